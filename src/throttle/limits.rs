//! The limits of a disk: their names, which go together, what a request counts for.
//!
//! What it is not: no clock and no lock; [`super`] holds requests to them.
//!
//! Invariant: names and rules are QEMU's (`-drive throttling.*`, `virsh blkdeviotune`). [`Limits`] that were changed by
//! [`Limits::changed`] obey the rules.

use std::collections::BTreeMap;

use crate::request::Command;

/// Limits that can be set beside each other.
pub const COUNT: usize = 6;

/// The names of each limit: its rate, the rate of a burst, and how many seconds a burst lasts.
pub const NAMES: [[&str; 3]; COUNT] = [
    ["iops-total", "iops-total-max", "iops-total-max-length"],
    ["iops-read", "iops-read-max", "iops-read-max-length"],
    ["iops-write", "iops-write-max", "iops-write-max-length"],
    ["bps-total", "bps-total-max", "bps-total-max-length"],
    ["bps-read", "bps-read-max", "bps-read-max-length"],
    ["bps-write", "bps-write-max", "bps-write-max-length"],
];
/// Requests of more bytes than this count as several.
pub const IOPS_SIZE: &str = "iops-size";

/// Largest rate, as in QEMU.
pub const MOST: u64 = 1_000_000_000_000_000;
/// Longest burst, seconds.
pub const LONGEST: u64 = 86_400;

/// What is counted is in billionths: of a request, of a byte.
pub(super) const ONE: u128 = 1_000_000_000;

/// True for the limits of bytes, of the first level of [`NAMES`].
fn counts_bytes(at: usize) -> bool {
    at >= COUNT / 2
}

/// One limit; 0: there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    /// Requests or bytes a second.
    pub rate: u64,
    /// The same in a burst.
    pub max: u64,
    /// Seconds that a burst lasts; 0 is 1.
    pub length: u64,
}

/// The limits of a disk, or of the disks of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    of: [Limit; COUNT],
    iops_size: u64,
}

/// Limits that are to be set, by their names; 0 takes one away. Names may have `_` for `-`.
pub type Change = BTreeMap<String, u64>;

/// What the limits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Charge {
    writes: bool,
    bytes: u64,
}

impl Charge {
    /// Of a request for so many bytes; `None`: its kind is not limited. A FLUSH has no size, a discard is a hint: its
    /// blocks do not count.
    #[must_use]
    pub fn new(command: Command, payload: u64, zeroes: u64) -> Option<Self> {
        match command {
            Command::Read(_) => Some(Self { writes: false, bytes: payload }),
            Command::Write(_) => Some(Self { writes: true, bytes: payload }),
            Command::WriteZeroes => Some(Self { writes: true, bytes: zeroes }),
            Command::Discard => Some(Self { writes: true, bytes: 0 }),
            Command::Flush | Command::GetId => None,
        }
    }
}

/// What a request counts for in each limit, in billionths.
pub(super) type Cost = [u128; COUNT];

impl Limits {
    /// True if there is one.
    #[must_use]
    pub fn any(&self) -> bool {
        self.of.iter().any(|limit| limit.rate > 0)
    }

    pub(super) fn each(&self) -> &[Limit; COUNT] {
        &self.of
    }

    pub(super) fn cost(&self, Charge { writes, bytes }: Charge) -> Cost {
        let ops = match bytes {
            _ if self.iops_size == 0 || bytes <= self.iops_size => ONE,
            _ => u128::from(bytes) * ONE / u128::from(self.iops_size),
        };
        let mut cost = Cost::default();
        for (at, (cost, limit)) in cost.iter_mut().zip(&self.of).enumerate() {
            let is_concerned = match at % (COUNT / 2) {
                0 => true,
                1 => !writes,
                _ => writes,
            };
            if is_concerned && limit.rate > 0 {
                *cost = if counts_bytes(at) { u128::from(bytes) * ONE } else { ops };
            }
        }
        cost
    }

    /// Those that are set, by name.
    pub fn set(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let limits = NAMES.iter().zip(&self.of);
        let named = limits.flat_map(|(names, of)| names.iter().copied().zip([of.rate, of.max, of.length]));
        named.chain([(IOPS_SIZE, self.iops_size)]).filter(|&(_, value)| value > 0)
    }

