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
use crate::throttle;

/// See the head of the file.
#[derive(Debug, Serialize)]
pub struct ProcessStatus {
    /// Of vublkd.
    pub version: &'static str,
    /// The daemon's process.
    pub pid: u32,
    /// Its program.
    pub program: PathBuf,
    /// A successor has to be able to go on from a state of this number.
    pub state_version: u32,
    /// The disk that was asked for, or the only one.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskState>,
    /// The disks of a file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskState>,
}

/// What a disk tells.
#[derive(Debug, Serialize)]
pub struct DiskState {
    /// Its name in the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `starting`, `serving` or `failed`.
    pub state: &'static str,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What its control thread shows.
    #[serde(flatten)]
    pub shown: Option<Shown>,
    /// The backing, once it is open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskStatus>,
    /// Since the daemon started.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
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
    /// Its limits, if it has any, and what had to wait for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttle: Option<throttle::Shown>,
    /// What is held because the disk refused it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held: Option<Held>,
    /// An fsync failed; every FLUSH, and every write that must be durable, fails until the daemon is restarted.
    pub sync_failed: bool,
}

impl ProcessStatus {
    /// Of this process, with one disk.
    #[must_use]
    pub fn of(disk: DiskState) -> Self {
        Self { disk: Some(disk), ..Self::of_disks(Vec::new()) }
    }

    /// Of this process, with the disks of a file.
    #[must_use]
    pub fn of_disks(disks: Vec<DiskState>) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            program: Program::own_path(),
            state_version: VERSION,
            disk: None,
            disks,
        }
    }
}

impl DiskState {
    /// Of the disk of this name: why it failed, the device once that is open, and what its control thread showed last.
    #[must_use]
    pub fn new(
        name: Option<String>,
        failed: Option<String>,
        device: Option<&Device>,
        shown: Option<Shown>,
    ) -> Self {
        let state = match (&failed, &shown) {
            (Some(_), _) => "failed",
            (None, Some(_)) => "serving",
            (None, None) => "starting",
        };
        let counters = device.map(|device| device.stats.counts().collect()).unwrap_or_default();
        Self { name, state, why: failed, shown, disk: device.map(DiskStatus::new), counters }
    }
}

impl DiskStatus {
    fn new(device: &Device) -> Self {
        let promise = device.promise();
        let (in_flight, oldest) = device.stats.in_flight();
        let through = device.durability.is_write_through();
        Self {
            path: device.disk.path().to_owned(),
            size: promise.bytes(),
            block: promise.block,
            read_only: promise.read_only,
            write_cache: if through { "writethrough" } else { "writeback" },
            on_error: device.holding.on_error().to_string(),
            in_flight,
            oldest_seconds: f64::from(oldest) / 10.0,
            throttle: Some(device.throttle.shown()).filter(throttle::Shown::is_any),
            held: device.holding.held(),
            sync_failed: device.durability.sync_failed(),
        }
    }
}
