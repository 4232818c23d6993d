//! The RBD engine: operations on an image of a Ceph cluster, by the cluster's library.
//!
//! What it is: each operation is given to librbd with the guest's page array, and a thread of librbd's puts its result into
//! a [`Mailbox`]. The worker sleeps in its ring as with any engine; a result that comes while it sleeps writes an eventfd.
//!
//! What it is not: it knows no server, and retries nothing: librbd goes on with what a lost server has not answered.
//!
//! Invariant: a slot's memory is librbd's until its result is in the mailbox; a mailbox is dropped only once all callbacks
//! have left it.
//!
//! ```text
//!   queue(Io) ──► librbd ──► result of the slot, its bit ─┬─► reap: Done
//!                             the worker sleeps: eventfd ─┘
//! ```
#![expect(unsafe_code, reason = "gives addresses to a library, and is called by it")]

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::uring::Options;
use super::uring::ring::Ring;
use super::{Done, Engine, Event, GRACE, Io, Kind, Outcome, Token, Wait};
use crate::log;
use crate::memory::fault;
use crate::rbd::image::Image;
use crate::rbd::library::{Api, Raw, THICK};
use crate::rbd::standing::Standing;
use crate::sys;

/// How often a worker checks whether requests that the cluster refused fail, or are left to a successor.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Bits of a word.
const WORD: usize = 64;

/// Where librbd's threads put results.
#[derive(Debug)]
struct Mailbox {
    /// Of each slot.
    results: Box<[AtomicI64]>,
    /// A bit for each slot whose result is there.
    arrived: Box<[AtomicU64]>,
    /// The worker sleeps, or is about to.
    sleeps: AtomicBool,
    wake: OwnedFd,
    /// Callbacks that have left.
    left: AtomicU64,
}

impl Mailbox {
    fn new(slots: usize) -> io::Result<Self> {
        Ok(Self {
            results: (0..slots).map(|_| AtomicI64::new(0)).collect(),
            arrived: (0..slots.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect(),
            sleeps: AtomicBool::new(false),
            wake: sys::eventfd()?,
            left: AtomicU64::new(0),
        })
    }

    /// By a thread of librbd's. What it does last is to leave.
    fn deliver(&self, slot: u16, result: i64) {
        let at = usize::from(slot);
        if let (Some(place), Some(word)) = (self.results.get(at), self.arrived.get(at / WORD)) {
            place.store(result, Ordering::Relaxed);
            // In one order with `may_sleep`: either the worker sees the bit, or this sees that it sleeps.
            word.fetch_or(1 << (at % WORD), Ordering::SeqCst);
            if self.sleeps.swap(false, Ordering::SeqCst) {
                sys::signal(&self.wake);
            }
        }
        self.left.fetch_add(1, Ordering::Release);
    }

    /// Says that the worker is about to sleep. False: there is a result.
    fn may_sleep(&self) -> bool {
        self.sleeps.store(true, Ordering::SeqCst);
        self.arrived.iter().all(|word| word.load(Ordering::SeqCst) == 0)
    }

    fn wakes(&self) {
        self.sleeps.store(false, Ordering::Relaxed);
    }

    /// Gives each result that is there.
    fn take(&self, mut each: impl FnMut(usize, i64)) {
        for (at, word) in self.arrived.iter().enumerate() {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::AcqRel);
            while bits != 0 {
                let slot = at * WORD + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                each(slot, self.results.get(slot).map_or(0, |place| place.load(Ordering::Relaxed)));
            }
        }
    }
}

/// What librbd gives back with a result.
#[derive(Debug)]
struct Address {
    api: &'static Api,
    mailbox: *const Mailbox,
    slot: u16,
}

/// Called by a thread of librbd's.
extern "C" fn completed(completion: Raw, address: *mut c_void) {
    // SAFETY: an engine drops addresses and mailbox only once as many callbacks have left as were asked for.
    let (address, mailbox) = unsafe {
        let address = &*address.cast::<Address>();
        (address, &*address.mailbox)
    };
    // SAFETY: the completion is this callback's, which releases it and does not use it any more.
    let result = unsafe {
        let result = (address.api.rbd_aio_get_return_value)(completion);
        (address.api.rbd_aio_release)(completion);
        result
    };
    mailbox.deliver(address.slot, result as i64);
}

/// See the head of the file.
pub struct Rbd {
    ring: Ring,
    image: Arc<Image>,
    mailbox: Box<Mailbox>,
    addresses: Box<[Address]>,
    /// What a slot's operation is.
    running: Box<[Option<Io>]>,
    /// Slots whose operation the cluster refused, with its client: they end with an I/O error, or are left to a successor.
    refused: Vec<u16>,
    /// Operations that librbd took.
    given: u64,
    /// Of the mailbox's eventfd.
    wake: Token,
    done: Vec<Done>,
    ready: Vec<Token>,
    /// Since when nothing may wait for servers that are gone.
    given_up: Option<Instant>,
}

