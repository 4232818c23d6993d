//! A request as it is carried out: a machine that says what to do next.
//!
//! What it is: pure. [`Op::begin`] takes a decoded command, [`Op::step`] takes what
//! happened, and both answer with the one [`Action`] that comes next. Every special
//! case of a request is here and in [`transfer`]: misaligned buffers, blocks larger than
//! sectors, the end of an odd file, short transfers, errors, zeroes by three means,
//! durability.
//!
//! What it is not: it reads no ring, submits nothing and touches no memory: the
//! [`crate::worker`] carries its actions out, one at a time, and the tests do so with
//! a byte array.
//!
//! Invariants: a request ends with [`Status::Ok`] only if every byte was moved, and only
//! after [`crate::durability`] said so where it must be durable. It waits for pool pages
//! with no pool pages, and for a range with no range: a wait never holds what another one
//! needs.
//!
//! ```text
//!   disk blocks   ├────────┼────────┼────────┼────────┼───────┤ file ends here
//!   a write           ▒▒▒▒▒ ▒▒▒▒▒▒▒▒ ▒▒▒▒▒▒▒▒ ▒▒▒▒▒▒▒▒ ▒▒▒▒
//!   pieces            Modify Direct ───────── Bounce   Direct, through the page cache
//!
//!   Direct   the guest's own pages          Modify   one block is read, changed and written
//!   Bounce   pages of the pool, whole blocks
//!
//!   WRITE_ZEROES   ├ edge ┼──── whole units of fallocate ────┼ edge ┤
//!                   written    punched, or zeroed, or written   written
//! ```

pub mod action;
mod transfer;

// cargo-fuzz sets `fuzzing`.
#[cfg(any(test, fuzzing))]
pub mod tests;

use self::action::{Action, Buffer, Copy, Failure, Input, Need, Submit};
use self::transfer::{Ask, Io, MAX_BYTES, Step, Transfer, What};
use crate::backing::Backing;
use crate::complete::Status;
use crate::engine::{Kind, Outcome, Target};
use crate::pages::PageArray;
use crate::request::{Command, Ranges};

/// Bytes of the longest request that begins on the short way, [`Op::begin_plain`].
pub const MAX_PLAIN: u64 = 2 << 20;
const _: () = assert!(MAX_PLAIN <= MAX_BYTES);

/// Attempts in a row that move nothing before a request fails.
const MAX_ATTEMPTS: u8 = 16;

/// What a request is carried out against: what the machine looks at and never changes.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// How the disk wants to be spoken to.
    pub backing: &'a Backing,
    /// The request's payload.
    pub pages: &'a PageArray,
    /// Its ranges, if it is a DISCARD or a WRITE_ZEROES.
    pub ranges: &'a Ranges,
    /// The cache mode now: a write must be durable before it is answered.
    pub write_through: bool,
    /// What is changed has to be locked first, where blocks can be modified at all.
    pub locks: bool,
    /// Bytes of one chunk of the pool; a multiple of the backing's block.
    pub chunk: u64,
}

/// What makes whole units of a WRITE_ZEROES read as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Means {
    /// FALLOC_FL_PUNCH_HOLE: the blocks are given back.
    Punch,
    /// FALLOC_FL_ZERO_RANGE: the blocks stay allocated.
    ZeroRange,
    /// Zeroes are written.
    Write,
}

impl Means {
    /// These, or the next ones that the disk is not known to refuse.
    fn or_next(self, backing: &Backing) -> Self {
        match self {
            Self::Punch if backing.may_punch() => self,
            Self::Punch | Self::ZeroRange if backing.may_zero_range() => Self::ZeroRange,
            _ => Self::Write,
        }
    }
}

/// What a request does, with all that it has to remember of it.
#[derive(Clone, Copy, Debug)]
enum Course {
    Read(Transfer),
    Write(Transfer),
    Flush,
    GetId,
    /// `len` bytes from `at` on are left of a range; range number `next` comes after it.
    Discard {
        next: usize,
        at: u64,
        len: u64,
    },
    /// The same; whole units become zeroes by `means`, edges are written.
    Zero {
        next: usize,
        range: Transfer,
        means: Means,
    },
}

/// What a request has written so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Written {
    Nothing,
    /// With RWF_DSYNC: durable, if the judgement on it says so.
    WithDsync,
    /// Durable only after an fdatasync.
    Volatile,
}

