//! The io_uring engine: one ring a worker, one `io_uring_enter` a turn.
//!
//! What it is: made by the thread that uses it, with every flag that saves work
//! and that this kernel has; each flag falls back alone. Disk, kicks and the
//! worker's wake-up are in the ring's file table. Eventfds are multishot polls
//! whose counters are never read.
//!
//! What it is not: no SQPOLL, no IOPOLL: an idle disk costs nothing.
//!
//! Invariants: the submission queue has room for an operation of every slot and
//! the completion queue for all of them and all polls; should the completion
//! queue overflow all the same, a poll that ended is armed again and reported,
//! so that no eventfd goes deaf.
//!
//! ```text
//!   user_data   63        32        16         0
//!               │ kind     │ epoch   │ slot or token │
//! ```
#![expect(unsafe_code, reason = "submits addresses to the kernel")]

pub mod pins;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Once};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::squeue::{self, Entry};
use io_uring::types::{Fd, Fixed, FsyncFlags};
use io_uring::{IoUring, cqueue, opcode};

use self::pins::Pins;
use super::{Done, Engine, Event, Files, Io, Kind, Outcome, Slot, Target, Token, Wait, inline};
use crate::memory::HostSpan;
use crate::pulse::Pulse;
use crate::sys;

/// How often it is looked for completions while a time is waited for, before Linux 5.11.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Operations that are submitted together to an idle disk.
const FIRST_BATCH: usize = 4;

const KIND_IO: u64 = 0;
const KIND_POLL: u64 = 1;
/// Completions that are ignored (the answer to a POLL_REMOVE).
const KIND_NONE: u64 = 2;

/// Places in the ring's file table: the two descriptions of the disk, then the tokens.
const DISK: u32 = 0;
const CACHED: u32 = 1;
const TOKENS: u32 = 2;
const POLLIN: u32 = 1;
const ENTER_GETEVENTS: u32 = 1;
const ENTER_REGISTERED_RING: u32 = 1 << 4;
const RWF_DSYNC: i32 = 2;
/// BLKDISCARD as a command, Linux 6.12; before, it is refused and made on the worker's thread.
const BLOCK_URING_CMD_DISCARD: u32 = 0x12 << 8;

/// What a kernel may lack. In a set, they are what the kernel is told not to be
/// asked for: a test refuses them one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// IORING_ENTER_EXT_ARG, an enter that ends at a time, Linux 5.11.
    EnterTimeout,
    /// IORING_SETUP_SUBMIT_ALL, Linux 5.18.
    SubmitAll,
    /// IORING_SETUP_SINGLE_ISSUER, Linux 6.0.
    SingleIssuer,
    /// IORING_SETUP_DEFER_TASKRUN, Linux 6.1; needs the one above.
    DeferTaskrun,
    /// IORING_SETUP_NO_SQARRAY, Linux 6.6.
    NoSqArray,
    /// A registered ring descriptor, Linux 5.18.
    RegisteredRing,
    /// A sparse file table, Linux 5.19.
    FixedFiles,
}

impl Feature {
    /// All, oldest first.
    pub const ALL: [Self; 7] = [
        Self::EnterTimeout,
        Self::SubmitAll,
        Self::SingleIssuer,
        Self::DeferTaskrun,
        Self::NoSqArray,
        Self::RegisteredRing,
        Self::FixedFiles,
    ];
    const SETUP: [Self; 4] = [Self::SubmitAll, Self::SingleIssuer, Self::DeferTaskrun, Self::NoSqArray];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::EnterTimeout => "enter-timeout",
            Self::SubmitAll => "submit-all",
            Self::SingleIssuer => "single-issuer",
            Self::DeferTaskrun => "defer-taskrun",
            Self::NoSqArray => "no-sqarray",
            Self::RegisteredRing => "registered-ring",
            Self::FixedFiles => "fixed-files",
        }
    }
}

