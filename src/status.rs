//! What the control socket's `status` and `queues` answer.
//!
//! What it is: values for people and programs, made when asked for.
//!
//! What it is not: the daemon does not read them back; the tool does.
//!
//! Invariants: fields are added, never renamed: programs read them. An answer fits into a socket's buffer, so that a client
//! that does not read costs nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::hold::Held;
use crate::link::Shown;
use crate::log;
use crate::program::Program;
use crate::session::state::VERSION;
use crate::stats::histogram::Histogram;
use crate::stats::queue::{Count, Totals};
use crate::stats::{Event, InFlight, Operation};

/// Queues of one answer.
const QUEUES_AT_ONCE: usize = 16;
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
    /// Seconds since this process started.
    pub uptime_seconds: f64,
    /// How much it logs.
    pub log_level: &'static str,
    /// The file of its disks, which the next upgrade reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<PathBuf>,
    /// The disk that was asked for, or the only one.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskState>,
    /// The disks of a file, without their histograms: those are told of one disk.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskState>,
}

/// What a process tells of itself.
#[derive(Debug)]
pub struct About {
    /// How long it has run.
    pub uptime: Duration,
    /// The file of its disks.
    pub config: Option<PathBuf>,
}

/// What a disk tells.
#[derive(Debug, Serialize)]
pub struct DiskState {
    /// Its name in the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Where its front-ends connect, if the daemon has made that socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
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
    /// Of the disk's workers, and of those of the daemons before this one.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub counters: BTreeMap<&'static str, u64>,
}

/// The disk as the guest has it, and what has been done on it, by this daemon and those before it.
#[derive(Debug, Serialize)]
pub struct DiskStatus {
    /// File or block device.
    pub path: PathBuf,
    /// Serial number, as the guest sees it.
    pub serial: String,
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
    /// Seconds since the connection to the disk's server was lost, or since a cluster did not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_lost_seconds: Option<f64>,
    /// `--reconnect-delay`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reconnect_delay_seconds: Option<f64>,
    /// Why the guest gets nothing but I/O errors: the image of a cluster is another client's, or may have been.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_lost: Option<String>,
    /// An fsync failed; every FLUSH, and every write that must be durable, fails until the daemon is restarted.
    pub sync_failed: bool,
    /// Seconds since the first daemon began to serve it.
    pub served_seconds: f64,
    /// Front-ends that have been served; each but the first is a reconnect.
    pub front_ends: u64,
    /// Notifications by the driver.
    pub kicks: u64,
    /// Interrupts sent to it.
    pub calls: u64,
    /// Requests that were carried out again, because a daemon or another back-end had left them in flight.
    pub replayed: u64,
    /// Daemons that took over from one that had stopped for them, and from one that had died.
    pub upgrades: u64,
    /// See `upgrades`.
    pub crashes: u64,
    /// Requests by operation.
    pub operations: BTreeMap<String, Done>,
    /// Errors by kind.
    pub errors: Errors,
}

/// Requests of one operation that were answered.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Done {
    /// How many.
    pub requests: u64,
    /// Bytes that they named.
    pub bytes: u64,
    /// How long they took, from fetch to return, together.
    pub seconds: f64,
    /// How long each took.
    pub latency: Histogram,
}

/// Requests and chains that went wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Errors {
    /// Requests answered with an I/O error.
    pub io: u64,
    /// Requests answered with "unsupported".
    pub unsupported: u64,
    /// Chains returned without a status; they are not among the requests.
    pub malformed: u64,
    /// Requests that were held because the disk refused them, whatever became of them.
    pub held: u64,
}

/// One queue.
#[derive(Debug, Serialize, Deserialize)]
pub struct QueueStatus {
    /// Its number.
    pub index: u16,
    /// Requests in flight.
    pub in_flight: u32,
    /// Seconds since the oldest of them was fetched.
    pub oldest_seconds: f64,
    /// Notifications by the driver.
    pub kicks: u64,
    /// Interrupts sent to it.
    pub calls: u64,
    /// Requests by operation.
    pub operations: BTreeMap<String, Done>,
    /// Errors by kind.
    pub errors: Errors,
}

/// Some queues.
#[derive(Debug, Serialize, Deserialize)]
pub struct QueuesStatus {
    /// In their order.
    pub queues: Vec<QueueStatus>,
    /// The first of the others, to be asked for next.
    pub next: Option<u16>,
}

