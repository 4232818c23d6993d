//! What `vublk stat` prints: what disks, or their queues, did in an interval, as `iostat -x` tells it of block devices.
//!
//! What it is: a [`Sample`] of what daemons have counted, the difference of two, and a line for each disk or queue.
//!
//! What it is not: it measures nothing; daemons do.
//!
//! Invariant: where a daemon began to count anew, what it has counted since then is what was done.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::find::Place;
use crate::notes::Note;
use crate::rpc::CallError;
use crate::status::{Done, Errors, QueueStatus, QueuesStatus};

/// What was counted of a disk or a queue.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Sample {
    in_flight: u32,
    operations: BTreeMap<String, Done>,
    errors: Errors,
    /// Of a disk.
    #[serde(default)]
    served_seconds: f64,
    /// Of the disk, also where it is a queue's.
    #[serde(skip)]
    notes: Vec<Note>,
}

impl Sample {
    /// Of what a daemon answers to `status` of a disk.
    ///
    /// # Errors
    /// It is something else.
    pub fn of(mut status: Value) -> serde_json::Result<Self> {
        let notes = Note::all(&status);
        let disk = status.get_mut("disk").map(Value::take).unwrap_or_default();
        Ok(Self { notes, ..Self::deserialize(disk)? })
    }

    /// Requests that were answered with an error, and chains that were returned without a status.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.errors.all()
    }
}

/// Which disk, and which of its queues.
pub type Key = (Place, Option<u16>);

/// What a daemon has counted until now: of the disk, or of each of its disks where none is named; by queue if that is
/// wanted.
///
/// # Errors
/// [`CallError`].
pub fn sample(place: &Place, queues: bool) -> Result<Vec<(Key, Sample)>, CallError> {
    let status = place.ask("status", json!({}))?;
    let Some(disks) = status.get("disks").and_then(Value::as_array) else {
        return sample_disk(place, status, queues);
    };
    let mut all = Vec::new();
    // One that has failed, or starts, has counted nothing.
    for disk in disks.iter().filter(|disk| disk.get("disk").is_some()) {
        let disk = disk.get("name").and_then(Value::as_str).map(str::to_owned);
        let place = Place { control: place.control.clone(), disk };
        // The histograms are told of one disk.
        let status = place.ask("status", json!({}))?;
        all.extend(sample_disk(&place, status, queues)?);
    }
    Ok(all)
}

fn sample_disk(place: &Place, status: Value, queues: bool) -> Result<Vec<(Key, Sample)>, CallError> {
    let strange = |e: serde_json::Error| {
        CallError::Refused(format!("{}: not the status of a vublkd: {e}", place.control.display()))
    };
    let disk = Sample::of(status).map_err(strange)?;
    if !queues {
        return Ok(vec![((place.clone(), None), disk)]);
    }
    let (mut all, mut next) = (Vec::new(), Some(0));
    while let Some(from) = next {
        let some =
            QueuesStatus::deserialize(place.ask("queues", json!({ "from": from }))?).map_err(strange)?;
        next = some.next.filter(|next| *next > from);
        all.extend(some.queues.into_iter().map(|queue| {
            let QueueStatus { index, in_flight, operations, errors, .. } = queue;
            let Sample { served_seconds, ref notes, .. } = disk;
            let sample = Sample { in_flight, operations, errors, served_seconds, notes: notes.clone() };
            ((place.clone(), Some(index)), sample)
        }));
    }
    Ok(all)
}

/// What was done in a time.
#[derive(Debug)]
pub struct Rates {
    seconds: f64,
    in_flight: u32,
    operations: BTreeMap<String, Done>,
    errors: Errors,
    notes: Vec<Note>,
}

fn since(now: &Done, before: Option<&Done>) -> Done {
    match before {
        Some(before) if before.requests <= now.requests && before.bytes <= now.bytes => Done {
            requests: now.requests - before.requests,
            bytes: now.bytes - before.bytes,
            seconds: (now.seconds - before.seconds).max(0.0),
            latency: now.latency.since(&before.latency),
        },
        _ => now.clone(),
    }
}

