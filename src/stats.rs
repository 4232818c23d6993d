//! Counters: what the daemon has done, for people.
//!
//! What it is: each worker's own counters, which only it writes, once a turn and not once a
//! request; the reader adds up those of all workers.
//!
//! What it is not: it decides nothing.
//!
//! Invariant: no two threads write the same counter, so none is a read-modify-write.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

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

/// The counters of one worker. On cache lines of their own, for it writes them each turn.
#[repr(align(128))]
#[derive(Debug, Default)]
pub struct Counters([AtomicU64; 8]);

impl Counters {
    /// Adds what their worker counted and starts its count anew.
    pub fn add(&self, tally: &mut Tally) {
        for (total, more) in self.0.iter().zip(std::mem::take(tally).counts()) {
            if more > 0 {
                total.store(total.load(Ordering::Relaxed) + more, Ordering::Relaxed);
            }
        }
    }
}

/// The counters of all workers.
#[derive(Debug, Default)]
pub struct Stats(Mutex<Vec<Arc<Counters>>>);

impl Stats {
    /// The counters of a new worker.
    pub fn register(&self) -> Arc<Counters> {
        let counters = Arc::<Counters>::default();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&counters));
        counters
    }

    /// Every counter by its name, over all workers.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let mut sums = [0; NAMES.len()];
        for counters in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            for (sum, count) in sums.iter_mut().zip(&counters.0) {
                *sum += count.load(Ordering::Relaxed);
            }
        }
        NAMES.into_iter().zip(sums)
    }
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
