//! Throttling: how many requests and bytes a second a disk, or a group of disks, may have.
//!
//! What it is: leaky buckets as in QEMU (docs/throttle.txt), shared by the workers of all disks of a [`Group`], and the
//! order in which their queues are served. What a request counts for flows into the buckets as it begins; they leak at the
//! rate of the limit; a request begins while none of its buckets is full, so one large request may overfill them.
//!
//! What it is not: the requests that wait are in their rings, in flight for no worker ([`crate::worker`]).
//!
//! Invariants: in any time the limit is exceeded by at most a twentieth of a second's worth, and one request; a burst
//! lasts its length and is refilled by idling. Queues that wait are served in the order of what they have had: each gets
//! its share, whatever its depth and the size of its requests. A queue whose worker is late holds up the others for
//! at most [`GRACE`]. Disks without a limit take no lock.
//!
//! ```text
//!   size    without a burst: rate × 1/20 s            with one: (max − rate) × length, and a second bucket that leaks
//!                                                     at max and holds max × 1/20 s
//! ```

mod limits;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::limits::{COUNT, Cost, Limit, ONE};
pub use self::limits::{Change, Charge, IOPS_SIZE, LONGEST, Limits, MOST, NAMES};
use crate::sys;

/// What a bucket holds without a burst: so many parts of a second. A worker that is late by less loses nothing, and from idle
/// a limit is exceeded by 1 % over 5 s. (QEMU: 10, which would be 2 %.)
const PARTS: u128 = 20;
/// How long the others wait for a queue whose turn it is, nanoseconds.
const GRACE: u64 = 20_000_000;

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    level: u128,
    /// The bucket of the burst's rate.
    burst: u128,
}

impl Bucket {
    fn leak(&mut self, limit: &Limit, ns: u64) {
        let leaked = |rate: u64| u128::from(rate) * u128::from(ns);
        self.level = self.level.saturating_sub(leaked(limit.rate));
        self.burst = self.burst.saturating_sub(leaked(limit.max));
    }

    fn fill(&mut self, limit: &Limit, cost: u128) {
        self.level += cost;
        self.burst += if limit.max > 0 { cost } else { 0 };
    }

    /// Another limit counts. What a large request overfilled it with is owed, and waited for at the new rate; an unused
    /// burst is not.
    fn change(&mut self, from: &Limit, to: &Limit) {
        let keep = |level: u128, old, new, rate: u64| match rate {
            0 => 0,
            _ => level.min(old).min(new) + level.saturating_sub(old),
        };
        self.level = keep(self.level, size(from), size(to), to.rate);
        self.burst = keep(self.burst, part(from.max), part(to.max), to.max);
    }

    /// Nanoseconds until it is not full any more, with `more` in it.
    fn wait(&self, limit: &Limit, more: u128) -> u128 {
        let until = |level: u128, size, rate: u64| match rate {
            0 => 0,
            rate => (level + more).saturating_sub(size).div_ceil(rate.into()),
        };
        until(self.level, size(limit), limit.rate).max(until(self.burst, part(limit.max), limit.max))
    }
}

fn part(rate: u64) -> u128 {
    u128::from(rate) * ONE / PARTS
}

fn size(&Limit { rate, max, length }: &Limit) -> u128 {
    let burst = u128::from(max.saturating_sub(rate)) * u128::from(length.max(1)) * ONE;
    burst.max(part(rate))
}

/// A queue that waits for its turn.
#[derive(Debug)]
struct Waiter {
    id: u64,
    /// Its disk's number in the group.
    disk: u64,
    /// Those with less are served first.
    tag: u64,
    /// When its turn comes, nanoseconds of CLOCK_MONOTONIC.
    due: u64,
    cost: Cost,
}

#[derive(Debug, Default)]
struct State {
    limits: Limits,
    /// When they were changed while the disk was served: CLOCK_MONOTONIC, nanoseconds; 0: they are the options'.
    changed: u64,
    buckets: [Bucket; COUNT],
    /// When they last leaked.
    now: u64,
    /// The largest tag that was served.
    served: u64,
    /// In the order of their tags.
    waiters: Vec<Waiter>,
}

impl State {
    fn leak(&mut self, now: u64) {
        let ns = now.saturating_sub(self.now);
        self.now = self.now.max(now);
        for (bucket, limit) in self.buckets.iter_mut().zip(self.limits.each()) {
            bucket.leak(limit, ns);
        }
    }

    /// Nanoseconds until a request at this place of the list may begin.
    fn wait(&self, place: usize, cost: &Cost) -> u64 {
        let mut wait = 0;
        let ahead =
            self.waiters.iter().take(place).filter(|waiter| waiter.due.saturating_add(GRACE) > self.now);
        for (at, (bucket, limit)) in self.buckets.iter().zip(self.limits.each()).enumerate() {
            if cost.get(at).is_some_and(|cost| *cost > 0) {
                let more = ahead.clone().filter_map(|waiter| waiter.cost.get(at)).sum();
                wait = wait.max(bucket.wait(limit, more));
            }
        }
        u64::try_from(wait).unwrap_or(u64::MAX)
    }

