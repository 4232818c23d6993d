//! RLIMIT_NPROC is reached: neither vublkd nor io_uring can start a thread. An
//! operation that would have gone to another thread then runs on the worker's own
//! thread, which is slower, and one line in the log says so.

use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::json;

use super::stage::{BLOCK_SECTORS, disk_status, set_writeback};
use crate::session::each_engine;
use crate::support::daemon::{Backend, Daemon, THREADS, URING, run, vublkd};
use crate::support::device::{
    Device, OK, Setup, T_DISCARD, T_FLUSH, T_OUT, T_WRITE_ZEROES, range, start_ring,
};
use crate::support::disk::{Disk, assert_same, pattern, salted};
use crate::support::freeze::threads;
use crate::support::ring::Ring;
use crate::support::sys::{root, skip};

const TMPFS_MAGIC: i64 = 0x0102_1994;
/// Sectors of a MiB.
const MIB: u64 = 2048;

/// A daemon of a user that has no other process, so that the limit counts its threads
/// alone.
struct OwnUser {
    daemon: Daemon,
    user: u32,
    // After the daemon, whose log is in its folder.
    disk: Disk,
}

impl OwnUser {
    #[track_caller]
    fn start(test: &str, engine: Backend, extra: &[&str]) -> Option<Self> {
        if !root(test, "a user without processes") {
            return None;
        }
        let Backend::Vublkd(name) = engine else { panic!("vublkd alone") };
        let user = unused_user();
        let disk = Disk::new();
        if rustix::fs::statfs(&disk.path).unwrap().f_type == TMPFS_MAGIC || !disk.takes_direct() {
            skip(test, "no file system for the disk on which operations go to other threads");
            return None;
        }
        for path in [disk.dir.path(), &disk.path] {
            chown(path, Some(user), Some(user)).unwrap();
        }
        let socket = disk.dir.path().join("disk.sock");
        let mut command = vublkd(name, &socket, &disk.path);
        command.args(["--num-queues=4"]).args(extra).uid(user).gid(user);
        let mut daemon = Daemon::spawn(engine, command, socket);
        daemon.wait_listening();
        Some(Self { daemon, user, disk })
    }

    #[track_caller]
    fn allow_threads(&self, allow: bool) {
        limit_threads(&self.daemon, self.user, allow);
    }

    /// The kernel has made no thread for io_uring.
    #[track_caller]
    fn assert_no_kernel_threads(&self) {
        let names = threads(&self.daemon);
        let helpers: Vec<_> = names.iter().filter(|(_, name)| name.starts_with("iou-wrk")).collect();
        assert!(helpers.is_empty(), "the kernel has made threads: {helpers:?}");
    }

    /// Lines of the log that say it.
    fn lines(&self) -> usize {
        self.daemon.log().lines().filter(|line| line.contains("own thread")).count()
    }
}

/// Lowers or raises the limit of a daemon's threads. A process of the same user does it:
/// root needs CAP_SYS_RESOURCE for the processes of others.
#[track_caller]
pub fn limit_threads(daemon: &Daemon, user: u32, allow: bool) {
    let pid = libc::pid_t::try_from(daemon.pid()).unwrap();
    let mut command = Command::new("true");
    command.uid(user).gid(user);
    // SAFETY: the closure only makes system calls, which are allowed between
    // fork and exec.
    unsafe {
        command.pre_exec(move || {
            let check = |result: i32| {
                if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
            };
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            check(libc::prlimit(pid, libc::RLIMIT_NPROC, std::ptr::null(), &raw mut limit))?;
            // The soft limit alone, which may be raised again.
            limit.rlim_cur = if allow { limit.rlim_max } else { 1 };
            check(libc::prlimit(pid, libc::RLIMIT_NPROC, &raw const limit, std::ptr::null_mut()))
        });
    }
    let (status, _, complaint) = run(command);
    assert!(status.success(), "prlimit: {complaint}");
}

/// A user id that no process has.
pub fn unused_user() -> u32 {
    let first = 60_000 + std::process::id() % 1000;
    let taken: Vec<u32> = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            entry.file_name().to_str()?.parse::<u32>().ok()?;
            Some(entry.metadata().ok()?.uid())
        })
        .collect();
    (first..first + 5000).find(|user| !taken.contains(user)).unwrap()
}

/// Requests that go to another thread: a write into a hole has to allocate blocks.
#[track_caller]
fn assert_all_served(own: &OwnUser, device: &mut Device) {
    let hole = 8 * MIB;
    let data = salted(1, hole, BLOCK_SECTORS);
    let requests: [(&str, u32, u64, Vec<u8>); 5] = [
        ("FLUSH", T_FLUSH, 0, Vec::new()),
        ("a write into a hole", T_OUT, hole, data.clone()),
        ("DISCARD", T_DISCARD, 0, range(MIB, 256, 0)),
        ("WRITE_ZEROES", T_WRITE_ZEROES, 0, range(MIB + 512, 256, 0)),
        ("FLUSH", T_FLUSH, 0, Vec::new()),
    ];
    for (what, kind, sector, payload) in requests {
        assert_eq!(device.status(kind, sector, &payload, 0), OK, "{what}");
        assert_eq!(disk_status(&own.daemon, "sync_failed"), json!(false), "{what}");
    }
    assert_same(&device.read(hole, BLOCK_SECTORS), &data, "a write into a hole");
    assert_same(&device.read(MIB + 512, 256), &vec![0; 256 * 512], "WRITE_ZEROES");
    assert_same(&device.read(MIB + 256, 256), &pattern(MIB + 256, 256), "beside what was discarded");
}

