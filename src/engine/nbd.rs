//! The NBD engine: operations on an export that a server has, over one connection at a time.
//!
//! What it is: the page-array idea on a socket. All requests of a turn leave in one SENDMSG, headers and the guest's
//! pages; replies come by one RECVMSG at a time, whose first buffers are the guest's pages of the read that is being
//! answered ([`incoming`]). Eventfds are watched by the same ring.
//!
//! What it is not: it connects nothing; [`crate::nbd::remote`] does, on a thread of its own, and wakes the engine.
//!
//! Invariants: memory of a request is named to the kernel only while the request is in its slot: its [`Done`] comes
//! after the SENDMSG that names it has ended. What was not answered on a connection that the server has closed goes over
//! the next one; where it is not known whether the server still carries it out, a change is not sent again but fails. A
//! connection that the server has not closed is given up only by a queue that has to stop, or by --reconnect-delay, and no
//! other is made before the server has closed it.
//!
//! ```text
//!   queue ──► queued ──► sending ──► sent ──► Done          connection: up ──► closing ──► down ──► up
//!               ▲            │ lost    │                                   lost        fresh
//!               └────────────┴─────────┘
//! ```
#![expect(unsafe_code, reason = "submits addresses to the kernel")]

mod incoming;
mod outgoing;
mod request;
mod state;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, Fixed};
use io_uring::{opcode, squeue};

use self::incoming::Incoming;
use self::outgoing::Outgoing;
use self::request::{Phase, Request};
use self::state::{Close, Ended, State};
use super::uring::Options;
use super::uring::ring::{Completion, KIND_ENGINE, Ring, user_data};
use super::{Done, Engine, Event, GRACE, Io, Kind, Outcome, Slot, Target, Token, Wait};
use crate::nbd::remote::{Line, Lost, Remote};
use crate::nbd::wire::{self, Command};

/// What it does with a ring, besides watching eventfds.
pub const OPERATIONS: [u8; 4] =
    [opcode::SendMsg::CODE, opcode::RecvMsg::CODE, opcode::Shutdown::CODE, opcode::AsyncCancel::CODE];

const KIND_SEND: u64 = KIND_ENGINE;
const KIND_RECEIVE: u64 = KIND_ENGINE + 1;
const KIND_SHUTDOWN: u64 = KIND_ENGINE + 2;
const KIND_CANCEL: u64 = KIND_ENGINE + 3;

/// The socket's place in the ring's file table.
const SOCKET: u32 = 0;

/// See the head of the file.
pub struct Nbd {
    ring: Ring,
    remote: Arc<Remote>,
    worker: usize,
    /// Of the line's wake-up.
    wake: Token,
    state: State,
    /// By slot; the last one is the engine's own, for flushes that no slot asks for.
    requests: Box<[Request]>,
    queue: VecDeque<u16>,
    outgoing: Box<Outgoing>,
    incoming: Box<Incoming>,
    /// Requests that are in their slots, and those of them that are large reads.
    in_slots: usize,
    large_reads: usize,
    /// The server has answered something on this connection.
    has_served: bool,
    done: Vec<Done>,
    completions: Vec<Completion>,
    ready: Vec<Token>,
    /// Who waits for the flush of the last slot, and who for the one after it.
    flushing: Vec<SyncSender<io::Result<()>>>,
    to_flush: Vec<SyncSender<io::Result<()>>>,
    /// How long requests wait for a lost server; `None`: as long as it takes.
    patience: Option<Duration>,
    /// Since when nothing may wait for a server that is gone.
    given_up: Option<Instant>,
    /// A shutdown is under way.
    shutting_down: bool,
    /// The last one was of both sides.
    is_shut: bool,
}

impl std::fmt::Debug for Nbd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nbd")
            .field("state", &self.state)
            .field("in_slots", &self.in_slots)
            .finish_non_exhaustive()
    }
}

