//! The daemon as its front-end sees it: started, asked, killed, and started again
//! as a successor would be.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{channel, sync_channel};
use std::time::Duration;

use vublk::engine::Token;
use vublk::memory::{GuestMemory, RegionLayout};
use vublk::ring::split::{self, Layout, RingState};
use vublk::worker::{Ack, Command, Nap, PoolSize, QueueParts, Tuning, Worker};
use vublk::{config, device, disk, sys};

use super::guest::{PATIENCE, Play, Queue};
use super::migration::Migration;
use super::model::Model;
use super::requests::What;
use super::world::{Crash, Sim};
use crate::support::memory::Memory;

pub fn table_of(memory: &Memory) -> Arc<GuestMemory> {
    let region = &memory.regions[0];
    let layout =
        RegionLayout { guest: region.guest, len: region.len, user: region.user, offset: region.offset };
    Arc::new(GuestMemory::map(&[layout], vec![region.file.try_clone().unwrap()]).unwrap())
}

impl Play {
    pub fn start(&mut self) {
        let path = format!("/proc/self/fd/{}", self.image.as_raw_fd());
        let options = disk::Options {
            path: path.into(),
            direct: self.direct,
            read_only: false,
            logical_block_size: Some(self.block),
            serial: String::new(),
            lock: false,
            incoming: false,
            instance: "sim".into(),
        };
        let disk = disk::Disk::open(&options, &|| false).unwrap();
        if self.sync_failed {
            disk.set_sync_failed(); // a successor is told
        }
        self.world.borrow_mut().rules(disk.facts().offset_align, disk.mem_align());
        let geometry = config::geometry(disk.facts(), "");
        let device = Arc::new(device::Device::new(disk, geometry, self.writeback));
        let (commands, inbox) = channel();
        let tuning =
            Tuning { pool: PoolSize { chunks: 2, chunk_len: 8192 }, poll: Duration::ZERO, plug: self.plug };
        let engine = Sim(Rc::clone(&self.world));
        let queues = self.queues.len() as u16;
        let worker = Worker::new(engine, Arc::clone(&device), queues, tuning, sys::eventfd().unwrap(), inbox);
        self.worker = Some(worker.unwrap());
        self.device = Some(device);
        self.commands = Some(commands);
        let _it_died = self.set_up();
    }

    /// What a successor is told before the guest goes on. `None`: it died of it, and
    /// another one has been told.
    fn set_up(&mut self) -> Option<()> {
        let table = Arc::clone(&self.table);
        self.ask(|ack| Command::SetMemory(table, ack))?;
        if let Some(log) = self.log() {
            self.ask(|ack| Command::SetLog(Some(log), ack))?;
        }
        (0..self.queues.len()).try_for_each(|at| self.start_queue(at))
    }

    fn log(&self) -> Option<Arc<vublk::dirty::DirtyLog>> {
        self.world.borrow().migration.as_ref().map(|migration| Arc::clone(&migration.log))
    }

    /// `None`: the daemon died of it.
    fn start_queue(&mut self, at: usize) -> Option<()> {
        let Queue { ring, indirect, base, .. } = &self.queues[at];
        let user = |guest| self.memory.user(guest);
        let layout = Layout {
            size: ring.size,
            desc: user(ring.table),
            avail: user(ring.avail),
            used: user(ring.used),
        };
        // After a crash: what QEMU gives. The region knows better.
        let from = base.unwrap_or(ring.used_idx());
        let device = split::Ring::new(&self.table, layout, from, ring.event_idx).unwrap();
        let device = if self.ours {
            device.journalled_by_us(&self.region, at as u16, base.is_none()).unwrap()
        } else {
            device.journalled(&self.region, at as u16).unwrap()
        };
        let parts = QueueParts {
            ring: device,
            kick: ring.kick.as_fd().try_clone_to_owned().unwrap(),
            call: Some(ring.call.as_fd().try_clone_to_owned().unwrap()),
            err: None,
            indirect: *indirect,
            used_log: self.log().map(|_| ring.used),
        };
        let started = self.ask(|ack| Command::Start(at as u16, Box::new(parts), ack))?;
        started.unwrap();
        self.queues[at].base = None;
        // What the session does when it is given a call eventfd.
        self.queues[at].ring.call.signal();
        Some(())
    }

