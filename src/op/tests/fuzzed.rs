//! Requests of the fuzzer's choice on disks of its choice, under outcomes of its choice; alone, or two at once.
//!
//! What it is: the body of the fuzz target `op` (`fuzz/`), the replay of its corpus, and the way from numbers to a
//! request that fits a disk, which the random tests use, too.
//!
//! What it is not: it has no rules of its own; they are [`super::request`]'s.
//!
//! Invariant: a case that breaks a rule panics with the rule and all that happened.

use super::explore::Choices;
use super::mistakes::NONE;
use super::request;
use super::together::at_once;
use super::world::{Asked, Disk};
use crate::request::Command;

#[path = "../../../fuzz/src/targets/reader.rs"]
#[expect(dead_code, reason = "the other targets use more of it")]
mod reader;
use self::reader::Reader;

/// A disk of this block: sectors, odd bytes, how much finer memory may be aligned, blocks of a chunk; and flags.
pub(super) fn disk_of(
    block: u64,
    (sectors, odd, mem, chunks): (u64, u64, u32, u64),
    flags: [bool; 8],
) -> Disk {
    let [dsync, is_device, write_through, can_punch, can_zero_range, mode_changes, odd_end, coarse] = flags;
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
}

/// Numbers out of which a request is made that fits the disk.
pub(super) type Seeds = (u8, Vec<(u16, u16, bool)>, Vec<(u8, u16)>);

/// A request on `sectors` sectors from sector `first` on, whose memory begins at `memory`.
pub(super) fn asked((first, sectors): (u64, u64), memory: usize, (kind, places, cuts): Seeds) -> Asked {
    let place = |&(at, len, unmap): &(u16, u16, bool)| {
        let at = u64::from(at) % sectors;
        ((first + at) * 512, (1 + u64::from(len) % (sectors - at)) * 512, unmap)
    };
    let (at, len, _) = place(&places[0]);
    let command = match kind % 5 {
        0 | 1 => Command::Read(at),
        2 | 3 => Command::Write(at),
        _ if kind % 2 == 0 => Command::WriteZeroes,
        _ => Command::Discard,
    };
    if matches!(command, Command::Read(_) | Command::Write(_)) {
        let (mut runs, mut left, mut next) = (Vec::new(), len as usize, memory);
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

fn seeds(bytes: &mut Reader<'_>) -> Seeds {
    let place = |bytes: &mut Reader<'_>| (bytes.u8().into(), bytes.u8().into(), bytes.bool());
    let mut places = vec![place(bytes)];
    let kind = bytes.u8();
    places.extend(bytes.list(3, place));
    (kind, places, bytes.list(8, |bytes| (bytes.u8(), bytes.u16())))
}

/// The body of the fuzz target.
pub fn run(data: &[u8]) {
    let mut bytes = Reader::new(data);
    let block = [1, 512, 1024, 4096][bytes.below(4) as usize];
    let sizes =
        (40 + bytes.below(40), u64::from(bytes.u16()) % 512, bytes.below(4) as u32, 1 + bytes.below(3));
    let flags = bytes.u8();
    let mut disk = disk_of(block, sizes, std::array::from_fn(|at| flags & 1 << at != 0));
    let more = bytes.u8();
    disk.ignores_discard = more & 1 != 0;
    // Of two, one may have chosen its action before the other saw the mode change.
    disk.mode_changes &= more & 4 == 0;
    disk.chunks = if more & 2 == 0 { 16 } else { 1 + bytes.below(3) };
    let sectors = disk.bytes / 512;
    let all = if more & 4 == 0 {
        vec![asked((0, sectors), 0, seeds(&mut bytes))]
    } else {
        // Side by side, so that they may share a block and no byte.
        let first = 1 + bytes.below(sectors - 1);
        let parts = [(0, first, 0), (first, sectors - first, 0x4_0000)];
        parts.map(|(first, sectors, memory)| asked((first, sectors), memory, seeds(&mut bytes))).into()
    };
    let script = bytes.bytes(usize::MAX).to_vec();
    let play = |choices: &mut Choices| match <&[Asked; 2]>::try_from(all.as_slice()) {
        Ok(pair) => at_once(&disk, pair, choices),
        Err(_) => request::run(&disk, &all[0], choices, &NONE).map(drop),
    };
    if let Err(rule) = play(&mut Choices::script(script.clone())) {
        let mut choices = Choices::script(script);
        choices.log = Some(Vec::new());
        let _the_same_again = play(&mut choices);
        panic!("{rule}\n{disk:?}\n{all:?}\n{}", choices.log.unwrap_or_default().join("\n"));
    }
}

/// What the fuzzer found interesting, or wrong, stays right.
#[test]
fn the_corpus_of_the_fuzzer() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let mut files = 0;
    for kind in ["corpus/op", "found/op"] {
        for entry in folder.join(kind).read_dir().into_iter().flatten() {
            let path = entry.expect("an entry").path();
            files += 1;
            let bytes = std::fs::read(&path).expect("its bytes");
            if std::panic::catch_unwind(|| run(&bytes)).is_err() {
                panic!("{} fails", path.display());
            }
        }
    }
    assert!(files > 0, "no corpus");
}
