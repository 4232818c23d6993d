//! Whose lock a guest relies on, noted where it outlives the process.
//!
//! What it is: three numbers, here or in memory that a successor gets: whether a guest relies on a lock, of which image, and
//! which client has it.
//!
//! What it is not: it takes no lock, and asks no cluster.
//!
//! Invariant: from the moment at which a guest can read or write until its front-end has left, a guest relies on a lock here.
//! So a successor that does not find the lock knows that another client may have had the image.
//!
//! ```text
//!          lock taken         given up for a successor, or about to be broken by it
//!   not ───────────────► held ─────────────────────────────────────────────────────► moving
//!    ▲                    │ ▲                                                          │
//!    └── front-end left ──┘ └──────── lock taken, or another client seen ──────────────┘
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

use crate::hash::fnv1a;
use crate::memory::mapping::Mapping;

/// Where it is, in bytes; before it are the numbers of [`crate::nbd::marks`], for a store can outlive a change of --disk.
const AT: usize = 24;

const NOT: u64 = 0;
const HELD: u64 = 1;
const MOVING: u64 = 2;

/// See the head of the file.
#[derive(Debug, Default)]
pub struct Held {
    own: [AtomicU64; 3],
    kept: Option<Mapping>,
}

/// What a predecessor left of an image on whose lock its guest relies.
#[derive(Clone, Copy, Debug)]
pub struct Relied {
    client: u64,
    /// The lock was given up, or was about to be broken, for a successor.
    pub may_be_free: bool,
}

impl Relied {
    /// True if this client had the lock.
    #[must_use]
    pub fn is_on(self, client: &str) -> bool {
        self.client == fnv1a(client.as_bytes())
    }

    /// Another client has the lock, or may have had it. `owners`: who has it, alive or not; `dead`: the clients of earlier
    /// daemons of this disk.
    #[must_use]
    pub fn was_taken(self, owners: &[String], dead: &[String]) -> bool {
        let is_other = |owner: &String| !dead.contains(owner) && !self.is_on(owner);
        owners.iter().any(is_other) || owners.is_empty() && !self.may_be_free
    }
}

impl Held {
    /// As an earlier daemon left it there, if one did.
    #[must_use]
    pub fn kept_in(kept: Mapping) -> Self {
        Self { kept: Some(kept), ..Self::default() }
    }

    fn words(&self) -> [&AtomicU64; 3] {
        match self.kept.as_ref().and_then(|kept| kept.words(AT, 3)) {
            Some([state, image, client]) => [state, image, client],
            _ => self.own.each_ref(),
        }
    }

    /// This client has the lock of this image.
    pub fn hold(&self, image: &str, client: &str) {
        let [state, of, by] = self.words();
        of.store(fnv1a(image.as_bytes()), Ordering::Relaxed);
        by.store(fnv1a(client.as_bytes()), Ordering::Relaxed);
        state.store(HELD, Ordering::Release);
    }

    /// The lock is about to be free, for the guest's next daemon.
    pub fn give_to_successor(&self) {
        let [state, ..] = self.words();
        let _or_none_relies = state.compare_exchange(HELD, MOVING, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// It is not: the client that had it has it yet, or another one has it already.
    pub fn is_not_free(&self) {
        let [state, ..] = self.words();
        let _or_none_relies = state.compare_exchange(MOVING, HELD, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// No guest relies on a lock.
    pub fn forget(&self) {
        let [state, ..] = self.words();
        state.store(NOT, Ordering::Release);
    }

    /// What a guest relies on, if it is this image's lock.
    #[must_use]
    pub fn relied(&self, image: &str) -> Option<Relied> {
        let [state, of, by] = self.words();
        let state = state.load(Ordering::Acquire);
        let is_this = of.load(Ordering::Relaxed) == fnv1a(image.as_bytes());
        (state != NOT && is_this)
            .then(|| Relied { client: by.load(Ordering::Relaxed), may_be_free: state == MOVING })
    }
}

#[cfg(test)]
mod tests {
    use super::Held;

    #[test]
    fn a_lock_that_is_not_where_it_was_was_taken() {
        let name = |text: &str| vec![text.to_owned()];
        let held = Held::default();
        assert!(held.relied("image").is_none());
        held.hold("image", "mine");
        assert!(held.relied("another").is_none());
        for (moves, owners, dead, was_taken) in [
            (false, name("mine"), vec![], false), // a start between the two forgot the name
            (false, vec![], name("mine"), true),
            (false, name("other"), name("mine"), true),
            (true, name("mine"), name("mine"), false),
            (true, vec![], vec![], false),
            (true, name("other"), vec![], true),
            // One that broke the lock, took it, and died before it could note that.
            (true, name("next"), name("next"), false),
        ] {
            held.hold("image", "mine");
            if moves {
                held.give_to_successor();
            }
            let relied = held.relied("image").expect("a guest relies on it");
            assert_eq!(relied.was_taken(&owners, &dead), was_taken, "{moves} {owners:?} {dead:?}");
        }
        // What another client did to it in between is not forgotten.
        held.is_not_free();
        assert!(held.relied("image").is_some_and(|relied| relied.was_taken(&[], &[])));
        held.forget();
        held.give_to_successor();
        held.is_not_free();
        assert!(held.relied("image").is_none());
    }
}
