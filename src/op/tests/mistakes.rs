//! Planted mistakes: each is noticed, so the rules are worth something.
//!
//! What it is: a [`Mistake`] stands between the machine and the harness and changes an action
//! or an input, as a mistake in the machine would.
//!
//! What it is not: none of it is in a program. [`NONE`] is what every other test uses.
//!
//! Invariant: the same request without the mistake breaks no rule.

use super::explore::explore;
use super::request;
use super::world::{Asked, Disk};
use crate::complete::Status;
use crate::engine::{Kind, Outcome, Target};
use crate::op::action::{Action, Buffer, Copy, Input, Need};
use crate::request::Command;

/// What is done to actions and inputs on their way.
#[derive(Debug)]
pub(super) struct Mistake {
    pub action: fn(Action) -> Action,
    /// The second is the input that the action, the first, led to.
    pub input: fn(Action, Input) -> Input,
}

pub(super) static NONE: Mistake = Mistake { action: |action| action, input: |_, input| input };

/// A mistake in an action.
const fn action(action: fn(Action) -> Action) -> Mistake {
    Mistake { action, ..NONE_AS_CONST }
}

/// A mistake in what is made of an input.
const fn input(input: fn(Action, Input) -> Input) -> Mistake {
    Mistake { input, ..NONE_AS_CONST }
}

const NONE_AS_CONST: Mistake = Mistake { action: |action| action, input: |_, input| input };

/// As much as the operation could have moved.
fn whole(action: Action) -> Input {
    match action {
        Action::Submit(submit) => Input::Ended(Outcome::Moved(submit.len)),
        _ => Input::Ended(Outcome::Moved(0)),
    }
}

/// Each mistake breaks a rule with one of these requests; without it, none does.
fn notices(name: &str, mistake: &Mistake, disk: &Disk, asked: &[Asked]) {
    let run = |mistake| {
        asked.iter().find_map(|asked| {
            explore(2, |choices| request::run(disk, asked, choices, mistake).map(|_| ())).err()
        })
    };
    let without = run(&NONE);
    assert!(without.is_none(), "{name}: {without:#?}");
    assert!(run(mistake).is_some(), "no rule notices: {name}");
}

#[test]
fn mistakes_of_a_read_modify_write_are_noticed() {
    let disk = Disk { mem_align: 512, ..Disk::of(4096, 4 * 4096) };
    let write = || [Asked::payload(Command::Write(512), &[(0, 1024)])];
    let zeroes = || [Asked::ranges(Command::WriteZeroes, &[(512, 1024, false)])];
    notices(
        "the payload goes to the start of the block",
        &action(|action| match action {
            Action::Copy(Copy::FromGuest { payload, len, .. }) => {
                Action::Copy(Copy::FromGuest { payload, pool: 0, len })
            }
            other => other,
        }),
        &disk,
        &write(),
    );
    notices(
        "the block is written back unchanged",
        &action(|action| match action {
            Action::Copy(Copy::FromGuest { payload, pool, .. }) => {
                Action::Copy(Copy::FromGuest { payload, pool, len: 0 })
            }
            other => other,
        }),
        &disk,
        &write(),
    );
    notices(
        "the block keeps what was to be zeroes",
        &action(|action| match action {
            Action::Copy(Copy::Zero { pool, .. }) => Action::Copy(Copy::Zero { pool, len: 0 }),
            other => other,
        }),
        &Disk { can_punch: false, can_zero_range: false, ..disk },
        &zeroes(),
    );
    notices(
        "a lost copy is written",
        &input(|_, input| if input == Input::Copied(false) { Input::Copied(true) } else { input }),
        &disk,
        &write(),
    );
    notices(
        "it does not say that it modifies",
        &action(|action| match action {
            Action::Need(Need::Range { start, end, .. }) => {
                Action::Need(Need::Range { start, end, modifies: false })
            }
            other => other,
        }),
        &disk,
        &write(),
    );
    notices(
        "the wrong block is locked",
        &action(|action| match action {
            Action::Need(Need::Range { start, end, modifies }) => {
                Action::Need(Need::Range { start: start + 4096, end: end + 4096, modifies })
            }
            other => other,
        }),
        &disk,
        &write(),
    );
    notices(
        "the block is written back a sector on",
        &action(|action| match action {
            Action::Submit(mut submit) if matches!(submit.kind, Kind::Write { .. }) => {
                submit.offset += 512;
                Action::Submit(submit)
            }
            other => other,
        }),
        &disk,
        &write(),
    );
}

