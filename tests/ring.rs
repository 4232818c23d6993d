//! Our ring against virtio-queue's: the same driver, twice the same memory, the
//! same device actions in random order. `model::ring` compares them.

use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};

use crate::model::ring::{Action, Twin};

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (1u16..12).prop_map(Action::Add),
        2 => Just(Action::Take),
        1 => prop_oneof![4 => -3i16..6, 1 => any::<i16>()].prop_map(Action::UsedEvent),
        1 => any::<bool>().prop_map(Action::NoInterrupt),
        1 => prop_oneof![Just(Action::Show), Just(Action::Backlog)],
        4 => (1u16..12).prop_map(Action::Fetch),
        6 => (any::<usize>(), any::<u32>()).prop_map(|(which, len)| Action::Push(which, len)),
        3 => Just(Action::Publish),
        2 => Just(Action::Arm),
    ]
}

/// Where indices start: often shortly before they wrap.
fn base() -> impl Strategy<Value = u16> {
    prop_oneof![3 => 0xfff0u16..=0xffff, 1 => Just(0), 1 => any::<u16>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn does_as_the_oracle_does(
        size_log in 0u32..7,
        base in base(),
        behind in 0u16..3,
        event_idx in any::<bool>(),
        actions in proptest::collection::vec(action(), 1..300),
    ) {
        let mut twin = Twin::new(1 << size_log, base, behind, event_idx);
        actions.iter().for_each(|action| twin.act(action));
        twin.end();
    }

    /// Indices that no driver may write: reported once, nothing more is
    /// fetched, and what was fetched is still returned.
    #[test]
    fn a_broken_ring_is_broken_once(
        size_log in 0u32..7,
        base in base(),
        event_idx in any::<bool>(),
        fetched in 0u16..8,
        head_too_large in any::<bool>(),
        far in prop_oneof![Just(0), any::<u16>()],
    ) {
        let mut twin = Twin::new(1 << size_log, base, 0, event_idx);
        let fetched = fetched.min(twin.size);
        if fetched > 0 {
            twin.act(&Action::Add(fetched));
            twin.act(&Action::Fetch(fetched));
        }
        twin.end_broken(head_too_large, far);
    }
}
