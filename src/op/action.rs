//! The words between a request's machine and the worker: what it asks for, what happened.

use std::fmt;
use std::io;

use crate::complete::Status;
use crate::engine::{Kind, Outcome, Target};

/// What happened since the last action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// The submitted operation ended.
    Ended(Outcome),
    /// It had been joined with others and did not go through whole: submit it alone.
    Apart,
    /// Pool pages of so many bytes are there, at least one chunk.
    Pool(u64),
    /// The range is locked until the request ends or asks for another one.
    Range,
    /// The bytes were copied. False: the guest's memory is gone.
    Copied(bool),
    /// Whether what was written, or everything for a FLUSH, is durable.
    Durable(bool),
    /// It failed and was held; the piece that failed is to be tried again.
    Again,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Submit this; then [`Input::Ended`], or [`Input::Apart`].
    Submit(Submit),
    /// Copy to or from the guest's pages; then [`Input::Copied`].
    Copy(Copy),
    /// Get this, waiting if need be.
    Need(Need),
    /// Write the status and return the chain.
    Finish(Status),
    /// The same with an I/O error that the operator should hear of; or hold the request, and later
    /// [`Input::Again`].
    Fail(Failure),
}

/// An operation for the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Submit {
    /// Which description of the disk.
    pub target: Target,
    /// What to do there.
    pub kind: Kind,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// With which memory.
    pub buffer: Buffer,
    /// On the worker's own thread: the engine could not start it elsewhere.
    pub own_thread: bool,
    /// It is the whole payload, and may be joined with its neighbours.
    pub joinable: bool,
}

/// The memory of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// The guest's pages, from this byte of the payload on.
    Guest(u64),
    /// The pool pages that the request holds.
    Pool,
    /// Zeroes, as often as it takes.
    Zeroes,
    /// None: the operation moves nothing.
    Nothing,
}

/// A copy of `len` bytes between byte `payload` of the guest's pages and byte `pool` of the
/// pool's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "said above, for all")]
pub enum Copy {
    /// What the guest wants written.
    FromGuest { payload: u64, pool: u64, len: u64 },
    /// What the disk gave.
    ToGuest { payload: u64, pool: u64, len: u64 },
    /// Zeroes into the pool pages.
    Zero { pool: u64, len: u64 },
    /// The serial number, padded with zeroes, over the whole payload.
    Serial,
}

/// What a request has to have before it can go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Pool pages for so many bytes, or as many as there are: [`Input::Pool`].
    Pool(u64),
    /// The blocks of `[start, end)`, bytes, against other changes: [`Input::Range`].
    Range {
        /// First byte, a block boundary.
        start: u64,
        /// One past the last, a block boundary.
        end: u64,
        /// The request is itself going to read a block, modify it and write it back.
        modifies: bool,
    },
    /// An fdatasync that is submitted from now on: [`Input::Durable`].
    Sync,
    /// The judgement on its own durable writes (RWF_DSYNC): [`Input::Durable`].
    Judgement,
}

/// Why a request failed on the disk, and at which byte of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The kernel said so.
    Errno(i32, u64),
    /// Nothing could be moved: the disk ends before it.
    Truncated(u64),
}

/// Follows the name of a request.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Errno(errno, at) => {
                write!(f, "failed at byte {at}: {}", io::Error::from_raw_os_error(*errno))
            }
            Self::Truncated(at) => {
                write!(
                    f,
                    "failed: the disk ends at byte {at}, before the size it had; has it been truncated?"
                )
            }
        }
    }
}
