//! A request's life between fetch and return: one step after another.
//!
//! What it is: the only place that builds operations. Each step either submits
//! one, waits for something (pool pages, a range, a sync), or finishes.
//!
//! What it is not: it reads no ring.
//!
//! Invariants: a request is finished exactly once, with `Ok` only if every byte
//! was moved; a FLUSH is answered by an fdatasync that was submitted after it
//! was fetched; a request that waits for pool pages holds none; one that waits
//! for a range holds neither a range nor pool pages.
//!
//! ```text
//!             ┌────────────── more ranges ◄──────────────┐
//!   begin ─► range lock ─► piece ─► operation ─► done ─► left? ─► sync? ─► finish
//!                            ▲                     │
//!                            └─── the rest of it ──┘
//! ```

use super::Worker;
use super::slots::{InFlight, Phase};
use crate::bugs::{self, Bug};
use crate::complete::Status;
use crate::device::{Blame, Device};
use crate::engine::{Done, Engine, Io, Op, Slot};
use crate::pages;
use crate::request::{Command, Range, SECTOR};
use crate::transfer::{self, Direction, Piece};

/// Operations in a row that may move nothing before the request fails.
const MAX_RETRIES: u8 = 16;
/// Longest fallocate, so that a drain stays short.
const MAX_FALLOCATE: u64 = 1 << 30;

/// A write as the cache mode wants it: durable by itself where the disk can.
fn write_op(device: &Device) -> Op {
    Op::Write { dsync: !device.writeback() && device.disk.facts().dsync }
}

impl<E: Engine> Worker<E> {
    /// A freshly decoded request's first step.
    #[inline]
    pub(super) fn begin(&mut self, slot: Slot) {
        let request = self.slots.get(slot);
        match request.command {
            // Plain transfers, which nearly all are, have no other first step.
            Command::Read(offset) if !request.pages.is_empty() => {
                request.offset = offset;
                request.len = request.pages.len();
                self.transfer(slot, Direction::Read);
            }
            Command::Write(offset) if !request.pages.is_empty() && self.rules.block <= SECTOR => {
                request.offset = offset;
                request.len = request.pages.len();
                self.transfer(slot, Direction::Write);
            }
            _ => self.begin_other(slot),
        }
    }

    fn begin_other(&mut self, slot: Slot) {
        let request = self.slots.get(slot);
        match request.command {
            Command::Read(offset) | Command::Write(offset) => {
                request.offset = offset;
                request.len = request.pages.len();
                self.advance(slot);
            }
            Command::Discard | Command::WriteZeroes => {
                request.ranges.reverse();
                self.advance(slot);
            }
            Command::Flush if self.device.disk.facts().read_only || bugs::has(Bug::FlushWithoutSync) => {
                self.finish(slot, Status::Ok);
            }
            Command::Flush => self.wait_for_sync(slot),
            Command::GetId => {
                let id = self.geometry.id;
                if let Some(memory) = self.tables.get(request.table) {
                    let mut rest = id.as_slice();
                    let mut whole = true;
                    request.pages.spans(0, request.pages.len(), |span| {
                        let (now, later) = rest.split_at(span.len().min(rest.len()));
                        whole &= memory.write_span(span, now);
                        rest = later;
                    });
                    request.done = request.pages.len();
                    let status = if whole { Status::Ok } else { Status::IoErr };
                    self.finish(slot, status);
                }
            }
        }
    }

    /// Finds the next step of a request of which nothing runs.
    pub(super) fn advance(&mut self, slot: Slot) {
        loop {
            let request = self.slots.get(slot);
            request.phase = Phase::Ready;
            let left = request.len - request.done;
            if left > 0 {
                break;
            }
            if let Some(ticket) = request.ticket.take() {
                self.device.disk.ranges.unlock(ticket);
            }
            match request.ranges.pop() {
                Some(range) => self.next_range(slot, range),
                None => return self.settle(slot),
            }
        }
        if !self.lock_range(slot) {
            self.for_range.push_back(slot);
            return;
        }
        match self.slots.get(slot).command {
            Command::Read(_) => self.transfer(slot, Direction::Read),
            Command::Write(_) => self.transfer(slot, Direction::Write),
            _ => self.fallocate(slot),
        }
    }

