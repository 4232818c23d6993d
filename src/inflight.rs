//! The in-flight journal: which chains were fetched and not yet returned, kept
//! in memory that survives us (vhost-user, "Inflight I/O tracking").
//!
//! What it is: the shared region of VHOST_USER_GET_INFLIGHT_FD and
//! SET_INFLIGHT_FD for split virtqueues, exactly as the document lays it out, so
//! that another back-end may take over. A [`Journal`] is one queue's part of it,
//! written by the queue's ring.
//!
//! What it is not: it knows no descriptor and no request; a chain is its head.
//!
//! Invariants: a chain is marked before anything is done for it, and unmarked
//! only after used.idx covers it, whenever this process is killed; what the
//! region holds is judged before it is used, and no index leaves it.
//!
//! ```text
//!   queue n at n × stride (a multiple of 64):
//!   ┌ features 8 │ version 2 │ desc_num 2 │ last_batch_head 2 │ used_idx 2 ┐
//!   │ inflight 1 │ padding 5 │ next 2 │ counter 8 │  × desc_num            │
//!   └──────────────────────────────────────────────────────────────────────┘
//!
//!   fetch     counter, inflight = 1
//!   push      next = the head before
//!   publish   last_batch_head │ used.idx of the ring │ inflight = 0 of the batch │ used_idx
//!                                        a kill here ▲ leaves the batch marked: open() walks it
//! ```
#![expect(unsafe_code, reason = "writes the region through atomics")]

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;

use crate::memory::mapping::Mapping;
use crate::sys;

/// The only version that the document knows.
const VERSION: u16 = 1;
/// In `features` of queue 0: the mode of the guest's write cache is known, and is write-back.
/// A front-end keeps the region across our death and never tells the mode again; other
/// back-ends leave the word alone.
const MODE_KNOWN: u64 = 1 << 63;
const MODE_WRITE_BACK: u64 = 1 << 62;
/// Queues start on cache lines of their own.
const ALIGN: u64 = 64;

#[repr(C)]
struct Header {
    /// The document defines none. Of queue 0: the cache mode ([`MODE_KNOWN`]). In a region of
    /// our own: the skew, in the low 16 bits.
    features: AtomicU64,
    /// 0: no back-end has used this part of the region yet.
    version: AtomicU16,
    desc_num: AtomicU16,
    last_batch_head: AtomicU16,
    used_idx: AtomicU16,
}

#[repr(C)]
struct Entry {
    inflight: AtomicU8,
    _padding: [AtomicU8; 5],
    next: AtomicU16,
    counter: AtomicU64,
}

const _: () = assert!(size_of::<Header>() == 16 && size_of::<Entry>() == 16);

/// Why a region cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum JournalError {
    /// Made by a back-end that is newer than this one.
    #[error("the in-flight region has version {0}, and only {VERSION} is known")]
    Version(u16),
    /// The region has no place for this queue, or for all of its descriptors.
    #[error("the in-flight region has {queues} queues of {size} descriptors, too few for this queue")]
    TooSmall {
        /// Queues that it has.
        queues: u16,
        /// Descriptors of each.
        size: u16,
    },
}

/// The region of all queues, mapped.
#[derive(Debug)]
pub struct Region {
    mapping: Mapping,
    queues: u16,
    size: u16,
}

/// Bytes from one queue to the next.
fn stride(size: u16) -> u64 {
    (16 + 16 * u64::from(size)).next_multiple_of(ALIGN)
}

