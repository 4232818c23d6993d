//! Requests that are as large as requests can be, by naming the same pages again and again: what a drain waits for has
//! a bound, and no queue waits for ever.

use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::Instant;

use super::Victim;
use crate::support::daemon::URING;
use crate::support::device::{Device, OK, Setup, T_IN, UNWRITTEN, header, negotiate, start_ring};
use crate::support::disk::Disk;
use crate::support::frontend::msg;
use crate::support::inflight::Inflight;
use crate::support::memory::{Memory, Span};
use crate::support::ring::{Desc, INDIRECT, Ring, WRITE, back, out};
use crate::support::sys::Deadline;

const MIB: u64 = 1 << 20;
/// Descriptors of a request's data, and bytes of each: 4 GiB less a little, all of it in one buffer.
const PARTS: u64 = 252;
const PART: u64 = 16 * MIB + 256 * 1024;
const REQUEST: u64 = PARTS * PART;

/// Memory in which one buffer is all that the requests name.
fn memory() -> Rc<Memory> {
    Memory::with(&[Span { guest: MIB, len: 64 * MIB }])
}

/// A disk that is large enough for such a request.
fn large_disk() -> Disk {
    Disk::of_size(REQUEST.next_multiple_of(MIB))
}

/// The indirect table of a read of 4 GiB: its address and its bytes. All reads of a ring may have the same.
fn table(device: &Device, buffer: u64, status: u64) -> (u64, u32) {
    let memory = &device.memory;
    let head = memory.page_with(&header(T_IN, 0));
    let place = memory.alloc(16 * (PARTS + 2), 16);
    let put = |at: u64, desc: Desc| memory.write(place + 16 * at, &desc.bytes());
    put(0, Desc { addr: head, len: 16, flags: 1, next: 1 });
    for part in 1..=PARTS {
        put(part, Desc { addr: buffer, len: PART as u32, flags: WRITE | 1, next: part as u16 + 1 });
    }
    put(PARTS + 1, Desc { addr: status, len: 1, flags: WRITE, next: 0 });
    (place, 16 * (PARTS as u32 + 2))
}

/// What all reads of a device have in common.
struct Reads {
    buffer: u64,
    status: u64,
    table: (u64, u32),
}

/// A device with so many rings of this size, and what its reads name.
fn reader(victim: &Victim, ring_size: u16, queues: u32) -> (Device, Reads) {
    let setup = Setup { ring_size, queues, memory: memory(), ..Setup::default() };
    let device = Device::new(&victim.daemon, setup);
    let buffer = device.memory.alloc(PART, 4096);
    let status = device.memory.page_with(&[UNWRITTEN]);
    let table = table(&device, buffer, status);
    (device, Reads { buffer, status, table })
}

/// So many reads of 4 GiB on a queue.
fn offer_reads(device: &mut Device, queue: usize, count: u16, (addr, len): (u64, u32)) {
    let ring = &mut device.rings[queue];
    for _ in 0..count {
        let head = ring.raw(Desc { addr, len, flags: INDIRECT, next: 0 });
        ring.stage(head);
    }
    ring.publish();
    ring.kick.signal();
}

fn answered(device: &Device) -> u32 {
    device.rings.iter().map(|ring| u32::from(ring.used_idx())).sum()
}

/// 256 reads of 4 GiB are a TiB. GET_VRING_BASE waits for one, and leaves the others in the ring.
#[test]
fn a_drain_waits_for_one_large_request() {
    let mut victim = Victim::with(URING, large_disk(), &["--workers=1"]);
    let (mut device, Reads { buffer, status, table }) = reader(&victim, 256, 2);
    offer_reads(&mut device, 0, 256, table);
    // The other queue of the same worker does not wait for them.
    for _ in 0..20 {
        device.assert_serves(1);
    }
    victim.answers("reads of a TiB");
    let before = device.rings[0].used_idx();
    let begun = Instant::now();
    let base = device.frontend.vring_base(0).expect("an answer to GET_VRING_BASE in time");
    eprintln!("GET_VRING_BASE with a TiB in the ring took {:?}", begun.elapsed());
    assert_eq!(device.rings[0].used_idx(), base, "all that was fetched was answered");
    assert_eq!(victim.in_flight(), 0, "a request that went back to its ring is not in flight");
    // One that ended while the message was on its way, and the one after it.
    assert!(base - before <= 2, "{} requests of 4 GiB were fetched", base - before);
    // It goes on where it stood, until it is reset.
    device.new_kick(0);
    Deadline::new("an answer after the drain").until(|| (device.rings[0].used_idx() > base).then_some(()));
    assert_eq!(device.memory.byte(status), OK);
    assert_eq!(device.memory.read(buffer, 512), vec![0; 512], "the last part of the disk is a hole");
    assert_eq!(victim.count("errors"), 0);
    drop(device);
    victim.serves("reads of a TiB");
    victim.stops();
}

