//! The parent that is the store where systemd's is not: a daemon whose parent dies, hangs, or is
//! itself under systemd; and what a successor knows.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::succession::{self, attach, daemon_of, supervised_on};
use crate::support::control::{self, Control, settle, vublk};
use crate::support::daemon::{Daemon, Options, URING, bare_vublkd, pass_fd, run, vublkd};
use crate::support::device::{Device, IOERR, OK, Setup, T_IN, UNSUPP, header};
use crate::support::disk::Disk;
use crate::support::frontend::Frontend;
use crate::support::gate::Gate;
use crate::support::inflight::Inflight;
use crate::support::load::{LANES, Load};
use crate::support::loopdev::LoopDevice;
use crate::support::manager::Manager;
use crate::support::ring::{Ring, out};
use crate::support::sys::{Deadline, PATIENCE, open_fds, root, tick};

/// By default, without an option: `--supervise` is what the tests' own command line has to undo.
fn start(extra: &[&str]) -> (Disk, Daemon) {
    let disk = Disk::new();
    let words: Vec<&str> = ["--supervise"].iter().chain(extra).copied().collect();
    let daemon = Daemon::start(URING, &disk, &Options::with(&words));
    (disk, daemon)
}

fn status(daemon: &Daemon) -> Value {
    Control::of(daemon).call("status", json!({})).unwrap()
}

/// Kills the daemon and waits for the next one.
#[track_caller]
fn kill(parent: &Daemon) {
    let before = daemon_of(parent);
    succession::kill(parent);
    Deadline::new("the successor").until_slowly(|| (daemon_of(parent) != before).then_some(()));
}

/// The parent is killed: its daemon serves on, and says what does not work any more.
#[test]
fn killed() {
    let (_disk, mut parent) = start(&[]);
    let mut device = Device::plain(&parent);
    assert_eq!(status(&parent)["kept_by"], json!("parent"));
    let orphan = daemon_of(&parent);
    let ended = pidfd_open(orphan, PidfdFlags::empty()).unwrap();
    parent.signal(Signal::KILL);
    parent.wait_end(PATIENCE);
    parent.wait_log("the parent process of vublkd, which starts successors, is gone");
    device.assert_serves(0);
    assert_eq!(status(&parent)["kept_by"], json!("none"));
    let (status, _, complained) = vublk(&["upgrade", &control::path(&parent).display().to_string()]);
    assert!(!status.success() && complained.contains("is gone"), "{complained}");
    let mut second = {
        drop(device);
        Device::plain(&parent)
    };
    second.assert_serves(0);
    drop(second);
    kill_process(orphan, Signal::TERM).unwrap();
    assert!(vublk::sys::readable_within(&ended, PATIENCE).unwrap(), "it does not stop");
    assert!(!parent.socket.exists(), "the socket stays behind");
}

/// The parent is stopped while front-ends come and go: nothing is given up, and a daemon that dies then is succeeded
/// once the parent goes on.
#[test]
fn stopped_for_a_while() {
    let (_disk, mut parent) = start(&[]);
    let victim = daemon_of(&parent);
    parent.signal(Signal::STOP);
    Device::plain(&parent).assert_serves(0);
    let mut device = Device::plain(&parent);
    device.assert_serves(0);
    assert_eq!(status(&parent)["kept_by"], json!("parent"));
    kill_process(victim, Signal::KILL).unwrap();
    let pending = device.submit(0, T_IN, 0, &[], 512);
    parent.signal(Signal::CONT);
    let used = device.rings[0].wait_used("the successor's answer");
    assert_eq!(device.outcome(&pending, used).status, OK);
    drop(device);
    parent.stop();
}

/// SIGTERM with a daemon that does not react: it is killed, within the time that was given.
#[test]
fn a_daemon_that_does_not_stop() {
    let (_disk, mut parent) = start(&["--stop-timeout-ms=300"]);
    kill_process(daemon_of(&parent), Signal::STOP).unwrap();
    let asked = Instant::now();
    parent.signal(Signal::TERM);
    assert_eq!(parent.wait_end(PATIENCE).code(), Some(3), "{}", parent.log());
    assert!(asked.elapsed() < Duration::from_millis(1300), "{:?}", asked.elapsed());
    assert!(parent.log().contains("does not stop in time, it is killed"));
}

