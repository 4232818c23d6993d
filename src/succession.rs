//! One daemon after another on one connection: what is kept for a successor, what is taken over from a predecessor,
//! and whether there may be a successor at all.
//!
//! What it is: a [`Succession`], which owns the store and the numbers of the listening socket and the connection there;
//! and [`take_over`], which reads what a predecessor kept.
//!
//! What it is not: it knows no message; a [`Session`] yields its state and takes one. It starts no process; the store
//! does.
//!
//! Invariant: a connection goes on only where it is known what was said on it; else
//! it is closed, for its other end, too.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use crate::device::Device;
use crate::disk::Disk;
use crate::keep::{FdId, Keeper, Pending, Phase, Predecessor};
use crate::manager::Manager;
use crate::promise::{self, Promise};
use crate::session::Session;
use crate::session::pause::KeptSnapshots;
use crate::session::state::{Fds, RestoreError, State};
use crate::sys;
use crate::throttle;

/// A front-end that a predecessor served.
#[derive(Debug)]
pub struct Resume {
    /// Its connection.
    pub stream: UnixStream,
    /// What it had said.
    pub state: State,
    pub(crate) from: Predecessor,
}

/// What a predecessor leaves to this daemon.
#[derive(Debug, Default)]
pub struct TakenOver {
    /// Where it listened.
    pub listener: Option<UnixListener>,
    /// Its front-end.
    pub resume: Option<Resume>,
    /// The connections that waited for their turn.
    pub waiting: Vec<(UnixStream, FdId)>,
    /// What that one's guest was promised.
    pub promise: Option<Promise>,
    /// The cache mode that its last guest had.
    pub write_back: Option<bool>,
    /// An fsync of its failed.
    pub sync_failed: bool,
    /// Limits that were set while it served.
    pub limits: Option<throttle::Kept>,
    /// It had stopped for this daemon.
    pub had_stopped: bool,
    /// What it knew of snapshots.
    pub snapshots: Option<KeptSnapshots>,
}

/// Reads what a predecessor kept.
///
/// # Errors
/// [`RestoreError`]: it was another disk, or another version of vublkd.
pub fn take_over(
    from: Predecessor,
    disk: &Disk,
    options: &promise::Options,
) -> Result<TakenOver, RestoreError> {
    if from.state.is_empty() {
        // It died before it had written anything. It may have listened already; a connection is closed with its copy.
        if from.fds.len() > 1 {
            tracing::error!(
                "an earlier vublkd died, and did not say what it was doing: its connection is closed"
            );
        }
        return Ok(without_state(&from));
    }
    let state = State::parse(&from.state)?;
    state.check_disk(disk)?;
    let fds = Fds(&from.fds);
    // Where it is not there any more, another is made.
    let listener = fds.get(state.listener).ok().map(UnixListener::from);
    let mut taken = TakenOver {
        listener,
        resume: None,
        waiting: state.waiting.iter().filter_map(|&id| Some((fds.get(id).ok()?.into(), id))).collect(),
        promise: state.promise(disk, options),
        write_back: Some(state.write_back()),
        sync_failed: from.sync_failed,
        limits: state.limits.clone(),
        had_stopped: state.stopped.is_some(),
        snapshots: state.snapshots(disk, &fds),
    };
    // Where it is not there any more, systemd saw the front-end leave.
    let Some(stream) = fds.get(state.connection).ok().map(UnixStream::from) else {
        return Ok(taken);
    };
    if from.is_unsure {
        tracing::error!(
            "an earlier vublkd died in the middle of a message of the front-end: its connection is closed"
        );
        sys::hang_up(&stream);
        return Ok(taken);
    }
    taken.resume = Some(Resume { stream, state, from });
    Ok(taken)
}

/// What can be told without the state: where the predecessor listened, and that a sync of
/// its failed. The mode of its guest's write cache cannot: that is durable until told otherwise.
#[must_use]
pub fn without_state(from: &Predecessor) -> TakenOver {
    let listener = from.fds.values().find(|fd| sys::is_listening(fd).is_ok_and(|yes| yes));
    let listener = listener.and_then(|fd| fd.try_clone().ok()).map(UnixListener::from);
    let write_back = (!from.state.is_empty()).then_some(false);
    TakenOver { listener, write_back, sync_failed: from.sync_failed, ..TakenOver::default() }
}

impl Resume {
    /// Where it listened is gone; there is another listener.
    pub fn listens_anew(&mut self) {
        self.state.listener = 0;
    }

    /// The message that the predecessor had whole and did not carry out.
    #[must_use]
    pub(crate) fn take_pending(&mut self) -> Pending {
        self.from.pending.take().unwrap_or_default()
    }
}

/// See the head of the file.
#[derive(Debug)]
pub struct Succession {
    keeper: Option<Keeper>,
    manager: Arc<Manager>,
    /// A store was asked for, and is gone.
    lost: Option<String>,
    listener: FdId,
    connection: FdId,
    waiting: Vec<FdId>,
    /// This program is new, and the store starts the one before it should it not serve.
    on_trial: bool,
    /// Why an upgrade did not take place.
    refused: Option<String>,
}

impl Succession {
    /// With what keeps it, if there is a store.
    #[must_use]
    pub fn new(
        keeper: Option<Keeper>,
        manager: Arc<Manager>,
        on_trial: bool,
        refused: Option<String>,
    ) -> Self {
        let (listener, connection, waiting) = (0, 0, Vec::new());
        Self { keeper, manager, lost: None, listener, connection, waiting, on_trial, refused }
    }

