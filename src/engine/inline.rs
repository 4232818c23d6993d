//! Disks that are memory: the worker does small reads and writes itself.
//!
//! What it is: an engine around another. zram, tmpfs and RAM disks have no way
//! to say "not now" (no NOWAIT), so io_uring hands each operation on them to a
//! kernel thread: two context switches around a copy that takes a microsecond.
//! Here the copy is made where it was asked for.
//!
//! What it is not: for devices that one waits for. Those would keep all other
//! requests waiting; so would a long operation, an fdatasync or a fallocate,
//! which are the other engine's.
//!
//! Invariant: as [`super::threads`]' threads: an operation is over before its
//! [`Done`] is seen.
#![expect(unsafe_code, reason = "hands addresses to system calls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use super::uring::pins::Pins;
use super::{Done, Engine, Event, Files, Io, Kind, Outcome, Token, Wait};
use crate::pulse::Pulse;
use crate::sys;

/// Longest operation that is done here, bytes; a copy of some ten microseconds.
const MAX_INLINE: u64 = 128 << 10;
/// Chains after which, at the latest, the driver is shown what is done: it goes
/// on with these while we do the next ones.
const MOST_CHAINS: u16 = 8;

/// Runs one operation to its end on this thread.
///
/// # Safety
/// As [`Engine::queue`], until this returns.
pub(super) unsafe fn run(files: &Files, io: &Io) -> Outcome {
    // SAFETY: the same contract.
    Outcome::of_call(unsafe { call(files.of(io), io) })
}

/// The same, on one file.
unsafe fn call(disk: &File, io: &Io) -> io::Result<u64> {
    let offset = i64::try_from(io.offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let count = i32::try_from(io.iovec_count).unwrap_or(i32::MAX);
    let fd = disk.as_raw_fd();
    loop {
        let moved = match io.kind {
            // SAFETY: iovecs and buffers are valid by the contract.
            Kind::Read => unsafe { libc::preadv2(fd, io.iovecs, count, offset, 0) },
            Kind::Write { dsync } => {
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                // SAFETY: as above.
                unsafe { libc::pwritev2(fd, io.iovecs, count, offset, flags) }
            }
            Kind::Sync => return disk.sync_data().map(|()| 0),
            Kind::Fallocate(mode) => return sys::fallocate(disk, mode, io.offset, io.len).map(|()| 0),
            Kind::Discard => return sys::device_discard(disk, io.offset, io.len).map(|()| 0),
        };
        match u64::try_from(moved) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// See the head of the file.
#[derive(Debug)]
pub struct Inline<E> {
    engine: E,
    files: Arc<Files>,
    done: Vec<Done>,
}

impl<E> Inline<E> {
    /// Small operations of `slots` slots on `files`, others by `engine`.
    #[must_use]
    pub fn new(engine: E, files: Arc<Files>, slots: u16) -> Self {
        Self { engine, files, done: Vec::with_capacity(slots.into()) }
    }
}

impl<E: Engine> Engine for Inline<E> {
    unsafe fn queue(&mut self, io: Io) {
        if io.len <= MAX_INLINE && matches!(io.kind, Kind::Read | Kind::Write { .. }) {
            // SAFETY: the contract of this very function.
            let outcome = unsafe { run(&self.files, &io) };
            self.done.push(Done { slot: io.slot, outcome });
        } else {
            // SAFETY: as above.
            unsafe { self.engine.queue(io) }
        }
    }

    fn watch(&mut self, token: Token, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.engine.watch(token, fd)
    }

    fn unwatch(&mut self, token: Token) {
        self.engine.unwatch(token);
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.engine.enter(if self.done.is_empty() { wait } else { Wait::No })
    }

    fn reap(&mut self, mut each: impl FnMut(Event)) {
        self.done.drain(..).for_each(|done| each(Event::Done(done)));
        self.engine.reap(each);
    }

    fn pin(&mut self, memory: Option<&Pins>) {
        self.engine.pin(memory);
    }

    fn set_pulse(&mut self, pulse: Arc<Pulse>) {
        self.engine.set_pulse(pulse);
    }

    fn max_joined(&self) -> u64 {
        MAX_INLINE
    }

    /// Half of what there is: the driver goes on with that half while we do the
    /// other one.
    fn chains(&self, offered: u16) -> u16 {
        offered.div_ceil(2).clamp(1, MOST_CHAINS)
    }

    fn is_inline(&self) -> bool {
        true
    }
}
