//! System calls on a disk: locks of a file, its blocks, its page cache, and what a block device tells of itself.
//!
//! What it is: thin. Arguments in, `io::Result` out.
//!
//! What it is not: reading and writing, which the engines do.
//!
//! Invariant: no function here keeps a pointer after it returns.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::check;

/// A kind of open file description lock (fcntl(2), F_OFD_SETLK).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Many holders.
    Shared,
    /// One holder; needs a descriptor open for writing.
    Exclusive,
    /// No lock.
    None,
}

fn flock(kind: LockKind, start: u64, len: u64) -> io::Result<libc::flock> {
    let number = |n: u64| i64::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    // SAFETY: all zeroes is a valid flock; l_pid must be 0 for OFD locks.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    let (kind, whence) = match kind {
        LockKind::Shared => (libc::F_RDLCK, libc::SEEK_SET),
        LockKind::Exclusive => (libc::F_WRLCK, libc::SEEK_SET),
        LockKind::None => (libc::F_UNLCK, libc::SEEK_SET),
    };
    let short = |n: libc::c_int| libc::c_short::try_from(n).map_err(|_| io::ErrorKind::InvalidInput);
    lock.l_type = short(kind)?;
    lock.l_whence = short(whence)?;
    lock.l_start = number(start)?;
    lock.l_len = number(len)?;
    Ok(lock)
}

/// Takes or drops an OFD lock on `[start, start + len)` without waiting.
///
/// # Errors
/// EAGAIN when another description holds a lock that conflicts; ENOLCK or
/// EINVAL where the file system has no locks.
pub fn ofd_lock(fd: impl AsFd, kind: LockKind, start: u64, len: u64) -> io::Result<()> {
    let lock = flock(kind, start, len)?;
    // SAFETY: F_OFD_SETLK reads one flock.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }).map(drop)
}

/// A lock that another open file description or process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Its kind.
    pub kind: LockKind,
    /// Its first byte.
    pub start: u64,
    /// Its bytes; 0: to the largest offset.
    pub len: u64,
    /// -1: an OFD lock. Else the process of a traditional lock, 0 where it cannot be named here.
    pub pid: i32,
}

/// A lock that keeps `kind` from being taken on the range. Works on descriptors of any mode.
///
/// # Errors
/// As fcntl(2).
pub fn ofd_conflict(fd: impl AsFd, kind: LockKind, start: u64, len: u64) -> io::Result<Option<Conflict>> {
    let mut lock = flock(kind, start, len)?;
    // SAFETY: F_OFD_GETLK reads and writes one flock.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
    let kind = match i32::from(lock.l_type) {
        libc::F_UNLCK => return Ok(None),
        libc::F_RDLCK => LockKind::Shared,
        _ => LockKind::Exclusive,
    };
    let number = |n| u64::try_from(n).unwrap_or(0);
    Ok(Some(Conflict { kind, start: number(lock.l_start), len: number(lock.l_len), pid: lock.l_pid }))
}

/// fallocate(2).
///
/// # Errors
/// As fallocate(2).
pub fn fallocate(fd: impl AsFd, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let number = |n: u64| i64::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    // SAFETY: no pointers.
    check(unsafe { libc::fallocate(fd.as_fd().as_raw_fd(), mode, number(offset)?, number(len)?) }).map(drop)
}

/// Memory and offset alignment of O_DIRECT on this file: STATX_DIOALIGN
/// (Linux 6.1). `None` when the kernel or the file system does not say.
#[must_use]
pub fn dio_align(fd: impl AsFd) -> Option<(u32, u32)> {
    // SAFETY: all zeroes is a valid statx.
    let mut out: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path with AT_EMPTY_PATH names the fd; `out` is a statx.
    let result = unsafe {
        libc::statx(
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut out,
        )
    };
    let said = result == 0 && out.stx_mask & libc::STATX_DIOALIGN != 0;
    (said && out.stx_dio_mem_align > 0 && out.stx_dio_offset_align > 0)
        .then_some((out.stx_dio_mem_align, out.stx_dio_offset_align))
}

/// Size of a block device in bytes (BLKGETSIZE64).
///
/// # Errors
/// As ioctl(2).
pub fn device_size(fd: impl AsFd) -> io::Result<u64> {
    const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKGETSIZE64, &raw mut size) })?;
    Ok(size)
}

/// Logical block size of a block device in bytes (BLKSSZGET).
///
/// # Errors
/// As ioctl(2).
pub fn device_block(fd: impl AsFd) -> io::Result<u32> {
    const BLKSSZGET: libc::c_ulong = 0x1268;
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKSSZGET, &raw mut size) })?;
    u32::try_from(size).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Drops this file's page cache; `write_back`: after writing it back.
///
/// # Errors
/// As fsync(2); that the cache could not be dropped is no error.
pub fn drop_cache(fd: impl AsFd, write_back: bool) -> io::Result<()> {
    let fd = fd.as_fd();
    if write_back {
        rustix::fs::fsync(fd)?;
    }
    // SAFETY: no pointers.
    unsafe { libc::posix_fadvise(fd.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    Ok(())
}

/// Gives a range of a block device back (BLKDISCARD).
///
/// # Errors
/// EOPNOTSUPP when the device has no discard.
pub fn device_discard(fd: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    const BLKDISCARD: libc::c_ulong = 0x1277;
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two u64.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKDISCARD, range.as_ptr()) }).map(drop)
}

/// True for a block device that is read-only (BLKROGET).
///
/// # Errors
/// As ioctl(2).
pub fn device_is_read_only(fd: impl AsFd) -> io::Result<bool> {
    const BLKROGET: libc::c_ulong = 0x125e;
    let mut on: libc::c_int = 0;
    // SAFETY: BLKROGET writes one int.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKROGET, &raw mut on) })?;
    Ok(on != 0)
}
