//! A model of the disk in memory beside the real one: random requests in
//! random framing, several in flight, and whatever is read must be what the
//! model holds.

use super::Bench;
use crate::support::device::{
    Device, OK, Setup, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, UNWRITTEN, header, range,
};
use crate::support::dice::Dice;
use crate::support::disk::{SECTOR, assert_same, salted};
use crate::support::frontend::feature;
use crate::support::memory::{Memory, Span};
use crate::support::ring::{Seg, back, out};

/// Sectors of the disk that take part, in as many lanes as may be in flight.
const LANES: u64 = 8;
const LANE: u64 = 512;

/// Guest memory of each lane, from its start: header, status, data.
const ROOM: u64 = 512 << 10;
const DATA: u64 = 8192;

struct Flight {
    queue: usize,
    lane: u64,
    kind: u32,
    sector: u64,
    data_at: u64,
    len: usize,
}

/// Cuts a range at random places, mostly into a few pieces.
fn shatter(dice: &mut Dice, addr: u64, len: usize, seg: fn(u64, usize) -> Seg) -> Vec<Seg> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < len {
        let left = len - at;
        let piece = match dice.below(6) {
            _ if pieces.len() >= 40 => left,
            0 => 1 + dice.below(left as u64) as usize,
            1 => SECTOR.min(left),
            2 => 4096.min(left),
            3 => (1 + dice.below(64) as usize).min(left),
            _ => left,
        };
        pieces.push(seg(addr + at as u64, piece));
        at += piece;
    }
    pieces
}

/// Prepares and offers one random request on a lane.
fn launch(device: &mut Device, dice: &mut Dice, lane: u64, base: u64, salt: u64) -> Flight {
    let memory = device.memory.clone();
    let room = base + lane * ROOM;
    let sectors = 1 + match dice.below(4) {
        0 => dice.below(LANE / 2),
        1 => dice.below(8),
        _ => dice.below(64),
    };
    let sector = lane * LANE + dice.below(LANE - sectors + 1);
    let len = sectors as usize * SECTOR;
    let kind = match dice.below(10) {
        0 => T_WRITE_ZEROES,
        1 => T_FLUSH,
        2..=5 => T_OUT,
        _ => T_IN,
    };
    // Anywhere: a page, a sector, a byte off.
    let data_at = room
        + DATA
        + match dice.below(4) {
            0 => dice.below(4096),
            1 => dice.below(8) * 512,
            _ => 0,
        };
    let head_at = room + dice.below(100);
    let status_at = room + 4096 + dice.below(100);
    let first = if kind == T_IN || kind == T_OUT { sector } else { 0 };
    memory.write(head_at, &header(kind, first));
    memory.write(status_at, &[UNWRITTEN]);
    let mut segs = if dice.rarely(3) { shatter(dice, head_at, 16, out) } else { vec![out(head_at, 16)] };
    match kind {
        T_OUT => {
            memory.write(data_at, &salted(salt, sector, sectors));
            segs.extend(shatter(dice, data_at, len, out));
        }
        T_IN => {
            memory.write(data_at, &vec![0xee; len]);
            segs.extend(shatter(dice, data_at, len, back));
        }
        T_WRITE_ZEROES => {
            let flags = dice.below(2) as u32;
            memory.write(data_at, &range(sector, sectors as u32, flags));
            segs.extend(shatter(dice, data_at, 16, out));
        }
        _ => {}
    }
    segs.push(back(status_at, 1));
    let queue = dice.below(device.rings.len() as u64) as usize;
    let ring = &mut device.rings[queue];
    let head = if device.features & feature::INDIRECT_DESC != 0 && !dice.rarely(3) {
        ring.indirect(&segs)
    } else {
        ring.chain(&segs)
    };
    ring.stage(head);
    Flight { queue, lane, kind, sector, data_at, len }
}

fn play(bench: &Bench, seed: u64, without: u64, queues: u32, rounds: u64) {
    let memory = Memory::with(&[
        Span { guest: 1 << 20, len: 16 << 20 },
        Span { guest: 5 << 30, len: 2 << 20 },
        Span { guest: (5 << 30) + (2 << 20), len: 4 << 20 },
    ]);
    let (_daemon, mut device) =
        bench.with(Setup { without, queues, ring_size: 1024, memory, ..Setup::default() });
    // The lanes' rooms lie across the border of two regions.
    let base = (5 << 30) + 100;
    let mut model = bench.stored().read(0, LANES * LANE);
    let mut dice = Dice::new(seed);
    for round in 0..rounds {
        let flights: Vec<Flight> = (0..LANES)
            .map(|lane| launch(&mut device, &mut dice, lane, base, round * LANES + lane + 1))
            .collect();
        for ring in &device.rings {
            ring.publish();
            ring.kick.signal();
        }
        for flight in &flights {
            let used = device.rings[flight.queue].wait_used("a random request");
            assert!(used.len >= 1);
        }
        for flight in &flights {
            let what = format!(
                "seed {seed:#x} round {round} lane {}: type {} at {} for {} bytes",
                flight.lane, flight.kind, flight.sector, flight.len
            );
            let room = base + flight.lane * ROOM;
            let status = device.memory.read(room + 4096, 100);
            assert_eq!(status.iter().max(), Some(&OK), "{what}");
            let start = flight.sector as usize * SECTOR;
            let place = &mut model[start..start + flight.len];
            match flight.kind {
                T_OUT => place.copy_from_slice(&device.memory.read(flight.data_at, flight.len)),
                T_WRITE_ZEROES => place.fill(0),
                T_IN => {
                    let got = device.memory.read(flight.data_at, flight.len);
                    assert_same(&got, place, &what);
                }
                _ => {}
            }
            device.memory.write(room + 4096, &[0; 100]);
        }
    }
    assert_same(&bench.stored().read(0, LANES * LANE), &model, "the whole disk");
}

pub fn random_requests(bench: &Bench) {
    play(bench, 0x51_7cc1, 0, 1, 200);
    play(bench, 0xdead_beef, feature::INDIRECT_DESC, 2, 200);
}

pub fn random_requests_on_four_queues(bench: &Bench) {
    play(bench, 0x1234_5677, 0, 4, 200);
    play(bench, 0x0bad_cafe, feature::EVENT_IDX, 4, 200);
}
