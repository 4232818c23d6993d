//! `vublkd --supervise`: a small process that outlives the daemon.
//!
//! What it is: it starts the daemon, keeps the descriptors that a successor needs,
//! starts one when the daemon was killed or hands over, and passes signals on.
//!
//! What it is not: it opens no disk, maps nothing and knows no message; there is
//! nothing in it that a guest could reach.
//!
//! Invariants: a daemon is started only when the one before it is gone, and with
//! everything that was kept up to its end. One that has served comes back however
//! often it dies; one that never could serve does not.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::keep::FdId;
use crate::keep::packets::{Packet, hand_out, receive};
use crate::session::state::VERSION;
use crate::sys;
use crate::workers::wait_for;

/// The daemon's way to say that it stopped for a successor.
pub const HANDED_OVER: u8 = 4;
/// What the supervisor adds to the daemon's command line: standard input is its
/// socket.
pub const KEPT: &str = "--kept";

/// The pause before another try; doubled, up to the second, each time that a daemon
/// did not even begin to serve.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a program may take to say what it can go on from.
const CHECK_TIME: Duration = Duration::from_secs(1);

/// See the head of the file.
#[derive(Debug)]
struct Supervisor {
    /// Where the daemon's program is, which an upgrade may have replaced.
    program: PathBuf,
    /// Or this one, which somebody gave us.
    given: Option<OwnedFd>,
    /// That program does not work: use the one that we are.
    fall_back: bool,
    args: Vec<OsString>,
    signals: OwnedFd,
    kept: BTreeMap<FdId, OwnedFd>,
    /// The daemon has not closed its socket.
    listening: bool,
    /// This daemon serves, and one has.
    serving: bool,
    served: bool,
    /// SIGTERM or SIGINT came.
    stopping: bool,
}

/// Runs the daemon with these arguments until it ends by itself; gives its exit
/// code.
///
/// # Errors
/// When it cannot be started.
pub fn run(args: impl Iterator<Item = OsString>) -> io::Result<u8> {
    let forwarded = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGHUP];
    let mut supervisor = Supervisor {
        program: std::env::current_exe()?,
        given: None,
        fall_back: false,
        args: args.filter(|arg| arg != "--supervise").collect(),
        signals: sys::block_signals(&forwarded)?,
        kept: BTreeMap::new(),
        listening: true,
        serving: false,
        served: false,
        stopping: false,
    };
    let mut pause = SHORTEST_PAUSE;
    loop {
        if supervisor.stopping {
            return Ok(0); // while there was none to stop
        }
        let status = match supervisor.serve() {
            Ok(status) => status,
            Err(e) if supervisor.served => {
                // Memory or processes ran out, say. What is kept is worth another try.
                tracing::error!("cannot start a daemon: {e}; trying again");
                supervisor.rest(&mut pause)?;
                continue;
            }
            Err(e) => return Err(e),
        };
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        match (code, status.signal()) {
            (Some(HANDED_OVER), _) if supervisor.stopping => return Ok(0),
            (Some(HANDED_OVER), _) => {
                tracing::info!("the daemon stopped for its successor");
                continue;
            }
            (Some(0), _) => return Ok(0),
            // It was stopped before it had begun.
            (_, Some(libc::SIGTERM | libc::SIGINT)) if supervisor.stopping => return Ok(0),
            _ if supervisor.stopping => return Ok(code.unwrap_or(1)),
            _ if !supervisor.served => return Ok(code.unwrap_or(1)),
            (_, Some(signal)) => tracing::error!("the daemon was killed by signal {signal}, another goes on"),
            (code, None) => tracing::error!("the daemon ended with {}, another goes on", code.unwrap_or(1)),
        }
        if supervisor.serving {
            pause = SHORTEST_PAUSE;
        } else {
            // That program did not get as far as serving; perhaps the other one does.
            supervisor.fall_back = !supervisor.fall_back;
            supervisor.rest(&mut pause)?;
        }
    }
}

impl Supervisor {
    /// Waits before the next try, unless somebody asks to stop.
    fn rest(&mut self, pause: &mut Duration) -> io::Result<()> {
        wait_for(&[self.signals.as_fd()], Some(*pause))?;
        self.take_signals(None);
        *pause = (*pause * 2).min(LONGEST_PAUSE);
        Ok(())
    }

