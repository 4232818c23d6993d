//! An export that is served: its connections, one after another on each line, and what is known of it.
//!
//! What it is: a [`Remote`], shared by the engines of the workers, each of which owns the requests of one [`Line`], and by
//! the thread that connects lost lines anew, which may still connect when the sandbox lets no other thread do so.
//!
//! What it is not: it sends no request of a guest; [`crate::engine::nbd`] does.
//!
//! Invariants:
//! - A connection is in the store before a request is sent on it. It leaves the store only when the server has done all that
//!   it had received there and the next connection is in the store. So no request of a dead daemon is carried out after those
//!   of its successor, and the successor always finds a connection by which it can wait for that.
//! - When a connection is lost while an answered write is not flushed, the loss stays noted: the server may have been started
//!   anew without that write.
//! - All lines are connected together. When one is lost, the connecting thread has the others closed, and connects none
//!   before all have ended. Otherwise a FLUSH on a new connection could be answered while another worker still reads a write's
//!   answer from the server before, which has lost that write.
//!
//! ```text
//!   engine   take() ──── requests ──── lost() ┐                             ┌ take()
//!   others   take() ── is_to_end() ─── lost() ┤                             ├ take()
//!   connecting thread                         └ connect ─ put into the store ─ offer, wake
//! ```

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::Shutdown;
use thiserror::Error;

use super::connect::{Peers, connect, resolve};
use super::fence::{Fenced, fence};
use super::handshake::{Export, HandshakeError, negotiate};
use super::marks::Marks;
use super::uri::Uri;
use crate::log::Quota;
use crate::sys;

/// How long a connection and its handshake may take.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// How long after the first vain attempt the next one is made; twice as long after each, up to the second.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A wait for a server is logged as often as this.
pub(super) const LOG_EVERY: Duration = Duration::from_secs(10);
/// The first number in the store of what is a server's: no state names it, a successor knows it by its number. In the place
/// of dead daemons' connections, until there are others: they are [`Fenced::Done`].
pub const FIRST_ID: u32 = 1 << 24;
/// The same: they are [`Fenced::Gone`].
pub const GONE_ID: u32 = FIRST_ID + 1;
/// Connections.
const CONNECTIONS: u32 = FIRST_ID + 2;

/// Where connections are kept that a successor has to know of.
pub trait Keep: fmt::Debug + Send {
    /// Keeps a socket under this number; it stays, however the process ends once this has returned.
    ///
    /// # Errors
    /// When it is not kept.
    fn keep(&mut self, id: u32, socket: BorrowedFd<'_>) -> io::Result<()>;

    /// Gives it up.
    ///
    /// # Errors
    /// When the store is gone.
    fn forget(&mut self, id: u32) -> io::Result<()>;
}

/// Bytes of the largest block of a server that can be served.
pub const MOST_BLOCK: u32 = 4096;

/// Why an export cannot be served.
#[derive(Debug, Error)]
pub enum RemoteError {
    /// The host is not known.
    #[error("cannot find the host: {0}")]
    Resolve(io::Error),
    /// Nothing answers.
    #[error("cannot connect: {0}. {hint}", hint = hint_of(.0))]
    Connect(io::Error),
    /// See [`HandshakeError`].
    #[error("{0}")]
    Handshake(#[from] HandshakeError),
    /// It is another one now.
    #[error("{0}")]
    Changed(String),
    /// Reads and writes of 512 bytes are what virtio-blk knows.
    #[error("the server wants blocks of {0} bytes; 4096 is the most that vublkd can serve")]
    Block(u32),
    /// A block of vublkd's pool has to go in one request.
    #[error("the server takes requests of {0} bytes at most; vublkd needs 4096")]
    Small(u32),
    /// NBD_FLAG_READ_ONLY.
    #[error("the export is read-only. Add --read-only")]
    ReadOnly,
    /// The store does not take it.
    #[error("cannot keep the connection for a successor: {0}")]
    Keep(io::Error),
}

/// A connection that is ready for requests.
#[derive(Debug)]
pub struct Connection {
    /// Its socket; blocking.
    pub socket: OwnedFd,
    /// Its number in the store; 0: there is none.
    pub id: u32,
    /// The server answers reads in chunks.
    pub structured: bool,
}

/// What a line's engine is woken for.
#[derive(Debug, Default)]
struct Mail {
    fresh: Option<Connection>,
    /// Who wants to know when all that was answered is durable.
    flushes: Vec<SyncSender<io::Result<()>>>,
    /// An engine has this line.
    is_attached: bool,
    /// It has taken a connection, and not lost it.
    in_use: bool,
    /// That one is to end, since another line was lost.
    is_to_end: bool,
    /// Since when there is no connection, in use or offered.
    down_since: Option<Instant>,
}

/// One connection at a time, for one worker.
#[derive(Debug)]
pub struct Line {
    wake: OwnedFd,
    mail: Mutex<Mail>,
}

impl Line {
    fn new(connection: Connection) -> io::Result<Self> {
        let mail = Mail { fresh: Some(connection), ..Mail::default() };
        Ok(Self { wake: sys::eventfd()?, mail: Mutex::new(mail) })
    }