    /// Makes `range` the current one. A DISCARD only keeps the whole units in
    /// it; what is beside them is not discarded, which a hint allows.
    fn next_range(&mut self, slot: Slot, range: Range) {
        let facts = self.device.disk.facts();
        let unit = u64::from(facts.discard_granularity.max(facts.fallocate.align));
        let request = self.slots.get(slot);
        let (start, end) = match request.command {
            Command::Discard => {
                (range.offset.next_multiple_of(unit), (range.offset + range.len) / unit * unit)
            }
            _ => (range.offset, range.offset + range.len),
        };
        request.offset = start;
        request.len = end.saturating_sub(start);
        request.done = 0;
        let free = request.command == Command::Discard || range.unmap;
        // Zeroes are written where fallocate cannot do what was asked for.
        request.by_writing = !(free && facts.fallocate.punch || facts.fallocate.zero);
        request.unmap = free && facts.fallocate.punch;
    }

    /// Every change of a disk whose block is larger than a sector holds the
    /// blocks that it touches. False: somebody else does.
    fn lock_range(&mut self, slot: Slot) -> bool {
        let block = self.rules.block;
        let request = self.slots.get(slot);
        if bugs::has(Bug::NeighbourUndone) {
            return true;
        }
        if block <= SECTOR || request.ticket.is_some() || matches!(request.command, Command::Read(_)) {
            return true;
        }
        let start = request.offset / block * block;
        let end = (request.offset + request.len).next_multiple_of(block);
        request.ticket = self.device.disk.ranges.try_lock(start, end, self.waiter, slot.0);
        request.ticket.is_some()
    }

    /// The next operation of a read, a write, or zeroes that are written.
    fn transfer(&mut self, slot: Slot, direction: Direction) {
        let mem_align = self.device.disk.mem_align();
        let rules = self.rules;
        let request = self.slots.get(slot);
        let zeroes = request.command == Command::WriteZeroes;
        let (at, left) = (request.offset + request.done, request.len - request.done);
        let fits = !zeroes
            && !request.force_pool
            && request.pages.is_aligned(request.done, mem_align, u32::try_from(rules.block).unwrap_or(1));
        let piece = transfer::next_piece(direction, at, left, fits, rules);
        if !matches!(piece, Piece::Direct { .. }) && request.pool.is_none() {
            let whole_zeroes = zeroes && matches!(piece, Piece::BounceWrite { .. });
            if !whole_zeroes {
                let Some(pages) = self.pool.take() else {
                    self.tally.pool_waits += 1;
                    self.for_pool.push_back(slot);
                    return;
                };
                request.pool = Some(pages);
                self.tally.bounced += 1;
            }
        }
        let op = match direction {
            Direction::Read => Op::Read,
            Direction::Write => write_op(&self.device),
        };
        match piece {
            Piece::Direct { offset, len } => {
                let len = request.pages.iovecs(request.done, len, rules.block, &mut request.iovecs);
                request.phase = Phase::Direct;
                request.piece = len;
                request.dirty |= op == Op::Write { dsync: false };
                if self.plugging && !request.alone {
                    self.hold(slot, op, offset, len);
                } else {
                    self.stage(slot, op, offset, len);
                }
            }
            Piece::BounceRead { offset, len, skip, take } => {
                request.phase = Phase::BounceRead { skip, take };
                self.submit_pool(slot, Op::Read, offset, len);
            }
            Piece::BounceWrite { offset, len } => {
                request.phase = Phase::BounceWrite;
                if !self.fill_pool(slot, 0, len) {
                    return self.finish(slot, Status::IoErr);
                }
                self.submit_pool(slot, op, offset, len);
            }
            Piece::Modify { offset, skip, take } => {
                request.phase = Phase::ModifyRead { offset, skip, take };
                self.submit_pool(slot, Op::Read, offset, rules.block);
            }
        }
    }