    /// Asks the worker and turns until it has answered. `None`: the daemon died.
    fn ask<T>(&mut self, command: impl FnOnce(Ack<T>) -> Command) -> Option<T> {
        let (value, answer) = sync_channel(1);
        let command = command(Ack::new(value, sys::eventfd().unwrap()));
        self.commands.as_ref().unwrap().send(command).unwrap();
        self.world.borrow_mut().signal(Token(0));
        for _ in 0..PATIENCE {
            self.turn()?;
            if let Ok(value) = answer.try_recv() {
                return Some(value);
            }
            // A guest that goes on, which a stop must not mind.
            if self.dice.rarely(4) {
                self.look();
            }
        }
        panic!("the worker does not answer a command");
    }

    /// One turn. `None`: the daemon died in it, and another is there.
    pub fn turn(&mut self) -> Option<()> {
        if self.world.borrow().asleep {
            return Some(()); // as if it had called, and slept on
        }
        // At times it looks on instead of sleeping.
        let nap = Nap { idle: !self.dice.rarely(4), in_flight: !self.dice.rarely(4) };
        let worker = self.worker.as_mut().unwrap();
        let turned = catch_unwind(AssertUnwindSafe(|| worker.turn(nap)));
        if !self.sync_failed && self.device.as_ref().unwrap().disk.sync_failed() {
            self.sync_failed = true;
            self.world.borrow_mut().lose();
        }
        match turned {
            Ok(turn) => {
                self.count.turns += u64::from(turn.unwrap().busy);
                Some(())
            }
            Err(panic) if panic.is::<Crash>() => {
                self.restart();
                None
            }
            Err(panic) => resume_unwind(panic),
        }
    }

    /// The daemon is dead; the next one starts when the kernel is done with it.
    fn restart(&mut self) {
        // The kernel holds the pages that it still writes to.
        self.world.borrow_mut().bury();
        (self.worker, self.device) = (None, None);
        self.commands = None;
        self.lives += 1;
        self.start();
    }

    pub fn kill(&mut self) {
        self.count.crashes += 1;
        self.restart();
    }

    pub fn stop_and_start(&mut self) {
        let at = self.dice.below(self.queues.len() as u64) as usize;
        if self.stop(at).is_some() {
            self.count.stops += 1;
            self.start_queue(at);
        }
    }

    /// `None`: the daemon died of it, and the queue runs.
    fn stop(&mut self, at: usize) -> Option<()> {
        let state = self.ask(|ack| Command::Stop(at as u16, ack))?;
        let RingState { next_avail } = state.expect("a queue that was served");
        let queue = &mut self.queues[at];
        queue.base = Some(next_avail);
        let owed = queue.ring.avail_idx.wrapping_sub(next_avail);
        let answered = queue.ring.used_idx();
        assert_eq!(
            answered.wrapping_add(queue.skew),
            next_avail,
            "stopped at {next_avail} with {owed} chains left, but {answered} are answered"
        );
        Some(())
    }

    pub fn change_memory(&mut self) {
        self.table = table_of(&self.memory);
        let table = Arc::clone(&self.table);
        if let Some(outside) = self.ask(|ack| Command::SetMemory(table, ack)) {
            assert!(outside.is_empty());
        }
    }

    /// The front-end restarts the daemon in the other mode, all being answered.
    pub fn change_cache(&mut self) {
        self.settle();
        self.writeback = !self.writeback;
        self.restart();
    }

