//! An upgrade: all disks make room for a successor, or none does.
//!
//! What it is: the steps of it, each taken when the one before it has its answer.
//!
//! What it is not: it judges no program, the parent does; it drains nothing, the disks do.
//!
//! Invariant: a disk ends for a successor only when all that are served have made room; if one does not in time, all go
//! on as before.
//!
//! ```text
//!   following ─► judging ─► making ─► the disks end
//!   may each      may the    is room made
//!   disk be       program    by each disk
//!   followed      follow
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Ears, Running};
use crate::link::{Call, Reply, Room};
use crate::start::Failure;
use crate::sys;

/// How long the parent may take to look at a program.
const JUDGEMENT: Duration = Duration::from_secs(3);
/// How long the only disk may take to end what it has in flight.
const DRAIN: Duration = Duration::from_secs(10);
/// The same of several: those that have done so wait for it, and their guests with them.
const DRAIN_OF_SEVERAL: Duration = Duration::from_secs(2);

/// See the head of the file.
pub(super) struct Upgrade {
    step: Step,
    until: Option<Instant>,
    /// `None`: a signal asked for it.
    client: Option<Arc<Reply>>,
}

enum Step {
    /// Answers that the disks owe. The program that is to be judged, if it has not been.
    Following(Vec<Arc<Reply>>, Option<Option<PathBuf>>),
    Judging,
    Making,
    /// The disks end.
    Made,
}

impl Upgrade {
    /// True while the parent's answer is awaited.
    pub(super) fn is_judged(&self) -> bool {
        matches!(self.step, Step::Judging)
    }

    /// Until something is late.
    pub(super) fn time_left(&self) -> Option<Duration> {
        self.until.map(|at| at.saturating_duration_since(Instant::now()))
    }
}

impl<M: FnOnce() -> Result<Ears, Failure>> Running<M> {
    /// Begins one that a client asked for; the program is the one at vublkd's path, or this one.
    pub(super) fn upgrade_for_client(&mut self, program: Option<PathBuf>) -> Arc<Reply> {
        let client = Arc::new(Reply::default());
        self.begin_upgrade(Some(program), Some(Arc::clone(&client)));
        client
    }

    /// Begins one. `program`: to be judged, if it has not been.
    pub(super) fn begin_upgrade(&mut self, program: Option<Option<PathBuf>>, client: Option<Arc<Reply>>) {
        if self.upgrade.is_some() {
            match client {
                Some(client) => client.give(Err("another upgrade is under way".into())),
                None => tracing::error!("no upgrade: another one is under way"),
            }
            return;
        }
        let answers = self.live().map(|disk| disk.link.ask(Call::MayFollow, false)).collect();
        self.upgrade = Some(Upgrade { step: Step::Following(answers, program), until: None, client });
    }

    /// Takes the steps that can be taken. True: the disks are to be told to end.
    pub(super) fn advance_upgrade(&mut self) -> bool {
        let Some(mut upgrade) = self.upgrade.take() else { return false };
        loop {
            let next = self.next_step(&mut upgrade);
            match next {
                Ok(None) => break,
                Ok(Some((step, time))) => {
                    upgrade.step = step;
                    upgrade.until = time.map(|time| Instant::now() + time);
                }
                Err(why) => {
                    match &upgrade.client {
                        Some(client) => {
                            client.give(Err(why));
                            sys::signal(&self.process.told); // to be written
                        }
                        None => tracing::error!("no upgrade: {why}; the daemon goes on"),
                    }
                    return false;
                }
            }
            if matches!(upgrade.step, Step::Made) {
                if let Some(client) = upgrade.client.take() {
                    client.give(Ok(Value::Null));
                }
                self.upgrade = Some(upgrade);
                return true;
            }
        }
        self.upgrade = Some(upgrade);
        false
    }

    /// The step after this one, and its time; `None`: its answers are not all there.
    fn next_step(&self, upgrade: &mut Upgrade) -> Result<Option<(Step, Option<Duration>)>, String> {
        let is_late = upgrade.until.is_some_and(|until| until <= Instant::now());
        match &mut upgrade.step {
            Step::Following(answers, program) => {
                let mut refused = None;
                answers.retain(|answer| match answer.take() {
                    None => true,
                    Some(answer) => {
                        refused = refused.take().or_else(|| answer.err());
                        false
                    }
                });
                match (refused, program) {
                    (Some(why), _) => return Err(why),
                    _ if !answers.is_empty() => return Ok(None),
                    (None, None) => {}
                    (None, Some(program)) => {
                        if self.process.manager.ask(program.as_deref())? {
                            return Ok(Some((Step::Judging, Some(JUDGEMENT))));
                        }
                    }
                }
                self.ask_for_room()
            }
            Step::Judging => match self.process.manager.answer() {
                Some(answer) => {
                    answer?;
                    self.ask_for_room()
                }
                None if is_late => Err("the parent of vublkd does not answer".into()),
                None => Ok(None),
            },
            Step::Making => {
                let missing = self.live().find(|disk| disk.link.room() != Room::Made);
                let Some(missing) = missing else { return Ok(Some((Step::Made, None))) };
                let refused = self.live().any(|disk| disk.link.room() == Room::Refused);
                if !refused && !is_late {
                    return Ok(None);
                }
                self.live().for_each(|disk| disk.link.judge(false));
                let name =
                    missing.name.as_ref().map_or_else(|| "the disk".into(), |name| format!("disk {name}"));
                Err(format!(
                    "{name} has requests in flight that its storage does not end within {} s, or what keeps what a \
                     successor needs is gone; the log says more",
                    self.drain_time().as_secs()
                ))
            }
            Step::Made => Ok(None),
        }
    }

    fn ask_for_room(&self) -> Result<Option<(Step, Option<Duration>)>, String> {
        for disk in self.live() {
            disk.link.begin_room();
            drop(disk.link.ask(Call::MakeRoom, true));
        }
        Ok(Some((Step::Making, Some(self.drain_time()))))
    }

    fn drain_time(&self) -> Duration {
        if self.disks.len() == 1 { DRAIN } else { DRAIN_OF_SEVERAL }
    }
}
