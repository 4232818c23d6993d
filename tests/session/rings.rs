//! What a front-end may do to rings that run: new descriptors, stops, starts,
//! resets. Nothing is lost, nothing is done twice.

use std::os::fd::AsFd;
use std::time::Duration;

use super::{each_engine, start};
use crate::support::device::{
    Device, OK, Pending, Setup, T_FLUSH, T_IN, T_OUT, header, set_ring_addr, start_ring,
};
use crate::support::disk::{PATTERNED, assert_same, pattern, salted};
use crate::support::frontend::{NO_FD, feature, msg, words32};
use crate::support::memory::Memory;
use crate::support::ring::{Ring, back, out};
use crate::support::sys::Event;

const MOMENT: Duration = Duration::from_millis(30);

/// Sends 64 writes off, 32 KiB each, past the pattern, without waiting.
fn load(device: &mut Device, salt: u64) -> Vec<(u64, Pending)> {
    (0..64)
        .map(|index| {
            let sector = PATTERNED + index * 64;
            let data = salted(salt, sector, 64);
            (sector, device.submit(0, T_OUT, sector, &data, 0))
        })
        .collect()
}

fn wide(queues: u32) -> Setup {
    Setup { ring_size: 256, queues, ..Setup::default() }
}

/// Takes what came back, strikes it off the list, checks each status.
fn strike(device: &mut Device, waiting: &mut Vec<(u64, Pending)>) {
    while let Some(used) = device.rings[0].take_used() {
        let at = waiting.iter().position(|(_, p)| p.head == used.head);
        let (_, pending) = waiting.remove(at.expect("a head nobody waits for"));
        assert_eq!(used.len, 1);
        assert_eq!(device.memory.byte(pending.status_at), OK);
    }
}

#[track_caller]
fn finish(device: &mut Device, waiting: &mut Vec<(u64, Pending)>) {
    while !waiting.is_empty() {
        let used = device.rings[0].wait_used("the writes to finish");
        let at = waiting.iter().position(|(_, p)| p.head == used.head);
        let (_, pending) = waiting.remove(at.expect("a head nobody waits for"));
        assert_eq!(device.memory.byte(pending.status_at), OK);
    }
}

#[test]
fn kick_is_replaced_on_a_running_ring() {
    each_engine(|engine| {
        let (_disk, daemon) = start(engine);
        let mut device = Device::plain(&daemon);
        for round in 0..50 {
            let pending = device.submit(0, T_IN, round, &[], 512);
            device.new_kick(0);
            let used = device.rings[0].wait_used("a read over a new kick");
            let done = device.outcome(&pending, used);
            assert_same(&done.data, &pattern(round, 1), "a sector");
            device.assert_serves(0);
        }
    });
}

#[test]
fn a_request_published_before_the_kick_is_replaced() {
    let (_disk, daemon) = start(crate::support::daemon::URING);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    // Published, but the old kick never fires: a new kick descriptor makes
    // the device look.
    let (segs, mut pending) = device.place(T_IN, 3, &[], 512);
    pending.head = device.rings[0].chain(&segs);
    device.rings[0].stage(pending.head);
    device.rings[0].publish();
    device.new_kick(0);
    let used = device.rings[0].wait_used("a read published before the new kick");
    assert_eq!(device.outcome(&pending, used).status, OK);
}

#[test]
fn call_is_replaced_on_a_running_ring() {
    each_engine(|engine| {
        let (_disk, daemon) = start(engine);
        let mut device = Device::plain(&daemon);
        for _ in 0..20 {
            device.assert_serves(0);
            let old = std::mem::replace(&mut device.rings[0].call, Event::new());
            let new = device.rings[0].call.as_fd();
            device.frontend.vring_fd(msg::SET_VRING_CALL, 0, new);
            device.rings[0].call.wait("the greeting of the new call");
            old.take();
            device.assert_serves(0);
            assert!(!old.within(Duration::ZERO), "the old call was signalled");
        }
    });
}

#[test]
fn without_a_call_descriptor() {
    let (_disk, daemon) = start(crate::support::daemon::URING);
    let mut device = Device::plain(&daemon);
    device.frontend.tell64(msg::SET_VRING_CALL, NO_FD);
    device.rings[0].call.take();
    for sector in 0..10 {
        let pending = device.submit(0, T_IN, sector, &[], 512);
        let used = device.rings[0].spin_used("a read without a call descriptor");
        assert_eq!(device.outcome(&pending, used).status, OK);
    }
    assert_eq!(device.rings[0].call.take(), 0, "the old call was signalled");
}

