//! Whether there is a connection, and how one ends.

use std::time::Instant;

use crate::nbd::remote::Connection;

/// Whether there is a connection.
#[derive(Debug)]
pub(super) enum State {
    Up(Connection),
    /// Nothing is sent any more. `end`: how it ended; `None`: the server has not closed it yet.
    Closing {
        connection: Connection,
        since: Instant,
        end: Option<Ended>,
        why: String,
    },
    Down(Instant),
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// By the server, which has done what it had received.
    ByServer,
    /// The kernel gave it up: the server may carry out yet what it had received.
    Unknown,
    /// It is not over, but is not waited for here any more: the next one is connected only once it is.
    GivenUp,
}

impl Ended {
    /// By the error of the socket; 0: the server closed it. The kernel reports what it was told last by the network
    /// (a firewall's refusal, too) when it gives up.
    pub(super) fn of_error(errno: i32) -> Self {
        if matches!(errno, 0 | libc::ECONNRESET | libc::EPIPE) { Self::ByServer } else { Self::Unknown }
    }
}

/// How a connection is given up.
#[derive(Clone, Copy, Debug)]
pub(super) enum Close {
    /// The sending side only; it is over when the server closes it.
    Sending,
    /// Nothing on it is waited for any more.
    Over(Ended),
}

#[cfg(test)]
mod tests {
    use super::Ended;

    /// A firewall that refuses what the kernel sends again is no server that has done all.
    #[test]
    fn only_the_server_says_that_it_is_done() {
        for errno in [0, libc::ECONNRESET, libc::EPIPE] {
            assert_eq!(Ended::of_error(errno), Ended::ByServer, "{errno}");
        }
        for errno in [libc::ETIMEDOUT, libc::EHOSTUNREACH, libc::ECONNREFUSED, libc::EACCES, libc::EPROTO] {
            assert_eq!(Ended::of_error(errno), Ended::Unknown, "{errno}");
        }
    }
}
