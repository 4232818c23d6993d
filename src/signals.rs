//! Signals as a descriptor: SIGTERM and SIGINT ask to stop, SIGUSR1 asks for a
//! line of statistics.
//!
//! What it is: read by the control thread alone, also while it waits for a
//! worker, so that a hung disk cannot keep the daemon from being stopped.
//!
//! Invariant: blocked before the first thread starts, so no thread is ever
//! interrupted by one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::sys;

/// See the head of the file.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
    /// When the first SIGTERM or SIGINT came.
    stop: OnceLock<Instant>,
    /// A SIGUSR1 that was not yet answered.
    report: AtomicBool,
    /// How long a drain may take after a stop was asked for.
    stop_timeout: Duration,
}

impl Signals {
    /// Blocks the signals for this thread and all that it will start.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new(stop_timeout: Duration) -> io::Result<Self> {
        let fd = sys::block_signals(&[libc::SIGTERM, libc::SIGINT, libc::SIGUSR1])?;
        Ok(Self { fd, stop: OnceLock::new(), report: AtomicBool::new(false), stop_timeout })
    }

    /// Takes what has arrived.
    pub fn take(&self) {
        while let Some(signal) = sys::next_signal(&self.fd) {
            if signal == libc::SIGUSR1.unsigned_abs() {
                self.report.store(true, Ordering::Relaxed);
            } else {
                self.stop.get_or_init(Instant::now);
            }
        }
    }

    /// True once a stop was asked for.
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.stop.get().is_some()
    }

    /// When a drain must be over: `None` as long as nobody asked to stop.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.stop.get().map(|at| *at + self.stop_timeout)
    }

    /// True once for every SIGUSR1.
    #[must_use]
    pub fn take_report(&self) -> bool {
        self.report.swap(false, Ordering::Relaxed)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