    /// Copies the next `len` bytes of the payload into the pool pages at `skip`.
    /// False: the guest's memory was lost, and these are not its bytes.
    #[must_use]
    fn fill_pool(&mut self, slot: Slot, skip: u64, len: u64) -> bool {
        let request = self.slots.get(slot);
        let Some(pages) = &request.pool else { return true }; // zeroes are there already
        let start = usize::try_from(skip).unwrap_or(0);
        let end = start + usize::try_from(len).unwrap_or(0);
        let Some(mut to) = self.pool.bytes(pages).get_mut(start..end) else { return false };
        if request.command == Command::WriteZeroes {
            to.fill(0);
            return true;
        }
        let Some(memory) = self.tables.get(request.table) else { return false };
        let mut whole = true;
        request.pages.spans(request.done, len, |span| {
            let (now, later) = std::mem::take(&mut to).split_at_mut(span.len());
            whole &= memory.read_span(span, now);
            to = later;
        });
        whole && !memory.is_lost()
    }

    /// Copies bytes that the disk gave from the pool pages to the guest. False:
    /// not all of them could be.
    #[must_use]
    fn drain_pool(&mut self, slot: Slot, skip: u64, len: u64) -> bool {
        let request = self.slots.get(slot);
        let (Some(pages), Some(memory)) = (&request.pool, self.tables.get(request.table)) else {
            return false;
        };
        let start = usize::try_from(skip).unwrap_or(0);
        let end = start + usize::try_from(len).unwrap_or(0);
        let Some(mut from) = self.pool.bytes(pages).get(start..end) else { return false };
        let mut whole = true;
        request.pages.spans(request.done, len, |span| {
            let (now, later) = from.split_at(span.len().min(from.len()));
            whole &= memory.write_span(span, now);
            from = later;
        });
        whole
    }

    /// Submits an operation on the slot's pool pages, or on zeroes.
    fn submit_pool(&mut self, slot: Slot, op: Op, offset: u64, len: u64) {
        let request = self.slots.get(slot);
        let bytes = usize::try_from(len).unwrap_or(0);
        let span = match &request.pool {
            Some(pages) => self.pool.span(pages, bytes),
            None => self.pool.zeroes(bytes),
        };
        request.iovecs.clear();
        request.iovecs.push(pages::iovec(span));
        self.submit(slot, op, offset, len);
    }

    fn submit(&mut self, slot: Slot, op: Op, offset: u64, len: u64) {
        self.slots.get(slot).dirty |= matches!(op, Op::Write { dsync: false } | Op::Fallocate(_));
        self.stage(slot, op, offset, len);
    }

    /// The one place where operations are made.
    #[inline]
    #[expect(unsafe_code, reason = "hands the slot's addresses to the engine")]
    pub(super) fn stage(&mut self, slot: Slot, op: Op, offset: u64, len: u64) {
        let request = self.slots.get(slot);
        let io = Io {
            slot,
            op,
            offset,
            len,
            iovecs: request.iovecs.as_ptr(),
            iovec_count: u32::try_from(request.iovecs.len()).unwrap_or(0),
        };
        self.staged += 1;
        // SAFETY: the iovecs are in the slot, which is boxed and not reused
        // before its Done; they name guest pages of a table that the slot keeps,
        // or pool pages that it holds. The engine is dropped before both.
        unsafe { self.engine.queue(io) }
    }

    /// The next operation of a DISCARD or WRITE_ZEROES.
    fn fallocate(&mut self, slot: Slot) {
        let facts = self.device.disk.facts();
        let align = u64::from(facts.fallocate.align);
        let request = self.slots.get(slot);
        let (at, left) = (request.offset + request.done, request.len - request.done);
        if request.by_writing || at % align != 0 || left < align {
            // Written block by block: an edge is at most one of them.
            return self.transfer(slot, Direction::Write);
        }
        let len = (left / align * align).min(MAX_FALLOCATE);
        request.phase = Phase::Fallocate { len };
        let mode = if request.unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
        request.iovecs.clear();
        self.submit(slot, Op::Fallocate(mode | libc::FALLOC_FL_KEEP_SIZE), at, len);
    }