impl Region {
    /// A fresh region for a front-end to keep: its file, and its bytes.
    ///
    /// # Errors
    /// When memory or descriptors run out.
    pub fn create(queues: u16, size: u16) -> io::Result<(File, u64)> {
        let bytes = (u64::from(queues) * stride(size)).next_multiple_of(4096);
        let fd = rustix::fs::memfd_create("vublk-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, bytes)?;
        // The region is sealed, so mapping it cannot raise SIGBUS.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok((fd.into(), bytes))
    }

    /// Maps `bytes` bytes of `file` from `offset` on, for `queues` queues of at
    /// most `size` descriptors.
    ///
    /// # Errors
    /// EINVAL when the file or the bytes are too few for that.
    pub fn map(file: &File, bytes: u64, offset: u64, queues: u16, size: u16) -> io::Result<Self> {
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        let needed = u64::from(queues) * stride(size);
        if bytes < needed || needed == 0 || !offset.is_multiple_of(8) {
            return Err(invalid());
        }
        Ok(Self { mapping: Mapping::new(file, offset, bytes)?, queues, size })
    }

    /// True once the front-end truncated the region's file: nothing that is
    /// written there is kept.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    /// What earlier back-ends, if there were any, left of the guest's write cache.
    #[must_use]
    pub fn cache_mode(&self) -> CacheMode {
        let used = |queue| self.header(queue).version.load(Ordering::Acquire) != 0;
        let word = self.header(0).features.load(Ordering::Acquire);
        match (word & MODE_KNOWN != 0, (0..self.queues).any(used)) {
            (true, _) => CacheMode::Known { write_back: word & MODE_WRITE_BACK != 0 },
            (false, true) => CacheMode::Unknown,
            (false, false) => CacheMode::NoHistory,
        }
    }

    /// Notes the mode for a successor.
    pub fn note_cache_mode(&self, write_back: bool) {
        let word = MODE_KNOWN | if write_back { MODE_WRITE_BACK } else { 0 };
        self.header(0).features.store(word, Ordering::Release);
    }

    /// The header of queue `queue` < queues.
    fn header(&self, queue: u16) -> &Header {
        debug_assert!(queue < self.queues);
        let at = usize::from(queue) * usize::try_from(stride(self.size)).unwrap_or(0);
        let header = std::ptr::with_exposed_provenance::<Header>(self.mapping.addr() + at);
        // SAFETY: `map` has seen that the mapping has all queues; aligned, since the mapping and
        // the stride are multiples of 8; all fields are atomics.
        unsafe { &*header }
    }
}

/// What a region says of the guest's write cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheMode {
    /// No back-end has used the region.
    NoHistory,
    /// One has, and did not say what it told the guest.
    Unknown,
    /// One has, and left it so.
    Known {
        /// The guest flushes.
        write_back: bool,
    },
}

/// What an earlier back-end left in flight.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// Its chains, by their counts, in the order in which it fetched them.
    pub chains: Vec<(u64, u16)>,
    /// The least count that stands for "after all of these".
    pub after: u64,
}

/// One queue's journal.
#[derive(Debug)]
pub struct Journal {
    /// Where its header is, with its entries behind it; valid while `_region` lives.
    header: NonNull<Header>,
    /// Descriptors of the ring: heads are less than this. Entries of the region.
    size: u16,
    most: u16,
    /// The head that was pushed last.
    last: u16,
    _region: Arc<Region>,
}

// SAFETY: the pointers are to atomics in the mapping that `_region` keeps.
unsafe impl Send for Journal {}

impl Journal {
    /// The journal of a ring of `size` descriptors whose used.idx is `used`, and
    /// what an earlier back-end left there. `offered`: chains that the driver has
    /// offered and not got back; there cannot be more in flight.
    ///
    /// # Errors
    /// [`JournalError`]: nothing was changed.
    pub fn open(
        region: &Arc<Region>,
        queue: u16,
        size: u16,
        used: u16,
        offered: u16,
    ) -> Result<(Self, Found), JournalError> {
        let journal = Self::place(region, queue, size)?;
        let most = journal.most;
        let header = journal.header();
        match header.version.load(Ordering::Acquire) {
            0 => journal.forget(used),
            VERSION => journal.end_last_batch(used),
            other => return Err(JournalError::Version(other)),
        }
        // A smaller ring has no such chains; a larger one may come.
        (size..most).for_each(|at| journal.entry(at).inflight.store(0, Ordering::Relaxed));
        let mut found: Vec<(u64, u16)> = (0..size)
            .filter(|&head| journal.entry(head).inflight.load(Ordering::Relaxed) != 0)
            .map(|head| (journal.entry(head).counter.load(Ordering::Relaxed), head))
            .collect();
        if found.len() > usize::from(offered) {
            // The driver began anew while no back-end served it: these are not its.
            static SAID: AtomicU64 = AtomicU64::new(0); // a front-end can do so again and again
            if sys::is_seldom(&SAID) {
                tracing::warn!(queue, "the in-flight region is of an earlier ring, it is cleared");
            }
            journal.forget(used);
            found.clear();
        }
        journal.begin();
        found.sort_unstable();
        let after = found.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok((journal, Found { chains: found, after }))
    }

