//! The split virtqueue, device side (virtio 1.3, 2.7).
//!
//! What it is: fetch chains, stage used elements, publish them once a batch,
//! and say when a notification is due.
//!
//! What it is not: it does not follow a chain; [`Chain`] only reads descriptors.
//!
//! Invariants: avail.idx is read once per batch and when asked how many chains
//! are left, used.idx is written once per batch; whatever the driver writes, no access leaves the three areas, which
//! were checked when the ring was made and live as long as its memory table. A
//! protocol violation is reported once; then the ring fetches nothing more,
//! while chains in flight are still returned.
//!
//! ```text
//!   descriptor table   size × 16    { addr, len, flags, next }
//!   available ring     6 + 2 × size { flags, idx, ring[size], used_event }
//!   used ring          6 + 8 × size { flags, idx, { id, len }[size], avail_event }
//! ```
#![expect(unsafe_code, reason = "the ring's words are atomics in guest memory")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_queue::desc::split::Descriptor;

use super::notify::{self, Shared};
use super::{Head, MAX_QUEUE_SIZE, RingError};
use crate::inflight::{Journal, Region};
use crate::memory::GuestMemory;

/// Where a ring is: VHOST_USER_SET_VRING_NUM and SET_VRING_ADDR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Queue size, descriptors.
    pub size: u16,
    /// Descriptor table, in the front-end's address space.
    pub desc: u64,
    /// Available ring, likewise.
    pub avail: u64,
    /// Used ring, likewise.
    pub used: u64,
}

/// What a stopped ring leaves behind: GET_VRING_BASE answers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingState {
    /// The avail index of the next chain to fetch.
    pub next_avail: u16,
}

/// Host pointers of the ring's three areas. Valid while `_memory` lives.
#[derive(Debug)]
struct Areas {
    desc: *const Descriptor,
    avail: *mut u16,
    used: *mut u16,
    size: u16,
    _memory: Arc<GuestMemory>,
}

// SAFETY: the pointers are to guest memory, which no thread has references to,
// and `_memory` keeps the mapping alive wherever the ring goes.
unsafe impl Send for Areas {}

impl Areas {
    fn map(layout: &Layout, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        let n = u64::from(layout.size);
        let area = |what, user, len, align: usize| {
            let span = memory.span_of_user(user, len).ok_or(RingError::NotInMemory(what))?;
            if span.addr() % align == 0 { Ok(span.addr()) } else { Err(RingError::Misaligned(what)) }
        };
        Ok(Self {
            desc: std::ptr::with_exposed_provenance(area("descriptor table", layout.desc, 16 * n, 16)?),
            avail: std::ptr::with_exposed_provenance_mut(area("available ring", layout.avail, 6 + 2 * n, 2)?),
            used: std::ptr::with_exposed_provenance_mut(area("used ring", layout.used, 6 + 8 * n, 4)?),
            size: layout.size,
            _memory: Arc::clone(memory),
        })
    }

    /// 16-bit word `at` of the available ring; `at` < 3 + size.
    fn avail_word(&self, at: u16) -> &AtomicU16 {
        debug_assert!(at < 3 + self.size);
        // SAFETY: inside the area that `map` checked; two-byte aligned; shared
        // with the driver, hence an atomic.
        unsafe { AtomicU16::from_ptr(self.avail.add(usize::from(at))) }
    }

    /// 16-bit word `at` of the used ring; `at` < 3 + 4 × size.
    fn used_word(&self, at: u16) -> &AtomicU16 {
        debug_assert!(at < 3 + 4 * self.size);
        // SAFETY: as in `avail_word`.
        unsafe { AtomicU16::from_ptr(self.used.add(usize::from(at))) }
    }

    /// Writes used element `at` < size; seen by the driver after the next
    /// release store of used.idx.
    fn write_used(&self, at: u16, id: u32, len: u32) {
        debug_assert!(at < self.size);
        // SAFETY: element `at` is inside the area; four-byte aligned, because
        // the area is and the elements start at byte 4. Volatile, since the
        // driver may read at any time.
        unsafe {
            let element = self.used.add(2 + 4 * usize::from(at)).cast::<u32>();
            element.write_volatile(id.to_le());
            element.add(1).write_volatile(len.to_le());
        }
    }

    /// Reads descriptor `at` < size, once, into a value of ours.
    fn descriptor(&self, at: u16) -> Descriptor {
        debug_assert!(at < self.size);
        // SAFETY: inside the checked, 16-byte aligned table; any bit pattern is
        // a valid Descriptor; volatile, since the driver may write at any time.
        unsafe { self.desc.add(usize::from(at)).read_volatile() }
    }
}

