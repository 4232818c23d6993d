//! Where disks and sockets are: folders and sockets.
//!
//! What it is: whether a disk in this folder could be read as vublkd reads it, and whether a VMM reaches a socket.
//!
//! What it is not: it connects to no socket, which would count as a front-end.
//!
//! Invariant: a file that it makes in a folder has no name there.

use std::fs::{File, OpenOptions, read_dir};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::statvfs;

use super::{Finding, fail, ok, warn};
use crate::backing::{Backing, Discard};
use crate::sys::users::{group_by_number, user_by_number};

/// What a folder is as a place for disks.
pub(super) fn folder(path: &Path) -> Vec<Finding> {
    let mut findings = vec![space(path)];
    match tempfile::tempfile_in(path) {
        Ok(file) => {
            findings.push(direct(reopened(&file)));
            let backing = Backing::of(&file, path.into(), false, false, Discard::Ignore);
            findings.extend(in_memory(backing.in_memory));
        }
        Err(e) => findings.push(warn(
            "O_DIRECT",
            format!("cannot be tried: no file can be made here: {e}"),
            format!(
                "run vublk doctor as a user that may, or make one: truncate -s 10G {}",
                path.join("disk.raw").display()
            ),
        )),
    }
    findings
}

/// The same file, without the page cache, and how it wants to be spoken to.
fn reopened(file: &File) -> io::Result<Backing> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path)?;
    Ok(Backing::of(&direct, path, true, true, Discard::Ignore))
}

/// Whether disks here are read and written past the page cache, by `tried`.
pub(super) fn direct(tried: io::Result<Backing>) -> Finding {
    let check = "O_DIRECT";
    match tried {
        Ok(backing) => ok(
            check,
            format!("works: offsets in multiples of {}, buffers of {}", backing.block, backing.mem_align()),
        ),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => fail(
            check,
            "this file system has none, and without it vublkd does not start by default",
            "vublkd --direct=off, which goes through the page cache, or another file system",
        ),
        Err(e) => fail(check, format!("cannot be tried: {e}"), "see dmesg for the file system's errors"),
    }
}

pub(super) fn in_memory(is: bool) -> Option<Finding> {
    let says = "it is memory: what disks hold here is lost when the host stops";
    is.then(|| warn("storage", says, "use a folder on a disk for what has to last"))
}

/// How much room the file system of a path has.
fn space(path: &Path) -> Finding {
    match statvfs(path) {
        Ok(all) => room(all.f_bavail.saturating_mul(all.f_frsize), all.f_blocks.saturating_mul(all.f_frsize)),
        Err(e) => fail(
            "space",
            format!("unknown: {}", io::Error::from(e)),
            "see dmesg for the file system's errors",
        ),
    }
}

/// Bytes that are left, and all of them.
fn room(left: u64, all: u64) -> Finding {
    let (check, make) = ("space", "make room; df and du show where it went");
    let says = format!("{left} bytes of {all} are left");
    match left {
        0 => fail(
            check,
            format!("{says}: a write to a block that a file does not have yet waits, or fails"),
            make,
        ),
        _ if left < all / 20 => warn(check, says, make),
        _ => ok(check, says),
    }
}

/// The sockets in a folder.
pub(super) fn sockets(path: &Path) -> Vec<Finding> {
    let entries = read_dir(path).into_iter().flatten().flatten();
    let is_disks = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "sock");
    let sockets = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()));
    let mut sockets: Vec<PathBuf> = sockets.map(|entry| entry.path()).filter(is_disks).collect();
    sockets.sort();
    sockets.iter().map(|path| socket(path)).collect()
}

/// Whether VMMs may connect to a socket.
pub(super) fn socket(path: &Path) -> Finding {
    let name = path.display();
    let looked = || -> io::Result<Finding> {
        let path = path.canonicalize()?;
        let own = path.metadata()?;
        let mut above = Vec::new();
        for folder in path.ancestors().skip(1) {
            let meta = folder.metadata()?;
            above.push((folder.to_owned(), meta.mode(), meta.gid()));
        }
        let group = group_by_number(own.gid()).ok().flatten();
        let group = group.map_or_else(|| own.gid().to_string(), |name| name.to_string_lossy().into_owned());
        Ok(reached(&name.to_string(), own.mode(), (own.gid(), &group), &above))
    };
    looked().unwrap_or_else(|e| {
        fail("socket", format!("{name}: cannot be looked at: {e}"), "sudo vublk doctor …")
    })
}

