//! `vublk upgrade` of daemons that nobody supervises: the tool carries what one has
//! to the next, and the front-end here never reconnects.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::TempDir;

use crate::recovery::kills;
use crate::succession::attach;
use crate::support::control::{self, Control, vublk};
use crate::support::daemon::{Daemon, Options, URING, bare_vublkd, pass_fd, vublkd};
use crate::support::device::{Device, OK, T_FLUSH};
use crate::support::disk::Disk;
use crate::support::frontend::Frontend;
use crate::support::gate::Gate;
use crate::support::load::{LANES, Load, empty_disk};
use crate::support::loopdev::LoopDevice;
use crate::support::ring::Ring;
use crate::support::sys::{Deadline, PATIENCE};

/// The daemon that the tool started last: nobody's child, so it is ended here.
struct Heir(Pid);

impl Heir {
    #[track_caller]
    fn of(daemon: &Daemon) -> Self {
        let status = Control::of(daemon).call("status", json!({})).unwrap();
        assert_eq!(status["kept_by"], json!("vublkd"));
        Self(Pid::from_raw(status["pid"].as_i64().unwrap() as i32).unwrap())
    }

    /// SIGTERM, and its end.
    #[track_caller]
    fn stop(self) {
        let ended = rustix::process::pidfd_open(self.0, rustix::process::PidfdFlags::empty()).unwrap();
        kill_process(self.0, Signal::TERM).unwrap();
        assert!(vublk::sys::readable_within(&ended, PATIENCE).unwrap(), "it does not stop");
    }
}

impl Drop for Heir {
    fn drop(&mut self) {
        let _gone = kill_process(self.0, Signal::KILL);
    }
}

/// The guest's requests go on while one daemon after another takes over.
#[test]
fn upgraded_under_load_without_a_supervisor() {
    crate::session::each_engine(|engine| {
        let disk = empty_disk();
        let mut daemon = Daemon::start(engine, &disk, &Options::default());
        let (frontend, mut ring, mut load) = attach(&daemon, 5);
        let control = control::path(&daemon).display().to_string();
        let mut waits = Vec::new();
        let mut heir = None;
        for _ in 0..(kills() / 8).max(3) {
            let words = ["upgrade".to_owned(), control.clone()];
            let tool = std::thread::spawn(move || vublk(&words.each_ref().map(String::as_str)));
            let taken = Deadline::new("the tool");
            while !tool.is_finished() {
                load.offer(&mut ring);
                load.take(&mut ring);
                taken.check();
            }
            let (status, said, complained) = tool.join().unwrap();
            assert!(status.success(), "{complained}{}", daemon.log());
            let waited = said.split_once("the guest waited ").and_then(|(_, rest)| rest.split_once(" ms"));
            waits.push(waited.expect(&said).0.parse::<f64>().unwrap());
            let next = Heir::of(&daemon);
            assert_eq!(daemon.wait_end(PATIENCE).code(), Some(0));
            if let Some(Heir(before)) = heir.replace(next) {
                assert_ne!(before, heir.as_ref().unwrap().0);
            }
        }
        load.drain(&mut ring);
        assert_eq!(frontend.vring_base(0).unwrap(), ring.avail_idx);
        waits.sort_by(f64::total_cmp);
        eprintln!(
            "{engine:?}, by the tool: {} upgrades, {} answers, the guest waited {} (median) to {} ms",
            waits.len(),
            load.answered,
            waits[waits.len() / 2],
            waits.last().unwrap()
        );
        let socket = daemon.socket.clone();
        heir.unwrap().stop();
        assert!(!socket.exists() && !Path::new(&control).exists(), "sockets stay behind");
        load.verify(&disk);
    });
}

/// A program that says that it could go on, and does not: the old one goes on.
#[test]
fn a_program_that_does_not_serve() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let control = control::path(&daemon).display().to_string();
    let program = disk.dir.path().join("program");
    use std::os::unix::fs::PermissionsExt;
    let version = vublk::session::state::VERSION;
    let put = |text: &str| {
        let _none = std::fs::remove_file(&program);
        std::fs::write(&program, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    let path = program.display().to_string();
    for (text, why) in
        [("exit 1".to_owned(), "cannot go on from"), (format!("echo {}", version + 1), "cannot go on from")]
    {
        put(&text);
        let (status, _, complained) = vublk(&["upgrade", &control, "--binary", &path]);
        assert!(!status.success() && complained.contains(why), "{complained}");
        assert!(complained.contains("the daemon goes on"), "{complained}");
        device.assert_serves(0);
        daemon.assert_alive();
    }
    put(&format!("[ \"$1\" = --print-state-version ] && echo {version} && exit; exit 1"));
    let (status, _, complained) = vublk(&["upgrade", &control, "--binary", &path]);
    assert!(!status.success() && complained.contains("the old program goes on"), "{complained}");
    let heir = Heir::of(&daemon);
    device.assert_serves(0);
    assert_eq!(daemon.wait_end(PATIENCE).code(), Some(0));
    drop(device);
    heir.stop();
}

/// Without a front-end, and with one that comes later; the state of the disk goes
/// along; nobody who was not asked for takes part.
#[test]
fn carried_over_while_nobody_uses_it() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    let control = control::path(&daemon).display().to_string();
    let mut idle = Control::of(&daemon);
    let (status, said, complained) = vublk(&["upgrade", &control]);
    assert!(status.success() && said.contains("has taken over"), "{said}{complained}");
    assert_eq!(idle.receive(), serde_json::Value::Null, "another client is left");
    let heir = Heir::of(&daemon);
    assert_eq!(daemon.wait_end(PATIENCE).code(), Some(0));
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    drop(device);
    heir.stop();
}

