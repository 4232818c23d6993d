//! What is held survives the daemon: its successor holds it on, and the guest gets no error.

use rustix::process::{Signal, kill_process};

use super::{serve, status, wait_held};
use crate::durability::stage::{Stage, Store};
use crate::recovery::attach;
use crate::session::each_engine;
use crate::succession::daemon_of;
use crate::support::control::{settle, vublk};
use crate::support::daemon::Daemon;
use crate::support::device::{Device, OK, Pending, Setup, T_OUT, UNWRITTEN};
use crate::support::disk::{SECTOR, assert_same, salted};
use crate::support::memory::Memory;
use crate::support::ring::Ring;
use crate::support::sys::{Deadline, PATIENCE};

const SECTORS: u64 = 8;

/// Two writes that are held, and one that waits in the ring.
fn three_writes(device: &mut Device, daemon: &Daemon) -> Vec<(Pending, u64)> {
    let mut writes = Vec::new();
    for sector in [0, 2 * SECTORS] {
        let (segs, mut pending) = device.place(T_OUT, sector, &salted(1, sector, SECTORS), 0);
        pending.head = device.rings[0].chain(&segs);
        device.rings[0].stage(pending.head);
        writes.push((pending, sector));
    }
    device.rings[0].publish();
    device.rings[0].kick.signal();
    wait_held(daemon, 2);
    writes.push((device.submit(0, T_OUT, 4 * SECTORS, &salted(1, 4 * SECTORS, SECTORS), 0), 4 * SECTORS));
    writes
}

#[track_caller]
fn assert_written(device: &mut Device, writes: &[(Pending, u64)], stage: &Stage) {
    for _ in writes {
        let used = device.rings[0].wait_used("a write that was held");
        let (pending, sector) = writes.iter().find(|(pending, _)| pending.head == used.head).unwrap();
        assert_eq!(device.outcome(pending, used).status, OK, "sector {sector}");
    }
    let contents = stage.gate.contents();
    for &(_, sector) in writes {
        let at = sector as usize * SECTOR;
        let len = SECTORS as usize * SECTOR;
        assert_same(&contents[at..at + len], &salted(1, sector, SECTORS), "what was held");
    }
}

/// A crash, an upgrade, and a crash again, on one connection whose front-end has no in-flight region.
#[test]
fn a_successor_holds_on() {
    let test = "broken::succession::a_successor_holds_on";
    each_engine(|engine| {
        let Some(stage) = Stage::new(test, Store::Loop) else { return };
        let parent = stage.start(engine, &["--supervise"]);
        let socket = parent.socket.to_str().unwrap().to_owned();
        let mut device = Device::new(&parent, Setup { base: 0xfffe, ..Setup::default() });
        stage.gate.fail(0..1 << 20, libc::ENOSPC);
        let writes = three_writes(&mut device, &parent);
        for how in ["kill", "upgrade", "upgrade", "kill"] {
            settle(&parent);
            let before = daemon_of(&parent);
            if how == "kill" {
                kill_process(before, Signal::KILL).unwrap();
            } else {
                let (status, _, complaint) = vublk(&["upgrade", &socket]);
                assert!(status.success(), "{complaint}");
            }
            Deadline::new("a successor").until_slowly(|| (daemon_of(&parent) != before).then_some(()));
            let held = Deadline::new("the successor to hold what was held").until_slowly(|| {
                let control = std::os::unix::net::UnixStream::connect(crate::support::control::path(&parent));
                control.ok().map(|_| wait_held_any(&parent))
            });
            assert!(held >= 1, "{how}");
            assert!(writes.iter().all(|(pending, _)| device.memory.byte(pending.status_at) == UNWRITTEN));
        }
        stage.gate.heal();
        assert_written(&mut device, &writes, &stage);
        assert_eq!(status(&parent)["counters"]["errors"], 0);
    });
}

/// At least one is held: the first one that is replayed keeps the others in the journal.
fn wait_held_any(daemon: &Daemon) -> u64 {
    Deadline::new("a request to be held").until_slowly(|| status(daemon)["disk"]["held"]["requests"].as_u64())
}

/// SIGTERM, and a VMM that comes back to the next daemon with its in-flight region.
#[test]
fn a_stop_leaves_it_to_the_next_daemon() {
    let test = "broken::succession::a_stop_leaves_it_to_the_next_daemon";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    let (_folder, mut daemon) = serve(crate::support::daemon::URING, &stage.path, &[]);
    let memory = Memory::plain();
    let ring = Ring::new(std::rc::Rc::clone(&memory), 128, 0, true);
    let (frontend, region) = attach(&daemon, &memory, &ring, None);
    let mut device = Device { frontend, memory, rings: vec![ring], features: 0 };
    stage.gate.fail(0..1 << 20, libc::ENOSPC);
    let writes = three_writes(&mut device, &daemon);
    daemon.stop_within(PATIENCE);
    assert!(daemon.log().contains("are left to the next daemon"), "{}", daemon.log());
    assert!(writes.iter().all(|(pending, _)| device.memory.byte(pending.status_at) == UNWRITTEN));
    let (_folder, next) = serve(crate::support::daemon::URING, &stage.path, &[]);
    let (frontend, _) = attach(&next, &device.memory, &device.rings[0], region.as_ref());
    device.frontend = frontend;
    wait_held_any(&next);
    stage.gate.heal();
    assert_written(&mut device, &writes, &stage);
}

/// Without a region there is no next daemon that could know of it: the guest gets an error.
#[test]
fn a_stop_fails_it_where_no_daemon_follows() {
    let test = "broken::succession::a_stop_fails_it_where_no_daemon_follows";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    let (_folder, mut daemon) = serve(crate::support::daemon::URING, &stage.path, &[]);
    let mut device = Device::plain(&daemon);
    stage.gate.fail(0..4096, libc::ENOSPC);
    let pending = device.submit(0, T_OUT, 0, &salted(1, 0, SECTORS), 0);
    wait_held(&daemon, 1);
    daemon.stop_within(PATIENCE);
    assert_eq!(device.memory.byte(pending.status_at), crate::support::device::IOERR);
}
