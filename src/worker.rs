//! The data path's loop: [`Worker::turn`].
//!
//! What it is: one thread, some queues, one engine, nothing shared with other
//! workers but the disk.
//!
//! ```text
//!   turn:  fetch ─► decode ─► carry out ─► sync ─► arm? ─► enter (one system call,
//!            ▲                                              │    may sleep)
//!            └── signal ◄── publish ◄── push ◄──── reap ◄───┘
//! ```
//!
//! What it is not: a turn decides nothing by the clock, but for a disk's limits, starts no thread and makes no system
//! call but through the engine and the call eventfds.
//!
//! Invariants: commands are carried out between two turns, in their order; a
//! queue that stops is drained first; nothing is allocated per request.

mod carry_out;
mod commands;
mod fetch;
mod held;
mod limited;
mod observed;
pub mod owed;
mod patience;
pub mod plug;
mod slots;
mod waiting;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

pub use self::commands::Command;
use self::limited::Waits;
use self::owed::Owed;
use self::patience::Patience;
use self::plug::Plug;
use self::slots::{Slots, Tables};
use self::waiting::Waiting;
use crate::chain::Segments;
use crate::changes::Changes;
use crate::device::Device;
use crate::dirty::DirtyLog;
use crate::disk::range_lock;
use crate::durability::{self, Claim};
use crate::engine::{Engine, Event, Slot, Token, Wait};
use crate::hold::AtStop;
use crate::pages::Pool;
use crate::promise::Promise;
use crate::pulse::Pulse;
use crate::ring::Head;
use crate::ring::split::{Ring, RingState};
use crate::stats::queue::{Count, QueueCounters};
use crate::stats::{Counters, Mark, Run, Tally};
use crate::throttle::{Charge, Share};
use crate::trace;
use crate::{stats, sys};

/// Requests in flight of one worker.
pub const SLOTS: u16 = 256;
const _: () = assert!(SLOTS as usize == stats::SLOTS);

/// The slot of the worker's own operation, the fdatasync that FLUSHes wait for.
const SYNC: Slot = Slot(SLOTS);
/// Operations in flight of one worker: one of each slot, and its own.
pub const OPERATIONS: u16 = SLOTS + 1;

/// Which waits a turn may sleep through, rather than look for what it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sleep {
    /// With nothing in flight: until a kick.
    pub when_idle: bool,
    /// With requests in flight: until one is done, or a kick.
    pub in_flight: bool,
}

/// What happened in a turn.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// A chain was fetched, an operation ended, or an eventfd was written.
    pub busy: bool,
    /// It was ready to sleep.
    pub slept: bool,
    /// Chains that were returned.
    pub answered: u32,
}

/// What of a worker can be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Its pool.
    pub pool: PoolSize,
    /// How long it may look for work before it sleeps; 0: not at all.
    pub poll: Duration,
    /// Adjacent requests of one turn become one operation.
    pub plug: bool,
}

/// The pool; tests make it small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolSize {
    /// Chunks.
    pub chunks: usize,
    /// Bytes of one, a multiple of 4096.
    pub chunk_len: usize,
}

impl Default for PoolSize {
    fn default() -> Self {
        Self { chunks: 16, chunk_len: 128 << 10 }
    }
}

/// The answer to a [`Command`]: a value, and an eventfd that says it is there.
#[derive(Debug)]
pub struct Ack<T> {
    value: SyncSender<T>,
    ready: Arc<OwnedFd>,
}

impl<T> Ack<T> {
    /// An answer that goes to `value` and then to `ready`.
    #[must_use]
    pub fn new(value: SyncSender<T>, ready: impl Into<Arc<OwnedFd>>) -> Self {
        Self { value, ready: ready.into() }
    }

    /// Answers. A control thread that is gone does not mind.
    pub fn send(self, value: T) {
        let _gone = self.value.send(value);
        sys::signal(&self.ready);
    }
}

