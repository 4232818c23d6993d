//! The control thread: one front-end at a time, from its first message to the
//! moment nothing of it is left.
//!
//! What it is: all that serves one disk: where its front-ends come from, its session with its workers, its
//! succession; and a loop over the socket and the process's [`Link`].
//!
//! What it is not: it knows no message; [`crate::session`] does.
//!
//! Invariants: it waits for no front-end, guest or disk but where it also sees the word to stop
//! (for the store it may wait, for seconds at most); a
//! second front-end waits, named in the log and never half-served; when the daemon
//! stops, the listener is closed before anything is drained, so that no front-end
//! connects to a daemon that is leaving.

mod calls;
mod lobby;
mod source;
mod takeover;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use vhost::vhost_user::BackendReqHandler;

use self::lobby::Lobby;
pub use self::source::Source;
use crate::device::{Blame, Device};
use crate::hold::Retry;
use crate::keep::{FdId, Keeper, Phase};
use crate::link::{Asked, Link, Shown};
use crate::rbd::standing::Standing;
use crate::session::Session;
use crate::session::judge::Judged;
use crate::session::receiver::{ReceiveError, Receiver};
use crate::stats::Event;
use crate::succession::{Resume, Succession};
use crate::sys;
use crate::workers::{WorkerError, wait_for};

/// How long a front-end may take from connecting to its first message.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);

/// How soon it is tried again to serve a connection for which there was no descriptor.
const RETRY_EVERY: Duration = Duration::from_millis(100);

/// Why the daemon cannot serve.
#[derive(Debug, Error)]
pub enum ControlError {
    /// `--fd` or LISTEN_FDS names something else.
    #[error(
        "file descriptor {0} {1}. --fd takes a Unix stream socket, listening or connected, that the program which starts \
         vublkd has left open for it; to listen on a path use --socket-path=PATH"
    )]
    BadFd(i32, &'static str),
    /// The only front-end cannot have the image.
    #[error(
        "another process has the image; stop it (vublk doctor, run as root, names it) and start vublkd again"
    )]
    Refused,
    /// What an earlier process had cannot be taken over; the log says why.
    #[error("cannot go on where an earlier vublkd left off")]
    Unfit,
    /// A worker cannot work.
    #[error("{0}")]
    Worker(WorkerError),
    /// Stopping took longer than allowed.
    #[error("stopped without waiting any longer for the disk; requests in flight were not answered")]
    GaveUp,
    /// There is no thread for the disk.
    #[error("cannot start the disk's control thread: {0}. Raise TasksMax=, pids.max or ulimit -u")]
    NoThread(io::Error),
    /// A bug.
    #[error("the disk's control thread has ended in a bug; the lines above say where")]
    Panicked,
    /// The control thread's own waits failed.
    #[error("the control thread cannot go on: {0}")]
    Io(#[from] io::Error),
}

impl From<WorkerError> for ControlError {
    fn from(failure: WorkerError) -> Self {
        match failure {
            WorkerError::GaveUp => Self::GaveUp,
            other => Self::Worker(other),
        }
    }
}

/// Why serving a front-end ended.
enum ConnectionEnd {
    FrontEndLeft,
    Stopping,
    /// A successor goes on with it.
    ForSuccessor,
    /// This process cannot go on with it, and another one can.
    Unfit,
}

/// How the daemon ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DaemonEnd {
    /// All is answered, the front-end is left.
    Stopped,
    /// All is answered, and what a successor needs is kept.
    ForSuccessor {
        /// A successor is asked for; else systemd decides whether there is one.
        asked: bool,
    },
}

/// See the head of the file.
#[derive(Debug)]
pub struct Control {
    device: Arc<Device>,
    link: Arc<Link>,
    /// Shared with `vhost`'s request handler, on this thread only.
    session: Arc<Mutex<Session>>,
    /// What of it outlives this process.
    succession: Succession,
    /// Where the control socket is, for those that take the disk's for it.
    control_socket: Option<PathBuf>,
    /// Where front-ends come from, if more than one may.
    lobby: Option<Lobby>,
    /// Which limits were written down.
    limits_kept: u32,
    /// A successor waits.
    wants_successor: bool,
    /// A stop was asked for when the process was last attended to. All that follows looks here, since one that comes
    /// later was not yet judged: it may be one for a successor.
    stops: bool,
    /// When the rings were stopped for it: CLOCK_MONOTONIC, nanoseconds.
    stopped: u64,
    /// The process that is served.
    front_end: Option<i32>,
}

