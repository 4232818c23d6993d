//! Nanoseconds of a request on the device's side, over the null engine, in
//! batches of 32: `cargo bench --bench turn_time`.
//!
//! What it is: the time of one turn, divided by the batch: the median of many,
//! and how they spread. It includes the one signal to the guest of each batch.
//!
//! What it is not: part of `make test`, since a busy machine changes it; nor
//! what a guest sees, whose cache lines come from another core.
//!
//! Invariant: only the turn is between the two looks at the clock.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a bench may panic, and is for reading"
)]

mod pump;

use std::hint::black_box;
use std::time::Instant;

use crate::pump::guest::BATCH;
use crate::pump::{Pump, READ, READ_INDIRECT, READ_SEGMENTS, WRITE, device_turn};

const BATCHES: usize = 40_000;
const WARM_UP: usize = 2_000;

fn main() {
    println!("ns per request, device side, batches of {BATCH}, {BATCHES} of them:");
    println!("{:<26}{:>8}{:>8}{:>8}{:>8}", "", "min", "p25", "median", "p75");
    let cases = [
        ("direct read", READ, false),
        ("direct read, journal", READ, true),
        ("indirect read", READ_INDIRECT, false),
        ("direct write", WRITE, false),
        ("direct read, 8 segments", READ_SEGMENTS, false),
    ];
    for (name, request, journalled) in cases {
        let mut pump = Pump::new(request, journalled);
        let mut times = Vec::with_capacity(BATCHES);
        for batch in 0..WARM_UP + BATCHES {
            pump.fill();
            let start = Instant::now();
            black_box(device_turn(pump.worker()));
            let time = start.elapsed();
            pump.empty();
            if batch >= WARM_UP {
                times.push(time.as_nanos());
            }
        }
        times.sort_unstable();
        let at = |part: usize| times[(times.len() - 1) * part / 4] as f64 / f64::from(BATCH);
        println!("{name:<26}{:>8.1}{:>8.1}{:>8.1}{:>8.1}", at(0), at(1), at(2), at(3));
    }
}
