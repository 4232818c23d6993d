//! Plugging: operations of one turn that follow each other on the disk become one, as the
//! block layer's plug does for bios.
//!
//! What it is: pure. The last operation that was made is held back until the next one is; if
//! that goes on where the first ends, the two are one.
//!
//! What it is not: it does not sort, and holds nothing back over a system call. Whose buffers
//! are whose is the caller's to know.
//!
//! Invariants: the requests of a joined operation each keep their own slot,
//! range and status; an operation that did not go through whole is taken apart,
//! and its requests go again one by one.
//!
//! ```text
//!   leader ──joined──► request ──joined──► request
//!   its iovecs are those of all; the others keep their payload, to go again with
//! ```

use crate::engine::Slot;
use crate::op::action::Submit;

/// The operation that is held back.
#[derive(Clone, Copy, Debug)]
pub struct Plug {
    /// Whose operation it is, and the request that joined it last.
    pub leader: Slot,
    /// See `leader`.
    pub last: Slot,
    /// All of it.
    pub submit: Submit,
}

impl Plug {
    /// An operation of one request.
    #[must_use]
    pub fn new(slot: Slot, submit: Submit) -> Self {
        Self { leader: slot, last: slot, submit }
    }

    /// True if `next` goes on where this ends, and both are no more than `longest` bytes.
    #[inline]
    #[must_use]
    pub fn takes(&self, next: &Submit, longest: u64) -> bool {
        let held = &self.submit;
        held.offset + held.len == next.offset
            && held.kind == next.kind
            && held.target == next.target
            && held.len + next.len <= longest
    }

    /// Joins a request, whose operation this takes and whose buffers were appended.
    pub fn join(&mut self, slot: Slot, next: &Submit) {
        self.last = slot;
        self.submit.len += next.len;
    }
}
