//! A server that has the disk, as the NBD engine's worker sees it: connections that end, the server
//! started anew without what it had not made durable, replies that are read late, requests that
//! wait and are sent again.
//!
//! What was answered and not flushed is counted by the [`Marks`] that ship, which outlive a daemon
//! here as they do there. A dead daemon's connections are fenced as `start` does it: what was sent
//! on them is done before its successor sends anything.
//!
//! Not in it: a connection that the kernel gives up while the server lives, and a dead daemon's
//! server of which nothing is known.

use vublk::engine::{Done, Kind, Outcome, Wait};
use vublk::nbd::marks::Marks;

use super::guest::Play;
use super::requests::Marks as Covered;
use super::world::{By, Running, World};

/// See the head of the file.
#[derive(Default)]
pub struct Server {
    pub marks: Marks,
    /// How often it was started anew without all that it had answered.
    pub restarts: u64,
    /// How often requests ended because they had to wait for it while a queue had to stop.
    pub give_ups: u64,
    /// Of a bug: a lost connection is not noted.
    pub forgets: bool,
    /// Of a bug: a worker is connected anew while another one still reads what an earlier server had answered.
    pub connects_apart: bool,
    /// Of a bug: a FLUSH that waits for a connection is sent on it, whatever another line's loss has shown.
    pub sends_lost_flushes: bool,
    /// The start of a daemon found it gone, with what was not flushed.
    pub is_found_gone: bool,
}

/// One worker's connection.
#[derive(Default)]
pub struct Line {
    /// The connection has ended, and the engine has not seen that yet.
    pub is_lost: bool,
    /// What the engine can still read there.
    replies: Vec<(Running, Result<u64, i32>)>,
    /// What is answered by no reply.
    unanswered: Vec<Running>,
    /// Turns until there is another connection; 0: there is one.
    down: u64,
    /// Turns for which the worker's thread gets no processor, if another one can have it.
    pub stands: u64,
    /// A queue has to stop, and nothing may be left.
    pub given_up: bool,
}

impl World {
    /// All connections end. True: the server was started anew, and some of what it had not made
    /// durable is gone.
    fn lose_connections(&mut self) -> bool {
        let (is_killed, drops) = (self.dice.rarely(2), self.dice.rarely(2));
        let mut running: Vec<(usize, Running)> = Vec::new();
        for (at, hands) in self.hands.iter_mut().enumerate() {
            if hands.line.down == 0 {
                (hands.line.is_lost, hands.asleep) = (true, false);
            }
            running.extend(hands.running.drain(..).map(|op| (at, op)));
        }
        while !running.is_empty() {
            let next = self.dice.below(running.len() as u64) as usize;
            let (at, op) = running.swap_remove(next);
            // One that is killed has done some; one that closes a connection has done all that came on it.
            if is_killed && self.dice.rarely(3) {
                self.do_a_part(&op);
                self.hands[at].line.unanswered.push(op.again());
                continue;
            }
            let again = op.again();
            let result = self.finish(op, By::Nobody);
            let line = &mut self.hands[at].line;
            match self.dice.rarely(2) {
                true => line.replies.push((again, result)),
                false => line.unanswered.push(again),
            }
        }
        if is_killed && drops {
            self.disk.power_cut(&mut self.dice);
        }
        is_killed && drops
    }

    /// The engine reads on a connection that has ended: a reply, or the end.
    pub fn read_on(&mut self, worker: usize) {
        let line = &mut self.hands[worker].line;
        if let Some((op, result)) = line.replies.pop() {
            line.stands = if self.dice.rarely(2) { self.dice.below(200) } else { 0 };
            return self.answer(worker, &op, Outcome::of_handed_over(result));
        }
        line.is_lost = false;
        line.down = 1 + self.dice.below(2 * self.weather.delay + 4);
        let hands = &mut self.hands[worker];
        let mut waiting = std::mem::take(&mut hands.line.unanswered);
        waiting.append(&mut hands.staged);
        let Some(server) = &self.server else { return };
        if !server.forgets {
            let _told = server.marks.note_loss();
        }
        hands.staged = waiting;
        self.fail_lost_flushes(worker);
    }

    /// Flushes that wait end where something that was answered may be gone.
    fn fail_lost_flushes(&mut self, worker: usize) {
        if !self.server.as_ref().is_some_and(|server| server.marks.has_lost()) {
            return;
        }
        let staged = std::mem::take(&mut self.hands[worker].staged);
        let (failing, waiting) = staged.into_iter().partition(|op| op.io.kind == Kind::Sync);
        self.hands[worker].staged = waiting;
        let failing: Vec<Running> = failing;
        failing.iter().for_each(|op| self.answer(worker, op, Outcome::Failed(libc::EIO)));
    }

    /// Nothing that was answered is to be flushed, and something is on its way: what a server lost now would be noticed by
    /// none but the worker that has yet to read its answer.
    pub fn has_only_unread_changes(&self) -> bool {
        let all_is_flushed = self.server.as_ref().is_some_and(|server| server.marks.unflushed() == 0);
        all_is_flushed
            && self
                .hands
                .iter()
                .flat_map(|hands| &hands.running)
                .any(|op| matches!(op.io.kind, Kind::Write { .. }))
    }

