//! A live migration as its source does it: pages that were written, by the guest
//! or by the device, are copied again and again while both go on, and once more
//! when the guest has stopped. The copy is then the memory.
//!
//! Not told apart: marks of a used ring while it runs from the one when it stops, and
//! a mark of a status byte right before it from one right behind.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

use vublk::dirty::DirtyLog;

use crate::support::memory::Memory;
use crate::support::sys::memory_file;

const PAGE: u64 = 4096;

/// See the head of the file.
pub struct Migration {
    memory: Rc<Memory>,
    file: File,
    pub log: Arc<DirtyLog>,
    /// Pages that the guest's processors wrote, which its VMM knows by itself.
    by_guest: BTreeSet<u64>,
    copy: Vec<u8>,
    pub passes: u64,
}

impl Migration {
    /// Before the first page is sent.
    pub fn new(memory: &Rc<Memory>) -> Self {
        let region = &memory.regions[0];
        let bytes = ((region.guest + region.len) / PAGE).div_ceil(8);
        let file = memory_file(bytes);
        let log = Arc::new(DirtyLog::map(&file, bytes, 0).unwrap());
        Self { memory: Rc::clone(memory), file, log, by_guest: BTreeSet::new(), copy: Vec::new(), passes: 0 }
    }

    /// The device marks from now on: everything is sent once.
    pub fn begin(&mut self) {
        self.copy = self.memory.read(self.start(), self.taken());
    }

    fn start(&self) -> u64 {
        self.memory.regions[0].guest
    }

    /// Whole pages that anybody has a use for.
    fn taken(&self) -> usize {
        self.memory.taken().next_multiple_of(PAGE) as usize
    }

    pub fn guest_wrote(&mut self, guest: u64, len: u64) {
        self.by_guest.extend(guest / PAGE..(guest + len).div_ceil(PAGE));
    }

    /// Copies what was marked since the last time.
    pub fn pass(&mut self) {
        if self.copy.is_empty() {
            return; // not begun
        }
        self.passes += 1;
        self.copy.resize(self.taken(), 0);
        let mut marks = vec![0; self.log_bytes()];
        self.file.read_exact_at(&mut marks, 0).unwrap();
        self.file.write_all_at(&vec![0; marks.len()], 0).unwrap();
        let mut pages = std::mem::take(&mut self.by_guest);
        for (at, byte) in (0..).zip(marks).filter(|(_, byte)| *byte != 0) {
            pages.extend((0..8).filter(|bit| byte >> bit & 1 != 0).map(|bit| 8 * at + bit));
        }
        for page in pages {
            let guest = page * PAGE;
            let at = (guest - self.start()) as usize;
            let bytes = self.memory.read(guest, PAGE as usize);
            self.copy[at..at + PAGE as usize].copy_from_slice(&bytes);
        }
    }

    /// Takes the mark of a page out again, as if the device had not made it.
    pub fn unmark(&self, guest: u64) {
        let (at, bit) = (guest / PAGE / 8, guest / PAGE % 8);
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, at).unwrap();
        self.file.write_all_at(&[byte[0] & !(1 << bit)], at).unwrap();
    }

    fn log_bytes(&self) -> usize {
        self.file.metadata().unwrap().len() as usize
    }

    /// The guest has stopped, and its device has.
    pub fn end(mut self) {
        self.pass();
        let memory = self.memory.read(self.start(), self.copy.len());
        for (at, (old, new)) in self.copy.chunks(PAGE as usize).zip(memory.chunks(PAGE as usize)).enumerate()
        {
            let guest = self.start() + at as u64 * PAGE;
            assert!(old == new, "the page at {guest:#x} was written and not marked");
        }
    }
}
