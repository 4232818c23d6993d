//! A case of chains as a hostile driver lays them out, and the check that `chain::walk` and
//! `request::decode` make of it what the plain walk does.
//!
//! What it is: [`Case`], which random tests and the fuzzer fill in their own ways, and [`Ground::play`].
//!
//! What it is not: it does not choose the values of a case.
//!
//! Invariant: a case that fails panics; every head that came out of the ring goes back exactly once
//! (a lost one panics in debug builds).

use std::rc::Rc;
use std::sync::Arc;

use vublk::chain::{self, MAX_DESCRIPTORS, Segments};
use vublk::memory::{GuestMemory, RegionHint, RegionLayout};
use vublk::pages::{Iovecs, PageArray};
use vublk::promise::Promise;
use vublk::request::{self, Command, Ranges, Reject, Request};
use vublk::ring::split::{Layout, Ring};
use vublk::ring::{Head, RingError};

use super::plain::{self, Plain};
use crate::support::memory::{Memory, Span};
use crate::support::request::{T_DISCARD, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, header, range};
use crate::support::ring::{Desc, INDIRECT, NEXT, WRITE};

/// Two regions side by side for the guest and apart for us, and a third one.
pub const LOW: Span = Span { guest: 0x1_0000, len: 0x2_0000 };
pub const NEXT_TO_IT: Span = Span { guest: 0x3_0000, len: 0x1_0000 };
pub const HIGH: Span = Span { guest: 5 << 30, len: 0x1_0000 };
pub const TABLE: u64 = LOW.guest;
pub const AVAIL: u64 = LOW.guest + 0x4000;
pub const USED: u64 = LOW.guest + 0x5000;

/// Indirect tables, one a chain.
pub const TABLES: u64 = LOW.guest + 0x8000;
pub const TABLE_ROOM: u64 = 16 * 64;

/// Buffers go from here on, over the border of the two regions.
pub const BUFFERS: u64 = LOW.guest + 0x1_8000;
pub const CAPACITY: u64 = 1000;

/// A request as the driver frames it.
#[derive(Clone, Debug)]
pub struct Plan {
    pub kind: u32,
    pub sector: u64,
    pub sectors: u64,
    /// Where the bytes that the device reads, and those that it writes, are
    /// cut into descriptors, and where each piece lies.
    pub cuts: [Vec<u64>; 2],
    pub places: Vec<u64>,
    pub indirect: bool,
    /// Bytes of the data that are missing or too many.
    pub odd: i64,
    pub ranges: Vec<(u64, u32, u32)>,
}

/// Which descriptor: one of the ring's table, or one of an indirect one.
#[derive(Clone, Debug)]
pub enum At {
    Ring(usize),
    Indirect(usize, usize),
}

#[derive(Clone, Debug)]
pub enum Field {
    Addr(u64),
    Len(u32),
    Flags(u16),
    Next(u16),
    All(u64, u32, u16, u16),
}

#[derive(Clone, Debug)]
pub struct Case {
    pub size_log: u32,
    pub indirect: bool,
    pub read_only: bool,
    pub plans: Vec<Plan>,
    pub harm: Vec<(At, Field)>,
    /// Entries of the avail ring that are something else.
    pub heads: Vec<(usize, u16)>,
    /// How far avail.idx is from where it should be.
    pub ahead: u16,
    /// Bytes that are anything, somewhere in the ring's table or an indirect one.
    pub noise: Vec<(u64, Vec<u8>)>,
}

/// Cuts `len` bytes at these places into pieces of (start, length).
fn cut(len: u64, at: &[u64]) -> Vec<(u64, u64)> {
    let mut ends: Vec<u64> = at.iter().map(|at| at % (len + 1)).chain([len]).collect();
    ends.sort_unstable();
    let starts = [0].into_iter().chain(ends.clone());
    starts.zip(ends).map(|(start, end)| (start, end - start)).filter(|(_, len)| *len > 0).collect()
}

