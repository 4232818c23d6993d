//! What goes between a daemon and whoever keeps its things: packets of five bytes,
//! some with a descriptor.
//!
//! What it is: [`send`] and [`receive`].
//!
//! What it is not: it knows neither end; what a packet brings about is theirs.
//!
//! Invariant: a packet is one message of the socket, also of one that is a stream:
//! it is read and written whole, and a descriptor goes with its own packet.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::retry_on_intr;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::FdId;

/// How long a daemon may take to read what is kept for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a packet begins; behind it a number of four bytes, and with it a descriptor.
pub mod kind {
    /// [`super::Packet::Keep`].
    pub const KEEP: u8 = b'k';
    /// [`super::Packet::Forget`].
    pub const FORGET: u8 = b'f';
    /// [`super::Packet::End`].
    pub const END: u8 = b'e';
    /// [`super::Packet::Serving`].
    pub const SERVING: u8 = b'r';
    /// [`super::Packet::Succeed`].
    pub const SUCCEED: u8 = b'u';
    /// [`super::Packet::Output`].
    pub const OUTPUT: u8 = b'o';
    /// [`super::Packet::Stopped`].
    pub const STOPPED: u8 = b's';
}

/// What goes between a daemon and its supervisor.
#[derive(Debug)]
pub enum Packet {
    /// Keep this.
    Keep(FdId, OwnedFd),
    /// Let it go.
    Forget(FdId),
    /// That is all there was.
    End,
    /// The daemon serves: it listens, or goes on with its front-end.
    Serving,
    /// A successor is wanted: this program, or the one at its usual path.
    Succeed(Option<OwnedFd>),
    /// It was told to stop: no successor is wanted.
    Stopped,
    /// Where the daemon writes to: its descriptor 1 or 2.
    Output(u32, OwnedFd),
}

/// Gives a new daemon what is kept for it.
///
/// # Errors
/// As [`send`].
pub fn hand_out(socket: &OwnedFd, kept: &BTreeMap<FdId, OwnedFd>) -> io::Result<()> {
    set_socket_timeout(socket, Timeout::Send, Some(PATIENCE))?;
    for (&id, fd) in kept {
        send(socket, kind::KEEP, id, &[fd.as_fd()])?;
    }
    send(socket, kind::END, 0, &[])
}

/// Sends a packet.
///
/// # Errors
/// EPIPE when the other end is gone; EAGAIN when it does not read.
pub fn send(socket: impl AsFd, kind: u8, id: FdId, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let [a, b, c, d] = id.to_le_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let socket = socket.as_fd();
    // One that has a time-out is interrupted by anything.
    retry_on_intr(|| {
        sendmsg(socket, &[IoSlice::new(&[kind, a, b, c, d])], &mut ancillary, SendFlags::NOSIGNAL)
    })?;
    Ok(())
}

/// The next packet; `None` when the other end is gone.
///
/// # Errors
/// EAGAIN when there is none; EINVAL for what is none.
pub fn receive(socket: impl AsFd) -> io::Result<Option<Packet>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 5];
    let socket = socket.as_fd();
    let got = retry_on_intr(|| {
        recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?
    .bytes;
    let fd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let [kind, a, b, c, d] = bytes;
    let id = u32::from_le_bytes([a, b, c, d]);
    match (got, kind, fd) {
        (0, ..) => Ok(None),
        (5, kind::KEEP, Some(fd)) => Ok(Some(Packet::Keep(id, fd))),
        (5, kind::FORGET, None) => Ok(Some(Packet::Forget(id))),
        (5, kind::END, None) => Ok(Some(Packet::End)),
        (5, kind::SERVING, None) => Ok(Some(Packet::Serving)),
        (5, kind::STOPPED, None) => Ok(Some(Packet::Stopped)),
        (5, kind::OUTPUT, Some(fd)) => Ok(Some(Packet::Output(id, fd))),
        (5, kind::SUCCEED, program) => Ok(Some(Packet::Succeed(program))),
        _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}
