//! Reads vhost-user messages from the front-end without ever blocking.
//!
//! What it is: whole messages, with their descriptors, bounded in size, number
//! and time; and the private socket on which `vhost`'s request handler, which
//! reads blockingly, is then given each of them.
//!
//! What it is not: it knows of a message only its length.
//!
//! Invariants: the handler only ever reads a message that is complete, so it
//! cannot block; every descriptor is close-on-exec from the moment it is ours,
//! and those of an incomplete message are closed.
//!
//! ```text
//!   front-end ══► Receiver ──whole message──► pair ──► BackendReqHandler
//!   front-end ◄══ relay ◄──────── reply ───── pair ◄────────┘
//! ```

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;

/// Bytes of a message's header: request, flags, size.
const HEADER: usize = 12;
/// Bytes of the largest message, as `vhost` has it.
const MAX_MESSAGE: usize = HEADER + 4096;
/// Descriptors of one message: a memory table of 32 regions.
const MAX_FDS: usize = 32;
/// How long the rest of a message may take.
pub const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a connection has to end.
#[derive(Debug, Error)]
pub enum ReceiveError {
    /// The front-end closed it.
    #[error("the front-end disconnected")]
    Closed,
    /// It closed it, or stopped, in the middle of a message.
    #[error("the front-end sent only a part of a message")]
    Incomplete,
    /// The header announces too much.
    #[error("a message of {0} bytes")]
    TooLarge(usize),
    /// Too many descriptors.
    #[error("a message with more than {MAX_FDS} descriptors")]
    TooManyFds,
    /// The socket failed.
    #[error("socket: {0}")]
    Io(#[from] io::Error),
}

impl From<rustix::io::Errno> for ReceiveError {
    fn from(e: rustix::io::Errno) -> Self {
        Self::Io(e.into())
    }
}

/// See the head of the file.
#[derive(Debug)]
pub struct Receiver {
    socket: UnixStream,
    private: UnixStream,
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// When the message that is being received began.
    since: Option<Instant>,
}

impl Receiver {
    /// A receiver, and the socket that the request handler reads from.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new(socket: UnixStream) -> io::Result<(Self, UnixStream)> {
        socket.set_nonblocking(true)?;
        let (private, handler) = UnixStream::pair()?;
        private.set_nonblocking(true)?;
        let bytes = Vec::with_capacity(MAX_MESSAGE);
        Ok((Self { socket, private, bytes, fds: Vec::with_capacity(MAX_FDS), since: None }, handler))
    }

    /// When the message under way must be complete.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.since.map(|at| at + MESSAGE_TIMEOUT)
    }

    /// Reads what is there. True: one whole message was passed to the handler,
    /// which must handle it now. False: there is no whole message yet.
    ///
    /// # Errors
    /// [`ReceiveError`]: the connection is of no use any more.
    pub fn receive(&mut self) -> Result<bool, ReceiveError> {
        loop {
            let want = self.wanted()?;
            if want == 0 {
                self.pass_on()?;
                return Ok(true);
            }
            if !self.read(want)? {
                if self.deadline().is_some_and(|d| d <= Instant::now()) {
                    return Err(ReceiveError::Incomplete);
                }
                return Ok(false);
            }
        }
    }

    /// Bytes that are missing to the header, then to the whole message.
    fn wanted(&self) -> Result<usize, ReceiveError> {
        let Some(&[a, b, c, d]) = self.bytes.get(8..HEADER) else { return Ok(HEADER - self.bytes.len()) };
        let body = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        let whole = body.saturating_add(HEADER);
        if whole > MAX_MESSAGE {
            return Err(ReceiveError::TooLarge(body));
        }
        Ok(whole - self.bytes.len())
    }

    /// Reads at most `want` bytes. False: there are none now.
    fn read(&mut self, want: usize) -> Result<bool, ReceiveError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let start = self.bytes.len();
        self.bytes.resize(start + want, 0);
        let buffer = self.bytes.get_mut(start..).unwrap_or_default();
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let result = recvmsg(&self.socket, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags);
        self.bytes.truncate(start + result.as_ref().map_or(0, |r| r.bytes));
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        let received = match result {
            Ok(received) => received,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        if received.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_FDS {
            return Err(ReceiveError::TooManyFds);
        }
        if received.bytes == 0 {
            return Err(if start == 0 { ReceiveError::Closed } else { ReceiveError::Incomplete });
        }
        self.since.get_or_insert_with(Instant::now);
        Ok(true)
    }

    /// Hands the message over and forgets it.
    fn pass_on(&mut self) -> Result<(), ReceiveError> {
        send(&self.private, &self.bytes, &self.fds)?;
        self.bytes.clear();
        self.fds.clear();
        self.since = None;
        Ok(())
    }

    /// Sends the front-end what the handler answered.
    ///
    /// # Errors
    /// A front-end that does not read its replies is not waited for.
    pub fn relay(&mut self) -> Result<(), ReceiveError> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut bytes = [0; MAX_MESSAGE];
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let got = match recvmsg(&self.private, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags)
            {
                Ok(got) if got.bytes > 0 => got.bytes,
                Ok(_) | Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(e) => return Err(e.into()),
            };
            let fds: Vec<OwnedFd> = ancillary
                .drain()
                .flat_map(|m| match m {
                    RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
                    _ => Vec::new(),
                })
                .collect();
            send(&self.socket, bytes.get(..got).unwrap_or_default(), &fds)?;
        }
    }
}

impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends one message whole, with its descriptors at its first byte.
fn send(to: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> Result<(), ReceiveError> {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(ReceiveError::TooManyFds);
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = sendmsg(to, &[IoSlice::new(bytes)], &mut ancillary, flags)?;
    if sent == bytes.len() { Ok(()) } else { Err(ReceiveError::Incomplete) }
}
