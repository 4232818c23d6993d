//! Messages in odd order about rings that run, queues that share a kick, and memory that means two things.

use std::os::fd::AsFd;
use std::rc::Rc;

use rustix::process::Signal;

use super::Victim;
use crate::session::each_engine;
use crate::succession;
use crate::support::control::settle;
use crate::support::daemon::{Backend, Daemon, Options, URING};
use crate::support::device::{Device, OK, Setup, T_IN, T_OUT, UNWRITTEN, negotiate, ring_addr};
use crate::support::dice::Dice;
use crate::support::disk::{Disk, assert_same, pattern, salted};
use crate::support::frontend::{Frontend, msg, single_region, words32, words64};
use crate::support::manager::Manager;
use crate::support::memory::{Memory, Region, Span};
use crate::support::ring::{Ring, back, out};
use crate::support::sys::{Event, PATIENCE};

/// What sets a ring up comes again while it runs, in any order, with the same values and with others, requests on their
/// way. With the right values once more it goes on.
#[test]
fn a_ring_is_set_up_again_while_it_runs() {
    each_engine(|engine| {
        let mut victim = Victim::new(engine);
        let mut device = Device::new(&victim.daemon, Setup { queues: 2, ..Setup::default() });
        let mut dice = Dice::new(7);
        for round in 0..60 {
            let data = salted(round + 1, 50_000, 8);
            let mut first = device.submit(0, T_OUT, 50_000, &data, 0);
            // Every second time, only what changes nothing.
            let most = if round % 2 == 0 { 4 } else { 8 };
            let steps: Vec<u64> = (0..4).map(|_| dice.below(most)).collect();
            for &step in &steps {
                let (frontend, ring) = (&device.frontend, &device.rings[0]);
                let addresses = ring_addr(0, ring);
                let told = match step {
                    0 => frontend.command(msg::SET_VRING_NUM, &words32(&[0, 128]), &[]),
                    1 => frontend.command(msg::SET_VRING_ADDR, &addresses, &[]),
                    2 => frontend.command(msg::SET_VRING_ENABLE, &words32(&[0, 1]), &[]),
                    3 => frontend.command(msg::SET_VRING_KICK, &[0; 8], &[ring.kick.as_fd()]),
                    4 => frontend.command(msg::SET_VRING_ENABLE, &words32(&[0, 0]), &[]),
                    // A size, addresses and an index that are none.
                    5 => frontend.command(msg::SET_VRING_NUM, &words32(&[0, 77]), &[]),
                    6 => {
                        let mut nowhere = words32(&[0, 0]);
                        nowhere.extend(words64(&[8, 1 << 50, 16, 0]));
                        frontend.command(msg::SET_VRING_ADDR, &nowhere, &[])
                    }
                    _ => frontend.command(msg::SET_VRING_BASE, &words32(&[0, 1 << 20]), &[]),
                };
                assert!(told.is_ok(), "step {step} of {steps:?} ended the connection");
            }
            if steps.iter().all(|&step| step < 4) {
                // Nothing has changed: it goes on by itself.
                let used = device.rings[0].wait_used("a write during messages that change nothing");
                assert_eq!(device.outcome(&first, used).status, OK, "{steps:?}");
                device.assert_serves(0);
                first = device.submit(0, T_OUT, 50_000, &data, 0);
            }
            // As it was; where it stands only the daemon knows.
            let base = device.frontend.vring_base(0).unwrap();
            device.frontend.vring_state(msg::SET_VRING_NUM, 0, 128);
            crate::support::device::set_ring_addr(&device.frontend, 0, &device.rings[0]);
            device.frontend.vring_state(msg::SET_VRING_BASE, 0, base.into());
            device.frontend.vring_fd(msg::SET_VRING_KICK, 0, &device.rings[0].kick);
            device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
            let used = device.rings[0].wait_used(&format!("a write after {steps:?}"));
            assert_eq!(device.outcome(&first, used).status, OK, "{steps:?}");
            assert_same(&device.read(50_000, 8), &data, "what was written");
            device.assert_serves(1);
        }
        drop(device);
        victim.serves("rings that were set up again");
        victim.stops();
    });
}