/// A disk that holds requests back, a daemon on it with some, and `vublk upgrade` that
/// waits for them.
struct Held {
    tool: Child,
    frontend: Frontend,
    ring: Ring,
    load: Load,
    daemon: Daemon,
    gate: Gate,
    _store: LoopDevice,
    _folder: TempDir,
}

fn held(test: &str) -> Option<Held> {
    let (gate, store) = Gate::under_loop(test, vec![0; 8 << 20])?;
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("disk.sock");
    let mut daemon = Daemon::spawn(URING, vublkd("io_uring", &socket, &store.path), socket);
    daemon.wait_listening();
    let (frontend, mut ring, mut load) = attach(&daemon, 0);
    gate.close(LANES, LANES / 2);
    load.offer(&mut ring);
    Deadline::new("requests to be held").until_slowly(|| (gate.held() == LANES / 2).then_some(()));
    let mut tool = Command::new(env!("CARGO_BIN_EXE_vublk"));
    tool.arg("upgrade").arg(control::path(&daemon)).stdout(Stdio::null());
    let tool = tool.spawn().unwrap();
    daemon.wait_log("stopping for a successor");
    Some(Held { gate, _store: store, _folder: folder, daemon, frontend, ring, load, tool })
}

/// The tool is killed while the daemon drains for it: the daemon goes on.
#[test]
fn a_tool_that_dies() {
    let Some(mut held) = held("carried_over::a_tool_that_dies") else { return };
    held.tool.kill().unwrap();
    held.tool.wait().unwrap();
    held.gate.open();
    held.load.drain(&mut held.ring);
    held.daemon.wait_log("its starter is gone: going on");
    for _ in 0..100 {
        held.load.offer(&mut held.ring);
        held.load.take(&mut held.ring);
    }
    held.load.drain(&mut held.ring);
    assert_eq!(held.frontend.vring_base(0).unwrap(), held.ring.avail_idx);
    held.daemon.stop();
}

/// The daemon is killed while it drains. What it answered is not known to anybody, so
/// its successor does not do it again: it closes the connection.
#[test]
fn a_daemon_that_dies_while_it_drains() {
    let Some(mut held) = held("carried_over::a_daemon_that_dies_while_it_drains") else { return };
    held.daemon.signal(Signal::KILL);
    held.gate.open();
    held.daemon.wait_end(PATIENCE);
    let before = held.ring.used_idx();
    held.frontend.wait_hangup("nobody knows where its rings are");
    assert!(held.tool.wait().unwrap().success());
    assert_eq!(held.ring.used_idx(), before, "requests were done again");
    let heir = Heir::of(&held.daemon);
    let mut device = Device::plain(&held.daemon);
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
    drop(device);
    heir.stop();
}

/// SIGTERM while it drains is a stop: no successor comes.
#[test]
fn a_daemon_that_is_stopped_while_it_drains() {
    let Some(mut held) = held("carried_over::a_daemon_that_is_stopped_while_it_drains") else { return };
    held.daemon.signal(Signal::TERM);
    held.gate.open();
    assert_eq!(held.daemon.wait_end(PATIENCE).code(), Some(0));
    assert!(!held.tool.wait().unwrap().success());
    held.load.drain(&mut held.ring);
    assert!(!held.daemon.socket.exists(), "somebody serves the disk again");
}

/// Callers that ask for all of it and do not take it, or do not read at all.
#[test]
fn callers_that_do_not_take_it() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    let mut device = Device::plain(&daemon);
    let mut control = Control::of(&daemon);
    assert_eq!(control.call("carry_over", json!({})).unwrap(), serde_json::Value::Null);
    drop(control);
    daemon.wait_log("its starter does not take what it needs");
    device.assert_serves(0);
    let mut slow = Control::of(&daemon);
    slow.send(b"{\"jsonrpc\":\"2.0\",\"method\":\"carry_over\",\"id\":2}\n");
    device.assert_serves(0);
    // Answered when the time is over in which a slow one may take it.
    assert!(Control::of(&daemon).call("status", json!({})).is_ok());
    device.frontend.sync();
    drop(device);
    daemon.stop();
}

/// A daemon that was given its socket has none to give, and says so.
#[test]
fn a_given_socket_cannot_be_carried_over() {
    let disk = Disk::new();
    let socket = disk.dir.path().join("disk.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let mut command = bare_vublkd();
    command.arg(format!("--blk-file={}", disk.path.display())).arg("--fd=7");
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    use std::os::fd::AsFd;
    pass_fd(&mut command, listener.as_fd(), 7);
    let mut daemon = Daemon::spawn(URING, command, socket);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let control = control::path(&daemon).display().to_string();
    let (status, _, complained) = vublk(&["upgrade", &control]);
    assert!(!status.success() && complained.contains("--socket-path"), "{complained}");
    device.assert_serves(0);
    drop(device);
    daemon.stop();
}
