//! Files that are truncated, replaced or taken away, file systems that stop, and I/O that hangs or is slow.

use std::os::fd::AsRawFd;
use std::time::Duration;

use super::{counter, serve, status, wait_held};
use crate::durability::stage::{Stage, Store};
use crate::session::each_engine;
use crate::support::control::Control;
use crate::support::daemon::URING;
use crate::support::device::{Device, IOERR, OK, Setup, T_FLUSH, T_IN, T_OUT};
use crate::support::disk::{Disk, SECTOR, assert_same, pattern, salted};
use crate::support::fs::Filesystem;
use crate::support::sys::Deadline;

const MIB: u64 = 1 << 20;

/// What is gone is an error, what is there is there, and what is written is the file's again.
#[test]
fn a_file_that_is_truncated() {
    each_engine(|engine| {
        let disk = Disk::new();
        let (_folder, daemon) = serve(engine, &disk.path, &[]);
        let mut device = Device::plain(&daemon);
        let file = std::fs::OpenOptions::new().write(true).open(&disk.path).unwrap();
        file.set_len(MIB).unwrap();
        let gone = MIB / SECTOR as u64;
        assert_eq!(device.status(T_IN, gone, &[], SECTOR), IOERR);
        assert_eq!(device.status(T_IN, gone - 8, &[], 16 * SECTOR), IOERR, "half of it is there");
        let told = daemon.wait_log("has it been truncated?");
        assert!(told.contains("the guest gets an I/O error"), "{told}");
        assert_same(&device.read(gone - 8, 8), &pattern(gone - 8, 8), "what is left");
        device.write(2 * gone, &salted(1, 2 * gone, 8));
        assert_same(&device.read(2 * gone, 8), &salted(1, 2 * gone, 8), "written after");
        assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
        assert_eq!(counter(&daemon, "errors"), 2);
    });
}

/// With `stop` a read of what is gone waits, and is done once the operator has mended the file.
#[test]
fn a_truncated_file_that_is_mended() {
    let disk = Disk::new();
    let (_folder, daemon) = serve(URING, &disk.path, &["--on-error=stop"]);
    let mut device = Device::plain(&daemon);
    let file = std::fs::OpenOptions::new().write(true).open(&disk.path).unwrap();
    file.set_len(MIB).unwrap();
    let gone = MIB / SECTOR as u64;
    let pending = device.submit(0, T_IN, gone, &[], SECTOR);
    let held = wait_held(&daemon, 1);
    assert!(held["error"].as_str().unwrap().contains("truncated"), "{held}");
    file.set_len(64 * MIB).unwrap();
    Control::of(&daemon).call("retry", serde_json::json!({})).unwrap();
    let used = device.rings[0].wait_used("the read");
    assert_eq!(device.outcome(&pending, used).status, OK);
}

/// The disk is the file that was opened, whatever is at its path now.
#[test]
fn a_file_that_is_replaced_or_removed() {
    let disk = Disk::new();
    let (_folder, daemon) = serve(URING, &disk.path, &[]);
    let mut device = Device::plain(&daemon);
    let (old, other) = (disk.dir.path().join("old"), disk.dir.path().join("other"));
    std::fs::hard_link(&disk.path, &old).unwrap();
    std::fs::write(&other, vec![0x55; 4 * MIB as usize]).unwrap();
    std::fs::rename(&other, &disk.path).unwrap();
    device.write(0, &salted(1, 0, 8));
    assert_same(&device.read(0, 8), &salted(1, 0, 8), "after it was replaced");
    std::fs::remove_file(&disk.path).unwrap();
    device.write(8, &salted(2, 8, 8));
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
    let kept = std::fs::read(&old).unwrap();
    assert_same(&kept[..8 * SECTOR], &salted(1, 0, 8), "the file that was opened");
    assert_same(&kept[8 * SECTOR..16 * SECTOR], &salted(2, 8, 8), "the file that was opened");
    assert_eq!(counter(&daemon, "errors"), 0);
}

