//! The in-flight journal in a region whose bytes are the front-end's: a plain reading of the vhost-user document beside
//! `inflight::Journal`, and a ring that goes on from such a region.
//!
//! The front-end writes anything anywhere at any time. What is found must be what the bytes say, a write must stay in the
//! queue's part, and as long as only journals have written, what is found is exactly what was in flight.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vublk::inflight::{CacheMode, Journal, JournalError, Region};
use vublk::memory::{GuestMemory, RegionLayout};
use vublk::ring::RingError;
use vublk::ring::split::{Layout, Ring};

use super::reader::Reader;
use crate::support::memory::{Memory, Span};

/// One queue's part of a region, as its bytes say it is.
#[derive(Clone, Debug)]
struct Part {
    features: u64,
    version: u16,
    last: u16,
    used: u16,
    /// Marked, the next head of the batch, the count.
    entries: Vec<(bool, u16, u64)>,
}

fn stride(most: u16) -> usize {
    (16 + 16 * usize::from(most)).div_ceil(64) * 64
}

impl Part {
    fn read(bytes: &[u8], queue: u16, most: u16) -> Self {
        let bytes = &bytes[stride(most) * usize::from(queue)..];
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let entry = |at: usize| (bytes[at] != 0, word(at + 6), long(at + 8));
        let entries = (1..=usize::from(most)).map(|at| entry(16 * at)).collect();
        Self { features: long(0), version: word(8), last: word(12), used: word(14), entries }
    }

    fn clear(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.0 = false);
    }

    /// What a back-end of a ring of `size` descriptors finds there, in the order of fetching; the marks that are left.
    fn open(&mut self, size: u16, used: u16, offered: u16) -> Result<Vec<(u64, u16)>, JournalError> {
        match (self.version, used.wrapping_sub(self.used)) {
            (0, _) => self.clear(),
            (1, batch) if batch > size => self.clear(),
            (1, batch) if self.last < size => {
                let mut at = self.last;
                for _ in 0..batch {
                    // An index out of the ring is the front-end's doing: any entry of the ring may be meant.
                    let entry = &mut self.entries[usize::from(at & (size - 1))];
                    entry.0 = false;
                    at = entry.1;
                }
            }
            (1, _) => {}
            (version, _) => return Err(JournalError::Version(version)),
        }
        self.entries[usize::from(size)..].iter_mut().for_each(|entry| entry.0 = false);
        let marked = (0..).zip(&self.entries).filter(|(_, entry)| entry.0);
        let mut found: Vec<(u64, u16)> = marked.map(|(head, entry)| (entry.2, head)).collect();
        found.sort_unstable();
        if found.len() > usize::from(offered) {
            self.clear();
            found.clear();
        }
        Ok(found)
    }

    fn marks(&self) -> Vec<bool> {
        self.entries.iter().map(|entry| entry.0).collect()
    }
}

struct Case {
    file: File,
    region: Arc<Region>,
    queues: u16,
    most: u16,
    /// The queue under test, and its ring's size.
    queue: u16,
    size: u16,
}

impl Case {
    fn new(bytes: &mut Reader<'_>) -> Self {
        let (queues, most) = (1 + bytes.below(3) as u16, 1 + bytes.u16() % 80);
        let (file, len) = Region::create(queues, most).unwrap();
        let region = Region::map(&file, len, 0, queues, most).unwrap();
        let queue = bytes.below(u64::from(queues)) as u16;
        // A ring that fits.
        let size = 1 << bytes.below(u64::from(most.ilog2()) + 1);
        Self { file, region: Arc::new(region), queues, most, queue, size }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; stride(self.most) * usize::from(self.queues)];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn part(&self) -> Part {
        Part::read(&self.bytes(), self.queue, self.most)
    }

    /// The front-end writes somewhere: a field of the queue, or any bytes.
    fn scribble(&self, bytes: &mut Reader<'_>) {
        let start = stride(self.most) * usize::from(self.queue);
        let entry = start + 16 + 16 * usize::from(bytes.u16() % self.most);
        let (at, len) = match bytes.below(8) {
            0 => (start + 8, 2),
            1 => (start + 12, 2),
            2 => (start + 14, 2),
            3 => (entry, 1),
            4 => (entry + 6, 2),
            5 => (entry + 8, 8),
            6 => (start, 8),
            _ => (start + usize::from(bytes.u8()) * 4, bytes.u8().into()),
        };
        let end = stride(self.most) * usize::from(self.queues);
        let content = bytes.bytes(len);
        if at + content.len() <= end {
            self.file.write_all_at(content, at as u64).unwrap();
        }
    }