impl Nbd {
    /// The engine of a worker's line, for `slots` operations at once and `tokens` eventfds. Call it on the thread that
    /// will use it. `patience`: how long requests wait for a lost server.
    ///
    /// # Errors
    /// ENOSYS or EPERM where io_uring is forbidden; ENOMEM.
    pub fn new(
        remote: Arc<Remote>,
        worker: usize,
        patience: Option<Duration>,
        slots: u16,
        tokens: u16,
        options: &Options,
    ) -> io::Result<Self> {
        let line = remote.line(worker).ok_or(io::ErrorKind::NotFound)?;
        let wake = Token(tokens);
        // One SENDMSG, one RECVMSG, one shutdown, one cancellation.
        let mut ring = Ring::new(4, &[-1], tokens.saturating_add(1), &OPERATIONS, options)?;
        ring.watch(wake, line.wake())?;
        line.attach();
        let count = usize::from(slots) + 1;
        let mut engine = Self {
            ring,
            worker,
            wake,
            state: State::Down(Instant::now()),
            requests: vec![Request::FREE; count].into_boxed_slice(),
            queue: VecDeque::with_capacity(count),
            outgoing: Box::new(Outgoing::new(count)),
            incoming: Box::new(Incoming::new()),
            in_slots: 0,
            large_reads: 0,
            has_served: false,
            done: Vec::with_capacity(count),
            completions: Vec::with_capacity(4),
            ready: Vec::with_capacity(usize::from(tokens) + 1),
            flushing: Vec::new(),
            to_flush: Vec::new(),
            patience,
            given_up: None,
            shutting_down: false,
            is_shut: false,
            remote,
        };
        engine.woken()?;
        Ok(engine)
    }

    fn line(&self) -> Option<&Line> {
        self.remote.line(self.worker)
    }

    /// The slot of flushes that no slot of the worker asks for.
    fn own_slot(&self) -> u16 {
        u16::try_from(self.requests.len() - 1).unwrap_or(u16::MAX)
    }

    /// Takes a connection and requests for flushes, if there are any.
    fn woken(&mut self) -> io::Result<()> {
        let Some(line) = self.line() else { return Ok(()) };
        let (is_to_end, flushes) = (line.is_to_end(), line.take_flushes());
        let fresh = if matches!(self.state, State::Down(_)) { line.take() } else { None };
        self.to_flush.extend(flushes);
        if is_to_end {
            self.close(&"another connection to it was lost", Close::Sending);
        }
        if let Some(connection) = fresh {
            self.ring.replace_file(SOCKET, connection.socket.as_raw_fd())?;
            self.incoming.begin(connection.structured);
            self.has_served = false;
            self.state = State::Up(connection);
            // Another line's loss may have shown it while they waited.
            self.fail_lost_flushes();
        }
        Ok(())
    }