/// A queue as a worker gets it.
#[derive(Debug)]
pub struct QueueParts {
    /// The ring, standing.
    pub ring: Ring,
    /// Kick: written by the driver.
    pub kick: Arc<OwnedFd>,
    /// Call: written by us. `None`: the driver polls.
    pub call: Option<Arc<OwnedFd>>,
    /// Written once when the ring breaks.
    pub err: Option<Arc<OwnedFd>>,
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// Guest address of the used ring, if what is written there is to be logged.
    pub used_log: Option<u64>,
}

/// A queue that is being served.
#[derive(Debug)]
struct Queue {
    parts: QueueParts,
    /// There may be chains to fetch.
    ready: bool,
    /// Requests of its that wait for pool pages or a range.
    held_up: u16,
    /// Requests of its that the disk refused and that have not ended yet; of those, the ones that wait to be tried
    /// again.
    held: u16,
    resting: u16,
    /// Its next chain has to wait; the chain is in the ring.
    waits: Option<Waits>,
    /// What it has had of the disk's limits, and what its next chain has been charged there.
    share: Share,
    charged: Option<Charge>,
    /// Since when its next chain has waited for them, nanoseconds of CLOCK_MONOTONIC.
    limited_since: Option<u64>,
    /// Its ring is not in the memory table; the control thread will stop it.
    outside: bool,
    /// Set while it drains.
    stopping: Option<Stopping>,
    counters: Arc<QueueCounters>,
}

/// A queue drains.
#[derive(Debug)]
struct Stopping {
    /// What to do with requests that are held.
    held: AtStop,
    ack: Ack<Option<RingState>>,
}

impl Queue {
    /// It is to stop, and owes its driver nothing: neither what it fetched, nor
    /// what an earlier back-end did, unless that cannot be reached any more, or is left to the next one.
    fn is_drained(&self) -> bool {
        let ring = &self.parts.ring;
        let Some(stopping) = &self.stopping else { return false };
        let left = if stopping.held == AtStop::Leave { self.resting } else { 0 };
        ring.in_flight() == left && (self.outside || left > 0 || !ring.is_replaying())
    }

    /// Chains may be taken from it now. One that stops takes only those of an earlier back-end.
    fn may_fetch(&self) -> bool {
        self.ready
            && !self.outside
            && self.held_up < MOST_HELD_UP
            && self.held == 0
            && (self.stopping.is_none() || self.parts.ring.is_replaying())
    }

    /// How many requests more it may have in flight beside `others` more queues: none while
    /// as many of them wait as may, or one is held.
    fn room(&self, others: usize) -> u16 {
        if self.held_up >= MOST_HELD_UP || self.held > 0 {
            return 0;
        }
        let others = u16::try_from(others).unwrap_or(u16::MAX);
        let most = SLOTS.saturating_sub(others.saturating_mul(RESERVED_SLOTS)).max(LEAST_SLOTS);
        most.saturating_sub(self.parts.ring.in_flight())
    }

    /// Its used ring was written.
    #[inline]
    fn mark(&self, log: Option<&Arc<DirtyLog>>) {
        if let (Some(log), Some(at)) = (log, self.parts.used_log) {
            log.mark(at, self.parts.ring.used_bytes());
        }
    }
}

/// Whether a driver has to be told of its answers at once.
///
/// To wake a sleeping guest takes some microseconds of this thread's time. Where
/// that is time in which no operation goes on, and there is more to do than the
/// guest needs to wake up, it is woken later, once for more answers. One that
/// is awake sees them at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Telling {
    Now,
    MayWait,
}

/// Chains left to do while a guest wakes up, and answers that it may not have
/// been told of.
const LEAST_BACKLOG: u16 = 16;
const MOST_UNASKED: u16 = 32;

/// Requests of a queue that may wait for pool pages or ranges; then no more is fetched from
/// it, so that the slots are left to the others.
const MOST_HELD_UP: u16 = 16;
/// Slots that a queue leaves to each other one, whatever its requests wait for; and those that
/// it may have in any case.
const RESERVED_SLOTS: u16 = 4;
const LEAST_SLOTS: u16 = 32;

