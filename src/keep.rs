//! What survives us: descriptors that a successor needs, and the state that says
//! what they are for.
//!
//! What it is: a [`Keeper`], which hands descriptors to whoever outlives this
//! process (a supervisor, or systemd's file descriptor store; else it has them
//! ready for whoever comes and asks), and in it a file of state, written before and
//! after each message of the front-end.
//!
//! What it is not: it knows no message and no queue: states and messages are
//! bytes. It is never given a disk's descriptor or a ring's: the kernel lets go of
//! a dead daemon's locks only with the last of them, which is how a successor
//! knows that nothing is written any more.
//!
//! Invariants: whenever this process is killed the file holds one whole state; a
//! descriptor that a state names is kept before that state is; what no state names
//! is let go.
//!
//! ```text
//!   idle ─► reading ─► received ─► replying ─► idle
//!           a message  it is whole,   it is carried    the reply
//!           may be     kept, and not  out: the new     is out
//!           half read  carried out    state counts
//!
//!   found by a successor:
//!   idle      go on
//!   reading   what was read is lost: the connection is closed
//!   received  carry it out, from the state before it
//!   replying  nobody knows whether it is out: the connection is closed
//! ```

mod file;
pub mod packets;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use sd_notify::NotifyState;

use self::file::{AT_SYNC_FAILED, AT_TRIES, Header, MESSAGE, length, load};
pub use self::file::{Pending, Phase};
use self::packets::{Packet, kind, receive, send};
use crate::sys;

/// The number of a kept descriptor. 0: it is not kept.
pub type FdId = u32;

/// The file of state.
const STATE: FdId = 1;
/// How long a supervisor may take to read.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long systemd may take to get to a message: it may be reloading its units.
const BARRIER: Duration = Duration::from_secs(10);
/// How many successors may carry out a message that daemons die of: with the first
/// one three have died then.
const TRIES: u8 = 2;
/// How long whoever is to start a successor may take to take what is kept.
const HAND_OVER_TIME: Duration = Duration::from_secs(5);
/// Names in systemd's store begin with it.
pub const STORED: &str = "vublk-";

/// What an earlier process left.
#[derive(Debug)]
pub struct Left {
    /// The last state.
    pub state: Vec<u8>,
    /// The message it was at, if it had one whole.
    pub pending: Option<Pending>,
    /// What was read of a message, or a reply to it, may be lost; or each daemon dies
    /// of the one that it was at.
    pub unsure: bool,
    /// An fdatasync had failed.
    pub sync_failed: bool,
    /// All descriptors.
    pub fds: Fds,
}

/// Descriptors by the numbers under which they are kept; shared, since hundreds of
/// them twice may be too many.
pub type Fds = BTreeMap<FdId, Arc<OwnedFd>>;

/// Who outlives us.
#[derive(Debug)]
enum Store {
    /// A process at the other end of a socket of whole packets.
    Supervisor(OwnedFd),
    /// systemd. It drops what it has under another name, so that we have to know
    /// what it has.
    Systemd(Fds),
    /// Nobody but us.
    Here {
        fds: Fds,
        /// Whoever started us to go on from another daemon, and wants to know when we
        /// serve.
        starter: Option<OwnedFd>,
        /// Whoever is to start one that goes on from us; it has all that is kept.
        carrier: Option<OwnedFd>,
    },
}

/// See the head of the file.
#[derive(Debug)]
pub struct Keeper {
    store: Store,
    kept: BTreeSet<FdId>,
    next: FdId,
    /// Those with numbers below are kept for certain.
    settled: FdId,
    /// Descriptors of the message under way.
    pending: Vec<FdId>,
    file: File,
    header: Header,
    /// The byte at [`AT_TRIES`].
    tries: u8,
}

impl Keeper {
    /// With a supervisor at the other end of `socket`; and what is left of an
    /// earlier process, if there was one.
    ///
    /// # Errors
    /// When the socket fails, or the file of state cannot be made or read.
    pub fn supervised(socket: OwnedFd) -> io::Result<(Self, Option<Left>)> {
        let fds = read_all(&socket)?;
        Self::new(Store::Supervisor(socket), fds)
    }

    /// With nobody: what is kept is here, for [`Keeper::hand_to`].
    ///
    /// # Errors
    /// When the file of state cannot be made.
    pub fn here() -> io::Result<Self> {
        let store = Store::Here { fds: Fds::new(), starter: None, carrier: None };
        Ok(Self::new(store, Fds::new())?.0)
    }

    /// The same, for a daemon that is to go on with what comes through `socket`.
    ///
    /// # Errors
    /// As [`Keeper::supervised`].
    pub fn handed(socket: OwnedFd) -> io::Result<(Self, Option<Left>)> {
        let fds = read_all(&socket)?;
        Self::new(Store::Here { fds: Fds::new(), starter: Some(socket), carrier: None }, fds)
    }

