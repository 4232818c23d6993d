//! What comes from the socket: replies, one RECVMSG at a time.
//!
//! What it is: where the next bytes go. Data of a read that is being answered goes straight to the guest's pages, and
//! what follows it to a buffer, in the same RECVMSG; from the buffer, heads of replies are read, and data that came with
//! them is copied. Where large reads are in flight the buffer takes no more than a head, so that their data is not copied.
//!
//! What it is not: it submits nothing.
//!
//! Invariant: a byte goes to the guest's pages only as the data of a read that is in its slot, at an offset that was asked
//! for and has not come yet. What else a server sends is a [`Violation`].

use std::ptr;

use vm_memory::VolatileSlice;

use super::request::{Phase, Request};
use super::{Command, Outcome};
use crate::nbd::wire::{self, ChunkKind, DATA_OFFSET_BYTES, HOLE_BYTES, Head, MAX_ERROR_BYTES};
use crate::pages::MAX_IOVECS;

/// Bytes of the buffer: replies of some 15 reads of 4 KiB.
const BUFFER: usize = 64 << 10;
const _: () = assert!(BUFFER > MAX_ERROR_BYTES as usize + wire::CHUNK_BYTES);
/// What the buffer takes where large reads are in flight: the head of a chunk, and where its data begins.
const HEAD: usize = wire::CHUNK_BYTES + DATA_OFFSET_BYTES as usize;

/// Why the connection cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Violation {
    #[error("{0}")]
    Wire(#[from] wire::Violation),
    #[error("the NBD server answered a request that it does not have")]
    Unknown,
    #[error("the NBD server sent a reply of another kind than the request's")]
    Kind,
}

/// What the next byte is.
#[derive(Clone, Copy, Debug)]
enum Next {
    Head,
    /// The payload of a chunk, which is looked at whole; of data, its offset.
    Payload {
        slot: u16,
        kind: ChunkKind,
        len: u32,
        done: bool,
    },
    /// Data of a read, from this byte of its buffers on.
    Data {
        slot: u16,
        at: u64,
        left: u64,
        done: bool,
    },
}

/// See the head of the file.
pub(super) struct Incoming {
    message: libc::msghdr,
    iovecs: Vec<libc::iovec>,
    buffer: Box<[u8]>,
    /// The bytes of the buffer that were received and not looked at.
    start: usize,
    end: usize,
    next: Next,
    /// Bytes of the RECVMSG under way that go to the guest's pages.
    direct: u64,
    structured: bool,
    is_under_way: bool,
    /// All that comes is dropped, until the end.
    is_ignoring: bool,
}

impl Incoming {
    pub(super) fn new() -> Self {
        // SAFETY: all zeroes is a valid msghdr.
        let message = unsafe { std::mem::zeroed() };
        Self {
            message,
            iovecs: Vec::with_capacity(MAX_IOVECS + 1),
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            next: Next::Head,
            direct: 0,
            structured: false,
            is_under_way: false,
            is_ignoring: false,
        }
    }

    /// On a new connection.
    pub(super) fn begin(&mut self, structured: bool) {
        (self.start, self.end, self.next, self.direct) = (0, 0, Next::Head, 0);
        (self.structured, self.is_ignoring) = (structured, false);
    }

    pub(super) fn is_under_way(&self) -> bool {
        self.is_under_way
    }

    /// Drops all that comes from now on.
    pub(super) fn ignore(&mut self) {
        (self.start, self.end, self.next) = (0, 0, Next::Head);
        self.is_ignoring = true;
    }

    /// The request whose data is being received.
    pub(super) fn receiving(&self) -> Option<u16> {
        match self.next {
            Next::Data { slot, .. } => Some(slot),
            Next::Head | Next::Payload { .. } => None,
        }
    }

    /// The RECVMSG ended.
    pub(super) fn ended(&mut self) {
        self.is_under_way = false;
    }