#[test]
fn a_full_call_descriptor_blocks_nobody() {
    each_engine(|engine| {
        let (_disk, daemon) = start(engine);
        let mut device = Device::plain(&daemon);
        device.rings[0].call.wait("the signal of SET_VRING_CALL");
        // The most an eventfd can count: the next signal would block.
        rustix::io::write(&device.rings[0].call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        for sector in 0..10 {
            let pending = device.submit(0, T_IN, sector, &[], 512);
            let used = device.rings[0].spin_used("a read with a full call descriptor");
            assert_eq!(device.outcome(&pending, used).status, OK);
        }
        device.rings[0].call.take();
        device.assert_serves(0);
    });
}

/// A stopped ring is drained: all that was fetched is answered before the
/// reply, nothing after it, and the rest is served after the restart.
#[test]
fn get_vring_base_drains() {
    each_engine(|engine| {
        let (disk, daemon) = start(engine);
        let mut device = Device::new(&daemon, wide(1));
        for salt in 1..20 {
            let mut waiting = load(&mut device, salt);
            let base = device.frontend.vring_base(0).unwrap();
            let settled = device.rings[0].used_idx();
            assert_eq!(base, settled, "the base is the used index");
            if salt % 8 == 1 {
                device.rings[0].call.take();
                device.rings[0].assert_quiet(MOMENT, "a stopped ring");
            }
            strike(&mut device, &mut waiting);
            assert_eq!(device.rings[0].seen, settled);
            start_ring(&device.frontend, 0, &device.rings[0]);
            finish(&mut device, &mut waiting);
            let want = salted(salt, PATTERNED, 4096);
            assert_same(&disk.read(PATTERNED, 4096), &want, "all writes of the round");
        }
    });
}

#[test]
fn a_stopped_ring_hears_no_kicks() {
    let (_disk, daemon) = start(crate::support::daemon::URING);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    device.frontend.vring_base(0).unwrap();
    device.rings[0].call.take();
    let pending = device.submit(0, T_IN, 1, &[], 512);
    device.frontend.sync();
    device.rings[0].assert_quiet(MOMENT, "a stopped ring that is kicked");
    // Asked again it stands where it stood.
    let base = device.frontend.vring_base(0).unwrap();
    assert_eq!(base, device.rings[0].seen);
    start_ring(&device.frontend, 0, &device.rings[0]);
    let used = device.rings[0].wait_used("the read after the restart");
    assert_eq!(device.outcome(&pending, used).status, OK);
}

#[test]
fn base_of_a_ring_that_never_ran() {
    let (_disk, daemon) = start(crate::support::daemon::URING);
    let mut device = Device::plain(&daemon);
    assert_eq!(device.frontend.vring_base(3).unwrap(), 0);
    device.assert_serves(0);
}

#[test]
fn enable_switches_a_ring() {
    each_engine(|engine| {
        let (_disk, daemon) = start(engine);
        let mut device = Device::new(&daemon, wide(1));
        for salt in 1..10 {
            let mut waiting = load(&mut device, salt);
            device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 0);
            let settled = device.rings[0].used_idx();
            device.rings[0].call.take();
            let extra = device.submit(0, T_FLUSH, 0, &[], 0);
            waiting.push((0, extra));
            if salt % 4 == 1 {
                device.rings[0].assert_quiet(MOMENT, "a disabled ring");
            }
            assert_eq!(device.rings[0].used_idx(), settled);
            device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
            finish(&mut device, &mut waiting);
        }
        // Twice the same is no harm.
        device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
        device.assert_serves(0);
    });
}

#[test]
fn one_queue_stops_and_others_go_on() {
    each_engine(|engine| {
        let (_disk, daemon) = start(engine);
        let mut device = Device::new(&daemon, wide(3));
        for _ in 0..5 {
            device.frontend.vring_base(1).unwrap();
            device.assert_serves(0);
            device.assert_serves(2);
            start_ring(&device.frontend, 1, &device.rings[1]);
            device.assert_serves(1);
        }
    });
}