    /// Does something with the keeper, if there is one. A keeper that fails is given up:
    /// the daemon serves on, without a successor.
    pub fn keeping<T: Default>(&mut self, what: impl FnOnce(&mut Keeper) -> io::Result<T>) -> T {
        let Some(keeper) = &mut self.keeper else { return T::default() };
        match what(keeper) {
            Ok(value) => value,
            Err(e) => {
                self.give_up(&format!("cannot keep what a successor would need: {e}"));
                T::default()
            }
        }
    }

    fn give_up(&mut self, why: &str) {
        tracing::error!(
            "{why}. The daemon serves on; a crash now ends the connection, and vublk upgrade does not work until \
             vublkd was started anew"
        );
        self.lost = Some(why.to_owned());
        if let Some(keeper) = self.keeper.take() {
            keeper.abandon();
        }
    }

    /// Notices a parent that is gone.
    pub fn check(&mut self) {
        if self.keeper.is_some() && self.manager.is_gone() {
            self.give_up("the parent process of vublkd, which starts successors, is gone");
        }
    }

    /// True if a successor could go on, should this process end now.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.keeper.is_some()
    }

    /// True if the store is systemd's.
    #[must_use]
    pub fn is_systemd(&self) -> bool {
        self.keeper.as_ref().is_some_and(|keeper| keeper.store().is_systemd())
    }

    /// True until this program, which is new, has served.
    #[must_use]
    pub fn is_on_trial(&self) -> bool {
        self.on_trial
    }

    /// What keeps it, in a word, for the status.
    #[must_use]
    pub fn kept_by(&self) -> &'static str {
        match &self.keeper {
            None => "none",
            Some(_) if self.is_systemd() => "systemd",
            Some(_) => "parent",
        }
    }

    /// Why the last upgrade did not take place, for the status.
    #[must_use]
    pub fn refused(&self) -> Option<&str> {
        self.refused.as_deref()
    }

    /// Keeps the listening socket, unless a predecessor has: `id`.
    pub fn keep_listener(&mut self, fd: &impl AsFd, id: FdId) {
        self.listener = if id == 0 { self.keeping(|k| k.keep(fd)) } else { id };
    }

    /// Keeps the connection of a front-end, unless a predecessor has: `id`.
    pub fn keep_connection(&mut self, fd: &impl AsFd, id: FdId) {
        self.connection = if id == 0 { self.keeping(|k| k.keep(fd)) } else { id };
    }

    /// The connection is none any more.
    pub fn forget_connection(&mut self) {
        self.connection = 0;
    }

    /// Keeps the connection of a front-end that waits, once it is among those of
    /// [`Succession::set_waiting`].
    pub fn keep_waiting(&mut self, fd: &impl AsFd) -> FdId {
        self.keeping(|k| k.keep(fd))
    }

    /// Keeps a file that the session's state names from the next commit on.
    pub fn keep_file(&mut self, fd: &impl AsFd) -> FdId {
        self.keeping(|k| k.keep(fd))
    }

    /// Which connections wait. True: others did at the last commit.
    pub fn set_waiting(&mut self, waiting: Vec<FdId>) -> bool {
        let changed = self.waiting != waiting;
        self.waiting = waiting;
        changed
    }

    /// A region of our own for what is in flight, until the front-end gives one. It
    /// has to be in the state before a ring starts.
    pub fn keep_inflight(&mut self, session: &mut Session) {
        if self.keeper.is_some() {
            let made = self.keeping(|keeper| session.own_inflight(|file| keeper.keep(file)).map(Some));
            session.set_own_inflight(made);
        }
    }

    /// How far the message under way has come, as a successor would find it.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.keeper.as_ref().map_or(Phase::Idle, Keeper::phase)
    }

    /// Writes down what a successor has to know now.
    pub fn commit(&mut self, session: &Session, phase: Phase) {
        self.write(session, phase, None);
    }

    /// Writes down that the rings stopped where they are, at this time: CLOCK_MONOTONIC,
    /// nanoseconds.
    pub fn commit_stopped(&mut self, session: &Session, at: u64) {
        self.write(session, self.phase(), Some(at));
    }

    fn write(&mut self, session: &Session, phase: Phase, stopped: Option<u64>) {
        if self.keeper.is_some() {
            let mut state = session.state();
            (state.listener, state.connection, state.stopped) = (self.listener, self.connection, stopped);
            state.waiting.clone_from(&self.waiting);
            self.keeping(|k| k.commit(&state.bytes(), &state.names(), phase));
        }
    }

    /// This disk is served.
    pub fn serving(&mut self) {
        self.on_trial = false;
        self.say(Manager::serving);
    }

    /// This disk is about to be served no longer.
    pub fn stopping(&mut self) {
        self.say(Manager::stopping);
    }

    /// A parent that does not read keeps nothing, either.
    fn say(&mut self, what: impl FnOnce(&Manager) -> io::Result<()>) {
        let said = what(&self.manager);
        self.keeping(|_| said);
    }

    /// Whether a successor could go on, asked before anything is given up.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub fn may_follow(&self, device: &Device) -> Result<(), String> {
        if self.keeper.is_none() {
            return Err(match &self.lost {
                Some(why) => format!("{why}. Start vublkd anew"),
                None => "this vublkd was started with --supervise=off: no process would start its successor. Start \
                         it anew, without that option"
                    .into(),
            });
        }
        if !device.disk.is_at_its_path() {
            let path = device.disk.path().display();
            return Err(format!("{path}: another disk is there now than the guest has. Put it back first"));
        }
        Ok(())
    }
}