/// How a ring is made; the default is what ships, the rest is for tests.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Features that set-up fails with, as an old kernel would.
    pub refuse: Vec<Feature>,
    /// Entries of the completion queue, to force an overflow.
    pub cq_entries: Option<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Poll {
    fd: RawFd,
    /// Tells completions of this poll from those of one that was removed.
    epoch: u16,
    watched: bool,
}

/// See the head of the file.
pub struct Uring {
    ring: IoUring,
    /// The ring's descriptor, or its index among the thread's registered ones.
    enter_fd: RawFd,
    /// GETEVENTS always: with DEFER_TASKRUN it is what runs completions.
    enter_flags: u32,
    /// An enter can end at a time.
    has_timeout: bool,
    files: Arc<Files>,
    fixed: bool,
    polls: Box<[Poll]>,
    /// Polls that ended and are to be armed again.
    ended: Vec<Token>,
    /// Registered buffers that may be used, sorted; the index is the kernel's.
    pinned: Vec<HostSpan>,
    /// The last hit among them.
    last_pinned: usize,
    /// The kernel has a table of buffers, which may be an old one.
    registered: bool,
    staged: u32,
    /// Operations that the kernel may still be running.
    in_flight: u32,
    /// Those that this very thread has done.
    done: Vec<Done>,
    pulse: Option<Arc<Pulse>>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("fixed", &self.fixed)
            .field("staged", &self.staged)
            .finish_non_exhaustive()
    }
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

impl Uring {
    /// A ring for `slots` operations at once on `files` and `tokens` eventfds.
    /// Call it on the thread that will use it.
    ///
    /// # Errors
    /// ENOSYS or EPERM where io_uring is forbidden; ENOMEM.
    pub fn new(files: Arc<Files>, slots: u16, tokens: u16, options: &Options) -> io::Result<Self> {
        // One operation of every slot, one poll and one removal of every token.
        let submissions = (u32::from(slots) + 2 * u32::from(tokens)).next_power_of_two();
        let completions = 2 * submissions;
        let ring = setup(submissions, options.cq_entries.unwrap_or(completions), options)?;
        let refused = |feature| options.refuse.contains(&feature);
        let enter = match refused(Feature::RegisteredRing) {
            false => sys::uring_register_self(ring.as_raw_fd()).map(|index| (index, ENTER_REGISTERED_RING)),
            true => Err(invalid()),
        };
        let (enter_fd, enter_flags) = enter.unwrap_or((ring.as_raw_fd(), 0));
        let fixed = !refused(Feature::FixedFiles)
            && ring.submitter().register_files_sparse(u32::from(tokens) + TOKENS).is_ok()
            && ring
                .submitter()
                .register_files_update(DISK, &[files.disk.as_raw_fd(), cached(&files)])
                .is_ok();
        restrict(&ring, fixed)?;
        Ok(Self {
            has_timeout: ring.params().is_feature_ext_arg() && !refused(Feature::EnterTimeout),
            ring,
            enter_fd,
            enter_flags: enter_flags | ENTER_GETEVENTS,
            files,
            fixed,
            polls: vec![Poll { fd: -1, epoch: 0, watched: false }; usize::from(tokens)].into_boxed_slice(),
            ended: Vec::with_capacity(usize::from(tokens)),
            pinned: Vec::new(),
            last_pinned: 0,
            pulse: None,
            registered: false,
            staged: 0,
            in_flight: 0,
            done: Vec::with_capacity(slots.into()),
        })
    }

