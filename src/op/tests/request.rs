//! A request whose machine is carried out, one action at a time, with every action checked.
//!
//! What it is: the worker's part in the tests: [`Request::advance`] does what the machine
//! asks for and tells it what happened, [`Request::check`] has the rules of an operation.
//!
//! What it is not: the judgement of the bytes, which is [`World::judge`]'s.
//!
//! Invariant: pool pages go back exactly as in the worker: with the first action that does
//! not use them.

use super::explore::Choices;
use super::mistakes::Mistake;
use super::world::{Asked, Checked, GARBAGE, Spans, World, is_direct, must};
use crate::backing::Backing;
use crate::complete::Status;
use crate::engine::{Kind, Outcome, Target};
use crate::op::action::{Action, Buffer, Copy, Failure, Input, Need, Submit};
use crate::op::transfer::MAX_BYTES;
use crate::op::{Context, MAX_ATTEMPTS, Op};
use crate::pages::{MAX_CHUNKS, MAX_IOVECS};
use crate::request::Command;

/// More actions than any request here needs.
const MANY: u32 = 5000;

#[derive(Clone, Copy, Debug)]
struct Lock {
    start: u64,
    end: u64,
    modifies: bool,
}

/// What requests find out about a disk while they run.
#[derive(Clone, Copy, Debug)]
struct Knew {
    mem_align: u32,
    may_punch: bool,
    may_zero_range: bool,
    may_discard: bool,
    discards_by_call: bool,
}

impl Knew {
    fn of(backing: &Backing) -> Self {
        Self {
            mem_align: backing.mem_align(),
            may_punch: backing.may_punch(),
            may_zero_range: backing.may_zero_range(),
            may_discard: backing.may_discard(),
            discards_by_call: backing.discards_by_call(),
        }
    }
}

/// How far a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Went,
    Waits,
    /// True: it was answered Ok.
    Ended(bool),
}

#[derive(Debug)]
pub(super) struct Request<'a> {
    pub asked: &'a Asked,
    /// What the machine asked for last.
    pub action: Action,
    id: usize,
    op: Op,
    mistake: &'a Mistake,
    pool: Vec<u8>,
    lock: Option<Lock>,
    steps: u32,
    /// What the machine knew when it chose its action: another request may have found out more since.
    knew: Knew,
    /// It was joined, in vain.
    apart: bool,
    /// Outcomes that were not whole.
    fruitless: u8,
    /// The last attempt was not executed.
    needs_own_thread: bool,
    /// Bytes were moved since an attempt was not executed: the engine is tried again.
    moved: bool,
    /// Something was written that only an fdatasync makes durable.
    unsynced: bool,
    /// Something was written that only a judgement says to be durable.
    unjudged: bool,
    /// An fdatasync that was asked for went well.
    synced: bool,
}

impl<'a> Request<'a> {
    pub fn begin(id: usize, asked: &'a Asked, world: &World, mistake: &'a Mistake) -> Self {
        let (op, action) = Op::begin(asked.command, Self::context(asked, world));
        Self {
            asked,
            action: (mistake.action)(action),
            id,
            op,
            mistake,
            pool: Vec::new(),
            lock: None,
            steps: 0,
            knew: Knew::of(&world.backing),
            apart: false,
            fruitless: 0,
            needs_own_thread: false,
            moved: false,
            unsynced: false,
            unjudged: false,
            synced: false,
        }
    }

    fn context<'b>(asked: &'b Asked, world: &'b World) -> Context<'b> {
        let Asked { pages, ranges, .. } = asked;
        let World { backing, write_through, disk, .. } = world;
        Context { backing, pages, ranges, write_through: *write_through, locks: true, chunk: disk.chunk }
    }

    /// Carries the action out. The input that it leads to has led to the next action.
    pub fn advance(&mut self, world: &mut World, choices: &mut Choices) -> Checked<Progress> {
        self.steps += 1;
        must(self.steps < MANY, "a request ends")?;
        choices.note(|| format!("{}: {:?}", self.id, self.action));
        if !uses_pool(&self.action) {
            world.free_chunks += self.pool.len() as u64 / world.disk.chunk;
            self.pool.clear();
        }
        let input = match self.action {
            Action::Submit(submit) => {
                let spans = self.check(&submit, world)?;
                let outcome = choices.outcome(&submit, world.disk.block, self.steps);
                world.carry(&submit, &spans, &mut self.pool, outcome);
                self.wrote(&submit, outcome);
                Input::Ended(outcome)
            }
            Action::Copy(copy) => Input::Copied(self.copy(copy, world, choices)?),
            Action::Need(need) => match self.get(need, world, choices)? {
                Some(input) => input,
                None => return Ok(Progress::Waits),
            },
            Action::Finish(status) => {
                must(status != Status::Unsupp, "what was begun is supported")?;
                return self.end(status == Status::Ok, world);
            }
            Action::Fail(failure) => {
                let (Failure::Errno(_, at) | Failure::Truncated(at)) = failure;
                let named = self.asked.parts().iter().any(|&(start, len)| at >= start && at <= start + len);
                must(named, "the byte that is reported is one of the request's")?;
                if choices.choose(2) == 0 {
                    return self.end(false, world);
                }
                // It is held, and tried again when the disk is well.
                self.op.let_go();
                self.lock = None;
                world.locks.retain(|&(whose, ..)| whose != self.id);
                let changes = self.op.changing(&world.backing);
                must(changes.is_none(), "a request that is held changes nothing")?;
                (self.fruitless, self.needs_own_thread, self.moved) = (0, false, false);
                Input::Again
            }
        };
        self.take(input, world, choices)?;
        Ok(Progress::Went)
    }

