//! Whether a server is done with what was sent on a connection.
//!
//! What it is: the wait for the end of a connection that is given up: a dead daemon's, or one of this daemon's own.
//!
//! What it is not: where connections are kept is the store's, and which are given up [`super::remote`]'s.
//!
//! Invariant: nothing is sent on a connection once this has begun.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::Shutdown;

use super::remote::LOG_EVERY;

/// How a dead daemon's connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fenced {
    /// The server was there, and closed the connection: it has done all that it had received.
    Done,
    /// The server had closed it already, or is gone: it may have been started anew since.
    Gone,
    /// Nothing is known of the server: what it received may be carried out yet.
    Unknown,
}

/// Waits until a server has done what a dead daemon had sent on this connection: a server closes a connection only then.
/// (A server that dies between the look at the socket and the end of this cannot be told from one that has closed.)
/// `waits`: is told of each ten seconds.
///
/// # Errors
/// When the socket cannot be read.
pub fn fence(socket: &OwnedFd, mut waits: impl FnMut(Duration)) -> io::Result<Fenced> {
    let started = Instant::now();
    let hung_up = |within: Duration| -> io::Result<PollFlags> {
        let mut fds = [PollFd::new(socket, PollFlags::IN | PollFlags::RDHUP)];
        let time = within.try_into().map_err(io::Error::other)?;
        poll(&mut fds, Some(&time))?;
        Ok(fds.first().map_or(PollFlags::empty(), PollFd::revents))
    };
    let gone = hung_up(Duration::ZERO)?.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR);
    let _gone_already = rustix::net::shutdown(socket, Shutdown::Write);
    let mut bytes = [0; 16 << 10];
    loop {
        while hung_up(LOG_EVERY)?.is_empty() {
            waits(started.elapsed());
        }
        match rustix::io::read(socket, &mut bytes) {
            Ok(0) if gone => return Ok(Fenced::Gone),
            Ok(0) => return Ok(Fenced::Done),
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
            Err(Errno::CONNRESET | Errno::PIPE) => return Ok(Fenced::Gone),
            // The kernel has given it up, and says what the network told it last.
            Err(_) => return Ok(Fenced::Unknown),
        }
    }
}