    fn mail(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Written when there is something to take.
    #[must_use]
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// An engine has it from now on.
    pub fn attach(&self) {
        self.mail().is_attached = true;
    }

    /// The next connection, if there is one.
    #[must_use]
    pub fn take(&self) -> Option<Connection> {
        let mut mail = self.mail();
        let fresh = mail.fresh.take();
        if fresh.is_some() {
            (mail.in_use, mail.is_to_end) = (true, false);
        }
        fresh
    }

    /// True: nothing more is sent on the connection that was taken; it is over when the server closes it.
    #[must_use]
    pub fn is_to_end(&self) -> bool {
        self.mail().is_to_end
    }

    /// Who waits for a flush.
    #[must_use]
    pub fn take_flushes(&self) -> Vec<SyncSender<io::Result<()>>> {
        std::mem::take(&mut self.mail().flushes)
    }
}

/// A line that lost its connection.
#[derive(Debug)]
pub struct Lost {
    /// Which one.
    pub worker: usize,
    /// What it had.
    pub connection: Connection,
    /// Something was answered on it.
    pub has_served: bool,
    /// The server has closed it, or the kernel has given it up. False: the server may carry out yet what was sent on it.
    pub is_over: bool,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Remote {
    uri: Uri,
    peers: Peers,
    /// As the server described it at the first connection.
    export: Export,
    size: AtomicU64,
    lines: OnceLock<Box<[Line]>>,
    marks: Marks,
    next_id: Mutex<u32>,
    connector: OnceLock<Mutex<Sender<Lost>>>,
    /// Connections that were given up, and on which the server may yet do something.
    not_over: AtomicU32,
    /// It was said that requests end with I/O errors while there is no connection.
    has_said_failing: AtomicBool,
    /// Of lines about the server.
    quota: Mutex<Quota>,
    first: Mutex<Option<Connection>>,
}

impl Remote {
    /// Finds the server and connects for the first time.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub fn open(uri: &Uri, read_only: bool) -> Result<Self, RemoteError> {
        let peers = resolve(&uri.address).map_err(RemoteError::Resolve)?;
        let (connection, export) = dial(&peers, &uri.export)?;
        if export.block.minimum > MOST_BLOCK {
            return Err(RemoteError::Block(export.block.minimum));
        }
        if export.block.maximum < MOST_BLOCK {
            return Err(RemoteError::Small(export.block.maximum));
        }
        if export.flags.read_only() && !read_only {
            return Err(RemoteError::ReadOnly);
        }
        if !export.flags.can_flush() && !export.flags.read_only() {
            tracing::warn!(disk = %uri, "the server knows no flush: what it has answered counts as durable");
        }
        Ok(Self {
            uri: uri.clone(),
            peers,
            size: AtomicU64::new(whole_blocks(&export)),
            export,
            lines: OnceLock::new(),
            marks: Marks::default(),
            next_id: Mutex::new(CONNECTIONS),
            connector: OnceLock::new(),
            not_over: AtomicU32::new(0),
            has_said_failing: AtomicBool::new(false),
            quota: Mutex::default(),
            first: Mutex::new(Some(connection)),
        })
    }

