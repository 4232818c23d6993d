//! The process: its signals, its control socket, and the control threads of its disks.
//!
//! What it is: the loop of the first thread. It answers `status` from what the disks show, passes other calls and the
//! word to stop on by their [`Link`]s, and makes an upgrade of what each disk does for one.
//!
//! What it is not: it knows no front-end, no guest and no store; a disk's [`Control`](crate::control::Control) does.
//!
//! Invariants: this thread waits for nothing that a guest, a front-end or a disk does, so `status` is answered and a
//! stop ends the process in time whatever they do. A control thread that does not end is left behind. A disk that fails
//! leaves the others as they are.

mod upgrade;

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use self::upgrade::Upgrade;
use crate::args::Socket;
use crate::control::{ControlError, DaemonEnd};
use crate::kept_file::KeptFile;
use crate::link::{Call, Link};
use crate::manager::Manager;
use crate::rpc::{self, Answer, Server};
use crate::sandbox::{self, Role};
use crate::signals::{Signal, Signals};
use crate::silence::Silence;
use crate::start::{Failure, Start};
use crate::status::{About, DiskState, ProcessStatus, QueuesStatus};
use crate::store::{self, Store};
use crate::supervise::GAVE_UP;
use crate::watchdog::Watchdog;
use crate::workers::{WorkerError, wait_for};
use crate::{log, metrics, sys, trace};

/// How much longer than for a drain a control thread may take.
const LAST_MOMENT: Duration = Duration::from_millis(500);
/// How long clients wait for several disks to be served.
const START: Duration = Duration::from_secs(2);
/// How soon it is tried again to accept a client for which there was no descriptor.
const RETRY_EVERY: Duration = Duration::from_millis(100);

/// Wakes the process when it is dropped.
struct Told(Arc<OwnedFd>);

impl Drop for Told {
    fn drop(&mut self) {
        sys::signal(&self.0);
    }
}

/// A disk whose control thread was started.
struct Disk {
    name: Option<String>,
    /// Where its front-ends connect, if it has made that socket.
    socket: Option<PathBuf>,
    link: Arc<Link>,
    /// An earlier daemon has left something of it.
    succeeds: bool,
    /// It is open, and may be serving.
    open: bool,
    /// Whether its cluster answers.
    silence: Silence,
    thread: Option<JoinHandle<()>>,
    ended: Receiver<Result<DaemonEnd, Failure>>,
    end: Option<Result<DaemonEnd, Failure>>,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Process {
    /// Those of the process.
    pub signals: Signals,
    /// Written by the SIGBUS handler.
    pub memory_lost: OwnedFd,
    /// Written when a disk has something to tell.
    pub told: Arc<OwnedFd>,
    /// The service manager's, if it wants one.
    pub watchdog: Option<Watchdog>,
    /// What started this process.
    pub manager: Arc<Manager>,
    /// The file of the disks.
    pub config: Option<PathBuf>,
    /// What is in that file, and what an earlier daemon kept of it.
    pub file: Option<(String, Option<KeptFile>)>,
    /// The store starts the program before this one should this one not serve.
    pub on_trial: bool,
    /// What the store has of disks that the file does not have any more.
    pub left: Vec<(String, OwnedFd)>,
    /// What the process gives up.
    pub sandbox: sandbox::Mode,
    /// None of the disks was served by an earlier daemon: one that cannot be served ends the process.
    pub first: bool,
}

/// Where the process is asked, not a disk.
#[derive(Debug, Default)]
pub struct Ears {
    /// The control socket.
    pub rpc: Option<Server>,
    /// `--metrics`.
    pub metrics: Option<metrics::server::Server>,
}

/// What [`Process::run`] works on.
struct Running<M> {
    process: Process,
    /// Makes what is below; `None` once it was made.
    open: Option<M>,
    ears: Ears,
    disks: Vec<Disk>,
    upgrade: Option<Upgrade>,
    /// The file of the disks, as it is kept for a successor.
    kept: Option<KeptFile>,
    started: Instant,
    /// Statistics were asked for.
    report: bool,
    parent_is_gone: bool,
}

impl Process {
    /// Serves these disks to their ends.
    ///
    /// # Errors
    /// As [`Start::serve`], if the disk is the only one or the first start; as `open`, which is called when the first disk
    /// is ready; when no thread can be had.
    pub fn run(
        self,
        starts: Vec<Start>,
        open: impl FnOnce() -> Result<Ears, Failure>,
    ) -> Result<DaemonEnd, Failure> {
        let disks = starts.into_iter().map(Disk::start).collect::<Result<_, _>>()?;
        let (open, ears) = (Some(open), Ears::default());
        let (started, upgrade, kept, report, parent_is_gone) = (Instant::now(), None, None, false, false);
        Running { process: self, open, ears, disks, upgrade, kept, started, report, parent_is_gone }.run()
    }
}

impl Disk {
    fn start(start: Start) -> Result<Self, Failure> {
        let (name, link) = (start.meant.name.clone(), Arc::clone(&start.link));
        let succeeds = !start.stored.is_empty();
        let socket = match &start.meant.socket {
            Socket::Path(path) => std::path::absolute(path).ok(),
            Socket::Fd(_) | Socket::Passed => None,
        };
        let (sender, ended) = sync_channel(1);
        let told = Told(Arc::clone(link.told()));
        let _none_yet = link.next_start();
        let called = name.clone();
        let run = move || {
            // Also where it panics, in a build that unwinds.
            let (_told, sender) = (told, sender);
            log::name_thread(called.as_deref());
            let _kept = sender.send(start.serve());
        };
        let thread = std::thread::Builder::new().name("vublk-control".into()).spawn(run);
        let thread = thread.map_err(ControlError::NoThread)?;
        let (open, silence, thread) = (false, Silence::default(), Some(thread));
        Ok(Self { name, socket, link, succeeds, open, silence, thread, ended, end: None })
    }