/// Deaths that get nothing done are answered more and more slowly; a request that is answered ends that.
#[test]
fn deaths_without_progress() {
    let (_disk, mut parent) = start(&[]);
    for _ in 0..5 {
        kill(&parent);
    }
    let pause =
        |line: &str| line.split_once("another goes on in ")?.1.split_once(" ms")?.0.parse::<u64>().ok();
    let pauses: Vec<u64> = parent.log().lines().filter_map(pause).collect();
    assert_eq!(pauses, [10, 20, 40, 80], "{}", parent.log());
    Device::plain(&parent).assert_serves(0);
    kill(&parent);
    assert!(parent.log().lines().last().is_some_and(|line| pause(line).is_none()), "{}", parent.log());
    parent.stop();
}

/// Counters go on after a crash and after an upgrade.
#[test]
fn statistics_go_on() {
    let (_disk, mut parent) = start(&[]);
    let mut device = Device::plain(&parent);
    let requests = || status(&parent)["counters"]["requests"].as_u64().unwrap();
    for turn in 1..=3 {
        device.assert_serves(0);
        device.assert_serves(0);
        assert_eq!(requests(), 2 * turn);
        if turn == 1 {
            kill(&parent);
        } else {
            let control = control::path(&parent).display().to_string();
            let (status, _, complained) = vublk(&["upgrade", &control]);
            assert!(status.success(), "{complained}");
        }
        assert_eq!(requests(), 2 * turn, "after turn {turn}");
    }
    drop(device);
    parent.stop();
    assert!(parent.log().contains("stopped: requests=6 "), "{}", parent.log());
}

/// An upgrade that is asked for as soon as the one before it is done, when the parent has yet to take note of that.
#[test]
fn one_upgrade_after_another() {
    let (_disk, mut parent) = start(&[]);
    let mut device = Device::plain(&parent);
    for _ in 0..5 {
        settle(&parent);
        let before = daemon_of(&parent);
        Control::of(&parent).call("upgrade", json!({})).unwrap();
        let new = Deadline::new("the new daemon").until_slowly(|| {
            let now = daemon_of(&parent);
            (now != before).then_some(now)
        });
        parent.signal(Signal::STOP);
        // It serves once the request is answered; what it has said to its parent waits.
        device.assert_serves(0);
        let mut control = Control::of(&parent);
        control.send(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"upgrade\"}\n");
        // The question is there by then, or comes after: either has to do.
        tick(&[], Duration::from_millis(50));
        parent.signal(Signal::CONT);
        let answer = control.receive();
        assert_eq!(answer.get("error"), None, "{answer}");
        Deadline::new("the next daemon").until_slowly(|| (daemon_of(&parent) != new).then_some(()));
        device.assert_serves(0);
    }
    drop(device);
    parent.stop();
}

/// After an upgrade daemon and parent are the new program, and both are called vublkd.
#[test]
fn names_after_an_upgrade() {
    if !root("parent::names_after_an_upgrade", "to look which program a daemon runs") {
        return;
    }
    let (disk, mut parent) = start(&[]);
    let newer = disk.dir.path().join("newer");
    std::fs::copy(env!("CARGO_BIN_EXE_vublkd"), &newer).unwrap();
    let control = control::path(&parent).display().to_string();
    let (status, _, complained) = vublk(&["upgrade", &control, "--binary", newer.to_str().unwrap()]);
    assert!(status.success(), "{complained}");
    let daemon = daemon_of(&parent).as_raw_nonzero().get().unsigned_abs();
    for pid in [daemon, parent.pid()] {
        let read = |what: &str| std::fs::read_to_string(format!("/proc/{pid}/{what}")).unwrap_or_default();
        let exe = || std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == newer);
        Deadline::new("the new program").until_slowly(|| exe().then_some(()));
        Deadline::new("its name").until_slowly(|| (read("comm").trim() == "vublkd").then_some(()));
        assert_eq!(read("cmdline").split('\0').next(), Some("vublkd"));
    }
    // The parent that was executed anew still does its work.
    let mut device = Device::plain(&parent);
    device.assert_serves(0);
    kill(&parent);
    device.assert_serves(0);
    drop(device);
    parent.stop();
}

