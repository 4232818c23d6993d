//! The disk of the simulation: sectors behind a volatile cache.
//!
//! Every sector holds one number, repeated in all of its words, so that a torn
//! sector would show. A sector remembers what was written to it since it was last
//! durable: a power cut leaves any of that, and a failed write-back gives some of it
//! up, which shows only at the next power cut.

use vublk::backing::Backing;
use vublk::engine::{Io, Kind, Target};

use crate::support::dice::Dice;

pub const SECTOR: usize = 512;

/// One sector of the disk.
#[derive(Clone, Debug, Default)]
pub struct Sector {
    durable: u64,
    /// What is there, but was given up: nothing will make it durable.
    lost: Option<u64>,
    /// What was written since, oldest first, and when: see [`Disk::clock`].
    cached: Vec<(u64, u64)>,
}

impl Sector {
    pub fn now(&self) -> u64 {
        self.cached.last().map(|written| written.1).or(self.lost).unwrap_or(self.durable)
    }

    /// What was there before the last write, if that is not durable yet.
    pub fn before(&self) -> Option<u64> {
        let (_, earlier) = self.cached.split_last()?;
        Some(earlier.last().map(|written| written.1).or(self.lost).unwrap_or(self.durable))
    }

    /// What was written up to this time is durable.
    fn settle(&mut self, time: u64) {
        let some = self.cached.iter().take_while(|written| written.0 <= time).count();
        if let Some((_, last)) = self.cached.drain(..some).next_back() {
            (self.durable, self.lost) = (last, None);
        }
    }

    /// What is cached now is given up.
    fn lose(&mut self) {
        self.lost = self.cached.last().map(|written| written.1).or(self.lost);
        self.cached.clear();
    }

    /// Only what is durable is left.
    fn forget(&mut self) {
        self.cached.clear();
        self.lost = None;
    }
}

/// See the head of the file.
pub struct Disk {
    sectors: Vec<Sector>,
    /// Counts the writes.
    pub clock: u64,
    /// What O_DIRECT asks of offsets and of addresses, bytes; 1: nothing.
    offset_align: u64,
    mem_align: u64,
    /// Where a last, partial block begins, bytes.
    tail: u64,
}

impl Disk {
    pub fn new(sectors: usize) -> Self {
        let sectors = vec![Sector::default(); sectors];
        Self { sectors, clock: 0, offset_align: 1, mem_align: 1, tail: u64::MAX }
    }

    /// What it asks of operations.
    pub fn rules(&mut self, backing: &Backing) {
        (self.offset_align, self.mem_align) = (backing.block, backing.mem_align().into());
        let bytes = self.bytes();
        let partial = bytes % self.offset_align;
        self.tail = if partial == 0 { u64::MAX } else { bytes - partial };
    }

    fn bytes(&self) -> u64 {
        (self.sectors.len() * SECTOR) as u64
    }

    /// What is there.
    pub fn read(&self, sector: u64) -> u64 {
        self.sectors[sector as usize].now()
    }

    /// The sectors of an operation.
    pub fn range(&mut self, io: &Io) -> &mut [Sector] {
        let (first, count) = (io.offset as usize / SECTOR, io.len as usize / SECTOR);
        &mut self.sectors[first..first + count]
    }

    /// All sectors of an operation become zeroes.
    pub fn zero(&mut self, io: &Io) {
        self.clock += 1;
        let time = self.clock;
        self.range(io).iter_mut().for_each(|sector| sector.cached.push((time, 0)));
    }

    /// What was written up to this time becomes durable: all of it by an fdatasync, its own
    /// sectors by a write with RWF_DSYNC.
    pub fn settle(&mut self, io: &Io, time: u64) {
        let sectors = if io.kind == Kind::Sync { &mut self.sectors } else { self.range(io) };
        sectors.iter_mut().filter(|sector| !sector.cached.is_empty()).for_each(|sector| sector.settle(time));
    }

    /// A write-back fails: some of what is cached is given up, and shown all the same.
    pub fn lose(&mut self, dice: &mut Dice) {
        for sector in &mut self.sectors {
            if dice.rarely(2) {
                sector.lose();
            }
        }
    }

    /// The power fails: each sector has what was durable, or anything newer.
    pub fn power_cut(&mut self, dice: &mut Dice) {
        for sector in &mut self.sectors {
            let choice = dice.below(sector.cached.len() as u64 + 1) as usize;
            if let Some(&(time, _)) = sector.cached[..choice].last() {
                sector.settle(time);
            }
            sector.forget();
        }
    }

    /// Another host looks at the image, which has seen nothing of this one's page cache.
    pub fn other_host(&mut self) {
        self.sectors.iter_mut().for_each(Sector::forget);
    }

    /// Moves the first `count` sectors of a read or a write. A sector may be scattered over
    /// buffers, of which each is whole words.
    pub fn transfer(&mut self, io: &Io, vectors: &[libc::iovec], count: u64) {
        self.clock += 1;
        let time = self.clock;
        let mut rest = vectors.iter();
        let mut words: &mut [u64] = &mut [];
        for sector in self.range(io).iter_mut().take(count as usize) {
            let mut value = (io.kind == Kind::Read).then(|| sector.now());
            let mut left = SECTOR / 8;
            while left > 0 {
                if words.is_empty() {
                    let v = rest.next().expect("bytes of the sector");
                    let (base, len) = (v.iov_base.cast::<u64>(), v.iov_len / 8);
                    assert!(base.is_aligned(), "the simulation's buffers are whole words");
                    // SAFETY: the worker vouches for the iovecs as long as the operation runs,
                    // and the memory is mapped as long as the simulation, which has one thread.
                    words = unsafe { std::slice::from_raw_parts_mut(base, len) };
                }
                let here = left.min(words.len());
                let (now, later) = std::mem::take(&mut words).split_at_mut(here);
                if io.kind == Kind::Read {
                    now.fill(value.unwrap_or_default());
                } else {
                    let first = *value.get_or_insert(now[0]);
                    assert!(now.iter().all(|&word| word == first), "a torn sector is written");
                }
                left -= now.len();
                words = later;
            }
            if let Some(value) = value.filter(|_| io.kind != Kind::Read) {
                sector.cached.push((time, value));
            }
        }
    }

    /// What O_DIRECT refuses, and what leaves the disk or makes it longer.
    pub fn judge(&self, io: &Io, vectors: &[libc::iovec]) {
        assert!(io.offset + io.len <= self.bytes(), "it leaves the disk: {io:?}");
        if let Kind::Fallocate(mode) = io.kind {
            let punches = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let zeroes = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
            assert!([punches, zeroes].contains(&mode), "fallocate({mode:#x})");
        }
        if !matches!(io.kind, Kind::Read | Kind::Write { .. }) {
            return;
        }
        let total: usize = vectors.iter().map(|v| v.iov_len).sum();
        assert_eq!(total as u64, io.len, "what the iovecs add up to");
        let (offset_align, mem_align) = match io.target {
            Target::Disk => (self.offset_align, self.mem_align),
            Target::Cached => (1, 1),
        };
        assert!(
            io.target == Target::Cached || io.offset + io.len <= self.tail,
            "direct I/O in the last, partial block: {io:?}"
        );
        assert!(
            io.offset.is_multiple_of(offset_align) && io.len.is_multiple_of(offset_align),
            "O_DIRECT: {io:?}"
        );
        for v in vectors {
            let aligned = (v.iov_base.addr() as u64).is_multiple_of(mem_align);
            assert!(
                aligned && (v.iov_len as u64).is_multiple_of(mem_align.min(offset_align)),
                "O_DIRECT: {v:?}"
            );
        }
    }
}
