//! Counters: what the daemon has done, for people.
//!
//! What it is: each worker's own counters, which only it writes, once a turn and not once a
//! request; the reader adds up those of all workers. Where there is a store they lie in the file of state
//! ([`crate::keep`]), and successors count on.
//!
//! What it is not: it decides nothing.
//!
//! Invariant: no two threads write the same counter, so none is a read-modify-write.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::memory::mapping::Mapping;

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
}

const NAMES: [&str; 8] =
    ["requests", "errors", "malformed", "bounced", "pool_waits", "merged", "syncs", "calls"];

impl Tally {
    fn counts(&self) -> [u64; 8] {
        let &Self { requests, errors, malformed, bounced, pool_waits, merged, syncs, calls } = self;
        [requests, errors, malformed, bounced, pool_waits, merged, syncs, calls]
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
    own: [AtomicU64; 8],
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

    /// The counters of a new worker.
    pub fn register(&self) -> Arc<Counters> {
        let mut inner = self.inner();
        let at = inner.workers.len() * STRIDE;
        let kept = inner.area.as_ref().map(|area| (Arc::clone(area), at));
        let counters = Arc::new(Counters { kept, ..Counters::default() });
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
