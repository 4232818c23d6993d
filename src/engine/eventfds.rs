//! Eventfds that are watched by one epoll, for engines without a ring.
//!
//! What it is: edge-triggered, so that each write is an event though no counter
//! is ever read.
//!
//! What it is not: for operations on the disk.
//!
//! Invariant: an eventfd that is not watched any more gives no event.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{Token, Wait};

/// Events taken from the kernel at once; the others come with the next wait.
const EVENTS: usize = 64;

/// See the head of the file.
#[derive(Debug)]
pub(super) struct Eventfds {
    epoll: Epoll,
    watched: Box<[RawFd]>,
    ready: Vec<Token>,
}

impl Eventfds {
    /// For `tokens` eventfds.
    pub(super) fn new(tokens: u16) -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            watched: vec![-1; tokens.into()].into_boxed_slice(),
            ready: Vec::with_capacity(EVENTS),
        })
    }

    /// As [`super::Engine::watch`].
    pub(super) fn watch(&mut self, token: Token, fd: BorrowedFd<'_>) -> io::Result<()> {
        let entry = self.watched.get_mut(usize::from(token.0)).ok_or(io::ErrorKind::InvalidInput)?;
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token.0.into());
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)?;
        *entry = fd.as_raw_fd();
        Ok(())
    }

    /// As [`super::Engine::unwatch`].
    pub(super) fn unwatch(&mut self, token: Token) {
        let Some(fd) = self.watched.get_mut(usize::from(token.0)).filter(|fd| **fd >= 0) else { return };
        let fd = std::mem::replace(fd, -1);
        if let Err(e) = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()) {
            tracing::warn!("cannot stop watching an eventfd: {e}");
        }
        self.ready.retain(|t| *t != token);
    }

    /// Waits for events, or only looks for them.
    pub(super) fn wait(&mut self, wait: Wait) -> io::Result<()> {
        let timeout = match wait {
            Wait::No => 0,
            Wait::Yes => -1,
            // Not less than that, or it would be asked again and again.
            Wait::For(time) => i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX),
        };
        let mut events = [EpollEvent::default(); EVENTS];
        match self.epoll.wait(timeout, &mut events) {
            Ok(n) => {
                let tokens = events.iter().take(n).filter_map(|e| u16::try_from(e.data()).ok());
                self.ready.extend(tokens.map(Token));
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Gives the tokens of those that were written.
    pub(super) fn reap(&mut self) -> impl Iterator<Item = Token> {
        self.ready.drain(..)
    }
}
