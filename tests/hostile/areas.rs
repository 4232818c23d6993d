//! In-flight regions and dirty logs that are too small, lie where something else is, or belong to another front-end.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use super::Victim;
use crate::session::each_engine;
use crate::session::migration::log_all;
use crate::support::daemon::URING;
use crate::support::device::{Device, Setup, T_IN, negotiate, start_ring};
use crate::support::frontend::{msg, single_region, words64};
use crate::support::inflight::{Inflight, describe};
use crate::support::memory::{Memory, Region};
use crate::support::ring::Ring;
use crate::support::sys::{Deadline, memory_file};

/// Bytes of one queue of 128 in an in-flight region.
const QUEUE: u64 = 16 + 16 * 128 + 48;

#[test]
fn inflight_regions_that_cannot_be() {
    let mut victim = Victim::new(URING);
    let mut device = Device::plain(&victim.daemon);
    let file = memory_file(1 << 20);
    for (what, bytes, offset, queues, size) in [
        ("none at all", 0, 0, 1, 128),
        ("a byte too small", QUEUE - 49, 0, 1, 128),
        ("too small for its queues", QUEUE, 0, 2, 128),
        ("longer than its file", (1 << 20) + 1, 0, 1, 128),
        ("beyond its file", 1 << 20, 4096, 1, 128),
        ("at an offset that overflows", 1 << 19, u64::MAX - 7, 1, 128),
        ("of an overflowing length", u64::MAX, 8, 1, 128),
        ("unaligned", 1 << 19, 4, 1, 128),
        ("unaligned by one", 1 << 19, 1, 1, 128),
        ("of no queue", 1 << 19, 0, 0, 128),
        ("of 65535 queues of 65535", 1 << 19, 0, u16::MAX, u16::MAX),
    ] {
        let payload = describe(bytes, offset, queues, size);
        let told = device.frontend.command(msg::SET_INFLIGHT_FD, &payload, &[file.as_fd()]);
        assert_eq!(told.ok(), Some(1), "an in-flight region that is {what}");
        device.assert_serves(0);
    }
    victim.daemon.wait_log("an in-flight region of 1 queues of 128 in 0 bytes");
    // What is asked for.
    for (queues, size) in [(0, 128), (1, 0), (5, 128), (1, 1025), (u16::MAX, u16::MAX)] {
        let mut frontend = victim.daemon.connect();
        drop(device);
        negotiate(&mut frontend, 0);
        frontend.send(msg::GET_INFLIGHT_FD, 0, &describe(0, 0, queues, size), &[]).unwrap();
        frontend.wait_hangup("an in-flight region that is too large, or empty");
        device = Device::plain(&victim.daemon);
    }
    drop(device);
    victim.serves("in-flight regions that cannot be");
    victim.stops();
}

/// A region of fewer queues than there are, of smaller ones, or of other ones: a queue that has no place in it is not
/// served, the log says so, and a region that has one lets it go on.
#[test]
fn inflight_regions_of_other_queues() {
    let mut victim = Victim::new(URING);
    for (queues, size, served) in [(1, 128, [true, false]), (2, 64, [false, false]), (4, 1024, [true, true])]
    {
        let mut device = Device::new(&victim.daemon, Setup { queues: 2, ..Setup::default() });
        let region = Inflight::ask(&device.frontend, queues, size);
        region.give(&device.frontend);
        device.frontend.sync();
        for (queue, is_served) in served.into_iter().enumerate() {
            if is_served {
                device.assert_serves(queue);
                continue;
            }
            let pending = device.submit(queue, T_IN, 100, &[], 512);
            device.frontend.sync();
            victim.daemon.wait_log("too few for this queue");
            // It is not served; a better region lets it go on where it stood.
            Inflight::ask(&device.frontend, 2, 128).give(&device.frontend);
            let used = device.rings[queue].wait_used("a request that waited for a region");
            device.outcome(&pending, used);
            device.assert_serves(queue);
            region.give(&device.frontend);
            device.frontend.sync();
        }
        drop(device);
        victim.serves("an in-flight region of other queues");
    }
    victim.stops();
}

/// The region lies in the guest's memory: over its ring, or over the buffers. What the daemon writes there is the
/// front-end's own harm, and what it reads there is judged.
#[test]
fn an_inflight_region_over_the_ring() {
    each_engine(|engine| {
        let mut victim = Victim::new(engine);
        for over in ["the descriptors", "the available ring", "the used ring", "the ring and all behind it"] {
            let mut frontend = victim.daemon.connect();
            let features = negotiate(&mut frontend, 0);
            let memory = Memory::plain();
            frontend.set_mem_table(&memory);
            let ring = Ring::new(Rc::clone(&memory), 128, 0, true);
            let (at, size) = match over {
                "the descriptors" => (ring.table, 128),
                "the available ring" => (ring.avail & !7, 128),
                "the used ring" => (ring.used & !7, 128),
                _ => (ring.table, 1024),
            };
            let offset = at - memory.regions[0].guest;
            let payload = describe(1 << 20, offset, 1, size);
            frontend.tell(msg::SET_INFLIGHT_FD, &payload, &[memory.regions[0].file.as_fd()]);
            start_ring(&frontend, 0, &ring);
            let mut device = Device { frontend, memory, rings: vec![ring], features };
            for sector in 0..20 {
                device.submit(0, T_IN, sector, &[], 512);
            }
            device.frontend.sync();
            victim.answers("an in-flight region over the ring");
            // Whatever became of the requests, the ring stops.
            device.frontend.vring_base(0).unwrap();
            drop(device);
            victim.serves(&format!("an in-flight region over {over}"));
        }
        victim.stops();
    });
}

