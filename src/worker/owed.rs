//! How many bytes the requests in flight of a worker may name together: what a drain has to wait for.
//!
//! What it is: the account of large requests, and the order in which queues get their next one. A chain that has no room
//! yet goes back to its ring and is fetched again later.
//!
//! What it is not: requests of at most [`SMALL`] bytes are not counted. There are never more of them than slots, which is
//! half of [`MOST_OWED`]. Discards and writes of zeroes carry no data and are not counted either.
//!
//! Invariants: requests in flight name at most [`MOST_OWED`] bytes, or one of them is larger than half of that and all
//! others are small; each queue whose next chain waits gets its turn, whatever the other queues ask for.

use super::limited::{Waits, charge};
use super::{SLOTS, Worker};
use crate::engine::{Engine, Slot};
use crate::op::MAX_PLAIN;

/// Bytes of the requests in flight of one worker: what GET_VRING_BASE waits for at most, unless one request has more.
pub const MOST_OWED: u64 = 1 << 30;
/// Requests of at most so many bytes are not counted: those that begin on the short way.
pub const SMALL: u64 = MAX_PLAIN;
const _: () = assert!(SMALL * SLOTS as u64 == MOST_OWED / 2);
/// Bytes of those that are.
const MOST_LARGE: u64 = MOST_OWED / 2;

/// The next chain of a queue is a large request for which there was no room.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Queues get their turn in the order of these.
    number: u64,
    /// Bytes of the request, as the driver had it when it was fetched.
    bytes: u64,
}

/// See the head of the file.
#[derive(Debug, Default)]
pub struct Owed {
    /// Bytes of the large requests in flight.
    large: u64,
    /// Queues that wait, and the next one's number.
    waiting: u16,
    next: u64,
    /// One of them waits no longer: another may be the first now.
    moved: bool,
    /// The queue whose turn it is.
    turn: Option<u16>,
}

impl Owed {
    fn has_room(&self, bytes: u64) -> bool {
        self.large == 0 || self.large.saturating_add(bytes) <= MOST_LARGE
    }

    /// Begins a large request, if there is room for it and no queue waits that came earlier.
    fn begin(&mut self, index: u16, bytes: u64) -> bool {
        let is_its_turn = self.turn.take_if(|turn| *turn == index).is_some();
        let may_begin = self.has_room(bytes) && (is_its_turn || self.waiting == 0);
        if may_begin {
            self.large += bytes;
        }
        may_begin
    }

    /// It has ended.
    pub fn end(&mut self, bytes: u64) {
        self.large -= bytes;
    }

    /// A queue has to wait.
    fn wait(&mut self, bytes: u64) -> Place {
        self.waiting += 1;
        self.next += 1;
        Place { number: self.next, bytes }
    }

    /// It does not wait any longer.
    pub fn leave(&mut self) {
        self.waiting -= 1;
        self.moved = true;
    }

    /// True if that happened since the last call.
    pub fn has_moved(&mut self) -> bool {
        std::mem::take(&mut self.moved)
    }
}

impl<E: Engine> Worker<E> {
    /// Lets a large request begin, or puts its chain back into the ring: false.
    #[cold]
    pub(super) fn begin_large(&mut self, slot: Slot) -> bool {
        let request = self.slots.get(slot);
        let (index, table, bytes) = (request.queue, request.table, request.pages.len());
        if self.owed.begin(index, bytes) {
            (request.owes, request.holds) = (bytes, true);
            return true;
        }
        let is_limited = self.device.throttle.is_limited();
        let charged = if is_limited { charge(request.command, bytes, &request.ranges) } else { None };
        let Some(head) = request.head.take() else { return true }; // not reached: it was just fetched
        self.tables.leave(table);
        self.slots.give_back(slot);
        match self.queues.get_mut(usize::from(index)) {
            Some(Some(queue)) => {
                queue.parts.ring.put_back(head);
                queue.charged = charged;
                (queue.waits, queue.ready) = (Some(Waits::ForRoom(self.owed.wait(bytes))), false);
            }
            _ => head.abandon(), // not reached: it was fetched from there
        }
        false
    }

    /// True if a queue whose next chain waits for room at this place may try again; it waits no longer then. A queue from
    /// which nothing is fetched now does not wait either, or it would keep the others waiting.
    pub(super) fn has_room(&mut self, index: u16, place: Place) -> bool {
        let waits = self.served.iter().filter_map(|&at| self.queues.get(usize::from(at))?.as_ref()?.waits);
        let places =
            waits.filter_map(|waits| if let Waits::ForRoom(place) = waits { Some(place) } else { None });
        let first = places.map(|place| place.number).min();
        let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) else { return false };
        queue.ready = true;
        let fetches = queue.may_fetch();
        if fetches && !(first == Some(place.number) && self.owed.has_room(place.bytes)) {
            return false;
        }
        queue.waits = None;
        self.owed.leave();
        self.owed.turn = fetches.then_some(index);
        fetches
    }
}
