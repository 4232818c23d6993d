//! Several requests at once: joined into one operation, and side by side in one block.
//!
//! What it is: [`joined`] plugs as the worker does, [`at_once`] interleaves the steps of two
//! requests in every order.
//!
//! What it is not: the worker's own plugging and the real range locks have their tests beside
//! them; here it is the machine's part in both.
//!
//! Invariant: requests that share no byte never undo each other's, in whatever order their
//! steps come.

use super::cases::layouts;
use super::explore::{Broken, Choices, explore};
use super::mistakes::{Mistake, NONE};
use super::request::{Progress, Request};
use super::world::{Asked, Checked, Disk, Spans, World, must};
use crate::engine::{Outcome, Slot};
use crate::op::action::{Action, Input, Need, Submit};
use crate::request::Command;
use crate::worker::plug::Plug;

/// An operation that was held back, and whose buffers it has.
struct Held {
    plug: Plug,
    spans: Spans,
    members: Vec<usize>,
}

/// Requests that come in one turn: what can be joined is, then each goes on by itself.
/// `counts`: operations that were made of several.
fn joined(disk: &Disk, all: &[Asked], choices: &mut Choices, mistake: &Mistake, counts: &mut u64) -> Checked {
    let mut world = World::new(disk, all);
    let mut requests: Vec<_> =
        all.iter().enumerate().map(|(id, asked)| Request::begin(id, asked, &world, mistake)).collect();
    let mut staged: Vec<Held> = Vec::new();
    for (id, request) in requests.iter_mut().enumerate() {
        while matches!(request.action, Action::Need(_) | Action::Copy(_)) {
            must(request.advance(&mut world, choices)? == Progress::Went, "it waits for no other")?;
        }
        let Action::Submit(submit) = request.action else { continue };
        if !submit.joinable {
            continue;
        }
        let spans = request.check(&submit, &world)?;
        let slot = Slot(id as u16);
        if let Some(held) = staged.last_mut()
            && held.plug.takes(&submit, 1 << 20)
            && held.spans.remaining_capacity() >= spans.len()
        {
            held.plug.join(slot, &submit);
            held.spans.extend(spans);
            held.members.push(id);
        } else {
            staged.push(Held { plug: Plug::new(slot, submit), spans, members: vec![id] });
        }
    }
    for Held { plug, spans, members } in staged {
        if members.len() == 1 {
            continue;
        }
        *counts += 1;
        let outcome = choices.outcome(&plug.submit, disk.block, 0);
        world.carry(&plug.submit, &spans, &mut [], outcome);
        choices.note(|| format!("joined {members:?}: {:?} {outcome:?}", plug.submit));
        let whole = outcome == Outcome::Moved(plug.submit.len);
        for id in members {
            let request = &mut requests[id];
            request.wrote(&plug.submit, outcome);
            let its_part = Outcome::Moved(request.asked.pages.len());
            request.take(if whole { Input::Ended(its_part) } else { Input::Apart }, &mut world, choices)?;
        }
    }
    let mut ends = Vec::new();
    for request in &mut requests {
        loop {
            match request.advance(&mut world, choices)? {
                Progress::Went => {}
                Progress::Waits => return Err("requests that share no block do not wait"),
                Progress::Ended(ok) => break ends.push((request.asked, ok)),
            }
        }
    }
    world.judge(&ends)
}

/// The same number of bytes for each request, one after another on the disk.
fn neighbours(command: fn(u64) -> Command, at: u64, len: u64, layout: usize) -> Vec<Asked> {
    let each = (0..3).map(|i| {
        let runs: Vec<_> = layouts(len)[layout].iter().map(|(at, len)| (at + i * 0x8000, *len)).collect();
        Asked::payload(command(at + i as u64 * len), &runs)
    });
    each.collect()
}

#[test]
fn joined_requests_end_like_single_ones() {
    let (mut runs, mut together) = (0, 0);
    let partial = 3 * 4096 + 1536;
    for (disk, at, len) in [
        (Disk::of(1, partial), 0, 512),
        (Disk::of(512, 3 * 4096), 512, 1024),
        (Disk { mem_align: 512, ..Disk::of(4096, 3 * 4096) }, 0, 4096),
        // Through the page cache: as long as no request modifies, the worker locks nothing.
        (Disk { locks_work: false, ..Disk::of(4096, partial) }, 3 * 4096, 512),
        (Disk { mem_align: 512, ..Disk::of(4096, 3 * 4096) }, 512, 1024), // each modifies
        (Disk { mem_align: 512, ..Disk::of(4096, partial) }, 2 * 4096, 4096 / 2), // none, and one
    ] {
        for disk in
            [disk, Disk { write_through: true, ..disk }, Disk { write_through: true, dsync: true, ..disk }]
        {
            for command in [Command::Read as fn(u64) -> Command, Command::Write] {
                for layout in 0..4 {
                    let mut all = neighbours(command, at, len, layout);
                    all.retain(|asked| asked.parts().iter().all(|(at, len)| at + len <= disk.bytes));
                    // Requests of one block would wait for each other here, one after the other.
                    if disk.block > len && matches!(all[0].command, Command::Write(_)) && at < 3 * 4096 {
                        all.truncate(1);
                    }
                    let run = |choices: &mut Choices| joined(&disk, &all, choices, &NONE, &mut together);
                    runs += unbroken(explore(2, run), &disk, &all);
                }
            }
        }
    }
    assert!(runs > 10_000 && together > 10_000, "{runs} runs, {together} joined operations");
}

