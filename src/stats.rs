//! Counters: what the daemon has done, for people.
//!
//! What it is: each worker's own counters, and those of each queue that it serves; only it writes them, most of them once a
//! turn and not once a request. Each slot shows what is in flight there, and since when. A reader adds up those of all
//! workers and queues. Where there is a store they lie in the file of state ([`crate::keep`]), and successors count on.
//!
//! What it is not: it decides nothing. A reader waits for no worker, and no worker for a reader: both only load and store.
//!
//! Invariant: no two threads write the same counter, so none is a read-modify-write.
//!
//! ```text
//!   area   0        a line for each worker                     of every version
//!          WORKERS  the layout of the rest, the disk's own     since layout 1
//!          …        queue 0, queue 1, …, each once it is served
//! ```

pub mod histogram;
pub mod queue;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use self::queue::{QueueCounters, Totals};
use crate::complete::Status;
use crate::memory::mapping::Mapping;
use crate::request::Command;
use crate::sys;

/// Queues that there can be.
const QUEUES: usize = 256;
/// Requests in flight of one worker.
pub const SLOTS: usize = 256;

/// What one worker counted since it last told.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Requests returned to the driver.
    pub requests: u64,
    /// Of those, not with VIRTIO_BLK_S_OK.
    pub errors: u64,
    /// Chains returned without a status.
    pub malformed: u64,
    /// Pieces that went through pool pages.
    pub bounced: u64,
    /// Times that a request had to wait for pool pages.
    pub pool_waits: u64,
    /// Requests that went as a part of another's operation.
    pub merged: u64,
    /// fdatasync calls.
    pub syncs: u64,
    /// Interrupts sent.
    pub calls: u64,
    /// Requests that were held because the disk refused them.
    pub held: u64,
}

/// In the order in which they lie in the area: another one comes last.
const NAMES: [&str; 9] =
    ["requests", "errors", "malformed", "bounced", "pool_waits", "merged", "syncs", "calls", "held"];

impl Tally {
    fn counts(&self) -> [u64; NAMES.len()] {
        let &Self { requests, errors, malformed, bounced, pool_waits, merged, syncs, calls, held } = self;
        [requests, errors, malformed, bounced, pool_waits, merged, syncs, calls, held]
    }
}

/// What a request is counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// VIRTIO_BLK_T_IN.
    Read,
    /// VIRTIO_BLK_T_OUT.
    Write,
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// Requests for the serial number, and those that are none that can be served.
    Other,
    /// VIRTIO_BLK_T_DISCARD.
    Discard,
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    Zeroes,
}

impl Operation {
    /// All.
    pub const ALL: [Self; 6] =
        [Self::Read, Self::Write, Self::Flush, Self::Other, Self::Discard, Self::Zeroes];

    /// As status and metrics call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Other => "other",
            Self::Discard => "discard",
            Self::Zeroes => "zeroes",
        }
    }

    fn index(self) -> usize {
        self as usize
    }
}

impl From<Command> for Operation {
    #[inline]
    fn from(command: Command) -> Self {
        match command {
            Command::Read(_) => Self::Read,
            Command::Write(_) => Self::Write,
            Command::Flush => Self::Flush,
            Command::GetId => Self::Other,
            Command::Discard => Self::Discard,
            Command::WriteZeroes => Self::Zeroes,
        }
    }
}

/// What a slot shows of the request in it: when it was fetched, of which queue, and what it is.
///
/// ```text
///   63             11 10       3 2         0
///   │ time, in 16 ns │  queue  │ operation │     all 0: the slot is free
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark(u64);

impl Mark {
    const TIME: u32 = 11;
    /// Nanoseconds of a unit, as a power of two: the time wraps after four years.
    const UNIT: u32 = 4;

    /// Of requests that are fetched from this queue now, by [`sys::monotonic_ns`]; they lack their operation.
    #[inline]
    #[must_use]
    pub fn new(now: u64, queue: u16) -> Self {
        Self(now >> Self::UNIT << Self::TIME | u64::from(queue & 0xff) << 3)
    }

    /// Of a request of this kind.
    #[inline]
    #[must_use]
    pub fn of(self, operation: Operation) -> Self {
        Self(self.0 | (operation as u64 + 1))
    }

    fn queue(self) -> u16 {
        u16::try_from(self.0 >> 3 & 0xff).unwrap_or(0)
    }

