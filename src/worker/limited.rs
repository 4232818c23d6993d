//! Requests that wait in their rings: what for, and until when.
//!
//! What it is: the worker's side of [`crate::throttle`], and what a queue can wait for before its next chain is fetched.
//!
//! What it is not: it decides neither whose turn it is nor when.
//!
//! Invariants: a chain that waits is in its ring, where nothing was done for it, so that a drain, a crash and an upgrade
//! find nothing. It is charged once, by what it was when it began. Chains of an earlier back-end were charged by it. A
//! worker whose queues wait sleeps.

use std::time::Duration;

use super::owed::Place;
use super::{Queue, Worker};
use crate::engine::{Engine, Wait};
use crate::request::{Command, Ranges};
use crate::sys;
use crate::throttle::{Charge, Throttle, Verdict};

/// How long one queue keeps its group busy before the others of its worker have their turn, nanoseconds.
const QUANTUM: u64 = 100_000;

/// What a queue's next chain waits for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Waits {
    /// It is a large request, for which there was no room.
    ForRoom(Place),
    /// The disk's limits; nanoseconds of CLOCK_MONOTONIC, and the version of the limits.
    ForLimits { until: u64, version: u32 },
}

/// What the limits count of a request; `None`: its kind is not limited.
pub(super) fn charge(command: Command, payload: u64, ranges: &Ranges) -> Option<Charge> {
    Charge::new(command, payload, ranges.iter().map(|range| range.len).sum())
}

impl Queue {
    /// Why a request that was just fetched may not begin: true, it waits for the limits; false, the worker's other
    /// queues have their turn. `None`: it may, and adds to `busy` for how long it keeps others waiting.
    #[cold]
    pub(super) fn why_not_yet(
        &mut self,
        throttle: &Throttle,
        command: Command,
        payload: u64,
        ranges: &Ranges,
        busy: &mut u64,
    ) -> Option<bool> {
        let charge = charge(command, payload, ranges)?;
        if *busy >= QUANTUM {
            return Some(false);
        }
        if self.charged.take() == Some(charge) {
            return None; // it waited for room then
        }
        let version = throttle.version();
        match throttle.ask(&mut self.share, charge) {
            Verdict::Begin(more) => {
                *busy += more;
                if let Some(since) = self.limited_since.take() {
                    throttle.delayed(sys::monotonic_ns().saturating_sub(since));
                }
                None
            }
            Verdict::WaitUntil(until) => {
                (self.waits, self.ready) = (Some(Waits::ForLimits { until, version }), false);
                self.limited_since.get_or_insert_with(sys::monotonic_ns);
                Some(true)
            }
        }
    }
}

impl<E: Engine> Worker<E> {
    /// True if a queue whose next chain waits may try again; it waits no longer then.
    #[cold]
    pub(super) fn is_its_turn(&mut self, index: u16) -> bool {
        let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) else { return false };
        let throttle = &self.device.throttle;
        match queue.waits {
            None => false, // not reached
            Some(Waits::ForRoom(place)) => self.has_room(index, place),
            Some(Waits::ForLimits { until, version })
                if throttle.is_limited() && throttle.version() == version && sys::monotonic_ns() < until =>
            {
                false
            }
            Some(Waits::ForLimits { .. }) => {
                self.limited -= 1;
                (queue.waits, queue.ready) = (None, true);
                let fetches = queue.may_fetch();
                if !fetches || !throttle.is_limited() {
                    throttle.leave(&queue.share);
                    queue.limited_since = None;
                }
                fetches
            }
        }
    }

    /// How long a turn sleeps: until the first queue that waits for the disk's limits may try again, if one does.
    pub(super) fn how_long(&self) -> Wait {
        if self.limited == 0 {
            return Wait::Yes;
        }
        let queues = self.served.iter().filter_map(|&at| self.queues.get(usize::from(at))?.as_ref());
        let times = queues.filter_map(|queue| match queue.waits {
            Some(Waits::ForLimits { until, .. }) => Some(until),
            _ => None,
        });
        let now = sys::monotonic_ns();
        times.min().map_or(Wait::Yes, |until| Wait::For(Duration::from_nanos(until.saturating_sub(now))))
    }
}
