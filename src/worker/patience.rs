//! How long a worker looks before it sleeps.
//!
//! What it is: a sleep and the wake-up after it cost more than a short wait, so
//! a worker may look at the rings and the completions for a while first, with
//! kicks suppressed. Looking costs CPU time, and where guest and disk are served
//! by the same CPUs it slows what is waited for. Whether it pays is found out by
//! doing it: both ways by turns, and comparing what a request takes.
//!
//! What it is not: it looks at nothing itself, and is told the time.
//!
//! Invariant: looking goes on only where it was seen to make requests quicker,
//! and what was found is tried again, ever more rarely: an idle disk, or a slow
//! one, costs nothing.
//!
//! ```text
//!   rest ──► the best way and another one by turns ──► the better of them ─┐
//!    ▲                                                                     │
//!    └──────────── twice as long, if the best one stayed the best ─────────┘
//! ```

use std::time::{Duration, Instant};

use super::Sleep;

/// Waits that go one way before the other way is taken again, and how often
/// that is done: what else changes meanwhile then hits both alike. The first of
/// them do not count: guest, disk and a hypervisor beneath us get used to it.
const TURN: u32 = 128;
const UNCOUNTED: u32 = 32;
const TURNS: u32 = 2;

/// A comparison ends early once a request costs so many times as much the other way. Else, where a
/// look takes half a microsecond, to try sleeping takes as long as all that is between two
/// comparisons.
const HOPELESS: u64 = 3;
/// Waits of a comparison after which that is asked again.
const ASKED_EVERY: u32 = 16;

/// Waits between two comparisons, at the least and at the most.
const LEAST_REST: u32 = 512;
const MOST_REST: u32 = 16 << 10;

/// A wait counts as at most so many lengths of a look: beyond that it makes no
/// difference how it ended.
const LONGEST: u32 = 8;

/// The ways to wait that are compared.
const WAYS: [Sleep; 4] = [
    ALWAYS,
    Sleep { when_idle: false, in_flight: true },
    Sleep { when_idle: true, in_flight: false },
    Sleep { when_idle: false, in_flight: false },
];
const ALWAYS: Sleep = Sleep { when_idle: true, in_flight: true };

/// What a way may cost, in percent of the best one's, to be taken instead: looking is paid for
/// with a CPU, and has to make requests much quicker.
fn percent(way: Sleep, best: Sleep) -> u64 {
    let looks = |way: Sleep| u8::from(!way.when_idle) + u8::from(!way.in_flight);
    match looks(way).cmp(&looks(best)) {
        std::cmp::Ordering::Greater => 55,
        std::cmp::Ordering::Equal => 90,
        std::cmp::Ordering::Less => 150,
    }
}

/// What requests took, one way.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    spent: Duration,
    answered: u64,
}

impl Sum {
    /// Nanoseconds a request.
    fn cost(self) -> Option<u64> {
        u64::try_from(self.spent.as_nanos()).ok()?.checked_div(self.answered)
    }
}

/// See the head of the file.
#[derive(Clone, Debug)]
pub struct Patience {
    /// How long a look is; 0: never look.
    length: Duration,
    best: Sleep,
    /// Index in [`WAYS`] of the way that is compared with it, or was last.
    other: usize,
    /// The waits of a rest; waits of it, or of a comparison, that are over.
    rest: u32,
    waits: u32,
    comparing: bool,
    /// Of a comparison: the best way, and the other one.
    sums: [Sum; 2],
    last: Option<Instant>,
}

impl Patience {
    /// Looks of `length`; 0: never look, always sleep.
    #[must_use]
    pub fn new(length: Duration) -> Self {
        Self {
            length,
            best: ALWAYS,
            other: 0,
            rest: LEAST_REST,
            waits: 0,
            comparing: false,
            sums: [Sum::default(); 2],
            last: None,
        }
    }

    /// 1 if it is the other way's turn, else 0.
    fn turn(&self) -> usize {
        usize::from(self.comparing && self.waits / TURN % 2 == 1)
    }

    /// Whether a turn may sleep, after nothing was found for so long.
    #[must_use]
    pub fn sleep(&self, waited: Duration) -> Sleep {
        let way = if self.turn() == 1 { WAYS[self.other] } else { self.best };
        let over = waited >= self.length;
        Sleep { when_idle: over || way.when_idle, in_flight: over || way.in_flight }
    }

