//! What `vublk top` knows.
//!
//! What it is: pure. The disks, what each did from second to second, and what the keys have chosen.
//!
//! What it is not: it reads no clock; times are since the program began.
//!
//! Invariant: what a disk is called, and why it does not answer, may be shown on a terminal as it is here.

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::time::Duration;

use crate::find::Place;
use crate::rates::{Key, Rates, Sample};
use crate::stats::histogram::Histogram;
use crate::tool::printable;

/// Seconds of a disk that are kept: no screen is wider.
const HISTORY: usize = 1000;
/// A disk that was not heard of for so long does not answer.
const SILENCE: Duration = Duration::from_secs(3);

/// What the disks are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sort {
    #[default]
    Name,
    Requests,
    Bytes,
    P99,
    Depth,
}

impl Sort {
    pub(super) fn next(self) -> Self {
        match self {
            Self::Name => Self::Requests,
            Self::Requests => Self::Bytes,
            Self::Bytes => Self::P99,
            Self::P99 => Self::Depth,
            Self::Depth => Self::Name,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Requests => "requests per second",
            Self::Bytes => "bytes per second",
            Self::P99 => "p99",
            Self::Depth => "requests in flight",
        }
    }
}

/// Where the selection goes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Move {
    Up,
    Down,
    First,
    Last,
}

/// A second of a disk.
#[derive(Clone, Debug)]
pub(super) struct Point {
    /// Which one.
    pub(super) second: u64,
    /// How long it was.
    pub(super) seconds: f64,
    /// How long the requests took that ended in it.
    pub(super) times: Histogram,
    /// Requests in flight: the mean.
    pub(super) depth: f64,
}

#[derive(Debug)]
pub(super) struct Disk {
    pub(super) place: Place,
    pub(super) name: String,
    /// When it was last asked with success, and what it had counted then.
    heard: Option<(Duration, Sample)>,
    /// Since it is served, at first; then of the last second.
    pub(super) rates: Option<Rates>,
    /// The oldest first.
    pub(super) history: VecDeque<Point>,
    why: String,
    /// Until when nothing of it was wanted.
    unwanted: Duration,
}

impl Disk {
    fn new(place: Place) -> Self {
        let name = printable(&place.name()).replace('\n', "\\n");
        Self {
            place,
            name,
            heard: None,
            rates: None,
            history: VecDeque::new(),
            why: String::new(),
            unwanted: Duration::ZERO,
        }
    }

    fn counted(&mut self, at: Duration, sample: Sample) {
        let before = self.heard.as_ref().map(|(then, sample)| (sample, at.saturating_sub(*then)));
        let rates = Rates::between(before.map(|(sample, time)| (sample, time.as_secs_f64())), &sample);
        if let Some((_, time)) = before {
            // As many seconds as there were, to the nearest, so that no drift leaves a gap.
            let next = u64::try_from((time.as_millis() + 500) / 1000).unwrap_or(1).max(1);
            let second = self.history.back().map_or(0, |last| last.second) + next;
            let (times, depth) = (rates.all().latency, rates.depth());
            self.history.push_back(Point { second, seconds: time.as_secs_f64(), times, depth });
            if self.history.len() > HISTORY {
                self.history.pop_front();
            }
        }
        self.rates = Some(rates);
        self.heard = Some((at, sample));
        self.why.clear();
    }

    /// Errors since it is served.
    pub(super) fn errors(&self) -> u64 {
        self.heard.as_ref().map_or(0, |(_, sample)| sample.errors())
    }

    /// Since when it has not answered, and why.
    pub(super) fn silence(&self, now: Duration) -> Option<(Duration, &str)> {
        let heard = self.heard.as_ref().map_or(Duration::ZERO, |(at, _)| *at);
        let silent = now.saturating_sub(heard.max(self.unwanted));
        (silent > SILENCE || self.heard.is_none()).then_some((silent, self.why.as_str()))
    }

