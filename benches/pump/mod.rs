//! The pump of `benches/turn.rs` and `benches/turn_time.rs`: a guest and a
//! worker over the null engine, both on this thread.
//!
//! What it is: rings are filled with one batch, the device takes one turn, the
//! answers are taken and checked. Only the turn is for measuring.
//!
//! What it is not: no disk, no second thread, and no cache line that comes from
//! another core.
//!
//! Invariant: what [`device_turn`] does is what a worker does for a batch, and
//! nothing of the driver's.
//!
//! The disk is a memory file through the page cache: its rules are the same on
//! every machine. None of its bytes is touched.

#[expect(dead_code, reason = "tests/allocations.rs uses the rest")]
pub mod guest;

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use vublk::engine::null::Null;
use vublk::sys;
use vublk::worker::{SLOTS, Sleep, Turn, Worker};

use self::guest::{BATCH, Guest, Request, T_IN, T_OUT};

/// Blocks of 4 KiB that the disk has. A power of two.
const BLOCKS: u64 = 1 << 16;

/// A read in one segment of 4 KiB.
pub const READ: Request =
    Request { kind: T_IN, sector: 0, segments: 1, segment_len: 4096, skew: 0, indirect: false, status: 0 };
/// The same through an indirect table.
pub const READ_INDIRECT: Request = Request { indirect: true, ..READ };
/// A write in one segment of 4 KiB.
pub const WRITE: Request = Request { kind: T_OUT, ..READ };
/// A read of 32 KiB in eight segments that are not adjacent.
pub const READ_SEGMENTS: Request = Request { segments: 8, ..READ };

/// See the head of the file.
pub struct Pump {
    guest: Guest,
    worker: Worker<Null>,
    request: Request,
    made: u64,
}

/// One turn of the device: what is measured. A function of its own, so that
/// callgrind can tell it from the driver.
#[inline(never)]
pub fn device_turn(worker: &mut Worker<Null>) -> Turn {
    worker.turn(Sleep { when_idle: false, in_flight: false }).unwrap()
}

impl Pump {
    /// A pump of requests like this one, warm; with or without an in-flight
    /// journal.
    pub fn new(request: Request, journalled: bool) -> Self {
        let disk = guest::memory_file(BLOCKS * 4096);
        let path = PathBuf::from(format!("/proc/self/fd/{}", disk.as_raw_fd()));
        let (mut guest, seat) = Guest::new(1, journalled);
        let engine = Null::new(SLOTS, seat.tokens()).unwrap();
        let mut worker = seat.worker(engine, guest::device(&path, false, 0));
        // Not `device_turn`, which is counted from the first call on.
        let turn =
            |worker: &mut Worker<Null>| worker.turn(Sleep { when_idle: true, in_flight: false }).unwrap();
        turn(&mut worker);
        guest.started();
        let mut pump = Self { guest, worker, request, made: 0 };
        for _ in 0..4 {
            pump.fill();
            turn(&mut pump.worker);
            pump.empty();
        }
        pump
    }

    /// Fills the ring with a batch. Not measured.
    pub fn fill(&mut self) {
        for _ in 0..BATCH {
            // Far from each other, so that no two are joined into one operation.
            let block = self.made.wrapping_mul(7919) % (BLOCKS / 8) * 8;
            self.made += 1;
            self.guest.offer(0, Request { sector: block * 8, ..self.request });
        }
        self.guest.publish(0);
    }

    /// The device's half, to be measured.
    pub fn worker(&mut self) -> &mut Worker<Null> {
        &mut self.worker
    }

    /// Takes the answers and checks each. Not measured.
    pub fn empty(&mut self) {
        assert_eq!(self.guest.take(0), 0, "one turn answers a batch");
        assert!(sys::drain(&self.guest.queues[0].call), "a batch is signalled");
    }
}
