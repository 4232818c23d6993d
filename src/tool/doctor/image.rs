//! A disk: a file or a block device.
//!
//! What it is: whether this user's vublkd could serve it, what of it is slow, and who has it.
//!
//! What it is not: [`crate::inspect`] finds out how a file lies; here is what that means.
//!
//! Invariant: the disk is opened for reading only. A daemon that serves it does not notice.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::fs::{Access, access, fstatvfs};
use rustix::io::Errno;

use super::super::look;
use super::place::{direct, in_memory, owner};
use super::{Finding, fail, ok, warn};
use crate::disk::lock::{self, LockError};
use crate::disk::{Disk, DiskError};
use crate::inspect::{Layout, Report};

/// All that can be told of a disk.
pub(super) fn all(path: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Ok(meta) = path.metadata() else { return vec![fail("path", "is gone", "look again")] };
    let may = access(path, Access::READ_OK | Access::WRITE_OK);
    findings.push(access_of(path, &owner(&meta), may));
    let (disk, report) = match look::open(path.into(), true) {
        Ok((disk, report)) => {
            let text = format!(
                "works: offsets in multiples of {}, buffers of {}",
                report.offset_align, report.mem_align
            );
            findings.push(alignment(text, &report));
            (disk, report)
        }
        Err(DiskError::NoDirect(_)) => {
            findings.push(direct(Err(io::Error::from_raw_os_error(libc::EINVAL))));
            match look::open(path.into(), false) {
                Ok(opened) => opened,
                Err(e) => return with(findings, &e),
            }
        }
        Err(e) => return with(findings, &e),
    };
    findings.extend(in_memory(report.in_memory));
    findings.push(format(&report));
    let Some(file) = disk.file() else { return findings };
    if !meta.file_type().is_block_device() {
        let left = fstatvfs(file).map_or(0, |all| all.f_bavail.saturating_mul(all.f_frsize));
        findings.extend(layout(&report.layout, left, &path.display().to_string(), report.in_memory));
    }
    findings.push(locks(file, &disk));
    findings
}

/// What was found, and why there is no more of it. The reason says what to type.
fn with(mut findings: Vec<Finding>, why: &DiskError) -> Vec<Finding> {
    let why = why.to_string();
    let (says, remedy) = why.split_once(". ").unwrap_or((&why, "see the reason"));
    // Of access there is a finding already.
    if findings.iter().all(|finding| finding.verdict != super::Verdict::Fail) {
        findings.push(fail("open", says, remedy));
    }
    findings
}

/// `may`: what access(2) said to this user.
fn access_of(path: &Path, owner: &str, may: rustix::io::Result<()>) -> Finding {
    let (check, path) = ("access", path.display());
    match may {
        Ok(()) => ok(check, format!("this user may read and write it ({owner})")),
        Err(Errno::ROFS) => warn(
            check,
            format!("it is on a read-only file system ({owner})"),
            "vublkd --read-only, or mount it for writing; in a unit ReadWritePaths=",
        ),
        Err(_) => fail(
            check,
            format!("this user may not read and write it ({owner})"),
            format!("start vublkd as its owner (--user=), or: chown USER {path}"),
        ),
    }
}

fn alignment(works: String, report: &Report) -> Finding {
    if report.offset_align <= u64::from(report.block) {
        return ok("O_DIRECT", works);
    }
    let says = format!(
        "{works}; guests see blocks of {}, and what is smaller is read before it is written",
        report.block
    );
    warn("O_DIRECT", says, format!("for a new guest: vublkd --logical-block-size={}", report.offset_align))
}

fn format(report: &Report) -> Finding {
    if report.format == "raw" {
        return ok("format", format!("raw, {} bytes", report.size));
    }
    let says = format!("it looks like an image of format {}, and vublkd serves raw disks", report.format);
    fail(
        "format",
        says,
        format!("qemu-img convert -O raw {} NEW.raw, or --format=raw if its guest wrote that", report.path),
    )
}

