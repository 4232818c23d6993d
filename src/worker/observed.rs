//! Single requests shown to a tracer: the USDT probes for bpftrace and perf, and the records of `vublk trace`.
//!
//! What it is: `vublk:request__begin` and `vublk:request__end`, and a record of each request that ended while there is a trace.
//!
//! What it is not: counting ([`crate::stats`]), which goes on as ever.
//!
//! Invariant: without a tracer a request costs one comparison, and requests that are counted as a run cost none more; with
//! one, each request is a run of its own.

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

/// What the probes tell of a request: its queue, what it is, its first sector, its bytes.
#[cold]
#[inline(never)]
fn arguments(InFlight { queue, command, pages, ranges, .. }: &InFlight) -> [u64; 4] {
    let operation = Operation::from(*command) as u64;
    [(*queue).into(), operation, sector(*command, ranges), bytes(pages.len(), ranges)]
}

/// A request begins that was fetched into this slot.
#[inline(always)]
pub(super) fn begins(request: &InFlight) {
    let told;
    probe_lazy!(
        vublk,
        request__begin,
        {
            told = arguments(request);
            told[0]
        },
        told[1],
        told[2],
        told[3]
    );
}

/// A request that ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ending {
    /// The one in this slot.
    Begun(Slot),
    /// One of this queue that could not be decoded.
    Rejected(u16),
}

impl<E> Worker<E> {
    #[cold]
    #[inline(never)]
    fn record(&mut self, ending: Ending, status: Status) -> Record {
        let ended = self.now;
        match ending {
            Ending::Begun(slot) => {
                let InFlight { queue, mark, command, pages, ranges, .. } = self.slots.get(slot);
                Record {
                    ended,
                    latency: mark.age(ended),
                    sector: sector(*command, ranges),
                    bytes: bytes(pages.len(), ranges),
                    queue: *queue,
                    operation: (*command).into(),
                    status,
                }
            }
            Ending::Rejected(queue) => {
                Record { ended, latency: 0, sector: 0, bytes: 0, queue, operation: Operation::Other, status }
            }
        }
    }

    /// Shows a request that ends now. True: something looks at requests one by one.
    #[inline(never)] // one place for the probe
    pub(super) fn shows(&mut self, ending: Ending, status: Status) -> bool {
        let told;
        let is_probed = probe_lazy!(
            vublk,
            request__end,
            {
                told = self.record(ending, status);
                told.queue
            },
            told.operation as u64,
            told.sector,
            told.bytes,
            told.status.byte(),
            told.latency
        );
        if self.trace.is_some() {
            let record = self.record(ending, status);
            self.trace.iter_mut().for_each(|trace| trace.write(&record));
            return true;
        }
        is_probed
    }
}