/// A planted mistake: a part of a joined operation counts as moved whatever came of it.
#[test]
fn an_operation_that_is_not_taken_apart_is_noticed() {
    let mistake = Mistake {
        input: |action, input| match (action, input) {
            (Action::Submit(submit), Input::Apart) => Input::Ended(Outcome::Moved(submit.len)),
            _ => input,
        },
        ..NONE
    };
    let disk = Disk::of(512, 8192);
    for command in [Command::Read as fn(u64) -> Command, Command::Write] {
        let all = neighbours(command, 0, 512, 0);
        let mut together = 0;
        let found = explore(1, |choices| joined(&disk, &all, choices, &mistake, &mut together));
        assert!(found.is_err(), "no rule notices");
    }
}

/// A planted mistake: what was taken apart is joined again, and may never end.
#[test]
fn what_is_joined_twice_is_noticed() {
    let mistake = Mistake {
        action: |action| match action {
            Action::Submit(submit) => Action::Submit(Submit { joinable: true, ..submit }),
            other => other,
        },
        ..NONE
    };
    let (disk, mut together) = (Disk::of(512, 8192), 0);
    let all = neighbours(Command::Write, 0, 512, 0);
    let found = explore(1, |choices| joined(&disk, &all, choices, &mistake, &mut together));
    assert!(found.is_err(), "no rule notices");
}

fn unbroken(found: Result<u64, Broken>, disk: &Disk, all: &[Asked]) -> u64 {
    match found {
        Ok(runs) => runs,
        Err(broken) => {
            let log = broken.log.join("\n");
            panic!("broken: {}\n{disk:?}\n{all:#?}\n{log}", broken.rule)
        }
    }
}

/// True if no other request can tell when it is done: its order is not varied.
fn is_private(action: &Action) -> bool {
    matches!(action, Action::Copy(_) | Action::Need(Need::Sync | Need::Judgement))
}

/// Two requests whose steps come in any order.
pub(super) fn at_once(disk: &Disk, all: &[Asked; 2], choices: &mut Choices) -> Checked {
    let mut world = World::new(disk, all);
    let mut requests: Vec<_> =
        all.iter().enumerate().map(|(id, asked)| Request::begin(id, asked, &world, &NONE)).collect();
    let mut ends: [Option<bool>; 2] = [None; 2];
    // Requests that could not go on, since anything else happened.
    let mut waits = [false; 2];
    loop {
        let ready = [0, 1].map(|id| ends[id].is_none() && !waits[id]);
        let id = match ready {
            [true, true] => match [0, 1].iter().position(|&id| is_private(&requests[id].action)) {
                Some(id) => id,
                None => choices.choose_freely(2),
            },
            [true, false] => 0,
            [false, true] => 1,
            [false, false] => break,
        };
        let held = (world.free_chunks, world.locks.len());
        match requests[id].advance(&mut world, choices)? {
            // What it held until now may be what the other one waits for.
            Progress::Waits if held == (world.free_chunks, world.locks.len()) => waits[id] = true,
            Progress::Waits => (waits[id], waits[1 - id]) = (true, false),
            Progress::Went => waits = [false; 2],
            Progress::Ended(ok) => (ends[id], waits) = (Some(ok), [false; 2]),
        }
    }
    let [Some(first), Some(second)] = ends else { return Err("a request waits for ever") };
    world.judge(&[(&all[0], first), (&all[1], second)])
}

/// Pairs of requests that share blocks, and no bytes.
fn pairs() -> Vec<[Asked; 2]> {
    let write = |at: u64, len: usize, memory: usize| Asked::payload(Command::Write(at), &[(memory, len)]);
    let zeroes = |ranges: &[(u64, u64, bool)]| Asked::ranges(Command::WriteZeroes, ranges);
    vec![
        [write(0, 512, 0), write(512, 512, 0x4000)],
        [write(512, 4096, 0), write(4608, 512, 0x4000)], // both in the second block
        [write(1024, 1024, 0), Asked::payload(Command::Read(512), &[(0x4008, 512)])],
        [write(4096, 512, 0), zeroes(&[(4608, 512, false)])],
        [zeroes(&[(4096, 512, true), (0, 512, false)]), zeroes(&[(512, 512, false), (4608, 512, true)])],
        [write(8192 + 512, 512, 0), Asked::ranges(Command::Discard, &[(4096, 4096, false)])],
        [write(8192 + 512, 512, 0), write(8192 + 4096, 512, 0x4000)], // beside the partial last block
    ]
}

/// Disks for [`pairs`]: with pool pages for both, and with less.
fn shared_disks() -> [Disk; 3] {
    let disk = Disk {
        mem_align: 512,
        can_punch: false,
        can_zero_range: false,
        chunk: 4096,
        ..Disk::of(4096, 3 * 4096 + 1536)
    };
    [disk, Disk { chunks: 1, ..disk }, Disk { can_zero_range: true, write_through: true, ..disk }]
}

#[test]
fn neighbours_in_one_block_undo_nothing() {
    let mut runs = 0;
    for disk in shared_disks() {
        for pair in pairs() {
            // Those of more steps have more orders by themselves.
            let steps: usize =
                pair.iter().map(|asked| asked.parts().len() + asked.pages.len() as usize / 4096).sum();
            let budget = [2, 2, 2, 1, 0][steps];
            runs += unbroken(explore(budget, |choices| at_once(&disk, &pair, choices)), &disk, &pair);
        }
    }
    assert!(runs > 10_000, "{runs}");
}

/// A planted mistake: without range locks a neighbour's write is undone.
#[test]
fn a_block_that_is_not_locked_is_noticed() {
    let [disk, ..] = shared_disks();
    let disk = Disk { locks_work: false, ..disk };
    let pair = &pairs()[0];
    let found = explore(0, |choices| at_once(&disk, pair, choices));
    let Err(broken) = found else { panic!("no rule notices") };
    assert_eq!(broken.rule, "the disk holds exactly what was written");
}
