//! Reads vhost-user messages from the front-end without ever blocking.
//!
//! What it is: whole messages, with their descriptors, bounded in size, number
//! and time; and the private socket on which `vhost`'s request handler, which
//! reads blockingly, is then given each of them.
//!
//! What it is not: it knows of a message only its length, and lets [`super::judge`] judge its
//! descriptors.
//!
//! Invariants: the handler only ever reads a message that is complete, so it
//! cannot block; every descriptor is close-on-exec from the moment it is ours,
//! and those of an incomplete message are closed; no close of one is waited for.
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
use vhost::vhost_user::message::FrontendReq;

use super::judge::{Judged, judge};
use crate::sys;

/// Bytes of a message's header: request, flags, size.
const HEADER: usize = 12;
/// Bytes of the largest message, as `vhost` has it.
const MAX_MESSAGE: usize = HEADER + 4096;
/// Descriptors of one message: a memory table of 32 regions.
const MAX_FDS: usize = 32;
/// The flags of a reply: version 1, REPLY.
const REPLY: u32 = 1 | 1 << 2;
/// What to do about the limit of descriptors.
const RAISE: &str = "raise the limit of open files (ulimit -n, LimitNOFILE=)";
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
    /// What came is no message.
    #[error("what connected does not speak vhost-user")]
    NotVhostUser,
    /// The header announces too much.
    #[error("a message of {0} bytes")]
    TooLarge(usize),
    /// Too many descriptors.
    #[error("a message with more than {MAX_FDS} descriptors")]
    TooManyFds,
    /// A reply lost the descriptor that it is about.
    #[error("no descriptor is left: {RAISE}")]
    OutOfDescriptors,
    /// The socket failed.
    #[error("socket: {0}")]
    Io(#[from] io::Error),
}

impl From<rustix::io::Errno> for ReceiveError {
    fn from(e: rustix::io::Errno) -> Self {
        Self::Io(e.into())
    }
}

/// Bytes and descriptors.
type Reply = (Vec<u8>, Vec<OwnedFd>);

/// See the head of the file.
#[derive(Debug)]
pub struct Receiver {
    socket: UnixStream,
    private: UnixStream,
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// Why it came without some of its descriptors.
    truncated: Option<&'static str>,
    /// When the message that is being received began.
    since: Option<Instant>,
    /// The descriptor of the last SET_BACKEND_REQ_FD, which `vhost` keeps to itself.
    channel: Option<OwnedFd>,
}

impl Receiver {
    /// A receiver of what comes from `socket`. The request handler reads from the other end of
    /// `private`.
    #[must_use]
    pub fn new(socket: UnixStream, private: UnixStream) -> Self {
        Self {
            socket,
            private,
            bytes: Vec::with_capacity(MAX_MESSAGE),
            fds: Vec::with_capacity(MAX_FDS),
            truncated: None,
            since: None,
            channel: None,
        }
    }

