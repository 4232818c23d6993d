//! The exclusive lock of an image. The client takes it before the first queue starts, and releases it when the front-end
//! leaves. After a change timed out the client keeps the lock, and has the cluster refuse it when the process ends.
//!
//! What it is: the methods of [`super::Image`] that the control thread and the workers call for that, and the library calls
//! behind them.
//!
//! What it is not: it does not know what follows from a refusal; [`crate::rbd::standing`] finds out.
//!
//! Invariants: the lock is not asked for while another client has it that is alive. It is not given up while the cluster may
//! carry out a change that ended with an error.
#![expect(unsafe_code, reason = "calls a library of C")]

use std::ffi::CString;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::{CLOSE_TIME, Client, Image, silent};
use crate::rbd::checks;
use crate::rbd::library::{self, Api};
use crate::rbd::standing::{self, Had, Standing};

/// How long a lock is asked for before the caller's patience counts.
const LOCK_TIME: Duration = Duration::from_secs(2);
/// How often a caller is asked whether it still waits.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long a dead client is refused: what the cluster takes where a lock is broken (mon_osd_blocklist_default_expire). It may
/// be such a one, whose last requests a cut link can delay by minutes; a shorter time would replace the longer.
const REFUSED_SECONDS: u32 = 3600;

/// Which daemon gets the image next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum For {
    /// Any, on any host: the guest is gone, or goes to the target of a migration.
    Any,
    /// This guest's next one, on this host.
    Successor,
}

/// Why the lock was not taken.
#[derive(Debug)]
pub enum NotLocked {
    /// This client has it, is alive, and keeps it.
    Owned(String),
    /// The cluster refuses this client.
    Refused,
    /// The cluster does not answer, or cannot do it.
    Cluster(io::Error),
}

impl From<io::Error> for NotLocked {
    fn from(error: io::Error) -> Self {
        if standing::is_refusal(&error) { Self::Refused } else { Self::Cluster(error) }
    }
}

/// The lock is another client's, which does not give it up.
fn is_others(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EROFS | libc::EBUSY | libc::EAGAIN))
}

impl Image {
    /// A successor can go on from a store, should this process end.
    pub fn set_store(&self) {
        self.has_store.store(true, Ordering::Release);
    }

