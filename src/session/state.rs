//! A session as a successor takes it over: what the front-end said, as a value.
//!
//! What it is: [`Session::state`] writes down everything that outlives this
//! process, [`Session::restore`] makes a session of it again, rings running.
//!
//! What it is not: it keeps no descriptor itself; a state names them by the
//! numbers under which [`crate::keep`] has them.
//!
//! Invariants: a state says all that a front-end will not say again; where a ring
//! goes on is not in it but in the ring itself and in the in-flight region, which
//! are true to the last store before a kill. A disk that is another one than the
//! state's is never served under it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::pause::KeptSnapshots;
use super::{KeptFd, Session, Vring};
use crate::device::Blame;
use crate::dirty::DirtyLog;
use crate::disk::{Disk, Identity};
use crate::inflight;
use crate::keep::{self, FdId};
use crate::memory::{GuestMemory, RegionLayout};
use crate::promise::{self, Promise};
use crate::throttle;

/// The layout of the state that this program writes.
pub const VERSION: u32 = 4;
/// The layouts that it can go on from. 3 had no count of deaths.
pub const READS: [u32; 2] = [3, VERSION];

/// See the head of the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    version: u32,
    disk: Identity,
    /// What the guest was promised. A successor keeps it, whatever it would promise itself.
    promise: Promise,
    /// The listening socket.
    pub listener: FdId,
    /// The front-end's connection; 0: there is none.
    pub connection: FdId,
    /// Connections of front-ends that wait for their turn.
    #[serde(default)]
    pub waiting: Vec<FdId>,
    /// VHOST_USER_SET_FEATURES and SET_PROTOCOL_FEATURES.
    pub features: u64,
    /// Likewise.
    pub protocol_features: u64,
    /// What the guest chose, or was kept_fd: its writes are durable after a FLUSH.
    write_back: bool,
    channel: FdId,
    news: bool,
    regions: Vec<KeptRegion>,
    inflight: Option<InflightState>,
    log: Option<LogState>,
    /// A ring of this connection has run, and the image is its guest's also between two boots.
    #[serde(default)]
    image_locked: bool,
    vrings: Vec<VringState>,
    /// Requests that were in flight when daemons died.
    #[serde(default)]
    pub(super) deaths: Vec<super::deaths::Death>,
    /// Limits that were set while the disk was served; before them the options' count.
    #[serde(default)]
    pub limits: Option<throttle::Kept>,
    /// When the rings were stopped for a successor: CLOCK_MONOTONIC, nanoseconds.
    pub stopped: Option<u64>,
    /// Snapshots, and what has changed since.
    #[serde(default)]
    pub(super) snapshots: Option<super::pause::SnapshotsState>,
}

/// A memory region and its file.
pub(super) type KeptRegion = (RegionLayout, FdId);

/// VHOST_USER_SET_INFLIGHT_FD, or a region of our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InflightState {
    pub(super) bytes: u64,
    pub(super) offset: u64,
    pub(super) queues: u16,
    pub(super) size: u16,
    pub(super) fd: FdId,
    /// A region that the front-end does not know of.
    pub(super) own: bool,
}

/// VHOST_USER_SET_LOG_BASE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LogState {
    pub(super) bytes: u64,
    pub(super) offset: u64,
    pub(super) fd: FdId,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct VringState {
    size: u32,
    addresses: Option<[u64; 3]>,
    used_log: Option<u64>,
    base: u16,
    enabled: bool,
    kick: FdId,
    call: FdId,
    err: FdId,
}

/// Why a session cannot go on where an earlier one ended.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// No state of ours, or of another version.
    #[error("its state is of another version of vublkd")]
    Version,
    /// `--read-only` was added or taken away while a guest has the disk.
    #[error("{0}: the guest has it {1}; start vublkd so, or stop the VM first")]
    OtherMode(PathBuf, &'static str),
    /// The path leads to another file or device than before.
    #[error("{0}: is another disk now than the guest had. Put that one back")]
    OtherDisk(PathBuf),
    /// A state names a descriptor that was not kept.
    #[error("its descriptor number {0} is not there any more")]
    Missing(FdId),
    /// What it had mapped cannot be mapped again.
    #[error("{0}")]
    Map(String),
}

impl State {
    /// Reads a state.
    ///
    /// # Errors
    /// [`RestoreError::Version`].
    pub fn parse(bytes: &[u8]) -> Result<Self, RestoreError> {
        let state: Self = serde_json::from_slice(bytes).map_err(|_| RestoreError::Version)?;
        let is_ours = READS.contains(&state.version) && state.promise.is_possible();
        if is_ours { Ok(state) } else { Err(RestoreError::Version) }
    }

