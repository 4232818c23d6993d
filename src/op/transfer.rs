//! Bytes on their way between a payload, or zeroes, and the disk: one piece after another.
//!
//! What it is: pure. It cuts pieces that the disk takes, and takes each of them through its
//! steps. After every piece it is asked again with what is left: a short transfer, a payload
//! of too many parts, one larger than the pool and one that fits only in the middle are all
//! the same case.
//!
//! What it is not: it knows no error and no durability; [`super`] does.
//!
//! Invariant: a piece makes progress or says why not; none passes the end of the disk.
//!
//! ```text
//!   Direct   Direct ─────────────────────────────────────────► done
//!   Bounce   Pool ─► Fill ─► Write (a write)                 ► done
//!            Pool ─► Read ─► Deliver (a read)                ► done
//!   Modify   Pool ─► Fetch ─► Change ─► Replace              ► done
//! ```

use super::Context;
use super::action::{Buffer, Copy};
use crate::backing::Backing;
use crate::engine::Target;
use crate::pages::MAX_IOVECS;

/// Longest operation, bytes: below the kernel's MAX_RW_COUNT (2 GiB less one page) and a
/// multiple of every block; also the longest fallocate, so that a drain stays short.
pub const MAX_BYTES: u64 = 1 << 30;

/// What is moved, and which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// Disk to guest. `bounce`: the kernel refused the guest's pages.
    Read { bounce: bool },
    /// Guest to disk; likewise.
    Write { bounce: bool },
    /// Zeroes to disk.
    Zeroes,
}

impl What {
    fn reads(self) -> bool {
        matches!(self, Self::Read { .. })
    }
}

/// What a transfer asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// Read or write this.
    Io(Io),
    /// Pool pages for so many bytes.
    Pool(u64),
    /// A copy.
    Copy(Copy),
    /// Nothing: so many bytes more are done.
    Done(u64),
    /// The disk moved so few bytes that they are of no use.
    Short(u64),
}

/// A read or a write. Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Io {
    pub(super) reads: bool,
    pub(super) target: Target,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) buffer: Buffer,
}

/// `len` bytes from byte `at` of the disk on, of which `done` are done. Bytes of the payload
/// are counted alike.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    pub(super) at: u64,
    pub(super) len: u64,
    pub(super) done: u64,
    pub(super) step: Step,
}

/// What is under way. In a block, `skip` bytes come before the `take` ones that are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    Ready,
    /// An operation on the guest's pages, or zeroes, of so many bytes.
    Direct(u64),
    /// A fallocate of so many bytes.
    Allocate(u64),
    /// Pool pages are waited for, for this piece.
    Pool(Piece),
    /// They are filled with so many bytes of the guest's.
    Fill(u64),
    /// Those are written.
    Write(u64),
    /// Whole blocks are read into them.
    Read { skip: u64, take: u64 },
    /// So many bytes of those are copied to the guest.
    Deliver(u64),
    /// A block is read into them.
    Fetch { skip: u64, take: u64 },
    /// Some bytes of it are replaced.
    Change { skip: u64, take: u64 },
    /// It is written back, with so many bytes that are new.
    Replace(u64),
}

/// The next part of a transfer. Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Between the guest's pages, or zeroes, and the disk.
    Direct { target: Target, len: u64 },
    /// Whole blocks, `cover` bytes from a block boundary on, through the pool; the first
    /// `skip` of them are not wanted (by a read).
    Bounce { cover: u64, skip: u64 },
    /// `take` bytes from byte `skip` of a block on.
    Modify { skip: u64, take: u64 },
}

impl Transfer {
    pub(super) fn new(at: u64, len: u64) -> Self {
        Self { at, len, done: 0, step: Step::Ready }
    }

    /// The byte of the disk that it is at.
    pub(super) fn offset(&self) -> u64 {
        self.at + self.done
    }

    pub(super) fn left(&self) -> u64 {
        self.len - self.done
    }

    /// Begins the next piece of the first `limit` bytes that are left, more than 0.
    pub(super) fn next(&mut self, what: What, limit: u64, cx: Context<'_>) -> Ask {
        let piece = self.piece(what, limit, cx);
        let bytes = match piece {
            Piece::Direct { target, len } => {
                let buffer = if what == What::Zeroes { Buffer::Zeroes } else { Buffer::Guest(self.done) };
                self.step = Step::Direct(len);
                return Ask::Io(Io { reads: what.reads(), target, offset: self.offset(), len, buffer });
            }
            Piece::Bounce { cover, .. } => cover,
            Piece::Modify { .. } => cx.backing.block,
        };
        self.step = Step::Pool(piece);
        Ask::Pool(bytes)
    }

