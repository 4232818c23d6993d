//! An image of a Ceph cluster that is open: its lock, its size, who else has it.
//!
//! What it is: an [`Image`], shared by the engines of the workers, which submit to it, and the control thread, which locks
//! and measures it. What may take long is asked for on a thread of the image's own.
//!
//! What it is not: it submits no request of a guest; [`crate::engine::rbd`] does.
//!
//! Invariants: the client's address is known before its lock is taken, so a successor can break the lock of a daemon that
//! died, and of no other. librbd keeps no cache: what was answered outlives this process.
//!
//! ```text
//!   control thread  ask(job) ──► image's thread: librbd, waits ──► answer
//!   workers         aio ──► librbd's threads ──► callback, eventfd
//!   librbd          header changed ──► News ──► control thread
//! ```
#![expect(unsafe_code, reason = "calls a library of C")]

mod lock;

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::OwnedFd;
use std::ptr::null;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

pub use self::lock::{For, NotLocked};
use super::held::Held;
use super::library::{Api, Raw};
use super::standing::{self, Record, Standing};
use super::uri::Uri;
use crate::log::Quota;
use crate::sandbox::ConfineClient;
use crate::sys;

/// How long the end waits for the lock to be given up, and then for the image to be closed: a successor needs neither.
const CLOSE_TIME: Duration = Duration::from_millis(500);
/// How long the control thread waits for what only a cluster can do, while its front-end waits for it. (A queue that has to
/// stop waits as long.)
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// How often a start that waits for the cluster says so.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// Why an image cannot be served. Each text says what to type next.
#[derive(Debug, Error)]
pub enum RbdError {
    /// dlopen(3).
    #[error("cannot load Ceph's library: {0}. Install it: apt install librbd1 (or dnf install librbd1)")]
    Library(String),
    /// A name with a NUL, or a setting that the library does not know.
    #[error("librados refuses {0}: {1}")]
    Setting(String, io::Error),
    /// ceph.conf.
    #[error("cannot read the cluster's file {0}: {1}. Name it in the URI: :conf=FILE")]
    Conf(String, io::Error),
    /// None of the files that may have it.
    #[error(
        "there is no key for {user}: {looked}. Name the file that ceph auth get-or-create wrote: :keyring=FILE"
    )]
    NoKey {
        /// As Ceph names it.
        user: String,
        /// Where it was looked for, and what came of it.
        looked: String,
    },
    /// mon_host.
    #[error("the cluster's file names no monitor: it needs a line such as mon_host = 10.0.0.1")]
    NoMonitor,
    /// The cluster does not answer, or not to this user.
    #[error(
        "cannot connect to the cluster: {0}. Does it answer to ceph -s with the same --conf, --id and --keyring?"
    )]
    Connect(io::Error),
    /// The pool.
    #[error("there is no pool \"{0}\": {1}. ceph osd pool ls shows those that are")]
    Pool(String, io::Error),
    /// The image, or its snapshot.
    #[error("cannot open the image: {0}. {1} shows what is there; the user needs the caps \"profile rbd\"")]
    Open(io::Error, String),
    /// It would be written to.
    #[error("a snapshot is never written to. Add --read-only")]
    Snapshot,
    /// Nothing would keep a dead daemon's writes from a later one's.
    #[error(
        "the image has no exclusive lock, without which the writes of a vublkd that died could come after those of the \
         next. Turn it on: rbd feature enable {0} exclusive-lock; or add --read-only"
    )]
    NoLock(String),
    /// Another client owns the lock.
    #[error(
        "the client {0} has this image. Stop it; for a VM that comes from there by live migration add --incoming. If it \
         died, try again: the cluster takes it for alive for some 30 s"
    )]
    Locked(String),
    /// A setting of the image's or its pool's, which override those of a client.
    #[error(
        "the image or its pool sets {key} to {value}, with which what a guest was answered could be lost. Type: rbd config \
         image set {image} {key} {needed}"
    )]
    Overridden {
        /// The setting.
        key: String,
        /// What it is.
        value: String,
        /// What it has to be.
        needed: &'static str,
        /// The image.
        image: String,
    },
    /// Anything else.
    #[error("cannot {0}: {1}")]
    Io(&'static str, io::Error),
}

/// A pointer of the library's, which its functions take from any thread.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handle(pub(super) Raw);

