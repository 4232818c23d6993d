//! Page arrays: the payload of a request as the kernel's direct I/O wants it.
//!
//! What it is: [`PageArray`], the guest's own pages, and [`Pool`], the few
//! pages of ours that stand in where the guest's do not fit.
//!
//! What it is not: it does no I/O and reads no descriptor.
//!
//! Invariant: a page array owns nothing. Guest pages belong to the memory table
//! that the slot keeps alive; pool pages are a [`PoolPages`] that goes back to
//! its pool exactly once.
//!
//! ```text
//!   page array: first offset, whole pages in between, length
//!
//!        page 7         page 8         page 9          page 41
//!   ┌───┬──────────┐┌──────────────┐┌──────────────┐┌────────┬─────┐
//!   │   │▒▒▒▒▒▒▒▒▒▒││▒▒▒▒▒▒▒▒▒▒▒▒▒▒││▒▒▒▒▒▒▒▒▒▒▒▒▒▒││▒▒▒▒▒▒▒▒│     │
//!   └───┴──────────┘└──────────────┘└──────────────┘└────────┴─────┘
//!   ◄───► first offset                              ◄────────► rest of length
//!       ◄──────────────── one run (contiguous) ────►◄─ a run ─►
//! ```
//!
//! Pages that follow each other in this process are one run, as in the kernel's
//! multi-page bio_vec: the guest's memory is mapped in one piece, so a
//! descriptor is one run however long it is, and a run becomes one iovec.
#![expect(unsafe_code, reason = "maps the pool and lends its bytes")]

use std::io;
use std::ptr::NonNull;

use arrayvec::ArrayVec;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::chain::MAX_DESCRIPTORS;
use crate::memory::HostSpan;

/// Runs of one page array: a chain's descriptors, and room for some of them to
/// cross from one memory region into the next.
pub const MAX_RUNS: usize = MAX_DESCRIPTORS + 32;

/// iovecs of one operation. The kernel's limit is 1024 (UIO_MAXIOV); a payload
/// of more runs goes in several operations.
pub const MAX_IOVECS: usize = 128;

/// The iovecs of one operation, kept by its slot until it completes.
pub type Iovecs = ArrayVec<libc::iovec, MAX_IOVECS>;

/// A payload has more than [`MAX_RUNS`] runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooScattered;

/// Chunks of the pool that one request may hold.
pub const MAX_CHUNKS: usize = 16;

/// The payload of one request, in guest order. What every request touches comes first.
#[repr(C)]
#[derive(Debug, Default)]
pub struct PageArray {
    len: u64,
    /// Every bit that is set in the address or in the length of a part that was
    /// pushed: what is aligned in all of them is seen without a walk.
    bits: usize,
    runs: ArrayVec<HostSpan, MAX_RUNS>,
}

