//! Our ring and virtio-queue's: the same driver, twice the same memory, the same device actions.
//!
//! What it is: [`Twin`], which does an [`Action`] with both and compares them.
//!
//! What it is not: it does not choose the actions; random tests and the fuzzer do.
//!
//! Invariant: a difference that is not among the known ones panics.
//!
//! Compared are the heads that come out, the used ring byte for byte after each
//! publish, the wish for a kick in memory, and whether a signal is due.
//!
//! Known differences, which the comparison allows for:
//!
//! - ours publishes a batch with one store of used.idx, the oracle one element
//!   at a time: the oracle is given the batch when ours publishes;
//! - ours signals at its first publish whatever the driver asked for;
//! - ours honours NO_INTERRUPT, the oracle always signals without EVENT_IDX;
//! - a publish of nothing never signals; the oracle's answer does not say;
//! - a head outside of the table is an error of ours; the oracle hands out a
//!   chain without descriptors.

use std::fs::File;
use std::num::Wrapping;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vublk::memory::{GuestMemory, RegionLayout};
use vublk::ring::split::{Layout, Ring};
use vublk::ring::{Head, RingError};

use crate::support::sys::memory_file;

/// Both memories: the three parts of the ring, far enough apart for size 1024.
const BYTES: u64 = 0x10000;
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x6000;
const USED: u64 = 0x8000;
/// The front-end's addresses, of which our ring is told.
const USER: u64 = 0x7000_0000_0000;

/// What driver and device do.
#[derive(Clone, Debug)]
pub enum Action {
    /// The driver makes up to this many chains available at once.
    Add(u16),
    /// The driver takes what is in the used ring; its heads are free again.
    Take,
    /// The driver asks for a signal this far from what it has taken.
    UsedEvent(i16),
    /// The driver sets or clears NO_INTERRUPT.
    NoInterrupt(bool),
    /// The device fetches up to this many chains.
    Fetch(u16),
    /// The device pushes one of those it has.
    Push(usize, u32),
    /// The device shows the driver what it pushed, and does not ask whether to signal.
    Show,
    /// The device publishes.
    Publish,
    /// The device counts what is left to fetch.
    Backlog,
    /// The device wants to sleep.
    Arm,
}

pub struct Twin {
    pub size: u16,
    event_idx: bool,
    /// The memory that our ring works on, and the oracle's.
    files: [File; 2],
    ours: Ring,
    oracle: Queue,
    oracle_memory: GuestMemoryMmap,
    /// The driver: heads that it may use, its avail index, what it has taken.
    free: Vec<u16>,
    avail: Wrapping<u16>,
    taken: Wrapping<u16>,
    no_interrupt: bool,
    /// The device: what it has fetched, what it pushed since it published.
    fetched: Vec<Head>,
    staged: Vec<(u16, u32)>,
    /// Something was shown since it published.
    shown: bool,
    published_before: bool,
}

impl Twin {
    pub fn new(size: u16, base: u16, behind: u16, event_idx: bool) -> Self {
        let files = [memory_file(BYTES), memory_file(BYTES)];
        // A ring that another device has served: used is where the driver is.
        for file in &files {
            store(file, AVAIL + 2, base);
            store(file, USED + 2, base);
        }
        let layout = RegionLayout { guest: 0, len: BYTES, user: USER, offset: 0 };
        let memory = GuestMemory::map(&[layout], vec![files[0].try_clone().unwrap()]).unwrap();
        let at = Layout { size, desc: USER + TABLE, avail: USER + AVAIL, used: USER + USED };
        let ours = Ring::new(&Arc::new(memory), at, base, event_idx).unwrap();
        let range = (
            GuestAddress(0),
            usize::try_from(BYTES).unwrap(),
            Some(FileOffset::new(files[1].try_clone().unwrap(), 0)),
        );
        let oracle_memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let mut oracle = Queue::new(1024).unwrap();
        oracle.set_size(size);
        oracle.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
        oracle.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
        oracle.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        oracle.set_next_avail(base);
        oracle.set_next_used(base);
        oracle.set_event_idx(event_idx);
        oracle.set_ready(true);
        assert!(oracle.is_valid(&oracle_memory));
        // Ours says so by itself when it starts.
        oracle.disable_notification(&oracle_memory).unwrap();
        let mut twin = Self {
            size,
            event_idx,
            files,
            ours,
            oracle,
            oracle_memory,
            free: (0..size).rev().collect(),
            avail: Wrapping(base),
            taken: Wrapping(base),
            no_interrupt: false,
            fetched: Vec::new(),
            staged: Vec::new(),
            shown: false,
            published_before: false,
        };
        twin.both(AVAIL + 4 + 2 * u64::from(size), base.wrapping_sub(behind));
        twin
    }