    /// For how long a request keeps the group busy, nanoseconds.
    fn busy(&self, cost: &Cost) -> u64 {
        let each = cost.iter().zip(self.limits.each());
        let each = each.filter_map(|(cost, limit)| cost.checked_div(limit.rate.into()));
        each.max().and_then(|ns| u64::try_from(ns).ok()).unwrap_or(0)
    }
}

/// A queue's share in its group.
#[derive(Debug)]
pub struct Share {
    id: u64,
    disk: u64,
    /// The tag of its next request, if it does not come late.
    next: u64,
}

/// The answer to a request that wants to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may. Where another queue waits: for how long it keeps the group busy, nanoseconds; else 0.
    Begin(u64),
    /// Ask again then: CLOCK_MONOTONIC, nanoseconds.
    WaitUntil(u64),
}

/// Disks that share one set of limits: those of one name, or a single one.
#[derive(Debug, Default)]
pub struct Group {
    name: Option<String>,
    is_limited: AtomicBool,
    /// Changes when the limits change or a queue leaves the group: a worker whose queue waits then asks again.
    version: AtomicU32,
    state: Mutex<State>,
    disks: AtomicU64,
    shares: AtomicU64,
    wakers: Mutex<Vec<Arc<OwnedFd>>>,
}

impl Group {
    /// With this name, if it has one, and the limits of the options.
    #[must_use]
    pub fn new(name: Option<String>, limits: Limits) -> Self {
        let group = Self { name, ..Self::default() };
        group.set(limits, 0);
        group
    }

    fn set(&self, limits: Limits, changed: u64) {
        let mut state = self.state();
        state.leak(sys::monotonic_ns()); // at the rate until now
        let State { buckets, limits: before, .. } = &mut *state;
        let each = before.each().iter().zip(limits.each());
        buckets.iter_mut().zip(each).for_each(|(bucket, (from, to))| bucket.change(from, to));
        (state.limits, state.changed) = (limits, changed);
        state.waiters.clear(); // they ask again
        self.is_limited.store(limits.any(), Ordering::Relaxed);
        self.wake(&state);
    }

    /// Lets all that wait ask again.
    fn wake(&self, _of: &MutexGuard<'_, State>) {
        self.version.fetch_add(1, Ordering::Release);
        let wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        wakers.iter().for_each(sys::signal);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Limits that were set while a disk was served, for its successor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kept {
    group: Option<String>,
    limits: Change,
    changed: u64,
}

/// What `vublk status` and `vublk throttle` tell.
#[derive(Clone, Debug, Serialize)]
pub struct Shown {
    /// The group's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The limits that are set, by name.
    #[serde(flatten)]
    pub limits: BTreeMap<String, u64>,
    /// Queues of the disk that wait for them now.
    pub waiting_queues: usize,
    /// Requests that had to wait at the head of their queues since the daemon started.
    pub delayed: u64,
    /// How long they waited, seconds.
    pub delayed_seconds: f64,
}

impl Shown {
    /// True if there is, or was, a limit.
    #[must_use]
    pub fn is_any(&self) -> bool {
        self.group.is_some() || !self.limits.is_empty() || self.delayed > 0
    }
}

/// One disk's part in its group.
#[derive(Debug, Default)]
pub struct Throttle {
    group: Arc<Group>,
    /// The disk's number in the group.
    disk: u64,
    delayed: AtomicU64,
    delayed_ns: AtomicU64,
}

impl Throttle {
    /// Of a disk of this group.
    #[must_use]
    pub fn new(group: Arc<Group>) -> Self {
        let disk = group.disks.fetch_add(1, Ordering::Relaxed);
        Self { group, disk, ..Self::default() }
    }

    /// False: nothing has to be asked.
    #[inline]
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.group.is_limited.load(Ordering::Relaxed)
    }

    /// Changes whenever those that wait have to ask again, and with the limits.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.group.version.load(Ordering::Acquire)
    }

    /// Writes this eventfd whenever the version changes.
    pub fn register(&self, waker: Arc<OwnedFd>) {
        self.group.wakers.lock().unwrap_or_else(PoisonError::into_inner).push(waker);
    }

    /// A share for a queue.
    #[must_use]
    pub fn share(&self) -> Share {
        Share { id: self.group.shares.fetch_add(1, Ordering::Relaxed), disk: self.disk, next: 0 }
    }

