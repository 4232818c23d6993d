//! Plugging: requests of one turn that follow each other on the disk become one
//! operation, as the block layer's plug does for bios.
//!
//! What it is: the last operation that was made is held back until the next one
//! is; if that goes on where the first ends, the two are one.
//!
//! What it is not: it does not sort, and holds nothing back over a system call.
//!
//! Invariants: the requests of a joined operation each keep their own slot,
//! range and status; an operation that did not go through whole is taken apart,
//! and its requests go again one by one.
//!
//! ```text
//!   leader ──merged──► request ──merged──► request
//!   its iovecs are those of all; the others keep their own, to go again with
//! ```

use super::Worker;
use crate::engine::{Done, Engine, Op, Slot};

/// The operation that is held back.
#[derive(Clone, Copy, Debug)]
pub struct Plug {
    leader: Slot,
    last: Slot,
    op: Op,
    start: u64,
    end: u64,
}

impl<E: Engine> Worker<E> {
    /// Holds an operation back, or joins it with the one that is.
    pub(super) fn hold(&mut self, slot: Slot, op: Op, offset: u64, len: u64) {
        let longest = self.engine.max_joined();
        if let Some(plug) = &mut self.plug
            && plug.op == op
            && plug.end == offset
            && plug.end - plug.start + len <= longest
            && self.slots.join_iovecs(plug.leader, slot)
        {
            self.slots.get(plug.last).merged = Some(slot);
            plug.last = slot;
            plug.end += len;
            self.tally.merged += 1;
            return;
        }
        self.unplug();
        self.plug = Some(Plug { leader: slot, last: slot, op, start: offset, end: offset + len });
    }

    /// Stages the operation that was held back.
    #[inline]
    pub(super) fn unplug(&mut self) {
        if let Some(Plug { leader, op, start, end, .. }) = self.plug.take() {
            self.stage(leader, op, start, end - start);
        }
    }

    /// A joined operation ended: each request's part of it did, or each goes
    /// again by itself.
    pub(super) fn part(&mut self, done: Done) {
        let mut total = 0;
        let mut next = Some(done.slot);
        while let Some(slot) = next {
            let request = self.slots.get(slot);
            total += request.piece;
            next = request.merged;
        }
        let whole = done.result == Ok(total);
        let mut next = Some(done.slot);
        while let Some(slot) = next {
            let request = self.slots.get(slot);
            next = request.merged.take();
            if whole {
                let result = Ok(request.piece);
                self.ended(Done { slot, result });
            } else {
                request.alone = true;
                self.advance(slot);
            }
        }
    }
}
