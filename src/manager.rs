//! What is said of the whole process to its manager: systemd, vublkd's own parent, or none.
//!
//! What it is: a [`Manager`], by which the disks say that they serve or end, and the process asks for a successor.
//!
//! What it is not: descriptors go to [`crate::store`], which uses the same socket.
//!
//! Invariants: READY=1 is said once, when the last disk serves, and STOPPING=1 once, when the last one is about to end.
//! Only the process's thread reads the socket.
//!
//! ```text
//!   READY=1  STOPPING=1               all disks serve; the process is about to end
//!   WATCHDOG=1                        its workers answer
//!   X_VUBLKD_UPGRADE=1 PATH=/program  to the parent only, which answers with a sentence
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::store::{MAX_PATH, PATIENCE, notify_socket, receive, send};
use crate::sys;

/// What started this process and may start its successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Whatever it is, it starts no successor.
    Other,
    /// systemd, which has a descriptor store.
    Systemd,
    /// vublkd's own parent process.
    Parent,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Manager {
    kind: Kind,
    /// `None`: there is none.
    socket: Option<Arc<OwnedFd>>,
    /// Disks that do not serve yet.
    starting: AtomicUsize,
    /// Disks that are not about to end.
    staying: AtomicUsize,
}

impl Manager {
    /// The one that this process has, which serves so many disks. `parent`: the socket that the parent has passed.
    ///
    /// # Errors
    /// When systemd's store is asked for and this process is not a service with Type=notify, or systemd does not listen.
    pub fn new(kind: Kind, parent: Option<OwnedFd>, disks: usize) -> io::Result<Self> {
        let socket = match (kind, parent) {
            (Kind::Parent, None) => return Err(io::Error::other("the parent passed no socket")),
            (Kind::Parent, parent) => parent,
            (Kind::Systemd | Kind::Other, _) => notify_socket()?,
        };
        if kind == Kind::Systemd && socket.is_none() {
            return Err(io::Error::other(
                "--fd-store is for a systemd unit with Type=notify: NOTIFY_SOCKET is not set",
            ));
        }
        if let Some(socket) = &socket {
            set_socket_timeout(socket, Timeout::Send, Some(PATIENCE))?;
        }
        let (starting, staying) = (AtomicUsize::new(disks), AtomicUsize::new(disks));
        Ok(Self { kind, socket: socket.map(Arc::new), starting, staying })
    }

    /// Who it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> Option<&Arc<OwnedFd>> {
        self.socket.as_ref()
    }

    /// One more disk serves.
    ///
    /// # Errors
    /// EPIPE when the parent is gone; EAGAIN when the manager does not read.
    pub fn serving(&self) -> io::Result<()> {
        if self.starting.fetch_sub(1, Ordering::Relaxed) == 1 { self.tell("READY=1") } else { Ok(()) }
    }

    /// One more disk is about to end.
    ///
    /// # Errors
    /// As [`Manager::serving`].
    pub fn stopping(&self) -> io::Result<()> {
        if self.staying.fetch_sub(1, Ordering::Relaxed) == 1 { self.tell("STOPPING=1") } else { Ok(()) }
    }

    fn tell(&self, what: &str) -> io::Result<()> {
        self.socket.as_ref().map_or(Ok(()), |socket| send(socket, what, &[]))
    }

    /// True once the parent is gone.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        let parent = self.parent();
        parent.is_some_and(|fd| sys::hung_up_within(fd, Duration::ZERO).unwrap_or(true))
    }

    /// Readable when the parent has said something, or is gone.
    #[must_use]
    pub fn parent(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().filter(|_| self.kind == Kind::Parent).map(AsFd::as_fd)
    }

    /// Asks whether a program (or, for `None`, the one at vublkd's path) may follow this daemon's. True: the parent
    /// will answer, see [`Manager::answer`]. The parent opens the program: a daemon opens nothing while it serves.
    ///
    /// # Errors
    /// Why it may not.
    pub fn ask(&self, program: Option<&Path>) -> Result<bool, String> {
        let Some(parent) = self.parent() else {
            return match program {
                None => Ok(false), // vublk has looked at it
                Some(_) => {
                    Err("systemd starts the program that the unit names (ExecStart=): install the new one \
                                there, and leave --binary away"
                        .into())
                }
            };
        };
        let mut question = "X_VUBLKD_UPGRADE=1".to_owned();
        if let Some(path) = program {
            let usable = |path: &&str| !path.contains('\n') && path.len() <= MAX_PATH;
            let Some(path) = path.to_str().filter(usable) else {
                return Err(format!("{}: such a path cannot be passed on", path.display()));
            };
            question.push_str("\nPATH=");
            question.push_str(path);
        }
        send(parent, &question, &[])
            .map(|()| true)
            .map_err(|e| format!("the parent of vublkd does not answer: {e}"))
    }

    /// What the parent answers, if it has said anything: that the program may follow, or why not.
    #[must_use]
    pub fn answer(&self) -> Option<Result<(), String>> {
        let parent = self.parent()?;
        if !sys::readable_within(parent, Duration::ZERO).unwrap_or(true) {
            return None;
        }
        Some(match receive(parent) {
            Ok(Some((why, _))) if why.is_empty() || why == "OK" => Ok(()),
            Ok(Some((why, _))) => Err(why),
            Ok(None) => Err("the parent of vublkd is gone".into()),
            Err(e) => Err(format!("the parent of vublkd does not answer: {e}")),
        })
    }
}