    /// The journal of a ring on which nothing is in flight, in a region of our own.
    ///
    /// # Errors
    /// [`JournalError::TooSmall`]: nothing was changed.
    pub fn anew(
        region: &Arc<Region>,
        queue: u16,
        size: u16,
        used: u16,
        skew: u16,
    ) -> Result<Self, JournalError> {
        let journal = Self::place(region, queue, size)?;
        journal.forget(used);
        journal.header().features.store(skew.into(), Ordering::Release);
        journal.begin();
        Ok(journal)
    }

    /// In a region of our own: how far avail indices are ahead of used ones when nothing
    /// is in flight, which a front-end says once, to this process or one before it.
    #[must_use]
    pub fn skew(&self) -> u16 {
        u16::try_from(self.header().features.load(Ordering::Acquire) & 0xffff).unwrap_or(0)
    }

    /// True if a ring has used its part of the region, and [`Journal::end`] did not
    /// end that.
    ///
    /// # Errors
    /// [`JournalError::TooSmall`].
    pub fn is_begun(region: &Arc<Region>, queue: u16, size: u16) -> Result<bool, JournalError> {
        Ok(Self::place(region, queue, size)?.header().version.load(Ordering::Acquire) != 0)
    }

    /// The ring stopped with nothing in flight: the part is as if it had not been used.
    pub fn end(&self) {
        self.header().version.store(0, Ordering::Release);
    }

    fn place(region: &Arc<Region>, queue: u16, size: u16) -> Result<Self, JournalError> {
        let &Region { queues, size: most, .. } = &**region;
        let at = u64::from(queue) * stride(most);
        let (true, Ok(at)) = (queue < queues && (1..=most).contains(&size), usize::try_from(at)) else {
            return Err(JournalError::TooSmall { queues, size: most });
        };
        let header = std::ptr::with_exposed_provenance_mut::<Header>(region.mapping.addr() + at);
        let Some(header) = NonNull::new(header) else {
            return Err(JournalError::TooSmall { queues, size: most }); // not reached: nothing is mapped at 0
        };
        Ok(Self { header, size, most, last: 0, _region: Arc::clone(region) })
    }

    /// From here on the region says what is in flight.
    fn begin(&self) {
        self.header().desc_num.store(self.most, Ordering::Relaxed);
        self.header().version.store(VERSION, Ordering::Release);
    }

    fn header(&self) -> &Header {
        // SAFETY: inside the mapping, which `_region` keeps; aligned, since the
        // region and the stride are multiples of 8; all fields are atomics.
        unsafe { self.header.as_ref() }
    }

    /// Entry `at` < most.
    fn entry(&self, at: u16) -> &Entry {
        debug_assert!(at < self.most);
        // SAFETY: as in `header`; the region was mapped for `most` entries, which
        // follow the header.
        unsafe { self.header.add(1).cast::<Entry>().add(usize::from(at)).as_ref() }
    }

    /// Nothing is in flight on a ring whose used.idx is `used`. Until that is done
    /// the region counts as unused, should we be killed meanwhile; also
    /// entries beyond a small ring's are cleared, a larger one may come.
    fn forget(&self, used: u16) {
        self.header().version.store(0, Ordering::Relaxed);
        for at in 0..self.most {
            // Release: after the version, or a kill could leave half of the marks.
            self.entry(at).inflight.store(0, Ordering::Release);
        }
        self.header().last_batch_head.store(0, Ordering::Relaxed);
        self.header().used_idx.store(used, Ordering::Release);
    }

    /// What was published in the last moment of an earlier back-end's life is not
    /// in flight any more.
    fn end_last_batch(&self, used: u16) {
        let batch = used.wrapping_sub(self.header().used_idx.load(Ordering::Acquire));
        if batch > self.size {
            return self.forget(used); // on one ring it is never more: another one
        }
        if self.header().last_batch_head.load(Ordering::Relaxed) < self.size {
            self.unmark(batch); // else it is not our writing
        }
        self.header().used_idx.store(used, Ordering::Release);
    }

