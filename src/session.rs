//! The vhost-user session: what the front-end said, turned into commands for
//! the workers.
//!
//! What it is: the state of one device across connections; [`messages`] has one
//! short method for each message.
//!
//! What it is not: it reads no socket ([`receiver`]) and no ring.
//!
//! Invariants: a ring runs if and only if it has a kick, addresses and a size,
//! is enabled, and lies in the memory table; [`Session::update`] is the one
//! place that starts and stops rings by that rule. A message is rejected, which
//! ends the connection, only when going on would be worse.

pub mod deaths;
mod image;
pub mod judge;
pub mod messages;
pub mod pause;
pub mod receiver;
pub mod resize;
pub mod state;
pub mod trace;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Error, Result};

use crate::device::{Blame, Device};
use crate::dirty::DirtyLog;
use crate::hold::{AtStop, Retry};
use crate::inflight;
use crate::keep::FdId;
use crate::link::{Link, Queue};
use crate::memory::GuestMemory;
use crate::promise;
use crate::ring::RingError;
use crate::ring::split::{Layout, Ring, RingState};
use crate::stats::Event;
use crate::sys;
use crate::worker::{Command, QueueParts};
use crate::workers::{WorkerError, Workers};

/// A descriptor of the front-end's, and the number under which it is kept.
#[derive(Debug)]
struct KeptFd {
    /// Shared with the worker that uses it.
    fd: Arc<OwnedFd>,
    id: FdId,
}

/// A virtqueue as the front-end described it so far.
#[derive(Debug, Default)]
struct Vring {
    size: u32,
    /// Descriptor table, available ring, used ring: front-end addresses.
    addresses: Option<[u64; 3]>,
    /// Guest address of the used ring, if what is written there is to be logged.
    used_log: Option<u64>,
    /// Where to go on: SET_VRING_BASE, or what the ring said when it stopped.
    base: u16,
    kick: Option<KeptFd>,
    call: Option<KeptFd>,
    err: Option<KeptFd>,
    enabled: bool,
    running: bool,
    /// This process has run it before.
    ran: bool,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Session {
    device: Arc<Device>,
    workers: Workers,
    link: Arc<Link>,
    vrings: Vec<Vring>,
    memory: Arc<GuestMemory>,
    /// What it was made of.
    regions: Vec<state::KeptRegion>,
    /// VHOST_USER_SET_INFLIGHT_FD, or a region of our own where we have a keeper.
    inflight: Option<(Arc<inflight::Region>, state::InflightState)>,
    /// VHOST_USER_SET_LOG_BASE: in use while LOG_ALL is among the features.
    log: Option<(Arc<DirtyLog>, state::LogState)>,
    /// VHOST_USER_SET_FEATURES.
    features: u64,
    /// VHOST_USER_SET_PROTOCOL_FEATURES.
    protocol_features: u64,
    /// The guest's cache mode is known; else an earlier process may have told it write-through.
    mode_is_settled: bool,
    /// A stop did not wait for the last fdatasync to end.
    unsettled: bool,
    /// The server did not answer the last flush in time, and no ring has run since.
    is_server_silent: bool,
    /// VHOST_USER_SET_BACKEND_REQ_FD, and whether there is news to be told there.
    channel: Option<KeptFd>,
    news: bool,
    image_locked: bool,
    /// Another process has the image: this connection is not served.
    refused: bool,
    /// Why something that the message under way asked for was not done.
    undone: Option<String>,
    /// The front-end was told that its memory is private.
    said_private: bool,
    /// The daemon cannot go on: the disk hangs and a stop was asked for, or a
    /// worker cannot work.
    failure: Option<WorkerError>,
    /// Under which numbers the descriptors of the message that is being handled are kept.
    received: VecDeque<FdId>,
    /// The message stopped rings and changed them; [`Session::start_moved`] starts them again.
    has_moved: bool,
    /// The rings that start are those of an earlier process.
    taking_over: bool,
    /// Requests that were in flight when the processes before this one died.
    deaths: Vec<deaths::Death>,
    replays_nothing: bool,
    /// How long the guest waited for us, when an earlier process stopped for us.
    waited_ms: Option<f64>,
    /// No ring runs, for a snapshot.
    paused: Option<pause::Pause>,
    pauses: u64,
    snapshots: Option<pause::Snapshots>,
    /// Requests are written down, one by one.
    trace: Option<trace::Trace>,
}

impl Session {
    /// A session with nothing said yet.
    #[must_use]
    pub fn new(device: Arc<Device>, workers: Workers, link: Arc<Link>, queues: u16) -> Self {
        Self {
            device,
            workers,
            link,
            vrings: (0..queues).map(|_| Vring::default()).collect(),
            memory: Arc::default(),
            regions: Vec::new(),
            inflight: None,
            log: None,
            features: 0,
            protocol_features: 0,
            mode_is_settled: false,
            unsettled: false,
            is_server_silent: false,
            channel: None,
            news: false,
            image_locked: false,
            refused: false,
            undone: None,
            said_private: false,
            failure: None,
            received: VecDeque::new(),
            has_moved: false,
            taking_over: false,
            deaths: Vec::new(),
            replays_nothing: false,
            waited_ms: None,
            paused: None,
            pauses: 0,
            snapshots: None,
            trace: None,
        }
    }

