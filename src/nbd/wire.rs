//! Requests and replies of the transmission phase, as bytes.
//!
//! What it is: pure functions from values to bytes and back, and [`Covered`], which bytes of a read have come.
//!
//! What it is not: it reads and writes no socket, and does not know which requests are in flight.
//!
//! Invariant: no input panics. What the protocol forbids is a [`Violation`], after which nothing that the server sends
//! can be trusted: the connection has to be closed.

use thiserror::Error;

#[cfg(test)]
mod tests;

/// First bytes of a request ("Request message").
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First bytes of a simple reply ("Simple reply message").
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First bytes of a chunk of a structured reply ("Structured reply chunk message").
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Bytes of a request, without the data of a write.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply, without the data of a read.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of a chunk, without its payload.
pub const CHUNK_BYTES: usize = 20;
/// Bytes before the data in the payload of [`ChunkKind::Data`]: the offset.
pub const DATA_OFFSET_BYTES: u32 = 8;
/// Bytes of the payload of [`ChunkKind::Hole`].
pub const HOLE_BYTES: u32 = 12;
/// Bytes in front of the message in the payload of an error chunk.
const ERROR_BYTES: u32 = 6;
/// Largest payload of an error chunk: a message has 4096 bytes at most ("Conventions"), with room for the fields
/// of error types that are not known here.
pub const MAX_ERROR_BYTES: u32 = 4096 + 64;
/// Largest payload of [`ChunkKind::BlockStatus`]; 131 072 extents. nbdkit and qemu-nbd send much less.
pub const MAX_BLOCK_STATUS_BYTES: u32 = 1 << 20;

/// `NBD_CMD_FLAG_*` ("Command flags").
mod flag {
    pub(super) const FUA: u16 = 1 << 0;
    pub(super) const NO_HOLE: u16 = 1 << 1;
    pub(super) const FAST_ZERO: u16 = 1 << 4;
}

/// `NBD_REPLY_FLAG_DONE` ("Structured reply flags").
const DONE: u16 = 1 << 0;
/// Chunk types with this bit report an error ("Structured reply types").
const IS_ERROR: u16 = 1 << 15;

/// What a request asks for ("Request types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `NBD_CMD_READ`.
    Read,
    /// `NBD_CMD_WRITE`; the data follows the request.
    Write {
        /// Answered only once the data is durable.
        fua: bool,
    },
    /// `NBD_CMD_FLUSH`; offset and length are 0.
    Flush,
    /// `NBD_CMD_TRIM`.
    Trim,
    /// `NBD_CMD_WRITE_ZEROES`.
    WriteZeroes {
        /// The range stays allocated.
        no_hole: bool,
        /// Refused with ENOTSUP unless it is faster than a write.
        fast_zero: bool,
    },
    /// `NBD_CMD_BLOCK_STATUS`.
    BlockStatus,
    /// `NBD_CMD_DISC`: the last request of a connection; it has no reply.
    Disconnect,
}

impl Command {
    /// The request type and the command flags.
    const fn code(self) -> (u16, u16) {
        const fn when(on: bool, bit: u16) -> u16 {
            if on { bit } else { 0 }
        }
        match self {
            Self::Read => (0, 0),
            Self::Write { fua } => (1, when(fua, flag::FUA)),
            Self::Disconnect => (2, 0),
            Self::Flush => (3, 0),
            Self::Trim => (4, 0),
            Self::WriteZeroes { no_hole, fast_zero } => {
                (6, when(no_hole, flag::NO_HOLE) | when(fast_zero, flag::FAST_ZERO))
            }
            Self::BlockStatus => (7, 0),
        }
    }
}