/// Writes what is inside guest memory of a range that may leave it, and beside
/// the rings: those are laid out later, and used.idx is the device's.
fn write_mapped(memory: &Memory, plain: &Plain, at: u64, bytes: &[u8]) {
    for (i, byte) in (0..).zip(bytes) {
        let at = at.wrapping_add(i);
        if plain.host(at).is_some() && !(LOW.guest..BUFFERS).contains(&at) {
            memory.write(at, &[*byte]);
        }
    }
}

impl Plan {
    /// Puts the request's bytes into memory; gives its descriptors, not linked.
    fn place(&self, memory: &Memory, plain: &Plain) -> Vec<Desc> {
        let mut out = header(self.kind, self.sector);
        let data = (self.sectors * 512).saturating_add_signed(self.odd);
        let back = match self.kind {
            T_IN => data,
            T_GET_ID => self.sectors,
            _ => 0,
        };
        match self.kind {
            T_OUT => out.resize(out.len() + data as usize, 0x5a),
            T_DISCARD | T_WRITE_ZEROES => {
                let flags = |flags| if self.kind == T_DISCARD { flags & !1 } else { flags };
                out.extend(self.ranges.iter().flat_map(|&(at, len, f)| range(at, len, flags(f))));
                out.truncate(out.len().saturating_add_signed(self.odd as isize));
            }
            _ => {}
        }
        let mut places = self.places.iter().copied();
        let mut desc = |len: u64, flags| Desc {
            addr: places.next().unwrap(),
            len: u32::try_from(len).unwrap(),
            flags,
            next: 0,
        };
        let mut descs = Vec::new();
        for (start, len) in cut(out.len() as u64, &self.cuts[0]) {
            let desc = desc(len, 0);
            let (start, len) = (start as usize, len as usize);
            write_mapped(memory, plain, desc.addr, &out[start..start + len]);
            descs.push(desc);
        }
        descs.extend(cut(back + 1, &self.cuts[1]).iter().map(|&(_, len)| desc(len, WRITE)));
        descs
    }
}

/// Links descriptors from index `from` on.
pub fn link(descs: &mut [Desc], from: u16) {
    let last = descs.len() - 1;
    for (at, desc) in (from..).zip(&mut descs[..last]) {
        desc.flags |= NEXT;
        desc.next = at + 1;
    }
}

/// Writes a descriptor with one field that is something else.
fn spoil(memory: &Memory, at: u64, field: &Field) {
    match *field {
        Field::Addr(addr) => memory.write(at, &addr.to_le_bytes()),
        Field::Len(len) => memory.write(at + 8, &len.to_le_bytes()),
        Field::Flags(flags) => memory.write(at + 12, &flags.to_le_bytes()),
        Field::Next(next) => memory.write(at + 14, &next.to_le_bytes()),
        Field::All(addr, len, flags, next) => memory.write(at, &Desc { addr, len, flags, next }.bytes()),
    }
}

/// Writes all of a case into memory; gives avail.idx.
pub fn lay_out(case: &Case, memory: &Memory, plain: &Plain) -> u16 {
    let size = 1_u16 << case.size_log;
    let mut free = 0;
    let mut offered = 0_u16;
    for (chain, plan) in (0..).zip(&case.plans) {
        let mut descs = plan.place(memory, plain);
        let table = TABLES + chain * TABLE_ROOM;
        if plan.indirect {
            link(&mut descs, 0);
            for (at, desc) in (0..).zip(&descs) {
                memory.write(table + 16 * at, &desc.bytes());
            }
            let len = 16 * u32::try_from(descs.len()).unwrap();
            descs = vec![Desc { addr: table, len, flags: INDIRECT, next: 0 }];
        } else {
            link(&mut descs, free);
        }
        if usize::from(size - free) < descs.len() {
            break; // a small ring holds fewer
        }
        memory.store16(AVAIL + 4 + 2 * u64::from(offered), free);
        offered += 1;
        for desc in &descs {
            memory.write(TABLE + 16 * u64::from(free), &desc.bytes());
            free += 1;
        }
    }
    for (at, field) in &case.harm {
        let at = match *at {
            At::Ring(at) => TABLE + 16 * (at as u64 % u64::from(size)),
            At::Indirect(chain, at) => TABLES + chain as u64 * TABLE_ROOM + 16 * at as u64,
        };
        spoil(memory, at, field);
    }
    for (at, bytes) in &case.noise {
        memory.write(*at, bytes);
    }
    for &(at, head) in &case.heads {
        memory.store16(AVAIL + 4 + 2 * (at as u64 % u64::from(size)), head);
    }
    let idx = offered.wrapping_add(case.ahead);
    memory.store16(AVAIL + 2, idx);
    idx
}