    /// Runs `change` and sees that it changes only this queue's part.
    fn only_here<T>(&self, change: impl FnOnce() -> T) -> T {
        let before = self.bytes();
        let value = change();
        let (after, stride) = (self.bytes(), stride(self.most));
        let here = usize::from(self.queue) * stride..(usize::from(self.queue) + 1) * stride;
        let others = (0..before.len()).filter(|at| !here.contains(at));
        others.for_each(|at| assert_eq!(before[at], after[at], "byte {at} is another queue's"));
        value
    }

    fn open(&self, used: u16, offered: u16) -> Option<(Journal, Vec<(u64, u16)>)> {
        let mut part = self.part();
        let before = self.bytes();
        let opened = self.only_here(|| Journal::open(&self.region, self.queue, self.size, used, offered));
        match (part.open(self.size, used, offered), opened) {
            (Ok(want), Ok((journal, found))) => {
                assert_eq!(found.chains, want);
                assert_eq!(found.after, want.last().map_or(0, |last| last.0.wrapping_add(1)));
                let now = self.part();
                assert_eq!((now.version, now.used), (1, used));
                assert_eq!(now.marks(), part.marks());
                Some((journal, want))
            }
            (Err(want), Err(got)) => {
                assert_eq!(got, want);
                assert_eq!(self.bytes(), before, "a refusal changes nothing");
                None
            }
            (want, got) => panic!("got {got:?}, want {want:?}"),
        }
    }
}

/// Regions of any shape, in a file of 8192 bytes: mapped if all of it is there.
fn shapes(bytes: &mut Reader<'_>) {
    let file = crate::support::sys::memory_file(8192);
    let number = |bytes: &mut Reader<'_>| if bytes.bool() { bytes.u64() } else { bytes.u16().into() };
    let (len, offset) = (number(bytes), number(bytes));
    let (queues, size) = (bytes.u16() >> bytes.below(16), bytes.u16() >> bytes.below(16));
    let needed = u128::from(queues) * stride(size) as u128;
    let end = u128::from(len) + u128::from(offset);
    let want = needed > 0 && needed <= len.into() && end <= 8192 && offset % 8 == 0;
    let region = Region::map(&file, len, offset, queues, size);
    assert_eq!(region.is_ok(), want, "{queues} queues of {size}, {len} bytes at {offset}");
    let Ok(region) = region else { return };
    let (queue, ring) = (bytes.u16() >> bytes.below(16), 1_u16 << bytes.below(16));
    let opened = Journal::open(&Arc::new(region), queue, ring, 0, 0);
    assert_eq!(opened.is_ok(), queue < queues && ring <= size, "queue {queue} of {queues}, {ring} of {size}");
}

/// Journals that live and die, and a front-end that may write there.
fn lives(bytes: &mut Reader<'_>) {
    let case = Case::new(bytes);
    let mut used = bytes.u16();
    // What is in flight, in the order of fetching; `None` once the front-end has written.
    let mut truth: Option<Vec<(u64, u16)>> = Some(Vec::new());
    let mut count = bytes.u64() >> 1;
    if bytes.bool() {
        truth = None;
        bytes.list(20, |bytes| case.scribble(bytes));
    }
    let Some((mut journal, _)) = case.open(used, case.size) else { return };
    // Pushed since the last publish.
    let mut staged: Vec<u16> = Vec::new();
    while !bytes.is_empty() {
        match bytes.below(8) {
            0..3 => {
                let head = bytes.u16() % case.size;
                let known = truth.as_ref().is_some_and(|t| t.iter().any(|&(_, other)| other == head));
                if known || staged.contains(&head) {
                    continue; // a driver that offers a head twice loses it itself
                }
                case.only_here(|| journal.fetched(head, count));
                truth.iter_mut().for_each(|truth| truth.push((count, head)));
                count += 1;
            }
            3 => {
                let Some(truth) = &mut truth else {
                    let head = bytes.u16() % case.size;
                    case.only_here(|| journal.pushed(head));
                    staged.push(head);
                    continue;
                };
                let open = truth.iter().filter(|(_, head)| !staged.contains(head));
                let open: Vec<u16> = open.map(|chain| chain.1).collect();
                if !open.is_empty() {
                    let head = open[usize::from(bytes.u8()) % open.len()];
                    journal.pushed(head);
                    staged.push(head);
                }
            }
            // Publishes; or is killed after the store of used.idx, or before it.
            how @ 4..7 => {
                if staged.len() > usize::from(case.size) {
                    return; // more than a ring can publish
                }
                case.only_here(|| journal.publishing());
                let batch = staged.len() as u16;
                if how > 4 {
                    used = used.wrapping_add(batch);
                    truth.iter_mut().for_each(|truth| truth.retain(|(_, head)| !staged.contains(head)));
                }
                if how == 5 {
                    case.only_here(|| journal.published(batch, used));
                    staged.clear();
                    continue;
                }
                staged.clear();
                drop(journal);
                let offered = if bytes.rarely() { bytes.u16() } else { case.size };
                let Some((next, found)) = case.open(used, offered) else { return };
                match &mut truth {
                    Some(truth) if truth.len() <= usize::from(offered) => assert_eq!(found, *truth),
                    Some(truth) => truth.clear(),
                    None => {}
                }
                journal = next;
            }
            _ => {
                truth = None;
                case.scribble(bytes);
            }
        }
    }
    let mode = bytes.bool();
    case.region.note_cache_mode(mode);
    assert_eq!(case.region.cache_mode(), CacheMode::Known { write_back: mode });
}