    /// An operation ended.
    #[inline]
    pub(super) fn done(&mut self, done: Done) {
        let request = self.slots.get(done.slot);
        let left = request.len - request.done;
        if done.result == Ok(left) && request.phase == Phase::Direct && request.merged.is_none() {
            // Nearly every request ends like this: all that was left was moved.
            request.done = request.len;
            if request.dirty { self.settle(done.slot) } else { self.finish(done.slot, Status::Ok) }
        } else {
            self.ended(done);
        }
    }

    /// An operation ended that may be one of several of its request, or one of
    /// several requests'.
    pub(super) fn ended(&mut self, done: Done) {
        let slot = done.slot;
        let request = self.slots.get(slot);
        if request.phase == Phase::Sync {
            return self.synced(done.result);
        }
        if request.merged.is_some() {
            return self.part(done);
        }
        let moved = match done.result {
            Ok(moved) => moved,
            Err(errno) => return self.failed(slot, errno),
        };
        let request = self.slots.get(slot);
        let progress = match request.phase {
            Phase::Direct | Phase::BounceWrite => moved.min(request.len - request.done),
            Phase::BounceRead { skip, take } => {
                let got = moved.saturating_sub(skip).min(take);
                if !self.drain_pool(slot, skip, got) {
                    return self.finish(slot, Status::IoErr);
                }
                got
            }
            Phase::ModifyRead { offset, skip, take } if moved == self.rules.block => {
                request.phase = Phase::ModifyWrite { take };
                request.retries = 0;
                if !self.fill_pool(slot, skip, take) {
                    return self.finish(slot, Status::IoErr);
                }
                return self.submit_pool(slot, write_op(&self.device), offset, self.rules.block);
            }
            Phase::ModifyWrite { take } if moved == self.rules.block => take,
            Phase::Fallocate { len } => len,
            _ => 0,
        };
        let request = self.slots.get(slot);
        request.done += progress;
        if progress > 0 {
            request.retries = 0;
        } else {
            // Nothing moved: the end of a file that shrank, or a short transfer
            // of a block. A short one is tried again; nothing at all is an error.
            request.retries += 1;
            if moved == 0 || request.retries > MAX_RETRIES {
                let (command, at) = (request.command, request.offset + request.done);
                if self.device.may_log(Blame::Disk) {
                    tracing::error!(
                        disk = %self.device.disk.path().display(),
                        "{command:?}: the disk ends at byte {at}, before the size it had; has it been truncated? \
                         The guest gets an I/O error"
                    );
                }
                return self.finish(slot, Status::IoErr);
            }
        }
        self.free_pool(slot);
        self.advance(slot);
    }

    fn failed(&mut self, slot: Slot, errno: i32) {
        let request = self.slots.get(slot);
        request.retries += 1;
        let again = match errno {
            libc::EINTR | libc::EAGAIN => request.retries <= MAX_RETRIES,
            libc::EINVAL if request.phase == Phase::Direct && !request.force_pool => {
                request.force_pool = true;
                self.device.disk.raise_mem_align();
                true
            }
            libc::EOPNOTSUPP | libc::EINVAL
                if matches!(request.phase, Phase::Fallocate { .. })
                    && request.command == Command::WriteZeroes =>
            {
                request.by_writing = true;
                true
            }
            _ => false,
        };
        if again {
            self.free_pool(slot);
            self.advance(slot);
        } else {
            let status = Status::of_errno(errno);
            let (command, at) = (request.command, request.offset + request.done);
            if self.device.may_log(Blame::Disk) {
                let error = std::io::Error::from_raw_os_error(errno);
                let disk = self.device.disk.path().display();
                tracing::error!(%disk, "{command:?} failed at byte {at}: {error}; the guest gets {status:?}");
            }
            self.finish(slot, status);
        }
    }

    /// All bytes are moved: answer, or make them durable first.
    fn settle(&mut self, slot: Slot) {
        let request = self.slots.get(slot);
        let durable =
            !request.dirty || matches!(request.command, Command::Discard) || self.device.writeback();
        if durable { self.finish(slot, Status::Ok) } else { self.wait_for_sync(slot) }
    }

    fn wait_for_sync(&mut self, slot: Slot) {
        if self.device.disk.sync_failed() {
            return self.finish(slot, Status::IoErr);
        }
        self.slots.get(slot).phase = Phase::Sync;
        self.next_sync.push(slot);
    }