/// A request that is being carried out.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    course: Course,
    written: Written,
    /// Attempts in a row that moved nothing.
    attempts: u8,
    /// The next attempt is made on the worker's own thread: the last one was not executed.
    own_thread: bool,
    /// The kernel refused the guest's pages: all goes through the pool.
    bounce: bool,
    /// It was joined with others, in vain.
    must_go_alone: bool,
    /// The range that is worked on is locked.
    holds_range: bool,
}

impl Op {
    /// Of a slot in which no request is.
    pub const IDLE: Self = Self {
        course: Course::Flush,
        written: Written::Nothing,
        attempts: 0,
        own_thread: false,
        bounce: false,
        must_go_alone: false,
        holds_range: false,
    };

    /// Begins a request of which nothing was done yet.
    #[must_use]
    pub fn begin(command: Command, cx: Context<'_>) -> (Self, Action) {
        let course = match command {
            Command::Read(at) => Course::Read(Transfer::new(at, cx.pages.len())),
            Command::Write(at) => Course::Write(Transfer::new(at, cx.pages.len())),
            Command::Flush => Course::Flush,
            Command::GetId => Course::GetId,
            Command::Discard => Course::Discard { next: 0, at: 0, len: 0 },
            Command::WriteZeroes => Course::Zero { next: 0, range: Transfer::new(0, 0), means: Means::Write },
        };
        let mut op = Self { course, ..Self::IDLE };
        let action = op.next(cx);
        (op, action)
    }

    /// The same for what nearly every request is: a read or a write of whole blocks, whose
    /// pages the disk takes as they are. `None`: it is something else, for [`Op::begin`].
    #[inline]
    #[must_use]
    pub fn begin_plain(command: Command, cx: Context<'_>) -> Option<(Self, Submit)> {
        let (Command::Read(offset) | Command::Write(offset)) = command else { return None };
        let (len, mask) = (cx.pages.len(), cx.backing.block - 1);
        let fits = cx.pages.is_direct(cx.backing.mem_align(), cx.backing.block)
            && (offset | len) & mask == 0
            && len.wrapping_sub(1) < MAX_PLAIN
            && offset + len <= cx.backing.tail();
        let writes = !matches!(command, Command::Read(_));
        if !fits || writes && (cx.write_through || cx.locks) {
            return None;
        }
        let transfer = Transfer { at: offset, len, done: 0, step: Step::Direct(len) };
        let (course, kind, written) = if writes {
            (Course::Write(transfer), Kind::Write { dsync: false }, Written::Volatile)
        } else {
            (Course::Read(transfer), Kind::Read, Written::Nothing)
        };
        let submit = Submit {
            target: Target::Disk,
            kind,
            offset,
            len,
            buffer: Buffer::Guest(0),
            own_thread: false,
            joinable: true,
        };
        Some((Self { course, written, holds_range: writes, ..Self::IDLE }, submit))
    }

    /// True if a request ended well with an operation that moved `bytes`: it was the only one,
    /// and moved all. [`Op::step`] says what is to be done otherwise.
    #[inline]
    #[must_use]
    pub fn is_done_by(&self, bytes: u64, write_through: bool) -> bool {
        let (Course::Read(t) | Course::Write(t)) = &self.course else { return false };
        t.step == Step::Direct(bytes)
            && bytes == t.left()
            && !(write_through && self.written != Written::Nothing)
    }

    /// Goes on after something happened.
    pub fn step(&mut self, input: Input, cx: Context<'_>) -> Action {
        match input {
            Input::Ended(Outcome::Moved(bytes)) => match self.transfer() {
                Some((transfer, what)) => {
                    let ask = transfer.moved(what, bytes, cx);
                    self.answer(ask, cx)
                }
                None => self.discarded(cx),
            },
            Input::Ended(Outcome::NotExecuted(errno)) => self.not_executed(errno, cx),
            Input::Ended(Outcome::Failed(errno)) => self.failed(errno, cx),
            Input::Apart => {
                self.must_go_alone = true;
                self.next(cx)
            }
            Input::Pool(bytes) => {
                let Some((transfer, what)) = self.transfer() else { return self.next(cx) };
                let ask = transfer.pool(what, bytes, cx);
                self.answer(ask, cx)
            }
            Input::Range => {
                self.holds_range = true;
                self.next(cx)
            }
            Input::Copied(true) => {
                let Some((transfer, _)) = self.transfer() else { return Action::Finish(Status::Ok) };
                let ask = transfer.copied(cx);
                self.answer(ask, cx)
            }
            Input::Durable(true) => Action::Finish(Status::Ok),
            Input::Again => self.next(cx),
            Input::Copied(false) | Input::Durable(false) => Action::Finish(Status::IoErr),
        }
    }

