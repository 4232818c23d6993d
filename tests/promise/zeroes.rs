//! WRITE_ZEROES of many MiB: by the disk where it can, written where it cannot.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};

use super::{allocated, loop_device, start};
use crate::session::each_engine;
use crate::support::daemon::{Backend, Daemon};
use crate::support::device::{Device, OK, T_FLUSH, T_WRITE_ZEROES, range};
use crate::support::disk::{Disk, SECTOR, assert_same, pattern, salted};
use crate::support::fs::Filesystem;
use crate::support::gate::Gate;
use crate::support::sys::{root, skip};

const MIB: u64 = 1 << 20;
const UNMAP: u32 = 1;

/// The range of a test: 1 GiB that begins and ends in the middle of a block.
const FIRST: u64 = 1;
const SECTORS: u64 = (1 << 30) / 512;
const END: u64 = FIRST + SECTORS;
/// Data around the end of the range, on both sides.
const AROUND_END: u64 = END - 128;
const MIDDLE: u64 = SECTORS / 2;

/// Bytes that a process gave the kernel to write, through the page cache or not.
fn written_bytes(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("write_bytes: "))?.parse().ok()
}

/// Fails if the file has any byte but zero in the range; skips its holes.
#[track_caller]
fn assert_zero(path: &Path, from: u64, to: u64) {
    let file = File::open(path).unwrap();
    let mut at = from;
    let mut buffer = vec![0; MIB as usize];
    loop {
        at = match seek(&file, SeekFrom::Data(at)) {
            Ok(data) if data < to => data,
            Ok(_) | Err(rustix::io::Errno::NXIO) => return,
            Err(error) => panic!("SEEK_DATA: {error}"),
        };
        let len = MIB.min(to - at) as usize;
        match file.read_exact_at(&mut buffer[..len], at) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => panic!("the file ends before {to}"),
            read => read.unwrap(),
        }
        if let Some(bad) = buffer[..len].iter().position(|byte| *byte != 0) {
            panic!("byte {} of the file is not zero", at + bad as u64);
        }
        at += len as u64;
    }
}

/// A gibibyte on a device of 4096-byte blocks for a guest with 512-byte ones, through
/// the page cache: the blocks at the edges are changed by us, all the others by the
/// device. `check` gets the file under the device and the bytes the daemon wrote.
#[track_caller]
fn zero_a_gibibyte(test: &str, flags: u32, check: impl Fn(&Disk, u64)) {
    each_engine(|engine| {
        let disk = Disk::of_size((1 << 30) + 16 * MIB);
        let file = File::options().write(true).open(&disk.path).unwrap();
        file.write_all_at(&salted(1, MIDDLE, 2048), MIDDLE * 512).unwrap();
        file.write_all_at(&salted(2, AROUND_END, 256), AROUND_END * 512).unwrap();
        let Some(store) = loop_device(test, &disk.path, 4096) else { return };
        let extra = ["--direct=off", "--logical-block-size=512"];
        let mut daemon = start(engine, disk.dir.path(), &store.path, &extra);
        let mut device = Device::plain(&daemon);
        let Some(before) = written_bytes(daemon.pid()) else {
            return skip(test, "the kernel does not account I/O to processes");
        };
        let zeroes = range(FIRST, SECTORS as u32, flags);
        assert_eq!(device.status(T_WRITE_ZEROES, 0, &zeroes, 0), OK, "status of 1 GiB of zeroes");
        let written = written_bytes(daemon.pid()).unwrap() - before;
        assert_edge(&device.read(0, 16), FIRST, &pattern(0, 1), "the start");
        let behind = device.read(END - 16, 32);
        assert_same(&behind[..16 * SECTOR], &[0; 16 * SECTOR], "before the end");
        assert_same(&behind[16 * SECTOR..], &salted(2, END, 16), "behind the end");
        assert_same(&device.read(MIDDLE, 2048), &vec![0; 2048 * SECTOR], "the middle");
        assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
        drop(device);
        daemon.stop();
        drop(store);
        assert_same(&disk.read(0, 1), &pattern(0, 1), "the sector before, in the file");
        assert_same(&disk.read(END, 128), &salted(2, END, 128), "the sectors behind, in the file");
        assert_zero(&disk.path, FIRST * 512, END * 512);
        check(&disk, written);
    });
}

/// `data` is `before` up to a sector, and zero from there on.
#[track_caller]
fn assert_edge(data: &[u8], sector: u64, before: &[u8], what: &str) {
    let at = sector as usize * SECTOR;
    assert_same(&data[..at], before, what);
    assert_same(&data[at..], &vec![0; data.len() - at], what);
}

