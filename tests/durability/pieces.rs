//! A request that needs several operations submits them together: one after
//! another, each would wait for the disk.
//!
//! The gate's file takes 128 KiB at a time and has no fallocate, so zeroes are
//! written. The requests that it holds are the operations in flight.

use super::stage::{DISK, Stage, Store};
use crate::support::daemon::URING;
use crate::support::device::{Device, OK, Pending, T_IN, T_OUT, T_WRITE_ZEROES, header, range};
use crate::support::disk::{SECTOR, assert_same, pattern, salted};
use crate::support::ring::{back, out};
use crate::support::sys::Deadline;

const MIB: usize = 1 << 20;
const PIECE: usize = 128 << 10;
const SECTORS: u64 = (MIB / SECTOR) as u64;
/// Where the requests are on the disk.
const AT: u64 = SECTORS;

/// A read or a write of 1 MiB whose buffer is at no multiple of 512; gives where.
fn submit_misaligned(device: &mut Device, write: Option<&[u8]>) -> (Pending, u64) {
    let buffer = device.memory.alloc((MIB + 4096) as u64, 4096) + 8;
    let kind = if write.is_some() { T_OUT } else { T_IN };
    let head = device.memory.page_with(&header(kind, AT));
    let data = match write {
        Some(data) => {
            device.memory.write(buffer, data);
            out(buffer, MIB)
        }
        None => back(buffer, MIB),
    };
    // `place` puts its data at the start of a page, so only its status is used.
    let (segs, mut pending) = device.place(kind, AT, &[], 0);
    pending.head = device.rings[0].chain(&[out(head, 16), data, segs[1]]);
    device.rings[0].offer(pending.head);
    (pending, buffer)
}

#[track_caller]
fn assert_ok(device: &mut Device, pending: &Pending, what: &str) {
    let used = device.rings[0].wait_used(what);
    assert_eq!(device.outcome(pending, used).status, OK, "{what}");
}

/// Waits until several of the request's operations are held at the same time, and
/// lets them through.
#[track_caller]
fn assert_together(stage: &Stage, writes: bool, what: &str) {
    Deadline::new(format!("{what}: several operations of up to 128 KiB in flight together")).until_slowly(
        || {
            let (count, longest) = stage.gate.held_writes();
            assert!(longest <= PIECE);
            let count = if writes { count } else { stage.gate.held() };
            (count > 1).then_some(())
        },
    );
    assert_eq!(stage.gate.held_writes().0 > 0, writes, "{what}: held are the others");
    stage.gate.open();
}

#[track_caller]
fn assert_on_disk(stage: &Stage, want: &[u8], what: &str) {
    let contents = stage.gate.contents();
    assert_same(&contents[MIB..2 * MIB], want, what);
    // What is beside it was not touched.
    let all = pattern(0, (DISK / SECTOR) as u64);
    assert_same(&contents[..MIB], &all[..MIB], "before it");
    assert_same(&contents[2 * MIB..], &all[2 * MIB..], "behind it");
}

/// WRITE_ZEROES on a file without fallocate.
#[test]
fn zeroes_that_are_written_go_together() {
    let Some(stage) = Stage::new("durability::zeroes_that_are_written_go_together", Store::File) else {
        return;
    };
    let mut daemon = stage.start(URING, &[]);
    let mut device = Device::plain(&daemon);
    stage.gate.close(usize::MAX, usize::MAX);
    let pending = device.submit(0, T_WRITE_ZEROES, 0, &range(AT, SECTORS as u32, 0), 0);
    assert_together(&stage, true, "zeroes");
    assert_ok(&mut device, &pending, "zeroes");
    assert_on_disk(&stage, &vec![0; MIB], "zeroes");
    drop(device);
    daemon.stop();
}

/// Reads and writes whose buffers are not aligned for direct I/O, so that their data
/// goes through the pool.
#[test]
fn transfers_through_the_pool_go_together() {
    let Some(stage) = Stage::new("durability::transfers_through_the_pool_go_together", Store::File) else {
        return;
    };
    let mut daemon = stage.start(URING, &[]);
    let mut device = Device::plain(&daemon);
    let data = salted(1, AT, SECTORS);
    stage.gate.close(usize::MAX, usize::MAX);
    let (pending, _) = submit_misaligned(&mut device, Some(&data));
    assert_together(&stage, true, "a write");
    assert_ok(&mut device, &pending, "a write");
    assert_on_disk(&stage, &data, "a write");
    stage.gate.close(usize::MAX, usize::MAX);
    let (pending, buffer) = submit_misaligned(&mut device, None);
    assert_together(&stage, false, "a read");
    assert_ok(&mut device, &pending, "a read");
    assert_same(&device.memory.read(buffer, MIB), &data, "a read");
    drop(device);
    daemon.stop();
}

/// The smallest pool has one chunk: requests take turns, and all of them end.
#[test]
fn one_chunk_is_enough_for_all() {
    let Some(stage) = Stage::new("durability::one_chunk_is_enough_for_all", Store::File) else { return };
    let mut daemon = stage.start(URING, &["--pool-chunks=1"]);
    let mut device = Device::plain(&daemon);
    let data = salted(1, AT, SECTORS);
    let (pending, _) = submit_misaligned(&mut device, Some(&data));
    assert_ok(&mut device, &pending, "a write");
    let reads: Vec<_> = (0..4).map(|_| submit_misaligned(&mut device, None)).collect();
    for _ in &reads {
        device.rings[0].wait_used("a read");
    }
    for (pending, buffer) in &reads {
        assert_eq!(device.memory.byte(pending.status_at), OK);
        assert_same(&device.memory.read(*buffer, MIB), &data, "a read");
    }
    assert_on_disk(&stage, &data, "a write");
    let pending = device.submit(0, T_WRITE_ZEROES, 0, &range(AT, SECTORS as u32, 0), 0);
    assert_ok(&mut device, &pending, "zeroes");
    assert_on_disk(&stage, &vec![0; MIB], "zeroes");
    drop(device);
    daemon.stop();
}
