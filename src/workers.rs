//! The control thread's side of the workers: start them, ask them, wait.
//!
//! What it is: one command at a time, each acknowledged; only stops of several queues go out together. The wait also sees the word to stop: a worker that drains
//! a hung disk does not keep the daemon.
//!
//! What it is not: it knows no vhost-user message.
//!
//! Invariant: a worker's thread is started when its first queue is, and lives
//! as long as the daemon; queue n is always served by worker n mod count, or by the one that
//! stands in for it, where no thread could be had.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

use crate::changes::Changes;
use crate::device::{Blame, Device};
use crate::dirty::DirtyLog;
use crate::disk::Way;
use crate::engine::inline::Inline;
use crate::engine::nbd::Nbd;
use crate::engine::null::Null;
use crate::engine::rbd::Rbd;
use crate::engine::threads::Threads;
use crate::engine::uring::pins::Pins;
use crate::engine::uring::{self, Uring};
use crate::engine::{Engine, Files};
use crate::hold::{AtStop, Retry};
use crate::link::Link;
use crate::memory::GuestMemory;
use crate::ring::split::RingState;
use crate::sandbox::{self, Role};
use crate::trace::Tracing;
use crate::worker::{Ack, Command, OPERATIONS, Tuning, Worker};
use crate::{log, sys};

/// A wait that takes longer is logged, again and again.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// How long a worker with nothing in flight may take to answer, whatever the
/// stop time-out.
const LEAST_WAIT: Duration = Duration::from_millis(20);

/// A worker that has not answered for so long may wait in a write to an eventfd of the
/// front-end's: it is interrupted then, and again and again.
const INTERRUPT_AFTER: Duration = Duration::from_millis(50);
const INTERRUPT_EVERY: Duration = Duration::from_millis(5);

/// Which engine the workers use.
#[derive(Clone, Debug)]
pub enum EngineKind {
    /// [`Uring`].
    Uring(uring::Options),
    /// [`Threads`].
    Threads,
    /// [`Null`].
    Null,
}

impl EngineKind {
    /// How rings are made.
    fn ring(&self) -> uring::Options {
        match self {
            Self::Uring(how) => how.clone(),
            Self::Threads | Self::Null => uring::Options::default(),
        }
    }
}

/// How workers are made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Threads at most.
    pub count: u16,
    /// Queues at most.
    pub queues: u16,
    /// Their engine.
    pub engine: EngineKind,
    /// Register the guest's memory with io_uring.
    pub pin_memory: bool,
    /// Their pool, and how they work.
    pub tuning: Tuning,
}

/// Why a worker did not answer.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// Stopping took longer than `--stop-timeout-ms`.
    #[error("operations on the disk did not end in time; they may be carried out yet")]
    GaveUp,
    /// A server did not answer in the time that it was given.
    #[error("the server does not answer")]
    Silent,
    /// The cluster refuses this process's client.
    #[error("the cluster refuses this process's client; a successor goes on with another")]
    Fenced,
    /// It could not be started.
    #[error("cannot start a worker thread: {0}")]
    Start(io::Error),
    /// poll(2) failed.
    #[error("cannot wait for a worker thread: {0}")]
    Wait(#[from] io::Error),
    /// Its thread is gone.
    #[error("a worker thread has ended; its engine failed")]
    Gone,
}

#[derive(Debug)]
struct Handle {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
    thread: JoinHandle<()>,
}

/// A queue that was asked to stop.
#[derive(Debug)]
pub struct Stopping {
    at: usize,
    answer: Result<Receiver<Option<RingState>>, WorkerError>,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Workers {
    options: Options,
    device: Arc<Device>,
    link: Arc<Link>,
    handles: Vec<Option<Handle>>,
    /// The worker that does the work of each: itself, unless no thread could be had for it.
    stand_ins: Vec<usize>,
    memory: Arc<GuestMemory>,
    pins: Option<Arc<Pins>>,
    log: Option<Arc<DirtyLog>>,
    changes: Option<Arc<Changes>>,
    trace: Option<Tracing>,
    acknowledged: Arc<OwnedFd>,
}

impl Workers {
    /// None is started yet.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new(options: Options, device: Arc<Device>, link: Arc<Link>) -> io::Result<Self> {
        Ok(Self {
            handles: (0..options.count.max(1)).map(|_| None).collect(),
            stand_ins: (0..options.count.max(1)).map(usize::from).collect(),
            options,
            device,
            link,
            memory: Arc::default(),
            pins: None,
            log: None,
            changes: None,
            trace: None,
            acknowledged: sys::eventfd()?.into(),
        })
    }

