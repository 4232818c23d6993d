//! The control thread: one front-end at a time, from its first message to the
//! moment nothing of it is left.
//!
//! What it is: a loop over the socket, the signals and the notice that guest
//! memory is gone.
//!
//! What it is not: it knows no message; [`crate::session`] does.
//!
//! Invariants: it never blocks but in a wait that also watches the signals; a
//! second front-end waits in the backlog, never half-served; when the daemon
//! stops, the listener is closed before anything is drained, so that nobody
//! connects to a daemon that is leaving.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use vhost::vhost_user::BackendReqHandler;

use crate::device::Device;
use crate::session::Session;
use crate::session::receiver::{ReceiveError, Receiver};
use crate::signals::Signals;
use crate::sys;
use crate::workers::{WorkerError, wait_for};

/// How long a front-end may take from connecting to its first message.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the daemon cannot serve.
#[derive(Debug, Error)]
pub enum ControlError {
    /// Another process serves on this path.
    #[error("{0}: another process is listening there. Stop it, or choose another --socket-path")]
    Live(PathBuf),
    /// Something that is no socket is there.
    #[error("{0}: exists and is not a socket. Remove it, or choose another --socket-path")]
    NotASocket(PathBuf),
    /// The socket cannot be made.
    #[error("{0}: cannot listen there: {1}. Check that its folder exists and is writable")]
    Bind(PathBuf, io::Error),
    /// `--fd` or LISTEN_FDS names something else.
    #[error("file descriptor {0} is not an open Unix stream socket: {1}")]
    BadFd(i32, io::Error),
    /// The only front-end cannot have the image.
    #[error("another process has the image; stop it (lslocks shows it) and start vublkd again")]
    Refused,
    /// A worker cannot work.
    #[error("{0}")]
    Worker(WorkerError),
    /// Stopping took longer than allowed.
    #[error("stopped without waiting any longer for the disk; requests in flight were not answered")]
    GaveUp,
    /// The control thread's own waits failed.
    #[error("the control thread cannot go on: {0}")]
    Io(#[from] io::Error),
}

/// Where front-ends come from.
#[derive(Debug)]
pub enum Source {
    /// They connect here, one after another. The path is removed at the end.
    Listener(UnixListener, Option<OwnPath>),
    /// There is only this one; when it leaves, the daemon ends.
    Connected(UnixStream),
}

/// A socket's path, and what tells ours from one that another put there.
#[derive(Debug)]
pub struct OwnPath {
    path: PathBuf,
    inode: (u64, u64),
}

impl OwnPath {
    fn inode(path: &Path) -> io::Result<(u64, u64)> {
        std::fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
    }

    /// Removes it, unless a successor already listens there.
    fn remove(&self) {
        if Self::inode(&self.path).is_ok_and(|now| now == self.inode) {
            let _gone_already = std::fs::remove_file(&self.path);
        }
    }
}

impl Source {
    /// Makes sure that nobody serves on `path`, before anything else is done.
    ///
    /// # Errors
    /// [`ControlError::Live`], [`ControlError::NotASocket`].
    pub fn check(path: &Path) -> Result<(), ControlError> {
        use std::os::unix::fs::FileTypeExt;
        match std::fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => Err(ControlError::NotASocket(path.into())),
            Ok(_) if UnixStream::connect(path).is_ok() => Err(ControlError::Live(path.into())),
            _ => Ok(()),
        }
    }

