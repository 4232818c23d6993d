//! One daemon after another on one connection: what is taken over, and what is
//! handed over.
//!
//! What it is: the first and the last thing that a control thread does where
//! somebody keeps what a successor needs.
//!
//! What it is not: what a state holds is [`crate::session::state`]'s affair, where it
//! is kept [`crate::keep`]'s.
//!
//! Invariant: a connection goes on only where it is known what was said on it; else
//! it is closed, for its other end, too.

use std::ffi::OsString;
use std::os::unix::net::{UnixListener, UnixStream};

use vhost::vhost_user::message::FrontendReq;

use super::{Control, ControlError, End, Ended, Handler, close};
use crate::disk::Disk;
use crate::keep::{Keeper, Left};
use crate::promise::{self, Promise};
use crate::session::Session;
use crate::session::receiver::Receiver;
use crate::session::state::{Fds, RestoreError, State};
use crate::sys;

/// What [`crate::upgrade`] adds to the command line: standard input is its socket.
pub const CARRIED_OVER: &str = "--carried-over";

/// A front-end that an earlier process served.
#[derive(Debug)]
pub struct Resume {
    pub(super) stream: UnixStream,
    pub(super) state: State,
    left: Left,
}

/// What an earlier process left.
#[derive(Debug, Default)]
pub struct TakenOver {
    /// Where it listened.
    pub listener: Option<UnixListener>,
    /// Its front-end.
    pub resume: Option<Resume>,
    /// What that one's guest was promised.
    pub promise: Option<Promise>,
    /// The cache mode that its last guest had.
    pub write_back: Option<bool>,
    /// An fsync of its failed.
    pub sync_failed: bool,
}

/// Reads what an earlier process left.
///
/// # Errors
/// [`RestoreError`]: it was another disk, or another version of vublkd.
pub fn take_over(left: Left, disk: &Disk, options: &promise::Options) -> Result<TakenOver, RestoreError> {
    if left.state.is_empty() {
        // It died before it had written anything, or before its rings had stopped for us. It
        // may have listened already; a connection is closed with what it left.
        if left.fds.len() > 1 {
            tracing::error!(
                "an earlier vublkd died, and did not say what it was doing: its connection is closed"
            );
        }
        return Ok(without_state(&left));
    }
    let state = State::parse(&left.state)?;
    state.check_disk(disk)?;
    let fds = Fds(&left.fds);
    let listener =
        if state.listener == 0 { None } else { Some(UnixListener::from(fds.get(state.listener)?)) };
    let mut taken = TakenOver {
        listener,
        resume: None,
        promise: state.promise(disk, options),
        write_back: Some(state.write_back()),
        sync_failed: left.sync_failed,
    };
    // Where it is not there any more, systemd saw the front-end leave.
    let Some(stream) = fds.get(state.connection).ok().map(UnixStream::from) else {
        return Ok(taken);
    };
    if left.unsure {
        tracing::error!(
            "an earlier vublkd died in the middle of a message of the front-end: its connection is closed"
        );
        close(&stream);
        return Ok(taken);
    }
    taken.resume = Some(Resume { stream, state, left });
    Ok(taken)
}

/// What can be told without the state: where the earlier process listened, and that a sync of
/// its failed. The mode of its guest's write cache cannot: that is durable until told otherwise.
#[must_use]
pub fn without_state(left: &Left) -> TakenOver {
    let listener = left.fds.values().find(|fd| sys::is_listening(fd).is_ok_and(|yes| yes));
    let listener = listener.and_then(|fd| fd.try_clone().ok()).map(UnixListener::from);
    let write_back = (!left.state.is_empty()).then_some(false);
    TakenOver { listener, write_back, sync_failed: left.sync_failed, ..TakenOver::default() }
}

/// What the process that starts a successor has to know of us.
pub(super) fn how_we_started(session: &Session) -> Result<serde_json::Value, String> {
    let no_text = |_| "its command line or its folder is no UTF-8".to_owned();
    let folder = std::env::current_dir().map_err(|e| format!("it has no folder any more: {e}"))?;
    let words = std::env::args_os().skip(1).filter(|word| word != CARRIED_OVER);
    let words = words.map(OsString::into_string).collect::<Result<Vec<_>, _>>().map_err(no_text)?;
    let folder = folder.into_os_string().into_string().map_err(no_text)?;
    Ok(serde_json::json!({ "args": words, "folder": folder, "descriptors": session.kept() }))
}

impl Resume {
    /// Where it listened is gone; there is another listener.
    pub fn listens_anew(&mut self) {
        self.state.listener = 0;
    }
}