    /// Asks for a request to begin. If it may not, it waits, until it asks again or leaves.
    pub fn ask(&self, share: &mut Share, charge: Charge) -> Verdict {
        let mut state = self.group.state();
        state.leak(sys::monotonic_ns());
        let cost = state.limits.cost(charge);
        let mut waits = state.waiters.iter().position(|waiter| waiter.id == share.id);
        if let Some(at) = waits
            && state.waiters.get(at).is_some_and(|waiter| waiter.cost != cost)
        {
            state.waiters.remove(at); // the driver has put another request there
            waits = None;
        }
        let tag = waits.and_then(|at| state.waiters.get(at)).map(|waiter| waiter.tag);
        let tag = tag.unwrap_or_else(|| share.next.max(state.served));
        let at = waits.unwrap_or_else(|| state.waiters.partition_point(|waiter| waiter.tag <= tag));
        let wait = state.wait(at, &cost);
        if wait > 0 {
            let due = state.now.saturating_add(wait);
            match state.waiters.get_mut(at).filter(|_| waits.is_some()) {
                Some(waiter) => waiter.due = due,
                None => state.waiters.insert(at, Waiter { id: share.id, disk: share.disk, tag, due, cost }),
            }
            return Verdict::WaitUntil(due);
        }
        if waits.is_some() {
            state.waiters.remove(at);
        }
        let State { buckets, limits, .. } = &mut *state;
        for ((bucket, limit), cost) in buckets.iter_mut().zip(limits.each()).zip(cost) {
            bucket.fill(limit, cost);
        }
        let busy = state.busy(&cost);
        share.next = tag.saturating_add(busy);
        state.served = state.served.max(tag);
        Verdict::Begin(if state.waiters.is_empty() { 0 } else { busy })
    }

    /// A queue waits no longer, and its request did not begin.
    pub fn leave(&self, share: &Share) {
        let mut state = self.group.state();
        let before = state.waiters.len();
        state.waiters.retain(|waiter| waiter.id != share.id);
        if state.waiters.len() < before && !state.waiters.is_empty() {
            self.group.wake(&state);
        }
    }

    /// A request waited so long, nanoseconds.
    pub fn delayed(&self, ns: u64) {
        self.delayed.fetch_add(1, Ordering::Relaxed);
        self.delayed_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// Changes the limits of the whole group.
    ///
    /// # Errors
    /// A sentence that says what does not go together.
    pub fn change(&self, change: &Change) -> Result<(), String> {
        if change.is_empty() {
            return Ok(());
        }
        let limits = self.group.state().limits.changed(change)?;
        self.group.set(limits, sys::monotonic_ns());
        tracing::info!("throttling: {}", describe(&limits));
        Ok(())
    }

    /// What was set while the disk was served.
    #[must_use]
    pub fn kept(&self) -> Option<Kept> {
        let state = self.group.state();
        let (group, limits, changed) = (self.group.name.clone(), state.limits.as_change(), state.changed);
        (changed > 0).then_some(Kept { group, limits, changed })
    }

    /// Goes on with what a predecessor had, unless another disk's predecessor of the group had something newer.
    pub fn adopt(&self, kept: Kept) {
        let is_ours = kept.group == self.group.name && kept.changed > self.group.state().changed;
        if let Some(limits) = is_ours.then(|| Limits::default().changed(&kept.limits)).and_then(Result::ok) {
            self.group.set(limits, kept.changed);
        }
    }

    /// What is shown of it.
    #[must_use]
    pub fn shown(&self) -> Shown {
        let state = self.group.state();
        let limits = state.limits;
        let waiting_queues = state.waiters.iter().filter(|waiter| waiter.disk == self.disk).count();
        drop(state); // workers wait for it
        let limits = limits.set().map(|(name, value)| (name.replace('-', "_"), value)).collect();
        let ms = self.delayed_ns.load(Ordering::Relaxed) / 1_000_000;
        Shown {
            group: self.group.name.clone(),
            limits,
            waiting_queues,
            delayed: self.delayed.load(Ordering::Relaxed),
            delayed_seconds: Duration::from_millis(ms).as_secs_f64(),
        }
    }
}

/// As they would be typed.
fn describe(limits: &Limits) -> String {
    let set: Vec<_> = limits.set().map(|(name, value)| format!("{name}={value}")).collect();
    if set.is_empty() { "no limits".into() } else { set.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Command;

    /// A guest may ask for more than the limit lets through in an age of the clock.
    #[test]
    fn a_wait_beyond_the_clock() {
        let only = |name: &str, value: u64| std::iter::once((name.to_owned(), value)).collect::<Change>();
        let throttle = Throttle::default();
        throttle.change(&only("bps-total", 1)).expect("a limit");
        let zeroes = Charge::new(Command::WriteZeroes, 0, 1 << 45).expect("it counts");
        let mut shares = [throttle.share(), throttle.share(), throttle.share()];
        let verdicts = shares.each_mut().map(|share| throttle.ask(share, zeroes));
        assert!(matches!(verdicts, [Verdict::Begin(_), Verdict::WaitUntil(u64::MAX), _]), "{verdicts:?}");
    }
}