    /// Asks the workers of `queues` to drain and stop them, all at the same time, so that no queue is given more to do
    /// while another one drains. The answers are taken one by one with [`Workers::stopped`].
    pub fn begin_stops(&self, queues: &[u16], held: AtStop) -> Vec<(u16, Stopping)> {
        let begin = |queue: u16| {
            let own = usize::from(queue) % self.handles.len();
            let at = self.stand_ins.get(own).copied().unwrap_or(own);
            (queue, Stopping { at, answer: self.send_at(at, |ack| Command::Stop(queue, held, ack)) })
        };
        queues.iter().copied().map(begin).collect()
    }

    /// Waits until a queue has stopped; `None`: it was not served.
    ///
    /// # Errors
    /// [`WorkerError`].
    pub fn stopped(&self, stopping: Stopping) -> Result<Option<RingState>, WorkerError> {
        let thread = self.handles.get(stopping.at).and_then(Option::as_ref).map(|handle| &handle.thread);
        self.wait(&stopping.answer?, thread, None)
    }

    /// Asks the worker of `queue`, starting it if need be, and waits.
    ///
    /// # Errors
    /// [`WorkerError`].
    pub fn ask<T>(&mut self, queue: u16, command: impl FnOnce(Ack<T>) -> Command) -> Result<T, WorkerError> {
        let own = usize::from(queue) % self.handles.len();
        let mut at = self.stand_ins.get(own).copied().unwrap_or(own);
        let mut started = None;
        if self.handles.get(at).is_some_and(Option::is_none) {
            match (self.start(at), self.handles.iter().position(Option::is_some)) {
                (Ok(handle), _) => started = Some(handle),
                (Err(WorkerError::Start(e)), Some(other)) => {
                    if sys::is_out_of_descriptors(&e) {
                        self.device.complain(
                            Blame::FrontEnd,
                            format_args!("a worker cannot be started, another serves its queues: {e}"),
                        );
                    } else {
                        self.device.say_not_executed(e.raw_os_error().unwrap_or(libc::EAGAIN));
                    }
                    if let Some(stand_in) = self.stand_ins.get_mut(own) {
                        *stand_in = other;
                    }
                    at = other;
                }
                (Err(e), _) => return Err(e),
            }
        }
        if let Some(handle) = started {
            if let Some(entry) = self.handles.get_mut(at) {
                *entry = Some(handle);
            }
            let memory = Arc::clone(&self.memory);
            // A new worker has no ring that could be outside of it.
            let _none = self.ask_at(at, |ack| Command::SetMemory(memory, ack))?;
            if let Some(pins) = self.pins.clone() {
                self.ask_at(at, |ack| Command::Pin(Some(pins), ack))?;
            }
            if let Some(log) = self.log.clone() {
                self.ask_at(at, |ack| Command::SetLog(Some(log), ack))?;
            }
            if let Some(changes) = self.changes.clone() {
                self.ask_at(at, |ack| Command::SetChanges(Some(changes), ack))?;
            }
            if let Some(ring) = self.trace.as_ref().map(|trace| trace.ring(at)) {
                self.ask_at(at, |ack| Command::SetTrace(Some(ring), ack))?;
            }
        }
        self.ask_at(at, command)
    }