    fn operation(self) -> Option<Operation> {
        let at = usize::try_from(self.0 & 7).ok()?.checked_sub(1)?;
        Operation::ALL.get(at).copied()
    }

    /// Nanoseconds from then to `now`.
    #[must_use]
    pub fn age(self, now: u64) -> u64 {
        let units = (now >> Self::UNIT).wrapping_sub(self.0 >> Self::TIME) << Self::TIME >> Self::TIME;
        // A clock that is read on another CPU may be behind.
        if units >> (63 - Self::TIME) == 1 { 0 } else { units << Self::UNIT }
    }
}

/// Requests that ended after each other and differ in nothing that is counted: they are counted at once.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)] // two sums side by side would be added as one vector, which takes more instructions
pub struct Run {
    requests: u64,
    mark: Mark,
    bytes: u64,
}

impl Run {
    /// A run of one request.
    #[must_use]
    pub fn new(mark: Mark, bytes: u64) -> Self {
        Self { requests: 1, mark, bytes }
    }

    /// Counts one more, if it is one of the run's.
    #[inline(always)]
    #[must_use]
    pub fn takes(&mut self, mark: Mark, bytes: u64) -> bool {
        let is_one = self.mark == mark;
        if is_one {
            self.requests = self.requests.wrapping_add(1);
            self.bytes = self.bytes.wrapping_add(bytes);
        }
        is_one
    }

    /// Its queue; `None`: it is empty.
    #[inline]
    #[must_use]
    pub fn queue(&self) -> Option<u16> {
        (self.requests > 0).then(|| self.mark.queue())
    }

    /// Counts its requests, which ended now.
    pub fn end(&mut self, queue: &QueueCounters, tally: &mut Tally, now: u64) {
        let Self { mark, requests, bytes } = std::mem::take(self);
        tally.requests += requests;
        if let Some(operation) = mark.operation() {
            queue.ended(operation, requests, bytes, mark.age(now));
        }
    }
}

/// One thread writes it.
#[inline]
fn add(cell: &AtomicU64, more: u64) {
    cell.store(cell.load(Relaxed).wrapping_add(more), Relaxed);
}

/// Bytes between the counters of two workers: cache lines of their own, for they are written each turn.
const STRIDE: usize = 128;
/// Bytes of the counters of all workers, where they outlive this process.
pub const WORKERS: usize = 256 * STRIDE;
/// Bytes in front of the first queue's counters: the layout, and the disk's own counters.
const HEAD: usize = 4096;
/// Bytes of all counters, where they outlive this process.
pub const AREA: usize = WORKERS + HEAD + QUEUES * 8 * queue::WORDS;

/// Of the words at [`WORKERS`]: which layout the rest has, then what [`Event`] says, and which queues have counters.
const LAYOUT: usize = 0;
const EVENTS: usize = 1;
const SERVED: usize = 12;
const HEAD_WORDS: usize = SERVED + QUEUES / 64;
/// Another layout of queues has another number. What was counted in a layout that this program does not know begins anew.
const THIS_LAYOUT: u64 = u64::from_ne_bytes(*b"vublk\0\0\x01");

/// What happens to a disk, and is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// When the first daemon began to serve it: nanoseconds of CLOCK_MONOTONIC.
    Began,
    /// A front-end said its first message.
    FrontEnd,
    /// Requests were carried out again that an earlier daemon, or another back-end, left in flight.
    Replayed,
    /// A daemon took over from one that had stopped for it.
    Upgrade,
    /// From one that had died.
    Crash,
}

/// Counters where they are: in the file of state, or on the heap.
#[derive(Clone, Debug)]
enum Cells {
    Kept(Arc<Mapping>, usize, usize),
    Own(Arc<[AtomicU64]>),
}

impl Cells {
    fn new(area: Option<&Arc<Mapping>>, at: usize, count: usize) -> Self {
        match area {
            Some(area) => Self::Kept(Arc::clone(area), at, count),
            None => Self::Own((0..count).map(|_| AtomicU64::new(0)).collect()),
        }
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        match self {
            Self::Kept(area, at, count) => area.words(*at, *count).unwrap_or_default(),
            Self::Own(cells) => cells,
        }
    }
}

/// The counters of one worker.
#[derive(Debug)]
pub struct Counters {
    cells: Cells,
    marks: Marks,
}

impl Counters {
    /// What the worker's slots show.
    #[must_use]
    pub fn marks(&self) -> Marks {
        self.marks.clone()
    }

