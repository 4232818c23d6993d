//! Front-ends that do not play by the rules. At most their own connection
//! ends; the daemon stays, serves the next one, and still obeys SIGTERM.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::start;
use crate::support::daemon::{Daemon, URING};
use crate::support::device::{Device, Setup, negotiate};
use crate::support::frontend::{feature, message, msg, single_region, words32, words64};
use crate::support::memory::{Memory, Region};
use crate::support::ring::Ring;
use crate::support::sys::{Deadline, Event, memory_file, open_fds, tick};

#[track_caller]
fn still_serves(daemon: &mut Daemon) {
    daemon.assert_alive();
    Device::plain(daemon).assert_serves(0);
}

#[test]
fn half_a_message_does_not_freeze_the_daemon() {
    for len in [1, 4, 11, 12, 15] {
        let (_disk, mut daemon) = start(URING);
        let frontend = daemon.connect();
        let whole = message(msg::SET_FEATURES, 1, &[0; 8]);
        frontend.send_bytes(&whole[..len], &[]).unwrap();
        daemon.stop_within(Duration::from_secs(1));
    }
}

#[test]
fn half_a_message_is_not_waited_for_for_ever() {
    let (_disk, mut daemon) = start(URING);
    let frontend = daemon.connect();
    frontend.send_bytes(&message(msg::SET_FEATURES, 1, &[0; 8])[..14], &[]).unwrap();
    frontend.wait_hangup_within(Duration::from_secs(30), "half a message");
    still_serves(&mut daemon);
}

/// Questions without end from a front-end that never reads the answers: the
/// daemon must not block in writing them.
#[test]
fn answers_that_are_not_read() {
    let (_disk, mut daemon) = start(URING);
    let frontend = daemon.connect();
    let mut payload = words32(&[0, 256, 0]);
    payload.resize(268, 0);
    let question = message(msg::GET_CONFIG, 1, &payload);
    let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
    // Until neither direction takes any more, or the daemon hangs up.
    let mut refused = 0;
    while refused < 20 {
        match rustix::net::send(&frontend.socket, &question, flags) {
            Ok(_) => refused = 0,
            Err(rustix::io::Errno::AGAIN) => {
                refused += 1;
                tick(&[], Duration::from_millis(5));
            }
            Err(_) => break,
        }
    }
    daemon.assert_alive();
    daemon.stop_within(Duration::from_secs(2));
}

/// A front-end that connects and says nothing keeps the others waiting only for
/// so long.
#[test]
fn a_silent_frontend_is_not_waited_for_for_ever() {
    let (_disk, mut daemon) = start(URING);
    let silent = daemon.connect();
    let next = daemon.connect();
    next.send(msg::GET_FEATURES, 0, &[], &[]).unwrap();
    Deadline::within(Duration::from_secs(60), "the silent front-end to be dropped").readable(&next.socket);
    next.receive().unwrap();
    drop((silent, next));
    still_serves(&mut daemon);
}

#[test]
fn a_message_in_pieces_is_a_message() {
    let (_disk, daemon) = start(URING);
    let frontend = daemon.connect();
    let whole = message(msg::GET_FEATURES, 1, &[]);
    for byte in &whole {
        frontend.send_bytes(&[*byte], &[]).unwrap();
    }
    assert_eq!(frontend.receive().unwrap().request, msg::GET_FEATURES);
    // Two in one piece.
    let two = [whole.clone(), whole].concat();
    frontend.send_bytes(&two, &[]).unwrap();
    for _ in 0..2 {
        assert_eq!(frontend.receive().unwrap().request, msg::GET_FEATURES);
    }
    let mut device = Device::over(frontend, Setup::default());
    device.assert_serves(0);
}