    /// The message to receive now. `None`: one is under way. `large_reads`: some are in flight.
    pub(super) fn next(&mut self, requests: &[Request], large_reads: bool) -> Option<*mut libc::msghdr> {
        if self.is_under_way {
            return None;
        }
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        self.iovecs.clear();
        self.direct = 0;
        if let Next::Data { slot, at, left, .. } = self.next
            && let Some(request) = requests.get(usize::from(slot))
        {
            let iovecs = &mut self.iovecs;
            pieces(request, at, left, |piece| iovecs.push(piece));
            self.direct = left;
        }
        let is_whole = matches!(self.next, Next::Payload { kind, .. } if kind != ChunkKind::Data);
        let room = if large_reads && !is_whole && !self.is_ignoring { HEAD } else { BUFFER };
        if let Some(free) = self.buffer.get_mut(self.end..room.max(self.end + 1).min(BUFFER)) {
            self.iovecs.push(libc::iovec { iov_base: free.as_mut_ptr().cast(), iov_len: free.len() });
        }
        self.message.msg_iov = self.iovecs.as_mut_ptr();
        self.message.msg_iovlen = self.iovecs.len();
        self.is_under_way = true;
        Some(ptr::from_mut(&mut self.message))
    }

    /// So many bytes came.
    pub(super) fn received(&mut self, bytes: usize) {
        let direct = usize::try_from(self.direct).map_or(bytes, |direct| bytes.min(direct));
        if let Next::Data { at, left, .. } = &mut self.next {
            (*at, *left) = (*at + direct as u64, *left - direct as u64);
        }
        self.end = (self.end + bytes - direct).min(self.buffer.len());
    }

    /// The next request that is answered whole. `None`: more bytes are needed.
    pub(super) fn parse(&mut self, requests: &mut [Request]) -> Result<Option<(u16, Outcome)>, Violation> {
        loop {
            if self.is_ignoring {
                (self.start, self.end) = (0, 0);
                return Ok(None);
            }
            let bytes = self.buffer.get(self.start..self.end).unwrap_or(&[]);
            match self.next {
                Next::Head => {
                    let Some((head, used)) = wire::head(bytes)? else { return Ok(None) };
                    self.start += used;
                    if let Some(ended) = self.head(head, requests)? {
                        return Ok(Some(ended));
                    }
                }
                Next::Payload { slot, kind, len, done } => {
                    let needed = if kind == ChunkKind::Data { DATA_OFFSET_BYTES } else { len } as usize;
                    let Some(payload) = bytes.get(..needed) else { return Ok(None) };
                    let request = requests.get_mut(usize::from(slot)).ok_or(Violation::Unknown)?;
                    self.next = payload_of(payload, request, slot, kind, len, done)?;
                    self.start += needed;
                    if let (Next::Head, true) = (self.next, done) {
                        return Ok(Some((slot, outcome(request))));
                    }
                }
                Next::Data { slot, at, left, done } => {
                    let request = requests.get_mut(usize::from(slot)).ok_or(Violation::Unknown)?;
                    let taken = usize::try_from(left).map_or(bytes.len(), |left| bytes.len().min(left));
                    let now = taken as u64;
                    let mut rest = bytes;
                    pieces(request, at, now, |piece| {
                        let (first, after) = rest.split_at(piece.iov_len.min(rest.len()));
                        // SAFETY: the request is in its slot, so its buffers are memory that may be written; the
                        // guest may write it, too, which is why the access is volatile.
                        let to = unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) };
                        to.copy_from(first);
                        rest = after;
                    });
                    self.start += taken;
                    if now < left {
                        self.next = Next::Data { slot, at: at + now, left: left - now, done };
                        return Ok(None);
                    }
                    self.next = Next::Head;
                    if done {
                        return Ok(Some((slot, outcome(request))));
                    }
                }
            }
        }
    }

    /// The fixed part of a reply.
    fn head(&mut self, head: Head, requests: &mut [Request]) -> Result<Option<(u16, Outcome)>, Violation> {
        let (Head::Simple { cookie, .. } | Head::Chunk { cookie, .. }) = head;
        let slot = (cookie & 0xffff) as u16;
        let request = requests.get_mut(usize::from(slot)).ok_or(Violation::Unknown)?;
        let is_known = matches!(request.phase, Phase::Sending | Phase::Sent) && request.early.is_none();
        if !is_known || u64::from(request.generation) != cookie >> 16 {
            return Err(Violation::Unknown);
        }
        match head {
            // A server with structured replies answers reads with these ("Structured replies").
            Head::Simple { error: 0, .. } if request.command == Command::Read && self.structured => {
                Err(Violation::Kind)
            }
            Head::Simple { error: 0, .. } if request.command == Command::Read => {
                request.covered.add(0, request.len.into())?;
                self.next = Next::Data { slot, at: 0, left: request.len.into(), done: true };
                Ok(None)
            }
            Head::Simple { error, .. } => {
                request.error = Some(error).filter(|&error| error > 0);
                Ok(Some((slot, outcome(request))))
            }
            Head::Chunk { .. } if !self.structured => Err(Violation::Kind),
            Head::Chunk { kind: ChunkKind::None, .. } => Ok(Some((slot, outcome(request)))),
            Head::Chunk { kind: ChunkKind::BlockStatus, .. } => Err(Violation::Kind),
            Head::Chunk { kind: ChunkKind::Data | ChunkKind::Hole, .. }
                if request.command != Command::Read =>
            {
                Err(Violation::Kind)
            }
            Head::Chunk { done, kind, len, .. } => {
                self.next = Next::Payload { slot, kind, len, done };
                Ok(None)
            }
        }
    }
}

