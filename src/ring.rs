//! Virtqueues, device side.
//!
//! What it is: the types that every ring layout shares. [`split`] is the one
//! layout served today; a packed ring would stand beside it and make and take
//! the same [`Head`]s.
//!
//! What it is not: it does not know what a chain holds ([`crate::chain`]).
//!
//! Invariant: a [`Head`] comes out of `Ring::next` and goes into `Ring::push` (or,
//! before anything was done for it, `Ring::put_back`), and there is no other way to make or to end one: every chain is
//! returned exactly once, by type. Debug builds panic on a lost one.

pub mod notify;
pub mod split;

use thiserror::Error;

use crate::inflight::JournalError;

/// The largest queue served. Virtio allows 32768; no front-end asks for more
/// than 1024.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// What makes a ring unusable: the first four when it is to start, the others
/// while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RingError {
    /// Not a power of two, 0, or more than [`MAX_QUEUE_SIZE`].
    #[error("queue size {0} is not a power of two between 1 and {MAX_QUEUE_SIZE}")]
    Size(u32),
    /// A part of the ring is not wholly in one guest memory region.
    #[error("the {0} does not lie wholly in guest memory")]
    NotInMemory(&'static str),
    /// A part of the ring is not aligned as virtio 2.7 asks.
    #[error("the {0} is not aligned")]
    Misaligned(&'static str),
    /// The ring was not given its addresses.
    #[error("the ring has no addresses yet")]
    NoAddresses,
    /// The driver moved avail.idx back, or to more chains than the queue holds.
    #[error("avail index {avail} after {next} would be more chains than the queue holds")]
    AvailIndex {
        /// avail.idx as read.
        avail: u16,
        /// The next one that we would fetch.
        next: u16,
    },
    /// A head outside of the descriptor table.
    #[error("descriptor head {0} is outside of the table")]
    HeadRange(u16),
    /// The in-flight region cannot be used for this ring.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// A descriptor chain that the driver gave us and is owed: its head index.
#[must_use = "a chain that is not pushed back is lost to the driver"]
#[derive(Debug)]
pub struct Head {
    index: u16,
    #[cfg(debug_assertions)]
    owed: bool,
}

impl Head {
    fn new(index: u16) -> Self {
        Self {
            index,
            #[cfg(debug_assertions)]
            owed: true,
        }
    }

    /// The index in the descriptor table; for logs.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Ends the debt: the ring writes the index to the used ring.
    #[cfg_attr(not(debug_assertions), expect(unused_mut, reason = "only the debug build marks the head"))]
    fn redeem(mut self) -> u16 {
        #[cfg(debug_assertions)]
        {
            self.owed = false;
        }
        self.index
    }

    /// Gives the head up because its ring is gone for good: the front-end left
    /// in the middle of a hang, or this process ends.
    pub(crate) fn abandon(self) {
        let _index = self.redeem();
    }
}

#[cfg(debug_assertions)]
impl Drop for Head {
    fn drop(&mut self) {
        if self.owed && !std::thread::panicking() {
            panic!("chain with head {} was never returned to the driver", self.index);
        }
    }
}
