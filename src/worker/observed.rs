//! Requests as somebody looks at them one by one: the probes of bpftrace and perf, and a trace.
//!
//! What it is: `vublk:request__begin` and `vublk:request__end`, and a record of each request that ended while there is a trace.
//!
//! What it is not: counting ([`crate::stats`]), which goes on as ever.
//!
//! Invariant: where nothing looks, a request costs one comparison, and those that end alike none: what is looked at is
//! never a run of several requests.

use probe::probe_lazy;

use super::Worker;
use super::slots::InFlight;
use crate::complete::Status;
use crate::engine::Slot;
use crate::promise::SECTOR;
use crate::request::{Command, Ranges};
use crate::stats::Operation;
use crate::trace::Record;

/// The first sector that a request names.
fn sector(command: Command, ranges: &Ranges) -> u64 {
    match command {
        Command::Read(offset) | Command::Write(offset) => offset / SECTOR,
        Command::Flush | Command::GetId => 0,
        Command::Discard | Command::WriteZeroes => ranges.first().map_or(0, |range| range.offset / SECTOR),
    }
}

/// Bytes that a request names. A discard and a write of zeroes have ranges instead of pages.
pub(super) fn bytes(payload: u64, ranges: &Ranges) -> u64 {
    ranges.iter().fold(payload, |sum, range| sum.wrapping_add(range.len))
}

/// A request begins that was fetched into this slot.
#[inline(always)]
pub(super) fn begins(InFlight { queue, command, pages, ranges, .. }: &InFlight) {
    probe_lazy!(
        vublk,
        request__begin,
        *queue,
        Operation::from(*command) as usize,
        sector(*command, ranges),
        bytes(pages.len(), ranges)
    );
}

impl<E> Worker<E> {
    /// The request in a slot ends. True: something looks at requests one by one.
    pub(super) fn ends(&mut self, slot: Slot, status: Status) -> bool {
        let InFlight { queue, mark, command, pages, ranges, .. } = self.slots.get(slot);
        let record = Record {
            ended: self.now,
            latency: mark.age(self.now),
            sector: sector(*command, ranges),
            bytes: bytes(pages.len(), ranges),
            queue: *queue,
            operation: (*command).into(),
            status,
        };
        self.shows(&record)
    }

    /// Shows what ended. True: something looks.
    #[inline(never)]
    pub(super) fn shows(&mut self, record: &Record) -> bool {
        let is_probed = probe_lazy!(
            vublk,
            request__end,
            record.queue,
            record.operation as usize,
            record.sector,
            record.bytes,
            record.status.byte(),
            record.latency
        );
        if let Some(trace) = &mut self.trace {
            trace.write(record);
        }
        is_probed || self.trace.is_some()
    }
}
