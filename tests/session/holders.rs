//! Locks of other programs on the image: they are told from those of an earlier daemon, their
//! holder is named, and they are not waited for without an end.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use vublk::sys::{LockKind, ofd_lock};

use super::start;
use crate::support::daemon::{Daemon, URING, vublkd};
use crate::support::device::Device;
use crate::support::disk::Disk;
use crate::support::sys::{Deadline, root};

/// The fences of all instances.
const FENCE: u64 = 1 << 62;
const FENCES: u64 = 1 << 40;

/// A lock as lockf(3) and fcntl(2) take it: it is the process's, and closing any descriptor
/// of the file drops it.
#[track_caller]
fn process_lock(file: &File, kind: i32, start: i64, len: i64) {
    // SAFETY: all zeroes is a valid flock, and F_SETLK reads one.
    let result = unsafe {
        let mut lock: libc::flock = std::mem::zeroed();
        lock.l_type = kind as i16;
        (lock.l_start, lock.l_len) = (start, len);
        libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw const lock)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// A disk and a daemon's way to it, which opens the disk no more in this process.
struct Stage {
    disk: Disk,
    direct: &'static str,
}

impl Stage {
    fn new() -> Self {
        let disk = Disk::new();
        let direct = if disk.takes_direct() { "--direct=on" } else { "--direct=off" };
        Self { disk, direct }
    }

    fn start(&self, extra: &[&str]) -> Daemon {
        let socket = self.disk.dir.path().join("disk.sock");
        let mut command = vublkd("auto", &socket, &self.disk.path);
        command.arg(self.direct).args(extra);
        Daemon::spawn(URING, command, socket)
    }

    /// Where a daemon here has its fence.
    #[track_caller]
    fn fence(&self) -> u64 {
        let mut daemon = self.start(&[]);
        daemon.wait_listening();
        let inode = format!(":{}", std::fs::metadata(&self.disk.path).unwrap().ino());
        let locks = std::fs::read_to_string("/proc/locks").unwrap();
        let starts = locks.lines().filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words
                .iter()
                .any(|word| word.ends_with(&inode))
                .then(|| words[words.len() - 2].parse::<u64>().unwrap())
        });
        let fence = starts.into_iter().find(|start| (FENCE..FENCE + FENCES).contains(start));
        daemon.stop();
        fence.expect("a fence in /proc/locks")
    }
}

fn ourselves() -> String {
    format!("(process {})", std::process::id())
}

/// A reader that has locked the image, or exactly the byte that a daemon locks, is no earlier
/// daemon: the start fails, and says who it is.
#[test]
fn a_foreign_lock_on_the_fence() {
    type Lock = fn(&File, u64);
    let whole_by_process: Lock = |file, _| process_lock(file, libc::F_RDLCK, 0, 0);
    let whole: Lock = |file, _| ofd_lock(file, LockKind::Shared, 0, 0).unwrap();
    let byte_by_process: Lock = |file, fence| process_lock(file, libc::F_RDLCK, fence.cast_signed(), 1);
    let byte: Lock = |file, fence| ofd_lock(file, LockKind::Shared, fence, 1).unwrap();
    let exclusive: Lock = |file, fence| ofd_lock(file, LockKind::Exclusive, fence, 1).unwrap();
    let cases: [(&str, Lock, bool, &[&str]); 7] = [
        ("all of it, lockf", whole_by_process, false, &["--lock=off"]),
        ("all of it, with image locks", whole, false, &[]),
        ("all of it, OFD", whole, false, &["--lock=off"]),
        ("a byte, fcntl", byte_by_process, false, &["--lock=off"]),
        ("a byte, OFD", byte, false, &[]),
        ("a byte, OFD, read-only", byte, false, &["--read-only"]),
        ("a byte, exclusively", exclusive, true, &[]),
    ];
    // At the same time: each is waited for. A daemon ends before its folder.
    let stages = cases.map(|_| Stage::new());
    let begun = Instant::now();
    let start = |(stage, (what, lock, write, extra)): (_, (_, Lock, _, &[&str]))| {
        let stage: &Stage = stage;
        let fence = stage.fence();
        let file = File::options().read(true).write(write).open(&stage.disk.path).unwrap();
        lock(&file, fence);
        (what, stage, file, stage.start(extra))
    };
    let running: Vec<(&str, &Stage, File, Daemon)> = stages.iter().zip(cases).map(start).collect();
    for (what, stage, file, mut daemon) in running {
        let status = daemon.wait_end(Duration::from_secs(25));
        let log = daemon.log();
        assert_eq!(status.code(), Some(1), "{what}: {log}");
        assert!(begun.elapsed() > Duration::from_secs(5), "{what}: not waited for");
        let path = stage.disk.path.display().to_string();
        let last = log.lines().last().unwrap();
        assert!(last.contains(&path) && last.contains(&ourselves()), "{what}: {log}");
        let waits = log.lines().any(|line| line.contains("waiting") && line.contains(&ourselves()));
        assert!(waits, "{what}: {log}");
        drop(file);
        let mut daemon = stage.start(&[]);
        daemon.wait_listening();
        Device::plain(&daemon).assert_serves(0);
    }
}

