//! The driver's side of a split virtqueue, with every field in reach: any
//! descriptor, any link, any index, and both ways of suppressing signals.

use std::rc::Rc;
use std::time::Duration;

use super::memory::Memory;
use super::sys::{Deadline, Event};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// A descriptor as it lies in memory.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Desc {
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A piece of a request: where, how long, and who writes it.
#[derive(Clone, Copy, Debug)]
pub struct Seg {
    pub addr: u64,
    pub len: u32,
    pub device_writes: bool,
}

/// For the device to read.
pub fn out(addr: u64, len: usize) -> Seg {
    Seg { addr, len: u32::try_from(len).unwrap(), device_writes: false }
}

/// For the device to write.
pub fn back(addr: u64, len: usize) -> Seg {
    Seg { addr, len: u32::try_from(len).unwrap(), device_writes: true }
}

/// An element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    pub len: u32,
}

/// A piece as a descriptor, and the one after it.
fn link(seg: Seg, next: Option<u16>) -> Desc {
    let flags = if seg.device_writes { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
    Desc { addr: seg.addr, len: seg.len, flags, next: next.unwrap_or(0) }
}

/// One queue.
pub struct Ring {
    pub memory: Rc<Memory>,
    pub size: u16,
    pub table: u64,
    pub avail: u64,
    pub used: u64,
    pub kick: Event,
    pub call: Event,
    pub event_idx: bool,
    /// What is in the avail index (all of it published).
    pub avail_idx: u16,
    /// How far the used ring has been read.
    pub seen: u16,
    free: Vec<u16>,
    /// The descriptors of each chain, by head.
    chains: Vec<Vec<u16>>,
}

impl Ring {
    /// A ring whose both indices start at `base`.
    pub fn new(memory: Rc<Memory>, size: u16, base: u16, event_idx: bool) -> Self {
        Self::aligned(memory, size, base, event_idx, 4)
    }

    /// The same with what the driver writes and what the device writes at multiples
    /// of `align`.
    pub fn aligned(memory: Rc<Memory>, size: u16, base: u16, event_idx: bool, align: u64) -> Self {
        let entries = u64::from(size);
        let table = memory.alloc(16 * entries, align.max(16));
        let avail = memory.alloc(6 + 2 * entries, 2);
        let used = memory.alloc(6 + 8 * entries, align);
        let ring = Self {
            memory,
            size,
            table,
            avail,
            used,
            kick: Event::new(),
            call: Event::new(),
            event_idx,
            avail_idx: base,
            seen: base,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
        };
        ring.memory.store16(ring.avail + 2, base);
        ring.memory.store16(ring.used + 2, base);
        if event_idx {
            ring.set_used_event(base);
        }
        ring
    }

    pub fn write_desc(&self, index: u16, desc: Desc) {
        self.memory.write(self.table + 16 * u64::from(index), &desc.bytes());
    }

    /// Takes a descriptor that no chain uses.
    pub fn take_desc(&mut self) -> u16 {
        self.free.pop().expect("the ring is full")
    }

    /// Writes a chain into free descriptors; gives its head.
    pub fn chain(&mut self, segs: &[Seg]) -> u16 {
        let indices: Vec<u16> = segs.iter().map(|_| self.take_desc()).collect();
        for (at, seg) in segs.iter().enumerate() {
            self.write_desc(indices[at], link(*seg, indices.get(at + 1).copied()));
        }
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        head
    }

    /// Writes a chain into a table of its own; gives its head.
    pub fn indirect(&mut self, segs: &[Seg]) -> u16 {
        let table = self.memory.alloc(16 * segs.len() as u64, 16);
        self.indirect_at(table, segs)
    }

    /// The same into a table at a place that is used again and again.
    pub fn indirect_at(&mut self, table: u64, segs: &[Seg]) -> u16 {
        for (index, seg) in (0..).zip(segs) {
            let desc = link(*seg, (index + 1 < segs.len() as u16).then_some(index + 1));
            self.memory.write(table + 16 * u64::from(index), &desc.bytes());
        }
        self.indirect_table(table, 16 * segs.len())
    }

    /// Stages a head whose descriptors the test writes itself.
    pub fn stage_own(&mut self, head: u16) {
        self.chains[usize::from(head)] = vec![head];
        self.stage(head);
    }

    /// Descriptors that no chain uses.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// One descriptor that points to an indirect table already in memory.
    pub fn indirect_table(&mut self, table: u64, len: usize) -> u16 {
        self.raw(Desc { addr: table, len: u32::try_from(len).unwrap(), flags: INDIRECT, next: 0 })
    }

    /// One descriptor, exactly as given.
    pub fn raw(&mut self, desc: Desc) -> u16 {
        let head = self.take_desc();
        self.write_desc(head, desc);
        self.chains[usize::from(head)] = vec![head];
        head
    }

    /// Puts a head on the avail ring without publishing it.
    pub fn stage(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.memory.store16(self.avail + 4 + 2 * slot, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// Publishes what was staged.
    pub fn publish(&self) {
        self.memory.store16(self.avail + 2, self.avail_idx);
    }

    /// Publishes one head and kicks.
    pub fn offer(&mut self, head: u16) {
        self.stage(head);
        self.publish();
        self.kick.signal();
    }

    pub fn used_idx(&self) -> u16 {
        self.memory.load16(self.used + 2)
    }

    /// The next used element if there is one; its descriptors are free again.
    pub fn take_used(&mut self) -> Option<Used> {
        let ahead = self.used_idx().wrapping_sub(self.seen);
        assert!(
            ahead <= self.size,
            "used index {} from {}, ring of {}",
            self.used_idx(),
            self.seen,
            self.size
        );
        if ahead == 0 {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.seen % self.size);
        let head = u16::try_from(self.memory.load32(at)).expect("used id out of range");
        let used = Used { head, len: self.memory.load32(at + 4) };
        self.seen = self.seen.wrapping_add(1);
        let chain = std::mem::take(&mut self.chains[usize::from(head)]);
        assert!(!chain.is_empty(), "head {head} came back twice");
        self.free.extend(chain);
        Some(used)
    }

    /// Waits for the next used element as a driver does: arm, look, sleep
    /// until the call descriptor fires.
    #[track_caller]
    pub fn wait_used(&mut self, what: &str) -> Used {
        let deadline = Deadline::new(format!("{what} (used element and its signal)"));
        loop {
            if self.event_idx {
                self.set_used_event(self.seen);
            }
            if let Some(used) = self.take_used() {
                return used;
            }
            deadline.readable(&self.call);
            self.call.take();
        }
    }

    /// Waits for the next used element by looking, for rings whose signals
    /// are switched off.
    #[track_caller]
    pub fn spin_used(&mut self, what: &str) -> Used {
        Deadline::new(format!("{what} (used element)")).until(|| self.take_used())
    }

    /// Fails when anything is put on the used ring within a moment.
    #[track_caller]
    pub fn assert_quiet(&self, time: Duration, what: &str) {
        let before = self.used_idx();
        assert!(!self.call.within(time), "{what}: the queue signalled");
        assert_eq!(self.used_idx(), before, "{what}: the used index moved");
    }

    /// Signal once the used index passes this one.
    pub fn set_used_event(&self, index: u16) {
        let at = self.avail + 4 + 2 * u64::from(self.size);
        self.memory.store16(at, index);
    }

    /// Where the device wants the next kick.
    pub fn avail_event(&self) -> u16 {
        self.memory.load16(self.used + 4 + 8 * u64::from(self.size))
    }

    /// Without EVENT_IDX: switch signals off and on.
    pub fn set_interrupts(&self, on: bool) {
        self.memory.store16(self.avail, if on { 0 } else { AVAIL_NO_INTERRUPT });
    }

    /// Without EVENT_IDX: the device asks for no kicks.
    pub fn device_wants_no_kicks(&self) -> bool {
        self.memory.load16(self.used) & USED_NO_NOTIFY != 0
    }
}