    /// The request failed and is held: its range is unlocked, and [`Input::Again`] begins anew with the piece that
    /// failed.
    pub fn let_go(&mut self) {
        self.made_progress();
        self.holds_range = false;
    }

    /// How many bytes of its payload a request that ended well has filled.
    #[inline]
    #[must_use]
    pub fn filled(&self, pages: &PageArray) -> u64 {
        match &self.course {
            Course::Read(_) | Course::GetId => pages.len(),
            _ => 0,
        }
    }

    /// The blocks that the request changes, once it may: `[start, end)`, bytes. `None`: none
    /// yet, or none that another request could have to modify.
    #[must_use]
    pub fn changing(&self, backing: &Backing) -> Option<(u64, u64)> {
        if self.holds_range { self.range(backing) } else { None }
    }

    /// The blocks that it is to change.
    fn range(&self, backing: &Backing) -> Option<(u64, u64)> {
        let (at, len) = match &self.course {
            Course::Write(t) | Course::Zero { range: t, .. } => (t.at, t.len),
            Course::Discard { at, len, .. } => (*at, *len),
            Course::Read(_) | Course::Flush | Course::GetId => return None,
        };
        let block = backing.block;
        (len > 0).then(|| (at / block * block, (at + len).next_multiple_of(block)))
    }

    /// The byte of the disk that it is at.
    fn offset(&self) -> u64 {
        match &self.course {
            Course::Read(t) | Course::Write(t) | Course::Zero { range: t, .. } => t.offset(),
            Course::Discard { at, .. } => *at,
            Course::Flush | Course::GetId => 0,
        }
    }

    /// The transfer that is under way, and what it moves.
    fn transfer(&mut self) -> Option<(&mut Transfer, What)> {
        let bounce = self.bounce;
        match &mut self.course {
            Course::Read(t) => Some((t, What::Read { bounce })),
            Course::Write(t) => Some((t, What::Write { bounce })),
            Course::Zero { range, .. } => Some((range, What::Zeroes)),
            Course::Flush | Course::GetId | Course::Discard { .. } => None,
        }
    }

    /// Finds what comes next when nothing is under way.
    fn next(&mut self, cx: Context<'_>) -> Action {
        match &mut self.course {
            Course::Flush if cx.backing.read_only => Action::Finish(Status::Ok),
            Course::Flush => Action::Need(Need::Sync),
            Course::GetId => Action::Copy(Copy::Serial),
            Course::Read(t) | Course::Write(t) if t.left() == 0 => self.settle(cx),
            Course::Read(t) => {
                let left = t.left();
                self.next_piece(left, cx)
            }
            Course::Write(t) => {
                let left = t.left();
                self.lock(cx).unwrap_or_else(|| self.next_piece(left, cx))
            }
            Course::Discard { .. } => self.discard(cx),
            Course::Zero { .. } => self.zero(cx),
        }
    }

    /// The next piece of the first `limit` bytes of a transfer.
    fn next_piece(&mut self, limit: u64, cx: Context<'_>) -> Action {
        let Some((transfer, what)) = self.transfer() else { return Action::Finish(Status::IoErr) };
        let ask = transfer.next(what, limit, cx);
        self.answer(ask, cx)
    }

    /// Does for a transfer what it asks for.
    fn answer(&mut self, ask: Ask, cx: Context<'_>) -> Action {
        match ask {
            Ask::Io(io) => self.submit(io, cx),
            Ask::Pool(bytes) => Action::Need(Need::Pool(bytes)),
            Ask::Copy(copy) => Action::Copy(copy),
            Ask::Done(bytes) => {
                if let Some((transfer, _)) = self.transfer() {
                    transfer.done += bytes;
                }
                self.made_progress();
                self.next(cx)
            }
            // Less than can be gone on with is tried again; nothing at all is the end of a disk
            // that was truncated.
            Ask::Short(0) => Action::Fail(Failure::Truncated(self.offset())),
            Ask::Short(_) if self.may_try_again() => self.next(cx),
            Ask::Short(_) => self.fail(libc::EIO),
        }
    }