/// A request, without the data of a write. The server's reply carries the same cookie.
#[inline]
#[must_use]
pub fn request(command: Command, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST_BYTES] {
    let (kind, flags) = command.code();
    let mut bytes = [0; REQUEST_BYTES];
    bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..28].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// What a server did that the protocol forbids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Violation {
    /// Neither kind of reply begins so.
    #[error("the NBD server sent 0x{0:08x} where a reply has to begin")]
    Magic(u32),
    /// Neither data nor an error, so it cannot be skipped.
    #[error("the NBD server sent a chunk of the unknown type {0}")]
    UnknownChunk(u16),
    /// The length does not go with the kind.
    #[error("the NBD server sent a chunk of type {kind} with a payload of {len} bytes")]
    ChunkLength {
        /// The chunk type.
        kind: u16,
        /// Bytes that the chunk announced.
        len: u32,
    },
    /// `NBD_REPLY_TYPE_NONE` without `NBD_REPLY_FLAG_DONE`.
    #[error("the NBD server sent an empty chunk that does not end its reply")]
    EmptyChunk,
    /// The message of an error is longer than the chunk.
    #[error("the NBD server sent an error with a message of {message} bytes in a payload of {payload}")]
    MessageLength {
        /// Bytes of the message, as the payload says.
        message: u16,
        /// Bytes of the payload.
        payload: usize,
    },
    /// An error chunk with error number 0.
    #[error("the NBD server sent an error with number 0")]
    NoError,
    /// A range of no bytes.
    #[error("the NBD server answered offset {offset} of a request with a range of no bytes")]
    EmptyRange {
        /// Relative to the request.
        offset: u64,
    },
    /// A range that was not asked for.
    #[error("the NBD server answered {len} bytes at offset {offset} of a request for {asked} bytes")]
    Outside {
        /// Relative to the request.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes of the request.
        asked: u32,
    },
    /// A range that had come already, or a part of it.
    #[error("the NBD server answered {len} bytes at offset {offset} of a request twice")]
    Twice {
        /// Relative to the request.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The answer to one read is in too many pieces.
    #[error("the NBD server answered a read in more than {MAX_RANGES} separate ranges at a time")]
    Fragmented,
    /// The payload of a block status makes no sense.
    #[error("the NBD server sent a block status of {0} bytes, which is no list of extents")]
    BlockStatusLength(usize),
}

/// What a chunk of a structured reply carries ("Structured reply types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkKind {
    /// Nothing; it ends the reply.
    None,
    /// An offset (see [`data_offset`]), then the data that begins there.
    Data,
    /// A range that reads as zeroes: see [`hole`].
    Hole,
    /// Extents: see [`block_status`].
    BlockStatus,
    /// An error: see [`error_of`]. Error types that are not known here count as this one.
    Error,
    /// An error at an offset: see [`error_of`].
    ErrorAt,
}

/// The fixed part of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// Without structured replies, or for a request without data. The data of a read follows if the error is 0.
    Simple {
        /// 0, or an error number of the protocol: see [`errno`].
        error: u32,
        /// The request's.
        cookie: u64,
    },
    /// One chunk of a structured reply.
    Chunk {
        /// No other chunk of this reply follows.
        done: bool,
        /// What the payload is.
        kind: ChunkKind,
        /// The request's.
        cookie: u64,
        /// Bytes of the payload that follows. It is possible for the kind, but for data it says nothing of the request:
        /// that is for the caller to compare.
        len: u32,
    },
}

/// The reply that `bytes` begin with, and the bytes that its fixed part takes. `None`: there are too few bytes yet.
///
/// # Errors
/// When no reply of the protocol begins so.
#[inline]
pub fn head(mut bytes: &[u8]) -> Result<Option<(Head, usize)>, Violation> {
    match take(&mut bytes).map(u32::from_be_bytes) {
        Some(SIMPLE_REPLY_MAGIC) => Ok(simple(bytes).map(|head| (head, SIMPLE_REPLY_BYTES))),
        Some(CHUNK_MAGIC) => Ok(chunk(bytes)?.map(|head| (head, CHUNK_BYTES))),
        Some(other) => Err(Violation::Magic(other)),
        None => Ok(None),
    }
}