    /// Listens on `path`, in place of a stale socket. It appears there with its
    /// mode of 0660 and ready to be connected to.
    ///
    /// # Errors
    /// [`ControlError::Live`], [`ControlError::NotASocket`], [`ControlError::Bind`].
    pub fn listen(path: &Path) -> Result<Self, ControlError> {
        Self::check(path)?;
        let bind = |e| ControlError::Bind(path.into(), e);
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}", std::process::id()));
        let fresh = path.with_file_name(name);
        let listener = UnixListener::bind(&fresh).map_err(bind)?;
        let published = std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o660))
            .and_then(|()| OwnPath::inode(&fresh))
            .and_then(|inode| std::fs::rename(&fresh, path).map(|()| inode));
        match published {
            Ok(inode) => Ok(Self::Listener(listener, Some(OwnPath { path: path.into(), inode }))),
            Err(e) => {
                let _left = std::fs::remove_file(&fresh);
                Err(bind(e))
            }
        }
    }

    /// A socket that this process was given, listening or connected.
    ///
    /// # Errors
    /// [`ControlError::BadFd`].
    pub fn from_fd(number: i32) -> Result<Self, ControlError> {
        let bad = |e| ControlError::BadFd(number, e);
        let fd = sys::inherited_fd(number).ok_or_else(|| bad(io::ErrorKind::NotFound.into()))?;
        if sys::is_listening(&fd).map_err(bad)? {
            Ok(Self::Listener(UnixListener::from(fd), None))
        } else {
            Ok(Self::Connected(UnixStream::from(fd)))
        }
    }

    /// What tells this instance from others: its socket's path. For a socket
    /// without one it is the process at the other end, which may have started an
    /// earlier daemon for the same disk; of a `read_only` disk one process may
    /// start several at once, so there it is the socket alone.
    #[must_use]
    pub fn name(&self, read_only: bool) -> String {
        let address = match self {
            Self::Listener(_, Some(own)) => return own.path.display().to_string(),
            Self::Listener(listener, None) => listener.local_addr(),
            Self::Connected(stream) => stream.local_addr(),
        };
        let path = address.ok().and_then(|a| a.as_pathname().map(|p| p.display().to_string()));
        path.or_else(|| if read_only { None } else { peer(self) }).unwrap_or_else(|| {
            let cookie = rustix::net::sockopt::socket_cookie(self).unwrap_or_default();
            format!("unnamed socket {cookie:x}")
        })
    }
}

/// The process at the other end of a socket, by number and time of start.
fn peer(socket: &impl AsFd) -> Option<String> {
    let pid = rustix::net::sockopt::socket_peercred(socket).ok()?.pid.as_raw_nonzero();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc(5): the name may hold anything; field 22 is the 20th after it.
    let started = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?;
    Some(format!("a socket of process {pid}, started at {started}"))
}

impl AsFd for Source {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Self::Listener(listener, _) => listener.as_fd(),
            Self::Connected(stream) => stream.as_fd(),
        }
    }
}

