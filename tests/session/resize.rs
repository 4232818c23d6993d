//! A disk that grows under a running guest: by the tool, by a signal, and by
//! somebody else; and sizes that make no sense.

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;

use super::{each_engine, start};
use crate::support::control::{self, Control, vublk};
use crate::support::daemon::{Daemon, Options, URING, vublkd};
use crate::support::device::{Device, IOERR, OK, Setup, T_IN, T_OUT};
use crate::support::disk::{Disk, SECTOR, assert_same, salted};
use crate::support::frontend::{Frontend, msg};
use crate::support::loopdev::LoopDevice;
use crate::support::manager::Manager;
use crate::support::sys::{PATIENCE, readable_within, root, skip};

const MIB: u64 = 1 << 20;
/// The disk at first, and then.
const BEFORE: u64 = 64 * MIB;
const AFTER: u64 = 96 * MIB;
const CONFIG_CHANGE_MSG: u32 = 2;

/// A channel for what the back-end has to say; gives our end of it.
fn channel(device: &Device) -> Frontend {
    let (ours, theirs) = UnixStream::pair().unwrap();
    device.frontend.tell(msg::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    Frontend::new(ours)
}

/// The front-end is told once, without being asked for an answer.
#[track_caller]
fn assert_told(channel: &Frontend) {
    let news = channel.receive().unwrap();
    assert_eq!((news.request, news.flags), (CONFIG_CHANGE_MSG, 1), "version 1, no NEED_REPLY");
    assert!(news.payload.is_empty() && news.fds.is_empty());
    assert_quiet(channel);
}

#[track_caller]
fn assert_quiet(channel: &Frontend) {
    assert!(!readable_within(channel.socket.as_fd(), Duration::from_millis(50)), "news nobody expects");
}

#[track_caller]
fn assert_capacity(device: &Device, bytes: u64) {
    let config = device.frontend.config(0, 60).unwrap();
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()) * SECTOR as u64, bytes);
}

#[test]
fn the_guest_sees_a_larger_disk_and_writes_to_its_end() {
    each_engine(|engine| {
        let (disk, daemon) = start(engine);
        let mut device = Device::new(&daemon, Setup { queues: 2, ..Setup::default() });
        let channel = channel(&device);
        let last = AFTER / SECTOR as u64 - 1;
        assert_eq!(device.status(T_IN, last, &[], SECTOR), IOERR);
        let path = control::path(&daemon).display().to_string();
        let (status, said, complained) = vublk(&["resize", &path, "96M"]);
        assert!(status.success(), "{complained}");
        assert_eq!(said, format!("{AFTER} bytes: the VMM was told, and tells its guest\n"));
        assert_told(&channel);
        assert_capacity(&device, AFTER);
        let data = salted(1, last, 1);
        for queue in 0..2 {
            assert_eq!(device.run(queue, T_OUT, last, &data, 0).status, OK);
            assert_same(&device.run(queue, T_IN, last, &[], SECTOR).data, &data, "the last sector");
            assert_eq!(device.run(queue, T_IN, last + 1, &[], SECTOR).status, IOERR);
        }
        assert_same(&disk.read(last, 1), &data, "the last sector of the file");
        device.assert_serves(0);
        // Once more is no news.
        let again = Control::of(&daemon).call("resize", json!({"size": AFTER})).unwrap();
        assert_eq!(again, json!({"size": AFTER, "told": "unchanged"}));
        assert_quiet(&channel);
        // The channel outlives a reset of the guest.
        device.frontend.tell(msg::RESET_DEVICE, &[], &[]);
        let more = Control::of(&daemon).call("resize", json!({"size": AFTER + MIB})).unwrap();
        assert_eq!(more, json!({"size": AFTER + MIB, "told": "later"}));
        assert_quiet(&channel);
        crate::support::device::start_ring(&device.frontend, 1, &device.rings[1]);
        assert_told(&channel);
        device.assert_serves(1);
    });
}

/// A file that another process made longer: SIGHUP says so.
#[test]
fn sighup() {
    let (disk, daemon) = start(URING);
    let device = Device::plain(&daemon);
    let channel = channel(&device);
    let file = OpenOptions::new().write(true).open(&disk.path).unwrap();
    // The odd bytes at the end are no block.
    file.set_len(AFTER + 100).unwrap();
    daemon.signal(Signal::HUP);
    assert_told(&channel);
    assert_capacity(&device, AFTER);
    // Asked for by its size, it keeps those bytes.
    Control::of(&daemon).call("resize", json!({"size": AFTER})).unwrap();
    assert_eq!(file.metadata().unwrap().len(), AFTER + 100, "the file was cut");
    // Shorter: the guest keeps its size, and gets errors where nothing is left.
    file.set_len(BEFORE).unwrap();
    daemon.signal(Signal::HUP);
    daemon.wait_log(&format!("has {BEFORE} bytes left of the {AFTER}"));
    assert_quiet(&channel);
    assert_capacity(&device, AFTER);
    let mut device = device;
    assert_eq!(device.status(T_IN, AFTER / SECTOR as u64 - 1, &[], SECTOR), IOERR);
    device.assert_serves(0);
}