    /// How this client stands with the cluster.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.standing.get()
    }

    /// Where the guest must not go on: why, and what is to be done.
    #[must_use]
    pub fn why_lost(&self) -> Option<String> {
        self.standing.why_lost()
    }

    /// Has a guest that goes on get I/O errors, where another client may have written to the image since it was last served.
    /// Call it before the first operation.
    pub fn judge_guest(&self) {
        if self.facts.was_taken {
            self.orphan(self.facts.owners.first().map(String::as_str));
        }
    }

    fn orphan(&self, owner: Option<&str>) {
        let what = match owner {
            Some(owner) => format!("the client {owner} has the image, on whose lock this guest relied"),
            None => "the lock on which this guest relied is gone".to_owned(),
        };
        self.held.is_not_free();
        self.orphaned.store(true, Ordering::Release);
        let why = format!(
            "{what}: another client may have written to the image, so the guest must not go on. Nothing is read or written for \
             it any more. Stop this VM, and start it anew"
        );
        self.standing.lose(&self.name, why);
    }

    /// The front-end has left: the next guest relies on nothing. Not where this daemon closed the connection: the same guest may
    /// come back by another one.
    pub fn guest_left(&self) {
        self.held.forget();
        self.relied.store(false, Ordering::Release);
        if self.orphaned.swap(false, Ordering::AcqRel) {
            self.standing.set(Standing::Good); // this client itself was never refused
        }
    }

    /// There is no successor any more that could go on.
    pub fn lose(&self) {
        let why = "the cluster refuses this client (its blocklist), and no successor can go on. Nothing is read or written any \
                   more. Stop and start vublkd";
        self.standing.lose(&self.name, why.to_owned());
    }

    /// The cluster refused this client: finds out who has the image, on a thread of its own, once.
    pub fn note_refused(&self) {
        if !self.standing.begin_to_look() {
            return;
        }
        tracing::warn!(
            disk = %self.name,
            "the cluster refuses this client (its blocklist): looking who has the image, requests wait"
        );
        let (standing, news, disk) = (Arc::clone(&self.standing), self.news, self.name.clone());
        let had =
            Had { lock: self.locked.load(Ordering::Acquire), store: self.has_store.load(Ordering::Acquire) };
        drop(self.ask(move |client| {
            let (like, unlooked) = (client.like.clone(), Arc::clone(&standing));
            let look = move || {
                standing::look(&like, &disk, had, &standing);
                news.tell();
            };
            // What was refused asks again.
            if std::thread::Builder::new().name("vublk-rbd-look".into()).spawn(look).is_err() {
                unlooked.set(Standing::Good);
            }
        }));
    }

    /// A request was given up after `--reconnect-delay`.
    pub fn note_given_up(&self) {
        let Some(patience) = self.patience else { return };
        if !self.is_giving_up.swap(true, Ordering::AcqRel) && self.may_log() {
            tracing::error!(
                disk = %self.name,
                "the cluster has not answered for {} s: requests end with I/O errors (--reconnect-delay)",
                patience.as_secs().max(1)
            );
        }
    }

    /// True if requests were given up, and none was seen to be answered since.
    #[must_use]
    pub fn is_giving_up(&self) -> bool {
        self.is_giving_up.load(Ordering::Acquire)
    }

    /// The cluster, which did not answer, does so again.
    pub fn answers_again(&self) {
        self.is_giving_up.store(false, Ordering::Release);
        if self.may_log() {
            tracing::info!(disk = %self.name, "the cluster answers again");
        }
    }

    fn may_log(&self) -> bool {
        self.quota.lock().unwrap_or_else(PoisonError::into_inner).may_log("the cluster")
    }

    /// A change ended with an error. Where requests are given up, the cluster may have received it, and carry it out yet.
    pub fn note_failed_change(&self) {
        if self.patience.is_some() && !self.given_up.swap(true, Ordering::AcqRel) {
            tracing::warn!(
                disk = %self.name,
                "a write ended with an I/O error after --reconnect-delay, and the cluster may carry it out yet: no other client \
                 gets the image before the cluster refuses this one, which it does once this vublkd ends (vublk upgrade)"
            );
        }
    }

    /// True while the cluster may carry out what ended with an I/O error: for as long as this client is not refused.
    #[must_use]
    pub fn may_yet_change(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    /// Takes the exclusive lock; not for a guest that gets I/O errors. `wait`: called again and again while that takes; false ends it.
    /// `say`: called when it begins to wait for the client of this name.
    ///
    /// # Errors
    /// [`NotLocked`].
    pub fn lock(&self, wait: &mut dyn FnMut() -> bool, say: &dyn Fn(&str)) -> Result<(), NotLocked> {
        if self.read_only || self.orphaned.load(Ordering::Acquire) {
            return Ok(());
        }
        if self.standing() == Standing::Lost {
            return Err(NotLocked::Refused);
        }
        self.wanted.store(true, Ordering::Release);
        let started = Instant::now();
        let is_in_time = |wait: &mut dyn FnMut() -> bool| started.elapsed() < LOCK_TIME || wait();
        let mut owner: Option<String> = None;
        loop {
            let locked = Arc::clone(&self.locked);
            let taken =
                self.ask(move |client| client.lock().inspect(|()| locked.store(true, Ordering::Release)));
            let taken = loop {
                match taken.recv_timeout(LOOK_EVERY) {
                    Ok(taken) => break taken,
                    Err(RecvTimeoutError::Timeout) if is_in_time(wait) => {}
                    Err(_) => {
                        drop(self.release(For::Successor)); // should it be had yet, no front-end is there that uses it
                        break Err(owner
                            .take()
                            .map_or_else(|| NotLocked::Cluster(silent()), NotLocked::Owned));
                    }
                }
            };
            match taken {
                Ok(()) => {
                    self.relied.store(false, Ordering::Release);
                    return Ok(());
                }
                Err(NotLocked::Owned(other)) if self.relied.load(Ordering::Acquire) => {
                    self.orphan(Some(&other));
                    return Ok(());
                }
                Err(NotLocked::Owned(other)) if is_in_time(wait) => {
                    if owner.as_ref() != Some(&other) {
                        say(&other);
                        owner = Some(other);
                    }
                    std::thread::park_timeout(LOOK_EVERY); // no message comes when a client lets go
                }
                other => return other,
            }
        }
    }

    /// True if the cluster refuses this client and a successor is to go on, found out while `wait` says so.
    pub fn wants_successor(&self, wait: &mut dyn FnMut() -> bool) -> bool {
        self.note_refused();
        while self.standing() == Standing::Looking && wait() {}
        self.standing() == Standing::Successor
    }

    /// Has the lock given up once what was asked for before is done; `None`: it was not asked for.
    fn release(&self, next: For) -> Option<Receiver<io::Result<()>>> {
        if self.may_yet_change() {
            return None;
        }
        let locked = Arc::clone(&self.locked);
        self.wanted.swap(false, Ordering::AcqRel).then(|| {
            self.ask(move |client| {
                if !locked.load(Ordering::Acquire) {
                    return Ok(()); // it may have been asked for in vain until now
                }
                client.unlock(next)?;
                locked.store(false, Ordering::Release);
                Ok(())
            })
        })
    }

    /// Gives the lock up, all operations having ended. Where the cluster does not answer, it is given up later. Where it may
    /// carry out yet what ended with an error, it refuses this client instead, whose lock any other may take then.
    pub fn unlock(&self, next: For) {
        if self.may_yet_change() {
            return self.fence_itself();
        }
        if self.standing() != Standing::Good {
            return; // it is not this client's to give up
        }
        let Some(released) = self.release(next) else { return };
        match released.recv_timeout(CLOSE_TIME) {
            Ok(Ok(())) => {}
            Ok(Err(e)) if standing::is_refusal(&e) => self.note_refused(),
            Ok(Err(e)) => tracing::warn!(disk = %self.name, "cannot give up the image's lock: {e}"),
            Err(_) => {
                tracing::warn!(disk = %self.name, "the cluster does not answer: the image's lock is given up later");
            }
        }
    }

    fn fence_itself(&self) {
        if self.is_fenced.load(Ordering::Acquire) {
            return;
        }
        match self.ask(|client| client.refuse(&client.like.address)).recv_timeout(LOCK_TIME) {
            Ok(Ok(())) => {
                self.is_fenced.store(true, Ordering::Release);
                tracing::info!(
                    disk = %self.name,
                    "the cluster refuses this client from now on: what ended with I/O errors is not carried out any more"
                );
            }
            refused => {
                let why = refused.map_or_else(|_| silent(), |refused| refused.err().unwrap_or_else(silent));
                tracing::warn!(
                    disk = %self.name,
                    "cannot have the cluster refuse this client, which keeps the image's lock: {why}. A vublkd on another host \
                     gets the image after some 30 s"
                );
            }
        }
    }
}

