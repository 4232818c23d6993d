//! Several syncs at a time, of which one fails: Linux reports a lost write to one
//! fsync, and the next one succeeds. A failure that one worker gets has to count
//! for all workers, also before that worker has processed it.

use std::time::Duration;

use serde_json::json;

use super::stage::{BLOCK, BLOCK_SECTORS, STORES, Server, Stage, Store, disk_status, set_writeback};
use crate::session::each_engine;
use crate::support::daemon::{Backend, URING};
use crate::support::device::{Device, IOERR, OK, Pending, Setup, T_FLUSH, T_IN, T_OUT};
use crate::support::disk::{pattern, salted};
use crate::support::freeze::Frozen;
use crate::support::sys::{Deadline, skip, tick};

/// What the first worker does when its sync fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    /// Nothing else.
    Idle,
    /// It answers many reads.
    Busy,
    /// It does not run until the second worker has answered, or for [`PAUSE`], as on
    /// a busy host.
    Stopped,
}

/// How long the first worker is stopped at most: the second one may wait for it.
const PAUSE: Duration = Duration::from_millis(500);

fn block(salt: u64, block: u64) -> Vec<u8> {
    salted(salt, block * BLOCK_SECTORS, BLOCK_SECTORS)
}

/// Stops the worker of queue 0 if that is asked for. The outer `None`: this machine
/// does not allow it.
fn stop_first(daemon: &Server, test: &str, first: First) -> Option<Option<Frozen>> {
    if first != First::Stopped {
        return Some(None);
    }
    Frozen::thread(daemon, "vublk-0").map(Some).map_err(|reason| skip(test, &reason)).ok()
}

/// Waits until the ring has an answer, at most for `time`.
fn answered_within(device: &Device, queue: usize, time: Duration) {
    let deadline = std::time::Instant::now() + time;
    let ring = &device.rings[queue];
    while ring.used_idx() == ring.seen && std::time::Instant::now() < deadline {
        tick(&[], Duration::from_millis(1));
    }
}

/// One daemon of two workers, and a FLUSH on each; the first one's fails.
#[track_caller]
fn flush_on_both(test: &str, engine: Backend, store: Store, first: First) {
    let Some(stage) = Stage::new(test, store) else { return };
    let what = format!("{engine:?}, {store:?}, first worker {first:?}");
    let mut daemon = stage.start(engine, &["--workers=2"]);
    let mut device = Device::new(&daemon, Setup { queues: 2, ring_size: 512, ..Setup::default() });
    for queue in [0, 1] {
        let written = device.run(queue, T_OUT, 8 + 8 * queue as u64, &block(1, 1 + queue as u64), 0);
        assert_eq!(written.status, OK, "{what}");
    }
    stage.gate.hold_syncs();
    let mut flushes = vec![device.submit(0, T_FLUSH, 0, &[], 0)];
    Deadline::new("the first FLUSH to be at the disk")
        .until_slowly(|| (stage.gate.held_syncs() == 1).then_some(()));
    flushes.push(device.submit(1, T_FLUSH, 0, &[], 0));
    Deadline::new("the second FLUSH to be fetched")
        .until(|| (device.rings[1].avail_event() == device.rings[1].avail_idx).then_some(()));
    let reads: Vec<Pending> = (0..if first == First::Busy { 120 } else { 0 })
        .map(|at| device.submit(0, T_IN, 4096 + 16 * at, &[], BLOCK))
        .collect();
    let Some(frozen) = stop_first(&daemon, test, first) else { return };
    stage.gate.end_sync(false);
    stage.gate.open_syncs();
    if frozen.is_some() {
        answered_within(&device, 1, PAUSE);
    }
    drop(frozen);
    for _ in 0..=reads.len() {
        device.rings[0].wait_used(&what);
    }
    device.rings[1].wait_used(&what);
    let statuses: Vec<u8> = flushes.iter().map(|flush| device.memory.byte(flush.status_at)).collect();
    for at in [1, 2] {
        assert_eq!(stage.durable(at), pattern(at * BLOCK_SECTORS, BLOCK_SECTORS), "the disk has lost it");
    }
    assert_eq!(statuses, [IOERR, IOERR], "{what}: both have lost what they wrote");
    assert!(reads.iter().all(|read| device.memory.byte(read.status_at) == OK), "{what}: reads go on");
    assert_eq!(disk_status(&daemon, "sync_failed"), json!(true), "{what}");
    for queue in [0, 1] {
        assert_eq!(device.run(queue, T_FLUSH, 0, &[], 0).status, IOERR, "{what}: a later FLUSH");
    }
    drop(device);
    daemon.stop();
}

#[track_caller]
fn flushes_on_both(test: &str, first: First, rounds: usize) {
    each_engine(|engine| {
        for store in STORES {
            for _ in 0..rounds {
                flush_on_both(test, engine, store, first);
            }
        }
    });
}

/// Both workers sync at the same time, and the disk reports the failure to one.
#[test]
fn a_flush_fails_on_every_worker_when_it_fails_on_one() {
    let test = "durability::a_flush_fails_on_every_worker_when_it_fails_on_one";
    flushes_on_both(test, First::Idle, 2);
}

