//! Images of other formats: served as a raw disk they would be destroyed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use rustix::process::{Signal, kill_process};

use crate::succession::daemon_of;
use crate::support::control::{settle, vublk};
use crate::support::daemon::{Daemon, Options, URING, run, vublkd};
use crate::support::device::Device;
use crate::support::disk::{Disk, takes_direct};
use crate::support::loopdev::LoopDevice;
use crate::support::sys::{Deadline, installed, program, root, skip};

fn command(dir: &Path, image: &Path, extra: &[&str]) -> Command {
    let mut command = vublkd("auto", &dir.join("disk.sock"), image);
    if !takes_direct(image) {
        command.arg("--direct=off");
    }
    command.args(extra);
    command
}

/// Refused, told what it is and what to type, and not changed.
#[track_caller]
fn assert_refused(dir: &Path, image: &Path, name: &str) {
    let before = std::fs::read(image).unwrap();
    let (status, _, said) = run(command(dir, image, &[]));
    assert_eq!(status.code(), Some(1), "{name}: {said}");
    let convert =
        format!("qemu-img convert -f {} -O raw {}", name.split(' ').next().unwrap(), image.display());
    for word in [&format!("format {name};"), &convert, "--format=raw"] {
        assert!(said.contains(word), "{name}: {word:?} is missing: {said}");
    }
    assert!(std::fs::read(image).unwrap() == before, "{name} was changed");
}

#[track_caller]
fn assert_served(dir: &Path, image: &Path, extra: &[&str]) {
    let mut daemon = Daemon::spawn(URING, command(dir, image, extra), dir.join("disk.sock"));
    daemon.wait_listening();
    daemon.stop();
}

fn inspected(image: &Path) -> String {
    let (status, text, complaint) = vublk(&["inspect", image.to_str().unwrap(), "--json"]);
    assert!(status.success(), "{complaint}");
    serde_json::from_str::<serde_json::Value>(&text).unwrap()["format"].as_str().unwrap().to_owned()
}

#[test]
fn by_their_magic() {
    let cases: &[(&str, u64, &[u8])] = &[
        ("qcow2", 0, b"QFI\xfb\0\0\0\x03"),
        ("qcow", 0, b"QFI\xfb\0\0\0\x01"),
        ("qed", 0, b"QED\0"),
        ("vhdx", 0, b"vhdxfile"),
        ("vpc (VHD)", 0, b"conectix"),
        ("vpc (VHD)", (1 << 20) - 512, b"conectix"),
        ("vmdk", 0, b"KDMV"),
        ("vmdk", 0, b"COWD"),
        ("vmdk", 0, b"# Disk DescriptorFile\nversion=1\n"),
        ("vmdk", 0, b"\n# made by hand\r\n#\nversion=3\r\n"),
        ("vdi", 64, b"\x7f\x10\xda\xbe"),
        ("parallels", 0, b"WithoutFreeSpace"),
        ("parallels", 0, b"WithouFreSpacExt"),
        ("bochs", 0, b"Bochs Virtual HD Image"),
        ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
        ("dmg", (1 << 20) - 512, b"koly"),
    ];
    let disk = Disk::of_size(4 << 20);
    let dir = disk.dir.path();
    for (at, &(name, offset, magic)) in cases.iter().enumerate() {
        let image = dir.join(format!("image{at}"));
        let file = File::create(&image).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(magic, offset).unwrap();
        assert_refused(dir, &image, name);
        assert_eq!(inspected(&image), name);
        assert_served(dir, &image, &["--format=raw"]);
    }
    assert_eq!(inspected(&disk.path), "raw");
}