/// A socket by its number goes along to successors.
#[test]
fn a_socket_by_number() {
    let disk = Disk::new();
    let socket = disk.dir.path().join("disk.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut command = bare_vublkd();
    command.arg(format!("--blk-file={}", disk.path.display())).arg("--fd=7");
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    pass_fd(&mut command, listener.as_fd(), 7);
    let mut parent = Daemon::spawn(URING, command, socket);
    let mut device = Device::plain(&parent);
    for _ in 0..2 {
        device.assert_serves(0);
        kill(&parent);
        device.assert_serves(0);
        let (status, _, complained) = vublk(&["upgrade", &control::path(&parent).display().to_string()]);
        assert!(status.success(), "{complained}");
    }
    drop(device);
    Device::plain(&parent).assert_serves(0);
    parent.stop();
}

/// Under systemd without its store the parent is the main process: READY=1 comes from it.
#[test]
fn readiness_comes_from_the_parent() {
    let disk = Disk::new();
    let (socket, notify) = (disk.dir.path().join("disk.sock"), disk.dir.path().join("notify"));
    let inbox = UnixDatagram::bind(&notify).unwrap();
    set_socket_passcred(&inbox, true).unwrap();
    inbox.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = vublkd("io_uring", &socket, &disk.path);
    command.arg("--supervise").env("NOTIFY_SOCKET", &notify);
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    let mut parent = Daemon::spawn(URING, command, socket);
    assert_eq!(heard(&inbox), ("READY=1".to_owned(), parent.pid()));
    kill(&parent);
    Device::plain(&parent).assert_serves(0);
    parent.stop();
    while heard(&inbox) != ("STOPPING=1".to_owned(), parent.pid()) {}
}

/// A message, and the process that sent it.
#[track_caller]
fn heard(inbox: &UnixDatagram) -> (String, u32) {
    let mut bytes = [0; 256];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(inbox, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::empty());
    let got = got.expect("a message of the parent").bytes;
    let pid = control.drain().find_map(|item| match item {
        RecvAncillaryMessage::ScmCredentials(who) => Some(who.pid.as_raw_nonzero().get().unsigned_abs()),
        _ => None,
    });
    (String::from_utf8_lossy(&bytes[..got]).trim().to_owned(), pid.unwrap())
}

/// Sockets of systemd's are told from the store's descriptors by more than the start of their names, and none is
/// ignored.
#[test]
fn sockets_of_systemd() {
    for supervise in ["--supervise=on", "--supervise=off"] {
        let disk = Disk::new();
        let socket = disk.dir.path().join("disk.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let command = |extra: &[&str], name: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", "LISTEN_PID=$$ exec \"$@\"", "sh", env!("CARGO_BIN_EXE_vublkd"), supervise]);
            command.arg(format!("--blk-file={}", disk.path.display())).args(extra);
            if !disk.takes_direct() {
                command.arg("--direct=off");
            }
            command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", name);
            pass_fd(&mut command, listener.as_fd(), 3);
            command
        };
        let mut daemon = Daemon::spawn(URING, command(&[], "vublk-vm1.socket"), socket.clone());
        Device::plain(&daemon).assert_serves(0);
        daemon.stop();
        let elsewhere = format!("--socket-path={}", disk.dir.path().join("other.sock").display());
        let mut daemon = Daemon::spawn(URING, command(&[&elsewhere], "vm1.socket"), socket.clone());
        assert_eq!(daemon.wait_end(PATIENCE).code(), Some(4), "who connects is turned away");
        assert!(daemon.log().contains("systemd passed a socket"), "{}", daemon.log());
    }
}

/// A request at which three daemons died is answered with an error, once its innocent neighbours are done; so is one
/// that is refused as soon as it is looked at. A chain that has no status goes back.
#[test]
fn a_request_that_daemons_die_of() {
    // Read, of no known type, without a status; what it is answered with at first.
    die_of(Some((T_IN, OK)));
    die_of(Some((0x77, UNSUPP)));
    die_of(None);
}

