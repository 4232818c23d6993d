//! `--discard`: whether a guest may give back blocks. With `ignore` an image that was
//! allocated in full stays so, and the guest sees no difference.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::FallocateFlags;

use super::{allocated, config, loop_device, start};
use crate::session::each_engine;
use crate::support::daemon::{Daemon, URING};
use crate::support::device::{Device, OK, T_DISCARD, T_FLUSH, T_WRITE_ZEROES, range};
use crate::support::disk::{Disk, SECTOR, assert_same, pattern};
use crate::support::frontend::{feature, msg};
use crate::support::sys::skip;

const MIB: u64 = 1 << 20;
const BYTES: u64 = 16 * MIB;
const SECTORS: u64 = BYTES / 512;
const UNMAP: u32 = 1;
/// What is discarded and zeroed: 4 MiB.
const FROM: u64 = 8192;
const COUNT: u64 = 8192;

/// An image of which every block is allocated and holds data; nothing where the
/// file system under the tests cannot allocate in advance.
fn preallocated(test: &str) -> Option<Disk> {
    let disk = Disk::of_size(BYTES);
    let file = File::options().write(true).open(&disk.path).unwrap();
    if let Err(error) = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, BYTES) {
        skip(test, &format!("fallocate: {error}"));
        return None;
    }
    file.write_all_at(&pattern(0, SECTORS), 0).unwrap();
    assert!(allocated(&disk.path) >= BYTES, "the image has holes");
    Some(disk)
}

/// What a driver learns.
fn offer(daemon: &Daemon) -> (u64, Vec<u8>) {
    let device = Device::plain(daemon);
    (device.frontend.ask64(msg::GET_FEATURES), config(&device))
}

/// Discards 4 MiB, then zeroes 4 MiB with UNMAP; looks at the blocks of `image` after each.
#[track_caller]
fn assert_nothing_is_freed(daemon: &Daemon, image: &Path) {
    let had = allocated(image);
    let mut device = Device::plain(daemon);
    let discard = range(FROM, COUNT as u32, 0);
    assert_eq!(device.status(T_DISCARD, 0, &discard, 0), OK, "status of the DISCARD");
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK, "flush");
    let has = allocated(image);
    assert_eq!(has, had, "bytes that the image occupies, after the DISCARD");
    assert_same(&device.read(FROM, COUNT), &pattern(FROM, COUNT), "what was discarded");
    let zeroes = range(FROM, COUNT as u32, UNMAP);
    assert_eq!(device.status(T_WRITE_ZEROES, 0, &zeroes, 0), OK, "status of the zeroes");
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK, "flush");
    // More is possible: the file system notes down which blocks read as zero.
    let has = allocated(image);
    assert!(has >= had, "of {had} bytes the image only occupies {has}, after zeroes with UNMAP");
    assert_same(&device.read(FROM, COUNT), &vec![0; COUNT as usize * SECTOR], "what was zeroed");
    assert_same(&device.read(FROM - 8, 8), &pattern(FROM - 8, 8), "before");
    assert_same(&device.read(FROM + COUNT, 8), &pattern(FROM + COUNT, 8), "behind");
}

/// An operator who allocated the image in advance does not want to lose the room.
#[test]
fn ignored_discards_free_no_block_of_a_file() {
    let test = "ignored_discards_free_no_block_of_a_file";
    each_engine(|engine| {
        let Some(disk) = preallocated(test) else { return };
        let mut daemon = start(engine, disk.dir.path(), &disk.path, &["--discard=ignore"]);
        assert_nothing_is_freed(&daemon, &disk.path);
        daemon.stop();
    });
}

/// The same on a block device, whose file must not shrink either.
#[test]
fn ignored_discards_free_no_block_of_a_device() {
    let test = "ignored_discards_free_no_block_of_a_device";
    each_engine(|engine| {
        let Some(disk) = preallocated(test) else { return };
        let Some(store) = loop_device(test, &disk.path, 4096) else { return };
        let mut daemon = start(engine, disk.dir.path(), &store.path, &["--discard=ignore"]);
        assert_nothing_is_freed(&daemon, &disk.path);
        daemon.stop();
    });
}

/// `unmap` is what happens without the option: blocks are given back.
#[test]
fn discards_free_blocks_unless_they_are_ignored() {
    let test = "discards_free_blocks_unless_they_are_ignored";
    each_engine(|engine| {
        for extra in [&[][..], &["--discard=unmap"]] {
            let Some(disk) = preallocated(test) else { return };
            let mut daemon = start(engine, disk.dir.path(), &disk.path, extra);
            let mut device = Device::plain(&daemon);
            let had = allocated(&disk.path);
            assert_eq!(device.status(T_DISCARD, 0, &range(FROM, COUNT as u32, 0), 0), OK, "{extra:?}");
            assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK, "flush");
            let has = allocated(&disk.path);
            // Some room for what the file system notes down about the hole.
            let least = 4 * MIB - 64 * 1024;
            assert!(had - has >= least, "{extra:?}: of 4 MiB only {} KiB were freed", (had - has) >> 10);
            drop(device);
            daemon.stop();
        }
    });
}

/// A guest may move between daemons with either setting.
#[test]
fn a_guest_does_not_see_whether_discards_are_ignored() {
    let disk = Disk::new();
    let mut offers = Vec::new();
    for extra in ["--discard=unmap", "--discard=ignore"] {
        let mut daemon = start(URING, disk.dir.path(), &disk.path, &[extra]);
        offers.push(offer(&daemon));
        daemon.stop();
    }
    assert_eq!(offers[0], offers[1], "feature bits and config space with unmap and with ignore");
    let both = feature::DISCARD | feature::WRITE_ZEROES;
    assert_eq!(offers[1].0 & both, both, "DISCARD and WRITE_ZEROES are offered");
}
