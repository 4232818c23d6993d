//! The daemon as its front-end sees it: started, asked, killed, and started again
//! as a successor would be.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::time::Duration;

use vublk::device::Device;
use vublk::engine::Token;
use vublk::hold::AtStop;
use vublk::memory::{GuestMemory, RegionLayout};
use vublk::promise::{self, Promise};
use vublk::ring::split::{self, Layout, RingState};
use vublk::worker::{Ack, Command, PoolSize, QueueParts, Sleep, Tuning, Worker};
use vublk::{disk, sys};

use super::bugs::{Bug, Faulty};
use super::guest::{PATIENCE, Play, Queue};
use super::world::{Crash, Sim};
use crate::support::memory::Memory;
use crate::support::sys::tick;

/// A worker, and the control thread's ends of it. Its wake-up is a real eventfd, which other
/// workers write; the kernel would tell the engine.
pub struct Thread {
    worker: Worker<Faulty>,
    commands: Sender<Command>,
    wake: OwnedFd,
}

pub fn table_of(memory: &Memory) -> Arc<GuestMemory> {
    let region = &memory.regions[0];
    let layout =
        RegionLayout { guest: region.guest, len: region.len, user: region.user, offset: region.offset };
    Arc::new(GuestMemory::map(&[layout], vec![region.file.try_clone().unwrap()]).unwrap())
}

impl Play {
    pub fn start(&mut self) {
        let setup = self.setup;
        let path = format!("/proc/self/fd/{}", self.image.as_raw_fd());
        let options = disk::Options {
            path: path.into(),
            direct: setup.direct,
            instance: "sim".into(),
            ..disk::Options::default()
        };
        let mut disk = disk::Disk::open(&options, &|| false).unwrap();
        if setup.direct {
            let bytes = disk.measure().unwrap();
            disk.backing.set_block(4096, bytes);
        }
        disk.backing.dsync = setup.dsync;
        self.world.borrow_mut().disk.rules(&disk.backing);
        let promise = Promise::new(
            &disk,
            &promise::Options { logical_block_size: Some(setup.block), serial: Some("sim".into()) },
        );
        let workers = setup.workers as u16;
        let device = Arc::new(Device::new(disk, promise.unwrap(), workers, self.mode.option).unwrap());
        let is_gone = self
            .world
            .borrow_mut()
            .server
            .as_mut()
            .is_some_and(|server| std::mem::take(&mut server.is_found_gone));
        if self.sync_failed || is_gone {
            self.sync_failed = true;
            device.durability.set_sync_failed(); // a successor is told
        }
        self.threads = (0..setup.workers).map(|at| self.thread(at, &device)).collect();
        // The only handle of ours: a successor waits until the last one is gone.
        self.device = Some(device);
        self.take_over_mode();
        let _it_died = self.set_up();
    }

    fn thread(&self, worker: usize, device: &Arc<Device>) -> Thread {
        let (commands, inbox) = channel();
        let pool = PoolSize { chunks: 2, chunk_len: 8192 };
        let tuning = Tuning { pool, poll: Duration::ZERO, plug: self.setup.plug };
        let sim = Sim { world: Rc::clone(&self.world), worker };
        let engine = Faulty::new(sim, self.setup.bug, Rc::clone(&self.owed));
        let wake = sys::eventfd().unwrap();
        let queues = self.queues.len() as u16;
        let waker = wake.try_clone().unwrap();
        let worker = Worker::new(engine, Arc::clone(device), queues, tuning, waker, inbox);
        Thread { worker: worker.unwrap(), commands, wake }
    }

    /// What a successor is told before the guest goes on. `None`: it died of it, and
    /// another one has been told.
    fn set_up(&mut self) -> Option<()> {
        for at in 0..self.threads.len() {
            let table = Arc::clone(&self.table);
            self.ask(at, |ack| Command::SetMemory(table, ack))?;
            if let Some(log) = self.log() {
                self.ask(at, |ack| Command::SetLog(Some(log), ack))?;
            }
        }
        (0..self.queues.len()).try_for_each(|at| self.start_queue(at))
    }

    pub fn log(&self) -> Option<Arc<vublk::dirty::DirtyLog>> {
        self.world.borrow().migration.as_ref().map(|migration| Arc::clone(&migration.log))
    }

    /// `None`: the daemon died of it.
    pub fn start_queue(&mut self, at: usize) -> Option<()> {
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
        let device = if self.has(Bug::ReplayFromFrontEndsBase) {
            device
        } else if self.setup.ours {
            device.journalled_by_us(&self.region, at as u16, base.is_none()).unwrap()
        } else {
            device.journalled(&self.region, at as u16).unwrap()
        };
        let parts = QueueParts {
            ring: device,
            kick: ring.kick.as_fd().try_clone_to_owned().unwrap().into(),
            call: Some(ring.call.as_fd().try_clone_to_owned().unwrap().into()),
            err: None,
            indirect: *indirect,
            used_log: self.log().map(|_| ring.used),
        };
        let started =
            self.ask(self.setup.worker_of(at), |ack| Command::Start(at as u16, Box::new(parts), ack))?;
        started.unwrap();
        self.queues[at].base = None;
        // What the session does when it is given a call eventfd.
        self.queues[at].ring.call.signal();
        Some(())
    }

