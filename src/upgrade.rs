//! `vublk upgrade` of a daemon that nobody supervises: this process is the
//! go-between.
//!
//! What it is: it takes what the daemon has, waits for its end, and starts another
//! one with it: the new program, or the old one again if that does not serve.
//!
//! What it is not: it opens no disk and maps nothing.
//!
//! Invariants: the daemon goes on until all that it keeps is here, and the new
//! program has said that it can go on from it; from then on no signal but SIGKILL and
//! SIGSTOP reaches this process until one of them serves. What a daemon says of itself
//! is not believed further than the kernel bears it out: a guest may have taken it
//! over.
//!
//! ```text
//!   tool      started?     carry_over      END             start, what is kept
//!   daemon      how        OUTPUT KEEP … END   drain, end
//!   successor                                                  SERVING
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::Parser;
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Resource, geteuid, getrlimit, pidfd_open};
use serde::Deserialize;
use serde_json::json;

use crate::args::Typed;
use crate::control::succession::CARRIED_OVER;
use crate::keep::FdId;
use crate::keep::packets::{Packet, hand_out, kind, receive, send};
use crate::rpc::{self, CallError};
use crate::supervise::{check, may_be_run};
use crate::sys;

/// Every signal that would end or stop this process and can be kept from it.
const HELD_BACK: [i32; 10] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
];
/// How long a daemon may take to give what it keeps, or to end after it hung up.
const GIVING_TIME: Duration = Duration::from_secs(10);
/// How long a new one may take to serve: nothing is in flight that it would wait for.
const SERVING_TIME: Duration = Duration::from_secs(60);
/// The old program did serve: memory or processes may have run out for a moment.
const OLD_TRIES: u32 = 5;

/// How a daemon says that it was started, and how many descriptors it keeps.
#[derive(Deserialize)]
struct Started {
    args: Vec<String>,
    folder: PathBuf,
    descriptors: u64,
}

