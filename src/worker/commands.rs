//! What the control thread asks of a worker, and doing it: between two turns, one command after another.
//!
//! What it is not: it drains nothing; a queue that is to stop is marked, and the loop ends it once it owes nothing.
//!
//! Invariant: each command but [`Command::Retry`] and [`Command::Exit`] is answered, those that wait for requests when
//! those have ended.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::TryRecvError;

use super::{Ack, Queue, QueueParts, Stopping, Worker};
use crate::changes::Changes;
use crate::dirty::DirtyLog;
use crate::engine::uring::pins::Pins;
use crate::engine::{Engine, Token};
use crate::hold::{AtStop, Retry};
use crate::memory::GuestMemory;
use crate::promise::Promise;
use crate::ring::split::RingState;
use crate::trace;

/// What the control thread asks of a worker.
#[derive(Debug)]
pub enum Command {
    /// Serve a queue.
    Start(u16, Box<QueueParts>, Ack<io::Result<()>>),
    /// Drain a queue and stop serving it. `None`: it was not served.
    Stop(u16, AtStop, Ack<Option<RingState>>),
    /// Another kick eventfd for a served queue.
    SetKick(u16, Arc<OwnedFd>, Ack<io::Result<()>>),
    /// Another call eventfd for a served queue.
    SetCall(u16, Option<Arc<OwnedFd>>, Ack<()>),
    /// Another error eventfd for a served queue.
    SetErr(u16, Option<Arc<OwnedFd>>, Ack<()>),
    /// Another memory table. Answers the queues whose rings are not in it.
    SetMemory(Arc<GuestMemory>, Ack<Vec<u16>>),
    /// Mark what is written to the guest there, or nowhere.
    SetLog(Option<Arc<DirtyLog>>, Ack<()>),
    /// Mark there what changes on the disk, or nowhere.
    SetChanges(Option<Arc<Changes>>, Ack<()>),
    /// Write down there each request that ends, or nowhere.
    SetTrace(Option<trace::Ring>, Ack<()>),
    /// Where a served queue's used ring is, for the log.
    SetUsedLog(u16, Option<u64>, Ack<()>),
    /// Judge requests that are fetched from now on by this.
    SetPromise(Promise, Ack<()>),
    /// Use this pinned memory in place of what was, or none.
    Pin(Option<Arc<Pins>>, Ack<()>),
    /// Answer once nothing in flight touches this guest range.
    Retire(u64, u64, Ack<()>),
    /// Carry out again requests that are held.
    Retry(Retry),
    /// End the thread. Queues that still run are left as they are.
    Exit,
}

impl<E: Engine> Worker<E> {
    /// Carries out what the control thread asked for.
    pub(super) fn obey(&mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Start(index, parts, ack)) => ack.send(self.start(index, *parts)),
                Ok(Command::Stop(index, held, ack)) => match self.queues.get_mut(usize::from(index)) {
                    Some(Some(queue)) => {
                        // Without a journal no later daemon would know of them.
                        let held = if queue.parts.ring.is_journalled() { held } else { AtStop::Fail };
                        queue.stopping = Some(Stopping { held, ack });
                        if held == AtStop::Fail {
                            self.engine.give_up(true);
                            self.fail_held(|request, _| request.queue == index);
                        }
                    }
                    _ => ack.send(None),
                },
                Ok(Command::SetKick(index, kick, ack)) => ack.send(self.set_kick(index, kick)),
                Ok(Command::SetCall(index, call, ack)) => {
                    if let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) {
                        queue.parts.call = call;
                    }
                    ack.send(());
                }
                Ok(Command::SetErr(index, err, ack)) => {
                    if let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) {
                        queue.parts.err = err;
                    }
                    ack.send(());
                }
                Ok(Command::SetMemory(memory, ack)) => ack.send(self.set_memory(memory)),
                Ok(Command::SetLog(log, ack)) => {
                    self.log = log;
                    ack.send(());
                }
                Ok(Command::SetChanges(changes, ack)) => {
                    self.changes = changes;
                    ack.send(());
                }
                Ok(Command::SetTrace(trace, ack)) => {
                    self.end_run(); // what ended before is not in the trace
                    self.trace = trace;
                    ack.send(());
                }
                Ok(Command::SetUsedLog(index, at, ack)) => {
                    if let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) {
                        queue.parts.used_log = at;
                        queue.mark(self.log.as_ref());
                    }
                    ack.send(());
                }
                Ok(Command::SetPromise(promise, ack)) => {
                    self.promise = promise;
                    ack.send(());
                }
                Ok(Command::Pin(pins, ack)) => {
                    self.engine.pin(pins.as_deref());
                    ack.send(());
                }
                Ok(Command::Retire(guest, len, ack)) => {
                    self.retiring.push((guest, len, ack));
                    self.fail_held(|request, tables| tables.uses_region(request, guest, len));
                }
                Ok(Command::Retry(which)) => self.retry(which),
                Ok(Command::Exit) | Err(TryRecvError::Disconnected) => {
                    self.exit = true;
                    return;
                }
                Err(TryRecvError::Empty) => return,
            }
        }
    }

    fn start(&mut self, index: u16, parts: QueueParts) -> io::Result<()> {
        let entry = self.queues.get_mut(usize::from(index)).ok_or(io::ErrorKind::InvalidInput)?;
        self.engine.watch(Token(index + 1), parts.kick.as_fd())?;
        // Scanned once whatever the kick says: a chain may have come before.
        *entry = Some(Queue {
            parts,
            ready: true,
            held_up: 0,
            held: 0,
            resting: 0,
            waits: None,
            share: self.device.throttle.share(),
            charged: None,
            limited_since: None,
            outside: false,
            stopping: None,
            counters: self.device.stats.queue(index),
        });
        self.served.push(index);
        Ok(())
    }

    fn set_kick(&mut self, index: u16, kick: Arc<OwnedFd>) -> io::Result<()> {
        let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) else { return Ok(()) };
        self.engine.unwatch(Token(index + 1));
        queue.parts.kick = kick;
        queue.ready = true; // the old kick may have been written unseen
        self.engine.watch(Token(index + 1), queue.parts.kick.as_fd())
    }

    fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Vec<u16> {
        let mut outside = Vec::new();
        for &index in &self.served {
            if let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) {
                queue.outside = queue.parts.ring.rebind(&memory).is_err();
                if queue.outside {
                    outside.push(index);
                }
            }
        }
        self.tables.replace(memory);
        outside
    }
}
