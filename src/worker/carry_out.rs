//! Carries out what a request's machine asks for, one action after another.
//!
//! What it is: the hands of [`crate::op`]: operations are built and joined here, bytes are
//! copied, waits are entered and left, chains are returned.
//!
//! What it is not: it decides nothing about a request.
//!
//! Invariants: a request is finished exactly once; a FLUSH is answered by an fdatasync that
//! was submitted after it was fetched, and both by [`crate::durability`]'s word; what a request
//! holds beyond its slot (pool pages, a range) it gives back with its last need of it.
//!
//! ```text
//!   begin ─► action ─► submit ─ … ─► done ─┐        need ─► got, or the waiting list
//!              ▲   └─► need, copy ─────────┤        resume ◄───────────┘
//!              └───────── step ◄───────────┘        finish ─► ring
//! ```

use super::observed::{self, Ending};
use super::owed::SMALL;
use super::plug::Plug;
use super::slots::InFlight;
use super::waiting::For;
use super::{SLOTS, SYNC, Worker};
use crate::complete::{self, Status};
use crate::device::Blame;
use crate::durability::Ended;
use crate::engine::{Done, Engine, Io, Kind, Outcome, Slot, Target};
use crate::op::Op;
use crate::op::action::{Action, Buffer, Copy, Failure, Input, Need, Submit};
use crate::request::Command;
use crate::stats::{self, Run};

/// Attempts at an fdatasync that are not executed before it counts as failed.
const MAX_SYNC_ATTEMPTS: u8 = 16;

impl<E: Engine> Worker<E> {
    /// Begins a freshly decoded request.
    #[inline]
    pub(super) fn begin(&mut self, slot: Slot) {
        let modes = (self.device.durability.is_write_through(), self.locks);
        let request = self.slots.get(slot);
        let command = request.command;
        let (_, cx) = request.with_context(&self.device.disk.backing, modes, self.chunk);
        if let Some((op, submit)) = Op::begin_plain(command, cx) {
            request.op = op;
            observed::begins(request);
            return self.submit(slot, submit);
        }
        if request.pages.len() > SMALL && !self.begin_large(slot) {
            return; // there is no room for it yet
        }
        let request = self.slots.get(slot);
        observed::begins(request);
        let (_, cx) = request.with_context(&self.device.disk.backing, modes, self.chunk);
        let (op, action) = Op::begin(command, cx);
        request.op = op;
        self.carry_out(slot, action);
    }

    /// Tells a request what happened, and does what it asks for.
    pub(super) fn step(&mut self, slot: Slot, input: Input) {
        let action = self.next_action(slot, input);
        self.carry_out(slot, action);
    }

    fn next_action(&mut self, slot: Slot, input: Input) -> Action {
        let modes = (self.device.durability.is_write_through(), self.locks);
        let request = self.slots.get(slot);
        let (op, cx) = request.with_context(&self.device.disk.backing, modes, self.chunk);
        op.step(input, cx)
    }

    fn carry_out(&mut self, slot: Slot, mut action: Action) {
        loop {
            if self.slots.get(slot).holds && !uses_pool(&action) {
                let Self { slots, pool, .. } = self;
                pool.give_back(&mut slots.get(slot).pool);
            }
            let input = match action {
                Action::Submit(submit) => return self.submit(slot, submit),
                Action::Finish(status) => return self.finish(slot, status),
                Action::Fail(failure) => return self.refused(slot, failure),
                Action::Copy(copy) => Input::Copied(self.copy(slot, copy)),
                Action::Need(need) => match self.get(slot, need) {
                    Some(input) => input,
                    None => return,
                },
            };
            action = self.next_action(slot, input);
        }
    }

