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

/// The payload of one request, in guest order.
#[derive(Debug, Default)]
pub struct PageArray {
    runs: ArrayVec<HostSpan, MAX_RUNS>,
    len: u64,
    /// Every bit that is set in the address or in the length of a part that was
    /// pushed: what is aligned in all of them is seen without a walk.
    bits: usize,
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

    /// True if, from byte `from` on, every run starts on a multiple of `mem` and
    /// is a multiple of `unit` long, both powers of 2: what direct I/O asks of
    /// each iovec.
    #[must_use]
    pub fn is_aligned(&self, from: u64, mem: u32, unit: u32) -> bool {
        let (mem, unit) = (mem as usize - 1, unit as usize - 1);
        if from == 0 && self.bits & (mem | unit) == 0 {
            return true;
        }
        self.try_spans(from, u64::MAX, |r| r.addr() & mem == 0 && r.len() & unit == 0)
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

    /// Writes the iovecs of `[from, from + len)` into `out`, as many as fit, and
    /// returns how many bytes they cover. When they do not all fit, the bytes
    /// are cut to a multiple of `unit`, a power of 2, by dropping from the end.
    pub fn iovecs(&self, from: u64, len: u64, unit: u64, out: &mut Iovecs) -> u64 {
        out.clear();
        if from == 0 && len == self.len && self.runs.len() <= MAX_IOVECS {
            out.extend(self.runs.iter().copied().map(iovec));
            return len;
        }
        let mut bytes = 0;
        self.try_spans(from, len, |span| {
            bytes += span.len() as u64;
            out.push(iovec(span));
            !out.is_full()
        });
        let bytes = bytes.min(len);
        if bytes == len {
            return bytes;
        }
        let mut excess = bytes & (unit - 1);
        while excess > 0
            && let Some(last) = out.last_mut()
        {
            let cut = excess.min(last.iov_len as u64);
            last.iov_len -= usize::try_from(cut).unwrap_or(last.iov_len);
            excess -= cut;
            if last.iov_len == 0 {
                out.pop();
            }
        }
        bytes & !(unit - 1)
    }
}

/// A span as the kernel takes it.
#[must_use]
pub fn iovec(span: HostSpan) -> libc::iovec {
    libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(span.addr()), iov_len: span.len() }
}

/// Pool pages that stand in for a piece of a payload. Goes back with
/// [`Pool::give_back`].
#[derive(Debug)]
#[must_use = "pool pages that are not given back are lost to the pool"]
pub struct PoolPages(usize);

/// A fixed set of aligned pages, sized at start, one set a worker.
///
/// It is cut into chunks of equal length; a piece of a request takes one. One
/// chunk more, always zero, is the source of written zeroes.
#[derive(Debug)]
pub struct Pool {
    base: NonNull<u8>,
    bytes: usize,
    chunk: usize,
    free: Vec<usize>,
    count: usize,
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
        let count = count.max(1);
        let bytes = (count + 1).checked_mul(chunk).ok_or(io::ErrorKind::OutOfMemory)?;
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

    /// A free chunk, or `None`: wait until one is given back.
    pub fn take(&mut self) -> Option<PoolPages> {
        self.free.pop().map(PoolPages)
    }

    /// Ends the use of a chunk. The kernel must be done with it.
    pub fn give_back(&mut self, pages: PoolPages) {
        self.free.push(pages.0);
    }

    /// True when a chunk is free.
    #[must_use]
    pub fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// True when every chunk is free.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.count
    }

    /// Where the first `len` bytes of a chunk are.
    #[must_use]
    pub fn span(&self, pages: &PoolPages, len: usize) -> HostSpan {
        HostSpan::new(self.base.as_ptr().expose_provenance() + pages.0 * self.chunk, len.min(self.chunk))
    }

    /// Zeroes to write from.
    #[must_use]
    pub fn zeroes(&self, len: usize) -> HostSpan {
        HostSpan::new(self.base.as_ptr().expose_provenance(), len.min(self.chunk))
    }

    /// The bytes of a chunk that no operation of the kernel uses now.
    pub fn bytes(&mut self, pages: &PoolPages) -> &mut [u8] {
        // SAFETY: chunk `pages.0` lies in the mapping, is initialised (it was
        // zero), and belongs to the holder of `pages`; `&mut self` keeps every
        // other loan away. The caller holds no running operation on it.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(pages.0 * self.chunk), self.chunk) }
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
        assert_eq!((pages.first_offset(), pages.len()), (0x200, 0x2000));
        assert!(pages.is_aligned(0, 512, 512) && !pages.is_aligned(0, 4096, 512));
        assert!(!pages.is_aligned(0, 512, 4096) && pages.is_aligned(0xe00, 4096, 512));
        assert!(!pages.is_aligned(0x100, 512, 512), "from the midst of a run");
    }

    #[test]
    fn iovecs_that_do_not_fit_are_cut_to_whole_units() {
        let spans: Vec<_> = (0..MAX_IOVECS + 10).map(|i| (0x10_0000 + i * 0x1000, 100)).collect();
        let pages = array(&spans);
        let mut out = Iovecs::new();
        let bytes = pages.iovecs(0, pages.len(), 512, &mut out);
        assert_eq!(bytes, 128 * 100 / 512 * 512);
        assert_eq!(out.iter().map(|v| v.iov_len as u64).sum::<u64>(), bytes);
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
            let covered = pages.iovecs(from, len, 1, &mut out);
            let got: Vec<usize> = out.iter().flat_map(|v| {
                let a = v.iov_base.addr();
                a..a + v.iov_len
            }).collect();
            let want: Vec<usize> = bytes.iter().copied()
                .skip(usize::try_from(from).expect("small")).take(usize::try_from(len).expect("small")).collect();
            assert_eq!(got, want);
            assert_eq!(covered, got.len() as u64);
        }
    }

    #[test]
    fn a_pool_lends_each_chunk_once() {
        let mut pool = Pool::new(2, 1).expect("memory");
        let (a, b) = (pool.take().expect("first"), pool.take().expect("second"));
        assert!(pool.take().is_none() && !pool.is_idle());
        assert!(!pool.span(&a, 4096).overlaps(pool.span(&b, 4096)));
        pool.bytes(&a).fill(7);
        assert_eq!(pool.bytes(&b)[0], 0);
        pool.give_back(a);
        pool.give_back(b);
        assert!(pool.is_idle());
    }
}