    /// One daemon's life.
    fn serve(&mut self) -> io::Result<ExitStatus> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let program = if self.fall_back { PathBuf::from("/proc/self/exe") } else { self.program() };
        let mut daemon = match self.command(&program).stdin(Stdio::from(theirs)).spawn() {
            Ok(daemon) => daemon,
            Err(e) if !self.fall_back && is_the_programs_fault(&e) => {
                tracing::error!("{}: cannot be started: {e}; going on with the old one", program.display());
                self.fall_back = true;
                return self.serve();
            }
            Err(e) => return Err(e),
        };
        let status = self.watch(&ours, &mut daemon);
        if status.is_err() {
            let _gone = daemon.kill();
            let _reaped = daemon.wait();
        }
        status
    }

    /// Until the daemon is gone.
    fn watch(&mut self, ours: &OwnedFd, daemon: &mut Child) -> io::Result<ExitStatus> {
        let ended = pidfd_open(Pid::from_child(daemon), PidfdFlags::empty())?;
        // A daemon that ends before it has read everything says why by its status.
        if let Err(e) = hand_out(ours, &self.kept) {
            tracing::warn!("the daemon does not take what is kept for it: {e}");
        }
        rustix::io::ioctl_fionbio(ours, true)?;
        self.listening = true;
        self.serving = false;
        loop {
            self.take_signals(Some(daemon));
            let gone = sys::readable_within(&ended, Duration::ZERO)?;
            // Once it is gone, what it sent before is all there is.
            self.take_packets(ours, daemon);
            if gone {
                return daemon.wait();
            }
            let mut fds = vec![ended.as_fd(), self.signals.as_fd()];
            if self.listening {
                fds.push(ours.as_fd());
            }
            wait_for(&fds, None)?;
        }
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.args(&self.args).arg(KEPT);
        command
    }

    fn take_packets(&mut self, socket: &OwnedFd, daemon: &Child) {
        loop {
            match receive(socket) {
                Ok(Some(Packet::Keep(id, fd))) => drop(self.kept.insert(id, fd)),
                Ok(Some(Packet::Forget(id))) => drop(self.kept.remove(&id)),
                Ok(Some(Packet::End | Packet::Stopped | Packet::Output(..))) => {}
                Ok(Some(Packet::Serving)) => (self.serving, self.served) = (true, true),
                Ok(Some(Packet::Succeed(program))) => self.succeed(daemon, program),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                    tracing::error!("cannot keep something for the daemon: descriptors have run out");
                }
                Ok(None) | Err(_) => {
                    self.listening = false;
                    return;
                }
            }
        }
    }

    /// Takes what has arrived, and passes it on to a daemon if there is one.
    fn take_signals(&mut self, daemon: Option<&Child>) {
        while let Some(signal) = sys::next_signal(&self.signals) {
            let Some(signal) = i32::try_from(signal).ok().and_then(Signal::from_named_raw) else { continue };
            self.stopping |= matches!(signal, Signal::TERM | Signal::INT);
            match daemon {
                None => {}
                Some(daemon) if signal == Signal::USR2 => self.succeed(daemon, None),
                Some(daemon) => drop(kill_process(Pid::from_child(daemon), signal)),
            }
        }
    }

    /// Asks the daemon to make room for a program: this one, or the one at vublkd's
    /// path.
    fn succeed(&mut self, daemon: &Child, program: Option<OwnedFd>) {
        let before = std::mem::replace(&mut self.given, program);
        let may = self.given.as_ref().map_or(Ok(()), may_be_run);
        let check = || {
            let ended =
                pidfd_open(Pid::from_child(daemon), PidfdFlags::empty()).map_err(|e| e.to_string())?;
            check(&self.program(), VERSION, ended.as_fd())
        };
        match may.and_then(|()| check()) {
            Ok(()) => {
                self.fall_back = false;
                let _gone = kill_process(Pid::from_child(daemon), Signal::USR2);
            }
            Err(why) => {
                tracing::error!("no upgrade: {}: {why}; the daemon goes on", self.program().display());
                self.given = before;
            }
        }
    }

    /// Where the daemon's program is.
    fn program(&self) -> PathBuf {
        match &self.given {
            // Seen by the child, before it becomes the daemon.
            Some(fd) => format!("/proc/self/fd/{}", fd.as_raw_fd()).into(),
            None => self.program.clone(),
        }
    }
}

/// Whether a program that the daemon gave us is one that it cannot have made: a guest
/// that has taken over a daemon, and writes to its disk, must not run as we do. It
/// belongs to root, or to whom our own program belongs, and not everybody may write
/// to it; a daemon that has a user of its own owns neither.
pub(crate) fn may_be_run(program: impl AsFd) -> Result<(), String> {
    let facts = || -> io::Result<bool> {
        let (theirs, ours) = (rustix::fs::fstat(program)?, std::fs::metadata("/proc/self/exe")?);
        Ok((theirs.st_uid == 0 || theirs.st_uid == ours.uid()) && theirs.st_mode & 0o002 == 0)
    };
    match facts() {
        Ok(true) => Ok(()),
        Ok(false) => {
            Err("belongs to neither root nor the owner of vublkd, or everybody may write to it".into())
        }
        Err(e) => Err(e.to_string()),
    }
}

/// Whether a program could go on from a state of this version, asked before anything
/// is given up. `daemon`: when that ends there is something more urgent to do.
pub(crate) fn check(program: &Path, version: u32, daemon: BorrowedFd<'_>) -> Result<(), String> {
    let ask = || -> io::Result<bool> {
        let mut child = Command::new(program)
            .arg("--print-state-version")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        wait_for(&[ended.as_fd(), daemon], Some(CHECK_TIME))?;
        let answered = sys::readable_within(&ended, Duration::ZERO)?;
        if !answered {
            child.kill()?;
        }
        let status = child.wait()?;
        let mut said = [0; 16];
        // What it has written is there: it has ended.
        let got = match child.stdout {
            Some(mut pipe) if answered => {
                rustix::io::ioctl_fionbio(&pipe, true)?;
                pipe.read(&mut said)?
            }
            _ => 0,
        };
        let text = String::from_utf8_lossy(said.get(..got).unwrap_or_default()).into_owned();
        Ok(status.success() && text.trim() == version.to_string())
    };
    match ask() {
        Ok(true) => Ok(()),
        Ok(false) => Err("cannot go on from this version's state".into()),
        Err(e) => Err(e.to_string()),
    }
}

/// As against memory or processes that ran out.
fn is_the_programs_fault(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::ENOENT | libc::EACCES | libc::ENOEXEC | libc::ETXTBSY | libc::ELIBBAD)
    )
}
