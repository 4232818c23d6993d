//! Whether what was written is durable: the cache mode, and who may say "durable".
//!
//! What it is: one object for each disk, with the mode that the guest was promised, the
//! open file description of each worker, and the latch that a failed sync sets.
//!
//! What it is not: it submits nothing. Workers ask it before they call anything durable.
//!
//! Invariants: after a sync failed, nothing is called durable again, by this process or its
//! successors. Linux reports a write-back error to one call for each open file description,
//! and a failed flush of a disk's own cache to one call at all; so an operation that makes
//! something durable is not called good before all that overlapped it have ended well.
//!
//! ```text
//!   worker 0   ├── fdatasync ──────────┤ EIO: the latch
//!   worker 1        ├── fdatasync ─┤ ok ····wait····┤ not durable
//!   worker 1                              ├── write (RWF_DSYNC) ─┤ not durable
//! ```

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::disk::{Disk, DiskError, Way};
use crate::engine::{Kind, Outcome};
use crate::sys;

/// An operation under way that makes something durable. Goes back with
/// [`Durability::end`].
#[derive(Debug)]
#[must_use = "an operation that does not end keeps all later ones from being judged"]
pub struct Claim(u64);

/// An operation that ended well; it is judged when all that overlapped it have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended(u64);

/// A worker as this object knows it.
#[derive(Clone, Copy, Debug)]
pub struct Waiter(usize);

/// The cache mode, from what it follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mode {
    /// `--write-cache`, until the guest chose; then its choice.
    write_back: bool,
    /// The driver can send FLUSH, or none has said yet (virtio 5.2.6.2).
    can_flush: bool,
}

/// Operations under way, by number.
#[derive(Debug, Default)]
struct Claims {
    /// Number of the oldest one that has not ended.
    oldest: u64,
    /// Whether that one and those after it have ended.
    ended: VecDeque<bool>,
    /// Each worker's wake-up, and whether it waits for a judgement.
    workers: Vec<(Arc<OwnedFd>, bool)>,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Durability {
    path: PathBuf,
    ways: Vec<Way>,
    mode: Mutex<Mode>,
    /// What the mode comes to.
    write_through: AtomicBool,
    sync_failed: AtomicBool,
    /// Where that is noted down for a successor: a file and an offset, bytes.
    note: OnceLock<(File, u64)>,
    claims: Mutex<Claims>,
}

impl Durability {
    /// Of an open disk that `workers` workers will serve; `write_back`: the mode until the
    /// guest chooses.
    ///
    /// # Errors
    /// When the disk cannot be opened once for each worker.
    pub fn new(disk: &Disk, workers: u16, write_back: bool) -> Result<Self, DiskError> {
        Ok(Self {
            path: disk.path().to_owned(),
            ways: disk.ways(workers)?,
            mode: Mutex::new(Mode { write_back, can_flush: true }),
            write_through: AtomicBool::new(!write_back),
            sync_failed: AtomicBool::new(false),
            note: OnceLock::new(),
            claims: Mutex::default(),
        })
    }

    /// The way of a worker to the disk. `None`: there are not so many workers.
    #[must_use]
    pub fn way(&self, worker: usize) -> Option<&Way> {
        self.ways.get(worker)
    }

    /// The description of every worker.
    pub fn all_files(&self) -> impl Iterator<Item = &File> {
        self.ways.iter().filter_map(|way| match way {
            Way::Files(files) => Some(&files.disk),
            Way::Nbd(_) | Way::Rbd(_) => None,
        })
    }