    /// Asks a worker and turns until it has answered. `None`: the daemon died.
    pub fn ask<T>(&mut self, worker: usize, command: impl FnOnce(Ack<T>) -> Command) -> Option<T> {
        let (value, answer) = sync_channel(1);
        let command = command(Ack::new(value, sys::eventfd().unwrap()));
        self.threads[worker].commands.send(command).unwrap();
        self.world.borrow_mut().signal(worker, Token(0));
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

    /// One turn of a worker that does not sleep. `None`: the daemon died in it, and another
    /// is there.
    pub fn turn(&mut self) -> Option<()> {
        let count = self.threads.len();
        let first = if count > 1 { self.dice.below(count as u64) as usize } else { 0 };
        let awake = {
            let hands = &mut self.world.borrow_mut().hands;
            let mut awake = (first..count).chain(0..first).filter(|&at| !hands[at].asleep);
            let one = awake.clone().find(|&at| hands[at].line.stands == 0).or_else(|| awake.next());
            hands.iter_mut().for_each(|hands| hands.line.stands = hands.line.stands.saturating_sub(1));
            one
        };
        let Some(at) = awake else { return Some(()) }; // as if it had called, and slept on
        self.before_turn();
        // At times it looks on instead of sleeping.
        let sleep = Sleep { when_idle: !self.dice.rarely(4), in_flight: !self.dice.rarely(4) };
        let worker = &mut self.threads[at].worker;
        let turned = catch_unwind(AssertUnwindSafe(|| worker.turn(sleep)));
        match turned {
            Ok(turn) => {
                let turn = turn.unwrap();
                if turn.busy || turn.slept {
                    self.pass_on();
                }
                self.count.turns += u64::from(turn.busy);
                self.world.borrow_mut().looked_at();
                self.after_turn();
                Some(())
            }
            Err(panic) if panic.is::<Crash>() => {
                self.pass_on();
                self.restart();
                None
            }
            Err(panic) => resume_unwind(panic),
        }
    }

    /// Tells each engine of its eventfd, and successors of a failed sync.
    pub fn pass_on(&mut self) {
        // One look for all, in place of one for each.
        let any = match self.threads.as_slice() {
            [_] => true,
            threads => {
                tick(&threads.iter().map(|thread| thread.wake.as_fd()).collect::<Vec<_>>(), Duration::ZERO)
            }
        };
        for (at, thread) in self.threads.iter().enumerate().filter(|_| any) {
            if sys::drain(&thread.wake) {
                self.world.borrow_mut().signal(at, Token(0));
            }
        }
        if !self.sync_failed && self.device.as_ref().unwrap().durability.sync_failed() {
            assert!(self.world.borrow().sync_failed, "the daemon has noted a sync that did not fail");
            self.sync_failed = true;
            self.count.failed_syncs += 1;
        }
    }

    /// The daemon is dead; the next one starts when the kernel is done with it.
    fn restart(&mut self) {
        // The kernel holds the pages that it still writes to.
        self.world.borrow_mut().bury();
        self.end();
        self.start();
    }

    /// The process is gone, and everything of it.
    pub fn end(&mut self) {
        (self.threads, self.device) = (Vec::new(), None);
        self.lives += 1;
    }

    pub fn kill(&mut self) {
        if !self.world.borrow().unread_failure {
            self.count.crashes += 1;
            self.restart();
        }
    }

    pub fn stop_and_start(&mut self) {
        let at = self.dice.below(self.queues.len() as u64) as usize;
        if self.stop(at).is_some() {
            self.count.stops += 1;
            self.start_queue(at);
        }
    }

    /// `None`: the daemon died of it, and the queue runs.
    pub fn stop(&mut self, at: usize) -> Option<()> {
        let state = self.ask(self.setup.worker_of(at), |ack| Command::Stop(at as u16, AtStop::Fail, ack))?;
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
        for worker in 0..self.threads.len() {
            let table = Arc::clone(&self.table);
            match self.ask(worker, |ack| Command::SetMemory(table, ack)) {
                Some(outside) => assert!(outside.is_empty()),
                None => return, // its successor has it
            }
        }
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
        self.world.borrow_mut().signal(self.setup.worker_of(at), Token(at as u16 + 1));
        for _ in 0..self.dice.below(20) {
            let _it_died = self.turn();
            self.look();
        }
        // What was fetched is returned, whatever the ring looks like.
        while self.stop(at).is_none() {}
        self.take_answers(at);
        for lane in 0..self.lanes.len() {
            if self.lanes[lane].queue == at && self.lanes[lane].what.is_some() {
                // Without a crash: never fetched.
                self.give_up_lane(lane, self.lives != lives);
            }
        }
        self.reboot_queue(at);
        self.count.broken += 1;
        self.start_queue(at);
    }

    /// A driver that begins anew, with eventfds of its own.
    pub fn reboot_queue(&mut self, at: usize) {
        self.queues[at] = self.boot_queue();
        self.world.borrow_mut().forget(self.setup.worker_of(at), Token(at as u16 + 1));
    }
}
