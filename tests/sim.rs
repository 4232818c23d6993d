//! The deterministic simulator: the very worker that ships, in a world whose
//! every event comes from a seed.
//!
//! A seed decides on everything: requests, good and bad, which worker turns next,
//! delays, the order of completions, errors, short and torn transfers, failed
//! write-backs and what they lose, operations that are not executed, when an
//! interrupt or a kick is asked for, when rings stop or break, when the driver
//! changes the cache mode, when the connections to a server are lost and what that drops, when the memory is copied for a migration and whether the
//! image then goes to another host, when the daemon dies (between turns, or inside
//! of one, at any call of its engine) and when the power fails. After each step a
//! model says what may be seen. A seed that fails prints the line that repeats it.
//!
//! Not in it: a disk that grows, a death between the kernel's report of a failed
//! write-back and the daemon's note of it, and deaths between two stores of one
//! call, which `recovery` and `succession` bring about with real signals.

mod bugs;
mod daemon;
mod disk;
mod guest;
mod migration;
mod model;
mod requests;
mod server;
mod session;
mod setup;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use self::bugs::Bug;
use self::guest::{Count, Play};

/// How long fresh seeds are tried, if VUBLK_SEEDS does not say how many.
const TIME: Duration = Duration::from_secs(30);

/// Seeds within which each bug has to be caught.
const SEEDS_FOR_A_BUG: u64 = 1000;

/// One seed, to its end.
fn play(seed: u64, bug: Option<Bug>) -> Result<Count, String> {
    let outcome = catch_unwind(AssertUnwindSafe(|| Play::new(seed, bug).run()));
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
        play(seed, None).unwrap_or_else(|line| {
            eprintln!("sim: {line}");
            panic!("{line}");
        });
        return;
    }
    let wanted = number("VUBLK_SEEDS");
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let (started, mut count) = (Instant::now(), Count::default());
    while wanted.map_or(started.elapsed() < TIME, |n| count.seeds < n) {
        match play(since.wrapping_add(count.seeds.wrapping_mul(0x9e37_79b9)), None) {
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
         {} rings stopped, {} broken, {} migrations, {} to another host, {} changes of the cache mode, {} failed syncs, \
         {} lost servers",
        count.seeds,
        count.turns,
        count.turns / seconds,
        count.requests,
        count.crashes,
        count.power_cuts,
        count.stops,
        count.broken,
        count.migrations,
        count.handed_over,
        count.mode_changes,
        count.failed_syncs,
        count.lost_servers
    );
}

/// A model that finds nothing would be no proof: bugs, each planted by itself, are found within
/// some hundred seeds, and for what they are.
#[test]
fn bugs_on_purpose_are_caught() {
    quiet_crashes();
    for bug in Bug::ALL {
        let found = (1..SEEDS_FOR_A_BUG).find_map(|seed| Some((seed, play(seed, Some(bug)).err()?)));
        let Some((seed, line)) = found else {
            panic!("{bug:?} was not caught in {SEEDS_FOR_A_BUG} seeds");
        };
        let how = line.split_once('#').map_or("", |(_, text)| text.trim());
        eprintln!("sim: {bug:?} caught by seed {seed}: {}", how.lines().next().unwrap_or_default());
        assert!(bug.signs().iter().any(|sign| how.contains(sign)), "{bug:?} was caught for something else");
    }
}