pub fn table_of(memory: &Memory) -> GuestMemory {
    let (layouts, files) = memory
        .regions
        .iter()
        .map(|r| {
            let layout = RegionLayout { guest: r.guest, len: r.len, user: r.user, offset: r.offset };
            (layout, r.file.try_clone().unwrap())
        })
        .unzip::<_, _, Vec<_>, Vec<_>>();
    GuestMemory::map(&layouts, files).unwrap()
}

/// One byte of a payload after the other, as addresses of this process.
fn bytes_of(pages: &PageArray) -> impl Iterator<Item = usize> + '_ {
    pages.runs().iter().flat_map(|run| run.addr()..run.end())
}

/// The operations that the payload would go in cover it once and in order.
fn same_in_operations(pages: &PageArray, want: &[usize]) {
    let mut iovecs = Iovecs::new();
    let mut from = 0;
    while from < pages.len() {
        // A unit of one byte: nothing has to be cut off at the end.
        let len = pages.direct_bytes(from, pages.len() - from, 1, 1);
        pages.iovecs(from, len, &mut iovecs);
        assert!(len > 0, "no progress at byte {}", from);
        let got = iovecs.iter().flat_map(|v| {
            let start = v.iov_base.addr();
            start..start + v.iov_len
        });
        let part = &want[from as usize..(from + len) as usize];
        assert!(got.eq(part.iter().copied()), "iovecs from byte {}", from);
        from += len;
    }
    let (from, len) = (pages.len() / 3, pages.len() / 2);
    let mut got = Vec::new();
    pages.spans(from, len, |span| got.extend(span.addr()..span.end()));
    assert!(got.iter().eq(&want[from as usize..(from + len) as usize]), "spans of the middle");
}

/// What `request::decode` gave, in the words of the plain walk.
fn outcome(decoded: Result<Request, Reject>) -> (Head, plain::Outcome) {
    match decoded {
        Ok(Request { head, status, command, writable }) => {
            (head, plain::Outcome::Valid(status.addr(), command, writable))
        }
        Err(Reject::Status(head, status, code, writable)) => {
            (head, plain::Outcome::Refused(status.addr(), code, writable))
        }
        Err(Reject::Bare(head)) => (head, plain::Outcome::Bare),
    }
}

/// The guest's memory, which is used for one case after another.
pub struct Ground {
    memory: Rc<Memory>,
    table: Arc<GuestMemory>,
}

impl Ground {
    pub fn new() -> Self {
        let memory = Memory::with(&[LOW, NEXT_TO_IT, HIGH]);
        let table = Arc::new(table_of(&memory));
        Self { memory, table }
    }

