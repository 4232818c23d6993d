//! Bugs on purpose: mistakes that block back-ends have made, planted from outside.
//!
//! A model that finds nothing would be no proof. Each bug is what a daemon with that mistake
//! would do to its disk, its guest or its successor, done around the worker that ships: by an
//! engine around the engine, at the guest's memory and eventfds between two turns, or where a
//! daemon is started and stopped.

use std::io;
use std::os::fd::BorrowedFd;

use vublk::engine::{Done, Engine, Event, Io, Kind, Outcome, Slot, Target, Token, Wait};
use vublk::worker::{OPERATIONS, SLOTS};

use super::disk::SECTOR;
use super::guest::Play;
use super::requests::What;
use super::setup::Setup;
use super::world::Sim;
use crate::support::device::UNWRITTEN;

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// The used index is shown before the status byte is written.
    PublishBeforeStatus,
    /// One chain is never returned.
    ForgetOneHead,
    /// FLUSH is answered, and nothing was made durable.
    FlushWithoutSync,
    /// After a crash the ring goes on at the front-end's base, not at what the
    /// in-flight region says.
    ReplayFromFrontEndsBase,
    /// The driver is not interrupted, though it asked for it.
    LostInterrupt,
    /// What a read brought is not marked in the dirty log.
    UnmarkedRead,
    /// A block that is read, changed and written is not kept from its neighbours.
    NeighbourUndone,
    /// A FLUSH that comes while an fdatasync runs is answered with it.
    SyncOfEarlier,
    /// Those that wait for an fdatasync are answered when it begins.
    AnsweredBeforeSync,
    /// A daemon that is started anew does not know that the guest turned its cache off.
    ModeForgotten,
    /// A failed write-back is taken for an operation that was not executed, and tried again.
    FailedSyncTriedAgain,
    /// A failed write-back counts for the write that met it, and not for those that were
    /// under way with it.
    JudgedAlone,
    /// An fdatasync that was not executed is taken for one that failed.
    NotExecutedIsFailed,
    /// The image goes to another host without a last sync.
    HandedOverUnsynced,
    /// A connection to a server is lost, and what was not flushed counts as durable later on.
    LossForgotten,
    /// A worker is connected to a server anew while another still reads what the one before it had answered.
    ConnectedApart,
    /// A FLUSH that waits for a connection is sent, though another worker's loss has shown that something is gone.
    WaitingFlushSent,
}

impl Bug {
    /// Each of them.
    pub const ALL: [Self; 17] = [
        Self::PublishBeforeStatus,
        Self::ForgetOneHead,
        Self::FlushWithoutSync,
        Self::ReplayFromFrontEndsBase,
        Self::LostInterrupt,
        Self::UnmarkedRead,
        Self::NeighbourUndone,
        Self::SyncOfEarlier,
        Self::AnsweredBeforeSync,
        Self::ModeForgotten,
        Self::FailedSyncTriedAgain,
        Self::JudgedAlone,
        Self::NotExecutedIsFailed,
        Self::HandedOverUnsynced,
        Self::LossForgotten,
        Self::ConnectedApart,
        Self::WaitingFlushSent,
    ];

    /// What the checks may say of it; which comes first depends on the seed.
    pub fn signs(self) -> &'static [&'static str] {
        match self {
            Self::PublishBeforeStatus => &["status 0xff of"],
            Self::ForgetOneHead => &["does not answer a command", "no answer in", "was lost"],
            Self::FlushWithoutSync | Self::SyncOfEarlier | Self::AnsweredBeforeSync => {
                &["by a FLUSH", "by write-through"]
            }
            // Chains that were answered are done again, and others never.
            Self::ReplayFromFrontEndsBase => &[
                "came back twice",
                "no answer in",
                "was lost",
                "are answered",
                "reads as",
                "on another host",
            ],
            Self::LostInterrupt => &["an interrupt was lost"],
            Self::UnmarkedRead => &["was written and not marked"],
            Self::NeighbourUndone => &["reads as", "in the end, not", "after a power cut, not"],
            Self::ModeForgotten => &["by write-through"],
            Self::JudgedAlone => &["after a power cut, not"],
            Self::FailedSyncTriedAgain => &["after a failed sync was answered with OK"],
            Self::NotExecutedIsFailed => &["a sync that did not fail", "status 0x1 of"],
            Self::HandedOverUnsynced => &["on another host"],
            Self::LossForgotten => &["after the server had lost"],
            Self::ConnectedApart | Self::WaitingFlushSent => {
                &["after the server had lost", "and the server has lost it"]
            }
        }
    }

    /// Makes a world in which nothing else can go wrong in the same way, or in which the bug
    /// can show at all.
    pub fn shape(self, setup: &mut Setup) {
        let weather = &mut setup.weather;
        match self {
            Self::FlushWithoutSync | Self::SyncOfEarlier | Self::AnsweredBeforeSync => {
                (weather.faults, weather.bad_syncs) = (0, 0);
            }
            Self::NeighbourUndone => {
                (setup.direct, setup.block, setup.area) = (true, 512, 13);
            }
            Self::ModeForgotten => {
                (setup.write_back, weather.bad_syncs) = (true, 0);
            }
            Self::FailedSyncTriedAgain => {
                (setup.write_back, weather.bad_syncs) = (false, 8);
            }
            Self::JudgedAlone => {
                (setup.workers, setup.queues) = (2, 2);
                (setup.direct, setup.block) = (true, 512);
                (setup.write_back, setup.dsync) = (false, true);
                (weather.bad_syncs, weather.faults, weather.inline) = (8, 0, false);
            }
            Self::NotExecutedIsFailed => {
                (weather.faults, weather.bad_syncs, weather.no_threads) = (0, 0, 5);
            }
            Self::HandedOverUnsynced => {
                (setup.direct, setup.block, weather.bad_syncs) = (false, 512, 0);
            }
            Self::LossForgotten => (setup.remote, setup.write_back) = (true, true),
            Self::ConnectedApart | Self::WaitingFlushSent => {
                (setup.remote, setup.write_back) = (true, true);
                (setup.workers, setup.queues, setup.lanes) = (2, 2, 4);
                (weather.delay, weather.crashes, weather.bad_syncs) = (30, 0, 0);
            }
            _ => {}
        }
    }
}

