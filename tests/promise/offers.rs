//! Feature bits and limits. A guest that comes by live migration has them from the
//! daemon at its source, so none may depend on how or when a daemon was started,
//! nor on what the backing can do.

use std::fs::{File, Permissions};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use super::{capacity, command, config, loop_device, start, u32_at};
use crate::support::daemon::{Daemon, URING, bare_vublkd, pass_fd};
use crate::support::device::{Device, OK, T_DISCARD, T_IN, T_WRITE_ZEROES, range};
use crate::support::disk::Disk;
use crate::support::frontend::{feature, msg};
use crate::support::fs::Filesystem;
use crate::support::gate::Gate;
use crate::support::sys::{root, skip};

/// User and group `nobody`.
const NOBODY: u32 = 65534;
/// Offsets in the config space.
const MAX_DISCARD_SECTORS: usize = 36;
const MAX_WRITE_ZEROES_SECTORS: usize = 48;

/// Feature bits and config space as a driver reads them.
fn offer(daemon: &Daemon) -> (u64, Vec<u8>) {
    let device = Device::plain(daemon);
    (device.frontend.ask64(msg::GET_FEATURES), config(&device))
}

/// The destination of a live migration often runs as a user that may write the image
/// and nothing beside it, and must not try anything out on the image either.
#[test]
fn a_daemon_that_waits_for_a_migration_offers_what_any_other_does() {
    let test = "a_daemon_that_waits_for_a_migration_offers_what_any_other_does";
    if !root(test, "another user's daemon") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let make_folder = |name: &str, owner: u32| {
        let path = folder.path().join(name);
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        chown(&path, Some(owner), Some(owner)).unwrap();
        path
    };
    std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let images = make_folder("images", 0);
    let (of_root, of_nobody) = (make_folder("root", 0), make_folder("nobody", NOBODY));
    let image = images.join("disk.raw");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    chown(&image, Some(NOBODY), Some(NOBODY)).unwrap();

    let mut source = start(URING, &of_root, &image, &[]);
    let wanted = offer(&source);
    source.stop();

    let meant = command(URING, &of_nobody, &image, &["--incoming"]);
    // By descriptor: nobody may not look into every folder that leads to the program.
    let program =
        File::options().read(true).custom_flags(libc::O_PATH).open(bare_vublkd().get_program()).unwrap();
    let mut command = Command::new("/proc/self/fd/9");
    command.args(meant.get_args()).uid(NOBODY).gid(NOBODY);
    pass_fd(&mut command, program.as_fd(), 9);
    let mut destination = Daemon::spawn(URING, command, of_nobody.join("disk.sock"));
    destination.wait_listening();
    let (features, mut config) = offer(&destination);
    // What the guest was told of its write cache is not known here: it has none until it says so.
    assert_eq!(std::mem::replace(&mut config[32], wanted.1[32]), 0, "write-through at the destination");
    assert_eq!(
        features, wanted.0,
        "feature bits: {features:#x} with --incoming, {:#x} at the source",
        wanted.0
    );
    assert_eq!(config, wanted.1, "config space");
    destination.stop();
}

/// There is no room behind such an image in which fallocate could be tried out.
#[test]
fn an_image_of_the_largest_size_is_offered_like_a_small_one() {
    const LARGEST: u64 = (1 << 44) - 4096;
    let test = "an_image_of_the_largest_size_is_offered_like_a_small_one";
    let Some(fs) = Filesystem::ext4(test, &[]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let (small, _) = fs.file("small.raw", 64 << 20);
    let (large, file) = fs.file("large.raw", LARGEST);
    assert!(file.set_len(LARGEST + 1).is_err(), "larger files are possible: the test needs another size");

    let mut daemon = start(URING, folder.path(), &small, &[]);
    let wanted = offer(&daemon);
    daemon.stop();
    let mut daemon = start(URING, folder.path(), &large, &[]);
    let (features, config) = offer(&daemon);
    assert_eq!(features, wanted.0, "feature bits: {features:#x}, of a small image {:#x}", wanted.0);
    let both = feature::DISCARD | feature::WRITE_ZEROES;
    assert_eq!(features & both, both, "DISCARD and WRITE_ZEROES");
    assert_eq!(capacity(&config), LARGEST / 512, "capacity");
    assert_eq!(config[8..], wanted.1[8..], "config space behind the capacity");
    let mut device = Device::plain(&daemon);
    let end = range(LARGEST / 512 - 16, 16, 0);
    assert_eq!(device.status(T_WRITE_ZEROES, 0, &end, 0), OK, "zeroes at the end of the image");
    assert_eq!(device.status(T_DISCARD, 0, &end, 0), OK, "discard at the end of the image");
    assert_eq!(device.status(T_IN, LARGEST / 512 - 16, &[], 16 * 512), OK, "read at the end of the image");
    drop(device);
    daemon.stop();
    assert_eq!(file.metadata().unwrap().len(), LARGEST, "length of the image");
}

#[track_caller]
fn assert_two_gibibytes(disk: &Path, what: &str) {
    let folder = tempfile::tempdir().unwrap();
    let mut daemon = start(URING, folder.path(), disk, &[]);
    let (_, config) = offer(&daemon);
    assert_eq!(u32_at(&config, MAX_DISCARD_SECTORS), 1 << 22, "max_discard_sectors on {what}");
    assert_eq!(u32_at(&config, MAX_WRITE_ZEROES_SECTORS), 1 << 22, "max_write_zeroes_sectors on {what}");
    daemon.stop();
}

/// A guest keeps these limits when it moves to a backing that has to write its zeroes.
#[test]
fn one_range_may_have_two_gibibytes_on_every_backing() {
    let test = "one_range_may_have_two_gibibytes_on_every_backing";
    let disk = Disk::new();
    assert_two_gibibytes(&disk.path, "a file");
    let Some(device) = loop_device(test, &disk.path, 4096) else { return };
    assert_two_gibibytes(&device.path, "a block device");
    if let Some(fs) = Filesystem::ramfs(test) {
        let (path, _) = fs.file("disk.raw", 64 << 20);
        let Some(device) = loop_device(test, &path, 4096) else { return };
        assert_two_gibibytes(&device.path, "a block device that can neither discard nor zero");
    }
    match Gate::new(vec![0; 8 << 20]) {
        Ok(gate) => assert_two_gibibytes(&gate.path(), "a file without fallocate"),
        Err(reason) => skip(test, &reason),
    }
}
