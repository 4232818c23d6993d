//! The world around a worker: a disk with a volatile cache, and an engine that
//! reorders, delays, cuts short and fails what it is given, as its dice say.
//!
//! Every sector holds one number, repeated in all of its words, so that a torn
//! sector would show.

use std::cell::RefCell;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

use vublk::engine::{Done, Engine, Event, Io, Op, Token, Wait};

use super::migration::Migration;
use crate::support::dice::Dice;

pub const SECTOR: usize = 512;

/// What a crash is inside of the worker: a panic with this.
pub struct Crash;

/// How wild the world is, in a seed, and of which kind.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// One in so many operations fails, or is cut short; 0: none.
    pub faults: u64,
    /// One in so many fdatasyncs fails; 0: none.
    pub bad_syncs: u64,
    /// Operations take up to so many turns.
    pub delay: u64,
    /// One in so many calls of the engine is the daemon's last; 0: none.
    pub crashes: u64,
    /// The disk is memory: reads and writes are over when they were asked for.
    pub inline: bool,
    /// Operations of a queue that are submitted together.
    pub batch: usize,
}

/// One sector of the disk.
#[derive(Clone, Debug, Default)]
struct Sector {
    durable: u64,
    /// What is there, but was given up: nothing will make it durable.
    lost: Option<u64>,
    /// What was written since, oldest first, and how many came before those.
    cached: Vec<u64>,
    older: usize,
}

impl Sector {
    fn now(&self) -> u64 {
        self.cached.last().copied().or(self.lost).unwrap_or(self.durable)
    }

    fn written(&self) -> usize {
        self.older + self.cached.len()
    }

    /// The first `count` that were ever written are durable.
    fn settle(&mut self, count: usize) {
        let some = count.saturating_sub(self.older).min(self.cached.len());
        if let Some(last) = self.cached.drain(..some).next_back() {
            (self.durable, self.lost) = (last, None);
        }
        self.older += some;
    }

    /// What is cached now is given up.
    fn lose(&mut self) {
        self.lost = self.cached.last().copied().or(self.lost);
        self.older += self.cached.len();
        self.cached.clear();
    }
}

struct Running {
    io: Io,
    /// The iovecs, as they were when it was submitted.
    vectors: Vec<libc::iovec>,
    turns: u64,
    /// For fdatasync: how much each sector was written when it began.
    begun: Vec<usize>,
}

/// See the head of the file.
pub struct World {
    pub dice: Dice,
    pub weather: Weather,
    /// What O_DIRECT asks of offsets and of addresses, bytes; 1: nothing.
    offset_align: u64,
    mem_align: u64,
    sectors: Vec<Sector>,
    running: Vec<Running>,
    staged: Vec<Running>,
    done: Vec<Done>,
    watched: Vec<Token>,
    /// Eventfds whose count is not 0. Nobody reads it.
    written: Vec<Token>,
    ready: Vec<Token>,
    /// The worker went to sleep, and nothing has woken it.
    pub asleep: bool,
    pub crashes: u64,
    /// Looks at the guest's memory while the worker is at work.
    pub migration: Option<Migration>,
}

pub type Shared = Rc<RefCell<World>>;

impl World {
    pub fn new(dice: Dice, weather: Weather, sectors: usize) -> Shared {
        Rc::new(RefCell::new(Self {
            dice,
            weather,
            offset_align: 1,
            mem_align: 1,
            sectors: vec![Sector::default(); sectors],
            running: Vec::new(),
            staged: Vec::new(),
            done: Vec::new(),
            watched: Vec::new(),
            written: Vec::new(),
            ready: Vec::new(),
            asleep: false,
            crashes: 0,
            migration: None,
        }))
    }

    /// What the disk asks of operations.
    pub fn rules(&mut self, offset_align: u32, mem_align: u32) {
        (self.offset_align, self.mem_align) = (offset_align.into(), mem_align.into());
    }

    /// Somebody writes an eventfd.
    pub fn signal(&mut self, token: Token) {
        if !self.written.contains(&token) {
            self.written.push(token);
        }
        if self.watched.contains(&token) {
            self.ready.push(token);
            self.asleep = false;
        }
    }

    /// There is a new eventfd of this name.
    pub fn forget(&mut self, token: Token) {
        self.written.retain(|t| *t != token);
    }

    /// The daemon is gone; what the kernel has of it ends before another serves.
    pub fn bury(&mut self) {
        self.watched.clear();
        self.ready.clear();
        self.forget(Token(0));
        self.asleep = false;
        self.staged.clear();
        self.done.clear();
        while !self.running.is_empty() {
            let at = self.dice.below(self.running.len() as u64) as usize;
            let op = self.running.swap_remove(at);
            let _nobody_asks = self.execute(&op);
        }
    }

