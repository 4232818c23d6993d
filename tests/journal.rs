//! The library's ring with a journal: what one that dies leaves for the next, in
//! which order, and how much a driver may offer.
//!
//! A ring dies when it is dropped without a word: its heads are forgotten.

use std::rc::Rc;
use std::sync::Arc;

use vublk::inflight::Region;
use vublk::memory::{GuestMemory, RegionLayout};
use vublk::ring::split::{Layout, Ring};
use vublk::ring::{Head, RingError};

use crate::support::memory::{Memory, Span};
use crate::support::ring::{self, out};

/// A driver, and the region in which its device keeps a journal.
struct Queue {
    driver: ring::Ring,
    table: Arc<GuestMemory>,
    region: Arc<Region>,
    heads: Vec<u16>,
}

impl Queue {
    fn new(size: u16, base: u16) -> Self {
        let memory = Memory::with(&[Span { guest: 1 << 20, len: 1 << 20 }]);
        let region = &memory.regions[0];
        let layout =
            RegionLayout { guest: region.guest, len: region.len, user: region.user, offset: region.offset };
        let table = GuestMemory::map(&[layout], vec![region.file.try_clone().unwrap()]).unwrap();
        let (file, bytes) = Region::create(1, size).unwrap();
        let region = Region::map(&file, bytes, 0, 1, size).unwrap();
        let buffer = memory.alloc(16, 16);
        let mut driver = ring::Ring::new(Rc::clone(&memory), size, base, false);
        // Heads that are not in the order of their numbers.
        let mut heads: Vec<u16> = (0..size).map(|_| driver.chain(&[out(buffer, 16)])).collect();
        heads.sort_by_key(|head| head * 5 % 8);
        Self { driver, table: Arc::new(table), region: Arc::new(region), heads }
    }

    /// Offers the next `count` heads; gives them.
    fn offer(&mut self, count: usize) -> Vec<u16> {
        let heads: Vec<u16> = self.heads.drain(..count).collect();
        heads.iter().for_each(|&head| self.driver.stage(head));
        self.driver.publish();
        heads
    }

    /// A device that goes on at `base`.
    fn device(&self, base: u16) -> Ring {
        let memory = &self.driver.memory;
        let layout = Layout {
            size: self.driver.size,
            desc: memory.user(self.driver.table),
            avail: memory.user(self.driver.avail),
            used: memory.user(self.driver.used),
        };
        Ring::new(&self.table, layout, base, false).unwrap()
    }

    fn journalled(&self, base: u16) -> Ring {
        self.device(base).journalled(&self.region, 0).unwrap()
    }

    fn journalled_by_us(&self, base: u16, taken_over: bool) -> Ring {
        self.device(base).journalled_by_us(&self.region, 0, taken_over).unwrap()
    }
}

/// Fetches all that there is.
fn fetch(ring: &mut Ring) -> Vec<Head> {
    std::iter::from_fn(|| ring.next().unwrap().map(|(head, _)| head)).collect()
}

fn numbers(heads: &[Head]) -> Vec<u16> {
    heads.iter().map(Head::index).collect()
}

fn die(ring: Ring, heads: Vec<Head>) {
    heads.into_iter().for_each(std::mem::forget);
    drop(ring);
}

/// What is left comes in the order of its fetching, whichever worker fetched it, also where
/// the indices go around.
#[test]
fn what_is_left_comes_in_its_order() {
    let base = 0xfffd;
    let mut queue = Queue::new(16, base);
    let mut want = queue.offer(5);
    let mut first = queue.journalled(base);
    let mut heads = fetch(&mut first);
    assert_eq!(numbers(&heads), want);
    want.remove(2);
    first.push(heads.remove(2), 0);
    let _wanted = first.publish();
    assert_eq!(first.in_flight(), 4);
    die(first, heads);

    // Four of the dead one's, then two of its own; one of each is returned.
    want.extend(queue.offer(2));
    let mut second = queue.journalled(0);
    assert_eq!(second.replays(), 4);
    let mut heads = fetch(&mut second);
    assert_eq!((numbers(&heads), second.in_flight()), (want.clone(), 6));
    for at in [4, 1] {
        want.remove(at);
        second.push(heads.remove(at), 0);
    }
    let _wanted = second.publish();
    die(second, heads);

    want.extend(queue.offer(3));
    let mut third = queue.journalled(0);
    let heads = fetch(&mut third);
    assert_eq!(numbers(&heads), want);
    heads.into_iter().for_each(|head| third.push(head, 0));
    let _wanted = third.publish();
    assert_eq!((third.in_flight(), third.stop().next_avail), (0, queue.driver.avail_idx));
}