    /// Unmarks the newest `count` chains that were pushed.
    #[inline]
    fn unmark(&self, count: u16) {
        // A front-end can write here, too: an index of its making must not leave the
        // region. It is masked, which is cheaper than asking.
        let mask = self.size.wrapping_sub(1);
        let mut at = self.header().last_batch_head.load(Ordering::Relaxed);
        let mut left = u32::from(count);
        while left != 0 {
            let entry = self.entry(at & mask);
            at = entry.next.load(Ordering::Relaxed);
            // Release: a crash between the two stores must leave the mark set, so that the
            // successor walks the batch.
            entry.inflight.store(0, Ordering::Release);
            left -= 1;
        }
    }

    /// A chain was fetched; `head` is less than the ring's size, `count` more than
    /// that of any chain before it.
    #[inline]
    pub fn fetched(&self, head: u16, count: u64) {
        let entry = self.entry(head);
        entry.counter.store(count, Ordering::Relaxed);
        entry.inflight.store(1, Ordering::Release);
    }

    /// A chain that was fetched is in the ring again; nothing was done for it.
    pub fn put_back(&self, head: u16) {
        self.entry(head).inflight.store(0, Ordering::Release);
    }

    /// A chain was put on the used ring, and is not yet covered by used.idx.
    #[inline]
    pub fn pushed(&mut self, head: u16) {
        self.entry(head).next.store(self.last, Ordering::Relaxed);
        self.last = head;
    }

    /// used.idx is about to cover all that was pushed: a crash right after that finds the
    /// batch from its newest head on.
    #[inline]
    pub fn publishing(&self) {
        self.header().last_batch_head.store(self.last, Ordering::Release);
    }

