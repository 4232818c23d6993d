//! Block devices: what the guest learns of them, what a DISCARD does to them, and
//! those that can only be read.
//!
//! What is not tested, for want of a device: alignment_offset other than 0 and an
//! optimal_io_size at all (a loop device has neither), and a device that discards but
//! does not write zeroes: write_zeroes_max_bytes is read-only in sysfs, and a loop
//! device has both or none.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{allocated, block_size, command, config, loop_device, start, u16_at, u32_at};
use crate::session::each_engine;
use crate::support::daemon::{Backend, Daemon, URING};
use crate::support::device::{Device, IOERR, OK, T_DISCARD, T_FLUSH, T_OUT, range};
use crate::support::disk::{Disk, assert_same, pattern, salted};
use crate::support::frontend::feature;
use crate::support::fs::Filesystem;
use crate::support::gate::Gate;
use crate::support::loopdev::LoopDevice;
use crate::support::sys::{PATIENCE, root, skip};

const MIB: u64 = 1 << 20;

/// A guest lays out its file systems by these limits.
#[test]
fn the_topology_is_that_of_the_device() {
    let test = "the_topology_is_that_of_the_device";
    let cases: [(u32, &[&str]); 3] = [(512, &[]), (4096, &[]), (4096, &["--logical-block-size=512"])];
    for (block, extra) in cases {
        let disk = Disk::new();
        let Some(store) = loop_device(test, &disk.path, block) else { return };
        let daemon = start(URING, disk.dir.path(), &store.path, extra);
        let config = config(&Device::plain(&daemon));
        let bytes = |name: &str| store.attribute(name).parse::<u32>().unwrap();
        let guest = block_size(&config);
        let what = format!("a device of {block}-byte blocks, {extra:?}");
        assert_eq!(guest, if extra.is_empty() { block } else { 512 }, "blk_size on {what}");
        let physical = bytes("queue/physical_block_size") / guest;
        assert_eq!(u32::from(config[24]), physical.ilog2(), "physical_block_exp on {what}");
        assert_eq!(u32::from(config[25]), bytes("alignment_offset") / guest, "alignment_offset on {what}");
        let least = bytes("queue/minimum_io_size") / guest;
        assert_eq!(u32::from(u16_at(&config, 26)), least, "min_io_size on {what}");
        let best = bytes("queue/optimal_io_size") / guest;
        assert_eq!(u32_at(&config, 28), best, "opt_io_size on {what}");
    }
}

/// Discards the device has carried out, by its own statistics.
fn discards(store: &LoopDevice) -> u64 {
    store.attribute("stat").split_whitespace().nth(11).unwrap().parse().unwrap()
}

/// A DISCARD is passed on as a discard, not as zeroes that happen to free blocks: only
/// that works on devices that cannot write zeroes.
#[test]
fn a_discard_is_a_discard_of_the_device() {
    let test = "a_discard_is_a_discard_of_the_device";
    each_engine(|engine| {
        let disk = Disk::of_size(2 * MIB);
        let Some(store) = loop_device(test, &disk.path, 4096) else { return };
        if store.attribute("queue/discard_max_bytes") == "0" {
            return skip(test, "the loop device cannot discard here");
        }
        let daemon = start(engine, disk.dir.path(), &store.path, &[]);
        let mut device = Device::plain(&daemon);
        assert_ne!(device.features & feature::DISCARD, 0, "DISCARD is not offered");
        let (before, had) = (discards(&store), allocated(&disk.path));
        assert!(had >= 2 * MIB, "the file has holes already");
        assert_eq!(device.status(T_DISCARD, 0, &range(1024, 2048, 0), 0), OK, "status of the DISCARD");
        assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
        assert!(discards(&store) > before, "no discard reached the device");
        assert_same(&device.read(0, 1024), &pattern(0, 1024), "before");
        assert_same(&device.read(3072, 1024), &pattern(3072, 1024), "behind");
        drop(device);
        drop(daemon);
        let has = allocated(&disk.path);
        assert!(has + MIB <= had + 64 * 1024, "of 1 MiB only {} KiB were freed", (had - has) >> 10);
    });
}

