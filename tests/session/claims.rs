//! Block devices that another user has: a mounted file system, a program that claimed it
//! under another name. A guest's writes would destroy what that one has.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Signal, kill_process};
use tempfile::TempDir;

use super::migration::move_to;
use crate::succession::daemon_of;
use crate::support::control::settle;
use crate::support::daemon::{Daemon, URING, run, vublkd};
use crate::support::device::Device;
use crate::support::disk::pattern;
use crate::support::loopdev::LoopDevice;
use crate::support::sys::{Deadline, installed, root, skip};

/// A device, a second node of it, and the folder of all that belongs to it.
struct Stage {
    // Before its file.
    device: LoopDevice,
    alias: PathBuf,
    folder: TempDir,
}

impl Stage {
    /// The start of the disk is patterned; or the test is left out.
    fn new(test: &str) -> Option<Self> {
        Self::over(test, |image| {
            std::fs::write(image, pattern(0, 4096)).unwrap();
            File::options().write(true).open(image).unwrap().set_len(16 << 20).unwrap();
        })
    }

    fn over(test: &str, make: impl FnOnce(&Path)) -> Option<Self> {
        if !root(test, "a loop device") {
            return None;
        }
        let folder = tempfile::Builder::new().prefix("vublk-").tempdir().unwrap();
        let image = folder.path().join("image");
        make(&image);
        let device = LoopDevice::over(&image, 512).map_err(|reason| skip(test, &reason)).ok()?;
        let alias = folder.path().join("alias");
        let number = std::fs::metadata(&device.path).unwrap().rdev();
        mknodat(CWD, &alias, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, number).unwrap();
        // A folder may be on a file system without devices.
        File::open(&alias).map_err(|reason| skip(test, &format!("{}: {reason}", alias.display()))).ok()?;
        Some(Self { device, alias, folder })
    }

    fn command(&self, disk: &Path, socket: &str) -> (Command, PathBuf) {
        let socket = self.folder.path().join(socket);
        (vublkd("auto", &socket, disk), socket)
    }

    fn start(&self, disk: &Path, socket: &str, extra: &[&str]) -> Daemon {
        let (mut command, socket) = self.command(disk, socket);
        command.args(extra);
        Daemon::spawn(URING, command, socket)
    }

    #[track_caller]
    fn serving(&self, socket: &str, extra: &[&str]) -> Daemon {
        let mut daemon = self.start(&self.device.path, socket, extra);
        daemon.wait_listening();
        daemon
    }

    fn claim(&self) -> std::io::Result<File> {
        File::options().read(true).custom_flags(libc::O_EXCL).open(&self.alias)
    }
}

#[track_caller]
fn assert_refused(mut daemon: Daemon, words: &[&str]) {
    let status = daemon.wait_end(Duration::from_secs(15));
    let log = daemon.log();
    assert_eq!(status.code(), Some(1), "{log}");
    for word in words {
        assert!(log.contains(word), "{word}: {log}");
    }
}

/// The mount is in a mount namespace of the daemon's own, and ends with it.
#[test]
fn a_mounted_device() {
    let test = "session::claims::a_mounted_device";
    if !installed("mkfs.ext4", test) || !installed("unshare", test) {
        return;
    }
    let stage = Stage::over(test, |image| {
        File::create(image).unwrap().set_len(16 << 20).unwrap();
        let mut mkfs = Command::new("mkfs.ext4");
        mkfs.arg("-q").arg(image);
        let (status, _, complaint) = run(mkfs);
        assert!(status.success(), "{complaint}");
    });
    let Some(stage) = stage else { return };
    let place = stage.folder.path().join("mnt");
    std::fs::create_dir(&place).unwrap();
    let start = |disk: &Path, extra: &[&str]| {
        let (inner, socket) = stage.command(disk, "disk.sock");
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", "mount \"$1\" \"$2\" && shift 2 && exec \"$@\"", "sh"]);
        command.arg(&stage.device.path).arg(&place);
        command.arg(inner.get_program()).args(inner.get_args()).args(extra);
        Daemon::spawn(URING, command, socket)
    };
    let mounted = format!("mounted on {}", place.display());
    for disk in [&stage.device.path, &stage.alias] {
        let path = disk.display().to_string();
        assert_refused(start(disk, &[]), &[&mounted, "umount", &path]);
    }
    // A file that is mounted by way of a loop device.
    let image = stage.folder.path().join("image");
    let over = format!("{}, a block device over this image,", stage.device.path.display());
    assert_refused(start(&image, &[]), &[&mounted, &over]);
    let mut daemon = stage.start(&image, "disk.sock", &[]); // the device is there, and free
    daemon.wait_listening();
    drop(daemon);
    // These do no harm, or were asked for.
    for extra in ["--read-only", "--lock=off", "--incoming"] {
        let mut daemon = start(&stage.device.path, &[extra]);
        daemon.wait_listening();
        daemon.stop();
    }
}

