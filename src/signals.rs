//! Signals as a descriptor: SIGTERM and SIGINT ask to stop, SIGUSR1 asks for a
//! line of statistics, SIGHUP says that the disk may have grown,
//! SIGUSR2 that a successor waits.
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
    /// A SIGHUP, likewise.
    grown: AtomicBool,
    /// A SIGUSR2 came.
    succeed: AtomicBool,
    /// How long a drain may take after a stop was asked for.
    stop_timeout: Duration,
}

impl Signals {
    /// Blocks the signals for this thread and all that it will start.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new(stop_timeout: Duration) -> io::Result<Self> {
        let fd = sys::block_signals(&[
            libc::SIGTERM,
            libc::SIGINT,
            libc::SIGUSR1,
            libc::SIGUSR2,
            libc::SIGHUP,
            libc::SIGXFSZ,
        ])?;
        Ok(Self {
            fd,
            stop: OnceLock::new(),
            report: AtomicBool::new(false),
            grown: AtomicBool::new(false),
            succeed: AtomicBool::new(false),
            stop_timeout,
        })
    }

    /// Takes what has arrived.
    pub fn take(&self) {
        while let Some(signal) = sys::next_signal(&self.fd) {
            const REPORT: u32 = libc::SIGUSR1.unsigned_abs();
            const GROWN: u32 = libc::SIGHUP.unsigned_abs();
            const SUCCEED: u32 = libc::SIGUSR2.unsigned_abs();
            const TOO_LARGE: u32 = libc::SIGXFSZ.unsigned_abs();
            match signal {
                REPORT => self.report.store(true, Ordering::Relaxed),
                GROWN => self.grown.store(true, Ordering::Relaxed),
                SUCCEED => self.succeed.store(true, Ordering::Relaxed),
                // The write past the limit of file sizes fails by itself.
                TOO_LARGE => {}
                _ => {
                    self.stop.get_or_init(Instant::now);
                }
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

    /// True once for every SIGUSR2.
    #[must_use]
    pub fn take_succeed(&self) -> bool {
        self.succeed.swap(false, Ordering::Relaxed)
    }

    /// True once for every SIGHUP.
    #[must_use]
    pub fn take_grown(&self) -> bool {
        self.grown.swap(false, Ordering::Relaxed)
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