    /// Does what its control thread wants of the process, and finds out whether that has ended.
    fn look(&mut self) {
        let ended = if self.end.is_none() { self.ended.try_recv() } else { Err(TryRecvError::Empty) };
        while let Some(start) = self.link.next_start() {
            start.now();
        }
        let end = match ended {
            Err(TryRecvError::Empty) => return,
            Err(TryRecvError::Disconnected) => Err(ControlError::Panicked.into()),
            Ok(end) => end,
        };
        self.link.close();
        // Its descriptors are closed, and the disk with them, before the process is seen to end.
        let joined = if end.is_ok() { self.thread.take().map(JoinHandle::join) } else { None };
        self.end =
            Some(if matches!(joined, Some(Err(_))) { Err(ControlError::Panicked.into()) } else { end });
    }

    fn is_live(&self) -> bool {
        self.end.is_none()
    }

    /// What `vublk status` tells.
    fn state(&self) -> DiskState {
        let failed = self.end.as_ref().and_then(|end| end.as_ref().err()).map(ToString::to_string);
        let device = self.link.device().map(AsRef::as_ref);
        DiskState::new(self.name.clone(), self.socket.clone(), failed, device, self.link.shown())
    }
}

impl<M: FnOnce() -> Result<Ears, Failure>> Running<M> {
    fn run(mut self) -> Result<DaemonEnd, Failure> {
        loop {
            sys::drain(&self.process.told);
            for at in 0..self.disks.len() {
                self.look(at)?;
            }
            self.serve_clients();
            self.take_signals();
            if let Some(end) = self.end() {
                return end;
            }
            self.settle();
            if sys::drain(&self.process.memory_lost) {
                self.disks.iter().for_each(|disk| disk.link.wake());
            }
            self.hear_parent();
            if self.advance_upgrade() {
                self.serve_clients(); // its client has its answer before the disks end
                self.kept.iter().for_each(KeptFile::outdate);
                self.live().for_each(|disk| disk.link.judge(true));
            }
            let left = self.time_left();
            if left.is_some_and(|left| left.is_zero()) {
                log::complain("stopped: the control thread does not end");
                log::flush();
                sys::exit_now(GAVE_UP.into());
            }
            self.wait(left)?;
        }
    }