    /// Gives every worker a new memory table. Answers the indexes of all queues
    /// whose rings are not in it; those still run where they were.
    ///
    /// # Errors
    /// [`WorkerError`].
    pub fn set_memory(&mut self, memory: &Arc<GuestMemory>) -> Result<Vec<u16>, WorkerError> {
        self.memory = Arc::clone(memory);
        // Pinned memory is let go by all before other memory is pinned: the limit
        // of locked memory counts both.
        if self.pins.take().is_some() {
            self.ask_all(|ack| Command::Pin(None, ack))?;
        }
        let outside = self.ask_all(|ack| Command::SetMemory(Arc::clone(memory), ack))?;
        self.pins = self.pin(memory);
        if let Some(pins) = self.pins.clone() {
            self.ask_all(|ack| Command::Pin(Some(Arc::clone(&pins)), ack))?;
        }
        Ok(outside.into_iter().flatten().collect())
    }

    /// Pins the guest's memory, where that was asked for and is possible.
    fn pin(&self, memory: &Arc<GuestMemory>) -> Option<Arc<Pins>> {
        if !self.options.pin_memory || memory.is_empty() {
            return None;
        }
        let (sender, pinned) = sync_channel(1);
        let memory = Arc::clone(memory);
        let pin = move || drop(sender.send(Pins::new(&memory)));
        // The sandbox lets no control thread make a ring.
        let pinned = self.link.start_thread("vublk-pin".into(), pin).and_then(|thread| {
            let pinned = pinned.recv().map_err(io::Error::other)?;
            thread.join().map_err(|_| io::Error::other("the thread that pins has ended"))?;
            pinned
        });
        match pinned {
            Ok(pins) => Some(Arc::new(pins)),
            Err(e) => {
                if self.device.may_log(Blame::FrontEnd) {
                    tracing::warn!(
                        "the guest's memory cannot be pinned, vublkd goes on without: {e}. It has to be a memfd or on \
                     tmpfs or hugetlbfs, and within the limit of locked memory (ulimit -l, LimitMEMLOCK=)"
                    );
                }
                None
            }
        }
    }

    /// Lets every worker mark in `log` what it writes to the guest, or nowhere.
    ///
    /// # Errors
    /// [`WorkerError`].
    pub fn set_log(&mut self, log: Option<&Arc<DirtyLog>>) -> Result<(), WorkerError> {
        self.log = log.cloned();
        self.ask_all(|ack| Command::SetLog(log.cloned(), ack)).map(drop)
    }

    /// Lets every worker mark there what it changes, from its next request on.
    ///
    /// # Errors
    /// [`WorkerError`].
    pub fn set_changes(&mut self, changes: Option<&Arc<Changes>>) -> Result<(), WorkerError> {
        self.changes = changes.cloned();
        self.ask_all(|ack| Command::SetChanges(changes.cloned(), ack)).map(drop)
    }

    /// How many there can be.
    #[must_use]
    pub fn most(&self) -> usize {
        self.handles.len()
    }

    /// Lets every worker write down there each request that ends, or nowhere.
    ///
    /// # Errors
    /// [`WorkerError`].
    pub fn set_trace(&mut self, trace: Option<Tracing>) -> Result<(), WorkerError> {
        self.trace = trace.clone();
        let rings = (0..self.handles.len()).filter(|&at| self.handles.get(at).is_some_and(Option::is_some));
        rings.collect::<Vec<_>>().into_iter().try_for_each(|at| {
            let ring = trace.as_ref().map(|trace| trace.ring(at));
            self.ask_at(at, |ack| Command::SetTrace(ring, ack))
        })
    }

    /// Lets every worker judge requests by what the guest is promised now.
    ///
    /// # Errors
    /// [`WorkerError`].
    pub fn set_promise(&mut self) -> Result<(), WorkerError> {
        let promise = self.device.promise();
        self.ask_all(|ack| Command::SetPromise(promise, ack)).map(drop)
    }

    /// Waits until nothing in flight touches a guest range.
    ///
    /// # Errors
    /// [`WorkerError`].
    pub fn retire(&mut self, guest: u64, len: u64) -> Result<(), WorkerError> {
        self.ask_all(|ack| Command::Retire(guest, len, ack)).map(drop)
    }

