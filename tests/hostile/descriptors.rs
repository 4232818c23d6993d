//! Every message with descriptors that it must not have: of every kind, and more of them than there may be.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::Victim;
use crate::support::daemon::URING;
use crate::support::device::negotiate;
use crate::support::frontend::{msg, words32, words64};
use crate::support::sys::{Event, memory_file};

/// All that a process can have: some of it can be polled, mapped or written, some of it is our own kind of thing.
fn kinds() -> Vec<(&'static str, OwnedFd)> {
    let mut params = [0_u8; 120];
    // SAFETY: each makes a descriptor, and reads or writes at most the 120 bytes of io_uring_params.
    let (ring, epoll, process, timer) = unsafe {
        (
            libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr()) as i32,
            libc::epoll_create1(libc::EPOLL_CLOEXEC),
            libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) as i32,
            libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC),
        )
    };
    let raw = |what, fd: i32| {
        // SAFETY: just made, and owned by no other value.
        (fd >= 0).then(|| (what, unsafe { OwnedFd::from_raw_fd(fd) }))
    };
    let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
    let (pipe, _) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let (stream, _) = UnixStream::pair().unwrap();
    let mut all: Vec<(&'static str, OwnedFd)> = vec![
        ("a file", tempfile::tempfile().unwrap().into()),
        ("a memfd", memory_file(4096).into()),
        ("a socket", stream.into()),
        ("a pipe", pipe),
        ("an eventfd", Event::new().as_fd().try_clone_to_owned().unwrap()),
        ("a folder", open("/")),
        ("/dev/null", open("/dev/null")),
        ("a file of /proc", open("/proc/self/status")),
    ];
    all.extend(
        [raw("an io_uring", ring), raw("an epoll", epoll), raw("a process", process), raw("a timer", timer)]
            .into_iter()
            .flatten(),
    );
    all
}

/// The messages that bring descriptors, or that are carried out without those that they bring (REM_MEM_REG).
const BRINGS: [u32; 9] = [
    msg::SET_MEM_TABLE,
    msg::SET_LOG_BASE,
    msg::SET_VRING_KICK,
    msg::SET_VRING_CALL,
    msg::SET_VRING_ERR,
    msg::SET_BACKEND_REQ_FD,
    msg::SET_INFLIGHT_FD,
    msg::ADD_MEM_REG,
    msg::REM_MEM_REG,
];
/// The messages that the document has, and some that it has not.
const MESSAGES: std::ops::RangeInclusive<u32> = 0..=46;

#[test]
fn every_message_with_every_descriptor() {
    let mut victim = Victim::new(URING);
    let kinds = kinds();
    assert!(kinds.len() >= 8);
    let mut refused = 0;
    for request in MESSAGES {
        for (what, fd) in &kinds {
            for count in [1, 3] {
                let mut frontend = victim.daemon.connect();
                negotiate(&mut frontend, 0);
                let payload = match request {
                    msg::SET_MEM_TABLE | msg::SET_VRING_NUM | msg::SET_VRING_BASE => words32(&[0, 0]),
                    msg::SET_LOG_BASE => words64(&[4096, 0]),
                    msg::SET_INFLIGHT_FD | msg::GET_INFLIGHT_FD => vec![0; 24],
                    msg::SET_VRING_ADDR | msg::ADD_MEM_REG | msg::REM_MEM_REG => vec![0; 40],
                    _ => vec![0; 8],
                };
                let fds: Vec<BorrowedFd<'_>> = vec![fd.as_fd(); count];
                let flags = if count == 1 { 1 << 3 } else { 0 };
                if frontend.send(request, flags, &payload, &fds).is_err() {
                    assert_eq!(*what, "an io_uring", "newer kernels send no rings");
                    continue;
                }
                // It is answered, refused by an answer, or the connection ends: it is never silent.
                let _ = frontend.send(msg::GET_FEATURES, 0, &[], &[]);
                let is_refused = match frontend.receive() {
                    Ok(answer) => answer.request == request && answer.payload == 1_u64.to_le_bytes(),
                    Err(e) => {
                        let is_silent = e.kind() == std::io::ErrorKind::WouldBlock;
                        assert!(!is_silent, "no answer to message {request} with {count} × {what}");
                        true
                    }
                };
                assert!(is_refused || BRINGS.contains(&request), "message {request} took {count} × {what}");
                refused += usize::from(is_refused);
            }
        }
    }
    assert!(refused > 500, "only {refused} were refused");
    victim.daemon.wait_log("it must not bring descriptors");
    victim.serves("every message with every descriptor");
    victim.stops();
}

/// More than a memory table may have, at the start of a message, in its middle, and in many pieces of one message.
#[test]
fn floods_of_descriptors() {
    let mut victim = Victim::new(URING);
    let event = Event::new();
    let many = vec![event.as_fd(); 64];
    for request in MESSAGES {
        let frontend = victim.daemon.connect();
        frontend.send(request, 0, &[0; 8], &many[..33]).unwrap();
        frontend.wait_hangup(&format!("33 descriptors with message {request}"));
    }
    victim.daemon.wait_log("a message with more than 32 descriptors");
    let whole = crate::support::frontend::message(msg::SET_MEM_TABLE, 1, &[0; 40]);
    for step in [1, 7, 13] {
        let frontend = victim.daemon.connect();
        for piece in whole.chunks(step) {
            // The daemon may have hung up by now.
            if frontend.send_bytes(piece, &many).is_err() {
                break;
            }
        }
        frontend.wait_hangup("descriptors with each piece of a message");
    }
    // In messages that the daemon will not read any more.
    let frontend = victim.daemon.connect();
    frontend.send(99, 0, &[], &[]).unwrap();
    for _ in 0..20 {
        if frontend.send(msg::SET_VRING_CALL, 0, &[0; 8], &many).is_err() {
            break;
        }
    }
    frontend.wait_hangup("a message that there is not");
    victim.serves("floods of descriptors");
    victim.stops();
}