#[test]
fn mistakes_of_a_transfer_are_noticed() {
    let disk = Disk { mem_align: 512, ..Disk::of(4096, 4 * 4096 + 1024) };
    let aligned = || {
        [
            Asked::payload(Command::Write(4096), &[(0, 8192)]),
            Asked::payload(Command::Read(4096), &[(0, 8192)]),
        ]
    };
    let bounced = || [Asked::payload(Command::Read(512), &[(8, 8192)])];
    let to_end = || [Asked::payload(Command::Write(4 * 4096), &[(0, 1024)])];
    notices(
        "a short transfer counts as whole",
        &input(|action, input| match input {
            Input::Ended(Outcome::Moved(1..)) => whole(action),
            other => other,
        }),
        &disk,
        &aligned(),
    );
    notices(
        "an error counts as whole",
        &input(|action, input| match input {
            Input::Ended(Outcome::Failed(libc::EIO)) => whole(action),
            other => other,
        }),
        &disk,
        &aligned(),
    );
    notices(
        "what was not executed counts as whole",
        &input(|action, input| match input {
            Input::Ended(Outcome::NotExecuted(_)) => whole(action),
            other => other,
        }),
        &disk,
        &aligned(),
    );
    notices(
        "what was not executed is an error",
        &input(|_, input| match input {
            Input::Ended(Outcome::NotExecuted(errno)) => Input::Ended(Outcome::Failed(errno)),
            other => other,
        }),
        &disk,
        &aligned(),
    );
    notices(
        "an error is tried again",
        &input(|_, input| match input {
            Input::Ended(Outcome::Failed(errno @ libc::EIO)) => Input::Ended(Outcome::NotExecuted(errno)),
            other => other,
        }),
        &disk,
        &aligned(),
    );
    notices(
        "what was not executed goes to the engine again",
        &action(|action| match action {
            Action::Submit(mut submit) => {
                submit.own_thread = false;
                Action::Submit(submit)
            }
            other => other,
        }),
        &disk,
        &aligned(),
    );
    notices(
        "the rest of a payload is its beginning",
        &action(|action| match action {
            Action::Submit(mut submit) if matches!(submit.buffer, Buffer::Guest(_)) => {
                submit.buffer = Buffer::Guest(0);
                Action::Submit(submit)
            }
            other => other,
        }),
        &disk,
        &aligned(),
    );
    notices(
        "the guest gets the start of the block",
        &action(|action| match action {
            Action::Copy(Copy::ToGuest { payload, len, .. }) => {
                Action::Copy(Copy::ToGuest { payload, pool: 0, len })
            }
            other => other,
        }),
        &disk,
        &bounced(),
    );
    notices(
        "more pool pages than were granted",
        &input(|_, input| match input {
            Input::Pool(bytes) => Input::Pool(2 * bytes),
            other => other,
        }),
        &Disk { chunk: 4096, ..disk },
        &bounced(),
    );
    notices(
        "a partial last block by direct I/O",
        &action(|action| match action {
            Action::Submit(mut submit) => {
                submit.target = Target::Disk;
                Action::Submit(submit)
            }
            other => other,
        }),
        &disk,
        &to_end(),
    );
}

#[test]
fn mistakes_about_durability_are_noticed() {
    let write = || [Asked::payload(Command::Write(4096), &[(0, 8192)])];
    for dsync in [false, true] {
        let disk = Disk { dsync, write_through: true, ..Disk::of(4096, 4 * 4096) };
        notices(
            "Ok before it is durable",
            &action(|action| match action {
                Action::Need(Need::Sync | Need::Judgement) => Action::Finish(Status::Ok),
                other => other,
            }),
            &disk,
            &write(),
        );
        notices(
            "Ok although it is not durable",
            &input(|_, input| if input == Input::Durable(false) { Input::Durable(true) } else { input }),
            &disk,
            &write(),
        );
        notices(
            "it writes without RWF_DSYNC and asks for a judgement, or the other way round",
            &action(|action| match action {
                Action::Need(Need::Sync) => Action::Need(Need::Judgement),
                Action::Need(Need::Judgement) => Action::Need(Need::Sync),
                Action::Submit(mut submit) if submit.kind == (Kind::Write { dsync: true }) => {
                    submit.kind = Kind::Write { dsync: false };
                    Action::Submit(submit)
                }
                other => other,
            }),
            &disk,
            &write(),
        );
    }
    notices(
        "a flush without an fdatasync",
        &action(|action| match action {
            Action::Need(Need::Sync) => Action::Finish(Status::Ok),
            other => other,
        }),
        &Disk::of(512, 4096),
        &[Asked::payload(Command::Flush, &[])],
    );
}

#[test]
fn mistakes_about_zeroes_and_discards_are_noticed() {
    let disk = Disk::of(512, 8 * 4096);
    let zeroes = || [Asked::ranges(Command::WriteZeroes, &[(512, 8192, false), (16384, 512, true)])];
    let discard = || [Asked::ranges(Command::Discard, &[(512, 16384, false)])];
    notices(
        "a block too many becomes zeroes",
        &action(|action| match action {
            Action::Submit(mut submit) if matches!(submit.kind, Kind::Fallocate(_)) => {
                submit.len += 512;
                Action::Submit(submit)
            }
            other => other,
        }),
        &disk,
        &zeroes(),
    );
    notices(
        "a hole where blocks are to stay",
        &action(|action| match action {
            Action::Submit(mut submit) if matches!(submit.kind, Kind::Fallocate(_)) => {
                submit.kind = Kind::Fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
                Action::Submit(submit)
            }
            other => other,
        }),
        &disk,
        &zeroes(),
    );
    notices(
        "a fallocate that may make the file longer",
        &action(|action| match action {
            Action::Submit(mut submit) => {
                if let Kind::Fallocate(mode) = &mut submit.kind {
                    *mode &= !libc::FALLOC_FL_KEEP_SIZE;
                }
                Action::Submit(submit)
            }
            other => other,
        }),
        &disk,
        &zeroes(),
    );
    notices(
        "a fallocate that is not known counts as whole",
        &input(|action, input| match input {
            Input::Ended(Outcome::Failed(libc::EOPNOTSUPP)) => whole(action),
            other => other,
        }),
        &disk,
        &zeroes(),
    );
    notices(
        "a discard of whole units around what is to be discarded",
        &action(|action| match action {
            Action::Submit(mut submit) => {
                submit.offset -= 4096;
                submit.len += 4096;
                Action::Submit(submit)
            }
            other => other,
        }),
        &disk,
        &discard(),
    );
}