#[test]
fn a_foreign_lock_that_is_dropped_in_time() {
    let stage = Stage::new();
    let reader = File::open(&stage.disk.path).unwrap();
    ofd_lock(&reader, LockKind::Shared, 0, 0).unwrap();
    let mut daemon = stage.start(&[]);
    let told = daemon.wait_log("waiting");
    assert!(told.contains(&ourselves()), "{told}");
    drop(reader);
    daemon.wait_listening();
    Device::plain(&daemon).assert_serves(0);
}

/// Where QEMU has its locks, and none of QEMU's: refused at once, and not called a writer.
#[test]
fn a_foreign_lock_on_the_image() {
    for (kind, start, len) in [(libc::F_RDLCK, 0, 4096), (libc::F_WRLCK, 100, 1), (libc::F_WRLCK, 0, 203)] {
        let stage = Stage::new();
        let other = File::options().read(true).write(true).open(&stage.disk.path).unwrap();
        process_lock(&other, kind, start, len);
        let mut daemon = stage.start(&[]);
        let status = daemon.wait_end(Duration::from_secs(8));
        let log = daemon.log();
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(log.contains("lockf") && log.contains(&ourselves()), "{log}");
        drop(other);
    }
}

/// One that comes before the first ring is waited for, and one with which ours conflict.
#[test]
fn a_foreign_lock_before_the_first_ring() {
    let (disk, daemon) = start(URING);
    let other = File::options().read(true).write(true).open(&disk.path).unwrap();
    ofd_lock(&other, LockKind::Exclusive, 0, 4096).unwrap();
    let device = std::thread::scope(|scope| {
        let told = scope.spawn(|| {
            Deadline::new("a front-end that waits")
                .until_slowly(|| daemon.log().contains("connected").then_some(()));
            drop(other);
        });
        let mut device = Device::plain(&daemon);
        device.assert_serves(0);
        told.join().unwrap();
        device
    });
    drop(device);
}

/// Who may not look into other processes learns how to find out.
#[test]
fn a_holder_that_cannot_be_seen() {
    let test = "session::holders::a_holder_that_cannot_be_seen";
    if !root(test, "another user") {
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    let stage = Stage::new();
    let all = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(stage.disk.dir.path(), all.clone()).unwrap();
    std::fs::set_permissions(&stage.disk.path, all).unwrap();
    let other = File::options().read(true).write(true).open(&stage.disk.path).unwrap();
    ofd_lock(&other, LockKind::Shared, 101, 1).unwrap();
    let socket = stage.disk.dir.path().join("nobody.sock");
    let mut command = vublkd("auto", &socket, &stage.disk.path);
    command.arg(stage.direct).uid(65534).gid(65534);
    let mut daemon = Daemon::spawn(URING, command, socket);
    let status = daemon.wait_end(Duration::from_secs(8));
    assert_eq!(status.code(), Some(1), "{}", daemon.log());
    assert!(daemon.log().contains("vublk doctor"), "{}", daemon.log());
}
