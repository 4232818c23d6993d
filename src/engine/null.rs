//! The null engine: every operation succeeds at once and moves nothing. It
//! measures everything but the disk.
//!
//! What it is not: a disk. A read leaves the guest's memory as it was.

use std::io;
use std::os::fd::BorrowedFd;

use super::eventfds::Eventfds;
use super::{Done, Engine, Event, Io, Outcome, Token, Wait};

/// A look at the eventfds is a system call: one in so many turns.
const LOOK_EVERY: u8 = 32;

/// See the head of the file.
#[derive(Debug)]
pub struct Null {
    done: Vec<Done>,
    eventfds: Eventfds,
    /// Turns since the eventfds were looked at, for want of a sleep.
    unseen: u8,
}

impl Null {
    /// For `slots` operations and `tokens` eventfds.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new(slots: u16, tokens: u16) -> io::Result<Self> {
        Ok(Self { done: Vec::with_capacity(slots.into()), eventfds: Eventfds::new(tokens)?, unseen: 0 })
    }
}

impl Engine for Null {
    #[expect(unsafe_code, reason = "the trait's method; nothing is done with the addresses")]
    unsafe fn queue(&mut self, io: Io) {
        self.done.push(Done { slot: io.slot, outcome: Outcome::Moved(io.len) });
    }

    fn watch(&mut self, token: Token, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.eventfds.watch(token, fd)
    }

    fn unwatch(&mut self, token: Token) {
        self.eventfds.unwatch(token);
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        let wait = if self.done.is_empty() { wait } else { Wait::No };
        self.unseen = self.unseen.wrapping_add(1);
        if wait == Wait::No && !self.unseen.is_multiple_of(LOOK_EVERY) {
            return Ok(());
        }
        self.eventfds.wait(wait)
    }

    fn reap(&mut self, mut each: impl FnMut(Event)) {
        self.done.drain(..).for_each(|done| each(Event::Done(done)));
        self.eventfds.reap().for_each(|token| each(Event::Ready(token)));
    }
}