fn die_of(kind: Option<(u32, u8)>) {
    let disk = Disk::new();
    let mut manager = Manager::new(disk.dir.path());
    let mut daemon = manager.start(&disk);
    let mut device = Device::plain(&daemon);
    let size = device.rings[0].size;
    let region = Inflight::ask(&device.frontend, 1, size);
    region.give(&device.frontend);
    let status_at = match kind {
        Some((kind, _)) => Some(device.submit(0, kind, 8, &[], 512).status_at),
        None => {
            let segs = [out(device.memory.page_with(&header(T_IN, 8)), 16)];
            let head = device.rings[0].chain(&segs);
            device.rings[0].offer(head);
            None
        }
    };
    let used = device.rings[0].wait_used("the first answer");
    let condemned = "in flight at each of the last deaths";
    for death in 1..=4 {
        settle(&daemon); // past the moment in which it is not known whether a reply is out
        daemon.signal(Signal::KILL);
        daemon.wait_end(PATIENCE);
        // As if it had died before it answered: not on the used ring, and marked.
        let ring = &mut device.rings[0];
        let before = ring.used_idx().wrapping_sub(1);
        device.memory.store16(ring.used + 2, before);
        ring.seen = before;
        region.file.write_all_at(&before.to_ne_bytes(), 14).unwrap();
        region.file.write_all_at(&[1], 16 + 16 * u64::from(used.head)).unwrap();
        if let Some(at) = status_at {
            device.memory.write(at, &[0xee]);
        }
        daemon = manager.start(&disk);
        let after = before.wrapping_add(1);
        Deadline::new("an answer").until(|| (device.rings[0].used_idx() == after).then_some(()));
        device.rings[0].seen = after;
        if let (Some(at), Some((_, first))) = (status_at, kind) {
            let answer = device.memory.byte(at);
            assert_eq!(answer, if death < 3 { first } else { IOERR }, "after {death} deaths");
        }
        settle(&daemon); // it says so after the answer
        assert_eq!(daemon.log().contains(condemned), death >= 3, "after {death} deaths: {}", daemon.log());
    }
    device.assert_serves(0);
    drop(device);
    daemon.stop();
}

/// A successor whose command line has changed: what the guest has cannot be taken away. With fewer queues its connection
/// is closed; read-only, or no more, is an error, and the guest goes on once that is undone.
#[test]
fn options_that_changed() {
    let disk = Disk::new();
    let mut manager = Manager::new(disk.dir.path());
    let mut daemon = manager.start(&disk);
    let device = Device::new(&daemon, Setup { queues: 3, ..Setup::default() });
    settle(&daemon);
    daemon.signal(Signal::KILL);
    daemon.wait_end(PATIENCE);
    daemon = manager.start_with(&disk, &["--num-queues=2"]);
    device.frontend.wait_hangup("fewer queues than it had");
    daemon.wait_log("it had more queues than --num-queues now allows");
    drop(device);
    Device::plain(&daemon).assert_serves(0);
    for (had, has, said) in [("off", "on", "without --read-only"), ("on", "off", "with --read-only")] {
        // Else it stops for a successor.
        daemon.wait_log("the front-end disconnected");
        daemon.stop();
        let mode = |mode: &str| format!("--read-only={mode}");
        daemon = manager.start_with(&disk, &[&mode(had)]);
        let mut device = Device::plain(&daemon);
        assert_eq!(device.run(0, T_IN, 8, &[], 512).status, OK);
        settle(&daemon);
        daemon.signal(Signal::KILL);
        daemon.wait_end(PATIENCE);
        daemon = manager.start_with(&disk, &[&mode(has)]);
        assert_eq!(daemon.wait_end(PATIENCE).code(), Some(1), "{}", daemon.log());
        let log = daemon.log();
        assert!(
            log.contains(&format!("the guest has it {said}; start vublkd so, or stop the VM first")),
            "{log}"
        );
        daemon = manager.start_with(&disk, &[&mode(had)]);
        assert_eq!(device.run(0, T_IN, 8, &[], 512).status, OK);
        settle(&daemon);
    }
    daemon.stop();
}

/// A state of the layout before is taken over; one of a layout that is not known, or of no sense, is put aside, the
/// connection is closed, and the daemon serves anew.
#[test]
fn states_of_other_layouts() {
    let disk = Disk::new();
    let mut manager = Manager::new(disk.dir.path());
    let mut daemon = manager.start(&disk);
    let text = |version: u32| format!("{{\"version\":{version},");
    let now = vublk::session::state::VERSION;
    for (written, goes_on) in
        [(text(now), true), (text(now - 1), true), (text(now + 5), false), ("nonsense".into(), false)]
    {
        let mut device = Device::plain(&daemon);
        device.assert_serves(0);
        settle(&daemon); // past the moment in which it is not known whether a reply is out
        daemon.signal(Signal::KILL);
        daemon.wait_end(PATIENCE);
        let state = manager.state();
        for slot in [4096, 4096 + (512 << 10)] {
            state.write_all_at(written.as_bytes(), slot).unwrap();
        }
        daemon = manager.start(&disk);
        if goes_on {
            device.assert_serves(0);
        } else {
            device.frontend.wait_hangup("a state that cannot be read");
            daemon.wait_log("cannot go on where an earlier vublkd left off");
        }
        drop(device);
        Device::plain(&daemon).assert_serves(0);
    }
    daemon.stop();
}

