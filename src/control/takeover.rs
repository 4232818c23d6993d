//! The first and the last thing that a control thread does where there is a store: it goes on where a predecessor left
//! off, and ends for a successor.
//!
//! What it is not: what a state holds is [`crate::session::state`]'s, where it is kept [`crate::keep`]'s, and whether
//! there may be a successor [`crate::succession`]'s.
//!
//! Invariant: rings run only once the state that says where they are is written.

use std::io;
use std::os::fd::AsFd;
use std::sync::PoisonError;

use vhost::vhost_user::message::FrontendReq;

use super::{ConnectionEnd, Control, ControlError, DaemonEnd, Handler};
use crate::hold::AtStop;
use crate::keep::Keeper;
use crate::link::Room;
use crate::session::receiver::Receiver;
use crate::session::state::{Fds, RestoreError, State};
use crate::stats::Event;
use crate::succession::Resume;
use crate::sys;
use crate::workers::wait_for;

impl Control {
    /// Makes room for a successor. False: this daemon goes on, or stops without one.
    pub(super) fn make_room(&mut self) -> io::Result<bool> {
        let may = self.drain_for_successor();
        self.stops = self.link.stopping();
        if self.stops {
            return Ok(may);
        }
        if !may {
            self.link.set_room(Room::Refused);
            return Ok(false);
        }
        self.link.set_room(Room::Made);
        // Until all disks of the process have made room, or one does not get there.
        loop {
            self.link.woken();
            self.stops = self.link.stopping();
            match self.link.verdict() {
                _ if self.stops => return Ok(self.succession.is_systemd()),
                Some(true) => return Ok(true),
                Some(false) => {
                    self.session().update_all();
                    return Ok(false);
                }
                None => wait_for(&[self.link.as_fd()], None)?,
            }
        }
    }

    /// Drains, when a successor is wanted. False: none would be started any more.
    fn drain_for_successor(&mut self) -> bool {
        self.stopped = sys::monotonic_ns();
        self.session().stop_rings(AtStop::Leave);
        if self.link.stopping() && !self.succession.is_systemd() {
            return false; // a stop came meanwhile
        }
        self.succession.check();
        let may = self.succession.is_kept() || self.session().failed();
        if !may {
            self.session().update_all();
        }
        may
    }

    /// Ends for a successor, which goes on with the same front-end; the rings have
    /// stopped.
    pub(super) fn end_for_successor(&mut self) -> Result<DaemonEnd, ControlError> {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(failure) = session.take_failure() {
            return Err(failure.into());
        }
        // Reading, if the rest of a message is yet to come: a successor cannot go on.
        self.succession.commit_stopped(&session, self.stopped);
        if !self.succession.is_kept() {
            drop(session);
            return self.finish();
        }
        if self.succession.is_systemd() {
            self.succession.stopping(); // to the parent the exit code says what is wanted
        }
        session.stop_workers();
        Ok(DaemonEnd::ForSuccessor { asked: !self.link.stopping() })
    }

    /// Goes on where a predecessor left off: with the features that it had
    /// negotiated, its rings, and the message that it was at.
    pub(super) fn resume(
        &mut self,
        receiver: &mut Receiver,
        handler: &mut Handler,
        mut resume: Resume,
    ) -> Option<ConnectionEnd> {
        let pending = resume.take_pending();
        let state = &resume.state;
        let fds = Fds(&resume.from.fds);
        let files = pending.fds.iter().map(|&id| fds.get(id)).collect::<Result<Vec<_>, _>>();
        let restored = renegotiate(receiver, handler, state)
            .map_err(RestoreError::Map)
            .and(files)
            .and_then(|files| self.session().restore(state, &fds).map(|()| files));
        let files = match restored {
            Ok(files) => files,
            Err(e) => {
                tracing::error!("cannot go on where an earlier vublkd left off: {e}");
                return Some(if self.succession.is_on_trial() {
                    ConnectionEnd::Unfit
                } else {
                    self.succession.serving();
                    ConnectionEnd::FrontEndLeft
                });
            }
        };
        self.session().count_deaths(state);
        self.changed();
        let replayed = |of: &Self| of.device.stats.times(Event::Replayed);
        let before = replayed(self);
        self.session().start_restored(state);
        let again = replayed(self).saturating_sub(before);
        let refused = self.session().is_refused();
        let failed = self.session().failed();
        if failed {
            // No ring ran: the next death is the same one.
            self.session().forget_last_death(state);
            self.changed();
        }
        if (refused || failed) && self.succession.is_on_trial() {
            let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = state.stopped.filter(|_| !session.any_runs()) {
                self.succession.commit_stopped(&session, at); // as it was found
            }
            return Some(ConnectionEnd::Unfit);
        }
        if failed {
            return Some(ConnectionEnd::Stopping); // the next one finds it as it was
        }
        self.succession.serving();
        // After it has said so: an upgrade that is asked for by one who has read this is the next one.
        match self.session().waited_ms() {
            Some(ms) => {
                tracing::info!("took over from a vublkd that stopped for this one: the guest waited {ms} ms")
            }
            None => tracing::warn!(
                "took over from a vublkd that died: {again} requests that it had in flight are carried out again"
            ),
        }
        if refused {
            return Some(ConnectionEnd::FrontEndLeft);
        }
        self.show();
        if pending.bytes.is_empty() {
            return None;
        }
        tracing::info!("a message that it had not carried out is carried out now");
        self.succession.keeping(Keeper::try_again);
        receiver.put_back(pending.bytes, files);
        self.session().set_received(pending.fds);
        let judged = receiver.judge();
        self.handle(receiver, handler, judged)
    }
}

/// Tells `vhost`'s handler what was negotiated: it is not told otherwise.
fn renegotiate(receiver: &Receiver, handler: &mut Handler, state: &State) -> Result<(), String> {
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