// SAFETY: rados/librados.h and rbd/librbd.h: handles are used from any thread, by several at once.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// What the image's own thread works with.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) api: &'static Api,
    pub(super) cluster: Handle,
    pub(super) pool: Handle,
    pub(super) image: Handle,
    pub(super) like: Likeness,
    /// Which image it is; see [`Facts`].
    pub(super) identity: String,
    /// The client of an earlier daemon, which is dead, and has the lock.
    pub(super) predecessor: Option<String>,
}

/// What a client is made of: another one for the same image is made like it.
#[derive(Clone, Debug)]
pub(super) struct Likeness {
    pub(super) uri: Uri,
    pub(super) how: How,
    /// As the cluster's lists of locks, watchers and refused clients name it.
    pub(super) address: String,
}

type Job = Box<dyn FnOnce(&Client) + Send>;

impl Drop for Client {
    /// Closes the image, and leaves the cluster: servers that still waited for this client would keep others waiting.
    fn drop(&mut self) {
        // SAFETY: nothing uses the handles any more.
        unsafe {
            let _leaves_anyway = (self.api.rbd_close)(self.image.0);
            (self.api.rados_ioctx_destroy)(self.pool.0);
            (self.api.rados_shutdown)(self.cluster.0);
        }
    }
}

/// Whether the image's header has changed, and who wants to know.
#[derive(Debug, Default)]
struct News {
    changed: AtomicBool,
    wake: OnceLock<Arc<OwnedFd>>,
}

impl News {
    fn tell(&self) {
        self.changed.store(true, Ordering::Release);
        if let Some(wake) = self.wake.get() {
            sys::signal(wake);
        }
    }
}

/// What an image is, found out when it was opened.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Bytes of its objects.
    pub object_size: u64,
    /// Cluster, pool and number of the image, whatever its name is.
    pub identity: String,
    /// This client, as the cluster's lists of locks and refused clients name it.
    pub client: String,
    /// RBD_FEATURE_...
    pub features: u64,
    /// Who owns its lock, and is alive.
    pub owners: Vec<String>,
    /// A guest relies on the lock of an earlier daemon's client,
    pub relied: bool,
    /// and another client has it, or may have had it.
    pub was_taken: bool,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Image {
    api: &'static Api,
    image: Handle,
    /// For messages.
    pub name: String,
    /// What it is.
    pub facts: Facts,
    size: AtomicU64,
    read_only: bool,
    news: &'static News,
    /// Its lock was asked for, and not given up since.
    wanted: AtomicBool,
    /// It is this client's.
    locked: Arc<AtomicBool>,
    /// Whose lock a guest relies on, for a successor.
    held: Arc<Held>,
    /// A guest that goes on relies on the lock, which was not taken yet.
    relied: AtomicBool,
    /// The lock that the guest relied on was taken away from an earlier daemon: it gets I/O errors until its front-end leaves.
    orphaned: AtomicBool,
    /// How this client stands with the cluster.
    standing: Arc<Record>,
    /// There is a store, from which a successor goes on.
    has_store: AtomicBool,
    /// Requests are given up after this time (rados_osd_op_timeout): what was sent may be carried out later.
    patience: Option<Duration>,
    /// Requests were given up, and none was seen to be answered since.
    is_giving_up: AtomicBool,
    /// Of lines about the cluster.
    quota: Mutex<Quota>,
    /// A change was given up.
    given_up: AtomicBool,
    /// The cluster was told to refuse this client, and does.
    is_fenced: AtomicBool,
    /// `None`: it was closed.
    jobs: Mutex<Option<Sender<Job>>>,
    /// Disconnected once it is closed.
    open: Mutex<Receiver<()>>,
    front_end: Mutex<Option<OwnedFd>>,
}

/// How an image is to be opened.
#[derive(Clone, Debug)]
pub struct How {
    /// Nothing is written.
    pub read_only: bool,
    /// Another client may have it yet.
    pub incoming: bool,
    /// Clients that are known to be dead: those of earlier daemons.
    pub dead: Vec<String>,
    /// Whose lock a guest relies on.
    pub held: Arc<Held>,
    /// How long requests wait for servers; `None`: as long as it takes.
    pub patience: Option<Duration>,
    /// What the image's thread does before it connects: the library's threads are like it then, and read these files.
    pub confine: ConfineClient,
}