/// A file system that shuts down (as after an error with errors=remount-ro, or when its device is pulled): all that
/// needs the disk fails, a FLUSH is not OK, and the daemon can be asked and stopped.
#[test]
fn a_file_system_that_shuts_down() {
    let test = "broken::files::a_file_system_that_shuts_down";
    /// FS_IOC_SHUTDOWN: _IOR('X', 125, __u32), and FS_SHUTDOWN_FLAGS_NOLOGFLUSH.
    const SHUTDOWN: libc::c_ulong = 0x8004_587d;
    for fs in [Filesystem::ext4(test, &[]), Filesystem::xfs(test)].into_iter().flatten() {
        let (path, disk) = fs.file("disk.raw", 16 * MIB);
        std::os::unix::fs::FileExt::write_all_at(&disk, &pattern(0, 128), 0).unwrap();
        disk.sync_all().unwrap();
        let (_folder, mut daemon) = serve(URING, &path, &[]);
        let mut device = Device::plain(&daemon);
        device.assert_serves(0);
        let how: u32 = 2;
        // SAFETY: the ioctl reads one u32.
        assert_eq!(unsafe { libc::ioctl(disk.as_raw_fd(), SHUTDOWN, &how) }, 0);
        assert_eq!(device.status(T_OUT, 0, &salted(1, 0, 8), 0), IOERR);
        assert_eq!(device.status(T_FLUSH, 0, &[], 0), IOERR);
        daemon.wait_log("Input/output error");
        assert_eq!(status(&daemon)["disk"]["sync_failed"], true);
        drop(device);
        daemon.stop();
    }
}

/// Nothing to write to any more (EROFS): reads go on.
#[test]
fn a_file_system_that_becomes_read_only() {
    let test = "broken::files::a_file_system_that_becomes_read_only";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    let daemon = stage.start(URING, &[]);
    let mut device = Device::plain(&daemon);
    device.write(0, &salted(1, 0, 8));
    stage.gate.fail_writes(libc::EROFS);
    assert_eq!(device.status(T_OUT, 0, &salted(2, 0, 8), 0), IOERR);
    daemon.wait_log("Read-only file system");
    assert_same(&device.read(0, 8), &salted(1, 0, 8), "reads go on");
    assert_eq!(counter(&daemon, "errors"), 1);
    stage.gate.heal();
    device.write(0, &salted(2, 0, 8));
}

/// I/O that hangs shows in `status`, with how long the oldest request has waited, while other queues go on.
#[test]
fn a_request_that_hangs_is_shown_with_its_age() {
    let test = "broken::files::a_request_that_hangs_is_shown_with_its_age";
    each_engine(|engine| {
        let Some(stage) = Stage::new(test, Store::File) else { return };
        let daemon = stage.start(engine, &[]);
        let mut device = Device::new(&daemon, Setup { queues: 2, ..Setup::default() });
        device.assert_serves(0);
        let idle = status(&daemon);
        assert_eq!((&idle["disk"]["in_flight"], &idle["disk"]["oldest_seconds"]), (&0.into(), &0.0.into()));
        stage.gate.close(1, 1);
        let pending = device.submit(0, T_IN, 0, &[], 4096);
        Deadline::new("the request to hang").until_slowly(|| (stage.gate.held() == 1).then_some(()));
        stage.gate.take_all();
        device.assert_serves(1);
        let age = || status(&daemon)["disk"]["oldest_seconds"].as_f64().unwrap();
        Deadline::new("an age of half a second").until_slowly(|| (age() >= 0.5).then_some(()));
        assert_eq!(status(&daemon)["disk"]["in_flight"], 1);
        assert!(age() < 30.0, "{}", age());
        stage.gate.open();
        let used = device.rings[0].wait_used("the request that hung");
        assert_eq!(device.outcome(&pending, used).status, OK);
        assert_eq!(status(&daemon)["disk"]["in_flight"], 0);
    });
}

/// A slow disk is only slow.
#[test]
fn a_disk_that_is_slow() {
    let test = "broken::files::a_disk_that_is_slow";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    let daemon = stage.start(URING, &[]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    device.rings[0].call.take();
    for round in 0..20 {
        stage.gate.close(1, 1);
        let pending = device.submit(0, T_OUT, 8 * round, &salted(round, 8 * round, 8), 0);
        Deadline::new("the write to be held").until(|| (stage.gate.held() == 1).then_some(()));
        device.rings[0].assert_quiet(Duration::from_millis(5), "an answer before the disk has the write");
        stage.gate.open();
        let used = device.rings[0].wait_used("a slow write");
        assert_eq!(device.outcome(&pending, used).status, OK);
    }
    assert_eq!(counter(&daemon, "errors"), 0);
}
