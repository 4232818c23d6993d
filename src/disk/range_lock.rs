//! Byte ranges that are being changed, so that a read-modify-write of a block
//! never undoes a neighbour's write.
//!
//! What it is: a table shared by all workers, used where the backing's blocks
//! are larger than a sector, and only once a request had to read a block to write it: until
//! then a guest whose writes are whole blocks locks nothing.
//!
//! What it is not: it orders nothing else; a driver that does not wait decides itself what
//! its overlapping writes leave.
//!
//! Invariants: a holder never waits for a second range, so there is no
//! deadlock; a request that was refused is woken after every release, and none that
//! came later gets a part of what it wants before it does. No block is modified before every
//! worker has locked what it had in flight.
//!
//! ```text
//!   worker 0   writes, unlocked ... in flight ─┐ locks them, then all that come
//!   worker 1   ── wants to modify: tells all ──┼───────────────┐ reads, changes, writes
//! ```

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::sys;

/// A held range. Goes back with [`RangeLocks::unlock`].
#[derive(Debug)]
#[must_use = "a range that is not unlocked blocks its neighbours for good"]
pub struct RangeTicket {
    start: u64,
    end: u64,
}

/// A worker as the table knows it.
#[derive(Clone, Copy, Debug)]
pub struct Waiter(usize);

#[derive(Debug)]
struct Worker {
    wake: Arc<OwnedFd>,
    /// A request of this worker was refused since the last release.
    refused: bool,
    /// It locks what it changes.
    locks: bool,
}

#[derive(Debug, Default)]
struct Table {
    held: Vec<(u64, u64)>,
    /// Refused ranges and whose they are, oldest first.
    wanted: Vec<(u64, u64, (usize, u16))>,
    workers: Vec<Worker>,
}

impl Table {
    fn wake_the_refused(&mut self) {
        for worker in &mut self.workers {
            if std::mem::take(&mut worker.refused) {
                sys::signal(&worker.wake);
            }
        }
    }
}

/// The table. Its vectors have room for all requests in flight once ranges are locked.
#[derive(Debug, Default)]
pub struct RangeLocks {
    /// A request wanted to modify a block: everything that is changed is locked.
    needed: AtomicBool,
    table: Mutex<Table>,
}

impl RangeLocks {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a worker known, once, by the eventfd that wakes it.
    pub fn register(&self, wake: impl Into<Arc<OwnedFd>>) -> Waiter {
        let mut table = self.table();
        table.workers.push(Worker { wake: wake.into(), refused: false, locks: false });
        Waiter(table.workers.len() - 1)
    }

    /// True once everything that is changed has to be locked.
    #[inline]
    #[must_use]
    pub fn are_needed(&self) -> bool {
        self.needed.load(Ordering::Acquire)
    }

    /// A block is to be modified: from now on every worker locks what it changes. They are
    /// woken, to lock what they have in flight.
    pub fn need(&self) {
        let table = self.table();
        if !self.needed.swap(true, Ordering::AcqRel) {
            table.workers.iter().for_each(|worker| sys::signal(&worker.wake));
        }
    }

    /// A worker locks everything from now on, `most` ranges at once; `hold` locks what it changes already.
    pub fn begin(
        &self,
        waiter: Waiter,
        most: usize,
        hold: impl FnOnce(&mut dyn FnMut(u64, u64) -> RangeTicket),
    ) {
        let mut table = self.table();
        // Room for all workers, and no allocation when a request takes it.
        let room = most * table.workers.len();
        let (held, wanted) = (table.held.len(), table.wanted.len());
        table.held.reserve(room.saturating_sub(held));
        table.wanted.reserve(room.saturating_sub(wanted));
        hold(&mut |start, end| {
            table.held.push((start, end));
            RangeTicket { start, end }
        });
        if let Some(worker) = table.workers.get_mut(waiter.0) {
            worker.locks = true;
        }
        table.wake_the_refused();
    }