    /// Stages an operation, or holds it back to be joined with the next one.
    #[inline(always)]
    fn submit(&mut self, slot: Slot, submit: Submit) {
        if !self.plugging || !submit.joinable {
            return self.stage(slot, &submit);
        }
        if let Some(plug) = &mut self.plug
            && plug.takes(&submit, self.engine.max_joined())
            && self.slots.join(plug.leader, slot)
        {
            let last = self.slots.get(plug.last);
            (last.joined, last.holds) = (Some(slot), true);
            plug.join(slot, &submit);
            self.tally.merged += 1;
            return;
        }
        self.unplug();
        self.plug = Some(Plug::new(slot, submit));
    }

    /// Stages the operation that was held back.
    #[inline]
    pub(super) fn unplug(&mut self) {
        if let Some(Plug { leader, submit, .. }) = self.plug.take() {
            self.stage(leader, &submit);
        }
    }

    /// The one place where operations are given to the engine.
    #[inline(always)]
    #[expect(unsafe_code, reason = "hands the slot's addresses to the engine")]
    fn stage(&mut self, slot: Slot, submit: &Submit) {
        let &Submit { target, kind, offset, len, buffer, own_thread, .. } = submit;
        let request = self.slots.get(slot);
        let (iovecs, iovec_count) = if buffer == Buffer::Guest(0) && len == request.pages.len() {
            (request.pages.as_iovecs(), request.pages.run_count())
        } else {
            let InFlight { pages, pool, iovecs, joined, .. } = request;
            match buffer {
                Buffer::Guest(_) if joined.is_some() => {} // those of all are there
                Buffer::Guest(from) => pages.iovecs(from, len, iovecs),
                Buffer::Pool => self.pool.iovecs(pool, len, iovecs),
                Buffer::Zeroes => self.pool.zeroes(len, iovecs),
                Buffer::Nothing => iovecs.clear(),
            }
            (iovecs.as_ptr(), iovecs.len())
        };
        if kind != Kind::Read {
            if kind.is_durable() {
                (request.claim, request.holds) = (Some(self.device.durability.begin()), true);
            }
            if let Some(changes) = &self.changes {
                changes.mark(offset, len);
            }
        }
        let iovec_count = u32::try_from(iovec_count).unwrap_or(0);
        let io = Io { slot, kind, target, own_thread, offset, len, iovecs, iovec_count };
        self.staged += 1;
        // SAFETY: the iovecs are in the slot, which is boxed and not reused
        // before its Done; they name guest pages of a table that the slot keeps,
        // or pool pages that it holds. The engine is dropped before both.
        unsafe { self.engine.queue(io) }
    }

    /// An operation ended.
    #[inline]
    pub(super) fn done(&mut self, done: Done) {
        let Done { slot, outcome } = done;
        if let Outcome::Moved(bytes) = outcome
            && slot != SYNC
        {
            let write_through = self.device.durability.is_write_through();
            let request = self.slots.get(slot);
            if !request.holds && request.op.is_done_by(bytes, write_through) {
                return self.finish(slot, Status::Ok);
            }
        }
        self.done_in_part(done);
    }

    /// An operation ended that is not all of its request: it was short or failed, is to be
    /// judged, or was several requests'.
    fn done_in_part(&mut self, Done { slot, outcome }: Done) {
        if let Outcome::NotExecuted(errno) = outcome {
            self.device.say_not_executed(errno);
        }
        if slot == SYNC {
            return self.synced(outcome);
        }
        let request = self.slots.get(slot);
        let ended = request
            .claim
            .take()
            .map(|claim| self.device.durability.end(claim, Kind::Write { dsync: true }, outcome));
        if request.joined.is_none() {
            request.ended = ended.or(request.ended);
            return self.step(slot, Input::Ended(outcome));
        }
        let mut total = 0;
        let mut next = Some(slot);
        while let Some(slot) = next {
            let request = self.slots.get(slot);
            total += request.pages.len();
            next = request.joined;
        }
        let whole = outcome == Outcome::Moved(total);
        let mut next = Some(slot);
        while let Some(slot) = next {
            let request = self.slots.get(slot);
            next = request.joined.take();
            if ended.is_some() {
                (request.ended, request.holds) = (ended, true);
            }
            let its_part = Outcome::Moved(request.pages.len());
            self.step(slot, if whole { Input::Ended(its_part) } else { Input::Apart });
        }
    }

