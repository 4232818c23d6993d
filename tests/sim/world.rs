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

use crate::support::dice::Dice;

pub const SECTOR: usize = 512;

/// What a crash is inside of the worker: a panic with this.
pub struct Crash;

/// How wild the world is, in a seed.
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
}

/// One sector of the disk.
#[derive(Clone, Debug, Default)]
struct Sector {
    durable: u64,
    /// What was written since, oldest first.
    cached: Vec<u64>,
}

impl Sector {
    fn now(&self) -> u64 {
        self.cached.last().copied().unwrap_or(self.durable)
    }
}

struct Running {
    io: Io,
    /// The iovecs, as they were when it was submitted.
    vectors: Vec<libc::iovec>,
    turns: u64,
}

/// See the head of the file.
pub struct World {
    pub dice: Dice,
    pub weather: Weather,
    sectors: Vec<Sector>,
    running: Vec<Running>,
    staged: Vec<Running>,
    watched: Vec<Token>,
    ready: Vec<Token>,
    /// The worker went to sleep, and nothing has woken it.
    pub asleep: bool,
    pub crashes: u64,
    /// An fdatasync failed, and this daemon knows.
    pub sync_failed: bool,
}

pub type Shared = Rc<RefCell<World>>;

impl World {
    pub fn new(dice: Dice, weather: Weather, sectors: usize) -> Shared {
        Rc::new(RefCell::new(Self {
            dice,
            weather,
            sectors: vec![Sector::default(); sectors],
            running: Vec::new(),
            staged: Vec::new(),
            watched: Vec::new(),
            ready: Vec::new(),
            asleep: false,
            crashes: 0,
            sync_failed: false,
        }))
    }

    /// Somebody writes an eventfd that the worker watches.
    pub fn signal(&mut self, token: Token) {
        if self.watched.contains(&token) {
            self.ready.push(token);
            self.asleep = false;
        }
    }

    /// The daemon is gone; what the kernel has of it ends before another serves.
    pub fn bury(&mut self) {
        self.watched.clear();
        self.ready.clear();
        self.asleep = false;
        self.staged.clear();
        while !self.running.is_empty() {
            let at = self.dice.below(self.running.len() as u64) as usize;
            let op = self.running.swap_remove(at);
            let _nobody_asks = self.execute(&op);
        }
        self.sync_failed = false;
    }

    /// The power fails: each sector has what was durable, or anything newer.
    pub fn power_cut(&mut self) {
        // Those that run stop where they are: some of their sectors are written.
        self.bury();
        for sector in &mut self.sectors {
            let choice = self.dice.below(sector.cached.len() as u64 + 1) as usize;
            if choice > 0 {
                sector.durable = sector.cached[choice - 1];
            }
            sector.cached.clear();
        }
    }

    /// What is on the disk.
    pub fn read(&self, sector: u64) -> u64 {
        self.sectors[sector as usize].now()
    }

    fn crash_now(&mut self) -> bool {
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
                if self.weather.bad_syncs > 0 && self.dice.rarely(self.weather.bad_syncs) {
                    self.sync_failed = true;
                    return Err(libc::EIO);
                }
                self.sectors.iter_mut().for_each(|s| {
                    s.durable = s.now();
                    s.cached.clear();
                });
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
                let (count, result) = match faulty.then(|| self.dice.below(5)) {
                    None => (blocks, Ok(op.io.len)),
                    Some(0) => (self.dice.below(blocks + 1), Err(libc::EIO)),
                    Some(1) => (self.dice.below(blocks + 1), Err(libc::ENOSPC)),
                    Some(2) => (0, Err(libc::EAGAIN)),
                    Some(3) => (0, Err(libc::EINTR)),
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
                    sector.durable = value;
                    sector.cached.clear();
                }
            }
        }
    }
}

/// The engine of the simulation: a handle to the world.
pub struct Sim(pub Shared);

impl Sim {
    fn maybe_crash(&self) {
        if self.0.borrow_mut().crash_now() {
            std::panic::panic_any(Crash);
        }
    }
}

impl Engine for Sim {
    unsafe fn queue(&mut self, io: Io) {
        self.maybe_crash();
        let mut world = self.0.borrow_mut();
        let vectors = if matches!(io.op, Op::Read | Op::Write { .. }) {
            // SAFETY: the worker vouches for them until the operation is done.
            unsafe { std::slice::from_raw_parts(io.iovecs, io.iovec_count as usize) }.to_vec()
        } else {
            Vec::new()
        };
        let turns = world.dice.roll() % (world.weather.delay + 1);
        world.staged.push(Running { io, vectors, turns });
    }

    fn watch(&mut self, token: Token, _: BorrowedFd<'_>) -> io::Result<()> {
        let mut world = self.0.borrow_mut();
        world.watched.push(token);
        // A count that is there already is an event, too.
        world.ready.push(token);
        Ok(())
    }

    fn unwatch(&mut self, token: Token) {
        let mut world = self.0.borrow_mut();
        world.watched.retain(|t| *t != token);
        world.ready.retain(|t| *t != token);
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.maybe_crash();
        let mut world = self.0.borrow_mut();
        let staged = std::mem::take(&mut world.staged);
        world.running.extend(staged);
        if wait == Wait::Yes {
            if world.running.is_empty() && world.ready.is_empty() {
                world.asleep = true;
            } else if world.ready.is_empty() {
                // Until the first is done.
                let least = world.running.iter().map(|r| r.turns).min().unwrap_or(0);
                world.running.iter_mut().for_each(|r| r.turns -= least);
            }
        }
        Ok(())
    }

    fn reap(&mut self, mut each: impl FnMut(Event)) {
        self.maybe_crash();
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
}