impl std::fmt::Debug for Rbd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rbd").field("image", &self.image).field("given", &self.given).finish_non_exhaustive()
    }
}

impl Rbd {
    /// For `slots` operations at once and `tokens` eventfds. Call it on the thread that will use it.
    ///
    /// # Errors
    /// ENOSYS or EPERM where io_uring is forbidden; ENOMEM.
    pub fn new(image: Arc<Image>, slots: u16, tokens: u16, options: &Options) -> io::Result<Self> {
        let wake = Token(tokens);
        let mut ring = Ring::new(1, &[-1], tokens.saturating_add(1), &[], options)?;
        let mailbox = Box::new(Mailbox::new(slots.into())?);
        ring.watch(wake, mailbox.wake.as_fd())?;
        let (api, to) = (image.raw().0, std::ptr::from_ref(&*mailbox));
        let addresses = (0..slots).map(|slot| Address { api, mailbox: to, slot }).collect();
        Ok(Self {
            ring,
            image,
            mailbox,
            addresses,
            running: vec![None; slots.into()].into_boxed_slice(),
            refused: Vec::with_capacity(slots.into()),
            given: 0,
            wake,
            done: Vec::with_capacity(slots.into()),
            ready: Vec::with_capacity(usize::from(tokens) + 1),
            given_up: None,
        })
    }

    /// Ends the process where a queue has to stop and the cluster has not answered in time: librbd cannot be told to leave
    /// the guest's memory alone, and a front-end that waits does nothing else, for its other devices neither. The requests
    /// stay in the journal, and the dead client is refused before they are done again.
    fn end_in_time(&self) {
        if self.given_up.is_some() && self.image.standing() == Standing::Successor {
            log::flush();
            sys::exit_now(1); // the control thread waits for this one, and a successor for both
        }
        if self.given_up.is_some_and(|since| since.elapsed() >= GRACE) && self.is_running() {
            let disk = &self.image.name;
            tracing::error!(
                %disk,
                "the cluster has not answered for {} s, and a queue has to stop: the front-end's connection is closed, and \
                 vublkd ends; another waits for the cluster",
                GRACE.as_secs()
            );
            self.image.hang_up();
            log::flush();
            sys::exit_now(1);
        }
    }

    /// Ends what the cluster refused, once it is known that this guest must not go on.
    fn settle_refused(&mut self) {
        if self.refused.is_empty() {
            return;
        }
        match self.image.standing() {
            Standing::Good => self.image.note_refused(), // there was no thread to look
            Standing::Looking | Standing::Successor => {}
            Standing::Lost => {
                for slot in self.refused.drain(..) {
                    if let Some(io) = self.running.get_mut(usize::from(slot)).and_then(Option::take) {
                        self.done.push(Done { slot: io.slot, outcome: Outcome::Failed(libc::ESHUTDOWN) });
                    }
                }
            }
        }
    }

    fn is_running(&self) -> bool {
        self.running.iter().any(Option::is_some)
    }

    /// Gives an operation to librbd.
    ///
    /// # Safety
    /// As [`Engine::queue`].
    unsafe fn give(&mut self, io: &Io) -> Result<(), i32> {
        if self.image.standing() == Standing::Lost {
            return Err(libc::ESHUTDOWN);
        }
        let (api, image) = self.image.raw();
        // librbd would leave out what is behind the end, and call the rest a success.
        if io.kind != Kind::Sync && io.offset.checked_add(io.len).is_none_or(|end| end > self.image.size()) {
            return Err(libc::EIO);
        }
        let address = self.addresses.get(usize::from(io.slot.0)).ok_or(libc::EINVAL)?;
        let address = std::ptr::from_ref(address).cast_mut().cast();
        let mut completion = null_mut();
        let count = c_int::try_from(io.iovec_count).map_err(|_| libc::EINVAL)?;
        // SAFETY: the iovecs and what they name stay until the Done, which is the contract; the address stays until its
        // callback has left.
        let given = unsafe {
            let made = (api.rbd_aio_create_completion)(address, completed, &raw mut completion);
            if made < 0 {
                return Err(-made);
            }
            let given = match io.kind {
                Kind::Read => (api.rbd_aio_readv)(image, io.iovecs, count, io.offset, completion),
                Kind::Write { .. } => (api.rbd_aio_writev)(image, io.iovecs, count, io.offset, completion),
                Kind::Sync => (api.rbd_aio_flush)(image, completion),
                Kind::Discard => (api.rbd_aio_discard)(image, io.offset, io.len, completion),
                Kind::Fallocate(mode) => {
                    let flags = if mode & libc::FALLOC_FL_PUNCH_HOLE == 0 { THICK } else { 0 };
                    let len = usize::try_from(io.len).unwrap_or(usize::MAX);
                    (api.rbd_aio_write_zeroes)(image, io.offset, len, completion, flags, 0)
                }
            };
            if given < 0 {
                (api.rbd_aio_release)(completion);
            }
            given
        };
        if given < 0 { Err(-given) } else { Ok(()) }
    }
}

