//! Cuts the power at every place of a log, and compares what the disk may then hold with what was promised.

use std::collections::BTreeSet;
use std::ops::Range;

use super::promises::{Content, Promises, content};
use crate::support::blocklog::{Entry, Log};
use crate::support::disk::SECTOR;

/// What a log showed.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Places at which the power was cut.
    pub cuts: usize,
    /// Of these: those at which a sector could hold more than one thing.
    pub open: usize,
    pub syncs: usize,
    /// Syncs that reached the disk while changes were under way, which they do not cover.
    pub crossed: usize,
    /// Contents of a sector that were compared with its promises.
    pub compared: usize,
    /// The first broken promises.
    pub broken: Vec<String>,
    pub violations: usize,
}

impl Verdict {
    pub fn add(&mut self, other: Self) {
        self.cuts += other.cuts;
        self.open += other.open;
        self.syncs += other.syncs;
        self.crossed += other.crossed;
        self.compared += other.compared;
        self.violations += other.violations;
        self.broken.extend(other.broken);
    }
}

/// A change that a sector may hold, and what that would be.
#[derive(Clone, Copy)]
struct Candidate {
    change: usize,
    holds: Content,
}

/// See the head of the file.
pub fn judge(log: &Log, promises: &Promises) -> Verdict {
    let mut verdict = Verdict::default();
    let sectors = promises.sectors() as usize;
    // Of each sector: all that it may hold. The change that the disk began with has no number.
    let start = Candidate { change: usize::MAX, holds: Content::Zeroes };
    let mut candidates = vec![vec![start]; sectors];
    let mut oldest = vec![0; sectors];
    let (mut begun, mut ended) = (vec![0; log.changes.len()], vec![usize::MAX; log.changes.len()]);
    let mut volatile: Vec<usize> = Vec::new();
    let mut open: BTreeSet<u64> = BTreeSet::new();
    let mut made = promises.made.iter().peekable();
    let range = |change: usize| -> Range<u64> {
        let change = &log.changes[change];
        assert!(change.at.is_multiple_of(SECTOR) && change.data.len().is_multiple_of(SECTOR));
        (change.at / SECTOR) as u64..((change.at + change.data.len()) / SECTOR) as u64
    };
    for cut in 0..=log.entries.len() {
        // Between two cuts only these sectors, or what was promised of them, have changed.
        let mut touched: BTreeSet<u64> = BTreeSet::new();
        match cut.checked_sub(1).map(|place| (place, log.entries[place])) {
            Some((place, Entry::Begun(change))) => {
                begun[change] = place;
                volatile.push(change);
                for (sector, bytes) in range(change).zip(log.changes[change].data.chunks(SECTOR)) {
                    let under_way =
                        |other: &Candidate| other.change != usize::MAX && ended[other.change] == usize::MAX;
                    if candidates[sector as usize].iter().any(under_way) {
                        verdict.blame(format!(
                            "cut {cut}: two changes of sector {sector} were under way at once"
                        ));
                    }
                    candidates[sector as usize].push(Candidate { change, holds: content(sector, bytes) });
                    touched.insert(sector);
                }
            }
            Some((place, Entry::Ended(change))) => ended[change] = place,
            Some((_, Entry::Synced { since })) => {
                verdict.syncs += 1;
                verdict.crossed += usize::from(
                    volatile.iter().any(|&change| begun[change] < since && ended[change] >= since),
                );
                for change in volatile.extract_if(.., |change| ended[*change] < since) {
                    for sector in range(change) {
                        // What had ended before a change that is durable began cannot come back.
                        candidates[sector as usize].retain(|other| {
                            other.change != usize::MAX
                                && (other.change == change || ended[other.change] > begun[change])
                        });
                        touched.insert(sector);
                    }
                }
            }
            None => {}
        }
        while let Some(promise) = made.next_if(|promise| promise.from <= cut) {
            oldest[promise.sector as usize] = promise.version;
            touched.insert(promise.sector);
        }
        for sector in touched {
            let (held, oldest) = (&candidates[sector as usize], oldest[sector as usize]);
            verdict.compared += held.len();
            if held.len() > 1 {
                open.insert(sector);
            } else {
                open.remove(&sector);
            }
            for candidate in held.iter().filter(|candidate| !promises.allow(sector, candidate.holds, oldest))
            {
                verdict.blame(format!(
                    "cut {cut}: sector {sector} may hold {:?}, and was to hold one of {}",
                    candidate.holds,
                    promises.tell(sector, oldest)
                ));
            }
        }
        verdict.cuts += 1;
        verdict.open += usize::from(!open.is_empty());
    }
    assert!(made.next().is_none(), "a promise from beyond the end of the log");
    verdict
}

impl Verdict {
    fn blame(&mut self, what: String) {
        self.violations += 1;
        if self.broken.len() < 5 {
            self.broken.push(what);
        }
    }
}