    /// One fdatasync for all that wait. Those that come while it runs wait for
    /// the next: it may have been submitted before their writes completed.
    pub(super) fn start_sync(&mut self) {
        if !self.running_sync.is_empty() {
            if bugs::has(Bug::SyncOfEarlier) {
                self.running_sync.append(&mut self.next_sync);
            }
            return;
        }
        let Some(&leader) = self.next_sync.first() else { return };
        std::mem::swap(&mut self.next_sync, &mut self.running_sync);
        self.tally.syncs += 1;
        self.slots.get(leader).iovecs.clear();
        self.submit(leader, Op::Sync, 0, 0);
        if bugs::has(Bug::AnsweredBeforeSync) {
            for slot in self.running_sync.split_off(1) {
                self.finish(slot, Status::Ok);
            }
        }
    }

    fn synced(&mut self, result: Result<u64, i32>) {
        let status = match result {
            // Linux reports a lost write once: one that comes after that knows nothing.
            Ok(_) if self.device.disk.sync_failed() => Status::IoErr,
            Ok(_) => Status::Ok,
            Err(libc::EINTR) => {
                // Nothing is known to be lost; all of them go again.
                let mut again = std::mem::take(&mut self.running_sync);
                again.append(&mut self.next_sync);
                self.next_sync = again;
                return;
            }
            Err(_) => {
                self.device.disk.set_sync_failed();
                Status::IoErr
            }
        };
        let mut group = std::mem::take(&mut self.running_sync);
        for slot in group.drain(..) {
            self.finish(slot, status);
        }
        self.running_sync = group;
    }

    /// Requests that waited for pool pages or a range try again.
    pub(super) fn resume(&mut self) {
        for _ in 0..self.for_range.len() {
            if let Some(slot) = self.for_range.pop_front() {
                self.advance(slot);
            }
        }
        while !self.for_pool.is_empty() && self.pool.has_free() {
            if let Some(slot) = self.for_pool.pop_front() {
                self.advance(slot);
            }
        }
    }

    fn free_pool(&mut self, slot: Slot) {
        if let Some(pages) = self.slots.get(slot).pool.take() {
            self.pool.give_back(pages);
        }
    }

    /// Marks all that a request may have written to the guest: a read that failed
    /// may have filled a part of its pages, too.
    #[cold]
    fn mark_written(&mut self, slot: Slot) {
        let request = self.slots.get(slot);
        let (Some(log), Some(memory)) = (&self.log, self.tables.get(request.table)) else { return };
        let mark = |span| memory.guest_ranges(span, |guest, len| log.mark(guest, len));
        let brought = matches!(request.command, Command::Read(_) | Command::GetId);
        if brought && !bugs::has(Bug::UnmarkedRead) {
            request.pages.spans(0, u64::MAX, mark);
        }
        mark(request.status);
    }

    /// Writes the status and returns the chain.
    fn finish(&mut self, slot: Slot, status: Status) {
        self.free_pool(slot);
        let request = self.slots.get(slot);
        if let Some(ticket) = request.ticket.take() {
            self.device.disk.ranges.unlock(ticket);
        }
        let InFlight { table, queue, status: at, .. } = *request;
        let written = match (status, request.command) {
            // Bytes of the payload before the status, which is the last one.
            (Status::Ok, Command::Read(_) | Command::GetId) => {
                u32::try_from(request.done + 1).unwrap_or(u32::MAX)
            }
            _ => 1,
        };
        let head = request.head.take();
        if bugs::has(Bug::PublishBeforeStatus) {
            self.late.push((at, status.byte(), table));
        } else if let Some(memory) = self.tables.get(table) {
            // The place was found in this table when the request was decoded.
            let _mapped = memory.write_byte(at, status.byte(), &self.tables.hint);
        }
        if self.log.is_some() {
            self.mark_written(slot);
        }
        self.tables.leave(table);
        self.slots.give_back(slot);
        self.tally.requests += 1;
        self.tally.errors += u64::from(status != Status::Ok);
        if let Some(head) = head {
            self.push(queue, head, written);
        }
    }
}