impl Shared for Areas {
    fn avail_idx(&self) -> u16 {
        u16::from_le(self.avail_word(1).load(Ordering::Acquire))
    }
    fn avail_flags(&self) -> u16 {
        u16::from_le(self.avail_word(0).load(Ordering::Relaxed))
    }
    fn used_event(&self) -> u16 {
        u16::from_le(self.avail_word(2 + self.size).load(Ordering::Relaxed))
    }
    fn set_used_idx(&self, idx: u16) {
        self.used_word(1).store(idx.to_le(), Ordering::Release);
    }
    fn set_used_flags(&self, flags: u16) {
        self.used_word(0).store(flags.to_le(), Ordering::Relaxed);
    }
    fn set_avail_event(&self, idx: u16) {
        self.used_word(2 + 4 * self.size).store(idx.to_le(), Ordering::Relaxed);
    }
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

/// One chain's descriptors, read on demand; [`crate::chain::walk`] follows them.
#[derive(Debug)]
pub struct Chain<'ring> {
    areas: &'ring Areas,
    head: u16,
}

impl Chain<'_> {
    /// Index of the first descriptor; less than [`Chain::size`].
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Descriptors in the table.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.areas.size
    }

    /// Descriptor `at`, or `None` outside of the table. Each call reads guest
    /// memory again: call once per descriptor.
    #[must_use]
    pub fn descriptor(&self, at: u16) -> Option<Descriptor> {
        (at < self.areas.size).then(|| self.areas.descriptor(at))
    }
}

