//! Front-ends come, wait, go and come back.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::{each_engine, start};
use crate::support::daemon::{Daemon, Options, URING};
use crate::support::device::{Device, OK, Setup, T_FLUSH, T_IN, negotiate, start_ring};
use crate::support::disk::{Disk, SECTOR, assert_same, pattern, salted};
use crate::support::frontend::{Frontend, msg, protocol};
use crate::support::memory::Memory;
use crate::support::ring::Ring;
use crate::support::sys::{Deadline, open_fds, readable_within};

#[test]
fn second_frontend_waits_its_turn() {
    let (_disk, daemon) = start(URING);
    let mut first = Device::plain(&daemon);
    let second = daemon.connect();
    second.send(msg::GET_FEATURES, 0, &[], &[]).unwrap();
    let answered = readable_within(second.socket.as_fd(), Duration::from_millis(100));
    assert!(!answered, "a second front-end was answered");
    first.assert_serves(0);
    drop(first);
    // Its turn now: the question asked back then is answered.
    let answer = second.receive().unwrap();
    assert_eq!(answer.request, msg::GET_FEATURES);
    let mut second = Device::over(second, Setup::default());
    second.assert_serves(0);
}

#[test]
fn frontends_one_after_the_other() {
    each_engine(|engine| {
        let (disk, daemon) = start(engine);
        for round in 1..20 {
            let mut device = Device::plain(&daemon);
            device.write(round * 8, &salted(round, round * 8, 8));
            assert_same(&device.read(0, 8), &pattern(0, 8), "start of the disk");
        }
        for round in 1..20 {
            let want = salted(round, round * 8, 8);
            assert_same(&disk.read(round * 8, 8), &want, "in the file");
        }
    });
}

/// The guest keeps its rings over a lost connection and goes on where the
/// used index stands, as QEMU does.
#[test]
fn reconnect_goes_on_from_the_used_index() {
    each_engine(|engine| {
        let (_disk, daemon) = start(engine);
        let mut device = Device::plain(&daemon);
        for sector in 0..300 {
            assert_same(&device.read(sector, 1), &pattern(sector, 1), "a sector");
        }
        for _ in 0..5 {
            let (memory, rings) = device.disconnect();
            let mut frontend = daemon.connect();
            let features = negotiate(&mut frontend, 0);
            frontend.set_mem_table(&memory);
            start_ring(&frontend, 0, &rings[0]);
            device = Device { frontend, memory, rings, features };
            for sector in 300..400 {
                assert_same(&device.read(sector, 1), &pattern(sector, 1), "a sector");
            }
        }
    });
}

/// A front-end that goes away with requests on their way: they are finished
/// before anybody else is served, and never touch memory afterwards.
#[test]
fn leaving_with_requests_in_flight() {
    each_engine(|engine| {
        let (disk, daemon) = start(engine);
        for round in 1..10 {
            let mut device = Device::new(&daemon, Setup { ring_size: 256, ..Setup::default() });
            for index in 0..64 {
                let data = salted(round, index * 64, 64);
                device.submit(0, 1, index * 64, &data, 0);
            }
            let (_memory, mut rings) = device.disconnect();
            // The next front-end is served: the old one's requests are over.
            let mut next = Device::plain(&daemon);
            let settled = rings[0].used_idx();
            assert_eq!(next.run(0, T_FLUSH, 0, &[], 0).status, OK);
            assert_eq!(rings[0].used_idx(), settled, "a write to a ring left behind");
            // Whatever was answered is on the disk.
            while let Some(used) = rings[0].take_used() {
                assert_eq!(used.len, 1);
            }
        }
        // Each 64 sectors are of one round or another, whole.
        for index in 0..64 {
            let got = disk.read(index * 64, 64);
            let known = (0..10).any(|round| got == salted(round, index * 64, 64));
            assert!(known, "sectors from {} are torn", index * 64);
        }
    });
}