/// A disk that holds requests back, a daemon on it with some, and `vublk upgrade` that waits for them.
struct Held {
    tool: Child,
    frontend: Frontend,
    ring: Ring,
    load: Load,
    parent: Daemon,
    gate: Gate,
    _store: LoopDevice,
    _folder: TempDir,
}

fn held(test: &str, program: Option<&Path>) -> Option<Held> {
    let (gate, store) = Gate::under_loop(test, vec![0; 8 << 20])?;
    let (folder, parent) = supervised_on(&store);
    let (frontend, mut ring, mut load) = attach(&parent, 0);
    gate.close(LANES, LANES / 2);
    load.offer(&mut ring);
    Deadline::new("requests to be held").until_slowly(|| (gate.held() == LANES / 2).then_some(()));
    let mut tool = Command::new(env!("CARGO_BIN_EXE_vublk"));
    tool.arg("upgrade").arg(control::path(&parent)).stdout(Stdio::null()).stderr(Stdio::null());
    tool.args(program.map(|path| format!("--binary={}", path.display())));
    let tool = tool.spawn().unwrap();
    // It drains once it carries out no calls any more.
    let drains = || !Control::of(&parent).answers_within("resize", Duration::from_millis(100));
    Deadline::new("the daemon to drain").until_slowly(|| drains().then_some(()));
    Some(Held { gate, _store: store, _folder: folder, parent, frontend, ring, load, tool })
}

/// A daemon whose parent was killed before it could look at it: it must not take itself for a first one, and serve
/// beside those that a person starts next.
#[test]
fn an_orphan() {
    let disk = Disk::new();
    let mut command = bare_vublkd();
    command.arg("--blk-file").arg(&disk.path).arg("--socket-path").arg(disk.dir.path().join("disk.sock"));
    // No process has this number.
    command.env("VUBLKD_STORE", "2147483647:3=notify");
    let (status, _, said) = run(command);
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("its parent ended while it started"), "{said}");
}

/// The daemon is killed while it drains for an upgrade: a successor does what was in flight.
#[test]
fn killed_while_it_drains() {
    let Some(mut held) = held("parent::killed_while_it_drains", None) else { return };
    kill_process(daemon_of(&held.parent), Signal::KILL).unwrap();
    held.gate.open();
    held.load.drain(&mut held.ring);
    held.load.offer(&mut held.ring);
    held.load.drain(&mut held.ring);
    assert_eq!(held.frontend.vring_base(0).unwrap(), held.ring.avail_idx);
    held.tool.kill().unwrap();
    held.tool.wait().unwrap();
    held.parent.stop();
}

/// What is executed is the file that was judged, whatever is at its path by then.
#[test]
fn a_program_that_is_swapped() {
    let folder = tempfile::tempdir().unwrap();
    let (newer, judged) = (folder.path().join("newer"), folder.path().join("judged"));
    std::fs::copy(env!("CARGO_BIN_EXE_vublkd"), &newer).unwrap();
    let Some(mut held) = held("parent::a_program_that_is_swapped", Some(&newer)) else { return };
    std::fs::rename(&newer, &judged).unwrap();
    std::fs::write(&newer, "#!/bin/sh\ntouch \"$0.ran\"\n").unwrap();
    std::fs::set_permissions(&newer, std::fs::Permissions::from_mode(0o755)).unwrap();
    held.gate.open();
    held.load.drain(&mut held.ring);
    assert!(held.tool.wait().unwrap().success(), "{}", held.parent.log());
    let exe = format!("/proc/{}/exe", daemon_of(&held.parent).as_raw_nonzero());
    assert_eq!(std::fs::read_link(exe).unwrap(), judged);
    held.load.offer(&mut held.ring);
    held.load.drain(&mut held.ring);
    assert_eq!(held.frontend.vring_base(0).unwrap(), held.ring.avail_idx);
    held.parent.stop();
    assert!(!newer.with_extension("ran").exists());
}

