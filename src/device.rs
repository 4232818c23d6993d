//! The block device that all workers serve: the disk, what requests are judged
//! by, and the cache mode the guest chose.
//!
//! What it is not: it has no rings and no threads.
//!
//! Invariant: shared and immutable but for a few atomics.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
    /// But for its capacity, which may grow.
    geometry: Geometry,
    capacity: AtomicU64,
    /// Counters.
    pub stats: Stats,
    writeback: AtomicBool,
    guest_quota: Mutex<Quota>,
    disk_quota: Mutex<Quota>,
}

/// Whose doing a message is about: a guest cannot use up the disk's lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The driver's.
    Guest,
    /// The backing store's.
    Disk,
}

#[derive(Debug, Default)]
struct Quota {
    since: Option<Instant>,
    lines: u32,
}

/// Lines that a guest or its disk can make us log in each [`LOG_WINDOW`].
const LOG_LINES: u32 = 10;
/// Of those, messages; one says that others are left out, one how many were.
const LOG_MESSAGES: u32 = LOG_LINES - 2;
const LOG_WINDOW: Duration = Duration::from_secs(10);

impl Device {
    /// A device over an open disk.
    #[must_use]
    pub fn new(disk: Disk, geometry: Geometry, writeback: bool) -> Self {
        Self {
            disk,
            capacity: AtomicU64::new(geometry.capacity),
            geometry,
            stats: Stats::default(),
            writeback: AtomicBool::new(writeback),
            guest_quota: Mutex::default(),
            disk_quota: Mutex::default(),
        }
    }

    /// True if a line that a guest, or its disk, can provoke may be logged now.
    /// Only asked where something is wrong, never on the way of a good request.
    #[must_use]
    pub fn may_log(&self, blame: Blame) -> bool {
        let quota = match blame {
            Blame::Guest => &self.guest_quota,
            Blame::Disk => &self.disk_quota,
        };
        let mut quota = quota.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if quota.since.is_none_or(|since| now.duration_since(since) >= LOG_WINDOW) {
            if quota.lines > LOG_MESSAGES {
                tracing::warn!("{} messages like the next one were left out", quota.lines - LOG_MESSAGES);
            }
            *quota = Quota { since: Some(now), lines: 0 };
        }
        quota.lines = quota.lines.saturating_add(1);
        if quota.lines == LOG_MESSAGES + 1 {
            tracing::warn!(
                "the next messages about this {blame:?} are left out, for at most {} s",
                LOG_WINDOW.as_secs()
            );
        }
        quota.lines <= LOG_MESSAGES
    }

    /// What requests are judged by, as it is now.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry { capacity: self.capacity.load(Ordering::Relaxed), ..self.geometry }
    }

    /// Sets the capacity, in sectors of 512 bytes, for whoever asks from now on.
    pub fn set_capacity(&self, sectors: u64) {
        self.capacity.store(sectors, Ordering::Relaxed);
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
