//! Engines: how operations on the disk are submitted and waited for.
//!
//! What it is: one trait and its values. [`uring`] is the real one, [`threads`]
//! stands in where io_uring is forbidden, [`inline`] is put around either where
//! the disk is memory, [`null`] does nothing, for measuring everything else.
//!
//! What it is not: an engine knows no guest address, no request and no ring. It
//! moves bytes between addresses of this process and one file.
//!
//! Invariants: the kernel only sees memory that a slot keeps alive; a slot has
//! at most one operation running, and is free only after its [`Done`]. An
//! engine that is dropped waits for what it has submitted.
//!
//! ```text
//!   queue(Io) … queue(Io)   staged, no system call
//!   enter(Wait)             one system call: submit all, and maybe sleep
//!   reap(|Event|)           what is done, and which eventfds were written
//! ```

mod eventfds;
pub mod inline;
pub mod null;
pub mod threads;
pub mod uring;

use std::io;
use std::os::fd::BorrowedFd;

/// Index into the fixed table of requests in flight of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(pub u16);

/// An eventfd that the engine watches: a kick, or the worker's own wake-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(pub u16);

/// What to do with the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// preadv.
    Read,
    /// pwritev; `dsync`: durable when done (RWF_DSYNC).
    Write {
        /// RWF_DSYNC.
        dsync: bool,
    },
    /// fdatasync.
    Sync,
    /// fallocate with these mode bits.
    Fallocate(i32),
}

/// One operation. It has no lifetime because the kernel has none: see
/// [`Engine::queue`].
#[derive(Clone, Copy, Debug)]
pub struct Io {
    /// Comes back in the [`Done`].
    pub slot: Slot,
    /// What to do.
    pub op: Op,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes; what the iovecs add up to, or the length of a fallocate.
    pub len: u64,
    /// The buffers, as many as `iovec_count`; unused by `Sync` and `Fallocate`.
    pub iovecs: *const libc::iovec,
    /// Number of buffers, 1 to [`crate::pages::MAX_IOVECS`].
    pub iovec_count: u32,
}

/// An operation ended: bytes transferred (0 for those that move none), or errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Whose operation.
    pub slot: Slot,
    /// How it ended.
    pub result: Result<u64, i32>,
}

/// What [`Engine::reap`] gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An operation ended.
    Done(Done),
    /// A watched eventfd was written, or may have been.
    Ready(Token),
}

/// Whether [`Engine::enter`] may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Submit and look.
    No,
    /// Submit, and sleep until there is an event.
    Yes,
}

/// Submits operations in batches and reports what happens.
pub trait Engine {
    /// Stages one operation. Never fails: there is room for one operation of
    /// every slot.
    ///
    /// # Safety
    /// The iovecs and the memory they name must stay as they are until the
    /// slot's [`Done`] was reaped or the engine was dropped.
    #[expect(unsafe_code, reason = "the kernel is given addresses that outlive the call")]
    unsafe fn queue(&mut self, io: Io);

    /// Watches an eventfd: each write to it makes an [`Event::Ready`]. Its
    /// counter is never read. A count that is there already is an event too.
    ///
    /// # Errors
    /// When the fd cannot be polled.
    fn watch(&mut self, token: Token, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Stops watching; no event of the token comes any more.
    fn unwatch(&mut self, token: Token);

    /// Submits what is staged and, with [`Wait::Yes`], sleeps for an event.
    ///
    /// # Errors
    /// Only what no retry can cure.
    fn enter(&mut self, wait: Wait) -> io::Result<()>;

    /// Gives every event that is there.
    fn reap(&mut self, each: impl FnMut(Event));

    /// The memory that most operations will name, pinned by `--pin-memory`, in
    /// place of what was; `None`: none is.
    fn pin(&mut self, _memory: Option<&uring::pins::Pins>) {}

    /// Longest operation that adjacent requests may be joined to, bytes: what
    /// disks take in one command.
    fn max_joined(&self) -> u64 {
        1 << 20
    }

    /// Chains to take from a queue, of so many that it has, before the others have
    /// their turn and the driver is shown what is done.
    fn chains(&self, _offered: u16) -> u16 {
        64
    }

    /// Operations to make for one queue before they are submitted, with so many
    /// requests in flight. One more may be held back to be joined with others.
    fn batch(&self, _in_flight: usize) -> usize {
        usize::MAX
    }

    /// True if operations are this thread's own work, and nothing goes on while
    /// it tells the driver of what is done.
    fn is_inline(&self) -> bool {
        false
    }
}