    /// Adds what their worker counted and starts its count anew.
    pub fn add(&self, tally: &mut Tally) {
        for (total, more) in self.cells.words().iter().zip(std::mem::take(tally).counts()) {
            if more > 0 {
                add(total, more);
            }
        }
    }
}

/// What the slots of a worker show.
#[derive(Clone, Debug)]
pub struct Marks(Arc<[AtomicU64; SLOTS]>);

impl Default for Marks {
    fn default() -> Self {
        Self(Arc::new([const { AtomicU64::new(0) }; SLOTS]))
    }
}

impl Marks {
    /// A request is in this slot.
    #[inline]
    pub fn began(&self, slot: u16, mark: Mark) {
        self.of(slot).store(mark.0, Relaxed);
    }

    /// The slot is free.
    #[inline]
    pub fn clear(&self, slot: u16) {
        self.of(slot).store(0, Relaxed);
    }

    /// There is no slot beyond the last one, and no bound to be checked.
    #[inline]
    fn of(&self, slot: u16) -> &AtomicU64 {
        const _: () = assert!(SLOTS == 1 << u8::BITS);
        let [slot, _] = slot.to_le_bytes();
        &self.0[usize::from(slot)]
    }
}

/// How many requests are in flight, and how old the oldest is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InFlight {
    /// How many.
    pub requests: u32,
    /// Since the oldest of them was fetched.
    pub oldest: Duration,
}

impl InFlight {
    fn add(&mut self, age: Duration) {
        self.requests += 1;
        self.oldest = self.oldest.max(age);
    }
}

/// All counters of a disk.
#[derive(Debug)]
pub struct Stats(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    area: Option<Arc<Mapping>>,
    head: Cells,
    workers: Vec<Arc<Counters>>,
    /// Also those that only an earlier daemon served.
    queues: BTreeMap<u16, Arc<QueueCounters>>,
}

impl Default for Stats {
    fn default() -> Self {
        let inner = Inner {
            area: None,
            head: Cells::new(None, 0, HEAD_WORDS),
            workers: Vec::new(),
            queues: BTreeMap::new(),
        };
        inner.begin();
        Self(Mutex::new(inner))
    }
}

impl Inner {
    /// Makes sense of what is there, or begins anew.
    fn begin(&self) {
        let words = self.head.words();
        let Some(layout) = words.get(LAYOUT) else { return };
        if layout.load(Relaxed) != THIS_LAYOUT {
            words.iter().for_each(|word| word.store(0, Relaxed));
            layout.store(THIS_LAYOUT, Relaxed);
        }
        if let Some(began) = words.get(EVENTS + Event::Began as usize)
            && began.load(Relaxed) == 0
        {
            began.store(sys::monotonic_ns(), Relaxed);
        }
    }

    fn queue_at(&self, index: u16) -> QueueCounters {
        let at = WORKERS + HEAD + usize::from(index) * 8 * queue::WORDS;
        QueueCounters::new(Cells::new(self.area.as_ref(), at, queue::WORDS))
    }

    /// The word that says whether a queue has counters, and its bit there.
    fn served(&self, index: u16) -> Option<(&AtomicU64, u64)> {
        let index = usize::from(index);
        Some((self.head.words().get(SERVED + index / 64)?, 1 << (index % 64)))
    }
}

impl Stats {
    /// Counts on in this area of [`AREA`] bytes, where earlier daemons counted, before any worker is registered.
    pub fn keep_in(&self, area: Mapping) {
        let mut inner = self.inner();
        let area = Arc::new(area);
        inner.head = Cells::new(Some(&area), WORKERS, HEAD_WORDS);
        inner.area = Some(area);
        inner.begin();
        let is_served =
            |index: &u16| inner.served(*index).is_some_and(|(word, bit)| word.load(Relaxed) & bit != 0);
        let served: Vec<u16> = (0..=255).filter(is_served).collect();
        let queues = served.into_iter().map(|index| (index, Arc::new(inner.queue_at(index)))).collect();
        inner.queues = queues;
    }

    /// The counters of a new worker.
    pub fn register(&self) -> Arc<Counters> {
        let mut inner = self.inner();
        let at = inner.workers.len() * STRIDE;
        let cells = Cells::new(inner.area.as_ref(), at, NAMES.len());
        let counters = Arc::new(Counters { cells, marks: Marks::default() });
        inner.workers.push(Arc::clone(&counters));
        counters
    }

