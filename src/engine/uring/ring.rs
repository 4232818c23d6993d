//! A ring of io_uring as engines use it: made by the thread that uses it, for the operations of one engine alone.
//!
//! What it is: the ring with every flag that saves work and that this kernel has, each of which falls back alone; its
//! table of files, whose first entries are the engine's; and the eventfds that it watches, as multishot polls whose
//! counters are never read.
//!
//! What it is not: it knows no operation: an engine stages entries, and reads completions by their number.
//!
//! Invariants: the submission queue has room for an operation of every slot and
//! the completion queue for all of them and all polls; should the completion
//! queue overflow all the same, a poll that ended is armed again and reported,
//! so that no eventfd goes deaf.
//!
//! ```text
//!   user_data   63        32        16         0
//!               │ kind     │ epoch   │ slot or token │     kinds: 0 polls, 1 no answer, 2 and above the engine's
//! ```
#![expect(unsafe_code, reason = "submits addresses to the kernel")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::squeue::{self, Entry};
use io_uring::types::{Fd, Fixed};
use io_uring::{IoUring, cqueue, opcode};

use crate::engine::{Token, Wait};
use crate::sys;

/// How often it is looked for completions while a time is waited for, before Linux 5.11.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// See [`Ring::enter_past`].
const PAST_THE_SURE: Duration = Duration::from_millis(1);

const KIND_POLL: u64 = 0;
/// Completions that are ignored (the answer to a POLL_REMOVE).
const KIND_NONE: u64 = 1;
/// The first kind of an engine's own.
pub const KIND_ENGINE: u64 = 2;

const POLLIN: u32 = 1;
const ENTER_GETEVENTS: u32 = 1;
const ENTER_REGISTERED_RING: u32 = 1 << 4;

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
pub struct Ring {
    ring: IoUring,
    /// The ring's descriptor, or its index among the thread's registered ones.
    enter_fd: RawFd,
    /// GETEVENTS always: with DEFER_TASKRUN it is what runs completions.
    enter_flags: u32,
    /// An enter can end at a time.
    has_timeout: bool,
    fixed: bool,
    /// Entries of the file table before those of the tokens.
    files: u32,
    polls: Box<[Poll]>,
    /// Polls that ended and are to be armed again.
    ended: Vec<Token>,
    staged: u32,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("fixed", &self.fixed)
            .field("staged", &self.staged)
            .finish_non_exhaustive()
    }
}

pub(super) fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

/// The number of a completion.
#[inline]
#[must_use]
pub fn user_data(kind: u64, epoch: u16, index: u16) -> u64 {
    kind << 32 | u64::from(epoch) << 16 | u64::from(index)
}

/// A completion of an engine's own.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// At least [`KIND_ENGINE`].
    pub kind: u64,
    /// What the entry had.
    pub index: u16,
    /// Negative: an errno.
    pub result: i32,
}

impl Ring {
    /// A ring for `slots` operations at once, all of them among `operations`, on `files` and on `tokens` eventfds. Call
    /// it on the thread that will use it.
    ///
    /// # Errors
    /// ENOSYS or EPERM where io_uring is forbidden; ENOMEM.
    pub fn new(
        slots: u16,
        files: &[RawFd],
        tokens: u16,
        operations: &[u8],
        options: &Options,
    ) -> io::Result<Self> {
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
        let count = u32::try_from(files.len()).map_err(|_| invalid())?;
        let fixed = !refused(Feature::FixedFiles)
            && ring.submitter().register_files_sparse(u32::from(tokens) + count).is_ok()
            && ring.submitter().register_files_update(0, files).is_ok();
        restrict(&ring, operations, fixed)?;
        Ok(Self {
            has_timeout: ring.params().is_feature_ext_arg() && !refused(Feature::EnterTimeout),
            ring,
            enter_fd,
            enter_flags: enter_flags | ENTER_GETEVENTS,
            fixed,
            files: count,
            polls: vec![Poll { fd: -1, epoch: 0, watched: false }; usize::from(tokens)].into_boxed_slice(),
            ended: Vec::with_capacity(usize::from(tokens)),
            staged: 0,
        })
    }