/// Front-ends without a channel, and none at all: there is none to tell.
#[test]
fn a_front_end_without_a_channel_and_none_at_all() {
    let (_disk, daemon) = start(URING);
    let mut control = Control::of(&daemon);
    let told = control.call("resize", json!({"size": BEFORE + MIB})).unwrap();
    assert_eq!(told, json!({"size": BEFORE + MIB, "told": "later"}));
    let mut device = Device::plain(&daemon);
    assert_capacity(&device, BEFORE + MIB);
    let told = control.call("resize", json!({"size": AFTER})).unwrap();
    assert_eq!(told, json!({"size": AFTER, "told": "at-reset"}));
    device.assert_serves(0);
    // One that has gone away, and one that never reads.
    drop(channel(&device));
    let told = control.call("resize", json!({"size": AFTER + MIB})).unwrap();
    assert_eq!(told, json!({"size": AFTER + MIB, "told": "at-reset"}));
    let deaf = channel(&device);
    let mut size = AFTER + MIB;
    loop {
        size += 4096;
        match control.call("resize", json!({"size": size})).unwrap()["told"].as_str().unwrap() {
            "front-end" => assert!(size < AFTER + 1024 * MIB, "the channel never fills"),
            "at-reset" => break,
            other => panic!("{other}"),
        }
    }
    device.assert_serves(0);
    assert_capacity(&device, size);
    drop(deaf);
}

#[test]
fn sizes_that_make_no_sense() {
    let (disk, mut daemon) = start(URING);
    let device = Device::plain(&daemon);
    let channel = channel(&device);
    let mut control = Control::of(&daemon);
    let mut refused = |size: u64, why: &str| {
        let (code, message) = control.call("resize", json!({"size": size})).unwrap_err();
        assert_eq!(code, -32000);
        assert!(message.contains(why), "{message}");
        assert!(message.contains("disk.raw"), "which disk? {message}");
    };
    refused(BEFORE - 4096, "a disk only grows");
    refused(0, "a disk only grows");
    refused(BEFORE + 1, "not a multiple");
    refused(u64::MAX - 4095, "too large");
    assert_eq!(std::fs::metadata(&disk.path).unwrap().len(), BEFORE);
    assert_quiet(&channel);
    let path = control::path(&daemon).display().to_string();
    for (size, why) in [("12Q", "20G"), ("-1", "20G"), ("1M", "a disk only grows")] {
        let (status, said, complained) = vublk(&["resize", &path, size]);
        assert!(!status.success() && said.is_empty() && complained.contains(why), "{size}: {complained}");
    }
    // The file is longer than the guest was told: it is not cut.
    OpenOptions::new().write(true).open(&disk.path).unwrap().set_len(AFTER).unwrap();
    let (_, message) = Control::of(&daemon).call("resize", json!({"size": AFTER - MIB})).unwrap_err();
    assert!(message.contains("a disk only grows"), "{message}");
    assert_eq!(std::fs::metadata(&disk.path).unwrap().len(), AFTER);
    drop(device);
    daemon.assert_alive();
    daemon.stop();

    let mut read_only = Daemon::start(URING, &disk, &Options { read_only: true, ..Options::default() });
    let (_, message) = Control::of(&read_only).call("resize", json!({"size": AFTER + MIB})).unwrap_err();
    assert!(message.contains("read-only"), "{message}");
    read_only.stop();
}

/// While no daemon served: the successor finds out, and tells.
#[test]
fn a_file_that_grew_between_two_daemons() {
    let disk = Disk::new();
    let mut manager = Manager::new(disk.dir.path());
    let mut daemon = manager.start(&disk);
    let mut device = Device::plain(&daemon);
    let channel = channel(&device);
    device.assert_serves(0);
    control::settle(&daemon);
    daemon.signal(Signal::KILL);
    daemon.wait_end(PATIENCE);
    OpenOptions::new().write(true).open(&disk.path).unwrap().set_len(AFTER).unwrap();
    daemon = manager.start(&disk);
    assert_told(&channel);
    assert_capacity(&device, AFTER);
    let last = AFTER / SECTOR as u64 - 1;
    device.write(last, &salted(1, last, 1));
    drop(device);
    daemon.stop();
}

/// Before a guest runs on it the image may be another's, which alone may resize it.
#[test]
fn an_image_that_another_has() {
    let disk = Disk::new();
    let mut idle = Daemon::start_at(URING, &disk, "idle.sock", &Options::default());
    idle.wait_listening();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    let device = Device::plain(&daemon);
    let (_, message) = Control::of(&idle).call("resize", json!({"size": AFTER})).unwrap_err();
    assert!(message.contains("lock"), "{message}");
    assert_eq!(std::fs::metadata(&disk.path).unwrap().len(), BEFORE);
    // By whom it has it.
    Control::of(&daemon).call("resize", json!({"size": AFTER})).unwrap();
    drop(device);
    idle.stop();
    daemon.stop();
}

/// A block device grows by its own means; `vublk resize` without a size finds out.
#[test]
fn a_block_device() {
    let test = "session::resize::a_block_device";
    if !root(test, "a loop device") {
        return;
    }
    let disk = Disk::new();
    let device = match LoopDevice::over(&disk.path, 512) {
        Ok(device) => device,
        Err(reason) => return skip(test, &format!("no loop device: {reason}")),
    };
    let socket = disk.dir.path().join("disk.sock");
    let mut daemon = Daemon::spawn(URING, vublkd("io_uring", &socket, &device.path), socket);
    daemon.wait_listening();
    let guest = Device::plain(&daemon);
    let channel = channel(&guest);
    let (_, message) = Control::of(&daemon).call("resize", json!({"size": AFTER})).unwrap_err();
    assert!(message.contains("without a size"), "{message}");
    OpenOptions::new().write(true).open(&disk.path).unwrap().set_len(AFTER).unwrap();
    device.update_size();
    let path = control::path(&daemon).display().to_string();
    let (status, _, complained) = vublk(&["resize", &path]);
    assert!(status.success(), "{complained}");
    assert_told(&channel);
    assert_capacity(&guest, AFTER);
    drop(guest);
    daemon.stop();
}
