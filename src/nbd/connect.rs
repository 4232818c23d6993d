//! A connected socket to an NBD server.
//!
//! What it is: [`resolve`], once, while files may still be opened; then [`connect`], as often as it takes.
//!
//! What it is not: it speaks no NBD, and tries nothing again: the caller decides when.
//!
//! Invariant: connecting ends within its time. It opens no file.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{
    self, set_socket_keepalive, set_socket_timeout, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl,
};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::uri::Address;

/// How long a connection is idle before the kernel asks whether the server's host is there, and how long it waits before
/// it asks again.
///
/// A connection must live as long as the network may still deliver what was sent on it: were it given up while the server
/// holds its requests, an old write could be carried out after a newer one that came over the next connection. So data on
/// its way is left to the kernel's retransmissions (net.ipv4.tcp_retries2, some 15 minutes; no TCP_USER_TIMEOUT). The
/// questions are for requests that have arrived: where the server died while the link was cut, only its host can tell that it
/// is gone, and does when it is asked. A host that does not answer is given up in 5 minutes.
const KEEPALIVE: Duration = Duration::from_secs(3);
/// Questions without an answer before the connection ends.
const KEEPALIVE_PROBES: u32 = 99;

/// Where a server can be reached, without looking anything up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peers {
    /// A Unix socket.
    Unix(PathBuf),
    /// The addresses of a host, in the resolver's order; at least one.
    Tcp(Vec<SocketAddr>),
}

/// Looks a server up. This may read files and ask name servers.
///
/// # Errors
/// When the host has no address.
pub fn resolve(address: &Address) -> io::Result<Peers> {
    match address {
        Address::Unix(path) => Ok(Peers::Unix(path.clone())),
        Address::Tcp { host, port } => {
            let peers: Vec<_> = (host.as_str(), *port).to_socket_addrs()?.collect();
            if peers.is_empty() {
                return Err(io::Error::new(ErrorKind::NotFound, format!("{host} has no address")));
            }
            Ok(Peers::Tcp(peers))
        }
    }
}

/// Connects within `time`, to one address after the other, each of which gets an equal part of the time that is left.
///
/// # Errors
/// That of the last address.
pub fn connect(peers: &Peers, time: Duration) -> io::Result<Stream> {
    let late = || io::Error::from(ErrorKind::TimedOut);
    match peers {
        Peers::Unix(path) => connect_unix(path, time).map(Stream::Unix),
        Peers::Tcp(peers) => {
            let end = Instant::now().checked_add(time);
            let mut failure = late();
            for (tried, peer) in peers.iter().enumerate() {
                let left = end.map_or(time, |end| end.saturating_duration_since(Instant::now()));
                let others = u32::try_from(peers.len() - tried).unwrap_or(u32::MAX);
                let part = left.checked_div(others).unwrap_or_default();
                if part.is_zero() {
                    return Err(late());
                }
                match TcpStream::connect_timeout(peer, part).and_then(prepared) {
                    Ok(stream) => return Ok(Stream::Tcp(stream)),
                    Err(e) => failure = e,
                }
            }
            Err(failure)
        }
    }
}

/// A server that accepts no connections for now makes connect(2) wait, for as long as SO_SNDTIMEO says.
fn connect_unix(path: &PathBuf, time: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, sockopt::Timeout::Send, Some(time.max(Duration::from_micros(1))))?;
    rustix::io::retry_on_intr(|| net::connect(&socket, &address)).map_err(|e| match e {
        rustix::io::Errno::AGAIN => ErrorKind::TimedOut.into(),
        e => io::Error::from(e),
    })?;
    set_socket_timeout(&socket, sockopt::Timeout::Send, None)?;
    Ok(socket.into())
}

fn prepared(stream: TcpStream) -> io::Result<TcpStream> {
    // The requests of a turn are sent at once.
    stream.set_nodelay(true)?;
    set_socket_keepalive(&stream, true)?;
    set_tcp_keepidle(&stream, KEEPALIVE)?;
    set_tcp_keepintvl(&stream, KEEPALIVE)?;
    set_tcp_keepcnt(&stream, KEEPALIVE_PROBES)?;
    Ok(stream)
}

/// A connection to an NBD server. Its descriptor is closed in programs that are executed.
#[derive(Debug)]
pub enum Stream {
    /// Of a Unix socket.
    Unix(UnixStream),
    /// Of TCP.
    Tcp(TcpStream),
}