/// A region that the front-end writes to while rings use it, and takes back.
#[test]
fn an_inflight_region_that_changes_under_a_ring() {
    let mut victim = Victim::new(URING);
    let mut device = Device::plain(&victim.daemon);
    let region = Inflight::ask(&device.frontend, 1, 128);
    // The daemon's own cannot be made smaller.
    assert!(region.file.set_len(0).is_err(), "a region that can be truncated");
    region.give(&device.frontend);
    for round in 0..100 {
        for at in 0..QUEUE / 8 {
            region.file.write_all_at(&[0xff; 8], at * 8).unwrap();
        }
        assert_eq!(device.read(round, 1), crate::support::disk::pattern(round, 1));
    }
    // Nothing of it is taken for true on the next start, either.
    device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 0);
    device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
    device.frontend.sync();
    victim.daemon.wait_log("the in-flight region has version 65535");
    drop(device);
    victim.serves("an in-flight region full of ones");

    let mut device = Device::plain(&victim.daemon);
    let own = memory_file(1 << 16);
    device.frontend.tell(msg::SET_INFLIGHT_FD, &describe(1 << 16, 0, 1, 128), &[own.as_fd()]);
    device.assert_serves(0);
    own.set_len(0).unwrap();
    device.submit(0, T_IN, 0, &[], 512);
    device.frontend.wait_hangup("an in-flight region that is gone");
    victim.daemon.wait_log("took back memory");
    drop(device);
    victim.serves("an in-flight region that is gone");
    victim.stops();
}

/// A log over the guest's own memory: marks are bits in its rings and buffers, and in nothing else.
#[test]
fn a_dirty_log_over_the_guest() {
    each_engine(|engine| {
        let mut victim = Victim::new(engine);
        for over_the_ring in [true, false] {
            let mut device = Device::plain(&victim.daemon);
            let memory = Rc::clone(&device.memory);
            let bytes = (memory.regions[0].guest + memory.regions[0].len) / 4096 / 8;
            let at = if over_the_ring { device.rings[0].table } else { memory.alloc(1 << 20, 4096) };
            let payload = words64(&[bytes, at - memory.regions[0].guest]);
            let file = [memory.regions[0].file.as_fd()];
            device.frontend.send(msg::SET_LOG_BASE, 0, &payload, &file).unwrap();
            assert_eq!(device.frontend.receive().unwrap().payload, payload);
            log_all(&device, true);
            for sector in 0..20 {
                device.submit(0, T_IN, sector, &[], 4096);
            }
            victim.answers("a dirty log over the guest's memory");
            if !over_the_ring {
                // Its marks are where nothing else is.
                Deadline::new("all answers").until(|| (device.rings[0].used_idx() == 20).then_some(()));
                device.frontend.sync();
                let marks: u32 = memory.read(at, bytes as usize).iter().map(|byte| byte.count_ones()).sum();
                assert!(marks >= 20, "{marks} pages are marked");
            }
            device.frontend.vring_base(0).unwrap();
            drop(device);
            victim.serves("a dirty log over the guest's memory");
        }
        victim.stops();
    });
}

/// Logs without a descriptor, with two, and for less memory than there is, or comes.
#[test]
fn dirty_logs_that_cannot_be() {
    let mut victim = Victim::new(URING);
    let log = memory_file(1 << 20);
    let all = words64(&[1 << 20, 0]);
    for (what, payload, count) in [
        ("a log without a descriptor", &all, 0),
        ("a log with two", &all, 2),
        ("an empty log", &words64(&[0, 0]), 1),
        ("a log of one byte", &words64(&[1, 0]), 1),
        ("half a payload", &all[..8].to_vec(), 1),
    ] {
        let mut device = Device::plain(&victim.daemon);
        device.assert_serves(0);
        device.frontend.send(msg::SET_LOG_BASE, 0, payload, &vec![log.as_fd(); count]).unwrap();
        device.frontend.wait_hangup(what);
        drop(device);
        victim.serves(what);
    }
    victim.daemon.wait_log("is too short for guest memory");
    // Memory that comes later, beyond it.
    let mut device = Device::plain(&victim.daemon);
    device.frontend.send(msg::SET_LOG_BASE, 0, &all, &[log.as_fd()]).unwrap();
    device.frontend.receive().unwrap();
    log_all(&device, true);
    let far = Region::new(1 << 40, 1 << 20, 0);
    let told = device.frontend.command(msg::ADD_MEM_REG, &single_region(&far), &[far.file.as_fd()]);
    assert_eq!(told.ok(), Some(1), "memory beyond the log");
    victim.daemon.wait_log("is more than the dirty log covers");
    device.assert_serves(0);
    // Not while it is not used: then it is a matter of later.
    log_all(&device, false);
    device.frontend.add_region(&far);
    log_all(&device, true);
    device.assert_serves(0);
    drop(device);
    victim.serves("memory beyond the log");
    victim.stops();
}