    /// Copies between the guest's pages and the pool's. False: the guest's memory was lost,
    /// and these are not its bytes.
    #[must_use]
    fn copy(&mut self, slot: Slot, copy: Copy) -> bool {
        let InFlight { pages, pool, table, .. } = self.slots.get(slot);
        let Some(memory) = self.tables.get(*table) else { return false };
        let mut whole = true;
        match copy {
            Copy::FromGuest { payload, pool: at, len } => {
                let mut done = payload;
                self.pool.parts(pool, at, len, |part| {
                    let mut to = part;
                    pages.spans(done, to.len() as u64, |span| {
                        let (now, later) = std::mem::take(&mut to).split_at_mut(span.len());
                        whole &= memory.read_span(span, now);
                        done += now.len() as u64;
                        to = later;
                    });
                });
                whole && !memory.is_lost()
            }
            Copy::ToGuest { payload, pool: at, len } => {
                let mut done = payload;
                self.pool.parts(pool, at, len, |part| {
                    let mut from = &*part;
                    pages.spans(done, from.len() as u64, |span| {
                        let (now, later) = from.split_at(span.len().min(from.len()));
                        whole &= memory.write_span(span, now);
                        done += now.len() as u64;
                        from = later;
                    });
                });
                whole
            }
            Copy::Zero { pool: at, len } => {
                self.pool.parts(pool, at, len, |part| part.fill(0));
                true
            }
            Copy::Serial => {
                let padding = [0; 64];
                let mut rest = self.promise.serial.as_slice();
                pages.spans(0, pages.len(), |mut span| {
                    while !span.is_empty() {
                        let source = if rest.is_empty() { &padding } else { rest };
                        let len = span.len().min(source.len());
                        whole &= memory.write_span(span.slice(0, len), &source[..len]);
                        rest = rest.get(len..).unwrap_or_default();
                        span = span.slice(len, usize::MAX);
                    }
                });
                whole
            }
        }
    }

    /// Gets what a request needs. `None`: it waits.
    fn get(&mut self, slot: Slot, need: Need) -> Option<Input> {
        let request = self.slots.get(slot);
        let durability = &self.device.durability;
        let got = match need {
            Need::Pool(bytes) => self.pool.take(bytes).map(|pages| {
                self.tally.bounced += 1;
                let len = self.pool.len_of(&pages);
                (request.pool, request.holds) = (pages, true);
                Input::Pool(len)
            }),
            Need::Range { start, end, modifies } => {
                return self.get_range(slot, need, (start, end), modifies);
            }
            Need::Sync if durability.sync_failed() => Some(Input::Durable(false)),
            Need::Sync => {
                self.sync_wanted = true;
                self.waiting.push(slot, For::Sync(self.syncs + 1));
                return None;
            }
            Need::Judgement => match request.ended {
                Some(ended) => return self.judge(slot, ended),
                None => Some(Input::Durable(!durability.sync_failed())), // not reached
            },
        };
        if got.is_none() {
            self.tally.pool_waits += 1;
            self.hold_up(slot, need);
        }
        got
    }

    fn get_range(
        &mut self,
        slot: Slot,
        need: Need,
        (start, end): (u64, u64),
        modifies: bool,
    ) -> Option<Input> {
        let ranges = &self.device.disk.ranges;
        if let Some(before) = self.slots.get(slot).ticket.take() {
            ranges.unlock(before);
        }
        if modifies && !ranges.are_needed() {
            ranges.need();
        }
        if !ranges.are_needed() {
            return Some(Input::Range);
        }
        self.lock_what_is_changed();
        match self.device.disk.ranges.try_lock(start, end, modifies, self.range_waiter, slot.0) {
            Some(ticket) => {
                let request = self.slots.get(slot);
                (request.ticket, request.holds) = (Some(ticket), true);
                Some(Input::Range)
            }
            None => {
                self.hold_up(slot, need);
                None
            }
        }
    }

