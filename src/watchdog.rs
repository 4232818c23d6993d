//! The service manager's watchdog (`WatchdogSec=`): it restarts a daemon whose workers do not answer any more.
//!
//! What it is: a [`Watchdog`], with which the process's thread asks the workers and tells the manager.
//!
//! What it is not: a look at the disk. A worker whose operations hang in the kernel answers as ever: no other daemon
//! could do better.
//!
//! Invariant: an idle daemon is woken twice in the manager's time, and no more.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::pulse::Pulses;
use crate::store::{self, Role};
use crate::sys;

/// How soon a worker that has not answered is looked at again, as a part of the time between two questions.
const AGAIN: u32 = 8;

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
    pub fn look<'a>(&mut self, pulses: impl Iterator<Item = &'a Pulses> + Clone) -> Duration {
        let now = Instant::now();
        if self.next <= now {
            self.next = now + self.every / AGAIN;
            // Not waiting: where the manager does not read, the word is sent a little later.
            let word = || sys::send_now(&self.manager, b"WATCHDOG=1");
            if pulses.clone().all(Pulses::have_answered) && word().is_ok() {
                pulses.for_each(Pulses::ask);
                self.next = now + self.every;
            }
        }
        self.next.saturating_duration_since(now)
    }
}