/// Those that a guest ever asked for.
fn operations(totals: &Totals) -> BTreeMap<String, Done> {
    let all = Operation::ALL.into_iter().map(|operation| (operation, totals.of(operation)));
    let asked_for = all.filter(|(_, done)| done.requests > 0);
    let told = asked_for.map(|(operation, done)| {
        let crate::stats::queue::Done { requests, bytes, time, latency } = done;
        (operation.name().to_owned(), Done { requests, bytes, seconds: time.as_secs_f64(), latency })
    });
    told.collect()
}

fn errors(totals: &Totals) -> Errors {
    Errors {
        io: totals.count(Count::IoErrors),
        unsupported: totals.count(Count::Unsupported),
        malformed: totals.count(Count::Malformed),
        held: totals.count(Count::Held),
    }
}

/// To a tenth, as people read it.
fn tenths(time: Duration) -> f64 {
    (time.as_secs_f64() * 10.0).floor() / 10.0
}

/// To a millisecond: rates are made of it.
fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e3).floor() / 1e3
}

impl ProcessStatus {
    /// Of this process with one disk.
    #[must_use]
    pub fn of(disk: DiskState, about: About) -> Self {
        Self { disk: Some(disk), ..Self::of_disks(Vec::new(), about) }
    }

    /// The same, with the disks of a file.
    #[must_use]
    pub fn of_disks(mut disks: Vec<DiskState>, about: About) -> Self {
        let all = disks.iter_mut().filter_map(|disk| disk.disk.as_mut());
        all.flat_map(|disk| disk.operations.values_mut())
            .for_each(|done| done.latency = Histogram::default());
        Self {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            program: Program::own_path(),
            state_version: VERSION,
            uptime_seconds: milliseconds(about.uptime),
            log_level: log::level(),
            config: about.config,
            disk: None,
            disks,
        }
    }
}

impl DiskState {
    /// Of the disk of this name and this socket: why it failed, the device once that is open, and what its control thread showed last.
    #[must_use]
    pub fn new(
        name: Option<String>,
        socket: Option<PathBuf>,
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
        Self { name, socket, state, why: failed, shown, disk: device.map(DiskStatus::new), counters }
    }
}

impl DiskStatus {
    /// Of this disk, now.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        let promise = device.promise();
        let in_flight = device.stats.in_flight();
        let through = device.durability.is_write_through();
        let totals = device.stats.totals();
        Self {
            path: device.disk.path().to_owned(),
            serial: String::from_utf8_lossy(&promise.serial).trim_end_matches('\0').to_owned(),
            size: promise.bytes(),
            block: promise.block,
            read_only: promise.read_only,
            write_cache: if through { "writethrough" } else { "writeback" },
            on_error: device.holding.on_error().to_string(),
            in_flight: in_flight.requests,
            oldest_seconds: tenths(in_flight.oldest),
            throttle: Some(device.throttle.shown()).filter(throttle::Shown::is_any),
            held: device.holding.held(),
            server_lost_seconds: device.server_lost_for(in_flight).map(tenths),
            reconnect_delay_seconds: device.reconnect_delay.map(tenths),
            image_lost: device.disk.image().and_then(|image| image.why_lost()),
            sync_failed: device.durability.sync_failed(),
            served_seconds: milliseconds(device.stats.served_for()),
            front_ends: device.stats.times(Event::FrontEnd),
            kicks: totals.count(Count::Kicks),
            calls: totals.count(Count::Calls),
            replayed: device.stats.times(Event::Replayed),
            upgrades: device.stats.times(Event::Upgrade),
            crashes: device.stats.times(Event::Crash),
            operations: operations(&totals),
            errors: errors(&totals),
        }
    }
}

impl QueuesStatus {
    /// Of the queues from this one on.
    #[must_use]
    pub fn new(device: &Device, from: u16) -> Self {
        let in_flight = device.stats.in_flight_by_queue();
        let mut queues = device.stats.queues();
        queues.retain(|(index, _)| *index >= from);
        let told = queues.iter().take(QUEUES_AT_ONCE).map(|(index, counters)| {
            let mut totals = Totals::default();
            totals.add(counters);
            let InFlight { requests, oldest } = in_flight.get(index).copied().unwrap_or_default();
            QueueStatus {
                index: *index,
                in_flight: requests,
                oldest_seconds: tenths(oldest),
                kicks: totals.count(Count::Kicks),
                calls: totals.count(Count::Calls),
                operations: operations(&totals),
                errors: errors(&totals),
            }
        });
        Self { queues: told.collect(), next: queues.get(QUEUES_AT_ONCE).map(|(index, _)| *index) }
    }
}
