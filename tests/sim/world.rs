//! The world around the workers: an engine for each, over one disk, that reorders,
//! delays, cuts short and fails what it is given, as its dice say.
//!
//! A failed write-back gives up a part of all that is cached at that moment, whichever worker wrote
//! it, and is reported to the one operation that met it. A daemon that is killed between
//! that report and its own note of it is left out: no daemon could know.

use std::cell::RefCell;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

use vublk::engine::{Done, Engine, Event, Io, Kind, Outcome, Slot, Target, Token, Wait};

use super::disk::{Disk, SECTOR};
use super::migration::Migration;
use super::server::{Line, Server};
use super::setup::Weather;
use crate::support::dice::Dice;

/// What a crash is inside of the worker: a panic with this.
pub struct Crash;

/// Errors of an operation that was not executed.
const NOT_EXECUTED: [i32; 4] = [libc::ECANCELED, libc::EAGAIN, libc::ENOMEM, libc::EINTR];

/// An operation under way.
pub struct Running {
    pub io: Io,
    /// The iovecs, as they were when it was submitted.
    vectors: Vec<libc::iovec>,
    turns: u64,
    /// For one that makes something durable: when that began.
    pub begun: u64,
    /// A write with RWF_DSYNC that was written, with this result, and is not yet durable.
    moved: Option<u64>,
    /// Of a server's flush: what it makes durable.
    pub changed: u64,
}

impl Running {
    fn new(io: Io, vectors: Vec<libc::iovec>, turns: u64) -> Self {
        Self { io, vectors, turns, begun: 0, moved: None, changed: 0 }
    }

    /// The same, as if nothing of it had been done.
    pub fn again(&self) -> Self {
        Self { changed: self.changed, ..Self::new(self.io, self.vectors.clone(), self.turns) }
    }
}

/// Who carries an operation out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The kernel's threads, or others.
    Engine,
    /// The thread that asks for it: it is always executed.
    OwnThread,
    /// Nobody waits for it any more.
    Nobody,
}

/// One worker's engine.
#[derive(Default)]
pub struct Hands {
    pub running: Vec<Running>,
    pub staged: Vec<Running>,
    pub done: Vec<Done>,
    watched: Vec<Token>,
    /// Eventfds whose count is not 0. Nobody reads it.
    written: Vec<Token>,
    pub ready: Vec<Token>,
    /// Of a server's disk.
    pub line: Line,
    /// The worker went to sleep, and nothing has woken it.
    pub asleep: bool,
}

/// See the head of the file.
pub struct World {
    pub dice: Dice,
    pub weather: Weather,
    pub disk: Disk,
    pub hands: Vec<Hands>,
    /// A write-back failed, and the disk was not opened anew since.
    pub sync_failed: bool,
    /// The daemon has not looked at the report of that yet.
    pub unread_failure: bool,
    pub crashes: u64,
    /// Looks at the guest's memory while the workers are at work.
    pub migration: Option<Migration>,
    /// That has the disk.
    pub server: Option<Server>,
}

pub type Shared = Rc<RefCell<World>>;

impl World {
    pub fn new(dice: Dice, weather: Weather, sectors: u64, workers: usize) -> Shared {
        Rc::new(RefCell::new(Self {
            dice,
            weather,
            disk: Disk::new(sectors as usize),
            hands: (0..workers).map(|_| Hands::default()).collect(),
            sync_failed: false,
            unread_failure: false,
            crashes: 0,
            migration: None,
            server: None,
        }))
    }

    /// Somebody writes an eventfd that this worker's engine watches.
    pub fn signal(&mut self, worker: usize, token: Token) {
        let hands = &mut self.hands[worker];
        if !hands.written.contains(&token) {
            hands.written.push(token);
        }
        if hands.watched.contains(&token) {
            hands.ready.push(token);
            hands.asleep = false;
        }
    }

    /// There is a new eventfd of this name.
    pub fn forget(&mut self, worker: usize, token: Token) {
        self.hands[worker].written.retain(|t| *t != token);
    }

