//! Counters: what the daemon has done, for people.
//!
//! What it is: each worker's own counters, which only it writes, once a turn and not once a
//! request, and when each request in flight was fetched; the reader adds up those of all workers. Where there is a store they lie in the file of state
//! ([`crate::keep`]), and successors count on.
//!
//! What it is not: it decides nothing.
//!
//! Invariant: no two threads write the same counter, so none is a read-modify-write.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::memory::mapping::Mapping;
use crate::sys;

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

const NAMES: [&str; 9] =
    ["requests", "errors", "malformed", "bounced", "pool_waits", "merged", "syncs", "calls", "held"];

impl Tally {
    fn counts(&self) -> [u64; NAMES.len()] {
        let &Self { requests, errors, malformed, bounced, pool_waits, merged, syncs, calls, held } = self;
        [requests, errors, malformed, bounced, pool_waits, merged, syncs, calls, held]
    }
}

/// Bytes between the counters of two workers: cache lines of their own, for they are written each turn.
const STRIDE: usize = 128;
/// Bytes of the counters of all workers, where they outlive this process.
pub const AREA: usize = 256 * STRIDE;

/// The counters of one worker.
#[derive(Debug, Default)]
pub struct Counters {
    /// Where they are kept for successors, and their place there; else here.
    kept: Option<(Arc<Mapping>, usize)>,
    own: [AtomicU64; NAMES.len()],
    /// Of each slot, when its request was fetched, in the unit of [`sys::coarse_time`]; 0: it is free.
    fetched: Box<[AtomicU32]>,
}

impl Counters {
    /// Adds what their worker counted and starts its count anew.
    pub fn add(&self, tally: &mut Tally) {
        for (total, more) in self.cells().iter().zip(std::mem::take(tally).counts()) {
            if more > 0 {
                total.store(total.load(Ordering::Relaxed) + more, Ordering::Relaxed);
            }
        }
    }

    /// The request in this slot was fetched then.
    #[inline]
    pub fn began(&self, slot: u16, then: u32) {
        if let Some(cell) = self.fetched.get(usize::from(slot)) {
            cell.store(then, Ordering::Relaxed);
        }
    }

    /// The request in this slot has ended.
    #[inline]
    pub fn ended(&self, slot: u16) {
        self.began(slot, 0);
    }

    fn cells(&self) -> &[AtomicU64] {
        self.kept.as_ref().and_then(|(area, at)| area.words(*at, self.own.len())).unwrap_or(&self.own)
    }
}

/// The counters of all workers.
#[derive(Debug, Default)]
pub struct Stats(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    area: Option<Arc<Mapping>>,
    workers: Vec<Arc<Counters>>,
}

impl Stats {
    /// Counts on in this area of [`AREA`] bytes, where earlier daemons counted, before any worker is registered.
    pub fn keep_in(&self, area: Mapping) {
        self.inner().area = Some(Arc::new(area));
    }

    /// The counters of a new worker with so many slots.
    pub fn register(&self, slots: u16) -> Arc<Counters> {
        let mut inner = self.inner();
        let at = inner.workers.len() * STRIDE;
        let kept = inner.area.as_ref().map(|area| (Arc::clone(area), at));
        let fetched = (0..slots).map(|_| AtomicU32::new(0)).collect();
        let counters = Arc::new(Counters { kept, fetched, ..Counters::default() });
        inner.workers.push(Arc::clone(&counters));
        counters
    }

    /// Every counter by its name, over all workers.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let inner = self.inner();
        let mut sums = [0; NAMES.len()];
        let mut add = |cells: &[AtomicU64]| {
            sums.iter_mut().zip(cells).for_each(|(sum, cell)| *sum += cell.load(Ordering::Relaxed));
        };
        match &inner.area {
            // Also of workers that an earlier daemon had.
            Some(area) => {
                (0..AREA).step_by(STRIDE).filter_map(|at| area.words(at, NAMES.len())).for_each(&mut add);
            }
            None => inner.workers.iter().for_each(|counters| add(&counters.own)),
        }
        NAMES.into_iter().zip(sums)
    }

    /// How many requests are in flight, and for how many tenths of a second the oldest of them.
    pub fn in_flight(&self) -> (u32, u32) {
        let now = sys::coarse_time();
        let workers = &self.inner().workers;
        let cells = workers.iter().flat_map(|counters| &counters.fetched);
        let fetched = cells.map(|cell| cell.load(Ordering::Relaxed)).filter(|&then| then != 0);
        fetched.fold((0, 0), |(count, oldest), then| (count + 1, oldest.max(now.saturating_sub(then))))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The requests that an area of [`AREA`] bytes counts.
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
