//! A worker of the library, turn by turn, on a disk that is always slower than
//! its driver. The engine moves nothing and ends a few operations a turn, so
//! that every run is the same: a queue that waits is served all the same, a ring
//! without memory is left alone, an idle disk is not kept waiting, and a driver
//! is told of its answers.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::time::Duration;

use vublk::device;
use vublk::disk;
use vublk::engine::{Done, Engine, Event, Io, Kind, Outcome, Token, Wait};
use vublk::hold::AtStop;
use vublk::inflight::{Journal, Region};
use vublk::memory::{GuestMemory, RegionLayout};
use vublk::promise::{self, Promise};
use vublk::ring::split::{self, Layout};
use vublk::sys;
use vublk::worker::{Ack, Command, PoolSize, QueueParts, SLOTS, Sleep, Tuning, Worker};

use crate::support::device::{OK, T_IN, T_OUT, T_WRITE_ZEROES, UNWRITTEN, header, range};
use crate::support::disk::{Disk, SECTOR};
use crate::support::loopdev::LoopDevice;
use crate::support::memory::{Memory, Span};
use crate::support::ring::{Desc, NEXT, Ring, Seg, back, out};
use crate::support::sys::{root, skip};

/// What an engine is like: how many operations end in a turn, and whether they
/// are the worker's own work; how many are submitted to an idle disk.
#[derive(Clone, Copy, Debug)]
struct Manner {
    pace: usize,
    inline: bool,
    batch: usize,
    plug: bool,
    /// Chunks of the worker's pool.
    chunks: usize,
}

const SLOW: Manner = Manner { pace: 8, inline: false, batch: usize::MAX, plug: false, chunks: 16 };
const INLINE: Manner = Manner { inline: true, ..SLOW };

/// Ends the oldest operations in each turn; none in the turn that submitted it,
/// or, inline, all of them.
#[derive(Debug)]
struct Slow {
    manner: Manner,
    pace: Rc<Cell<usize>>,
    /// Operations that were made.
    made: Rc<Cell<usize>>,
    staged: Vec<Io>,
    running: VecDeque<Io>,
    watched: Vec<Token>,
}

impl Engine for Slow {
    unsafe fn queue(&mut self, io: Io) {
        self.made.set(self.made.get() + 1);
        self.staged.push(io);
    }

    fn watch(&mut self, token: Token, _: BorrowedFd<'_>) -> io::Result<()> {
        self.watched.push(token);
        Ok(())
    }

    fn unwatch(&mut self, token: Token) {
        self.watched.retain(|t| *t != token);
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        assert_eq!(wait, Wait::No, "nothing here wakes a sleeper");
        Ok(())
    }

    fn reap(&mut self, mut each: impl FnMut(Event)) {
        // An eventfd may always have been written.
        self.watched.iter().for_each(|token| each(Event::Ready(*token)));
        if self.manner.inline {
            self.running.extend(self.staged.drain(..));
        }
        let pace = if self.manner.inline { usize::MAX } else { self.pace.get() };
        let count = pace.min(self.running.len());
        for io in self.running.drain(..count) {
            let moved = if let Kind::Read | Kind::Write { .. } = io.kind { io.len } else { 0 };
            each(Event::Done(Done { slot: io.slot, outcome: Outcome::Moved(moved) }));
        }
        self.running.extend(self.staged.drain(..));
    }

    fn chains(&self, _offered: u16) -> u16 {
        if self.manner.inline { 8 } else { 64 }
    }

    fn batch(&self, in_flight: usize) -> usize {
        in_flight.max(self.manner.batch)
    }

    fn is_inline(&self) -> bool {
        self.manner.inline
    }
}

/// A worker and the driver of its rings, turn by turn.
struct Bench {
    worker: Worker<Slow>,
    commands: Sender<Command>,
    memory: Rc<Memory>,
    table: Arc<GuestMemory>,
    rings: Vec<Ring>,
    made: Rc<Cell<usize>>,
    /// Operations that end in a turn.
    pace: Rc<Cell<usize>>,
}

