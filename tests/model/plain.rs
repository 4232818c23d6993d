//! What a chain means, the plain way: one byte after another, no hints, no
//! limits but those of the standard and those that `chain` states. It shares
//! the types of the outcome with the code under test, and nothing else.

use vublk::chain::{MAX_DESCRIPTORS, Malformed, Segment};
use vublk::complete::Status;
use vublk::memory::{GuestMemory, RegionHint};
use vublk::promise::{MAX_RANGE_SECTORS, MAX_RANGES, Promise};
use vublk::request::{Command, Range};

use crate::support::memory::Memory;
use crate::support::request::{T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES};
use crate::support::ring::{INDIRECT, NEXT, WRITE};

/// What a device makes of a chain that could be followed: where the status byte is in
/// this process, and what the request is or why it is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// And how many bytes the driver can have written.
    Valid(usize, Command, u32),
    Refused(usize, Status, u32),
    Bare,
}

/// A chain that was followed.
#[derive(Debug, Default)]
pub struct Followed {
    pub readable: Vec<Segment>,
    pub writable: Vec<Segment>,
    total: u64,
}

impl Followed {
    fn add(&mut self, addr: u64, len: u32, flags: u16) -> Result<(), Malformed> {
        let segment = Segment { addr, len };
        if flags & WRITE == 0 && !self.writable.is_empty() {
            return Err(Malformed::Order);
        }
        self.total += u64::from(len);
        if len > 0 {
            if flags & WRITE == 0 { self.readable.push(segment) } else { self.writable.push(segment) }
        }
        Ok(())
    }

    fn end(self) -> Result<Self, Malformed> {
        if self.total < 1 << 32 { Ok(self) } else { Err(Malformed::TooLarge) }
    }
}

/// The same complaint; where in a table outside of memory does not matter.
pub fn same_kind(got: Malformed, want: Malformed) -> bool {
    match (got, want) {
        (Malformed::TableAddress(_), Malformed::TableAddress(_)) => true,
        _ => got == want,
    }
}

/// Guest memory, byte by byte, and what else a request is judged by.
pub struct Plain<'a> {
    memory: &'a Memory,
    /// Guest address, length and address in this process of each region.
    regions: Vec<(u64, u64, usize)>,
    table: u64,
    size: u16,
    indirect: bool,
    pub disk: Promise,
}

impl<'a> Plain<'a> {
    pub fn new(
        memory: &'a Memory,
        mapped: &GuestMemory,
        table: u64,
        size: u16,
        indirect: bool,
        disk: Promise,
    ) -> Self {
        let host = |guest| {
            let mut at = 0;
            mapped.translate(guest, 1, &mut RegionHint::default(), |span| at = span.addr()).unwrap();
            at
        };
        let regions = memory.regions.iter().map(|r| (r.guest, r.len, host(r.guest))).collect();
        Self { memory, regions, table, size, indirect, disk }
    }

    /// Where a guest byte is in this process, if it is anywhere.
    pub fn host(&self, guest: u64) -> Option<usize> {
        let inside = |&&(start, len, _): &&(u64, u64, usize)| guest >= start && guest - start < len;
        self.regions.iter().find(inside).map(|&(start, _, host)| host + (guest - start) as usize)
    }

    fn desc(&self, at: u64) -> (u64, u32, u16, u16) {
        let bytes = self.memory.read(at, 16);
        let word = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        let addr = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        (addr, len, word(12), word(14))
    }

    /// Follows the chain that begins at `head`.
    pub fn walk(&self, head: u16) -> Result<Followed, Malformed> {
        let mut out = Followed::default();
        let mut at = head;
        let mut steps = 0;
        loop {
            if steps == usize::from(self.size).min(MAX_DESCRIPTORS) {
                return Err(Malformed::TooLong);
            }
            steps += 1;
            if at >= self.size {
                return Err(Malformed::NextRange(at));
            }
            let (addr, len, flags, next) = self.desc(self.table + 16 * u64::from(at));
            if flags & INDIRECT != 0 {
                return match () {
                    () if !self.indirect => Err(Malformed::NotNegotiated),
                    () if flags & NEXT != 0 => Err(Malformed::IndirectFlags(flags)),
                    () => self.walk_table(addr, len, out),
                };
            }
            out.add(addr, len, flags)?;
            if flags & NEXT == 0 {
                return out.end();
            }
            at = next;
        }
    }

    fn walk_table(&self, addr: u64, len: u32, mut out: Followed) -> Result<Followed, Malformed> {
        if len == 0 || !len.is_multiple_of(16) {
            return Err(Malformed::TableSize(len));
        }
        let count = u64::from(len) / 16;
        let mut at = 0;
        // The chain is limited, not the table: a short one may be anywhere in it.
        for _ in 0..count.min(MAX_DESCRIPTORS as u64) {
            if u64::from(at) >= count {
                return Err(Malformed::NextRange(at));
            }
            let Some(start) = addr.checked_add(16 * u64::from(at)) else {
                return Err(Malformed::TableAddress(addr));
            };
            if (0..16).any(|i| start.checked_add(i).is_none_or(|byte| self.host(byte).is_none())) {
                return Err(Malformed::TableAddress(start));
            }
            let (addr, len, flags, next) = self.desc(start);
            if flags & INDIRECT != 0 {
                return Err(Malformed::NestedIndirect);
            }
            out.add(addr, len, flags)?;
            if flags & NEXT == 0 {
                return out.end();
            }
            at = next;
        }
        Err(Malformed::TooLong)
    }