/// A base that is not where the ring stands: chains are lost or done again, which is the front-end's harm, and more than
/// the ring holds break it. The next start is right again.
#[test]
fn a_base_that_is_wrong() {
    let mut victim = Victim::new(URING);
    for wrong in [1_u16, 5, 127, 128, 129, 1000, 0x8000, u16::MAX] {
        let mut device = Device::plain(&victim.daemon);
        device.assert_serves(0);
        let error = Event::new();
        device.frontend.vring_fd(msg::SET_VRING_ERR, 0, &error);
        device.frontend.vring_state(msg::SET_VRING_BASE, 0, wrong.into());
        let ring = &device.rings[0];
        ring.kick.signal();
        device.frontend.sync();
        device.frontend.vring_base(0).unwrap();
        if wrong != 1 && ring.avail_idx.wrapping_sub(wrong) > 128 {
            error.wait(&format!("the error descriptor of a ring of which chain {wrong} is the next"));
        }
        drop(device);
        victim.serves(&format!("a ring that begins at {wrong}"));
    }
    victim.daemon.wait_log("the driver broke the ring");
    victim.stops();
}

/// Guest addresses of two regions that overlap, wrap or are one file twice; and front-end addresses that name two regions.
#[test]
fn memory_that_means_two_things() {
    let mut victim = Victim::new(URING);
    let mut device = Device::plain(&victim.daemon);
    let memory = Rc::clone(&device.memory);
    let plain = &memory.regions[0];
    let refused = [
        ("the same once more", plain.guest, plain.len, plain.user),
        ("a page of it", plain.guest + 8192, 4096, 1 << 50),
        ("all around it", plain.guest - 4096, plain.len + 8192, 1 << 50),
        ("its last page and one more", plain.guest + plain.len - 4096, 8192, 1 << 50),
        ("up to beyond the last address", u64::MAX - 4096, 8192, 1 << 50),
        ("at addresses of the front-end that wrap", 1 << 40, 8192, u64::MAX - 4096),
    ];
    let file = crate::support::sys::memory_file(128 << 20);
    for (what, guest, len, user) in refused {
        let mut payload = words64(&[0]);
        payload.extend(words64(&[guest, len, user, 0]));
        let told = device.frontend.command(msg::ADD_MEM_REG, &payload, &[file.as_fd()]);
        assert_eq!(told.ok(), Some(1), "a region that is {what}");
        device.assert_serves(0);
    }
    // The same file twice, at other addresses: two views of the same bytes.
    let mut payload = words64(&[0]);
    payload.extend(words64(&[1 << 40, 1 << 20, plain.user, 0]));
    device.frontend.tell(msg::ADD_MEM_REG, &payload, &[plain.file.as_fd()]);
    let place = device.memory.alloc(512, 4096);
    let head = device.memory.page_with(&crate::support::device::header(T_IN, 7));
    let alias = place - device.memory.regions[0].guest + (1 << 40);
    let (status, _) = device.run_segs(&[out(head, 16), back(alias, 512), back(head + 64, 1)], false);
    assert_eq!(status, OK);
    assert_same(&device.memory.read(place, 512), &pattern(7, 1), "through another address");
    // Its ring is found in one of the two, both of which have its addresses.
    device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 0);
    device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
    device.assert_serves(0);
    // More regions than there are slots for.
    let slots = device.frontend.ask64(msg::GET_MAX_MEM_SLOTS);
    let page = Region::new(1 << 41, 4096, 0);
    let add = |at: u64| {
        let mut payload = words64(&[0]);
        payload.extend(words64(&[(1 << 41) + at * 4096, 4096, (1 << 42) + at * 4096, 0]));
        device.frontend.command(msg::ADD_MEM_REG, &payload, &[page.file.as_fd()]).unwrap()
    };
    let added = (0..600).take_while(|&at| add(at) == 0).count() as u64;
    assert_eq!(added, slots - 2);
    victim.daemon.wait_log("more than 509 guest memory regions");
    let none = Region::new(1 << 43, 4096, 0);
    assert_eq!(device.frontend.command(msg::REM_MEM_REG, &single_region(&none), &[]).ok(), Some(1));
    device.assert_serves(0);
    drop(device);
    victim.serves("memory that means two things");
    victim.stops();
}

