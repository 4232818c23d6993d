//! The daemon's story: parse, open, serve, exit code.

use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tracing::Level;
use vublk::args::{CAPABILITIES, EngineChoice, Keep, LogLevel, Meant, Socket, Typed};
use vublk::control::succession::{Resume, TakenOver, take_over, without_state};
use vublk::control::{Control, ControlError, Ended, Source};
use vublk::device::Device;
use vublk::disk::Disk;
use vublk::engine::uring::Uring;
use vublk::keep::{Keeper, STORED};
use vublk::listen::OwnPath;
use vublk::promise::Promise;
use vublk::rpc::Server;
use vublk::session::Session;
use vublk::session::state::RestoreError;
use vublk::signals::Signals;
use vublk::supervise::{self, HANDED_OVER};
use vublk::workers::{EngineKind, Options, Workers};
use vublk::{listen, memory, sys};

/// Exit codes; 2 is clap's, for a command line that makes no sense.
const CANNOT_SERVE: u8 = 1;
const USAGE: u8 = 2;
const GAVE_UP: u8 = 3;
/// systemd starts the next daemon at once, which is right after a crash, and would be
/// a loop where the disk is gone.
const PAUSE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    // The parent may have blocked them for itself. Until the signalfd reads them, they end this process.
    let usual = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGALRM, libc::SIGTSTP];
    if let Err(e) = sys::unblock_signals(&usual) {
        complain(&format!("cannot be stopped while it starts: {e}"));
    }
    if std::env::args_os().any(|a| a == "--print-capabilities") {
        // A broken pipe is the reader's choice, not an error of ours.
        let _printed = writeln!(std::io::stdout(), "{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    if std::env::args_os().any(|a| a == "--print-state-version") {
        let _printed = writeln!(std::io::stdout(), "{}", vublk::session::state::VERSION);
        return ExitCode::SUCCESS;
    }
    // Those of the socket unit, and those that an earlier daemon had kept.
    let (stored, sockets): (Vec<(i32, String)>, Vec<_>) = sd_notify::listen_fds_with_names()
        .map(Iterator::collect::<Vec<_>>)
        .unwrap_or_default()
        .into_iter()
        .partition(|(_, name)| name.starts_with(STORED));
    let listen_fds: Vec<i32> = sockets.into_iter().map(|(fd, _)| fd).collect();
    let meant = match Typed::parse().mean(&listen_fds) {
        Ok(meant) => meant,
        Err(why) => {
            complain(&why);
            return ExitCode::from(USAGE);
        }
    };
    log_to_stderr(meant.log_level);
    if let Err(e) = sys::raise_descriptor_limit() {
        tracing::debug!("cannot raise the limit of open files: {e}");
    }
    if meant.supervise {
        return match supervise::run(std::env::args_os().skip(1)) {
            Ok(code) => ExitCode::from(code),
            Err(why) => {
                complain(&format!("cannot start the daemon: {why}"));
                ExitCode::from(CANNOT_SERVE)
            }
        };
    }
    let keep = meant.keep;
    match serve(meant, stored) {
        // To systemd a hand-over is a stop like any other.
        Ok(Ended::HandedOver) if keep == Keep::Supervisor => ExitCode::from(HANDED_OVER),
        Ok(_) => ExitCode::SUCCESS,
        Err(why) => {
            complain(&why.to_string());
            if keep == Keep::Systemd {
                std::thread::sleep(PAUSE);
            }
            ExitCode::from(if why.downcast_ref().is_some_and(|e| matches!(e, ControlError::GaveUp)) {
                GAVE_UP
            } else {
                CANNOT_SERVE
            })
        }
    }
}

fn complain(why: &str) {
    let _nobody_reads = writeln!(std::io::stderr(), "vublkd: {why}");
}