    /// Lays the case out and checks all that the device makes of it.
    pub fn play(&self, case: &Case) {
        let Self { memory, table } = self;
        for region in &memory.regions {
            memory.write(region.guest, &vec![0; region.len as usize]);
        }
        let size = 1_u16 << case.size_log;
        let layout =
            Layout { size, desc: memory.user(TABLE), avail: memory.user(AVAIL), used: memory.user(USED) };
        let disk = disk_that(case.read_only);
        let plain = Plain::new(memory, table, TABLE, size, case.indirect, disk);
        let avail = lay_out(case, memory, &plain);
        let mut ring = Ring::new(table, layout, 0, true).unwrap();
        let mut fetched = Vec::new();
        fetch_all(case, memory, &plain, table, &mut ring, avail, &mut fetched);
        let owed: Vec<u16> = fetched.iter().map(Head::index).collect();
        for (len, head) in (1..).zip(fetched) {
            ring.push(head, len);
        }
        let signal = ring.publish();
        let in_flight = ring.in_flight();
        let _state = ring.stop();
        assert_eq!(signal, !owed.is_empty());
        assert_eq!(in_flight, 0);
        assert_eq!(usize::from(memory.load16(USED + 2)), owed.len(), "used index");
        for (at, head) in (0..).zip(owed) {
            let element = USED + 4 + 8 * at;
            assert_eq!(memory.load32(element), u32::from(head));
            assert_eq!(u64::from(memory.load32(element + 4)), at + 1);
        }
    }
}

fn fetch_all(
    case: &Case,
    memory: &Memory,
    plain: &Plain,
    table: &GuestMemory,
    ring: &mut Ring,
    avail: u16,
    fetched: &mut Vec<Head>,
) {
    let size = 1_u16 << case.size_log;
    let mut segments = Segments::default();
    let mut pages = PageArray::default();
    let mut ranges = Ranges::new();
    let mut hint = RegionHint::default();
    loop {
        let at = fetched.len() as u16;
        let entry = memory.load16(AVAIL + 4 + 2 * u64::from(at % size));
        let (head, chain) = match ring.next() {
            Ok(Some(got)) => got,
            Ok(None) => {
                assert_eq!(at, avail, "everything was fetched");
                return;
            }
            Err(why) => {
                let want = if avail > size {
                    RingError::AvailIndex { avail, next: 0 }
                } else {
                    RingError::HeadRange(entry)
                };
                assert_eq!(why, want);
                assert!(entry >= size || avail > size);
                return;
            }
        };
        let walked = chain::walk(&chain, case.indirect, table, &mut hint, &mut segments);
        let index = head.index();
        let want = plain.walk(index);
        let same = match (&walked, &want) {
            (Ok(()), Ok(want)) => {
                let got = [segments.readable(), segments.writable()];
                got[0].len() + got[1].len() <= MAX_DESCRIPTORS
                    && got[0].iter().eq(&want.readable)
                    && got[1].iter().eq(&want.writable)
            }
            (Err(got), Err(want)) => plain::same_kind(*got, *want),
            _ => false,
        };
        let (Ok(()), Ok(followed), true) = (&walked, &want, same) else {
            fetched.push(head);
            assert!(same, "head {}: got {:?}, want {:?}", index, walked, want);
            continue;
        };
        let decoded =
            request::decode(head, &segments, &plain.disk, table, &mut hint, &mut pages, &mut ranges);
        let (head, got) = outcome(decoded);
        assert_eq!(head.index(), index);
        fetched.push(head);
        let (want, payload, wanted_ranges) = plain.decode(followed);
        assert_eq!(got, want);
        if let plain::Outcome::Valid(_, command, _) = got {
            assert_eq!(pages.len(), payload.len() as u64);
            assert!(bytes_of(&pages).eq(payload.iter().copied()), "payload of {:?}", command);
            same_in_operations(&pages, &payload);
            let ranges_count = if matches!(command, Command::Discard | Command::WriteZeroes) {
                wanted_ranges.len()
            } else {
                0
            };
            assert_eq!(ranges.len(), ranges_count);
            assert!(ranges.iter().eq(&wanted_ranges));
        }
    }
}

/// A disk that is read-only, discards, writes zeroes, or not.
pub fn disk_that(read_only: bool) -> Promise {
    let mut promise = Promise::default();
    (promise.capacity, promise.read_only) = (CAPACITY, read_only);
    promise
}