/// Why serving a front-end ended.
enum End {
    Left,
    Stopping,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Control {
    device: Arc<Device>,
    signals: Arc<Signals>,
    /// Shared with `vhost`'s request handler, on this thread only.
    session: Arc<Mutex<Session>>,
    /// Written by the SIGBUS handler.
    memory_lost: OwnedFd,
}

impl Control {
    /// A control thread's state. `memory_lost` is what
    /// [`crate::memory::fault::install`] was given.
    #[must_use]
    pub fn new(device: Arc<Device>, signals: Arc<Signals>, session: Session, memory_lost: OwnedFd) -> Self {
        Self { device, signals, session: Arc::new(Mutex::new(session)), memory_lost }
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves front-ends until a signal asks to stop.
    ///
    /// # Errors
    /// [`ControlError::GaveUp`] when the disk hangs; [`ControlError::Io`].
    pub fn serve(&self, source: Source) -> Result<(), ControlError> {
        let (listener, path) = match source {
            Source::Connected(stream) => {
                self.connection(stream, None)?;
                if self.session().is_refused() {
                    return self.finish().and(Err(ControlError::Refused));
                }
                return self.finish();
            }
            Source::Listener(listener, path) => (listener, path),
        };
        listener.set_nonblocking(true)?;
        while let Some(stream) = self.accept(&listener)? {
            tracing::info!("a front-end connected");
            match self.connection(stream, Some(Instant::now() + FIRST_MESSAGE_TIMEOUT))? {
                End::Stopping => break,
                End::Left => self.session().disconnect(),
            }
            if self.session().failed() {
                break;
            }
        }
        drop(listener);
        if let Some(own) = path {
            own.remove();
        }
        self.finish()
    }

    /// Drains what runs and ends the workers.
    fn finish(&self) -> Result<(), ControlError> {
        let _not_under_systemd = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        let mut session = self.session();
        session.disconnect();
        match session.take_failure() {
            None => {}
            Some(WorkerError::GaveUp) => return Err(ControlError::GaveUp),
            Some(other) => return Err(ControlError::Worker(other)),
        }
        session.stop_workers();
        tracing::info!("stopped: {}", self.device.stats);
        Ok(())
    }

    /// The next front-end, or `None` when a signal came.
    fn accept(&self, listener: &UnixListener) -> Result<Option<UnixStream>, ControlError> {
        loop {
            self.take_signals();
            if self.signals.stopping() {
                return Ok(None);
            }
            match listener.accept() {
                Ok((stream, _)) => return Ok(Some(stream)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    wait_for(&[listener.as_fd(), self.signals.as_fd()], None)?;
                }
                Err(e) => {
                    // A front-end that left at once, or descriptors that ran out.
                    tracing::warn!("cannot accept a front-end: {e}");
                    wait_for(&[self.signals.as_fd()], Some(Duration::from_millis(100)))?;
                }
            }
        }
    }

    fn take_signals(&self) {
        self.signals.take();
        if self.signals.take_report() {
            tracing::info!("statistics: {}", self.device.stats);
        }
    }

    /// Serves one front-end until it leaves, misbehaves, or a signal comes.
    fn connection(&self, stream: UnixStream, first_message: Option<Instant>) -> Result<End, ControlError> {
        let (mut receiver, private) = match Receiver::new(stream) {
            Ok(made) => made,
            Err(e) => {
                tracing::error!("cannot serve this front-end, its connection is closed: {e}");
                return Ok(End::Left);
            }
        };
        let mut handler = BackendReqHandler::from_stream(private, Arc::clone(&self.session));
        let mut first_message = first_message;
        loop {
            self.take_signals();
            if self.signals.stopping() {
                return Ok(End::Stopping);
            }
            if sys::drain(&self.memory_lost) && self.session().memory_lost() {
                tracing::error!(
                    "the front-end took back memory that it had given to the guest; its connection is closed"
                );
                return Ok(End::Left);
            }
            match receiver.receive() {
                Ok(true) => {
                    first_message = None;
                    let handled = handler.handle_request();
                    if let Err(e) = receiver.relay() {
                        tracing::warn!("the front-end does not read its replies: {e}");
                        return Ok(End::Left);
                    }
                    if let Err(e) = handled {
                        tracing::error!("rejected a message, the connection is closed: {e}");
                        return Ok(End::Left);
                    }
                    if self.session().failed() {
                        return Ok(End::Stopping);
                    }
                    if self.session().is_refused() {
                        tracing::error!("the connection is closed, so that the front-end may try again");
                        return Ok(End::Left);
                    }
                    continue;
                }
                Ok(false) => {}
                Err(ReceiveError::Closed) => {
                    tracing::info!("the front-end disconnected");
                    return Ok(End::Left);
                }
                Err(e) => {
                    tracing::error!("the connection is closed: {e}");
                    return Ok(End::Left);
                }
            }
            let now = Instant::now();
            if first_message.is_some_and(|until| until <= now) {
                tracing::warn!(
                    "the front-end said nothing for {} s, its connection is closed",
                    FIRST_MESSAGE_TIMEOUT.as_secs()
                );
                return Ok(End::Left);
            }
            let until = receiver.deadline().or(first_message);
            let timeout = until.map(|at| at.saturating_duration_since(now));
            wait_for(&[receiver.as_fd(), self.signals.as_fd(), self.memory_lost.as_fd()], timeout)?;
        }
    }
}
