//! The parent of the daemon: the store that vublkd brings itself where systemd's is not.
//!
//! What it is: it starts the daemon, holds the descriptors that a successor needs, starts a successor when the daemon
//! died or asks for one, and passes signals on. It speaks the protocol of systemd's store ([`crate::store`]).
//!
//! What it is not: it opens no disk, maps nothing and knows no message of a front-end; there is
//! nothing in it that a guest could reach.
//!
//! Invariants: a daemon is started only when the one before it is gone, and with
//! everything that was stored up to its end. Once one has served, another comes however
//! often they die, at a pace that grows while they get nothing done. A daemon that does not stop in time is killed.
//!
//! ```text
//!   daemon: X_VUBLKD_UPGRADE ─► the program is judged ─► the daemon drains, ends with RESTART
//!     ─► the new program is started as a daemon ─► READY=1: this process executes it, too, in its place
//!                                               └► it ends: the program of this process is started again
//! ```

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::io::FdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};

use crate::keep::file::STATS;
use crate::program::Program;
use crate::session::state::VERSION;
use crate::store::{self, Inherited, MADE, NOTIFY, SOCKET, TRIAL, VARIABLE};
use crate::workers::wait_for;
use crate::{log, sandbox, sys, watchdog};

/// The daemon's exit code when it stopped for a successor (sysexits.h: EX_TEMPFAIL, "try again").
pub const RESTART: u8 = 75;
/// The daemon's exit code when it did not wait for the disk any longer.
pub const GAVE_UP: u8 = 3;

/// The pause before a successor; doubled, up to the second, each time that a daemon got nothing done.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A daemon that lived so long was no failure.
const LONG_LIFE: Duration = Duration::from_secs(60);
/// How long a daemon may take to stop, besides `--stop-timeout-ms`, until it is killed.
const STOP_MARGIN: Duration = Duration::from_millis(500);
/// How long a new program may take to serve: nothing is in flight that it would wait for.
const TRIAL_TIME: Duration = Duration::from_secs(20);
/// Descriptors that starting a daemon takes, and some.
const SPARE: usize = 8;
/// Descriptors that are held for a daemon: 256 queues with three each, 509 regions, and a message of each kind.
const MOST: usize = 4096;
/// The name of the daemon's process, for a parent that was executed while it served.
const DAEMON: &str = "daemon-";
/// Where the program was that was started first: there an upgrade finds the next one.
const INSTALLED: &str = "VUBLKD_INSTALLED";
/// Why the last upgrade did not take place, for the status of the daemon that serves on.
pub const REFUSED: &str = "VUBLKD_REFUSED";

/// See the head of the file.
#[derive(Debug)]
struct Parent {
    /// Where a new program is installed.
    installed: PathBuf,
    args: Vec<OsString>,
    signals: OwnedFd,
    /// Those that this process was started with, for every daemon.
    sockets: Vec<(String, OwnedFd)>,
    stored: BTreeMap<String, OwnedFd>,
    stop_timeout: Duration,
    /// A program that has been judged, and then the one of a daemon that has not served yet.
    next: Option<Program>,
    /// The daemon runs it.
    on_trial: bool,
    /// Why the last one was not taken.
    refused: Option<String>,
    /// A daemon has served, and this one does.
    served: bool,
    serving: bool,
    /// It has said that it ends, for its own reasons.
    ending: bool,
    /// When SIGTERM or SIGINT came.
    stopping: Option<Instant>,
    /// Places among the descriptors, for what a start takes.
    spare: Vec<OwnedFd>,
    /// Requests that daemons had answered when the last one began.
    answered: u64,
    pause: Duration,
    /// The service manager's patience, and when it last heard of this process itself.
    watchdog: Option<Duration>,
    heard: Instant,
}

/// A process that serves, or is about to.
#[derive(Debug)]
struct Daemon {
    pid: Pid,
    ended: OwnedFd,
    /// Our end of its notify socket; `None` once it has closed its own.
    socket: Option<OwnedFd>,
    started: Instant,
    /// When it was sent SIGKILL, for not stopping or not serving in time.
    killed: Option<Instant>,
}

