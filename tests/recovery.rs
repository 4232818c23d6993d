//! Requests that a killed daemon had in flight: with the in-flight region the
//! next one goes on with them, and the guest notices nothing.
//!
//! Daemons are killed after numbers of answers that are drawn, while all lanes
//! have a request on its way, and the region says how many of them had been
//! fetched by then.

use std::rc::Rc;

use rustix::process::Signal;

use crate::support::daemon::{Daemon, Options};
use crate::support::device::{Device, Setup, negotiate, start_ring};
use crate::support::disk::Disk;
use crate::support::frontend::{Frontend, msg, words32};
use crate::support::inflight::{Inflight, describe};
use crate::support::load::{Load, empty_disk};
use crate::support::memory::Memory;
use crate::support::ring::Ring;
use crate::support::sys::{PATIENCE, register_tally};

/// A connection with this ring and region, as QEMU makes it after a crash.
#[track_caller]
pub fn attach(
    daemon: &Daemon,
    memory: &Memory,
    ring: &Ring,
    region: Option<&Inflight>,
) -> (Frontend, Option<Inflight>) {
    let mut frontend = daemon.connect();
    negotiate(&mut frontend, 0);
    frontend.set_mem_table(memory);
    let fresh = region.is_none().then(|| Inflight::ask(&frontend, 1, ring.size));
    region.or(fresh.as_ref()).unwrap().give(&frontend);
    start_ring(&frontend, 0, ring);
    (frontend, fresh)
}