/// What a result says of an operation.
fn outcome(image: &Image, io: &Io, result: i64) -> Outcome {
    // SAFETY: the slot's memory is there until its Done.
    let iovecs = || unsafe { std::slice::from_raw_parts(io.iovecs, io.iovec_count as usize) };
    if fault::any_lost()
        && io.iovec_count > 0
        && iovecs().iter().any(|v| fault::is_lost_at(v.iov_base.addr()))
    {
        return Outcome::Failed(libc::EFAULT); // a copy went nowhere
    }
    match (u64::try_from(result), io.kind) {
        (Ok(bytes), Kind::Read) => Outcome::Moved(bytes),
        (Ok(_), Kind::Write { .. }) => Outcome::Moved(io.len),
        (Ok(_), _) => Outcome::Moved(0),
        (Err(_), kind) => {
            if result == -i64::from(libc::ETIMEDOUT) {
                image.note_given_up();
            }
            if !matches!(kind, Kind::Read | Kind::Sync) && !is_refusal(result) {
                image.note_failed_change();
            }
            Outcome::Failed(i32::try_from(-result).unwrap_or(libc::EIO))
        }
    }
}

/// The cluster has this client on its blocklist.
fn is_refusal(result: i64) -> bool {
    result == -i64::from(libc::ESHUTDOWN)
}

impl Engine for Rbd {
    unsafe fn queue(&mut self, io: Io) {
        // SAFETY: the caller's contract.
        match unsafe { self.give(&io) } {
            Ok(()) => {
                self.given += 1;
                if let Some(running) = self.running.get_mut(usize::from(io.slot.0)) {
                    *running = Some(io);
                }
            }
            Err(errno) => {
                let outcome = Outcome::of_handed_over(Err(errno));
                self.done.push(Done { slot: io.slot, outcome });
            }
        }
    }

    fn watch(&mut self, token: Token, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.ring.watch(token, fd)
    }

    fn unwatch(&mut self, token: Token) {
        self.ring.unwatch(token);
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.end_in_time();
        self.settle_refused();
        let left = self.given_up.filter(|_| self.is_running()).map(|at| GRACE.saturating_sub(at.elapsed()));
        let wait = wait.within(left).within((!self.refused.is_empty()).then_some(LOOK_EVERY));
        let has_event = !self.done.is_empty() || (wait != Wait::No && !self.mailbox.may_sleep());
        let entered = self.ring.enter(wait, has_event);
        self.mailbox.wakes();
        entered
    }

    fn reap(&mut self, mut each: impl FnMut(Event)) {
        let ready = &mut self.ready;
        self.ring.reap(|event| ready.extend(event.err()));
        let wake = self.wake;
        self.ready.drain(..).filter(|&token| token != wake).for_each(|token| each(Event::Ready(token)));
        let Self { mailbox, running, image, refused, done, .. } = self;
        mailbox.take(|slot, result| {
            let Some(place) = running.get_mut(slot) else { return };
            if is_refusal(result) && image.standing() != Standing::Lost {
                image.note_refused();
                refused.extend(place.as_ref().map(|io| io.slot.0));
                return;
            }
            let Some(io) = place.take() else { return };
            done.push(Done { slot: io.slot, outcome: outcome(image, &io, result) });
        });
        done.drain(..).for_each(|done| each(Event::Done(done)));
    }

    fn give_up(&mut self, given_up: bool) {
        self.given_up = given_up.then(|| self.given_up.unwrap_or_else(Instant::now));
    }
}

impl Drop for Rbd {
    /// Waits for what librbd has: the memory belongs to others afterwards.
    fn drop(&mut self) {
        for slot in self.refused.drain(..) {
            self.running.get_mut(usize::from(slot)).into_iter().for_each(|io| *io = None);
        }
        while self.is_running() {
            if self.mailbox.may_sleep()
                && let Err(e) = self.ring.submit(1, None)
            {
                tracing::error!("io_uring_enter: {e}");
                std::process::abort(); // better than memory that changes by itself
            }
            let running = &mut self.running;
            self.mailbox.take(|slot, _| running.get_mut(slot).into_iter().for_each(|io| *io = None));
            self.ring.reap(|_| {});
        }
        // All have put their results there, and write no eventfd any more on their way out.
        while self.mailbox.left.load(Ordering::Acquire) < self.given {
            std::thread::yield_now();
        }
    }
}