    fn both(&mut self, at: u64, value: u16) {
        for file in &self.files {
            store(file, at, value);
        }
    }

    fn word(&self, which: usize, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.files[which].read_exact_at(&mut bytes, at).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// The used ring without its flags: index and elements.
    fn used(&self, which: usize) -> Vec<u8> {
        let mut bytes = vec![0; 2 + 8 * usize::from(self.size)];
        self.files[which].read_exact_at(&mut bytes, USED + 2).unwrap();
        bytes
    }

    /// What the device wants of the driver: flags, or the avail event.
    fn wish(&self, which: usize) -> u16 {
        self.word(which, if self.event_idx { USED + 4 + 8 * u64::from(self.size) } else { USED })
    }

    pub fn act(&mut self, action: &Action) {
        match *action {
            Action::Add(count) => {
                let count = usize::from(count).min(self.free.len());
                for head in self.free.split_off(self.free.len() - count) {
                    let slot = u64::from(self.avail.0 % self.size);
                    self.both(AVAIL + 4 + 2 * slot, head);
                    self.avail += 1;
                }
                self.both(AVAIL + 2, self.avail.0);
            }
            Action::Take => {
                while self.taken.0 != self.word(0, USED + 2) {
                    let slot = u64::from(self.taken.0 % self.size);
                    // The newest at the bottom: heads come in ever new orders.
                    let head = self.word(0, USED + 4 + 8 * slot);
                    assert!(!self.free.contains(&head), "head {} came back twice", head);
                    self.free.insert(0, head);
                    self.taken += 1;
                }
            }
            Action::UsedEvent(by) => {
                let event = self.taken.0.wrapping_add_signed(by);
                self.both(AVAIL + 4 + 2 * u64::from(self.size), event);
            }
            Action::NoInterrupt(off) => {
                self.no_interrupt = off;
                self.both(AVAIL, off.into());
            }
            Action::Fetch(count) => {
                for _ in 0..count {
                    let theirs = self.oracle.pop_descriptor_chain(&self.oracle_memory);
                    let theirs = theirs.map(|chain| chain.head_index());
                    let ours = self.ours.next().unwrap();
                    let Some((head, chain)) = ours else {
                        assert_eq!(theirs, None, "ours is empty");
                        break;
                    };
                    assert_eq!(chain.head(), head.index());
                    assert_eq!(chain.size(), self.size);
                    let index = head.index();
                    self.fetched.push(head);
                    assert_eq!(Some(index), theirs);
                    if !self.event_idx {
                        assert_eq!(self.wish(0), 1, "no kicks while it works");
                    }
                }
                assert_eq!(usize::from(self.ours.in_flight()), self.fetched.len());
            }
            Action::Push(which, len) => {
                if !self.fetched.is_empty() {
                    let at = which % self.fetched.len();
                    let head = self.fetched.swap_remove(at);
                    self.staged.push((head.index(), len));
                    let before = self.word(0, USED + 2);
                    self.ours.push(head, len);
                    assert_eq!(self.word(0, USED + 2), before, "staged, not shown");
                }
            }
            Action::Show => {
                let staged = self.staged.len();
                self.give_staged();
                assert_eq!(usize::from(self.ours.show()), staged);
                assert_eq!(self.used(0), self.used(1), "used ring");
            }
            Action::Publish => self.publish(),
            Action::Backlog => {
                assert_eq!(self.ours.backlog(), self.avail.0.wrapping_sub(self.oracle.next_avail()));
            }
            Action::Arm => {
                let before = self.wish(0);
                let more = self.oracle.enable_notification(&self.oracle_memory).unwrap();
                assert_eq!(self.ours.arm(), !more);
                if more && !self.event_idx {
                    // The oracle turns kicks on even so; we look again at once.
                    assert_eq!(self.wish(0), before, "nothing changes while there is work");
                } else {
                    assert_eq!(self.wish(0), self.wish(1), "the wish for a kick");
                }
                assert_eq!(self.ours.arm(), !more, "asked again");
            }
        }
    }

    /// The oracle is given what ours shows at once.
    fn give_staged(&mut self) {
        for (head, len) in self.staged.drain(..) {
            self.oracle.add_used(&self.oracle_memory, head, len).unwrap();
            self.shown = true;
        }
    }

    fn publish(&mut self) {
        self.give_staged();
        let any = std::mem::take(&mut self.shown);
        let theirs = self.oracle.needs_notification(&self.oracle_memory).unwrap();
        let ours = self.ours.publish();
        if !any {
            assert!(!ours, "nothing was published");
        } else if !self.published_before {
            assert!(ours, "the first signal is free");
            self.published_before = true;
        } else {
            assert_eq!(ours, if self.event_idx { theirs } else { !self.no_interrupt });
        }
        assert_eq!(self.used(0), self.used(1), "used ring");
        assert!(!self.ours.publish(), "published already");
    }

    /// Returns what is owed and stops.
    pub fn end(mut self) {
        let theirs = self.oracle.next_avail();
        for head in self.fetched.drain(..) {
            self.ours.push(head, 0);
        }
        let _signal = self.ours.publish();
        assert_eq!(self.ours.stop().next_avail, theirs, "next avail");
    }

    /// Ends it; gives used.idx.
    fn end_used(self) -> u16 {
        let file = self.files[0].try_clone().unwrap();
        self.end();
        let mut bytes = [0; 2];
        file.read_exact_at(&mut bytes, USED + 2).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// A head that should not be there is returned all the same, so that a failure
    /// says what it is.
    fn keep(&mut self, got: Result<Option<Head>, RingError>) -> Result<Option<u16>, RingError> {
        got.map(|head| {
            head.map(|head| {
                let index = head.index();
                self.fetched.push(head);
                index
            })
        })
    }

    /// Ends it with an index that no driver may write: reported once, nothing more is
    /// fetched, and what was fetched is still returned.
    pub fn end_broken(mut self, head_too_large: bool, far: u16) {
        self.act(&Action::Fetch(u16::MAX));
        let (size, next) = (self.size, self.oracle.next_avail());
        let fetched = u16::try_from(self.fetched.len()).unwrap();
        let owed = fetched + u16::try_from(self.staged.len()).unwrap();
        let room = size - fetched;
        let want = if head_too_large && room > 0 {
            let head = size + far % (u16::MAX - size + 1);
            self.both(AVAIL + 4 + 2 * u64::from(next % size), head);
            self.both(AVAIL + 2, next.wrapping_add(1));
            RingError::HeadRange(head)
        } else {
            // One chain more than there is room for, or more.
            let ahead = room + 1 + far % (u16::MAX - room);
            self.both(AVAIL + 2, next.wrapping_add(ahead));
            // The oracle does not count those in flight.
            assert_eq!(
                self.oracle.iter(&self.oracle_memory).is_err(),
                ahead > size,
                "the oracle refuses it too"
            );
            RingError::AvailIndex { avail: next.wrapping_add(ahead), next }
        };
        let first = self.ours.next().map(|chain| chain.map(|(head, _)| head));
        let second = self.ours.next().map(|chain| chain.map(|(head, _)| head));
        let (slept, failed, in_flight) = (self.ours.arm(), self.ours.failed(), self.ours.in_flight());
        let used_before = self.word(0, USED + 2);
        let (first, second) = (self.keep(first), self.keep(second));
        let end = self.end_used();
        assert_eq!(first, Err(want));
        assert_eq!(second, Ok(None));
        assert!(slept && failed);
        assert_eq!(in_flight, fetched);
        assert_eq!(end.wrapping_sub(used_before), owed, "all are returned");
    }
}

fn store(file: &File, at: u64, value: u16) {
    file.write_all_at(&value.to_le_bytes(), at).unwrap();
}