    /// Every change of a disk whose blocks are larger than a sector locks what it changes.
    /// `None`: that is done, or need not be.
    fn lock(&self, cx: Context<'_>) -> Option<Action> {
        if self.holds_range || !cx.backing.can_modify() {
            return None;
        }
        let (start, end) = self.range(cx.backing)?;
        let modifies = match &self.course {
            Course::Write(t) | Course::Zero { range: t, .. } => (t.at | t.len) % cx.backing.block != 0,
            _ => false,
        };
        Some(Action::Need(Need::Range { start, end, modifies }))
    }

    /// The next operation of a DISCARD: whole units only; what is beside them stays.
    fn discard(&mut self, cx: Context<'_>) -> Action {
        let unit = cx.backing.discard_unit;
        let Course::Discard { next, at, len } = &mut self.course else {
            return Action::Finish(Status::IoErr);
        };
        // Another request may have found that out while this one waited for its range.
        if !cx.backing.may_discard() {
            return Action::Finish(Status::Ok);
        }
        while *len == 0 {
            self.holds_range = false;
            let Some(range) = cx.ranges.get(*next) else {
                return Action::Finish(Status::Ok);
            };
            *next += 1;
            *at = range.offset.next_multiple_of(unit);
            *len = ((range.offset + range.len) / unit * unit).saturating_sub(*at);
        }
        let (at, len) = (*at, discard_bytes(*len, cx));
        if cx.backing.is_device && cx.backing.discards_by_call() {
            self.own_thread = true;
        }
        let punch = Kind::Fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
        let kind = if cx.backing.is_device { Kind::Discard } else { punch };
        self.lock(cx).unwrap_or_else(|| self.submit_metadata(kind, at, len))
    }

    /// An operation of a DISCARD ended well.
    fn discarded(&mut self, cx: Context<'_>) -> Action {
        if let Course::Discard { at, len, .. } = &mut self.course {
            let done = discard_bytes(*len, cx);
            (*at, *len) = (*at + done, *len - done);
        }
        self.made_progress();
        self.next(cx)
    }

    /// The next operation of a WRITE_ZEROES: whole units by fallocate, if that can, and edges,
    /// or all, written.
    fn zero(&mut self, cx: Context<'_>) -> Action {
        if !self.load_zero_range(cx) {
            return self.settle(cx);
        }
        if let Some(wait) = self.lock(cx) {
            return wait;
        }
        let Course::Zero { range, means, .. } = &mut self.course else {
            return Action::Finish(Status::IoErr);
        };
        let (offset, left, unit) = (range.offset(), range.left(), cx.backing.fallocate_align);
        let edge = offset.next_multiple_of(unit) - offset;
        let whole_units = left.saturating_sub(edge) / unit * unit;
        // Another request may have found out what the disk refuses while this one waited for its range.
        *means = means.or_next(cx.backing);
        let mode = match means {
            Means::Punch => libc::FALLOC_FL_PUNCH_HOLE,
            Means::ZeroRange => libc::FALLOC_FL_ZERO_RANGE,
            Means::Write => return self.next_piece(left, cx),
        };
        if whole_units == 0 {
            return self.next_piece(left, cx);
        }
        if edge > 0 {
            return self.next_piece(edge, cx);
        }
        let len = whole_units.min(MAX_BYTES);
        range.step = Step::Allocate(len);
        self.written = Written::Volatile;
        self.submit_metadata(Kind::Fallocate(mode | libc::FALLOC_FL_KEEP_SIZE), offset, len)
    }

    /// Makes the next range of a WRITE_ZEROES the current one, if that is done. False: all are.
    fn load_zero_range(&mut self, cx: Context<'_>) -> bool {
        let Course::Zero { next, range, means } = &mut self.course else { return false };
        if range.left() > 0 {
            return true;
        }
        self.holds_range = false;
        let Some(of_guest) = cx.ranges.get(*next) else { return false };
        *next += 1;
        *range = Transfer::new(of_guest.offset, of_guest.len);
        *means = if of_guest.unmap { Means::Punch } else { Means::ZeroRange };
        true
    }