    /// Whether this process can have a ring as the engine's: io_uring may be forbidden, or the kernel be older than 5.13.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn probe() -> io::Result<()> {
        let ring = try_setup(1, 2, &[], &Options::default())?;
        // As old as polls that stay armed, which a kernel does not tell of itself.
        if !ring.params().is_feature_resource_tagging() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel is older than 5.13"));
        }
        restrict(&ring, false)
    }

    /// What a ring here has to do without of what saves instructions of each request.
    #[must_use]
    pub fn missing() -> Vec<Feature> {
        let lacks = |feature: &Feature| {
            let needs = if *feature == Feature::DeferTaskrun { &[Feature::SingleIssuer][..] } else { &[] };
            try_setup(1, 2, &[needs, &[*feature]].concat(), &Options::default()).is_err()
        };
        Feature::SETUP.into_iter().filter(lacks).collect()
    }

    fn stage(&mut self, entry: &Entry) {
        // SAFETY: addresses in the entry are valid until its completion: for
        // operations by the contract of `queue`, polls and removals have none.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // Full of polls as well as operations: hand over what is there.
            if let Err(e) = self.submit(0, None) {
                tracing::error!("io_uring_enter: {e}");
                std::process::abort(); // an operation that cannot be submitted never ends
            }
        }
        self.staged += 1;
    }

    /// One io_uring_enter, which waits for completions, for at most this time.
    fn submit(&mut self, min_complete: u32, time: Option<Duration>) -> io::Result<()> {
        loop {
            match sys::uring_enter(self.enter_fd, self.staged, min_complete, self.enter_flags, time) {
                Ok(taken) => {
                    self.staged -= taken.min(self.staged);
                    if self.staged == 0 {
                        return Ok(());
                    }
                }
                Err(e) => match e.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // Completions must be reaped first; the caller will.
                    Some(libc::EBUSY | libc::EAGAIN) => return Ok(()),
                    Some(libc::ETIME) => return Ok(()),
                    _ => return Err(e),
                },
            }
        }
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

    /// True if the kernel has completions that only an enter brings out.
    fn has_work(&mut self) -> bool {
        let queue = self.ring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    fn arm(&mut self, token: Token) {
        let Some(poll) = self.polls.get(usize::from(token.0)).copied() else { return };
        let data = user_data(KIND_POLL, poll.epoch, token.0);
        let entry = if self.fixed {
            opcode::PollAdd::new(Fixed(TOKENS + u32::from(token.0)), POLLIN).multi(true).build()
        } else {
            opcode::PollAdd::new(Fd(poll.fd), POLLIN).multi(true).build()
        };
        self.stage(&entry.user_data(data));
    }
}

fn user_data(kind: u64, epoch: u16, index: u16) -> u64 {
    kind << 32 | u64::from(epoch) << 16 | u64::from(index)
}