    /// The daemon is gone; what the kernel has of it ends before another serves.
    pub fn bury(&mut self) {
        self.fence();
        for at in 0..self.hands.len() {
            let hands = &mut self.hands[at];
            hands.written.retain(|token| *token != Token(0));
            let Hands { written, running, .. } = std::mem::take(hands);
            self.hands[at].written = written;
            let mut running = running;
            while !running.is_empty() {
                let at = self.dice.below(running.len() as u64) as usize;
                let _nobody_asks = self.finish(running.swap_remove(at), By::Nobody);
            }
        }
    }

    /// The power fails.
    pub fn power_cut(&mut self) {
        // Those that run stop where they are: some of their sectors are written, and
        // it is not known how far an fdatasync had come.
        for at in 0..self.hands.len() {
            for op in std::mem::take(&mut self.hands[at].running) {
                match op.io.kind {
                    Kind::Sync if self.dice.rarely(2) => {}
                    Kind::Read => {}
                    Kind::Write { .. } if op.moved.is_none() => self.do_a_part(&op),
                    _ => drop(self.finish(op, By::Nobody)),
                }
            }
        }
        self.bury();
        self.disk.power_cut(&mut self.dice);
        (self.sync_failed, self.unread_failure) = (false, false);
    }

    /// Some of the sectors of a write are written.
    pub fn do_a_part(&mut self, op: &Running) {
        if matches!(op.io.kind, Kind::Write { .. }) && op.moved.is_none() {
            let some = self.dice.below(op.io.len / SECTOR as u64 + 1);
            self.disk.transfer(&op.io, &op.vectors, some);
        }
    }

    /// What is on the disk.
    pub fn read(&self, sector: u64) -> u64 {
        self.disk.read(sector)
    }

    /// An fdatasync by the control thread begins.
    pub fn begin_sync(&self) -> Running {
        let io = Io {
            slot: Slot(0),
            kind: Kind::Sync,
            target: Target::Disk,
            own_thread: true,
            offset: 0,
            len: 0,
            iovecs: std::ptr::null(),
            iovec_count: 0,
        };
        let changed = self.server.as_ref().map_or(0, |server| server.marks.changed());
        Running { begun: self.disk.clock, changed, ..Running::new(io, Vec::new(), 0) }
    }

    /// It ends, and the control thread looks at its outcome at once.
    pub fn end_sync(&mut self, op: Running) -> Outcome {
        if let Some(outcome) = self.flush_unsent() {
            return outcome;
        }
        let (unread, changed) = (self.unread_failure, op.changed);
        let result = self.finish(op, By::OwnThread);
        self.unread_failure = unread;
        if let (Ok(_), Some(server)) = (result, &self.server) {
            server.marks.note_flush(changed);
        }
        result.map_or_else(Outcome::Failed, Outcome::Moved)
    }

    /// Reports that the daemons have been given were looked at.
    pub fn looked_at(&mut self) {
        self.unread_failure &= self.hands.iter().any(|hands| !hands.done.is_empty());
    }

    /// Something else happens while a worker is at work. True: its end.
    fn meanwhile(&mut self) -> bool {
        if let Some(migration) = &mut self.migration
            && self.dice.rarely(8)
        {
            migration.pass();
        }
        let crash =
            self.weather.crashes > 0 && self.dice.rarely(self.weather.crashes) && !self.unread_failure;
        self.crashes += u64::from(crash);
        crash
    }

    /// Carries an operation out to its end.
    pub fn finish(&mut self, mut op: Running, by: By) -> Result<u64, i32> {
        loop {
            if let Some(result) = self.advance(&mut op, by) {
                return result;
            }
        }
    }