/// `left`: bytes that the file system has left.
fn layout(layout: &Layout, left: u64, path: &str, in_memory: bool) -> Vec<Finding> {
    let some = |n: Option<u64>| n.filter(|&n| n > 0);
    let details = "vublk inspect tells what that costs, and what to type";
    let mut findings = Vec::new();
    match some(layout.hole_bytes) {
        Some(holes) if holes > left => findings.push(warn(
            "holes",
            format!("{holes} bytes are not allocated yet, and the file system has {left} left: writes to them may wait or fail"),
            format!("make room, or allocate them all while that is possible: fallocate -l SIZE {path}"),
        )),
        Some(holes) => findings.push(ok("holes", format!("{holes} bytes; the first write into each is slower"))),
        None => {}
    }
    // Of memory nothing is gained by it.
    if let Some(cached) = some(layout.cached_bytes).filter(|_| !in_memory) {
        findings.push(warn(
            "page cache",
            format!("{cached} bytes of it are cached, which makes direct writes slower from Linux 6.19 on; a start drops them"),
            format!("sync {path} && dd if={path} iflag=nocache count=0"),
        ));
    }
    for (check, bytes) in [("unwritten", layout.unwritten_bytes), ("shared", layout.shared_bytes)] {
        if let Some(bytes) = some(bytes) {
            findings
                .push(ok(check, format!("{bytes} bytes; the first write into each is slower. {details}")));
        }
    }
    findings
}

/// Who has locked it, or claimed it.
fn locks(file: &File, disk: &Disk) -> Finding {
    let tested = lock::test(file, false).and_then(|()| match disk.backing.is_device {
        true => lock::claim(file, None, &mut || false).map(drop),
        false => Ok(()),
    });
    let check = "locks";
    let remedy = "stop that process, or have it let go";
    match tested {
        Ok(()) => ok(
            check,
            "free: no process holds a lock on it, as vublkd does while a VM uses the disk, and QEMU and qemu-img do",
        ),
        Err(LockError::InUse(_, holders) | LockError::Forbidden(_, holders)) if holders.are_all("vublkd") => {
            ok(check, format!("{holders} serves it"))
        }
        Err(LockError::InUse(_, holders) | LockError::Forbidden(_, holders))
            if !holders.are_all_but("vublkd") =>
        {
            warn(
                check,
                format!("{holders} uses it as a VM's disk: vublkd, QEMU, or a tool of QEMU's"),
                "sudo vublk doctor … may tell which one",
            )
        }
        Err(LockError::InUse(_, holders) | LockError::Forbidden(_, holders)) => {
            fail(check, format!("{holders} has locked it"), remedy)
        }
        Err(LockError::Foreign(holders)) => {
            fail(check, format!("{holders} has locked the part where image locks are"), remedy)
        }
        Err(LockError::Claimed(_, why)) => {
            let (says, remedy) = why.split_once(". ").unwrap_or((&why, remedy));
            fail(check, says, remedy)
        }
        Err(
            e @ (LockError::Served
            | LockError::Io(_)
            | LockError::Client(_)
            | LockError::Refused
            | LockError::Cluster(_)),
        ) => warn(check, format!("unknown: {e}"), "vublkd --lock=off, where a file system has no locks"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn what_a_layout_means() {
        let all = Layout {
            cached_bytes: Some(4096),
            hole_bytes: Some(100),
            unwritten_bytes: Some(1),
            shared_bytes: Some(2),
            ..Layout::default()
        };
        let of = |left, in_memory| -> Vec<_> {
            layout(&all, left, "/d", in_memory)
                .into_iter()
                .map(|found| (found.check, found.verdict))
                .collect()
        };
        let (fine, bad) = (Verdict::Ok, Verdict::Warn);
        let rest = [("unwritten", fine), ("shared", fine)];
        assert_eq!(of(100, false), [&[("holes", fine), ("page cache", bad)][..], &rest].concat());
        assert_eq!(of(99, true), [&[("holes", bad)][..], &rest].concat());
        assert_eq!(layout(&Layout::default(), 0, "/d", false), []);
    }

    #[test]
    fn who_may() {
        let of = |may| access_of(Path::new("/d"), "owner root, group root, mode 0600", may).verdict;
        assert_eq!(of(Ok(())), Verdict::Ok);
        assert_eq!(of(Err(Errno::ROFS)), Verdict::Warn);
        assert_eq!(of(Err(Errno::ACCESS)), Verdict::Fail);
    }
}