impl Image {
    /// Connects to the cluster and opens the image. Locks of dead clients are broken, and the clients refused from then on.
    ///
    /// # Errors
    /// [`RbdError`].
    pub fn open(uri: &Uri, how: How) -> Result<Self, RbdError> {
        if uri.snapshot.is_some() && !how.read_only {
            return Err(RbdError::Snapshot);
        }
        let (jobs, inbox) = channel::<Job>();
        let (sender, opened) = sync_channel(1);
        let (name, uri, read_only) = (uri.name(), uri.clone(), how.read_only);
        let (patience, held) = (how.patience, Arc::clone(&how.held));
        let started = Instant::now();
        Api::load().map_err(RbdError::Library)?;
        let (ends, open) = sync_channel::<()>(0);
        let serve = move || {
            let _ends = ends;
            let client = match Client::open(&uri, &how) {
                Ok((client, facts, size)) => {
                    let _gone = sender.send(Ok((client.api, client.image, facts, size)));
                    client
                }
                Err(e) => {
                    let _gone = sender.send(Err(e));
                    return;
                }
            };
            while let Ok(job) = inbox.recv() {
                job(&client);
            }
        };
        let thread = std::thread::Builder::new().name("vublk-rbd".into()).spawn(serve);
        thread.map_err(|e| RbdError::Io("start a thread for it", e))?;
        let gone = || RbdError::Io("open it", io::ErrorKind::BrokenPipe.into());
        let opened = loop {
            match opened.recv_timeout(TELL_EVERY) {
                Err(RecvTimeoutError::Timeout) => {
                    tracing::warn!(disk = %name, "waiting {} s for the cluster", started.elapsed().as_secs());
                }
                answer => break answer,
            }
        };
        let (api, image, facts, size) = opened.map_err(|_| gone())??;
        let relied = AtomicBool::new(facts.relied);
        let image = Self {
            api,
            image,
            name,
            facts,
            size: size.into(),
            read_only,
            news: Box::leak(Box::default()), // librbd's threads have it until the process ends
            wanted: AtomicBool::new(false),
            locked: Arc::default(),
            held,
            relied,
            orphaned: AtomicBool::new(false),
            standing: Arc::default(),
            has_store: AtomicBool::new(false),
            patience,
            is_giving_up: AtomicBool::new(false),
            quota: Mutex::default(),
            given_up: AtomicBool::new(false),
            is_fenced: AtomicBool::new(false),
            jobs: Mutex::new(Some(jobs)),
            open: Mutex::new(open),
            front_end: Mutex::new(None),
        };
        Ok(image)
    }