/// With UNMAP the device frees what it zeroes, so the file under it nearly vanishes.
#[test]
fn unmapped_zeroes_of_a_gibibyte_free_it() {
    zero_a_gibibyte("unmapped_zeroes_of_a_gibibyte_free_it", UNMAP, |disk, written| {
        assert!(written < 16 * MIB, "the daemon wrote {} MiB of zeroes", written / MIB);
        let left = allocated(&disk.path);
        assert!(left < 4 * MIB, "{} KiB of the file are still allocated", left >> 10);
    });
}

/// Without UNMAP the blocks stay allocated, and no zeroes pass through the daemon.
#[test]
fn zeroes_of_a_gibibyte_are_the_devices_work() {
    zero_a_gibibyte("zeroes_of_a_gibibyte_are_the_devices_work", 0, |_, written| {
        assert!(written < 16 * MIB, "the daemon wrote {} MiB of zeroes", written / MIB);
    });
}

/// Sector and number of sectors of 64 MiB that begin and end in the middle of a block.
const LONG: (u64, u64) = (3, 64 * MIB / 512);

/// Starts a daemon and zeroes 64 MiB of its disk.
#[track_caller]
fn zero_long_range(engine: Backend, folder: &Path, disk: &Path, flags: u32) -> Daemon {
    let daemon = start(engine, folder, disk, &["--logical-block-size=512"]);
    let mut device = Device::plain(&daemon);
    let zeroes = range(LONG.0, LONG.1 as u32, flags);
    assert_eq!(device.status(T_WRITE_ZEROES, 0, &zeroes, 0), OK, "status of 64 MiB of zeroes");
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK, "flush");
    daemon
}

const OLD: u8 = 0xa5;
const DISK_BYTES: u64 = 80 * MIB;

/// The range is zero, and everything else as it was.
#[track_caller]
fn assert_long_range(contents: &[u8]) {
    let (from, to) = (LONG.0 as usize * SECTOR, (LONG.0 + LONG.1) as usize * SECTOR);
    let mut want = vec![OLD; DISK_BYTES as usize];
    want[from..to].fill(0);
    assert_same(contents, &want, "the disk");
}

/// No fallocate (FUSE without it): the zeroes are written, in pieces that do not hold
/// up a stop, and the guest need not know.
#[test]
fn zeroes_of_many_mebibytes_on_a_file_without_fallocate() {
    let test = "zeroes_of_many_mebibytes_on_a_file_without_fallocate";
    if !root(test, "a mount") {
        return;
    }
    each_engine(|engine| {
        for flags in [0, UNMAP] {
            let gate = match Gate::new(vec![OLD; DISK_BYTES as usize]) {
                Ok(gate) => gate,
                Err(reason) => return skip(test, &reason),
            };
            let folder = tempfile::tempdir().unwrap();
            let mut daemon = zero_long_range(engine, folder.path(), &gate.path(), flags);
            daemon.stop();
            assert_long_range(&gate.contents());
        }
    });
}

/// The device says that it can zero, and the file under it cannot: the zeroes are
/// written after all, those too that were to be freed.
#[test]
fn zeroes_that_the_device_fails_are_written() {
    let test = "zeroes_that_the_device_fails_are_written";
    each_engine(|engine| {
        for flags in [0, UNMAP] {
            let contents = vec![OLD; DISK_BYTES as usize];
            let Some((gate, store)) = Gate::under_loop(test, contents) else { return };
            assert_ne!(
                store.attribute("queue/write_zeroes_max_bytes"),
                "0",
                "the device says that it cannot"
            );
            let folder = tempfile::tempdir().unwrap();
            let mut daemon = zero_long_range(engine, folder.path(), &store.path, flags);
            daemon.stop();
            assert_long_range(&gate.contents());
        }
    });
}

/// A block device whose write_zeroes_max_bytes is 0.
#[test]
fn zeroes_of_many_mebibytes_on_a_device_that_cannot_zero() {
    let test = "zeroes_of_many_mebibytes_on_a_device_that_cannot_zero";
    each_engine(|engine| {
        for flags in [0, UNMAP] {
            let Some(fs) = Filesystem::ramfs(test) else { return };
            let (path, file) = fs.file("disk.raw", DISK_BYTES);
            file.write_all_at(&vec![OLD; DISK_BYTES as usize], 0).unwrap();
            let Some(store) = loop_device(test, &path, 4096) else { return };
            assert_eq!(store.attribute("queue/write_zeroes_max_bytes"), "0", "the device can zero");
            let folder = tempfile::tempdir().unwrap();
            let mut daemon = zero_long_range(engine, folder.path(), &store.path, flags);
            daemon.stop();
            assert_long_range(&std::fs::read(&path).unwrap());
        }
    });
}
