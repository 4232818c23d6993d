//! The guest of the simulation, its model of the disk, and the play of both with a
//! worker.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::time::Duration;

use vublk::engine::Token;
use vublk::inflight::Region;
use vublk::memory::{GuestMemory, RegionLayout};
use vublk::ring::split::{self, Layout, RingState};
use vublk::worker::{Ack, Command, Nap, PoolSize, QueueParts, Tuning, Worker};
use vublk::{config, device, disk, sys};

use super::world::{Crash, SECTOR, Shared, Sim, Weather, World};
use crate::support::device::{
    IOERR, OK, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, UNSUPP, UNWRITTEN, header, range,
};
use crate::support::dice::Dice;
use crate::support::memory::Memory;
use crate::support::ring::{Ring, Seg, back, out};

const LANES: usize = 12;
/// Sectors of a lane; lanes do not share blocks of 4096.
const AREA: u64 = 16;
const DISK_SECTORS: u64 = LANES as u64 * AREA;
const STEPS: u64 = 500;
/// Turns in which an answer has to come when nothing else happens.
const PATIENCE: u64 = 4000;

/// What was played.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    pub seeds: u64,
    pub turns: u64,
    pub requests: u64,
    pub crashes: u64,
    pub power_cuts: u64,
    pub stops: u64,
}

impl Count {
    pub fn add(&mut self, more: Self) {
        self.seeds += more.seeds;
        self.turns += more.turns;
        self.requests += more.requests;
        self.crashes += more.crashes;
        self.power_cuts += more.power_cuts;
        self.stops += more.stops;
    }
}

/// What one sector may hold: the values that it was given, oldest first, without
/// those that cannot come back.
#[derive(Clone, Debug)]
struct Model {
    /// What may be left after a power cut.
    left: Vec<u64>,
    /// How many came before those.
    ruled_out: usize,
    /// Which of them a read may give, by their numbers in order.
    now: Vec<usize>,
}

impl Model {
    fn of(value: u64) -> Self {
        Self { left: vec![value], ruled_out: 0, now: vec![0] }
    }

    /// A value was written, surely or perhaps.
    fn written(&mut self, value: u64, surely: bool, durable: bool) {
        if surely {
            self.now.clear();
        }
        self.now.push(self.ruled_out + self.left.len());
        self.left.push(value);
        if surely && durable {
            self.flushed(self.mark());
        }
    }

    fn values(&self) -> impl Iterator<Item = u64> {
        self.now.iter().map(|at| self.left[at - self.ruled_out])
    }

    /// A read gave this. False: it may not.
    fn seen(&mut self, value: u64) -> bool {
        let (left, out) = (&self.left, self.ruled_out);
        self.now.retain(|at| left[at - out] == value);
        !self.now.is_empty()
    }

    /// The oldest that may be there now: what a flush that begins now leaves.
    fn mark(&self) -> usize {
        self.now[0]
    }

    fn flushed(&mut self, mark: usize) {
        let older = mark.saturating_sub(self.ruled_out);
        self.left.drain(..older);
        self.ruled_out += older;
    }
}

#[derive(Clone, Debug)]
enum What {
    Read,
    /// The value of each sector.
    Write(Vec<u64>),
    Zero,
    Discard,
    /// For each sector of the disk, what is there; and the daemon's life that
    /// has failed already.
    Flush(Vec<usize>, Option<u64>),
    /// Must be refused, and come back all the same.
    Nonsense,
}

struct Lane {
    header: u64,
    data: u64,
    sector: u64,
    count: u64,
    queue: usize,
    what: Option<What>,
}

/// A ring and what its driver is doing.
struct Queue {
    ring: Ring,
    /// The driver looks at the used ring by itself.
    awake: bool,
    /// Lane of each head.
    owner: Vec<usize>,
    indirect: bool,
    /// used.idx when the daemon began that serves it, and its life in which a FLUSH
    /// failed.
    since: u16,
    failed: Option<u64>,
}

