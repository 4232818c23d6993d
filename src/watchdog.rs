//! The service manager's watchdog (`WatchdogSec=`): it restarts a daemon whose workers do not answer any more.
//!
//! What it is: each worker's [`Pulse`], and the [`Watchdog`], with which the process's thread asks for the pulses and
//! tells the manager.
//!
//! What it is not: a look at the disk. A worker whose operations hang in the kernel answers as ever, and one that makes
//! a call of its own for the disk is not asked meanwhile: no other daemon could do better.
//!
//! Invariants: a worker answers between two turns, and only when it was asked; an idle daemon is woken twice in the
//! manager's time, and no more.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::net::{SendFlags, send};

use crate::store::{self, Role};
use crate::sys;

/// How soon a worker that has not answered is looked at again, as a part of the time between two questions.
const AGAIN: u32 = 8;

/// What a worker answers with.
#[derive(Debug)]
pub struct Pulse {
    wake: Arc<OwnedFd>,
    asked: AtomicU32,
    answered: AtomicU32,
    /// Its thread is in a call for the disk.
    in_call: AtomicBool,
}

impl Pulse {
    /// Answers what was asked so far.
    pub fn answer(&self) {
        // Relaxed: the number is all that is told.
        self.answered.store(self.asked.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// The worker's thread begins, or has ended, a call for the disk that may take as long as the disk does.
    pub fn in_call(&self, begins: bool) {
        self.in_call.store(begins, Ordering::Relaxed);
    }

    fn ask(&self) {
        self.asked.fetch_add(1, Ordering::Relaxed);
        sys::signal(&self.wake);
    }

    fn has_answered(&self) -> bool {
        self.in_call.load(Ordering::Relaxed)
            || self.answered.load(Ordering::Relaxed) == self.asked.load(Ordering::Relaxed)
    }
}

/// Those of all workers that live.
#[derive(Debug, Default)]
pub struct Pulses(Mutex<Vec<Weak<Pulse>>>);

impl Pulses {
    /// That of a worker which `wake` wakes.
    pub fn register(&self, wake: Arc<OwnedFd>) -> Arc<Pulse> {
        let (asked, answered) = (AtomicU32::new(0), AtomicU32::new(0));
        let pulse = Arc::new(Pulse { wake, asked, answered, in_call: AtomicBool::new(false) });
        self.all().push(Arc::downgrade(&pulse));
        pulse
    }

    fn all(&self) -> std::sync::MutexGuard<'_, Vec<Weak<Pulse>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if all workers have answered what they were asked.
    fn have_answered(&self) -> bool {
        self.all().iter().filter_map(Weak::upgrade).all(|pulse| pulse.has_answered())
    }

    fn ask(&self) {
        self.all().retain(|pulse| pulse.upgrade().inspect(|pulse| pulse.ask()).is_some());
    }
}

/// How long the service manager waits for a word of this process, or of its parent where that is the service.
#[must_use]
pub fn patience(role: Role) -> Option<Duration> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let main = match role {
        Role::Daemon => std::os::unix::process::parent_id(),
        Role::First | Role::Parent | Role::Orphan => std::process::id(),
    };
    let is_for_us = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(main));
    number("WATCHDOG_USEC").filter(|&time| is_for_us && time > 0).map(Duration::from_micros)
}

/// See the head of the file.
#[derive(Debug)]
pub struct Watchdog {
    manager: OwnedFd,
    /// Half of the manager's patience.
    every: Duration,
    next: Instant,
}

impl Watchdog {
    /// One where the manager wants it. `parent`: the socket to the parent, which passes the word on.
    ///
    /// # Errors
    /// When the manager does not listen, or descriptors run out.
    pub fn new(role: Role, parent: Option<impl AsFd>) -> io::Result<Option<Self>> {
        let Some(patience) = patience(role) else { return Ok(None) };
        let manager = match parent {
            Some(parent) => Some(parent.as_fd().try_clone_to_owned()?),
            None => store::notify_socket()?,
        };
        Ok(manager.map(|manager| Self { manager, every: patience / 2, next: Instant::now() }))
    }

    /// Tells the manager if all workers have answered, and asks them again; gives the time until the next look.
    pub fn look(&mut self, pulses: &Pulses) -> Duration {
        let now = Instant::now();
        if self.next <= now {
            self.next = now + self.every / AGAIN;
            // Not waiting: where the manager does not read, the word is sent a little later.
            let word = || send(&self.manager, b"WATCHDOG=1", SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
            if pulses.have_answered() && word().is_ok() {
                pulses.ask();
                self.next = now + self.every;
            }
        }
        self.next.saturating_duration_since(now)
    }
}