impl Stream {
    /// How long one read or write waits, from now on; `None`: for ever.
    ///
    /// # Errors
    /// When the time is zero.
    pub fn set_timeouts(&self, time: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(time).and_then(|()| stream.set_write_timeout(time)),
            Self::Tcp(stream) => stream.set_read_timeout(time).and_then(|()| stream.set_write_timeout(time)),
        }
    }

    /// The same stream, on which all that is read and written ends at a time together, however slowly the server sends.
    /// The timeouts are those of the last read or write afterwards.
    #[must_use]
    pub fn until(&mut self, end: Instant) -> Until<'_> {
        Until { stream: self, end }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(into),
            Self::Tcp(stream) => stream.read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl From<Stream> for OwnedFd {
    fn from(stream: Stream) -> Self {
        match stream {
            Stream::Unix(stream) => stream.into(),
            Stream::Tcp(stream) => stream.into(),
        }
    }
}

/// See [`Stream::until`].
#[derive(Debug)]
pub struct Until<'a> {
    stream: &'a mut Stream,
    end: Instant,
}

impl Until<'_> {
    fn set_timeouts(&self) -> io::Result<()> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.stream.set_timeouts(Some(left))
    }
}

impl Read for Until<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.set_timeouts()?;
        self.stream.read(into)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.set_timeouts()?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::time::{Duration, Instant};

    use rustix::io::{FdFlags, fcntl_getfd};
    use rustix::net::sockopt::{socket_keepalive, tcp_keepcnt, tcp_keepidle, tcp_nodelay};

    use super::{Address, Peers, Stream, connect, resolve};

    const LONG: Duration = Duration::from_secs(10);
    const SHORT: Duration = Duration::from_millis(50);

    fn greets(mut stream: Stream, mut peer: impl Read + Write) {
        assert_eq!(fcntl_getfd(&stream).unwrap(), FdFlags::CLOEXEC);
        stream.write_all(b"hello").unwrap();
        let mut bytes = [0; 5];
        peer.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
        // Nothing comes: both ways to wait end.
        stream.set_timeouts(Some(SHORT)).unwrap();
        assert_eq!(stream.read(&mut bytes).unwrap_err().kind(), ErrorKind::WouldBlock);
        let end = Instant::now() + SHORT;
        assert_eq!(stream.until(end).read(&mut bytes).unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(stream.until(end).read(&mut bytes).unwrap_err().kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn tcp_is_connected_to_the_first_address_that_answers() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        // A port that is bound and does not listen refuses.
        let closed = TcpListener::bind("127.0.0.1:0").and_then(|gone| gone.local_addr()).unwrap();
        let Peers::Tcp(peers) = resolve(&Address::Tcp { host: "127.0.0.1".into(), port }).unwrap() else {
            panic!("no addresses");
        };
        let peers = Peers::Tcp([vec![closed], peers].concat());
        let stream = connect(&peers, LONG).unwrap();
        assert!(tcp_nodelay(&stream).unwrap() && socket_keepalive(&stream).unwrap());
        assert_eq!(
            (tcp_keepidle(&stream).unwrap(), tcp_keepcnt(&stream).unwrap()),
            (Duration::from_secs(3), 99)
        );
        greets(stream, listener.accept().unwrap().0);
        let refused = connect(&Peers::Tcp(vec![closed]), LONG).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        assert_eq!(connect(&peers, Duration::ZERO).unwrap_err().kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn a_unix_socket_is_connected_or_the_time_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nbd.sock");
        let peers = resolve(&Address::Unix(path.clone())).unwrap();
        assert_eq!(connect(&peers, LONG).unwrap_err().kind(), ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).unwrap();
        greets(connect(&peers, LONG).unwrap(), listener.accept().unwrap().0);
        // The listener accepts no more: after a few connections its queue is full.
        rustix::net::listen(&listener, 1).unwrap();
        let mut waiting = Vec::new();
        let failure = loop {
            match connect(&peers, SHORT) {
                Ok(stream) => waiting.push(stream),
                Err(e) => break e,
            }
            assert!(waiting.len() < 100);
        };
        assert_eq!(failure.kind(), ErrorKind::TimedOut);
    }
}
