//! Which daemon has the image: this one from the first ring that starts until its front-end leaves, or until the last ring
//! of a migration's source has stopped.
//!
//! What it is: the three moments at which the image changes hands, and what has to be durable then.
//!
//! What it is not: it takes no lock; [`crate::disk`] does.
//!
//! Invariant: another daemon gets the image only once what the guest was answered is durable.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::Session;
use crate::device::Blame;
use crate::disk::lock;
use crate::engine::GRACE;
use crate::workers::{WorkerError, wait_for};

impl Session {
    /// Takes the image before a front-end comes: what an earlier process answered is not durable,
    /// and no other daemon may serve it as if it were.
    pub fn hold_image(&mut self) {
        match self.device.disk.take_image_lock(&mut || false) {
            Ok(()) => self.image_locked = true,
            Err(e) => tracing::error!(disk = %self.device.disk.path().display(), "{e}"),
        }
    }

    /// Takes the image lock before the first ring starts. In a migration the
    /// other daemon may still be about to drop it.
    pub(super) fn lock_image(&mut self) -> bool {
        if self.image_locked {
            return true;
        }
        let started = Instant::now();
        let mut wait = || {
            // Nothing tells when a lock is dropped; the word to stop ends the wait.
            let waited = wait_for(&[self.link.as_fd()], Some(Duration::from_millis(20)));
            self.link.woken();
            waited.is_ok() && started.elapsed() < lock::PATIENCE && !self.link.stopping()
        };
        let taken = self.device.disk.take_image_lock(&mut wait);
        if let (Err(lock::LockError::Refused), Some(image)) = (&taken, self.device.disk.image())
            && image.wants_successor(&mut wait)
        {
            self.failure.get_or_insert(WorkerError::Fenced);
            return false;
        }
        if let Err(e) = taken {
            self.device.complain(Blame::FrontEnd, format_args!("{e}; no queue is served"));
            self.refused = true;
            return false;
        }
        self.image_locked = true;
        // The daemon that had it may have grown it, as at the source of a migration.
        if let Err(e) = self.resize(None) {
            self.device.complain(Blame::FrontEnd, format_args!("{e}"));
        }
        true
    }

    /// The last ring of a migration's source has stopped: the daemon at the target waits for the
    /// image. Without a dirty log the guest only boots again, and the image stays its own.
    pub(super) fn unlock_for_migration(&mut self) {
        let has_stopped = self.vrings.iter().any(|v| v.ran) && self.vrings.iter().all(|v| !v.running);
        if self.log_in_use().is_some() && has_stopped {
            self.unlock_image();
            self.keep_from_target();
        }
    }

    /// A target on another host sees only what is on the disk, so the last ring is not handed over where the guest must
    /// not go on there: the front-end can still cancel the migration.
    fn keep_from_target(&mut self) {
        let disk = &self.device.disk;
        if disk.remote().is_none() && disk.image().is_none() {
            return;
        }
        let why = match disk.forbids_migration() {
            Some(why) => why,
            None if self.image_locked => "what the guest was answered is not durable",
            None => return,
        };
        self.undone = Some(format!("the guest must not go on at the target of its migration: {why}"));
    }

    /// Drops the image lock, no ring running, so that another daemon may have the image: what was
    /// answered is durable then. With requests still in the kernel it is the kernel's to let go.
    pub(super) fn unlock_image(&mut self) {
        if !self.image_locked || self.failure.is_some() || self.unsettled || self.is_server_silent {
            return;
        }
        if self.device.promise().read_only {
            self.image_locked = false;
            return self.device.disk.drop_image_lock();
        }
        if self.device.disk.image().is_some_and(|image| image.may_yet_change()) {
            return; // to the end of this process: no other client may have the image before the cluster refuses this one
        }
        // A cut link hides from TCP for a quarter of an hour that no answer will come.
        let patience = self.device.disk.remote().map(|_| GRACE);
        match self.workers.sync(patience) {
            Err(WorkerError::Silent) => {
                tracing::warn!(
                    disk = %self.device.disk.path().display(),
                    "the server has not answered a flush for {} s: what the guest was answered may not be durable yet",
                    GRACE.as_secs()
                );
                self.is_server_silent = true;
                return;
            }
            Err(WorkerError::GaveUp) => {
                tracing::warn!(
                    disk = %self.device.disk.path().display(),
                    "stopped before all that the guest was answered had reached the disk; the rest may reach it yet"
                );
                self.unsettled = true;
                return;
            }
            synced => self.answered(synced),
        };
        if self.device.durability.sync_failed() {
            if self.device.may_log(Blame::Disk) {
                let disk = &self.device.disk;
                let what = if disk.remote().is_some() {
                    "start no other daemon on this export before vublkd was stopped" // nothing locks it
                } else {
                    "the image stays locked until vublkd is stopped, so that no other daemon serves it as if it were"
                };
                tracing::error!(disk = %disk.path().display(), "what the guest was answered is not durable: {what}");
            }
            return;
        }
        self.image_locked = false;
        self.device.disk.drop_image_lock();
    }
}