/// The token of the worker's own wake-up; queue n has token n + 1.
const WAKE: Token = Token(0);

/// See the head of the file.
#[derive(Debug)]
pub struct Worker<E> {
    engine: E,
    device: Arc<Device>,
    commands: Receiver<Command>,
    /// Watched by the engine for as long as it lives.
    _wake: Arc<OwnedFd>,
    queues: Box<[Option<Queue>]>,
    /// Indexes of the queues that are served, and where the last turn began.
    served: Vec<u16>,
    first: usize,
    slots: Slots,
    tables: Tables,
    pool: Pool,
    /// Bytes of one of its chunks.
    chunk: u64,
    promise: Promise,
    /// Where it is marked what is written to the guest, during a migration.
    log: Option<Arc<DirtyLog>>,
    /// Where it is marked what changes on the disk, since a snapshot.
    changes: Option<Arc<Changes>>,
    /// Where requests that have ended are written down, one by one.
    trace: Option<trace::Ring>,
    range_waiter: range_lock::Waiter,
    durability_waiter: durability::Waiter,
    pulse: Arc<Pulse>,
    /// Everything that is changed is locked: see [`range_lock`].
    locks: bool,
    segments: Segments,
    waiting: Waiting,
    owed: Owed,
    /// Queues that wait for the disk's limits; whether what is fetched now counts there, and for how long it keeps the
    /// group busy, nanoseconds.
    limited: u16,
    limits_count: bool,
    group_busy: u64,
    /// A request waits for the next fdatasync; how many were begun; the one that runs, and
    /// how often it was tried before.
    sync_wanted: bool,
    syncs: u64,
    sync_claim: Option<(Claim, u8)>,
    /// How many durable operations had ended when those that wait were last judged.
    judged: u64,
    /// Adjacent requests that are to become one operation.
    plug: Option<Plug>,
    plugging: bool,
    patience: Patience,
    retiring: Vec<(u64, u64, Ack<()>)>,
    events: Vec<Event>,
    /// What was counted since the last turn, and before; the requests that ended last.
    tally: Tally,
    run: Run,
    counters: Arc<Counters>,
    /// The time of [`sys::monotonic_ns`] at which requests are fetched, or were reaped.
    now: u64,
    /// What requests show that are fetched now, but for what they are.
    mark: Mark,
    /// A chain was pushed since the last publish, or that one put a signal off.
    untold: bool,
    /// Operations that were staged for the queue that is being fetched.
    staged: usize,
    /// Something happened in this turn, and so many chains were returned.
    busy: bool,
    answered: u32,
    exit: bool,
}

impl<E: Engine> Worker<E> {
    /// A worker for queues 0 to `queues` - 1. `wake` is written by the thread that sends
    /// a command.
    ///
    /// # Errors
    /// When the engine cannot watch `wake`.
    pub fn new(
        mut engine: E,
        device: Arc<Device>,
        queues: u16,
        tuning: Tuning,
        wake: impl Into<Arc<OwnedFd>>,
        commands: Receiver<Command>,
    ) -> io::Result<Self> {
        let wake = wake.into();
        let block = usize::try_from(device.disk.backing.block).unwrap_or(4096);
        let PoolSize { chunks, chunk_len } = tuning.pool;
        let pool = Pool::new(chunks, chunk_len.max(block).next_multiple_of(block))?;
        engine.watch(WAKE, wake.as_fd())?;
        // Nothing fails from here on: a worker that is registered has to turn.
        let range_waiter = device.disk.ranges.register(Arc::clone(&wake));
        let durability_waiter = device.durability.register(Arc::clone(&wake));
        let pulse = device.pulses.register(Arc::clone(&wake));
        device.throttle.register(Arc::clone(&wake));
        engine.set_pulse(Arc::clone(&pulse));
        let slots = usize::from(SLOTS);
        let counters = device.stats.register();
        Ok(Self {
            engine,
            commands,
            _wake: wake,
            queues: (0..queues).map(|_| None).collect(),
            served: Vec::with_capacity(queues.into()),
            first: 0,
            slots: Slots::new(SLOTS, counters.marks()),
            tables: Tables::new(),
            promise: device.promise(),
            log: None,
            changes: None,
            trace: None,
            chunk: pool.chunk_len() as u64,
            pool,
            range_waiter,
            durability_waiter,
            pulse,
            locks: false,
            segments: Segments::default(),
            waiting: Waiting::new(slots),
            owed: Owed::default(),
            limited: 0,
            limits_count: false,
            group_busy: 0,
            sync_wanted: false,
            syncs: 0,
            sync_claim: None,
            judged: 0,
            plug: None,
            plugging: tuning.plug,
            patience: Patience::new(tuning.poll),
            retiring: Vec::new(),
            events: Vec::with_capacity(4 * slots),
            tally: Tally::default(),
            run: Run::default(),
            counters,
            now: 0,
            mark: Mark::default(),
            untold: false,
            staged: 0,
            busy: false,
            answered: 0,
            exit: false,
            device,
        })
    }

