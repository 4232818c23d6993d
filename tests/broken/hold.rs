//! `--on-error`: requests that the disk refuses are held, tried again, and failed when their queue has to stop.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::{counter, serve, status, wait_held};
use crate::durability::stage::{Stage, Store};
use crate::session::each_engine;
use crate::support::control::{Control, says, settle, vublk};
use crate::support::daemon::{Daemon, URING};
use crate::support::device::{
    Device, IOERR, OK, Pending, Setup, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, UNWRITTEN, range,
};
use crate::support::disk::{SECTOR, assert_same, pattern, salted};
use crate::support::frontend::msg;
use crate::support::fs::Filesystem;
use crate::support::memory::Region;
use crate::support::sys::Deadline;

const MIB: u64 = 1 << 20;
/// Sectors of a write.
const SECTORS: u64 = 8;
/// Where nothing is allocated.
const HOLE: u64 = 40 * MIB / SECTOR as u64;

/// Takes all the room that a file system has.
fn fill(path: &Path) -> File {
    let file = File::create(path).unwrap();
    let mut at = 0;
    let mut len = 64 * MIB;
    while len >= 512 {
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), at, len) {
            Ok(()) => at += len,
            Err(_) => len /= 2,
        }
    }
    file
}

/// A device whose two queues run.
fn two_queues(daemon: &Daemon) -> Device {
    Device::new(daemon, Setup { queues: 2, ..Setup::default() })
}

/// A disk in memory, whose operations are the worker's own, and one that is not.
fn full_file_systems(test: &str) -> Vec<Filesystem> {
    [Filesystem::tmpfs(test, "2m"), Filesystem::ext4(test, &[])].into_iter().flatten().collect()
}

#[test]
fn a_queue_waits_for_room_and_the_others_go_on() {
    let test = "broken::hold::a_queue_waits_for_room_and_the_others_go_on";
    each_engine(|engine| {
        for fs in full_file_systems(test) {
            let (path, disk) = fs.file("disk.raw", 64 * MIB);
            std::os::unix::fs::FileExt::write_all_at(&disk, &pattern(0, 128), 0).unwrap();
            let filler = fs.path("filler");
            drop(fill(&filler));
            let (_folder, mut daemon) = serve(engine, &path, &[]);
            let mut device = two_queues(&daemon);

            let first = device.submit(0, T_OUT, HOLE, &salted(1, HOLE, SECTORS), 0);
            let held = wait_held(&daemon, 1);
            assert!(held["error"].as_str().unwrap().contains("No space left on device"), "{held}");
            let second = device.submit(0, T_OUT, HOLE + 64, &salted(2, HOLE + 64, SECTORS), 0);
            device.assert_serves(1);
            device.assert_serves(1);
            let now = status(&daemon);
            assert_eq!(now["disk"]["in_flight"], 1, "the queue fetches nothing more: {now}");
            assert_eq!(now["disk"]["on_error"], "enospc");
            assert_eq!(device.memory.byte(first.status_at), UNWRITTEN);
            let told = daemon.wait_log("until there is room");
            assert!(told.contains("ERROR") && told.contains("a write failed at byte"), "{told}");

            std::fs::remove_file(&filler).unwrap();
            for (pending, salt, sector) in [(first, 1, HOLE), (second, 2, HOLE + 64)] {
                let used = device.rings[0].wait_used("a write that waited for room");
                assert_eq!(device.outcome(&pending, used).status, OK);
                let read = device.run(1, T_IN, sector, &[], SECTORS as usize * SECTOR);
                assert_same(&read.data, &salted(salt, sector, SECTORS), "what waited");
            }
            daemon.wait_log("no request is held any more: the last one is done");
            let now = status(&daemon);
            assert!(now["disk"].get("held").is_none(), "{now}");
            assert_eq!((&now["counters"]["errors"], &now["counters"]["held"]), (&json!(0), &json!(1)));
            drop(device);
            daemon.stop();
        }
    });
}

/// Zeroes, writes that must be durable, writes of half a block: all of them wait, and none holds a range or pool pages
/// that a request of another queue needs.
#[test]
fn whatever_writes_waits() {
    let test = "broken::hold::whatever_writes_waits";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    for cache in ["writeback", "writethrough"] {
        let daemon = stage.start(URING, &[&format!("--write-cache={cache}"), "--pool-chunks=1"]);
        let mut device = two_queues(&daemon);
        stage.gate.fail(0..4096, libc::ENOSPC);
        let requests = [
            (T_OUT, 0, salted(3, 0, SECTORS)),
            (T_OUT, 1, salted(4, 1, 1)),
            (T_WRITE_ZEROES, 0, range(2, 3, 0)),
        ];
        for (kind, sector, data) in requests {
            let before = counter(&daemon, "held");
            let pending = device.submit(0, kind, sector, &data, 0);
            wait_held(&daemon, 1);
            // The same kind elsewhere, on another queue.
            assert_eq!(device.run(1, T_OUT, 17, &salted(5, 17, 1), 0).status, OK);
            stage.gate.heal();
            let used = device.rings[0].wait_used("a request that waited for room");
            assert_eq!(device.outcome(&pending, used).status, OK, "type {kind}, {cache}");
            stage.gate.fail(0..4096, libc::ENOSPC);
            assert_eq!(counter(&daemon, "held"), before + 1);
        }
        stage.gate.heal();
        let mut expected = salted(3, 0, SECTORS);
        expected[SECTOR..2 * SECTOR].copy_from_slice(&salted(4, 1, 1));
        expected[2 * SECTOR..5 * SECTOR].fill(0);
        assert_same(&device.read(0, SECTORS), &expected, cache);
        assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
        assert_same(&stage.durable(0), &expected, "after the flush");
    }
}

