//! The life of vublkd: how it starts, whom it serves, how it is left, and how
//! it ends. vublkd alone; the oracle has other manners.

mod blocks;
mod callers;
mod claims;
mod command_lines;
mod connection;
mod deaf;
mod descriptors;
mod descriptors_run_out;
mod engines;
mod faults;
mod features;
mod formats;
mod haste;
mod holders;
mod hostile;
mod locks;
mod logging;
mod memory;
pub mod migration;
mod pin;
mod plug;
mod resize;
mod rings;
mod sandbox;
mod sharing;
mod signals;
mod sockets;
mod startup;
mod stop;
mod unmapped;

use crate::support::daemon::{Backend, Daemon, Options, THREADS, URING};
use crate::support::disk::Disk;

/// Runs a check once for each engine that does I/O.
#[track_caller]
pub fn each_engine(check: impl Fn(Backend)) {
    for engine in [URING, THREADS] {
        check(engine);
    }
}

/// A disk and a daemon on it, with default options.
#[track_caller]
fn start(engine: Backend) -> (Disk, Daemon) {
    let disk = Disk::new();
    let daemon = Daemon::start(engine, &disk, &Options::default());
    (disk, daemon)
}