    /// The export, as it was at the first connection.
    #[must_use]
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// The export's name; empty: the server's default.
    #[must_use]
    pub fn export_name(&self) -> &str {
        &self.uri.export
    }

    /// Bytes, as the server said last.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// The ports of TCP that a connection may go to.
    #[must_use]
    pub fn ports(&self) -> Vec<u16> {
        match &self.peers {
            Peers::Unix(_) => Vec::new(),
            Peers::Tcp(peers) => peers.iter().map(std::net::SocketAddr::port).collect(),
        }
    }

    /// How many workers may have a connection of their own, of so many.
    #[must_use]
    pub fn lines_of(&self, workers: u16) -> u16 {
        if self.export.flags.can_multi_conn() { workers } else { 1 }
    }

    /// Connects as often as there are workers, once.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub fn connect_lines(&self, workers: u16) -> Result<(), RemoteError> {
        let mut lines = Vec::new();
        for _ in 0..self.lines_of(workers).max(1) {
            let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
            let connection = match first {
                Some(connection) => connection,
                None => self.dial()?,
            };
            lines.push(Line::new(connection).map_err(RemoteError::Keep)?);
        }
        let _once = self.lines.set(lines.into());
        Ok(())
    }

    /// The line of a worker. `None`: there is none.
    #[must_use]
    pub fn line(&self, worker: usize) -> Option<&Line> {
        self.lines.get()?.get(worker)
    }

    fn lines(&self) -> &[Line] {
        self.lines.get().map_or(&[], |lines| lines)
    }

    /// Since when a line has no connection, the longest.
    #[must_use]
    pub fn down_since(&self) -> Option<Instant> {
        self.lines().iter().filter_map(|line| line.mail().down_since).min()
    }

    /// Puts all connections into the store, and starts the thread that connects lost lines; `confine` is what it does
    /// first.
    ///
    /// # Errors
    /// When the store does not take them, or no thread can be had.
    pub fn start(
        self: &Arc<Self>,
        mut store: Option<Box<dyn Keep>>,
        confine: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        for line in self.lines() {
            if let Some(connection) = line.mail().fresh.as_mut() {
                connection.id = self.keep(store.as_mut(), &connection.socket)?;
            }
        }
        if let Some(store) = &mut store {
            store.forget(FIRST_ID)?;
            store.forget(GONE_ID)?;
        }
        let (sender, lost) = channel();
        let _once = self.connector.set(Mutex::new(sender));
        let remote = Arc::clone(self);
        let run = move || {
            confine();
            remote.reconnect(&lost, store);
        };
        std::thread::Builder::new().name("vublk-connect".into()).spawn(run).map(drop)
    }

    /// Puts a connection into the store before anything is sent on it.
    fn keep(&self, store: Option<&mut Box<dyn Keep>>, socket: &OwnedFd) -> io::Result<u32> {
        let Some(store) = store else { return Ok(0) };
        let mut next = self.next_id.lock().unwrap_or_else(PoisonError::into_inner);
        let id = *next;
        *next = next.checked_add(1).unwrap_or(CONNECTIONS);
        store.keep(id, socket.as_fd())?;
        Ok(id)
    }

    /// A connection was lost, and its server has done what it had received, or cannot be asked. The engine takes the next
    /// one once it is woken.
    pub fn lost(&self, lost: Lost, why: &dyn fmt::Display) {
        let uri = &self.uri;
        if let Some(unflushed) = self.marks.note_loss() {
            tracing::error!(
                disk = %uri,
                "the connection to the server was lost ({why}) while {unflushed} answered writes were not flushed: should the server \
                 have been started anew, they are gone. A flush fails from now on, until vublkd was stopped and started"
            );
        } else if self.may_log() {
            tracing::warn!(disk = %uri, "the connection to the server was lost: {why}. Requests wait for the next one");
        }
        if let Some(line) = self.line(lost.worker) {
            let mut mail = line.mail();
            (mail.down_since, mail.in_use, mail.is_to_end) = (Some(Instant::now()), false, false);
        }
        if !lost.is_over {
            self.not_over.fetch_add(1, Ordering::AcqRel);
        }
        if let Some(sender) = self.connector.get() {
            let sender = sender.lock().unwrap_or_else(PoisonError::into_inner);
            let _ends = sender.send(lost);
        }
    }