/// Puts `program` in the place of the daemon at `control`, whose state has the number
/// `version`.
///
/// # Errors
/// A sentence that says who serves now.
pub fn carry_over(control: &Path, program: &Path, version: u32) -> Result<(), CallError> {
    let refused = |why: String| CallError::Refused(format!("no upgrade: {why}; the daemon goes on"));
    let stream = rpc::connect(control)?;
    let daemon = Daemon::at(&stream).map_err(refused)?;
    let new = |why: String| refused(format!("{}: {why}", program.display()));
    let file = File::open(program).map_err(|e| new(e.to_string()))?;
    may_be_run(file).and_then(|()| check(program, version, daemon.ended.as_fd())).map_err(new)?;
    let started = rpc::ask(control, &stream, "started", &json!({}))?;
    let started: Started = serde_json::from_value(started).map_err(|e| refused(e.to_string()))?;
    daemon.may_be_started_anew(&started).map_err(refused)?;
    has_room_for(started.descriptors).map_err(refused)?;
    // What is in our hands from now on must not end with us.
    let _signals = sys::block_signals(&HELD_BACK).map_err(|e| refused(e.to_string()))?;
    rpc::ask(control, &stream, "carry_over", &json!({}))?;
    let mut successor = Successor { started, kept: BTreeMap::new(), output: BTreeMap::new() };
    if let Err(e) = successor.take(&stream) {
        drop(stream); // and so it knows
        return Err(refused(format!("cannot take what it keeps: {e}")));
    }
    let over =
        |why: String| CallError::Refused(format!("{why}. Nobody serves the disk now: start vublkd again"));
    match successor.wait_for_its_end(&stream, &daemon).map_err(|e| over(e.to_string()))? {
        Ended::Gone => {}
        Ended::NotYet => return Err(refused("it hung up, its log says why".into())),
        Ended::Stopped => return Err(CallError::Refused("no upgrade: the daemon was told to stop".into())),
    }
    let Err(why) = successor.start(program) else { return Ok(()) };
    let why = format!("{}: {why}", program.display());
    let old = PathBuf::from(format!("/proc/self/fd/{}", daemon.program.as_raw_fd()));
    let mut tries = OLD_TRIES;
    loop {
        tries -= 1;
        match successor.start(&old) {
            Ok(()) => return Err(CallError::Refused(format!("{why}; the old program goes on"))),
            Err(e) if tries == 0 => return Err(over(format!("{why}; the old program: {e}"))),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// Whether this process, and one that it starts, may have so many descriptors: what
/// is kept, what a session and its workers have of it, and some.
fn has_room_for(descriptors: u64) -> Result<(), String> {
    sys::raise_descriptor_limit().map_err(|e| e.to_string())?;
    let needed = 4 * descriptors + 128;
    match getrlimit(Resource::Nofile).current {
        Some(limit) if limit < needed => Err(format!(
            "{limit} descriptors are too few, {needed} may be needed: raise the hard limit (ulimit -Hn)"
        )),
        _ => Ok(()),
    }
}

/// The running daemon, as the kernel knows it.
struct Daemon {
    pid: i32,
    ended: OwnedFd,
    program: File,
}

impl Daemon {
    fn at(stream: &UnixStream) -> Result<Self, String> {
        let peer = rustix::net::sockopt::socket_peercred(stream).map_err(|e| e.to_string())?;
        if peer.uid != geteuid() {
            return Err(format!(
                "it runs as user {}; only that user can start its successor",
                peer.uid.as_raw()
            ));
        }
        let pid = peer.pid.as_raw_nonzero().get();
        let look = || -> io::Result<Self> {
            let ended = pidfd_open(peer.pid, PidfdFlags::empty())?;
            Ok(Self { pid, ended, program: File::open(format!("/proc/{pid}/exe"))? })
        };
        let daemon = look().map_err(|e| format!("cannot look at its process {pid}: {e}"))?;
        daemon.lives_where_we_do()?;
        Ok(daemon)
    }

    /// A successor is started here: not in a container, nor in a service that ends
    /// with it, or with us.
    fn lives_where_we_do(&self) -> Result<(), String> {
        for name in ["mnt", "pid"] {
            let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{name}"));
            if of("self").ok() != of(&self.pid.to_string()).ok() {
                return Err("it runs in a container: run vublk there".into());
            }
        }
        let cgroup = |pid: &str| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let (ours, its) = (cgroup("self"), cgroup(&self.pid.to_string()));
        let is_service = |cgroup: &str| cgroup.lines().any(|line| line.ends_with(".service"));
        if ours != its && (is_service(&ours) || is_service(&its)) {
            return Err(
                "it, or this vublk, runs in a service of systemd's, which ends what is in it. Daemons \
                        of systemd's are upgraded with --fd-store and systemctl restart"
                    .into(),
            );
        }
        Ok(())
    }

    /// Whether another process could open the disk that it was started with, and that
    /// is a disk which it has open itself, and may write to if that one would.
    fn may_be_started_anew(&self, started: &Started) -> Result<(), String> {
        let words = std::iter::once("vublkd").chain(started.args.iter().map(String::as_str));
        let typed = Typed::try_parse_from(words).map_err(|e| e.to_string())?;
        let path = started.folder.join(typed.blk_file);
        let access = if typed.read_only { Access::READ_OK } else { Access::READ_OK | Access::WRITE_OK };
        accessat(CWD, &path, access, AtFlags::EACCESS)
            .map_err(|e| format!("{}: this process could not open it: {e}", path.display()))?;
        let identity = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino(), m.rdev()));
        let look = || -> io::Result<bool> {
            let wanted = identity(&path)?;
            let open = fs::read_dir(format!("/proc/{}/fd", self.pid))?.flatten();
            Ok(open
                .filter(|fd| identity(&fd.path()).is_ok_and(|found| found == wanted))
                .any(|fd| self.is_open_for(&fd.file_name().to_string_lossy(), typed.read_only)))
        };
        match look() {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!("{}: it does not have this disk open", path.display())),
            Err(e) => Err(format!("{}: {e}", path.display())),
        }
    }

    /// Whether its descriptor is good for reading, or for both.
    fn is_open_for(&self, fd: &str, read_only: bool) -> bool {
        let facts = fs::read_to_string(format!("/proc/{}/fdinfo/{fd}", self.pid)).unwrap_or_default();
        let flags = facts.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|octal| i32::from_str_radix(octal.trim(), 8).ok());
        flags.is_some_and(|flags| {
            flags & libc::O_PATH == 0 && (read_only || flags & libc::O_ACCMODE == libc::O_RDWR)
        })
    }
}