/// All queues of a device stop together: none is given another large request while the others drain.
#[test]
fn a_reset_drains_all_queues_together() {
    const QUEUES: u32 = 4;
    let mut victim = Victim::with(URING, large_disk(), &["--workers=1"]);
    let (mut device, Reads { table, .. }) = reader(&victim, 64, QUEUES);
    for queue in 0..QUEUES as usize {
        offer_reads(&mut device, queue, 64, table);
    }
    let before = answered(&device);
    device.frontend.tell(msg::RESET_DEVICE, &[], &[]);
    let more = answered(&device) - before;
    assert!(more <= 2, "{more} requests of 4 GiB were answered before a reset");
    drop(device);
    victim.serves("a reset with a TiB in the rings");
    // The front-end leaves in the middle of them.
    let (mut device, Reads { table, .. }) = reader(&victim, 64, QUEUES);
    for queue in 0..QUEUES as usize {
        offer_reads(&mut device, queue, 64, table);
    }
    drop(device);
    victim.serves("a front-end that left a TiB behind");
    victim.stops();
}

/// Each queue has its turn, whatever the requests of the others are like, and also if its driver makes the
/// request another one while it waits.
#[test]
fn large_requests_of_all_queues_have_their_turn() {
    let mut victim = Victim::with(URING, large_disk(), &["--workers=1"]);
    let (mut device, Reads { table, .. }) = reader(&victim, 16, 4);
    for queue in 0..4 {
        offer_reads(&mut device, queue, 2, table);
    }
    // What waits becomes a chain that makes no sense, and a small request.
    device.rings[2].write_desc(0, Desc { addr: 1, len: 7, flags: INDIRECT, next: 0 });
    let small = device.memory.page_with(&header(T_IN, 100));
    let place = device.memory.alloc(512, 4096);
    let small = device.rings[3].indirect(&[out(small, 16), back(place, 512), back(small + 64, 1)]);
    let desc = device.memory.read(device.rings[3].table + 16 * u64::from(small), 16);
    device.memory.write(device.rings[3].table, &desc);
    for queue in 0..4 {
        let ring = &mut device.rings[queue];
        for _ in 0..2 {
            Deadline::new(format!("the turn of queue {queue}")).until(|| ring.take_used());
        }
    }
    for queue in 0..4 {
        device.assert_serves(queue);
    }
    drop(device);
    victim.serves("large requests on all queues");
    victim.stops();
}

/// The large requests that a killed daemon had in flight, or a front-end says it had, are done one after another, too,
/// and the journal knows nothing of those that are left in the ring.
#[test]
fn what_an_earlier_daemon_left_has_the_same_bound() {
    const COUNT: u16 = 4;
    let mut victim = Victim::with(URING, large_disk(), &["--workers=1"]);
    let mut frontend = victim.daemon.connect();
    let features = negotiate(&mut frontend, 0);
    let memory = memory();
    frontend.set_mem_table(&memory);
    let region = Inflight::ask(&frontend, 2, 16);
    // Version 1, and marks with their counts.
    region.file.write_all_at(&1_u16.to_ne_bytes(), 8).unwrap();
    for head in 0..COUNT {
        let entry = 16 + 16 * u64::from(COUNT - 1 - head);
        region.file.write_all_at(&[1], entry).unwrap();
        region.file.write_all_at(&u64::from(head).to_ne_bytes(), entry + 8).unwrap();
    }
    let mut device = Device { frontend, memory: Rc::clone(&memory), rings: Vec::new(), features };
    let buffer = memory.alloc(PART, 4096);
    let status = memory.page_with(&[UNWRITTEN]);
    let table = table(&device, buffer, status);
    for queue in 0..2 {
        device.rings.push(Ring::new(Rc::clone(&memory), 16, 0, true));
        offer_reads(&mut device, queue, if queue == 0 { COUNT } else { 0 }, table);
    }
    region.give(&device.frontend);
    for queue in 0..2 {
        start_ring(&device.frontend, queue, &device.rings[queue as usize]);
    }
    device.assert_serves(1);
    let order: Vec<u16> = (0..COUNT)
        .map(|_| Deadline::new("what was left in flight").until(|| device.rings[0].take_used()).head)
        .collect();
    assert_eq!(order, [3, 2, 1, 0], "in the order in which they were fetched");
    // Six that are not an earlier daemon's: the ring stops with most of them in it, and none of them marked.
    offer_reads(&mut device, 0, 6, table);
    assert_eq!(device.frontend.vring_base(0).unwrap(), device.rings[0].used_idx());
    assert!(region.marked(0).is_empty(), "nothing is in flight on a ring that has stopped");
    drop(device);
    victim.serves("large requests of an earlier daemon");
    victim.stops();
}
