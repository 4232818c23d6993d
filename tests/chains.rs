//! Chains as a hostile driver makes them: mostly requests that are nearly
//! valid, some of them with a field or a descriptor that is anything at all.
//!
//! `chain::walk` and `request::decode` must agree with the plain walk in
//! `plain`, byte by byte; never panic; end soon; and every head that came out
//! of the ring goes back exactly once (a lost one panics in debug builds).

mod plain;

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::bool::weighted;
use proptest::prelude::{
    Just, ProptestConfig, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest,
};
use proptest::test_runner::TestCaseError;
use vublk::chain::{self, MAX_DESCRIPTORS, Segments};
use vublk::memory::{GuestMemory, RegionHint, RegionLayout};
use vublk::pages::{Iovecs, PageArray};
use vublk::promise::Promise;
use vublk::request::{self, Command, Ranges, Reject, Request};
use vublk::ring::split::{Layout, Ring};
use vublk::ring::{Head, RingError};

use self::plain::Plain;
use crate::support::device::{T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, header, range};
use crate::support::memory::{Memory, Span};
use crate::support::ring::{Desc, INDIRECT, NEXT, WRITE};

/// Two regions side by side for the guest and apart for us, and a third one.
const LOW: Span = Span { guest: 0x1_0000, len: 0x2_0000 };
const NEXT_TO_IT: Span = Span { guest: 0x3_0000, len: 0x1_0000 };
const HIGH: Span = Span { guest: 5 << 30, len: 0x1_0000 };

const TABLE: u64 = LOW.guest;
const AVAIL: u64 = LOW.guest + 0x4000;
const USED: u64 = LOW.guest + 0x5000;
/// Indirect tables, one a chain.
const TABLES: u64 = LOW.guest + 0x8000;
const TABLE_ROOM: u64 = 16 * 64;
/// Buffers go from here on, over the border of the two regions.
const BUFFERS: u64 = LOW.guest + 0x1_8000;

const CAPACITY: u64 = 1000;

/// A request as the driver frames it.
#[derive(Clone, Debug)]
struct Plan {
    kind: u32,
    sector: u64,
    sectors: u64,
    /// Where the bytes that the device reads, and those that it writes, are
    /// cut into descriptors, and where each piece lies.
    cuts: [Vec<u64>; 2],
    places: Vec<u64>,
    indirect: bool,
    /// Bytes of the data that are missing or too many.
    odd: i64,
    ranges: Vec<(u64, u32, u32)>,
}

/// Which descriptor: one of the ring's table, or one of an indirect one.
#[derive(Clone, Debug)]
enum At {
    Ring(usize),
    Indirect(usize, usize),
}

#[derive(Clone, Debug)]
enum Field {
    Addr(u64),
    Len(u32),
    Flags(u16),
    Next(u16),
    All(u64, u32, u16, u16),
}

#[derive(Clone, Debug)]
struct Case {
    size_log: u32,
    indirect: bool,
    read_only: bool,
    plans: Vec<Plan>,
    harm: Vec<(At, Field)>,
    /// Entries of the avail ring that are something else.
    heads: Vec<(usize, u16)>,
    /// How far avail.idx is from where it should be.
    ahead: u16,
    /// Bytes that are anything, somewhere in the ring's table or an indirect one.
    noise: Vec<(u64, Vec<u8>)>,
}

/// Almost always `usual`, now and then the other.
fn rarely<T: std::fmt::Debug + 'static>(
    usual: impl Strategy<Value = T> + 'static,
    rare: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = T> {
    prop_oneof![20 => usual, 1 => rare]
}

/// Over an end, at nothing, at the end of all addresses.
fn unmapped() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0u64..600).prop_map(|at| NEXT_TO_IT.guest + NEXT_TO_IT.len - at),
        (0u64..600).prop_map(|at| HIGH.guest + HIGH.len - at),
        (0u64..600).prop_map(|at| LOW.guest.wrapping_sub(at)),
        (0u64..600).prop_map(|at| 0u64.wrapping_sub(at)),
        any::<u64>(),
    ]
}

fn address() -> impl Strategy<Value = u64> {
    let mapped = prop_oneof![
        4 => 0..LOW.guest + LOW.len + NEXT_TO_IT.len - BUFFERS - 0x5000,
        1 => (HIGH.guest..HIGH.guest + 0x8000).prop_map(|at| at - BUFFERS),
    ];
    prop_oneof![200 => mapped.prop_map(|at| BUFFERS.wrapping_add(at)), 1 => unmapped()]
}