/// Of several operations together.
fn together<'a>(all: impl Iterator<Item = &'a Done>) -> Done {
    all.fold(Done::default(), |sum, one| Done {
        requests: sum.requests.saturating_add(one.requests),
        bytes: sum.bytes.saturating_add(one.bytes),
        seconds: sum.seconds + one.seconds,
        latency: sum.latency.and(&one.latency),
    })
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn over(count: u64, by: f64) -> f64 {
    if by > 0.0 { count as f64 / by } else { 0.0 }
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn mean(sum: f64, requests: u64) -> f64 {
    if requests > 0 { sum / requests as f64 } else { 0.0 }
}

impl Done {
    /// Milliseconds within which this share of the requests were done; 0 if there were none.
    #[must_use]
    pub fn within(&self, share: f64) -> f64 {
        self.latency.quantile(share).map_or(0.0, |ns| ns / 1e6)
    }

    /// Milliseconds that they took: the mean.
    #[must_use]
    pub fn await_ms(&self) -> f64 {
        mean(self.seconds * 1e3, self.requests)
    }

    #[expect(clippy::cast_precision_loss, reason = "for people")]
    fn request_bytes(&self) -> f64 {
        mean(self.bytes as f64, self.requests)
    }
}

impl Rates {
    /// Between two samples, so many seconds apart; without an earlier one since the disk is served.
    #[must_use]
    pub fn between(before: Option<(&Sample, f64)>, now: &Sample) -> Self {
        let (seconds, errors) = match before {
            Some((before, seconds)) => (seconds, now.errors.since(before.errors)),
            None => (now.served_seconds, now.errors),
        };
        let of = |name: &String| before.and_then(|(before, _)| before.operations.get(name));
        let operations = now.operations.iter().map(|(name, done)| (name.clone(), since(done, of(name))));
        Self {
            seconds,
            in_flight: now.in_flight,
            operations: operations.collect(),
            errors,
            notes: now.notes.clone(),
        }
    }

    /// What was done of some operations together.
    #[must_use]
    pub fn of(&self, names: &[&str]) -> Done {
        together(names.iter().filter_map(|name| self.operations.get(*name)))
    }

    /// What was done of all.
    #[must_use]
    pub fn all(&self) -> Done {
        together(self.operations.values())
    }

    /// Requests, or bytes, per second.
    #[must_use]
    pub fn per_second(&self, count: u64) -> f64 {
        over(count, self.seconds)
    }

    /// What else there is to say of the disk at the end, the gravest first.
    #[must_use]
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// Requests in flight at the end.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// The mean number of requests in flight; where none has ended, as on a disk that is held or hangs, how many there are.
    #[must_use]
    pub fn depth(&self) -> f64 {
        let busy: f64 = self.operations.values().map(|done| done.seconds).sum();
        if busy <= 0.0 {
            return self.in_flight.into();
        }
        if self.seconds > 0.0 { busy / self.seconds } else { 0.0 }
    }

    /// A line for people; see [`HEAD`].
    #[must_use]
    pub fn line(&self, name: &str) -> String {
        let mut line = format!("{name:<width$}", width = NAME);
        let mut number = |value: f64, digits: usize| {
            let _never = write!(line, " {value:>9.digits$}");
        };
        // A guest's kernel counts zeroes among the writes, too.
        for names in [&["read"][..], &["write", "zeroes"], &["discard"]] {
            let done = self.of(names);
            number(over(done.requests, self.seconds), 1);
            number(over(done.bytes, self.seconds) / 1024.0, 1);
            number(done.await_ms(), 3);
            number(done.request_bytes() / 1024.0, 1);
            if names != ["discard"] {
                number(done.within(0.5), 3);
                number(done.within(0.99), 3);
            }
        }
        let flush = self.of(&["flush"]);
        number(over(flush.requests, self.seconds), 1);
        number(flush.await_ms(), 3);
        number(self.depth(), 2);
        number(f64::from(self.in_flight), 0);
        let _never = write!(line, " {:>6}", self.errors.all());
        if !self.notes.is_empty() {
            let _never = write!(line, "  {}", Note::words(&self.notes));
        }
        line.push('\n');
        line
    }

    /// The same for programs: each operation by itself.
    #[must_use]
    pub fn json(&self) -> Value {
        let operations = self.operations.iter().map(|(name, done)| {
            let told = json!({
                "requests_per_second": over(done.requests, self.seconds),
                "bytes_per_second": over(done.bytes, self.seconds),
                "request_bytes": done.request_bytes(),
                "await_ms": done.await_ms(),
                "p50_ms": done.within(0.5),
                "p99_ms": done.within(0.99),
                "requests": done.requests,
                "bytes": done.bytes,
            });
            (name.clone(), told)
        });
        json!({
            "seconds": self.seconds,
            "in_flight": self.in_flight,
            "mean_in_flight": self.depth(),
            "operations": operations.collect::<serde_json::Map<_, _>>(),
            "errors": self.errors,
            "notes": self.notes.iter().map(Note::word).collect::<Vec<_>>(),
        })
    }
}

const NAME: usize = 16;

/// What the columns are.
#[must_use]
pub fn head() -> String {
    let columns = [
        "r/s", "rkB/s", "r_await", "rareq-sz", "r_p50", "r_p99", "w/s", "wkB/s", "w_await", "wareq-sz",
        "w_p50", "w_p99", "d/s", "dkB/s", "d_await", "dareq-sz", "f/s", "f_await", "aqu-sz", "inflight",
    ];
    let columns: String = columns.iter().map(|column| format!(" {column:>9}")).collect();
    format!("{:<width$}{columns} {:>6}  note\n", "Disk", "errors", width = NAME)
}

impl Errors {
    fn all(self) -> u64 {
        self.io.saturating_add(self.unsupported).saturating_add(self.malformed)
    }

    fn since(self, before: Self) -> Self {
        let more = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now);
        Self {
            io: more(self.io, before.io),
            unsupported: more(self.unsupported, before.unsupported),
            malformed: more(self.malformed, before.malformed),
            held: more(self.held, before.held),
        }
    }
}