    /// used.idx became `used`, which covers the newest `count` chains.
    #[inline]
    pub fn published(&self, count: u16, used: u16) {
        self.unmark(count);
        self.header().used_idx.store(used, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(queues: u16, size: u16) -> (File, Arc<Region>) {
        let (file, bytes) = Region::create(queues, size).expect("memfd");
        let region = Region::map(&file, bytes, 0, queues, size).expect("map");
        (file, Arc::new(region))
    }

    fn open(region: &Arc<Region>, used: u16, offered: u16) -> (Journal, Vec<u16>) {
        let (journal, found) = Journal::open(region, 0, 8, used, offered).expect("a journal");
        (journal, found.chains.into_iter().map(|(_, head)| head).collect())
    }

    /// Chains with these heads are fetched, after `count` others.
    fn fetch(journal: &Journal, count: u64, heads: &[u16]) {
        (count..).zip(heads).for_each(|(count, &head)| journal.fetched(head, count));
    }

    #[test]
    fn the_layout_is_the_documents() {
        use std::os::unix::fs::FileExt;
        let (file, region) = region(2, 8);
        let (mut journal, none) = Journal::open(&region, 1, 8, 7, 0).expect("a journal");
        assert_eq!(none, Found { chains: Vec::new(), after: 0 });
        fetch(&journal, 0, &[3, 5]);
        journal.pushed(3);
        journal.publishing();
        let mut bytes = [0; 192];
        file.read_exact_at(&mut bytes, 192).expect("the second queue: 16 + 8 × 16, up to a multiple of 64");
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        assert_eq!([8, 10, 12, 14].map(word), [1, 8, 3, 7], "version, desc_num, last_batch_head, used_idx");
        let entry = |at: usize| (bytes[16 + 16 * at], bytes[16 + 16 * at + 8]);
        assert_eq!([3, 4, 5].map(entry), [(1, 0), (0, 0), (1, 1)], "inflight and counter");
    }

    #[test]
    fn the_cache_mode_outlives_a_back_end() {
        let (_file, region) = region(2, 8);
        assert_eq!(region.cache_mode(), CacheMode::NoHistory);
        let (_journal, _) = Journal::open(&region, 1, 8, 7, 0).expect("a journal");
        assert_eq!(region.cache_mode(), CacheMode::Unknown, "a back-end without such a note");
        for write_back in [true, false] {
            region.note_cache_mode(write_back);
            let (_journal, _) = Journal::open(&region, 0, 8, 7, 0).expect("a journal");
            assert_eq!(region.cache_mode(), CacheMode::Known { write_back });
        }
    }

    #[test]
    fn what_was_not_returned_comes_back_in_the_order_of_fetching() {
        let (_file, region) = region(1, 8);
        let (mut journal, _) = open(&region, 0, 0);
        fetch(&journal, 0, &[4, 1, 7, 0]);
        journal.pushed(7);
        journal.publishing();
        journal.published(1, 1);
        let (journal, heads) = open(&region, 1, 3);
        assert_eq!(heads, [4, 1, 0]);
        // And those that come later are later.
        journal.fetched(7, 4);
        let (_, found) = Journal::open(&region, 0, 8, 1, 4).expect("a journal");
        assert_eq!(found, Found { chains: vec![(0, 4), (1, 1), (3, 0), (4, 7)], after: 5 });
    }

    /// used.idx was stored, and nothing after it.
    #[test]
    fn a_batch_that_was_published_in_the_last_moment_is_not_replayed() {
        for cleared in 0..=2 {
            let (_file, region) = region(1, 8);
            let (mut journal, _) = open(&region, 0xffff, 0);
            fetch(&journal, 0, &[4, 1, 7, 0]);
            [1, 4].into_iter().for_each(|head| journal.pushed(head));
            journal.publishing();
            journal.unmark(cleared);
            drop(journal);
            assert_eq!(open(&region, 1, 2).1, [7, 0], "{cleared} of two were unmarked");
            assert_eq!(open(&region, 1, 2).1, [7, 0], "and once more");
        }
    }

    /// Pushed, and used.idx not yet stored: the driver knows nothing of it.
    #[test]
    fn what_was_pushed_and_not_published_is_replayed() {
        let (_file, region) = region(1, 8);
        let (mut journal, _) = open(&region, 0, 0);
        fetch(&journal, 0, &[4, 1]);
        journal.pushed(4);
        let (mut journal, heads) = open(&region, 0, 2);
        assert_eq!(heads, [4, 1]);
        // Pushed again, the list goes through it twice.
        journal.pushed(4);
        journal.pushed(1);
        journal.publishing();
        journal.published(2, 2);
        assert!(open(&region, 2, 0).1.is_empty());
    }

    #[test]
    fn marks_of_an_earlier_ring_are_cleared() {
        let (_file, region) = region(1, 8);
        let (journal, _) = open(&region, 1000, 0);
        fetch(&journal, 0, &[4, 1]);
        assert!(open(&region, 0, 2).1.is_empty(), "a new driver that has offered two chains");
        assert!(open(&region, 0, 8).1.is_empty(), "cleared for good");
        let (journal, _) = open(&region, 3, 0);
        fetch(&journal, 0, &[4, 1]);
        assert!(open(&region, 3, 1).1.is_empty(), "more than it has offered");
        assert!(open(&region, 3, 8).1.is_empty(), "cleared for good");
        // A large ring, a small one, a large one.
        let (journal, _) = open(&region, 1000, 0);
        journal.fetched(7, 0);
        let (_, small) = Journal::open(&region, 0, 4, 0, 4).expect("a journal");
        assert!(small.chains.is_empty() && open(&region, 0, 8).1.is_empty());
    }

    #[test]
    fn a_region_that_makes_no_sense_is_refused_or_harmless() {
        use std::os::unix::fs::FileExt;
        let (file, bytes) = Region::create(1, 8).expect("memfd");
        let map = |bytes, offset, queues, size| Region::map(&file, bytes, offset, queues, size).is_ok();
        assert!(map(bytes, 0, 1, 8) && !map(bytes + 1, 0, 1, 8) && !map(bytes, 4096, 1, 8));
        assert!(!map(bytes, 0, 200, 8) && !map(16, 0, 1, 8) && !map(bytes - 4, 4, 1, 8));
        assert!(!map(bytes, u64::MAX, 1, 8) && !map(bytes, 0, 0, 8));
        let region = Arc::new(Region::map(&file, bytes, 0, 1, 8).expect("map"));
        let too_small = JournalError::TooSmall { queues: 1, size: 8 };
        assert_eq!(Journal::open(&region, 1, 8, 0, 0).err(), Some(too_small));
        assert_eq!(Journal::open(&region, 0, 16, 0, 0).err(), Some(too_small));
        // Every index wild, everything in flight, a batch of eight.
        file.write_all_at(&[0xff; 144], 0).expect("write");
        file.write_all_at(&[1, 0], 8).expect("version 1");
        let (journal, heads) = open(&region, 7, 8);
        assert_eq!(heads.len(), 8);
        journal.published(8, 15);
        file.write_all_at(&[2, 0], 8).expect("version 2");
        assert_eq!(Journal::open(&region, 0, 8, 0, 0).err(), Some(JournalError::Version(2)));
    }
}