    fn live(&self) -> impl Iterator<Item = &Disk> {
        self.disks.iter().filter(|disk| disk.is_live())
    }

    /// Looks at a disk; an error ends the process.
    fn look(&mut self, at: usize) -> Result<(), Failure> {
        let alone = self.disks.len() == 1;
        let Some(disk) = self.disks.get_mut(at).filter(|disk| disk.is_live()) else { return Ok(()) };
        disk.look();
        if let Some(go) = disk.link.waits_to_serve() {
            if let Some(open) = self.open.take() {
                match open() {
                    Ok(ears) => self.ears = ears,
                    Err(e) => {
                        drop(go);
                        let _ended = disk.thread.take().map(JoinHandle::join);
                        return Err(e);
                    }
                }
                let Ears { rpc, metrics } = &mut self.ears;
                let folders = rpc.as_ref().and_then(Server::folder).into_iter();
                let folders: Vec<_> = folders.chain(metrics.as_ref().and_then(|m| m.folder())).collect();
                sandbox::enter(self.process.sandbox, None, &folders, &[]);
                if self.process.sandbox != sandbox::Mode::Off {
                    log::restart()?;
                }
                if let Some(metrics) = metrics {
                    metrics.start()?;
                }
                sandbox::confine(Role::Process);
            }
            disk.open = true;
            let _ended = go.send(self.ears.rpc.as_ref().map(Server::path));
        }
        let Some(Err(why)) = &disk.end else { return Ok(()) };
        let gave_up = matches!(
            why.downcast_ref(),
            Some(ControlError::GaveUp | ControlError::Unfit | ControlError::Worker(WorkerError::Fenced))
        );
        // The program before this one, with the file as it was, may do better for a guest that has the disk.
        let is_for_all = self.process.first || self.process.on_trial && disk.succeeds;
        if alone || gave_up || is_for_all && disk.link.shown().is_none() {
            return match disk.end.take() {
                Some(Err(why)) => Err(match &disk.name {
                    Some(name) if !gave_up => format!("disk {name}: {why}").into(),
                    _ => why,
                }),
                _ => Ok(()), // not reached
            };
        }
        let name = disk.name.as_deref().unwrap_or_default();
        tracing::error!(
            "disk {name} is not served, the others are: {why}. When that is mended type: vublk upgrade CONTROL"
        );
        if disk.link.shown().is_none() {
            // The others are all that there is to wait for.
            let _parent_is_gone = self.process.manager.serving();
        }
        let _parent_is_gone = self.process.manager.stopping();
        Ok(())
    }

    /// How the process ends, once all disks have ended, or need not be waited for.
    fn end(&mut self) -> Option<Result<DaemonEnd, Failure>> {
        // One that is not open yet has nothing to answer for.
        let is_over = |disk: &Disk| !disk.is_live() || disk.link.stopping() && !disk.open;
        if !self.disks.iter().all(is_over) {
            return None;
        }
        let ends = || self.disks.iter().filter_map(|disk| disk.end.as_ref());
        let asked =
            |asked| ends().any(|end| matches!(end, Ok(end) if *end == DaemonEnd::ForSuccessor { asked }));
        if let Some(end) = [true, false].into_iter().find(|&of| asked(of)) {
            return Some(Ok(DaemonEnd::ForSuccessor { asked: end }));
        }
        let failed = self.disks.iter_mut().find_map(|disk| disk.end.take_if(|end| end.is_err()));
        Some(failed.unwrap_or(Ok(DaemonEnd::Stopped)))
    }