    /// Whether it is this disk that the guest had.
    ///
    /// # Errors
    /// [`RestoreError::OtherDisk`].
    pub fn check_disk(&self, disk: &Disk) -> Result<(), RestoreError> {
        if self.connection == 0 {
            return Ok(()); // no front-end has it now
        }
        if self.disk != disk.identity() {
            return Err(RestoreError::OtherDisk(disk.path().to_owned()));
        }
        match (self.promise.read_only, disk.backing.read_only) {
            (true, false) => Err(RestoreError::OtherMode(disk.path().to_owned(), "with --read-only")),
            (false, true) => Err(RestoreError::OtherMode(disk.path().to_owned(), "without --read-only")),
            _ => Ok(()),
        }
    }

    /// What was promised of `disk`, which a successor keeps. While no front-end has it, an option
    /// that says something else goes first: `None`.
    #[must_use]
    pub fn promise(&self, disk: &Disk, options: &promise::Options) -> Option<Promise> {
        let contradicts = !self.promise.agrees(disk, options);
        if self.connection != 0 && contradicts {
            tracing::warn!(
                disk = %disk.path().display(),
                "the guest keeps the block size and the serial number that it has; those of the command line take \
                 effect once the VM and vublkd were stopped"
            );
        }
        (self.connection != 0 || !contradicts && self.disk == disk.identity()).then_some(self.promise)
    }

    /// What is known of snapshots of this disk.
    #[must_use]
    pub fn snapshots(&self, disk: &Disk, fds: &Fds<'_>) -> Option<KeptSnapshots> {
        let state = self.snapshots.filter(|_| self.disk == disk.identity())?;
        let current = fds.file(state.current).ok()?;
        let previous = if state.previous == 0 { None } else { Some(fds.file(state.previous).ok()?) };
        Some(KeptSnapshots { state, current, previous })
    }

    /// The cache mode that the last guest chose, or was kept_fd.
    #[must_use]
    pub fn write_back(&self) -> bool {
        self.write_back
    }

    /// As it is written.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Every descriptor that it names.
    #[must_use]
    pub fn names(&self) -> BTreeSet<FdId> {
        let rings = self.vrings.iter().flat_map(|v| [v.kick, v.call, v.err]);
        let rest = [self.listener, self.connection, self.channel];
        let areas = self.inflight.iter().map(|i| i.fd).chain(self.log.iter().map(|l| l.fd));
        let areas = areas.chain(self.waiting.iter().copied());
        let areas = areas.chain(self.snapshots.iter().flat_map(|of| [of.current, of.previous]));
        rings.chain(rest).chain(areas).chain(self.regions.iter().map(|r| r.1)).filter(|&id| id != 0).collect()
    }
}

/// The kept descriptors, for who restores a state.
#[derive(Debug)]
pub struct Fds<'a>(pub &'a keep::Fds);

impl Fds<'_> {
    /// A copy of one.
    ///
    /// # Errors
    /// [`RestoreError::Missing`].
    pub fn get(&self, id: FdId) -> Result<OwnedFd, RestoreError> {
        self.0.get(&id).and_then(|fd| fd.try_clone().ok()).ok_or(RestoreError::Missing(id))
    }

    fn file(&self, id: FdId) -> Result<File, RestoreError> {
        self.get(id).map(File::from)
    }

    fn kept_fd(&self, id: FdId) -> Result<Option<KeptFd>, RestoreError> {
        let fd = || self.0.get(&id).cloned().ok_or(RestoreError::Missing(id));
        if id == 0 { Ok(None) } else { Ok(Some(KeptFd { fd: fd()?, id })) }
    }
}

impl Session {
    /// Everything that a successor has to know of it; the sockets are [`crate::succession`]'s.
    #[must_use]
    pub fn state(&self) -> State {
        let id = |kept_fd: &Option<KeptFd>| kept_fd.as_ref().map_or(0, |g| g.id);
        let vring = |v: &Vring| VringState {
            size: v.size,
            addresses: v.addresses,
            used_log: v.used_log,
            base: v.base,
            enabled: v.enabled,
            kick: id(&v.kick),
            call: id(&v.call),
            err: id(&v.err),
        };
        let mut vrings: Vec<VringState> = self.vrings.iter().map(vring).collect();
        while vrings.last().is_some_and(|last| *last == VringState::default()) {
            vrings.pop(); // most of 256 were never spoken of
        }
        State {
            version: VERSION,
            disk: self.device.disk.identity(),
            promise: self.device.promise(),
            listener: 0,
            connection: 0,
            waiting: Vec::new(),
            features: self.features,
            protocol_features: self.protocol_features,
            write_back: self.device.durability.write_back_chosen(),
            channel: id(&self.channel),
            news: self.news,
            regions: self.regions.clone(),
            inflight: self.inflight.as_ref().map(|(_, at)| *at),
            log: self.log.as_ref().map(|(_, at)| *at),
            image_locked: self.image_locked,
            vrings,
            deaths: self.deaths.clone(),
            limits: self.device.throttle.kept(),
            stopped: None,
            snapshots: self.snapshots_state(),
        }
    }

