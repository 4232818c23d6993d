//! The guest of the simulation, and the play of it with a worker.

use std::fs::File;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::Sender;
use std::time::Duration;

use vublk::device::Device;
use vublk::inflight::Region;
use vublk::memory::GuestMemory;
use vublk::worker::{Command, Worker};

use super::daemon::table_of;
use super::model::Model;
use super::requests::Lane;
use super::world::{SECTOR, Shared, Sim, Weather, World};
use crate::support::dice::Dice;
use crate::support::memory::{Memory, Span};
use crate::support::ring::{Ring, out};
use crate::support::sys::memory_file;

/// Sectors of a lane at most.
pub const AREA: u64 = 16;
/// Descriptors of the largest ring.
const LARGEST: u16 = 256;
const STEPS: u64 = 500;
/// Turns in which an answer has to come when nothing else happens.
pub const PATIENCE: u64 = 4000;

/// What was played.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    pub seeds: u64,
    pub turns: u64,
    pub requests: u64,
    pub crashes: u64,
    pub power_cuts: u64,
    pub stops: u64,
    pub broken: u64,
    pub migrations: u64,
}

impl Count {
    pub fn add(&mut self, more: Self) {
        self.seeds += more.seeds;
        self.turns += more.turns;
        self.requests += more.requests;
        self.crashes += more.crashes;
        self.power_cuts += more.power_cuts;
        self.stops += more.stops;
        self.broken += more.broken;
        self.migrations += more.migrations;
    }
}

/// A ring and what its driver is doing.
pub struct Queue {
    pub ring: Ring,
    /// The driver looks at the used ring by itself.
    pub awake: bool,
    /// Lane of each head.
    pub owner: Vec<usize>,
    pub indirect: bool,
    /// Where it is to be started; `None`: it runs.
    pub base: Option<u16>,
    pub flush_failed: bool,
    /// Chains that an earlier device has lost: how far base is ahead of used.idx.
    pub skew: u16,
}

/// See the head of the file.
pub struct Play {
    pub dice: Dice,
    pub world: Shared,
    pub memory: Rc<Memory>,
    pub table: Arc<GuestMemory>,
    pub region_file: File,
    pub region: Arc<Region>,
    /// The front-end knows nothing of the region.
    pub ours: bool,
    pub queues: Vec<Queue>,
    pub lanes: Vec<Lane>,
    /// Sectors of a lane. Neighbours may share blocks of the disk.
    pub area: u64,
    pub model: Vec<Model>,
    pub value: u64,
    pub image: File,
    pub direct: bool,
    pub block: u32,
    pub writeback: bool,
    pub plug: bool,
    pub worker: Option<Worker<Sim>>,
    pub device: Option<Arc<Device>>,
    pub commands: Option<Sender<Command>>,
    /// A daemon knows that an fdatasync failed, and tells those after it.
    pub sync_failed: bool,
    pub lives: u64,
    pub count: Count,
}