    /// The device's cache mode is what an earlier process left; else that is found out.
    pub fn settle_mode(&mut self) {
        self.mode_is_settled = true;
    }

    /// The queues that are being served.
    #[must_use]
    pub fn queues(&self) -> Vec<Queue> {
        let running = self.vrings.iter().enumerate().filter(|(_, vring)| vring.running);
        running.map(|(index, vring)| Queue { index, size: vring.size }).collect()
    }

    /// True if the front-end keeps a journal of what is in flight.
    #[must_use]
    pub fn has_inflight_region(&self) -> bool {
        self.inflight.as_ref().is_some_and(|(_, at)| !at.own)
    }

    /// The message that is handled next, and what its descriptors are kept as.
    pub fn set_received(&mut self, ids: Vec<FdId>) {
        self.received = ids.into();
    }

    /// The number of the next descriptor of the message that is being handled.
    fn received(&mut self) -> FdId {
        self.received.pop_front().unwrap_or(0)
    }

    /// Ends what a connection began: drains and stops every ring, unlocks the image, forgets all
    /// that the front-end said, unmaps its memory.
    pub fn disconnect(&mut self) {
        // A daemon that ends leaves what is held to the next one, where that will find it.
        let leave = self.link.stopping() && self.has_inflight_region();
        self.reset_rings(if leave { AtStop::Leave } else { AtStop::Fail });
        self.unlock_image();
        self.is_server_silent = false;
        self.features = 0;
        self.protocol_features = 0;
        (self.refused, self.said_private) = (false, false);
        self.undone = None;
        self.memory = Arc::default();
        self.regions.clear();
        self.apply_memory();
        self.inflight = None;
        self.log = None;
        self.apply_log();
        // One that failed may be succeeded, and its channel with it.
        if let Some(channel) = self.channel.take().filter(|_| self.failure.is_none()) {
            sys::hang_up(&channel.fd);
        }
        self.deaths.clear();
        // The cache mode stays: a front-end that comes back does not tell it again.
        let _to_write_back = self.device.durability.driver_can_flush(true);
    }

    /// True once the daemon cannot go on.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failure.is_some()
    }

    /// The cluster refuses this process's client: what is in flight is a successor's.
    pub fn fail_for_successor(&mut self) {
        self.failure.get_or_insert(WorkerError::Fenced);
    }

    /// Why it cannot.
    pub fn take_failure(&mut self) -> Option<WorkerError> {
        self.failure.take()
    }

    /// Why something that the message under way asked for was not done, if so.
    #[must_use]
    pub fn take_undone(&mut self) -> Option<String> {
        self.undone.take()
    }