    /// From the first read-modify-write of any worker on, everything that is changed is
    /// locked: also what is changed already.
    pub(super) fn lock_what_is_changed(&mut self) {
        if self.locks {
            return;
        }
        self.locks = true;
        let backing = &self.device.disk.backing;
        self.device.disk.ranges.begin(self.range_waiter, SLOTS.into(), |lock| {
            for request in self.slots.in_use_mut() {
                if let Some((start, end)) = request.op.changing(backing) {
                    (request.ticket, request.holds) = (Some(lock(start, end)), true);
                }
            }
        });
    }

    /// A request waits, and its queue for it, but no other one.
    fn hold_up(&mut self, slot: Slot, need: Need) {
        let index = self.slots.get(slot).queue;
        if let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) {
            queue.held_up += 1;
        }
        self.waiting.push(slot, For::Need(need));
    }

    fn judge(&mut self, slot: Slot, ended: Ended) -> Option<Input> {
        let verdict = self.device.durability.judge(ended, self.durability_waiter);
        if verdict.is_none() {
            self.waiting.push(slot, For::Judgement(ended));
        }
        verdict.map(Input::Durable)
    }

    /// Requests that wait try again, in the order in which they came.
    pub(super) fn resume(&mut self) {
        let ended = self.device.durability.ended();
        let judge = std::mem::replace(&mut self.judged, ended) != ended;
        for _ in 0..self.waiting.len() {
            let Some((slot, what)) = self.waiting.pop() else { return };
            let got = match what {
                For::Judgement(ended) if judge => self.judge(slot, ended),
                For::Sync(_) | For::Judgement(_) | For::Retry(_) => {
                    self.waiting.push(slot, what);
                    None
                }
                For::Need(need) => {
                    let index = self.slots.get(slot).queue;
                    if let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) {
                        queue.held_up -= 1;
                    }
                    self.get(slot, need)
                }
            };
            if let Some(input) = got {
                self.step(slot, input);
            }
        }
    }

    /// One fdatasync for all that wait. Those that come while it runs wait for
    /// the next: it may have been submitted before their writes completed.
    pub(super) fn start_sync(&mut self) {
        if self.sync_wanted && self.sync_claim.is_none() {
            self.sync_wanted = false;
            self.syncs += 1;
            self.tally.syncs += 1;
            self.submit_sync(0);
        }
    }

    #[expect(unsafe_code, reason = "the engine's contract, for an operation without memory")]
    fn submit_sync(&mut self, attempts: u8) {
        self.sync_claim = Some((self.device.durability.begin(), attempts));
        self.staged += 1;
        let io = Io {
            slot: SYNC,
            kind: Kind::Sync,
            target: Target::Disk,
            own_thread: attempts > 0,
            offset: 0,
            len: 0,
            iovecs: std::ptr::null(),
            iovec_count: 0,
        };
        // SAFETY: an fdatasync names no memory.
        unsafe { self.engine.queue(io) }
    }

    fn synced(&mut self, outcome: Outcome) {
        let Some((claim, attempts)) = self.sync_claim.take() else { return };
        let outcome = match outcome {
            Outcome::NotExecuted(errno) if attempts >= MAX_SYNC_ATTEMPTS => Outcome::Failed(errno),
            other => other,
        };
        let ended = self.device.durability.end(claim, Kind::Sync, outcome);
        if let Outcome::NotExecuted(_) = outcome {
            self.submit_sync(attempts + 1);
        } else {
            self.waiting.synced(self.syncs, ended);
            self.judged = u64::MAX; // those have not been judged at all
        }
    }

    #[cold]
    pub(super) fn fail(&mut self, slot: Slot, failure: Failure) {
        let command = self.slots.get(slot).command;
        self.device.complain(Blame::Disk, format_args!("{command} {failure}; the guest gets an I/O error"));
        self.finish(slot, Status::IoErr);
    }

    /// Marks all that a request may have written to the guest: a read that failed
    /// may have filled a part of its pages, too.
    #[cold]
    fn mark_written(&mut self, slot: Slot) {
        let request = self.slots.get(slot);
        let (Some(log), Some(memory)) = (&self.log, self.tables.get(request.table)) else { return };
        let mark = |span| memory.guest_ranges(span, |guest, len| log.mark(guest, len));
        if matches!(request.command, Command::Read(_) | Command::GetId) {
            request.pages.spans(0, u64::MAX, mark);
        }
        mark(request.status);
    }

    /// Writes the status and returns the chain.
    #[inline(always)]
    fn finish(&mut self, slot: Slot, status: Status) {
        let request = self.slots.get(slot);
        if request.holds {
            request.holds = false;
            request.ended = None;
            self.owed.end(std::mem::take(&mut request.owes));
            self.pool.give_back(&mut request.pool);
            if let Some(ticket) = request.ticket.take() {
                self.device.disk.ranges.unlock(ticket);
            }
            if std::mem::take(&mut request.held) {
                if let Some(Some(queue)) = self.queues.get_mut(usize::from(request.queue)) {
                    queue.held -= 1;
                }
                self.device.end_held(status);
            }
        }
        let filled = if status == Status::Ok { request.op.filled(&request.pages) } else { 0 };
        let written = complete::used_length(request.writable, filled);
        let InFlight { table, queue, status: at, mark, .. } = *request;
        let head = request.head.take();
        if status != Status::Ok || !self.run.takes(mark, request.pages.len()) {
            self.count_slot(slot, status);
        }
        if let Some(memory) = self.tables.get(table) {
            // The place was found in this table when the request was decoded.
            let _mapped = memory.write_byte(at, status.byte(), &self.tables.hint);
        }
        if self.log.is_some() {
            self.mark_written(slot);
        }
        self.tables.leave(table);
        self.slots.give_back(slot);
        if let Some(head) = head {
            self.push(queue, head, written);
        }
    }
}

