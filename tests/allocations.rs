//! Nothing is allocated per request: a worker on a thread of its own, whose
//! allocations are counted while a driver on another one sends it all kinds of
//! requests through four queues.
//!
//! What it is: a test binary of its own, because an allocator is a program's.
//!
//! What it is not: a count of what set-up, the control thread, the driver or
//! the threads engine's helpers allocate.
//!
//! Invariant: only threads that asked for it are counted, and only after as many
//! requests were in flight at once as ever will be (a worker makes its slots
//! when it first needs them) and each kind was served a few times. The first
//! allocation that is counted prints where it was made.
#![expect(clippy::unwrap_used, unsafe_code, reason = "a test may panic; an allocator is unsafe by nature")]

#[path = "../benches/pump/guest.rs"]
mod guest;

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use vublk::device::Device;
use vublk::disk::Way;
use vublk::engine::inline::Inline;
use vublk::engine::null::Null;
use vublk::engine::threads::Threads;
use vublk::engine::uring::{Options, Uring};
use vublk::engine::{Done, Engine, Event, Io, Token, Wait};
use vublk::sys;
use vublk::worker::SLOTS;

use crate::guest::{BATCH, Guest, MAX_SEGMENTS, Request, T_IN, T_OUT};

const REQUESTS: usize = 10_000;
const WARM_UP: usize = 2_000;
const QUEUES: u16 = 4;
const DISK_BYTES: u64 = 64 << 20;
/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const T_NONSENSE: u32 = 77;
const UNSUPP: u8 = 2;

const WRITE: Request =
    Request { kind: T_OUT, sector: 0, segments: 1, segment_len: 4096, skew: 0, indirect: false, status: 0 };

/// Set while allocations count.
static ARMED: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    // Const and without a destructor: to look at it allocates nothing.
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

impl Counting {
    fn note(bytes: usize) {
        if !ARMED.load(Ordering::Relaxed) || !COUNTED.get() {
            return;
        }
        if COUNT.fetch_add(1, Ordering::Relaxed) == 0 {
            COUNTED.set(false); // a backtrace allocates
            let _lost = writeln!(
                std::io::stderr().lock(),
                "the first allocation, of {bytes} bytes:\n{}",
                Backtrace::force_capture()
            );
            COUNTED.set(true);
        }
    }
}

// SAFETY: the system's allocator does all of the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::note(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::note(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::note(size);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, size) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// An engine whose operations do not seem to end while `HOLD` is set, so that
/// the depth of the warm-up is not a matter of luck.
struct Held<E> {
    engine: E,
    kept: Vec<Done>,
}

static HOLD: AtomicBool = AtomicBool::new(false);

impl<E: Engine> Engine for Held<E> {
    unsafe fn queue(&mut self, io: Io) {
        // SAFETY: the contract of this very function.
        unsafe { self.engine.queue(io) }
    }
    fn watch(&mut self, token: Token, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        self.engine.watch(token, fd)
    }
    fn unwatch(&mut self, token: Token) {
        self.engine.unwatch(token);
    }
    fn enter(&mut self, wait: Wait) -> std::io::Result<()> {
        self.engine.enter(wait)
    }
    fn reap(&mut self, mut each: impl FnMut(Event)) {
        let Self { engine, kept } = self;
        let hold = HOLD.load(Ordering::SeqCst);
        engine.reap(|event| match event {
            Event::Done(done) if hold => kept.push(done),
            event => each(event),
        });
        if !hold {
            kept.drain(..).for_each(|done| each(Event::Done(done)));
        }
    }
    fn is_inline(&self) -> bool {
        self.engine.is_inline()
    }
    fn max_joined(&self) -> u64 {
        self.engine.max_joined()
    }
    fn chains(&self, offered: u16) -> u16 {
        self.engine.chains(offered)
    }
    fn batch(&self, in_flight: usize) -> usize {
        self.engine.batch(in_flight)
    }
}

/// All kinds of requests, again and again; `at` numbers them.
fn request(at: usize) -> Request {
    // Steps over the disk; what is written there does not matter.
    let sector = (at as u64).wrapping_mul(7919 * 8) % (DISK_BYTES / 512 - 256) / 8 * 8;
    let read =
        Request { kind: T_IN, sector, segments: 1, segment_len: 4096, skew: 0, indirect: false, status: 0 };
    let write = Request { kind: T_OUT, ..read };
    let (odd_read, odd_write) = (Request { skew: 3, ..read }, Request { skew: 3, ..write });
    let round = at / 32;
    match at % 32 {
        // Now and then all wait for the pool at once.
        _ if round % 16 == 5 => odd_read,
        0..4 => read,
        4..8 => Request { indirect: true, ..write },
        8 => Request { segments: MAX_SEGMENTS, ..read },
        9 => Request { segments: MAX_SEGMENTS, indirect: true, ..write },
        // Adjacent: joined into one operation.
        at @ 10..16 => Request { sector: (round * 64 % 4096 + at * 8) as u64, ..write },
        at @ 16..20 => Request { sector: (round * 64 % 4096 + at * 8) as u64, indirect: true, ..read },
        // Through pool pages.
        20 | 21 => odd_read,
        22 | 23 => Request { segments: MAX_SEGMENTS, ..odd_write },
        // Not whole blocks, where a block is more than a sector.
        24 => Request { sector: sector + 3, segment_len: 512, ..write },
        25 => Request { sector: sector + 5, segment_len: 1536, ..read },
        26 => Request { kind: T_GET_ID, segment_len: 20, ..read },
        27 => Request { kind: T_DISCARD, segment_len: 16, ..read },
        28 => Request { kind: T_WRITE_ZEROES, segment_len: 16, ..read },
        29 => Request { kind: T_NONSENSE, status: UNSUPP, ..read },
        _ => Request { kind: T_FLUSH, segments: 0, ..read },
    }
}

