//! Random requests on random disks under random outcomes.
//!
//! What it is: what the lists of [`super::cases`] do not have: any place, any cut of the
//! memory, long sequences of bad outcomes, a cache mode that changes on the way.
//!
//! What it is not: it has no rules of its own; they are [`super::request`]'s.
//!
//! Invariant: a failing case is printed as its seed values, and shrunk.

use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop, prop_assert, prop_oneof, proptest};

use super::explore::Choices;
use super::mistakes::NONE;
use super::request;
use super::world::{Asked, Disk};
use crate::request::Command;

fn disk() -> impl Strategy<Value = Disk> {
    let block = prop_oneof![Just(1_u64), Just(512), Just(1024), Just(4096)];
    let sizes = (40_u64..80, 0_u64..512, 0_u32..4, 1_u64..4);
    let flags = any::<[bool; 8]>();
    (block, sizes, flags).prop_map(|(block, (sectors, odd, mem, chunks), flags)| {
        let [dsync, is_device, write_through, can_punch, can_zero_range, mode_changes, odd_end, coarse] =
            flags;
        let bytes = sectors * 512 + if odd_end { odd } else { 0 };
        let bytes = if is_device { bytes / 4096 * 4096 } else { bytes };
        Disk {
            mem_align: if block == 1 { 1 } else { (block >> mem).max(4) },
            discard_unit: if coarse { 3 * 4096 } else { block.max(512) },
            fallocate_align: if is_device { 4096 } else { 1 },
            chunk: block.max(512) * chunks,
            dsync,
            is_device,
            write_through,
            can_punch,
            can_zero_range,
            mode_changes,
            ..Disk::of(block, bytes)
        }
    })
}

/// Numbers out of which a request is made that fits the disk.
type Seeds = (u8, Vec<(u16, u16, bool)>, Vec<(u8, u16)>);

fn asked(disk: &Disk, (kind, places, cuts): Seeds) -> Asked {
    let sectors = disk.bytes / 512;
    let place = |&(at, len, unmap): &(u16, u16, bool)| {
        let at = u64::from(at) % sectors;
        (at * 512, (1 + u64::from(len) % (sectors - at)) * 512, unmap)
    };
    let (at, len, _) = place(&places[0]);
    let command = match kind % 5 {
        0 | 1 => Command::Read(at),
        2 | 3 => Command::Write(at),
        _ if kind % 2 == 0 => Command::WriteZeroes,
        _ => Command::Discard,
    };
    if matches!(command, Command::Read(_) | Command::Write(_)) {
        let (mut runs, mut left, mut next) = (Vec::new(), len as usize, 0_usize);
        for (gap, cut) in cuts {
            // Multiples of 512 twice as often as others.
            let shift = [0, 512, 1024, 8, 520, 4][usize::from(gap) % 6];
            let cut =
                if gap >= 128 { usize::from(cut) % 4096 + 1 } else { usize::from(cut) % 16 * 512 + 512 };
            let now = left.min(cut);
            let start = if gap % 7 == 0 { next } else { next.next_multiple_of(4096) + shift };
            runs.push((start, now));
            (next, left) = (start + now, left - now);
        }
        runs.push((next, left));
        runs.retain(|run| run.1 > 0);
        return Asked::payload(command, &runs);
    }
    // Ranges that share no byte, in no order.
    let mut ranges: Vec<(u64, u64, bool)> = Vec::new();
    for (at, len, unmap) in places.iter().map(place) {
        if ranges.iter().all(|(a, l, _)| at + len <= *a || a + l <= at) {
            ranges.push((at, len, unmap));
        }
    }
    Asked::ranges(command, &ranges)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_request_under_any_outcomes(
        disk in disk(),
        kind in any::<u8>(),
        places in prop::collection::vec(any::<(u16, u16, bool)>(), 1..5),
        cuts in prop::collection::vec(any::<(u8, u16)>(), 0..8),
        script in prop::collection::vec(any::<u8>(), 0..60),
    ) {
        let asked = asked(&disk, (kind, places, cuts));
        let mut choices = Choices::script(script);
        choices.log = Some(Vec::new());
        let ended = request::run(&disk, &asked, &mut choices, &NONE);
        prop_assert!(ended.is_ok(), "{:?}\n{:?}\n{}", ended, asked, choices.log.unwrap_or_default().join("\n"));
    }
}