/// What follows the payload of a chunk.
fn payload_of(
    payload: &[u8],
    request: &mut Request,
    slot: u16,
    kind: ChunkKind,
    len: u32,
    done: bool,
) -> Result<Next, Violation> {
    let from = request.io.offset;
    let relative = |offset: u64| offset.checked_sub(from).ok_or(Violation::Unknown);
    match kind {
        ChunkKind::Data => {
            let offset = payload.first_chunk().map_or(u64::MAX, wire::data_offset);
            let (at, left) = (relative(offset)?, u64::from(len - DATA_OFFSET_BYTES));
            request.covered.add(at, left)?;
            return Ok(Next::Data { slot, at, left, done });
        }
        ChunkKind::Hole => {
            let (offset, len) =
                payload.first_chunk::<{ HOLE_BYTES as usize }>().map_or((u64::MAX, 0), wire::hole);
            let at = relative(offset)?;
            request.covered.add(at, len.into())?;
            pieces(request, at, len.into(), |piece| {
                const ZEROES: [u8; 4096] = [0; 4096];
                // SAFETY: as where data is copied.
                let to = unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) };
                for from in (0..piece.iov_len).step_by(ZEROES.len()) {
                    let zeroes = ZEROES.get(..(piece.iov_len - from).min(ZEROES.len())).unwrap_or(&[]);
                    if let Ok(part) = to.offset(from) {
                        part.copy_from(zeroes);
                    }
                }
            });
        }
        ChunkKind::Error | ChunkKind::ErrorAt => request.error = Some(wire::error_of(payload)?),
        ChunkKind::None | ChunkKind::BlockStatus => {}
    }
    Ok(Next::Head)
}

/// How a request ended whose reply has come whole.
fn outcome(request: &Request) -> Outcome {
    match (request.error, request.command) {
        (Some(error), _) => Outcome::Failed(wire::errno(error)),
        (None, Command::Read) if !request.covered.is_whole() => Outcome::Failed(libc::EIO),
        (None, Command::Read) if request.has_lost_memory() => Outcome::Failed(libc::EFAULT),
        (None, Command::Read | Command::Write { .. }) => Outcome::Moved(request.len.into()),
        _ => Outcome::Moved(0),
    }
}

/// The parts of a request's buffers of `len` bytes from byte `at` on.
fn pieces(request: &Request, at: u64, len: u64, mut each: impl FnMut(libc::iovec)) {
    let (mut skip, mut left) = (usize::try_from(at).unwrap_or(usize::MAX), usize::try_from(len).unwrap_or(0));
    // SAFETY: the request is in its slot.
    for iovec in unsafe { request.iovecs() } {
        let from = skip.min(iovec.iov_len);
        let now = (iovec.iov_len - from).min(left);
        if now > 0 {
            each(libc::iovec { iov_base: iovec.iov_base.wrapping_byte_add(from), iov_len: now });
        }
        (skip, left) = (skip - from, left - now);
    }
}
