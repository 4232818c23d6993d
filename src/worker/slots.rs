//! The fixed table of requests in flight of one worker, and the memory tables
//! that they point into.
//!
//! What it is: storage, made once. A [`Request`](crate::request::Request) is
//! decoded into a free [`InFlight`] and stays there until its chain is returned.
//!
//! What it is not: it decides nothing; [`super::steps`] does.
//!
//! Invariant: a memory table lives as long as a slot in use was decoded with it.

use std::sync::Arc;

use crate::disk::range_lock::RangeTicket;
use crate::engine::Slot;
use crate::memory::{GuestMemory, HostSpan, RegionHint};
use crate::pages::{Iovecs, PageArray, PoolPages};
use crate::request::{Command, Ranges};
use crate::ring::Head;

/// What of a request is running or comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing runs; the next step is to be found.
    Ready,
    /// Guest pages and disk.
    Direct,
    /// A cover is read into pool pages.
    BounceRead {
        /// Bytes of the cover that are not wanted.
        skip: u64,
        /// Bytes that are.
        take: u64,
    },
    /// Pool pages, or zeroes, are written.
    BounceWrite,
    /// A block is read to be changed.
    ModifyRead {
        /// Where the block is.
        offset: u64,
        /// Bytes that stay.
        skip: u64,
        /// Bytes that change.
        take: u64,
    },
    /// The changed block is written.
    ModifyWrite {
        /// Bytes that it changes.
        take: u64,
    },
    /// A fallocate of this many bytes.
    Fallocate {
        /// Its length.
        len: u64,
    },
    /// Waits for an fdatasync.
    Sync,
}

/// A request in flight. Lives in one place from fetch to return.
#[derive(Debug)]
pub struct InFlight {
    /// The chain; `None` in a free slot.
    pub head: Option<Head>,
    /// Index of its queue.
    pub queue: u16,
    /// Its memory table.
    pub table: usize,
    /// Where the status byte is, in that table.
    pub status: HostSpan,
    /// What to do.
    pub command: Command,
    /// What runs.
    pub phase: Phase,
    /// The payload.
    pub pages: PageArray,
    /// The ranges of a DISCARD or WRITE_ZEROES, last first.
    pub ranges: Ranges,
    /// Where the transfer (or the current range) starts on the disk, bytes.
    pub offset: u64,
    /// Its length, bytes.
    pub len: u64,
    /// How much of it is done.
    pub done: u64,
    /// Zeroes are written, fallocate having been refused.
    pub by_writing: bool,
    /// The current range may be freed, not only zeroed.
    pub unmap: bool,
    /// Through the pool, the kernel having refused the guest's pages.
    pub force_pool: bool,
    /// Something was written that is not yet durable.
    pub dirty: bool,
    /// Bytes of the running operation that are this request's.
    pub piece: u64,
    /// The next request of a joined operation.
    pub merged: Option<Slot>,
    /// Was a part of a joined operation that failed; is not joined again.
    pub alone: bool,
    /// Operations in a row that moved nothing.
    pub retries: u8,
    /// Pool pages of the current piece.
    pub pool: Option<PoolPages>,
    /// The range of the disk that is locked.
    pub ticket: Option<RangeTicket>,
    /// What the kernel was given.
    pub iovecs: Iovecs,
}

impl InFlight {
    fn new() -> Self {
        Self {
            head: None,
            queue: 0,
            table: 0,
            status: HostSpan::new(0, 0),
            command: Command::Flush,
            phase: Phase::Ready,
            pages: PageArray::default(),
            ranges: Ranges::new(),
            offset: 0,
            len: 0,
            done: 0,
            by_writing: false,
            unmap: false,
            force_pool: false,
            dirty: false,
            piece: 0,
            merged: None,
            alone: false,
            retries: 0,
            pool: None,
            ticket: None,
            iovecs: Iovecs::new(),
        }
    }

    /// Makes it ready for a new request; pages and ranges are decode's.
    pub fn reset(&mut self) {
        self.phase = Phase::Ready;
        self.offset = 0;
        self.len = 0;
        self.done = 0;
        self.by_writing = false;
        self.force_pool = false;
        self.dirty = false;
        self.alone = false;
        self.retries = 0;
    }
}

/// All slots of a worker.
#[derive(Debug)]
pub struct Slots {
    /// Boxed: the kernel knows their addresses, and few queues are ever as deep
    /// as all of them.
    all: Vec<Box<InFlight>>,
    free: Vec<u16>,
    max: u16,
}

impl Slots {
    /// At most `max` slots, made when the queues first get that deep (and one
    /// ahead).
    #[must_use]
    pub fn new(max: u16) -> Self {
        Self { all: Vec::with_capacity(max.into()), free: Vec::with_capacity(max.into()), max }
    }

    /// The slot that the next request would get, without taking it.
    pub fn peek_free(&mut self) -> Option<(Slot, &mut InFlight)> {
        if self.free.is_empty() && self.any_free() {
            self.free.push(u16::try_from(self.all.len()).ok()?);
            self.all.push(Box::new(InFlight::new()));
        }
        let at = *self.free.last()?;
        self.all.get_mut(usize::from(at)).map(|s| (Slot(at), s.as_mut()))
    }