impl Bench {
    fn new(image: &Path, direct: bool, queues: u16, manner: Manner) -> Self {
        let options = disk::Options {
            path: image.into(),
            direct,
            instance: "turns".into(),
            ..disk::Options::default()
        };
        let disk = disk::Disk::open(&options, &|| false).unwrap();
        let promise = Promise::new(&disk, &promise::Options { logical_block_size: Some(512), serial: None });
        let device = Arc::new(device::Device::new(disk, promise.unwrap(), 1, true).unwrap());
        let memory = Memory::plain();
        let region = &memory.regions[0];
        let layout =
            RegionLayout { guest: region.guest, len: region.len, user: region.user, offset: region.offset };
        let table = Arc::new(GuestMemory::map(&[layout], vec![region.file.try_clone().unwrap()]).unwrap());
        let (commands, inbox) = channel();
        let pool = PoolSize { chunks: manner.chunks, ..PoolSize::default() };
        let tuning = Tuning { pool, poll: Duration::ZERO, plug: manner.plug };
        let (made, pace) = (Rc::default(), Rc::new(Cell::new(manner.pace)));
        let engine = Slow {
            manner,
            pace: Rc::clone(&pace),
            made: Rc::clone(&made),
            staged: Vec::new(),
            running: VecDeque::new(),
            watched: Vec::new(),
        };
        let worker = Worker::new(engine, device, queues, tuning, sys::eventfd().unwrap(), inbox).unwrap();
        let mut bench = Self { worker, commands, memory, table, rings: Vec::new(), made, pace };
        let table = Arc::clone(&bench.table);
        let outside = bench.ask(|ack| Command::SetMemory(table, ack));
        assert!(outside.is_empty());
        for index in 0..queues {
            bench.start(index);
        }
        bench
    }

    /// A ring of 512 for queue `index`.
    fn start(&mut self, index: u16) {
        let ring = Ring::new(Rc::clone(&self.memory), 512, 0, false);
        self.start_ring(index, ring, |ring| ring);
    }

    /// A ring of 512 that the driver has used, and what it is for the device.
    fn start_ring(&mut self, index: u16, ring: Ring, journal: impl FnOnce(split::Ring) -> split::Ring) {
        let user = |guest| self.memory.user(guest);
        let layout =
            Layout { size: 512, desc: user(ring.table), avail: user(ring.avail), used: user(ring.used) };
        let dup = |fd: BorrowedFd<'_>| Arc::new(fd.try_clone_to_owned().unwrap());
        let parts = QueueParts {
            ring: journal(split::Ring::new(&self.table, layout, 0, false).unwrap()),
            kick: dup(ring.kick.as_fd()),
            call: Some(dup(ring.call.as_fd())),
            err: None,
            indirect: false,
            used_log: None,
        };
        self.rings.push(ring);
        self.ask(|ack| Command::Start(index, Box::new(parts), ack)).unwrap();
    }

    #[track_caller]
    fn ask<T>(&mut self, command: impl FnOnce(Ack<T>) -> Command) -> T {
        let (value, answer) = sync_channel(1);
        self.commands.send(command(Ack::new(value, sys::eventfd().unwrap()))).unwrap();
        self.turn();
        answer.try_recv().expect("an answer in the same turn")
    }

    fn turn(&mut self) {
        self.worker.turn(Sleep { when_idle: false, in_flight: false }).unwrap();
    }

    /// A request in memory: its segments and where its status goes.
    fn place(&self, kind: u32, sector: u64, data: Seg) -> (Vec<Seg>, u64) {
        let at = self.memory.page_with(&header(kind, sector));
        self.memory.write(at + 64, &[UNWRITTEN]);
        (vec![out(at, 16), data, back(at + 64, 1)], at + 64)
    }

    fn offer(&mut self, queue: usize, segs: &[Seg]) -> u16 {
        let ring = &mut self.rings[queue];
        let head = ring.chain(segs);
        ring.stage(head);
        ring.publish();
        head
    }
}

/// One turn; then each of the first queues asks again for what it got.
fn refill(bench: &mut Bench, segs: &[Seg], served: &mut [usize]) {
    bench.turn();
    for (queue, served) in served.iter_mut().enumerate() {
        while bench.rings[queue].take_used().is_some() {
            *served += 1;
            bench.offer(queue, segs);
        }
    }
}