fn low(count: u64) -> u16 {
    let [low, high, ..] = count.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// A running split virtqueue.
#[derive(Debug)]
pub struct Ring {
    areas: Areas,
    layout: Layout,
    /// The queue size less one: where an index is in the ring.
    mask: u16,
    event_idx: bool,
    /// Counts what is fetched, for the journal: the low 16 bits are the avail index
    /// of the next chain.
    count: u64,
    /// The newest avail index read from the driver.
    seen_avail: u16,
    /// Used elements staged so far, and those that the driver was shown.
    next_used: u16,
    published: u16,
    /// Up to where the driver was asked whether it wants an interrupt.
    asked: u16,
    /// How far avail indices are ahead of used ones when nothing is in flight: 0,
    /// but with a front-end that gave another base.
    skew: u16,
    armed: bool,
    /// The first publish after a start interrupts whatever used_event says: what the driver
    /// was told before is not known.
    signal_once: bool,
    failed: bool,
    /// Where it is written down what is in flight.
    journal: Option<Journal>,
    /// Only we know of it, and it says nothing once the ring has stopped.
    ours: bool,
    /// Chains that an earlier back-end fetched and did not return, by their counts, last first.
    replay: Vec<(u64, u16)>,
    /// The last of them that was fetched, and `count` at that time: it is the newest fetch while that is the same.
    replayed: Option<(u64, (u64, u16))>,
}

impl Ring {
    /// A ring at `layout` that goes on at avail index `next_avail`
    /// (VHOST_USER_SET_VRING_BASE). used.idx goes on where the ring says.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::NotInMemory`], [`RingError::Misaligned`].
    pub fn new(
        memory: &Arc<GuestMemory>,
        layout: Layout,
        next_avail: u16,
        event_idx: bool,
    ) -> Result<Self, RingError> {
        if !layout.size.is_power_of_two() || layout.size > MAX_QUEUE_SIZE {
            return Err(RingError::Size(layout.size.into()));
        }
        let areas = Areas::map(&layout, memory)?;
        let used = u16::from_le(areas.used_word(1).load(Ordering::Relaxed));
        notify::disarm(&areas, event_idx);
        Ok(Self {
            areas,
            layout,
            mask: layout.size - 1,
            event_idx,
            count: next_avail.into(),
            seen_avail: next_avail,
            next_used: used,
            published: used,
            asked: used,
            skew: next_avail.wrapping_sub(used),
            armed: false,
            signal_once: true,
            failed: false,
            journal: None,
            ours: false,
            replay: Vec::new(),
            replayed: None,
        })
    }

    /// Keeps a journal in `region`, as queue number `queue`, and goes on where
    /// that says: with the chains that an earlier back-end left in flight. What
    /// the front-end gave as the base does not matter then: front-ends disagree
    /// on what it is after a crash.
    ///
    /// # Errors
    /// [`RingError::Journal`].
    pub fn journalled(mut self, region: &Arc<Region>, queue: u16) -> Result<Self, RingError> {
        let used = self.published;
        let offered = self.areas.avail_idx().wrapping_sub(used);
        let (journal, found) = Journal::open(region, queue, self.layout.size, used, offered)?;
        self.replay = found.chains;
        self.replay.reverse();
        // The chains found are those before it, and the next fetch comes after them.
        // A front-end's region is of one whose base is used.idx, whatever it says.
        self.skew = if self.ours { journal.skew() } else { 0 };
        self.seen_avail = used.wrapping_add(self.skew).wrapping_add(self.replays());
        self.count = found.after.wrapping_add(self.seen_avail.wrapping_sub(low(found.after)).into());
        self.journal = Some(journal);
        Ok(self)
    }

    /// Keeps a journal in `region`, of which the front-end knows nothing: what it
    /// gave as the base counts, unless an earlier process had begun with this very
    /// start, or had the ring running (`taken_over`).
    ///
    /// # Errors
    /// [`RingError::Journal`].
    pub fn journalled_by_us(
        mut self,
        region: &Arc<Region>,
        queue: u16,
        taken_over: bool,
    ) -> Result<Self, RingError> {
        self.ours = true;
        if taken_over || Journal::is_begun(region, queue, self.layout.size)? {
            return self.journalled(region, queue);
        }
        self.journal = Some(Journal::anew(region, queue, self.layout.size, self.published, self.skew)?);
        Ok(self)
    }

    /// True if it is written down what is in flight.
    #[must_use]
    pub fn is_journalled(&self) -> bool {
        self.journal.is_some()
    }

    /// True if the driver had it before: it did not begin anew.
    #[must_use]
    pub fn has_history(&self) -> bool {
        self.published != 0 || self.next_avail() != 0
    }

    /// True while chains of an earlier back-end are still to be fetched.
    #[must_use]
    pub fn is_replaying(&self) -> bool {
        !self.replay.is_empty()
    }

    /// How many chains of an earlier back-end are still to be fetched.
    #[must_use]
    pub fn replays(&self) -> u16 {
        // One for each head at most.
        u16::try_from(self.replay.len()).unwrap_or(self.layout.size)
    }

    /// used.idx as the driver has it.
    #[must_use]
    pub fn used(&self) -> u16 {
        self.published
    }

    /// The chains of an earlier back-end that are still to be fetched, by their counts.
    pub fn replayed(&self) -> impl Iterator<Item = (u64, u16)> {
        self.replay.iter().copied()
    }

    /// Fetches one of them out of turn.
    pub fn take_replayed(&mut self, head: u16) -> Option<(Head, Chain<'_>)> {
        let at = self.replay.iter().position(|&(_, other)| other == head)?;
        self.replay.remove(at);
        Some((Head::new(head), Chain { areas: &self.areas, head }))
    }

    /// The avail index of the next chain to fetch.
    fn next_avail(&self) -> u16 {
        low(self.count)
    }

    /// How many chains the driver may have made available since the last fetch: as
    /// many as the queue has room for. More, or fewer than none, break the ring.
    fn room(&self) -> u16 {
        self.layout.size.saturating_sub(self.in_flight())
    }

    /// Moves the ring to a new memory table, at the same front-end addresses.
    ///
    /// # Errors
    /// As [`Ring::new`]; then the ring stays where it was.
    pub fn rebind(&mut self, memory: &Arc<GuestMemory>) -> Result<(), RingError> {
        self.areas = Areas::map(&self.layout, memory)?;
        Ok(())
    }

    /// Fetches the next chain, if the driver has made one available.
    ///
    /// # Errors
    /// A protocol violation, once; from then on the ring looks empty.
    #[expect(clippy::should_implement_trait, reason = "the field's name for it; an iterator cannot lend")]
    pub fn next(&mut self) -> Result<Option<(Head, Chain<'_>)>, RingError> {
        if self.failed {
            return Ok(None);
        }
        let next = self.next_avail();
        if next == self.seen_avail {
            if let Some((count, head)) = self.replay.pop() {
                self.replayed = Some((self.count, (count, head)));
                return Ok(Some((Head::new(head), Chain { areas: &self.areas, head })));
            }
            let avail = self.areas.avail_idx();
            if avail.wrapping_sub(next) > self.room() {
                return self.fail(RingError::AvailIndex { avail, next });
            }
            self.seen_avail = avail;
            if avail == next {
                return Ok(None);
            }
        }
        let at = next & self.mask;
        let head = u16::from_le(self.areas.avail_word(2 + at).load(Ordering::Relaxed));
        if head >= self.layout.size {
            return self.fail(RingError::HeadRange(head));
        }
        if let Some(journal) = &self.journal {
            journal.fetched(head, self.count);
        }
        self.count = self.count.wrapping_add(1);
        if self.armed {
            self.armed = false;
            notify::disarm(&self.areas, self.event_idx);
        }
        Ok(Some((Head::new(head), Chain { areas: &self.areas, head })))
    }

    /// Undoes the newest fetch, for which nothing was done: the next fetch gives the chain again.
    pub fn put_back(&mut self, head: Head) {
        let head = head.redeem();
        if let Some((count, chain)) = self.replayed.take_if(|(count, _)| *count == self.count) {
            debug_assert_eq!((count, chain.1), (self.count, head), "the newest fetch");
            return self.replay.push(chain); // it stays marked
        }
        self.count = self.count.wrapping_sub(1);
        if let Some(journal) = &self.journal {
            journal.put_back(head);
        }
    }

    fn fail<T>(&mut self, error: RingError) -> Result<T, RingError> {
        self.failed = true;
        Err(error)
    }

    /// Returns a chain; `written` bytes of it were written by us. Staged: the
    /// driver sees it at the next [`Ring::show`] or [`Ring::publish`].
    pub fn push(&mut self, head: Head, written: u32) {
        let at = self.next_used & self.mask;
        let head = head.redeem();
        self.areas.write_used(at, head.into(), written);
        if let Some(journal) = &mut self.journal {
            journal.pushed(head);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver what was pushed, should it look. Gives how many that are.
    pub fn show(&mut self) -> u16 {
        let more = self.next_used.wrapping_sub(self.published);
        if more > 0 {
            self.published = self.next_used;
            if let Some(journal) = &self.journal {
                journal.publishing();
            }
            self.areas.set_used_idx(self.published);
            if let Some(journal) = &self.journal {
                journal.published(more, self.published);
            }
        }
        more
    }

    /// Shows the driver what was pushed. True: it wants an interrupt, for that or
    /// for what was shown since the last call.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        self.show();
        if self.asked == self.published {
            return false;
        }
        let old = std::mem::replace(&mut self.asked, self.published);
        let wants = notify::wants_signal(&self.areas, self.event_idx, old, self.published);
        std::mem::take(&mut self.signal_once) || wants
    }

    /// Chains that are there now and will be fetched.
    #[must_use]
    pub fn backlog(&mut self) -> u16 {
        if self.failed || self.is_replaying() {
            return 0;
        }
        let (avail, next) = (self.areas.avail_idx(), self.next_avail());
        if avail.wrapping_sub(next) <= self.room() {
            self.seen_avail = avail; // else `next` says what is wrong
        }
        self.seen_avail.wrapping_sub(next)
    }

    /// Chains that were shown to the driver and that it was not asked about.
    #[must_use]
    pub fn unasked(&self) -> u16 {
        self.published.wrapping_sub(self.asked)
    }

    /// Asks the driver for a kick at its next chain. True: nothing was there, we
    /// may sleep. False: call [`Ring::next`] again.
    #[must_use]
    pub fn arm(&mut self) -> bool {
        if self.is_replaying() {
            return false;
        }
        if self.failed || self.armed {
            // A failed ring never has work; an armed one stays armed, but what
            // came after the arming is behind a kick that may not be read yet.
            return self.failed || self.areas.avail_idx() == self.next_avail();
        }
        self.armed = notify::arm(&self.areas, self.event_idx, self.next_avail());
        if !self.armed {
            notify::disarm(&self.areas, self.event_idx);
        }
        self.armed
    }

    /// Bytes of the used ring.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        6 + 8 * u64::from(self.layout.size)
    }

    /// Chains fetched and not yet pushed.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        let owed = self.next_avail().wrapping_sub(self.skew).wrapping_sub(self.next_used);
        owed.wrapping_sub(self.replays())
    }

    /// True after a protocol violation.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failed
    }

    /// Ends the ring. What is in flight stays in the journal; kicks are asked for again, so
    /// that the next back-end is told of what comes.
    #[must_use]
    pub fn stop(self) -> RingState {
        debug_assert!(self.in_flight() == 0 || self.journal.is_some(), "a ring stops drained");
        debug_assert_eq!(self.next_used, self.asked, "a ring stops published");
        if self.ours
            && self.replay.is_empty()
            && self.in_flight() == 0
            && let Some(journal) = &self.journal
        {
            journal.end();
        }
        if !self.event_idx {
            self.areas.set_used_flags(0);
        }
        RingState { next_avail: self.next_avail() }
    }
}