    /// True if a message is answered by a number that says what became of it (REPLY_ACK).
    #[must_use]
    pub fn acknowledges(&self) -> bool {
        self.protocol_features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    /// True once the image turned out to be another's when a ring was to start.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// True once the front-end truncated memory that it had given us.
    #[must_use]
    pub fn memory_lost(&self) -> bool {
        self.memory.is_lost()
            || self.inflight.as_ref().is_some_and(|(region, _)| region.is_lost())
            || self.log.as_ref().is_some_and(|(log, _)| log.is_lost())
    }

    /// Carries out again what is held because the disk refused it.
    pub fn retry(&self, which: Retry) {
        self.workers.retry(which);
    }

    /// Ends the workers, none of which has anything in flight.
    pub fn stop_workers(&mut self) {
        self.workers.stop();
        if self.unsettled {
            return; // the kernel drops the locks when the fdatasync has ended
        }
        let Device { disk, durability, .. } = &*self.device;
        disk.release_for_successor(durability.all_files());
    }

    fn vring(&mut self, index: u32) -> Result<(u16, &mut Vring)> {
        let at = u16::try_from(index).map_err(|_| Error::InvalidParam)?;
        let vring = self.vrings.get_mut(usize::from(at)).ok_or_else(|| {
            let why = format!("queue {index} does not exist; use fewer queues or raise --num-queues");
            Error::ReqHandlerError(std::io::Error::other(why))
        })?;
        Ok((at, vring))
    }

    /// An answer of the workers; without one the session cannot go on.
    fn answered<T>(&mut self, answer: std::result::Result<T, WorkerError>) -> Option<T> {
        match answer {
            Ok(value) => Some(value),
            Err(e) => {
                if self.failure.is_none() {
                    tracing::error!(disk = %self.device.disk.path().display(), "{e}");
                    self.failure = Some(e);
                }
                None
            }
        }
    }

    /// Starts or stops a ring so that the invariant holds.
    fn update(&mut self, index: u16) {
        let Some(vring) = self.vrings.get(usize::from(index)) else { return };
        let wanted = vring.enabled && vring.kick.is_some() && vring.addresses.is_some() && vring.size > 0;
        if wanted && !vring.running {
            if self.paused.is_some() {
                return; // `resume` looks again
            }
            self.start(index);
        } else if !wanted {
            if vring.running {
                self.stop(index, AtStop::Fail);
            }
            self.unlock_for_migration();
        }
    }

    fn start(&mut self, index: u16) {
        if self.memory.is_empty() {
            return; // comes with SET_MEM_TABLE
        }
        if self.refused {
            return;
        }
        if self.features & promise::F_VERSION_1 == 0 {
            if self.device.may_log(Blame::Guest) {
                tracing::error!(
                    queue = index,
                    "the driver did not negotiate VIRTIO_F_VERSION_1: it is not served"
                );
            }
            return;
        }
        // First: until the image is ours another daemon may be writing to the ring.
        if !self.lock_image() {
            return;
        }
        self.look_for_private_memory(index);
        match self.prepare(index) {
            Ok(Some(mut parts)) => {
                if parts.ring.is_replaying() {
                    self.device.stats.note(Event::Replayed, parts.ring.replays().into());
                    if self.device.may_log(Blame::FrontEnd) {
                        tracing::info!(
                            queue = index,
                            "goes on with {} requests that an earlier vublkd left in flight",
                            parts.ring.replays()
                        );
                    }
                    if self.taking_over || self.replays_nothing {
                        self.answer_condemned(index, &mut parts);
                    }
                }
                let history = parts.ring.has_history();
                let ran =
                    self.vrings.get_mut(usize::from(index)).map(|v| std::mem::replace(&mut v.ran, true));
                if history && ran == Some(false) {
                    self.assume_mode();
                }
                self.note_cache();
                let asked = self.workers.ask(index, |ack| Command::Start(index, Box::new(parts), ack));
                let asked = match asked {
                    // One that takes over has no message to refuse: another goes on, or none.
                    Err(WorkerError::Start(e)) if !self.taking_over => Some(Err(e)),
                    asked => self.answered(asked),
                };
                match asked {
                    Some(Ok(())) => {
                        if let Some(vring) = self.vrings.get_mut(usize::from(index)) {
                            vring.running = true;
                        }
                        self.is_server_silent = false;
                        tracing::debug!(queue = index, "started");
                    }
                    Some(Err(e)) => self.undone = Some(format!("queue {index} cannot be served now: {e}")),
                    None => {}
                }
            }
            Ok(None) => {}
            Err(e) => self.broken(index, e),
        }
        self.tell_news();
    }

    /// The ring and the descriptors that its worker gets.
    fn prepare(&self, index: u16) -> std::result::Result<Option<QueueParts>, RingError> {
        let Some(vring) = self.vrings.get(usize::from(index)) else { return Ok(None) };
        let [desc, avail, used] = vring.addresses.ok_or(RingError::NoAddresses)?;
        let size = u16::try_from(vring.size).map_err(|_| RingError::Size(vring.size))?;
        let event_idx = self.features & promise::F_EVENT_IDX != 0;
        let mut ring = Ring::new(&self.memory, Layout { size, desc, avail, used }, vring.base, event_idx)?;
        if let Some((region, at)) = &self.inflight {
            ring = if at.own {
                ring.journalled_by_us(region, index, self.taking_over)?
            } else {
                ring.journalled(region, index)?
            };
        }
        let fd = |kept: &Option<KeptFd>| kept.as_ref().map(|kept| Arc::clone(&kept.fd));
        Ok(fd(&vring.kick).map(|kick| QueueParts {
            ring,
            kick,
            call: fd(&vring.call),
            err: fd(&vring.err),
            indirect: self.features & promise::F_INDIRECT_DESC != 0,
            used_log: vring.used_log,
        }))
    }

    fn broken(&self, index: u16, why: RingError) {
        self.device.complain(Blame::Queues, format_args!("queue {index} is not served: {why}"));
        if let Some(err) = self.vrings.get(usize::from(index)).and_then(|v| v.err.as_ref()) {
            sys::signal_foreign(&err.fd);
        }
    }

    /// A VMM whose memory is not shared has a guest that waits for its disk for good.
    fn look_for_private_memory(&mut self, index: u16) {
        let addresses = self.vrings.get(usize::from(index)).and_then(|vring| vring.addresses);
        let is_private = addresses.is_some_and(|[desc, avail, _]| {
            self.memory.is_untouched(desc) && self.memory.is_untouched(avail)
        });
        if is_private && !std::mem::replace(&mut self.said_private, true) {
            self.device.complain(Blame::Queues, format_args!(
                "queue {index} is empty, and so is all of the guest's memory: the VMM has not shared it, and no request \
                 will arrive. With QEMU type -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine \
                 memory-backend=mem, with cloud-hypervisor --memory size=SIZE,shared=on"
            ));
        }
    }

    fn stop(&mut self, index: u16, held: AtStop) {
        self.stop_all(&[index], held);
    }

    /// Drains and stops queues, all at the same time.
    fn stop_all(&mut self, queues: &[u16], held: AtStop) {
        if matches!(self.failure, Some(WorkerError::GaveUp | WorkerError::Fenced)) {
            return;
        }
        for (index, stopping) in self.workers.begin_stops(queues, held) {
            let stopped = self.workers.stopped(stopping);
            let gave_up = matches!(stopped, Err(WorkerError::GaveUp));
            let state = self.answered(stopped).flatten();
            self.has_stopped(index, state);
            if gave_up {
                return; // each would wait for its moment, and there may be hundreds
            }
        }
    }

    fn has_stopped(&mut self, index: u16, state: Option<RingState>) {
        if let Some(vring) = self.vrings.get_mut(usize::from(index)) {
            vring.running = false;
            if let Some(state) = state {
                vring.base = state.next_avail;
            }
        }
        tracing::debug!(queue = index, "stopped");
    }

    /// Changes a ring that may be running: stopped, changed, started again.
    fn change(&mut self, index: u32, change: impl FnOnce(&mut Vring)) -> Result<()> {
        let (at, vring) = self.vring(index)?;
        let moved = vring.running;
        if moved {
            self.stop(at, AtStop::Fail);
        }
        change(self.vring(index)?.1);
        if moved {
            self.has_moved = true;
        } else {
            self.update(at);
        }
        self.carried_out()
    }

    /// Starts the rings that a message moved, once the state says where they are: else a successor would look for what
    /// is in flight where they were, and would repeat what was answered since from an older base. True: there are some.
    pub fn start_moved(&mut self) -> bool {
        let moved = std::mem::take(&mut self.has_moved);
        if moved {
            self.update_all();
        }
        moved
    }

    /// Stops every ring where it stands, for a moment or for a successor: the image stays
    /// locked. `held`: what the workers do with held requests. True: one ran.
    pub fn stop_rings(&mut self, held: AtStop) -> bool {
        let running: Vec<u16> =
            (0..).zip(&self.vrings).filter_map(|(at, vring)| vring.running.then_some(at)).collect();
        self.stop_all(&running, held);
        !running.is_empty()
    }

    /// Starts and stops rings, whatever changed for all of them.
    pub fn update_all(&mut self) {
        (0..self.vrings.len()).filter_map(|at| u16::try_from(at).ok()).for_each(|at| self.update(at));
    }

    fn reset_rings(&mut self, held: AtStop) {
        self.end_pause_with_held();
        self.stop_rings(held);
        // What comes after a driver that this process has served was told its mode by us.
        self.mode_is_settled |= self.vrings.iter().any(|vring| vring.ran);
        self.vrings.fill_with(Vring::default);
    }

    /// Gives the workers the current table, stops rings that are not in it, and
    /// starts those that only waited for it.
    fn apply_memory(&mut self) {
        let memory = Arc::clone(&self.memory);
        let answer = self.workers.set_memory(&memory);
        let outside = self.answered(answer).unwrap_or_default();
        self.stop_all(&outside, AtStop::Fail); // and `update` will say why they cannot start again
        self.update_all();
    }

    /// The dirty log, while it is to be written.
    fn log_in_use(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref().filter(|_| self.features & promise::F_LOG_ALL != 0).map(|(log, _)| log)
    }

    /// Lets the workers log what they write, or not.
    fn apply_log(&mut self) {
        let log = self.log_in_use().cloned();
        let answer = self.workers.set_log(log.as_ref());
        self.answered(answer);
    }

    /// The guest chose a cache mode, or must be taken to have chosen it. It is noted for a
    /// successor before anything is answered.
    fn choose_cache(&mut self, write_back: bool) {
        let turned_off = self.device.durability.choose(write_back);
        self.note_cache();
        // Also where the mode was write-through already: a process before this one may have noted
        // the guest's choice and died before its sync had ended.
        if turned_off || !write_back {
            self.sync();
        }
    }

    /// Notes the cache mode in the front-end's in-flight region, which outlives this process.
    fn note_cache(&self) {
        if let Some((region, at)) = &self.inflight
            && !at.own
        {
            region.note_cache_mode(self.device.durability.write_back_chosen());
        }
    }

    /// A driver that lived before this process may have been told that its writes are durable,
    /// and will not say so: until it does, they are.
    fn assume_mode(&mut self) {
        if !std::mem::replace(&mut self.mode_is_settled, true) && self.device.durability.write_back_chosen() {
            if self.device.may_log(Blame::FrontEnd) {
                tracing::info!(
                    "an earlier back-end served this guest, and did not leave its cache mode: \
                     write-through until the guest chooses"
                );
            }
            self.choose_cache(false);
        }
    }

    /// Makes durable what was answered; a failure is latched.
    fn sync(&mut self) {
        if !self.device.promise().read_only {
            let synced = self.workers.sync(None);
            self.answered(synced);
        }
    }
}
