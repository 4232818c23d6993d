//! The io_uring engine for files and block devices: one ring a worker, one `io_uring_enter` a turn.
//!
//! What it is: operations on the open disk as entries of a [`Ring`], with the guest's memory registered where that was
//! asked for.
//!
//! What it is not: no SQPOLL, no IOPOLL: an idle disk costs nothing.
//!
//! Invariant: dropping it waits for every operation: the memory belongs to others afterwards.
#![expect(unsafe_code, reason = "submits addresses to the kernel")]

pub mod pins;
pub mod ring;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Once};

use io_uring::opcode;
use io_uring::types::{Fd, Fixed, FsyncFlags};

use self::pins::Pins;
use self::ring::{Completion, KIND_ENGINE, Ring, user_data};
pub use self::ring::{Feature, Options};
use super::{Done, Engine, Event, Files, Io, Kind, Outcome, Slot, Target, Token, Wait, inline};
use crate::memory::HostSpan;
use crate::pulse::Pulse;
use crate::sys;

/// Operations that are submitted together to an idle disk.
const FIRST_BATCH: usize = 4;

/// Places in the ring's file table: the two descriptions of the disk.
const DISK: u32 = 0;
const CACHED: u32 = 1;
const RWF_DSYNC: i32 = 2;
/// BLKDISCARD as a command, Linux 6.12; before, it is refused and made on the worker's thread.
const BLOCK_URING_CMD_DISCARD: u32 = 0x12 << 8;

/// What it does with a ring, besides watching eventfds.
const OPERATIONS: [u8; 9] = [
    opcode::Read::CODE,
    opcode::ReadFixed::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::WriteFixed::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::UringCmd16::CODE,
];

/// See the head of the file.
pub struct Uring {
    ring: Ring,
    files: Arc<Files>,
    /// Registered buffers that may be used, sorted; the index is the kernel's.
    pinned: Vec<HostSpan>,
    /// The last hit among them.
    last_pinned: usize,
    /// The kernel has a table of buffers, which may be an old one.
    registered: bool,
    /// Operations that the kernel may still be running.
    in_flight: u32,
    /// Those that this very thread has done.
    done: Vec<Done>,
    pulse: Option<Arc<Pulse>>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("ring", &self.ring).finish_non_exhaustive()
    }
}

impl Uring {
    /// A ring for `slots` operations at once on `files` and `tokens` eventfds.
    /// Call it on the thread that will use it.
    ///
    /// # Errors
    /// ENOSYS or EPERM where io_uring is forbidden; ENOMEM.
    pub fn new(files: Arc<Files>, slots: u16, tokens: u16, options: &Options) -> io::Result<Self> {
        let descriptors = [files.disk.as_raw_fd(), cached(&files)];
        Ok(Self {
            ring: Ring::new(slots, &descriptors, tokens, &OPERATIONS, options)?,
            files,
            pinned: Vec::new(),
            last_pinned: 0,
            pulse: None,
            registered: false,
            in_flight: 0,
            done: Vec::with_capacity(slots.into()),
        })
    }

    /// Whether this process can have a ring as the engine's: io_uring may be forbidden, or the kernel be older than 5.13.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn probe() -> io::Result<()> {
        Ring::probe(&OPERATIONS)
    }

    /// The registered buffer that `iovec` lies in.
    fn pinned(&mut self, iovec: libc::iovec) -> Option<u16> {
        let (start, len) = (iovec.iov_base.addr(), iovec.iov_len);
        let holds = |b: &HostSpan| start >= b.addr() && len <= b.len() && start - b.addr() <= b.len() - len;
        if !self.pinned.get(self.last_pinned).is_some_and(holds) {
            let at = self.pinned.partition_point(|b| b.addr() <= start).checked_sub(1)?;
            self.pinned.get(at).filter(|b| holds(b))?;
            self.last_pinned = at;
        }
        u16::try_from(self.last_pinned).ok()
    }
}

/// The descriptor of the page cache's description, or -1.
fn cached(files: &Files) -> RawFd {
    files.cached.as_ref().map_or(-1, |file| file.as_raw_fd())
}