    /// The power fails: each sector has what was durable, or anything newer.
    pub fn power_cut(&mut self) {
        // Those that run stop where they are: some of their sectors are written, and
        // nobody knows how far an fdatasync had come.
        for op in std::mem::take(&mut self.running) {
            match op.io.op {
                Op::Sync if self.dice.rarely(2) => {}
                Op::Read => {}
                Op::Write { .. } => {
                    let some = self.dice.below(op.io.len / SECTOR as u64 + 1);
                    self.transfer(&op, some);
                }
                Op::Sync | Op::Fallocate(_) => drop(self.execute(&op)),
            }
        }
        self.bury();
        for sector in &mut self.sectors {
            let choice = self.dice.below(sector.cached.len() as u64 + 1) as usize;
            sector.settle(sector.older + choice);
            sector.cached.clear();
            sector.lost = None;
        }
    }

    /// The daemon knows now that an fdatasync failed: the kernel has given up some of
    /// what it did not write, and shows it all the same.
    pub fn lose(&mut self) {
        for sector in &mut self.sectors {
            if self.dice.rarely(2) {
                sector.lose();
            }
        }
    }

    /// What is on the disk.
    pub fn read(&self, sector: u64) -> u64 {
        self.sectors[sector as usize].now()
    }

    /// Something else happens while the worker is at work. True: its end.
    fn meanwhile(&mut self) -> bool {
        if let Some(migration) = &mut self.migration
            && self.dice.rarely(8)
        {
            migration.pass();
        }
        let crash = self.weather.crashes > 0 && self.dice.rarely(self.weather.crashes);
        self.crashes += u64::from(crash);
        crash
    }

    /// Carries an operation out, or a part of it.
    fn execute(&mut self, op: &Running) -> Result<u64, i32> {
        let faulty = self.weather.faults > 0 && self.dice.rarely(self.weather.faults);
        let blocks = op.io.len / SECTOR as u64;
        match op.io.op {
            Op::Sync => {
                if faulty && self.dice.rarely(2) {
                    return Err(libc::EINTR);
                }
                if self.weather.bad_syncs > 0 && self.dice.rarely(self.weather.bad_syncs) {
                    return Err(libc::EIO);
                }
                // What was written while it ran may be durable as well.
                let more = self.dice.rarely(2);
                for (sector, &begun) in self.sectors.iter_mut().zip(&op.begun) {
                    sector.settle(if more { sector.written() } else { begun });
                }
                Ok(0)
            }
            Op::Fallocate(_) => {
                if faulty {
                    return Err(if self.dice.rarely(2) { libc::EOPNOTSUPP } else { libc::EIO });
                }
                for at in 0..blocks {
                    self.sectors[(op.io.offset / SECTOR as u64 + at) as usize].cached.push(0);
                }
                Ok(0)
            }
            Op::Read | Op::Write { .. } => {
                let (count, result) = match faulty.then(|| self.dice.below(6)) {
                    None => (blocks, Ok(op.io.len)),
                    Some(0) => (self.dice.below(blocks + 1), Err(libc::EIO)),
                    Some(1) => (self.dice.below(blocks + 1), Err(libc::ENOSPC)),
                    Some(2) => (0, Err(libc::EAGAIN)),
                    Some(3) => (0, Err(libc::EINTR)),
                    Some(4) => (0, Err(libc::EINVAL)),
                    Some(_) => {
                        let some = 1 + self.dice.below(blocks);
                        (some, Ok(some * SECTOR as u64))
                    }
                };
                self.transfer(op, count);
                result
            }
        }
    }

    /// Moves the first `count` sectors.
    fn transfer(&mut self, op: &Running, count: u64) {
        let mut words = op.vectors.iter().flat_map(|v| {
            (0..v.iov_len / 8).map(move |at| {
                // SAFETY: the worker vouches for the iovecs as long as the operation
                // runs, and the memory is mapped as long as the simulation.
                unsafe { v.iov_base.cast::<u64>().add(at) }
            })
        });
        for at in 0..count {
            let sector = &mut self.sectors[(op.io.offset / SECTOR as u64 + at) as usize];
            let first = words.next().expect("a word of the sector");
            let rest = words.by_ref().take(SECTOR / 8 - 1);
            if op.io.op == Op::Read {
                // SAFETY: as above; the driver may read it at any time.
                unsafe { first.write_unaligned(sector.now()) };
                // SAFETY: as above.
                rest.for_each(|word| unsafe { word.write_unaligned(sector.now()) });
            } else {
                // SAFETY: as above.
                let value = unsafe { first.read_unaligned() };
                for word in rest {
                    // SAFETY: as above.
                    assert_eq!(unsafe { word.read_unaligned() }, value, "a torn sector is written");
                }
                sector.cached.push(value);
                if op.io.op == (Op::Write { dsync: true }) {
                    sector.settle(sector.written());
                }
            }
        }
    }