/// Runs the daemon, and its successors, until one ends by itself or is stopped; gives its exit code. `sandbox`: whether
/// this process gives up what it does not need, either.
///
/// # Errors
/// When it cannot be started.
pub fn run(mut inherited: Inherited, stop_timeout: Duration, sandbox: sandbox::Mode) -> io::Result<u8> {
    let forwarded = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGHUP];
    let sockets = inherited.split(|name| name.split('@').next() == Some(SOCKET) || name.starts_with(MADE));
    let notify = inherited.split(|name| name == NOTIFY).pop();
    let mut parent = Parent {
        installed: std::env::var_os(INSTALLED).map_or_else(Program::own_path, PathBuf::from),
        args: std::env::args_os().skip(1).collect(),
        signals: sys::block_signals(&forwarded)?,
        sockets,
        stored: inherited.split(|name| store::number(name).is_some()).into_iter().collect(),
        stop_timeout,
        next: None,
        on_trial: false,
        refused: None,
        served: false,
        serving: false,
        ending: false,
        stopping: None,
        spare: Vec::new(),
        answered: 0,
        pause: Duration::ZERO,
        watchdog: watchdog::patience(inherited.role),
        heard: Instant::now(),
    };
    // Of an upgrade: the daemon serves already, and the descriptor is that of its process.
    let mut daemon = match (inherited.split(|name| name.starts_with(DAEMON)).pop(), notify) {
        (Some((name, ended)), Some((_, socket))) => {
            (parent.serving, parent.served) = (true, true);
            let pid = name.strip_prefix(DAEMON).and_then(|pid| Pid::from_raw(pid.parse().ok()?));
            pid.map(|pid| Daemon { pid, ended, socket: Some(socket), started: Instant::now(), killed: None })
        }
        _ => None,
    };
    drop(inherited);
    if sandbox != sandbox::Mode::Off {
        sandbox::enter_as_parent();
        log::restart()?; // by a thread that has given up as much
    }
    loop {
        let daemon = match daemon.take().map_or_else(|| parent.start(), Ok) {
            Ok(daemon) => daemon,
            Err(e) if parent.served => {
                // Memory or processes ran out, say. What is stored is worth another try.
                tracing::error!("cannot start a daemon: {e}; trying again");
                parent.rest()?;
                if parent.stopping.is_some() {
                    return Ok(0);
                }
                continue;
            }
            Err(e) => return Err(e),
        };
        let status = parent.watch(daemon)?;
        if let Some(code) = parent.after(status)? {
            return Ok(code);
        }
    }
}

