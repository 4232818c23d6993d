//! The guest's memory as the front-end described it: map, translate, copy, drop.
//!
//! What it is: an immutable table of mapped regions ([`GuestMemory`]). A new
//! table replaces the old one whole; the old one lives until the last request
//! that points into it is complete.
//!
//! What it is not: it knows nothing of rings, requests or files.
//!
//! Invariant: this is the only file (the rings' atomics apart) that turns a
//! guest address into a host pointer. No `&` or `&mut` to a guest byte ever
//! exists, here or elsewhere: the guest writes to its memory while we read it.
//! All access is volatile, through [`vm_memory::VolatileSlice`] or in aligned
//! words, or by address through the kernel ([`HostSpan`]).
//!
//! ```text
//!  guest physical         front-end virtual           host (this process)
//!  0x0000_0000 ┌───────┐  0x7f10_0000_0000 ┌───────┐  0x7fab_0000_0000 ┌───────┐
//!              │ reg 0 │ ◄─ SET_VRING_ADDR │ reg 0 │   mmap of the fd  │ reg 0 │
//!  0x8000_0000 └───────┘      speaks these └───────┘                   └───────┘
//!     descriptors speak these                     the kernel is given these
//! ```
#![expect(unsafe_code, reason = "reads and writes the guest's memory through raw pointers")]

pub mod fault;
pub mod mapping;
#[cfg(test)]
pub(crate) mod tests;

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{Bytes, VolatileSlice};

use self::mapping::Mapping;
use crate::sys;

/// Regions that a front-end may describe: what VHOST_USER_GET_MAX_MEM_SLOTS
/// answers. 509 is what vhost in the kernel gives QEMU, and QEMU's own limit.
pub const MAX_REGIONS: usize = 509;

/// Why a memory table was not taken.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The fd is neither a memfd, a file of tmpfs, hugetlbfs or a disk, nor a character device.
    #[error(
        "guest memory region at {0:#x} is backed by something that is neither a file nor a character device; use \
         memory-backend-memfd or memory-backend-file with share=on"
    )]
    NotAFile(u64),
    /// The file ends before the region does.
    #[error("guest memory region at {guest:#x} needs {needed} bytes of its file, which has {actual}")]
    FileTooSmall {
        /// Guest address of the region.
        guest: u64,
        /// Offset plus length, bytes.
        needed: u64,
        /// Size of the file, bytes.
        actual: u64,
    },
    /// Address plus length passes the end of the address space, or length is 0.
    #[error("guest memory region at {0:#x} is empty or passes the end of the address space")]
    BadRange(u64),
    /// Two regions claim the same guest addresses.
    #[error("guest memory regions overlap at {0:#x}")]
    Overlap(u64),
    /// More than [`MAX_REGIONS`].
    #[error("more than {MAX_REGIONS} guest memory regions")]
    TooMany,
    /// No region has these addresses (REM_MEM_REG).
    #[error("no guest memory region at {0:#x} with that size")]
    NoSuchRegion(u64),
    /// mmap or fstat failed.
    #[error("cannot map the guest memory region at {guest:#x}: {source}")]
    Map {
        /// Guest address of the region.
        guest: u64,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// One region as VHOST_USER_SET_MEM_TABLE and ADD_MEM_REG describe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionLayout {
    /// Guest physical address of the first byte.
    pub guest: u64,
    /// Length in bytes.
    pub len: u64,
    /// The same first byte in the front-end's own address space.
    pub user: u64,
    /// Where the region starts in its file, bytes.
    pub offset: u64,
}

/// Guest bytes that lie together in this process: an address for the kernel.
///
/// A span is only a number here. To look at its bytes one has to go back to
/// the table that made it ([`GuestMemory::read_span`]), which checks it. Laid out as the
/// kernel's iovec, so that an array of spans is an array of iovecs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostSpan {
    addr: usize,
    len: usize,
}

const _: () = assert!(
    size_of::<HostSpan>() == size_of::<libc::iovec>()
        && std::mem::offset_of!(HostSpan, addr) == std::mem::offset_of!(libc::iovec, iov_base)
        && std::mem::offset_of!(HostSpan, len) == std::mem::offset_of!(libc::iovec, iov_len)
);

