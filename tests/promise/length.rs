//! Images whose last block has one sector. The guest has that sector on every
//! file system, before and after a copy that shares blocks with the image.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};

use super::{block_size, capacity, config, start};
use crate::session::each_engine;
use crate::succession::daemon_of;
use crate::support::daemon::Backend;
use crate::support::device::{Device, OK, T_FLUSH};
use crate::support::disk::{PATTERNED, assert_same, pattern, salted};
use crate::support::fs::Filesystem;
use crate::support::sys::Deadline;

const SECTORS: u64 = (16 << 20) / 512 + 1;
const BYTES: u64 = SECTORS * 512;
/// The sector that is alone in its block of 4096 bytes.
const LAST: u64 = SECTORS - 1;
/// The first sector of the block before.
const TAIL: u64 = LAST - 8;

/// What the last nine sectors hold in their nth generation.
fn tail(generation: u64) -> Vec<u8> {
    salted(generation, TAIL, 9)
}

/// A new image with a pattern at its start and generation 0 at its end.
fn image(fs: &Filesystem, engine: Backend) -> PathBuf {
    let (path, file) = fs.file(&format!("{engine:?}.raw"), BYTES);
    file.write_all_at(&pattern(0, PATTERNED), 0).unwrap();
    file.write_all_at(&tail(0), TAIL * 512).unwrap();
    path
}

/// What `cp --reflink=always` makes: a file that shares every block with the image.
fn share_blocks(image: &Path) -> File {
    let copy = File::options().read(true).write(true).create_new(true).open(image.with_extension("copy"));
    let copy = copy.unwrap();
    rustix::fs::ioctl_ficlone(&copy, File::open(image).unwrap()).unwrap();
    copy
}

#[track_caller]
fn assert_complete(config: &[u8]) {
    assert_eq!(block_size(config), 512, "blk_size");
    assert_eq!(capacity(config), SECTORS, "capacity, with the sector that is alone in its block");
}

/// The tail reads as `generation`; then the next one is written, the last sector
/// by itself first, and is read back.
#[track_caller]
fn renew_tail(device: &mut Device, generation: u64) {
    assert_same(&device.read(TAIL, 9), &tail(generation), "the last nine sectors");
    let next = tail(generation + 1);
    device.write(LAST, &next[8 * 512..]);
    let mut half = tail(generation);
    half[8 * 512..].copy_from_slice(&next[8 * 512..]);
    assert_same(&device.read(TAIL, 9), &half, "after a write of the last sector");
    assert_same(&device.read(LAST, 1), &next[8 * 512..], "the last sector by itself");
    device.write(TAIL, &next);
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK, "flush");
    assert_same(&device.read(TAIL, 9), &next, "after a write of the last nine sectors");
    device.assert_serves(0);
}

#[track_caller]
fn assert_length(image: &Path) {
    assert_eq!(std::fs::metadata(image).unwrap().len(), BYTES, "length of the image in bytes");
}

/// Serves one image three times in a row, and does `between` before the second.
#[track_caller]
fn restarted<T>(engine: Backend, fs: &Filesystem, between: impl FnOnce(&Path) -> T) -> T {
    let image = image(fs, engine);
    let folder = tempfile::tempdir().unwrap();
    let mut between = Some(between);
    let mut made = None;
    let mut first_config = None;
    for generation in 0..3 {
        let mut daemon = start(engine, folder.path(), &image, &[]);
        let mut device = Device::plain(&daemon);
        let config = config(&device);
        assert_complete(&config);
        let first = first_config.get_or_insert_with(|| config.clone());
        assert_eq!(config, *first, "config space after {generation} restarts");
        renew_tail(&mut device, generation);
        drop(device);
        daemon.stop();
        assert_length(&image);
        if let Some(between) = between.take() {
            made = Some(between(&image));
        }
    }
    let mut end = vec![0; 9 * 512];
    File::open(&image).unwrap().read_exact_at(&mut end, TAIL * 512).unwrap();
    assert_same(&end, &tail(3), "the end of the image as other programs read it");
    made.unwrap()
}

/// XFS takes smaller O_DIRECT writes before blocks are shared than after: what the
/// guest sees of its disk may not depend on that, or a restart would cut the disk.
#[test]
fn a_shared_block_copy_and_a_restart_leave_the_guest_its_last_sector() {
    let test = "a_shared_block_copy_and_a_restart_leave_the_guest_its_last_sector";
    let Some(fs) = Filesystem::xfs(test) else { return };
    each_engine(|engine| {
        let copy = restarted(engine, &fs, share_blocks);
        let mut end = vec![0; 9 * 512];
        copy.read_exact_at(&mut end, TAIL * 512).unwrap();
        assert_same(&end, &tail(1), "the copy, which later writes may not change");
    });
}

/// The same under a parent: the successor goes on with a connection whose guest
/// has read the config space already.
#[test]
fn a_shared_block_copy_and_a_crash_leave_the_guest_its_last_sector() {
    let test = "a_shared_block_copy_and_a_crash_leave_the_guest_its_last_sector";
    let Some(fs) = Filesystem::xfs(test) else { return };
    each_engine(|engine| {
        let image = image(&fs, engine);
        let folder = tempfile::tempdir().unwrap();
        let mut daemon = start(engine, folder.path(), &image, &["--supervise"]);
        let mut device = Device::plain(&daemon);
        let before = config(&device);
        assert_complete(&before);
        renew_tail(&mut device, 0);
        let copy = share_blocks(&image);
        for generation in 1..3 {
            let victim: Pid = daemon_of(&daemon);
            kill_process(victim, Signal::KILL).unwrap();
            Deadline::new("the successor").until_slowly(|| (daemon_of(&daemon) != victim).then_some(()));
            assert_eq!(config(&device), before, "config space after {generation} crashes");
            renew_tail(&mut device, generation);
            assert_length(&image);
        }
        drop(device);
        daemon.stop();
        assert_length(&image);
        let mut end = vec![0; 9 * 512];
        copy.read_exact_at(&mut end, TAIL * 512).unwrap();
        assert_same(&end, &tail(1), "the copy, which later writes may not change");
    });
}

/// Nothing shares blocks and no host block is known: the guest still has every sector.
#[track_caller]
fn every_sector_is_usable(fs: Option<Filesystem>) {
    let Some(fs) = fs else { return };
    each_engine(|engine| restarted(engine, &fs, |_| ()));
}

/// tmpfs says nothing of its O_DIRECT alignment.
#[test]
fn every_sector_is_usable_on_tmpfs() {
    every_sector_is_usable(Filesystem::tmpfs("every_sector_is_usable_on_tmpfs", "64m"));
}

/// btrfs says nothing of its O_DIRECT alignment.
#[test]
fn every_sector_is_usable_on_btrfs() {
    every_sector_is_usable(Filesystem::btrfs("every_sector_is_usable_on_btrfs"));
}

/// With data=journal ext4 opens files with O_DIRECT and says that it has no alignment.
#[test]
fn every_sector_is_usable_on_ext4_that_journals_data() {
    let test = "every_sector_is_usable_on_ext4_that_journals_data";
    every_sector_is_usable(Filesystem::ext4(test, &[("data", "journal")]));
}

/// An overlay answers for the file system of its upper layer.
#[test]
fn every_sector_is_usable_on_an_overlay() {
    every_sector_is_usable(Filesystem::overlay("every_sector_is_usable_on_an_overlay"));
}

/// No O_DIRECT at all: through the page cache every sector is there, too.
#[test]
fn every_sector_is_usable_on_ramfs() {
    every_sector_is_usable(Filesystem::ramfs("every_sector_is_usable_on_ramfs"));
}
