//! The store: what holds descriptors while one daemon ends and the next begins.
//!
//! What it is: [`Inherited`], what this process was started with, and [`Store`], the daemon's end of the protocol of
//! systemd's file descriptor store (sd_notify(3), sd_listen_fds(3)). At the other end is systemd, or vublkd's own
//! parent ([`crate::supervise`]), which speaks the same. A process has one for each disk: what they put has the disk's
//! name in its own.
//!
//! What it is not: it does not know what a descriptor is for; [`crate::keep`] does. What is said of the whole process is
//! said by [`crate::manager`].
//!
//! Invariant: what was put stays in the store, however this process ends after [`Store::settle`].
//!
//! ```text
//!   FDSTORE=1 FDNAME=vublk-7@root FDPOLL=0  + descriptor     put; without @ where the disk has no name
//!   FDSTOREREMOVE=1 FDNAME=vublk-7@root                      remove
//!   BARRIER=1                               + a socket's end settle: closed when all before it is done
//! ```

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::nbd::remote::Keep;
use crate::sys;

/// The number of a descriptor in the store. 0: it is not there.
pub type FdId = u32;
/// Descriptors by their numbers; shared, since hundreds of them twice may be too many.
pub type Fds = BTreeMap<FdId, Arc<OwnedFd>>;

/// Names in the store are this and a number.
const NAME: &str = "vublk-";
/// `VUBLKD_STORE=pid:descriptor=name:…`: the process that is the store, and what it passes on. systemd passes
/// descriptors as numbers from 3 on instead (LISTEN_FDS), for which a process would have to move those that it has.
pub const VARIABLE: &str = "VUBLKD_STORE";
/// The name of the parent's socket there, and the start of those of listening sockets.
pub const NOTIFY: &str = "notify";
/// See [`NOTIFY`].
pub const SOCKET: &str = "socket";
/// What the names of sockets begin with that the parent has made because its daemons may not; and those names.
pub const MADE: &str = "made-";
/// A disk's; with @ and its name where it has one, as [`SOCKET`].
pub const MADE_SOCKET: &str = "made-socket";
/// The control socket.
pub const MADE_CONTROL: &str = "made-control";
/// That of `--metrics`.
pub const MADE_METRICS: &str = "made-metrics";
/// Set where an upgraded program is started that has not served yet.
pub const TRIAL: &str = "VUBLKD_TRIAL";

/// How long a store may take to get to a message. systemd may be reloading its units.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of a path (limits.h).
pub(crate) const MAX_PATH: usize = 4096;

/// The number in a name of the store, and the disk's name there, which is empty where it has none; `None` for a socket
/// unit's, whatever that is called.
#[must_use]
pub fn number(name: &str) -> Option<(FdId, &str)> {
    let rest = name.strip_prefix(NAME)?;
    let (digits, disk) = rest.split_once('@').unwrap_or((rest, ""));
    let id = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())??;
    Some((id, disk))
}

/// The name in the store of a descriptor of a disk's.
fn name(id: FdId, disk: &str) -> String {
    if disk.is_empty() { format!("{NAME}{id}") } else { format!("{NAME}{id}@{disk}") }
}

/// What started this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A person, a VMM, a service manager.
    First,
    /// The parent, with the program that it had before an upgrade.
    Parent,
    /// The parent, which is the store.
    Daemon,
    /// A parent that is gone already: what it stored is lost.
    Orphan,
}

/// What this process was started with.
#[derive(Debug)]
pub struct Inherited {
    /// What started it.
    pub role: Role,
    /// Descriptors by name: of the parent, or of systemd.
    pub fds: Vec<(String, OwnedFd)>,
}

impl Inherited {
    /// Takes what is there, once, at the start of the process.
    #[must_use]
    pub fn take() -> Self {
        let own = |(fd, name): (i32, String)| Some((name, sys::inherited_fd(fd)?));
        let text = std::env::var(VARIABLE).unwrap_or_default();
        let mut words = text.split(':');
        let store = words.next().and_then(|pid| pid.parse::<u32>().ok());
        let role = if store == Some(std::process::id()) {
            Role::Parent
        } else if store == Some(std::os::unix::process::parent_id()) {
            Role::Daemon
        } else if store.is_some() {
            return Self { role: Role::Orphan, fds: Vec::new() };
        } else {
            let fds = sd_notify::listen_fds_with_names().map(|fds| fds.filter_map(own).collect());
            return Self { role: Role::First, fds: fds.unwrap_or_default() };
        };
        let named = words.filter_map(|word| {
            let (fd, name) = word.split_once('=')?;
            Some((fd.parse().ok()?, name.to_owned()))
        });
        Self { role, fds: named.filter_map(own).collect() }
    }

