//! Whether a guest relies on the image's lock, noted where it outlives the process.
//!
//! What it is: one word, here or in memory that a successor gets.
//!
//! What it is not: it takes no lock.
//!
//! Invariant: while it says so, the image is this daemon's client's or was taken from it. So a successor that does not find
//! its predecessor's lock knows that another client may have had the image.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::mapping::Mapping;

/// Where it is, in bytes; before it are the numbers of [`crate::nbd::marks`], for a store can outlive a change of --disk.
const AT: usize = 24;

/// See the head of the file.
#[derive(Debug, Default)]
pub struct Held {
    own: AtomicU64,
    kept: Option<Mapping>,
}

impl Held {
    /// As an earlier daemon left it there, if one did.
    #[must_use]
    pub fn kept_in(kept: Mapping) -> Self {
        Self { kept: Some(kept), ..Self::default() }
    }

    fn word(&self) -> &AtomicU64 {
        match self.kept.as_ref().and_then(|kept| kept.words(AT, 1)) {
            Some([word]) => word,
            _ => &self.own,
        }
    }

    /// After the lock was taken: true. Before it is given up: false.
    pub fn set(&self, held: bool) {
        self.word().store(held.into(), Ordering::Release);
    }

    /// A guest relies on the lock.
    #[must_use]
    pub fn get(&self) -> bool {
        self.word().load(Ordering::Acquire) != 0
    }
}