    /// Takes the slot that [`Slots::peek_free`] showed.
    pub fn take(&mut self) {
        self.free.pop();
    }

    /// Gives a slot back, for the next request to use while it is warm.
    pub fn give_back(&mut self, slot: Slot) {
        self.free.push(slot.0);
    }

    /// A slot.
    ///
    /// # Panics
    /// Never: slots are only made here.
    pub fn get(&mut self, slot: Slot) -> &mut InFlight {
        &mut self.all[usize::from(slot.0)]
    }

    /// True if a slot is free.
    #[must_use]
    pub fn any_free(&self) -> bool {
        !self.free.is_empty() || self.all.len() < usize::from(self.max)
    }

    /// True if a request is in flight.
    #[must_use]
    pub fn any_in_use(&self) -> bool {
        self.free.len() < self.all.len()
    }

    /// How many requests are in flight.
    #[must_use]
    pub fn count_in_use(&self) -> usize {
        self.all.len() - self.free.len()
    }

    /// Requests in flight.
    pub fn in_use(&self) -> impl Iterator<Item = &InFlight> {
        self.all.iter().map(AsRef::as_ref).filter(|s| s.head.is_some())
    }

    /// Takes the heads of all that are in flight.
    pub fn take_heads(&mut self) -> impl Iterator<Item = Head> {
        self.all.iter_mut().filter_map(|s| s.head.take())
    }

    /// Appends the iovecs of one slot to another's, bytes that follow each other
    /// in one. False: they do not fit, and nothing was changed.
    pub fn join_iovecs(&mut self, to: Slot, from: Slot) -> bool {
        let Ok([to, from]) = self.all.get_disjoint_mut([usize::from(to.0), usize::from(from.0)]) else {
            return false;
        };
        let room = to.iovecs.remaining_capacity();
        let mut rest = from.iovecs.as_slice();
        if let (Some(last), [first, others @ ..]) = (to.iovecs.last_mut(), rest)
            && last.iov_base.addr() + last.iov_len == first.iov_base.addr()
            && others.len() <= room
        {
            last.iov_len += first.iov_len;
            rest = others;
        }
        to.iovecs.try_extend_from_slice(rest).is_ok()
    }
}

#[derive(Debug)]
struct Entry {
    memory: Option<Arc<GuestMemory>>,
    users: usize,
}

/// The current memory table, and old ones that requests still point into.
#[derive(Debug)]
pub struct Tables {
    entries: Vec<Entry>,
    current: usize,
    /// For translations in the current table.
    pub hint: RegionHint,
}

impl Tables {
    /// No guest memory at all.
    #[must_use]
    pub fn new() -> Self {
        Self {
            entries: vec![Entry { memory: Some(Arc::default()), users: 0 }],
            current: 0,
            hint: RegionHint::default(),
        }
    }

    /// Replaces the current table; the old one stays while it is used.
    pub fn replace(&mut self, memory: Arc<GuestMemory>) {
        if let Some(old) = self.entries.get_mut(self.current)
            && old.users == 0
        {
            old.memory = None;
        }
        self.hint = RegionHint::default();
        let entry = Entry { memory: Some(memory), users: 0 };
        if let Some(at) = self.entries.iter().position(|e| e.memory.is_none()) {
            self.entries[at] = entry;
            self.current = at;
        } else {
            self.entries.push(entry);
            self.current = self.entries.len() - 1;
        }
    }

    /// The current table and the hint, to translate with.
    pub fn lookup(&mut self) -> Option<(&GuestMemory, &mut RegionHint)> {
        Some((self.entries.get(self.current)?.memory.as_deref()?, &mut self.hint))
    }

    /// The table of a slot.
    #[must_use]
    pub fn get(&self, table: usize) -> Option<&GuestMemory> {
        self.entries.get(table)?.memory.as_deref()
    }

    /// A request decoded with the current table is in flight.
    pub fn enter(&mut self) -> usize {
        if let Some(entry) = self.entries.get_mut(self.current) {
            entry.users += 1;
        }
        self.current
    }

    /// It is not any more; an old table that nobody uses is unmapped.
    pub fn leave(&mut self, table: usize) {
        let current = self.current;
        if let Some(entry) = self.entries.get_mut(table) {
            entry.users = entry.users.saturating_sub(1);
            if entry.users == 0 && table != current {
                entry.memory = None;
            }
        }
    }

    /// True if `request` may still touch the region at `guest`.
    #[must_use]
    pub fn uses_region(&self, request: &InFlight, guest: u64, len: u64) -> bool {
        let Some(memory) = self.get(request.table) else { return false };
        let mut hits = false;
        let mut each = |span: HostSpan| hits |= request.status.overlaps(span) || request.pages.touches(span);
        // A table without the region has no request in it either.
        let _absent = memory.translate(guest, len, &mut RegionHint::default(), &mut each);
        hits
    }
}

impl Default for Tables {
    fn default() -> Self {
        Self::new()
    }
}
