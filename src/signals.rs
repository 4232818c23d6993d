//! Signals as a descriptor: SIGTERM and SIGINT ask to stop, SIGUSR1 asks for a
//! line of statistics, SIGHUP says that the disk may have grown,
//! SIGUSR2 that a successor waits.
//!
//! What it is: read by the control thread alone, also while it waits for a
//! worker, so that a hung disk cannot keep the daemon from being stopped.
//!
//! Invariant: all are blocked before the first thread starts, so none interrupts a thread. While
//! the daemon opens its disk SIGTERM and SIGINT end it, whatever it waits for, and the others wait.

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

const READ: [i32; 7] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGHUP,
    // A write past the limit of file sizes, and a line of the log for a terminal whose foreground is
    // another's: both go on, or fail, by themselves.
    libc::SIGXFSZ,
    libc::SIGTTOU,
];

/// Blocks the signals for this thread and all that it will start; lets others in that the parent had
/// blocked for itself.
///
/// # Errors
/// As sigprocmask(2).
pub fn block() -> io::Result<()> {
    sys::block_signals(&READ)?;
    sys::unblock_signals(&[libc::SIGQUIT, libc::SIGALRM, libc::SIGTSTP])
}

/// Lets SIGTERM and SIGINT end a process that has nothing to answer for and does not read them yet.
///
/// # Errors
/// As sigprocmask(2).
pub fn let_end() -> io::Result<()> {
    sys::end_also_as_pid_1(&[libc::SIGTERM, libc::SIGINT])?;
    sys::unblock_signals(&[libc::SIGTERM, libc::SIGINT])
}

impl Signals {
    /// Reads the signals from now on.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new(stop_timeout: Duration) -> io::Result<Self> {
        Ok(Self {
            fd: sys::block_signals(&READ)?,
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
            const TERMINAL: u32 = libc::SIGTTOU.unsigned_abs();
            match signal {
                REPORT => self.report.store(true, Ordering::Relaxed),
                GROWN => self.grown.store(true, Ordering::Relaxed),
                SUCCEED => self.succeed.store(true, Ordering::Relaxed),
                TOO_LARGE | TERMINAL => {}
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

    /// When a drain must be over: `None` as long as no signal asked to stop.
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