    /// Once all disks are served, or never will be, what is in the file counts: disks that it does not have any more lose
    /// their front-ends.
    fn settle(&mut self) {
        if !self.are_decided() {
            return;
        }
        if let Some((text, earlier)) = self.process.file.take() {
            self.kept = KeptFile::keep(text, earlier, &self.process.manager);
        }
        let mut told = BTreeSet::new();
        for (name, fd) in std::mem::take(&mut self.process.left) {
            let Some((id, disk)) = store::number(&name) else { continue };
            if told.insert(disk.to_owned()) {
                let disk = if disk.is_empty() { "that was served" } else { disk };
                tracing::warn!("disk {disk} is not in the file of --config any more: it is not served");
            }
            // Its front-end sees that.
            let _no_socket = rustix::net::shutdown(&fd, rustix::net::Shutdown::Both);
            if let Some(socket) = self.process.manager.socket() {
                let _parent_is_gone = Store::new(Arc::clone(socket), disk.to_owned(), None).remove(id);
            }
        }
    }

    fn take_signals(&mut self) {
        while let Some(signal) = self.process.signals.next() {
            match signal {
                Signal::Stop => {
                    self.kept.iter().for_each(KeptFile::outdate);
                    self.disks.iter().for_each(|disk| disk.link.stop());
                }
                Signal::Report => self.report = true,
                Signal::Grown => self.live().for_each(|disk| drop(disk.link.ask(Call::Resize(None), true))),
                // The parent has judged the program before it passed the signal on.
                Signal::Succeed => self.begin_upgrade(None, None),
            }
        }
        if self.report && self.are_decided() {
            self.report = false;
            for disk in &self.disks {
                let Some(device) = disk.link.device() else { continue };
                let of = disk.name.as_ref().map_or_else(String::new, |name| format!(" of disk {name}"));
                tracing::info!("statistics{of}: {}", device.stats);
            }
        }
    }

    /// Each disk is served, or will not be.
    fn are_decided(&self) -> bool {
        self.disks.iter().all(|disk| !disk.is_live() || disk.link.shown().is_some())
    }

    /// Lets each disk notice a parent that is gone, once.
    fn hear_parent(&mut self) {
        let awaited = self.upgrade.as_ref().is_some_and(Upgrade::is_judged);
        // An answer that comes too late is no news.
        while !awaited && !self.process.manager.is_gone() && self.process.manager.answer().is_some() {}
        if !self.parent_is_gone && self.process.manager.is_gone() {
            self.parent_is_gone = true;
            self.disks.iter().for_each(|disk| disk.link.wake());
        }
    }

    /// Until the process does not wait for its disks any more.
    fn time_left(&self) -> Option<Duration> {
        let deadline = self.live().filter_map(|disk| disk.link.deadline()).max();
        deadline.map(|at| (at + LAST_MOMENT).saturating_duration_since(Instant::now()))
    }

    fn wait(&mut self, mut left: Option<Duration>) -> Result<(), Failure> {
        if let Some(watchdog) = &mut self.process.watchdog {
            let devices =
                self.disks.iter().filter(|disk| disk.is_live()).filter_map(|disk| disk.link.device());
            left = left.into_iter().chain([watchdog.look(devices.map(|device| &device.pulses))]).min();
        }
        let looks = self.disks.iter_mut().filter(|disk| disk.is_live()).filter_map(|disk| {
            let device = disk.link.device()?;
            disk.silence.look(device)
        });
        left = left.into_iter().chain(looks).min();
        left = left.into_iter().chain(self.upgrade.as_ref().and_then(Upgrade::time_left)).min();
        let patience = if self.disks.len() > 1 { START.checked_sub(self.started.elapsed()) } else { None };
        left = left.into_iter().chain(patience).min();
        let process = &self.process;
        let mut fds = vec![process.signals.as_fd(), process.memory_lost.as_fd(), process.told.as_fd()];
        fds.extend(process.manager.parent().filter(|_| !self.parent_is_gone));
        if let Some(rpc) = self.ears.rpc.as_ref().filter(|_| self.answers()) {
            fds.extend(rpc.fds());
            left = left.into_iter().chain(rpc.is_deaf().then_some(RETRY_EVERY)).min();
        }
        Ok(wait_for(&fds, left)?)
    }