    /// The same, to be kept and set again.
    #[must_use]
    pub fn as_change(&self) -> Change {
        self.set().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// With what is to be set. A limit that is taken away takes its burst along.
    ///
    /// # Errors
    /// A sentence that says what does not go together.
    pub fn changed(mut self, change: &Change) -> Result<Self, String> {
        let is = |name: &str, known: &str| name.replace('_', "-") == known;
        let value = |known: &str| change.iter().find(|(name, _)| is(name, known)).map(|(_, value)| *value);
        let mut names = NAMES.as_flattened().iter().chain([&IOPS_SIZE]);
        if let Some(name) = change.keys().find(|name| !names.clone().any(|known| is(name, known))) {
            let all: Vec<_> = names.by_ref().map(|name| name.replace('-', "_")).collect();
            return Err(format!("there is no limit {name:?}; there are {}", all.join(", ")));
        }
        for (limit, [rate, max, length]) in self.of.iter_mut().zip(NAMES) {
            match value(rate) {
                Some(0) => *limit = Limit::default(),
                Some(value) => limit.rate = value,
                None => {}
            }
            if let Some(value) = value(max) {
                limit.max = value;
                limit.length = if value == 0 { 0 } else { limit.length };
            }
            limit.length = value(length).unwrap_or(limit.length);
        }
        self.iops_size = value(IOPS_SIZE).unwrap_or(self.iops_size);
        self.check().map(|()| self)
    }

    fn check(&self) -> Result<(), String> {
        for (limit, [rate, max, length]) in self.of.iter().zip(NAMES) {
            let &Limit { rate: base, max: burst, length: seconds } = limit;
            if base > MOST || burst > MOST {
                return Err(format!("--{}: use {MOST} at most", if base > MOST { rate } else { max }));
            }
            if seconds > LONGEST {
                return Err(format!("--{length}={seconds}: use {LONGEST} seconds at most"));
            }
            if burst > 0 && base == 0 {
                return Err(format!("--{max} is the rate of a burst above --{rate}: add --{rate}"));
            }
            if burst > 0 && burst < base {
                return Err(format!(
                    "--{max}={burst} is less than --{rate}={base}: a burst is faster, use more than {base}"
                ));
            }
            if seconds > 0 && burst == 0 {
                return Err(format!("--{length} is how long a burst of --{max} lasts: add --{max}"));
            }
        }
        for (limits, names) in self.of.chunks(COUNT / 2).zip(NAMES.chunks(COUNT / 2)) {
            let set = |at: usize| limits.get(at).is_some_and(|limit| limit.rate > 0);
            let name = |at: usize| names.get(at).map_or("", |[name, ..]| name);
            if let Some(at) = (1..limits.len()).find(|&at| set(0) && set(at)) {
                return Err(format!(
                    "--{} and --{} exclude each other: the total is of reads and writes together. Take one away",
                    name(0),
                    name(at)
                ));
            }
        }
        let counts_requests = self.of.iter().take(COUNT / 2).any(|limit| limit.rate > 0);
        if self.iops_size > 0 && !counts_requests {
            return Err(format!(
                "--{IOPS_SIZE} says which requests count as several: add --iops-total, --iops-read or --iops-write"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(change: &[(&str, u64)]) -> Result<Limits, String> {
        Limits::default().changed(&change.iter().map(|&(name, value)| (name.to_owned(), value)).collect())
    }

    #[test]
    fn what_goes_together() {
        for (change, why) in [
            (&[("iops-total", 5), ("iops-read", 5)][..], "--iops-total and --iops-read exclude each other"),
            (&[("bps_total", 5), ("bps_write", 5)], "--bps-total and --bps-write exclude each other"),
            (&[("iops-read-max", 5)], "add --iops-read"),
            (&[("bps-write", 5), ("bps-write-max", 4)], "less than --bps-write=5"),
            (&[("bps-write", 5), ("bps-write-max-length", 4)], "add --bps-write-max"),
            (&[("iops-size", 5), ("bps-write", 4)], "add --iops-total"),
            (&[("iops-write", MOST + 1)], "at most"),
            (&[("iops-write", 1), ("iops-write-max", 2), ("iops-write-max-length", LONGEST + 1)], "at most"),
            (&[("iops", 1)], "there are iops_total, "),
        ] {
            let refused = limits(change).expect_err("refused");
            assert!(refused.contains(why), "{change:?}: {refused}");
        }
        let some = limits(&[("iops-total", 5), ("bps-read", 5), ("bps-write", 7), ("bps-write-max", 7)]);
        let some = some.expect("it goes together");
        let burst = [("bps_write", 0)].map(|(name, value)| (name.to_owned(), value)).into();
        assert_eq!(some.changed(&burst), limits(&[("iops_total", 5), ("bps_read", 5)]));
        assert_eq!(Limits::default().changed(&some.as_change()), Ok(some));
    }

    #[test]
    fn what_a_request_counts_for() {
        let of = limits(&[("iops-total", 5), ("iops-size", 4096), ("bps-read", 7), ("bps-write", 7)]);
        let of = of.expect("it goes together");
        let cost = |command, payload, zeroes| Charge::new(command, payload, zeroes).map(|c| of.cost(c));
        let milli = |[ops, read, write]: [u64; 3]| {
            let [ops, read, write] = [ops, read, write].map(|n| u128::from(n) * ONE / 1000);
            Some([ops, 0, 0, 0, read, write])
        };
        assert_eq!(cost(Command::Read(0), 512, 0), milli([1000, 512_000, 0]));
        assert_eq!(cost(Command::Write(0), 6144, 0), milli([1500, 0, 6_144_000]));
        assert_eq!(cost(Command::WriteZeroes, 0, 8192), milli([2000, 0, 8_192_000]));
        assert_eq!(cost(Command::Discard, 0, 8192), milli([1000, 0, 0]));
        assert_eq!(cost(Command::Flush, 0, 0), None);
    }
}
