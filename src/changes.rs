//! Which parts of a disk were written since a snapshot, in units of [`GRAIN`].
//!
//! What it is: a bitmap in memory that outlives the process. Workers set bits, each before it submits what changes the
//! disk; a backup reads extents.
//!
//! What it is not: it knows no snapshot; [`crate::session`] has one bitmap for each.
//!
//! Invariant: what was changed is marked, whatever ends the process; what is marked may be as it was.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::MemfdFlags;
use serde::Deserialize;

use crate::memory::mapping::Mapping;

/// Bytes of the disk for each bit.
pub const GRAIN: u64 = 64 << 10;
/// Bytes of the disk for each word of the bitmap.
const WORD: u64 = 64 * GRAIN;
/// A disk may grow to this many bytes, or to four times its size, before all of it counts as changed.
const LEAST: u64 = 1 << 40;

/// Bytes from an offset on.
pub type Extent = (u64, u64);

/// Which changes are asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Since {
    /// From the last snapshot until now.
    #[default]
    Last,
    /// From the snapshot before the last one until the last one.
    Previous,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Changes {
    map: Mapping,
}

impl Changes {
    /// An empty bitmap for a disk of so many bytes, and its file, of which the length is all that a successor needs.
    ///
    /// # Errors
    /// When memory or descriptors run out.
    pub fn create(disk: u64) -> io::Result<(File, Self)> {
        let words = disk.saturating_mul(4).max(LEAST).div_ceil(WORD);
        let file = File::from(rustix::fs::memfd_create("vublk-changes", MemfdFlags::CLOEXEC)?);
        // The first word says whether something was changed that has no bit.
        file.set_len((1 + words) * 8)?;
        let changes = Self::map(&file)?;
        Ok((file, changes))
    }

    /// One that an earlier process had.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn map(file: &File) -> io::Result<Self> {
        Ok(Self { map: Mapping::new(file, 0, file.metadata()?.len())? })
    }

    /// The words of these bytes; none where they are not all there.
    fn words(&self) -> (&AtomicU64, &[AtomicU64]) {
        static NONE: AtomicU64 = AtomicU64::new(1);
        let all = self.map.words(0, self.map.len() / 8).unwrap_or_default();
        all.split_first().unwrap_or((&NONE, &[]))
    }

    /// These bytes are about to change.
    pub fn mark(&self, offset: u64, len: u64) {
        let (outside, words) = self.words();
        let mut at = offset / GRAIN;
        let end = offset.saturating_add(len).div_ceil(GRAIN);
        while at < end {
            let next = ((at / 64) + 1).saturating_mul(64).min(end);
            let bits = u64::MAX >> (64 - (next - at)) << (at % 64);
            let word = usize::try_from(at / 64).ok().and_then(|at| words.get(at));
            let (word, bits) = word.map_or((outside, 1), |word| (word, bits));
            // Most are set already, and a load leaves the cache line where it is.
            if word.load(Ordering::Relaxed) & bits != bits {
                word.fetch_or(bits, Ordering::Relaxed);
            }
            at = next;
        }
    }

    /// What has changed of a disk of so many bytes, from byte `from` on, as at most `most` extents; and where to go on.
    #[must_use]
    pub fn extents(&self, disk: u64, from: u64, most: usize) -> (Vec<Extent>, Option<u64>) {
        let (outside, words) = self.words();
        if outside.load(Ordering::Relaxed) != 0 {
            return (if from < disk { vec![(from, disk - from)] } else { Vec::new() }, None);
        }
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = from / GRAIN;
        let end = disk.div_ceil(GRAIN);
        while at < end {
            let word = usize::try_from(at / 64).ok().and_then(|at| words.get(at));
            let bits = word.map_or(0, |word| word.load(Ordering::Relaxed)) >> (at % 64);
            if bits == 0 {
                at = (at / 64 + 1) * 64;
                continue;
            }
            at += u64::from(bits.trailing_zeros());
            if at >= end {
                break;
            }
            let (start, stop) = (at * GRAIN, ((at + 1) * GRAIN).min(disk));
            let full = extents.len() == most;
            match extents.last_mut() {
                Some((offset, len)) if *offset + *len == start => *len = stop - *offset,
                _ if full => return (extents, Some(start)),
                _ => extents.push((start, stop - start)),
            }
            at += 1;
        }
        (extents, None)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Beside a plain list of blocks.
        #[test]
        fn extents_are_those_that_were_marked(
            marks in proptest::collection::vec((0_u64..(300 * GRAIN), 0_u64..(70 * GRAIN)), 0..20),
            disk in 1_u64..(400 * GRAIN),
            most in 1_usize..5,
        ) {
            let (_file, changes) = Changes::create(disk).expect("memory");
            let mut plain = vec![false; 400];
            for &(offset, len) in &marks {
                changes.mark(offset, len);
                let blocks = offset / GRAIN..(offset + len).div_ceil(GRAIN);
                blocks.for_each(|block| plain[usize::try_from(block).expect("few")] = true);
            }
            let (mut from, mut found) = (0, vec![false; 400]);
            loop {
                let (extents, next) = changes.extents(disk, from, most);
                prop_assert!(extents.len() <= most);
                for (offset, len) in extents {
                    prop_assert!(len > 0 && offset + len <= disk && offset % GRAIN == 0);
                    let blocks = offset / GRAIN..(offset + len).div_ceil(GRAIN);
                    for block in blocks {
                        let cell = &mut found[usize::try_from(block).expect("few")];
                        prop_assert!(!std::mem::replace(cell, true), "twice");
                    }
                }
                match next {
                    Some(next) => {
                        prop_assert!(next > from || from == 0);
                        from = next;
                    }
                    None => break,
                }
            }
            let blocks = usize::try_from(disk.div_ceil(GRAIN)).expect("few");
            prop_assert_eq!(&found[..blocks], &plain[..blocks]);
        }
    }

    #[test]
    fn what_has_no_bit_is_all_of_the_disk() {
        let (file, changes) = Changes::create(1 << 30).expect("memory");
        changes.mark(0, GRAIN);
        assert_eq!(changes.extents(1 << 41, 0, 9), (vec![(0, GRAIN)], None));
        let again = Changes::map(&file).expect("memory");
        assert_eq!(again.extents(1 << 41, 0, 9), (vec![(0, GRAIN)], None));
        again.mark(1 << 41, 1);
        assert_eq!(changes.extents(1 << 42, GRAIN, 9), (vec![(GRAIN, (1 << 42) - GRAIN)], None));
    }
}
