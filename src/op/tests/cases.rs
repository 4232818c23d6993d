//! One request at a time: every kind of request, place, memory and outcome.
//!
//! What it is: the lists of what is tried. Each entry is explored: every combination of
//! outcomes with so many departures from the good path as the test says.
//!
//! What it is not: requests that meet each other are in [`super::together`].
//!
//! Invariant: the number of runs is asserted, so that a list that shrinks is noticed.
//!
//! ```text
//!   blocks of 1, 512, 4096 × where it begins × how long × how its memory lies × cache mode
//! ```

use super::explore::{Choices, explore};
use super::mistakes::NONE;
use super::request;
use super::world::{Asked, Disk};
use crate::backing::Backing;
use crate::complete::Status;
use crate::engine::{Kind, Outcome, Target};
use crate::memory::HostSpan;
use crate::op::action::{Action, Failure, Input, Need, Submit};
use crate::op::transfer::MAX_BYTES;
use crate::op::{Context, MAX_ATTEMPTS, Op};
use crate::pages::{MAX_IOVECS, PageArray};
use crate::request::{Command, Range, Ranges};

/// Every run of a request, with so many departures.
fn all_runs(disk: &Disk, asked: &Asked, budget: u32) -> u64 {
    match explore(budget, |choices| request::run(disk, asked, choices, &NONE).map(|_| ())) {
        Ok(runs) => runs,
        Err(broken) => panic!(
            "broken: {}\n{disk:?}\n{:?} {:?} {:x?}\n{}",
            broken.rule,
            asked.command,
            asked.ranges,
            asked.pages.runs(),
            broken.log.join("\n")
        ),
    }
}

/// Disks of every kind of block, with and without a partial last one.
pub(super) fn disks() -> Vec<Disk> {
    let partial = 5 * 4096 + 1536;
    vec![
        Disk::of(1, partial),
        Disk::of(512, partial),
        Disk { mem_align: 4, ..Disk::of(512, partial + 100) },
        Disk { mem_align: 512, ..Disk::of(4096, 6 * 4096) },
        Disk { mem_align: 512, ..Disk::of(4096, partial) },
        Disk { chunk: 4096, ..Disk::of(4096, partial) },
    ]
}

/// Where requests begin and how long they are, bytes: one sector, one block, both, several
/// blocks, up to the end of the disk.
pub(super) fn places(disk: &Disk) -> Vec<(u64, u64)> {
    let capacity = disk.bytes / 512 * 512;
    let block = disk.block.max(512);
    let starts: &[u64] = if block > 512 { &[0, 512, 7 * 512, 4096] } else { &[0, 1536] };
    let mut all = Vec::new();
    for &start in starts {
        for len in [512, block, block + 512, 3 * block] {
            if !all.contains(&(start, len)) {
                all.push((start, len));
            }
        }
    }
    let last = (capacity - 1) / block * block;
    let ends = [last - block, last - 512, last, last + 512];
    all.extend(ends.iter().filter(|at| **at < capacity).map(|at| (*at, capacity - at)));
    all
}

/// Where `len` bytes of payload lie: (offset in the guest's memory, length) of its runs.
pub(super) fn layouts(len: u64) -> Vec<Vec<(usize, usize)>> {
    let len = len as usize;
    let cut = |lens: &[usize], shifts: &[usize]| {
        let (mut runs, mut left, mut at) = (Vec::new(), len, 0_usize);
        for (part, shift) in lens.iter().cycle().zip(shifts.iter().cycle()) {
            if left == 0 {
                break;
            }
            let part = left.min(*part);
            runs.push((at + shift, part));
            at = (at + shift + part).next_multiple_of(512) + 512;
            left -= part;
        }
        runs
    };
    let mut all = vec![
        vec![(0, len)],
        vec![(512, len)],
        vec![(8, len)],
        cut(&[520, 1016, 8, 4096, 1000], &[0, 8, 512]),
    ];
    if len > 512 {
        all.push(cut(&[512], &[0, 512]));
        all.push(cut(&[512, usize::MAX], &[8, 0]));
    }
    all
}

/// The cache modes: write-back, write-through with an fdatasync, and with RWF_DSYNC.
fn cache_modes(disk: Disk) -> [Disk; 3] {
    [disk, Disk { write_through: true, ..disk }, Disk { write_through: true, dsync: true, ..disk }]
}

fn transfers(command: fn(u64) -> Command, disk: &Disk, budget: u32) -> u64 {
    let mut runs = 0;
    for (at, len) in places(disk) {
        for layout in layouts(len) {
            runs += all_runs(disk, &Asked::payload(command(at), &layout), budget);
        }
    }
    runs
}