/// SIGTERM while it drains for an upgrade is a stop: no successor comes.
#[test]
fn stopped_while_it_drains() {
    let Some(mut held) = held("parent::stopped_while_it_drains", None) else { return };
    held.parent.signal(Signal::TERM);
    held.gate.open();
    assert_eq!(held.parent.wait_end(PATIENCE).code(), Some(0), "{}", held.parent.log());
    held.load.drain(&mut held.ring);
    assert!(!held.parent.socket.exists(), "the socket stays behind");
    held.tool.kill().unwrap();
    held.tool.wait().unwrap();
}

/// A script as a program of vublkd's.
fn script(path: &Path, text: &str) {
    let says =
        format!("[ \"$1\" = --print-state-version ] && echo {} && exit", vublk::session::state::VERSION);
    std::fs::write(path, format!("#!/bin/sh\n{says}\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// New programs that end before they serve, whatever they say by it: the old one goes on, and the guest waits
/// for that.
#[test]
fn programs_that_end_before_they_serve() {
    let (disk, mut parent) = start(&[]);
    let mut device = Device::plain(&parent);
    let control = control::path(&parent).display().to_string();
    for (at, text) in ["exit 0", "exit 75", "exit 3", "kill -KILL $$"].into_iter().enumerate() {
        let program = disk.dir.path().join(format!("program{at}"));
        script(&program, text);
        let binary = format!("--binary={}", program.display());
        let (status, _, complained) = vublk(&["upgrade", &control, &binary]);
        assert!(!status.success() && complained.contains("before it served"), "{text}: {complained}");
        device.assert_serves(0);
    }
    drop(device);
    parent.stop();
}

/// A second upgrade while a new program is on trial is refused, and does not change which program is executed.
#[test]
fn one_upgrade_at_a_time() {
    let (disk, mut parent) = start(&[]);
    let mut device = Device::plain(&parent);
    let (slow, gate) = (disk.dir.path().join("slow"), disk.dir.path().join("gate"));
    script(&slow, &format!("while [ ! -e {} ]; do sleep 0.01; done; exit 1", gate.display()));
    let control = control::path(&parent).display().to_string();
    let binary = format!("--binary={}", slow.display());
    let tool = std::thread::spawn(move || vublk(&["upgrade", &control, &binary]));
    parent.wait_log("the daemon stopped for its successor");
    let pending = device.submit(0, T_IN, 0, &[], 512);
    parent.signal(Signal::USR2);
    parent.wait_log("another upgrade is under way");
    std::fs::write(&gate, "").unwrap();
    let (status, _, complained) = tool.join().unwrap();
    assert!(!status.success() && complained.contains("the old program goes on"), "{complained}");
    let used = device.rings[0].wait_used("the old program's answer");
    assert_eq!(device.outcome(&pending, used).status, OK);
    drop(device);
    parent.stop();
}

/// A successor has no more than its predecessor had: what was enough for that is enough for it.
#[test]
fn a_successor_with_few_descriptors() {
    let disk = Disk::new();
    let socket = disk.dir.path().join("disk.sock");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 1024; exec \"$@\"", "sh"]).arg(env!("CARGO_BIN_EXE_vublkd"));
    command.args(vublkd("io_uring", &socket, &disk.path).get_args());
    command.args(["--supervise", "--num-queues=256", "--workers=2"]);
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    let mut parent = Daemon::spawn(URING, command, socket);
    parent.wait_listening();
    let mut device = Device::new(&parent, Setup { queues: 256, ring_size: 16, ..Setup::default() });
    device.assert_serves(255);
    kill(&parent);
    device.assert_serves(255);
    device.assert_serves(0);
    drop(device);
    parent.stop();
}

/// Connections that come and go leave nothing behind in the parent, however many.
#[test]
fn connections_that_come_and_go() {
    let (_disk, mut parent) = start(&[]);
    let mut device = Device::plain(&parent);
    device.assert_serves(0);
    drop(device);
    status(&parent);
    let before = open_fds(parent.pid());
    for _ in 0..2000 {
        drop(std::os::unix::net::UnixStream::connect(&parent.socket));
    }
    status(&parent);
    Device::plain(&parent).assert_serves(0);
    Deadline::new("the parent to close what is gone")
        .until_slowly(|| (open_fds(parent.pid()) <= before + 8).then_some(()));
    parent.stop();
}