/// DISCARD is a hint: a device that cannot follow it has followed it.
#[track_caller]
fn assert_discard_changes_nothing(engine: Backend, store: &LoopDevice) {
    let folder = tempfile::tempdir().unwrap();
    let mut daemon = start(engine, folder.path(), &store.path, &[]);
    let mut device = Device::plain(&daemon);
    assert_ne!(device.features & feature::DISCARD, 0, "DISCARD is not offered");
    for (sector, sectors) in [(0, 4096), (8, 1024), (8192, 8)] {
        let status = device.status(T_DISCARD, 0, &range(sector, sectors, 0), 0);
        assert_eq!(status, OK, "status of a DISCARD of {sectors} sectors at {sector}");
    }
    assert_same(&device.read(0, 8192), &pattern(0, 8192), "what was discarded");
    device.write(16, &salted(1, 16, 16));
    assert_same(&device.read(16, 16), &salted(1, 16, 16), "written after a DISCARD");
    drop(device);
    daemon.stop();
}

/// discard_max_bytes is 0: the kernel refuses BLKDISCARD.
#[test]
fn a_discard_on_a_device_that_cannot_changes_nothing() {
    let test = "a_discard_on_a_device_that_cannot_changes_nothing";
    each_engine(|engine| {
        let Some(fs) = Filesystem::ramfs(test) else { return };
        let (path, file) = fs.file("disk.raw", 8 * MIB);
        file.write_all_at(&pattern(0, 16384), 0).unwrap();
        let Some(store) = loop_device(test, &path, 4096) else { return };
        assert_eq!(store.attribute("queue/discard_max_bytes"), "0", "the device can discard");
        assert_discard_changes_nothing(engine, &store);
    });
}

/// The device says that it can discard, and the file under it cannot: BLKDISCARD fails.
#[test]
fn a_discard_that_the_device_fails_changes_nothing() {
    let test = "a_discard_that_the_device_fails_changes_nothing";
    each_engine(|engine| {
        let Some((_gate, store)) = Gate::under_loop(test, pattern(0, 16384)) else { return };
        assert_ne!(store.attribute("queue/discard_max_bytes"), "0", "the device says that it cannot discard");
        assert_discard_changes_nothing(engine, &store);
    });
}

/// A read-only device opens for writing, and every write to it would fail.
fn read_only(test: &str, file: &Path) -> Option<LoopDevice> {
    if !root(test, "a loop device") {
        return None;
    }
    let store = LoopDevice::read_only_over(file, 4096)
        .map_err(|reason| skip(test, &format!("no loop device: {reason}")))
        .ok()?;
    assert_eq!(store.attribute("ro"), "1", "the device can be written");
    Some(store)
}

#[test]
fn a_read_only_device_has_to_be_asked_for() {
    let test = "a_read_only_device_has_to_be_asked_for";
    let disk = Disk::new();
    let Some(store) = read_only(test, &disk.path) else { return };
    let command = command(URING, disk.dir.path(), &store.path, &[]);
    let mut daemon = Daemon::spawn(URING, command, disk.dir.path().join("disk.sock"));
    assert_eq!(daemon.wait_end(PATIENCE).code(), Some(1), "exit code");
    let log = daemon.log();
    let name = store.path.to_str().unwrap();
    assert!(log.lines().any(|line| line.contains(name) && line.contains("--read-only")), "{log}");
}

#[test]
fn a_read_only_device_that_was_asked_for_is_served() {
    let test = "a_read_only_device_that_was_asked_for_is_served";
    each_engine(|engine| {
        let disk = Disk::new();
        let Some(store) = read_only(test, &disk.path) else { return };
        let mut daemon = start(engine, disk.dir.path(), &store.path, &["--read-only"]);
        let mut device = Device::plain(&daemon);
        assert_ne!(device.features & feature::RO, 0, "RO is not offered");
        device.assert_serves(0);
        assert_eq!(device.status(T_OUT, 8, &salted(1, 8, 8), 0), IOERR, "status of a write");
        assert_same(&device.read(8, 8), &pattern(8, 8), "after the write that failed");
        drop(device);
        daemon.stop();
    });
}