    /// Has the image's thread do something; the answer comes when it has.
    fn ask<T: Send + 'static>(&self, job: impl FnOnce(&Client) -> T + Send + 'static) -> Receiver<T> {
        let (sender, answer) = sync_channel(1);
        let job: Job = Box::new(move |client| {
            let _gone = sender.send(job(client));
        });
        if let Some(jobs) = &*self.jobs.lock().unwrap_or_else(PoisonError::into_inner) {
            let _gone = jobs.send(job);
        }
        answer
    }

    /// What was asked for, if it comes in time.
    fn answer<T>(&self, answer: &Receiver<io::Result<T>>) -> io::Result<T> {
        match answer.recv_timeout(ANSWER_TIME) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::BrokenPipe.into()),
            Err(RecvTimeoutError::Timeout) => Err(silent()),
        }
    }

    /// This connection's front-end has the image now.
    pub fn set_front_end(&self, connection: Option<OwnedFd>) {
        *self.front_end.lock().unwrap_or_else(PoisonError::into_inner) = connection;
    }

    /// Closes the front-end's connection, for a successor too: nothing is left to hope for. By the image's thread, for a
    /// worker may not.
    pub fn hang_up(&self) {
        let connection = self.front_end.lock().unwrap_or_else(PoisonError::into_inner).take();
        let closed = self.ask(move |_| connection.iter().for_each(sys::hang_up));
        let _closed = closed.recv_timeout(CLOSE_TIME);
    }

    /// The functions, and the image as they name it.
    #[must_use]
    pub fn raw(&self) -> (&'static Api, Raw) {
        (self.api, self.image.0)
    }

    /// Its name without pool and namespace.
    #[must_use]
    pub fn short_name(&self) -> &str {
        self.name.rsplit('/').next().unwrap_or_default()
    }

    /// Bytes, as the cluster said last.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Asks for the size, which librbd knows.
    ///
    /// # Errors
    /// As rbd_get_size.
    pub fn measure(&self) -> io::Result<u64> {
        let mut size = 0;
        // SAFETY: the image is open; the function looks at memory of its own.
        let measured = Api::ok(unsafe { (self.api.rbd_get_size)(self.image.0, &raw mut size) });
        // The end of its watch is told as a change of the image.
        if measured.as_ref().is_err_and(standing::is_refusal) {
            self.note_refused();
        }
        measured?;
        self.size.store(size, Ordering::Relaxed);
        Ok(size)
    }

    /// Makes it longer.
    ///
    /// # Errors
    /// As rbd_resize; ETIMEDOUT where the cluster does not answer, which may do it later.
    pub fn grow(&self, bytes: u64) -> io::Result<()> {
        // SAFETY: the image is open for as long as its thread runs.
        self.answer(&self.ask(move |c| Api::ok(unsafe { (c.api.rbd_resize)(c.image.0, bytes) })))
    }

    /// Bytes of its objects that there are, and its parents' that show through.
    ///
    /// # Errors
    /// As rbd_diff_iterate2.
    pub fn allocated(&self) -> io::Result<u64> {
        let mut sum = 0_u64;
        let size = self.size();
        // SAFETY: the image is open, and `sum` is there until the call returns.
        let counted = unsafe {
            let sum = (&raw mut sum).cast();
            (self.api.rbd_diff_iterate2)(self.image.0, null(), 0, size, 1, 1, add_extent, sum)
        };
        Api::ok(counted).map(|()| sum)
    }

    /// Has `wake` written when the image's header changes: it was resized, say.
    ///
    /// # Errors
    /// As rbd_update_watch; ETIMEDOUT.
    pub fn watch(&self, wake: Arc<OwnedFd>) -> io::Result<()> {
        let news = self.news;
        let _once = news.wake.set(wake);
        let arg = Handle(std::ptr::from_ref(news).cast_mut().cast());
        self.answer(&self.ask(move |c| {
            let (arg, mut handle) = (arg, 0);
            // SAFETY: what `arg` points to is never freed.
            Api::ok(unsafe { (c.api.rbd_update_watch)(c.image.0, &raw mut handle, updated, arg.0) })
        }))
    }

    /// True once after the header has changed.
    #[must_use]
    pub fn take_news(&self) -> bool {
        self.news.changed.swap(false, Ordering::AcqRel)
    }

    /// Waits until what was submitted has ended. What was answered is durable without that: librbd keeps no cache.
    ///
    /// # Errors
    /// As rbd_flush.
    pub fn flush(&self) -> io::Result<()> {
        if !self.locked.load(Ordering::Acquire) || self.standing() != Standing::Good {
            return Ok(()); // nothing was written, or nothing can be; and another client's is not ours to flush
        }
        // SAFETY: the image is open for as long as its thread runs.
        let flushed = self.answer(&self.ask(|c| Api::ok(unsafe { (c.api.rbd_flush)(c.image.0) })));
        match flushed {
            Err(e) if e.kind() == io::ErrorKind::TimedOut || standing::is_refusal(&e) => {
                if standing::is_refusal(&e) {
                    self.note_refused();
                }
                tracing::warn!(
                    disk = %self.name,
                    "the image is left without a last flush, for nothing that was answered needs one: {e}"
                );
                Ok(())
            }
            flushed => flushed,
        }
    }

    /// Closes the image and leaves the cluster. No operation is under way, and none comes. False: a later daemon has to know
    /// this client, for the cluster does not answer, and its servers know it for another 30 s; or it has the lock yet.
    pub fn close(&self) -> bool {
        if self.may_yet_change() && !self.is_fenced.load(Ordering::Acquire) {
            return false; // that would give up the lock
        }
        drop(self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let is_closed = open.recv_timeout(CLOSE_TIME) == Err(RecvTimeoutError::Disconnected);
        if !is_closed {
            tracing::warn!(disk = %self.name, "the cluster does not answer: the image is left without a word");
        }
        is_closed && !self.locked.load(Ordering::Acquire)
    }
}

impl Drop for Image {
    /// A start that failed would be taken for alive for some 30 s.
    fn drop(&mut self) {
        let is_open = self.jobs.get_mut().unwrap_or_else(PoisonError::into_inner).is_some();
        if is_open && !self.locked.load(Ordering::Acquire) {
            let _known_no_longer = self.close();
        }
    }
}

fn silent() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the cluster does not answer")
}

/// Called by rbd_diff_iterate2.
extern "C" fn add_extent(_at: u64, len: usize, exists: c_int, sum: *mut c_void) -> c_int {
    // SAFETY: it is the sum of `allocated`, which waits for this.
    let sum = unsafe { &mut *sum.cast::<u64>() };
    *sum = sum.saturating_add(if exists == 0 { 0 } else { len as u64 });
    0
}

/// Called by a thread of librbd's.
extern "C" fn updated(arg: *mut c_void) {
    // SAFETY: it is the News of `watch`, which is never freed.
    let news = unsafe { &*arg.cast::<News>() };
    news.tell();
}