fn plan() -> impl Strategy<Value = Plan> {
    let kinds = prop_oneof![
        6 => prop_oneof![Just(T_IN), Just(T_OUT)],
        3 => proptest::sample::select(vec![T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES]),
    ];
    let cuts = || proptest::collection::vec(any::<u64>(), 0..6);
    let ranges = || {
        let sectors = rarely(0u32..100, any::<u32>());
        (rarely(0..CAPACITY - 100, any::<u64>()), sectors, rarely(0u32..2, any::<u32>()))
    };
    (
        rarely(kinds, any::<u32>()),
        rarely(0..CAPACITY - 64, any::<u64>()),
        rarely(0u64..24, 0u64..200),
        [cuts(), cuts()],
        proptest::collection::vec(address(), 14),
        any::<bool>(),
        rarely(Just(0i64), -40i64..40),
        rarely(proptest::collection::vec(ranges(), 1..4), proptest::collection::vec(ranges(), 0..20)),
    )
        .prop_map(|(kind, sector, sectors, cuts, places, indirect, odd, ranges)| Plan {
            kind,
            sector,
            sectors,
            cuts,
            places,
            indirect,
            odd,
            ranges,
        })
}

fn harm() -> impl Strategy<Value = (At, Field)> {
    let at = prop_oneof![
        (0usize..40).prop_map(At::Ring),
        (0usize..8, 0usize..16).prop_map(|(chain, at)| At::Indirect(chain, at)),
    ];
    let flags = || prop_oneof![0u16..8, any::<u16>()];
    let field = prop_oneof![
        prop_oneof![address(), unmapped()].prop_map(Field::Addr),
        prop_oneof![0u32..40, (0u32..600).prop_map(|n| 16 * n), any::<u32>()].prop_map(Field::Len),
        flags().prop_map(Field::Flags),
        prop_oneof![0u16..8, 0u16..64, any::<u16>()].prop_map(Field::Next),
        (address(), any::<u32>(), flags(), 0u16..300).prop_map(|(a, l, f, n)| Field::All(a, l, f, n)),
    ];
    (at, field)
}

fn noise() -> impl Strategy<Value = (u64, Vec<u8>)> {
    // Small numbers as often as all: flags and links that mean something.
    let byte = prop_oneof![3 => Just(0u8), 2 => 0u8..8, 1 => any::<u8>()];
    let at = prop_oneof![TABLE..TABLE + 0x400, TABLES..TABLES + 0x1000];
    (at, proptest::collection::vec(byte, 1..600))
}

