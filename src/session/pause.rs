//! A disk that rests for a snapshot, and what was written since the last one.
//!
//! What it is: [`Session::pause`] stops the rings where they stand and makes durable what was answered;
//! [`Session::resume`] lets them go on. While a disk is paused a snapshot may be counted ([`Session::count_snapshot`]),
//! from which on changes are marked in a bitmap of their own.
//!
//! What it is not: it makes no snapshot; the tool does, or whatever the operator has.
//!
//! Invariants: a pause ends by itself at its time; where requests are held any message of the front-end ends it. A worker
//! marks changes from the first request that it submits after the snapshot.
//!
//! ```text
//!          snapshot 1                 snapshot 2
//!   ───────────┼──────────────────────────┼───────────►
//!              └── previous: what backup  └── current: since the last one
//!                  2 has to copy
//! ```

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Session;
use crate::changes::{Changes, Extent, Since};
use crate::hold::AtStop;
use crate::keep::FdId;
use crate::link::Paused;

/// How long a pause may take.
pub const LONGEST: Duration = Duration::from_secs(600);
/// Extents of one answer: they fit into a socket's buffer.
const EXTENTS: usize = 1000;

/// A pause.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pause {
    number: u64,
    since: Instant,
    until: Instant,
    /// Requests that the disk had refused were left in the journal.
    held: bool,
}

/// What is known of snapshots.
#[derive(Debug)]
pub(super) struct Snapshots {
    state: SnapshotsState,
    current: Arc<Changes>,
    previous: Option<Changes>,
}

/// The same for a successor.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct SnapshotsState {
    /// The number of the last one.
    pub(super) last: u64,
    pub(super) current: FdId,
    /// 0: it was the first one.
    pub(super) previous: FdId,
}

/// What a predecessor knew of snapshots, with its bitmaps.
#[derive(Debug)]
pub struct KeptSnapshots {
    pub(super) state: SnapshotsState,
    pub(super) current: File,
    pub(super) previous: Option<File>,
}

/// What has changed.
#[derive(Debug, Serialize)]
pub struct Changed {
    /// The snapshot from which on.
    pub from: u64,
    /// The one up to which; `None`: until now.
    pub to: Option<u64>,
    /// Bytes of the disk.
    pub size: u64,
    /// Offsets and lengths in bytes.
    pub extents: Vec<Extent>,
    /// Where to ask on.
    pub next: Option<u64>,
}

impl Session {
    /// Pauses the disk for `time` at most; gives the number of the pause.
    ///
    /// # Errors
    /// Why it is not paused.
    pub fn pause(&mut self, time: Duration) -> Result<u64, String> {
        if self.paused.is_some() {
            return Err("the disk is paused already".into());
        }
        let since = Instant::now();
        let held = self.device.holding.held().is_some();
        self.pauses += 1;
        self.paused = Some(Pause { number: self.pauses, since, until: since + time.min(LONGEST), held });
        self.stop_rings(if self.inflight.is_some() { AtStop::Leave } else { AtStop::Fail });
        self.sync();
        if self.failed() {
            return Err("the disk does not end what it has".into());
        }
        if self.device.durability.sync_failed() {
            self.resume(None).map_err(|_| "the disk cannot be paused")?;
            return Err("what the guest was answered is not durable: an fsync has failed".into());
        }
        Ok(self.pauses)
    }

    /// Lets it go on; gives how long it was paused.
    ///
    /// # Errors
    /// It is not paused, or not by that pause.
    pub fn resume(&mut self, number: Option<u64>) -> Result<Duration, String> {
        self.check_pause(number)?;
        let pause = self.paused.take();
        self.update_all();
        Ok(pause.map_or(Duration::ZERO, |pause| pause.since.elapsed()))
    }

    fn check_pause(&self, number: Option<u64>) -> Result<(), String> {
        match self.paused {
            None => Err(
                "the disk is not paused; a pause ends by itself at its time, by a message of the VMM that \
                         stops the disk, or with the daemon"
                    .into(),
            ),
            Some(pause) if number.is_some_and(|number| number != pause.number) => {
                Err("the disk is paused by another client".into())
            }
            Some(_) => Ok(()),
        }
    }