fn log_to_stderr(level: LogLevel) {
    let level = match level {
        LogLevel::Error => Level::ERROR,
        LogLevel::Warn => Level::WARN,
        LogLevel::Info => Level::INFO,
        LogLevel::Debug => Level::DEBUG,
        LogLevel::Trace => Level::TRACE,
    };
    let lines = tracing_subscriber::fmt()
        .with_max_level(level)
        // A log that cannot be written (a full disk, a reader that left) would
        // be complained about there, which panics: a VM's disk is worth more.
        .log_internal_errors(false)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        lines.without_time().init(); // the journal has its own
    } else {
        lines.init();
    }
}

/// Where front-ends come from: a socket that is there, or is to be made once
/// the disk is ready.
enum Given<'a> {
    Socket(Source),
    Path(&'a Path),
}

fn serve(meant: Meant, stored: Vec<(i32, String)>) -> Result<Ended, Box<dyn std::error::Error>> {
    let stdin = || std::io::stdin().as_fd().try_clone_to_owned();
    let some = |(keeper, left)| (Some(keeper), left);
    let (keeper, left) = match meant.keep {
        // It is no reason not to serve.
        Keep::Itself => {
            let warn =
                |e: &std::io::Error| tracing::warn!("vublk upgrade will not work, nothing is kept: {e}");
            (Keeper::here().inspect_err(warn).ok(), None)
        }
        Keep::CarriedOver => Keeper::handed(stdin()?).map(some)?,
        Keep::Supervisor => Keeper::supervised(stdin()?).map(some)?,
        Keep::Systemd => {
            let fds = stored.into_iter().filter_map(|(fd, name)| Some((name, sys::inherited_fd(fd)?)));
            Keeper::systemd(fds).map(some)?
        }
    };
    let taking_over = left.as_ref().is_some_and(|left| !left.fds.is_empty());
    // Whether somebody serves here comes first: to wait at the fence for a
    // daemon that is alive would be to wait forever.
    let (given, name) = match &meant.socket {
        // An earlier process of ours listens, for whoever goes on.
        Socket::Path(path) if taking_over => {
            (Given::Path(path), std::path::absolute(path)?.display().to_string())
        }
        Socket::Path(path) => {
            listen::check(path, "--socket-path")?;
            (Given::Path(path), std::path::absolute(path)?.display().to_string())
        }
        Socket::Fd(fd) => {
            let source = Source::from_fd(*fd)?;
            let name = source.name(meant.disk.read_only);
            (Given::Socket(source), name)
        }
    };
    let engine = engine(&meant)?;
    let mut disk_options = meant.disk;
    disk_options.instance = name;
    let disk = Disk::open(&disk_options, &|| match &given {
        Given::Path(path) => !taking_over && listen::check(path, "--socket-path").is_err(),
        Given::Socket(_) => false,
    })?;
    let TakenOver { listener, mut resume, promise, write_back, sync_failed } = match left {
        Some(left) => {
            let known = without_state(&left);
            match take_over(left, &disk, &meant.promise) {
                // A supervisor has the old program yet; systemd has not.
                Err(e @ RestoreError::Version) if meant.keep == Keep::Systemd => {
                    tracing::error!(
                        "cannot go on where an earlier vublkd left off, the connection is closed: {e}"
                    );
                    known
                }
                taken => taken?,
            }
        }
        None => TakenOver::default(),
    };
    let promise = match promise {
        Some(promise) => promise,
        None => {
            disk.check_format(&disk_options)?;
            Promise::new(&disk, &meant.promise)?
        }
    };
    let mode_is_settled = write_back.is_some();
    // A guest that arrives by migration may have been told that its writes are durable.
    if write_back.is_none() && meant.write_back && disk_options.incoming {
        tracing::info!(
            "--incoming: write-through until the guest chooses write-back, whatever it had before"
        );
    }
    let write_back = write_back.unwrap_or(meant.write_back && !disk_options.incoming);

    // From here on signals are read, not delivered: before the first thread.
    let signals = Arc::new(Signals::new(meant.stop_timeout)?);
    let memory_lost = sys::eventfd()?;
    memory::fault::install(memory_lost.try_clone()?)?;
    let in_memory = disk.backing.in_memory;
    let sync_failed = sync_failed || disk.lost_writes;
    let device = Arc::new(Device::new(disk, promise, meant.workers, write_back)?);
    if sync_failed {
        device.durability.set_sync_failed();
    }
    let pin_memory = meant.pin_memory && matches!(engine, EngineKind::Uring(_)) && !in_memory;
    if meant.pin_memory && !pin_memory {
        tracing::warn!("--pin-memory has no effect here: it is for io_uring on a disk that is not memory");
    }
    let options =
        Options { count: meant.workers, queues: meant.queues, engine, pin_memory, tuning: meant.tuning };
    let workers = Workers::new(options, Arc::clone(&device), Arc::clone(&signals))?;
    let mut session = Session::new(Arc::clone(&device), workers, Arc::clone(&signals), meant.queues, keeper);
    if mode_is_settled {
        session.settle_mode();
    }
    if sync_failed {
        session.hold_image();
    }

    let source = match (given, listener) {
        (Given::Socket(source), _) => source,
        (Given::Path(path), Some(listener)) => match OwnPath::taken_over(path) {
            Some(own) => Source::Listener(listener, Some(own)),
            None => {
                resume.iter_mut().for_each(Resume::listens_anew);
                Source::listen(path)? // it is not there any more
            }
        },
        (Given::Path(path), None) => Source::listen(path)?,
    };
    tracing::info!(
        "serving {} ({} bytes, block {}{}) on {}",
        disk_options.path.display(),
        promise.bytes(),
        promise.block,
        if promise.read_only { ", read-only" } else { "" },
        source.name(promise.read_only),
    );
    let rpc = control_socket(meant.control.as_deref(), &source).inspect_err(|_| {
        if let Source::Listener(_, Some(own)) = &source {
            own.remove();
        }
    })?;
    let _not_under_systemd = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let mut control = Control::new(device, signals, session, memory_lost, rpc);
    let ended = control.serve(source, resume);
    if let Err(ControlError::GaveUp) = &ended {
        // The workers hang in the kernel: no destructor may wait for them.
        complain(&ControlError::GaveUp.to_string());
        std::process::exit(GAVE_UP.into());
    }
    Ok(ended?)
}

