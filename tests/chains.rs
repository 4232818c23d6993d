//! Chains as a hostile driver makes them: mostly requests that are nearly
//! valid, some of them with a field or a descriptor that is anything at all.
//!
//! `chain::walk` and `request::decode` must agree with the plain walk in
//! `model::plain`, byte by byte; never panic; end soon; and every head that came
//! out of the ring goes back exactly once. `model::chains` checks that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::bool::weighted;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_assert, prop_oneof, proptest};
use vublk::chain::{self, MAX_DESCRIPTORS, Segments};
use vublk::memory::RegionHint;
use vublk::ring::split::{Layout, Ring};

use crate::model::chains::{
    AVAIL, At, BUFFERS, CAPACITY, Case, Field, Ground, HIGH, LOW, NEXT_TO_IT, Plan, TABLE, TABLES, USED,
    disk_that, lay_out, link, table_of,
};
use crate::model::plain::{self, Plain};
use crate::support::device::{T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES};
use crate::support::memory::Memory;
use crate::support::ring::{Desc, INDIRECT, NEXT};

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

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_chain(case in case()) {
        let begun = Instant::now();
        Ground::new().play(&case);
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
