//! Byte ranges that are being changed, so that a read-modify-write of a block
//! never undoes a neighbour's write.
//!
//! What it is: a table shared by all workers, used where the backing's blocks
//! are larger than a sector.
//!
//! What it is not: it orders nothing else; overlapping writes of a driver that
//! does not wait are the driver's own affair.
//!
//! Invariants: a holder never waits for a second range, so there is no
//! deadlock; whoever was refused is woken after every release, and nobody who
//! came later gets a part of what it wants before it does.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

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

#[derive(Debug, Default)]
struct Table {
    held: Vec<(u64, u64)>,
    /// Refused ranges and whose they are, oldest first.
    wanted: Vec<(u64, u64, (usize, u16))>,
    /// Each worker's wake-up, and whether it was refused since the last release.
    workers: Vec<(OwnedFd, bool)>,
}

/// The table. Its vectors grow to the number of requests in flight, once.
#[derive(Debug, Default)]
pub struct RangeLocks(Mutex<Table>);

impl RangeLocks {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a worker known, once, by the eventfd that wakes it.
    pub fn register(&self, wake: OwnedFd) -> Waiter {
        let mut table = self.table();
        table.workers.push((wake, false));
        Waiter(table.workers.len() - 1)
    }

    /// Takes `[start, end)` for request `slot` of a worker, or says no and wakes
    /// the worker at a later release. Whoever was refused has to ask again.
    pub fn try_lock(&self, start: u64, end: u64, waiter: Waiter, slot: u16) -> Option<RangeTicket> {
        let mut table = self.table();
        let me = (waiter.0, slot);
        let asked = table.wanted.iter().position(|&(_, _, who)| who == me);
        let older = table.wanted.get(..asked.unwrap_or(table.wanted.len())).unwrap_or_default();
        let taken = table.held.iter().any(|&(s, e)| s < end && start < e)
            || older.iter().any(|&(s, e, _)| s < end && start < e);
        if taken {
            if asked.is_none() {
                table.wanted.push((start, end, me));
            }
            if let Some((_, refused)) = table.workers.get_mut(waiter.0) {
                *refused = true;
            }
            return None;
        }
        if let Some(asked) = asked {
            table.wanted.remove(asked);
        }
        table.held.push((start, end));
        Some(RangeTicket { start, end })
    }

    /// Lets go of a range and wakes whoever was refused.
    pub fn unlock(&self, ticket: RangeTicket) {
        let RangeTicket { start, end } = ticket;
        let mut table = self.table();
        if let Some(at) = table.held.iter().position(|&held| held == (start, end)) {
            table.held.swap_remove(at);
        }
        for (wake, refused) in &mut table.workers {
            if std::mem::take(refused) {
                sys::signal(wake);
            }
        }
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
        let first = locks.try_lock(0, 4096, me, 1).expect("free");
        let beside = locks.try_lock(4096, 8192, me, 2).expect("no overlap");
        assert!(locks.try_lock(4095, 4097, me, 3).is_none());
        locks.unlock(beside);
        assert!(sys::drain(&wake), "woken");
        assert!(locks.try_lock(0, 1, me, 4).is_none(), "first still holds");
        locks.unlock(first);
        assert!(sys::drain(&wake), "woken again");
        let third = locks.try_lock(4095, 4097, me, 3).expect("free again");
        let fourth = locks.try_lock(0, 1, me, 4).expect("free again");
        locks.unlock(third);
        locks.unlock(fourth);
        let all = locks.try_lock(0, 8192, me, 5).expect("nobody wants it");
        locks.unlock(all);
    }

    /// A large range among many small ones that never all rest at once.
    #[test]
    fn who_came_later_waits_for_who_was_refused() {
        let locks = RangeLocks::default();
        let me = locks.register(sys::eventfd().expect("eventfd"));
        let mut held = locks.try_lock(0, 4096, me, 0).expect("free");
        assert!(locks.try_lock(0, 1 << 20, me, 1).is_none());
        assert!(locks.try_lock(8192, 12288, me, 2).is_none(), "behind the large one");
        let beside = locks.try_lock(2 << 20, 3 << 20, me, 3).expect("nobody wants that");
        locks.unlock(beside);
        locks.unlock(held);
        assert!(locks.try_lock(8192, 12288, me, 2).is_none(), "still behind it");
        held = locks.try_lock(0, 1 << 20, me, 1).expect("its turn");
        locks.unlock(held);
        held = locks.try_lock(8192, 12288, me, 2).expect("and now this one");
        locks.unlock(held);
    }
}