impl HostSpan {
    /// A span of memory that this process owns itself (a pool page).
    pub(crate) fn new(addr: usize, len: usize) -> Self {
        Self { addr, len }
    }

    /// Host virtual address of the first byte.
    #[must_use]
    pub fn addr(self) -> usize {
        self.addr
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(self) -> usize {
        self.len
    }

    /// True for a span of no bytes.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The address one past the last byte.
    #[must_use]
    pub fn end(self) -> usize {
        self.addr + self.len
    }

    /// The part that starts `skip` bytes in and has at most `max` bytes.
    #[must_use]
    pub fn slice(self, skip: usize, max: usize) -> Self {
        let skip = skip.min(self.len);
        Self { addr: self.addr + skip, len: (self.len - skip).min(max) }
    }

    /// True if the two spans share a byte.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.addr < other.end() && other.addr < self.end()
    }
}

/// The guest gave an address that no region has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("guest address {0:#x} is outside of guest memory")]
pub struct Unmapped(pub u64);

/// The region that served the last translation; most requests hit it again.
///
/// A copy of what a translation needs, so that a hit touches no table. It names
/// the table it was made by, and serves no other.
#[derive(Clone, Copy, Debug, Default)]
pub struct RegionHint {
    table: u64,
    guest: u64,
    len: u64,
    host: usize,
}

/// One mapped region; unmapped when the last table that has it is dropped.
#[derive(Debug)]
struct MappedRegion {
    layout: RegionLayout,
    /// Host address of the region's first byte.
    host: usize,
    mapping: Mapping,
    /// The file, if it had not one page: see [`GuestMemory::is_untouched`].
    empty: Option<File>,
}

/// Files of a table that are kept open at most, for [`GuestMemory::is_untouched`].
const MOST_EMPTY: usize = 4;

impl MappedRegion {
    fn map(layout: RegionLayout, file: &File) -> Result<Self, MemoryError> {
        let guest = layout.guest;
        let bad = || MemoryError::BadRange(guest);
        let os = |source| MemoryError::Map { guest, source };
        if layout.len == 0
            || layout.guest.checked_add(layout.len).is_none()
            || layout.user.checked_add(layout.len).is_none()
        {
            return Err(bad());
        }
        let facts = sys::facts(file).map_err(|e| os(e.into()))?;
        let needed = layout.offset.checked_add(layout.len).ok_or_else(bad)?;
        if sys::is_type(&facts, libc::S_IFREG) {
            if facts.stx_size < needed {
                return Err(MemoryError::FileTooSmall { guest, needed, actual: facts.stx_size });
            }
        } else if !sys::is_type(&facts, libc::S_IFCHR) {
            return Err(MemoryError::NotAFile(guest));
        }
        let mapping = Mapping::new(file, layout.offset, layout.len).map_err(os)?;
        Ok(Self { layout, host: mapping.addr(), mapping, empty: None })
    }

    fn guest_end(&self) -> u64 {
        self.layout.guest + self.layout.len
    }

    /// The part of `[offset, offset + len)` (from the region's start) inside it.
    fn span(&self, offset: u64, len: u64) -> HostSpan {
        // Both fit: the whole region is mapped, so its length is a usize.
        let len = usize::try_from(len.min(self.layout.len - offset)).unwrap_or(0);
        HostSpan { addr: self.host + usize::try_from(offset).unwrap_or(0), len }
    }

    /// The whole of it.
    fn host_span(&self) -> HostSpan {
        self.span(0, self.layout.len)
    }

    /// A volatile view of `span`, which must lie inside this region.
    fn volatile(&self, span: HostSpan) -> VolatileSlice<'_> {
        debug_assert!(span.addr >= self.host && span.end() <= self.host + self.mapping.len());
        // SAFETY: the span lies in this mapping (each caller made it from this
        // region, or checked it), which lives as long as `self`; VolatileSlice
        // never makes a reference to the bytes.
        unsafe { VolatileSlice::new(std::ptr::with_exposed_provenance_mut(span.addr), span.len) }
    }
}

/// True for a file without a page or a block, as far as this kernel alone knows that: in memory
/// or on a local disk.
fn is_empty(file: &File) -> bool {
    sys::facts(file).is_ok_and(|facts| {
        let is_local = facts.stx_dev_major != 0 || sys::is_memory(file);
        facts.stx_blocks == 0 && sys::is_type(&facts, libc::S_IFREG) && is_local
    })
}