    /// Turns until told to exit.
    ///
    /// # Errors
    /// What the engine cannot recover from.
    pub fn run(&mut self) -> io::Result<()> {
        // When the worker found nothing to do, and began to look for something.
        let mut looking = None;
        // u64: a fast driver may never trigger a measurement, and a u32 would wrap.
        let mut answered = 0_u64;
        while !self.exit {
            let waited = looking.map_or(Duration::ZERO, |since: Instant| since.elapsed());
            let turn = self.turn(self.patience.sleep(waited))?;
            answered += u64::from(turn.answered);
            if turn.slept || turn.busy && looking.is_some() {
                self.patience.learn(Instant::now(), std::mem::take(&mut answered));
                looking = None;
            } else if !turn.busy {
                looking.get_or_insert_with(Instant::now);
                std::hint::spin_loop();
            }
        }
        Ok(())
    }

    /// One turn.
    ///
    /// # Errors
    /// What the engine cannot recover from.
    pub fn turn(&mut self, may_sleep: Sleep) -> io::Result<Turn> {
        self.busy = false;
        self.answered = 0;
        if self.device.disk.ranges.are_needed() {
            self.lock_what_is_changed();
        }
        let more = self.fetch();
        self.unplug();
        self.start_sync();
        if self.untold {
            self.publish(Telling::MayWait);
        }
        let may_sleep = if self.slots.any_in_use() { may_sleep.in_flight } else { may_sleep.when_idle };
        // A queue that waits for the disk's limits is never looked at.
        let slept = (may_sleep || self.limited > 0) && !more && self.arm();
        if slept {
            self.publish(Telling::Now);
        }
        self.engine.enter(if slept { self.how_long() } else { Wait::No })?;
        self.reap();
        self.unplug();
        if self.busy || self.untold {
            self.publish(Telling::MayWait);
        }
        Ok(Turn { busy: self.busy, slept, answered: self.answered })
    }

    /// Asks for kicks on every ring that has nothing more. False: one has.
    fn arm(&mut self) -> bool {
        if !self.slots.any_free() {
            return true; // slots come back by completions, which wake us
        }
        let mut nothing = true;
        let others = self.served.len() - usize::from(!self.served.is_empty());
        for &index in &self.served {
            if let Some(Some(queue)) = self.queues.get_mut(usize::from(index))
                && queue.ready
                && !queue.outside
                && queue.stopping.is_none()
                && queue.waits.is_none()
                && queue.room(others) > 0
            {
                queue.ready = !queue.parts.ring.arm();
                queue.mark(self.log.as_ref());
                nothing &= !queue.ready;
            }
        }
        nothing
    }

    fn push(&mut self, index: u16, head: Head, written: u32) {
        match self.queues.get_mut(usize::from(index)) {
            Some(Some(queue)) => {
                queue.parts.ring.push(head, written);
                self.untold = true;
                queue.ready = true; // an answered driver is likely to ask again
            }
            _ => head.abandon(), // not reached: a queue stays until it is drained
        }
    }

