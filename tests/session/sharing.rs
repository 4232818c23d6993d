//! Who shares an image or a socket with whom: daemons that start beside each
//! other, and an image that another process has locked.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use vublk::sys::{LockKind, ofd_lock};

use super::{each_engine, start};
use crate::support::daemon::{Daemon, Options, URING, bare_vublkd, pass_fd, vublkd};
use crate::support::device::{Device, Setup, negotiate, start_ring};
use crate::support::disk::Disk;
use crate::support::frontend::{Frontend, msg};
use crate::support::memory::Memory;
use crate::support::ring::Ring;
use crate::support::sys::Deadline;

/// Bytes of QEMU's locks: 100 + p says that p is used, 200 + p that others may
/// not use it.
const WRITES: u64 = 101;
const NO_WRITERS: u64 = 201;

/// A reader with a connected socket that has no name; `log` names its log.
fn reader_on(disk: &Disk, fd: BorrowedFd<'_>, log: &str) -> Daemon {
    let mut command = bare_vublkd();
    command.args(["--fd=7", "--read-only"]).arg(format!("--blk-file={}", disk.path.display()));
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    pass_fd(&mut command, fd, 7);
    Daemon::spawn(URING, command, disk.dir.path().join(log))
}

#[test]
fn readers_on_sockets_without_a_name_share_an_image() {
    let disk = Disk::new();
    let mut running: Vec<(Device, Daemon)> = Vec::new();
    for log in ["one.sock", "two.sock", "three.sock"] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let daemon = reader_on(&disk, theirs.as_fd(), log);
        drop(theirs);
        let device = Device::over(Frontend::new(ours), Setup::default());
        running.push((device, daemon));
        for (device, _) in &mut running {
            device.assert_serves(0);
        }
    }
    for (device, mut daemon) in running {
        drop(device);
        let status = daemon.wait_end(Duration::from_secs(10));
        assert_eq!(status.code(), Some(0), "{}", daemon.log());
    }
}

/// Ended, and not yet asked how. Asking would take the process away from the
/// value that ends it.
fn has_ended(daemon: &Daemon) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
    stat.rsplit(')').next().unwrap().trim_start().starts_with('Z')
}

/// Two daemons on one socket; the name of each log is its own.
fn start_two(disk: &Disk, read_only: bool) -> [Daemon; 2] {
    let socket = disk.dir.path().join("disk.sock");
    ["one.sock", "two.sock"].map(|log| {
        let mut command = vublkd("io_uring", &socket, &disk.path);
        if read_only {
            command.arg("--read-only");
        }
        if !disk.takes_direct() {
            command.arg("--direct=off");
        }
        let mut daemon = Daemon::spawn(URING, command, disk.dir.path().join(log));
        daemon.socket.clone_from(&socket);
        daemon
    })
}

/// One of the two serves, the other says why it does not.
#[track_caller]
fn assert_one_serves(mut both: [Daemon; 2]) {
    Deadline::new("one of two daemons to end").until_slowly(|| both.iter().any(has_ended).then_some(()));
    if has_ended(&both[0]) {
        both.swap(0, 1);
    }
    let [mut winner, mut loser] = both;
    let status = loser.wait_end(Duration::from_secs(10));
    let said = loser.log();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("disk.sock") || said.contains("another vublkd serves"), "{said}");
    winner.wait_listening();
    Device::plain(&winner).assert_serves(0);
    winner.stop();
    assert!(!winner.socket.exists(), "a socket was left behind");
}

#[test]
fn of_two_daemons_on_one_socket_one_serves() {
    for read_only in [false, true] {
        for _ in 0..4 {
            let disk = Disk::new();
            assert_one_serves(start_two(&disk, read_only));
        }
    }
}

/// Readers that wait at the fence at the same time do not wait for each other.
#[test]
fn of_two_readers_at_the_fence_one_serves() {
    let disk = Disk::new();
    // As an operation that a killed reader left in the kernel: on every fence.
    let left = File::open(&disk.path).unwrap();
    ofd_lock(&left, LockKind::Shared, 1 << 62, 1 << 32).unwrap();
    let both = start_two(&disk, true);
    for daemon in &both {
        daemon.wait_log("waiting");
    }
    drop(left);
    assert_one_serves(both);
}

/// Another daemon that has taken the place on the path keeps it when the first one ends.
#[test]
fn the_socket_of_a_successor_stays() {
    let (disk, mut daemon) = start(URING);
    let fresh = disk.dir.path().join("successor.sock");
    let successor = UnixListener::bind(&fresh).unwrap();
    std::fs::rename(&fresh, &daemon.socket).unwrap();
    daemon.stop();
    let _front_end = UnixStream::connect(&daemon.socket).expect("the successor's socket is gone");
    drop(successor);
}

#[test]
fn readers_start_at_the_same_time() {
    let disk = Disk::new();
    let options = Options { read_only: true, ..Options::default() };
    let mut all =
        ["one.sock", "two.sock", "three.sock"].map(|socket| Daemon::start_at(URING, &disk, socket, &options));
    let mut devices: Vec<Device> = Vec::new();
    for daemon in &mut all {
        daemon.wait_listening();
        devices.push(Device::plain(daemon));
    }
    for device in &mut devices {
        device.assert_serves(0);
    }
}