/// How an fdatasync that did not run ends; a real one moves nothing.
const MADE_UP: Outcome = Outcome::Moved(1);

/// The simulation's engine with a bug, or without one.
pub struct Faulty {
    sim: Sim,
    bug: Option<Bug>,
    /// What the running operation of each slot is.
    kinds: Vec<Kind>,
    /// Where each slot has read a block to, and from which byte of the disk.
    fetched: Vec<Option<(*mut libc::c_void, u64)>>,
    forgot: bool,
    /// An fdatasync was queued and has not begun; what the one before it covers.
    sync_begins: bool,
    covered: Option<u64>,
    /// A failure that is told to the next operation that begins, instead of all that run.
    owed: std::rc::Rc<std::cell::Cell<bool>>,
    events: Vec<Event>,
}

impl Faulty {
    pub fn new(sim: Sim, bug: Option<Bug>, owed: std::rc::Rc<std::cell::Cell<bool>>) -> Self {
        Self {
            sim,
            bug,
            kinds: vec![Kind::Read; OPERATIONS.into()],
            fetched: vec![None; OPERATIONS.into()],
            forgot: false,
            sync_begins: false,
            covered: None,
            owed,
            events: Vec::new(),
        }
    }

    /// An operation ends like this, whatever the disk does.
    fn make_up(&self, slot: Slot, outcome: Outcome) {
        let done = Done { slot, outcome };
        self.sim.world.borrow_mut().hands[self.sim.worker].done.push(done);
    }

    /// What happens to an operation. False: the engine does not get it.
    fn on_queue(&mut self, bug: Bug, io: &Io) -> bool {
        self.kinds[usize::from(io.slot.0)] = io.kind;
        match bug {
            Bug::FlushWithoutSync | Bug::AnsweredBeforeSync if io.kind == Kind::Sync => {
                self.make_up(io.slot, MADE_UP);
                bug == Bug::AnsweredBeforeSync
            }
            Bug::SyncOfEarlier => {
                self.sync_begins |= io.kind == Kind::Sync && !io.own_thread;
                true
            }
            Bug::JudgedAlone if io.kind.is_durable() && self.owed.take() => {
                self.make_up(io.slot, Outcome::Failed(libc::EREMOTEIO));
                self.sim.world.borrow_mut().unread_failure = true;
                false
            }
            Bug::NeighbourUndone => {
                self.modify_an_old_block(io);
                true
            }
            _ => true,
        }
    }

    /// A block that is written after it was read: one sector in it becomes what it was before
    /// its last write, as if that had come between the two.
    fn modify_an_old_block(&mut self, io: &Io) {
        let moves = matches!(io.kind, Kind::Read | Kind::Write { .. });
        if !moves || io.len != 4096 || io.iovec_count != 1 || io.target != Target::Disk {
            return;
        }
        // SAFETY: one iovec, by the engine's contract.
        let base = unsafe { (*io.iovecs).iov_base };
        let place = Some((base, io.offset));
        let before = std::mem::replace(&mut self.fetched[usize::from(io.slot.0)], place);
        if io.kind == Kind::Read || before != place {
            return;
        }
        let mut world = self.sim.world.borrow_mut();
        for (at, sector) in world.disk.range(io).iter().enumerate() {
            // SAFETY: `at` is a sector of the buffer, which is the pool's: it was read into.
            let words = unsafe {
                std::slice::from_raw_parts_mut(base.cast::<u64>().add(at * SECTOR / 8), SECTOR / 8)
            };
            if let Some(old) = sector.before().filter(|_| sector.now() == words[0]) {
                words.fill(old);
                return;
            }
        }
    }

