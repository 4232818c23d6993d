//! The block device that all workers serve: the disk, what the guest was promised of it,
//! and how durable it is.
//!
//! What it is not: it has no rings and no threads.
//!
//! Invariant: shared by all threads; each fact in it has one owner.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::complete::Status;
use crate::disk::{Disk, DiskError};
use crate::durability::Durability;
use crate::hold::{self, Holding};
use crate::log::Quota;
use crate::op::action::Failure;
use crate::promise::Promise;
use crate::pulse::Pulses;
use crate::rbd::standing::Standing;
use crate::request::Command;
use crate::stats::{InFlight, Stats};
use crate::throttle::Throttle;

/// A cluster that has not answered a request for so long counts as lost.
pub const SILENCE: Duration = Duration::from_secs(10);

/// See the head of the file.
#[derive(Debug)]
pub struct Device {
    /// The backing store.
    pub disk: Disk,
    /// The cache mode, and whether what was written is durable.
    pub durability: Durability,
    /// The requests that are held because the disk refused them.
    pub holding: Holding,
    /// How much it may have of its limits.
    pub throttle: Throttle,
    promise: Mutex<Promise>,
    /// Counters.
    pub stats: Stats,
    /// Whether its workers answer.
    pub pulses: Pulses,
    /// `--reconnect-delay`: how long requests wait for a lost server; `None`: as long as it takes.
    pub reconnect_delay: Option<Duration>,
    quotas: Mutex<[Quota; Blame::ALL.len()]>,
    said_not_executed: AtomicBool,
}

/// Whose doing a message is about: a guest cannot use up the disk's lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The driver's.
    Guest,
    /// The backing store's.
    Disk,
    /// The front-end's: what it sends.
    FrontEnd,
    /// Queues that a front-end or its driver set up so that they cannot be served.
    Queues,
    /// Front-ends that connect and leave.
    Connections,
}

impl Blame {
    const ALL: [Self; 5] = [Self::Guest, Self::Disk, Self::FrontEnd, Self::Queues, Self::Connections];

    fn about(self) -> &'static str {
        match self {
            Self::Guest => "the guest",
            Self::Disk => "the disk",
            Self::FrontEnd => "what the front-end sends",
            Self::Queues => "queues that cannot be served",
            Self::Connections => "front-ends that connect",
        }
    }
}

impl Device {
    /// A device over an open disk, for so many workers at most; `write_back`: the cache mode
    /// until the guest chooses one.
    ///
    /// # Errors
    /// When the disk cannot be opened once for each worker.
    pub fn new(disk: Disk, promise: Promise, workers: u16, write_back: bool) -> Result<Self, DiskError> {
        Ok(Self {
            durability: Durability::new(&disk, workers, write_back)?,
            holding: Holding::default(),
            throttle: Throttle::default(),
            disk,
            promise: Mutex::new(promise),
            stats: Stats::default(),
            pulses: Pulses::default(),
            reconnect_delay: None,
            quotas: Mutex::default(),
            said_not_executed: AtomicBool::new(false),
        })
    }

    /// What the guest was promised, as it is now.
    #[must_use]
    pub fn promise(&self) -> Promise {
        *self.promise.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Promises something else: what an earlier process had promised, or a larger disk.
    pub fn set_promise(&self, promise: Promise) {
        *self.promise.lock().unwrap_or_else(PoisonError::into_inner) = promise;
    }

    /// For how long the server of a disk on another machine has been lost, while this is in flight: since a connection to it
    /// ended; of a cluster, since the oldest request that it has not answered, once that is [`SILENCE`] old.
    #[must_use]
    pub fn server_lost_for(&self, in_flight: InFlight) -> Option<Duration> {
        if let Some(remote) = self.disk.remote() {
            return remote.down_since().as_ref().map(Instant::elapsed);
        }
        let image = self.disk.image()?;
        let is_asked = image.standing() == Standing::Good && self.holding.held().is_none();
        (is_asked && in_flight.oldest >= SILENCE).then_some(in_flight.oldest)
    }

    /// Says, once, that the worker's own threads have to do what others should.
    pub fn say_not_executed(&self, errno: i32) {
        if errno != libc::EINTR && !self.said_not_executed.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                disk = %self.disk.path().display(),
                "the kernel has no thread or no memory for an operation ({}): such operations run on a worker's own \
                 thread, where other requests wait for them. Raise the limit of tasks (TasksMax=, pids.max, ulimit -u)",
                std::io::Error::from_raw_os_error(errno)
            );
        }
    }

    /// True if a line that a guest, its disk or its front-end can provoke may be logged now.
    /// Only asked where something is wrong, never on the way of a good request.
    #[must_use]
    pub fn may_log(&self, blame: Blame) -> bool {
        let mut quotas = self.quotas();
        let Some(quota) = quotas.get_mut(blame as usize) else { return true }; // not reached
        quota.may_log(blame.about())
    }

    /// Logs an error that [`Device::may_log`] lets pass.
    pub fn complain(&self, blame: Blame, what: fmt::Arguments<'_>) {
        if self.may_log(blame) {
            tracing::error!(disk = %self.disk.path().display(), "{what}");
        }
    }

    /// A request is held, for the first time.
    pub fn hold(&self, command: Command, failure: Failure) {
        let disk = self.disk.path().display();
        if !self.holding.hold(command, failure) || !self.may_log(Blame::Disk) {
            return;
        }
        if hold::lacks_room(failure) {
            tracing::error!(
                %disk,
                "{command} {failure}; it is held, and its queue with it, until there is room: make some. It is tried \
                 again every second; with --on-error=report the guest would get an I/O error"
            );
        } else {
            tracing::error!(
                %disk,
                "{command} {failure}; it is held, and its queue with it (--on-error=stop). When the disk is well \
                 again type: vublk retry SOCKET"
            );
        }
    }

    /// A request that was held has ended like this.
    pub fn end_held(&self, status: Status) {
        let Some(seconds) = self.holding.end() else { return };
        if self.may_log(Blame::Disk) {
            let how = if status == Status::Ok { "is done" } else { "was answered with an I/O error" };
            tracing::info!(
                disk = %self.disk.path().display(),
                "no request is held any more: the last one {how}, the first had waited {seconds} s"
            );
        }
    }

    /// A request that was held is left to the next daemon.
    pub fn leave_held(&self) {
        if let Some(seconds) = self.holding.end() {
            tracing::info!(
                disk = %self.disk.path().display(),
                "requests that were held for {seconds} s are left to the next daemon"
            );
        }
    }

    /// Logs how many messages were left out and not yet told of: the daemon ends.
    pub fn tell_left_out(&self) {
        for (quota, blame) in self.quotas().iter_mut().zip(Blame::ALL) {
            quota.tell(blame.about());
        }
    }

    fn quotas(&self) -> MutexGuard<'_, [Quota; Blame::ALL.len()]> {
        self.quotas.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