    /// Takes `[start, end)` for request `slot` of a worker, or says no and wakes
    /// the worker at a later release; then it has to ask again. `modifies`: a read-modify-write
    /// is refused while any worker still changes blocks without locks.
    pub fn try_lock(
        &self,
        start: u64,
        end: u64,
        modifies: bool,
        waiter: Waiter,
        slot: u16,
    ) -> Option<RangeTicket> {
        let mut table = self.table();
        let me = (waiter.0, slot);
        let asked = table.wanted.iter().position(|&(_, _, who)| who == me);
        let older = table.wanted.get(..asked.unwrap_or(table.wanted.len())).unwrap_or_default();
        let taken = table.held.iter().any(|&(s, e)| s < end && start < e)
            || older.iter().any(|&(s, e, _)| s < end && start < e)
            || modifies && table.workers.iter().any(|worker| !worker.locks);
        if taken {
            if asked.is_none() {
                table.wanted.push((start, end, me));
            }
            if let Some(worker) = table.workers.get_mut(waiter.0) {
                worker.refused = true;
            }
            return None;
        }
        if let Some(asked) = asked {
            table.wanted.remove(asked);
        }
        table.held.push((start, end));
        Some(RangeTicket { start, end })
    }

    /// Lets go of a range and wakes the workers that were refused one.
    pub fn unlock(&self, ticket: RangeTicket) {
        let RangeTicket { start, end } = ticket;
        let mut table = self.table();
        if let Some(at) = table.held.iter().position(|&held| held == (start, end)) {
            table.held.swap_remove(at);
        }
        table.wake_the_refused();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_is_refused_and_woken_and_neighbours_are_free() {
        let wake = sys::eventfd().expect("eventfd");
        let locks = RangeLocks::default();
        let me = locks.register(wake.try_clone().expect("dup"));
        let first = locks.try_lock(0, 4096, false, me, 1).expect("free");
        let beside = locks.try_lock(4096, 8192, false, me, 2).expect("no overlap");
        assert!(locks.try_lock(4095, 4097, false, me, 3).is_none());
        locks.unlock(beside);
        assert!(sys::drain(&wake), "woken");
        assert!(locks.try_lock(0, 1, false, me, 4).is_none(), "first still holds");
        locks.unlock(first);
        assert!(sys::drain(&wake), "woken again");
        let third = locks.try_lock(4095, 4097, false, me, 3).expect("free again");
        let fourth = locks.try_lock(0, 1, false, me, 4).expect("free again");
        locks.unlock(third);
        locks.unlock(fourth);
        let all = locks.try_lock(0, 8192, false, me, 5).expect("no other wants it");
        locks.unlock(all);
    }

    /// A large range among many small ones that never all rest at once.
    #[test]
    fn who_came_later_waits_for_who_was_refused() {
        let locks = RangeLocks::default();
        let me = locks.register(sys::eventfd().expect("eventfd"));
        let mut held = locks.try_lock(0, 4096, false, me, 0).expect("free");
        assert!(locks.try_lock(0, 1 << 20, false, me, 1).is_none());
        assert!(locks.try_lock(8192, 12288, false, me, 2).is_none(), "behind the large one");
        let beside = locks.try_lock(2 << 20, 3 << 20, false, me, 3).expect("no other wants that");
        locks.unlock(beside);
        locks.unlock(held);
        assert!(locks.try_lock(8192, 12288, false, me, 2).is_none(), "still behind it");
        held = locks.try_lock(0, 1 << 20, false, me, 1).expect("its turn");
        locks.unlock(held);
        held = locks.try_lock(8192, 12288, false, me, 2).expect("and now this one");
        locks.unlock(held);
    }

    /// What a worker had in flight, unlocked, when the first block is to be modified.
    #[test]
    fn a_block_is_modified_when_every_worker_locks() {
        let (wake, other) = (sys::eventfd().expect("eventfd"), sys::eventfd().expect("eventfd"));
        let locks = RangeLocks::default();
        let me = locks.register(wake.try_clone().expect("dup"));
        let them = locks.register(other.try_clone().expect("dup"));
        assert!(!locks.are_needed());
        locks.need();
        assert!(locks.are_needed() && sys::drain(&wake) && sys::drain(&other), "all are told");
        locks.begin(me, 4, |_| ());
        assert!(locks.try_lock(0, 4096, true, me, 1).is_none(), "the other one does not lock yet");
        let mut theirs = None;
        locks.begin(them, 4, |lock| theirs = Some(lock(0, 8192)));
        assert!(sys::drain(&wake), "woken: all lock now");
        assert!(locks.try_lock(0, 4096, true, me, 1).is_none(), "the other one is writing there");
        locks.unlock(theirs.expect("a ticket"));
        assert!(sys::drain(&wake), "woken again");
        let mine = locks.try_lock(0, 4096, true, me, 1).expect("free");
        locks.unlock(mine);
    }
}