/// A front-end that has lost requests says so by a base ahead of used.idx. With a
/// region of our own that holds for successors, which are told nothing.
#[test]
fn a_base_ahead_of_the_used_index_stays_ahead() {
    let mut queue = Queue::new(8, 10);
    let _lost = queue.offer(2);
    let mut first = queue.journalled_by_us(12, false);
    let want = queue.offer(3);
    let mut heads = fetch(&mut first);
    assert_eq!(numbers(&heads), want);
    first.push(heads.remove(0), 0);
    let _wanted = first.publish();
    die(first, heads);
    for taken_over in [true, false] {
        let mut next = queue.journalled_by_us(12, taken_over);
        let heads = fetch(&mut next);
        assert_eq!((numbers(&heads), next.in_flight()), (want[1..].to_vec(), 2));
        die(next, heads);
    }
    let mut last = queue.journalled_by_us(0, true);
    fetch(&mut last).into_iter().for_each(|head| last.push(head, 0));
    let _wanted = last.publish();
    assert_eq!(last.stop().next_avail, 15);
    // Ended: the front-end's word counts again.
    let mut anew = queue.journalled_by_us(15, false);
    assert_eq!((anew.replays(), fetch(&mut anew).len()), (0, 0));
    let _stopped = anew.stop();
}

/// There may be as many chains as the queue holds, those in flight among them.
#[test]
fn more_chains_than_there_is_room_for() {
    for (avail, room) in [(8, true), (9, false), (11, false), (2, false)] {
        let mut queue = Queue::new(8, 0);
        queue.offer(3);
        let mut device = queue.device(0);
        let heads = fetch(&mut device);
        queue.driver.memory.store16(queue.driver.avail + 2, avail);
        assert_eq!(device.backlog(), if room { 5 } else { 0 }, "{avail}");
        if room {
            fetch(&mut device).into_iter().for_each(|head| device.push(head, 0));
        } else {
            let refused = device.next().map(|chain| chain.map(|(head, _)| head.index()));
            assert_eq!(refused, Err(RingError::AvailIndex { avail, next: 3 }));
            assert!(device.failed() && device.next().unwrap().is_none());
        }
        // Those in flight are returned all the same.
        heads.into_iter().for_each(|head| device.push(head, 0));
        let _wanted = device.publish();
        assert_eq!((device.in_flight(), queue.driver.used_idx()), (0, if room { 8 } else { 3 }));
    }
}

/// A fetch that was undone is none: the next one gives the same chain, and so does a successor's. An earlier device's
/// chain stays marked, and in its place.
#[test]
fn a_chain_that_was_put_back() {
    let base = 0xffff;
    let mut queue = Queue::new(8, base);
    let want = queue.offer(4);
    let mut first = queue.journalled(base);
    let mut heads = Vec::new();
    for _ in 0..2 {
        let (head, _) = first.next().unwrap().unwrap();
        first.put_back(head);
        assert_eq!(usize::from(first.in_flight()), heads.len());
        heads.push(first.next().unwrap().unwrap().0);
    }
    let (third, _) = first.next().unwrap().unwrap();
    first.put_back(third);
    assert_eq!(numbers(&heads), want[..2]);
    die(first, heads);

    let mut second = queue.journalled(0);
    assert_eq!(second.replays(), 2, "the third was not in flight");
    for left in [2, 1] {
        let (head, _) = second.next().unwrap().unwrap();
        second.put_back(head);
        assert_eq!((second.replays(), second.in_flight()), (left, 2 - left));
        let (head, _) = second.next().unwrap().unwrap();
        assert_eq!(head.index(), want[usize::from(2 - left)]);
        std::mem::forget(head);
    }
    let (third, _) = second.next().unwrap().unwrap();
    second.put_back(third);
    let heads = fetch(&mut second);
    assert_eq!(numbers(&heads), want[2..]);
    die(second, heads);
    let mut last = queue.journalled(0);
    let heads = fetch(&mut last);
    assert_eq!(numbers(&heads), want);
    heads.into_iter().for_each(|head| last.push(head, 0));
    let _wanted = last.publish();
    assert_eq!(last.stop().next_avail, base.wrapping_add(4));
}
