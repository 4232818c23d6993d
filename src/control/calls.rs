//! What the process asks of a disk, by its control socket or a signal: one arm for each.
//!
//! What it is not: it reads no socket; [`crate::rpc`] does, and [`crate::link`] brings a [`Call`] here.
//!
//! Invariant: a call is carried out between two messages of the front-end.

use std::sync::PoisonError;

use serde_json::{Value, to_value};

use super::Control;
use crate::hold::Retry;
use crate::link::Call;

impl Control {
    /// Does it; what is told of it.
    pub(super) fn carry_out(&mut self, call: Call) -> Result<Value, String> {
        match call {
            Call::Resize(size) => {
                let resized = self.session().resize(size).map_err(|e| e.to_string());
                self.changed();
                resized.and_then(|size| to_value(size).map_err(|e| e.to_string()))
            }
            Call::Retry => {
                let held = self.device.holding.held();
                self.session().retry(Retry::All);
                to_value(held).map_err(|e| e.to_string())
            }
            Call::Throttle(change) => {
                let changed = self.device.throttle.change(&change);
                self.keep_limits();
                let shown = self.device.throttle.shown();
                changed.and_then(|()| to_value(shown).map_err(|e| e.to_string()))
            }
            Call::Pause(time) => {
                let paused = self.session().pause(time);
                self.changed();
                paused.map(Value::from)
            }
            Call::Resume(number) => {
                let resumed = self.session().resume(number);
                self.changed();
                // To a tenth of a millisecond, as people read it.
                resumed.map(|time| ((time.as_secs_f64() * 1e4).round() / 10.0).into())
            }
            Call::Snapshot(pause) => {
                let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
                let counted = session.count_snapshot(pause, |file| self.succession.keep_file(file));
                drop(session);
                self.changed();
                counted.map(Value::from)
            }
            Call::Changed(since, from) => self
                .session()
                .changed(since, from)
                .and_then(|changed| to_value(changed).map_err(|e| e.to_string())),
            Call::Trace(request) => self
                .session()
                .begin_trace(request)
                .and_then(|begun| to_value(begun).map_err(|e| e.to_string())),
            Call::MayFollow if self.session().paused_until().is_some() => {
                Err("the disk is paused for a snapshot; try again when it goes on".into())
            }
            Call::MayFollow => self.succession.may_follow(&self.device).map(|()| Value::Null),
            Call::MakeRoom => {
                self.wants_successor = true;
                Ok(Value::Null)
            }
        }
    }
}
