//! What the process and one disk's control thread tell each other.
//!
//! What it is: calls and the word to stop, on their way to the control thread; on the way back, what
//! `vublk status` shows, and threads to start. The process has one for each disk that it serves.
//!
//! What it is not: it carries nothing out, and no message of a front-end comes this way.
//!
//! Invariant: the process waits for no control thread here. A status is there at any time, however long the
//! control thread waits for a disk, a lock or a front-end.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem::discriminant;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::changes::Since;
use crate::device::Device;
use crate::throttle::Change;
use crate::{log, sys, trace};

/// What a control thread can be asked for.
#[derive(Debug)]
pub enum Call {
    /// Grow the disk to so many bytes, or find out whether it has grown.
    Resize(Option<u64>),
    /// Carry out again what is held.
    Retry,
    /// Change the limits of the disk and its group; none: tell them.
    Throttle(Change),
    /// Stop the rings and make durable what was answered, for so long at most.
    Pause(Duration),
    /// Go on, after the pause of this number if there is one.
    Resume(Option<u64>),
    /// A snapshot was made in the pause of this number.
    Snapshot(u64),
    /// What has changed, from this byte on.
    Changed(Since, u64),
    /// Write down each request that ends.
    Trace(trace::Request),
    /// Find out whether a successor could go on.
    MayFollow,
    /// Make room for a successor.
    MakeRoom,
}

/// The result of a call: a value, or why there is none.
pub type Answer = Result<Value, String>;

/// A call, and where its answer goes; a signal's has none.
#[derive(Debug)]
pub struct Asked {
    /// See [`Call`].
    pub call: Call,
    /// `None`: to the log, if it is bad.
    pub reply: Option<Arc<Reply>>,
}

/// Where an answer will be, for the one who asked and the one who was asked.
#[derive(Debug, Default)]
pub struct Reply(Mutex<Option<Answer>>);

impl Reply {
    /// Gives the answer.
    pub fn give(&self, answer: Answer) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
    }

    /// The answer, once it is there. An error: there will be none, the disk's control thread has ended.
    pub fn take(self: &Arc<Self>) -> Option<Answer> {
        // In this order: what was asked gives its answer, then itself up.
        let is_alone = Arc::strong_count(self) == 1;
        let answer = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        answer.or_else(|| is_alone.then(|| Err("the daemon ends".into())))
    }
}

impl Asked {
    /// Its client is there yet.
    fn is_wanted(&self) -> bool {
        self.reply.as_ref().is_none_or(|reply| Arc::strong_count(reply) > 1)
    }
}

/// How far a disk has come in making room for a successor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Room {
    /// Something is in flight, or it was not asked.
    #[default]
    Occupied,
    /// Nothing is in flight, and nothing more will be until it is told to go on.
    Made,
    /// It goes on, for no successor could.
    Refused,
}

/// What a control thread shows of its disk.
#[derive(Clone, Debug, Serialize)]
pub struct Shown {
    /// What keeps what a successor would need, and starts it: `parent`, `systemd`, or `none`.
    pub kept_by: &'static str,
    /// Why the last upgrade did not take place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upgrade_refused: Option<String>,
    /// The queues that are being served.
    pub queues: Vec<Queue>,
    /// The process that connected to the disk's socket and is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub front_end_pid: Option<i32>,
    /// The front-end keeps a journal of what is in flight.
    pub inflight_region: bool,
    /// Milliseconds that the guest waited for this daemon to take over from one
    /// that stopped for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waited_ms: Option<f64>,
    /// No ring runs, for a snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused: Option<Paused>,
}

/// A pause.
#[derive(Clone, Copy, Debug)]
pub struct Paused {
    /// When it began.
    pub since: Instant,
    /// When it ends by itself.
    pub until: Instant,
}

/// As it is at the moment of telling.
impl Serialize for Paused {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let tenths = |time: Duration| (time.as_secs_f64() * 10.0).round() / 10.0;
        let left = self.until.saturating_duration_since(Instant::now());
        let told = [("seconds", tenths(self.since.elapsed())), ("ends_in_seconds", tenths(left))];
        serializer.collect_map(told)
    }
}

