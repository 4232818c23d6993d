//! Where front-ends come from: a socket that listens, or one that is connected.
//!
//! What it is: a [`Source`], made from a path or from a descriptor that was given.
//!
//! What it is not: it accepts none; [`super::lobby`] does.
//!
//! Invariant: a socket is a Unix stream socket that listens or is connected, or it is refused.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketType, getpeername, sockopt};

use super::ControlError;
use crate::listen::{self, ListenError, OwnPath};
use crate::sys;

/// Where front-ends come from.
#[derive(Debug)]
pub enum Source {
    /// They connect here, one after another. The path is removed at the end.
    Listener(UnixListener, Option<OwnPath>),
    /// There is only this one; when it leaves, the daemon ends.
    Connected(UnixStream),
}

impl Source {
    /// Listens on `path`; its mode is 0660.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn listen(path: &Path) -> Result<Self, ListenError> {
        listen::listen(path, 0o660, None, "--socket-path")
            .map(|(listener, own)| Self::Listener(listener, Some(own)))
    }

    /// A socket that this process was given, listening or connected.
    ///
    /// # Errors
    /// [`ControlError::BadFd`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, ControlError> {
        let bad = |why| ControlError::BadFd(fd.as_raw_fd(), why);
        match sockopt::socket_type(&fd) {
            Ok(SocketType::STREAM) if sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX) => {}
            Ok(_) => return Err(bad("is a socket of another kind")),
            Err(_) => return Err(bad("is not a socket")),
        }
        if sockopt::socket_acceptconn(&fd) == Ok(true) {
            Ok(Self::Listener(UnixListener::from(fd), None))
        } else if getpeername(&fd).is_ok() {
            Ok(Self::Connected(UnixStream::from(fd)))
        } else {
            Err(bad("is a socket that neither listens nor is connected"))
        }
    }

    /// Where it is in the file system, if it is.
    #[must_use]
    pub fn path(&self) -> Option<PathBuf> {
        let address = match self {
            Self::Listener(_, Some(own)) => return Some(own.path().to_owned()),
            Self::Listener(listener, None) => listener.local_addr(),
            Self::Connected(stream) => stream.local_addr(),
        };
        address.ok()?.as_pathname().map(Path::to_owned)
    }

    /// The folder of the path that is removed at the end.
    #[must_use]
    pub fn folder(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Listener(_, Some(own)) => Some(own.folder()),
            _ => None,
        }
    }

    /// What tells this instance from others: its socket's path. For a socket
    /// without one it is the process at the other end, which may have started an
    /// earlier daemon for the same disk; of a `read_only` disk one process may
    /// start several at once, so there it is the socket alone.
    #[must_use]
    pub fn name(&self, read_only: bool) -> String {
        if let Some(path) = self.path() {
            return path.display().to_string();
        }
        let peer = if read_only { None } else { peer(self) };
        peer.unwrap_or_else(|| {
            let cookie = sockopt::socket_cookie(self).unwrap_or_default();
            format!("unnamed socket {cookie:x}")
        })
    }
}

/// The process at the other end of a socket, by number and time of start.
fn peer(socket: &impl AsFd) -> Option<String> {
    let pid = sys::peer_pid(socket)?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc(5): the name may hold anything; field 22 is the 20th after it.
    let started = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?;
    Some(format!("a socket of process {pid}, started at {started}"))
}

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Listener(listener, _) => listener.as_fd(),
            Self::Connected(stream) => stream.as_fd(),
        }
    }
}