    /// Goes on where a state left off: maps what was mapped. The features have been set; the rings start in
    /// [`Session::start_restored`], with what was in flight on them.
    ///
    /// # Errors
    /// [`RestoreError`]; then no ring runs, and the connection is to be closed.
    pub fn restore(&mut self, state: &State, fds: &Fds<'_>) -> Result<(), RestoreError> {
        state.check_disk(&self.device.disk)?;
        let map = |e: &dyn std::fmt::Display| RestoreError::Map(e.to_string());
        // The device was made with its promise.
        self.mode_is_settled = true;
        self.choose_cache(state.write_back);
        // systemd may have seen that its other end is closed.
        self.channel = fds.kept_fd(state.channel).unwrap_or_default();
        self.news = state.news;
        if let Some(at) = state.inflight {
            let region = inflight::Region::map(&fds.file(at.fd)?, at.bytes, at.offset, at.queues, at.size);
            self.inflight = Some((Arc::new(region.map_err(|e| map(&e))?), at));
        }
        if let Some(at) = state.log {
            let log = fds.file(at.fd).and_then(|file| {
                DirtyLog::map(&file, at.bytes, at.offset).map_err(|e| RestoreError::Map(e.to_string()))
            });
            match log {
                Ok(log) => self.log = Some((Arc::new(log), at)),
                // One that a cancelled migration left may be gone by now.
                Err(_) if state.features & promise::F_LOG_ALL == 0 => {}
                Err(e) => return Err(e),
            }
        }
        self.apply_log();
        if state.vrings.len() > self.vrings.len() {
            return Err(RestoreError::Map("it had more queues than --num-queues now allows".into()));
        }
        // systemd's store has an eventfd once, also if it is the kick of several queues. An epoll takes a descriptor once.
        let mut kicks = BTreeSet::new();
        let mut kick = |id| match fds.kept_fd(id)? {
            Some(_) if !kicks.insert(id) => Ok(Some(KeptFd { fd: fds.get(id)?.into(), id })),
            first => Ok(first),
        };
        for (vring, was) in self.vrings.iter_mut().zip(&state.vrings) {
            *vring = Vring {
                size: was.size,
                addresses: was.addresses,
                used_log: was.used_log,
                base: was.base,
                kick: kick(was.kick)?,
                call: fds.kept_fd(was.call)?,
                err: fds.kept_fd(was.err)?,
                enabled: was.enabled,
                running: false,
                ran: false,
            };
        }
        let layouts: Vec<RegionLayout> = state.regions.iter().map(|r| r.0).collect();
        let files = state.regions.iter().map(|r| fds.file(r.1)).collect::<Result<Vec<_>, _>>()?;
        self.regions.clone_from(&state.regions);
        self.memory = Arc::new(GuestMemory::map(&layouts, files).map_err(|e| map(&e))?);
        if state.image_locked {
            self.lock_image(); // whether or not a ring starts; it says so if it cannot
        }
        Ok(())
    }

    /// Starts the rings of a state that was restored, which is written down by now: should this process die, too, its
    /// rings are not where they were stopped for it.
    pub fn start_restored(&mut self, state: &State) {
        self.taking_over = true;
        self.apply_memory();
        self.taking_over = false;
        // There is no message to refuse, and the next one is not about it.
        if let Some(why) = self.take_undone() {
            self.device.complain(Blame::Queues, format_args!("{why}"));
        }
        // To a tenth of a millisecond, as people read it.
        let since = |at| Duration::from_nanos(crate::sys::monotonic_ns().saturating_sub(at)).as_secs_f64();
        self.waited_ms = state.stopped.map(|at| (since(at) * 1e4).round() / 10.0);
        // An interrupt may have gone astray with the process that was to send it.
        for call in self.vrings.iter().filter(|v| v.running).filter_map(|v| v.call.as_ref()) {
            crate::sys::signal_foreign(&call.fd);
        }
    }

    /// How long the guest waited for this process to take over from one that
    /// stopped for it, milliseconds.
    #[must_use]
    pub fn waited_ms(&self) -> Option<f64> {
        self.waited_ms
    }

    /// True if a ring runs.
    #[must_use]
    pub fn any_runs(&self) -> bool {
        self.vrings.iter().any(|vring| vring.running)
    }

    /// Makes a region for what is in flight that the front-end does not know; `keep` keeps its file.
    ///
    /// # Errors
    /// When memory or descriptors run out, or it cannot be kept.
    pub fn own_inflight(
        &self,
        keep: impl FnOnce(&File) -> io::Result<FdId>,
    ) -> io::Result<(inflight::Region, InflightState)> {
        let queues = u16::try_from(self.vrings.len()).unwrap_or(u16::MAX);
        let size = crate::ring::MAX_QUEUE_SIZE;
        let (file, bytes) = inflight::Region::create(queues, size)?;
        let region = inflight::Region::map(&file, bytes, 0, queues, size)?;
        Ok((region, InflightState { bytes, offset: 0, queues, size, fd: keep(&file)?, own: true }))
    }

    /// Uses such a region until the front-end gives one.
    pub fn set_own_inflight(&mut self, made: Option<(inflight::Region, InflightState)>) {
        self.inflight = made.map(|(region, at)| (Arc::new(region), at));
    }
}