impl<E> Worker<E> {
    /// Counts the request in a slot, if it is not one of the run's.
    #[cold]
    fn count_slot(&mut self, slot: Slot, status: Status) {
        let InFlight { mark, pages, ranges, .. } = self.slots.get(slot);
        let run = Run::new(*mark, observed::bytes(pages.len(), ranges));
        let is_plain = ranges.is_empty();
        self.count(run, status);
        if self.shows(Ending::Begun(slot), status) || !is_plain {
            self.end_run();
        }
    }

    /// Counts a request that ended with this status, and those that ended before it.
    pub(super) fn count(&mut self, run: Run, status: Status) {
        self.end_run();
        let queue = run.queue();
        self.run = run;
        if let Some(error) = stats::error_of(status) {
            self.tally.errors += 1;
            if let Some(Some(queue)) = queue.and_then(|index| self.queues.get(usize::from(index))) {
                queue.counters.count(error);
            }
        }
    }

    /// Counts the requests that ended last.
    #[inline]
    pub(super) fn end_run(&mut self) {
        let Some(index) = self.run.queue() else { return };
        if let Some(Some(queue)) = self.queues.get(usize::from(index)) {
            self.run.end(&queue.counters, &mut self.tally, self.now);
        }
    }
}

/// True if the request's pool pages are part of the action, and must stay.
#[inline]
fn uses_pool(action: &Action) -> bool {
    match action {
        Action::Submit(submit) => submit.buffer == Buffer::Pool,
        Action::Copy(_) => true,
        Action::Need(_) | Action::Finish(_) | Action::Fail(_) => false,
    }
}