    /// Carries an operation out, or a part of it. `None`: the rest comes later.
    fn advance(&mut self, op: &mut Running, by: By) -> Option<Result<u64, i32>> {
        if let Some(bytes) = op.moved.take() {
            let its_part = Io { len: bytes, ..op.io };
            return Some(self.write_back(&its_part, op.begun, by).map(|()| bytes));
        }
        let result = self.execute(op, by);
        let dsync = op.io.kind == Kind::Write { dsync: true };
        match result {
            Ok(bytes) if dsync => {
                op.moved = Some(bytes);
                op.begun = self.disk.clock;
                op.turns = self.dice.roll() % (self.weather.delay + 1);
                None
            }
            Err(libc::EIO) if dsync && by != By::Nobody => {
                self.fail();
                Some(result)
            }
            _ => Some(result),
        }
    }

    /// What was written when it began becomes durable, or a part of everything is lost.
    fn write_back(&mut self, io: &Io, begun: u64, by: By) -> Result<(), i32> {
        let Weather { bad_syncs, .. } = self.weather;
        if by != By::Nobody && bad_syncs > 0 && self.dice.rarely(bad_syncs) {
            self.fail();
            return Err(libc::EIO);
        }
        // What was written while it ran may be durable as well.
        let more = self.dice.rarely(2);
        self.disk.settle(io, if more { self.disk.clock } else { begun });
        Ok(())
    }

    fn fail(&mut self) {
        (self.sync_failed, self.unread_failure) = (true, true);
        self.disk.lose(&mut self.dice);
    }

    fn execute(&mut self, op: &Running, by: By) -> Result<u64, i32> {
        let Weather { faults, no_threads, .. } = self.weather;
        if by == By::Engine && no_threads > 0 && self.dice.rarely(no_threads) {
            return Err(NOT_EXECUTED[self.dice.below(4) as usize]);
        }
        let faulty = faults > 0 && self.dice.rarely(faults);
        let blocks = op.io.len / SECTOR as u64;
        match op.io.kind {
            Kind::Sync => {
                if faulty && by == By::Engine && self.dice.rarely(2) {
                    return Err(libc::EINTR);
                }
                self.write_back(&op.io, op.begun, by).map(|()| 0)
            }
            Kind::Fallocate(_) | Kind::Discard => {
                if faulty {
                    return Err(if self.dice.rarely(2) { libc::EOPNOTSUPP } else { libc::EIO });
                }
                self.disk.zero(&op.io);
                Ok(0)
            }
            Kind::Read | Kind::Write { .. } => {
                let (count, result) = match faulty.then(|| self.dice.below(6)) {
                    None => (blocks, Ok(op.io.len)),
                    Some(0) => (self.dice.below(blocks + 1), Err(libc::EIO)),
                    Some(1) => (self.dice.below(blocks + 1), Err(libc::ENOSPC)),
                    Some(2) if by != By::OwnThread => (0, Err(libc::EAGAIN)),
                    Some(3) if by != By::OwnThread => (0, Err(libc::EINTR)),
                    Some(4) => (0, Err(libc::EINVAL)),
                    Some(_) => {
                        let some = 1 + self.dice.below(blocks);
                        (some, Ok(some * SECTOR as u64))
                    }
                };
                self.disk.transfer(&op.io, &op.vectors, count);
                result
            }
        }
    }
}

/// A worker's engine in the simulation: a handle to the world.
pub struct Sim {
    pub world: Shared,
    pub worker: usize,
}

impl Sim {
    fn meanwhile(&self) {
        // Not while the world is borrowed: a panic goes through here.
        let crash = self.world.borrow_mut().meanwhile();
        if crash {
            std::panic::panic_any(Crash);
        }
    }
}