    /// Where the bytes are in this process; none if one of them is nowhere.
    fn hosts(&self, bytes: impl Iterator<Item = u64>) -> Option<Vec<usize>> {
        bytes.map(|at| self.host(at)).collect()
    }

    fn contents(&self, bytes: impl Iterator<Item = u64>) -> Option<Vec<u8>> {
        bytes.map(|at| self.host(at).map(|_| self.memory.byte(at))).collect()
    }

    /// What the chain asks for, the payload byte by byte, and the ranges.
    pub fn decode(&self, chain: &Followed) -> (Outcome, Vec<usize>, Vec<Range>) {
        let nothing = |outcome| (outcome, Vec::new(), Vec::new());
        let Some(last) = chain.writable.last() else {
            return nothing(Outcome::Bare);
        };
        // A chain may not be so long that the sum of its lengths matters; an
        // address may be so high that it wraps.
        let Some(status) = last.addr.checked_add(u64::from(last.len) - 1) else {
            return nothing(Outcome::Bare);
        };
        let Some(status) = self.host(status) else {
            return nothing(Outcome::Bare);
        };
        let len = |segments: &[Segment]| segments.iter().map(|s| u64::from(s.len)).sum::<u64>();
        let out_len = len(&chain.readable);
        let back_len = len(&chain.writable) - 1;
        let writable = back_len as u32 + 1;
        let refused = |code| nothing(Outcome::Refused(status, code, writable));
        if out_len < 16 {
            return refused(Status::IoErr);
        }
        let Some(header) = self.contents(bytes(&chain.readable).take(16)) else {
            return refused(Status::IoErr);
        };
        let kind = u32::from_le_bytes(header[..4].try_into().unwrap());
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
        let out_data = || bytes(&chain.readable).skip(16);
        let valid = |command, payload| (Outcome::Valid(status, command, writable), payload, Vec::new());
        match kind {
            T_IN => match self.fits(sector, back_len) {
                true => match self.hosts(bytes(&chain.writable).take(back_len as usize)) {
                    Some(payload) => valid(Command::Read(512 * sector), payload),
                    None => refused(Status::IoErr),
                },
                false => refused(Status::IoErr),
            },
            T_OUT => match self.fits(sector, out_len - 16) && !self.disk.read_only {
                true => match self.hosts(out_data()) {
                    Some(payload) => valid(Command::Write(512 * sector), payload),
                    None => refused(Status::IoErr),
                },
                false => refused(Status::IoErr),
            },
            T_FLUSH => valid(Command::Flush, Vec::new()),
            T_GET_ID => match self.hosts(bytes(&chain.writable).take(back_len.min(4096) as usize)) {
                Some(payload) => valid(Command::GetId, payload),
                None => refused(Status::IoErr),
            },
            T_DISCARD if !self.disk.read_only => match self.ranges(out_len - 16, out_data(), 0) {
                Ok(ranges) => (Outcome::Valid(status, Command::Discard, writable), Vec::new(), ranges),
                Err(code) => refused(code),
            },
            T_WRITE_ZEROES if !self.disk.read_only => match self.ranges(out_len - 16, out_data(), 1) {
                Ok(ranges) => (Outcome::Valid(status, Command::WriteZeroes, writable), Vec::new(), ranges),
                Err(code) => refused(code),
            },
            _ => refused(Status::Unsupp),
        }
    }

    /// Whole sectors inside the disk.
    fn fits(&self, sector: u64, len: u64) -> bool {
        len.is_multiple_of(512) && sector <= self.disk.capacity && len / 512 <= self.disk.capacity - sector
    }

    fn ranges(
        &self,
        len: u64,
        mut from: impl Iterator<Item = u64>,
        flags_known: u32,
    ) -> Result<Vec<Range>, Status> {
        match len {
            0 => return Err(Status::IoErr),
            _ if !len.is_multiple_of(16) => return Err(Status::IoErr),
            _ if len / 16 > MAX_RANGES as u64 => return Err(Status::Unsupp),
            _ => {}
        }
        let mut ranges = Vec::new();
        for _ in 0..len / 16 {
            let raw = self.contents(from.by_ref().take(16)).ok_or(Status::IoErr)?;
            let sector = u64::from_le_bytes(raw[..8].try_into().unwrap());
            let sectors = u32::from_le_bytes(raw[8..12].try_into().unwrap());
            let flags = u32::from_le_bytes(raw[12..].try_into().unwrap());
            if flags & !flags_known != 0 {
                return Err(Status::Unsupp);
            }
            let len = 512 * u64::from(sectors);
            if sectors > MAX_RANGE_SECTORS || !self.fits(sector, len) {
                return Err(Status::IoErr);
            }
            if len > 0 {
                ranges.push(Range { offset: 512 * sector, len, unmap: flags & 1 != 0 });
            }
        }
        Ok(ranges)
    }
}

/// The guest addresses of all bytes, in order; past the highest address comes
/// nothing that is mapped.
fn bytes(segments: &[Segment]) -> impl Iterator<Item = u64> + '_ {
    segments.iter().flat_map(|s| (0..u64::from(s.len)).map(|i| s.addr.wrapping_add(i)))
}