/// Four queues want more than all slots there are, all the time. One read on a
/// fifth queue is answered, and none of the four is left behind.
#[test]
fn no_queue_starves() {
    const DEPTH: usize = 128;
    let disk = Disk::new();
    let mut bench = Bench::new(&disk.path, false, 5, SLOW);
    assert!(4 * DEPTH >= 2 * usize::from(SLOTS));
    let place = bench.memory.alloc(SECTOR as u64, 4096);
    let (segs, status) = bench.place(T_IN, 100, back(place, SECTOR));
    for queue in 0..4 {
        for _ in 0..DEPTH {
            bench.offer(queue, &segs);
        }
    }
    let mut served = [0_usize; 4];
    // Until no slot is free, and beyond.
    for _ in 0..20 {
        refill(&mut bench, &segs, &mut served);
    }
    let place = bench.memory.alloc(SECTOR as u64, 4096);
    let (last, answered) = bench.place(T_IN, 7, back(place, SECTOR));
    bench.offer(4, &last);
    // At 8 a turn all 256 slots are over after 32 turns.
    let turns = (0..200).find(|_| {
        refill(&mut bench, &segs, &mut served);
        bench.rings[4].take_used().is_some()
    });
    assert!(turns.is_some(), "a read on the fifth queue starved; the others had {served:?} answers");
    assert_eq!(bench.memory.byte(answered), OK);
    for _ in 0..800 {
        refill(&mut bench, &segs, &mut served);
    }
    assert_eq!(bench.memory.byte(status), OK);
    let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
    assert!(4 * least >= *most, "answers of four queues that ask alike: {served:?}");
}

/// The requests of one queue wait for a small pool, their buffers not being aligned.
/// Those of the other queues need no pool and do not wait.
#[test]
fn a_queue_that_waits_for_the_pool_keeps_no_other_one_waiting() {
    let name = "turns::a_queue_that_waits_for_the_pool_keeps_no_other_one_waiting";
    let disk = Disk::new();
    if !disk.takes_direct() {
        return skip(name, "the file system does not take O_DIRECT");
    }
    for depth in [16, 32, 64] {
        let mut bench = Bench::new(&disk.path, true, 4, Manner { chunks: 2, ..SLOW });
        let segs: Vec<_> = [0, 0, 0, 8]
            .map(|skew| {
                let place = bench.memory.alloc(3 * 4096, 4096) + skew;
                bench.place(T_IN, 0, back(place, 4096)).0
            })
            .into();
        let mut served = [0_usize; 4];
        for _ in 0..depth {
            for (queue, segs) in segs.iter().enumerate() {
                bench.offer(queue, segs);
            }
        }
        for _ in 0..1000 {
            bench.turn();
            for (queue, segs) in segs.iter().enumerate() {
                while bench.rings[queue].take_used().is_some() {
                    served[queue] += 1;
                    bench.offer(queue, segs);
                }
            }
        }
        let what = format!("answers at depth {depth}, the last queue's through the pool: {served:?}");
        let (least, most) = (served[..3].iter().min().unwrap(), served[..3].iter().max().unwrap());
        assert!(10 * (most - least) <= *most, "{what}");
        assert!(served[3] > 0, "{what}");
        // The pool has a place for two of the eight operations that end in a turn.
        assert!(4 * served[..3].iter().sum::<usize>() >= 3 * 8 * 1000 * 9 / 10, "{what}");
    }
}

/// Zeroes over a MiB wait for every small write in it that was there before,
/// and for none that came later.
#[test]
fn a_large_range_among_small_writes_is_answered() {
    const LANES: u64 = 12;
    let name = "a_large_range_among_small_writes_is_answered";
    if !root(name, "a loop device") {
        return;
    }
    let disk = Disk::new();
    let device = match LoopDevice::over(&disk.path, 4096) {
        Ok(device) => device,
        Err(reason) => return skip(name, &format!("no loop device: {reason}")),
    };
    // A small write is two operations, one a turn: they never all end at once.
    let mut bench = Bench::new(&device.path, true, 2, Manner { pace: 1, ..SLOW });
    let data = bench.memory.alloc(SECTOR as u64, 4096);
    // Lane n writes a sector of block 20 n.
    let lanes: Vec<_> =
        (0..LANES).map(|lane| bench.place(T_OUT, 160 * lane + 1, out(data, SECTOR)).0).collect();
    let mut of_head = vec![0_usize; 512];
    for (lane, segs) in lanes.iter().enumerate() {
        let head = bench.offer(0, segs);
        of_head[usize::from(head)] = lane;
    }
    let mut written = 0;
    let mut play = |bench: &mut Bench| {
        bench.turn();
        while let Some(used) = bench.rings[0].take_used() {
            written += 1;
            let lane = of_head[usize::from(used.head)];
            let head = bench.offer(0, &lanes[lane]);
            of_head[usize::from(head)] = lane;
        }
    };
    for _ in 0..50 {
        play(&mut bench);
    }
    let zeroes = bench.memory.page_with(&range(0, 2048, 0));
    let (segs, status) = bench.place(T_WRITE_ZEROES, 0, out(zeroes, 16));
    bench.offer(1, &segs);
    let turns = (0..500).find(|_| {
        play(&mut bench);
        bench.rings[1].take_used().is_some()
    });
    assert!(turns.is_some(), "zeroes starved behind {written} writes that came later");
    assert_eq!(bench.memory.byte(status), OK);
}

