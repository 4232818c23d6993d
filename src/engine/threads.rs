//! The fallback engine: preadv2 and pwritev2 on a pool of threads, for hosts
//! where io_uring is forbidden.
//!
//! What it is: the same contract as [`super::uring`], with one epoll in place of
//! one ring. Work is handed over and taken back in batches.
//!
//! What it is not: fast. It keeps [`THREADS`] operations in flight at most.
//!
//! Invariants: dropping it waits for every running operation; threads are
//! started when the first operation is, so an idle disk has none. Where none can
//! be started the worker's own thread does the work.
#![expect(unsafe_code, reason = "hands addresses to system calls on other threads")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::eventfds::Eventfds;
use super::{Done, Engine, Event, Files, Io, Outcome, Token, Wait, inline};
use crate::pulse::Pulse;
use crate::sandbox::{self, Role};
use crate::sys;

/// Operations in flight at once.
pub const THREADS: usize = 32;

/// An operation on its way to a thread.
struct Job(Io);

// SAFETY: the addresses in an Io stay valid until its Done is reaped (the
// contract of `Engine::queue`), whichever thread uses them.
unsafe impl Send for Job {}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    stop: bool,
}

struct Shared {
    files: Arc<Files>,
    jobs: Mutex<Jobs>,
    wake: Condvar,
    done: Mutex<Vec<Done>>,
    ready: OwnedFd,
}

impl Shared {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn done(&self) -> MutexGuard<'_, Vec<Done>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        sandbox::confine(Role::Io);
        loop {
            let mut jobs = self.jobs();
            let job = loop {
                if let Some(job) = jobs.waiting.pop_front() {
                    break job;
                }
                if jobs.stop {
                    return;
                }
                jobs = self.wake.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            };
            drop(jobs);
            // SAFETY: what a Job promises.
            let outcome = unsafe { inline::run(&self.files, &job.0) };
            let mut done = self.done();
            done.push(Done { slot: job.0.slot, outcome });
            if done.len() == 1 {
                sys::signal(&self.ready);
            }
        }
    }
}

/// See the head of the file.
pub struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    eventfds: Eventfds,
    /// The token of the pool's own eventfd.
    completions: Token,
    staged: Vec<Job>,
    reaped: Vec<Done>,
    in_flight: usize,
    pulse: Option<Arc<Pulse>>,
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Threads").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

impl Threads {
    /// A pool for `slots` operations on `files` and `tokens` eventfds.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new(files: Arc<Files>, slots: u16, tokens: u16) -> io::Result<Self> {
        let shared = Shared {
            files,
            jobs: Mutex::default(),
            wake: Condvar::new(),
            done: Mutex::new(Vec::with_capacity(slots.into())),
            ready: sys::eventfd()?,
        };
        shared.jobs().waiting.reserve(slots.into());
        // One token more, for the pool's own eventfd.
        let mut eventfds = Eventfds::new(tokens.saturating_add(1))?;
        eventfds.watch(Token(tokens), shared.ready.as_fd())?;
        Ok(Self {
            shared: Arc::new(shared),
            threads: Vec::with_capacity(THREADS),
            eventfds,
            completions: Token(tokens),
            staged: Vec::with_capacity(slots.into()),
            reaped: Vec::with_capacity(slots.into()),
            in_flight: 0,
            pulse: None,
        })
    }

    /// Threads are added as the depth grows, and stay. False: there is none.
    fn grow(&mut self) -> bool {
        while self.threads.len() < self.in_flight.min(THREADS) {
            let shared = Arc::clone(&self.shared);
            let name = format!("vublk-io-{}", self.threads.len());
            match std::thread::Builder::new().name(name).stack_size(64 << 10).spawn(move || shared.serve()) {
                Ok(thread) => self.threads.push(thread),
                Err(e) => {
                    tracing::debug!("only {} threads for I/O: {e}", self.threads.len());
                    break;
                }
            }
        }
        !self.threads.is_empty()
    }
}

impl Engine for Threads {
    unsafe fn queue(&mut self, io: Io) {
        if io.own_thread {
            self.in_flight += 1;
            let outcome = Pulse::during(self.pulse.as_deref(), || {
                // SAFETY: the contract of this very function.
                unsafe { inline::run(&self.shared.files, &io) }
            });
            self.shared.done().push(Done { slot: io.slot, outcome });
        } else {
            self.staged.push(Job(io));
        }
    }

    fn set_pulse(&mut self, pulse: Arc<Pulse>) {
        self.pulse = Some(pulse);
    }

    fn watch(&mut self, token: Token, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.eventfds.watch(token, fd)
    }

    fn unwatch(&mut self, token: Token) {
        self.eventfds.unwatch(token);
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        if !self.staged.is_empty() {
            self.in_flight += self.staged.len();
            if self.grow() {
                let count = self.staged.len();
                self.shared.jobs().waiting.extend(self.staged.drain(..));
                for _ in 0..count.min(THREADS) {
                    self.shared.wake.notify_one();
                }
            } else {
                // The worker's own thread will do them; it says so, too.
                let gone = self.staged.drain(..).map(|job| job.0.slot);
                let outcome = Outcome::NotExecuted(libc::EAGAIN);
                self.shared.done().extend(gone.map(|slot| Done { slot, outcome }));
            }
        }
        let wait = if self.shared.done().is_empty() { wait } else { Wait::No };
        self.eventfds.wait(wait)
    }

    fn reap(&mut self, mut each: impl FnMut(Event)) {
        std::mem::swap(&mut *self.shared.done(), &mut self.reaped);
        self.in_flight -= self.reaped.len();
        self.reaped.drain(..).for_each(|done| each(Event::Done(done)));
        let completions = self.completions;
        self.eventfds.reap().filter(|t| *t != completions).for_each(|t| each(Event::Ready(t)));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.jobs().stop = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing running any more.
            let _panicked = thread.join();
        }
    }
}
