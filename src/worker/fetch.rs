//! From a ring to a slot: chains are fetched, followed, decoded, and either begun
//! or given back.
//!
//! What it is: the first half of a turn.
//!
//! What it is not: what happens to a request from then on is [`super::carry_out`]'s.
//!
//! Invariants: nothing is fetched that there is no slot for; a queue takes as
//! many chains as the engine says before the others have their turn.

use super::Worker;
use super::observed::Ending;
use super::slots::InFlight;
use crate::chain;
use crate::complete::{self, Status};
use crate::device::Blame;
use crate::engine::Engine;
use crate::request::{self, Reject};
use crate::ring::{Head, RingError};
use crate::stats::queue::Count;
use crate::stats::{Mark, Operation, Run};
use crate::sys;

impl<E: Engine> Worker<E> {
    /// Takes chains from every ready queue. True: there is more to take.
    pub(super) fn fetch(&mut self) -> bool {
        let mut more = false;
        let limited = self.device.throttle.is_limited();
        self.now = sys::monotonic_ns();
        let count = self.served.len();
        // Each turn begins at another queue: those at the end get slots, too.
        self.first = if self.first + 1 < count { self.first + 1 } else { 0 };
        for at in (self.first..count).chain(0..self.first) {
            if let Some(&index) = self.served.get(at) {
                more |= self.fetch_queue(index, limited);
            }
        }
        more || self.owed.has_moved()
    }

    /// `limited`: the disk's limits may make a chain wait. One function for both: what it calls is inlined only once.
    fn fetch_queue(&mut self, index: u16, limited: bool) -> bool {
        let batch = self.engine.batch(self.slots.count_in_use());
        self.staged = 0;
        let others = self.served.len() - 1; // this one is served
        let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) else { return false };
        if queue.waits.is_some() && !self.is_its_turn(index) {
            return false;
        }
        let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) else { return false };
        let (chains, room) = (self.engine.chains(queue.parts.ring.backlog()), queue.room(others));
        self.mark = Mark::new(self.now, index);
        // An earlier back-end has charged what is replayed; the queue's other chains come in the next turn.
        let replays = if limited { queue.parts.ring.replays() } else { 0 };
        let (limited, most) = if replays > 0 { (false, replays) } else { (limited, u16::MAX) };
        (self.limits_count, self.group_busy) = (limited, 0);
        for _ in 0..chains.min(room).min(most) {
            if self.staged >= batch {
                return true;
            }
            let Some((slot, request)) = self.slots.peek_free() else { return false };
            let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) else { return false };
            if !queue.may_fetch() {
                return false;
            }
            match queue.parts.ring.next() {
                Ok(Some((head, chain))) => {
                    self.busy = true;
                    let Some((memory, hint)) = self.tables.lookup() else {
                        head.abandon(); // not reached: there is a table, if an empty one
                        return false;
                    };
                    let segments = &mut self.segments;
                    if let Err(why) = chain::walk(&chain, queue.parts.indirect, memory, hint, segments) {
                        self.refuse(index, head, why);
                        continue;
                    }
                    let promise = &self.promise;
                    let InFlight { pages, ranges, .. } = request;
                    match request::decode(head, segments, promise, memory, hint, pages, ranges) {
                        Ok(decoded) if memory.is_lost() => {
                            self.reject(index, decoded.head, Status::IoErr, 0);
                        }
                        Ok(decoded) => {
                            if self.limits_count
                                && let Some(Some(queue)) = self.queues.get_mut(usize::from(index))
                            {
                                let (command, payload) = (decoded.command, pages.len());
                                let verdict = queue.why_not_yet(
                                    &self.device.throttle,
                                    command,
                                    payload,
                                    ranges,
                                    &mut self.group_busy,
                                );
                                if let Some(waits) = verdict {
                                    queue.parts.ring.put_back(decoded.head);
                                    self.limited += u16::from(waits);
                                    return !waits;
                                }
                            }
                            request.head = Some(decoded.head);
                            request.status = decoded.status;
                            request.command = decoded.command;
                            request.writable = decoded.writable;
                            request.queue = index;
                            request.mark = self.mark.of(decoded.command.into());
                            request.table = self.tables.enter();
                            let mark = request.mark;
                            self.slots.take(mark);
                            self.begin(slot);
                        }
                        Err(Reject::Status(head, status, code, writable)) => {
                            // The place was found when the chain was decoded.
                            let _mapped = memory.write_byte(status, code.byte(), hint);
                            if let Some(log) = &self.log {
                                memory.guest_ranges(status, |guest, len| log.mark(guest, len));
                            }
                            self.reject(index, head, code, complete::used_length(writable, 0));
                        }
                        Err(Reject::Bare(head)) => {
                            self.malformed(index);
                            self.push(index, head, 0);
                        }
                    }
                }
                Ok(None) => return false, // still ready: `arm` says when it is not
                Err(why) => {
                    self.give_up(index, why);
                    return false;
                }
            }
        }
        chains <= room // else answers make room
    }

    /// Stops fetching from a ring that the driver broke.
    #[cold]
    fn give_up(&mut self, index: u16, why: RingError) {
        let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) else { return };
        queue.ready = false;
        if self.device.may_log(Blame::Guest) {
            tracing::error!(queue = index, "the driver broke the ring, it is not served any more: {why}");
        }
        if let Some(err) = &queue.parts.err {
            sys::signal(err);
        }
    }

    /// Returns a chain that is no request that can be served.
    #[cold]
    fn reject(&mut self, index: u16, head: Head, status: Status, written: u32) {
        self.count(Run::new(self.mark.of(Operation::Other), 0), status);
        let _looks = self.shows(Ending::Rejected(index), status);
        self.push(index, head, written);
    }

    /// Counts a chain that is returned without a status.
    #[cold]
    fn malformed(&mut self, index: u16) {
        self.tally.malformed += 1;
        if let Some(Some(queue)) = self.queues.get(usize::from(index)) {
            queue.counters.count(Count::Malformed);
        }
    }

    /// Returns a chain that could not be followed.
    #[cold]
    fn refuse(&mut self, index: u16, head: Head, why: chain::Malformed) {
        self.malformed(index);
        if self.device.may_log(Blame::Guest) {
            tracing::warn!(queue = index, "the driver made a chain that makes no sense: {why}");
        }
        self.push(index, head, 0);
    }
}
