//! The serial number without `--serial`. Guests tell disks apart by it
//! (/dev/disk/by-id), so no two images have the same, and an image keeps its own.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::command;
use crate::support::daemon::{Daemon, URING};
use crate::support::device::{Device, OK, T_GET_ID};
use crate::support::disk::Disk;

/// What GET_ID answers in 20 bytes, without the zeroes behind it. `disk` may be
/// relative to `folder`, where the socket is.
#[track_caller]
fn serial_of(disk: &Path, folder: &Path, extra: &[&str]) -> String {
    let mut command = command(URING, folder, disk, extra);
    command.current_dir(folder);
    let mut daemon = Daemon::spawn(URING, command, folder.join("disk.sock"));
    daemon.wait_listening();
    let mut device = Device::plain(&daemon);
    let done = device.run(0, T_GET_ID, 0, &[], 20);
    assert_eq!(done.status, OK, "GET_ID");
    drop(device);
    daemon.stop();
    let len = done.data.iter().position(|byte| *byte == 0).unwrap_or(done.data.len());
    assert!(done.data[len..].iter().all(|byte| *byte == 0), "{:?}: more behind a zero", done.data);
    assert!(done.data[..len].iter().all(u8::is_ascii_graphic), "{:?} is not readable ASCII", done.data);
    String::from_utf8(done.data[..len].to_vec()).unwrap()
}

/// An image of this name in a folder of its own.
fn image(name: &str) -> (Disk, PathBuf) {
    let disk = Disk::new();
    let path = disk.dir.path().join(name);
    std::fs::rename(&disk.path, &path).unwrap();
    (disk, path)
}

/// Names that are the same, or the same in all bytes that a serial number has room for.
#[test]
fn images_with_like_names_have_serial_numbers_of_their_own() {
    let names = ["disk.raw", "disk.raw", "customer-database-0001.raw", "customer-database-0002.raw"];
    let mut serials = Vec::new();
    for name in names {
        let (disk, path) = image(name);
        let serial = serial_of(&path, disk.dir.path(), &[]);
        // The first letters tell an operator which image it is; how many there is
        // room for is the daemon's choice.
        assert!(serial.starts_with(&name[..4]), "{name} has the serial number {serial:?}");
        serials.push((name, serial, disk));
    }
    for (at, (name, serial, _)) in serials.iter().enumerate() {
        for (other, same, _) in &serials[..at] {
            assert_ne!(serial, same, "the serial number of {name} and of another {other}");
        }
    }
}

/// Guests make file names of it, so letters that are not ASCII and spaces may not be in it.
#[test]
fn a_name_that_is_not_ascii_gives_a_readable_serial_number() {
    for name in ["größe 1.raw", "磁盘.raw", " .raw"] {
        let (disk, path) = image(name);
        let serial = serial_of(&path, disk.dir.path(), &[]);
        assert!(!serial.is_empty(), "{name} has no serial number");
    }
}

/// The guest's /dev/disk/by-id and its boot entries have to find the disk again.
#[test]
fn an_image_keeps_its_serial_number() {
    let (disk, path) = image("customer-database-0001.raw");
    let folder = disk.dir.path();
    let first = serial_of(&path, folder, &[]);
    assert_eq!(serial_of(&path, folder, &[]), first, "after a restart");
    let link = folder.join("link.raw");
    symlink(&path, &link).unwrap();
    assert_eq!(serial_of(&link, folder, &[]), first, "through a symlink");
    let elsewhere = tempfile::tempdir().unwrap();
    let link = elsewhere.path().join("relative.raw");
    let target = Path::new("..").join(folder.file_name().unwrap()).join(path.file_name().unwrap());
    symlink(&target, &link).unwrap();
    assert_eq!(serial_of(&link, elsewhere.path(), &[]), first, "through a relative symlink");
    let name = Path::new(path.file_name().unwrap());
    assert_eq!(serial_of(name, folder, &[]), first, "by a relative path");
    let parent = Path::new("..").join(folder.file_name().unwrap()).join(name);
    assert_eq!(serial_of(&parent, folder, &[]), first, "by a path that goes up");
    assert_eq!(serial_of(&path, folder, &["--read-only"]), first, "read-only");
}

/// A serial number that was asked for is the one the guest has.
#[test]
fn a_serial_number_that_was_asked_for_is_used() {
    let (disk, path) = image("disk.raw");
    for wanted in ["42", "exactly-20-bytes-lon"] {
        let option = format!("--serial={wanted}");
        assert_eq!(serial_of(&path, disk.dir.path(), &[&option]), wanted);
    }
}