/// The first bytes, which are then gone.
#[inline]
pub(super) fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}

fn simple(mut bytes: &[u8]) -> Option<Head> {
    let error = u32::from_be_bytes(take(&mut bytes)?);
    Some(Head::Simple { error, cookie: u64::from_be_bytes(take(&mut bytes)?) })
}

fn chunk(mut bytes: &[u8]) -> Result<Option<Head>, Violation> {
    let mut fields = || Some((take(&mut bytes)?, take(&mut bytes)?, take(&mut bytes)?, take(&mut bytes)?));
    let Some((flags, code, cookie, len)) = fields() else { return Ok(None) };
    let (code, len) = (u16::from_be_bytes(code), u32::from_be_bytes(len));
    // Flags that are not known may be ignored ("Structured reply flags").
    let done = u16::from_be_bytes(flags) & DONE != 0;
    let (kind, is_possible) = match code {
        0 => (ChunkKind::None, len == 0),
        1 => (ChunkKind::Data, len > DATA_OFFSET_BYTES),
        2 => (ChunkKind::Hole, len == HOLE_BYTES),
        5 => (ChunkKind::BlockStatus, (12..=MAX_BLOCK_STATUS_BYTES).contains(&len) && len % 8 == 4),
        // ErrorAt has the offset behind the message.
        0x8002 => (ChunkKind::ErrorAt, (ERROR_BYTES + 8..=MAX_ERROR_BYTES).contains(&len)),
        _ if code & IS_ERROR != 0 => (ChunkKind::Error, (ERROR_BYTES..=MAX_ERROR_BYTES).contains(&len)),
        _ => return Err(Violation::UnknownChunk(code)),
    };
    if !is_possible {
        return Err(Violation::ChunkLength { kind: code, len });
    }
    if kind == ChunkKind::None && !done {
        return Err(Violation::EmptyChunk);
    }
    Ok(Some(Head::Chunk { done, kind, cookie: u64::from_be_bytes(cookie), len }))
}

/// Where the data of a [`ChunkKind::Data`] begins in the export, of the first bytes of its payload.
#[inline]
#[must_use]
pub const fn data_offset(payload: &[u8; 8]) -> u64 {
    u64::from_be_bytes(*payload)
}

/// Where a [`ChunkKind::Hole`] begins in the export, and its bytes.
#[inline]
#[must_use]
pub const fn hole(payload: &[u8; 12]) -> (u64, u32) {
    let [a, b, c, d, e, f, g, h, len @ ..] = *payload;
    (u64::from_be_bytes([a, b, c, d, e, f, g, h]), u32::from_be_bytes(len))
}

/// The error number of the protocol in the payload of an error chunk; see [`errno`].
///
/// # Errors
/// When the payload is shorter than it says, or the error is none.
pub fn error_of(mut payload: &[u8]) -> Result<u32, Violation> {
    let bytes = payload.len();
    let mut fields = || Some((take(&mut payload)?, take(&mut payload)?));
    let (error, message) = fields()
        .map_or((0, u16::MAX), |(error, message)| (u32::from_be_bytes(error), u16::from_be_bytes(message)));
    if payload.len() < usize::from(message) {
        return Err(Violation::MessageLength { message, payload: bytes });
    }
    if error == 0 { Err(Violation::NoError) } else { Ok(error) }
}

/// Linux's number for an error of the protocol ("Error values").
///
/// None of them is an errno that means "nothing was tried" of a local operation: an operation that a server refuses was
/// tried. So ENOMEM of a server is an I/O error here. An error that is not known is one as well, and not EINVAL, as the
/// protocol suggests: EINVAL says that the server left the disk alone, and only a server that sends it can know.
#[must_use]
pub const fn errno(error: u32) -> i32 {
    match error {
        1 => libc::EPERM,
        22 => libc::EINVAL,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::EOPNOTSUPP,
        108 => libc::ESHUTDOWN,
        // 5 is EIO, 12 ENOMEM.
        _ => libc::EIO,
    }
}