/// How often to kill: VUBLK_KILLS, or a few times.
pub fn kills() -> u64 {
    std::env::var("VUBLK_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(40)
}

/// A kill that finds nothing in flight proves nothing. On an idle machine 9 of 10 find something; on a busy one the
/// killer is often late, which few kills do not even out.
#[track_caller]
pub fn assert_hits(hits: u64, kills: u64) {
    let least = if kills >= 200 { 5 } else { 2 };
    assert!(hits * 10 >= kills * least, "only {hits} of {kills} kills hit a request");
}

/// kill -9 at any moment under load: nothing is lost, wrong, or answered twice.
#[test]
fn killed_under_load_and_nothing_is_lost() {
    register_tally();
    crate::session::each_engine(|engine| {
        let disk = empty_disk();
        let mut daemon = Daemon::start(engine, &disk, &Options::default());
        let memory = Memory::plain();
        let mut ring = Ring::new(Rc::clone(&memory), 256, 0xfff0, true);
        let mut load = Load::new(&memory, 0x1234_5678_9abc_def1);
        let (mut frontend, region) = attach(&daemon, &memory, &ring, None);
        let region = region.unwrap();
        let (kills, mut with_requests, mut replayed) = (kills(), 0, 0);
        for _ in 0..kills {
            load.offer(&mut ring);
            for _ in 0..load.dice.below(200) {
                load.take(&mut ring);
                load.offer(&mut ring);
            }
            daemon.signal(Signal::KILL);
            daemon.wait_end(PATIENCE);
            // Marks of what was published in the last moment are not in flight.
            let ended = ring.used_idx().wrapping_sub(region.used_idx(0));
            let marked = region.marked(0).len().saturating_sub(usize::from(ended));
            with_requests += u64::from(marked > 0);
            replayed += marked;
            drop(frontend);
            daemon = Daemon::start(engine, &disk, &Options::default());
            (frontend, _) = attach(&daemon, &memory, &ring, Some(&region));
        }
        load.drain(&mut ring);
        // GET_VRING_BASE: drained, and the region says so.
        assert_eq!(frontend.vring_base(0).unwrap(), ring.avail_idx);
        assert!(region.marked(0).is_empty() && region.used_idx(0) == ring.used_idx());
        eprintln!(
            "{engine:?}: {kills} kills, {with_requests} of them with requests in flight ({replayed} in all), {} answers",
            load.answered
        );
        assert_hits(with_requests, kills);
        daemon.stop();
        load.verify(&disk);
    });
}

/// The same without a region: what the killed daemon had is lost to the guest.
/// It is what the region is for, and shows that the test above can fail.
#[test]
fn without_a_region_requests_are_lost() {
    let disk = empty_disk();
    let mut daemon = Daemon::start(crate::support::daemon::URING, &disk, &Options::default());
    let memory = Memory::plain();
    let mut ring = Ring::new(Rc::clone(&memory), 256, 0, true);
    let mut load = Load::new(&memory, 77);
    let (frontend, region) = attach(&daemon, &memory, &ring, None);
    let region = region.unwrap();
    let mut lost = 0;
    let mut frontend = Some(frontend);
    for _ in 0..20 {
        load.offer(&mut ring);
        load.take(&mut ring);
        load.offer(&mut ring);
        daemon.signal(Signal::KILL);
        daemon.wait_end(PATIENCE);
        let ended = ring.used_idx().wrapping_sub(region.used_idx(0));
        lost = region.marked(0).len().saturating_sub(usize::from(ended));
        if lost > 0 {
            break;
        }
        drop(frontend.take());
        daemon = Daemon::start(crate::support::daemon::URING, &disk, &Options::default());
        frontend = Some(attach(&daemon, &memory, &ring, Some(&region)).0);
        load.drain(&mut ring);
    }
    assert!(lost > 0, "no kill hit a request");
    drop(frontend.take());
    daemon = Daemon::start(crate::support::daemon::URING, &disk, &Options::default());
    let mut frontend = daemon.connect();
    negotiate(&mut frontend, 0);
    frontend.set_mem_table(&memory);
    // cloud-hypervisor's base: the avail index, beyond all that was fetched.
    frontend.vring_state(msg::SET_VRING_NUM, 0, u32::from(ring.size));
    frontend.vring_state(msg::SET_VRING_BASE, 0, u32::from(ring.avail_idx));
    crate::support::device::set_ring_addr(&frontend, 0, &ring);
    frontend.vring_fd(msg::SET_VRING_KICK, 0, &ring.kick);
    frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
    let before = ring.used_idx();
    assert_eq!(frontend.vring_base(0).unwrap(), ring.avail_idx);
    assert_eq!(ring.used_idx(), before, "nobody knows of {lost} requests");
    // And with the region they are there after all, whatever base is given.
    region.give(&frontend);
    frontend.vring_state(msg::SET_VRING_BASE, 0, u32::from(ring.avail_idx));
    frontend.vring_fd(msg::SET_VRING_KICK, 0, &ring.kick);
    frontend.vring_fd(msg::SET_VRING_CALL, 0, &ring.call);
    load.drain(&mut ring);
    load.verify(&disk);
    daemon.stop();
}

/// A region that is given while a ring runs is that ring's from then on.
#[test]
fn a_region_for_a_running_ring() {
    crate::session::each_engine(|engine| {
        let disk = Disk::new();
        let daemon = Daemon::start(engine, &disk, &Options::default());
        let mut device = Device::new(&daemon, Setup { base: 7, ..Setup::default() });
        device.assert_serves(0);
        let region = Inflight::ask(&device.frontend, 4, 128);
        region.give(&device.frontend);
        for _ in 0..300 {
            device.assert_serves(0);
        }
        device.frontend.sync();
        assert_eq!(region.used_idx(0), device.rings[0].used_idx());
        assert!(region.marked(0).is_empty());
    });
}

/// What makes no sense is refused, and costs no other front-end anything.
#[test]
fn regions_that_make_no_sense() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(crate::support::daemon::URING, &disk, &Options::default());
    for (queues, size) in [(0, 128), (1, 0), (5, 128), (1, 2048), (u16::MAX, u16::MAX)] {
        let mut frontend = daemon.connect();
        negotiate(&mut frontend, 0);
        frontend.send(msg::GET_INFLIGHT_FD, 0, &describe(0, 0, queues, size), &[]).unwrap();
        frontend.wait_hangup("an in-flight region that cannot be");
    }
    let file = crate::support::sys::memory_file(4096);
    for description in [
        describe(4097, 0, 1, 128),
        describe(4096, 4096, 1, 128),
        describe(4096, 4, 1, 128),
        describe(4096, u64::MAX, 1, 128),
        describe(4096, 0, 4, 1024),
        words32(&[0; 6]),
    ] {
        let mut frontend = daemon.connect();
        negotiate(&mut frontend, 0);
        let fds = [std::os::fd::AsFd::as_fd(&file)];
        frontend.send(msg::SET_INFLIGHT_FD, 0, &description, &fds).unwrap();
        frontend.wait_hangup("an in-flight region that cannot be");
    }
    // A ring that the region has no place for is not served; others are.
    let mut device = Device::new(&daemon, Setup { queues: 2, ..Setup::default() });
    Inflight::ask(&device.frontend, 1, 128).give(&device.frontend);
    device.assert_serves(0);
    daemon.wait_log("too few for this queue");
    drop(device);
    daemon.assert_alive();
    daemon.stop();
}
