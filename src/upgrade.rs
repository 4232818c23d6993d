//! `vublk upgrade` of a daemon that nobody supervises: this process is the
//! go-between.
//!
//! What it is: it takes what the daemon has, waits for its end, and starts another
//! one with it: the new program, or the old one again if that does not serve.
//!
//! What it is not: it opens no disk and maps nothing.
//!
//! Invariants: nothing is given up before the new program has said that it can go
//! on; from then on no signal but SIGKILL ends this process until one of them serves.
//! What a daemon says of itself is not believed further than the kernel bears it out:
//! a guest may have taken it over.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::Parser;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, geteuid, pidfd_open};
use serde::Deserialize;
use serde_json::json;

use crate::args::Typed;
use crate::control::succession::CARRIED_OVER;
use crate::keep::FdId;
use crate::keep::packets::{Packet, hand_out, receive};
use crate::rpc::{self, CallError};
use crate::supervise::{check, may_be_run};
use crate::sys;

/// How a daemon says that it was started.
#[derive(Deserialize)]
struct Started {
    args: Vec<String>,
    folder: PathBuf,
}

/// All that a successor is started with.
struct Successor {
    started: Started,
    kept: BTreeMap<FdId, OwnedFd>,
    output: BTreeMap<u32, OwnedFd>,
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
    daemon.has_disk_of(&started).map_err(refused)?;
    sys::raise_descriptor_limit().map_err(|e| refused(e.to_string()))?;
    // What is in our hands from now on must not end with us.
    let ignored = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];
    let _signals = sys::block_signals(&ignored).map_err(|e| refused(e.to_string()))?;
    rpc::ask(control, &stream, "carry_over", &json!({}))?;
    let over =
        |why: String| CallError::Refused(format!("{why}. Nobody serves the disk now: start vublkd again"));
    let successor = daemon.take(&stream, started).map_err(over)?;
    let Err(why) = successor.start(program) else { return Ok(()) };
    let why = format!("{}: {why}", program.display());
    let old = format!("/proc/self/fd/{}", daemon.program.as_raw_fd());
    match successor.start(Path::new(&old)) {
        Ok(()) => Err(CallError::Refused(format!("{why}; the old program goes on"))),
        Err(e) => Err(over(format!("{why}; the old program: {e}"))),
    }
}

/// The running daemon, as the kernel knows it.
struct Daemon {
    pid: Pid,
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
        let look = || -> io::Result<Self> {
            let ended = pidfd_open(peer.pid, PidfdFlags::empty())?;
            let program = File::open(format!("/proc/{}/exe", peer.pid.as_raw_nonzero()))?;
            Ok(Self { pid: peer.pid, ended, program })
        };
        look().map_err(|e| e.to_string())
    }

    /// Whether the disk in what it says is one that it has open.
    fn has_disk_of(&self, started: &Started) -> Result<(), String> {
        let words = std::iter::once("vublkd").chain(started.args.iter().map(String::as_str));
        let typed = Typed::try_parse_from(words).map_err(|e| e.to_string())?;
        let path = started.folder.join(typed.blk_file);
        let identity = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino(), m.rdev()));
        let look = || -> io::Result<bool> {
            let wanted = identity(&path)?;
            let open = std::fs::read_dir(format!("/proc/{}/fd", self.pid.as_raw_nonzero()))?;
            Ok(open.flatten().any(|fd| identity(&fd.path()).is_ok_and(|found| found == wanted)))
        };
        match look() {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!("{}: it does not have this disk open", path.display())),
            Err(e) => Err(format!("{}: {e}", path.display())),
        }
    }

    /// Everything that it gives, once it is gone.
    fn take(&self, stream: &UnixStream, started: Started) -> Result<Successor, String> {
        let mut successor = Successor { started, kept: BTreeMap::new(), output: BTreeMap::new() };
        // It takes as long as its disk does.
        stream.set_read_timeout(None).map_err(|e| e.to_string())?;
        loop {
            match receive(stream) {
                Ok(Some(Packet::Keep(id, fd))) => drop(successor.kept.insert(id, fd)),
                Ok(Some(Packet::Forget(id))) => drop(successor.kept.remove(&id)),
                Ok(Some(Packet::Output(at, fd))) => drop(successor.output.insert(at, fd)),
                Ok(Some(Packet::End | Packet::Serving | Packet::Succeed(_))) => {}
                Ok(None) => break,
                Err(e) => return Err(e.to_string()),
            }
        }
        match sys::readable_within(&self.ended, Duration::from_secs(10)) {
            Ok(true) => Ok(successor),
            Ok(false) => Err("it hung up, and is still there".into()),
            Err(e) => Err(e.to_string()),
        }
    }
}

impl Successor {
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
            loop {
                match receive(&ours)? {
                    Some(Packet::Serving) => return Ok(true),
                    Some(_) => {}
                    None => return Ok(false),
                }
            }
        };
        if serves().is_ok_and(|yes| yes) {
            return Ok(());
        }
        let _gone = child.kill();
        match child.wait() {
            Ok(status) => Err(format!("does not serve ({status}); its log says why")),
            Err(e) => Err(e.to_string()),
        }
    }
}