/// What shows that a process wrote to a file, or asked for room in it.
fn traces(disk: &Disk) -> ([i64; 4], [u64; 3]) {
    let file = std::fs::metadata(&disk.path).unwrap();
    let times = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()];
    (times, [file.blocks(), file.size(), file.ino()])
}

/// How a message names this process.
fn ourselves() -> String {
    format!("(process {})", std::process::id())
}

/// An image that another has locked is only looked at.
#[test]
fn a_locked_image_is_not_touched() {
    for (read_only, byte) in [(false, NO_WRITERS), (false, WRITES), (true, WRITES)] {
        let disk = Disk::new();
        let other = File::options().read(true).write(true).open(&disk.path).unwrap();
        ofd_lock(&other, LockKind::Shared, byte, 1).unwrap();
        // Long ago, so that no clock is too coarse to show a change.
        other.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
        let before = traces(&disk);
        let options = Options { read_only, ..Options::default() };
        let mut daemon = Daemon::start_at(URING, &disk, "second.sock", &options);
        let status = daemon.wait_end(Duration::from_secs(15));
        assert_eq!(status.code(), Some(1), "{}", daemon.log());
        assert!(daemon.log().contains(&ourselves()), "{}", daemon.log());
        assert_eq!(traces(&disk), before, "an image with a lock on byte {byte} was changed");
        // It was the lock, and nothing else.
        drop(other);
        let daemon = Daemon::start(URING, &disk, &options);
        Device::plain(&daemon).assert_serves(0);
    }
}

/// Four rings, described and enabled without a wait for any answer.
fn start_four(mut frontend: Frontend) -> Device {
    let features = negotiate(&mut frontend, 0);
    frontend.acks = false;
    let memory = Memory::plain();
    frontend.set_mem_table(&memory);
    let mut rings = Vec::new();
    for index in 0..4 {
        let ring = Ring::new(Rc::clone(&memory), 64, 0, true);
        start_ring(&frontend, index, &ring);
        rings.push(ring);
    }
    Device { frontend, memory, rings, features }
}

/// The lock is waited for once, whatever the number of queues; then the
/// connection is closed, and the next one is served if the image is free.
#[test]
fn an_image_that_is_locked_before_the_first_ring_starts() {
    let (disk, mut daemon) = start(URING);
    let other = File::options().read(true).write(true).open(&disk.path).unwrap();
    ofd_lock(&other, LockKind::Shared, NO_WRITERS, 1).unwrap();
    let begun = Instant::now();
    let refused = start_four(daemon.connect());
    refused.frontend.wait_hangup_within(Duration::from_secs(18), "the image is another's");
    let took = begun.elapsed();
    assert!(took > Duration::from_secs(5), "the lock was waited for only {took:?}");
    for ring in &refused.rings {
        assert_eq!(ring.used_idx(), 0);
    }
    let log = daemon.log();
    let told = log.lines().filter(|line| line.contains("no queue is served")).count();
    assert_eq!(told, 1, "{log}");
    // Who it is can be found out at the start alone: the sandbox closes /proc.
    assert!(log.contains("another process (vublk doctor"), "{log}");
    drop(refused);
    drop(other);
    let mut device = start_four(daemon.connect());
    for queue in 0..4 {
        device.assert_serves(queue);
    }
    drop(device);
    daemon.stop();
}

/// With one front-end for good there is nothing left to serve.
#[test]
fn an_image_that_the_only_front_end_cannot_have() {
    let disk = Disk::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut daemon = reader_on(&disk, theirs.as_fd(), "only.sock");
    drop(theirs);
    let frontend = Frontend::new(ours);
    frontend.ask64(msg::GET_FEATURES); // its look at the locks is over
    let writer = File::options().read(true).write(true).open(&disk.path).unwrap();
    ofd_lock(&writer, LockKind::Shared, WRITES, 1).unwrap();
    let refused = start_four(frontend);
    refused.frontend.wait_hangup_within(Duration::from_secs(18), "the image is another's");
    let status = daemon.wait_end(Duration::from_secs(10));
    assert_eq!(status.code(), Some(1), "{}", daemon.log());
    assert!(daemon.log().contains("another process has the image"), "{}", daemon.log());
}

/// As in a migration: the other lets go while we wait.
#[test]
fn a_lock_that_goes_while_it_is_waited_for() {
    each_engine(|engine| {
        let (disk, daemon) = start(engine);
        let other = File::options().read(true).write(true).open(&disk.path).unwrap();
        ofd_lock(&other, LockKind::Shared, NO_WRITERS, 1).unwrap();
        let mut device = start_four(daemon.connect());
        let pending = device.submit(3, 0, 100, &[], 512);
        assert_eq!(device.rings[3].used_idx(), 0);
        drop(other);
        let used = device.rings[3].wait_used("a read once the lock is gone");
        assert_eq!(device.outcome(&pending, used).status, 0);
        for queue in 0..4 {
            device.assert_serves(queue);
        }
    });
}