    /// Nothing more is sent on a connection; it is over when the server closes it.
    pub fn say_closing(&self, why: &dyn fmt::Display) {
        if self.may_log() {
            tracing::warn!(disk = %self.uri, "{why}: nothing more is sent to the server, which is to close the connection");
        }
    }

    /// Requests have waited so long for the server, and end with I/O errors until there is a connection.
    pub fn say_failing(&self, patience: Duration) {
        if !self.has_said_failing.swap(true, Ordering::AcqRel) && self.may_log() {
            tracing::error!(
                disk = %self.uri,
                "the server has been lost for {} s: requests end with I/O errors (--reconnect-delay)",
                patience.as_secs()
            );
        }
    }

    fn may_log(&self) -> bool {
        self.quota.lock().unwrap_or_else(PoisonError::into_inner).may_log("the server")
    }

    /// What may be gone with a server that is started anew.
    #[inline]
    #[must_use]
    pub fn marks(&self) -> &Marks {
        &self.marks
    }

    /// True while the server may yet carry out what a queue that had to stop gave up.
    #[must_use]
    pub fn may_yet_change(&self) -> bool {
        self.not_over.load(Ordering::Acquire) > 0
    }

    /// Makes durable all that was answered, by the engine of a line; waits.
    ///
    /// # Errors
    /// What the server said; EIO where something answered may be gone; Interrupted where the workers ended before it was asked
    /// or had answered.
    pub fn flush(&self) -> io::Result<()> {
        if self.marks.has_lost() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        if self.marks.unflushed() == 0 {
            return Ok(()); // nothing was changed since
        }
        // With several lines the server says that a flush on one is for all.
        let attached = self.lines().iter().find(|line| line.mail().is_attached);
        let Some(line) = attached else { return Ok(()) };
        let (sender, flushed) = sync_channel(1);
        line.mail().flushes.push(sender);
        sys::signal(&line.wake);
        flushed.recv().unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()))
    }

    fn dial(&self) -> Result<Connection, RemoteError> {
        let (connection, export) = dial(&self.peers, &self.uri.export)?;
        let was = &self.export;
        let what = match () {
            () if whole_blocks(&export) < self.size() => "it is smaller",
            () if export.flags.read_only() && !was.flags.read_only() => "it is read-only now",
            () if !export.flags.read_only() && was.flags.read_only() => "it is not read-only any more",
            () if export.flags != was.flags => "the server can do other things with it",
            () if export.block != was.block => "it has other block sizes",
            () => {
                self.size.fetch_max(whole_blocks(&export), Ordering::Relaxed);
                return Ok(connection);
            }
        };
        Err(RemoteError::Changed(format!(
            "the export is not what it was: {what}. Start the server as it was"
        )))
    }