/// The socket's mode and group, and modes and groups of the folders above it.
fn reached(name: &str, mode: u32, group: (u32, &str), above: &[(PathBuf, u32, u32)]) -> Finding {
    let check = "socket";
    let (gid, group) = group;
    let passes =
        |(_, mode, folder): &(PathBuf, u32, u32)| mode & 0o001 != 0 || *folder == gid && mode & 0o010 != 0;
    if let Some((folder, ..)) = above.iter().find(|folder| !passes(folder)) {
        let says = format!("{name}: group {group} cannot reach it: it may not pass {}", folder.display());
        return fail(check, says, format!("chmod o+x {}", folder.display()));
    }
    if mode & 0o002 != 0 {
        return warn(
            check,
            format!("{name}: every user of this host may connect"),
            format!("chmod o-w {name}"),
        );
    }
    if mode & 0o020 == 0 {
        let says = format!("{name}: only its owner may connect, no group");
        return warn(
            check,
            says,
            format!("chgrp kvm {name} && chmod g+rw {name}, or vublkd --group=kvm, or SocketGroup=kvm"),
        );
    }
    if gid == 0 {
        let says = format!("{name}: only root's group may connect");
        return warn(
            check,
            says,
            format!("chgrp kvm {name}, or vublkd --user=… --group=kvm, or SocketGroup=kvm"),
        );
    }
    ok(check, format!("{name}: VMMs whose user is in group {group} may connect"))
}

/// Owner and mode, for people.
pub(super) fn owner(meta: &std::fs::Metadata) -> String {
    let user = user_by_number(meta.uid()).ok().flatten();
    let user = user.map_or_else(|| meta.uid().to_string(), |user| user.name.to_string_lossy().into_owned());
    let group = group_by_number(meta.gid()).ok().flatten();
    let group = group.map_or_else(|| meta.gid().to_string(), |name| name.to_string_lossy().into_owned());
    format!("owner {user}, group {group}, mode {:04o}", meta.mode() & 0o7777)
}

#[cfg(test)]
mod tests {
    use super::super::Verdict::{Fail, Ok as Fine, Warn};
    use super::*;

    #[test]
    fn who_reaches_a_socket() {
        let above = |run: u32, vublk: u32, group: u32| {
            let folder = |path: &str, mode, group| (PathBuf::from(path), 0o040_000 | mode, group);
            [folder("/run/vublk", vublk, group), folder("/run", run, 0), folder("/", 0o755, 0)]
        };
        let kvm = (105, "kvm");
        for (mode, group, above, want, says) in [
            (0o660, kvm, above(0o755, 0o755, 0), Fine, "group kvm may connect"),
            (0o660, kvm, above(0o755, 0o750, 105), Fine, "group kvm may connect"),
            (0o660, kvm, above(0o755, 0o750, 0), Fail, "may not pass /run/vublk"),
            (0o660, kvm, above(0o700, 0o755, 0), Fail, "may not pass /run"),
            (0o600, kvm, above(0o755, 0o755, 0), Warn, "only its owner"),
            (0o660, (0, "root"), above(0o755, 0o755, 0), Warn, "root's group"),
            (0o666, kvm, above(0o755, 0o755, 0), Warn, "every user"),
        ] {
            let found = reached("a.sock", mode, group, &above);
            assert_eq!((found.verdict, found.says.contains(says)), (want, true), "{found:?}");
        }
    }

    #[test]
    fn how_much_room() {
        for (left, want) in [(0, Fail), (4, Warn), (5, Fine), (100, Fine)] {
            assert_eq!(room(left, 100).verdict, want, "{left}");
        }
    }
}