/// The memory table: what guest addresses mean. Immutable.
#[derive(Debug, Default)]
pub struct GuestMemory {
    /// Sorted by guest address, without overlap.
    regions: Vec<Arc<MappedRegion>>,
    /// Tells this table from every other one of this process. 0 is the empty
    /// table's and that of a hint that hints at nothing.
    id: u64,
}

/// The id of the next table.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl GuestMemory {
    /// Maps a whole table (VHOST_USER_SET_MEM_TABLE). The files are closed: the
    /// mappings keep what they need.
    ///
    /// # Errors
    /// Each of [`MemoryError`]; then nothing stays mapped.
    pub fn map(layouts: &[RegionLayout], files: Vec<File>) -> Result<Self, MemoryError> {
        let add = |table: Self, (layout, file): (&RegionLayout, &File)| table.with(*layout, file);
        let table = layouts.iter().zip(&files).try_fold(Self::default(), add);
        sys::close_foreign(files.into_iter().map(Into::into));
        table
    }

    /// This table and one region more (VHOST_USER_ADD_MEM_REG).
    ///
    /// # Errors
    /// Each of [`MemoryError`].
    pub fn with(&self, layout: RegionLayout, file: &File) -> Result<Self, MemoryError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        let mut region = MappedRegion::map(layout, file)?;
        if self.regions.iter().filter(|r| r.empty.is_some()).count() < MOST_EMPTY && is_empty(file) {
            region.empty = file.try_clone().ok();
        }
        let region = Arc::new(region);
        let at = self.regions.partition_point(|r| r.layout.guest < layout.guest);
        let before = at.checked_sub(1).and_then(|i| self.regions.get(i));
        if before.is_some_and(|r| r.guest_end() > layout.guest)
            || self.regions.get(at).is_some_and(|r| region.guest_end() > r.layout.guest)
        {
            return Err(MemoryError::Overlap(layout.guest));
        }
        let mut regions = self.regions.clone();
        regions.insert(at, region);
        Ok(Self::of(regions))
    }

    /// This table without one region (VHOST_USER_REM_MEM_REG; the document
    /// compares guest address, user address and size, and so do we).
    ///
    /// # Errors
    /// [`MemoryError::NoSuchRegion`].
    pub fn without(&self, guest: u64, user: u64, len: u64) -> Result<Self, MemoryError> {
        let is_it = |r: &RegionLayout| r.guest == guest && r.len == len && r.user == user;
        let mut regions = self.regions.clone();
        regions.retain(|r| !is_it(&r.layout));
        if regions.len() == self.regions.len() {
            return Err(MemoryError::NoSuchRegion(guest));
        }
        Ok(Self::of(regions))
    }

    /// True if no process has ever written to the file behind this address of the front-end's: then
    /// neither has the guest, whose driver has put a ring there. The front-end has mapped the
    /// file privately, and the guest's pages are its alone. Ask before anything is read there:
    /// that makes a page.
    #[must_use]
    pub fn is_untouched(&self, user: u64) -> bool {
        let holds = |r: &&Arc<MappedRegion>| user.wrapping_sub(r.layout.user) < r.layout.len;
        self.regions.iter().find(holds).and_then(|r| r.empty.as_ref()).is_some_and(is_empty)
    }

    fn of(regions: Vec<Arc<MappedRegion>>) -> Self {
        Self { regions, id: NEXT_ID.fetch_add(1, Ordering::Relaxed) }
    }

    /// Number of regions.
    #[must_use]
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// True before the first SET_MEM_TABLE.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Where each region is in this process.
    pub fn host_spans(&self) -> impl Iterator<Item = HostSpan> {
        self.regions.iter().map(|r| r.host_span())
    }

    /// True once a page of this table was gone when it was touched: the
    /// front-end truncated its memory file, and there is no guest any more. What
    /// was read since then may be zeroes that the guest never wrote: ask after
    /// reading and before acting on it.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        fault::any_lost() && self.regions.iter().any(|r| r.mapping.is_lost())
    }

    /// `[guest, guest + len)`, if the region of the hint has all of it: what
    /// nearly every translation is.
    #[inline]
    fn hinted(&self, guest: u64, len: u64, hint: &RegionHint) -> Option<HostSpan> {
        let offset = guest.wrapping_sub(hint.guest);
        if hint.table != self.id || len > hint.len || offset > hint.len - len {
            return None;
        }
        // Both fit: the whole region is mapped, so its length is a usize.
        let (offset, len) = (usize::try_from(offset).ok()?, usize::try_from(len).ok()?);
        Some(HostSpan { addr: hint.host.wrapping_add(offset), len })
    }

    fn region_at(&self, guest: u64, hint: &mut RegionHint) -> Option<&MappedRegion> {
        let holds = |r: &MappedRegion| guest.wrapping_sub(r.layout.guest) < r.layout.len;
        let at = self.regions.partition_point(|r| r.layout.guest <= guest).checked_sub(1)?;
        let region = self.regions.get(at).filter(|r| holds(r))?;
        let RegionLayout { guest, len, .. } = region.layout;
        *hint = RegionHint { table: self.id, guest, len, host: region.host };
        Some(region)
    }

    /// The whole of `[guest, guest + len)`, if one region has it: what nearly
    /// every range of a driver's is. `None`: [`GuestMemory::translate`] knows.
    #[inline]
    #[must_use]
    pub fn span(&self, guest: u64, len: u64, hint: &mut RegionHint) -> Option<HostSpan> {
        self.hinted(guest, len, hint).or_else(|| self.span_elsewhere(guest, len, hint))
    }

    #[inline(never)]
    fn span_elsewhere(&self, guest: u64, len: u64, hint: &mut RegionHint) -> Option<HostSpan> {
        self.region_at(guest, hint)?;
        self.hinted(guest, len, hint)
    }

    /// Visits `[guest, guest + len)` region by region, in order.
    #[inline(never)]
    fn walk(
        &self,
        guest: u64,
        len: u64,
        hint: &mut RegionHint,
        mut each: impl FnMut(&MappedRegion, HostSpan),
    ) -> Result<(), Unmapped> {
        let (mut at, mut left) = (guest, len);
        while left > 0 {
            let region = self.region_at(at, hint).ok_or(Unmapped(at))?;
            let span = region.span(at - region.layout.guest, left);
            each(region, span);
            let got = span.len as u64;
            left -= got;
            if left > 0 {
                at = at.checked_add(got).ok_or(Unmapped(at))?;
            }
        }
        Ok(())
    }

    /// Gives `each` the host spans of `[guest, guest + len)`, in order: one for
    /// every region that the range touches.
    ///
    /// # Errors
    /// [`Unmapped`] with the first address that no region has. Spans before it
    /// were given already; the caller throws them away.
    pub fn translate(
        &self,
        guest: u64,
        len: u64,
        hint: &mut RegionHint,
        mut each: impl FnMut(HostSpan),
    ) -> Result<(), Unmapped> {
        self.walk(guest, len, hint, |_, span| each(span))
    }

    /// The whole of `[user, user + len)` as one span, for the parts of a
    /// virtqueue, which SET_VRING_ADDR names in the front-end's own addresses.
    #[must_use]
    pub fn span_of_user(&self, user: u64, len: u64) -> Option<HostSpan> {
        self.regions.iter().find_map(|r| {
            let offset = user.checked_sub(r.layout.user)?;
            let end = offset.checked_add(len)?;
            (end <= r.layout.len).then(|| r.span(offset, len))
        })
    }

    /// Reads 16 bytes as two little-endian words, each byte exactly once: a request
    /// header or a descriptor.
    ///
    /// # Errors
    /// [`Unmapped`].
    #[inline]
    pub fn read_pair(&self, guest: u64, hint: &mut RegionHint) -> Result<[u64; 2], Unmapped> {
        if let Some(span) = self.hinted(guest, 16, hint)
            && span.addr.is_multiple_of(align_of::<u64>())
        {
            let from = std::ptr::with_exposed_provenance::<u64>(span.addr);
            // SAFETY: 16 aligned bytes of a region of this table, which is mapped
            // as long as `self` lives. Volatile, since the guest may write at any
            // time.
            return Ok(unsafe { [from.read_volatile(), from.add(1).read_volatile()] }.map(u64::from_le));
        }
        self.read_pair_anywhere(guest, hint)
    }

    #[inline(never)]
    fn read_pair_anywhere(&self, guest: u64, hint: &mut RegionHint) -> Result<[u64; 2], Unmapped> {
        let mut low = [0; 8];
        let mut high = [0; 8];
        self.read(guest, &mut low, hint)?;
        self.read(guest.checked_add(8).ok_or(Unmapped(guest))?, &mut high, hint)?;
        Ok([u64::from_le_bytes(low), u64::from_le_bytes(high)])
    }

    /// Copies guest bytes out, each read exactly once.
    ///
    /// # Errors
    /// [`Unmapped`].
    pub fn read(&self, guest: u64, out: &mut [u8], hint: &mut RegionHint) -> Result<(), Unmapped> {
        let mut done = 0;
        self.walk(guest, out.len() as u64, hint, |region, span| {
            if let Some(part) = out.get_mut(done..done + span.len) {
                let _all = region.volatile(span).read(part, 0);
            }
            done += span.len;
        })
    }

    /// Writes bytes to the guest.
    ///
    /// # Errors
    /// [`Unmapped`].
    pub fn write(&self, guest: u64, data: &[u8], hint: &mut RegionHint) -> Result<(), Unmapped> {
        let mut done = 0;
        self.walk(guest, data.len() as u64, hint, |region, span| {
            if let Some(part) = data.get(done..done + span.len) {
                let _all = region.volatile(span).write(part, 0);
            }
            done += span.len;
        })
    }

    /// Writes one byte at a place that this table has translated before. False:
    /// it was another table, and nothing is written.
    #[inline]
    #[must_use]
    pub fn write_byte(&self, at: HostSpan, byte: u8, hint: &RegionHint) -> bool {
        let offset = at.addr.wrapping_sub(hint.host) as u64;
        if hint.table != self.id || offset >= hint.len || at.len != 1 {
            return self.write_span(at, &[byte]);
        }
        // SAFETY: inside the region of the hint, which is one of this table's
        // and mapped as long as `self` lives. Volatile, since the guest may look
        // at any time.
        unsafe { std::ptr::with_exposed_provenance_mut::<u8>(at.addr).write_volatile(byte) };
        true
    }

    /// Visits a host span region by region: regions that were mapped side by
    /// side share spans. False: a part of it is not this table's.
    fn walk_span(&self, span: HostSpan, mut each: impl FnMut(&MappedRegion, HostSpan)) -> bool {
        let mut left = span;
        while !left.is_empty() {
            let holds = |r: &&Arc<MappedRegion>| left.addr.wrapping_sub(r.host) < r.host_span().len;
            let Some(region) = self.regions.iter().find(holds) else { return false };
            let part = left.slice(0, region.host_span().end() - left.addr);
            each(region, part);
            left = left.slice(part.len, usize::MAX);
        }
        true
    }

    /// Gives `each` the guest address and the length of the parts of a span of this
    /// table. Parts that are not its own are left out.
    pub fn guest_ranges(&self, span: HostSpan, mut each: impl FnMut(u64, u64)) {
        let _whole = self.walk_span(span, |region, part| {
            each(region.layout.guest + (part.addr - region.host) as u64, part.len as u64);
        });
    }

    /// The guest address after the last byte of all regions.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.regions.last().map_or(0, |r| r.guest_end())
    }

    /// Copies a span of this table, or as much of it as `out` takes. False: a
    /// part of it is not this table's, and `out` is not to be used.
    #[must_use]
    pub fn read_span(&self, span: HostSpan, out: &mut [u8]) -> bool {
        let mut rest = out;
        self.walk_span(span, |region, part| {
            let all = std::mem::take(&mut rest);
            let (now, later) = all.split_at_mut(part.len.min(all.len()));
            let _all = region.volatile(part).read(now, 0);
            rest = later;
        })
    }

    /// Copies `data` into a span of this table, as much as both have. False as
    /// in [`GuestMemory::read_span`].
    #[must_use]
    pub fn write_span(&self, span: HostSpan, data: &[u8]) -> bool {
        let mut rest = data;
        self.walk_span(span, |region, part| {
            let (now, later) = rest.split_at(part.len.min(rest.len()));
            let _all = region.volatile(part).write(now, 0);
            rest = later;
        })
    }
}