#[test]
fn reads_under_every_outcome() {
    let runs: u64 = disks().iter().map(|disk| transfers(Command::Read, disk, 3)).sum();
    assert!(runs > 80_000, "{runs}");
}

#[test]
fn writes_under_every_outcome() {
    let all = disks().into_iter().flat_map(cache_modes);
    let runs: u64 = all.map(|disk| transfers(Command::Write, &disk, 2)).sum();
    assert!(runs > 200_000, "{runs}");
}

/// One departure more, where a write has the most steps.
#[test]
fn modifying_writes_under_every_outcome() {
    let mut runs = 0;
    for disk in disks().into_iter().filter(|disk| disk.block == 4096 && disk.mem_align == 512) {
        for (at, len) in places(&disk) {
            let [aligned, .., two] = &layouts(len)[..] else { continue };
            for layout in [aligned, two] {
                runs += all_runs(&disk, &Asked::payload(Command::Write(at), layout), 3);
            }
        }
    }
    assert!(runs > 100_000, "{runs}");
}

/// Every way to make zeroes, on files and on a device, with and without leave to unmap.
fn zeroes(disk: &Disk, budget: u32) -> u64 {
    let mut runs = 0;
    for (can_punch, can_zero_range) in [(true, true), (false, true), (true, false), (false, false)] {
        let file = Disk { can_punch, can_zero_range, ..*disk };
        // A device is of whole blocks, and one that is opened through the page cache takes any
        // byte but those of fallocate.
        let device = Disk { is_device: true, fallocate_align: 4096, bytes: 6 * 4096, ..file };
        for (at, len) in places(disk) {
            for unmap in [false, true] {
                let asked = Asked::ranges(Command::WriteZeroes, &[(at, len, unmap)]);
                runs += all_runs(&file, &asked, budget) + all_runs(&device, &asked, budget);
            }
        }
    }
    runs
}

#[test]
fn zeroes_under_every_outcome() {
    let runs: u64 = disks().iter().map(|disk| zeroes(disk, 2)).sum();
    assert!(runs > 100_000, "{runs}");
    let modes = cache_modes(Disk { mem_align: 512, ..Disk::of(4096, 5 * 4096 + 1536) });
    let runs: u64 = modes.iter().map(|disk| zeroes(disk, 2)).sum();
    assert!(runs > 50_000, "{runs}");
}

/// The second range is begun from scratch: its means, its lock, its edges.
#[test]
fn several_ranges_of_zeroes_under_every_outcome() {
    let ranges = [(512, 4096, true), (12288, 4096, false), (20480, 1536, true)];
    let asked = Asked::ranges(Command::WriteZeroes, &ranges);
    let partial = Disk { mem_align: 512, ..Disk::of(4096, 5 * 4096 + 1536) };
    let mut runs = 0;
    for disk in cache_modes(partial).into_iter().chain(cache_modes(Disk::of(512, 5 * 4096 + 1536))) {
        runs += all_runs(&disk, &asked, 3);
        runs += all_runs(&Disk { can_punch: false, can_zero_range: false, ..disk }, &asked, 3);
    }
    assert!(runs > 10_000, "{runs}");
    let none = Asked::ranges(Command::WriteZeroes, &[]);
    assert_eq!(all_runs(&partial, &none, 3), 1, "nothing to do and nothing that may happen");
}

#[test]
fn discards_under_every_outcome() {
    let mut runs = 0;
    for disk in disks() {
        let device = Disk { is_device: true, bytes: 6 * 4096, ..disk };
        for unit in [512, 4096, 3 * 4096] {
            let unit = unit.max(disk.block);
            let file = Disk { discard_unit: unit, ..disk };
            let device = Disk { discard_unit: unit, ..device };
            for (at, len) in places(&disk) {
                for ranges in [vec![(at, len, false)], vec![(at, len, false), (8192, 8192, false)]] {
                    let asked = Asked::ranges(Command::Discard, &ranges);
                    runs += all_runs(&file, &asked, 3) + all_runs(&device, &asked, 3);
                }
            }
        }
    }
    assert!(runs > 10_000, "{runs}");
}

#[test]
fn a_discard_that_is_to_be_ignored_does_nothing() {
    let disk = Disk { ignores_discard: true, ..Disk::of(512, 8 * 4096) };
    assert_eq!(all_runs(&disk, &Asked::ranges(Command::Discard, &[(0, 8192, false)]), 3), 1);
    // And leave to unmap is no leave to punch: the rules of an operation see to it.
    all_runs(&disk, &Asked::ranges(Command::WriteZeroes, &[(0, 8192, true)]), 3);
}