/// What real programs make.
#[test]
fn made_by_qemu_img() {
    if !installed("qemu-img", "session::formats::made_by_qemu_img") {
        return;
    }
    let cases = [
        ("qcow2", "qcow2", ""),
        ("qcow2", "qcow2", "compat=0.10"),
        ("qcow", "qcow", ""),
        ("qed", "qed", ""),
        ("vhdx", "vhdx", ""),
        ("vpc (VHD)", "vpc", "subformat=dynamic"),
        ("vpc (VHD)", "vpc", "subformat=fixed"),
        ("vmdk", "vmdk", "subformat=monolithicSparse"),
        ("vmdk", "vmdk", "subformat=monolithicFlat"),
        ("vmdk", "vmdk", "subformat=twoGbMaxExtentSparse"),
        ("vmdk", "vmdk", "subformat=streamOptimized"),
        ("vdi", "vdi", ""),
        ("vdi", "vdi", "static=on"),
        ("parallels", "parallels", ""),
    ];
    let disk = Disk::of_size(4 << 20);
    for (at, (name, format, options)) in cases.into_iter().enumerate() {
        let image = disk.dir.path().join(format!("image{at}.{format}"));
        let mut create = program("qemu-img");
        create.args(["create", "-q", "-f", format]);
        if !options.is_empty() {
            create.args(["-o", options]);
        }
        create.arg(&image).arg("8M");
        let (status, _, complaint) = run(create);
        assert!(status.success(), "{format} {options}: {complaint}");
        assert_refused(disk.dir.path(), &image, name);
    }
}

#[test]
fn on_a_block_device() {
    let test = "session::formats::on_a_block_device";
    if !root(test, "a loop device") {
        return;
    }
    for block in [512, 4096] {
        let disk = Disk::of_size(4 << 20);
        File::options().write(true).open(&disk.path).unwrap().write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
        let device = match LoopDevice::over(&disk.path, block) {
            Ok(device) => device,
            Err(reason) => return skip(test, &reason),
        };
        assert_refused(disk.dir.path(), &device.path, "qcow2");
        assert_served(disk.dir.path(), &device.path, &["--format=raw"]);
    }
}

/// Guests write these themselves.
#[test]
fn what_a_guest_may_have_is_served() {
    let disk = Disk::of_size(4 << 20);
    let zeroes = [0; 512];
    let boot_sector = [[0_u8; 510].as_slice(), &[0x55, 0xaa]].concat();
    for start in
        [b"LUKS\xba\xbe\0\x02".as_slice(), b"SKUL\xba\xbe", &zeroes, &boot_sector, b"# a note\n", b"QFI"]
    {
        File::options().write(true).open(&disk.path).unwrap().write_all_at(start, 0).unwrap();
        assert_served(disk.dir.path(), &disk.path, &[]);
    }
    // Shorter than the part that is looked at, and of odd lengths.
    for len in [512, 513, 65536, 65537, 131_071] {
        File::options().write(true).open(&disk.path).unwrap().set_len(len).unwrap();
        assert_served(disk.dir.path(), &disk.path, &[]);
    }
}

/// A guest that writes another format's header to its own disk keeps it, in every way in which
/// one daemon follows another; only a start from nothing is refused.
#[test]
fn a_guest_that_writes_a_header_keeps_its_disk() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--supervise"]));
    let mut device = Device::plain(&daemon);
    let mut header = vec![0; 512];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    device.write(0, &header);
    let kill = || {
        // Answered between two messages of the front-end.
        settle(&daemon);
        let victim = daemon_of(&daemon);
        kill_process(victim, Signal::KILL).unwrap();
        Deadline::new("a successor").until_slowly(|| (daemon_of(&daemon) != victim).then_some(()));
    };
    kill();
    device.assert_serves(0);
    assert_eq!(device.read(0, 1), header);
    drop(device);
    // No front-end has it now: the store starts the next one.
    Device::plain(&daemon).assert_serves(0);
    kill();
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    device.write(0, &header);
    drop(device);
    daemon.stop();
    assert_refused(disk.dir.path(), &disk.path, "qcow2");
    assert_served(disk.dir.path(), &disk.path, &["--format=raw"]);
    assert_served(disk.dir.path(), &disk.path, &["--incoming"]);
}

#[test]
fn only_raw_can_be_asked_for() {
    let disk = Disk::of_size(1 << 20);
    let (status, _, said) = run(command(disk.dir.path(), &disk.path, &["--format=qcow2"]));
    assert_eq!(status.code(), Some(2), "{said}");
    assert!(said.contains("qemu-img convert -f qcow2 -O raw"), "{said}");
}