    /// All bytes are moved: answer, or have them made durable first.
    fn settle(&self, cx: Context<'_>) -> Action {
        match self.written {
            Written::Volatile if cx.write_through => Action::Need(Need::Sync),
            Written::WithDsync if cx.write_through => Action::Need(Need::Judgement),
            _ => Action::Finish(Status::Ok),
        }
    }

    /// Bytes were moved: whatever made earlier attempts fail is over.
    fn made_progress(&mut self) {
        (self.attempts, self.own_thread) = (0, false);
    }

    fn may_try_again(&mut self) -> bool {
        self.attempts += 1;
        self.attempts <= MAX_ATTEMPTS
    }

    /// Nothing was tried: there was no room, no thread, or a signal came. It says nothing of the
    /// disk; the worker's own thread needs none of them.
    fn not_executed(&mut self, errno: i32, cx: Context<'_>) -> Action {
        self.own_thread = true;
        if self.may_try_again() { self.next(cx) } else { self.fail(errno) }
    }

    /// What follows an operation that was tried and failed, by what it was and why:
    ///
    /// | operation | EOPNOTSUPP, ENOTTY, ENOSYS | EINVAL | else |
    /// |---|---|---|---|
    /// | discard | not tried again, done | this range is done | I/O error |
    /// | zeroes by fallocate | by the next means, from now on | by the next means | I/O error |
    /// | on the guest's pages | I/O error | through the pool, once | I/O error |
    /// | any other | I/O error | I/O error | I/O error |
    fn failed(&mut self, errno: i32, cx: Context<'_>) -> Action {
        let unknown = matches!(errno, libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS);
        let refused = unknown || errno == libc::EINVAL;
        match &mut self.course {
            Course::Discard { .. } if refused && cx.backing.is_device && !self.own_thread => {
                cx.backing.discard_by_call();
            }
            Course::Discard { len, .. } if refused => {
                if unknown {
                    cx.backing.cannot_discard();
                }
                *len = 0;
                self.made_progress();
            }
            Course::Zero { means, range: Transfer { step: Step::Allocate(_), .. }, .. } if refused => {
                match (*means, unknown) {
                    (Means::Punch, true) => cx.backing.cannot_punch(),
                    (Means::ZeroRange, true) => cx.backing.cannot_zero_range(),
                    _ => {}
                }
                *means = if *means == Means::Punch { Means::ZeroRange } else { Means::Write };
            }
            // The buffer may not fit; the page cache takes any.
            Course::Read(t @ Transfer { step: Step::Direct(_), .. })
            | Course::Write(t @ Transfer { step: Step::Direct(_), .. })
                if errno == libc::EINVAL && !self.bounce && t.offset() < cx.backing.tail() =>
            {
                self.bounce = true;
                cx.backing.raise_mem_align();
            }
            _ => return self.fail(errno),
        }
        self.next(cx)
    }

    fn fail(&self, errno: i32) -> Action {
        Action::Fail(Failure::Errno(errno, self.offset()))
    }

    fn submit(&mut self, io: Io, cx: Context<'_>) -> Action {
        let kind = if io.reads {
            Kind::Read
        } else {
            let dsync = cx.write_through && cx.backing.dsync && io.target == Target::Disk;
            self.written = self.written.max(if dsync { Written::WithDsync } else { Written::Volatile });
            Kind::Write { dsync }
        };
        let Io { target, offset, len, buffer, .. } = io;
        let whole = buffer == Buffer::Guest(0) && len == cx.pages.len();
        let joinable = whole && !self.must_go_alone && !self.own_thread;
        Action::Submit(Submit { target, kind, offset, len, buffer, own_thread: self.own_thread, joinable })
    }

    fn submit_metadata(&self, kind: Kind, offset: u64, len: u64) -> Action {
        Action::Submit(Submit {
            target: Target::Disk,
            kind,
            offset,
            len,
            buffer: Buffer::Nothing,
            own_thread: self.own_thread,
            joinable: false,
        })
    }
}

/// How much of a DISCARD goes in one operation: less where the worker's other requests wait
/// for it.
fn discard_bytes(left: u64, cx: Context<'_>) -> u64 {
    const BY_CALL: u64 = 16 << 20;
    let by_call = cx.backing.is_device && cx.backing.discards_by_call();
    left.min(if by_call { BY_CALL } else { MAX_BYTES })
}