/// The ring with all flags the kernel takes: all, all but one, then fewer and
/// fewer, newest first.
fn setup(entries: u32, completions: u32, options: &Options) -> io::Result<IoUring> {
    let all = Feature::SETUP.to_vec();
    let without_one =
        all.iter().rev().map(|gone| all.iter().copied().filter(|f| f != gone).collect::<Vec<_>>());
    let fewer = (0..all.len()).rev().map(|n| all.iter().copied().take(n).collect());
    let mut last = invalid();
    for flags in std::iter::once(all.clone()).chain(without_one).chain(fewer) {
        match try_setup(entries, completions, &flags, options) {
            Ok(ring) => {
                if flags.len() < all.len() {
                    let names: Vec<_> = flags.iter().map(|f| f.name()).collect();
                    tracing::debug!("io_uring with only: {}", names.join(", "));
                }
                return Ok(ring);
            }
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => last = e,
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

fn try_setup(entries: u32, completions: u32, flags: &[Feature], options: &Options) -> io::Result<IoUring> {
    if flags.iter().any(|f| options.refuse.contains(f)) {
        return Err(invalid());
    }
    let mut builder = IoUring::builder();
    builder.setup_cqsize(completions).setup_clamp().setup_r_disabled();
    for flag in flags {
        match flag {
            Feature::SubmitAll => builder.setup_submit_all(),
            Feature::SingleIssuer => builder.setup_single_issuer(),
            // The flag says when a completion is only an enter away.
            Feature::DeferTaskrun => builder.setup_defer_taskrun().setup_taskrun_flag(),
            Feature::NoSqArray => builder.setup_no_sqarray(),
            Feature::EnterTimeout | Feature::RegisteredRing | Feature::FixedFiles => &mut builder,
        };
    }
    builder.build(entries)
}

/// Enables a ring, for nothing but what this file does with it: whatever runs in this process later, the ring opens,
/// connects and receives nothing. `fixed`: all operations are on its own file table.
fn restrict(ring: &IoUring, fixed: bool) -> io::Result<()> {
    const OPERATIONS: [u8; 10] = [
        opcode::Read::CODE,
        opcode::ReadFixed::CODE,
        opcode::Readv::CODE,
        opcode::Write::CODE,
        opcode::WriteFixed::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::PollAdd::CODE,
        opcode::PollRemove::CODE,
    ];
    /// IORING_{UNREGISTER_BUFFERS, REGISTER_FILES_UPDATE}.
    const REGISTRATIONS: [u8; 2] = [1, 6];
    /// IORING_REGISTER_CLONE_BUFFERS, Linux 6.12.
    const CLONE_BUFFERS: u8 = 30;
    // A kernel refuses a list with a number that it does not know. The oldest last: IORING_OP_URING_CMD is of Linux 5.19.
    let mut known = 2;
    loop {
        let newer = [Restriction::sqe_op(opcode::UringCmd16::CODE), Restriction::register_op(CLONE_BUFFERS)];
        let mut all: Vec<Restriction> = OPERATIONS.map(Restriction::sqe_op).into();
        all.extend(REGISTRATIONS.map(Restriction::register_op));
        all.extend(newer.into_iter().take(known));
        let own_table = squeue::Flags::FIXED_FILE.bits();
        all.push(Restriction::sqe_flags_allowed(own_table));
        if fixed {
            all.push(Restriction::sqe_flags_required(own_table));
        }
        match ring.submitter().register_restrictions(&mut all) {
            Ok(()) => return ring.submitter().register_enable_rings(),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && known > 0 => known -= 1,
            Err(e) => return Err(e),
        }
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
        let entry = if self.fixed { on!(Fixed(place)) } else { on!(Fd(fd)) };
        self.in_flight += 1;
        self.stage(&entry.user_data(user_data(KIND_IO, 0, io.slot.0)));
    }

    fn set_pulse(&mut self, pulse: Arc<Pulse>) {
        self.pulse = Some(pulse);
    }

    fn watch(&mut self, token: Token, fd: BorrowedFd<'_>) -> io::Result<()> {
        let fixed = self.fixed;
        let at = u32::from(token.0) + TOKENS;
        let poll = self.polls.get_mut(usize::from(token.0)).ok_or_else(invalid)?;
        if fixed {
            self.ring.submitter().register_files_update(at, &[fd.as_raw_fd()])?;
        }
        poll.fd = fd.as_raw_fd();
        poll.epoch = poll.epoch.wrapping_add(1);
        poll.watched = true;
        self.arm(token);
        Ok(())
    }

    fn unwatch(&mut self, token: Token) {
        let Some(poll) = self.polls.get_mut(usize::from(token.0)) else { return };
        if !std::mem::take(&mut poll.watched) {
            return;
        }
        let old = user_data(KIND_POLL, poll.epoch, token.0);
        poll.epoch = poll.epoch.wrapping_add(1);
        self.ended.retain(|t| *t != token);
        let remove = opcode::PollRemove::new(old).build();
        // It has no file; a ring that takes operations on its own table alone asks for the flag all the same.
        let remove = if self.fixed { remove.flags(squeue::Flags::FIXED_FILE) } else { remove };
        self.stage(&remove.user_data(KIND_NONE << 32));
        // The removal must be in the kernel before the descriptor is closed.
        if let Err(e) = self.submit(0, None) {
            tracing::error!("io_uring_enter: {e}");
        }
        if self.fixed {
            let at = u32::from(token.0) + TOKENS;
            if let Err(e) = self.ring.submitter().register_files_update(at, &[-1]) {
                tracing::warn!("cannot clear entry {at} of the ring's file table: {e}");
            }
        }
    }

    fn pin(&mut self, memory: Option<&Pins>) {
        // From here on nothing is looked up in the old table: its addresses may
        // soon be another mapping's, and a registered page stays what it was.
        self.pinned.clear();
        // What is staged names buffers of the old table; the kernel looks when it
        // is submitted.
        if let Err(e) = self.submit(0, None) {
            tracing::error!("io_uring_enter: {e}");
        }
        if self.staged > 0 {
            return; // the kernel takes nothing now: unpinned until the next table
        }
        if std::mem::take(&mut self.registered)
            && let Err(e) = self.ring.submitter().unregister_buffers()
        {
            tracing::warn!("cannot let go of pinned memory: {e}");
        }
        let Some(pins) = memory.filter(|p| !p.buffers().is_empty()) else { return };
        match sys::uring_clone_buffers(self.ring.as_raw_fd(), pins.fd()) {
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
        for at in 0..self.ended.len() {
            if let Some(&token) = self.ended.get(at) {
                self.arm(token);
            }
        }
        self.ended.clear();
        let have = !self.done.is_empty() || !self.ring.completion().is_empty();
        if self.staged == 0 && (have || wait == Wait::No && !self.has_work()) {
            return Ok(()); // what is there first; no system call for it
        }
        match wait {
            Wait::For(time) if self.has_timeout && !have => self.submit(1, Some(time)),
            Wait::For(time) if !have => {
                self.submit(0, None)?;
                std::thread::park_timeout(time.min(LOOK_EVERY));
                Ok(())
            }
            _ => self.submit(u32::from(wait == Wait::Yes && !have), None),
        }
    }

    fn reap(&mut self, mut each: impl FnMut(Event)) {
        self.done.drain(..).for_each(|done| each(Event::Done(done)));
        for cqe in self.ring.completion() {
            let data = cqe.user_data();
            let index = u16::try_from(data & 0xffff).unwrap_or(0);
            match data >> 32 {
                KIND_IO => {
                    self.in_flight -= 1;
                    let result = u64::try_from(cqe.result()).map_err(|_| -cqe.result());
                    let outcome = Outcome::of_handed_over(result);
                    each(Event::Done(Done { slot: Slot(index), outcome }));
                }
                KIND_POLL => {
                    let Some(poll) = self.polls.get(usize::from(index)) else { continue };
                    if !poll.watched || u64::from(poll.epoch) != data >> 16 & 0xffff {
                        continue;
                    }
                    if !cqueue::more(cqe.flags()) {
                        self.ended.push(Token(index));
                    }
                    each(Event::Ready(Token(index)));
                }
                _ => {}
            }
        }
    }
}

impl Drop for Uring {
    /// Waits for what is running: the memory belongs to others afterwards.
    fn drop(&mut self) {
        while self.in_flight > 0 {
            if let Err(e) = self.submit(1, None) {
                tracing::error!("io_uring_enter: {e}");
                std::process::abort(); // better than memory that changes by itself
            }
            self.reap(|_| ());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What runs in this process in place of us gets nothing else out of the ring.
    #[test]
    fn a_ring_refuses_what_the_engine_does_not_do() {
        let file = || std::fs::File::open("/proc/self/exe").expect("a file");
        let files = Arc::new(Files { disk: file(), cached: None, witness: Arc::new(file()) });
        let mut engine = match Uring::new(files, 4, 4, &Options::default()) {
            Ok(engine) => engine,
            Err(e) => return eprintln!("SKIPPED a_ring_refuses_what_the_engine_does_not_do: {e}"),
        };
        let path = c"/dev/null".as_ptr();
        let own = squeue::Flags::FIXED_FILE;
        let refused = [
            opcode::Nop::new().build().flags(own),
            opcode::OpenAt::new(Fd(libc::AT_FDCWD), path).build(),
            opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build().flags(own),
            // Of our kind, but on a file that is not in the ring's table.
            opcode::Fsync::new(Fd(engine.files.disk.as_raw_fd())).build(),
        ];
        for (data, entry) in (1..).zip(refused) {
            // SAFETY: the only address is that of a string that lives as long as the program.
            unsafe { engine.ring.submission().push(&entry.user_data(data)) }.expect("room");
            engine.ring.submit_and_wait(1).expect("io_uring_enter");
            let done = engine.ring.completion().next().expect("a completion");
            assert_eq!((done.user_data(), done.result()), (data, -libc::EACCES));
        }
    }
}
