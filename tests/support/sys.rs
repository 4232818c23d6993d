//! The system calls the tests share: waits that end, event counters, memory
//! files, and the list of tests that were left out.
//!
//! Nothing here sleeps to let something happen: every wait is on a descriptor
//! or on a condition, and every wait has an end that names what it waited for.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, memfd_create};

/// How long anything may take before the test calls it a hang.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The end of a wait, and what was waited for.
pub struct Deadline {
    end: Instant,
    patience: Duration,
    what: String,
}

impl Deadline {
    pub fn new(what: impl Into<String>) -> Self {
        Self::within(PATIENCE, what)
    }

    pub fn within(patience: Duration, what: impl Into<String>) -> Self {
        Self { end: Instant::now() + patience, patience, what: what.into() }
    }

    pub fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// Fails the test once the time is up.
    #[track_caller]
    pub fn check(&self) {
        assert!(!self.left().is_zero(), "gave up after {:?} waiting for {}", self.patience, self.what);
    }

    /// Waits until `fd` is readable (or hung up).
    #[track_caller]
    pub fn readable(&self, fd: impl AsFd) {
        while !readable_within(fd.as_fd(), self.left()) {
            self.check();
        }
    }

    /// Looks at `done` again and again, in between giving the processor away.
    #[track_caller]
    pub fn until<T>(&self, mut done: impl FnMut() -> Option<T>) -> T {
        loop {
            if let Some(value) = done() {
                return value;
            }
            self.check();
            std::thread::yield_now();
        }
    }

    /// As `until`, for conditions that cost a system call to look at: at most
    /// 500 looks a second.
    #[track_caller]
    pub fn until_slowly<T>(&self, mut done: impl FnMut() -> Option<T>) -> T {
        loop {
            if let Some(value) = done() {
                return value;
            }
            self.check();
            tick(&[], Duration::from_millis(2));
        }
    }
}

/// True as soon as `fd` is readable, false when it is not within `time`.
pub fn readable_within(fd: BorrowedFd<'_>, time: Duration) -> bool {
    tick(&[fd], time)
}

/// Waits for any of `fds`, at most `time`.
pub fn tick(fds: &[BorrowedFd<'_>], time: Duration) -> bool {
    let end = Instant::now() + time;
    let mut polled: Vec<PollFd<'_>> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap();
        match poll(&mut polled, Some(&timeout)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
    }
}

/// An eventfd, as a kick, a call or an error descriptor.
pub struct Event(OwnedFd);

impl Event {
    pub fn new() -> Self {
        Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
    }

    pub fn signal(&self) {
        rustix::io::write(&self.0, &1_u64.to_ne_bytes()).unwrap();
    }

    /// Takes all signals; 0 when there is none.
    pub fn take(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.0, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(rustix::io::Errno::AGAIN) => 0,
            Err(error) => panic!("eventfd: {error}"),
        }
    }

    #[track_caller]
    pub fn wait(&self, what: &str) -> u64 {
        let deadline = Deadline::new(what);
        loop {
            deadline.readable(&self.0);
            let count = self.take();
            if count > 0 {
                return count;
            }
        }
    }

    pub fn within(&self, time: Duration) -> bool {
        readable_within(self.0.as_fd(), time)
    }

    /// The same eventfd once more.
    pub fn another(&self) -> Self {
        Self(self.0.try_clone().unwrap())
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An anonymous file of `len` bytes.
pub fn memory_file(len: u64) -> File {
    let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

/// A new terminal: what a person sees and types, and the end that programs get.
pub fn terminal() -> (File, OwnedFd) {
    let mut name = [0; 64];
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: plain calls on descriptors that were just made; `name` is as long as it says.
    unsafe {
        let master = libc::posix_openpt(flags);
        assert!(master >= 0 && libc::grantpt(master) == 0 && libc::unlockpt(master) == 0);
        assert_eq!(libc::ptsname_r(master, name.as_mut_ptr(), name.len()), 0);
        let terminal = libc::open(name.as_ptr(), flags);
        assert!(terminal >= 0);
        (File::from_raw_fd(master), OwnedFd::from_raw_fd(terminal))
    }
}

/// How many descriptors a process has open. A daemon lets only root look: else none, and it is told.
pub fn open_fds(pid: u32) -> usize {
    match std::fs::read_dir(format!("/proc/{pid}/fd")) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            skip("counts of a daemon's descriptors", "needs root: no other user may look into it");
            0
        }
        entries => entries.unwrap().count(),
    }
}

static LEFT_OUT: Mutex<Vec<String>> = Mutex::new(Vec::new());
static TALLY: Once = Once::new();

/// Says that a test is left out and why. The line goes to stderr itself, past
/// the capture of the test runner: a skip nobody sees is a hole.
pub fn skip(test: &str, reason: &str) {
    register_tally();
    let mut left_out = LEFT_OUT.lock().unwrap();
    if left_out.iter().any(|name| name == test) {
        return; // said already, for another engine
    }
    left_out.push(test.to_owned());
    drop(left_out);
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
}

/// Counts the left-out tests when the process ends.
pub fn register_tally() {
    TALLY.call_once(|| {
        // SAFETY: `tally` is a plain function that stays valid to the end of
        // the process.
        unsafe { libc::atexit(tally) };
    });
}

extern "C" fn tally() {
    if let Ok(names) = LEFT_OUT.lock() {
        let _ = writeln!(
            std::io::stderr(),
            "\nleft out: {} test(s){}{}",
            names.len(),
            if names.is_empty() { "" } else { ": " },
            names.join(", ")
        );
    }
}

/// True when the test runs as root; otherwise it is reported as left out.
pub fn root(test: &str, reason: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip(test, &format!("needs root: {reason}"));
    }
    root
}

/// Where a program is: in the QEMU that `make setup` unpacks for the tests, or in a folder of PATH.
pub fn find(program: &str) -> Option<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/qemu/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(own).chain(std::env::split_paths(&path));
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// True when the program is installed; otherwise the test is reported as left out.
pub fn installed(program: &str, test: &str) -> bool {
    let found = find(program).is_some();
    if !found {
        skip(test, &format!("{program} is not installed"));
    }
    found
}

/// A program that is installed, to be started.
pub fn program(name: &str) -> Command {
    Command::new(find(name).unwrap_or_else(|| name.into()))
}
