//! Instructions of a request on the device's side: ring, chain, decode, pages,
//! complete, over the null engine, counted by callgrind.
//!
//! What it is: the counts behind the gate of `make test`. They do not depend on
//! the machine's load, so a change of one in a hundred is seen; `turn_gate.py`
//! runs this, and compares with `instructions.toml`.
//!
//! What it is not: a time (`turn_time.rs`). System calls count as nothing here,
//! a cache miss as much as a hit.
//!
//! Invariant: only [`pump::device_turn`] is counted: the driver's half, the
//! set-up and the warm-up are not.
#![expect(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench may panic; the harness makes items without a word"
)]

mod pump;

use gungraun::{
    Callgrind, EntryPoint, LibraryBenchmarkConfig, library_benchmark, library_benchmark_group, main,
};

use crate::pump::guest::BATCH;
use crate::pump::{Pump, READ, READ_INDIRECT, READ_SEGMENTS, WRITE, device_turn};

/// Pumps `requests` through. The names of the cases say how many they are:
/// that is what the gate divides by.
fn run((mut pump, requests): (Pump, u16)) -> Pump {
    for _ in 0..requests / BATCH {
        pump.fill();
        device_turn(pump.worker());
        pump.empty();
    }
    pump
}

#[library_benchmark]
#[bench::requests_16384((Pump::new(READ, false), 16384))]
fn direct_read(pump: (Pump, u16)) -> Pump {
    run(pump)
}

#[library_benchmark]
#[bench::requests_16384((Pump::new(READ_INDIRECT, false), 16384))]
fn indirect_read(pump: (Pump, u16)) -> Pump {
    run(pump)
}

#[library_benchmark]
#[bench::requests_16384((Pump::new(WRITE, false), 16384))]
fn direct_write(pump: (Pump, u16)) -> Pump {
    run(pump)
}

#[library_benchmark]
#[bench::requests_16384((Pump::new(READ_SEGMENTS, false), 16384))]
fn direct_read_8_segments(pump: (Pump, u16)) -> Pump {
    run(pump)
}

#[library_benchmark]
#[bench::requests_16384((Pump::new(READ, true), 16384))]
fn journalled_read(pump: (Pump, u16)) -> Pump {
    run(pump)
}

library_benchmark_group!(
    name = turn,
    benchmarks = [direct_read, journalled_read, indirect_read, direct_write, direct_read_8_segments]
);

main!(
    config = LibraryBenchmarkConfig::default().tool(
        Callgrind::default()
            .args(["cache-sim=no"])
            .entry_point(EntryPoint::Custom("turn::pump::device_turn".into()))
    ),
    library_benchmark_groups = turn
);