    /// Connects the lines anew whenever one was lost, until the process ends.
    fn reconnect(&self, lost: &Receiver<Lost>, mut store: Option<Box<dyn Keep>>) {
        let mut over = vec![false; self.lines().len()];
        let mut spent = Vec::new();
        let mut has_served = false;
        let mut pause = FIRST_PAUSE;
        let mut logged: Option<(Instant, String)> = None;
        loop {
            let news = if over.contains(&false) {
                lost.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                // From half of it on, so that the clients of a server do not all come at once.
                lost.recv_timeout(pause.mul_f64(0.5 + fastrand::f64() / 2.0))
            };
            match news {
                Ok(gone) => {
                    self.end_others(gone.worker, &mut over, &mut spent);
                    if !gone.is_over {
                        self.end(&gone.connection.socket);
                    }
                    spent.push(gone.connection.id);
                    has_served |= gone.has_served;
                    // A server that gets nothing done is asked less and less often.
                    if !over.contains(&false) {
                        pause = if has_served { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            match self.dial_lines(store.as_mut()) {
                Ok(connections) => {
                    if self.may_log() {
                        tracing::info!(disk = %self.uri, "connected to the server again");
                    }
                    spent.drain(..).for_each(|id| forget(store.as_mut(), id));
                    over.fill(false);
                    has_served = false;
                    self.has_said_failing.store(false, Ordering::Release);
                    for (line, connection) in self.lines().iter().zip(connections) {
                        let mut mail = line.mail();
                        // Here, for no engine may ever take it: a worker without queues has none.
                        (mail.fresh, mail.down_since) = (Some(connection), None);
                        drop(mail);
                        sys::signal(&line.wake);
                    }
                }
                Err(e) => {
                    let why = e.to_string();
                    let is_due = logged
                        .as_ref()
                        .is_none_or(|(at, last)| at.elapsed() >= LOG_EVERY || *last != why && self.may_log());
                    if is_due {
                        tracing::warn!(disk = %self.uri, "no connection to the server yet: {why}");
                        logged = Some((Instant::now(), why));
                    }
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// One line is over: the others are to end. Where a connection was not taken yet nothing was sent. `spent`: the numbers
    /// of such ones in the store.
    fn end_others(&self, worker: usize, over: &mut [bool], spent: &mut Vec<u32>) {
        for (number, (line, over)) in self.lines().iter().zip(over).enumerate() {
            let mut mail = line.mail();
            if number == worker {
                *over = true;
            } else if let Some(unused) = mail.fresh.take() {
                mail.down_since.get_or_insert_with(Instant::now);
                let _closed_already = rustix::net::shutdown(&unused.socket, Shutdown::Both); // the store has it, too
                spent.push(unused.id);
                *over = true;
            } else if mail.in_use && !std::mem::replace(&mut mail.is_to_end, true) {
                sys::signal(&line.wake);
            }
        }
    }

    /// A connection for each line, in the store; or none.
    fn dial_lines(&self, mut store: Option<&mut Box<dyn Keep>>) -> Result<Vec<Connection>, RemoteError> {
        let mut made: Vec<Connection> = Vec::new();
        for _ in self.lines() {
            let kept = self.dial().and_then(|mut connection| {
                connection.id =
                    self.keep(store.as_deref_mut(), &connection.socket).map_err(RemoteError::Keep)?;
                Ok(connection)
            });
            match kept {
                Ok(connection) => made.push(connection),
                Err(e) => {
                    made.iter().for_each(|unused| forget(store.as_deref_mut(), unused.id));
                    return Err(e);
                }
            }
        }
        Ok(made)
    }

    /// Waits until a connection is over that was given up: what was sent on it must not be carried out after what will be
    /// sent on the next one.
    fn end(&self, socket: &OwnedFd) {
        let ended = fence(socket, |waited| {
            tracing::warn!(
                disk = %self.uri,
                "waiting {} s for the server to end what it was asked for and to close the connection",
                waited.as_secs()
            );
        });
        if !matches!(ended, Ok(Fenced::Done | Fenced::Gone)) {
            tracing::warn!(disk = %self.uri, "the server could not be asked whether it has done what was given up");
        }
        self.not_over.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What to look at where no connection comes about.
fn hint_of(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied {
        "The user of vublkd needs write permission on the server's socket, and search permission on the folders above it: \
         chgrp and chmod them"
    } else {
        "Is the server running? nbdinfo and vublk inspect take the same URI"
    }
}

/// Gives up a connection on which the server does nothing more. Should that fail, the next daemon asks about it once more.
fn forget(store: Option<&mut Box<dyn Keep>>, id: u32) {
    if let Some(store) = store
        && id > 0
    {
        let _asked_again = store.forget(id);
    }
}

/// Bytes of an export, but for those behind its last whole block: no request can end there.
fn whole_blocks(export: &Export) -> u64 {
    export.size - export.size % u64::from(export.block.minimum)
}

fn dial(peers: &Peers, export: &str) -> Result<(Connection, Export), RemoteError> {
    let end = Instant::now() + CONNECT_TIME;
    let mut stream = connect(peers, CONNECT_TIME).map_err(RemoteError::Connect)?;
    let export = negotiate(&mut stream.until(end), export, false)?;
    stream.set_timeouts(None).map_err(RemoteError::Connect)?;
    Ok((Connection { socket: stream.into(), id: 0, structured: export.structured }, export))
}
