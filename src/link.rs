//! What the process and one disk's control thread tell each other.
//!
//! What it is: calls and the word to stop, on their way to the control thread; on the way back, what
//! `vublk status` shows. The process has one for each disk.
//!
//! What it is not: it carries nothing out, and no message of a front-end comes this way.
//!
//! Invariant: neither side waits for the other here. A status is there at any time, however long the
//! control thread waits for a disk, a lock or a front-end.

use std::collections::VecDeque;
use std::io;
use std::mem::discriminant;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use crate::sys;
use crate::worker::Ack;

/// What a control thread can be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// Grow the disk to so many bytes, or find out whether it has grown.
    Resize(Option<u64>),
    /// Make room for a successor with this program, or the one at vublkd's path.
    Upgrade(Option<PathBuf>),
}

/// What became of a call: a value, or why there is none.
pub type Answer = Result<Value, String>;

/// A call, and where its answer goes; a signal's has none.
#[derive(Debug)]
pub struct Asked {
    /// See [`Call`].
    pub call: Call,
    /// `None`: to the log, if it is bad.
    pub answer: Option<Ack<Answer>>,
}

/// What a control thread shows of its disk.
#[derive(Clone, Debug, Serialize)]
pub struct Shown {
    /// What keeps what a successor would need, and starts it: `parent`, `systemd`, or `none`.
    pub kept_by: &'static str,
    /// Why the last upgrade did not take place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upgrade_refused: Option<String>,
    /// The queues that are being served.
    pub queues: Vec<Queue>,
    /// The front-end keeps a journal of what is in flight.
    pub inflight_region: bool,
    /// Milliseconds that the guest waited for this daemon to take over from one
    /// that stopped for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waited_ms: Option<f64>,
}

/// A queue that is being served.
#[derive(Clone, Debug, Serialize)]
pub struct Queue {
    /// Its number.
    pub index: usize,
    /// Its descriptors.
    pub size: u32,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Link {
    /// Wakes the control thread.
    wake: OwnedFd,
    /// Wakes the process.
    told: Arc<OwnedFd>,
    calls: Mutex<VecDeque<Asked>>,
    shown: Mutex<Option<Shown>>,
    /// When the first SIGTERM or SIGINT came.
    stop: OnceLock<Instant>,
    /// How long a drain may take from then on.
    stop_timeout: Duration,
}

impl Link {
    /// A link to a process that `told` wakes.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new(told: Arc<OwnedFd>, stop_timeout: Duration) -> io::Result<Self> {
        Ok(Self {
            wake: sys::eventfd()?,
            told,
            calls: Mutex::default(),
            shown: Mutex::default(),
            stop: OnceLock::new(),
            stop_timeout,
        })
    }

    /// Asks for something. A signal that comes again before it was attended to is one.
    pub fn ask(&self, call: Call, answer: Option<Ack<Answer>>) {
        let mut calls = self.calls();
        let again = |asked: &Asked| {
            asked.answer.is_none() && answer.is_none() && discriminant(&asked.call) == discriminant(&call)
        };
        if !calls.iter().any(again) {
            calls.push_back(Asked { call, answer });
        }
        drop(calls);
        self.wake();
    }

    /// Asks to stop.
    pub fn stop(&self) {
        self.stop.get_or_init(Instant::now);
        self.wake();
    }

    /// Lets the control thread look at what may have changed.
    pub fn wake(&self) {
        sys::signal(&self.wake);
    }

    /// What the disk shows; `None` as long as it does not serve.
    #[must_use]
    pub fn shown(&self) -> Option<Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Shows something else.
    pub fn show(&self, shown: Shown) {
        let mut cell = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if cell.replace(shown).is_none() {
            sys::signal(&self.told);
        }
    }

    /// The next call.
    #[must_use]
    pub fn next_call(&self) -> Option<Asked> {
        self.calls().pop_front()
    }

    /// Takes what woke the control thread, which then looks at everything that may have changed.
    pub fn woken(&self) {
        sys::drain(&self.wake);
    }

    /// True: there is a call, which nothing else may wake the control thread for.
    #[must_use]
    pub fn has_call(&self) -> bool {
        !self.calls().is_empty()
    }

    /// True once a stop was asked for.
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.stop.get().is_some()
    }

    /// When a drain must be over: `None` as long as it was not asked to stop.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.stop.get().map(|at| *at + self.stop_timeout)
    }

    /// The eventfd that wakes the process.
    #[must_use]
    pub fn told(&self) -> &Arc<OwnedFd> {
        &self.told
    }

    fn calls(&self) -> MutexGuard<'_, VecDeque<Asked>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Readable when there is something new for the control thread.
impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