    /// Takes what the engine has, then what is possible because of it.
    fn reap(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        self.engine.reap(|event| events.push(event));
        let mut woken = false;
        if !events.is_empty() {
            self.busy = true;
            self.now = sys::monotonic_ns();
        }
        for event in events.drain(..) {
            match event {
                Event::Done(done) => self.done(done),
                Event::Ready(WAKE) => woken = true,
                Event::Ready(Token(token)) => {
                    if let Some(Some(queue)) = self.queues.get_mut(usize::from(token) - 1) {
                        queue.ready = true;
                        queue.counters.count(Count::Kicks);
                    }
                }
            }
        }
        self.events = events;
        if self.waiting.len() > 0 {
            self.resume();
        }
        if woken {
            self.pulse.answer();
            self.obey();
        }
    }

    /// Shows every driver what was pushed, signals those that want to be told, and
    /// ends what is drained.
    fn publish(&mut self, telling: Telling) {
        // Counted before the driver is told, who may ask for the count.
        self.end_run();
        self.counters.add(&mut self.tally);
        // The remaining chains are fetched in the next turn, which asks again.
        let may_wait = telling == Telling::MayWait
            && self.engine.is_inline()
            && self.slots.any_free()
            && self.waiting.len() == 0;
        self.untold = false;
        let mut drained = false;
        for &index in &self.served {
            let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) else { continue };
            let shown = queue.parts.ring.show();
            if shown > 0 {
                self.answered += u32::from(shown);
                queue.mark(self.log.as_ref());
            }
            let ring = &mut queue.parts.ring;
            let later = may_wait
                && queue.stopping.is_none()
                && !queue.outside
                && ring.backlog() > LEAST_BACKLOG
                && ring.unasked() < MOST_UNASKED;
            self.untold |= later;
            if !later
                && ring.publish()
                && let Some(call) = &queue.parts.call
            {
                queue.counters.count(Count::Calls);
                self.tally.calls += 1;
                sys::signal(call);
            }
            drained |= queue.is_drained();
        }
        if drained {
            self.end_drained();
        }
        if !self.retiring.is_empty() {
            self.end_retiring();
        }
    }

    fn end_drained(&mut self) {
        for index in self.served.clone() {
            let Some(entry) = self.queues.get_mut(usize::from(index)) else { continue };
            let Some(queue) = entry.take_if(|q| q.is_drained()) else { continue };
            self.engine.unwatch(Token(index + 1));
            self.served.retain(|&i| i != index);
            match queue.waits {
                Some(Waits::ForRoom(_)) => self.owed.leave(),
                Some(Waits::ForLimits { .. }) => {
                    self.limited -= 1;
                    self.device.throttle.leave(&queue.share);
                }
                None => {}
            }
            let (used, bytes) = (queue.parts.used_log, queue.parts.ring.used_bytes());
            if queue.resting > 0 {
                self.leave_held(index);
            }
            let state = queue.parts.ring.stop();
            if let (Some(log), Some(at)) = (&self.log, used) {
                log.mark(at, bytes); // it asks for kicks again
            }
            if let Some(stopping) = queue.stopping {
                stopping.ack.send(Some(state));
            }
        }
        let must_end = |q: &Queue| matches!(q.stopping, Some(Stopping { held: AtStop::Fail, .. }));
        self.engine.give_up(self.queues.iter().flatten().any(must_end));
    }

    fn end_retiring(&mut self) {
        for at in (0..self.retiring.len()).rev() {
            let Some(&(guest, len, _)) = self.retiring.get(at) else { continue };
            if !self.slots.in_use().any(|r| self.tables.uses_region(r, guest, len)) {
                self.retiring.swap_remove(at).2.send(());
            }
        }
    }
}

impl<E> Drop for Worker<E> {
    fn drop(&mut self) {
        // Only a daemon that gives up on a hung disk comes here with work left.
        self.slots.take_heads().for_each(Head::abandon);
    }
}
