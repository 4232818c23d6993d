//! A trace: each request of a disk as a record, when it has ended, in memory that is shared with `vublk trace`.
//!
//! What it is: how that memory is laid out, a [`Ring`] that one worker writes, and a [`Reader`] of it.
//!
//! What it is not: [`crate::session`] begins and ends traces; the tool makes the memory and prints what is in it.
//!
//! Invariants: the daemon reads nothing there: where a worker writes next it knows by itself. A worker waits for no reader:
//! a record that was not read in time is overwritten, and the reader finds out how many there were.
//!
//! ```text
//!   memory   ring of worker 0 │ ring of worker 1 │ …       all of the same size
//!   ring     records written until now │ 7 words of nothing │ record 0 │ record 1 │ …, and again over record 0
//!   record   CLOCK_MONOTONIC at its end │ nanoseconds that it took │ sector │ bytes │ queue, operation, status
//! ```

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU64, fence};

use crate::complete::Status;
use crate::memory::mapping::Mapping;
use crate::stats::Operation;

/// Words of a ring before its first record, and of a record.
const HEAD: usize = 8;
const WORDS: usize = 5;
const WORD: usize = size_of::<u64>();
/// Records that a ring has at least: those of some milliseconds.
const LEAST: usize = 512;

/// Descriptors of a [`Request`].
pub const FDS: usize = 2;

/// What a client of the control socket asks for.
#[derive(Debug)]
pub struct Request {
    /// Requests that took less time than so many nanoseconds are left out.
    pub slow_ns: u64,
    /// When it ends; else when the client's pipe is closed.
    pub seconds: Option<u32>,
    /// The memory, and the client's pipe, to write.
    pub fds: Vec<OwnedFd>,
}

/// The memory of a trace, and what goes there.
#[derive(Clone, Debug)]
pub struct Tracing {
    /// It.
    pub memory: Arc<Mapping>,
    /// Records of each ring.
    pub records: usize,
    /// Requests that took less time than so many nanoseconds are left out.
    pub slow: u64,
}

impl Tracing {
    /// The ring of worker `number`, from its beginning.
    #[must_use]
    pub fn ring(&self, number: usize) -> Ring {
        Ring { place: Place::new(&self.memory, number, self.records), slow: self.slow, written: 0 }
    }
}

/// A request that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// When: CLOCK_MONOTONIC, nanoseconds.
    pub ended: u64,
    /// Nanoseconds since it was fetched.
    pub latency: u64,
    /// Its first sector of 512 bytes; 0 where it names none.
    pub sector: u64,
    /// Bytes that it names.
    pub bytes: u64,
    /// Its queue.
    pub queue: u16,
    /// What it was.
    pub operation: Operation,
    /// How it was answered.
    pub status: Status,
}

impl Record {
    fn words(&self) -> [u64; WORDS] {
        let &Self { ended, latency, sector, bytes, queue, operation, status } = self;
        let rest = u64::from(queue) | (operation as u64) << 16 | u64::from(status.byte()) << 24;
        [ended, latency, sector, bytes, rest]
    }

    /// `None`: no vublkd has written this.
    fn of([ended, latency, sector, bytes, rest]: [u64; WORDS]) -> Option<Self> {
        let [queue_low, queue_high, operation, status, ..] = rest.to_le_bytes();
        let queue = u16::from_le_bytes([queue_low, queue_high]);
        let operation = *Operation::ALL.get(usize::from(operation))?;
        let status = [Status::Ok, Status::IoErr, Status::Unsupp].into_iter().find(|s| s.byte() == status)?;
        Some(Self { ended, latency, sector, bytes, queue, operation, status })
    }
}

/// Records of each ring, where so many rings share so many bytes.
///
/// # Errors
/// How many bytes there have to be at least.
pub fn records(bytes: usize, rings: usize) -> Result<usize, usize> {
    let rings = rings.max(1);
    let records = (bytes / rings / WORD).saturating_sub(HEAD) / WORDS;
    if records < LEAST { Err(ring_bytes(LEAST) * rings) } else { Ok(records) }
}

fn ring_bytes(records: usize) -> usize {
    (HEAD + records * WORDS) * WORD
}

/// A ring in the memory: how many records were written there, and the words of those.
#[derive(Debug)]
struct Place {
    map: Arc<Mapping>,
    at: usize,
    records: usize,
}

impl Place {
    fn new(map: &Arc<Mapping>, number: usize, records: usize) -> Self {
        Self { map: Arc::clone(map), at: number.saturating_mul(ring_bytes(records)), records }
    }

    fn written(&self) -> Option<&AtomicU64> {
        self.map.words(self.at, 1)?.first()
    }

    /// The words of a record, by its number since the beginning.
    fn record(&self, number: u64) -> Option<&[AtomicU64]> {
        let at = usize::try_from(number % self.records.max(1) as u64).ok()?;
        self.map.words(self.at + ring_bytes(at), WORDS)
    }
}