impl Client {
    /// Takes the lock, unless another client has it that is alive: one that took it by itself, as QEMU does, would give it to
    /// any that asks, and take it back with its next write.
    fn lock(&self) -> Result<(), NotLocked> {
        let mut owners = self.owners()?;
        owners.retain(|owner| *owner != self.like.address);
        let held = &self.like.how.held;
        if let Some(dead) = self.predecessor.as_ref().filter(|dead| owners.contains(dead)) {
            held.give_to_successor();
            if let Err(e) = self.break_lock(dead) {
                if self.owners().is_ok_and(|owners| owners.contains(dead)) {
                    held.is_not_free();
                }
                return Err(e.into());
            }
            tracing::info!(
                disk = %self.like.uri.name(),
                "the cluster refuses the client {dead} from now on, a vublkd that died"
            );
            owners.retain(|owner| owner != dead);
        }
        checks::keep_alive(self.api, self.image, &mut owners);
        if let Some(owner) = owners.pop() {
            return Err(NotLocked::Owned(owner));
        }
        // SAFETY: the image is open.
        match Api::ok(unsafe { (self.api.rbd_lock_acquire)(self.image.0, library::EXCLUSIVE) }) {
            Err(e) if is_others(&e) => {
                let owner = self.owners()?.pop(); // it came meanwhile
                Err(NotLocked::Owned(owner.unwrap_or_else(|| "that had it a moment ago".into())))
            }
            taken => {
                taken?;
                held.hold(&self.identity, &self.like.address);
                Ok(())
            }
        }
    }

    /// Gives the lock up.
    fn unlock(&self, next: For) -> io::Result<()> {
        let held = &self.like.how.held;
        match next {
            For::Any => held.forget(),
            For::Successor => held.give_to_successor(),
        }
        // SAFETY: the image is open for as long as its thread runs.
        let released = Api::ok(unsafe { (self.api.rbd_lock_release)(self.image.0) });
        released.inspect_err(|_| held.hold(&self.identity, &self.like.address))
    }

    /// Who owns the lock.
    fn owners(&self) -> io::Result<Vec<String>> {
        checks::owners(self.api, self.image)
    }

    /// Has the cluster refuse a client that is dead, and forget what it waits for of it.
    pub(in crate::rbd) fn refuse(&self, client: &str) -> io::Result<()> {
        let client = CString::new(client).map_err(io::Error::other)?;
        // SAFETY: a text, which the function does not change.
        Api::ok(unsafe {
            (self.api.rados_blocklist_add)(self.cluster.0, client.as_ptr().cast_mut(), REFUSED_SECONDS)
        })
    }

    /// Takes the lock from a client that is dead, which the cluster refuses from then on.
    pub(in crate::rbd) fn break_lock(&self, owner: &str) -> io::Result<()> {
        let owner = CString::new(owner).map_err(io::Error::other)?;
        // SAFETY: a text.
        match Api::ok(unsafe { (self.api.rbd_lock_break)(self.image.0, library::EXCLUSIVE, owner.as_ptr()) })
        {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()), // it has given it up
            broken => broken,
        }
    }
}