/// A queue that is being served.
#[derive(Clone, Debug, Serialize)]
pub struct Queue {
    /// Its number.
    pub index: usize,
    /// Its descriptors.
    pub size: u32,
}

/// A thread that the process is to start: a thread keeps the sandbox of the one that started it, and a worker needs
/// more system calls than a control thread has.
pub struct Start {
    name: String,
    run: Box<dyn FnOnce() + Send>,
    started: SyncSender<io::Result<JoinHandle<()>>>,
}

impl fmt::Debug for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Start").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Start {
    /// Starts it.
    pub fn now(self) {
        let _gone = self.started.send(std::thread::Builder::new().name(self.name).spawn(self.run));
    }
}

/// See the head of the file.
#[derive(Debug)]
pub struct Link {
    /// Wakes the control thread.
    wake: Arc<OwnedFd>,
    /// Wakes the process.
    told: Arc<OwnedFd>,
    /// `None` once no call will be carried out any more.
    calls: Mutex<Option<VecDeque<Asked>>>,
    /// `None` as long as there is no process to start them: the thread that wants another starts it.
    starts: Mutex<Option<VecDeque<Start>>>,
    shown: Mutex<Option<Shown>>,
    device: OnceLock<Arc<Device>>,
    /// To a disk that is ready to be served.
    ready: Mutex<Option<SyncSender<Option<PathBuf>>>>,
    room: Mutex<Room>,
    /// Whether the disk ends, now that it has made room.
    verdict: Mutex<Option<bool>>,
    /// When the first SIGTERM or SIGINT came.
    stop: OnceLock<Instant>,
    /// How long a drain may take from then on.
    stop_timeout: Duration,
}

