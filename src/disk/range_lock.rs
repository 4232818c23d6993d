//! Byte ranges that are being changed, so that a read-modify-write of a block
//! never undoes a neighbour's write.
//!
//! What it is: a table shared by all workers, used only where the guest's
//! sectors are smaller than the backing's blocks.
//!
//! What it is not: it orders nothing else; overlapping writes of a driver that
//! does not wait are the driver's own affair.
//!
//! Invariants: a holder never waits for a second range, so there is no
//! deadlock; whoever was refused is woken after every release.

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

    /// Takes `[start, end)`, or says no and wakes the worker at a later release.
    pub fn try_lock(&self, start: u64, end: u64, waiter: Waiter) -> Option<RangeTicket> {
        let mut table = self.table();
        if table.held.iter().any(|&(s, e)| s < end && start < e) {
            if let Some((_, refused)) = table.workers.get_mut(waiter.0) {
                *refused = true;
            }
            return None;
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
        let first = locks.try_lock(0, 4096, me).expect("free");
        let beside = locks.try_lock(4096, 8192, me).expect("no overlap");
        assert!(locks.try_lock(4095, 4097, me).is_none());
        locks.unlock(beside);
        assert!(sys::drain(&wake), "woken");
        assert!(locks.try_lock(0, 1, me).is_none(), "first still holds");
        locks.unlock(first);
        assert!(sys::drain(&wake), "woken again");
        let all = locks.try_lock(0, 8192, me).expect("free again");
        locks.unlock(all);
    }
}