    /// Puts a request among those that wait for their turn.
    fn enqueue(&mut self, slot: u16, io: Io) {
        let (command, len) = match io.kind {
            Kind::Read => (Command::Read, io.len.min(self.most())),
            Kind::Write { dsync } => (Command::Write { fua: dsync }, io.len.min(self.most())),
            Kind::Sync => (Command::Flush, 0),
            Kind::Discard => (Command::Trim, io.len),
            Kind::Fallocate(mode) => {
                let no_hole = mode & libc::FALLOC_FL_PUNCH_HOLE == 0;
                (Command::WriteZeroes { no_hole, fast_zero: false }, io.len)
            }
        };
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return };
        let generation = request.generation;
        *request = Request { io, command, len, phase: Phase::Queued, generation, ..Request::FREE };
        self.in_slots += 1;
        self.large_reads += usize::from(request.is_large_read());
        let flags = self.remote.export().flags;
        if command == Command::Flush && self.remote.marks().has_lost() {
            self.end(slot, Outcome::Failed(libc::EIO));
        } else if command == Command::Flush && !flags.can_flush() {
            self.end(slot, Outcome::Moved(0)); // what such a server answers counts as durable, which the start has said
        } else {
            self.queue.push_back(slot);
        }
    }

    /// Bytes of one read or write at most; whole blocks.
    fn most(&self) -> u64 {
        let sizes = self.remote.export().block;
        let unit = sizes.minimum.max(512);
        u64::from(sizes.maximum / unit * unit)
    }

    /// A request was answered, or is not sent any more. Its Done comes once no SENDMSG names its memory.
    fn end(&mut self, slot: u16, outcome: Outcome) {
        let own = self.own_slot();
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return };
        if request.phase == Phase::Sending {
            request.early = Some(outcome);
            return;
        }
        request.phase = Phase::Free;
        self.in_slots -= 1;
        self.large_reads -= usize::from(request.is_large_read());
        if matches!(outcome, Outcome::Moved(_)) {
            match request.command {
                Command::Flush => self.remote.marks().note_flush(request.changed),
                Command::Write { fua: false } | Command::WriteZeroes { .. } => {
                    self.remote.marks().note_change()
                }
                _ => {}
            }
        }
        if slot == own {
            let result = match outcome {
                Outcome::Moved(_) => 0,
                Outcome::NotExecuted(errno) | Outcome::Failed(errno) => errno,
            };
            for waiter in self.flushing.drain(..) {
                let said = if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) };
                let _gone = waiter.send(said);
            }
        } else {
            self.done.push(Done { slot: Slot(slot), outcome });
        }
    }

    /// Stages what can be sent and received now. True: among them is a message that the socket takes at once.
    fn stage(&mut self) -> bool {
        let mut takes_at_once = false;
        if !self.to_flush.is_empty() && self.flushing.is_empty() {
            self.flushing.append(&mut self.to_flush);
            let own = self.own_slot();
            self.enqueue(own, Request::FREE.io);
        }
        let (is_up, socket) = match &self.state {
            State::Up(connection) => (true, connection.socket.as_raw_fd()),
            State::Closing { connection, end: None, .. } => (false, connection.socket.as_raw_fd()),
            State::Closing { .. } | State::Down(_) => return false,
        };
        if is_up {
            let changed = self.remote.marks().changed();
            if let Some(message) = self.outgoing.next(&mut self.requests, &mut self.queue, changed) {
                let flags = libc::MSG_NOSIGNAL.unsigned_abs();
                let entry = if self.ring.is_fixed() {
                    opcode::SendMsg::new(Fixed(SOCKET), message).flags(flags).build()
                } else {
                    opcode::SendMsg::new(Fd(socket), message).flags(flags).build()
                };
                // SAFETY: the message and its iovecs are in `outgoing`, which stays as it is until this completes, and
                // name memory of requests that are in their slots until then.
                unsafe { self.ring.stage(&entry.user_data(user_data(KIND_SEND, 0, 0))) };
                takes_at_once = self.outgoing.is_short();
            }
        }
        if let Some(message) = self.incoming.next(&self.requests, self.large_reads > 0) {
            let entry = if self.ring.is_fixed() {
                opcode::RecvMsg::new(Fixed(SOCKET), message).build()
            } else {
                opcode::RecvMsg::new(Fd(socket), message).build()
            };
            // SAFETY: as above, of `incoming`; the guest's pages are those of a request that is in its slot until its
            // reply was received.
            unsafe { self.ring.stage(&entry.user_data(user_data(KIND_RECEIVE, 0, 0))) };
        }
        takes_at_once
    }

    fn completed(&mut self, completion: Completion) {
        match completion.kind {
            KIND_SEND => {
                if self.outgoing.ended(completion.result) {
                    while let Some(slot) = self.outgoing.take_sent() {
                        self.sent(slot);
                    }
                }
                if completion.result < 0 && !is_again(completion.result) {
                    self.cannot_send(-completion.result);
                }
            }
            KIND_RECEIVE => {
                self.incoming.ended();
                match completion.result {
                    0 => self.lose(0),
                    n if n == -libc::EFAULT => self.cannot_receive(),
                    n if n < 0 && !is_again(n) => self.lose(-n),
                    n => self.received(usize::try_from(n).unwrap_or(0)),
                }
            }
            KIND_CANCEL => {}
            _ => {
                self.shutting_down = false;
                if let State::Closing { connection, end: Some(Ended::ByServer | Ended::Unknown), .. } =
                    &self.state
                    && !self.is_shut
                {
                    self.shut(libc::SHUT_RDWR, connection.socket.as_raw_fd());
                }
            }
        }
        self.closed();
    }

    /// A SENDMSG ended that had this request whole, or will not send the rest of it.
    fn sent(&mut self, slot: u16) {
        let Some(request) = self.requests.get_mut(usize::from(slot)) else { return };
        if request.phase == Phase::Sending {
            request.phase = Phase::Sent;
            if let Some(outcome) = request.early.take() {
                self.end(slot, outcome);
            }
        }
    }

    fn received(&mut self, bytes: usize) {
        self.incoming.received(bytes);
        loop {
            match self.incoming.parse(&mut self.requests) {
                // It is another server's to do.
                Ok(Some((_, Outcome::Failed(libc::ESHUTDOWN)))) => {
                    return self.close(&"the server shuts down", Close::Sending);
                }
                Ok(Some((slot, outcome))) => {
                    self.has_served = true;
                    self.end(slot, outcome);
                }
                Ok(None) => return,
                Err(violation) => {
                    // What was sent may be carried out yet: the server is given the time to end it and to close.
                    self.close(&violation, Close::Sending);
                    return;
                }
            }
        }
    }

    /// Nothing more leaves: the server has closed its side, or memory of a write is gone. What it had received it may carry
    /// out yet, so the connection is over only when it has nothing more to say.
    fn cannot_send(&mut self, errno: i32) {
        if matches!(self.state, State::Up(_)) {
            if errno == libc::EFAULT
                && let Some(slot) = self.outgoing.faulted()
                && let Some(request) = self.requests.get_mut(usize::from(slot))
            {
                request.early = Some(Outcome::Failed(errno));
            }
            self.close(&io::Error::from_raw_os_error(errno), Close::Sending);
        }
    }

    /// The memory of the read that is being answered is gone.
    fn cannot_receive(&mut self) {
        let slot = self.incoming.receiving();
        if let Some(request) = slot.and_then(|slot| self.requests.get_mut(usize::from(slot))) {
            request.early = Some(Outcome::Failed(libc::EFAULT));
        }
        self.close(&io::Error::from_raw_os_error(libc::EFAULT), Close::Sending);
    }

    /// The connection ended; 0: the server closed it.
    fn lose(&mut self, errno: i32) {
        let how = Close::Over(Ended::of_error(errno));
        match errno {
            0 => self.close(&"the server closed it", how),
            _ => self.close(&io::Error::from_raw_os_error(errno), how),
        }
    }

    /// Shuts the connection down, or its sending side.
    fn close(&mut self, why: &dyn std::fmt::Display, how: Close) {
        let state = std::mem::replace(&mut self.state, State::Down(Instant::now()));
        self.state = match (state, how) {
            (State::Up(connection), Close::Sending) => {
                // Until the server closes, all that comes is dropped.
                self.incoming.ignore();
                self.is_shut = false;
                self.shut(libc::SHUT_WR, connection.socket.as_raw_fd());
                self.remote.say_closing(why);
                State::Closing { connection, since: Instant::now(), end: None, why: why.to_string() }
            }
            (State::Up(connection), Close::Over(end)) => {
                self.is_shut = false;
                self.stop_using(connection.socket.as_raw_fd(), end);
                let (since, end) = (Instant::now(), Some(end));
                State::Closing { connection, since, end, why: why.to_string() }
            }
            (State::Closing { connection, since, end: None, why }, Close::Over(end)) => {
                self.stop_using(connection.socket.as_raw_fd(), end);
                State::Closing { connection, since, end: Some(end), why }
            }
            (state, _) => state,
        };
    }

    /// No operation on the socket waits any more.
    fn stop_using(&mut self, socket: RawFd, end: Ended) {
        if end != Ended::GivenUp {
            return self.shut(libc::SHUT_RDWR, socket);
        }
        // Its receiving side stays: by that it is seen when the server closes.
        self.incoming.ignore();
        self.shut(libc::SHUT_WR, socket);
        if self.incoming.is_under_way() {
            self.cancel(KIND_RECEIVE);
        }
    }

    fn cancel(&mut self, kind: u64) {
        let entry = opcode::AsyncCancel::new(user_data(kind, 0, 0)).build();
        // It has no file; a ring that takes operations on its own table alone asks for the flag all the same.
        let entry = if self.ring.is_fixed() { entry.flags(squeue::Flags::FIXED_FILE) } else { entry };
        // SAFETY: it names no memory.
        unsafe { self.ring.stage(&entry.user_data(user_data(KIND_CANCEL, 0, 0))) };
    }

    fn shut(&mut self, how: i32, socket: RawFd) {
        if self.shutting_down {
            return;
        }
        self.shutting_down = true;
        self.is_shut = how == libc::SHUT_RDWR;
        let entry = if self.ring.is_fixed() {
            opcode::Shutdown::new(Fixed(SOCKET), how).build()
        } else {
            opcode::Shutdown::new(Fd(socket), how).build()
        };
        // SAFETY: it names no memory.
        unsafe { self.ring.stage(&entry.user_data(user_data(KIND_SHUTDOWN, 0, 0))) };
    }

    /// Gives a connection up once nothing on it is under way.
    fn closed(&mut self) {
        if !matches!(self.state, State::Closing { end: Some(_), .. })
            || self.outgoing.is_under_way()
            || self.incoming.is_under_way()
            || self.shutting_down
        {
            return;
        }
        let state = std::mem::replace(&mut self.state, State::Down(Instant::now()));
        let State::Closing { connection, end: Some(end), why, .. } = state else { return };
        self.outgoing.reset();
        if let Err(e) = self.ring.replace_file(SOCKET, -1) {
            tracing::warn!("cannot clear the socket's entry of the ring's file table: {e}");
        }
        for slot in 0..self.requests.len() {
            let Some(request) = self.requests.get_mut(slot) else { continue };
            if !matches!(request.phase, Phase::Sending | Phase::Sent) {
                continue;
            }
            let slot = u16::try_from(slot).unwrap_or(u16::MAX);
            if let Some(outcome) = request.early.take() {
                request.phase = Phase::Sent;
                self.end(slot, outcome);
            } else if end != Ended::ByServer && request.changes() {
                request.phase = Phase::Sent;
                self.end(slot, Outcome::Failed(libc::EIO));
            } else {
                request.phase = Phase::Queued;
                request.error = None;
                self.queue.push_back(slot);
            }
        }
        let (worker, has_served, is_over) = (self.worker, self.has_served, end != Ended::GivenUp);
        self.remote.lost(Lost { worker, connection, has_served, is_over }, &why);
        self.fail_lost_flushes();
    }

    /// Ends flushes that wait, where something that was answered may be gone.
    fn fail_lost_flushes(&mut self) {
        if self.remote.marks().has_lost() {
            self.fail_queued(|request| request.command == Command::Flush);
        }
    }

    /// Ends requests that wait for their turn, with an I/O error.
    fn fail_queued(&mut self, which: impl Fn(&Request) -> bool) {
        for _ in 0..self.queue.len() {
            let Some(slot) = self.queue.pop_front() else { return };
            if self.requests.get(usize::from(slot)).is_some_and(&which) {
                self.end(slot, Outcome::Failed(libc::EIO));
            } else {
                self.queue.push_back(slot);
            }
        }
    }

    /// When something has to be done without an event.
    fn deadline(&self) -> Option<Instant> {
        if self.in_slots == 0 {
            return None;
        }
        match &self.state {
            State::Down(since) if !self.queue.is_empty() => match self.given_up {
                Some(at) => Some(at),
                None => Some(*since + self.patience?),
            },
            State::Up(_) => Some(self.given_up? + GRACE),
            State::Closing { since, end: None, .. } => match self.given_up {
                Some(at) => Some(at + GRACE),
                None => Some(*since + self.patience?),
            },
            _ => None,
        }
    }

    /// Does what is due.
    fn expire(&mut self) {
        if self.deadline().is_none_or(|at| at > Instant::now()) {
            return;
        }
        if let (None, Some(patience)) = (self.given_up, self.patience) {
            self.remote.say_failing(patience);
        }
        match self.state {
            State::Down(_) => self.fail_queued(|_| true),
            _ => self.close(&"it did not answer in time", Close::Over(Ended::GivenUp)),
        }
    }
}