    /// What is told of it.
    #[must_use]
    pub fn shown_pause(&self) -> Option<Paused> {
        self.paused.map(|Pause { since, until, .. }| Paused { since, until })
    }

    /// When it goes on by itself.
    #[must_use]
    pub fn paused_until(&self) -> Option<Instant> {
        self.paused.map(|pause| pause.until)
    }

    /// True: it has been paused for too long, and goes on.
    pub fn end_late_pause(&mut self) -> bool {
        self.paused.is_some_and(|pause| pause.until <= Instant::now()) && self.resume(None).is_ok()
    }

    /// The front-end may stop or change a ring, which must not wait for what is held, or lose it: that goes on, and ends
    /// as it always does then.
    pub(crate) fn end_pause_with_held(&mut self) {
        if self.paused.is_some_and(|pause| pause.held) {
            let _was_paused = self.resume(None);
        }
    }

    /// A snapshot was made in this pause: from now on changes are those since it. `keep` keeps a bitmap's file. Gives
    /// its number.
    ///
    /// # Errors
    /// It is not paused; memory or descriptors run out; a worker does not answer.
    pub fn count_snapshot(&mut self, number: u64, keep: impl FnOnce(&File) -> FdId) -> Result<u64, String> {
        self.check_pause(Some(number))?;
        let made =
            Changes::create(self.device.promise().bytes()).map(|(file, changes)| (keep(&file), changes));
        let (fd, changes) = made.map_err(|e| format!("cannot begin to mark changes: {e}"))?;
        let current = Arc::new(changes);
        self.workers.set_changes(Some(&current)).map_err(|e| e.to_string())?;
        let (last, previous) = match self.snapshots.take() {
            Some(Snapshots { state, current, .. }) => (state.last, Some((state.current, current))),
            None => (0, None),
        };
        let state =
            SnapshotsState { last: last + 1, current: fd, previous: previous.as_ref().map_or(0, |p| p.0) };
        // No worker has it any more.
        let previous = previous.and_then(|(_, changes)| Arc::into_inner(changes));
        self.snapshots = Some(Snapshots { state, current, previous });
        Ok(state.last)
    }

    /// What has changed, from byte `from` on.
    ///
    /// # Errors
    /// There was no such snapshot, or it is not known any more.
    pub fn changed(&self, since: Since, from: u64) -> Result<Changed, String> {
        let unknown = || {
            "it is not known what has changed: no snapshot was made with vublk snapshot since vublkd was started. Make \
             a whole backup"
                .to_owned()
        };
        let Snapshots { state, current, previous } = self.snapshots.as_ref().ok_or_else(unknown)?;
        let size = self.device.promise().bytes();
        let (changes, first, to) = match since {
            Since::Last => (&**current, state.last, None),
            Since::Previous => (previous.as_ref().ok_or_else(unknown)?, state.last - 1, Some(state.last)),
        };
        let (extents, next) = changes.extents(size, from, EXTENTS);
        Ok(Changed { from: first, to, size, extents, next })
    }

    pub(super) fn snapshots_state(&self) -> Option<SnapshotsState> {
        self.snapshots.as_ref().map(|snapshots| snapshots.state)
    }

    /// Goes on with what an earlier process knew of snapshots.
    pub fn take_snapshots(&mut self, kept: KeptSnapshots) {
        let KeptSnapshots { state, current, previous } = kept;
        let map = || -> io::Result<Snapshots> {
            let current = Arc::new(Changes::map(&current)?);
            let previous = previous.as_ref().map(Changes::map).transpose()?;
            Ok(Snapshots { state, current, previous })
        };
        match map() {
            Ok(snapshots) => {
                let told = self.workers.set_changes(Some(&snapshots.current));
                self.answered(told);
                self.snapshots = Some(snapshots);
            }
            Err(e) => tracing::error!("what has changed since the last snapshot is not known any more: {e}"),
        }
    }
}