    /// What becomes of the end of an operation. `None`: it is not told.
    fn on_done(&mut self, bug: Bug, done: Done) -> Option<Done> {
        let Done { slot, outcome } = done;
        let kind = self.kinds[usize::from(slot.0)];
        let as_if = |outcome| Some(Done { slot, outcome });
        match (bug, outcome) {
            (Bug::ForgetOneHead, _) if slot != Slot(SLOTS) && !self.forgot => {
                self.forgot = true;
                None
            }
            (Bug::AnsweredBeforeSync, _) if slot == Slot(SLOTS) && outcome != MADE_UP => None,
            (Bug::FailedSyncTriedAgain, Outcome::Failed(errno)) if kind.is_durable() => {
                as_if(Outcome::NotExecuted(errno))
            }
            (Bug::JudgedAlone, Outcome::Failed(libc::EIO)) if kind == (Kind::Write { dsync: true }) => {
                self.owed.set(true);
                as_if(Outcome::Failed(libc::ENOSPC))
            }
            (Bug::NotExecutedIsFailed, Outcome::NotExecuted(errno)) if kind.is_durable() => {
                as_if(Outcome::Failed(errno))
            }
            _ => Some(done),
        }
    }

    /// The fdatasync that has just begun covers what the one before it did.
    fn cover_less(&mut self) {
        let world = &mut *self.sim.world.borrow_mut();
        let running = &mut world.hands[self.sim.worker].running;
        if let Some(sync) = running.iter_mut().find(|op| op.io.kind == Kind::Sync)
            && let Some(before) = self.covered.replace(sync.begun)
        {
            sync.begun = before;
        }
    }
}

impl Engine for Faulty {
    unsafe fn queue(&mut self, io: Io) {
        if self.bug.is_none_or(|bug| self.on_queue(bug, &io)) {
            // SAFETY: the contract of this very function.
            unsafe { self.sim.queue(io) };
        }
    }

    fn watch(&mut self, token: Token, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.sim.watch(token, fd)
    }

    fn unwatch(&mut self, token: Token) {
        self.sim.unwatch(token);
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.sim.enter(wait)?;
        if std::mem::take(&mut self.sync_begins) {
            self.cover_less();
        }
        Ok(())
    }

    fn reap(&mut self, mut each: impl FnMut(Event)) {
        let Some(bug) = self.bug else { return self.sim.reap(each) };
        let mut events = std::mem::take(&mut self.events);
        self.sim.reap(|event| events.push(event));
        for event in events.drain(..) {
            match event {
                Event::Done(done) => {
                    if let Some(done) = self.on_done(bug, done) {
                        each(Event::Done(done));
                    }
                }
                Event::Ready(_) => each(event),
            }
        }
        self.events = events;
    }

    fn give_up(&mut self, given_up: bool) {
        self.sim.give_up(given_up);
    }

    fn batch(&self, in_flight: usize) -> usize {
        self.sim.batch(in_flight)
    }

    fn chains(&self, offered: u16) -> u16 {
        self.sim.chains(offered)
    }

    fn is_inline(&self) -> bool {
        self.sim.is_inline()
    }
}

impl Play {
    pub fn has(&self, bug: Bug) -> bool {
        self.setup.bug == Some(bug)
    }

    /// What happens to the guest's memory and eventfds before a turn.
    pub fn before_turn(&mut self) {
        for (at, status) in self.late.drain(..) {
            self.memory.write(at, &[status]);
        }
    }

    /// The same after a turn.
    pub fn after_turn(&mut self) {
        match self.setup.bug {
            Some(Bug::PublishBeforeStatus) => {
                for lane in self.lanes.iter().filter(|lane| lane.what.is_some()) {
                    let status = self.memory.byte(lane.status());
                    if status != UNWRITTEN {
                        self.memory.write(lane.status(), &[UNWRITTEN]);
                        self.late.push((lane.status(), status));
                    }
                }
            }
            Some(Bug::LostInterrupt) if self.dice.rarely(16) => {
                for queue in &self.queues {
                    let _unseen = queue.ring.call.take();
                }
            }
            Some(Bug::UnmarkedRead) => {
                if let Some(migration) = &self.world.borrow().migration {
                    let reads = self.lanes.iter().filter(|lane| matches!(lane.what, Some(What::Read)));
                    reads.for_each(|lane| migration.unmark(lane.data));
                }
            }
            _ => {}
        }
    }
}