/// QEMU resets the device at every reboot of the guest and sets everything up
/// again but owner, protocol features and memory.
#[test]
fn reset_device() {
    each_engine(|engine| {
        let (_disk, daemon) = start(engine);
        let mut device = Device::new(&daemon, wide(2));
        for salt in 1..10 {
            let mut waiting = load(&mut device, salt);
            device.frontend.set_config(32, &[0]);
            device.frontend.tell(msg::RESET_DEVICE, &[], &[]);
            let settled = device.rings[0].used_idx();
            if salt == 1 {
                device.rings[0].call.take();
                device.rings[0].kick.signal();
                device.rings[0].assert_quiet(MOMENT, "a device that was reset");
            }
            assert_eq!(device.rings[0].used_idx(), settled);
            strike(&mut device, &mut waiting);
            let cache = device.frontend.config(32, 1).unwrap();
            assert_eq!(cache, [0], "the cache mode that the guest chose stays");
            // New rings, from index 0.
            device.rings.clear();
            device.frontend.tell64(msg::SET_FEATURES, device.features);
            for index in 0..2 {
                let ring = Ring::new(device.memory.clone(), 64, 0, true);
                start_ring(&device.frontend, index, &ring);
                device.rings.push(ring);
            }
            device.assert_serves(0);
            device.assert_serves(1);
            device.rings[0] = Ring::new(device.memory.clone(), 256, 0, true);
            device.frontend.vring_base(0).unwrap();
            start_ring(&device.frontend, 0, &device.rings[0]);
            if salt % 4 == 0 {
                // The buffers of many rounds do not fit one memory.
                device = {
                    drop(device);
                    Device::new(&daemon, wide(2))
                };
            }
        }
    });
}

#[test]
fn addresses_are_sent_again_while_it_runs() {
    each_engine(|engine| {
        let (_disk, daemon) = start(engine);
        let mut device = Device::new(&daemon, wide(1));
        for salt in 1..10 {
            let mut waiting = load(&mut device, salt);
            for _ in 0..4 {
                set_ring_addr(&device.frontend, 0, &device.rings[0]);
                device.frontend.tell64(msg::SET_FEATURES, device.features);
            }
            finish(&mut device, &mut waiting);
        }
    });
}

/// A front-end that does not ack PROTOCOL_FEATURES has no ENABLE message:
/// its rings run at once.
#[test]
fn rings_run_at_once_without_protocol_features() {
    let (_disk, daemon) = start(crate::support::daemon::URING);
    let frontend = daemon.connect();
    frontend.tell(msg::SET_OWNER, &[], &[]);
    frontend.tell64(msg::SET_FEATURES, feature::VERSION_1 | feature::FLUSH | feature::INDIRECT_DESC);
    let memory = Memory::plain();
    frontend.set_mem_table(&memory);
    let mut ring = Ring::new(memory.clone(), 64, 0, false);
    frontend.vring_state(msg::SET_VRING_NUM, 0, 64);
    frontend.vring_state(msg::SET_VRING_BASE, 0, 0);
    set_ring_addr(&frontend, 0, &ring);
    frontend.vring_fd(msg::SET_VRING_CALL, 0, &ring.call);
    frontend.vring_fd(msg::SET_VRING_KICK, 0, &ring.kick);
    let at = memory.page_with(&header(T_IN, 3));
    let head = ring.chain(&[out(at, 16), back(at + 512, 512), back(at + 32, 1)]);
    ring.offer(head);
    assert_eq!(ring.wait_used("a read without ENABLE").len, 513);
    assert_same(&memory.read(at + 512, 512), &pattern(3, 1), "sector 3");
}

/// A driver older than virtio 1 is told so, not served wrongly.
#[test]
fn drivers_without_version_1_are_refused_with_a_log_line() {
    let (_disk, mut daemon) = start(crate::support::daemon::URING);
    let mut frontend = daemon.connect();
    crate::support::device::negotiate(&mut frontend, feature::VERSION_1);
    let memory = Memory::plain();
    frontend.set_mem_table(&memory);
    let mut ring = Ring::new(memory.clone(), 64, 0, false);
    let kick = [ring.kick.as_fd()];
    let _ = frontend.command(msg::SET_VRING_NUM, &words32(&[0, 64]), &[]);
    let payload = crate::support::device::ring_addr(0, &ring);
    let _ = frontend.command(msg::SET_VRING_ADDR, &payload, &[]);
    let _ = frontend.command(msg::SET_VRING_KICK, &0_u64.to_le_bytes(), &kick);
    let _ = frontend.command(msg::SET_VRING_ENABLE, &words32(&[0, 1]), &[]);
    daemon.wait_log("VERSION_1");
    assert!(ring.take_used().is_none());
    drop(frontend);
    Device::plain(&daemon).assert_serves(0);
    daemon.assert_alive();
}