    /// A driver breaks its ring; then the guest resets the device.
    pub fn break_ring(&mut self) {
        let at = self.dice.below(self.queues.len() as u64) as usize;
        let lives = self.lives;
        let far = 1 + self.dice.below(u64::from(u16::MAX - 2 * self.queues[at].ring.size)) as u16;
        let Queue { ring, .. } = &self.queues[at];
        let index = ring.avail_idx.wrapping_add(ring.size).wrapping_add(far);
        self.memory.store16(ring.avail + 2, index);
        self.driver_wrote(at);
        self.world.borrow_mut().signal(Token(at as u16 + 1));
        for _ in 0..self.dice.below(20) {
            let _it_died = self.turn();
            self.look();
        }
        // What was fetched is returned, whatever the ring looks like.
        while self.stop(at).is_none() {}
        let queue = &mut self.queues[at];
        queue.awake = true;
        while self.queues[at].ring.used_idx() != self.queues[at].ring.seen {
            self.queues[at].awake = true;
            self.look();
        }
        for lane in 0..self.lanes.len() {
            if self.lanes[lane].queue == at && self.lanes[lane].what.is_some() {
                // Without a crash: never fetched.
                self.give_up_lane(lane, self.lives != lives);
            }
        }
        self.queues[at] = self.boot_queue();
        self.world.borrow_mut().forget(Token(at as u16 + 1));
        self.count.broken += 1;
        self.start_queue(at);
    }

    /// A migration begins, or is given up, or ends; then the guest goes on here.
    pub fn migrate(&mut self) {
        let going_on = self.world.borrow().migration.is_some();
        if !going_on {
            let migration = Migration::new(&self.memory);
            self.world.borrow_mut().migration = Some(migration);
            if self.log_to(true).is_some() {
                self.begin_copy();
            }
            return;
        }
        if self.dice.rarely(2) {
            self.settle();
        }
        // Another death only begins it anew.
        while !(0..self.queues.len()).all(|at| self.queues[at].base.is_some() || self.stop(at).is_some()) {}
        let migration = self.world.borrow_mut().migration.take().unwrap();
        self.count.migrations += 1;
        migration.end();
        let _it_died =
            self.log_to(false).and_then(|()| (0..self.queues.len()).try_for_each(|at| self.start_queue(at)));
    }

    fn begin_copy(&mut self) {
        if let Some(migration) = &mut self.world.borrow_mut().migration {
            migration.begin();
        }
    }

    /// The log, and then the flag of each ring, on rings that run. `None`: the daemon
    /// died; its successor has both.
    fn log_to(&mut self, on: bool) -> Option<()> {
        let log = self.log();
        let set = self.ask(|ack| Command::SetLog(log, ack));
        if set.is_none() {
            self.begin_copy();
        }
        set?;
        for at in 0..self.queues.len() {
            let used = on.then_some(self.queues[at].ring.used);
            if self.queues[at].base.is_none() {
                let set = self.ask(|ack| Command::SetUsedLog(at as u16, used, ack));
                if set.is_none() {
                    self.begin_copy();
                }
                set?;
            }
        }
        Some(())
    }

    pub fn power_cut(&mut self) {
        self.count.power_cuts += 1;
        self.world.borrow_mut().power_cut();
        (self.worker, self.device) = (None, None);
        self.commands = None;
        self.sync_failed = false;
        self.lives += 1;
        for sector in 0..self.model.len() as u64 {
            let value = self.world.borrow().read(sector);
            let mut may = self.model[sector as usize].left.clone();
            for lane in self.lanes.iter().filter(|l| (l.sector..l.sector + l.count).contains(&sector)) {
                match &lane.what {
                    Some(What::Write(values)) => may.push(values[(sector - lane.sector) as usize]),
                    Some(What::Zero | What::Discard) => may.push(0),
                    _ => {}
                }
            }
            assert!(may.contains(&value), "sector {sector} holds {value:#x} after a power cut, not {may:x?}");
            self.model[sector as usize] = Model::of(value);
        }
        // Another guest boots, with rings and a region of its own.
        self.world.borrow_mut().migration = None;
        self.lanes.iter_mut().for_each(|lane| lane.what = None);
        let bytes = self.region_file.metadata().unwrap().len();
        self.region_file.write_all_at(&vec![0; bytes as usize], 0).unwrap();
        for at in 0..self.queues.len() {
            self.queues[at] = self.boot_queue();
            self.world.borrow_mut().forget(Token(at as u16 + 1));
        }
        self.start();
    }
}