/// The ring of one worker, to write.
#[derive(Debug)]
pub struct Ring {
    place: Place,
    /// Requests that took less time than so many nanoseconds are left out.
    slow: u64,
    written: u64,
}

impl Ring {
    /// Writes a record over the oldest one.
    pub fn write(&mut self, record: &Record) {
        if record.latency < self.slow {
            return;
        }
        let (Some(written), Some(words)) = (self.place.written(), self.place.record(self.written)) else {
            return; // not reached: the memory has all rings
        };
        // A reader that sees one of the words below also sees how many records were written before.
        fence(Release);
        words.iter().zip(record.words()).for_each(|(word, value)| word.store(value, Relaxed));
        self.written += 1;
        written.store(self.written, Release);
    }
}

/// The same ring, to read.
#[derive(Debug)]
pub struct Reader {
    place: Place,
    read: u64,
}

impl Reader {
    /// Of worker `number`; each ring has so many records.
    #[must_use]
    pub fn new(map: &Arc<Mapping>, number: usize, records: usize) -> Self {
        Self { place: Place::new(map, number, records), read: 0 }
    }

    /// Reads the records that were written since; gives how many were overwritten before they could be read.
    pub fn read(&mut self, mut each: impl FnMut(Record)) -> u64 {
        let Self { place, read } = self;
        let Some(count) = place.written() else { return 0 };
        let end = count.load(Acquire);
        let mut lost = 0;
        while *read < end {
            let mut words = [0; WORDS];
            let from = place.record(*read).unwrap_or_default();
            words.iter_mut().zip(from).for_each(|(word, cell)| *word = cell.load(Relaxed));
            fence(Acquire);
            // The worker may be writing the one after these, over the oldest.
            let oldest = (count.load(Relaxed) + 1).saturating_sub(place.records as u64);
            if *read < oldest {
                lost += oldest - *read;
                *read = oldest;
                continue;
            }
            Record::of(words).into_iter().for_each(&mut each);
            *read += 1;
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn memory(rings: usize, records: usize) -> Arc<Mapping> {
        let file = File::from(memfd_create("trace", MemfdFlags::CLOEXEC).expect("memory"));
        let bytes = (rings * ring_bytes(records)) as u64;
        file.set_len(bytes).expect("memory");
        Arc::new(Mapping::new(&file, 0, bytes).expect("memory"))
    }

    fn record(number: u64) -> Record {
        let operation = Operation::ALL[usize::try_from(number % 6).expect("few")];
        let status = if number.is_multiple_of(7) { Status::IoErr } else { Status::Ok };
        let queue = u16::try_from(number % 256).expect("few");
        Record {
            ended: number,
            latency: number * 3,
            sector: !number,
            bytes: number << 9,
            queue,
            operation,
            status,
        }
    }

    fn ring(map: &Arc<Mapping>, number: usize, records: usize, slow: u64) -> Ring {
        Tracing { memory: Arc::clone(map), records, slow }.ring(number)
    }

    #[test]
    fn what_was_written_is_read_once_and_what_was_overwritten_is_counted() {
        let map = memory(2, 8);
        let (mut other, mut ring) = (ring(&map, 0, 8, 0), ring(&map, 1, 8, 30));
        let mut reader = Reader::new(&map, 1, 8);
        (0..15).for_each(|number| ring.write(&record(number)));
        other.write(&record(77));
        let mut got = Vec::new();
        assert_eq!(reader.read(|record| got.push(record)), 0);
        assert_eq!(got, (10..15).map(record).collect::<Vec<_>>(), "those that took 30 ns or more");
        assert_eq!(reader.read(|_| panic!("twice")), 0);
        got.clear();
        (100..120).for_each(|number| ring.write(&record(number)));
        assert_eq!(reader.read(|record| got.push(record)), 13);
        assert_eq!(got, (113..120).map(record).collect::<Vec<_>>(), "one less than there is room for");
    }

    /// No record is read that was written in part, and none goes unnoticed.
    #[test]
    fn a_reader_beside_a_writer() {
        const ALL: u64 = 300_000;
        let map = memory(1, 16);
        let (mut ring, mut reader) = (ring(&map, 0, 16, 0), Reader::new(&map, 0, 16));
        let writer = std::thread::spawn(move || (0..ALL).for_each(|number| ring.write(&record(number))));
        let (mut read, mut lost, mut last) = (0, 0, None);
        while read + lost < ALL {
            lost += reader.read(|got| {
                assert_eq!(got, record(got.ended));
                assert!(last < Some(got.ended), "{last:?} before {got:?}");
                (last, read) = (Some(got.ended), read + 1);
            });
        }
        writer.join().expect("the writer");
        assert_eq!((read + lost, last), (ALL, Some(ALL - 1)));
    }

    #[test]
    fn memory_that_is_too_small() {
        let least = records(0, 4).expect_err("nothing");
        assert_eq!(records(least - 1, 4), Err(least));
        assert_eq!(records(least, 4), Ok(LEAST));
        assert!(records(16 << 20, 1).is_ok_and(|records| records > 400_000));
    }
}
