//! The guest of the simulation, and the play of it with a worker.

use std::cell::Cell;
use std::fs::File;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use vublk::device::Device;
use vublk::inflight::Region;
use vublk::memory::GuestMemory;

use super::bugs::Bug;
use super::daemon::{Thread, table_of};
use super::disk::SECTOR;
use super::model::Model;
use super::requests::Lane;
use super::server::Server;
use super::session::Mode;
use super::setup::Setup;
use super::world::{Shared, World};
use crate::support::dice::Dice;
use crate::support::memory::{Memory, Span};
use crate::support::ring::{Ring, out};
use crate::support::sys::memory_file;

/// Queues of a device, and descriptors of the largest ring, at most.
pub const QUEUES: u16 = 4;
pub const LARGEST: u16 = 256;
const STEPS: u64 = 500;
/// Turns in which an answer has to come when nothing else happens.
pub const PATIENCE: u64 = 8000;

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
    pub handed_over: u64,
    pub mode_changes: u64,
    pub failed_syncs: u64,
    pub lost_servers: u64,
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
        self.handed_over += more.handed_over;
        self.mode_changes += more.mode_changes;
        self.failed_syncs += more.failed_syncs;
        self.lost_servers += more.lost_servers;
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
    pub setup: Setup,
    pub world: Shared,
    pub memory: Rc<Memory>,
    pub table: Arc<GuestMemory>,
    pub region_file: File,
    pub region: Arc<Region>,
    pub queues: Vec<Queue>,
    pub lanes: Vec<Lane>,
    pub model: Vec<Model>,
    pub value: u64,
    pub image: File,
    pub threads: Vec<Thread>,
    pub device: Option<Arc<Device>>,
    pub mode: Mode,
    /// A daemon knows that a sync failed, and tells those after it.
    pub sync_failed: bool,
    /// The server has lost what the guest was answered.
    pub dropped: bool,
    pub lives: u64,
    pub count: Count,
    /// Of bugs: status bytes that are shown late, and a failure that is.
    pub late: Vec<(u64, u8)>,
    pub owed: Rc<Cell<bool>>,
}

impl Play {
    pub fn new(seed: u64, bug: Option<Bug>) -> Self {
        let mut dice = Dice::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x5151);
        for _ in 0..8 {
            dice.roll();
        }
        let setup = Setup::roll(&mut dice, bug);
        let sectors = setup.sectors();
        let world = World::new(Dice::new(dice.roll()), setup.weather, sectors, setup.workers);
        let memory = Memory::with(&[Span { guest: 1 << 20, len: 8 << 20 }]);
        let (region_file, bytes) = Region::create(QUEUES, LARGEST).unwrap();
        let mut play = Self {
            world,
            table: table_of(&memory),
            region: Arc::new(Region::map(&region_file, bytes, 0, QUEUES, LARGEST).unwrap()),
            region_file,
            queues: Vec::new(),
            lanes: (0..setup.lanes).map(|_| Lane::new(&memory)).collect(),
            model: vec![Model::of(0); sectors as usize],
            value: seed << 20,
            image: memory_file(sectors * SECTOR as u64),
            threads: Vec::new(),
            device: None,
            mode: Mode::new(setup.write_back),
            sync_failed: false,
            dropped: false,
            lives: 0,
            count: Count { seeds: 1, ..Count::default() },
            late: Vec::new(),
            owed: Rc::default(),
            setup,
            memory,
            dice,
        };
        if setup.remote {
            let server = Server {
                forgets: bug == Some(Bug::LossForgotten),
                connects_apart: bug == Some(Bug::ConnectedApart),
                sends_lost_flushes: bug == Some(Bug::WaitingFlushSent),
                ..Server::default()
            };
            play.world.borrow_mut().server = Some(server);
        }
        for _ in 0..setup.queues {
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
        let skew = if self.setup.ours && self.dice.rarely(3) { 1 + self.dice.below(3) as u16 } else { 0 };
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
                25 if self.dice.rarely(3) => self.change_mode(),
                26 if self.dice.rarely(20) => self.break_ring(),
                27 if self.dice.rarely(6) => self.migrate(),
                28 if self.setup.remote && self.dice.rarely(3) => self.lose_server(),
                29..=36 if self.world.borrow().has_only_unread_changes() => self.lose_server(),
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
        if self.dice.rarely(2) {
            self.power_cut();
        }
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

    /// Takes every answer that is in a ring.
    pub fn take_answers(&mut self, at: usize) {
        while self.queues[at].ring.used_idx() != self.queues[at].ring.seen {
            self.queues[at].awake = true;
            self.look();
        }
    }

    /// Until everything is answered.
    pub fn settle(&mut self) {
        for _ in 0..PATIENCE {
            self.look();
            if self.lanes.iter().all(|lane| lane.what.is_none()) {
                return;
            }
            let stuck = self.world.borrow().hands.iter().all(|hands| hands.asleep)
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