    fn end(&mut self, ok: bool, world: &mut World) -> Checked<Progress> {
        world.locks.retain(|&(whose, ..)| whose != self.id);
        let writes = matches!(self.asked.command, Command::Write(_) | Command::WriteZeroes);
        if ok && writes && world.write_through {
            must(!self.unsynced && !self.unjudged, "in write-through, Ok means durable")?;
        }
        if ok && self.asked.command == Command::Flush {
            must(self.synced || world.disk.read_only, "a flush is answered by an fdatasync")?;
        }
        let reads = matches!(self.asked.command, Command::Read(_) | Command::GetId);
        let filled = if reads { self.asked.pages.len() } else { 0 };
        must(!ok || self.op.filled(&self.asked.pages) == filled, "what is read fills the payload")?;
        Ok(Progress::Ended(ok))
    }

    /// Tells the machine what happened and takes its next action.
    pub fn take(&mut self, input: Input, world: &mut World, choices: &mut Choices) -> Checked {
        choices.note(|| format!("{}: {input:?}", self.id));
        if world.disk.mode_changes && choices.choose(2) == 1 {
            world.write_through = !world.write_through;
        }
        let before = self.action;
        let told = (self.mistake.input)(before, input);
        let next = (self.mistake.action)(self.op.step(told, Self::context(self.asked, world)));
        self.action = next;
        self.knew = Knew::of(&world.backing);
        self.apart |= input == Input::Apart;
        let failed = matches!(next, Action::Fail(_));
        let bytes_move = matches!(before, Action::Submit(submit) if submit.buffer != Buffer::Nothing);
        match input {
            Input::Ended(Outcome::NotExecuted(errno)) => {
                self.fruitless = self.fruitless.saturating_add(1);
                (self.needs_own_thread, self.moved) = (true, false);
                if failed {
                    must(self.fruitless > MAX_ATTEMPTS, "what was not executed is tried again")?;
                    must(matches!(next, Action::Fail(Failure::Errno(e, _)) if e == errno), "says why")?;
                }
            }
            Input::Ended(Outcome::Moved(_)) if !bytes_move => {
                (self.needs_own_thread, self.moved) = (false, true);
            }
            Input::Ended(Outcome::Moved(bytes)) => {
                self.needs_own_thread = false;
                // Through the pool, only the last of several operations moves the request on.
                self.moved |= matches!(before, Action::Submit(submit) if submit.buffer != Buffer::Pool);
                let whole = matches!(before, Action::Submit(submit) if submit.len == bytes);
                self.fruitless = self.fruitless.saturating_add(u8::from(!whole));
                must(!whole || !failed, "what went well does not fail")?;
                must(bytes > 0 || failed, "an operation at the end of the disk is not repeated")?;
            }
            Input::Ended(Outcome::Failed(errno)) => {
                (self.needs_own_thread, self.moved) = (false, false);
                let direct = matches!(before, Action::Submit(submit) if is_direct(&submit));
                let policy = direct && errno == libc::EINVAL
                    || !bytes_move && matches!(errno, libc::EINVAL | libc::EOPNOTSUPP | libc::ENOTTY);
                must(policy || failed, "an error is not tried again")?;
                let same = matches!(next, Action::Fail(Failure::Errno(e, _)) if e == errno);
                must(!failed || same, "the error that is reported is the one that came")?;
            }
            Input::Copied(false) | Input::Durable(false) => {
                must(next == Action::Finish(Status::IoErr), "what is lost or not durable is an error")?;
            }
            Input::Again
            | Input::Apart
            | Input::Pool(_)
            | Input::Range
            | Input::Copied(true)
            | Input::Durable(true) => {
                must(!failed, "what went well does not fail")?;
            }
        }
        Ok(())
    }