    /// Whether what is staged can be sent now. If not, time passes, all of it where the worker sleeps.
    pub fn is_connected(&mut self, worker: usize, wait: Wait) -> bool {
        let connects_apart = self.server.as_ref().is_some_and(|server| server.connects_apart);
        let others_read = !connects_apart && self.hands.iter().any(|hands| hands.line.is_lost);
        let hands = &mut self.hands[worker];
        if hands.line.is_lost || hands.line.down == 0 {
            return !hands.line.is_lost;
        }
        if hands.line.given_up && !hands.staged.is_empty() {
            let waiting = std::mem::take(&mut hands.staged);
            self.server.as_mut().expect("lines are a server's").give_ups += 1;
            waiting.iter().for_each(|op| self.answer(worker, op, Outcome::Failed(libc::EIO)));
        } else if !others_read {
            let sleeps = wait == Wait::Yes && hands.ready.is_empty() && hands.done.is_empty();
            hands.line.down = if sleeps { 0 } else { hands.line.down - 1 };
            let sends = self.server.as_ref().is_some_and(|server| server.sends_lost_flushes);
            if self.hands[worker].line.down == 0 && !sends {
                self.fail_lost_flushes(worker);
            }
        }
        false
    }

    /// An operation ends.
    pub fn answer(&mut self, worker: usize, op: &Running, outcome: Outcome) {
        if let Some(server) = &self.server {
            match (outcome, op.io.kind) {
                (Outcome::Moved(_), Kind::Sync) => server.marks.note_flush(op.changed),
                (Outcome::Moved(_), Kind::Write { dsync: false } | Kind::Fallocate(_)) => {
                    server.marks.note_change();
                }
                (Outcome::Failed(_), kind) if kind.is_durable() => {
                    (self.sync_failed, self.unread_failure) = (true, true);
                }
                _ => {}
            }
        }
        self.hands[worker].done.push(Done { slot: op.io.slot, outcome });
    }

    /// What the control thread's flush comes to before anything is sent. `None`: it is sent.
    pub fn flush_unsent(&mut self) -> Option<Outcome> {
        for at in 0..self.hands.len() {
            while self.server.is_some() && self.hands[at].line.is_lost {
                self.read_on(at);
            }
        }
        let marks = &self.server.as_ref()?.marks;
        if marks.has_lost() {
            self.sync_failed = true;
            return Some(Outcome::Failed(libc::EIO));
        }
        (marks.unflushed() == 0).then_some(Outcome::Moved(0))
    }

    /// The daemon is dead. What its successor finds of its connections: were they closed before?
    pub fn fence(&mut self) {
        let gone = self.hands.iter().any(|hands| hands.line.is_lost);
        if let Some(server) = &mut self.server
            && gone
            && server.marks.unflushed() > 0
        {
            (self.sync_failed, server.is_found_gone) = (true, true);
        }
    }
}

impl Play {
    /// Connections to the server are lost, and perhaps it was started anew.
    pub fn lose_server(&mut self) {
        (0..self.queues.len()).for_each(|at| self.take_answers(at));
        self.count.lost_servers += 1;
        if !self.world.borrow_mut().lose_connections() {
            return;
        }
        for sector in 0..self.model.len() as u64 {
            let value = self.world.borrow().read(sector);
            let mut unanswered = Vec::new();
            self.add_unanswered(sector, &mut unanswered);
            let model = &mut self.model[sector as usize];
            let (may, how) = (model.left.clone(), model.durable);
            let dropped = model.restarted(value, unanswered.contains(&value));
            self.dropped |= dropped.unwrap_or_else(|| {
                panic!(
                    "sector {sector} holds {value:#x} after the server was started anew, not {may:x?}, made durable {how}"
                )
            });
        }
        self.world.borrow_mut().server.as_mut().expect("it was lost").restarts += 1;
    }

    /// How often the server was started anew, and how often requests to it were given up.
    pub fn server_count(&self) -> (u64, u64) {
        self.world.borrow().server.as_ref().map_or((0, 0), |server| (server.restarts, server.give_ups))
    }

    /// What a sync of the control thread makes durable.
    pub fn synced(&mut self, how: &'static str) {
        let is_remote = self.setup.remote;
        for model in &mut self.model {
            // Without anything to flush a server is not asked.
            let mark = if is_remote { model.sure_mark() } else { model.mark() };
            model.flushed(mark, how);
        }
    }

    /// A FLUSH was answered with OK: what it covered, and what had been gone before it was sent.
    pub fn judge_flush(&self, marks: &Covered, dropped: bool) {
        assert!(!dropped, "a FLUSH was answered with OK after the server had lost what was answered");
        for (sector, (model, mark)) in self.model.iter().zip(marks.sure()).enumerate() {
            assert!(
                model.survived(mark),
                "sector {sector}: a FLUSH was answered with OK, and the server has lost it"
            );
        }
    }
}