impl Parent {
    /// Starts a daemon with everything that is stored: the program that was judged, or our own.
    fn start(&mut self) -> io::Result<Daemon> {
        self.spare.clear();
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        (self.serving, self.ending, self.on_trial) = (false, false, self.next.is_some());
        self.answered = self.count();
        let program = self.next.as_ref().map_or_else(|| "/proc/self/exe".into(), Program::executable);
        let mut command = Command::new(program);
        command.env_remove("NOTIFY_SOCKET").env_remove(INSTALLED);
        if self.on_trial {
            command.env(TRIAL, "1");
        } else {
            command.env_remove(TRIAL);
        }
        match &self.refused {
            Some(why) => command.env(REFUSED, why),
            None => command.env_remove(REFUSED),
        };
        let child = self.with(&mut command, &[(NOTIFY, theirs.as_fd())], Command::spawn);
        let mut child = match child {
            Err(e) if self.on_trial => {
                self.refuse(&format!("cannot be started: {e}"));
                return self.start();
            }
            child => child?,
        };
        let pid = Pid::from_child(&child);
        let ended = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(ended) => ended,
            Err(e) => {
                // One that is not watched must not live beside the next.
                let _gone = child.kill();
                let _reaped = child.wait();
                return Err(e.into());
            }
        };
        self.spare.extend((0..SPARE).map_while(|_| self.signals.try_clone().ok()));
        Ok(Daemon { pid, ended, socket: Some(ours), started: Instant::now(), killed: None })
    }

    /// Runs `start` with a command that gets all descriptors of ours that a daemon needs, and `more`.
    fn with<T>(
        &self,
        command: &mut Command,
        more: &[(&str, BorrowedFd<'_>)],
        start: impl FnOnce(&mut Command) -> T,
    ) -> T {
        let ours = self.sockets.iter().map(|(name, fd)| (name.as_str(), fd.as_fd()));
        let stored = self.stored.iter().map(|(name, fd)| (name.as_str(), fd.as_fd()));
        let program = self.next.iter().map(|program| ("program", program.as_fd()));
        let all: Vec<_> = ours.chain(stored).chain(program).chain(more.iter().copied()).collect();
        let set = |flags| {
            for (_, fd) in &all {
                let _it_is_open = rustix::io::fcntl_setfd(fd, flags);
            }
        };
        command.arg0("vublkd").args(&self.args);
        command.env(VARIABLE, store::variable(std::process::id(), all.iter().copied()));
        // Inherited under the numbers that they have here, and only by this one.
        set(FdFlags::empty());
        let started = start(command);
        set(FdFlags::CLOEXEC);
        started
    }

    /// Until the daemon is gone.
    fn watch(&mut self, mut daemon: Daemon) -> io::Result<ExitStatus> {
        loop {
            // In this order, so that what was sent before a signal is known when the signal is taken.
            let signalled = sys::readable_within(&self.signals, Duration::ZERO)?;
            let gone = sys::readable_within(&daemon.ended, Duration::ZERO)?;
            // Once it is gone, what it sent before is all there is.
            self.take_messages(&mut daemon, gone);
            if gone {
                while self.take_signal(Some(&daemon)) {}
                if daemon.started.elapsed() >= LONG_LIFE {
                    self.pause = Duration::ZERO;
                }
                let status = waitpid(Some(daemon.pid), WaitOptions::empty())?;
                let raw = status.map_or(0, |(_, status)| status.as_raw());
                return Ok(ExitStatus::from_raw(raw));
            }
            if self.serving && self.on_trial && self.stopping.is_none() {
                self.become_next(&daemon);
            }
            if signalled && self.take_signal(Some(&daemon)) {
                continue;
            }
            let is_new = self.on_trial && !self.serving;
            let until = match (daemon.killed, self.stopping) {
                (Some(at), _) => Some(at + STOP_MARGIN).filter(|_| self.stopping.is_some()),
                (None, Some(at)) => Some(at + self.stop_timeout + STOP_MARGIN),
                (None, None) => is_new.then_some(daemon.started + TRIAL_TIME),
            };
            if until.is_some_and(|until| until <= Instant::now()) {
                if daemon.killed.is_some() {
                    tracing::error!("the daemon was killed and does not end: the kernel waits for its disk");
                    return Ok(ExitStatus::from_raw(libc::SIGKILL));
                }
                tracing::error!(
                    "the daemon does not {} in time, it is killed",
                    if is_new { "serve" } else { "stop" }
                );
                daemon.killed = Some(Instant::now());
                let _gone = kill_process(daemon.pid, Signal::KILL);
                continue;
            }
            let word = if self.serving { None } else { self.pulse() };
            let until = until.into_iter().chain(word).min();
            let mut fds = vec![daemon.ended.as_fd(), self.signals.as_fd()];
            fds.extend(daemon.socket.as_ref().map(AsFd::as_fd));
            wait_for(&fds, until.map(|at| at.saturating_duration_since(Instant::now())))?;
        }
    }

    /// What this process does after a daemon's end: `Some` exit code ends it, `None` starts another daemon.
    fn after(&mut self, status: ExitStatus) -> io::Result<Option<u8>> {
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        if self.stopping.is_some() {
            return Ok(Some(match (code, status.signal()) {
                (Some(RESTART), _) | (_, Some(libc::SIGTERM | libc::SIGINT)) => 0,
                (_, Some(libc::SIGKILL)) => GAVE_UP,
                _ => code.unwrap_or(1),
            }));
        }
        let how = match status.signal() {
            Some(libc::SIGSYS) => {
                "made a system call that its sandbox does not know, and was killed (journalctl -k says \
                                   which; please report it; --sandbox=log lets it through)"
                    .into()
            }
            Some(signal) => format!("was killed by signal {signal}"),
            None => format!("ended with {}", code.unwrap_or(1)),
        };
        if self.on_trial && !self.serving {
            self.refuse(&format!("the daemon that ran it {how} before it served"));
            return Ok(None);
        }
        match code {
            Some(0) => return Ok(Some(0)),
            Some(RESTART) => {
                tracing::info!("the daemon stopped for its successor");
                return Ok(None);
            }
            code if !self.served => {
                if status.signal().is_some() {
                    tracing::error!("the daemon {how} before it served");
                }
                return Ok(Some(code.unwrap_or(1)));
            }
            Some(code) if self.ending => return Ok(Some(code)),
            _ => {}
        }
        if !self.on_trial && self.next.is_some() {
            self.refuse(&format!("the daemon that was to make room for it {how}"));
        }
        if self.count() > self.answered {
            self.pause = Duration::ZERO;
        }
        if self.pause.is_zero() {
            tracing::error!("the daemon {how}, another goes on");
            self.pause = SHORTEST_PAUSE;
        } else {
            tracing::error!(
                "the daemon {how} and had got nothing done, another goes on in {} ms",
                self.pause.as_millis()
            );
            self.rest()?;
        }
        Ok((self.stopping.is_some()).then_some(0))
    }

    /// Waits before another try, unless a signal asks to stop.
    fn rest(&mut self) -> io::Result<()> {
        let until = Instant::now() + self.pause.max(SHORTEST_PAUSE);
        while self.stopping.is_none() && Instant::now() < until {
            let wake = self.pulse().map_or(until, |word| word.min(until));
            wait_for(&[self.signals.as_fd()], Some(wake.saturating_duration_since(Instant::now())))?;
            while self.take_signal(None) {}
        }
        self.pause = (self.pause.max(SHORTEST_PAUSE) * 2).min(LONGEST_PAUSE);
        Ok(())
    }

    /// Answers the service manager's watchdog while no daemon serves, which may take as long as a disk does; gives the time
    /// of the next word.
    fn pulse(&mut self) -> Option<Instant> {
        let every = self.watchdog? / 2;
        if self.heard + every <= Instant::now() {
            self.heard = Instant::now();
            let _not_under_systemd = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
        }
        Some(self.heard + every)
    }

    /// Requests that daemons have answered, as they count them.
    fn count(&self) -> u64 {
        let states = self
            .stored
            .iter()
            .filter(|(name, _)| store::number(name).is_some_and(|(id, _)| id == crate::keep::STATE));
        let read = |fd: &OwnedFd| {
            let state = File::from(fd.try_clone().ok()?);
            let mut bytes = [0; crate::stats::WORKERS];
            state.read_exact_at(&mut bytes, STATS).ok()?;
            Some(crate::stats::requests(&bytes))
        };
        states.filter_map(|(_, fd)| read(fd)).fold(0, u64::wrapping_add)
    }

    /// All that have come; of a new program that serves and lives, those up to that word: the program that this process
    /// becomes then takes the others, which may ask for the next upgrade.
    fn take_messages(&mut self, daemon: &mut Daemon, gone: bool) {
        while let Some(socket) = &daemon.socket {
            if !gone && self.serving && self.on_trial && self.stopping.is_none() {
                return;
            }
            match store::receive(socket) {
                // A daemon that asks for more is not the one that was started.
                Ok(Some(_)) if self.stored.len() >= MOST => daemon.socket = None,
                Ok(Some((text, fd))) => {
                    if let Some(answer) = self.take_message(&text, fd, &daemon.ended) {
                        let _gone = store::send(socket, &answer, &[]);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if sys::is_out_of_descriptors(&e) => {
                    tracing::error!(
                        "cannot hold what a successor needs, descriptors have run out: raise LimitNOFILE= or ulimit -n"
                    );
                    daemon.socket = None; // by which the daemon knows
                }
                Ok(None) | Err(_) => daemon.socket = None,
            }
        }
    }

    /// Does what a message says; gives the answer of those that have one.
    fn take_message(&mut self, text: &str, fd: Option<OwnedFd>, daemon: &OwnedFd) -> Option<String> {
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let name = value("FDNAME").filter(|name| store::number(name).is_some());
        match (name, fd) {
            (Some(name), Some(fd)) if value("FDSTORE").is_some() => {
                sys::close_foreign(self.stored.insert(name.to_owned(), fd));
            }
            (Some(name), None) if value("FDSTOREREMOVE").is_some() => {
                sys::close_foreign(self.stored.remove(name))
            }
            (None, None) if value("X_VUBLKD_UPGRADE").is_some() => {
                let path = value("PATH").map(Path::new);
                return Some(self.judge(path, daemon).err().unwrap_or_else(|| "OK".into()));
            }
            (None, None) if value("READY").is_some() => {
                (self.serving, self.served) = (true, true);
                let _not_under_systemd = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
            }
            (None, None) if value("STOPPING").is_some() => self.ending = true,
            (None, None) if value("WATCHDOG").is_some() => {
                self.heard = Instant::now();
                let _not_under_systemd = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
            }
            // A barrier is done once it is read.
            (_, fd) => sys::close_foreign(fd),
        }
        None
    }

    /// Takes a signal, and passes it on to a daemon if there is one. False: none has arrived.
    fn take_signal(&mut self, daemon: Option<&Daemon>) -> bool {
        let Some(number) = sys::next_signal(&self.signals) else { return false };
        let Some(signal) = i32::try_from(number).ok().and_then(Signal::from_named_raw) else { return true };
        if matches!(signal, Signal::TERM | Signal::INT) && self.stopping.is_none() {
            self.stopping = Some(Instant::now());
            let _not_under_systemd = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        }
        if let Some(daemon) = daemon {
            let judged = if signal == Signal::USR2 { self.judge(None, &daemon.ended) } else { Ok(()) };
            match judged {
                Ok(()) => drop(kill_process(daemon.pid, signal)),
                Err(why) => tracing::error!("no upgrade: {why}; the daemon goes on"),
            }
        }
        true
    }

    /// Whether the daemon may make room for this program, or for the one where vublkd is installed.
    fn judge(&mut self, path: Option<&Path>, daemon: &OwnedFd) -> Result<(), String> {
        if self.on_trial {
            return Err("another upgrade is under way".into());
        }
        let program = Program::open(path.unwrap_or(&self.installed))?;
        program.may_follow(VERSION, Some(daemon.as_fd()))?;
        self.refused = None;
        self.next = Some(program);
        Ok(())
    }

    /// A program that does not serve is not tried again.
    fn refuse(&mut self, why: &str) {
        if let Some(program) = self.next.take() {
            let why = format!("{}: {why}", program.path().display());
            tracing::error!("no upgrade: {why}; the old program goes on");
            self.refused = Some(why);
            self.on_trial = false;
        }
    }

    /// Executes the program whose daemon serves, in place of this one; that daemon stays our child.
    fn become_next(&mut self, daemon: &Daemon) {
        let Some(socket) = &daemon.socket else { return };
        let name = format!("{DAEMON}{}", daemon.pid.as_raw_nonzero());
        let Some(program) = self.next.as_ref().map(Program::executable) else { return };
        let mut command = Command::new(program);
        command.env(INSTALLED, &self.installed).env_remove(TRIAL).env_remove(REFUSED);
        let more = [(name.as_str(), daemon.ended.as_fd()), (NOTIFY, socket.as_fd())];
        // It ends the thread that writes the log.
        log::flush();
        let e = self.with(&mut command, &more, CommandExt::exec);
        tracing::error!("the parent stays the old program, it cannot execute the new one: {e}");
        self.next = None;
        self.on_trial = false;
    }
}
