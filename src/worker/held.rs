//! Requests that the disk refused: held and tried again, failed, or left to the next daemon.
//!
//! What it is: the worker's side of [`crate::hold`].
//!
//! What it is not: it has no clock; the control thread says when it is tried again.
//!
//! Invariants: a queue with a held request fetches nothing until that request has ended; a held request has nothing
//! locked and no pool pages, so that requests of other queues wait for none.

use super::slots::{InFlight, Tables};
use super::waiting::For;
use super::{Stopping, Worker};
use crate::engine::{Engine, Slot};
use crate::hold::{AtStop, Retry};
use crate::op::action::{Failure, Input};
use crate::stats::queue::Count;

impl<E: Engine> Worker<E> {
    /// A request failed on the disk: it is held, or its guest gets an I/O error.
    #[cold]
    pub(super) fn refused(&mut self, slot: Slot, failure: Failure) {
        let request = self.slots.get(slot);
        let Some(Some(queue)) = self.queues.get_mut(usize::from(request.queue)) else {
            return self.fail(slot, failure); // not reached: a queue stays until it is drained
        };
        let must_end = matches!(queue.stopping, Some(Stopping { held: AtStop::Fail, .. }))
            || queue.outside
            || !self.retiring.is_empty();
        if must_end || !self.device.holding.wants(request.command, failure) {
            return self.fail(slot, failure);
        }
        request.op.let_go();
        if let Some(ticket) = request.ticket.take() {
            self.device.disk.ranges.unlock(ticket);
        }
        // It may wait for long, and a drain does not wait for it.
        self.owed.end(std::mem::take(&mut request.owes));
        request.holds = true;
        if !std::mem::replace(&mut request.held, true) {
            queue.held += 1;
            self.tally.held += 1;
            queue.counters.count(Count::Held);
            self.device.hold(request.command, failure);
        }
        queue.resting += 1;
        self.waiting.push(slot, For::Retry(failure));
    }

    /// Carries held requests out again.
    pub(super) fn retry(&mut self, which: Retry) {
        self.wake_held(
            |_, _, failure| which.includes(failure),
            |worker, slot, _| worker.step(slot, Input::Again),
        );
    }

    /// Answers held requests with an I/O error.
    pub(super) fn fail_held(&mut self, which: impl Fn(&InFlight, &Tables) -> bool) {
        self.wake_held(|request, tables, _| which(request, tables), Self::fail);
    }

    /// Gives a queue's held requests up; they are still in the journal.
    pub(super) fn leave_held(&mut self, index: u16) {
        self.wake_held(
            |request, _, _| request.queue == index,
            |worker, slot, _| {
                let request = worker.slots.get(slot);
                (request.held, request.holds) = (false, false);
                if let Some(head) = request.head.take() {
                    head.abandon();
                }
                let table = request.table;
                worker.tables.leave(table);
                worker.slots.give_back(slot);
                worker.device.leave_held();
            },
        );
    }

    fn wake_held(
        &mut self,
        which: impl Fn(&InFlight, &Tables, Failure) -> bool,
        then: impl Fn(&mut Self, Slot, Failure),
    ) {
        for _ in 0..self.waiting.len() {
            let Some((slot, what)) = self.waiting.pop() else { return };
            let request = self.slots.get(slot);
            match what {
                For::Retry(failure) if which(request, &self.tables, failure) => {
                    if let Some(Some(queue)) = self.queues.get_mut(usize::from(request.queue)) {
                        queue.resting -= 1;
                    }
                    then(self, slot, failure);
                }
                _ => self.waiting.push(slot, what),
            }
        }
    }
}