/// Has as many of a request in flight at once as ever will be: the slots are
/// made, and what else grows with the depth.
fn drive_deep(guest: &mut Guest, request: impl Fn(usize) -> Request) {
    HOLD.store(true, Ordering::SeqCst);
    for queue in 0..usize::from(QUEUES) {
        (0..usize::from(BATCH)).for_each(|at| guest.offer(queue, request(queue * usize::from(BATCH) + at)));
        guest.publish(queue);
    }
    let until = Instant::now() + PATIENCE;
    while !(0..usize::from(QUEUES)).all(|queue| guest.is_fetched(queue)) {
        assert!(Instant::now() < until, "all requests are fetched");
        std::thread::sleep(Duration::from_millis(1));
    }
    HOLD.store(false, Ordering::SeqCst);
    sys::signal(&guest.queues[0].kick); // or it would sleep on
    take_all(guest);
}

/// Takes answers until nothing is in flight.
fn take_all(guest: &mut Guest) {
    let until = Instant::now() + PATIENCE;
    while (0..usize::from(QUEUES)).map(|queue| guest.take(queue)).sum::<usize>() > 0 {
        assert!(Instant::now() < until, "all requests are answered");
        let mut calls: Vec<_> =
            guest.queues.iter().map(|queue| PollFd::new(&queue.call, PollFlags::IN)).collect();
        let timeout = Timespec::try_from(PATIENCE).unwrap();
        poll(&mut calls, Some(&timeout)).unwrap();
        for queue in &guest.queues {
            sys::drain(&queue.call);
        }
    }
}

/// Sends requests in batches through all queues; gives how many were answered.
fn drive(guest: &mut Guest, from: usize, count: usize) -> usize {
    let mut made = from;
    while made < from + count {
        for queue in 0..usize::from(QUEUES) {
            for _ in 0..BATCH.min(1 + u16::try_from(made % 61).unwrap()) {
                guest.offer(queue, request(made));
                made += 1;
            }
            guest.publish(queue);
        }
        take_all(guest);
    }
    made - from
}

fn engine_allocates_nothing<E: Engine>(
    name: &str,
    disk: &Path,
    block: u64,
    engine: impl FnOnce(&Device, u16) -> E + Send,
) {
    let (mut guest, seat) = Guest::new(QUEUES, true);
    let direct = rustix::fs::open(disk, OFlags::RDWR | OFlags::DIRECT, Mode::empty()).is_ok();
    let device = guest::device(disk, direct, block);
    std::thread::scope(|scope| {
        let theirs = &device;
        let worker = scope.spawn(move || {
            // The engine is made on the thread that uses it.
            let engine = engine(theirs, seat.tokens());
            let engine = Held { engine, kept: Vec::with_capacity(SLOTS.into()) };
            let mut worker = seat.worker(engine, theirs.clone());
            COUNTED.set(true);
            let result = worker.run();
            COUNTED.set(false);
            result.unwrap();
        });
        guest.started();
        drive_deep(&mut guest, |at| Request { sector: at as u64 * 64, ..WRITE });
        drive_deep(&mut guest, |_| WRITE); // one holds the block, all others wait for it
        drive(&mut guest, 0, WARM_UP);
        ARMED.store(true, Ordering::SeqCst);
        let seen = drive(&mut guest, WARM_UP, REQUESTS);
        ARMED.store(false, Ordering::SeqCst);
        drop(guest); // tells the worker to exit
        worker.join().unwrap();
        let allocated = COUNT.swap(0, Ordering::SeqCst);
        let block = device.disk.backing.block;
        report(&format!(
            "{name}: {seen} requests, {allocated} allocations (direct={direct} block={block}; with the warm-up: {})",
            device.stats
        ));
        assert_eq!(allocated, 0, "{name} allocates for a request; where first is said above");
        assert!(seen >= REQUESTS);
    });
}

/// Says it past the test runner's capture: how much was tried is for everyone.
fn report(line: &str) {
    let _lost = writeln!(std::io::stderr().lock(), "allocations: {line}");
}

/// One test: two at once would count each other's.
#[test]
fn nothing_is_allocated_per_request() {
    // On the file system of the target folder, where a file is most likely to
    // be on a disk and to take O_DIRECT.
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(DISK_BYTES).unwrap();
    let disk = file.path();
    // In memory, with blocks of a page: parts of blocks are changed.
    let memory = guest::memory_file(DISK_BYTES);
    let memory_path = PathBuf::from(format!("/proc/self/fd/{}", memory.as_raw_fd()));

    engine_allocates_nothing("null", disk, 0, |_, tokens| Null::new(SLOTS, tokens).unwrap());
    let files = |device: &Device| match device.durability.way(0).unwrap() {
        Way::Files(files) => Arc::clone(files),
        Way::Nbd(_) | Way::Rbd(_) => panic!("it is a file"),
    };
    engine_allocates_nothing("threads", disk, 0, |device, tokens| {
        Threads::new(files(device), SLOTS, tokens).unwrap()
    });
    if let Err(why) = Uring::probe() {
        report(&format!("LEFT OUT: io_uring is not available here: {why}"));
        return;
    }
    let uring =
        |device: &Device, tokens| Uring::new(files(device), SLOTS, tokens, &Options::default()).unwrap();
    engine_allocates_nothing("io_uring", disk, 0, uring);
    engine_allocates_nothing("inline", &memory_path, 4096, |device, tokens| {
        Inline::new(uring(device, tokens), files(device), SLOTS)
    });
}