    /// A wait ended, by a look that found something or by a sleep; so many
    /// requests were answered since the last one ended.
    pub fn learn(&mut self, now: Instant, answered: u64) {
        if self.length.is_zero() {
            return;
        }
        let longest = self.length * LONGEST;
        let last = self.last.replace(now).unwrap_or(now);
        if self.waits % TURN >= UNCOUNTED {
            let sum = &mut self.sums[self.turn()];
            sum.spent += now.saturating_duration_since(last).min(longest);
            sum.answered = sum.answered.saturating_add(answered);
        }
        self.waits += 1;
        if self.comparing
            && (self.waits == 2 * TURN * TURNS
                || self.waits.is_multiple_of(ASKED_EVERY) && self.is_hopeless())
        {
            self.decide();
            self.begin(false);
        } else if !self.comparing && self.waits >= self.rest {
            self.other = if self.best == ALWAYS {
                WAYS.len() - 1 // of all that could pay the one that pays most
            } else {
                let next = (self.other + 1) % WAYS.len();
                if WAYS[next] == self.best { (next + 1) % WAYS.len() } else { next }
            };
            self.begin(true);
        }
    }

    fn begin(&mut self, comparing: bool) {
        self.comparing = comparing;
        self.waits = 0;
        self.sums = [Sum::default(); 2];
    }

    fn is_hopeless(&self) -> bool {
        matches!(self.sums.map(Sum::cost), [Some(best), Some(cost)] if cost > best.saturating_mul(HOPELESS))
    }

    fn decide(&mut self) {
        let other = WAYS[self.other];
        // Where nothing was answered nothing was learnt.
        let costs = self.sums.map(Sum::cost);
        if let [Some(best), Some(cost)] = costs
            && cost.saturating_mul(100) <= best.saturating_mul(percent(other, self.best))
        {
            self.best = other;
            self.rest = LEAST_REST;
        } else {
            self.rest = (self.rest * 2).min(MOST_REST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: Duration = Duration::from_micros(50);

    /// A load of one request after another, each of which is waited for twice:
    /// for the driver and for the disk. `took` says how long such a wait takes
    /// when one looks, and when one sleeps.
    struct Load {
        now: Instant,
        dice: u64,
    }

    impl Load {
        fn new() -> Self {
            Self { now: Instant::now(), dice: 1 }
        }

        /// Gives how many looks there were for a hundred requests of the second half.
        fn run(&mut self, patience: &mut Patience, requests: u32, took: impl Fn(bool, bool) -> u64) -> u64 {
            let mut looks = 0;
            for request in 0..requests {
                for disk in [false, true] {
                    let sleep = patience.sleep(Duration::ZERO);
                    let look = !if disk { sleep.in_flight } else { sleep.when_idle };
                    self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let noise = 75 + (self.dice >> 33) % 50; // percent
                    self.now += Duration::from_nanos(took(disk, look) * noise * 10);
                    patience.learn(self.now, u64::from(disk));
                    looks += u64::from(look && request >= requests / 2);
                }
            }
            looks * 100 / u64::from(requests / 2)
        }
    }

    #[test]
    fn it_looks_where_that_pays() {
        let (mut load, mut patience) = (Load::new(), Patience::new(LENGTH));
        let both = load.run(&mut patience, 100_000, |_, look| if look { 5 } else { 20 });
        assert!(both > 180, "both waits are short: {both} looks for a hundred requests");
        let driver = |disk: bool, look: bool| if look && !disk { 3 } else { 20 };
        let idle = load.run(&mut patience, 200_000, driver);
        assert!((85..115).contains(&idle), "only the driver is quick: {idle}");
        let slowed = |disk, look| if disk && look { 70 } else { 40 };
        let none = load.run(&mut patience, 200_000, slowed);
        assert!(none < 10, "looking slows the disk: {none}");
        let again = load.run(&mut patience, 200_000, |_, look| if look { 5 } else { 20 });
        assert!(again > 180, "short again: {again}");
    }

    #[test]
    fn waits_that_are_long_anyway_are_slept_through() {
        let (mut load, mut patience) = (Load::new(), Patience::new(LENGTH));
        let looks = load.run(&mut patience, 100_000, |_, _| 10_000);
        assert!(looks < 10, "{looks}");
    }

    #[test]
    fn a_way_that_is_hopeless_is_not_tried_for_long() {
        let (mut load, mut patience) = (Load::new(), Patience::new(LENGTH));
        load.run(&mut patience, 100_000, |_, look| if look { 5 } else { 20 });
        let (start, requests) = (load.now, 200_000);
        load.run(&mut patience, requests, |_, look| if look { 1 } else { 50 });
        let took = load.now.duration_since(start) / requests;
        assert!(took < Duration::from_nanos(2_600), "two looks take 2 µs, with what is tried {took:?}");
    }

    #[test]
    fn a_gain_that_is_small_is_not_worth_a_cpu() {
        let (mut load, mut patience) = (Load::new(), Patience::new(LENGTH));
        let looks = load.run(&mut patience, 100_000, |_, look| if look { 80 } else { 100 });
        assert!(looks < 10, "{looks}");
    }

    #[test]
    fn without_a_length_it_never_looks() {
        let (mut load, mut patience) = (Load::new(), Patience::new(Duration::ZERO));
        assert_eq!(load.run(&mut patience, 1000, |_, _| 1), 0);
    }
}
