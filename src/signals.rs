//! Signals as a descriptor: SIGTERM and SIGINT ask to stop, SIGUSR1 asks for a
//! line of statistics, SIGHUP says that the disk may have grown,
//! SIGUSR2 that a successor waits.
//!
//! What it is: what the process's own thread reads, which waits for nothing: a hung disk cannot keep the daemon
//! from being stopped, nor can whatever a front-end makes a control thread wait for.
//!
//! What it is not: SIGALRM, which interrupts a write that takes too long ([`sys::interrupt`]).
//!
//! Invariant: all are blocked before the first thread starts, so none interrupts a thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sys;

/// What a signal says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM, SIGINT.
    Stop,
    /// SIGUSR1.
    Report,
    /// SIGHUP.
    Grown,
    /// SIGUSR2.
    Succeed,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Signals(OwnedFd);

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
    sys::default_sigchld()?;
    sys::unblock_signals(&[libc::SIGQUIT, libc::SIGALRM, libc::SIGTSTP])
}

impl Signals {
    /// Reads the signals from now on.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new() -> io::Result<Self> {
        sys::block_signals(&READ).map(Self)
    }

    /// The next that has arrived.
    #[must_use]
    pub fn next(&self) -> Option<Signal> {
        const REPORT: u32 = libc::SIGUSR1.unsigned_abs();
        const GROWN: u32 = libc::SIGHUP.unsigned_abs();
        const SUCCEED: u32 = libc::SIGUSR2.unsigned_abs();
        const STOP: [u32; 2] = [libc::SIGTERM.unsigned_abs(), libc::SIGINT.unsigned_abs()];
        loop {
            return Some(match sys::next_signal(&self.0)? {
                REPORT => Signal::Report,
                GROWN => Signal::Grown,
                SUCCEED => Signal::Succeed,
                number if STOP.contains(&number) => Signal::Stop,
                _ => continue,
            });
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