/// The worker whose sync failed processes that late: it answers many reads.
#[test]
fn a_flush_fails_on_every_worker_also_when_the_first_is_busy() {
    let test = "durability::a_flush_fails_on_every_worker_also_when_the_first_is_busy";
    flushes_on_both(test, First::Busy, 3);
}

/// The worker whose sync failed does not run: the other one may wait for it or fail,
/// and may not answer OK.
#[test]
fn a_flush_fails_on_every_worker_also_when_the_first_does_not_run() {
    let test = "durability::a_flush_fails_on_every_worker_also_when_the_first_does_not_run";
    flushes_on_both(test, First::Stopped, 1);
}

/// Writes in flight together.
const WRITES: u64 = 32;

/// No write is next to another one: none may be joined.
fn block_of(write: u64) -> u64 {
    2 * write + 1
}

/// 32 durable writes are on their way. Half of them are on the disk, and their
/// sync runs, when the other half arrives on the disk, too. The sync fails, and
/// the disk loses them all; the syncs after it succeed.
#[track_caller]
fn durable_writes(test: &str, store: Store, workers: usize, first: First) {
    let Some(stage) = Stage::new(test, store) else { return };
    let what = format!("{store:?}, {workers} worker(s), first worker {first:?}");
    let mut daemon = stage.start(URING, &[&format!("--workers={workers}")]);
    let queues = workers as u32;
    let mut device = Device::new(&daemon, Setup { queues, ring_size: 256, ..Setup::default() });
    set_writeback(&device, false);
    device.frontend.sync();
    stage.gate.close(usize::MAX, usize::MAX);
    let mut pending = Vec::new();
    for half in 0..2 {
        let queue = half % workers;
        for _ in 0..WRITES / 2 {
            let at = block_of(pending.len() as u64);
            pending.push(device.submit(queue, T_OUT, at * BLOCK_SECTORS, &block(1, at), 0));
        }
        Deadline::new("the writes to be at the disk")
            .until_slowly(|| (stage.gate.held_writes().0 == pending.len()).then_some(()));
    }
    stage.gate.hold_syncs();
    let mut through = WRITES as usize / 2;
    stage.gate.let_through(through);
    // On a block device the kernel begins no flush while durable writes are on their
    // way to it, but for 5 s at most: then the next write that ends begins one.
    Deadline::new(format!("{what}: the first sync")).until_slowly(|| {
        if store == Store::Loop && through < WRITES as usize * 3 / 4 && stage.gate.held_syncs() == 0 {
            tick(&[], Duration::from_secs(1));
            stage.gate.let_through(1);
            through += 1;
        }
        (stage.gate.held_syncs() > 0).then_some(())
    });
    assert!(stage.gate.held() >= WRITES as usize / 4, "{what}: too few writes are left for this test");
    stage.gate.open();
    Deadline::new("all writes to be on the disk")
        .until_slowly(|| (stage.gate.writes() == WRITES as usize).then_some(()));
    let Some(frozen) = stop_first(&daemon, test, first) else { return };
    stage.gate.end_sync(false);
    stage.gate.open_syncs();
    if frozen.is_some() {
        answered_within(&device, 1, PAUSE);
    }
    drop(frozen);
    for half in 0..2 {
        for _ in 0..WRITES / 2 {
            device.rings[half % workers].wait_used(&what);
        }
    }
    let statuses: Vec<u8> = pending.iter().map(|write| device.memory.byte(write.status_at)).collect();
    let lost: Vec<u64> = (0..WRITES)
        .filter(|&write| {
            let is_durable = stage.durable(block_of(write)) == block(1, block_of(write));
            statuses[write as usize] == OK && !is_durable
        })
        .collect();
    assert!(lost.is_empty(), "{what}: these writes were answered OK and are lost: {lost:?}");
    assert!(statuses.contains(&IOERR), "{what}: nothing failed");
    drop(device);
    daemon.stop();
}

/// Writes whose own sync succeeds, after another sync has failed and lost their data.
#[test]
fn no_durable_write_is_lost_in_a_file_of_one_worker() {
    let test = "durability::no_durable_write_is_lost_in_a_file_of_one_worker";
    durable_writes(test, Store::File, 1, First::Idle);
}

/// The same where the kernel makes each write durable (RWF_DSYNC).
#[test]
fn no_durable_write_is_lost_on_a_block_device_of_one_worker() {
    let test = "durability::no_durable_write_is_lost_on_a_block_device_of_one_worker";
    durable_writes(test, Store::Loop, 1, First::Idle);
}

/// The sync of one worker fails, the write is the other one's.
#[test]
fn no_durable_write_is_lost_in_a_file_of_two_workers() {
    let test = "durability::no_durable_write_is_lost_in_a_file_of_two_workers";
    for first in [First::Idle, First::Stopped] {
        durable_writes(test, Store::File, 2, first);
    }
}

/// The same on a block device.
#[test]
fn no_durable_write_is_lost_on_a_block_device_of_two_workers() {
    let test = "durability::no_durable_write_is_lost_on_a_block_device_of_two_workers";
    for first in [First::Idle, First::Stopped] {
        durable_writes(test, Store::Loop, 2, first);
    }
}
