//! The dirty log: which pages of the guest were written, for a live migration
//! (vhost-user, "Migration").
//!
//! What it is: the bitmap of VHOST_USER_SET_LOG_BASE, one bit for each 4096 bytes
//! of guest address, that all workers mark and the front-end reads and clears
//! while they do.
//!
//! What it is not: it does not know when a page is written; the writer
//! marks it, afterwards.
//!
//! Invariants: a page is marked after its last byte was written, or the front-end
//! could copy it too early and never again; each mark is an atomic read-modify-
//! write, also of a bit that seems to be set: it orders the guest's bytes before
//! the front-end's look at them. No mark leaves the bitmap.
#![expect(unsafe_code, reason = "sets bits in shared memory through atomics")]

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use crate::memory::mapping::Mapping;
use crate::sys;

/// Guest bytes of a bit (VHOST_LOG_PAGE).
const PAGE: u64 = 4096;

/// See the head of the file.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: Mapping,
    outside: AtomicBool,
}

impl DirtyLog {
    /// Maps the log: `bytes` bytes of `file` from `offset` on.
    ///
    /// # Errors
    /// As [`Mapping::new`].
    pub fn map(file: &File, bytes: u64, offset: u64) -> io::Result<Self> {
        Ok(Self { mapping: Mapping::new(file, offset, bytes)?, outside: AtomicBool::new(false) })
    }

    /// True if it has a bit for the guest byte before `end`.
    #[must_use]
    pub fn covers(&self, end: u64) -> bool {
        end.div_ceil(PAGE).div_ceil(8) <= self.mapping.len() as u64
    }

    /// True once the front-end truncated its file.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    /// Marks the pages of `[guest, guest + len)`.
    pub fn mark(&self, guest: u64, len: u64) {
        let Some(last) = len.checked_sub(1).map(|more| guest.saturating_add(more) / PAGE) else { return };
        for page in guest / PAGE..=last {
            let at = usize::try_from(page / 8).unwrap_or(usize::MAX);
            if at >= self.mapping.len() {
                static SAID: AtomicU64 = AtomicU64::new(0); // a front-end can give one log after another
                if !self.outside.swap(true, Ordering::Relaxed) && sys::is_seldom(&SAID) {
                    tracing::error!(
                        "guest memory at {guest:#x} is beyond the dirty log: the migration misses what is written there"
                    );
                }
                return;
            }
            let byte = std::ptr::with_exposed_provenance_mut::<u8>(self.mapping.addr() + at);
            // SAFETY: inside the mapping, which lives as long as `self`; shared with
            // the front-end, hence an atomic.
            unsafe { AtomicU8::from_ptr(byte) }.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_bit_for_each_page_that_is_touched() {
        let file: File =
            rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd").into();
        file.set_len(8192).expect("its length");
        let log = DirtyLog::map(&file, 4, 4096).expect("a log of 32 pages");
        assert!(log.covers(32 * 4096) && !log.covers(32 * 4096 + 1));
        log.mark(4095, 0);
        log.mark(4095, 1);
        log.mark(3 * 4096 - 1, 2);
        log.mark(9 * 4096, 4096);
        // Beyond it, also by an overflow, is nowhere.
        log.mark(31 * 4096, u64::MAX);
        log.mark(u64::MAX - 5, 10);
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 4096).expect("read");
        assert_eq!(bytes, [0b1101, 0b10, 0, 0x80, 0, 0, 0, 0]);
    }
}