impl Play {
    pub fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x5151);
        for _ in 0..8 {
            dice.roll();
        }
        let weather = Weather {
            faults: [0, 0, 60, 12][dice.below(4) as usize],
            bad_syncs: if dice.rarely(6) { 8 } else { 0 },
            delay: [0, 2, 9][dice.below(3) as usize],
            crashes: [0, 400, 60][dice.below(3) as usize],
            inline: dice.rarely(4),
            batch: [4, usize::MAX][dice.below(2) as usize],
        };
        // Enough of them for a driver to be woken late, where the disk is memory.
        let lanes = if dice.rarely(6) { 40 } else { 12 };
        let sectors = lanes * AREA;
        let world = World::new(Dice::new(dice.roll()), weather, sectors as usize);
        let memory = Memory::with(&[Span { guest: 1 << 20, len: 8 << 20 }]);
        let table = table_of(&memory);
        let queues = 1 + dice.below(2);
        let (region_file, bytes) = Region::create(2, LARGEST).unwrap();
        let region = Arc::new(Region::map(&region_file, bytes, 0, 2, LARGEST).unwrap());
        let image = memory_file(sectors * SECTOR as u64);
        let lanes = (0..lanes).map(|at| Lane::new(&memory, at)).collect();
        let (direct, small) = (dice.rarely(2), dice.rarely(3));
        let block = if direct && small { 4096 } else { 512 };
        let mut play = Self {
            world,
            table,
            region_file,
            region,
            ours: dice.rarely(3),
            queues: Vec::new(),
            lanes,
            area: if block == 512 && dice.rarely(2) { 13 } else { AREA },
            model: vec![Model::of(0); sectors as usize],
            value: seed << 20,
            image,
            direct,
            block,
            writeback: !dice.rarely(4),
            plug: dice.rarely(2),
            worker: None,
            device: None,
            commands: None,
            sync_failed: false,
            lives: 0,
            count: Count { seeds: 1, ..Count::default() },
            memory,
            dice,
        };
        for _ in 0..queues {
            let queue = play.boot_queue();
            play.queues.push(queue);
        }
        play
    }

    /// A driver that begins anew.
    pub fn boot_queue(&mut self) -> Queue {
        let large = if self.lanes.len() > 12 { LARGEST } else { 64 };
        let size = [16, large][self.dice.below(2) as usize];
        let event_idx = self.dice.rarely(2);
        let base = self.dice.roll() as u16;
        // Pages of its own, so that the log can be judged.
        let mut ring = Ring::aligned(Rc::clone(&self.memory), size, base, event_idx, 4096);
        self.memory.alloc(1, 4096);
        self.guest_wrote(ring.table, ring.used + 4096 - ring.table);
        // Whose front-end says so by the base; one with a region does not.
        let skew = if self.ours && self.dice.rarely(3) { 1 + self.dice.below(3) as u16 } else { 0 };
        for _ in 0..skew {
            let lost = ring.chain(&[out(self.lanes[0].header, 16)]);
            ring.stage(lost);
        }
        ring.publish();
        Queue {
            ring,
            awake: true,
            owner: vec![usize::MAX; size.into()],
            indirect: self.dice.rarely(2),
            base: Some(base.wrapping_add(skew)),
            flush_failed: false,
            skew,
        }
    }

    pub fn run(mut self) -> Count {
        self.start();
        for _ in 0..STEPS {
            match self.dice.below(64) {
                0..=11 => self.offer(),
                12..=20 => self.look(),
                21 if self.dice.rarely(8) => self.kill(),
                22 if self.dice.rarely(20) => self.power_cut(),
                23 if self.dice.rarely(3) => self.stop_and_start(),
                24 if self.dice.rarely(3) => self.change_memory(),
                25 if self.dice.rarely(6) => self.change_cache(),
                26 if self.dice.rarely(20) => self.break_ring(),
                27 if self.dice.rarely(6) => self.migrate(),
                _ => drop(self.turn()),
            }
        }
        self.settle();
        for (sector, model) in self.model.iter().enumerate() {
            let value = self.world.borrow().read(sector as u64);
            let may: Vec<u64> = model.values().collect();
            assert!(may.contains(&value), "sector {sector} holds {value:#x} in the end, not {may:x?}");
        }
        self.count.crashes += self.world.borrow().crashes;
        self.count
    }

    /// Takes answers, from rings whose driver is awake or was interrupted.
    pub fn look(&mut self) {
        for at in 0..self.queues.len() {
            let queue = &mut self.queues[at];
            if !queue.awake {
                if queue.ring.call.take() == 0 {
                    continue;
                }
                queue.awake = true;
                if !queue.ring.event_idx && self.dice.rarely(2) {
                    queue.ring.set_interrupts(false);
                }
            }
            let mut some = 1 + self.dice.below(8);
            while some > 0
                && let Some(used) = self.queues[at].ring.take_used()
            {
                some -= 1;
                let lane = std::mem::replace(&mut self.queues[at].owner[usize::from(used.head)], usize::MAX);
                self.answered(lane, used.len, at);
            }
            let queue = &mut self.queues[at];
            if some > 0 {
                // Nothing left: sleep until the next interrupt.
                queue.ring.set_interrupts(true);
                if queue.ring.event_idx {
                    queue.ring.set_used_event(queue.ring.seen);
                }
                fence(Ordering::SeqCst);
                queue.awake = queue.ring.used_idx() != queue.ring.seen;
            }
            self.driver_wrote(at);
        }
    }

    /// Until everything is answered.
    pub fn settle(&mut self) {
        for _ in 0..PATIENCE {
            self.look();
            if self.lanes.iter().all(|lane| lane.what.is_none()) {
                return;
            }
            let stuck = self.world.borrow().asleep
                && self.queues.iter().all(|q| !q.awake && !q.ring.call.within(Duration::ZERO));
            if stuck {
                let unseen = self.queues.iter().any(|q| q.ring.used_idx() != q.ring.seen);
                panic!("{}", if unseen { "an interrupt was lost" } else { "a kick was lost" });
            }
            let _it_died = self.turn();
        }
        let waiting: Vec<_> = self.lanes.iter().filter_map(|lane| lane.what.as_ref()).collect();
        panic!("no answer in {PATIENCE} turns to {waiting:?}");
    }
}
