//! File systems of a test's own. Each is mounted at no folder, and reached
//! through the descriptor of its mount: `/proc/<pid>/fd/<number>/<name>`.
//!
//! Where the file system needs a block device, that is a loop device over an
//! image whose name is gone before the mount is made. The mount ends with its
//! descriptor, the loop device with the mount, and the image with the loop
//! device, so a test that panics or is killed leaves nothing behind.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

use super::daemon::run;
use super::loopdev::LoopDevice;
use super::sys::{installed, root, skip};

const MIB: u64 = 1 << 20;

/// A mounted file system.
pub struct Filesystem {
    root: OwnedFd,
    /// The folders that an overlay is made of.
    _layers: Option<Box<Filesystem>>,
}

/// Each gives nothing, and reports the test as left out, where the file system
/// cannot be made: without root, its mkfs program, or the kernel's support.
impl Filesystem {
    /// Files can share blocks here (FICLONE).
    pub fn xfs(test: &str) -> Option<Self> {
        // mkfs.xfs makes nothing smaller than 300 MiB.
        Self::formatted(test, "xfs", 320 * MIB, "mkfs.xfs", &["-q"], &[])
    }

    pub fn btrfs(test: &str) -> Option<Self> {
        Self::formatted(test, "btrfs", 256 * MIB, "mkfs.btrfs", &["-q"], &[])
    }

    /// Blocks of 4096 bytes, and these mount options.
    pub fn ext4(test: &str, options: &[(&str, &str)]) -> Option<Self> {
        Self::formatted(test, "ext4", 128 * MIB, "mkfs.ext4", &["-q", "-b", "4096"], options)
    }

    /// A tmpfs that has room for `size`: `64m`.
    pub fn tmpfs(test: &str, size: &str) -> Option<Self> {
        Self::plain(test, "tmpfs", &[("size", size)])
    }

    /// Files in memory without O_DIRECT and without fallocate. A loop device over
    /// one can neither discard nor zero.
    pub fn ramfs(test: &str) -> Option<Self> {
        Self::plain(test, "ramfs", &[])
    }

    /// An overlay whose layers are folders of a tmpfs.
    pub fn overlay(test: &str) -> Option<Self> {
        let layers = Self::tmpfs(test, "64m")?;
        let mut options = Vec::new();
        for (key, name) in [("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work")] {
            let folder = layers.path(name);
            std::fs::create_dir(&folder).unwrap();
            options.push((key, folder.into_os_string().into_string().unwrap()));
        }
        let options: Vec<(&str, &str)> = options.iter().map(|(key, value)| (*key, value.as_str())).collect();
        let overlay = Self::plain(test, "overlay", &options)?;
        Some(Self { _layers: Some(Box::new(layers)), ..overlay })
    }

    /// Where root can open the file of this name while the value lives.
    pub fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}/{name}", std::process::id(), self.root.as_raw_fd()))
    }

    /// A new file of `bytes` bytes, all of it a hole.
    #[track_caller]
    pub fn file(&self, name: &str, bytes: u64) -> (PathBuf, File) {
        let path = self.path(name);
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(bytes).unwrap();
        (path, file)
    }

    fn plain(test: &str, kind: &str, options: &[(&str, &str)]) -> Option<Self> {
        if !root(test, "a mount") {
            return None;
        }
        mount(kind, options).map_err(|reason| skip(test, &reason)).ok()
    }

    fn formatted(
        test: &str,
        kind: &str,
        size: u64,
        mkfs: &str,
        arguments: &[&str],
        options: &[(&str, &str)],
    ) -> Option<Self> {
        if !root(test, "a mount") || !installed(mkfs, test) {
            return None;
        }
        let made = format(size, mkfs, arguments).and_then(|device| {
            let source = ("source", device.path.to_str().unwrap());
            mount(kind, &[&[source], options].concat())
            // From here on the mount alone keeps the loop device.
        });
        made.map_err(|reason| skip(test, &reason)).ok()
    }
}

/// A loop device with an empty file system on it. The image has no name any more.
fn format(size: u64, mkfs: &str, arguments: &[&str]) -> Result<LoopDevice, String> {
    let folder = tempfile::Builder::new().prefix("vublk-").tempdir().unwrap();
    let image = folder.path().join("image");
    File::create(&image).unwrap().set_len(size).unwrap();
    make(mkfs, arguments, &image)?;
    LoopDevice::over(&image, 512).map_err(|reason| format!("no loop device: {reason}"))
}

fn make(mkfs: &str, arguments: &[&str], image: &Path) -> Result<(), String> {
    let mut command = Command::new(mkfs);
    command.args(arguments).arg(image);
    let (status, _, complaint) = run(command);
    if status.success() { Ok(()) } else { Err(format!("{mkfs} ended with {status}: {complaint}")) }
}

/// A mount at no folder; the reason, as the kernel words it, when there is none.
fn mount(kind: &str, options: &[(&str, &str)]) -> Result<Filesystem, String> {
    let refused = |error: rustix::io::Errno| format!("no {kind} of its own: {error}");
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(refused)?;
    let mounted = || {
        for (key, value) in options {
            fsconfig_set_string(&context, *key, *value)?;
        }
        fsconfig_create(&context)?;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
    };
    let root = mounted().map_err(|error| format!("{} {}", refused(error), messages(&context)))?;
    Ok(Filesystem { root, _layers: None })
}

/// What the kernel says of a mount that failed.
fn messages(context: &OwnedFd) -> String {
    let mut text = String::new();
    let mut buffer = [0; 1024];
    while let Ok(got @ 1..) = rustix::io::read(context, &mut buffer) {
        text.push_str(&String::from_utf8_lossy(&buffer[..got]));
    }
    text
}