impl Engine for Sim {
    unsafe fn queue(&mut self, io: Io) {
        self.meanwhile();
        let mut world = self.world.borrow_mut();
        let moves = matches!(io.kind, Kind::Read | Kind::Write { .. });
        let vectors = if moves {
            // SAFETY: the worker vouches for them until the operation is done.
            unsafe { std::slice::from_raw_parts(io.iovecs, io.iovec_count as usize) }.to_vec()
        } else {
            Vec::new()
        };
        world.disk.judge(&io, &vectors);
        if io.kind == Kind::Sync && world.server.as_ref().is_some_and(|server| server.marks.has_lost()) {
            let op = Running::new(io, vectors, 0);
            return world.answer(self.worker, &op, Outcome::Failed(libc::EIO));
        }
        let turns = world.dice.roll() % (world.weather.delay + 1);
        let mut op = Running::new(io, vectors, turns);
        let outcome = if io.own_thread {
            op.begun = world.disk.clock;
            world.finish(op, By::OwnThread).map_or_else(Outcome::Failed, Outcome::Moved)
        } else if moves && world.weather.inline {
            Outcome::of_handed_over(world.finish(op, By::Engine))
        } else {
            return world.hands[self.worker].staged.push(op);
        };
        world.hands[self.worker].done.push(Done { slot: io.slot, outcome });
    }

    fn watch(&mut self, token: Token, _: BorrowedFd<'_>) -> io::Result<()> {
        let hands = &mut self.world.borrow_mut().hands[self.worker];
        hands.watched.push(token);
        if hands.written.contains(&token) {
            hands.ready.push(token);
        }
        Ok(())
    }

    fn unwatch(&mut self, token: Token) {
        let hands = &mut self.world.borrow_mut().hands[self.worker];
        hands.watched.retain(|t| *t != token);
        hands.ready.retain(|t| *t != token);
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.meanwhile();
        let world = &mut *self.world.borrow_mut();
        if !world.is_connected(self.worker, wait) {
            return Ok(());
        }
        let changed = world.server.as_ref().map_or(0, |server| server.marks.changed());
        let hands = &mut world.hands[self.worker];
        for mut op in hands.staged.drain(..) {
            (op.begun, op.changed) = (world.disk.clock, changed);
            hands.running.push(op);
        }
        if wait == Wait::Yes && hands.ready.is_empty() && hands.done.is_empty() {
            if hands.running.is_empty() {
                hands.asleep = true;
            } else {
                // Until the first is done.
                let least = hands.running.iter().map(|r| r.turns).min().unwrap_or(0);
                hands.running.iter_mut().for_each(|r| r.turns -= least);
            }
        }
        Ok(())
    }

    fn reap(&mut self, mut each: impl FnMut(Event)) {
        self.meanwhile();
        let world = &mut *self.world.borrow_mut();
        let at = self.worker;
        if world.hands[at].line.is_lost {
            world.read_on(at);
        }
        world.hands[at].done.drain(..).for_each(|done| each(Event::Done(done)));
        loop {
            let running = &mut world.hands[at].running;
            let due = running.iter().filter(|op| op.turns == 0).count() as u64;
            if due == 0 {
                break;
            }
            let chosen = world.dice.below(due) as usize;
            let index = (0..running.len()).filter(|&n| running[n].turns == 0).nth(chosen);
            let mut op = running.swap_remove(index.expect("as many as were counted"));
            match world.advance(&mut op, By::Engine) {
                None => world.hands[at].running.push(op),
                Some(result) => {
                    world.answer(at, &op, Outcome::of_handed_over(result));
                    world.hands[at].done.drain(..).for_each(|done| each(Event::Done(done)));
                }
            }
        }
        let hands = &mut world.hands[at];
        hands.running.iter_mut().for_each(|r| r.turns -= 1);
        hands.ready.drain(..).for_each(|token| each(Event::Ready(token)));
    }

    fn give_up(&mut self, given_up: bool) {
        self.world.borrow_mut().hands[self.worker].line.given_up = given_up;
    }

    fn batch(&self, in_flight: usize) -> usize {
        in_flight.max(self.world.borrow().weather.batch)
    }

    fn chains(&self, offered: u16) -> u16 {
        if self.is_inline() { offered.div_ceil(2).clamp(1, 8) } else { 64 }
    }

    fn is_inline(&self) -> bool {
        self.world.borrow().weather.inline
    }
}
