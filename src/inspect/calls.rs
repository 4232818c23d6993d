//! The system calls that tell of a file's extents and of its pages in the page cache.
//!
//! What it is: thin. A file and numbers in, `io::Result` out.
//!
//! What it is not: a judgement; [`crate::inspect`] decides what an error means.
//!
//! Invariant: none of them writes the file, reads its data, or brings a page into
//! the page cache or out of it.
#![expect(unsafe_code, reason = "calls libc")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// Bytes of a page.
///
/// # Errors
/// As sysconf(3).
pub fn page_size() -> io::Result<u64> {
    // SAFETY: no pointers.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).map_err(|_| io::Error::last_os_error())
}

/// Pages of a file in the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedPages {
    /// All of them.
    pub cached: u64,
    /// Those that were changed and not written back.
    pub dirty: u64,
}

/// Counts the cached pages of the file's first `size` bytes (cachestat(2)).
///
/// # Errors
/// ENOSYS before Linux 6.5; EPERM for a file that the caller neither owns nor may
/// write; EOPNOTSUPP on hugetlbfs.
pub fn cached_pages(file: &File, size: u64) -> io::Result<CachedPages> {
    // The number is the same on all architectures that Rust's libc has.
    const SYS_CACHESTAT: libc::c_long = 451;
    #[repr(C)]
    struct Range {
        offset: u64,
        len: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Counts {
        cached: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    let range = Range { offset: 0, len: size };
    let mut counts = Counts::default();
    // SAFETY: the kernel reads one cachestat_range and writes one cachestat; there
    // are no flags.
    let result = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut counts, 0 as libc::c_uint)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(CachedPages { cached: counts.cached, dirty: counts.dirty })
}

/// The same with mincore(2), where the kernel has no cachestat: it looks up each page,
/// so the time depends on `size`.
///
/// For a caller that neither owns the file nor may write it the kernel says that
/// every page is cached.
///
/// # Errors
/// As mmap(2) and mincore(2).
pub fn resident_pages(file: &File, size: u64) -> io::Result<u64> {
    const WINDOW: usize = 256 << 20;
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    // Else mmap sets the time of access. Only the owner may ask for this; for others
    // the time is set, as by any reader.
    if let Ok(flags) = fcntl_getfl(file) {
        let _best_effort = fcntl_setfl(file, flags | OFlags::NOATIME);
    }
    let page = usize::try_from(page_size()?).map_err(invalid)?;
    let mut resident = 0;
    let mut offset = 0;
    let mut states = Vec::new();
    while offset < size {
        let len = usize::try_from(size - offset).unwrap_or(WINDOW).min(WINDOW);
        states.resize(len.div_ceil(page), 0u8);
        let at = libc::off_t::try_from(offset).map_err(invalid)?;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let window = unsafe {
            libc::mmap(ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), at)
        };
        if window == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `window` is a mapping of `len` bytes, and `states` has a byte for each
        // of its pages.
        let result = unsafe { libc::mincore(window, len, states.as_mut_ptr()) };
        let error = io::Error::last_os_error();
        // SAFETY: mapped above; nothing refers to it.
        unsafe { libc::munmap(window, len) };
        if result < 0 {
            return Err(error);
        }
        resident += states.iter().map(|state| u64::from(state & 1)).sum::<u64>();
        offset += u64::try_from(len).map_err(invalid)?;
    }
    Ok(resident)
}

/// A run of bytes of the file that the file system has a place for: struct
/// fiemap_extent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins in the file, bytes.
    pub logical: u64,
    /// Where it begins on the device, bytes.
    pub physical: u64,
    /// Its length in bytes.
    pub length: u64,
    pub(super) reserved_64: [u64; 2],
    /// [`LAST`], [`UNWRITTEN`], [`SHARED`] and others.
    pub flags: u32,
    pub(super) reserved: [u32; 3],
}

/// The last extent of the file.
pub const LAST: u32 = 0x1;
/// Allocated, but never written: it reads as zeroes.
pub const UNWRITTEN: u32 = 0x800;
/// Another file has it, too.
pub const SHARED: u32 = 0x2000;

/// Extents that one call of [`extents`] returns at most.
pub const BATCH: usize = 512;

/// The extents of `[start, start + len)`, at most [`BATCH`] of them (FS_IOC_FIEMAP).
/// The first may begin before `start`. What the page cache holds is not written
/// back first: FIEMAP_FLAG_SYNC is not set.
///
/// # Errors
/// EOPNOTSUPP or ENOTTY where the file system has no FIEMAP.
pub fn extents(file: &File, start: u64, len: u64) -> io::Result<Vec<Extent>> {
    #[repr(C)]
    struct Map {
        start: u64,
        len: u64,
        flags: u32,
        mapped: u32,
        count: u32,
        reserved: u32,
        extents: [Extent; BATCH],
    }
    // _IOWR('f', 11, struct fiemap); that struct ends before the extents.
    const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;
    let mut map = Box::new(Map {
        start,
        len,
        flags: 0,
        mapped: 0,
        count: u32::try_from(BATCH).map_err(|_| io::ErrorKind::InvalidInput)?,
        reserved: 0,
        extents: [Extent::default(); BATCH],
    });
    // SAFETY: the kernel reads the fields before `extents` and writes at most `count`
    // extents behind them, for which there is room.
    if unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut *map) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mapped = usize::try_from(map.mapped).unwrap_or(BATCH).min(BATCH);
    Ok(map.extents.iter().take(mapped).copied().collect())
}