/// How it goes with a daemon that has given everything away.
enum Ended {
    /// Another may go on.
    Gone,
    /// It hung up, and goes on itself.
    NotYet,
    /// Somebody else told it to stop.
    Stopped,
}

/// All that a successor is started with.
struct Successor {
    started: Started,
    kept: BTreeMap<FdId, OwnedFd>,
    output: BTreeMap<u32, OwnedFd>,
}

impl Successor {
    /// Takes everything that is kept, and says that it is here.
    fn take(&mut self, stream: &UnixStream) -> io::Result<()> {
        stream.set_read_timeout(Some(GIVING_TIME))?;
        loop {
            match receive(stream) {
                Ok(Some(Packet::End)) => return send(stream, kind::END, 0, &[]),
                Ok(Some(packet)) => self.note(packet),
                Ok(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
                // What came had no room here.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                    return Err(io::Error::other("descriptors have run out"));
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn note(&mut self, packet: Packet) {
        match packet {
            Packet::Keep(id, fd) => drop(self.kept.insert(id, fd)),
            Packet::Forget(id) => drop(self.kept.remove(&id)),
            Packet::Output(at, fd) => drop(self.output.insert(at, fd)),
            Packet::End | Packet::Serving | Packet::Stopped | Packet::Succeed(_) => {}
        }
    }

    /// Until the daemon is gone, which takes as long as its disk does.
    fn wait_for_its_end(&mut self, stream: &UnixStream, daemon: &Daemon) -> io::Result<Ended> {
        stream.set_read_timeout(None)?;
        while let Some(packet) = receive(stream)? {
            if let Packet::Stopped = packet {
                return Ok(Ended::Stopped);
            }
            self.note(packet);
        }
        Ok(if sys::readable_within(&daemon.ended, GIVING_TIME)? { Ended::Gone } else { Ended::NotYet })
    }

    /// Starts a daemon and waits until it serves.
    fn start(&self, program: &Path) -> Result<(), String> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|e| e.to_string())?;
        let mut command = Command::new(program);
        command.args(&self.started.args).arg(CARRIED_OVER).current_dir(&self.started.folder);
        // It is the old daemon's heir, not ours: nothing that is typed here reaches it.
        command.process_group(0).stdin(Stdio::from(theirs));
        for name in ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "SYSTEMD_EXEC_PID"] {
            command.env_remove(name);
        }
        let output = |at| {
            self.output.get(&at).and_then(|fd| fd.try_clone().ok()).map_or_else(Stdio::null, Stdio::from)
        };
        command.stdout(output(1)).stderr(output(2));
        let mut child = command.spawn().map_err(|e| format!("cannot be started: {e}"))?;
        // Its socket is its alone: the command has let go of it by now.
        drop(command);
        let serves = || -> io::Result<bool> {
            hand_out(&ours, &self.kept)?;
            while sys::readable_within(&ours, SERVING_TIME)? {
                match receive(&ours)? {
                    Some(Packet::Serving) => return Ok(true),
                    Some(_) => {}
                    None => return Ok(false),
                }
            }
            Ok(false)
        };
        if serves().is_ok_and(|yes| yes) {
            return Ok(());
        }
        // Unless it has ended by itself, and says how.
        let pid = Pid::from_child(&child);
        let ended = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| e.to_string())?;
        if !sys::readable_within(&ended, Duration::from_secs(1)).unwrap_or(false) {
            let _gone = child.kill();
        }
        match child.wait() {
            Ok(status) => Err(format!("does not serve ({status}); its log says why")),
            Err(e) => Err(e.to_string()),
        }
    }
}
