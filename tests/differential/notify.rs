//! When the device signals, when it must not, and when it may be left alone.

use std::time::Duration;

use super::Bench;
use crate::support::daemon::Options;
use crate::support::device::{Device, OK, Setup, T_IN, header, negotiate, start_ring};
use crate::support::disk::{assert_same, pattern};
use crate::support::frontend::{feature, msg};
use crate::support::memory::Memory;
use crate::support::ring::{Ring, back, out};

/// Long enough for a wrong signal to arrive.
const MOMENT: Duration = Duration::from_millis(30);

pub fn signal_after_set_vring_call(bench: &Bench) {
    let (_daemon, device) = bench.plain();
    // Nothing was asked for, and yet: a driver that lost a signal to a
    // reconnect looks at its ring now.
    device.rings[0].call.wait("the signal that greets a new call descriptor");
}

/// One read whose used element is found by looking; the call descriptor is
/// left alone.
#[track_caller]
fn read_without_signal(device: &mut Device, sector: u64) {
    let pending = device.submit(0, T_IN, sector, &[], 512);
    let used = device.rings[0].spin_used("a read");
    let done = device.outcome(&pending, used);
    assert_eq!(done.status, OK);
    assert_same(&done.data, &pattern(sector, 1), "a sector");
}

pub fn used_event_is_honoured(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    assert!(device.rings[0].event_idx, "EVENT_IDX is offered");
    // The first completion of all may signal whatever the index says: the
    // device cannot know what was signalled before.
    read_without_signal(&mut device, 4);
    device.rings[0].call.wait("the signal of the first read");
    for round in 0..3 {
        let now = device.rings[0].seen;
        device.rings[0].set_used_event(now.wrapping_add(2));
        for sector in 0..2 {
            read_without_signal(&mut device, sector);
            device.rings[0].assert_quiet(MOMENT, "before the event index");
        }
        read_without_signal(&mut device, 2);
        let count = device.rings[0].call.wait("the signal at the event index");
        assert_eq!(count, 1, "signals in round {round}");
        read_without_signal(&mut device, 3);
        device.rings[0].assert_quiet(MOMENT, "past the event index");
    }
}

pub fn no_interrupt_flag_is_honoured(bench: &Bench) {
    let (_daemon, mut device) = bench.with(Setup { without: feature::EVENT_IDX, ..Setup::default() });
    device.rings[0].call.wait("the signal of SET_VRING_CALL");
    read_without_signal(&mut device, 4);
    device.rings[0].call.wait("the signal of the first read");
    for _ in 0..3 {
        device.rings[0].set_interrupts(false);
        read_without_signal(&mut device, 0);
        read_without_signal(&mut device, 1);
        device.rings[0].assert_quiet(MOMENT, "with NO_INTERRUPT");
        device.rings[0].set_interrupts(true);
        read_without_signal(&mut device, 2);
        device.rings[0].call.wait("a signal without NO_INTERRUPT");
    }
    // Without the feature the event index means nothing.
    let far = device.rings[0].seen.wrapping_add(1000);
    device.rings[0].set_used_event(far);
    read_without_signal(&mut device, 3);
    device.rings[0].call.wait("a signal whatever the event index says");
}

/// Keeps eight reads in flight and kicks only when the device asks for it.
fn polite(device: &mut Device, total: u64) {
    let memory = device.memory.clone();
    let ring = &mut device.rings[0];
    let buffer = memory.alloc(8 * 4096, 4096);
    let mut free: Vec<u64> = (0..8).map(|slot| buffer + slot * 4096).collect();
    let mut places = vec![(0, 0); 128];
    let (mut sent, mut done, mut kicks) = (0, 0, 0_u64);
    while done < total {
        let before = ring.avail_idx;
        while sent < total
            && let Some(at) = free.pop()
        {
            memory.write(at, &header(T_IN, sent % 4096));
            let head = ring.chain(&[out(at, 16), back(at + 512, 512), back(at + 32, 1)]);
            places[usize::from(head)] = (at, sent % 4096);
            ring.stage(head);
            sent += 1;
        }
        ring.publish();
        let new = ring.avail_idx;
        let wanted = if ring.event_idx {
            // 2.7.10.1: the event index lies in what was just published.
            let past = new.wrapping_sub(ring.avail_event()).wrapping_sub(1);
            past < new.wrapping_sub(before)
        } else {
            new != before && !ring.device_wants_no_kicks()
        };
        if wanted {
            kicks += 1;
            ring.kick.signal();
        }
        let used = ring.wait_used("a read with as few kicks as asked for");
        let (at, sector) = places[usize::from(used.head)];
        assert_eq!(used.len, 513);
        assert_eq!(memory.byte(at + 32), OK);
        assert_same(&memory.read(at + 512, 512), &pattern(sector, 1), "a sector");
        free.push(at);
        done += 1;
    }
    assert!(kicks > 0 && kicks <= total);
}

pub fn kicks_can_be_left_out_while_it_works(bench: &Bench) {
    let daemon = bench.start(&Options::default());
    for without in [0, feature::EVENT_IDX] {
        let setup = Setup { without, ..Setup::default() };
        polite(&mut Device::new(&daemon, setup), 5000);
    }
}

pub fn a_kick_before_the_ring_is_enabled(bench: &Bench) {
    if bench.deviates("disabled rings") {
        return;
    }
    let daemon = bench.start(&Options::default());
    let mut frontend = daemon.connect();
    let features = negotiate(&mut frontend, 0);
    let memory = Memory::plain();
    frontend.set_mem_table(&memory);
    let event_idx = features & feature::EVENT_IDX != 0;
    let mut ring = Ring::new(memory.clone(), 64, 0, event_idx);
    start_ring(&frontend, 0, &ring);
    frontend.vring_state(msg::SET_VRING_ENABLE, 0, 0);
    ring.call.take();
    let at = memory.page_with(&header(T_IN, 3));
    let head = ring.chain(&[out(at, 16), back(at + 512, 512), back(at + 32, 1)]);
    ring.offer(head);
    frontend.sync();
    ring.assert_quiet(MOMENT, "a ring that is not enabled");
    frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
    assert_eq!(ring.wait_used("the read kicked before ENABLE").len, 513);
    assert_same(&memory.read(at + 512, 512), &pattern(3, 1), "sector 3");
}

pub fn batches_signal(bench: &Bench) {
    for without in [0, feature::EVENT_IDX] {
        let (_daemon, mut device) = bench.with(Setup { without, ring_size: 256, ..Setup::default() });
        for _ in 0..10 {
            let mut waiting = Vec::new();
            for sector in 0..64 {
                let (segs, mut pending) = device.place(T_IN, sector * 7, &[], 512);
                pending.head = device.rings[0].chain(&segs);
                device.rings[0].stage(pending.head);
                waiting.push((sector * 7, pending));
            }
            device.rings[0].publish();
            device.rings[0].kick.signal();
            while !waiting.is_empty() {
                let used = device.rings[0].wait_used("one of 64 reads under one kick");
                let at = waiting.iter().position(|(_, p)| p.head == used.head);
                let (sector, pending) = waiting.remove(at.unwrap());
                let done = device.outcome(&pending, used);
                assert_eq!((done.status, done.written), (OK, 513));
                assert_same(&done.data, &pattern(sector, 1), "a sector");
            }
        }
    }
}