    /// What O_DIRECT refuses, and what leaves the disk.
    fn judge(&self, io: &Io, vectors: &[libc::iovec]) {
        assert!(io.offset + io.len <= (self.sectors.len() * SECTOR) as u64, "it leaves the disk: {io:?}");
        if let Op::Fallocate(mode) = io.op {
            let punches = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let zeroes = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
            assert!([punches, zeroes].contains(&mode), "fallocate({mode:#x})");
        }
        if !matches!(io.op, Op::Read | Op::Write { .. }) {
            return;
        }
        let (offset_align, mem_align) = (self.offset_align, self.mem_align);
        let total: usize = vectors.iter().map(|v| v.iov_len).sum();
        assert_eq!(total as u64, io.len, "what the iovecs add up to");
        assert!(
            io.offset.is_multiple_of(offset_align) && io.len.is_multiple_of(offset_align),
            "O_DIRECT: {io:?}"
        );
        for v in vectors {
            let aligned = (v.iov_base.addr() as u64).is_multiple_of(mem_align);
            assert!(
                aligned && (v.iov_len as u64).is_multiple_of(mem_align.min(offset_align)),
                "O_DIRECT: {v:?}"
            );
        }
    }
}

/// The engine of the simulation: a handle to the world.
pub struct Sim(pub Shared);

impl Sim {
    fn meanwhile(&self) {
        // Not while the world is borrowed: a panic goes through here.
        let crash = self.0.borrow_mut().meanwhile();
        if crash {
            std::panic::panic_any(Crash);
        }
    }
}

impl Engine for Sim {
    unsafe fn queue(&mut self, io: Io) {
        self.meanwhile();
        let mut world = self.0.borrow_mut();
        let moves = matches!(io.op, Op::Read | Op::Write { .. });
        let vectors = if moves {
            // SAFETY: the worker vouches for them until the operation is done.
            unsafe { std::slice::from_raw_parts(io.iovecs, io.iovec_count as usize) }.to_vec()
        } else {
            Vec::new()
        };
        world.judge(&io, &vectors);
        let turns = world.dice.roll() % (world.weather.delay + 1);
        let op = Running { io, vectors, turns, begun: Vec::new() };
        if moves && world.weather.inline {
            let result = world.execute(&op);
            world.done.push(Done { slot: op.io.slot, result });
        } else {
            world.staged.push(op);
        }
    }

    fn watch(&mut self, token: Token, _: BorrowedFd<'_>) -> io::Result<()> {
        let mut world = self.0.borrow_mut();
        world.watched.push(token);
        if world.written.contains(&token) {
            world.ready.push(token);
        }
        Ok(())
    }

    fn unwatch(&mut self, token: Token) {
        let mut world = self.0.borrow_mut();
        world.watched.retain(|t| *t != token);
        world.ready.retain(|t| *t != token);
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.meanwhile();
        let mut world = self.0.borrow_mut();
        for mut op in std::mem::take(&mut world.staged) {
            if op.io.op == Op::Sync {
                op.begun = world.sectors.iter().map(Sector::written).collect();
            }
            world.running.push(op);
        }
        if wait == Wait::Yes && world.ready.is_empty() && world.done.is_empty() {
            if world.running.is_empty() {
                world.asleep = true;
            } else {
                // Until the first is done.
                let least = world.running.iter().map(|r| r.turns).min().unwrap_or(0);
                world.running.iter_mut().for_each(|r| r.turns -= least);
            }
        }
        Ok(())
    }

    fn reap(&mut self, mut each: impl FnMut(Event)) {
        self.meanwhile();
        let done = std::mem::take(&mut self.0.borrow_mut().done);
        done.into_iter().for_each(|done| each(Event::Done(done)));
        loop {
            let mut world = self.0.borrow_mut();
            let due: Vec<usize> =
                (0..world.running.len()).filter(|&at| world.running[at].turns == 0).collect();
            if due.is_empty() {
                break;
            }
            let at = due[world.dice.below(due.len() as u64) as usize];
            let op = world.running.swap_remove(at);
            let result = world.execute(&op);
            drop(world);
            each(Event::Done(Done { slot: op.io.slot, result }));
        }
        let mut world = self.0.borrow_mut();
        world.running.iter_mut().for_each(|r| r.turns -= 1);
        let ready = std::mem::take(&mut world.ready);
        drop(world);
        ready.into_iter().for_each(|token| each(Event::Ready(token)));
    }

    fn batch(&self, in_flight: usize) -> usize {
        in_flight.max(self.0.borrow().weather.batch)
    }

    fn chains(&self, offered: u16) -> u16 {
        if self.is_inline() { offered.div_ceil(2).clamp(1, 8) } else { 64 }
    }

    fn is_inline(&self) -> bool {
        self.0.borrow().weather.inline
    }
}