/// A request that reads a block to change it, and is held, keeps no other queue from that block.
#[test]
fn a_held_request_locks_nothing() {
    let test = "broken::hold::a_held_request_locks_nothing";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    let daemon = stage.start(URING, &["--logical-block-size=512", "--on-error=stop", "--workers=2"]);
    let mut device = two_queues(&daemon);
    device.write(1, &salted(1, 1, 1)); // from now on blocks are locked
    stage.gate.fail(0..4096, libc::EIO);
    let pending = device.submit(0, T_OUT, 1, &salted(2, 1, 1), 0);
    wait_held(&daemon, 1);
    let other = device.submit(1, T_OUT, 2, &salted(3, 2, 1), 0);
    wait_held(&daemon, 2);
    stage.gate.heal();
    assert_eq!(Control::of(&daemon).call("retry", json!({})).unwrap()["requests"], 2);
    for (queue, pending) in [(0, pending), (1, other)] {
        let used = device.rings[queue].wait_used("a request that was held");
        assert_eq!(device.outcome(&pending, used).status, OK);
    }
    let mut expected = pattern(0, SECTORS);
    expected[SECTOR..2 * SECTOR].copy_from_slice(&salted(2, 1, 1));
    expected[2 * SECTOR..3 * SECTOR].copy_from_slice(&salted(3, 2, 1));
    assert_same(&device.read(0, SECTORS), &expected, "both changes of one block");
}

/// With `stop` reads wait, too, and only the operator's word ends that.
#[test]
fn any_error_waits_for_the_operator_with_stop() {
    let test = "broken::hold::any_error_waits_for_the_operator_with_stop";
    each_engine(|engine| {
        let Some(stage) = Stage::new(test, Store::File) else { return };
        let daemon = stage.start(engine, &["--on-error=stop"]);
        let socket = daemon.socket.to_str().unwrap().to_owned();
        let mut device = Device::plain(&daemon);
        let (status, said, _) = vublk(&["retry", &socket]);
        assert_eq!((status.code(), said.as_str()), (Some(0), "no request is held\n"));
        stage.gate.fail(0..4096, libc::EIO);
        for kind in [T_IN, T_OUT] {
            let (data, back) = if kind == T_OUT { (salted(1, 0, 1), 0) } else { (Vec::new(), SECTOR) };
            let pending = device.submit(0, kind, 0, &data, back);
            let held = wait_held(&daemon, 1);
            assert!(held["error"].as_str().unwrap().contains("Input/output error"), "{held}");
            says(&socket, "held", "Input/output error");
            // As bad as before: it stays.
            let failed = stage.gate.failed();
            let (status, said, _) = vublk(&["retry", &socket]);
            assert_eq!(status.code(), Some(0));
            assert!(said.starts_with("1 requests are tried again"), "{said}");
            Deadline::new("the retry to fail").until_slowly(|| (stage.gate.failed() > failed).then_some(()));
            wait_held(&daemon, 1);
            // An error that is not about room is not tried again by itself.
            stage.gate.heal();
            device.rings[0].call.take();
            device.rings[0].assert_quiet(Duration::from_millis(1200), "a retry without the operator's word");
            vublk(&["retry", &socket]);
            let used = device.rings[0].wait_used("a request after vublk retry");
            assert_eq!(device.outcome(&pending, used).status, OK);
            stage.gate.fail(0..4096, libc::EIO);
        }
        daemon.wait_log("vublk retry SOCKET");
        assert_eq!((counter(&daemon, "errors"), counter(&daemon, "held")), (0, 2));
        stage.gate.heal();
    });
}

/// A failed fsync is final: what it lost, no retry brings back.
#[test]
fn a_failed_fsync_is_reported_with_stop_too() {
    let test = "broken::hold::a_failed_fsync_is_reported_with_stop_too";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    let daemon = stage.start(URING, &["--on-error=stop"]);
    let mut device = Device::plain(&daemon);
    device.write(0, &salted(1, 0, SECTORS));
    stage.gate.fail_syncs(1);
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), IOERR);
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), IOERR);
    assert_eq!(status(&daemon)["disk"]["sync_failed"], true);
}

