//! The fixed table of requests in flight of one worker, and the memory tables
//! that they point into.
//!
//! What it is: storage, made once. A [`Request`](crate::request::Request) is
//! decoded into a free [`InFlight`] and stays there until its chain is returned.
//!
//! What it is not: it decides nothing; [`crate::op`] does.
//!
//! Invariant: a memory table lives as long as a slot in use was decoded with it.
//!
//! ```text
//!   InFlight   hot ── head, op, status │ payload: its length, first runs │ … more runs │ cold
//!              what every plain request touches, side by side
//! ```

use std::sync::Arc;

use crate::backing::Backing;
use crate::disk::range_lock::RangeTicket;
use crate::durability::{Claim, Ended};
use crate::engine::Slot;
use crate::memory::{GuestMemory, HostSpan, RegionHint};
use crate::op::{Context, Op};
use crate::pages::{self, Iovecs, PageArray, PoolPages};
use crate::request::{Command, Ranges};
use crate::ring::Head;
use crate::stats::{Mark, Marks};

/// A request in flight. Lives in one place from fetch to return.
#[repr(C)]
#[derive(Debug)]
pub struct InFlight {
    /// The chain; `None` in a free slot.
    pub head: Option<Head>,
    /// Index of its queue.
    pub queue: u16,
    /// Its memory table.
    pub table: u16,
    /// Bytes that the driver can have written, the status byte included.
    pub writable: u32,
    /// It owns pool pages, a range or a durability claim, is large, is part of a joined operation, or is held;
    /// `finish` then releases them.
    pub holds: bool,
    /// The disk refused it, and it has not ended yet: see [`crate::hold`].
    pub held: bool,
    /// When it was fetched, from which queue, and what it is counted as.
    pub mark: Mark,
    /// Where the status byte is, in that table.
    pub status: HostSpan,
    /// How far it is.
    pub op: Op,
    /// The payload.
    pub pages: PageArray,
    /// What was asked for; for the log.
    pub command: Command,
    /// The next request of this joined operation.
    pub joined: Option<Slot>,
    /// Pool pages of the running piece.
    pub pool: PoolPages,
    /// The range of the disk that is locked.
    pub ticket: Option<RangeTicket>,
    /// The running operation makes something durable.
    pub claim: Option<Claim>,
    /// The last one that did.
    pub ended: Option<Ended>,
    /// What the kernel was given, if not the payload as it is.
    pub iovecs: Iovecs,
    /// The ranges of a DISCARD or WRITE_ZEROES.
    pub ranges: Ranges,
    /// Bytes of a large request; 0 for any other.
    pub owes: u64,
}

impl InFlight {
    fn new() -> Self {
        Self {
            head: None,
            queue: 0,
            table: 0,
            writable: 0,
            holds: false,
            held: false,
            mark: Mark::default(),
            status: HostSpan::new(0, 0),
            op: Op::IDLE,
            pages: PageArray::default(),
            command: Command::Flush,
            joined: None,
            pool: PoolPages::default(),
            ticket: None,
            claim: None,
            ended: None,
            iovecs: Iovecs::new(),
            ranges: Ranges::new(),
            owes: 0,
        }
    }

    /// The op, and what it is carried out against.
    #[inline]
    pub fn with_context<'a>(
        &'a mut self,
        backing: &'a Backing,
        (write_through, locks): (bool, bool),
        chunk: u64,
    ) -> (&'a mut Op, Context<'a>) {
        let Self { op, pages, ranges, .. } = self;
        (op, Context { backing, pages, ranges, write_through, locks, chunk })
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
    /// Shows which are in use, and since when.
    marks: Marks,
}

impl Slots {
    /// At most `max` slots, made when the queues first get that deep (and one
    /// ahead).
    #[must_use]
    pub fn new(max: u16, marks: Marks) -> Self {
        let (all, free) = (Vec::with_capacity(max.into()), Vec::with_capacity(max.into()));
        Self { all, free, max, marks }
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

    /// Takes the slot that [`Slots::peek_free`] showed, for a request that is fetched now.
    pub fn take(&mut self, mark: Mark) {
        if let Some(slot) = self.free.pop() {
            self.marks.began(slot, mark);
        }
    }

    /// Gives a slot back, for the next request to use while it is warm.
    pub fn give_back(&mut self, slot: Slot) {
        self.free.push(slot.0);
        self.marks.clear(slot.0);
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

    /// The same, to change.
    pub fn in_use_mut(&mut self) -> impl Iterator<Item = &mut InFlight> {
        self.all.iter_mut().map(AsMut::as_mut).filter(|s| s.head.is_some())
    }

    /// Takes the heads of all that are in flight.
    pub fn take_heads(&mut self) -> impl Iterator<Item = Head> {
        self.all.iter_mut().filter_map(|s| s.head.take())
    }

    /// Appends the buffers of one slot, its whole payload, to another's, which is then no more
    /// only its own; bytes that follow each other in one. False: they do not fit, and nothing
    /// was changed.
    pub fn join(&mut self, to: Slot, from: Slot) -> bool {
        let Ok([to, from]) = self.all.get_disjoint_mut([usize::from(to.0), usize::from(from.0)]) else {
            return false;
        };
        if to.joined.is_none() {
            let len = to.pages.len();
            to.pages.iovecs(0, len, &mut to.iovecs);
        }
        let room = to.iovecs.remaining_capacity();
        let mut rest = from.pages.runs();
        if let (Some(last), [first, others @ ..]) = (to.iovecs.last_mut(), rest)
            && last.iov_base.addr() + last.iov_len == first.addr()
            && others.len() <= room
        {
            last.iov_len += first.len();
            rest = others;
        }
        if rest.len() > to.iovecs.remaining_capacity() {
            return false;
        }
        to.iovecs.extend(rest.iter().copied().map(pages::iovec));
        true
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
    current: u16,
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
        if let Some(old) = self.entries.get_mut(usize::from(self.current))
            && old.users == 0
        {
            old.memory = None;
        }
        self.hint = RegionHint::default();
        let entry = Entry { memory: Some(memory), users: 0 };
        let at = self.entries.iter().position(|e| e.memory.is_none()).unwrap_or(self.entries.len());
        match self.entries.get_mut(at) {
            Some(free) => *free = entry,
            None => self.entries.push(entry),
        }
        // No more tables than requests in flight, and one.
        self.current = u16::try_from(at).unwrap_or(u16::MAX);
    }

    /// The current table and the hint, to translate with.
    pub fn lookup(&mut self) -> Option<(&GuestMemory, &mut RegionHint)> {
        Some((self.entries.get(usize::from(self.current))?.memory.as_deref()?, &mut self.hint))
    }

    /// The table of a slot.
    #[must_use]
    pub fn get(&self, table: u16) -> Option<&GuestMemory> {
        self.entries.get(usize::from(table))?.memory.as_deref()
    }

    /// A request decoded with the current table is in flight.
    pub fn enter(&mut self) -> u16 {
        if let Some(entry) = self.entries.get_mut(usize::from(self.current)) {
            entry.users += 1;
        }
        self.current
    }

    /// It is not any more; an old table without a request is unmapped.
    pub fn leave(&mut self, table: u16) {
        if let Some(entry) = self.entries.get_mut(usize::from(table)) {
            entry.users = entry.users.saturating_sub(1);
            if entry.users == 0 && table != self.current {
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