    /// True if a write is durable before it is answered.
    #[inline]
    #[must_use]
    pub fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::Acquire)
    }

    /// What the guest chose, or was given.
    #[must_use]
    pub fn write_back_chosen(&self) -> bool {
        self.lock_mode().write_back
    }

    /// The guest chose, or must be taken to have chosen. True: writes are durable from now on
    /// and were not before; a sync has to make those durable that were answered.
    #[must_use = "a guest that turned its cache off takes what was answered for durable"]
    pub fn choose(&self, write_back: bool) -> bool {
        self.change_mode(|mode| mode.write_back = write_back)
    }

    /// The driver can send FLUSH, or there is none.
    #[must_use]
    pub fn driver_can_flush_now(&self) -> bool {
        self.lock_mode().can_flush
    }

    /// A driver said whether it can send FLUSH, or left (`true`). The answer is that of
    /// [`Durability::choose`].
    #[must_use = "a driver that cannot flush takes what was answered for durable"]
    pub fn driver_can_flush(&self, can_flush: bool) -> bool {
        self.change_mode(|mode| mode.can_flush = can_flush)
    }

    fn change_mode(&self, change: impl FnOnce(&mut Mode)) -> bool {
        let mut mode = self.lock_mode();
        change(&mut mode);
        let write_through = !(mode.write_back && mode.can_flush);
        let was = self.write_through.swap(write_through, Ordering::AcqRel);
        write_through && !was
    }

    fn lock_mode(&self) -> MutexGuard<'_, Mode> {
        self.mode.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True once a sync failed: what is durable is unknown until the disk is opened anew.
    #[must_use]
    pub fn sync_failed(&self) -> bool {
        self.sync_failed.load(Ordering::Acquire)
    }

    /// Latches [`Durability::sync_failed`].
    pub fn set_sync_failed(&self) {
        if !self.sync_failed() {
            self.write_note(); // first: a process that sees the latch may be killed
        }
        if !self.sync_failed.swap(true, Ordering::AcqRel) {
            let (what, where_to_look) = match self.ways.first() {
                Some(Way::Nbd(_)) => ("a flush", "server's log"),
                Some(Way::Rbd(_)) => ("a flush", "cluster"),
                Some(Way::Files(_)) | None => ("fsync", "device"),
            };
            tracing::error!(
                disk = %self.path.display(),
                "{what} failed: writes that the guest believes cached may be lost. Every FLUSH, and every write that \
                 must be durable, fails, also after a crash or an upgrade, until vublkd was stopped and started; \
                 check the {where_to_look} before you do"
            );
        }
    }

    /// Notes it down there, too, from now on; once.
    pub fn note_failed_syncs(&self, file: File, at: u64) {
        let _only_one_session = self.note.set((file, at));
        if self.sync_failed() {
            self.write_note();
        }
    }

    fn write_note(&self) {
        let Some((file, at)) = self.note.get() else { return };
        if let Err(e) = sys::write_all_at(file, &[1], *at) {
            tracing::error!("cannot note that down for a successor: {e}");
        }
    }

    /// Makes a worker known, once, by the eventfd that wakes it.
    pub fn register(&self, wake: impl Into<Arc<OwnedFd>>) -> Waiter {
        let mut claims = self.claims();
        claims.workers.push((wake.into(), false));
        Waiter(claims.workers.len() - 1)
    }

    /// An operation that makes something durable is about to be submitted.
    pub fn begin(&self) -> Claim {
        let mut claims = self.claims();
        claims.ended.push_back(false);
        Claim(claims.oldest + claims.ended.len() as u64 - 1)
    }

    /// It ended. Ask [`Durability::judge`] before anything is said of it.
    pub fn end(&self, claim: Claim, kind: Kind, outcome: Outcome) -> Ended {
        if let Outcome::Failed(errno) = outcome
            && (kind == Kind::Sync || !leaves_the_disk_alone(errno))
        {
            self.set_sync_failed(); // before it has ended: one that waits for it must see the latch
        }
        let mut claims = self.claims();
        let at = usize::try_from(claim.0 - claims.oldest).unwrap_or(usize::MAX);
        if let Some(ended) = claims.ended.get_mut(at) {
            *ended = true;
        }
        let before = claims.oldest;
        while claims.ended.front() == Some(&true) {
            claims.ended.pop_front();
            claims.oldest += 1;
        }
        if claims.oldest > before {
            for (wake, waits) in &mut claims.workers {
                if std::mem::take(waits) {
                    sys::signal(wake);
                }
            }
        }
        Ended(claims.oldest + claims.ended.len() as u64)
    }

    /// How many operations have ended, of those that none older one overlaps: a judgement that
    /// was put off is worth another look when this has grown.
    #[must_use]
    pub fn ended(&self) -> u64 {
        self.claims().oldest
    }

    /// Makes durable what was answered, on a description that no worker uses; waits. A failure
    /// is latched.
    pub fn sync(&self, disk: &Disk) {
        let claim = self.begin();
        let outcome = match disk.sync() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Outcome::NotExecuted(libc::EINTR),
            synced => Outcome::of_call(synced.map(|()| 0)),
        };
        let _nothing_is_said = self.end(claim, Kind::Sync, outcome);
    }

    /// May this be called durable? The one place that says so: for a FLUSH, a write in
    /// write-through, zeroes, and the last sync before the image changes hands. `None`: what
    /// overlapped it is still under way; the worker is woken when that may have changed.
    #[must_use]
    pub fn judge(&self, operation: Ended, waiter: Waiter) -> Option<bool> {
        let mut claims = self.claims();
        // Of those that began before it had ended, none is left.
        if claims.oldest >= operation.0 {
            return Some(!self.sync_failed());
        }
        if let Some((_, waits)) = claims.workers.get_mut(waiter.0) {
            *waits = true;
        }
        None
    }

    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Errors of a write that say nothing of what was written before: it did not get as far as
/// the disk's cache.
fn leaves_the_disk_alone(errno: i32) -> bool {
    const HARMLESS: [i32; 7] =
        [libc::ENOSPC, libc::EDQUOT, libc::EFBIG, libc::EINVAL, libc::EFAULT, libc::EOPNOTSUPP, libc::EPERM];
    HARMLESS.contains(&errno)
}