#[track_caller]
fn assert_failed(device: &mut Device, pending: &Pending) {
    let used = device.rings[0].wait_used("a request that was held when its queue stopped");
    assert_eq!(device.outcome(pending, used).status, IOERR);
}

/// A pause for a snapshot keeps what is held; what the front-end waits for meanwhile is not held up, and nothing is lost.
#[test]
fn a_pause_keeps_what_is_held() {
    let test = "broken::hold::a_pause_keeps_what_is_held";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    let daemon = stage.start(URING, &["--supervise=on"]);
    for how in ["nothing", "GET_VRING_BASE", "RESET_DEVICE", "a disconnect"] {
        let mut device = Device::plain(&daemon);
        stage.gate.fail(0..4096, libc::ENOSPC);
        let pending = device.submit(0, T_OUT, 0, &salted(1, 0, SECTORS), 0);
        wait_held(&daemon, 1);
        let mut control = Control::of(&daemon);
        let pause = control.call("pause", json!({})).unwrap();
        assert_eq!(device.memory.byte(pending.status_at), UNWRITTEN, "{how}: answered by a pause");
        match how {
            "GET_VRING_BASE" => drop(device.frontend.vring_base(0).unwrap()),
            "RESET_DEVICE" => device.frontend.tell(msg::RESET_DEVICE, &[], &[]),
            "a disconnect" => {
                let (memory, _rings) = device.disconnect();
                Deadline::new("the held request to fail")
                    .until_slowly(|| (memory.byte(pending.status_at) == IOERR).then_some(()));
                stage.gate.heal();
                continue;
            }
            _ => {
                stage.gate.heal();
                control.call("resume", json!({"pause": pause})).unwrap();
                let used = device.rings[0].wait_used("what was held before the pause");
                assert_eq!(device.outcome(&pending, used).status, OK);
                continue;
            }
        }
        assert_failed(&mut device, &pending);
        stage.gate.heal();
        assert!(control.call("resume", json!({"pause": pause})).is_err(), "{how}: the pause has ended");
    }
}

/// What the front-end waits for is not held up: the held requests fail, and the queue can start again.
#[test]
fn a_queue_that_stops_fails_what_it_holds() {
    let test = "broken::hold::a_queue_that_stops_fails_what_it_holds";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    let daemon = stage.start(URING, &[]);
    for how in ["GET_VRING_BASE", "ENABLE(0)", "RESET_DEVICE", "REM_MEM_REG", "a disconnect"] {
        let mut device = two_queues(&daemon);
        stage.gate.fail(0..4096, libc::ENOSPC);
        let errors = counter(&daemon, "errors");
        let memory = Region::new(1 << 40, 2 * MIB, 0);
        let mut pending = if how == "REM_MEM_REG" {
            device.frontend.add_region(&memory);
            let (mut segs, mut pending) = device.place(T_OUT, 0, &salted(1, 0, SECTORS), 0);
            segs[1].addr = memory.guest;
            pending.head = device.rings[0].chain(&segs);
            device.rings[0].offer(pending.head);
            pending
        } else {
            device.submit(0, T_OUT, 0, &salted(1, 0, SECTORS), 0)
        };
        wait_held(&daemon, 1);
        let ring = &device.rings[0];
        match how {
            "GET_VRING_BASE" => {
                assert_eq!(device.frontend.vring_base(0).unwrap(), ring.avail_idx);
                assert_eq!(device.memory.byte(pending.status_at), IOERR, "answered before the reply");
            }
            "ENABLE(0)" => device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 0),
            "RESET_DEVICE" => device.frontend.tell(msg::RESET_DEVICE, &[], &[]),
            "REM_MEM_REG" => device.frontend.remove_region(&memory),
            _ => {
                let (memory, _rings) = device.disconnect();
                Deadline::new("the held request to fail")
                    .until_slowly(|| (memory.byte(pending.status_at) == IOERR).then_some(()));
                continue;
            }
        }
        assert_failed(&mut device, &pending);
        stage.gate.heal();
        match how {
            "GET_VRING_BASE" | "RESET_DEVICE" => {}
            "ENABLE(0)" => device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1),
            _ => {
                settle(&daemon);
                pending = device.submit(0, T_OUT, 0, &salted(2, 0, SECTORS), 0);
                let used = device.rings[0].wait_used("the next write");
                assert_eq!(device.outcome(&pending, used).status, OK, "after {how}");
            }
        }
        assert_eq!(counter(&daemon, "errors"), errors + 1, "{how}");
        assert!(status(&daemon)["disk"].get("held").is_none(), "{how}");
    }
    stage.gate.heal();
    Device::plain(&daemon).assert_serves(0);
}
