//! The block device that all workers serve: the disk, what requests are judged
//! by, and the cache mode the guest chose.
//!
//! What it is not: it has no rings and no threads.
//!
//! Invariant: shared and immutable but for a few atomics.

use std::sync::atomic::{AtomicBool, Ordering};

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
}

impl Device {
    /// A device over an open disk.
    #[must_use]
    pub fn new(disk: Disk, geometry: Geometry, writeback: bool) -> Self {
        Self { disk, geometry, stats: Stats::default(), writeback: AtomicBool::new(writeback) }
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