    /// With systemd's file descriptor store; `fds` are those that it started us
    /// with, by their names.
    ///
    /// # Errors
    /// When the file of state cannot be made or read, or systemd does not listen.
    pub fn systemd(fds: impl Iterator<Item = (String, OwnedFd)>) -> io::Result<(Self, Option<Left>)> {
        if std::env::var_os("NOTIFY_SOCKET").is_none() {
            return Err(io::Error::other(
                "--fd-store is for a systemd unit with Type=notify: NOTIFY_SOCKET is not set",
            ));
        }
        let number = |name: &str| name.strip_prefix(STORED).and_then(|n| n.parse().ok());
        let fds = fds.filter_map(|(name, fd)| number(&name).map(|id: FdId| (id, Arc::new(fd)))).collect();
        Self::new(Store::Systemd(Fds::new()), fds)
    }

    fn new(store: Store, mut fds: Fds) -> io::Result<(Self, Option<Left>)> {
        let next = fds.keys().last().map_or(STATE + 1, |last| last + 1);
        if let Some(file) = fds.remove(&STATE) {
            let file = File::from(file.try_clone()?);
            let (header, state, mut pending) = load(&file)?;
            let mut bytes = [0; 2];
            let _of_an_older_version = file.read_exact_at(&mut bytes, AT_TRIES);
            let [tries, sync_failed] = bytes;
            pending = pending.filter(|_| tries < TRIES);
            let unsure = match header.phase {
                Phase::Idle => false,
                Phase::Received => pending.is_none(),
                Phase::Reading | Phase::Replying => true,
            };
            let mut kept: BTreeSet<FdId> = fds.keys().copied().collect();
            kept.insert(STATE);
            let held = pending.as_ref().map_or_else(Vec::new, |p| p.fds.clone());
            let mut keeper = Self { store, kept, next, settled: next, pending: held, file, header, tries };
            if let Store::Systemd(known) | Store::Here { fds: known, .. } = &mut keeper.store {
                known.clone_from(&fds);
                known.insert(STATE, Arc::new(keeper.file.try_clone()?.into()));
            }
            return Ok((keeper, Some(Left { state, pending, unsure, sync_failed: sync_failed != 0, fds })));
        }
        let file = File::from(rustix::fs::memfd_create("vublk-state", rustix::fs::MemfdFlags::CLOEXEC)?);
        // Before it is kept: whoever finds it can read it.
        file.write_all_at(&Header::default().bytes(), 0)?;
        let mut keeper = Self {
            store,
            kept: BTreeSet::new(),
            next,
            settled: next,
            pending: Vec::new(),
            file,
            header: Header::default(),
            tries: 0,
        };
        let copy = keeper.file.try_clone()?;
        keeper.put(STATE, copy.as_fd())?;
        Ok((keeper, None))
    }

    /// Keeps a descriptor. Kept a second time it may get the same number.
    ///
    /// # Errors
    /// When whoever keeps it is gone, or has no room: then it is lost with us.
    pub fn keep(&mut self, fd: impl AsFd) -> io::Result<FdId> {
        let fd = fd.as_fd();
        if let Store::Systemd(known) = &self.store
            && let Some((&id, _)) = known.iter().find(|(_, other)| sys::is_same_file(fd, other))
        {
            return Ok(id);
        }
        let id = self.next;
        let next = id.checked_add(1).ok_or_else(|| io::Error::other("no number is left"))?;
        self.put(id, fd)?;
        self.next = next;
        Ok(id)
    }

    fn put(&mut self, id: FdId, fd: BorrowedFd<'_>) -> io::Result<()> {
        match &mut self.store {
            Store::Supervisor(socket) => send(socket, kind::KEEP, id, &[fd])?,
            Store::Systemd(known) => {
                let name = format!("{STORED}{id}");
                // Without FDPOLL=0 it lets go of a socket whose other end hangs up.
                let what =
                    [NotifyState::FdStore, NotifyState::FdName(&name), NotifyState::Custom("FDPOLL=0")];
                sd_notify::notify_with_fds(&what, &[fd])?;
                known.insert(id, Arc::new(fd.try_clone_to_owned()?));
            }
            Store::Here { fds, carrier, .. } => {
                if let Some(carrier) = carrier {
                    send(carrier, kind::KEEP, id, &[fd])?;
                }
                fds.insert(id, Arc::new(fd.try_clone_to_owned()?));
            }
        }
        self.kept.insert(id);
        Ok(())
    }