/// A mount that this process cannot see, as in another container.
#[test]
fn a_device_that_is_mounted_out_of_sight() {
    let test = "session::claims::a_device_that_is_mounted_out_of_sight";
    let Some(stage) = Stage::new(test) else { return };
    let holder = stage.claim().unwrap();
    let path = stage.device.path.display().to_string();
    let ourselves = format!("(process {})", std::process::id());
    assert_refused(stage.start(&stage.device.path, "disk.sock", &[]), &[&ourselves, &path, "--lock=off"]);
    drop(holder);
    Device::plain(&stage.serving("disk.sock", &[])).assert_serves(0);
}

/// File locks are a device node's, the claim is the device's.
#[test]
fn two_daemons_by_two_nodes() {
    let Some(stage) = Stage::new("session::claims::two_daemons_by_two_nodes") else { return };
    let first = stage.serving("first.sock", &[]);
    let mut device = Device::plain(&first);
    device.assert_serves(0);
    let holder = format!("vublkd (process {})", first.pid());
    assert_refused(stage.start(&stage.alias, "second.sock", &[]), &[&holder]);
    device.frontend.vring_base(0).unwrap();
    assert_refused(stage.start(&stage.alias, "second.sock", &[]), &[&holder]);
    drop(device);
    Deadline::new("the claim to go with the front-end").until_slowly(|| stage.claim().ok().map(drop));
    let mut second = stage.start(&stage.alias, "second.sock", &[]);
    second.wait_listening();
    Device::plain(&second).assert_serves(0);
}

/// A device is claimed while a guest has it, and before that a claim is waited for.
#[test]
fn a_claim_that_goes_while_it_is_waited_for() {
    let Some(stage) = Stage::new("session::claims::a_claim_that_goes_while_it_is_waited_for") else { return };
    let daemon = stage.serving("disk.sock", &[]);
    let holder = stage.claim().expect("no front-end has it");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            Deadline::new("a front-end").until_slowly(|| daemon.log().contains("connected").then_some(()));
            drop(holder);
        });
        let mut device = Device::plain(&daemon);
        device.assert_serves(0);
        let refused = stage.claim().expect_err("claimed while a guest has it");
        assert_eq!(refused.raw_os_error(), Some(libc::EBUSY));
    });
}

/// A reader takes no claim and needs none.
#[test]
fn readers_share_a_claimed_device() {
    let Some(stage) = Stage::new("session::claims::readers_share_a_claimed_device") else { return };
    let _holder = stage.claim().unwrap();
    let daemons = ["one.sock", "two.sock"].map(|socket| stage.serving(socket, &["--read-only"]));
    let mut devices = daemons.each_ref().map(Device::plain);
    devices.iter_mut().for_each(|device| device.assert_serves(0));
}

#[test]
fn a_migration_on_one_host() {
    let Some(stage) = Stage::new("session::claims::a_migration_on_one_host") else { return };
    let source = stage.serving("source.sock", &[]);
    let mut there = Device::plain(&source);
    there.assert_serves(0);
    let mut target = stage.start(&stage.alias, "target.sock", &["--incoming"]);
    move_to(&mut target, there);
}

/// A dead daemon's claim goes with its last descriptor.
#[test]
fn a_killed_daemon_leaves_no_claim() {
    let Some(stage) = Stage::new("session::claims::a_killed_daemon_leaves_no_claim") else { return };
    for _ in 0..20 {
        let mut daemon = stage.serving("disk.sock", &[]);
        let mut device = Device::plain(&daemon);
        device.assert_serves(0);
        daemon.signal(Signal::KILL);
        daemon.wait_end(Duration::from_secs(10));
        let again = stage.serving("disk.sock", &[]);
        Device::plain(&again).assert_serves(0);
    }
}

#[test]
fn a_successor_claims_the_device() {
    let Some(stage) = Stage::new("session::claims::a_successor_claims_the_device") else { return };
    let daemon = stage.serving("disk.sock", &["--supervise"]);
    let mut device = Device::plain(&daemon);
    for signal in [Signal::KILL, Signal::KILL, Signal::KILL] {
        device.assert_serves(0);
        // Answered between two messages of the front-end.
        settle(&daemon);
        let victim = daemon_of(&daemon);
        kill_process(victim, signal).unwrap();
        Deadline::new("a successor").until_slowly(|| (daemon_of(&daemon) != victim).then_some(()));
    }
    device.assert_serves(0);
    assert!(stage.claim().is_err(), "not claimed by the successor");
}
