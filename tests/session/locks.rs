//! The image locks of QEMU: a daemon that writes an image keeps others away, from the
//! first ring that starts until its front-end leaves.

use std::process::Command;
use std::time::Duration;

use rustix::process::{Signal, kill_process};

use super::migration::move_to;
use crate::succession::daemon_of;
use crate::support::control::settle;
use crate::support::daemon::{Daemon, Options, QSD, URING, run, vublkd};
use crate::support::device::{Device, start_ring};
use crate::support::disk::Disk;
use crate::support::frontend::msg;
use crate::support::sys::{Deadline, installed, program};

/// What qemu-img answers to a reader that wants the image to stay as it is:
/// None when it may read.
fn read_refused(disk: &Disk) -> Option<String> {
    let mut reader = program("qemu-img");
    reader.args(["convert", "-f", "raw", "-O", "raw"]).arg(&disk.path).arg(disk.dir.path().join("copy"));
    refusal(reader)
}

/// What qemu-img answers to a writer: None when it may write.
fn write_refused(disk: &Disk) -> Option<String> {
    let mut writer = program("qemu-img");
    writer.args(["resize", "-f", "raw"]).arg(&disk.path).arg("64M");
    refusal(writer)
}

fn refusal(command: Command) -> Option<String> {
    let (status, _, stderr) = run(command);
    (!status.success()).then_some(stderr)
}

/// The daemon drops the lock at a moment of its own: between the two commands,
/// too. One of them waits for it; from then on neither may be refused.
fn wait_for_the_lock_to_go(disk: &Disk, with: &'static str) {
    Deadline::new(with).until_slowly(|| write_refused(disk).is_none().then_some(()));
    assert_eq!((read_refused(disk), write_refused(disk)), (None, None));
}

#[track_caller]
fn assert_refused(disk: &Disk) {
    for refusal in [read_refused(disk), write_refused(disk)] {
        let refusal = refusal.expect("qemu-img opened an image in use");
        assert!(refusal.contains("lock"), "{refusal}");
    }
}

/// Also between two boots of the guest, whatever the VMM says at the end of the first.
#[test]
fn qemu_img_refuses_an_image_in_use() {
    if !installed("qemu-img", "qemu_img_refuses_an_image_in_use") {
        return;
    }
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    assert_eq!((read_refused(&disk), write_refused(&disk)), (None, None), "no ring runs yet");
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    assert_refused(&disk);
    device.frontend.vring_base(0).unwrap();
    assert_refused(&disk);
    device.frontend.tell(msg::RESET_DEVICE, &[], &[]);
    assert_refused(&disk);
    start_ring(&device.frontend, 0, &device.rings[0]);
    device.assert_serves(0);
    device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 0);
    device.frontend.tell(msg::RESET_DEVICE, &[], &[]);
    assert_refused(&disk);
    drop(device);
    wait_for_the_lock_to_go(&disk, "the lock to go with the front-end");
}

#[test]
fn a_second_daemon_is_refused_between_two_boots() {
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    device.frontend.vring_base(0).unwrap();
    let mut second = Daemon::start_at(URING, &disk, "second.sock", &Options::default());
    let status = second.wait_end(Duration::from_secs(15));
    assert_eq!(status.code(), Some(1), "{}", second.log());
    assert!(second.log().contains(&format!("vublkd (process {})", daemon.pid())), "{}", second.log());
    start_ring(&device.frontend, 0, &device.rings[0]);
    device.assert_serves(0);
}

/// A daemon that takes over between two boots has the lock as the one before it had.
#[test]
fn a_successor_locks_the_image_between_two_boots() {
    if !installed("qemu-img", "a_successor_locks_the_image_between_two_boots") {
        return;
    }
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::with(&["--supervise"]));
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    device.frontend.vring_base(0).unwrap();
    for _ in 0..2 {
        // Answered between two messages of the front-end.
        settle(&daemon);
        let victim = daemon_of(&daemon);
        kill_process(victim, Signal::KILL).unwrap();
        Deadline::new("a successor").until_slowly(|| (daemon_of(&daemon) != victim).then_some(()));
        device.frontend.sync();
        assert_refused(&disk);
    }
    start_ring(&device.frontend, 0, &device.rings[0]);
    device.assert_serves(0);
}

/// While the dirty log is in use the guest may be about to go on elsewhere.
#[test]
fn a_migration_on_one_host_hands_the_image_over() {
    let disk = Disk::new();
    let source = Daemon::start(URING, &disk, &Options::default());
    let mut there = Device::plain(&source);
    there.assert_serves(0);
    let mut target = Daemon::start_at(URING, &disk, "target.sock", &Options::with(&["--incoming"]));
    move_to(&mut target, there);
}

#[test]
fn the_lock_goes_with_the_connection() {
    if !installed("qemu-img", "the_lock_goes_with_the_connection") {
        return;
    }
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    assert!(read_refused(&disk).is_some() && write_refused(&disk).is_some());
    drop(device);
    wait_for_the_lock_to_go(&disk, "the lock to go with the connection");
    // And it comes back.
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    assert!(read_refused(&disk).is_some() && write_refused(&disk).is_some());
}

#[test]
fn an_image_that_qemu_holds_is_refused() {
    let name = "an_image_that_qemu_holds_is_refused";
    if !installed("qemu-storage-daemon", name) {
        return;
    }
    let disk = Disk::new();
    let holder = Daemon::start(QSD, &disk, &Options::default());
    let socket = disk.dir.path().join("second.sock");
    let mut second = Daemon::spawn(URING, vublkd("auto", &socket, &disk.path), socket);
    let status = second.wait_end(Duration::from_secs(15));
    assert!(!status.success(), "vublkd started on a locked image");
    assert!(second.log().contains("lock"), "{}", second.log());
    let named = format!("qemu-storage-da (process {})", holder.pid());
    assert!(second.log().contains(&named), "{named}: {}", second.log());
    // With the lock off it starts.
    let options = Options::with(&["--lock=off"]);
    let mut third = Daemon::start_at(URING, &disk, "third.sock", &options);
    third.wait_listening();
    Device::plain(&third).assert_serves(0);
}

#[test]
fn lock_off_takes_none() {
    if !installed("qemu-img", "lock_off_takes_none") {
        return;
    }
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::with(&["--lock=off"]));
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    assert_eq!((read_refused(&disk), write_refused(&disk)), (None, None));
}

#[test]
fn readers_share_an_image() {
    let disk = Disk::new();
    let options = Options { read_only: true, ..Options::default() };
    let mut one = Daemon::start_at(URING, &disk, "one.sock", &options);
    one.wait_listening();
    let mut first = Device::plain(&one);
    first.assert_serves(0);
    let mut two = Daemon::start_at(URING, &disk, "two.sock", &options);
    two.wait_listening();
    let mut second = Device::plain(&two);
    second.assert_serves(0);
    first.assert_serves(0);
}

#[test]
fn a_second_writer_is_refused() {
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let mut second = Daemon::start_at(URING, &disk, "second.sock", &Options::default());
    let status = second.wait_end(Duration::from_secs(15));
    assert!(!status.success(), "two writers on one image");
    assert!(second.log().contains("lock"), "{}", second.log());
    device.assert_serves(0);
}