fn case() -> impl Strategy<Value = Case> {
    (
        rarely(5u32..10, 0u32..5),
        rarely(Just(true), Just(false)),
        weighted(0.1),
        proptest::collection::vec(plan(), 1..8),
        prop_oneof![
            2 => proptest::collection::vec(harm(), 0..1),
            2 => proptest::collection::vec(harm(), 1..4),
            1 => proptest::collection::vec(harm(), 4..60),
        ],
        rarely(
            proptest::collection::vec((0usize..1, 0u16..1), 0..1),
            proptest::collection::vec((0usize..8, prop_oneof![0u16..64, any::<u16>()]), 1..4),
        ),
        rarely(Just(0u16), prop_oneof![0u16..3, any::<u16>()]),
        rarely(proptest::collection::vec(noise(), 0..1), proptest::collection::vec(noise(), 1..4)),
    )
        .prop_map(|(size_log, indirect, read_only, plans, harm, heads, ahead, noise)| Case {
            size_log,
            indirect,
            read_only,
            plans,
            harm,
            heads,
            ahead,
            noise,
        })
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
fn link(descs: &mut [Desc], from: u16) {
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
fn lay_out(case: &Case, memory: &Memory, plain: &Plain) -> u16 {
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

fn table_of(memory: &Memory) -> GuestMemory {
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
fn same_in_operations(pages: &PageArray, want: &[usize]) -> Result<(), TestCaseError> {
    let mut iovecs = Iovecs::new();
    let mut from = 0;
    while from < pages.len() {
        // A unit of one byte: nothing has to be cut off at the end.
        let len = pages.direct_bytes(from, pages.len() - from, 1, 1);
        pages.iovecs(from, len, &mut iovecs);
        prop_assert!(len > 0, "no progress at byte {}", from);
        let got = iovecs.iter().flat_map(|v| {
            let start = v.iov_base.addr();
            start..start + v.iov_len
        });
        let part = &want[from as usize..(from + len) as usize];
        prop_assert!(got.eq(part.iter().copied()), "iovecs from byte {}", from);
        from += len;
    }
    let (from, len) = (pages.len() / 3, pages.len() / 2);
    let mut got = Vec::new();
    pages.spans(from, len, |span| got.extend(span.addr()..span.end()));
    prop_assert!(got.iter().eq(&want[from as usize..(from + len) as usize]), "spans of the middle");
    Ok(())
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

fn play(case: &Case) -> Result<(), TestCaseError> {
    let memory = Memory::with(&[LOW, NEXT_TO_IT, HIGH]);
    let table = Arc::new(table_of(&memory));
    let size = 1_u16 << case.size_log;
    let layout =
        Layout { size, desc: memory.user(TABLE), avail: memory.user(AVAIL), used: memory.user(USED) };
    let disk = disk_that(case.read_only);
    let plain = Plain::new(&memory, &table, TABLE, size, case.indirect, disk);
    let avail = lay_out(case, &memory, &plain);
    let mut ring = Ring::new(&table, layout, 0, true).unwrap();
    let mut fetched = Vec::new();
    let checked = fetch_all(case, &memory, &plain, &table, &mut ring, avail, &mut fetched);
    // Whatever was found, nothing is lost.
    let owed: Vec<u16> = fetched.iter().map(Head::index).collect();
    for (len, head) in (1..).zip(fetched) {
        ring.push(head, len);
    }
    let signal = ring.publish();
    let in_flight = ring.in_flight();
    let _state = ring.stop();
    checked?;
    prop_assert_eq!(signal, !owed.is_empty());
    prop_assert_eq!(in_flight, 0);
    prop_assert_eq!(usize::from(memory.load16(USED + 2)), owed.len(), "used index");
    for (at, head) in (0..).zip(owed) {
        let element = USED + 4 + 8 * at;
        prop_assert_eq!(memory.load32(element), u32::from(head));
        prop_assert_eq!(u64::from(memory.load32(element + 4)), at + 1);
    }
    Ok(())
}

fn fetch_all(
    case: &Case,
    memory: &Memory,
    plain: &Plain,
    table: &GuestMemory,
    ring: &mut Ring,
    avail: u16,
    fetched: &mut Vec<Head>,
) -> Result<(), TestCaseError> {
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
                prop_assert_eq!(at, avail, "everything was fetched");
                return Ok(());
            }
            Err(why) => {
                let want = if avail > size {
                    RingError::AvailIndex { avail, next: 0 }
                } else {
                    RingError::HeadRange(entry)
                };
                prop_assert_eq!(why, want);
                prop_assert!(entry >= size || avail > size);
                return Ok(());
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
            prop_assert!(same, "head {}: got {:?}, want {:?}", index, walked, want);
            continue;
        };
        let decoded =
            request::decode(head, &segments, &disk_of(plain), table, &mut hint, &mut pages, &mut ranges);
        let (head, got) = outcome(decoded);
        prop_assert_eq!(head.index(), index);
        fetched.push(head);
        let (want, payload, wanted_ranges) = plain.decode(followed);
        prop_assert_eq!(got, want);
        if let plain::Outcome::Valid(_, command, _) = got {
            prop_assert_eq!(pages.len(), payload.len() as u64);
            prop_assert!(bytes_of(&pages).eq(payload.iter().copied()), "payload of {:?}", command);
            same_in_operations(&pages, &payload)?;
            let ranges_count = if matches!(command, Command::Discard | Command::WriteZeroes) {
                wanted_ranges.len()
            } else {
                0
            };
            prop_assert_eq!(ranges.len(), ranges_count);
            prop_assert!(ranges.iter().eq(&wanted_ranges));
        }
    }
}

/// A disk that is read-only, discards, writes zeroes, or not.
fn disk_that(read_only: bool) -> Promise {
    let mut promise = Promise::default();
    (promise.capacity, promise.read_only) = (CAPACITY, read_only);
    promise
}

fn disk_of(plain: &Plain) -> Promise {
    plain.disk
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_chain(case in case()) {
        let begun = Instant::now();
        play(&case)?;
        prop_assert!(begun.elapsed() < Duration::from_secs(5), "took {:?}", begun.elapsed());
    }
}

/// As long as a chain may be and one longer, in the ring's table, which is
/// longer still, and in one of its own.
#[test]
fn chains_of_every_length() {
    for (len, indirect) in [255_u16, 256, 257, 300].into_iter().flat_map(|len| [(len, false), (len, true)]) {
        let memory = Memory::with(&[LOW, NEXT_TO_IT, HIGH]);
        let mapped = Arc::new(table_of(&memory));
        let disk = disk_that(false);
        let plain = Plain::new(&memory, &mapped, TABLE, 512, true, disk);
        let mut descs = vec![Desc { addr: BUFFERS, len: 1, flags: 0, next: 0 }; usize::from(len)];
        link(&mut descs, 0);
        let table = if indirect { HIGH.guest + 3 } else { TABLE };
        let bytes: Vec<u8> = descs.iter().flat_map(|desc| desc.bytes()).collect();
        memory.write(table, &bytes);
        if indirect {
            let desc = Desc { addr: table, len: 16 * u32::from(len), flags: INDIRECT, next: 0 };
            memory.write(TABLE, &desc.bytes());
        }
        memory.store16(AVAIL + 2, 1);
        let [desc, avail, used] = [TABLE, AVAIL, USED].map(|at| memory.user(at));
        let mut ring = Ring::new(&mapped, Layout { size: 512, desc, avail, used }, 0, true).unwrap();
        let mut segments = Segments::default();
        let (head, chain) = ring.next().unwrap().unwrap();
        let got = chain::walk(&chain, true, &mapped, &mut RegionHint::default(), &mut segments);
        ring.push(head, 0);
        let want = plain.walk(0);
        assert_eq!(got.is_ok(), usize::from(len) <= MAX_DESCRIPTORS, "{len}, indirect: {indirect}");
        assert_eq!(got, want.as_ref().map(|_| ()).map_err(|why| *why));
        if let Ok(want) = want {
            assert!(segments.readable().iter().eq(&want.readable));
        }
    }
}

/// A chain of two whose second descriptor is far behind in a table that is longer than any chain.
#[test]
fn a_short_chain_in_a_long_table() {
    const FAR: u16 = 300;
    let memory = Memory::with(&[LOW, NEXT_TO_IT, HIGH]);
    let mapped = Arc::new(table_of(&memory));
    let plain = Plain::new(&memory, &mapped, TABLE, 8, true, disk_that(false));
    let table = Desc { addr: HIGH.guest, len: 16 * u32::from(FAR + 1), flags: INDIRECT, next: 0 };
    memory.write(TABLE, &table.bytes());
    memory.write(HIGH.guest, &Desc { addr: BUFFERS, len: 1, flags: NEXT, next: FAR }.bytes());
    let last = Desc { addr: BUFFERS, len: 2, flags: 0, next: 0 };
    memory.write(HIGH.guest + 16 * u64::from(FAR), &last.bytes());
    memory.store16(AVAIL + 2, 1);
    let [desc, avail, used] = [TABLE, AVAIL, USED].map(|at| memory.user(at));
    let mut ring = Ring::new(&mapped, Layout { size: 8, desc, avail, used }, 0, true).unwrap();
    let mut segments = Segments::default();
    let (head, chain) = ring.next().unwrap().unwrap();
    let got = chain::walk(&chain, true, &mapped, &mut RegionHint::default(), &mut segments);
    ring.push(head, 0);
    assert_eq!(got, Ok(()));
    assert_eq!(segments.readable_bytes(), 3);
    assert!(segments.readable().iter().eq(&plain.walk(0).unwrap().readable));
}

/// The generator has to make what it is for: most requests are valid, and each
/// way to be wrong comes up.
#[test]
fn the_chains_are_of_all_kinds() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut seen = std::collections::BTreeMap::<String, u32>::new();
    for _ in 0..1500 {
        let case = case().new_tree(&mut runner).unwrap().current();
        let memory = Memory::with(&[LOW, NEXT_TO_IT, HIGH]);
        let table = table_of(&memory);
        let size = 1_u16 << case.size_log;
        let disk = disk_that(case.read_only);
        let plain = Plain::new(&memory, &table, TABLE, size, case.indirect, disk);
        let avail = lay_out(&case, &memory, &plain);
        for at in 0..avail.min(size) {
            let head = memory.load16(AVAIL + 4 + 2 * u64::from(at));
            if head >= size {
                break;
            }
            let what = match plain.walk(head) {
                Err(why) => format!("{why:?}"),
                Ok(followed) => match plain.decode(&followed).0 {
                    plain::Outcome::Valid(_, command, _) => format!("{command:?}"),
                    plain::Outcome::Refused(_, code, _) => format!("{code:?}"),
                    plain::Outcome::Bare => "Bare".to_owned(),
                },
            };
            let name: String = what.chars().take_while(|c| c.is_alphabetic()).collect();
            *seen.entry(name).or_default() += 1;
        }
    }
    eprintln!("{seen:?}");
    let kinds = [
        "Read",
        "Write",
        "Flush",
        "GetId",
        "Discard",
        "WriteZeroes",
        "IoErr",
        "Unsupp",
        "Bare",
        "TooLong",
        "NextRange",
        "NestedIndirect",
        "NotNegotiated",
        "IndirectFlags",
        "TableSize",
        "TableAddress",
        "Order",
        "TooLarge",
    ];
    let missing: Vec<_> = kinds.iter().filter(|kind| !seen.contains_key(**kind)).collect();
    assert!(missing.is_empty(), "no {missing:?} among {seen:?}");
    let valid: u32 = kinds[..6].iter().filter_map(|kind| seen.get(*kind)).sum();
    let all: u32 = seen.values().sum();
    assert!(valid * 2 > all, "{valid} of {all} are valid");
}
