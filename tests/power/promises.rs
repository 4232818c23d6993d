//! What a guest wrote to each sector, and which of it was promised to be there after a power cut.
//!
//! A promise is made when the guest sees an answer. It holds at every cut that is not before the place `from` in the
//! disk's log, which is how long the log was just after the answer was seen: see the head of `power`.

use crate::support::disk::{SECTOR, salted};

/// What one sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Zeroes,
    /// What the write of this number wrote there.
    Written(u64),
    /// Nothing that was ever written to this sector, or a mixture.
    Strange,
}

/// Finds out what 512 bytes are that were read from `sector`.
pub fn content(sector: u64, bytes: &[u8]) -> Content {
    if bytes.iter().all(|&byte| byte == 0) {
        return Content::Zeroes;
    }
    // The inverse of what `salted` multiplies by.
    const INVERSE: u64 = 0xf1de_83e1_9937_733d;
    let first = u64::from_le_bytes(bytes[..8].try_into().unwrap()).wrapping_mul(INVERSE);
    let number = first.wrapping_sub(sector * (SECTOR as u64 / 8) + 1) >> 40;
    if number > 0 && bytes == salted(number, sector, 1) { Content::Written(number) } else { Content::Strange }
}

/// What a request does to a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Write,
    Zeroes,
    /// Undefined until it is written again: zeroes, or anything that the sector held before.
    Discard,
}

/// Of one sector, from this place in the log on: nothing older than this version.
#[derive(Clone, Copy, Debug)]
pub struct Promise {
    pub from: usize,
    pub sector: u64,
    pub version: usize,
}

/// All versions of all sectors. At most one request at a time changes a sector, so its versions have an order.
pub struct Promises {
    /// Of each sector: what it was to become, by which request. Number 0 is how the disk began.
    versions: Vec<Vec<(u64, Change)>>,
    /// The newest version that was answered.
    answered: Vec<usize>,
    /// The newest version that was promised.
    promised: Vec<usize>,
    /// In the order of their places.
    pub made: Vec<Promise>,
}

impl Promises {
    /// Of a disk of zeroes.
    pub fn new(sectors: u64) -> Self {
        let sectors = sectors as usize;
        Self {
            versions: vec![vec![(0, Change::Zeroes)]; sectors],
            answered: vec![0; sectors],
            promised: vec![0; sectors],
            made: Vec::new(),
        }
    }

    pub fn sectors(&self) -> u64 {
        self.versions.len() as u64
    }

    /// A request is about to be made.
    pub fn request(&mut self, number: u64, change: Change, range: std::ops::Range<u64>) {
        for sector in range {
            self.versions[sector as usize].push((number, change));
        }
    }

    /// The last request for these sectors was answered.
    pub fn answer(&mut self, range: std::ops::Range<u64>) {
        for sector in range {
            self.answered[sector as usize] = self.versions[sector as usize].len() - 1;
        }
    }

    /// What a FLUSH that is sent now promises once it is answered.
    pub fn answered(&self) -> Vec<usize> {
        self.answered.clone()
    }

    /// All that had been answered is durable.
    pub fn promise_all(&mut self, from: usize, answered: &[usize]) {
        for (sector, &version) in (0..).zip(answered) {
            self.promise(Promise { from, sector, version });
        }
    }

    /// What was answered of these sectors is durable.
    pub fn promise_range(&mut self, from: usize, range: std::ops::Range<u64>) {
        for sector in range {
            self.promise(Promise { from, sector, version: self.answered[sector as usize] });
        }
    }

    fn promise(&mut self, promise: Promise) {
        let promised = &mut self.promised[promise.sector as usize];
        if promise.version > *promised {
            *promised = promise.version;
            self.made.push(promise);
        }
    }

    /// Whether a sector may hold this, if nothing older than `oldest` may be there.
    pub fn allow(&self, sector: u64, content: Content, oldest: usize) -> bool {
        let versions = &self.versions[sector as usize];
        let newer = &versions[oldest..];
        let discarded = newer.iter().any(|(_, change)| *change == Change::Discard);
        match content {
            Content::Zeroes => discarded || newer.iter().any(|(_, change)| *change == Change::Zeroes),
            Content::Written(number) => {
                let wrote = |(by, change): &(u64, Change)| *by == number && *change == Change::Write;
                if discarded { versions.iter().any(wrote) } else { newer.iter().any(wrote) }
            }
            Content::Strange => false,
        }
    }

    /// Whether a read that meets no request for the sector may give this.
    pub fn allow_read(&self, sector: u64, content: Content) -> bool {
        self.allow(sector, content, self.answered[sector as usize])
    }

    /// The versions of a sector from this one on, for a complaint.
    pub fn tell(&self, sector: u64, oldest: usize) -> String {
        format!("{:?}", &self.versions[sector as usize][oldest..])
    }
}