impl Link {
    /// A link to a process that `told` wakes.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new(told: Arc<OwnedFd>, stop_timeout: Duration) -> io::Result<Self> {
        Ok(Self {
            wake: sys::eventfd()?.into(),
            told,
            calls: Mutex::new(Some(VecDeque::new())),
            starts: Mutex::default(),
            shown: Mutex::default(),
            device: OnceLock::new(),
            ready: Mutex::default(),
            room: Mutex::default(),
            verdict: Mutex::default(),
            stop: OnceLock::new(),
            stop_timeout,
        })
    }

    /// Asks for something, for which there is an answer but to a signal. A signal that comes again before it was
    /// attended to is one.
    pub fn ask(&self, call: Call, by_signal: bool) -> Arc<Reply> {
        let reply = Arc::new(Reply::default());
        let mut calls = self.calls();
        if let Some(calls) = calls.as_mut() {
            calls.retain(Asked::is_wanted);
            let again =
                |asked: &Asked| asked.reply.is_none() && discriminant(&asked.call) == discriminant(&call);
            if !by_signal || !calls.iter().any(again) {
                calls.push_back(Asked { call, reply: (!by_signal).then(|| Arc::clone(&reply)) });
            }
        }
        drop(calls);
        self.wake();
        reply
    }

    /// No call will be carried out any more.
    pub fn close(&self) {
        *self.calls() = None;
    }

    /// Gives the answer to a call.
    pub fn answer(&self, reply: &Reply, answer: Answer) {
        reply.give(answer);
        sys::signal(&self.told);
    }

    /// Asks to stop.
    pub fn stop(&self) {
        self.stop.get_or_init(Instant::now);
        self.wake();
    }

    /// Lets the control thread look at what may have changed.
    pub fn wake(&self) {
        sys::signal(&self.wake);
    }

    /// The eventfd that wakes the control thread.
    #[must_use]
    pub fn waker(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.wake)
    }

    /// What the disk shows; `None` as long as it does not serve.
    #[must_use]
    pub fn shown(&self) -> Option<Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Shows the device, once it is open.
    pub fn opened(&self, device: &Arc<Device>) {
        let _once = self.device.set(Arc::clone(device));
    }

    /// The device, once it is open.
    #[must_use]
    pub fn device(&self) -> Option<&Arc<Device>> {
        self.device.get()
    }

    /// Waits until the process has given up what it does not need, either; gives the path of the control socket, if there
    /// is one.
    ///
    /// # Errors
    /// The process ends.
    pub fn wait_to_serve(&self) -> io::Result<Option<PathBuf>> {
        let (go, gone) = sync_channel(1);
        *self.ready.lock().unwrap_or_else(PoisonError::into_inner) = Some(go);
        sys::signal(&self.told);
        gone.recv().map_err(|_| io::Error::other("the process ends"))
    }

    /// Where to send what [`Link::wait_to_serve`] waits for, if it does.
    #[must_use]
    pub fn waits_to_serve(&self) -> Option<SyncSender<Option<PathBuf>>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Tells the process how far making room has come.
    pub fn set_room(&self, room: Room) {
        *self.room.lock().unwrap_or_else(PoisonError::into_inner) = room;
        sys::signal(&self.told);
    }

    /// How far making room has come.
    #[must_use]
    pub fn room(&self) -> Room {
        self.room.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells a disk that has made room, or will have, to end for a successor, or to go on.
    pub fn judge(&self, ends: bool) {
        *self.verdict.lock().unwrap_or_else(PoisonError::into_inner) = Some(ends);
        self.wake();
    }

    /// True: the disk ends for a successor. False: it goes on. `None`: it is not decided.
    #[must_use]
    pub fn verdict(&self) -> Option<bool> {
        *self.verdict.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room is to be made.
    pub fn begin_room(&self) {
        *self.verdict.lock().unwrap_or_else(PoisonError::into_inner) = None;
        *self.room.lock().unwrap_or_else(PoisonError::into_inner) = Room::Occupied;
    }

    /// Shows something else.
    pub fn show(&self, shown: Shown) {
        let mut cell = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if cell.replace(shown).is_none() {
            sys::signal(&self.told);
        }
    }

    /// The next call whose client is there yet.
    #[must_use]
    pub fn next_call(&self) -> Option<Asked> {
        let mut calls = self.calls();
        let calls = calls.as_mut()?;
        calls.retain(Asked::is_wanted);
        calls.pop_front()
    }

    /// True if there is a call, for which nothing else may wake the control thread.
    #[must_use]
    pub fn has_calls(&self) -> bool {
        self.calls().as_ref().is_some_and(|calls| !calls.is_empty())
    }

    /// Takes what woke the control thread: it has to look at all that there may be then.
    pub fn woken(&self) {
        sys::drain(&self.wake);
    }

    /// Has the process start a thread.
    ///
    /// # Errors
    /// As [`std::thread::Builder::spawn`].
    pub fn start_thread(
        &self,
        name: String,
        run: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let (started, answer) = sync_channel(1);
        let disk = log::thread_name();
        let run = move || {
            log::name_thread(disk.as_deref());
            run();
        };
        let start = Start { name, run: Box::new(run), started };
        match self.starts().as_mut() {
            Some(starts) => starts.push_back(start),
            None => start.now(),
        }
        sys::signal(&self.told);
        answer.recv().map_err(|_| io::Error::other("the process ends"))?
    }

    /// The next thread to start, for the process, which starts all of them from the first call on.
    #[must_use]
    pub fn next_start(&self) -> Option<Start> {
        self.starts().get_or_insert_default().pop_front()
    }

    fn starts(&self) -> MutexGuard<'_, Option<VecDeque<Start>>> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True once a stop was asked for.
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.stop.get().is_some()
    }

    /// When a drain must be over: `None` as long as it was not asked to stop.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.stop.get().map(|at| *at + self.stop_timeout)
    }

    /// The eventfd that wakes the process.
    #[must_use]
    pub fn told(&self) -> &Arc<OwnedFd> {
        &self.told
    }

    fn calls(&self) -> MutexGuard<'_, Option<VecDeque<Asked>>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Readable when there is something new for the control thread.
impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