    /// Keeps in mind what has to be made durable.
    pub fn wrote(&mut self, submit: &Submit, outcome: Outcome) {
        if matches!(outcome, Outcome::NotExecuted(_)) {
            return;
        }
        self.unjudged |= submit.kind == Kind::Write { dsync: true };
        self.unsynced |= matches!(submit.kind, Kind::Write { dsync: false } | Kind::Fallocate(_));
    }

    /// The rules of an operation.
    pub fn check(&mut self, submit: &Submit, world: &World) -> Checked<Spans> {
        let &Submit { target, kind, offset, len, buffer, own_thread, joinable } = submit;
        let (backing, disk, asked, knew) = (&world.backing, &world.disk, self.asked, self.knew);
        let end = offset + len;
        let mask = disk.block - 1;
        must(len > 0 && len <= MAX_BYTES, "an operation is no longer than the kernel takes")?;
        must(own_thread || !self.needs_own_thread, "what was not executed is tried on the own thread")?;
        let by_call = kind == Kind::Discard && knew.discards_by_call;
        must(!own_thread || !self.moved || by_call, "what follows is tried elsewhere again")?;
        must(own_thread <= (self.fruitless > 0 || disk.is_device), "nothing else is on the own thread")?;
        let whole = buffer == Buffer::Guest(0) && len == asked.pages.len();
        must(!joinable || whole && !own_thread && !self.apart, "only a whole payload is joined")?;
        must(end <= disk.bytes, "an operation ends where the disk ends")?;

        let spans = world.spans(submit, &asked.pages)?;
        must(spans.len() <= MAX_IOVECS, "no more buffers than an operation has")?;
        if buffer != Buffer::Zeroes && buffer != Buffer::Nothing {
            let total: usize = spans.iter().map(|(_, len)| len).sum();
            must(total as u64 == len, "the buffers are as long as the operation")?;
        }
        must(buffer != Buffer::Pool || len <= self.pool.len() as u64, "pool pages that were granted")?;
        if is_direct(submit) {
            must((offset | len) & mask == 0, "direct I/O is in whole blocks")?;
            must(end <= backing.tail(), "direct I/O does not make a file longer")?;
            let fits = |&(addr, len): &(usize, usize)| {
                addr as u64 & (u64::from(knew.mem_align) - 1) == 0 && len as u64 & mask == 0
            };
            must(spans.iter().all(fits), "direct I/O takes aligned buffers")?;
        } else if target == Target::Cached {
            must(offset >= backing.tail(), "the page cache is for the partial last block")?;
        }

        // The part of the request that it is for; through the pool, the blocks around it.
        let parts = asked.parts();
        let around = if buffer == Buffer::Pool { mask } else { 0 };
        let is_in = |&&(start, part): &&(u64, u64)| {
            offset >= start & !around && end <= (start + part + around) & !around
        };
        let part = parts.iter().find(is_in).ok_or("an operation is about bytes of the request")?;
        match (asked.command, kind) {
            (Command::Read(_), Kind::Read) => return Ok(spans),
            (Command::Write(_) | Command::WriteZeroes, Kind::Read) => {
                let own = offset >= part.0 && end <= part.0 + part.1;
                let modifies = self.lock.is_some_and(|lock| lock.modifies);
                must(own || modifies || !backing.can_modify(), "who modifies a block said so before")?;
                must(buffer == Buffer::Pool, "a block is modified in the pool")?;
            }
            (Command::Write(_), Kind::Write { dsync }) | (Command::WriteZeroes, Kind::Write { dsync }) => {
                let may = disk.dsync && target == Target::Disk;
                must(dsync == (world.write_through && may), "RWF_DSYNC in write-through, and direct")?;
                let zeroes = matches!(asked.command, Command::WriteZeroes);
                must(zeroes || buffer != Buffer::Zeroes, "a write writes the payload")?;
            }
            (Command::WriteZeroes, Kind::Fallocate(mode)) => {
                let unmap = asked.ranges.iter().any(|range| range.unmap && range.offset == part.0);
                let mode = mode & !libc::FALLOC_FL_KEEP_SIZE;
                let punch = mode == libc::FALLOC_FL_PUNCH_HOLE && unmap && knew.may_punch;
                let zero = mode == libc::FALLOC_FL_ZERO_RANGE && knew.may_zero_range;
                must(punch || zero, "zeroes by a call that is known, and no hole unless allowed")?;
                must((offset | len) & (disk.fallocate_align - 1) == 0, "fallocate in whole units")?;
            }
            (Command::Discard, Kind::Fallocate(_) | Kind::Discard) => {
                must((kind == Kind::Discard) == disk.is_device, "a device is discarded, a file punched")?;
                must(offset % disk.discard_unit == 0 && len % disk.discard_unit == 0, "in whole units")?;
                must(knew.may_discard, "a discard that is worth a call")?;
            }
            _ => return Err("an operation is of a kind that its request needs"),
        }
        if let Kind::Fallocate(mode) = kind {
            must(mode & libc::FALLOC_FL_KEEP_SIZE != 0, "fallocate keeps the size")?;
        }
        if matches!(kind, Kind::Fallocate(_) | Kind::Discard) {
            must(buffer == Buffer::Nothing && !joinable, "it moves no bytes")?;
        }
        let covered = self.lock.is_some_and(|lock| lock.start <= offset && end <= lock.end);
        must(covered || !backing.can_modify(), "what is changed is locked")?;
        // What a worker locks that did not need locks until now.
        let said = self.op.changing(backing);
        let same = said == self.lock.map(|lock| (lock.start, lock.end));
        must(same || !backing.can_modify(), "what it says to be changing is what it locked")?;
        Ok(spans)
    }