#[test]
fn garbage_ends_the_connection_only() {
    let (_disk, mut daemon) = start(URING);
    let long = message(msg::SET_FEATURES, 1, &vec![0; 70_000]);
    let mut huge = message(msg::SET_FEATURES, 1, &[]);
    huge[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let wrong: [(&str, Vec<u8>); 9] = [
        ("nothing but 0xff", vec![0xff; 64]),
        ("zeroes", vec![0; 64]),
        ("text", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("an unknown request", message(200, 1, &[])),
        ("version 2", message(msg::GET_FEATURES, 2, &[])),
        ("an answer", message(msg::GET_FEATURES, 1 | 4, &[0; 8])),
        ("a short payload", message(msg::SET_FEATURES, 1, &[0; 4])),
        ("4 GiB of payload", huge),
        ("a long payload", long),
    ];
    for (what, bytes) in &wrong {
        let frontend = daemon.connect();
        // The socket may be closed in the middle of it.
        let _ = rustix::net::send(&frontend.socket, bytes, rustix::net::SendFlags::NOSIGNAL);
        frontend.wait_hangup_within(Duration::from_secs(30), what);
        still_serves(&mut daemon);
    }
}

#[test]
fn messages_in_the_wrong_order() {
    let (_disk, mut daemon) = start(URING);
    // Each alone, first thing on a connection.
    let vring = words32(&[0, 1]);
    let address = words64(&[0; 5]);
    let table = words32(&[0, 0]);
    let cases: [(u32, &[u8]); 9] = [
        (msg::SET_VRING_ENABLE, &vring),
        (msg::GET_VRING_BASE, &vring),
        (msg::SET_VRING_BASE, &vring),
        (msg::SET_VRING_NUM, &vring),
        (msg::SET_VRING_ADDR, &address),
        (msg::SET_MEM_TABLE, &table),
        (msg::RESET_DEVICE, &[]),
        (msg::GET_CONFIG, &[]),
        (msg::SET_BACKEND_REQ_FD, &[]),
    ];
    for (request, payload) in cases {
        let frontend = daemon.connect();
        let _ = frontend.send(request, 0, payload, &[]);
        drop(frontend);
        still_serves(&mut daemon);
    }
}

#[test]
fn sizes_of_config_requests() {
    let (_disk, mut daemon) = start(URING);
    for (offset, size, really) in
        [(0, 60, 0), (0, 0, 0), (0, 257, 257), (0, u32::MAX, 16), (250, 10, 10), (u32::MAX, 4, 4), (60, 4, 4)]
    {
        let mut frontend = daemon.connect();
        negotiate(&mut frontend, 0);
        let mut payload = words32(&[offset, size, 0]);
        payload.resize(12 + really, 0);
        // Answered with an error, with zeroes, or by hanging up.
        let _ = frontend.send(msg::GET_CONFIG, 0, &payload, &[]);
        let _ = frontend.receive();
        drop(frontend);
        let mut frontend = daemon.connect();
        negotiate(&mut frontend, 0);
        let _ = frontend.command(msg::SET_CONFIG, &payload, &[]);
        drop(frontend);
        still_serves(&mut daemon);
    }
}

#[test]
fn ring_sizes_that_are_none() {
    let (_disk, mut daemon) = start(URING);
    for size in [0, 3, 100, 1023, 2048, 32768, 65536, u32::MAX] {
        let mut frontend = daemon.connect();
        negotiate(&mut frontend, 0);
        let memory = Memory::plain();
        frontend.set_mem_table(&memory);
        let ring = Ring::new(memory, 128, 0, false);
        // Refused at once, or the queue never starts; said in the log anyway.
        let told = frontend.command(msg::SET_VRING_NUM, &words32(&[0, size]), &[]);
        if matches!(told, Ok(0)) {
            let payload = crate::support::device::ring_addr(0, &ring);
            let _ = frontend.command(msg::SET_VRING_ADDR, &payload, &[]);
            let kick = [ring.kick.as_fd()];
            let _ = frontend.command(msg::SET_VRING_KICK, &0_u64.to_le_bytes(), &kick);
            let _ = frontend.command(msg::SET_VRING_ENABLE, &words32(&[0, 1]), &[]);
            ring.kick.signal();
        }
        drop(frontend);
        still_serves(&mut daemon);
        assert_eq!(ring.used_idx(), 0);
    }
}

#[test]
fn rings_that_are_not_in_memory() {
    let (_disk, mut daemon) = start(URING);
    let memory = Memory::plain();
    let region = &memory.regions[0];
    let end = region.user + region.len;
    let start = region.user;
    for (table, used, avail) in [
        (0, start, start + 4096),
        (start, 0, start + 4096),
        (start, start + 4096, 0),
        (end - 16, start, start + 4096),
        (start, end - 8, start + 4096),
        (start, start + 4096, end - 4),
        (start + 1, start + 4096, start + 8192),
        (start, start + 4097, start + 8192),
        (start, start + 4096, start + 8193),
        (u64::MAX - 7, u64::MAX - 7, u64::MAX - 7),
    ] {
        let mut frontend = daemon.connect();
        negotiate(&mut frontend, 0);
        frontend.set_mem_table(&memory);
        let kick = Event::new();
        frontend.vring_state(msg::SET_VRING_NUM, 0, 128);
        let mut payload = words32(&[0, 0]);
        payload.extend(words64(&[table, used, avail, 0]));
        if matches!(frontend.command(msg::SET_VRING_ADDR, &payload, &[]), Ok(0)) {
            let fds = [kick.as_fd()];
            let _ = frontend.command(msg::SET_VRING_KICK, &0_u64.to_le_bytes(), &fds);
            let _ = frontend.command(msg::SET_VRING_ENABLE, &words32(&[0, 1]), &[]);
            kick.signal();
        }
        drop(frontend);
        still_serves(&mut daemon);
    }
}

#[test]
fn memory_tables_that_lie() {
    let (_disk, mut daemon) = start(URING);
    let good = Region::new(1 << 20, 1 << 20, 0);
    let pipe = rustix::pipe::pipe().unwrap();
    let event = Event::new();
    let empty = memory_file(0);
    let wrong = |guest, len, user, offset| {
        let mut payload = words64(&[0]);
        payload.extend(words64(&[guest, len, user, offset]));
        payload
    };
    let honest = single_region(&good);
    let cases: [(&str, Vec<u8>, Vec<BorrowedFd<'_>>); 11] = [
        ("no descriptor", honest.clone(), vec![]),
        ("a pipe", honest.clone(), vec![pipe.0.as_fd()]),
        ("an eventfd", honest.clone(), vec![event.as_fd()]),
        ("an empty file", honest.clone(), vec![empty.as_fd()]),
        ("longer than its file", wrong(0, 2 << 20, 1 << 30, 0), vec![good.file.as_fd()]),
        ("past its file", wrong(0, 4096, 1 << 30, 1 << 20), vec![good.file.as_fd()]),
        ("an offset that overflows", wrong(0, 8192, 1 << 30, u64::MAX - 4095), vec![good.file.as_fd()]),
        (
            "guest addresses that overflow",
            wrong(u64::MAX - 4095, 1 << 20, 1 << 30, 0),
            vec![good.file.as_fd()],
        ),
        ("user addresses that overflow", wrong(0, 1 << 20, u64::MAX - 4095, 0), vec![good.file.as_fd()]),
        ("no bytes", wrong(0, 0, 1 << 30, 0), vec![good.file.as_fd()]),
        ("two descriptors", honest, vec![good.file.as_fd(), good.file.as_fd()]),
    ];
    // Each is refused by its reply, and costs nothing else.
    let mut device = Device::new(&daemon, Setup { queues: 2, ..Setup::default() });
    for (what, payload, fds) in &cases {
        let told = device.frontend.command(msg::ADD_MEM_REG, payload, fds);
        assert_eq!(told.ok(), Some(1), "a region with {what}");
        device.assert_serves(0);
    }
    let other = Region::new((1 << 20) + 4096, 1 << 20, 0);
    let fds = [other.file.as_fd()];
    let told = device.frontend.command(msg::ADD_MEM_REG, &single_region(&other), &fds);
    assert_eq!(told.ok(), Some(1), "a region that overlaps the memory that is there");
    let told = device.frontend.command(msg::REM_MEM_REG, &single_region(&other), &[]);
    assert_eq!(told.ok(), Some(1), "a region that is not there");
    let two = Memory { regions: vec![other, Region::new(1 << 20, 1 << 20, 0)] };
    assert_eq!(device.frontend.try_mem_table(&two).ok(), Some(1), "a table that overlaps itself");
    device.assert_serves(1);
    drop(device);
    // Without a reply to say so in, the connection ends.
    for (what, payload, fds) in &cases {
        let mut frontend = daemon.connect();
        negotiate(&mut frontend, 0);
        frontend.send(msg::ADD_MEM_REG, 0, payload, fds).unwrap();
        frontend.wait_hangup(what);
        still_serves(&mut daemon);
    }
}

/// A message that makes sense to the protocol and not to this daemon is refused by its reply; what
/// it was to change stays as it was.
#[test]
fn a_message_is_refused_by_its_reply_alone() {
    let (_disk, mut daemon) = start(URING);
    let mut device = Device::plain(&daemon);
    let file = memory_file(4096);
    let mut inflight = words64(&[1 << 20, 0]);
    inflight.extend([9, 0, 0xff, 0xff, 0, 0, 0, 0]);
    let refused: [(u32, Vec<u8>, Option<BorrowedFd<'_>>); 8] = [
        (msg::SET_VRING_NUM, words32(&[256, 128]), None),
        (msg::SET_VRING_BASE, words32(&[0, 1 << 16]), None),
        (msg::SET_VRING_ENABLE, words32(&[4, 1]), None),
        (msg::SET_VRING_ENABLE, words32(&[0, 2]), None),
        (msg::SET_VRING_CALL, 9_u64.to_le_bytes().to_vec(), None),
        (msg::SET_MEM_TABLE, words32(&[0, 0]), None),
        (msg::SET_INFLIGHT_FD, inflight, Some(file.as_fd())),
        (msg::SET_BACKEND_REQ_FD, Vec::new(), Some(file.as_fd())),
    ];
    for (request, payload, fd) in refused {
        let told = device.frontend.command(request, &payload, fd.as_slice());
        assert_eq!(told.ok(), Some(1), "message {request}");
        device.assert_serves(0);
    }
    // After features that were refused the two ends would not mean the same.
    let told = device.frontend.command(msg::SET_FEATURES, &feature::RING_PACKED.to_le_bytes(), &[]);
    assert_eq!(told.ok(), Some(1));
    device.frontend.wait_hangup("features that were not offered");
    drop(device);
    still_serves(&mut daemon);
}

#[test]
fn surplus_descriptors_are_closed() {
    let (_disk, mut daemon) = start(URING);
    still_serves(&mut daemon);
    daemon.connect().ask64(msg::GET_FEATURES);
    let before = Deadline::new("the daemon to be idle").until_slowly(|| Some(open_fds(daemon.pid())));
    let event = Event::new();
    let many: Vec<_> = (0..32).map(|_| event.as_fd()).collect();
    for count in [1, 2, 8, 32] {
        for (request, payload) in [
            (msg::GET_FEATURES, vec![]),
            (msg::SET_FEATURES, feature::VERSION_1.to_le_bytes().to_vec()),
            (msg::SET_OWNER, vec![]),
            (msg::SET_VRING_KICK, vec![0; 8]),
            (msg::SET_VRING_CALL, vec![0; 8]),
            (msg::SET_VRING_ERR, vec![0; 8]),
            (msg::SET_MEM_TABLE, words32(&[0, 0])),
            (msg::GET_QUEUE_NUM, vec![]),
            (99, vec![]),
        ] {
            let frontend = daemon.connect();
            let _ = frontend.send(request, 0, &payload, &many[..count]);
            let _ = frontend.send(msg::GET_FEATURES, 0, &[], &many[..count]);
            let _ = frontend.receive();
        }
    }
    daemon.connect().ask64(msg::GET_FEATURES);
    Deadline::new(format!("the daemon to go back to {before} descriptors"))
        .until_slowly(|| (open_fds(daemon.pid()) <= before).then_some(()));
    still_serves(&mut daemon);
}

/// A ring that breaks does not end the connection, and the error descriptor
/// is told about it.
#[test]
fn a_broken_ring_is_reported() {
    let (_disk, daemon) = start(URING);
    let mut device = Device::plain(&daemon);
    let error = Event::new();
    device.frontend.vring_fd(msg::SET_VRING_ERR, 0, &error);
    device.assert_serves(0);
    let ring = &device.rings[0];
    ring.memory.store16(ring.avail + 2, ring.avail_idx.wrapping_add(1000));
    ring.kick.signal();
    error.wait("the error descriptor of a broken ring");
    device.frontend.sync();
}
