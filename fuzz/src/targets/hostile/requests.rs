//! Requests in guest memory: of each kind, on sectors in and beyond the disk, framed as a driver may frame them, or not.
//!
//! What it is: [`Requests`], which keeps where each ring is filled, as a driver does.
//!
//! What it is not: it does not know what a request should come to; `op` and `chain_request` do.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::super::reader::Reader;
use super::super::stage::{DISK_BYTES, QUEUES};
use super::{AVAIL, BUFFERS, FILE_BYTES, GUEST, RING, TABLE, USED};
use crate::support::request::{T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, header, range};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const SECTORS: u64 = DISK_BYTES / 512;
/// Descriptors of an indirect table at most: what fits at [`TABLE`].
const MOST: usize = 16;

/// A part of a chain.
#[derive(Clone, Copy)]
struct Segment {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// What a driver knows of one ring.
#[derive(Clone, Copy, Default)]
struct Ring {
    size: u16,
    /// Its next descriptor, and how many requests it has made available.
    desc: u16,
    avail: u16,
}

/// See the head of the file.
#[derive(Default)]
pub struct Requests {
    rings: [Ring; QUEUES as usize],
}

/// A sector: of the first ones, around the end of the disk, or anything.
fn sector(bytes: &mut Reader<'_>) -> u64 {
    match bytes.below(8) {
        0..4 => bytes.u8().into(),
        4 | 5 => (SECTORS + 2).saturating_sub(bytes.below(32)),
        6 => u64::MAX - bytes.below(32),
        _ => bytes.u64(),
    }
}

/// A length: whole sectors, nearly so, or few bytes.
fn length(bytes: &mut Reader<'_>) -> u32 {
    match bytes.below(8) {
        0..2 => 0,
        2..5 => 512 * bytes.below(17) as u32,
        5 => (512 * bytes.below(9) as u32 + 1_u32).saturating_sub(bytes.below(3) as u32),
        6 => 20,
        _ => bytes.u8().into(),
    }
}

/// Cuts `len` bytes from `at` on into segments.
fn cut(at: u64, len: u32, flags: u16, bytes: &mut Reader<'_>, into: &mut Vec<Segment>) {
    let (mut at, mut left) = (at, len);
    while left > 0 && into.len() < MOST {
        let whole = bytes.below(4) != 0 || into.len() + 1 == MOST;
        let now = if whole { left } else { left.min(1 + u32::from(bytes.u8())) };
        into.push(Segment { addr: GUEST + at, len: now, flags, next: 0 });
        (at, left) = (at + u64::from(now), left - now);
    }
}

impl Requests {
    /// The ring was set up for so many descriptors. Answers where it goes on.
    pub fn set_up(&mut self, queue: usize, size: u16) -> u16 {
        self.rings[queue].size = size;
        self.rings[queue].avail
    }

    /// Makes a request available on a ring.
    pub fn add(&mut self, memory: &File, queue: usize, bytes: &mut Reader<'_>) {
        // Each queue has its own: a request of another one is not changed under way by this one.
        let buffers = BUFFERS + 0x1000 * queue as u64;
        let kinds = [T_IN, T_OUT, T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES];
        let shape = bytes.u8();
        let kind = if shape & 0xf8 == 0xf8 { bytes.u32() } else { kinds[usize::from(shape & 7)] };
        let mut readable = header(kind, sector(bytes));
        let mut len = 0;
        match kind {
            T_DISCARD | T_WRITE_ZEROES => {
                for (sector, sectors, flags) in
                    bytes.list(17, |b| (sector(b), length(b) / 8, b.below(4) as u32 / 2))
                {
                    readable.extend(range(sector, sectors, flags));
                }
            }
            T_OUT => readable.resize(16 + length(bytes) as usize, shape),
            _ => len = length(bytes),
        }
        let (mut source, mut sink) = (readable.len() as u32, len + 1);
        if bytes.rarely() {
            source = source.saturating_sub(bytes.u8().into());
        }
        if bytes.rarely() {
            sink -= 1;
        }
        memory.write_all_at(&readable[..readable.len().min(0x1000)], buffers).unwrap();
        let mut chain = Vec::new();
        cut(buffers, source, 0, bytes, &mut chain);
        // Into the memory behind what is read, and beyond the region where that is long.
        cut(buffers + 0x800, sink, WRITE, bytes, &mut chain);
        self.publish(memory, queue, chain, bytes);
    }

    /// Writes a chain's descriptors, and the one that is first into the ring.
    fn publish(&mut self, memory: &File, queue: usize, mut chain: Vec<Segment>, bytes: &mut Reader<'_>) {
        let ring = &mut self.rings[queue];
        let (size, at) = (ring.size.max(1), RING * queue as u64);
        let head = ring.desc % size;
        let indirect = bytes.below(3) == 0;
        let first = if indirect { 0 } else { head };
        let last = chain.len().saturating_sub(1);
        for (place, segment) in chain.iter_mut().enumerate() {
            segment.next = first + place as u16 + 1;
            if !indirect {
                segment.next %= size;
            }
            segment.flags |= if place < last { NEXT } else { 0 };
        }
        let mut table = Segment {
            addr: GUEST + at + TABLE,
            len: 16 * chain.len() as u32,
            flags: INDIRECT,
            next: (head + 1) % size,
        };
        // Now and then one of them is not what it should be.
        if bytes.rarely() {
            let place = usize::from(bytes.u8()) % (chain.len() + 1);
            let broken = chain.get_mut(place).unwrap_or(&mut table);
            match bytes.below(6) {
                0 => broken.flags ^= 1 << bytes.below(4),
                1 => broken.next = bytes.u8().into(),
                2 => broken.len = bytes.u32(),
                3 => broken.len = 0,
                4 => broken.addr = bytes.u64(),
                _ => broken.addr = GUEST + FILE_BYTES - bytes.below(17),
            }
        }
        let write = |at: u64, segment: &Segment| {
            let mut desc = segment.addr.to_le_bytes().to_vec();
            desc.extend(segment.len.to_le_bytes());
            desc.extend([segment.flags, segment.next].iter().flat_map(|word| word.to_le_bytes()));
            memory.write_all_at(&desc, at).unwrap();
        };
        let place = |index: u16| at + 16 * u64::from(index % size);
        if indirect {
            (0..).zip(&chain).for_each(|(index, segment)| write(at + TABLE + 16 * index, segment));
            write(place(head), &table);
        } else {
            (0..).zip(&chain).for_each(|(index, segment)| write(place(head + index), segment));
        }
        ring.desc = head + if indirect { 1 } else { chain.len() as u16 };
        let slot = at + AVAIL + 4 + 2 * u64::from(ring.avail % size);
        let named = if bytes.rarely() { bytes.u16() } else { head };
        memory.write_all_at(&named.to_le_bytes(), slot).unwrap();
        ring.avail = ring.avail.wrapping_add(1);
        memory.write_all_at(&ring.avail.to_le_bytes(), at + AVAIL + 2).unwrap();
    }

    /// True once every request that was made available is returned, as the ring says, or if the ring was not set up.
    pub fn are_returned(&self, memory: &File, queue: usize) -> bool {
        let Ring { size, avail, .. } = self.rings[queue];
        let (mut used, at) = ([0; 2], RING * queue as u64 + USED + 2);
        size == 0 || memory.read_exact_at(&mut used, at).is_err() || u16::from_le_bytes(used) == avail
    }
}