    /// What counts for the order; more comes first.
    fn weight(&self, sort: Sort) -> f64 {
        let Some(rates) = &self.rates else { return 0.0 };
        match sort {
            Sort::Name => 0.0,
            Sort::Requests => rates.per_second(rates.all().requests),
            Sort::Bytes => rates.per_second(rates.all().bytes),
            Sort::P99 => rates.all().within(0.99),
            Sort::Depth => rates.depth(),
        }
    }
}

/// See the head of the file.
#[derive(Debug, Default)]
pub(super) struct Model {
    disks: Vec<Disk>,
    selected: Option<Place>,
    pub(super) sort: Sort,
    /// What is shown stays.
    pub(super) paused: bool,
    pub(super) help: bool,
    pub(super) now: Duration,
}

/// True if this is one of the disks that `of` names: a disk, or all of a daemon.
fn is_of(disk: &Place, of: &Place) -> bool {
    disk.control == of.control && (of.disk.is_none() || of.disk == disk.disk)
}

impl Model {
    /// Time goes on, but for what is shown while that stays.
    pub(super) fn go_on(&mut self, now: Duration) {
        if !self.paused {
            self.now = now;
        }
    }

    /// What is shown stays, or goes on from now.
    pub(super) fn pause(&mut self, now: Duration) {
        self.paused = !self.paused;
        self.disks.iter_mut().for_each(|disk| disk.unwanted = now);
    }

    /// What the disks of a daemon, or one of them, had counted when it was asked.
    pub(super) fn counted(&mut self, of: &Place, at: Duration, all: Vec<(Key, Sample)>) {
        if self.paused {
            return;
        }
        self.disks
            .retain(|disk| !is_of(&disk.place, of) || all.iter().any(|((place, _), _)| *place == disk.place));
        for ((place, _), sample) in all {
            match self.disks.iter_mut().find(|disk| disk.place == place) {
                Some(disk) => disk.counted(at, sample),
                None => {
                    let mut disk = Disk::new(place);
                    disk.counted(at, sample);
                    self.disks.push(disk);
                }
            }
        }
    }

    /// A daemon does not answer.
    pub(super) fn silent(&mut self, of: &Place, why: &str) {
        if !self.disks.iter().any(|disk| is_of(&disk.place, of)) {
            self.disks.push(Disk::new(of.clone()));
        }
        let why = printable(why).replace('\n', " ");
        self.disks
            .iter_mut()
            .filter(|disk| is_of(&disk.place, of))
            .for_each(|disk| disk.why.clone_from(&why));
    }

    /// A daemon is gone.
    pub(super) fn gone(&mut self, of: &Place) {
        self.disks.retain(|disk| !is_of(&disk.place, of));
    }

    /// The disks in their order.
    pub(super) fn sorted(&self) -> Vec<&Disk> {
        let mut disks: Vec<&Disk> = self.disks.iter().collect();
        disks.sort_by(|one, other| {
            let [weight, others] = [one, other].map(|disk| disk.weight(self.sort));
            let by_weight = others.partial_cmp(&weight).unwrap_or(Ordering::Equal);
            by_weight.then_with(|| one.name.cmp(&other.name))
        });
        disks
    }

    /// Where the selected disk is among them: the first one, where none was selected or it is gone.
    pub(super) fn selected(&self, disks: &[&Disk]) -> usize {
        disks.iter().position(|disk| Some(&disk.place) == self.selected.as_ref()).unwrap_or(0)
    }

    pub(super) fn select(&mut self, to: Move) {
        let disks = self.sorted();
        let (at, last) = (self.selected(&disks), disks.len().saturating_sub(1));
        let at = match to {
            Move::Up => at.saturating_sub(1),
            Move::Down => (at + 1).min(last),
            Move::First => 0,
            Move::Last => last,
        };
        self.selected = disks.get(at).map(|disk| disk.place.clone());
    }
}
