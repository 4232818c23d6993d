//! What the control socket's `status` answers.
//!
//! What it is: a value for people and programs, made when asked for.
//!
//! What it is not: nothing reads it back.
//!
//! Invariant: fields are added, never renamed: programs read them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::device::Device;
use crate::hold::Held;
use crate::link::Shown;
use crate::program::Program;
use crate::session::state::VERSION;

/// See the head of the file.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Of vublkd.
    pub version: &'static str,
    /// The daemon's process.
    pub pid: u32,
    /// Its program.
    pub program: PathBuf,
    /// A successor has to be able to go on from a state of this number.
    pub state_version: u32,
    /// What the disk's control thread shows.
    #[serde(flatten)]
    pub shown: Option<Shown>,
    /// The backing.
    pub disk: DiskStatus,
    /// Since the daemon started.
    pub counters: BTreeMap<&'static str, u64>,
}

/// The disk as the guest has it.
#[derive(Debug, Serialize)]
pub struct DiskStatus {
    /// File or block device.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// Bytes of a logical block.
    pub block: u32,
    /// The guest may only read.
    pub read_only: bool,
    /// `writeback` or `writethrough`.
    pub write_cache: &'static str,
    /// `--on-error`: `report`, `stop` or `enospc`.
    pub on_error: String,
    /// Requests in flight.
    pub in_flight: u32,
    /// Seconds since the oldest of them was fetched: a disk that hangs shows here.
    pub oldest_seconds: f64,
    /// What is held because the disk refused it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held: Option<Held>,
    /// An fsync failed; every FLUSH, and every write that must be durable, fails until the daemon is restarted.
    pub sync_failed: bool,
}

impl Status {
    /// The state of things: of a disk, and what its control thread showed last.
    #[must_use]
    pub fn new(device: &Device, shown: Option<Shown>) -> Self {
        let promise = device.promise();
        let (in_flight, oldest) = device.stats.in_flight();
        let through = device.durability.is_write_through();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            program: Program::own_path(),
            state_version: VERSION,
            shown,
            disk: DiskStatus {
                path: device.disk.path().to_owned(),
                size: promise.bytes(),
                block: promise.block,
                read_only: promise.read_only,
                write_cache: if through { "writethrough" } else { "writeback" },
                on_error: device.holding.on_error().to_string(),
                in_flight,
                oldest_seconds: f64::from(oldest) / 10.0,
                held: device.holding.held(),
                sync_failed: device.durability.sync_failed(),
            },
            counters: device.stats.counts().collect(),
        }
    }
}