#[test]
fn no_descriptor_leaks_over_connections() {
    each_engine(|engine| {
        let (_disk, daemon) = start(engine);
        // Counts with nobody connected; the hang-up has been dealt with when
        // the next front-end is answered, so the count settles soon.
        let round = || {
            let mut device = Device::new(&daemon, Setup { queues: 3, ..Setup::default() });
            device.assert_serves(2);
        };
        for _ in 0..3 {
            round();
        }
        let idle = |limit: Option<usize>| {
            Deadline::new("the descriptor count to settle").until_slowly(|| {
                let count = open_fds(daemon.pid());
                limit.is_none_or(|limit| count <= limit).then_some(count)
            })
        };
        drop(Device::plain(&daemon));
        // Whoever connects and is answered knows the one before is gone; then
        // only this last connection may still be open.
        drop_quietly(&daemon);
        let before = idle(None);
        for _ in 0..50 {
            round();
        }
        drop_quietly(&daemon);
        let after = idle(Some(before));
        assert!(after <= before, "{before} descriptors before, {after} after");
    });
}

/// Connects, waits for an answer, leaves.
fn drop_quietly(daemon: &Daemon) {
    daemon.connect().ask64(msg::GET_FEATURES);
}

#[test]
fn empty_connections_do_no_harm() {
    let (_disk, daemon) = start(URING);
    for _ in 0..100 {
        drop(UnixStream::connect(&daemon.socket).unwrap());
    }
    Device::plain(&daemon).assert_serves(0);
}

#[test]
fn two_daemons_do_not_meet() {
    let (_disk, daemon) = start(URING);
    let (_other_disk, other) = start(URING);
    let mut one = Device::plain(&daemon);
    let mut two = Device::plain(&other);
    one.write(0, &salted(1, 0, 1));
    two.write(0, &salted(2, 0, 1));
    assert_eq!(one.read(0, 1), salted(1, 0, 1));
    assert_eq!(two.read(0, 1), salted(2, 0, 1));
}

/// The back-end channel is taken; one that closes does not end the session.
#[test]
fn backend_channel() {
    let (_disk, daemon) = start(URING);
    let mut frontend = daemon.connect();
    frontend.ask64(msg::GET_FEATURES);
    let offered = frontend.ask64(msg::GET_PROTOCOL_FEATURES);
    assert_ne!(offered & protocol::BACKEND_REQ, 0);
    frontend.tell64(msg::SET_PROTOCOL_FEATURES, offered);
    frontend.acks = true;
    let (ours, theirs) = UnixStream::pair().unwrap();
    frontend.tell(msg::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    drop(theirs);
    drop(ours);
    let (_again, theirs) = UnixStream::pair().unwrap();
    frontend.tell(msg::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    drop(theirs);
    let frontend = Frontend { socket: frontend.socket, acks: true };
    let mut device = Device::over(frontend, Setup::default());
    device.assert_serves(0);
}

/// A front-end that waits for no answer: all messages and the first requests
/// are on their way before the daemon has looked at any of them.
#[test]
fn messages_without_waiting() {
    each_engine(|engine| {
        let (_disk, daemon) = start(engine);
        for _ in 0..10 {
            let mut frontend = daemon.connect();
            let features = negotiate(&mut frontend, 0);
            frontend.acks = false;
            let memory = Memory::plain();
            frontend.set_mem_table(&memory);
            let mut device = Device { frontend, memory, rings: Vec::new(), features };
            for index in 0..4 {
                let ring = Ring::new(device.memory.clone(), 64, 0, true);
                start_ring(&device.frontend, index, &ring);
                device.rings.push(ring);
            }
            for queue in 0..4 {
                device.assert_serves(queue);
            }
        }
    });
}

/// The default number of queues is all a front-end can use.
#[test]
fn many_queues() {
    let disk = Disk::new();
    let options = Options { queues: None, ..Options::default() };
    each_engine(|engine| {
        let daemon = Daemon::start(engine, &disk, &options);
        let memory = crate::support::memory::Memory::plain();
        let mut device =
            Device::new(&daemon, Setup { queues: 128, ring_size: 16, memory, ..Setup::default() });
        assert_eq!(device.frontend.ask64(msg::GET_QUEUE_NUM), 256);
        let waiting: Vec<_> =
            (0..128).map(|queue| device.submit(queue, T_IN, queue as u64, &[], SECTOR)).collect();
        for (queue, pending) in waiting.iter().enumerate() {
            let used = device.rings[queue].wait_used("one of 128 queues");
            let done = device.outcome(pending, used);
            assert_eq!(done.status, OK);
            assert_same(&done.data, &pattern(queue as u64, 1), "a sector");
        }
    });
}
