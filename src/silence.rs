//! Whether the cluster that a disk's image is in answers: the log says once it does not, and once it does again.
//!
//! What it is: a [`Silence`] for each disk, by which the process's thread looks at the age of the oldest request.
//!
//! What it is not: requests are not counted or timed for it, and none ends by it.
//!
//! Invariant: an idle daemon is woken for it every 10 s, and only where it serves an image of a cluster.

use std::time::{Duration, Instant};

use crate::device::{Device, SILENCE};
use crate::rbd::standing::Standing;
use crate::stats::Operation;
use crate::stats::queue::Count;

/// How often it is said of a cluster that still does not answer.
const TELL_EVERY: Duration = Duration::from_secs(60);
/// How often a cluster that does not answer is looked at, and how soon after a request that is about to be too old.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// See the head of the file.
#[derive(Debug, Default)]
pub struct Silence {
    next: Option<Instant>,
    told: Option<Told>,
}

/// It was said that the cluster does not answer.
#[derive(Clone, Copy, Debug)]
struct Told {
    at: Instant,
    /// Requests that it had answered by then.
    answered: u64,
}

impl Silence {
    /// Looks at this disk if it is time to; gives the time until the next look. `None`: it is of no cluster.
    pub fn look(&mut self, device: &Device) -> Option<Duration> {
        device.disk.image()?;
        let now = Instant::now();
        let next = match self.next {
            Some(next) if next > now => next,
            _ => now + self.look_now(device)?,
        };
        self.next = Some(next);
        Some(next.saturating_duration_since(now))
    }

    fn look_now(&mut self, device: &Device) -> Option<Duration> {
        let image = device.disk.image()?;
        let in_flight = device.stats.in_flight();
        let told = |at| Told { at, answered: answered(device) };
        if let Some(silent) = device.server_lost_for(in_flight) {
            if self.told.is_none_or(|told| told.at.elapsed() >= TELL_EVERY) {
                self.told = Some(told(Instant::now()));
                let requests = match in_flight.requests {
                    1 => "1 request waits".to_owned(),
                    requests => format!("{requests} requests wait"),
                };
                tracing::warn!(
                    disk = %image.name,
                    "the cluster has not answered a request for {} s: {requests}. ceph health detail tells what it lacks",
                    silent.as_secs()
                );
            }
            return Some(LOOK_EVERY);
        }
        if image.standing() != Standing::Good {
            self.told = None; // what the cluster refuses, it answers
        } else if image.is_giving_up() && self.told.is_none() {
            self.told = Some(told(Instant::now()));
        }
        match self.told {
            Some(told) if answered(device) > told.answered => {
                self.told = None;
                image.answers_again();
            }
            Some(_) => return Some(LOOK_EVERY),
            None => {}
        }
        Some(SILENCE.saturating_sub(in_flight.oldest).max(LOOK_EVERY))
    }
}

/// How many requests the cluster has answered well.
fn answered(device: &Device) -> u64 {
    let totals = device.stats.totals();
    let asks = [Operation::Read, Operation::Write, Operation::Discard, Operation::Zeroes];
    let ended: u64 = asks.into_iter().map(|operation| totals.of(operation).requests).sum();
    ended.saturating_sub(totals.count(Count::IoErrors))
}
