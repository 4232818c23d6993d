//! The block device that all workers serve: the disk, what requests are judged
//! by, and the cache mode the guest chose.
//!
//! What it is not: it has no rings and no threads.
//!
//! Invariant: shared and immutable but for a few atomics.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::disk::Disk;
use crate::request::Geometry;
use crate::stats::Stats;

/// See the head of the file.
#[derive(Debug)]
pub struct Device {
    /// The backing store.
    pub disk: Disk,
    /// What requests are judged by.
    pub geometry: Geometry,
    /// Counters.
    pub stats: Stats,
    writeback: AtomicBool,
    log_quota: Mutex<(Option<Instant>, u32)>,
}

/// Lines that a guest or its disk can make us log in each [`LOG_WINDOW`].
const LOG_LINES: u32 = 10;
const LOG_WINDOW: Duration = Duration::from_secs(10);

impl Device {
    /// A device over an open disk.
    #[must_use]
    pub fn new(disk: Disk, geometry: Geometry, writeback: bool) -> Self {
        Self {
            disk,
            geometry,
            stats: Stats::default(),
            writeback: AtomicBool::new(writeback),
            log_quota: Mutex::default(),
        }
    }

    /// True if a line that the guest can provoke may be logged now. Only asked
    /// where something is wrong, never on the way of a good request.
    #[must_use]
    pub fn may_log(&self) -> bool {
        let mut quota = self.log_quota.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if quota.0.is_none_or(|since| now.duration_since(since) >= LOG_WINDOW) {
            *quota = (Some(now), 0);
        }
        quota.1 = quota.1.saturating_add(1);
        if quota.1 == LOG_LINES {
            tracing::warn!(
                "the next messages about this guest are left out, for at most {} s",
                LOG_WINDOW.as_secs()
            );
        }
        quota.1 < LOG_LINES
    }

    /// False: a write is durable before it is answered.
    #[must_use]
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }

    /// Sets the cache mode for every request that completes from now on. After
    /// turning it off, [`Disk::sync`] makes what came before durable.
    pub fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::Release);
    }
}
