//! The counters of one queue: requests and bytes by operation, how long they took, errors, notifications.
//!
//! What it is: cells that the worker which serves the queue writes, and [`Totals`], what a reader makes of them.
//!
//! What it is not: what does not belong to one queue (fdatasyncs, pool pages) is counted by worker.
//!
//! Invariant: a queue is served by one worker at a time, so no cell is written by two threads.
//!
//! ```text
//!   word   0   of each operation: requests, bytes, nanoseconds
//!         24   by Count
//!         32   of each operation: a histogram
//! ```

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::histogram::{self, BUCKETS, Histogram};
use super::{Cells, Operation, add};

/// Where a queue's counts by [`Count`] are, and its histograms.
const COUNTS: usize = 24;
const HISTOGRAMS: usize = 32;
/// Words of a queue: whole cache lines of its own.
pub(super) const WORDS: usize = (HISTOGRAMS + Operation::ALL.len() * BUCKETS).next_multiple_of(16);

/// What is counted of a queue beside its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// Requests that were answered with VIRTIO_BLK_S_IOERR.
    IoErrors,
    /// With VIRTIO_BLK_S_UNSUPP.
    Unsupported,
    /// Chains that were returned without a status: they are not among the requests.
    Malformed,
    /// Requests that were held because the disk refused them.
    Held,
    /// Notifications by the driver.
    Kicks,
    /// Interrupts sent to it.
    Calls,
}

/// See the head of the file.
#[derive(Debug)]
pub struct QueueCounters(Cells);

impl QueueCounters {
    pub(super) fn new(cells: Cells) -> Self {
        Self(cells)
    }

    /// Sets all to 0.
    pub(super) fn clear(&self) {
        self.0.words().iter().for_each(|cell| cell.store(0, Relaxed));
    }

    /// Requests ended, each of which took so long.
    pub(super) fn ended(&self, operation: Operation, requests: u64, bytes: u64, ns: u64) {
        let words = self.0.words();
        let at = operation.index();
        if let Some([count, sum, time, ..]) = words.get(at * 3..) {
            add(count, requests);
            add(sum, bytes);
            add(time, ns.wrapping_mul(requests));
        }
        if let Some(cell) = words.get(HISTOGRAMS + at * BUCKETS + histogram::bucket(ns)) {
            add(cell, requests);
        }
    }

    /// Counts one more.
    #[inline]
    pub fn count(&self, what: Count) {
        if let Some(cell) = self.0.words().get(COUNTS + what as usize) {
            add(cell, 1);
        }
    }
}

/// Of one operation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes that they named.
    pub bytes: u64,
    /// How long they took, from fetch to return, together.
    pub time: Duration,
    /// How long each of them took.
    pub latency: Histogram,
}

/// What was counted, of one queue or several.
#[derive(Clone, Debug)]
pub struct Totals(Vec<u64>);

impl Default for Totals {
    fn default() -> Self {
        Self(vec![0; WORDS])
    }
}

impl Totals {
    /// Adds the counters of a queue.
    pub fn add(&mut self, queue: &QueueCounters) {
        for (sum, cell) in self.0.iter_mut().zip(queue.0.words()) {
            *sum = sum.wrapping_add(AtomicU64::load(cell, Relaxed));
        }
    }

    fn word(&self, at: usize) -> u64 {
        self.0.get(at).copied().unwrap_or(0)
    }

    /// Of an operation.
    #[must_use]
    pub fn of(&self, operation: Operation) -> Done {
        let at = operation.index();
        let buckets = HISTOGRAMS + at * BUCKETS;
        Done {
            requests: self.word(3 * at),
            bytes: self.word(3 * at + 1),
            time: Duration::from_nanos(self.word(3 * at + 2)),
            latency: Histogram::of(self.0.get(buckets..buckets + BUCKETS).unwrap_or_default()),
        }
    }

    /// Of what else is counted.
    #[must_use]
    pub fn count(&self, what: Count) -> u64 {
        self.word(COUNTS + what as usize)
    }
}