/// Between the loss of a ring's memory and the stop of the ring there may be
/// turns: what the driver asked for is then left for a later table, and not
/// given back unanswered.
#[test]
fn a_ring_without_memory_is_left_alone() {
    let disk = Disk::new();
    let mut bench = Bench::new(&disk.path, false, 2, SLOW);
    let place = bench.memory.alloc(SECTOR as u64, 4096);
    let (segs, status) = bench.place(T_IN, 100, back(place, SECTOR));
    // On their way before, with the table that has all.
    for queue in 0..2 {
        bench.offer(queue, &segs);
    }
    bench.turn();
    let other = Memory::with(&[Span { guest: 9 << 30, len: 1 << 20 }]);
    let region = &other.regions[0];
    let layout =
        RegionLayout { guest: region.guest, len: region.len, user: region.user, offset: region.offset };
    let table = Arc::new(GuestMemory::map(&[layout], vec![region.file.try_clone().unwrap()]).unwrap());
    let outside = bench.ask(|ack| Command::SetMemory(table, ack));
    assert_eq!(outside.len(), 2);
    for queue in 0..2 {
        bench.offer(queue, &segs);
    }
    for _ in 0..10 {
        bench.turn();
    }
    for queue in 0..2_u16 {
        let ring = &mut bench.rings[usize::from(queue)];
        assert!(ring.take_used().is_some(), "what was on its way was answered");
        assert!(ring.take_used().is_none(), "queue {queue}: a chain was judged by a table without its ring");
        let state = bench.ask(|ack| Command::Stop(queue, AtStop::Fail, ack));
        assert_eq!(state.map(|state| state.next_avail), Some(1));
    }
    assert_eq!(bench.memory.byte(status), OK);
}

/// Reads of one sector each, `apart` sectors from each other.
fn offer_reads(bench: &mut Bench, count: u64, apart: u64) {
    for at in 0..count {
        let place = bench.memory.alloc(SECTOR as u64, 4096);
        let (segs, _) = bench.place(T_IN, at * apart, back(place, SECTOR));
        bench.offer(0, &segs);
    }
}

/// To prepare operations takes time: an idle disk gets a few, and others while
/// it works.
#[test]
fn an_idle_disk_is_not_kept_waiting_for_a_long_batch() {
    let disk = Disk::new();
    let mut bench = Bench::new(&disk.path, false, 1, Manner { pace: 0, batch: 4, ..SLOW });
    offer_reads(&mut bench, 40, 100);
    for running in [4, 8, 16, 32, 40] {
        bench.turn();
        assert_eq!(bench.made.get(), running);
    }
}

/// Requests that are joined are prepared as one.
#[test]
fn a_short_batch_does_not_cut_joined_requests_apart() {
    let disk = Disk::new();
    let manner = Manner { pace: 0, batch: 4, plug: true, ..SLOW };
    let mut bench = Bench::new(&disk.path, false, 1, manner);
    offer_reads(&mut bench, 40, 1);
    bench.turn();
    bench.turn();
    assert_eq!(bench.made.get(), 1, "operations for forty adjacent reads");
}

/// Where operations are the worker's own work, a driver that sleeps is woken
/// when there is little left to do, or for many answers; it sees them all before.
#[test]
fn a_driver_is_woken_once_for_more_answers() {
    let disk = Disk::new();
    let mut bench = Bench::new(&disk.path, false, 1, INLINE);
    offer_reads(&mut bench, 80, 100);
    let mut told = Vec::new();
    for turn in 1..=10 {
        bench.turn();
        let seen = std::iter::from_fn(|| bench.rings[0].take_used()).count();
        assert_eq!(seen, 8, "answers that are there after turn {turn}");
        if bench.rings[0].call.take() > 0 {
            told.push(80 - 8 * turn);
        }
    }
    // Chains left to do when it was told: after 32 answers, then from 16 left on.
    assert_eq!(told, [48, 16, 8, 0]);
}