    /// fdatasync, off this thread, so that the wait for it can be interrupted; on it where no
    /// thread is to be had. `patience`: how long a server is waited for.
    ///
    /// # Errors
    /// [`WorkerError::GaveUp`], [`WorkerError::Silent`]; a sync that fails, then or later, is latched.
    pub fn sync(&mut self, patience: Option<Duration>) -> Result<(), WorkerError> {
        let (sender, receiver) = sync_channel(1);
        let ack = Ack::new(sender, Arc::clone(&self.acknowledged));
        let device = Arc::clone(&self.device);
        let sync = move || {
            device.durability.sync(&device.disk);
            ack.send(());
        };
        if let Err(e) = std::thread::Builder::new().name("vublk-sync".into()).spawn(sync) {
            self.device.say_not_executed(e.raw_os_error().unwrap_or(libc::EAGAIN));
            self.device.durability.sync(&self.device.disk);
            return Ok(());
        }
        self.wait(&receiver, None, patience)
    }

    /// Has every worker carry out again what it holds; waits for none.
    pub fn retry(&self, which: Retry) {
        for handle in self.handles.iter().flatten() {
            let _gone = handle.commands.send(Command::Retry(which));
            sys::signal(&handle.wake);
        }
    }

    /// Ends every worker. None may serve a queue any more.
    pub fn stop(&mut self) {
        for handle in self.handles.iter_mut().filter_map(Option::take) {
            let _gone = handle.commands.send(Command::Exit);
            sys::signal(&handle.wake);
            let _panicked = handle.thread.join();
        }
    }

    /// Asks every worker that was started, one after another.
    fn ask_all<T>(&mut self, command: impl Fn(Ack<T>) -> Command) -> Result<Vec<T>, WorkerError> {
        let started: Vec<_> =
            (0..).zip(&self.handles).filter_map(|(at, h)| h.is_some().then_some(at)).collect();
        started.into_iter().map(|at| self.ask_at(at, &command)).collect()
    }

    fn ask_at<T>(&mut self, at: usize, command: impl FnOnce(Ack<T>) -> Command) -> Result<T, WorkerError> {
        let answer = self.send_at(at, command)?;
        let thread = self.handles.get(at).and_then(Option::as_ref).map(|handle| &handle.thread);
        self.wait(&answer, thread, None)
    }

    fn send_at<T>(
        &self,
        at: usize,
        command: impl FnOnce(Ack<T>) -> Command,
    ) -> Result<Receiver<T>, WorkerError> {
        let Some(Some(handle)) = self.handles.get(at) else { return Err(WorkerError::Gone) };
        let (sender, receiver) = sync_channel(1);
        let ack = Ack::new(sender, Arc::clone(&self.acknowledged));
        handle.commands.send(command(ack)).map_err(|_| WorkerError::Gone)?;
        sys::signal(&handle.wake);
        Ok(receiver)
    }

    /// Waits for an answer, of that thread if it serves queues.
    fn wait<T>(
        &self,
        answer: &Receiver<T>,
        thread: Option<&JoinHandle<()>>,
        patience: Option<Duration>,
    ) -> Result<T, WorkerError> {
        let started = Instant::now();
        let silent_at = patience.map(|patience| started + patience);
        let mut logged = started;
        loop {
            sys::drain(&self.acknowledged);
            match answer.try_recv() {
                Ok(value) => return Ok(value),
                Err(TryRecvError::Disconnected) => return Err(WorkerError::Gone),
                Err(TryRecvError::Empty) => {}
            }
            self.link.woken();
            let now = Instant::now();
            if silent_at.is_some_and(|at| at <= now) {
                return Err(WorkerError::Silent);
            }
            if logged + LOG_EVERY <= now {
                logged = now;
                tracing::warn!(
                    disk = %self.device.disk.path().display(),
                    "waiting {} s for operations on the disk to end",
                    started.elapsed().as_secs()
                );
            }
            let until = match self.link.deadline() {
                // One look at least, for a worker that only has to be asked.
                Some(deadline) if deadline.max(started + LEAST_WAIT) <= now => {
                    return Err(WorkerError::GaveUp);
                }
                Some(deadline) if deadline <= now => started + LEAST_WAIT,
                Some(deadline) => deadline.min(logged + LOG_EVERY),
                None => logged + LOG_EVERY,
            };
            let until = silent_at.map_or(until, |at| until.min(at));
            let until = match thread.map(|thread| (thread, started + INTERRUPT_AFTER)) {
                None => until,
                Some((_, at)) if now < at => until.min(at),
                Some((thread, _)) => {
                    sys::interrupt(thread);
                    until.min(now + INTERRUPT_EVERY)
                }
            };
            wait_for(&[self.acknowledged.as_fd(), self.link.as_fd()], Some(until - now))?;
        }
    }

