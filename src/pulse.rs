//! Whether workers answer: each worker's [`Pulse`], and the [`Pulses`] of all.
//!
//! What it is not: it does not know who asks; [`crate::watchdog`] does.
//!
//! Invariant: a worker answers between two turns, and only when it was asked. One whose thread is in a call for the disk
//! counts as one that answers.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::sys;

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

    /// Makes a call for the disk on the worker's thread, which may take as long as the disk does.
    pub fn during<T>(pulse: Option<&Self>, call: impl FnOnce() -> T) -> T {
        let mark = |begins| pulse.inspect(|pulse| pulse.in_call.store(begins, Ordering::Relaxed));
        mark(true);
        let result = call();
        mark(false);
        result
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

    fn all(&self) -> MutexGuard<'_, Vec<Weak<Pulse>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if all workers have answered what they were asked.
    #[must_use]
    pub fn have_answered(&self) -> bool {
        self.all().iter().filter_map(Weak::upgrade).all(|pulse| pulse.has_answered())
    }

    /// Asks them all, and forgets those that are gone.
    pub fn ask(&self) {
        self.all().retain(|pulse| pulse.upgrade().inspect(|pulse| pulse.ask()).is_some());
    }
}