#[test]
fn flushes_and_serial_numbers_under_every_outcome() {
    let flush = Asked::payload(Command::Flush, &[]);
    for disk in cache_modes(Disk::of(512, 4096)) {
        assert_eq!(all_runs(&disk, &flush, 3), 2, "durable or not");
        assert_eq!(all_runs(&Disk { read_only: true, ..disk }, &flush, 3), 1, "nothing to make durable");
        for len in [20, 512, 1, 0] {
            let asked = Asked::payload(Command::GetId, &[(8, len / 2), (100, len - len / 2)]);
            assert_eq!(all_runs(&disk, &asked, 3), 2, "copied or lost");
        }
        for command in [Command::Read(512), Command::Write(512)] {
            assert_eq!(all_runs(&disk, &Asked::payload(command, &[]), 3), 1, "of no bytes");
        }
    }
}

/// More runs than an operation has buffers, and more zeroes than one writes.
#[test]
fn a_payload_of_more_buffers_than_an_operation_has() {
    let runs: Vec<_> = (0..MAX_IOVECS + 10).map(|i| (i * 1024, 512)).collect();
    let shifted: Vec<_> = runs.iter().map(|(at, len)| (at + 8, *len)).collect();
    let bytes = 1 << 17;
    for disk in [Disk::of(1, bytes), Disk::of(512, bytes), Disk { mem_align: 512, ..Disk::of(4096, bytes) }] {
        for command in [Command::Read(512), Command::Write(512)] {
            all_runs(&disk, &Asked::payload(command, &runs), 1);
            all_runs(&disk, &Asked::payload(command, &shifted), 1);
        }
        let small = Disk { chunk: disk.block.max(512), can_zero_range: false, ..disk };
        all_runs(&small, &Asked::ranges(Command::WriteZeroes, &[(512, 100_000 / 512 * 512, false)]), 1);
    }
    let tail: Vec<_> = (0..192).map(|i| (i * 16, 8)).collect();
    for command in [Command::Read(4096), Command::Write(4096)] {
        all_runs(&Disk::of(4096, 4096 + 1536), &Asked::payload(command, &tail), 2);
    }
}

/// What is not executed is tried again, but not for ever.
#[test]
fn what_is_never_executed_fails_in_the_end() {
    let disk = Disk { mem_align: 512, write_through: true, ..Disk::of(4096, 5 * 4096 + 1536) };
    let asked = [
        Asked::payload(Command::Read(512), &[(8, 8192)]),
        Asked::payload(Command::Write(512), &[(8, 16384)]),
        Asked::ranges(Command::WriteZeroes, &[(512, 16384, false)]),
        Asked::ranges(Command::Discard, &[(0, 16384, false)]),
    ];
    for disk in [disk, Disk { can_punch: false, can_zero_range: false, ..disk }] {
        for asked in &asked {
            for skip in 0..8 {
                let run = |times| request::run(&disk, asked, &mut Choices::not_executed(skip, times), &NONE);
                let limit = usize::from(MAX_ATTEMPTS);
                assert_eq!(run(limit), Ok(true), "{:?}, operation {skip}", asked.command);
                // Operations that there are not are not tried.
                let fails = run(limit + 1) == Ok(false);
                assert!(fails || skip > 0, "{:?}, operation {skip}", asked.command);
            }
        }
    }
}

/// Attempts are counted anew once something was moved.
#[test]
fn each_operation_has_its_own_attempts() {
    let disk = Disk { mem_align: 512, ..Disk::of(4096, 6 * 4096) };
    let ranges = [(0, 4096, false), (8192, 4096, true), (16384, 4096, false)];
    for asked in [
        Asked::payload(Command::Read(0), &[(0, 4096), (8192, 4096), (20480 + 8, 4096)]),
        Asked::payload(Command::Write(4096), &[(0, 4096), (8192 + 8, 4096), (20480, 4096)]),
        Asked::ranges(Command::WriteZeroes, &ranges),
        Asked::ranges(Command::Discard, &ranges),
    ] {
        let mut choices = Choices::each_not_executed(MAX_ATTEMPTS.into());
        assert_eq!(request::run(&disk, &asked, &mut choices, &NONE), Ok(true), "{:?}", asked.command);
    }
}

