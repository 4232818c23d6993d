//! Descriptors that are not what they must be, or change while they are used: they end what they
//! were sent for, and keep no operator from asking or stopping the daemon.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::OFlags;
use rustix::process::Signal;

use super::{each_engine, start};
use crate::support::control::settle;
use crate::support::daemon::{Daemon, Options, URING};
use crate::support::device::{Device, T_IN, negotiate, ring_addr};
use crate::support::disk::Disk;
use crate::support::freeze::Frozen;
use crate::support::frontend::{Frontend, message, msg, words32, words64};
use crate::support::memory::Memory;
use crate::support::ring::Ring;
use crate::support::sys::{memory_file, skip};

/// A second after `--stop-timeout-ms`, which is a second.
const STOPPED: Duration = Duration::from_secs(2);

fn raw(fd: i32) -> OwnedFd {
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: just made, and known to nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// What looks like an eventfd to some, and is none.
fn no_eventfds() -> Vec<(&'static str, OwnedFd)> {
    // SAFETY: system calls that read at most an empty set of signals.
    let (timer, signals, epoll, watcher) = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        (
            libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK),
            libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK),
            libc::epoll_create1(0),
            libc::inotify_init1(libc::IN_NONBLOCK),
        )
    };
    let (_reader, pipe) = rustix::pipe::pipe().unwrap();
    vec![
        ("a timerfd", raw(timer)),
        ("a signalfd", raw(signals)),
        ("an epoll", raw(epoll)),
        ("an inotify", raw(watcher)),
        ("a pipe", pipe),
        ("a memfd", memory_file(4096).into()),
        ("a socket", UnixStream::pair().unwrap().0.into()),
        ("/dev/null", std::fs::File::options().read(true).write(true).open("/dev/null").unwrap().into()),
    ]
}

#[test]
fn kicks_calls_and_errs_are_eventfds() {
    let (_disk, mut daemon) = start(URING);
    let mut device = Device::plain(&daemon);
    for request in [msg::SET_VRING_KICK, msg::SET_VRING_CALL, msg::SET_VRING_ERR] {
        for (what, fd) in no_eventfds() {
            let told = device.frontend.command(request, &0_u64.to_le_bytes(), &[fd.as_fd()]);
            assert_eq!(told.ok(), Some(1), "{what} in message {request}");
            device.assert_serves(0);
        }
    }
    daemon.wait_log("not an eventfd");
    drop(device);
    // Without a reply to say so in, the connection ends.
    for (what, fd) in no_eventfds() {
        let mut frontend = daemon.connect();
        negotiate(&mut frontend, 0);
        frontend.send(msg::SET_VRING_CALL, 0, &0_u64.to_le_bytes(), &[fd.as_fd()]).unwrap();
        frontend.wait_hangup(what);
    }
    Device::plain(&daemon).assert_serves(0);
    daemon.assert_alive();
}

/// An eventfd that is full and blocking, whatever the daemon does about it: a thread of the
/// test takes O_NONBLOCK back, and fills it again, as fast as it can.
struct Stubborn {
    fd: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Stubborn {
    fn new() -> Self {
        let fd = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let (theirs, ends) = (Arc::clone(&fd), Arc::clone(&stop));
        // As full as it gets, so that a write of 1 has to wait.
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                rustix::fs::fcntl_setfl(&theirs, OFlags::RDWR).unwrap();
            }
        });
        Self { fd, stop, thread: Some(thread) }
    }
}

impl Drop for Stubborn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A worker that waits in a write is brought back when it is asked for something.
#[test]
fn a_full_call_that_blocks_stops_nothing() {
    each_engine(|engine| {
        let disk = Disk::new();
        let mut daemon = Daemon::start(engine, &disk, &Options::default());
        for round in 0..3 {
            let mut device = Device::plain(&daemon);
            device.assert_serves(0);
            let call = Stubborn::new();
            device.frontend.vring_fd(msg::SET_VRING_CALL, 0, &*call.fd);
            device.rings[0].set_used_event(device.rings[0].seen);
            for sector in 0..4 {
                device.submit(0, T_IN, sector, &[], 512);
            }
            device.rings[0].spin_used("a read with a call that blocks");
            if round == 0 {
                assert_eq!(device.frontend.vring_base(0).unwrap(), device.rings[0].avail_idx);
            }
            settle(&daemon);
            if round == 2 {
                daemon.signal(Signal::TERM);
                daemon.wait_end(STOPPED);
            }
        }
    });
}

/// The control thread itself writes the error descriptor of a ring that does not start, and each
/// new call.
#[test]
fn a_full_err_that_blocks_stops_nothing() {
    let (_disk, mut daemon) = start(URING);
    let mut frontend = daemon.connect();
    negotiate(&mut frontend, 0);
    let memory = Memory::plain();
    frontend.set_mem_table(&memory);
    let ring = Ring::new(memory, 128, 0, false);
    let (err, call) = (Stubborn::new(), Stubborn::new());
    frontend.vring_fd(msg::SET_VRING_ERR, 0, &*err.fd);
    frontend.vring_state(msg::SET_VRING_NUM, 0, 3);
    frontend.tell(msg::SET_VRING_ADDR, &ring_addr(0, &ring), &[]);
    frontend.vring_fd(msg::SET_VRING_KICK, 0, &ring.kick);
    for _ in 0..200 {
        frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
        frontend.vring_fd(msg::SET_VRING_CALL, 0, &*call.fd);
    }
    frontend.sync();
    settle(&daemon);
    daemon.signal(Signal::TERM);
    daemon.wait_end(STOPPED);
}

