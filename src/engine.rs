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
pub mod nbd;
pub mod null;
pub mod rbd;
pub mod threads;
pub mod uring;

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::pulse::Pulse;

/// Index into the fixed table of requests in flight of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(pub u16);

/// An eventfd that the engine watches: a kick, or the worker's own wake-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(pub u16);

/// What to do with the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
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
    /// BLKDISCARD.
    Discard,
}

impl Kind {
    /// True if it makes something durable, so that its outcome has to be judged.
    #[inline]
    #[must_use]
    pub fn is_durable(self) -> bool {
        matches!(self, Self::Sync | Self::Write { dsync: true })
    }
}

/// Which open file description of the disk an operation goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The worker's own.
    Disk,
    /// The same file through the page cache.
    Cached,
}

/// The open file descriptions that an engine works on.
#[derive(Debug)]
pub struct Files {
    /// One worker's own: Linux reports a lost write once for each description.
    pub disk: File,
    /// Through the page cache, where the disk is not; `None`: no operation names it.
    pub cached: Option<Arc<File>>,
    /// A description on which no worker's first attempt is made: should one that seemed not
    /// to have been tried have used up an error, the second attempt still meets it here.
    pub witness: Arc<File>,
}

impl Files {
    /// The description that an operation goes to.
    #[must_use]
    pub fn of(&self, io: &Io) -> &File {
        match io.target {
            Target::Disk if io.own_thread && io.kind.is_durable() => &self.witness,
            Target::Disk => &self.disk,
            Target::Cached => self.cached.as_deref().unwrap_or(&self.disk),
        }
    }
}

/// One operation. It has no lifetime because the kernel has none: see
/// [`Engine::queue`].
#[derive(Clone, Copy, Debug)]
pub struct Io {
    /// Comes back in the [`Done`].
    pub slot: Slot,
    /// What to do.
    pub kind: Kind,
    /// Where to.
    pub target: Target,
    /// On the thread that calls [`Engine::queue`], before that returns: earlier it could not
    /// be started elsewhere.
    pub own_thread: bool,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes; what the iovecs add up to, or the length of a fallocate.
    pub len: u64,
    /// The buffers, as many as `iovec_count`; unused by those that move nothing.
    pub iovecs: *const libc::iovec,
    /// Number of buffers, 1 to [`crate::pages::MAX_IOVECS`].
    pub iovec_count: u32,
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Well; so many bytes were transferred, 0 by those that move none.
    Moved(u64),
    /// Nothing was tried: there was no thread, no memory or no room, or a signal came. It
    /// says nothing of the disk.
    NotExecuted(i32),
    /// It was tried; this errno.
    Failed(i32),
}

impl Outcome {
    /// Of an operation that was handed to another thread or to the kernel's.
    #[inline]
    #[must_use]
    pub fn of_handed_over(result: Result<u64, i32>) -> Self {
        match result {
            Ok(bytes) => Self::Moved(bytes),
            // io_uring(7): ECANCELED when no worker thread could be made, ENOMEM and EAGAIN
            // when the request itself could not be.
            Err(errno @ (libc::ECANCELED | libc::EAGAIN | libc::ENOMEM | libc::EINTR)) => {
                Self::NotExecuted(errno)
            }
            Err(errno) => Self::Failed(errno),
        }
    }

    /// Of a system call that was made and returned.
    #[must_use]
    pub fn of_call(result: io::Result<u64>) -> Self {
        match result {
            Ok(bytes) => Self::Moved(bytes),
            Err(e) => Self::Failed(e.raw_os_error().unwrap_or(libc::EIO)),
        }
    }
}

/// An operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Whose operation.
    pub slot: Slot,
    /// How it ended.
    pub outcome: Outcome,
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
    /// Submit, and sleep until there is an event, or for this long; an engine may be late.
    For(Duration),
}

impl Wait {
    /// The same, but no longer than this.
    #[must_use]
    pub fn within(self, left: Option<Duration>) -> Self {
        match (self, left) {
            (Self::Yes, Some(left)) => Self::For(left),
            (Self::For(time), Some(left)) => Self::For(time.min(left)),
            (wait, _) => wait,
        }
    }
}

/// How long another machine may take for what it was asked once a queue has to stop, and nothing may be left to a later
/// daemon; and for the flush before the disk changes hands.
pub const GRACE: Duration = Duration::from_secs(10);

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

    /// Submits what is staged and, but for [`Wait::No`], sleeps for an event.
    ///
    /// # Errors
    /// Only what no retry can cure.
    fn enter(&mut self, wait: Wait) -> io::Result<()>;

    /// Gives every event that is there.
    fn reap(&mut self, each: impl FnMut(Event));

    /// The memory that most operations will name, pinned by `--pin-memory`, in
    /// place of what was; `None`: none is.
    fn pin(&mut self, _memory: Option<&uring::pins::Pins>) {}

    /// True while a queue has to stop of which nothing may be left to a later daemon: nothing waits for a server that is
    /// gone.
    fn give_up(&mut self, _given_up: bool) {}

    /// Where it marks that the worker's own thread is in a call which may take as long as the disk does.
    fn set_pulse(&mut self, _pulse: Arc<Pulse>) {}

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