    /// Whether this process can have a ring as an engine's: io_uring may be forbidden, or the kernel be older than 5.13.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn probe(operations: &[u8]) -> io::Result<()> {
        let ring = try_setup(1, 2, &[], &Options::default())?;
        // As old as polls that stay armed, which a kernel does not tell of itself.
        if !ring.params().is_feature_resource_tagging() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel is older than 5.13"));
        }
        restrict(&ring, operations, false)
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

    /// True if operations are on entries of the file table, and on those alone.
    #[inline]
    #[must_use]
    pub fn is_fixed(&self) -> bool {
        self.fixed
    }

    /// The ring's own descriptor.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// The calls that register things.
    #[must_use]
    pub fn submitter(&self) -> io_uring::Submitter<'_> {
        self.ring.submitter()
    }

    /// Entries that the kernel has not taken yet.
    #[must_use]
    pub fn staged(&self) -> u32 {
        self.staged
    }

    /// Stages an entry.
    ///
    /// # Safety
    /// The memory that it names must stay until its completion was reaped.
    #[inline]
    pub unsafe fn stage(&mut self, entry: &Entry) {
        // SAFETY: the contract of this very function.
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
    ///
    /// # Errors
    /// Only what no retry can cure.
    pub fn submit(&mut self, min_complete: u32, time: Option<Duration>) -> io::Result<()> {
        loop {
            match sys::uring_enter(self.enter_fd, self.staged, min_complete, self.enter_flags, time) {
                Ok(taken) => {
                    self.staged -= taken.min(self.staged);
                    if self.staged == 0 {
                        return Ok(());
                    }
                }
                Err(e) => match e.raw_os_error() {
                    // The control thread signals workers that it waits for. To wait for the whole time again, each
                    // time, would be to wait for ever; the caller knows how much is left.
                    Some(libc::EINTR) if time.is_some() => return Ok(()),
                    Some(libc::EINTR) => {}
                    // Completions must be reaped first; the caller will.
                    Some(libc::EBUSY | libc::EAGAIN) => return Ok(()),
                    Some(libc::ETIME) => return Ok(()),
                    _ => return Err(e),
                },
            }
        }
    }

    /// Submits what is staged and, but for [`Wait::No`], sleeps for a completion, unless the engine has an event by itself.
    ///
    /// # Errors
    /// Only what no retry can cure.
    #[inline]
    pub fn enter(&mut self, wait: Wait, has_event: bool) -> io::Result<()> {
        for at in 0..self.ended.len() {
            if let Some(&token) = self.ended.get(at) {
                self.arm(token);
            }
        }
        self.ended.clear();
        let have = has_event || !self.ring.completion().is_empty();
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

    /// As [`Ring::enter`], where `sure` of the staged operations end as soon as the kernel has them: it sleeps for one more.
    /// Should one of them not end, it returns after [`PAST_THE_SURE`].
    ///
    /// # Errors
    /// Only what no retry can cure.
    pub fn enter_past(&mut self, sure: u32, wait: Wait, has_event: bool) -> io::Result<()> {
        let time = match wait {
            Wait::Yes => PAST_THE_SURE,
            Wait::For(time) => time.min(PAST_THE_SURE),
            Wait::No => return self.enter(wait, has_event),
        };
        if has_event || !self.has_timeout || !self.ended.is_empty() || !self.ring.completion().is_empty() {
            return self.enter(wait, has_event);
        }
        self.submit(sure + 1, Some(time))
    }

    /// Gives every completion that is there: an engine's own, or the token of an eventfd that was written.
    #[inline]
    pub fn reap(&mut self, mut each: impl FnMut(Result<Completion, Token>)) {
        for cqe in self.ring.completion() {
            let data = cqe.user_data();
            let index = u16::try_from(data & 0xffff).unwrap_or(0);
            match data >> 32 {
                kind @ KIND_ENGINE.. => each(Ok(Completion { kind, index, result: cqe.result() })),
                KIND_POLL => {
                    let Some(poll) = self.polls.get(usize::from(index)) else { continue };
                    if !poll.watched || u64::from(poll.epoch) != data >> 16 & 0xffff {
                        continue;
                    }
                    if !cqueue::more(cqe.flags()) {
                        self.ended.push(Token(index));
                    }
                    each(Err(Token(index)));
                }
                _ => {}
            }
        }
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
            opcode::PollAdd::new(Fixed(self.files + u32::from(token.0)), POLLIN).multi(true).build()
        } else {
            opcode::PollAdd::new(Fd(poll.fd), POLLIN).multi(true).build()
        };
        // SAFETY: a poll names no memory.
        unsafe { self.stage(&entry.user_data(data)) };
    }

    /// Puts a descriptor in the place of one of the engine's files; -1: none.
    ///
    /// # Errors
    /// As io_uring_register(2).
    pub fn replace_file(&mut self, at: u32, fd: RawFd) -> io::Result<()> {
        if self.fixed {
            self.ring.submitter().register_files_update(at, &[fd])?;
        }
        Ok(())
    }

    /// As [`crate::engine::Engine::watch`].
    ///
    /// # Errors
    /// When the fd cannot be polled.
    pub fn watch(&mut self, token: Token, fd: BorrowedFd<'_>) -> io::Result<()> {
        let fixed = self.fixed;
        let at = u32::from(token.0) + self.files;
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

    /// As [`crate::engine::Engine::unwatch`].
    pub fn unwatch(&mut self, token: Token) {
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
        // SAFETY: a removal names no memory.
        unsafe { self.stage(&remove.user_data(KIND_NONE << 32)) };
        // The removal must be in the kernel before the descriptor is closed.
        if let Err(e) = self.submit(0, None) {
            tracing::error!("io_uring_enter: {e}");
        }
        if self.fixed {
            let at = u32::from(token.0) + self.files;
            if let Err(e) = self.ring.submitter().register_files_update(at, &[-1]) {
                tracing::warn!("cannot clear entry {at} of the ring's file table: {e}");
            }
        }
    }
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

/// Enables a ring, for nothing but an engine's operations and what this file does with it: whatever runs in this process
/// later, the ring opens and connects nothing. `fixed`: all operations are on its own file table.
fn restrict(ring: &IoUring, operations: &[u8], fixed: bool) -> io::Result<()> {
    const OWN: [u8; 2] = [opcode::PollAdd::CODE, opcode::PollRemove::CODE];
    /// IORING_{UNREGISTER_BUFFERS, REGISTER_FILES_UPDATE}.
    const REGISTRATIONS: [u8; 2] = [1, 6];
    /// IORING_REGISTER_CLONE_BUFFERS, Linux 6.12.
    const CLONE_BUFFERS: u8 = 30;
    // A kernel refuses a list with a number that it does not know. The oldest last: IORING_OP_URING_CMD is of Linux 5.19.
    let mut known = 2;
    loop {
        let newer = [Restriction::sqe_op(opcode::UringCmd16::CODE), Restriction::register_op(CLONE_BUFFERS)];
        let old = OWN.iter().chain(operations).filter(|&&op| op != opcode::UringCmd16::CODE);
        let mut all: Vec<Restriction> = old.map(|&op| Restriction::sqe_op(op)).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What runs in this process in place of us gets nothing else out of the ring.
    #[test]
    fn a_ring_refuses_what_its_engine_does_not_do() {
        let file = std::fs::File::open("/proc/self/exe").expect("a file");
        let operations = [opcode::Fsync::CODE];
        let mut ring = match Ring::new(4, &[file.as_raw_fd()], 4, &operations, &Options::default()) {
            Ok(ring) => ring.ring,
            Err(e) => return eprintln!("SKIPPED a_ring_refuses_what_its_engine_does_not_do: {e}"),
        };
        let path = c"/dev/null".as_ptr();
        let own = squeue::Flags::FIXED_FILE;
        let refused = [
            opcode::Nop::new().build().flags(own),
            opcode::OpenAt::new(Fd(libc::AT_FDCWD), path).build(),
            opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build().flags(own),
            // Of our kind, but on a file that is not in the ring's table.
            opcode::Fsync::new(Fd(file.as_raw_fd())).build(),
        ];
        for (data, entry) in (1..).zip(refused) {
            // SAFETY: the only address is that of a string that lives as long as the program.
            unsafe { ring.submission().push(&entry.user_data(data)) }.expect("room");
            ring.submit_and_wait(1).expect("io_uring_enter");
            let done = ring.completion().next().expect("a completion");
            assert_eq!((done.user_data(), done.result()), (data, -libc::EACCES));
        }
    }
}
