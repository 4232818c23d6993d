//! How long requests took, as counts in fixed buckets.
//!
//! What it is: pure. Eight buckets for each power of two from 1.024 µs to 68.7 s, one for what is shorter and one for
//! what is longer: a bucket is at most an eighth of its time wide, and two histograms are merged by adding counts.
//!
//! What it is not: it knows no request and no clock.
//!
//! Invariant: the bounds are the same in every version, since counts outlive the process that counted them.
//!
//! ```text
//!   bucket 0        less than 2^10 ns
//!   bucket 1 + i    from (8 + i % 8) * 2^(7 + i / 8) ns, for i from 0 to 207
//!   bucket 209      2^36 ns and more
//! ```

use serde::{Deserialize, Serialize};

/// Powers of two, in nanoseconds, at which the first and the last bucket end and begin.
const FIRST: u32 = 10;
const LAST: u32 = 36;
/// Buckets of one power of two, as a power of two.
const PARTS: u32 = 3;
/// Buckets of a histogram.
pub const BUCKETS: usize = 2 + (((LAST - FIRST) as usize) << PARTS);

/// The bucket of a time in nanoseconds.
#[inline]
#[must_use]
pub fn bucket(ns: u64) -> usize {
    if ns >> FIRST == 0 {
        return 0;
    }
    let power = 63 - ns.leading_zeros();
    if power >= LAST {
        return BUCKETS - 1;
    }
    // The bits below the highest one say which part of the power it is.
    let part = (ns >> (power - PARTS)) & ((1 << PARTS) - 1);
    let before = u64::from(power - FIRST) << PARTS;
    usize::try_from(1 + before + part).unwrap_or(0)
}

/// Nanoseconds at which a bucket ends and the next one begins. `None`: the last bucket has no end.
#[must_use]
pub fn end(bucket: usize) -> Option<u64> {
    if bucket + 1 >= BUCKETS {
        return None;
    }
    let power = u32::try_from(bucket >> PARTS).ok()?;
    let part = u64::try_from(bucket & ((1 << PARTS) - 1)).ok()?;
    Some(((1 << PARTS) + part) << (FIRST - PARTS + power))
}

/// Counts, without the zeroes at both ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// The bucket of the first of `counts`.
    pub first_bucket: usize,
    /// Requests in this bucket and in those after it.
    pub counts: Vec<u64>,
}

impl Histogram {
    /// Of the counts of all buckets.
    #[must_use]
    pub fn of(all: &[u64]) -> Self {
        let first_bucket = all.iter().position(|&count| count > 0).unwrap_or(0);
        let end = all.iter().rposition(|&count| count > 0).map_or(first_bucket, |last| last + 1);
        Self { first_bucket, counts: all.get(first_bucket..end).unwrap_or_default().to_vec() }
    }

    /// The count of a bucket.
    #[must_use]
    pub fn count(&self, bucket: usize) -> u64 {
        let at = bucket.checked_sub(self.first_bucket);
        at.and_then(|at| self.counts.get(at)).copied().unwrap_or(0)
    }

    /// What was counted since `before`; all of it if another daemon began anew meanwhile.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let began_anew = (0..BUCKETS).any(|bucket| self.count(bucket) < before.count(bucket));
        let more = |bucket| {
            let count = self.count(bucket);
            if began_anew { count } else { count - before.count(bucket) }
        };
        Self::of(&(0..BUCKETS).map(more).collect::<Vec<_>>())
    }

    /// Both together.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let both = |bucket| self.count(bucket).saturating_add(other.count(bucket));
        Self::of(&(0..BUCKETS).map(both).collect::<Vec<_>>())
    }

    /// The time in nanoseconds within which this share of the requests, 0.0 to 1.0, were done: where it falls into a
    /// bucket, requests are taken to be spread evenly over it. `None`: there were none.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let total: u64 = self.counts.iter().fold(0, |sum, &count| sum.saturating_add(count));
        if total == 0 {
            return None;
        }
        let wanted = share * total as f64;
        let mut below = 0.0;
        for bucket in (0..BUCKETS).filter(|&bucket| self.count(bucket) > 0) {
            let count = self.count(bucket) as f64;
            if below + count >= wanted {
                let from = bucket.checked_sub(1).and_then(end).unwrap_or(0) as f64;
                let to = end(bucket).map_or(from, |end| end as f64);
                return Some(from + (to - from) * ((wanted - below) / count).clamp(0.0, 1.0));
            }
            below += count;
        }
        None // not reached: the counts are those of the total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_in_the_bucket_whose_bounds_hold_it() {
        let edges = (0..64).flat_map(|power| [1_u64 << power, (1 << power) + 1, (1 << power) - 1]);
        let all = edges.chain((0..BUCKETS).filter_map(end).flat_map(|end| [end - 1, end]));
        for ns in all.chain([0, 1_000, 12_345, 999_999_999, u64::MAX]) {
            let at = bucket(ns);
            assert!(at < BUCKETS);
            assert!(
                end(at).is_none_or(|end| ns < end),
                "{ns} ns in bucket {at}, which ends at {:?}",
                end(at)
            );
            assert!(at == 0 || end(at - 1).is_some_and(|begin| ns >= begin), "{ns} ns in bucket {at}");
        }
        assert_eq!((end(0), end(1), end(8)), (Some(1024), Some(1152), Some(2048)));
        assert_eq!((end(BUCKETS - 2), end(BUCKETS - 1)), (Some(1 << 36), None));
    }

    #[test]
    fn quantiles_are_within_a_bucket_of_the_truth() {
        let mut counts = [0; BUCKETS];
        let times: Vec<u64> = (1..=10_000).map(|n| n * 1_000).collect();
        times.iter().for_each(|&ns| counts[bucket(ns)] += 1);
        let histogram = Histogram::of(&counts);
        for (share, want) in [(0.5, 5e6), (0.99, 9.9e6), (1.0, 1e7)] {
            let got = histogram.quantile(share).unwrap_or(0.0);
            assert!((got - want).abs() <= want / 8.0, "{share}: {got} for {want}");
        }
        assert_eq!(Histogram::default().quantile(0.5), None);
    }

    #[test]
    fn what_was_counted_since_and_after_a_new_beginning() {
        let of = |pairs: &[(usize, u64)]| {
            let mut counts = [0; BUCKETS];
            pairs.iter().for_each(|&(at, count)| counts[at] = count);
            Histogram::of(&counts)
        };
        let (before, now) = (of(&[(3, 5), (9, 1)]), of(&[(3, 7), (9, 1), (40, 2)]));
        assert_eq!(now.since(&before), of(&[(3, 2), (40, 2)]));
        assert_eq!(now.since(&Histogram::default()), now);
        assert_eq!(before.since(&now), before, "a daemon that began anew");
        assert_eq!(of(&[]), Histogram::default());
    }
}