impl Control {
    /// A control thread's state.
    #[must_use]
    pub fn new(
        device: Arc<Device>,
        link: Arc<Link>,
        session: Session,
        succession: Succession,
        control_socket: Option<PathBuf>,
    ) -> Self {
        Self {
            device,
            link,
            session: Arc::new(Mutex::new(session)),
            succession,
            control_socket,
            lobby: None,
            limits_kept: 0,
            wants_successor: false,
            stops: false,
            stopped: 0,
            front_end: None,
        }
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves front-ends until it is asked to stop. `resume`: the first one, which
    /// an earlier process served; `waiting`: those that were next.
    ///
    /// # Errors
    /// [`ControlError::GaveUp`] when the disk hangs; [`ControlError::Io`].
    pub fn serve(
        &mut self,
        source: Source,
        mut resume: Option<Resume>,
        waiting: Vec<(UnixStream, FdId)>,
    ) -> Result<DaemonEnd, ControlError> {
        let (listener, path) = match source {
            Source::Connected(stream) => {
                self.succession.keep_connection(&stream, resume.as_ref().map_or(0, |r| r.state.connection));
                if resume.is_none() {
                    self.succession.serving();
                }
                let end = self.connection(stream, None, resume)?;
                match end {
                    ConnectionEnd::ForSuccessor => return self.end_for_successor(),
                    ConnectionEnd::Unfit => return Err(ControlError::Unfit),
                    ConnectionEnd::FrontEndLeft | ConnectionEnd::Stopping => {}
                }
                if self.session().is_refused() {
                    return self.finish().and(Err(ControlError::Refused));
                }
                return self.finish();
            }
            Source::Listener(listener, path) => (listener, path),
        };
        let id = resume.as_ref().map_or(0, |resume| resume.state.listener);
        if id != 0 || path.is_some() {
            // Others are given to every process that is started.
            self.succession.keep_listener(&listener, id);
        }
        let lobby = Lobby::new(listener, waiting)?;
        self.succession.set_waiting(lobby.kept());
        self.lobby = Some(lobby);
        if resume.is_none() {
            self.commit(Phase::Idle); // else what is there is needed yet
            self.succession.serving();
        }
        loop {
            let (stream, patience) = match resume.as_ref().map(|r| r.stream.try_clone()) {
                Some(stream) => (stream?, None),
                None => match self.accept()? {
                    None if self.wants_successor => return self.end_for_successor(),
                    None => break,
                    Some(stream) => (stream, Some(Instant::now() + FIRST_MESSAGE_TIMEOUT)),
                },
            };
            self.succession.keep_connection(&stream, resume.as_ref().map_or(0, |r| r.state.connection));
            match self.connection(stream, patience, resume.take())? {
                ConnectionEnd::Stopping => break,
                ConnectionEnd::ForSuccessor => return self.end_for_successor(),
                ConnectionEnd::Unfit => return Err(ControlError::Unfit),
                ConnectionEnd::FrontEndLeft => self.leave(),
            }
            if self.session().failed() {
                break;
            }
        }
        self.lobby = None;
        // One that failed is succeeded, and its socket with it.
        let succeeded = self.session().failed() && self.succession.is_kept();
        if let Some(own) = path.filter(|_| !succeeded) {
            own.remove();
        }
        self.finish()
    }

    /// Writes down what a successor has to know.
    fn commit(&mut self, phase: Phase) {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        self.succession.commit(&session, phase);
    }

    /// Nothing is left of a front-end.
    fn leave(&mut self) {
        self.session().disconnect();
        self.front_end = None;
        self.succession.forget_connection();
        self.commit(Phase::Idle);
    }

    /// Drains what runs and ends the workers.
    fn finish(&mut self) -> Result<DaemonEnd, ControlError> {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        session.disconnect();
        if let Some(failure) = session.take_failure() {
            return Err(failure.into()); // and a successor may do better
        }
        self.succession.stopping();
        session.stop_workers();
        self.device.tell_left_out();
        tracing::info!("stopped: {}", self.device.stats);
        Ok(DaemonEnd::Stopped)
    }

    /// The next front-end, or `None` when this daemon is to end.
    fn accept(&mut self) -> Result<Option<UnixStream>, ControlError> {
        loop {
            self.attend();
            if self.session().failed() {
                return Ok(None);
            }
            self.wants_successor = self.wants_successor && self.make_room()?;
            if self.stops || self.wants_successor {
                return Ok(None);
            }
            if let Some(lobby) = &mut self.lobby
                && let Some(stream) = lobby.next(&self.device)
            {
                self.succession.set_waiting(lobby.kept());
                return Ok(Some(stream));
            }
            self.wait(&[], None)?;
        }
    }

    /// Does what the process asks for.
    fn attend(&mut self) {
        // First: what comes after this look wakes the thread again.
        self.link.woken();
        self.succession.check();
        if self.session().end_late_pause() {
            tracing::warn!("the disk was paused for a snapshot for too long, and goes on");
            self.changed();
        }
        self.session().end_late_trace();
        if self.device.holding.is_due(Instant::now()) {
            self.session().retry(Retry::ForRoom);
        }
        self.keep_limits(); // another disk of the group may have changed them
        if let Some(image) = self.device.disk.image()
            && image.standing() == Standing::Successor
        {
            if self.succession.is_kept() { self.session().fail_for_successor() } else { image.lose() }
        }
        if self.device.disk.image().is_some_and(|image| image.take_news()) {
            let resized = self.session().resize(None);
            match resized {
                Ok(_) => self.changed(),
                Err(e) => tracing::warn!("{e}"),
            }
        }
        // One, so that neither a front-end nor a stop waits for many.
        self.stops = self.link.stopping();
        let asked = if self.stops { None } else { self.link.next_call() };
        if let Some(Asked { call, reply }) = asked {
            let done = self.carry_out(call);
            self.show();
            match (reply, done) {
                (Some(reply), done) => self.link.answer(&reply, done),
                (None, Err(why)) => tracing::error!("{why}"),
                (None, Ok(_)) => {}
            }
        }
        if self.stops {
            // systemd starts a successor, or drops what is stored, and with it the
            // front-end: it knows which, and this daemon does not. Elsewhere a stop is a stop.
            if !self.succession.is_systemd() {
                self.wants_successor = false;
            } else if !self.wants_successor {
                match self.succession.may_follow(&self.device) {
                    Ok(()) => self.wants_successor = true,
                    Err(why) => tracing::error!("no upgrade: {why}"),
                }
            }
        }
        self.show();
    }

    /// Shows what `vublk status` tells of this disk.
    fn show(&self) {
        let session = self.session();
        self.link.show(Shown {
            kept_by: self.succession.kept_by(),
            upgrade_refused: self.succession.refused().map(str::to_owned),
            queues: session.queues(),
            front_end_pid: self.front_end,
            inflight_region: session.has_inflight_region(),
            waited_ms: session.waited_ms(),
            paused: session.shown_pause(),
        });
    }

    /// Something other than a message changed the session.
    fn changed(&mut self) {
        self.commit(self.succession.phase());
    }

    /// Writes down limits that were changed.
    fn keep_limits(&mut self) {
        let version = self.device.throttle.version();
        if std::mem::replace(&mut self.limits_kept, version) != version {
            self.changed();
        }
    }

    /// Waits for the process, a connection, or one of `others`.
    fn wait(&self, others: &[BorrowedFd<'_>], mut timeout: Option<Duration>) -> io::Result<()> {
        let mut fds = others.to_vec();
        fds.push(self.link.as_fd());
        if let Some(lobby) = &self.lobby {
            let (connections, pause) = lobby.fds();
            fds.extend(connections);
            timeout = timeout.into_iter().chain(pause).min();
        }
        let tracer = self.session().tracer();
        fds.extend(tracer.iter().map(AsFd::as_fd));
        let times = self.device.holding.next_retry().into_iter().chain(self.session().paused_until());
        let times = times.chain(self.session().traced_until());
        let next = times.min().map(|at| at.saturating_duration_since(Instant::now()));
        timeout = timeout.into_iter().chain(next).min();
        if self.link.has_calls() { Ok(()) } else { wait_for(&fds, timeout) }
    }

    /// Serves one front-end until it leaves, misbehaves, or this daemon is to end.
    fn connection(
        &mut self,
        stream: UnixStream,
        first_message: Option<Instant>,
        resume: Option<Resume>,
    ) -> Result<ConnectionEnd, ControlError> {
        let (private, handlers) = loop {
            match UnixStream::pair() {
                Ok(pair) => break pair,
                Err(e) => {
                    self.device.complain(Blame::FrontEnd, format_args!("a front-end has to wait: {e}"));
                    // Not for those that connect: they are why there is none left.
                    wait_for(&[self.link.as_fd()], Some(RETRY_EVERY))?;
                    self.attend();
                    if self.stops {
                        return Ok(ConnectionEnd::Stopping);
                    }
                }
            }
        };
        if let Some(image) = self.device.disk.image() {
            // Where there is no descriptor for it, a cluster that is gone keeps this front-end waiting.
            image.set_front_end(stream.try_clone().ok().map(Into::into));
        }
        let mut receiver = Receiver::new(stream, private);
        let end = self.converse(&mut receiver, handlers, first_message, resume);
        if let Some(image) = self.device.disk.image() {
            image.set_front_end(None);
        }
        let end = end?;
        // One that failed may be succeeded, and its connection with it.
        if matches!(end, ConnectionEnd::FrontEndLeft)
            || matches!(end, ConnectionEnd::Stopping) && !self.session().failed()
        {
            sys::hang_up(&receiver);
        }
        Ok(end)
    }

    fn converse(
        &mut self,
        receiver: &mut Receiver,
        private: UnixStream,
        mut first_message: Option<Instant>,
        resume: Option<Resume>,
    ) -> Result<ConnectionEnd, ControlError> {
        let mut handler = BackendReqHandler::from_stream(private, Arc::clone(&self.session));
        self.front_end = sys::peer_pid(receiver.as_fd());
        let mut is_counted = resume.is_some();
        match resume {
            None => {
                let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
                self.succession.keep_inflight(&mut session);
            }
            Some(resume) => {
                if let Some(end) = self.resume(receiver, &mut handler, resume) {
                    return Ok(end);
                }
            }
        }
        self.commit(Phase::Idle);
        loop {
            self.attend();
            if self.session().failed() {
                return Ok(ConnectionEnd::Stopping);
            }
            if self.wants_successor && (receiver.is_empty() || self.stops) {
                self.wants_successor = self.make_room()?;
                if self.wants_successor {
                    return Ok(ConnectionEnd::ForSuccessor);
                }
            }
            if self.stops {
                return Ok(ConnectionEnd::Stopping);
            }
            if self.session().memory_lost() {
                self.device.complain(Blame::FrontEnd, format_args!(
                    "the front-end took back memory that it had given to the guest; its connection is closed"
                ));
                return Ok(ConnectionEnd::FrontEndLeft);
            }
            // While nothing comes, a successor has nothing to be unsure of.
            let received = if receiver.is_ready() {
                self.succession.keeping(Keeper::reading);
                receiver.receive()
            } else {
                receiver.check_time().map(|()| false)
            };
            match received {
                Ok(true) => {
                    first_message = None;
                    if !std::mem::replace(&mut is_counted, true) {
                        self.device.stats.note(Event::FrontEnd, 1);
                    }
                    let judged = receiver.judge();
                    if judged.why.is_none() {
                        let (bytes, fds) = receiver.message();
                        let ids = self.succession.keeping(|k| k.received(bytes, fds));
                        self.session().set_received(ids);
                    }
                    if let Some(end) = self.handle(receiver, &mut handler, judged) {
                        return Ok(end);
                    }
                    continue;
                }
                Ok(false) => {}
                Err(ReceiveError::Closed) => {
                    if self.device.may_log(Blame::Connections) {
                        tracing::info!("the front-end disconnected");
                    }
                    if let Some(image) = self.device.disk.image() {
                        image.guest_left();
                    }
                    return Ok(ConnectionEnd::FrontEndLeft);
                }
                Err(ReceiveError::NotVhostUser) => {
                    let (first, _) = receiver.message();
                    lobby::turn_away(&self.device, receiver.as_fd(), first, self.control_socket.as_deref());
                    return Ok(ConnectionEnd::FrontEndLeft);
                }
                Err(e) => {
                    self.device.complain(Blame::FrontEnd, format_args!("the connection is closed: {e}"));
                    return Ok(ConnectionEnd::FrontEndLeft);
                }
            }
            if receiver.is_empty() {
                self.succession.keeping(Keeper::idle);
            }
            if let Some(lobby) = &mut self.lobby {
                let (control, succession) = (self.control_socket.as_deref(), &mut self.succession);
                let more = lobby.look(&self.device, receiver.as_fd(), control, succession);
                if succession.set_waiting(lobby.kept()) {
                    self.changed();
                }
                if more {
                    continue;
                }
            }
            let now = Instant::now();
            if first_message.is_some_and(|until| until <= now) {
                self.device.complain(
                    Blame::FrontEnd,
                    format_args!(
                        "the front-end said nothing for {} s, its connection is closed",
                        FIRST_MESSAGE_TIMEOUT.as_secs()
                    ),
                );
                return Ok(ConnectionEnd::FrontEndLeft);
            }
            let until = receiver.deadline().or(first_message);
            let timeout = until.map(|at| at.saturating_duration_since(now));
            self.wait(&[receiver.as_fd()], timeout)?;
        }
    }

    /// Carries out the message that the receiver has, and answers it.
    fn handle(
        &mut self,
        receiver: &mut Receiver,
        handler: &mut Handler,
        judged: Judged,
    ) -> Option<ConnectionEnd> {
        self.session().end_pause_with_held();
        let given = if judged.why.is_none() { receiver.give_to_handler() } else { Ok(()) };
        let mut refused = match (judged.why, given) {
            (_, Err(e)) => {
                self.device.complain(Blame::FrontEnd, format_args!("the connection is closed: {e}"));
                return Some(ConnectionEnd::FrontEndLeft);
            }
            (None, Ok(())) => handler.handle_request().err().map(|e| match e {
                vhost::vhost_user::Error::ReqHandlerError(why) => why.to_string(),
                other => format!("message {}: {other}", judged.request),
            }),
            (why, Ok(())) => {
                receiver.forget();
                why
            }
        };
        if let Some(channel) = receiver.take_channel()
            && refused.is_none()
        {
            self.session().set_channel(channel);
        }
        self.session().set_received(Vec::new());
        let told = judged.by_number && self.session().acknowledges();
        // A message that ends the connection ends it for a successor, too.
        let phase = if receiver.has_reply() || refused.is_some() { Phase::Replying } else { Phase::Idle };
        self.commit(phase);
        if self.session().start_moved() {
            self.commit(phase);
            if let Some(why) = self.session().take_undone() {
                let _closes_below = receiver.drop_replies();
                refused = Some(why);
            }
        }
        self.show();
        let answered = match refused {
            Some(_) if told && !receiver.has_reply() => receiver.refuse(judged.request),
            _ => receiver.relay(),
        };
        if let Err(e) = answered {
            self.device.complain(
                Blame::FrontEnd,
                format_args!("cannot answer the front-end, its connection is closed: {e}"),
            );
            return Some(ConnectionEnd::FrontEndLeft);
        }
        if let Some(why) = refused {
            let what =
                if told { "refused a message" } else { "rejected a message, the connection is closed" };
            self.device.complain(Blame::FrontEnd, format_args!("{what}: {why}"));
            if !told {
                return Some(ConnectionEnd::FrontEndLeft);
            }
        }
        self.succession.keeping(Keeper::idle);
        if self.session().failed() {
            return Some(ConnectionEnd::Stopping);
        }
        if self.session().is_refused() {
            self.device.complain(
                Blame::FrontEnd,
                format_args!("the connection is closed, so that the front-end may try again"),
            );
            return Some(ConnectionEnd::FrontEndLeft);
        }
        None
    }
}

type Handler = BackendReqHandler<Mutex<Session>>;
