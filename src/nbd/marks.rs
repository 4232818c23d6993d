//! Whether something that was answered may be gone with a server that was started anew.
//!
//! What it is: three numbers, here or where they outlive the process.
//!
//! What it is not: it sees no connection, and sends no flush.
//!
//! Invariant: once a connection was lost while something answered was not flushed, that stays known.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::mapping::Mapping;

/// See the head of the file.
#[derive(Debug, Default)]
pub struct Marks {
    /// Changes that were answered and are durable only after a flush; as many of these as are flushed; 1 once some may be
    /// gone.
    own: [AtomicU64; 3],
    kept: OnceLock<Mapping>,
}

impl Marks {
    fn words(&self) -> [&AtomicU64; 3] {
        let kept = self.kept.get().and_then(|kept| kept.words(0, 3));
        match kept {
            Some([changed, flushed, lost]) => [changed, flushed, lost],
            _ => self.own.each_ref(),
        }
    }

    /// Goes on with what earlier daemons noted there.
    pub fn keep_in(&self, kept: Mapping) {
        let _once = self.kept.set(kept);
    }

    /// A write, or zeroes, was answered, and is durable only after a flush.
    #[inline]
    pub fn note_change(&self) {
        let [changed, ..] = self.words();
        changed.fetch_add(1, Ordering::AcqRel);
    }

    /// What a flush that is sent now will make durable.
    #[inline]
    #[must_use]
    pub fn changed(&self) -> u64 {
        let [changed, ..] = self.words();
        changed.load(Ordering::Acquire)
    }

    /// A flush that was sent then ended well.
    #[inline]
    pub fn note_flush(&self, changed: u64) {
        let [_, flushed, _] = self.words();
        flushed.fetch_max(changed, Ordering::AcqRel);
    }

    /// How many changes were answered that no flush has made durable.
    #[must_use]
    pub fn unflushed(&self) -> u64 {
        let [changed, flushed, _] = self.words();
        changed.load(Ordering::Acquire).saturating_sub(flushed.load(Ordering::Acquire))
    }

    /// A connection was lost. How many changes may be gone with it, the first time that some may be.
    pub fn note_loss(&self) -> Option<u64> {
        let [.., lost] = self.words();
        let unflushed = self.unflushed();
        (unflushed > 0 && lost.swap(1, Ordering::AcqRel) == 0).then_some(unflushed)
    }

    /// True once something that was answered may be gone.
    #[must_use]
    pub fn has_lost(&self) -> bool {
        let [.., lost] = self.words();
        lost.load(Ordering::Acquire) != 0
    }
}