/// Nothing was moved, and the next attempt may.
fn is_again(result: i32) -> bool {
    matches!(-result, libc::EAGAIN | libc::EINTR | libc::ENOBUFS | libc::ENOMEM)
}

impl Engine for Nbd {
    unsafe fn queue(&mut self, io: Io) {
        self.enqueue(io.slot.0, io);
    }

    fn watch(&mut self, token: Token, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.ring.watch(token, fd)
    }

    fn unwatch(&mut self, token: Token) {
        self.ring.unwatch(token);
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.expire();
        let sends = self.stage();
        let left = self.deadline().map(|at| at.saturating_duration_since(Instant::now()));
        let wait = wait.within(left);
        let has_event = !self.done.is_empty();
        if sends {
            self.ring.enter_past(1, wait, has_event)?; // the end of the SENDMSG is nothing to wake up for
        } else {
            self.ring.enter(wait, has_event)?;
        }
        self.expire();
        Ok(())
    }

    fn reap(&mut self, mut each: impl FnMut(Event)) {
        let (completions, ready) = (&mut self.completions, &mut self.ready);
        self.ring.reap(|event| match event {
            Ok(completion) => completions.push(completion),
            Err(token) => ready.push(token),
        });
        while let Some(completion) = self.completions.pop() {
            self.completed(completion);
        }
        while let Some(token) = self.ready.pop() {
            if token != self.wake {
                each(Event::Ready(token));
            } else if let Err(e) = self.woken() {
                tracing::error!("cannot use the connection to the server: {e}");
            }
        }
        self.done.drain(..).for_each(|done| each(Event::Done(done)));
    }