    /// Cuts the next piece.
    fn piece(&self, what: What, limit: u64, cx: Context<'_>) -> Piece {
        let Backing { block, .. } = *cx.backing;
        let mem_align = cx.backing.mem_align();
        let (offset, done, tail) = (self.offset(), self.done, cx.backing.tail());
        if offset >= tail {
            // The page cache takes any byte, and does not make the file longer.
            let len = match what {
                What::Zeroes => limit.min(cx.chunk),
                What::Read { .. } | What::Write { .. } => {
                    cx.pages.direct_bytes(done, limit.min(MAX_BYTES), 1, 1)
                }
            };
            return Piece::Direct { target: Target::Cached, len };
        }
        let left = limit.min(tail - offset);
        let (skip, whole) = (offset % block, left / block * block);
        let bounce_all = matches!(what, What::Read { bounce: true } | What::Write { bounce: true });
        if skip == 0 && whole > 0 {
            let len = match what {
                What::Zeroes => whole.min(cx.chunk * MAX_IOVECS as u64),
                _ if bounce_all => 0,
                _ => cx.pages.direct_bytes(done, whole, mem_align, block),
            };
            if len > 0 {
                return Piece::Direct { target: Target::Disk, len: len.min(MAX_BYTES) };
            }
        }
        let bounced = |from: u64, len: u64| {
            if bounce_all { len } else { cx.pages.bounced_bytes(from, len, mem_align, block) }
        };
        if what.reads() {
            // Past the first block, which has to go through the pool, the pages may fit.
            let first = left.min(block - skip);
            let rest = if left > first { bounced(done + first, left - first) } else { 0 };
            Piece::Bounce { cover: (skip + first + rest).next_multiple_of(block), skip }
        } else if skip == 0 && whole > 0 {
            Piece::Bounce { cover: bounced(done, whole), skip: 0 }
        } else {
            Piece::Modify { skip, take: left.min(block - skip) }
        }
    }

    /// Pool pages of `granted` bytes are there for the piece that waited for them.
    pub(super) fn pool(&mut self, what: What, granted: u64, cx: Context<'_>) -> Ask {
        let block = cx.backing.block;
        let Step::Pool(piece) = self.step else { return Ask::Short(0) }; // not reached
        let (len, skip) = match piece {
            Piece::Bounce { cover, skip } => (cover.min(granted / block * block), skip),
            Piece::Modify { skip, .. } => (block, skip),
            Piece::Direct { .. } => return Ask::Short(0), // not reached
        };
        self.step = match piece {
            Piece::Modify { skip, take } => Step::Fetch { skip, take },
            _ if what.reads() => Step::Read { skip, take: self.left().min(len - skip) },
            _ => {
                self.step = Step::Fill(len);
                return Ask::Copy(Copy::FromGuest { payload: self.done, pool: 0, len });
            }
        };
        let offset = self.offset() - skip;
        Ask::Io(Io { reads: true, target: Target::Disk, offset, len, buffer: Buffer::Pool })
    }

    /// The copy that was asked for is made.
    pub(super) fn copied(&mut self, cx: Context<'_>) -> Ask {
        let (len, offset) = match self.step {
            Step::Fill(len) => {
                self.step = Step::Write(len);
                (len, self.offset())
            }
            Step::Change { skip, take } => {
                self.step = Step::Replace(take);
                (cx.backing.block, self.offset() - skip)
            }
            Step::Deliver(take) => return Ask::Done(take),
            _ => return Ask::Short(0), // not reached
        };
        Ask::Io(Io { reads: false, target: Target::Disk, offset, len, buffer: Buffer::Pool })
    }

    /// The operation that was asked for moved `bytes`; those that move none ended well.
    pub(super) fn moved(&mut self, what: What, bytes: u64, cx: Context<'_>) -> Ask {
        let block = cx.backing.block;
        match self.step {
            Step::Allocate(len) => Ask::Done(len),
            Step::Direct(len) | Step::Write(len) if bytes > 0 => Ask::Done(bytes.min(len)),
            Step::Read { skip, take } if bytes > skip => {
                let len = take.min(bytes - skip);
                self.step = Step::Deliver(len);
                Ask::Copy(Copy::ToGuest { payload: self.done, pool: skip, len })
            }
            Step::Fetch { skip, take } if bytes == block => {
                self.step = Step::Change { skip, take };
                Ask::Copy(match what {
                    What::Zeroes => Copy::Zero { pool: skip, len: take },
                    _ => Copy::FromGuest { payload: self.done, pool: skip, len: take },
                })
            }
            Step::Replace(take) if bytes == block => Ask::Done(take),
            _ => Ask::Short(bytes),
        }
    }
}
