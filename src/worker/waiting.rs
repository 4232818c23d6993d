//! Requests that wait, and what wakes them.
//!
//! What it is: one list for everything that a request can wait for.
//!
//! What it is not: requests that wait for the disk are not here, and chains that wait for a
//! slot are still in their rings.
//!
//! Invariant: whatever is waited for, the worker looks at the whole list once a turn and
//! tries again what may go on, in the order of arrival; a request holds nothing that another
//! one waits for but the range that it changes.
//!
//! ```text
//!   Pool    a request that gives its pool pages back        this worker
//!   Range   a request that ends, of any worker              its eventfd, by the range table
//!   Sync    the fdatasync of this number, judged            this worker
//!   Judged  the last operation that overlapped its own      its eventfd, by Durability
//!   Room    room on the disk, or the operator's word        a command, by the control thread
//! ```

use std::collections::VecDeque;

use crate::durability::Ended;
use crate::engine::Slot;
use crate::op::action::{Failure, Need};

/// What a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum For {
    /// Pool pages, or a range.
    Need(Need),
    /// The fdatasync with this number, or a later one.
    Sync(u64),
    /// Judgement on an operation that ended.
    Judgement(Ended),
    /// What made it fail to be over; see [`crate::hold`].
    Retry(Failure),
}

/// See the head of the file.
#[derive(Debug)]
pub struct Waiting {
    list: VecDeque<(Slot, For)>,
}

impl Waiting {
    /// For at most `slots` requests.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        Self { list: VecDeque::with_capacity(slots) }
    }

    /// A request waits from now on.
    pub fn push(&mut self, slot: Slot, what: For) {
        self.list.push_back((slot, what));
    }

    /// The request that has waited longest. It is tried again, or pushed again.
    pub fn pop(&mut self) -> Option<(Slot, For)> {
        self.list.pop_front()
    }

    /// How many wait.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Fdatasync `number` ended: those that waited for it, or an earlier one, are judged with it.
    pub fn synced(&mut self, number: u64, ended: Ended) {
        for (_, what) in &mut self.list {
            if matches!(what, For::Sync(n) if *n <= number) {
                *what = For::Judgement(ended);
            }
        }
    }
}