    fn give_up(&mut self, given_up: bool) {
        self.given_up = given_up.then(|| self.given_up.unwrap_or_else(Instant::now));
    }

    /// A few for an idle server, and as many more as there are already.
    fn batch(&self, in_flight: usize) -> usize {
        in_flight.max(4)
    }
}

impl Drop for Nbd {
    /// Waits for what is running on the socket, which is cancelled: the memory belongs to others afterwards. The connection is
    /// not shut down: a successor does that, and sees then whether the server was there until now.
    fn drop(&mut self) {
        if self.incoming.is_under_way() {
            self.cancel(KIND_RECEIVE);
        }
        if self.outgoing.is_under_way() {
            self.cancel(KIND_SEND);
        }
        while self.outgoing.is_under_way() || self.incoming.is_under_way() || self.shutting_down {
            if let Err(e) = self.ring.submit(1, None) {
                tracing::error!("io_uring_enter: {e}");
                std::process::abort(); // better than memory that changes by itself
            }
            let completions = &mut self.completions;
            self.ring.reap(|event| completions.extend(event.ok()));
            while let Some(completion) = self.completions.pop() {
                match completion.kind {
                    KIND_SEND => {
                        self.outgoing.ended(completion.result);
                        self.outgoing.reset();
                    }
                    KIND_RECEIVE => self.incoming.ended(),
                    // It runs just now: a thread of the kernel's has it.
                    KIND_CANCEL if completion.result == -libc::EALREADY => {
                        if let State::Up(connection) | State::Closing { connection, .. } = &self.state {
                            self.shut(libc::SHUT_RDWR, connection.socket.as_raw_fd());
                        }
                    }
                    KIND_CANCEL => {}
                    _ => self.shutting_down = false,
                }
            }
        }
    }
}