/// A TCP socket with more to send than its peer takes: to close its last descriptor takes as long
/// as it lingers.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 1 << 16]).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::from_secs(600))).unwrap();
    (socket.into(), peer)
}

/// A connection that brings these messages, each with so many descriptors that linger, of which the
/// daemon has the last ones: they waited in the backlog.
fn deliver(daemon: &Daemon, messages: &[(&[u8], usize)]) -> (Frontend, Vec<TcpStream>) {
    let served = daemon.connect();
    served.ask64(msg::GET_FEATURES);
    let waits = daemon.connect();
    let mut peers = Vec::new();
    for &(bytes, count) in messages {
        if count == 0 {
            waits.send_bytes(bytes, &[]).unwrap();
            continue;
        }
        let (socket, peer) = lingering();
        waits.send_bytes(bytes, &vec![socket.as_fd(); count]).unwrap();
        peers.push(peer);
    }
    (waits, peers)
}

#[test]
fn descriptors_that_linger_are_not_waited_for() {
    let (_disk, mut daemon) = start(URING);
    let number = [0; 8];
    let cases: [(u32, &[u8], usize); 9] = [
        (msg::SET_VRING_CALL, &number, 1),
        (msg::SET_VRING_ERR, &number, 1),
        (msg::SET_VRING_KICK, &number, 2),
        (msg::GET_FEATURES, &[], 1),
        (msg::SET_FEATURES, &number, 32),
        (msg::GET_FEATURES, &[], 60),
        (msg::SET_BACKEND_REQ_FD, &[], 1),
        (msg::REM_MEM_REG, &[0; 40], 1),
        (99, &[], 1),
    ];
    for (request, payload, count) in cases {
        let (frontend, _peers) = deliver(&daemon, &[(&message(request, 1, payload), count)]);
        frontend.wait_hangup(&format!("message {request} with {count} sockets"));
        daemon.connect().ask64(msg::GET_FEATURES);
    }
    // Behind a message that ends the connection, so that nobody reads it.
    let (first, second) = (message(99, 1, &[]), message(msg::SET_OWNER, 1, &[]));
    let (frontend, _unread) = deliver(&daemon, &[(&first, 0), (&second, 3)]);
    frontend.wait_hangup("a message that makes no sense, before another");
    daemon.connect().ask64(msg::GET_FEATURES);
    // Half a message.
    let (frontend, _half) = deliver(&daemon, &[(&second[..4], 1)]);
    drop(frontend);
    daemon.connect().ask64(msg::GET_FEATURES);
    // In the queue of the back-end channel, which nobody reads either.
    let mut frontend = daemon.connect();
    negotiate(&mut frontend, 0);
    let (ours, theirs) = UnixStream::pair().unwrap();
    frontend.tell(msg::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    let (socket, _peer) = lingering();
    Frontend::new(ours).send_bytes(&second, &[socket.as_fd()]).unwrap();
    drop((theirs, socket, frontend));
    Device::plain(&daemon).assert_serves(0);
    settle(&daemon);
    daemon.stop_within(STOPPED);
}

/// Under supervision nothing that is refused is kept, so that the supervisor does not wait either.
#[test]
fn a_supervisor_keeps_nothing_that_lingers() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--supervise"]));
    for request in [msg::SET_VRING_CALL, msg::SET_MEM_TABLE, msg::SET_INFLIGHT_FD] {
        let (frontend, _peers) = deliver(&daemon, &[(&message(request, 1, &[0; 8]), 1)]);
        frontend.wait_hangup("a message with a socket that lingers");
    }
    Device::plain(&daemon).assert_serves(0);
    daemon.stop_within(STOPPED);
}

/// Whatever the control thread waits for: it is stopped here by a debugger.
#[test]
fn sigterm_ends_a_daemon_whose_control_thread_does_not_run() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--stop-timeout-ms=300"]));
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let frozen = match Frozen::thread(&daemon, "vublk-control") {
        Ok(frozen) => frozen,
        Err(why) => return skip("sigterm_ends_a_daemon_whose_control_thread_does_not_run", &why),
    };
    device.assert_serves(0);
    daemon.signal(Signal::TERM);
    let asked = Instant::now();
    frozen.wait_ended();
    let status = daemon.wait_end(Duration::from_millis(1300).saturating_sub(asked.elapsed()));
    assert_eq!(status.code(), Some(3), "{}", daemon.log());
}

#[test]
fn one_wrong_descriptor_of_many_refuses_the_table() {
    let (_disk, daemon) = start(URING);
    let mut device = Device::plain(&daemon);
    let region = &device.memory.regions[0];
    let mut payload = words32(&[2, 0]);
    for at in [0, 1] {
        payload.extend(words64(&[region.guest + at * (1 << 30), 4096, region.user + at * (1 << 30), 0]));
    }
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let fds = [region.file.as_fd(), theirs.as_fd()];
    assert_eq!(device.frontend.command(msg::SET_MEM_TABLE, &payload, &fds).ok(), Some(1));
    device.assert_serves(0);
}