impl Control {
    /// Gives what a successor needs to the process at the other end of `stream`, and
    /// stops for it.
    pub(super) fn carry_over(&mut self, stream: UnixStream) {
        match stream.set_nonblocking(false).and_then(|()| self.session().carry_over(stream.into())) {
            Ok(()) => {
                tracing::info!("stopping for a successor, which whoever asked for it starts");
                self.handing_over = true;
            }
            Err(e) => {
                tracing::error!("no successor takes over, its starter does not take what it needs: {e}")
            }
        }
    }

    /// Drains, when a successor is wanted. False: nobody would start one any more.
    pub(super) fn makes_room(&mut self) -> bool {
        self.stopped = sys::monotonic_ns();
        let mut session = self.session();
        session.stop_rings();
        if session.is_given() && (self.signals.stopping() || session.failed()) {
            session.take_back(); // a stop is a stop
            return session.failed() && !self.signals.stopping();
        }
        let watched = session.is_watched() || session.failed();
        if !watched {
            tracing::error!("no successor takes over, its starter is gone: going on");
            session.take_back();
            session.update_all();
        }
        watched
    }

    /// Keeps a connection for a successor, unless an earlier process has done so.
    pub(super) fn keep_connection(&self, stream: &UnixStream, resume: Option<&Resume>) {
        match resume {
            Some(resume) => self.session().set_connection(resume.state.connection),
            None => self.session().keep_connection(stream),
        }
    }

    /// Ends for a successor, who goes on with the same front-end; the rings have
    /// stopped.
    pub(super) fn hand_over(&mut self) -> Result<Ended, ControlError> {
        self.rpc = None;
        let mut session = self.session();
        if session.is_stored() {
            let _told = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        }
        if let Some(failure) = session.take_failure() {
            return Err(failure.into());
        }
        // Reading, if the rest of a message is yet to come: a successor cannot go on.
        session.commit_stopped(self.stopped);
        if !session.is_kept() {
            drop(session);
            return self.finish();
        }
        session.stop_workers();
        Ok(Ended::HandedOver)
    }

    /// Goes on where an earlier process left off: with the features that it had
    /// negotiated, its rings, and the message that it was at.
    pub(super) fn resume(
        &mut self,
        receiver: &mut Receiver,
        handler: &mut Handler,
        resume: Resume,
    ) -> Option<End> {
        let Resume { state, left, .. } = resume;
        let fds = Fds(&left.fds);
        let pending = left.pending.unwrap_or_default();
        let files = pending.fds.iter().map(|&id| fds.get(id)).collect::<Result<Vec<_>, _>>();
        let restored = self
            .renegotiate(receiver, handler, &state)
            .map_err(RestoreError::Map)
            .and(files)
            .and_then(|files| self.session().restore(&state, &fds).map(|()| files));
        let files = match restored {
            Ok(files) => files,
            Err(e) if self.session().is_on_trial() => {
                tracing::error!("cannot go on where an earlier vublkd left off: {e}");
                return Some(End::Unfit);
            }
            Err(e) => {
                tracing::error!(
                    "cannot go on where an earlier vublkd left off, the connection is closed: {e}"
                );
                self.session().keeping(Keeper::serving);
                return Some(End::Left);
            }
        };
        match self.session().waited_ms() {
            Some(ms) => {
                tracing::info!("took over from a vublkd that stopped for this one: the guest waited {ms} ms")
            }
            None => tracing::info!("took over from a vublkd that died"),
        }
        let refused = self.session().is_refused();
        let failed = self.session().failed();
        if (refused || failed) && self.session().is_on_trial() {
            let mut session = self.session();
            if let Some(at) = state.stopped.filter(|_| !session.any_runs()) {
                session.commit_stopped(at); // as it was found
            }
            return Some(End::Unfit);
        }
        if failed {
            return Some(End::Stopping); // who comes next finds it as it was
        }
        self.session().keeping(Keeper::serving);
        if refused {
            return Some(End::Left);
        }
        if pending.bytes.is_empty() {
            return None;
        }
        tracing::info!("a message that it had not carried out is carried out now");
        self.session().keeping(Keeper::try_again);
        receiver.put_back(pending.bytes, files);
        self.session().set_received(pending.fds);
        self.handle(receiver, handler)
    }

    /// Tells `vhost`'s handler what was negotiated: it is not told otherwise.
    fn renegotiate(&self, receiver: &Receiver, handler: &mut Handler, state: &State) -> Result<(), String> {
        let set = |request, number| (number != 0).then_some((request, Some(number)));
        let said = [
            Some((FrontendReq::GET_FEATURES, None)),
            Some((FrontendReq::GET_PROTOCOL_FEATURES, None)),
            set(FrontendReq::SET_PROTOCOL_FEATURES, state.protocol_features),
            set(FrontendReq::SET_FEATURES, state.features),
        ];
        for (request, number) in said.into_iter().flatten() {
            receiver.replay(request as u32, number).map_err(|e| e.to_string())?;
            handler.handle_request().map_err(|e| e.to_string())?;
            receiver.drop_replies().map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}
