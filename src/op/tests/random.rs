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
use super::fuzzed::{asked, disk_of};
use super::mistakes::NONE;
use super::request;
use super::world::Disk;

fn disk() -> impl Strategy<Value = Disk> {
    let block = prop_oneof![Just(1_u64), Just(512), Just(1024), Just(4096)];
    let sizes = (40_u64..80, 0_u64..512, 0_u32..4, 1_u64..4);
    (block, sizes, any::<[bool; 8]>()).prop_map(|(block, sizes, flags)| disk_of(block, sizes, flags))
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
        let asked = asked((0, disk.bytes / 512), 0, (kind, places, cuts));
        let mut choices = Choices::script(script);
        choices.log = Some(Vec::new());
        let ended = request::run(&disk, &asked, &mut choices, &NONE);
        prop_assert!(ended.is_ok(), "{:?}\n{:?}\n{}", ended, asked, choices.log.unwrap_or_default().join("\n"));
    }
}
