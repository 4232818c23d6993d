//! Requests that are held because the disk refused them: `--on-error`.
//!
//! What it is: which errors hold a request, and what the operator is told of those that are held. What they wait for
//! is room on the disk, which is tried for again and again, or the operator's word (`vublk retry`).
//!
//! What it is not: the requests are in the workers' waiting lists ([`crate::worker`]).
//!
//! Invariants: a held request has reported nothing to its guest, and is carried out again from the piece that failed.
//! What a failed sync lost is never held: no second attempt can bring it back.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde::Serialize;

use crate::op::action::Failure;
use crate::request::Command;
use crate::sys;

/// How soon it is tried again whether there is room.
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// What the daemon does with a request that the disk refuses; the words and their meaning are QEMU's (`werror=`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnError {
    /// Its guest gets an I/O error.
    Report,
    /// It is held, whatever the error.
    Stop,
    /// It is held if there was no room for what it writes; else its guest gets an I/O error.
    Enospc,
}

impl OnError {
    const ALL: [Self; 3] = [Self::Report, Self::Stop, Self::Enospc];

    /// True if a request that failed so is held.
    fn holds(self, command: Command, failure: Failure) -> bool {
        match self {
            Self::Report => false,
            Self::Stop => true,
            Self::Enospc => !matches!(command, Command::Read(_)) && lacks_room(failure),
        }
    }
}

/// As it is typed.
impl fmt::Display for OnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Report => "report",
            Self::Stop => "stop",
            Self::Enospc => "enospc",
        })
    }
}

/// True if the request may succeed as soon as there is room.
#[must_use]
pub fn lacks_room(failure: Failure) -> bool {
    matches!(failure, Failure::Errno(libc::ENOSPC | libc::EDQUOT, _))
}

/// Which of the held requests are tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Those for which there was no room.
    ForRoom,
    /// All.
    All,
}

impl Retry {
    /// True if a request that failed so is among them.
    #[must_use]
    pub fn includes(self, failure: Failure) -> bool {
        self == Self::All || lacks_room(failure)
    }
}

/// What a worker does with a queue's held requests when the queue stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtStop {
    /// Their guest gets an I/O error: who asked for the stop waits for a drained queue.
    Fail,
    /// They stay in the in-flight journal, and the next daemon carries them out.
    Leave,
}

/// What is held now, for `vublk status`.
#[derive(Clone, Debug, Serialize)]
pub struct Held {
    /// How many requests.
    pub requests: u32,
    /// What the first of them met with.
    pub error: String,
    /// Seconds since then.
    pub seconds: u64,
}

#[derive(Debug)]
struct First {
    at: Instant,
    error: String,
    /// When it is tried again whether there is room, if that is what lacks.
    retry: Option<Instant>,
}

#[derive(Debug, Default)]
struct State {
    requests: u32,
    first: Option<First>,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Holding {
    on_error: AtomicU8,
    /// Wakes the control thread, which has the clock.
    wake: OnceLock<Arc<OwnedFd>>,
    state: Mutex<State>,
}

impl Default for Holding {
    /// Every error is reported.
    fn default() -> Self {
        Self {
            on_error: AtomicU8::new(OnError::Report as u8),
            wake: OnceLock::new(),
            state: Mutex::default(),
        }
    }
}

impl Holding {
    /// Chooses which of the requests that the disk refuses are held from now on; `wake` is written when one is held.
    pub fn choose(&self, on_error: OnError, wake: Arc<OwnedFd>) {
        let _only_one_process = self.wake.set(wake);
        self.on_error.store(on_error as u8, Ordering::Relaxed);
    }

    /// What was chosen.
    #[must_use]
    pub fn on_error(&self) -> OnError {
        let chosen = self.on_error.load(Ordering::Relaxed);
        OnError::ALL.into_iter().find(|choice| *choice as u8 == chosen).unwrap_or(OnError::Report)
    }

    /// True if a request that failed so is to be held.
    #[must_use]
    pub fn wants(&self, command: Command, failure: Failure) -> bool {
        self.on_error().holds(command, failure)
    }

    /// A request is held, for the first time. True: no other one was.
    pub fn hold(&self, command: Command, failure: Failure) -> bool {
        let now = Instant::now();
        let mut state = self.state();
        state.requests += 1;
        let first = state.first.is_none();
        let found = state.first.get_or_insert_with(|| First {
            at: now,
            error: format!("{command} {failure}"),
            retry: None,
        });
        if lacks_room(failure) {
            found.retry.get_or_insert(now + RETRY_EVERY);
        }
        drop(state);
        if let Some(wake) = self.wake.get() {
            sys::signal(wake);
        }
        first
    }

    /// A request that was held has ended. If it was the last one: how many seconds the first has waited.
    pub fn end(&self) -> Option<u64> {
        let mut state = self.state();
        state.requests = state.requests.saturating_sub(1);
        if state.requests > 0 {
            return None;
        }
        state.first.take().map(|first| first.at.elapsed().as_secs())
    }

    /// When the next attempt is due: `None` if nothing waits for room.
    #[must_use]
    pub fn next_retry(&self) -> Option<Instant> {
        self.state().first.as_ref().and_then(|first| first.retry)
    }

    /// True, once, when an attempt is due.
    #[must_use]
    pub fn is_due(&self, now: Instant) -> bool {
        let mut state = self.state();
        let retry = state.first.as_mut().and_then(|first| first.retry.as_mut());
        let Some(at) = retry.filter(|at| **at <= now) else { return false };
        *at = now + RETRY_EVERY;
        true
    }

    /// What is held now.
    #[must_use]
    pub fn held(&self) -> Option<Held> {
        let state = self.state();
        state.first.as_ref().map(|first| Held {
            requests: state.requests,
            error: first.error.clone(),
            seconds: first.at.elapsed().as_secs(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