    /// The counters of a queue, for the worker that serves it.
    pub fn queue(&self, index: u16) -> Arc<QueueCounters> {
        let mut inner = self.inner();
        if let Some(known) = inner.queues.get(&index) {
            return Arc::clone(known);
        }
        let queue = Arc::new(inner.queue_at(index));
        // What lies there is of no layout, or of another one.
        queue.clear();
        if let Some((word, bit)) = inner.served(index) {
            word.store(word.load(Relaxed) | bit, Relaxed);
        }
        inner.queues.insert(index, Arc::clone(&queue));
        queue
    }

    /// Something happened, so often. Told by the disk's control thread, or before it runs.
    pub fn note(&self, event: Event, times: u64) {
        if let Some(cell) = self.inner().head.words().get(EVENTS + event as usize) {
            add(cell, times);
        }
    }

    /// How often something happened.
    #[must_use]
    pub fn times(&self, event: Event) -> u64 {
        self.inner().head.words().get(EVENTS + event as usize).map_or(0, |cell| cell.load(Relaxed))
    }

    /// How long the disk has been served, by this daemon and those before it.
    #[must_use]
    pub fn served_for(&self) -> Duration {
        Duration::from_nanos(sys::monotonic_ns().saturating_sub(self.times(Event::Began)))
    }

    /// Every counter of workers by its name, over all of them.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let (area, workers) = {
            let inner = self.inner();
            (inner.area.clone(), inner.workers.clone())
        };
        let mut sums = [0_u64; NAMES.len()];
        let mut add = |cells: &[AtomicU64]| {
            sums.iter_mut().zip(cells).for_each(|(sum, cell)| *sum = sum.wrapping_add(cell.load(Relaxed)));
        };
        match &area {
            // Also of workers that an earlier daemon had.
            Some(area) => {
                (0..WORKERS).step_by(STRIDE).filter_map(|at| area.words(at, NAMES.len())).for_each(&mut add);
            }
            None => workers.iter().for_each(|counters| add(counters.cells.words())),
        }
        NAMES.into_iter().zip(sums)
    }

    /// What was counted of each queue.
    #[must_use]
    pub fn queues(&self) -> Vec<(u16, Arc<QueueCounters>)> {
        self.inner().queues.iter().map(|(&index, queue)| (index, Arc::clone(queue))).collect()
    }

    /// What was counted of all queues.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        self.queues().iter().for_each(|(_, queue)| totals.add(queue));
        totals
    }

    /// What is in flight, of each queue that has something.
    #[must_use]
    pub fn in_flight_by_queue(&self) -> BTreeMap<u16, InFlight> {
        let workers = self.inner().workers.clone();
        let now = sys::monotonic_ns();
        let mut all = BTreeMap::<_, InFlight>::new();
        let marks =
            workers.iter().flat_map(|counters| counters.marks.0.iter()).map(|cell| Mark(cell.load(Relaxed)));
        for mark in marks.filter(|mark| *mark != Mark::default()) {
            all.entry(mark.queue()).or_default().add(Duration::from_nanos(mark.age(now)));
        }
        all
    }

    /// What is in flight.
    #[must_use]
    pub fn in_flight(&self) -> InFlight {
        self.in_flight_by_queue().into_values().fold(InFlight::default(), |all, queue| InFlight {
            requests: all.requests + queue.requests,
            oldest: all.oldest.max(queue.oldest),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kind of error that a status is.
#[must_use]
pub fn error_of(status: Status) -> Option<queue::Count> {
    match status {
        Status::Ok => None,
        Status::IoErr => Some(queue::Count::IoErrors),
        Status::Unsupp => Some(queue::Count::Unsupported),
    }
}

/// The requests that an area of [`WORKERS`] bytes counts.
#[must_use]
pub fn requests(area: &[u8]) -> u64 {
    let first = |slot: &[u8]| slot.first_chunk().map_or(0, |word| u64::from_ne_bytes(*word));
    area.chunks(STRIDE).fold(0, |sum, slot| sum.wrapping_add(first(slot)))
}

/// `requests=1 errors=0 …`, one line.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (name, count)) in self.counts().enumerate() {
            let space = if at == 0 { "" } else { " " };
            write!(f, "{space}{name}={count}")?;
        }
        Ok(())
    }
}