/// A queue that stops owes its driver nothing, not even a signal.
#[test]
fn a_queue_that_stops_tells_of_its_last_answers() {
    let disk = Disk::new();
    let mut bench = Bench::new(&disk.path, false, 1, INLINE);
    offer_reads(&mut bench, 80, 100);
    bench.turn();
    assert_eq!(bench.rings[0].call.take(), 0, "there is enough left to do");
    let state = bench.ask(|ack| Command::Stop(0, AtStop::Fail, ack));
    // The turn that was told to stop had fetched before.
    assert_eq!(state.map(|state| state.next_avail), Some(16));
    assert!(bench.rings[0].call.take() > 0, "sixteen answers, and no signal");
}

/// A ring that broke is not fetched from any more: what was answered before is
/// told of, however much seems to be left.
#[test]
fn a_driver_whose_ring_broke_is_told_of_what_was_answered() {
    let disk = Disk::new();
    let mut bench = Bench::new(&disk.path, false, 1, INLINE);
    offer_reads(&mut bench, 10, 100);
    bench.rings[0].stage(600); // a ring of 512
    offer_reads(&mut bench, 40, 100);
    bench.turn();
    assert_eq!(bench.rings[0].call.take(), 0, "there is enough left to do");
    bench.turn();
    bench.turn();
    assert_eq!(std::iter::from_fn(|| bench.rings[0].take_used()).count(), 10);
    assert!(bench.rings[0].call.take() > 0, "ten answers, and no signal");
}

const MIB: u64 = 1 << 20;

/// A read of so many MiB into the same 50 MiB of the guest again and again.
fn large_read(bench: &Bench, mib: u64, buffer: u64) -> Vec<Seg> {
    let (mut segs, _) = bench.place(T_IN, 0, back(buffer, 0));
    let status = segs.pop().unwrap();
    segs.pop();
    let parts = (0..mib.div_ceil(50)).map(|part| (mib - 50 * part).min(50) * MIB);
    segs.extend(parts.map(|bytes| back(buffer, bytes as usize)));
    segs.push(status);
    segs
}

/// Large requests go one after another, or as many together as their bound allows. A queue with small ones is served
/// beside them.
#[test]
fn large_requests_have_a_bound() {
    // MiB of each, and how many are in flight together.
    for (mib, together) in [(2, 20), (3, 20), (40, 12), (256, 2), (257, 1), (1000, 1)] {
        let disk = Disk::of_size(1 << 30);
        let mut bench = Bench::new(&disk.path, false, 3, Manner { pace: 0, ..SLOW });
        let place = bench.memory.alloc(SECTOR as u64, 4096);
        let (small, _) = bench.place(T_IN, 100, back(place, SECTOR));
        let buffer = bench.memory.alloc(50 * MIB, 4096);
        let large = large_read(&bench, mib, buffer);
        for _ in 0..10 {
            bench.offer(0, &large);
            bench.offer(1, &large);
            bench.offer(2, &small);
        }
        for _ in 0..5 {
            bench.turn();
        }
        assert_eq!(bench.made.get(), together + 10, "operations of reads of {mib} MiB, and ten small ones");
        // GET_VRING_BASE leaves in the ring what was not begun.
        let (value, answer) = sync_channel(1);
        bench
            .commands
            .send(Command::Stop(0, AtStop::Fail, Ack::new(value, sys::eventfd().unwrap())))
            .unwrap();
        bench.pace.set(8);
        let state = (0..200).find_map(|_| {
            bench.turn();
            answer.try_recv().ok()
        });
        let base = usize::from(state.expect("a ring that stops").unwrap().next_avail);
        assert_eq!(std::iter::from_fn(|| bench.rings[0].take_used()).count(), base, "{mib} MiB");
        assert!(base <= together, "{base} reads of {mib} MiB were answered before the ring stopped");
        // The other queues go on.
        for _ in 0..200 {
            bench.turn();
        }
        for queue in [1, 2] {
            let answers = std::iter::from_fn(|| bench.rings[queue].take_used()).count();
            assert_eq!(answers, 10, "of queue {queue}, {mib} MiB");
        }
    }
}

