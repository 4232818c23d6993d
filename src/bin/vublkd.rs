//! The command `vublkd`: parses its command line, opens the disk, serves, and ends with an exit code.

use std::io::{IsTerminal, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use vublk::args::{CAPABILITIES, EngineChoice, Keep, Meant, Socket, Typed};
use vublk::control::{Control, ControlError, DaemonEnd, Source};
use vublk::device::Device;
use vublk::disk::Disk;
use vublk::engine::uring::Uring;
use vublk::keep::{self, Keeper, Predecessor};
use vublk::link::Link;
use vublk::listen::{ListenError, OwnPath, beside};
use vublk::metrics::server::Place;
use vublk::metrics::{self, Metrics};
use vublk::process::Process;
use vublk::program::Program;
use vublk::promise::Promise;
use vublk::rpc::Server;
use vublk::session::state::{READS, RestoreError};
use vublk::session::{Session, judge};
use vublk::signals::{self, Signals};
use vublk::stats::Event;
use vublk::store::{self, Inherited, Role, Store};
use vublk::succession::{Resume, Succession, TakenOver, take_over, without_state};
use vublk::supervise::{self, GAVE_UP, RESTART};
use vublk::user::{self, UserError};
use vublk::watchdog::Watchdog;
use vublk::workers::{EngineKind, Options, Workers};
use vublk::{listen, log, memory, sandbox, sys};

/// Exit codes; 2 is clap's, for a command line that makes no sense.
const CANNOT_SERVE: u8 = 1;
const USAGE: u8 = 2;
/// systemd starts the next daemon at once, which is right after a crash, and would be
/// a loop where the disk is gone.
const PAUSE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    // The first thing: before a thread starts, and before a signal can end what only starts or waits.
    let blocked = signals::block();
    if std::env::args_os().any(|a| a == "--print-capabilities") {
        // A broken pipe is the reader's choice, not an error of ours.
        let _printed = writeln!(std::io::stdout(), "{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    if std::env::args_os().any(|a| a == "--print-state-version") {
        let layouts = READS.map(|layout| layout.to_string()).join(" ");
        let _printed = writeln!(std::io::stdout(), "{layouts}");
        return ExitCode::SUCCESS;
    }
    if let Err(e) = blocked.and_then(|()| log::start()) {
        let _printed = writeln!(
            std::io::stderr(),
            "vublkd: cannot start the thread that writes the log: {e}. Raise TasksMax=, pids.max or ulimit -u"
        );
        return ExitCode::from(CANNOT_SERVE);
    }
    let code = run();
    log::flush();
    code
}

fn run() -> ExitCode {
    // A program that was executed by its descriptor is called after that.
    let _for_ps = rustix::thread::set_name(c"vublkd");
    let mut inherited = Inherited::take();
    let role = inherited.role;
    if role == Role::Orphan {
        log::complain("its parent ended while it started; nothing is served. Start vublkd anew");
        return ExitCode::from(CANNOT_SERVE);
    }
    let sockets = inherited.fds.iter().filter(|(name, _)| is_socket(role, name)).count();
    let mut typed = match Typed::try_parse() {
        Ok(typed) => typed,
        Err(e) if e.use_stderr() => {
            let text = e.render();
            let colours = std::io::stderr().is_terminal();
            log::say(if colours { text.ansi().to_string() } else { text.to_string() });
            return ExitCode::from(USAGE);
        }
        Err(help_or_version) => help_or_version.exit(),
    };
    if role != Role::First && sockets > 0 {
        typed.fd = None; // it is among them
    }
    let meant = match typed.mean(sockets) {
        Ok(meant) => meant,
        Err(why) => {
            log::complain(why);
            return ExitCode::from(USAGE);
        }
    };
    // Before a descriptor of our own can get its number.
    if let Socket::Fd(number) = meant.socket {
        let Some(fd) = sys::inherited_fd(number) else {
            log::complain(ControlError::BadFd(number, "is not open"));
            return ExitCode::from(CANNOT_SERVE);
        };
        inherited.fds.push((store::SOCKET.to_owned(), fd));
    }
    log::subscribe(meant.log_level.into());
    if let Err(e) = sys::raise_descriptor_limit() {
        tracing::debug!("cannot raise the limit of open files: {e}");
    }
    let made = match become_user(&meant, &mut inherited) {
        Ok(made) => made,
        Err(why) => {
            log::complain(&why);
            let is_usage = why.downcast_ref().is_some_and(UserError::is_usage);
            return ExitCode::from(if is_usage { USAGE } else { CANNOT_SERVE });
        }
    };
    if meant.keep == Keep::Parent && role != Role::Daemon {
        for (name, _) in inherited.fds.iter_mut().filter(|(name, _)| is_socket(role, name)) {
            *name = store::SOCKET.to_owned();
        }
        let ended = supervise::run(inherited, meant.stop_timeout, meant.sandbox);
        if let Socket::Path(path) = &meant.socket {
            // Of a daemon that was killed, or had ended for a successor when the stop came.
            listen::remove_stale(path);
            listen::remove_stale(&meant.control.unwrap_or_else(|| beside(path)));
        }
        if let Some(Place::Unix(path)) = &meant.metrics {
            listen::remove_stale(path);
        }
        return match ended {
            Ok(code) => ExitCode::from(code),
            Err(why) => {
                log::complain(format_args!("cannot start the daemon: {why}"));
                ExitCode::from(CANNOT_SERVE)
            }
        };
    }
    if let Err(e) = signals::let_end() {
        log::complain(format_args!("cannot be stopped while it starts: {e}"));
    }
    let keep = meant.keep;
    match serve(meant, inherited) {
        Ok(DaemonEnd::Stopped) => ExitCode::SUCCESS,
        // The store starts a successor, or systemd drops what is stored: it knows which.
        Ok(DaemonEnd::ForSuccessor { asked }) => ExitCode::from(if asked { RESTART } else { 0 }),
        Err(why) => {
            log::complain(&why);
            made.iter().for_each(|path| listen::remove_stale(path));
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

/// True for a listening or connected socket among what this process was started with, whatever its unit is called.
fn is_socket(role: Role, name: &str) -> bool {
    match role {
        Role::First => store::number(name).is_none() && !name.starts_with(store::MADE),
        Role::Parent | Role::Daemon | Role::Orphan => name == store::SOCKET,
    }
}

/// The store, what a predecessor kept there, and why that cannot be read if it cannot.
fn find_store(
    keep: Keep,
    inherited: &mut Inherited,
) -> std::io::Result<Option<(Keeper, Option<Predecessor>)>> {
    let fds = keep::stored(inherited.split(|name| store::number(name).is_some()));
    let store = match (keep, inherited.split(|name| name == store::NOTIFY).pop()) {
        (Keep::Nowhere, _) => return Ok(None),
        (Keep::Systemd, _) => Store::systemd(fds.clone())?,
        (Keep::Parent, Some((_, socket))) => Store::parent(socket)?,
        (Keep::Parent, None) => return Err(std::io::Error::other("the parent passed no socket")),
    };
    let (keeper, predecessor, unreadable) = Keeper::new(store, fds)?;
    if let Some(why) = unreadable {
        tracing::error!("cannot go on where an earlier vublkd left off, its connection is closed: {why}");
    }
    Ok(Some((keeper, predecessor)))
}

fn serve(meant: Meant, mut inherited: Inherited) -> Result<DaemonEnd, Box<dyn std::error::Error>> {
    let role = inherited.role;
    let mut made =
        |wanted| inherited.split(|name| name == wanted).pop().map(|(_, fd)| UnixListener::from(fd));
    let (made_socket, made_control) = (made(store::MADE_SOCKET), made(store::MADE_CONTROL));
    let made_metrics = inherited.split(|name| name == store::MADE_METRICS).pop().map(|(_, fd)| fd);
    let passed = inherited.split(|name| is_socket(role, name)).pop();
    let (keeper, predecessor) = find_store(meant.keep, &mut inherited)?.unzip();
    let predecessor = predecessor.flatten();
    drop(inherited);
    let succeeds = predecessor.as_ref().is_some_and(|p| !p.fds.is_empty());
    // First whether another daemon serves here: to wait at the fence for a
    // daemon that is alive would be to wait forever.
    let source = match (&meant.socket, passed) {
        (Socket::Path(path), _) => {
            if !succeeds && made_socket.is_none() {
                listen::check(path, "--socket-path")?;
            }
            None
        }
        (Socket::Fd(_) | Socket::Passed, Some((_, fd))) => Some(Source::from_fd(fd)?),
        (Socket::Fd(_) | Socket::Passed, None) => return Err("the socket that was passed is gone".into()),
    };
    let name = match (&meant.socket, &source) {
        (Socket::Path(path), _) => std::path::absolute(path)?.display().to_string(),
        (_, Some(source)) => source.name(meant.disk.read_only),
        (_, None) => String::new(),
    };
    if let Some(control) = meant.control.as_deref().filter(|_| !succeeds && made_control.is_none()) {
        listen::check(control, "--control")?;
    }
    let engine = engine(&meant)?;
    let mut disk_options = meant.disk;
    disk_options.instance = name;
    let disk = Disk::open(&disk_options, &|| match &meant.socket {
        // The one that was made is in no other daemon's place.
        Socket::Path(path) => {
            !succeeds && made_socket.is_none() && listen::check(path, "--socket-path").is_err()
        }
        Socket::Fd(_) | Socket::Passed => false,
    })?;
    let by_parent = |name| std::env::var(name).ok().filter(|_| role == Role::Daemon);
    let on_trial = by_parent(store::TRIAL).is_some();
    let has_predecessor = predecessor.is_some();
    let TakenOver { listener, mut resume, waiting, promise, write_back, sync_failed, had_stopped } =
        match predecessor {
            Some(predecessor) => {
                let known = without_state(&predecessor);
                match take_over(predecessor, &disk, &meant.promise) {
                    // The parent has the program yet that can read it, if this one is new.
                    Err(e @ RestoreError::Version) if !on_trial => {
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

    // From here on SIGTERM and SIGINT are read, too, and end nothing by themselves.
    let signals = Signals::new()?;
    // Opened while that is allowed.
    let _none_without_proc = judge::mounts();
    let link = Arc::new(Link::new(Arc::new(sys::eventfd()?), meant.stop_timeout)?);
    let memory_lost = sys::eventfd()?;
    memory::fault::install(memory_lost.try_clone()?)?;
    sys::allow_interrupts()?;
    let in_memory = disk.backing.in_memory;
    let sync_failed = sync_failed || disk.lost_writes;
    let device = Arc::new(Device::new(disk, promise, meant.workers, write_back)?);
    device.holding.choose(meant.on_error, link.waker());
    if sync_failed {
        device.durability.set_sync_failed();
    }
    if let Some(keeper) = &keeper {
        let (file, at) = keeper.sync_note()?;
        device.durability.note_failed_syncs(file, at);
        device.stats.keep_in(keeper.stats()?);
    }
    if has_predecessor {
        device.stats.note(if had_stopped { Event::Upgrade } else { Event::Crash }, 1);
    }
    let pin_memory = meant.pin_memory && matches!(engine, EngineKind::Uring(_)) && !in_memory;
    if meant.pin_memory && !pin_memory {
        tracing::warn!("--pin-memory has no effect here: it is for io_uring on a disk that is not memory");
    }
    let options =
        Options { count: meant.workers, queues: meant.queues, engine, pin_memory, tuning: meant.tuning };
    let workers = Workers::new(options, Arc::clone(&device), Arc::clone(&link))?;
    if !succeeds {
        // A successor has what its predecessor had, and its guest waits.
        enough_descriptors(&disk_options.path, meant.queues, meant.workers, keeper.as_ref())?;
    }
    let mut session = Session::new(Arc::clone(&device), workers, Arc::clone(&link), meant.queues);
    if mode_is_settled {
        session.settle_mode();
    }
    if sync_failed {
        session.hold_image();
    }

    if listener.is_none() {
        resume.iter_mut().for_each(Resume::listens_anew); // what a predecessor made is not there any more
    }
    let source = match (source, &meant.socket, listener.or(made_socket)) {
        (Some(source), ..) => source,
        (None, Socket::Path(path), Some(listener)) if let Some(own) = OwnPath::taken_over(path) => {
            Source::Listener(listener, Some(own))
        }
        (None, Socket::Path(path), listener) => {
            resume.iter_mut().for_each(Resume::listens_anew);
            Source::listen(path).or_else(|e| {
                // The user of --user may not make another. A front-end that is connected goes on.
                tracing::warn!(
                    "no front-end can connect: the socket was removed, and no other can be made: {e}"
                );
                listener.map(|listener| Source::Listener(listener, None)).ok_or(e)
            })?
        }
        (None, ..) => return Err("there is no socket".into()),
    };
    let rpc = control_socket(&meant.socket, meant.control.as_deref(), &source, made_control, role);
    let rpc = rpc.inspect_err(|_| {
        if let Source::Listener(_, Some(own)) = &source {
            own.remove();
        }
    })?;
    tracing::info!(
        "serving {} ({} bytes, block {}{}) on {}",
        disk_options.path.display(),
        promise.bytes(),
        promise.block,
        if promise.read_only { ", read-only" } else { "" },
        source.name(promise.read_only),
    );
    let parent = keeper.as_ref().map(Keeper::store).filter(|store| !store.is_systemd());
    let watchdog = Watchdog::new(role, parent)?;
    let succession = Succession::new(keeper, on_trial, by_parent(supervise::REFUSED))?;
    let control_socket = rpc.as_ref().map(Server::path);
    let control_socket_name = control_socket.as_deref().map(listen::disk_name);
    let mut control =
        Control::new(Arc::clone(&device), Arc::clone(&link), session, succession, control_socket);
    // The parent keeps its socket for all its daemons.
    let own = match &meant.metrics {
        Some(Place::Unix(path)) if role == Role::First => OwnPath::taken_over(path),
        _ => None,
    };
    let folders = rpc.iter().filter_map(Server::folder).chain(source.folder());
    let folders: Vec<_> = folders.chain(own.as_ref().map(OwnPath::folder)).collect();
    sandbox::enter(meant.sandbox, device.disk.backing.is_device.then(|| device.disk.file()), &folders);
    if meant.sandbox != sandbox::Mode::Off {
        log::restart()?;
        device.disk.start_claimer(|| sandbox::confine(sandbox::Role::Claim))?;
    }
    let _answers_until_the_end = match made_metrics {
        Some(listener) => {
            let name = control_socket_name.unwrap_or_else(|| source.name(promise.read_only));
            let disk = metrics::Disk { name, device: Arc::clone(&device), link: Arc::clone(&link) };
            Some(metrics::server::Server::start(listener, Metrics::new(vec![disk]), own)?)
        }
        None => None,
    };
    let process = Process { signals, memory_lost, rpc, watchdog, device, link };
    let ended = process.run(move || control.serve(source, resume, waiting));
    if let Err(ControlError::GaveUp) = &ended {
        // The workers hang in the kernel: no destructor may wait for them.
        log::complain(ControlError::GaveUp);
        log::flush();
        std::process::exit(GAVE_UP.into());
    }
    Ok(ended?)
}

/// Counts the descriptors that the queues, the workers and one front-end will need, before one
/// comes.
fn enough_descriptors(
    disk: &Path,
    queues: u16,
    workers: u16,
    keeper: Option<&Keeper>,
) -> Result<(), Box<dyn std::error::Error>> {
    // A kick, a call and an error descriptor; three for each worker's engine; those of a message,
    // and a few for connections.
    let mut needed = 3 * usize::from(queues) + 3 * usize::from(workers) + 32 + 24;
    if keeper.is_some_and(|keeper| keeper.store().is_systemd()) {
        needed += 3 * usize::from(queues) + 64; // copies, to know what systemd has
    }
    let (left, most) = sys::descriptors_left()?;
    if left < needed {
        return Err(format!(
            "{}: {queues} queues need {} open files, and the limit is {most}. Raise it (ulimit -n, LimitNOFILE=), or use \
             fewer --num-queues",
            disk.display(),
            needed + (most - left)
        )
        .into());
    }
    Ok(())
}

/// Where the control socket is to be, if there is to be one; true: it was asked for, so that it is a reason not to serve
/// if it cannot be made.
fn control_path(wanted: Option<&Path>, socket: &Socket, source: Option<&Source>) -> Option<(PathBuf, bool)> {
    let beside_it = || match (socket, source) {
        (Socket::Path(path), _) => Some(beside(path)),
        (_, Some(source @ Source::Listener(..))) => source.path().map(|path| beside(&path)),
        _ => None,
    };
    wanted.map(|path| (path.into(), true)).or_else(|| beside_it().map(|path| (path, false)))
}

/// Makes something of the control socket's path, or says why there will be none.
fn at_control_path<T>(
    (path, is_wanted): (PathBuf, bool),
    make: impl FnOnce(&Path) -> Result<T, ListenError>,
) -> Result<Option<T>, ListenError> {
    match make(&path) {
        Err(e) if !is_wanted => {
            tracing::warn!("no control socket, vublk status, resize, retry and upgrade do not work: {e}");
            Ok(None)
        }
        made => made.map(Some),
    }
}

/// The control socket, `made` already or not.
fn control_socket(
    socket: &Socket,
    wanted: Option<&Path>,
    source: &Source,
    made: Option<UnixListener>,
    role: Role,
) -> Result<Option<Server>, ListenError> {
    let Some(place) = control_path(wanted, socket, Some(source)) else { return Ok(None) };
    let Some(listener) = made else { return at_control_path(place, Server::listen) };
    // The parent keeps it for all its daemons.
    let own = if role == Role::First { OwnPath::taken_over(&place.0) } else { None };
    Ok(Some(Server::over(listener, &place.0, own)))
}

/// Becomes the user of `--user`, if it is another, once the sockets are made that this user may not be able to make; gives
/// their paths.
fn become_user(meant: &Meant, inherited: &mut Inherited) -> Result<Vec<PathBuf>, Box<dyn std::error::Error>> {
    if inherited.role != Role::First {
        return Ok(Vec::new()); // it is that user
    }
    let account = user::account(meant.user.as_deref(), meant.group.as_deref())?;
    let owner = account.as_ref().map(|account| (account.uid, account.gid));
    let mut made = make_sockets(meant, inherited, owner)?;
    let remove =
        |made: &[MadeSocket]| made.iter().filter_map(|(.., own)| own.as_ref()).for_each(OwnPath::remove);
    made.extend(make_metrics(meant, inherited, owner).inspect_err(|_| remove(&made))?);
    if let Some(account) = &account {
        account.assume().inspect_err(|_| remove(&made))?;
    }
    if account.is_some() && meant.keep == Keep::Parent {
        let program = Program::own_path();
        if let Err(why) = Program::open(&program) {
            tracing::warn!("vublk upgrade will not work, the user of --user may not read the program: {why}");
        }
    }
    let paths = made.iter().filter_map(|(.., own)| Some(own.as_ref()?.path().to_owned())).collect();
    inherited.fds.extend(made.into_iter().map(|(name, fd, _)| (name.to_owned(), fd)));
    Ok(paths)
}

/// A socket's name among those that are inherited, itself, and its place.
type MadeSocket = (&'static str, OwnedFd, Option<OwnPath>);

/// The socket of `--metrics`, which all daemons after this one have. A guest that waits for one gets its disk without.
fn make_metrics(
    meant: &Meant,
    inherited: &Inherited,
    owner: Option<(u32, u32)>,
) -> Result<Option<MadeSocket>, String> {
    let Some(place) = &meant.metrics else { return Ok(None) };
    match place.listen(owner) {
        Ok((listener, own)) => Ok(Some((store::MADE_METRICS, listener, own))),
        Err(why) if succeeds(inherited) => {
            tracing::error!("no metrics: {why}");
            Ok(None)
        }
        Err(why) => Err(why),
    }
}

/// True if an earlier daemon has left something.
fn succeeds(inherited: &Inherited) -> bool {
    inherited.fds.iter().any(|(name, _)| store::number(name).is_some())
}

/// The disk's socket, if it is not there yet, and the control socket, for the user of `--user` if there is one.
fn make_sockets(
    meant: &Meant,
    inherited: &Inherited,
    owner: Option<(u32, u32)>,
) -> Result<Vec<MadeSocket>, Box<dyn std::error::Error>> {
    if owner.is_none() {
        return Ok(Vec::new()); // each daemon may make its own
    }
    let succeeds = succeeds(inherited);
    let mut made: Vec<MadeSocket> = Vec::new();
    let mut source = None;
    match &meant.socket {
        Socket::Path(path) if !succeeds => {
            let (listener, own) = listen::listen(path, 0o660, owner, "--socket-path")?;
            made.push((store::MADE_SOCKET, listener.into(), Some(own)));
        }
        Socket::Path(_) => {}
        Socket::Fd(_) | Socket::Passed => {
            let passed = inherited.fds.iter().find(|(name, _)| is_socket(inherited.role, name));
            source = passed.map(|(_, fd)| Source::from_fd(fd.try_clone()?)).transpose()?;
        }
    }
    if let Some(place) = control_path(meant.control.as_deref(), &meant.socket, source.as_ref()) {
        let control = at_control_path(place, |path| listen::listen(path, 0o600, owner, "--control"))
            .inspect_err(|_| made.iter().filter_map(|(.., own)| own.as_ref()).for_each(OwnPath::remove))?;
        made.extend(control.map(|(listener, own)| (store::MADE_CONTROL, listener.into(), Some(own))));
    }
    Ok(made)
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