    /// When the message under way must be complete.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.since.map(|at| at + MESSAGE_TIMEOUT)
    }

    /// Whether the message under way may go on.
    ///
    /// # Errors
    /// [`ReceiveError::Incomplete`]: its time is over.
    pub fn check_time(&self) -> Result<(), ReceiveError> {
        if self.deadline().is_some_and(|until| until <= Instant::now()) {
            return Err(ReceiveError::Incomplete);
        }
        Ok(())
    }

    /// Reads what is there. True: one whole message is there, which is to be
    /// passed on now. False: there is no whole message yet.
    ///
    /// # Errors
    /// [`ReceiveError`]: the connection is of no use any more.
    pub fn receive(&mut self) -> Result<bool, ReceiveError> {
        loop {
            let want = self.wanted()?;
            if want == 0 {
                return Ok(true);
            }
            if !self.read(want)? {
                return self.check_time().map(|()| false);
            }
        }
    }

    /// Bytes that are missing to the header, then to the whole message.
    fn wanted(&self) -> Result<usize, ReceiveError> {
        if is_foreign(&self.bytes) {
            return Err(ReceiveError::NotVhostUser);
        }
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
        // Room for all that can come: what does not fit would be closed by the call itself.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(sys::MOST_SENT))];
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
        if received.flags.contains(ReturnFlags::CTRUNC) {
            let is_full = self.socket.try_clone().is_err_and(|e| sys::is_out_of_descriptors(&e));
            self.truncated =
                Some(if is_full { "no descriptor is left" } else { "the kernel keeps it from us" });
        }
        if self.fds.len() > MAX_FDS {
            return Err(ReceiveError::TooManyFds);
        }
        if received.bytes == 0 {
            return Err(if start == 0 { ReceiveError::Closed } else { ReceiveError::Incomplete });
        }
        self.since.get_or_insert_with(Instant::now);
        Ok(true)
    }

    /// True if there is something to receive, be it the end.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        sys::peek(&self.socket, &mut [0]) != Err(rustix::io::Errno::AGAIN)
    }

    /// True between two messages.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Judges the whole message. If it cannot be carried out its descriptors are let go.
    pub fn judge(&mut self) -> Judged {
        let word = |at: usize| match self.bytes.get(at..at + 4) {
            Some(&[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]),
            _ => 0, // not reached: it is whole
        };
        let mut judged = judge(word(0), word(4), &self.fds);
        if let Some(why) = self.truncated {
            judged.why = Some(format!("a descriptor of message {} was lost: {why}; {RAISE}", judged.request));
        }
        if judged.why.is_none()
            && judged.request == FrontendReq::SET_BACKEND_REQ_FD as u32
            && let [fd] = self.fds.as_slice()
        {
            match fd.try_clone() {
                Ok(fd) => self.channel = Some(fd),
                Err(e) => judged.why = Some(format!("cannot keep the back-end channel: {e}; {RAISE}")),
            }
        }
        if judged.without_fds || judged.why.is_some() {
            sys::close_foreign(self.fds.drain(..));
        }
        judged
    }

    /// The whole message, and its descriptors.
    #[must_use]
    pub fn message(&self) -> (&[u8], &[OwnedFd]) {
        (&self.bytes, &self.fds)
    }

    /// Has a message that was read by an earlier process.
    pub fn put_back(&mut self, bytes: Vec<u8>, fds: Vec<OwnedFd>) {
        self.bytes = bytes;
        self.fds = fds;
    }

    /// Passes a message of ours on, as if the front-end had sent it again.
    ///
    /// # Errors
    /// When the private socket fails.
    pub fn replay(&self, request: u32, number: Option<u64>) -> Result<(), ReceiveError> {
        let payload = number.map(u64::to_le_bytes);
        let payload = payload.as_ref().map_or(&[][..], |bytes| bytes);
        let size = u32::try_from(payload.len()).unwrap_or(0);
        let mut message: Vec<u8> = [request, 1, size].iter().flat_map(|word| word.to_le_bytes()).collect();
        message.extend_from_slice(payload);
        send(&self.private, &message, &[])
    }

    /// Discards the handler's replies: the front-end has them from an earlier daemon.
    ///
    /// # Errors
    /// When the private socket fails.
    pub fn drop_replies(&self) -> Result<(), ReceiveError> {
        while self.reply()?.is_some() {}
        Ok(())
    }

    /// True if the handler has answered.
    #[must_use]
    pub fn has_reply(&self) -> bool {
        matches!(sys::peek(&self.private, &mut [0]), Ok(1..))
    }

    /// Hands the message over to the handler, which must handle it now, and forgets
    /// it.
    ///
    /// # Errors
    /// When the private socket fails.
    pub fn give_to_handler(&mut self) -> Result<(), ReceiveError> {
        send(&self.private, &self.bytes, &self.fds)?;
        self.forget();
        Ok(())
    }

    /// Forgets the message.
    pub fn forget(&mut self) {
        self.bytes.clear();
        sys::close_foreign(self.fds.drain(..));
        self.since = None;
        self.truncated = None;
    }

    /// Answers a message by a number that says no.
    ///
    /// # Errors
    /// As [`Receiver::relay`].
    pub fn refuse(&self, request: u32) -> Result<(), ReceiveError> {
        let mut reply: Vec<u8> = [request, REPLY, 8].iter().flat_map(|word| word.to_le_bytes()).collect();
        reply.extend(1_u64.to_le_bytes());
        send(&self.socket, &reply, &[])
    }

    /// The back-end channel, if the message that was handled brought one.
    pub fn take_channel(&mut self) -> Option<OwnedFd> {
        self.channel.take()
    }

    /// Sends the front-end what the handler answered.
    ///
    /// # Errors
    /// A front-end that does not read its replies is not waited for.
    pub fn relay(&mut self) -> Result<(), ReceiveError> {
        while let Some((bytes, fds)) = self.reply()? {
            send(&self.socket, &bytes, &fds)?;
        }
        Ok(())
    }

    /// What the handler answered, if it has.
    fn reply(&self) -> Result<Option<Reply>, ReceiveError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = vec![0; MAX_MESSAGE];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        match recvmsg(&self.private, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
            Ok(got) if got.flags.contains(ReturnFlags::CTRUNC) => return Err(ReceiveError::OutOfDescriptors),
            Ok(got) if got.bytes > 0 => bytes.truncate(got.bytes),
            Ok(_) | Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        let fds = ancillary.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        });
        let fds = fds.collect();
        Ok(Some((bytes, fds)))
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        sys::close_foreign(self.fds.drain(..));
    }
}

impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// True for bytes that no message begins with: the number of every request fits into
/// the first of its four bytes. Two bytes of a text are enough to tell.
#[must_use]
pub fn is_foreign(bytes: &[u8]) -> bool {
    bytes.iter().skip(1).take(3).any(|&byte| byte != 0)
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
