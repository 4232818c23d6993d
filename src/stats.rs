//! Counters: what the daemon has done, for people.
//!
//! What it is: relaxed atomics, added to once a turn and not once a request.
//!
//! What it is not: it decides nothing.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

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

/// The sum over all workers.
#[derive(Debug, Default)]
pub struct Stats {
    requests: AtomicU64,
    errors: AtomicU64,
    malformed: AtomicU64,
    bounced: AtomicU64,
    pool_waits: AtomicU64,
    merged: AtomicU64,
    syncs: AtomicU64,
    calls: AtomicU64,
}

impl Stats {
    fn each(&self, tally: &Tally) -> [(&'static str, &AtomicU64, u64); 8] {
        [
            ("requests", &self.requests, tally.requests),
            ("errors", &self.errors, tally.errors),
            ("malformed", &self.malformed, tally.malformed),
            ("bounced", &self.bounced, tally.bounced),
            ("pool_waits", &self.pool_waits, tally.pool_waits),
            ("merged", &self.merged, tally.merged),
            ("syncs", &self.syncs, tally.syncs),
            ("calls", &self.calls, tally.calls),
        ]
    }

    /// Every counter by its name.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.each(&Tally::default()).map(|(name, total, _)| (name, total.load(Ordering::Relaxed))).into_iter()
    }

    /// Adds what a worker counted and starts its count anew.
    pub fn add(&self, tally: &mut Tally) {
        for (_, total, more) in self.each(&std::mem::take(tally)) {
            if more > 0 {
                total.fetch_add(more, Ordering::Relaxed);
            }
        }
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