    /// Takes out those with such names.
    pub fn split(&mut self, mut wanted: impl FnMut(&str) -> bool) -> Vec<(String, OwnedFd)> {
        let (taken, rest) = std::mem::take(&mut self.fds).into_iter().partition(|(name, _)| wanted(name));
        self.fds = rest;
        taken
    }
}

/// What [`Inherited::take`] reads, for a process to be started with these descriptors.
#[must_use]
pub fn variable<'a>(store: u32, fds: impl Iterator<Item = (&'a str, BorrowedFd<'a>)>) -> String {
    fds.fold(store.to_string(), |text, (name, fd)| format!("{text}:{}={name}", fd.as_raw_fd()))
}

/// See the head of the file.
#[derive(Debug)]
pub struct Store {
    socket: Arc<OwnedFd>,
    /// The disk's name, or nothing.
    disk: String,
    /// What systemd has: it drops a descriptor that it has under another name. The parent does not.
    systemd: Option<Fds>,
    settled: bool,
}

impl Store {
    /// Of a disk, behind this socket. `systemd`: it is systemd's, which has these of the disk's already.
    #[must_use]
    pub fn new(socket: Arc<OwnedFd>, disk: String, systemd: Option<Fds>) -> Self {
        Self { socket, disk, systemd, settled: true }
    }

    /// True if it is systemd's.
    #[must_use]
    pub fn is_systemd(&self) -> bool {
        self.systemd.is_some()
    }

    /// The number under which it has this descriptor already.
    #[must_use]
    pub fn find(&self, fd: BorrowedFd<'_>) -> Option<FdId> {
        let mut known = self.systemd.iter().flatten();
        known.find(|(_, other)| sys::is_same_file(fd, other)).map(|(&id, _)| id)
    }

    /// Puts a descriptor.
    ///
    /// # Errors
    /// EPIPE when the parent is gone; EAGAIN when the store does not read.
    pub fn put(&mut self, id: FdId, fd: BorrowedFd<'_>) -> io::Result<()> {
        // Without FDPOLL=0 systemd removes a socket whose other end hangs up.
        send(&self.socket, &format!("FDSTORE=1\nFDNAME={}\nFDPOLL=0", name(id, &self.disk)), &[fd])?;
        self.settled = false;
        if let Some(known) = &mut self.systemd {
            known.insert(id, Arc::new(fd.try_clone_to_owned()?));
        }
        Ok(())
    }

    /// Removes one.
    ///
    /// # Errors
    /// As [`Store::put`].
    pub fn remove(&mut self, id: FdId) -> io::Result<()> {
        if let Some(known) = &mut self.systemd {
            known.remove(&id);
        }
        send(&self.socket, &format!("FDSTOREREMOVE=1\nFDNAME={}", name(id, &self.disk)), &[])
    }

    /// Waits until all that was put stays, however this process ends. The parent reads to the end of a
    /// dead daemon's socket; systemd looks up the sender, who must be there yet.
    ///
    /// # Errors
    /// When systemd does not answer in time.
    pub fn settle(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.settled, true) || !self.is_systemd() {
            return Ok(());
        }
        let (ours, theirs) = UnixStream::pair()?;
        send(&self.socket, "BARRIER=1", &[theirs.as_fd()])?;
        drop(theirs);
        // systemd closes its copy when it has got that far.
        if sys::hung_up_within(&ours, PATIENCE)? { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
    }
}

impl Keep for Store {
    fn keep(&mut self, id: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.put(id, socket)?;
        self.settle()
    }

    fn forget(&mut self, id: u32) -> io::Result<()> {
        self.remove(id)
    }
}

/// A socket to the service manager that started this process, if there is one.
///
/// # Errors
/// When it does not listen.
pub fn notify_socket() -> io::Result<Option<OwnedFd>> {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(None) };
    let socket = UnixDatagram::unbound()?;
    match name.as_encoded_bytes() {
        [b'@', name @ ..] => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
        _ => socket.connect(&name)?,
    }
    Ok(Some(socket.into()))
}

/// Sends a message of the protocol.
///
/// # Errors
/// EPIPE when the other end is gone; EAGAIN when it does not read.
pub fn send(socket: impl AsFd, text: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let bytes = [IoSlice::new(text.as_bytes())];
    retry_on_intr(|| sendmsg(&socket, &bytes, &mut ancillary, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// The next message, and its descriptor; `None` when the other end is gone.
///
/// # Errors
/// EAGAIN when there is none; EMFILE when its descriptor had no room.
pub fn receive(socket: impl AsFd) -> io::Result<Option<(String, Option<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; MAX_PATH + 64];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = retry_on_intr(|| recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags))?;
    let fd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    let text = bytes.get(..got.bytes).unwrap_or_default();
    Ok((got.bytes > 0).then(|| (String::from_utf8_lossy(text).into_owned(), fd)))
}