/// A block that is never read or written whole is not tried for ever. Elsewhere, short
/// transfers lead to the end, one after another.
#[test]
fn what_is_always_too_short_ends() {
    let disk = Disk { mem_align: 512, ..Disk::of(4096, 6 * 4096) };
    let bounced = |command| Asked::payload(command, &[(8, 8192)]);
    let direct = |command| Asked::payload(command, &[(0, 8192)]);
    for (asked, skip, ok) in [
        (bounced(Command::Write(512)), 0, false),
        (bounced(Command::Write(512)), 1, false),
        (bounced(Command::Read(1024)), 0, false),
        (bounced(Command::Read(4096)), 0, false),
        (direct(Command::Write(4096)), 0, false),
    ] {
        let ended = request::run(&disk, &asked, &mut Choices::short(skip), &NONE);
        assert_eq!(ended, Ok(ok), "{:?}, from operation {skip} on", asked.command);
    }
    let small = Disk::of(512, 6 * 4096);
    for asked in [bounced(Command::Read(512)), direct(Command::Write(512))] {
        assert_eq!(request::run(&small, &asked, &mut Choices::short(0), &NONE), Ok(true));
    }
}

/// The actions of a request of which every operation goes well.
fn all_goes_well(command: Command, pages: &PageArray, ranges: &Ranges, backing: &Backing) -> Vec<Action> {
    let cx = Context { backing, pages, ranges, write_through: false, locks: true, chunk: 4096 };
    let (mut op, mut action) = Op::begin(command, cx);
    let mut all = Vec::new();
    loop {
        all.push(action);
        let input = match action {
            Action::Submit(submit) if matches!(submit.kind, Kind::Read | Kind::Write { .. }) => {
                Input::Ended(Outcome::Moved(submit.len))
            }
            Action::Submit(_) => Input::Ended(Outcome::Moved(0)),
            Action::Need(Need::Range { .. }) => Input::Range,
            _ => return all,
        };
        action = op.step(input, cx);
    }
}

/// Offsets and lengths of the operations among them.
fn operations(actions: &[Action]) -> Vec<(u64, u64)> {
    let each = actions.iter().filter_map(|action| match action {
        Action::Submit(submit) => Some((submit.offset, submit.len)),
        _ => None,
    });
    each.collect()
}

#[test]
fn no_operation_is_longer_than_the_kernel_takes() {
    let len = MAX_BYTES + (MAX_BYTES >> 1);
    let parts = [(4096, MAX_BYTES), (4096 + MAX_BYTES, MAX_BYTES >> 1)];
    let mut pages = PageArray::default();
    pages.push(HostSpan::new(1 << 20, len as usize)).expect("one run");
    let ranges = [Range { offset: 4096, len, unmap: false }].into_iter().collect();
    for block in [1, 512, 4096] {
        let backing = Backing::nowhere(block);
        for command in [Command::Read(4096), Command::Write(4096)] {
            let all = all_goes_well(command, &pages, &Ranges::new(), &backing);
            assert_eq!(operations(&all), parts, "{command:?}, blocks of {block}");
        }
        for command in [Command::WriteZeroes, Command::Discard] {
            let all = all_goes_well(command, &PageArray::default(), &ranges, &backing);
            assert_eq!(operations(&all), parts, "{command:?}, blocks of {block}");
            let locks = all.iter().filter(|action| matches!(action, Action::Need(_))).count();
            assert_eq!(locks, usize::from(block == 4096), "one lock for all parts");
        }
    }
}

/// What the kernel turns out not to know is not asked of it again.
#[test]
fn what_the_store_lacks_is_remembered() {
    let ranges = [Range { offset: 0, len: 8192, unmap: true }].into_iter().collect();
    let pages = PageArray::default();
    for (errno, remembered) in [(libc::EOPNOTSUPP, true), (libc::ENOTTY, true), (libc::EINVAL, false)] {
        let backing = Backing::nowhere(512);
        let cx = Context {
            backing: &backing,
            pages: &pages,
            ranges: &ranges,
            write_through: false,
            locks: true,
            chunk: 4096,
        };
        let (mut op, mut action) = Op::begin(Command::WriteZeroes, cx);
        for mode in [libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE] {
            let Action::Submit(submit) = action else { panic!("{action:?}") };
            assert_eq!(submit.kind, Kind::Fallocate(mode | libc::FALLOC_FL_KEEP_SIZE));
            action = op.step(Input::Ended(Outcome::Failed(errno)), cx);
        }
        assert!(matches!(action, Action::Submit(s) if s.kind == Kind::Write { dsync: false }), "{action:?}");
        assert_eq!((backing.may_punch(), backing.may_zero_range()), (!remembered, !remembered));

        let (mut op, _) = Op::begin(Command::Discard, cx);
        let action = op.step(Input::Ended(Outcome::Failed(errno)), cx);
        assert_eq!(action, Action::Finish(Status::Ok), "a discard is a hint");
        assert_eq!(backing.may_discard(), !remembered);
    }
}