/// Two queues with one kick, which both are to serve.
fn one_kick(mut frontend: Frontend) -> Device {
    let features = negotiate(&mut frontend, 0);
    let memory = Memory::with(&[Span { guest: 1 << 20, len: 64 << 20 }]);
    frontend.set_mem_table(&memory);
    let mut rings: Vec<Ring> = (0..2).map(|_| Ring::new(Rc::clone(&memory), 128, 0, true)).collect();
    // The ring has a kick of its own in the test's hands; what it signals is the first one's.
    for (index, ring) in (0..).zip(&mut rings) {
        frontend.vring_state(msg::SET_VRING_NUM, index, 128);
        crate::support::device::set_ring_addr(&frontend, index, ring);
        frontend.vring_fd(msg::SET_VRING_CALL, index, &ring.call);
    }
    let kick = Event::new();
    for index in 0..2 {
        frontend.vring_fd(msg::SET_VRING_KICK, index, &kick);
        frontend.vring_state(msg::SET_VRING_ENABLE, index, 1);
    }
    for ring in &mut rings {
        ring.kick = kick.another();
    }
    Device { frontend, memory, rings, features }
}

#[track_caller]
fn both_serve(device: &mut Device, what: &str) {
    for queue in [0, 1, 1, 0] {
        let memory = Rc::clone(&device.memory);
        let at = memory.page_with(&crate::support::device::header(T_IN, 100));
        memory.write(at + 64, &[UNWRITTEN]);
        let ring = &mut device.rings[queue];
        let head = ring.chain(&[out(at, 16), back(at + 512, 512), back(at + 64, 1)]);
        ring.offer(head);
        ring.wait_used(&format!("queue {queue} {what}"));
        assert_eq!(memory.byte(at + 64), OK);
        assert_same(&memory.read(at + 512, 512), &pattern(100, 1), what);
    }
}

/// Two queues may have one kick, also where they are served by one worker, and by a successor that gets the eventfd from
/// its store, where systemd's has it once for both.
#[test]
fn two_queues_with_one_kick() {
    each_engine(|engine| {
        let mut victim = Victim::with(engine, Disk::new(), &["--workers=1"]);
        let mut device = one_kick(victim.daemon.connect());
        both_serve(&mut device, "with one kick for both");
        drop(device);
        victim.serves("two queues with one kick");
        victim.stops();

        // The parent's store.
        let disk = Disk::new();
        let daemon = Daemon::start(engine, &disk, &Options::with(&["--supervise", "--workers=1"]));
        let mut device = one_kick(daemon.connect());
        both_serve(&mut device, "before a crash");
        succession::kill(&daemon);
        both_serve(&mut device, "of a successor");
        drop((device, daemon));

        // systemd's.
        let Backend::Vublkd(name) = engine else { unreachable!("vublkd alone") };
        let disk = Disk::new();
        let mut manager = Manager::new(disk.dir.path());
        let extra = [format!("--engine={name}"), "--workers=1".to_owned()];
        let mut daemon = manager.start_with(&disk, &extra);
        let mut device = one_kick(daemon.connect());
        both_serve(&mut device, "before a crash");
        for _ in 0..2 {
            settle(&daemon);
            daemon.signal(Signal::KILL);
            daemon.wait_end(PATIENCE);
            daemon = manager.start_with(&disk, &extra);
            both_serve(&mut device, "of a successor that has the kick once");
            let log = daemon.log();
            assert!(!log.contains("cannot be served"), "{log}");
        }
        // A new kick for one of them leaves the other its own.
        device.new_kick(0);
        both_serve(&mut device, "with a kick of its own");
    });
}
