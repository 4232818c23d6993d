//! Requests that daemons die of.
//!
//! What it is: a count, in the state that successors take over, of the deaths at which a request was in flight; one
//! that was so three times in a row is answered with an I/O error instead of being done once more.
//!
//! What it is not: it does not know why they died. A daemon that had answered other requests of the queue before it
//! died was most likely killed from outside: its death counts for a tenth.
//!
//! Invariant: a death is counted before a ring runs on which its requests are done again.

use serde::{Deserialize, Serialize};

use super::Session;
use super::state::State;
use crate::chain::{self, Segments};
use crate::complete::{self, Status};
use crate::device::Blame;
use crate::pages::PageArray;
use crate::request::{self, Ranges, Reject, Request};
use crate::worker::QueueParts;

/// So much guilt is no coincidence: three deaths at which nothing had been answered.
const TOO_MUCH: u8 = 3 * DEATH;
/// Of a death at which nothing had been answered on the queue.
const DEATH: u8 = 10;
/// Of one at which something had.
const DEATH_AFTER_ANSWERS: u8 = 1;
/// Requests that are counted; of more than these the later ones are not.
const MOST: usize = 2048;

/// A request that was in flight when daemons died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Death {
    queue: u16,
    head: u16,
    /// The journal's count, which no other request of the queue has.
    count: u64,
    /// used.idx of the ring when it was counted last.
    used: u16,
    guilt: u8,
}

impl Session {
    /// Counts the death of the daemon that left this state, which has been restored.
    pub fn count_deaths(&mut self, state: &State) {
        self.deaths.clear();
        if state.stopped.is_some() {
            return; // it stopped with nothing in flight
        }
        self.taking_over = true;
        let mut deaths = Vec::new();
        for queue in (0..self.vrings.len()).filter_map(|at| u16::try_from(at).ok()) {
            let Ok(Some(parts)) = self.prepare(queue) else { continue }; // its start says why
            let used = parts.ring.used();
            let room = MOST - deaths.len();
            deaths.extend(parts.ring.replayed().take(room).map(|(count, head)| {
                let same = |d: &&Death| (d.queue, d.head, d.count) == (queue, head, count);
                let before = state.deaths.iter().find(same);
                let answered = before.is_some_and(|d| d.used != used);
                let more = if answered { DEATH_AFTER_ANSWERS } else { DEATH };
                let guilt = before.map_or(0, |d| d.guilt).saturating_add(more);
                Death { queue, head, count, used, guilt }
            }));
        }
        self.deaths = deaths;
        self.taking_over = false;
    }

    /// What an earlier daemon left in flight is not done again: its server may carry it out at any time, after what the
    /// guest writes next.
    pub fn replay_nothing(&mut self) {
        self.replays_nothing = true;
    }

    /// This process could not do what was in flight, and is not to count.
    pub fn forget_last_death(&mut self, state: &State) {
        self.deaths.clone_from(&state.deaths);
    }

    /// Answers those requests of a ring that is about to start that daemons have died of.
    pub(super) fn answer_condemned(&self, queue: u16, parts: &mut QueueParts) {
        let guilty = |d: &&Death| d.queue == queue && d.guilt >= TOO_MUCH;
        let condemned: Vec<u16> = match self.replays_nothing {
            false => self.deaths.iter().filter(guilty).map(|death| death.head).collect(),
            true => parts.ring.replayed().map(|(_, head)| head).collect(),
        };
        let mut hint = Default::default();
        for head in condemned {
            let Some((head, chain)) = parts.ring.take_replayed(head) else { continue };
            let (mut segments, mut pages, mut ranges) =
                (Segments::default(), PageArray::default(), Ranges::default());
            let promise = self.device.promise();
            let decoded = match chain::walk(&chain, parts.indirect, &self.memory, &mut hint, &mut segments) {
                Ok(()) => request::decode(
                    head,
                    &segments,
                    &promise,
                    &self.memory,
                    &mut hint,
                    &mut pages,
                    &mut ranges,
                ),
                Err(_) => Err(Reject::Bare(head)),
            };
            let (head, written) = match decoded {
                Ok(Request { head, status, writable, .. })
                | Err(Reject::Status(head, status, _, writable)) => {
                    let _mapped = self.memory.write_byte(status, Status::IoErr.byte(), &hint);
                    if let Some(log) = self.log_in_use() {
                        self.memory.guest_ranges(status, |guest, len| log.mark(guest, len));
                    }
                    (head, complete::used_length(writable, 0))
                }
                Err(Reject::Bare(head)) => (head, 0),
            };
            parts.ring.push(head, written);
            parts.ring.show();
            if self.device.may_log(Blame::Guest) {
                tracing::error!(
                    disk = %self.device.disk.path().display(),
                    queue,
                    "{}: it is answered with an I/O error",
                    if self.replays_nothing {
                        "a request was in flight, and the server may carry it out yet"
                    } else {
                        "a request was in flight at each of the last deaths of vublkd"
                    }
                );
            }
        }
    }
}