/// With threads again everything works, FLUSH included.
#[track_caller]
fn assert_recovers(own: &OwnUser, device: &mut Device) {
    own.allow_threads(true);
    device.write(0, &salted(2, 0, BLOCK_SECTORS));
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK, "a FLUSH with threads again");
    assert_eq!(disk_status(&own.daemon, "sync_failed"), json!(false));
}

/// io_uring hands operations that would block to kernel threads. If there are none,
/// an fsync was not tried, which is not an fsync that failed.
#[test]
fn requests_are_served_when_io_uring_gets_no_threads() {
    let test = "durability::requests_are_served_when_io_uring_gets_no_threads";
    let Some(mut own) = OwnUser::start(test, URING, &[]) else { return };
    let mut device = Device::plain(&own.daemon);
    device.assert_serves(0);
    own.assert_no_kernel_threads();
    own.allow_threads(false);
    assert_all_served(&own, &mut device);
    own.assert_no_kernel_threads();
    assert_eq!(own.lines(), 1, "lines for the operator:\n{}", own.daemon.log());
    assert_recovers(&own, &mut device);
    drop(device);
    own.daemon.stop();
}

/// The threads engine starts its first thread with the first request.
#[test]
fn requests_are_served_when_the_engine_of_threads_gets_none() {
    let test = "durability::requests_are_served_when_the_engine_of_threads_gets_none";
    for after_a_read in [false, true] {
        let Some(mut own) = OwnUser::start(test, THREADS, &[]) else { return };
        let mut device = Device::plain(&own.daemon);
        if after_a_read {
            device.assert_serves(0);
        }
        own.allow_threads(false);
        assert_all_served(&own, &mut device);
        // One thread exists, which can do everything: then a line is allowed, not required.
        let lines = own.lines();
        assert!(lines == 1 || after_a_read && lines == 0, "{lines} lines:\n{}", own.daemon.log());
        assert_recovers(&own, &mut device);
        drop(device);
        own.daemon.stop();
    }
}

/// Leaving write-back syncs on a thread of its own. The session must not end because
/// that thread cannot be started.
#[test]
fn the_cache_mode_changes_without_a_thread() {
    let test = "durability::the_cache_mode_changes_without_a_thread";
    each_engine(|engine| {
        let Some(mut own) = OwnUser::start(test, engine, &[]) else { return };
        let mut device = Device::plain(&own.daemon);
        device.assert_serves(0);
        device.write(0, &salted(1, 0, BLOCK_SECTORS));
        own.allow_threads(false);
        for on in [false, true, false] {
            set_writeback(&device, on);
            device.frontend.sync();
            let mode = if on { "writeback" } else { "writethrough" };
            assert_eq!(disk_status(&own.daemon, "write_cache"), json!(mode), "{engine:?}");
            assert_eq!(disk_status(&own.daemon, "sync_failed"), json!(false), "{engine:?}");
            device.write(8, &salted(2, 8, BLOCK_SECTORS));
        }
        assert_recovers(&own, &mut device);
        drop(device);
        own.daemon.stop();
    });
}

/// A queue whose worker cannot be started is served by a worker that runs.
#[test]
fn a_second_queue_is_served_without_a_second_worker() {
    let test = "durability::a_second_queue_is_served_without_a_second_worker";
    each_engine(|engine| {
        let Some(mut own) = OwnUser::start(test, engine, &["--workers=2"]) else { return };
        let mut device = Device::new(&own.daemon, Setup::default());
        device.assert_serves(0);
        own.allow_threads(false);
        let ring = Ring::new(device.memory.clone(), 128, 0, true);
        start_ring(&device.frontend, 1, &ring);
        device.rings.push(ring);
        for queue in [1, 0, 1] {
            device.assert_serves(queue);
            let data = salted(1, 4096, BLOCK_SECTORS);
            assert_eq!(device.run(queue, T_OUT, 4096, &data, 0).status, OK, "{engine:?}, queue {queue}");
            assert_eq!(device.run(queue, T_FLUSH, 0, &[], 0).status, OK, "{engine:?}, queue {queue}");
        }
        // It stops and starts like any other, also when threads can be made again.
        for allow in [false, true] {
            own.allow_threads(allow);
            let base = device.frontend.vring_base(1).unwrap();
            assert_eq!(base, device.rings[1].avail_idx, "{engine:?}");
            let kick = &device.rings[1].kick;
            device.frontend.vring_fd(crate::support::frontend::msg::SET_VRING_KICK, 1, kick);
            device.assert_serves(1);
            device.assert_serves(0);
        }
        own.daemon.assert_alive();
        assert_same(&own.disk.read(4096, BLOCK_SECTORS), &salted(1, 4096, BLOCK_SECTORS), "on the disk");
        drop(device);
        own.daemon.stop();
    });
}