    /// Waits until everything so far is kept, whatever happens to us then.
    ///
    /// # Errors
    /// When systemd does not answer in time.
    fn settle(&mut self) -> io::Result<()> {
        let Store::Systemd(_) = &self.store else { return Ok(()) }; // a packet sent is a packet kept
        if self.settled == self.next {
            return Ok(());
        }
        self.settled = self.next;
        let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])?;
        drop(theirs);
        // It closes its copy when it has got that far.
        if crate::sys::hung_up_within(&ours, BARRIER)? { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
    }

    /// A message may be half read from now on.
    ///
    /// # Errors
    /// When the file of state cannot be written.
    pub fn reading(&mut self) -> io::Result<()> {
        self.set_phase(Phase::Reading)
    }

    /// Nothing was read, or a reply is out.
    ///
    /// # Errors
    /// When the file of state cannot be written.
    pub fn idle(&mut self) -> io::Result<()> {
        self.set_phase(Phase::Idle)
    }

    /// Lets go of everything: what is kept is not true any more, and whoever finds it
    /// shall not go on from it.
    pub fn abandon(mut self) {
        // As far as it is possible at all.
        let _ = self.set_phase(Phase::Reading);
        for id in std::mem::take(&mut self.kept) {
            if id != STATE && self.forget(id).is_err() {
                return;
            }
        }
    }

    /// False once a supervisor, or another who is to start a successor, is gone: nobody
    /// would take over.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        match &self.store {
            Store::Supervisor(socket) | Store::Here { carrier: Some(socket), .. } => {
                !sys::hung_up_within(socket, Duration::ZERO).unwrap_or(true)
            }
            Store::Systemd(_) | Store::Here { .. } => true,
        }
    }

    /// Gives all that is kept, and where we write to, to the process at the other end of
    /// `socket`, and once that has it what comes from now on: it starts a successor when
    /// we are gone.
    ///
    /// # Errors
    /// When it does not take all of it, in time: then nothing has changed.
    pub fn hand_to(&mut self, socket: OwnedFd) -> io::Result<()> {
        let Store::Here { fds, carrier, .. } = &mut self.store else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let until = Instant::now() + HAND_OVER_TIME;
        let give = |kind, id, fds: &[BorrowedFd<'_>]| {
            let left = until.saturating_duration_since(Instant::now());
            set_socket_timeout(&socket, Timeout::Send, Some(left.max(Duration::from_millis(1))))?;
            send(&socket, kind, id, fds)
        };
        give(kind::OUTPUT, 1, &[io::stdout().as_fd()])?;
        give(kind::OUTPUT, 2, &[io::stderr().as_fd()])?;
        fds.iter().try_for_each(|(&id, fd)| give(kind::KEEP, id, &[fd.as_fd()]))?;
        give(kind::END, 0, &[])?;
        // It may have had no room for one of them.
        let left = until.saturating_duration_since(Instant::now());
        set_socket_timeout(&socket, Timeout::Recv, Some(left.max(Duration::from_millis(1))))?;
        match receive(&socket)? {
            Some(Packet::End) => *carrier = Some(socket),
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }

    /// True if somebody has all that is kept, to start a successor when we are gone.
    #[must_use]
    pub fn is_given(&self) -> bool {
        matches!(self.store, Store::Here { carrier: Some(_), .. })
    }

    /// No successor shall come, or whoever was to start one is gone.
    pub fn take_back(&mut self) {
        if let Store::Here { carrier, .. } = &mut self.store
            && let Some(carrier) = carrier.take()
        {
            let _gone = send(carrier, kind::STOPPED, 0, &[]);
        }
    }

    /// How many descriptors are kept.
    #[must_use]
    pub fn count(&self) -> usize {
        self.kept.len()
    }

    /// Where [`crate::disk::Disk`] notes down that an fdatasync failed, at once: a
    /// successor has to know, or a FLUSH of its would succeed.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn sync_note(&self) -> io::Result<(File, u64)> {
        Ok((self.file.try_clone()?, AT_SYNC_FAILED))
    }

    /// Tells that this daemon serves.
    ///
    /// # Errors
    /// When the supervisor is gone.
    pub fn serving(&mut self) -> io::Result<()> {
        match &mut self.store {
            Store::Supervisor(socket) => send(socket, kind::SERVING, 0, &[]),
            Store::Systemd(_) => Ok(()),
            // Whoever started us has nothing more to do with us.
            Store::Here { starter, .. } => {
                starter.take().map_or(Ok(()), |socket| send(socket, kind::SERVING, 0, &[]))
            }
        }
    }

    /// Asks for a successor. False: nobody here starts one; systemd does when it is
    /// told to restart the service.
    ///
    /// # Errors
    /// When the supervisor is gone.
    pub fn call_successor(&self, program: Option<BorrowedFd<'_>>) -> io::Result<bool> {
        let Store::Supervisor(socket) = &self.store else { return Ok(false) };
        send(socket, kind::SUCCEED, 0, program.as_slice())?;
        Ok(true)
    }

    /// True if nobody has what is kept but us: a crash loses it.
    #[must_use]
    pub fn is_here(&self) -> bool {
        matches!(self.store, Store::Here { carrier: None, .. })
    }

    /// True if what is kept outlives this process, however it ends.
    #[must_use]
    pub fn is_lasting(&self) -> bool {
        !matches!(self.store, Store::Here { .. })
    }

    /// True if somebody has the program that served before us, should we not.
    #[must_use]
    pub fn is_on_trial(&self) -> bool {
        matches!(self.store, Store::Here { starter: Some(_), .. })
    }

    /// True if it is systemd, which tells a stop from a restart by itself.
    #[must_use]
    pub fn is_systemd(&self) -> bool {
        matches!(self.store, Store::Systemd(_))
    }

    /// What becomes of the message under way.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.header.phase
    }

    fn set_phase(&mut self, phase: Phase) -> io::Result<()> {
        self.carried_out(phase)?;
        if self.header.phase == phase {
            return Ok(());
        }
        self.header.phase = phase;
        self.file.write_all_at(&self.header.bytes(), 0)
    }

    /// Begins to carry out a message at which an earlier process had died.
    ///
    /// # Errors
    /// When the file of state cannot be written.
    pub fn try_again(&mut self) -> io::Result<()> {
        self.tries = self.tries.saturating_add(1);
        self.file.write_all_at(&[self.tries], AT_TRIES)
    }

    /// Nobody died of the message.
    fn carried_out(&mut self, phase: Phase) -> io::Result<()> {
        if self.tries > 0 && phase != Phase::Received {
            self.tries = 0;
            self.file.write_all_at(&[0], AT_TRIES)?;
        }
        Ok(())
    }

    /// Keeps a whole message, before it is carried out; gives its descriptors'
    /// numbers.
    ///
    /// # Errors
    /// As [`Keeper::keep`].
    pub fn received(&mut self, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<Vec<FdId>> {
        let ids = fds.iter().map(|fd| self.keep(fd)).collect::<io::Result<Vec<_>>>()?;
        self.settle()?;
        let at = self.header.at(MESSAGE);
        self.file.write_all_at(bytes, at)?;
        let numbers: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        self.file.write_all_at(&numbers, at + bytes.len() as u64)?;
        self.header.message = length(bytes)?;
        self.header.fds = length(&numbers)?;
        self.set_phase(Phase::Received)?;
        self.pending.clone_from(&ids);
        Ok(ids)
    }

    /// `state` is what counts from now on, and with it a message that was
    /// received is carried out. `names`: every descriptor that it names; others are
    /// let go.
    ///
    /// # Errors
    /// When the file of state cannot be written.
    pub fn commit(&mut self, state: &[u8], names: &BTreeSet<FdId>, phase: Phase) -> io::Result<()> {
        self.settle()?;
        self.carried_out(phase)?;
        let slot = 1 - self.header.active;
        self.file.write_all_at(state, self.header.at(slot))?;
        if let Some(len) = self.header.len.get_mut(usize::from(slot)) {
            *len = length(state)?;
        }
        self.header.active = slot;
        self.header.phase = phase;
        self.file.write_all_at(&self.header.bytes(), 0)?;
        if phase != Phase::Received {
            self.pending.clear(); // the state names what it needs of it
        }
        let needed = |id: &FdId| *id == STATE || names.contains(id) || self.pending.contains(id);
        let gone: Vec<FdId> = self.kept.iter().copied().filter(|id| !needed(id)).collect();
        gone.into_iter().try_for_each(|id| self.forget(id))
    }

    fn forget(&mut self, id: FdId) -> io::Result<()> {
        self.kept.remove(&id);
        match &mut self.store {
            Store::Supervisor(socket) => send(socket, kind::FORGET, id, &[]),
            Store::Systemd(known) => {
                known.remove(&id);
                let name = format!("{STORED}{id}");
                sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(&name)])
            }
            Store::Here { fds, carrier, .. } => {
                fds.remove(&id);
                carrier.as_ref().map_or(Ok(()), |carrier| send(carrier, kind::FORGET, id, &[]))
            }
        }
    }
}

/// What is kept for a new daemon.
fn read_all(socket: &OwnedFd) -> io::Result<Fds> {
    set_socket_timeout(socket, Timeout::Recv, Some(PATIENCE))?;
    set_socket_timeout(socket, Timeout::Send, Some(PATIENCE))?;
    let mut fds = Fds::new();
    while let Packet::Keep(id, fd) = receive(socket)?.ok_or(io::ErrorKind::UnexpectedEof)? {
        fds.insert(id, Arc::new(fd));
    }
    Ok(fds)
}
