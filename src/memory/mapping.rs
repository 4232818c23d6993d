//! A part of a file or a device that the front-end gave us, mapped: guest memory, the
//! in-flight region, the dirty log.
//!
//! What it is: the one place that maps a front-end's file, which it may truncate
//! at any time, and unmaps it.
//!
//! What it is not: it hands out no reference but to atomics; users go through raw pointers,
//! volatile or atomic.
//!
//! Invariant: the range is mapped, and watched for a SIGBUS, as long as the value
//! lives.
//!
//! ```text
//!   the file    ├────page────┼────page────┼────page────┤
//!   asked for          ├───────────────┤
//!   mapped      ├─lead─┼───────────────┼──────┤
//! ```
#![expect(unsafe_code, reason = "maps and unmaps")]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicU64;

use arrayvec::ArrayVec;
use rustix::fs::Statx;
use rustix::mm::{MapFlags, ProtFlags};

use super::fault;
use crate::sys;

/// See the head of the file.
#[derive(Debug)]
pub struct Mapping {
    /// Of the first byte that was asked for.
    addr: usize,
    len: usize,
    /// What was mapped, which starts before `addr` when the offset in the file is
    /// no multiple of the file's page.
    map_addr: usize,
    map_len: usize,
    watch: Option<fault::Watch>,
}

impl Mapping {
    /// Maps `[offset, offset + len)` of `file`, shared, to read and write.
    ///
    /// A character device is taken if it can be mapped like that: persistent memory (devdax) and
    /// SGX's are such. Its size is not known here, so mmap(2) judges it. The front-end has opened
    /// it, and could map it, too: nothing is reached through us that it cannot reach itself. A device
    /// whose mapping or whose pages have side effects does that to the front-end's own guest; it
    /// is touched only where the guest names its addresses, and not here.
    ///
    /// # Errors
    /// EINVAL when it is neither file nor character device, or has not all of these bytes; as
    /// mmap(2).
    pub fn new(file: &File, offset: u64, len: u64) -> io::Result<Self> {
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        let facts = sys::facts(file)?;
        let end = offset.checked_add(len).ok_or_else(invalid)?;
        let whole = sys::is_type(&facts, libc::S_IFREG) && facts.stx_size >= end;
        if !whole && !sys::is_type(&facts, libc::S_IFCHR) || len == 0 {
            return Err(invalid());
        }
        // hugetlbfs and devdax refuse an offset or a length that is no multiple of their page.
        let pages = pages_of(file, &facts)?;
        let mut mapped = Err(invalid());
        for &page in &pages {
            let start = offset / page * page;
            let end = end.checked_next_multiple_of(page).ok_or_else(invalid)?;
            let number = |n: u64| usize::try_from(n).map_err(|_| invalid());
            let (lead, map_len, page) = (number(offset - start)?, number(end - start)?, number(page)?);
            let (protection, flags) =
                (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
            // SAFETY: a new mapping at an address of the kernel's choice; nothing in
            // this process can already point there.
            let ptr = unsafe {
                rustix::mm::mmap(std::ptr::null_mut(), map_len, protection, flags, file.as_fd(), start)
            };
            mapped = ptr.map(|ptr| (ptr, lead, map_len, page)).map_err(io::Error::from);
            if !matches!(&mapped, Err(e) if e.raw_os_error() == Some(libc::EINVAL)) {
                break;
            }
        }
        let (ptr, lead, map_len, page) = mapped?;
        let len = usize::try_from(len).map_err(|_| invalid())?;
        // A core dump of the daemon must not carry the guest's memory.
        // SAFETY: the range was mapped above and is owned by this function.
        if unsafe { libc::madvise(ptr, map_len, libc::MADV_DONTDUMP) } != 0 {
            tracing::debug!("MADV_DONTDUMP: {}", io::Error::last_os_error());
        }
        let map_addr = ptr.expose_provenance();
        let watch = fault::Watch::new(map_addr, map_len, page);
        Ok(Self { addr: map_addr + lead, len, map_addr, map_len, watch })
    }

    /// Host address of the first byte that was asked for.
    #[must_use]
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// Bytes that were asked for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// `count` words, from byte `at` on; `None` when they are not all there, or not aligned.
    #[must_use]
    pub fn words(&self, at: usize, count: usize) -> Option<&[AtomicU64]> {
        let end = count.checked_mul(size_of::<AtomicU64>())?.checked_add(at)?;
        let addr = self.addr.checked_add(at)?;
        if end > self.len || !addr.is_multiple_of(align_of::<AtomicU64>()) {
            return None;
        }
        let words = std::ptr::with_exposed_provenance::<AtomicU64>(addr);
        // SAFETY: inside the mapping, which lives as long as `self`, and aligned; atomics may change under us.
        Some(unsafe { std::slice::from_raw_parts(words, count) })
    }

    /// Never: at least a byte is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// True once a page was missing when it was touched: the file was truncated.
    /// What was read there since may be zeroes, what was written is not kept.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        fault::any_lost() && self.watch.as_ref().is_some_and(fault::Watch::is_lost)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.watch = None; // before the addresses can belong to someone else
        // SAFETY: mapped by `new`; each holder of a pointer here keeps this value.
        let unmapped =
            unsafe { rustix::mm::munmap(std::ptr::with_exposed_provenance_mut(self.map_addr), self.map_len) };
        if let Err(e) = unmapped {
            tracing::error!("munmap: {e}");
        }
    }
}

/// Sizes that a page of `file` may have, the unit of its offsets and of a SIGBUS: 4096 on memfd and tmpfs, more on
/// hugetlbfs. A device does not say (sysfs does, which a sandbox closes): devdax has pages of 4 KiB, 2 MiB or 1 GiB,
/// and takes no smaller unit than its own. A part of a large page cannot be replaced.
fn pages_of(file: &File, facts: &Statx) -> io::Result<ArrayVec<u64, 3>> {
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    if sys::is_type(facts, libc::S_IFCHR) {
        return Ok(ArrayVec::from([4096, 2 << 20, 1 << 30]));
    }
    let mut page = 4096;
    if sys::is_memory(file) {
        let fs = rustix::fs::fstatfs(file)?;
        if fs.f_type == HUGETLBFS_MAGIC {
            page = u64::try_from(fs.f_bsize)
                .ok()
                .filter(|p| p.is_power_of_two())
                .ok_or(io::ErrorKind::InvalidInput)?;
        }
    }
    Ok(ArrayVec::from_iter([page]))
}
