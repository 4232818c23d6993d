//! A completion queue that overflows ends the multishot polls by which kicks
//! are heard; the engine has to notice, and to listen again.
//!
//! The queue is as short as the kernel lets it be. Without DEFER_TASKRUN every
//! kick puts a completion into it, also while the worker copies megabytes out
//! of its pool. That it did overflow is read from the kernel's own account of
//! the ring.
//!
//! It was seen to fail: with the line of the engine that remembers an ended
//! poll taken out, the first queue that is tried afterwards stays silent.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::wait_armed;
use crate::support::daemon::{Daemon, Options, URING};
use crate::support::device::{Device, OK, Setup, T_IN, header};
use crate::support::disk::{Disk, assert_same};
use crate::support::memory::{Memory, Span};
use crate::support::ring::{back, out};
use crate::support::sys::{Deadline, PATIENCE, skip};

const QUEUES: u16 = 8;
/// An operation of each of 256 slots, two of each poll: the length of the
/// submission queue, rounded up, below which no completion queue may be.
const ENTRIES: &str = "--io-uring-cq-entries=512";
/// Bytes that the worker copies while nobody looks at its completions.
const COPIED: usize = 8 << 20;

/// Where the kernel tells about the daemon's ring.
fn account_of(pid: u32) -> PathBuf {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let ring = fds
        .filter(|fd| {
            std::fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().contains("[io_uring]"))
        })
        .map(|fd| fd.file_name());
    let rings: Vec<_> = ring.collect();
    assert_eq!(rings.len(), 1, "one worker, one ring");
    Path::new(&format!("/proc/{pid}/fdinfo")).join(&rings[0])
}

/// Completions that the kernel keeps aside, the queue being full.
fn overflown(account: &Path) -> usize {
    let text = std::fs::read_to_string(account).unwrap();
    let list = text.lines().skip_while(|line| !line.starts_with("CqOverflowList"));
    list.filter(|line| line.contains("user_data=")).count()
}

#[test]
fn no_queue_goes_deaf_when_completions_overflow() {
    let disk = Disk::new();
    let extra = Options::with(&[
        "--workers=1",
        "--io-uring-refuse=defer-taskrun",
        ENTRIES,
        "--pool-chunks=4",
        &format!("--pool-chunk-len={COPIED}"),
    ]);
    let mut daemon = Daemon::start(URING, &disk, &Options { queues: Some(QUEUES), ..extra });
    let buffers = 4 << 30;
    let room = 16 << 20;
    let memory =
        Memory::with(&[Span { guest: 1 << 20, len: 4 << 20 }, Span { guest: buffers, len: 4 * room }]);
    let mut device = Device::new(&daemon, Setup { queues: QUEUES.into(), memory, ..Setup::default() });
    for queue in 0..usize::from(QUEUES) {
        device.assert_serves(queue);
    }
    let account = account_of(daemon.pid());
    let want = disk.read(0, COPIED as u64 / 512);
    for round in 0..3 {
        let end = Instant::now() + PATIENCE;
        let mut overflows = 0;
        while overflows == 0 {
            if Instant::now() > end {
                let test = "flags::overflow::no_queue_goes_deaf_when_completions_overflow";
                return skip(test, "kicks are not faster than the worker here; it takes two CPUs");
            }
            overflows = storm(&mut device, &account, buffers, room);
        }
        for i in 0..4 {
            let at = buffers + i * room;
            assert_eq!(device.memory.byte(at + 64), OK);
            assert_same(&device.memory.read(at + 4097, COPIED), &want, "a copied read");
        }
        // Kicks that nobody asked for are over: each queue sleeps, and wakes.
        for queue in 0..usize::from(QUEUES) {
            for ring in &device.rings {
                wait_armed(ring);
            }
            let done = device.run(queue, T_IN, 0, &[], 4096);
            assert_eq!(done.status, OK, "queue {queue} in round {round} after {overflows} overflows");
        }
    }
    drop(device);
    daemon.stop();
}

/// Misaligned reads that the worker copies, and kicks on all queues until they
/// are answered. Gives how many completions were seen to overflow.
fn storm(device: &mut Device, account: &Path, buffers: u64, room: u64) -> usize {
    for i in 0..4 {
        let at = buffers + i * room;
        device.memory.write(at, &header(T_IN, 0));
        device.memory.write(at + 64, &[0xff]);
        let head = device.rings[0].chain(&[out(at, 16), back(at + 4097, COPIED), back(at + 64, 1)]);
        device.rings[0].stage(head);
    }
    device.rings[0].publish();
    let deadline = Deadline::new("reads among kicks");
    let (mut overflows, mut answered) = (0, 0);
    while answered < 4 {
        for _ in 0..20 {
            for ring in &device.rings {
                ring.kick.signal();
            }
        }
        overflows += overflown(account);
        while device.rings[0].take_used().is_some() {
            answered += 1;
        }
        deadline.check();
    }
    overflows
}