impl PageArray {
    /// Empties it for the next request.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.len = 0;
        self.bits = 0;
    }

    /// Appends bytes; those that follow the last run lengthen it.
    ///
    /// # Errors
    /// [`TooScattered`].
    #[inline]
    pub fn push(&mut self, span: HostSpan) -> Result<(), TooScattered> {
        if span.is_empty() {
            return Ok(());
        }
        self.bits |= span.addr() | span.len();
        match self.runs.last_mut() {
            Some(last) if last.end() == span.addr() => {
                *last = HostSpan::new(last.addr(), last.len() + span.len())
            }
            _ => self.runs.try_push(span).map_err(|_| TooScattered)?,
        }
        self.len += span.len() as u64;
        Ok(())
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True if there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Offset of the first byte in its page of 4096.
    #[must_use]
    pub fn first_offset(&self) -> usize {
        self.runs.first().map_or(0, |r| r.addr() % 4096)
    }

    /// The contiguous runs, for tests and for the page-by-page view.
    #[must_use]
    pub fn runs(&self) -> &[HostSpan] {
        &self.runs
    }

    /// True if direct I/O takes all of it as it is; as [`PageArray::direct_bytes`].
    #[inline]
    #[must_use]
    pub fn is_direct(&self, mem: u32, unit: u64) -> bool {
        let mask = usize::try_from(unit - 1).unwrap_or(usize::MAX);
        self.bits & ((mem as usize - 1) | mask) == 0 && self.runs.len() <= MAX_IOVECS
    }

    /// How many bytes from `from` on, `len` at most, direct I/O takes as they are: whole
    /// multiples of `unit`, every part of which begins on a multiple of `mem` and is a
    /// multiple of `unit` long, in at most [`MAX_IOVECS`] parts. Both are powers of 2.
    #[must_use]
    pub fn direct_bytes(&self, from: u64, len: u64, mem: u32, unit: u64) -> u64 {
        let mem = mem as usize - 1;
        let mask = usize::try_from(unit - 1).unwrap_or(usize::MAX);
        let mut bytes = 0;
        let mut parts = 0;
        self.try_spans(from, len, |span| {
            let whole = span.len() & !mask;
            if span.addr() & mem != 0 || parts == MAX_IOVECS {
                return false;
            }
            bytes += whole as u64;
            parts += 1;
            whole == span.len()
        });
        bytes
    }

    /// How many bytes from `from` on, `len` at most, have to go through the pool before direct
    /// I/O takes some as they are: multiples of `unit`, or all of them. As
    /// [`PageArray::direct_bytes`].
    #[must_use]
    pub fn bounced_bytes(&self, from: u64, len: u64, mem: u32, unit: u64) -> u64 {
        let mem = mem as usize - 1;
        let mut at = 0_u64; // bytes from `from` to the part that is looked at
        let mut found = None;
        self.try_spans(from, len, |span| {
            // The first unit that begins in this run, and as many more as may be aligned otherwise.
            let first = at.next_multiple_of(unit) - at;
            let ways = (mem as u64 + 1).div_ceil(unit);
            let fits = |skip: &u64| {
                let part = span.slice(usize::try_from(*skip).unwrap_or(usize::MAX), usize::MAX);
                part.len() as u64 >= unit && part.addr() & mem == 0
            };
            found = (0..ways).map(|n| first + n * unit).find(fits).map(|skip| at + skip);
            at += span.len() as u64;
            found.is_none()
        });
        found.unwrap_or(len)
    }

    /// True if any byte lies in `span`.
    #[must_use]
    pub fn touches(&self, span: HostSpan) -> bool {
        self.runs.iter().any(|r| r.overlaps(span))
    }

    /// Visits the bytes `[from, from + len)` run by run.
    pub fn spans(&self, from: u64, len: u64, mut each: impl FnMut(HostSpan)) {
        self.try_spans(from, len, |span| {
            each(span);
            true
        });
    }

    /// False if `each` said so, which ends the visit.
    fn try_spans(&self, from: u64, len: u64, mut each: impl FnMut(HostSpan) -> bool) -> bool {
        // Both saturate only where no run can be that long anyway.
        let mut skip = usize::try_from(from).unwrap_or(usize::MAX);
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        for run in &self.runs {
            if skip >= run.len() {
                skip -= run.len();
                continue;
            }
            let part = run.slice(skip, left);
            skip = 0;
            if left == 0 {
                break;
            }
            if !each(part) {
                return false;
            }
            left -= part.len();
        }
        true
    }

    /// The whole array as the kernel takes it, if it is no more than [`MAX_IOVECS`] parts.
    #[inline]
    #[must_use]
    pub fn as_iovecs(&self) -> *const libc::iovec {
        // A HostSpan is laid out as an iovec: address, length.
        self.runs.as_ptr().cast()
    }

    /// Number of runs.
    #[inline]
    #[must_use]
    pub fn run_count(&self) -> usize {
        self.runs.len()
    }

    /// Writes the iovecs of `[from, from + len)` into `out`: at most [`MAX_IOVECS`], as
    /// [`PageArray::direct_bytes`] has seen to.
    pub fn iovecs(&self, from: u64, len: u64, out: &mut Iovecs) {
        out.clear();
        self.try_spans(from, len, |span| out.try_push(iovec(span)).is_ok());
    }
}

/// A span as the kernel takes it.
#[must_use]
pub fn iovec(span: HostSpan) -> libc::iovec {
    libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(span.addr()), iov_len: span.len() }
}

/// Chunks of the pool that stand in for a piece of a payload. They go back with
/// [`Pool::give_back`].
#[derive(Debug, Default)]
#[must_use = "pool pages that are not given back are lost to the pool"]
pub struct PoolPages(ArrayVec<u16, MAX_CHUNKS>);

/// A fixed set of aligned pages, sized at start, one set a worker.
///
/// It is cut into chunks of equal length; a piece of a request takes some. One
/// chunk more, always zero, is the source of written zeroes.
#[derive(Debug)]
pub struct Pool {
    base: NonNull<u8>,
    bytes: usize,
    chunk: usize,
    free: Vec<u16>,
    count: u16,
}

// SAFETY: the pool owns its memory; nothing in it is tied to a thread.
unsafe impl Send for Pool {}