/// io_uring learned to discard long after the system call did.
#[test]
fn a_discard_that_a_device_refuses_is_made_once_more_as_a_call() {
    let mut backing = Backing::nowhere(512);
    backing.is_device = true;
    let ranges = [Range { offset: 0, len: 8192, unmap: false }].into_iter().collect();
    let pages = PageArray::default();
    let cx = Context {
        backing: &backing,
        pages: &pages,
        ranges: &ranges,
        write_through: false,
        locks: true,
        chunk: 4096,
    };
    let (mut op, first) = Op::begin(Command::Discard, cx);
    let Action::Submit(first) = first else { panic!("{first:?}") };
    let refused = Input::Ended(Outcome::Failed(libc::EOPNOTSUPP));
    let second = op.step(refused, cx);
    assert_eq!(second, Action::Submit(Submit { own_thread: true, ..first }));
    assert!(backing.may_discard());
    assert_eq!(op.step(refused, cx), Action::Finish(Status::Ok));
    assert!(!backing.may_discard());
}

/// Blocks around a misaligned read are one operation, not one for each edge.
#[test]
fn a_read_through_the_pool_is_one_operation() {
    let backing = Backing::nowhere(4096);
    let mut pages = PageArray::default();
    pages.push(HostSpan::new(0x1008, 4096)).expect("one run");
    let ranges = Ranges::new();
    let cx = Context {
        backing: &backing,
        pages: &pages,
        ranges: &ranges,
        write_through: false,
        locks: true,
        chunk: 4096,
    };
    let (mut op, action) = Op::begin(Command::Read(512), cx);
    assert_eq!(action, Action::Need(Need::Pool(8192)));
    assert_eq!(operations(&[op.step(Input::Pool(8192), cx)]), [(0, 8192)]);
}

/// A buffer that the kernel refuses although it fits its rules goes through the pool.
#[test]
fn a_refused_buffer_is_bounced_and_the_rules_are_raised() {
    let backing = Backing::nowhere(512);
    let mut pages = PageArray::default();
    pages.push(HostSpan::new(0x1200, 4096)).expect("one run");
    let ranges = Ranges::new();
    let cx = Context {
        backing: &backing,
        pages: &pages,
        ranges: &ranges,
        write_through: false,
        locks: true,
        chunk: 4096,
    };
    let (mut op, _) = Op::begin(Command::Read(0), cx);
    let action = op.step(Input::Ended(Outcome::Failed(libc::EINVAL)), cx);
    assert_eq!(action, Action::Need(Need::Pool(4096)));
    assert_eq!(backing.mem_align(), 4096);
    let (mut other, action) = Op::begin(Command::Read(0), cx);
    let before_the_page = Action::Need(Need::Pool(4096 - 512));
    assert_eq!(action, before_the_page, "the next one is bounced at once, up to a whole page");
    other.step(Input::Pool(4096), cx);
    let action = other.step(Input::Ended(Outcome::Failed(libc::EINVAL)), cx);
    assert_eq!(action, Action::Fail(Failure::Errno(libc::EINVAL, 0)), "refused from the pool as well");
}

/// The page cache takes any buffer: what it refuses says nothing of direct I/O's alignment.
#[test]
fn what_the_page_cache_refuses_is_an_error() {
    let mut backing = Backing::nowhere(512);
    backing.block = 4096;
    backing.resized(4096 + 1536);
    let mut pages = PageArray::default();
    pages.push(HostSpan::new(0x1200, 512)).expect("one run");
    let ranges = Ranges::new();
    let cx = Context {
        backing: &backing,
        pages: &pages,
        ranges: &ranges,
        write_through: false,
        locks: true,
        chunk: 4096,
    };
    let (mut op, action) = Op::begin(Command::Read(4096), cx);
    assert!(matches!(action, Action::Submit(submit) if submit.target == Target::Cached), "{action:?}");
    let action = op.step(Input::Ended(Outcome::Failed(libc::EINVAL)), cx);
    assert_eq!(action, Action::Fail(Failure::Errno(libc::EINVAL, 4096)));
    assert_eq!(backing.mem_align(), 512);
}