    fn start(&self, at: usize) -> Result<Handle, WorkerError> {
        let (commands, inbox) = channel();
        let wake = Arc::new(sys::eventfd().map_err(WorkerError::Start)?);
        let (ready, started) = sync_channel(1);
        let ack = Ack::new(ready, Arc::clone(&self.acknowledged));
        let start = Start {
            number: at,
            device: Arc::clone(&self.device),
            options: self.options.clone(),
            wake: Arc::clone(&wake),
            inbox,
            ack,
        };
        // The engine is made on the thread that uses it (SINGLE_ISSUER).
        let thread = self.link.start_thread(format!("vublk-{at}"), move || start.run());
        let thread = thread.map_err(WorkerError::Start)?;
        self.wait(&started, None, None)?.map_err(WorkerError::Start)?;
        Ok(Handle { commands, wake, thread })
    }
}

/// A worker's thread: everything its loop needs.
struct Start {
    number: usize,
    device: Arc<Device>,
    options: Options,
    wake: Arc<OwnedFd>,
    inbox: Receiver<Command>,
    ack: Ack<io::Result<()>>,
}

impl Start {
    fn run(self) {
        let tokens = self.options.queues.saturating_add(1);
        let files = match self.device.durability.way(self.number).cloned() {
            Some(Way::Files(files)) => files,
            Some(Way::Nbd(remote)) => {
                let (patience, how) = (self.device.reconnect_delay, self.options.engine.ring());
                let engine = Nbd::new(remote, self.number, patience, OPERATIONS, tokens, &how);
                sandbox::confine(Role::Worker);
                return self.serve(engine);
            }
            Some(Way::Rbd(image)) => {
                let engine = Rbd::new(image, OPERATIONS, tokens, &self.options.engine.ring());
                sandbox::confine(Role::Caller);
                return self.serve(engine);
            }
            None => return self.ack.send(Err(io::ErrorKind::NotFound.into())), // not reached
        };
        match self.options.engine.clone() {
            EngineKind::Uring(how) => {
                let engine = Uring::new(Arc::clone(&files), OPERATIONS, tokens, &how);
                sandbox::confine(Role::Worker);
                self.choose(&files, engine)
            }
            EngineKind::Threads => self.choose(&files, Threads::new(Arc::clone(&files), OPERATIONS, tokens)),
            EngineKind::Null => self.serve(Null::new(OPERATIONS, tokens)),
        }
    }

    /// On a disk that is memory, small operations are the worker's own.
    fn choose<E: Engine>(self, files: &Arc<Files>, engine: io::Result<E>) {
        if self.device.disk.backing.in_memory {
            self.serve(engine.map(|e| Inline::new(e, Arc::clone(files), OPERATIONS)));
        } else {
            self.serve(engine);
        }
    }

    fn serve<E: Engine>(self, engine: io::Result<E>) {
        let Self { device, options, wake, inbox, ack, .. } = self;
        let worker = engine
            .and_then(|e| Worker::new(e, Arc::clone(&device), options.queues, options.tuning, wake, inbox));
        let ended = match worker {
            Ok(mut worker) => {
                ack.send(Ok(()));
                worker.run()
            }
            Err(e) => {
                ack.send(Err(e));
                return;
            }
        };
        if let Err(e) = ended {
            let disk = device.disk.path().display();
            tracing::error!(%disk, "the engine failed: {e}. vublkd ends; start it again");
            // Queues that are not served would hang their guest for good; a new
            // daemon, and a front-end that connects again, do not.
            log::flush();
            std::process::exit(1);
        }
    }
}

/// Sleeps until one of `fds` is readable (or hung up), or for `timeout`.
///
/// # Errors
/// As poll(2); an interruption is none.
pub fn wait_for(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<()> {
    let mut fds: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}