/// `NBD_STATE_HOLE` and `NBD_STATE_ZERO`.
const HOLE: u32 = 1 << 0;
const ZERO: u32 = 1 << 1;

/// A part of the export, as `base:allocation` tells it ("The base:allocation metadata context").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; a server must not say 0, but may.
    pub len: u32,
    /// It takes no room on the server's disk.
    pub is_hole: bool,
    /// It reads as zeroes.
    pub reads_zero: bool,
}

/// The metadata context that the payload of a [`ChunkKind::BlockStatus`] speaks of, and the extents from the request's
/// offset on. The last one may reach beyond the request.
///
/// # Errors
/// When the payload is no list of extents.
pub fn block_status(payload: &[u8]) -> Result<(u32, impl Iterator<Item = Extent> + '_), Violation> {
    let mut extents = payload;
    let wrong = Violation::BlockStatusLength(payload.len());
    let context = take(&mut extents).map(u32::from_be_bytes).ok_or(wrong)?;
    if extents.is_empty() || !extents.len().is_multiple_of(8) {
        return Err(wrong);
    }
    let each = std::iter::from_fn(move || {
        let len = u32::from_be_bytes(take(&mut extents)?);
        let flags = u32::from_be_bytes(take(&mut extents)?);
        Some(Extent { len, is_hole: flags & HOLE != 0, reads_zero: flags & ZERO != 0 })
    });
    Ok((context, each))
}

/// Separate ranges of one read that may have come at a time.
pub const MAX_RANGES: usize = 8;

/// Which bytes of one read have come. The ranges of an answer may come in any order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Covered {
    asked: u32,
    count: usize,
    /// Begin and end; the first `count`, ascending, and no two of them touch.
    ranges: [(u32, u32); MAX_RANGES],
}

impl Covered {
    /// Nothing has come yet of a read of so many bytes.
    #[inline]
    #[must_use]
    pub const fn new(asked: u32) -> Self {
        Self { asked, count: 0, ranges: [(0, 0); MAX_RANGES] }
    }

    /// A range came; `offset` is relative to the request.
    ///
    /// # Errors
    /// When it lies outside of the request, is empty, or came before, and when there are more than [`MAX_RANGES`].
    #[inline]
    pub fn add(&mut self, offset: u64, len: u64) -> Result<(), Violation> {
        if len == 0 {
            return Err(Violation::EmptyRange { offset });
        }
        let asked = self.asked;
        let within = |at: u64| u32::try_from(at).ok().filter(|&at| at <= asked);
        let (Some(start), Some(end)) = (within(offset), offset.checked_add(len).and_then(within)) else {
            return Err(Violation::Outside { offset, len, asked });
        };
        let count = self.count;
        let at = self.ranges[..count].partition_point(|&(begin, _)| begin < start);
        let before = at.checked_sub(1).map(|index| self.ranges[index].1);
        let after = self.ranges[at..count].first().map(|&(begin, _)| begin);
        if before.is_some_and(|before| before > start) || after.is_some_and(|after| after < end) {
            return Err(Violation::Twice { offset, len });
        }
        match (before == Some(start), after == Some(end)) {
            (true, true) => {
                self.ranges[at - 1].1 = self.ranges[at].1;
                self.ranges.copy_within(at + 1..count, at);
                self.count -= 1;
            }
            (true, false) => self.ranges[at - 1].1 = end,
            (false, true) => self.ranges[at].0 = start,
            (false, false) if count == MAX_RANGES => return Err(Violation::Fragmented),
            (false, false) => {
                self.ranges.copy_within(at..count, at + 1);
                self.ranges[at] = (start, end);
                self.count += 1;
            }
        }
        Ok(())
    }

    /// Every byte has come.
    #[inline]
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.asked == 0 || self.ranges[..self.count] == [(0, self.asked)]
    }
}