const TABLE: u64 = 0x1_0000;
const AVAIL: u64 = TABLE + 0x1000;
const USED: u64 = TABLE + 0x2000;

/// A ring that goes on from a region whose bytes are anything.
fn ring(bytes: &mut Reader<'_>) {
    let case = Case::new(bytes);
    let (size, used) = (case.size, bytes.u16());
    let avail = used.wrapping_add(if bytes.rarely() { bytes.u16() } else { bytes.u16() % (2 * size) });
    let memory = Memory::with(&[Span { guest: TABLE, len: 0x4000 }]);
    memory.store16(AVAIL + 2, avail);
    memory.store16(USED + 2, used);
    for slot in 0..u64::from(size) {
        memory.store16(AVAIL + 4 + 2 * slot, bytes.u8().into());
    }
    let (ours, taken_over, base) = (bytes.bool(), bytes.bool(), used.wrapping_add(bytes.below(4) as u16));
    bytes.list(40, |bytes| case.scribble(bytes));

    let region = &memory.regions[0];
    let layout = RegionLayout { guest: region.guest, len: region.len, user: region.user, offset: 0 };
    let table = GuestMemory::map(&[layout], vec![region.file.try_clone().unwrap()]).unwrap();
    let layout =
        Layout { size, desc: memory.user(TABLE), avail: memory.user(AVAIL), used: memory.user(USED) };
    let device = Ring::new(&Arc::new(table), layout, base, false).unwrap();
    let mut part = case.part();
    let anew = ours && !taken_over && part.version == 0;
    let opened = case.only_here(|| match ours {
        true => device.journalled_by_us(&case.region, case.queue, taken_over),
        false => device.journalled(&case.region, case.queue),
    });
    let found = if anew { Ok(Vec::new()) } else { part.open(size, used, avail.wrapping_sub(used)) };
    let (found, mut device) = match (found, opened) {
        (Ok(found), Ok(device)) => (found, device),
        (Err(want), Err(got)) => return assert_eq!(got, RingError::Journal(want)),
        (want, got) => panic!("got {got:?}, want {want:?}"),
    };
    let skew = match (ours, anew) {
        (false, _) => 0,
        (true, true) => base.wrapping_sub(used),
        (true, false) => part.features as u16,
    };
    let replays = found.len() as u16;
    assert_eq!(device.replays(), replays);
    let mut heads = Vec::new();
    for (_, want) in found {
        let (head, _) = device.next().unwrap().unwrap();
        assert_eq!(head.index(), want);
        heads.push(head);
    }
    // Then what the driver has offered since, if there is room for it.
    let mut next = used.wrapping_add(skew).wrapping_add(replays);
    let mut broken = None;
    if avail.wrapping_sub(next) > size - replays {
        broken = Some(RingError::AvailIndex { avail, next });
    }
    while broken.is_none() && next != avail {
        let want = memory.load16(AVAIL + 4 + 2 * u64::from(next % size));
        if want >= size {
            broken = Some(RingError::HeadRange(want));
            break;
        }
        let (head, _) = device.next().unwrap().unwrap();
        assert_eq!(head.index(), want);
        heads.push(head);
        next = next.wrapping_add(1);
    }
    let last = device.next().map(|chain| chain.map(|(head, _)| head.index()));
    assert_eq!(last, broken.map_or(Ok(None), Err));
    assert_eq!(usize::from(device.in_flight()), heads.len());
    let owed = heads.len() as u16;
    case.only_here(|| {
        heads.into_iter().for_each(|head| device.push(head, 0));
        assert!(device.publish() || owed == 0);
    });
    assert_eq!(memory.load16(USED + 2), used.wrapping_add(owed));
    assert_eq!(device.stop().next_avail, next);
}

pub fn run(data: &[u8]) {
    let mut bytes = Reader::new(data);
    match bytes.below(4) {
        0 => shapes(&mut bytes),
        1 | 2 => lives(&mut bytes),
        _ => ring(&mut bytes),
    }
}