    /// Before it serves, a disk has nothing to say, and a client would take that for its word; of several disks those that
    /// take their time are shown so.
    fn answers(&self) -> bool {
        self.are_decided() || self.disks.len() > 1 && self.started.elapsed() > START
    }

    /// When disks have ended, clients wait for answers yet: of an upgrade, say.
    fn serve_clients(&mut self) {
        if !self.answers() {
            return;
        }
        if let Some(mut rpc) = self.ears.rpc.take() {
            rpc.serve(|disk, call, fds| self.answer(disk.as_deref(), call, fds));
            self.ears.rpc = Some(rpc);
        }
    }

    fn answer(&mut self, disk: Option<&str>, call: rpc::Call, mut fds: Vec<OwnedFd>) -> Answer {
        let value = |value: Result<_, serde_json::Error>| Answer::Now(value.map_err(|e| e.to_string()));
        if !matches!(call, rpc::Call::Trace { .. }) {
            sys::close_foreign(fds.drain(..)); // no other call has any
        }
        let call = match call {
            rpc::Call::Status if disk.is_none() && self.disks.iter().any(|disk| disk.name.is_some()) => {
                let states = self.disks.iter().map(Disk::state).collect();
                return value(serde_json::to_value(ProcessStatus::of_disks(states, self.about())));
            }
            rpc::Call::Upgrade { binary } => return Answer::Later(self.upgrade_for_client(binary)),
            rpc::Call::LogLevel(level) => {
                if let Some(level) = level {
                    log::set_level(level);
                    tracing::info!(
                        "logs at level {} until the next upgrade, by vublk log-level",
                        log::level()
                    );
                }
                return Answer::Now(Ok(json!({ "log_level": log::level() })));
            }
            rpc::Call::Status => None,
            rpc::Call::Queues { from } => {
                let device =
                    self.find(disk).and_then(|disk| disk.link.device().ok_or("it is not open yet".into()));
                return match device {
                    Ok(device) => value(serde_json::to_value(QueuesStatus::new(device, from))),
                    Err(why) => Answer::Now(Err(why)),
                };
            }
            rpc::Call::Resize { size } => Some(Call::Resize(size)),
            rpc::Call::Retry => Some(Call::Retry),
            rpc::Call::Throttle(change) => Some(Call::Throttle(change)),
            rpc::Call::Pause { timeout_ms } => Some(Call::Pause(Duration::from_millis(timeout_ms))),
            rpc::Call::Resume { pause } => Some(Call::Resume(pause)),
            rpc::Call::Snapshot { pause } => Some(Call::Snapshot(pause)),
            rpc::Call::Trace { slow_ns, seconds } => {
                Some(Call::Trace(trace::Request { slow_ns, seconds, fds }))
            }
            rpc::Call::Changed { since, from } => Some(Call::Changed(since, from)),
        };
        match (self.find(disk), call) {
            (Err(why), _) => Answer::Now(Err(why)),
            (Ok(disk), None) => value(serde_json::to_value(ProcessStatus::of(disk.state(), self.about()))),
            (Ok(disk), Some(call)) => Answer::Later(disk.link.ask(call, false)),
        }
    }

    /// What is told of the process.
    fn about(&self) -> About {
        About { uptime: self.started.elapsed(), config: self.process.config.clone() }
    }

    /// The disk that a client means.
    fn find(&self, name: Option<&str>) -> Result<&Disk, String> {
        let names = || {
            let names: Vec<_> = self.disks.iter().filter_map(|disk| disk.name.as_deref()).collect();
            names.join(", ")
        };
        match (name, self.disks.as_slice()) {
            (None, [disk]) => Ok(disk),
            (None, _) => Err(format!("this vublkd serves several disks: name one with --disk: {}", names())),
            (Some(name), disks) => {
                let found = disks.iter().find(|disk| disk.name.as_deref() == Some(name));
                found.ok_or_else(|| format!("there is no disk {name:?} here; there are: {}", names()))
            }
        }
    }
}