impl Pool {
    /// `count` chunks of `chunk` bytes each, aligned to 4096 bytes. Mapped and
    /// not allocated: a page is only taken from the system when first used, and
    /// most guests never need one.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(count: usize, chunk: usize) -> io::Result<Self> {
        let chunk = chunk.next_multiple_of(4096).max(4096);
        let count = u16::try_from(count.clamp(1, 4096)).unwrap_or(1);
        let bytes = (usize::from(count) + 1).checked_mul(chunk).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, bytes, chunk, free: (1..=count).rev().collect(), count })
    }

    /// Bytes of a chunk.
    #[must_use]
    pub fn chunk_len(&self) -> usize {
        self.chunk
    }

    /// Chunks for `bytes` bytes, or for as many as there are. `None`: wait until one is given
    /// back.
    pub fn take(&mut self, bytes: u64) -> Option<PoolPages> {
        let wanted = usize::try_from(bytes).unwrap_or(usize::MAX).div_ceil(self.chunk).max(1);
        let some = wanted.min(MAX_CHUNKS).min(self.free.len());
        let chunks = self.free.drain(self.free.len() - some..).collect();
        (some > 0).then_some(PoolPages(chunks))
    }

    /// Ends the use of chunks, leaving none. The kernel must be done with them.
    pub fn give_back(&mut self, pages: &mut PoolPages) {
        self.free.extend(pages.0.drain(..));
    }

    /// Bytes of what was taken.
    #[must_use]
    pub fn len_of(&self, pages: &PoolPages) -> u64 {
        (pages.0.len() * self.chunk) as u64
    }

    /// True when every chunk is free.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.free.len() == usize::from(self.count)
    }

    /// Where the first `len` bytes of these pages are.
    pub fn iovecs(&self, pages: &PoolPages, len: u64, out: &mut Iovecs) {
        self.repeat(len, pages.0.iter().copied(), out);
    }

    /// `len` bytes of zeroes to write from: the zero chunk, as often as it takes.
    pub fn zeroes(&self, len: u64, out: &mut Iovecs) {
        self.repeat(len, std::iter::repeat(0), out);
    }

    fn repeat(&self, len: u64, chunks: impl Iterator<Item = u16>, out: &mut Iovecs) {
        out.clear();
        let base = self.base.as_ptr().expose_provenance();
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        for chunk in chunks {
            let span = HostSpan::new(base + usize::from(chunk) * self.chunk, left.min(self.chunk));
            if left == 0 || out.try_push(iovec(span)).is_err() {
                return;
            }
            left -= span.len();
        }
    }

    /// Visits `len` bytes from byte `from` of these pages on, part by part. No operation of
    /// the kernel uses them now.
    pub fn parts(&mut self, pages: &PoolPages, from: u64, len: u64, mut each: impl FnMut(&mut [u8])) {
        let mut skip = usize::try_from(from).unwrap_or(usize::MAX);
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        for &chunk in &pages.0 {
            if skip >= self.chunk {
                skip -= self.chunk;
                continue;
            }
            let take = left.min(self.chunk - skip);
            // SAFETY: the bytes lie in chunk `chunk` of the mapping, are initialised (they were
            // zero), and belong to the holder of `pages`; `&mut self` keeps every other loan
            // away. The caller holds no running operation on them.
            each(unsafe {
                let start = self.base.as_ptr().add(usize::from(chunk) * self.chunk + skip);
                std::slice::from_raw_parts_mut(start, take)
            });
            skip = 0;
            left -= take;
            if left == 0 {
                return;
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if !self.is_idle() {
            return; // the kernel may still write there: a leak is the lesser harm
        }
        // SAFETY: mapped in `new`, and no chunk is out.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "munmap of the pool");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{prop, proptest};

    fn array(spans: &[(usize, usize)]) -> PageArray {
        let mut pages = PageArray::default();
        for &(addr, len) in spans {
            pages.push(HostSpan::new(addr, len)).expect("fits");
        }
        pages
    }

    #[test]
    fn contiguous_pages_are_one_run() {
        let pages = array(&[(0x1200, 0xe00), (0x2000, 0x1000), (0x9000, 0x200)]);
        assert_eq!(pages.runs().len(), 2);
        assert!(PageArray::default().is_empty() && !pages.is_empty());
        let touches = |addr, len| pages.touches(HostSpan::new(addr, len));
        assert!(touches(0x1000, 0x201) && touches(0x91ff, 1), "a byte of a run");
        assert!(!touches(0x1000, 0x200) && !touches(0x3000, 0x6000), "up to a run, and behind one");
        assert_eq!((pages.first_offset(), pages.len()), (0x200, 0x2000));
        assert_eq!(pages.direct_bytes(0, 0x2000, 512, 512), 0x2000);
        assert_eq!(pages.direct_bytes(0, 0x2000, 4096, 512), 0, "the first run begins in a page");
        assert_eq!(pages.direct_bytes(0xe00, 0x1200, 4096, 512), 0x1200, "a page on, it does not");
        assert_eq!(pages.direct_bytes(0, 0x2000, 512, 4096), 0x1000, "whole blocks of the first run");
        assert_eq!(pages.direct_bytes(0x100, 0x1f00, 512, 512), 0, "from the midst of a run");
        assert_eq!(pages.bounced_bytes(0, 0x2000, 4096, 512), 0xe00);
        assert_eq!(pages.bounced_bytes(0x100, 0x1f00, 512, 512), 0x1f00, "never aligned again");
    }

    #[test]
    fn no_more_parts_than_an_operation_has() {
        let spans: Vec<_> = (0..MAX_IOVECS + 10).map(|i| (0x10_0000 + i * 0x1000, 512)).collect();
        let pages = array(&spans);
        let mut out = Iovecs::new();
        let bytes = pages.direct_bytes(0, pages.len(), 512, 512);
        assert_eq!(bytes, 128 * 512);
        pages.iovecs(0, bytes, &mut out);
        assert_eq!(out.iter().map(|v| v.iov_len as u64).sum::<u64>(), bytes);
    }

    /// What goes direct and what through the pool, against every unit by itself.
    #[test]
    fn what_has_to_be_bounced_is_what_no_unit_of_which_fits() {
        let starts = [0x1000_usize, 0x1200, 0x1208];
        for lens in [[0x1000, 0x2000, 0x200], [0x200, 0x3e00, 0x1000], [0x208, 0x1000, 0xdf8]] {
            for (first, second) in starts.iter().flat_map(|a| starts.iter().map(move |b| (*a, *b))) {
                let pages = array(&[(first, lens[0]), (0x10_0000 + second, lens[1]), (0x20_0000, lens[2])]);
                for (mem, unit) in [(512, 512), (512, 4096), (4096, 512), (4096, 4096)] {
                    for from in (0..pages.len()).step_by(512) {
                        let len = pages.len() - from;
                        let fits = |at| at < len && pages.direct_bytes(from + at, len - at, mem, unit) > 0;
                        let by_hand = (0..).map(|n| n * unit).take_while(|at| *at < len).find(|&at| fits(at));
                        let got = pages.bounced_bytes(from, len, mem, unit);
                        assert_eq!(
                            got,
                            by_hand.unwrap_or(len),
                            "{lens:x?} {first:x} {second:x} from {from:x}"
                        );
                    }
                }
            }
        }
    }

    proptest! {
        /// iovecs over any sub-range name exactly the bytes that a walk byte by
        /// byte names.
        #[test]
        fn iovecs_equal_a_byte_walk(
            lens in prop::collection::vec(1usize..700, 1..40),
            gaps in prop::collection::vec(0usize..3, 40),
            from in 0u64..5000,
            len in 0u64..9000,
        ) {
            let mut at = 0x1000;
            let mut bytes = Vec::new();
            let mut pages = PageArray::default();
            for (n, gap) in lens.iter().zip(&gaps) {
                at += gap * 64;
                pages.push(HostSpan::new(at, *n)).expect("fits");
                bytes.extend(at..at + n);
                at += n;
            }
            let mut out = Iovecs::new();
            pages.iovecs(from, len, &mut out);
            let got: Vec<usize> = out.iter().flat_map(|v| {
                let a = v.iov_base.addr();
                a..a + v.iov_len
            }).collect();
            let want: Vec<usize> = bytes.iter().copied()
                .skip(usize::try_from(from).expect("small")).take(usize::try_from(len).expect("small")).collect();
            assert_eq!(got, want);
        }
    }

    #[test]
    fn a_pool_lends_each_chunk_once() {
        let mut pool = Pool::new(3, 1).expect("memory");
        let (mut a, mut b) = (pool.take(1).expect("one"), pool.take(1 << 20).expect("what is left"));
        assert_eq!((pool.len_of(&a), pool.len_of(&b)), (4096, 8192));
        assert!(pool.take(1).is_none() && !pool.is_idle());
        pool.parts(&a, 0, 4096, |bytes| bytes.fill(7));
        let mut seen = Vec::new();
        pool.parts(&b, 4000, 200, |bytes| seen.push((bytes.len(), bytes.iter().all(|b| *b == 0))));
        assert_eq!(seen, [(96, true), (104, true)], "across two chunks, neither of them the other's");
        pool.parts(&b, 4096 + 100, 8, |bytes| bytes.fill(9));
        seen.clear();
        pool.parts(&b, 4096, 4096, |bytes| seen.push((bytes.len(), bytes[100..108] == [9; 8])));
        assert_eq!(seen, [(4096, true)], "in the second chunk alone");
        pool.give_back(&mut a);
        pool.give_back(&mut b);
        assert!(pool.is_idle());
    }

    #[test]
    fn one_chunk_of_zeroes_is_named_as_often_as_it_takes() {
        let pool = Pool::new(1, 4096).expect("memory");
        let mut out = Iovecs::new();
        pool.zeroes(10_000, &mut out);
        assert_eq!(out.iter().map(|v| v.iov_len).collect::<Vec<_>>(), [4096, 4096, 1808]);
        assert!(out.iter().all(|v| v.iov_base == out[0].iov_base));
    }
}