impl Engine for Uring {
    unsafe fn queue(&mut self, io: Io) {
        if io.own_thread {
            let outcome = Pulse::during(self.pulse.as_deref(), || {
                // SAFETY: the contract of this very function.
                unsafe { inline::run(&self.files, &io) }
            });
            self.done.push(Done { slot: io.slot, outcome });
            return;
        }
        let flags = if let Kind::Write { dsync: true } = io.kind { RWF_DSYNC } else { 0 };
        // SAFETY: the contract: `iovecs` names at least one valid iovec for
        // every operation that has data.
        let one = (io.iovec_count == 1).then(|| unsafe { *io.iovecs });
        let len = |v: libc::iovec| u32::try_from(v.iov_len).unwrap_or(u32::MAX);
        let count = io.iovec_count;
        let mut discard = [0; 16];
        for (to, from) in discard.iter_mut().zip(io.len.to_ne_bytes()) {
            *to = from;
        }
        let pinned = one.filter(|_| !self.pinned.is_empty()).and_then(|v| self.pinned(v));
        macro_rules! on {
            ($fd:expr) => {
                match (io.kind, one, pinned) {
                    (Kind::Read, Some(v), Some(at)) => {
                        opcode::ReadFixed::new($fd, v.iov_base.cast(), len(v), at).offset(io.offset).build()
                    }
                    (Kind::Read, Some(v), None) => {
                        opcode::Read::new($fd, v.iov_base.cast(), len(v)).offset(io.offset).build()
                    }
                    (Kind::Read, None, _) => {
                        opcode::Readv::new($fd, io.iovecs, count).offset(io.offset).build()
                    }
                    (Kind::Write { .. }, Some(v), Some(at)) => {
                        opcode::WriteFixed::new($fd, v.iov_base.cast(), len(v), at)
                            .offset(io.offset)
                            .rw_flags(flags)
                            .build()
                    }
                    (Kind::Write { .. }, Some(v), None) => opcode::Write::new($fd, v.iov_base.cast(), len(v))
                        .offset(io.offset)
                        .rw_flags(flags)
                        .build(),
                    (Kind::Write { .. }, None, _) => {
                        opcode::Writev::new($fd, io.iovecs, count).offset(io.offset).rw_flags(flags).build()
                    }
                    (Kind::Sync, ..) => opcode::Fsync::new($fd).flags(FsyncFlags::DATASYNC).build(),
                    (Kind::Discard, ..) => opcode::UringCmd16::new($fd, BLOCK_URING_CMD_DISCARD)
                        .addr(Some(io.offset))
                        .cmd(discard)
                        .build(),
                    (Kind::Fallocate(mode), ..) => {
                        opcode::Fallocate::new($fd, io.len).offset(io.offset).mode(mode).build()
                    }
                }
            };
        }
        let (place, fd) = match io.target {
            Target::Disk => (DISK, self.files.disk.as_raw_fd()),
            Target::Cached => (CACHED, cached(&self.files)),
        };
        let entry = if self.ring.is_fixed() { on!(Fixed(place)) } else { on!(Fd(fd)) };
        self.in_flight += 1;
        // SAFETY: the contract of this very function.
        unsafe { self.ring.stage(&entry.user_data(user_data(KIND_ENGINE, 0, io.slot.0))) };
    }

    fn set_pulse(&mut self, pulse: Arc<Pulse>) {
        self.pulse = Some(pulse);
    }

    fn watch(&mut self, token: Token, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.ring.watch(token, fd)
    }

    fn unwatch(&mut self, token: Token) {
        self.ring.unwatch(token);
    }

    fn pin(&mut self, memory: Option<&Pins>) {
        // From here on nothing is looked up in the old table: its addresses may
        // soon be another mapping's, and a registered page stays what it was.
        self.pinned.clear();
        // What is staged names buffers of the old table; the kernel looks when it
        // is submitted.
        if let Err(e) = self.ring.submit(0, None) {
            tracing::error!("io_uring_enter: {e}");
        }
        if self.ring.staged() > 0 {
            return; // the kernel takes nothing now: unpinned until the next table
        }
        if std::mem::take(&mut self.registered)
            && let Err(e) = self.ring.submitter().unregister_buffers()
        {
            tracing::warn!("cannot let go of pinned memory: {e}");
        }
        let Some(pins) = memory.filter(|p| !p.buffers().is_empty()) else { return };
        match sys::uring_clone_buffers(self.ring.fd(), pins.fd()) {
            Ok(()) => {
                self.registered = true;
                self.pinned = pins.buffers().to_vec();
            }
            Err(e) => {
                static SAID: Once = Once::new(); // a front-end can send one table after another
                SAID.call_once(|| {
                    tracing::warn!("--pin-memory has no effect: this kernel cannot share pinned memory: {e}");
                });
            }
        }
    }

    /// A few for an idle disk, and as many more as there are already: to prepare a
    /// long batch takes as long as a disk needs for a request, and an idle one
    /// would wait for it.
    fn batch(&self, in_flight: usize) -> usize {
        in_flight.max(FIRST_BATCH)
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.ring.enter(wait, !self.done.is_empty())
    }

    fn reap(&mut self, mut each: impl FnMut(Event)) {
        self.done.drain(..).for_each(|done| each(Event::Done(done)));
        let in_flight = &mut self.in_flight;
        self.ring.reap(|event| match event {
            Ok(Completion { index, result, .. }) => {
                *in_flight -= 1;
                let outcome = Outcome::of_handed_over(u64::try_from(result).map_err(|_| -result));
                each(Event::Done(Done { slot: Slot(index), outcome }));
            }
            Err(token) => each(Event::Ready(token)),
        });
    }
}

impl Drop for Uring {
    /// Waits for what is running: the memory belongs to others afterwards.
    fn drop(&mut self) {
        while self.in_flight > 0 {
            if let Err(e) = self.ring.submit(1, None) {
                tracing::error!("io_uring_enter: {e}");
                std::process::abort(); // better than memory that changes by itself
            }
            self.reap(|_| ());
        }
    }
}