/// See the head of the file.
pub struct Play {
    dice: Dice,
    world: Shared,
    memory: Rc<Memory>,
    table: Arc<GuestMemory>,
    region_file: File,
    region: Arc<Region>,
    queues: Vec<Queue>,
    lanes: Vec<Lane>,
    model: Vec<Model>,
    value: u64,
    image: File,
    direct: bool,
    block: u32,
    writeback: bool,
    plug: bool,
    worker: Option<Worker<Sim>>,
    commands: Option<Sender<Command>>,
    life: u64,
    count: Count,
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
        };
        let world = World::new(Dice::new(dice.roll()), weather, DISK_SECTORS as usize);
        let memory = Memory::with(&[crate::support::memory::Span { guest: 1 << 20, len: 4 << 20 }]);
        let table = table_of(&memory);
        let queues = 1 + dice.below(2);
        let (region_file, bytes) = Region::create(2, 64).unwrap();
        let region = Arc::new(Region::map(&region_file, bytes, 0, 2, 64).unwrap());
        let image = crate::support::sys::memory_file(DISK_SECTORS * SECTOR as u64);
        let lane = |at: usize| {
            let header = memory.alloc(4096, 4096);
            Lane {
                header,
                data: memory.alloc(AREA * 512 + 4096, 4096),
                sector: at as u64 * AREA,
                count: 0,
                queue: 0,
                what: None,
            }
        };
        let lanes = (0..LANES).map(lane).collect();
        let (direct, small) = (dice.rarely(2), dice.rarely(3));
        let mut play = Self {
            world,
            table,
            region_file,
            region,
            queues: Vec::new(),
            lanes,
            model: vec![Model::of(0); DISK_SECTORS as usize],
            value: seed << 20,
            image,
            direct,
            block: if direct && small { 4096 } else { 512 },
            writeback: !dice.rarely(4),
            plug: dice.rarely(2),
            worker: None,
            commands: None,
            life: 0,
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
    fn boot_queue(&mut self) -> Queue {
        let size = [16, 64][self.dice.below(2) as usize];
        let event_idx = self.dice.rarely(2);
        let ring = Ring::new(Rc::clone(&self.memory), size, self.dice.roll() as u16, event_idx);
        Queue {
            ring,
            awake: true,
            owner: vec![usize::MAX; size.into()],
            indirect: self.dice.rarely(2),
            since: 0,
            failed: None,
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

    // --- the daemon ---

    fn start(&mut self) {
        self.life += 1;
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.image));
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
        let geometry = config::geometry(disk.facts(), "");
        let device = Arc::new(device::Device::new(disk, geometry, self.writeback));
        let (commands, inbox) = channel();
        let tuning =
            Tuning { pool: PoolSize { chunks: 2, chunk_len: 8192 }, poll: Duration::ZERO, plug: self.plug };
        let engine = Sim(Rc::clone(&self.world));
        let queues = self.queues.len() as u16;
        let worker = Worker::new(engine, device, queues, tuning, sys::eventfd().unwrap(), inbox);
        self.worker = Some(worker.unwrap());
        self.commands = Some(commands);
        let table = Arc::clone(&self.table);
        let Some(_) = self.ask(|ack| Command::SetMemory(table, ack)) else { return };
        for at in 0..self.queues.len() {
            // What QEMU gives after a crash; the region knows better.
            let base = self.queues[at].ring.used_idx();
            self.queues[at].since = base;
            if self.start_queue(at, base).is_none() {
                return;
            }
        }
    }

    /// `None`: the daemon died of it.
    fn start_queue(&mut self, at: usize, base: u16) -> Option<()> {
        let Queue { ring, indirect, .. } = &self.queues[at];
        let user = |guest| self.memory.user(guest);
        let layout = Layout {
            size: ring.size,
            desc: user(ring.table),
            avail: user(ring.avail),
            used: user(ring.used),
        };
        let device = split::Ring::new(&self.table, layout, base, ring.event_idx).unwrap();
        let device = device.journalled(&self.region, at as u16).unwrap();
        let parts = QueueParts {
            ring: device,
            kick: ring.kick.as_fd().try_clone_to_owned().unwrap(),
            call: Some(ring.call.as_fd().try_clone_to_owned().unwrap()),
            err: None,
            indirect: *indirect,
            used_log: None,
        };
        let started = self.ask(|ack| Command::Start(at as u16, Box::new(parts), ack))?;
        started.unwrap();
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
    fn turn(&mut self) -> Option<()> {
        if self.world.borrow().asleep {
            return Some(()); // as if it had called, and slept on
        }
        let nap = Nap { idle: true, in_flight: true };
        let worker = self.worker.as_mut().unwrap();
        let turned = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| worker.turn(nap)));
        match turned {
            Ok(turn) => {
                self.count.turns += u64::from(turn.unwrap().busy);
                Some(())
            }
            Err(panic) if panic.is::<Crash>() => {
                self.restart();
                None
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// The daemon is dead; the next one starts when the kernel is done with it.
    fn restart(&mut self) {
        // The kernel holds the pages that it still writes to.
        self.world.borrow_mut().bury();
        self.worker = None;
        self.commands = None;
        self.start();
    }

    fn kill(&mut self) {
        self.count.crashes += 1;
        self.restart();
    }

    fn stop_and_start(&mut self) {
        let at = self.dice.below(self.queues.len() as u64) as usize;
        let Some(state) = self.ask(|ack| Command::Stop(at as u16, ack)) else { return };
        let RingState { next_avail } = state.expect("a queue that was served");
        let ring = &self.queues[at].ring;
        self.count.stops += 1;
        let owed = ring.avail_idx.wrapping_sub(next_avail);
        let answered = ring.used_idx();
        assert_eq!(
            answered, next_avail,
            "stopped at {next_avail} with {owed} chains left, but {answered} are answered"
        );
        self.start_queue(at, next_avail);
    }

    fn change_memory(&mut self) {
        self.table = table_of(&self.memory);
        let table = Arc::clone(&self.table);
        if let Some(outside) = self.ask(|ack| Command::SetMemory(table, ack)) {
            assert!(outside.is_empty());
        }
    }

    /// The front-end restarts the daemon in the other mode, all being answered.
    fn change_cache(&mut self) {
        self.settle();
        self.writeback = !self.writeback;
        self.restart();
    }

    fn power_cut(&mut self) {
        self.count.power_cuts += 1;
        self.world.borrow_mut().power_cut();
        self.worker = None;
        self.commands = None;
        for sector in 0..DISK_SECTORS {
            let lane = &self.lanes[(sector / AREA) as usize];
            let value = self.world.borrow().read(sector);
            let mut may = self.model[sector as usize].left.clone();
            if (lane.sector..lane.sector + lane.count).contains(&sector) {
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
        self.lanes.iter_mut().for_each(|lane| lane.what = None);
        let bytes = self.region_file.metadata().unwrap().len();
        self.region_file.write_all_at(&vec![0; bytes as usize], 0).unwrap();
        for at in 0..self.queues.len() {
            self.queues[at] = self.boot_queue();
        }
        self.start();
    }

    // --- the guest ---

    /// Requests for some of the lanes that have none.
    fn offer(&mut self) {
        let queue = self.dice.below(self.queues.len() as u64) as usize;
        let before = self.queues[queue].ring.avail_idx;
        for at in 0..LANES {
            if self.lanes[at].what.is_none() && self.dice.rarely(2) && self.queues[queue].ring.free() >= 6 {
                self.request(at, queue);
            }
        }
        let ring = &self.queues[queue].ring;
        let now = ring.avail_idx;
        if now == before {
            return;
        }
        ring.publish();
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let wanted = if ring.event_idx {
            now.wrapping_sub(ring.avail_event()).wrapping_sub(1) < now.wrapping_sub(before)
        } else {
            !ring.device_wants_no_kicks()
        };
        if wanted {
            self.world.borrow_mut().signal(Token(queue as u16 + 1));
        }
    }

    fn request(&mut self, at: usize, queue: usize) {
        let life = self.life;
        let block = u64::from(self.block) / 512;
        let failed = self.world.borrow().sync_failed.then_some(life);
        let lane = &mut self.lanes[at];
        let start = self.dice.below(AREA / block) * block;
        let most = AREA - start;
        lane.sector = at as u64 * AREA + start;
        lane.count = (1 + self.dice.below(most / block)) * block;
        lane.queue = queue;
        let (sector, count) = (lane.sector, lane.count);
        let kind = match self.dice.below(16) {
            0..=5 => T_IN,
            6..=11 => T_OUT,
            12 | 13 => T_FLUSH,
            14 if self.dice.rarely(2) => T_WRITE_ZEROES,
            14 => T_DISCARD,
            _ => 99,
        };
        let bytes = (count * 512) as usize;
        // Buffers at any multiple of 8.
        let data = lane.data + if self.dice.rarely(2) { 8 * self.dice.below(500) } else { 0 };
        let header_at = lane.header;
        let status = lane.header + 64;
        let mut segs: Vec<Seg> = vec![out(header_at, 16)];
        let what = match kind {
            T_IN => {
                self.memory.write(data, &vec![0xee; bytes]);
                self.memory.write(header_at + 128, &data.to_le_bytes());
                split_in_two(&mut segs, back(data, bytes), &mut self.dice);
                What::Read
            }
            T_OUT => {
                let values: Vec<u64> = (0..count).map(|n| self.value + n + 1).collect();
                self.value += count;
                let words: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes().repeat(SECTOR / 8)).collect();
                self.memory.write(data, &words);
                split_in_two(&mut segs, out(data, bytes), &mut self.dice);
                What::Write(values)
            }
            T_FLUSH => {
                lane.count = 0;
                What::Flush(self.model.iter().map(Model::mark).collect(), failed)
            }
            T_WRITE_ZEROES | T_DISCARD => {
                self.memory.write(data, &range(sector, count as u32, 0));
                segs.push(out(data, 16));
                if kind == T_DISCARD { What::Discard } else { What::Zero }
            }
            _ => {
                lane.count = 0;
                What::Nonsense
            }
        };
        self.memory.write(header_at, &header(kind, if kind == T_IN || kind == T_OUT { sector } else { 0 }));
        self.memory.write(status, &[UNWRITTEN]);
        segs.push(back(status, 1));
        lane.what = Some(what);
        let Queue { ring, owner, indirect, .. } = &mut self.queues[queue];
        let head = if *indirect && self.dice.rarely(2) {
            // A table of its own place, not one more of the memory for each request.
            ring.indirect_at(header_at + 1024, &segs)
        } else {
            ring.chain(&segs)
        };
        owner[usize::from(head)] = at;
        ring.stage(head);
        self.count.requests += 1;
    }

    /// Takes answers, from rings whose driver is awake or was interrupted.
    fn look(&mut self) {
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
                // Answers stand in the ring in the order in which they were given.
                let ring = &self.queues[at].ring;
                let by_this_daemon = ring.seen.wrapping_sub(self.queues[at].since).wrapping_sub(1) < 0x8000;
                self.answered(lane, used.len, by_this_daemon.then_some(at));
            }
            let queue = &mut self.queues[at];
            if some > 0 {
                // Nothing left: sleep until the next interrupt.
                queue.ring.set_interrupts(true);
                if queue.ring.event_idx {
                    queue.ring.set_used_event(queue.ring.seen);
                }
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                queue.awake = queue.ring.used_idx() != queue.ring.seen;
            }
        }
    }

    /// Judges an answer.
    fn answered(&mut self, at: usize, written: u32, queue: Option<usize>) {
        assert!(at < LANES, "a head came back that nobody has sent");
        let lane = &mut self.lanes[at];
        let what = lane.what.take().expect("a lane is answered once");
        let status = self.memory.byte(lane.header + 64);
        let (sector, count) = (lane.sector as usize, lane.count as usize);
        let models = &mut self.model[sector..sector + count];
        let ok = status == OK;
        let Weather { faults, bad_syncs, .. } = self.world.borrow().weather;
        let may_fail = faults > 0 || bad_syncs > 0;
        match what {
            What::Nonsense => {}
            // A disk that cannot, after all.
            What::Discard if may_fail && status == UNSUPP => {}
            _ => assert!(ok || may_fail && status == IOERR, "status {status:#x} of {what:?}"),
        }
        match what {
            What::Read if ok => {
                assert_eq!(written as usize, count * SECTOR + 1);
                let table = self.memory.read(lane.header + 128, 8);
                let data = u64::from_le_bytes(table.try_into().unwrap());
                let bytes = self.memory.read(data, count * SECTOR);
                for (n, (model, got)) in models.iter_mut().zip(bytes.chunks(SECTOR)).enumerate() {
                    let value = u64::from_le_bytes(got[..8].try_into().unwrap());
                    assert!(got.chunks(8).all(|w| w == &got[..8]), "sector {} was read torn", sector + n);
                    let may: Vec<u64> = model.values().collect();
                    assert!(model.seen(value), "sector {} reads as {value:#x}, not {may:x?}", sector + n);
                }
            }
            What::Read => {}
            What::Write(values) => {
                models.iter_mut().zip(values).for_each(|(m, v)| m.written(v, ok, !self.writeback));
            }
            What::Zero => models.iter_mut().for_each(|m| m.written(0, ok, !self.writeback)),
            // Best effort: what it leaves alone is as it was.
            What::Discard => models.iter_mut().for_each(|m| m.written(0, false, false)),
            What::Flush(marks, failed) => {
                if let Some(queue) = queue {
                    let before = &mut self.queues[queue].failed;
                    assert!(
                        !ok || *before != Some(self.life),
                        "a FLUSH after one that failed was answered with OK"
                    );
                    if !ok {
                        *before = Some(self.life);
                    }
                }
                if ok {
                    assert_ne!(failed, Some(self.life), "a FLUSH after a failed sync was answered with OK");
                    self.model.iter_mut().zip(marks).for_each(|(model, mark)| model.flushed(mark));
                }
            }
            What::Nonsense => assert_eq!(status, UNSUPP, "an unknown request"),
        }
    }

    /// Until everything is answered.
    fn settle(&mut self) {
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
            self.turn();
        }
        let waiting: Vec<_> = self.lanes.iter().filter_map(|lane| lane.what.as_ref()).collect();
        panic!("no answer in {PATIENCE} turns to {waiting:?}");
    }
}

/// One segment, or two.
fn split_in_two(segs: &mut Vec<Seg>, seg: Seg, dice: &mut Dice) {
    let half = dice.below(u64::from(seg.len) / 8) as u32 * 8;
    if half > 0 && dice.rarely(3) {
        segs.push(Seg { len: half, ..seg });
        segs.push(Seg { addr: seg.addr + u64::from(half), len: seg.len - half, ..seg });
    } else {
        segs.push(seg);
    }
}

fn table_of(memory: &Memory) -> Arc<GuestMemory> {
    let region = &memory.regions[0];
    let layout =
        RegionLayout { guest: region.guest, len: region.len, user: region.user, offset: region.offset };
    Arc::new(GuestMemory::map(&[layout], vec![region.file.try_clone().unwrap()]).unwrap())
}