/// The large requests that an earlier daemon had in flight go one after another, too, in their order.
#[test]
fn large_requests_of_an_earlier_daemon_have_the_same_bound() {
    let disk = Disk::of_size(1 << 30);
    let mut bench = Bench::new(&disk.path, false, 2, Manner { pace: 0, ..SLOW });
    let buffer = bench.memory.alloc(50 * MIB, 4096);
    let large = large_read(&bench, 300, buffer);
    let stopped = bench.ask(|ack| Command::Stop(0, AtStop::Fail, ack));
    assert_eq!(stopped.map(|state| state.next_avail), Some(0));
    let mut ring = Ring::new(Rc::clone(&bench.memory), 512, 0, false);
    let mut heads: Vec<u16> = (0..4).map(|_| ring.chain(&large)).collect();
    heads.iter().for_each(|&head| ring.stage(head));
    ring.publish();
    let (file, bytes) = Region::create(1, 512).unwrap();
    let region = Arc::new(Region::map(&file, bytes, 0, 1, 512).unwrap());
    let (journal, _) = Journal::open(&region, 0, 512, 0, 0).unwrap();
    heads.reverse();
    (0..).zip(&heads).for_each(|(count, &head)| journal.fetched(head, count));
    drop(journal);
    bench.start_ring(0, ring, |ring| ring.journalled(&region, 0).unwrap());
    for _ in 0..5 {
        bench.turn();
    }
    assert_eq!(bench.made.get(), 1, "operations of four reads of 300 MiB");
    bench.pace.set(8);
    for _ in 0..50 {
        bench.turn();
    }
    let ring = bench.rings.last_mut().unwrap();
    let answers: Vec<u16> = std::iter::from_fn(|| ring.take_used()).map(|used| used.head).collect();
    assert_eq!(answers, heads);
    assert_eq!(bench.ask(|ack| Command::Stop(0, AtStop::Fail, ack)).map(|state| state.next_avail), Some(4));
}

/// Two queues with requests that only fit alone, and one whose requests would always fit beside another's: each has its
/// turn.
#[test]
fn large_requests_take_turns() {
    let disk = Disk::of_size(1 << 30);
    let mut bench = Bench::new(&disk.path, false, 3, SLOW);
    let buffer = bench.memory.alloc(50 * MIB, 4096);
    let segs = [900, 900, 8].map(|mib| large_read(&bench, mib, buffer));
    let mut served = [0_usize; 3];
    for (queue, segs) in segs.iter().enumerate() {
        (0..10).for_each(|_| {
            bench.offer(queue, segs);
        });
    }
    for _ in 0..600 {
        bench.turn();
        for (queue, segs) in segs.iter().enumerate() {
            while bench.rings[queue].take_used().is_some() {
                served[queue] += 1;
                bench.offer(queue, segs);
            }
        }
    }
    let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
    assert!(*least > 20 && served[0].abs_diff(served[1]) <= 2, "answers of three queues: {served:?}");
    assert!(*most <= 20 * least, "answers of three queues: {served:?}");
}

/// The driver of the queue whose turn comes next makes its request a chain that makes no sense. Nothing is in flight then
/// that would wake the worker for the queue behind it, so it does not sleep.
#[test]
fn a_queue_behind_one_that_gives_its_turn_away() {
    for turns in 0..4 {
        let disk = Disk::of_size(1 << 30);
        let mut bench = Bench::new(&disk.path, false, 3, Manner { pace: 0, ..SLOW });
        let buffer = bench.memory.alloc(50 * MIB, 4096);
        let large = large_read(&bench, 900, buffer);
        for queue in 0..3 {
            let head = bench.offer(queue, &large);
            bench.turn();
            if queue == 1 {
                bench.rings[1].write_desc(head, Desc { addr: 0, len: 16, flags: NEXT, next: 999 });
            }
        }
        (0..turns).for_each(|_| bench.turn());
        bench.pace.set(8);
        let answered = (0..20).find(|_| {
            let sleep = Sleep { when_idle: true, in_flight: false };
            bench.worker.turn(sleep).unwrap();
            bench.rings[2].used_idx() == 1
        });
        assert!(answered.is_some(), "the third queue had no turn");
    }
}
