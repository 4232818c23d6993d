//! The deterministic simulator: the very worker that ships, in a world whose
//! every event comes from a seed.
//!
//! A seed decides on everything: requests, good and bad, delays, the order of
//! completions, errors, short and torn transfers, when an interrupt or a kick is
//! asked for, when rings stop or break, when the memory is copied for a migration,
//! when the daemon dies (between turns, or inside of one, at any call of its
//! engine) and when the power fails. After each step a model says what may be
//! seen. A seed that fails prints the line that repeats it.
//!
//! Not in it: more than one worker, a disk that grows, and deaths between two
//! stores of one call, which `recovery` and `succession` bring about with real
//! signals.

mod daemon;
mod guest;
mod migration;
mod model;
mod requests;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use self::guest::{Count, Play};

/// How long fresh seeds are tried, if VUBLK_SEEDS does not say how many.
const TIME: Duration = Duration::from_secs(30);

/// One seed, to its end.
fn play(seed: u64) -> Result<Count, String> {
    let outcome = catch_unwind(AssertUnwindSafe(|| Play::new(seed).run()));
    outcome.map_err(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
            .unwrap_or_default();
        format!("VUBLK_SEED={seed} cargo test --test main sim::   # {text}")
    })
}

/// Panics of a crash are no news; those of a failed check are told by who catches
/// them.
fn quiet_crashes() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let name = std::thread::current().name().map(str::to_owned).unwrap_or_default();
            if !info.payload().is::<world::Crash>() && !name.starts_with("sim::") {
                loud(info);
            }
        }));
    });
}

/// Fresh seeds for a while, or as many as VUBLK_SEEDS says, or the one of
/// VUBLK_SEED.
#[test]
fn seeds() {
    quiet_crashes();
    let number = |name| std::env::var(name).ok().and_then(|n: String| n.parse::<u64>().ok());
    if let Some(seed) = number("VUBLK_SEED") {
        play(seed).unwrap_or_else(|line| {
            eprintln!("sim: {line}");
            panic!("{line}");
        });
        return;
    }
    let wanted = number("VUBLK_SEEDS");
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let (started, mut count) = (Instant::now(), Count::default());
    while wanted.map_or(started.elapsed() < TIME, |n| count.seeds < n) {
        match play(since.wrapping_add(count.seeds.wrapping_mul(0x9e37_79b9))) {
            Ok(more) => count.add(more),
            Err(line) => {
                eprintln!("sim: after {} seeds: {line}", count.seeds);
                panic!("{line}");
            }
        }
    }
    let seconds = started.elapsed().as_secs().max(1);
    eprintln!(
        "sim: {} seeds in {seconds} s, {} turns with work in them ({} a second), {} requests, {} crashes, {} power cuts, \
         {} rings stopped, {} broken, {} migrations",
        count.seeds,
        count.turns,
        count.turns / seconds,
        count.requests,
        count.crashes,
        count.power_cuts,
        count.stops,
        count.broken,
        count.migrations
    );
}

/// A model that finds nothing would be no proof: classic bugs, each turned on by
/// itself, are found within some hundred seeds, and for what they are. `cargo test
/// --features bugs`.
#[cfg(feature = "bugs")]
#[test]
fn classic_bugs_are_caught() {
    use vublk::bugs::{self, Bug};
    quiet_crashes();
    for bug in Bug::ALL {
        // What a model may say of it; which comes first is the seed's affair.
        let signs: &[&str] = match bug {
            Bug::PublishBeforeStatus => &["status 0xff of"],
            Bug::ForgetOneHead => &["does not answer a command", "no answer in", "was lost"],
            Bug::FlushWithoutSync | Bug::SyncOfEarlier | Bug::AnsweredBeforeSync => {
                &["after a power cut, not"]
            }
            Bug::ReplayFromFrontEndsBase => &["came back twice", "no answer in", "was lost", "are answered"],
            Bug::StaleSignal => &["an interrupt was lost"],
            Bug::UnmarkedRead => &["was written and not marked"],
            Bug::NeighbourUndone => &["reads as", "in the end, not", "after a power cut, not"],
        };
        bugs::set(Some(bug));
        let found = (1..5000).find_map(|seed| play(seed).err().map(|line| (seed, line)));
        bugs::set(None);
        let Some((seed, line)) = found else { panic!("{bug:?} was not caught in 5000 seeds") };
        let how = line.split_once('#').map_or("", |(_, text)| text.trim());
        eprintln!("sim: {bug:?} caught by seed {seed}: {}", how.lines().next().unwrap_or_default());
        assert!(signs.iter().any(|sign| how.contains(sign)), "{bug:?} was caught for something else");
    }
}