    fn copy(&mut self, copy: Copy, world: &mut World, choices: &mut Choices) -> Checked<bool> {
        let whole = choices.choose(2) == 0;
        let pages = &self.asked.pages;
        let granted = self.pool.len() as u64;
        match copy {
            Copy::FromGuest { payload, pool, len } | Copy::ToGuest { payload, pool, len } => {
                must(payload + len <= pages.len(), "a copy is of the payload")?;
                must(pool + len <= granted, "a copy is of pool pages that were granted")?;
                let to_guest = matches!(copy, Copy::ToGuest { .. });
                let part = &mut self.pool[pool as usize..(pool + len) as usize];
                world.copy(pages, payload, part, to_guest);
                if !whole && !to_guest {
                    part.fill(GARBAGE);
                }
            }
            Copy::Zero { pool, len } => {
                must(pool + len <= granted, "a copy is of pool pages that were granted")?;
                self.pool[pool as usize..(pool + len) as usize].fill(0);
            }
            Copy::Serial => world.write_serial(pages),
        }
        Ok(whole)
    }

    fn get(&mut self, need: Need, world: &mut World, choices: &mut Choices) -> Checked<Option<Input>> {
        let writes = matches!(self.asked.command, Command::Write(_) | Command::WriteZeroes);
        match need {
            Need::Pool(bytes) => {
                must(bytes > 0, "pool pages are for some bytes")?;
                if world.free_chunks == 0 {
                    return Ok(None);
                }
                let wanted = bytes.div_ceil(world.disk.chunk).min(MAX_CHUNKS as u64).min(world.free_chunks);
                let got = if wanted > 1 && choices.choose(2) == 1 { 1 } else { wanted };
                world.free_chunks -= got;
                self.pool.resize((got * world.disk.chunk) as usize, GARBAGE);
                Ok(Some(Input::Pool(self.pool.len() as u64)))
            }
            Need::Range { start, end, modifies } => {
                let mask = world.disk.block - 1;
                must(world.backing.can_modify(), "locked only where blocks are modified")?;
                must(start < end && (start | end) & mask == 0, "whole blocks are locked")?;
                world.locks.retain(|&(whose, ..)| whose != self.id);
                self.lock = None;
                if world.disk.locks_work && world.locks.iter().any(|&(_, s, e)| s < end && start < e) {
                    return Ok(None);
                }
                world.locks.push((self.id, start, end));
                self.lock = Some(Lock { start, end, modifies });
                Ok(Some(Input::Range))
            }
            Need::Sync => {
                let needed =
                    self.asked.command == Command::Flush || writes && (self.unsynced || self.unjudged);
                must(needed, "an fdatasync has something to make durable")?;
                let durable = choices.choose(2) == 0;
                self.synced = durable;
                (self.unsynced, self.unjudged) = (self.unsynced && !durable, self.unjudged && !durable);
                Ok(Some(Input::Durable(durable)))
            }
            Need::Judgement => {
                must(writes && self.unjudged, "a judgement has a durable write to judge")?;
                let durable = choices.choose(2) == 0;
                self.unjudged &= !durable;
                Ok(Some(Input::Durable(durable)))
            }
        }
    }
}

/// As in the worker: pages that the action does not use go back.
fn uses_pool(action: &Action) -> bool {
    match action {
        Action::Submit(submit) => submit.buffer == Buffer::Pool,
        Action::Copy(_) => true,
        Action::Need(_) | Action::Finish(_) | Action::Fail(_) => false,
    }
}

/// Carries one request out from its beginning to its end, and judges it.
pub(super) fn run(
    disk: &super::world::Disk,
    asked: &Asked,
    choices: &mut Choices,
    mistake: &Mistake,
) -> Checked<bool> {
    let mut world = World::new(disk, [asked]);
    let mut request = Request::begin(0, asked, &world, mistake);
    loop {
        match request.advance(&mut world, choices)? {
            Progress::Went => {}
            Progress::Waits => return Err("a request that is alone never waits"),
            Progress::Ended(ok) => {
                world.judge(&[(asked, ok)])?;
                return Ok(ok);
            }
        }
    }
}