/// The control socket: where it was asked for, or beside the disk's socket, where
/// it is no reason not to serve if it cannot be made.
fn control_socket(wanted: Option<&Path>, source: &Source) -> Result<Option<Server>, listen::ListenError> {
    let Some(path) = wanted else {
        let (Source::Listener(..), Some(beside)) = (source, source.path()) else { return Ok(None) };
        let mut name = beside.into_os_string();
        name.push(".control");
        return Ok(Server::listen(Path::new(&name))
            .inspect_err(|e| {
                tracing::warn!("no control socket, vublk status, resize and upgrade do not work: {e}")
            })
            .ok());
    };
    Server::listen(path).map(Some)
}

/// The engine to use, and a word about it if it is not the best.
fn engine(meant: &Meant) -> Result<EngineKind, Box<dyn std::error::Error>> {
    let uring = EngineKind::Uring(meant.uring.clone());
    Ok(match (meant.engine, Uring::probe()) {
        (EngineChoice::Threads, _) => EngineKind::Threads,
        (EngineChoice::Null, _) => {
            tracing::warn!("--engine=null: nothing is read or written");
            EngineKind::Null
        }
        (EngineChoice::Auto | EngineChoice::IoUring, Ok(())) => uring,
        (EngineChoice::Auto, Err(e)) => {
            tracing::warn!("io_uring is not available here ({e}): using --engine=threads, which is slower");
            EngineKind::Threads
        }
        (EngineChoice::IoUring, Err(e)) => {
            return Err(format!(
                "io_uring is not available here: {e}. Allow it (sysctl kernel.io_uring_disabled=0, or in the \
                 container's seccomp profile), or use --engine=threads"
            )
            .into());
        }
    })
}
