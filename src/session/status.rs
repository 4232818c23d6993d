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

use super::Session;
use crate::program::Program;
use crate::succession::Succession;

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
    /// What keeps what it would need, and starts it: `parent`, `systemd`, or `none`.
    pub kept_by: &'static str,
    /// Why the last upgrade did not take place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upgrade_refused: Option<String>,
    /// The backing.
    pub disk: DiskStatus,
    /// The queues that are being served.
    pub queues: Vec<QueueStatus>,
    /// The front-end keeps a journal of what is in flight.
    pub inflight_region: bool,
    /// Milliseconds that the guest waited for this daemon to take over from one
    /// that stopped for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waited_ms: Option<f64>,
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
    /// An fsync failed; every FLUSH, and every write that must be durable, fails until the daemon is restarted.
    pub sync_failed: bool,
}

/// A queue that is being served.
#[derive(Debug, Serialize)]
pub struct QueueStatus {
    /// Its number.
    pub index: usize,
    /// Its descriptors.
    pub size: u32,
}

impl Session {
    /// The state of things.
    #[must_use]
    pub fn status(&self, succession: &Succession) -> Status {
        let disk = &self.device.disk;
        let promise = self.device.promise();
        let running = self.vrings.iter().enumerate().filter(|(_, vring)| vring.running);
        Status {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            program: Program::own_path(),
            state_version: super::state::VERSION,
            kept_by: succession.kept_by(),
            upgrade_refused: succession.refused().map(str::to_owned),
            disk: DiskStatus {
                path: disk.path().to_owned(),
                size: promise.bytes(),
                block: promise.block,
                read_only: promise.read_only,
                write_cache: if self.device.durability.is_write_through() {
                    "writethrough"
                } else {
                    "writeback"
                },
                sync_failed: self.device.durability.sync_failed(),
            },
            queues: running.map(|(index, vring)| QueueStatus { index, size: vring.size }).collect(),
            inflight_region: self.inflight.as_ref().is_some_and(|(_, at)| !at.own),
            waited_ms: self.waited_ms,
            counters: self.device.stats.counts().collect(),
        }
    }
}
