//! Signals as a descriptor: SIGTERM and SIGINT ask to stop, SIGUSR1 asks for a
//! line of statistics, SIGHUP says that the disk may have grown,
//! SIGUSR2 that a successor waits.
//!
//! What it is: read by a thread that does nothing else and tells the control thread, which
//! also looks while it waits for a worker: a hung disk cannot keep the daemon from being stopped,
//! nor can whatever a front-end makes the control thread wait for.
//!
//! What it is not: SIGALRM, which interrupts a write that takes too long ([`sys::interrupt`]).
//!
//! Invariant: all are blocked before the first thread starts, so none interrupts a thread. While
//! the daemon opens its disk SIGTERM and SIGINT end it, whatever it waits for, and the others wait.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::supervise::GAVE_UP;
use crate::{log, sys};

/// How much longer than for a drain the control thread may take.
const LAST_MOMENT: Duration = Duration::from_millis(500);

/// See the head of the file.
#[derive(Debug)]
pub struct Signals {
    /// Readable when there is something to take.
    fd: OwnedFd,
    /// No thread could be had: `fd` has the signals themselves.
    alone: bool,
    taken: Arc<Taken>,
}

#[derive(Debug)]
struct Taken {
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
    sys::default_sigchld()?;
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
        let signals = sys::block_signals(&READ)?;
        let taken = Arc::new(Taken {
            stop: OnceLock::new(),
            report: AtomicBool::new(false),
            grown: AtomicBool::new(false),
            succeed: AtomicBool::new(false),
            stop_timeout,
        });
        let told = sys::eventfd()?;
        let (theirs, tell, copy) = (Arc::clone(&taken), told.try_clone()?, signals.try_clone()?);
        let thread = std::thread::Builder::new().name("vublk-signals".into()).stack_size(64 << 10);
        let alone = thread.spawn(move || theirs.watch(&copy, &tell)).is_err();
        Ok(Self { fd: if alone { signals } else { told }, alone, taken })
    }

    /// Takes what has arrived.
    pub fn take(&self) {
        if self.alone {
            self.taken.read(&self.fd);
        } else {
            sys::drain(&self.fd);
        }
    }

    /// True once a stop was asked for.
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.taken.stop.get().is_some()
    }

    /// When a drain must be over: `None` as long as no signal asked to stop.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.taken.deadline()
    }

    /// True once for every SIGUSR2.
    #[must_use]
    pub fn take_succeed(&self) -> bool {
        self.taken.succeed.swap(false, Ordering::Relaxed)
    }

    /// True once for every SIGHUP.
    #[must_use]
    pub fn take_grown(&self) -> bool {
        self.taken.grown.swap(false, Ordering::Relaxed)
    }

    /// True once for every SIGUSR1.
    #[must_use]
    pub fn take_report(&self) -> bool {
        self.taken.report.swap(false, Ordering::Relaxed)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Taken {
    fn read(&self, signals: &OwnedFd) {
        while let Some(signal) = sys::next_signal(signals) {
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

    fn deadline(&self) -> Option<Instant> {
        self.stop.get().map(|at| *at + self.stop_timeout)
    }

    /// Reads signals as long as the process lives, which is not much longer than it may.
    fn watch(&self, signals: &OwnedFd, tell: &OwnedFd) {
        loop {
            let end = self.deadline().map(|at| at + LAST_MOMENT);
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                log::complain("stopped: the control thread does not end");
                log::flush();
                sys::exit_now(GAVE_UP.into());
            }
            match sys::readable_within(signals, left) {
                Ok(true) => {
                    self.read(signals);
                    sys::signal(tell);
                }
                Ok(false) => {}
                Err(_) => std::thread::sleep(LAST_MOMENT), // not reached
            }
        }
    }
}
