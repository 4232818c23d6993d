//! `vublk trace`: each request of a disk, as a line when it has ended.
//!
//! What it is: the tool's side. It makes the memory that the daemon's workers write, reads it, and prints.
//!
//! What it is not: what is in that memory is [`crate::trace`]'s.
//!
//! Invariant: each request is a line or is counted as lost, and what is lost is told where it is missing.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use serde::Deserialize;
use serde_json::json;

use crate::complete::Status;
use crate::find::Place;
use crate::memory::mapping::Mapping;
use crate::sys;
use crate::trace::{Reader, Record};

/// Bytes of the memory: all workers together may be so many bytes ahead of the tool.
const MEMORY: u64 = 32 << 20;
/// How often it is read.
const EVERY: Duration = Duration::from_millis(10);
/// How much longer than its time a trace may take before the tool ends it.
const PATIENCE: Duration = Duration::from_secs(1);

/// A time as it is typed: 10ms.
pub(super) fn time(text: &str) -> Result<Duration, String> {
    let unit = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit);
    let ns = match unit {
        "ns" => 1.0,
        "us" | "µs" => 1e3,
        "ms" => 1e6,
        "s" => 1e9,
        _ => return Err("use a number with ns, us, ms or s, such as 10ms".into()),
    };
    let number = number.trim().parse::<f64>().ok().filter(|number| *number >= 0.0);
    number
        .and_then(|number| Duration::try_from_secs_f64(number * ns / 1e9).ok())
        .ok_or_else(|| "use a number with ns, us, ms or s, such as 10ms".into())
}

/// What the daemon answers.
#[derive(Deserialize)]
struct Begun {
    rings: usize,
    records: usize,
}

/// Memory that a daemon may map: its pages are there, and stay.
fn memory() -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("vublk-trace", flags)?);
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, MEMORY)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}

/// Prints requests until the time is over, the reader of its lines is gone, or the daemon ends it.
pub(super) fn trace(
    place: &Place,
    slow: Duration,
    seconds: Option<u32>,
    as_json: bool,
) -> Result<(), String> {
    let no_memory = |e: io::Error| format!("no memory for a trace: {e}");
    let file = memory().map_err(no_memory)?;
    let map = Mapping::new(&file, 0, MEMORY).map(Arc::new).map_err(no_memory)?;
    let (daemon, client) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|e| format!("no pipe for a trace: {}", io::Error::from(e)))?;
    let clock = Clock::now();
    let params = json!({
        "slow_ns": u64::try_from(slow.as_nanos()).unwrap_or(u64::MAX),
        "seconds": seconds,
    });
    // The daemon counts from when it has read this: it ends the trace later.
    let until = seconds.map(|time| Instant::now() + Duration::from_secs(time.into()));
    let begun =
        place.ask_with("trace", params, &[file.as_fd(), client.as_fd()]).map_err(|e| e.to_string())?;
    drop(client); // the daemon's is the only one
    let begun = Begun::deserialize(begun).map_err(|e| format!("not the answer of a vublkd: {e}"))?;
    let mut readers: Vec<_> =
        (0..begun.rings).map(|number| Reader::new(&map, number, begun.records)).collect();
    let mut shown = if as_json { String::new() } else { HEAD.to_owned() };
    loop {
        let is_over = sys::hung_up_within(&daemon, EVERY).map_err(|e| e.to_string())?;
        let mut records = Vec::new();
        let lost: u64 = readers.iter_mut().map(|reader| reader.read(|record| records.push(record))).sum();
        records.sort_by_key(|record| record.ended);
        if lost > 0 {
            shown.push_str(&told_lost(lost, as_json));
        }
        for record in &records {
            shown.push_str(&if as_json { clock.json(record) } else { clock.line(record) });
        }
        let mut out = io::stdout().lock();
        if out.write_all(shown.as_bytes()).and_then(|()| out.flush()).is_err() {
            return Ok(()); // its reader has seen enough
        }
        shown.clear();
        let late = until.map(|until| Instant::now().checked_duration_since(until));
        match late {
            Some(Some(late)) if is_over || late > PATIENCE => return Ok(()),
            _ if is_over => {
                return Err(
                    "the trace has ended, because vublkd was stopped or upgraded, or has crashed".into()
                );
            }
            _ => {}
        }
    }
}

fn told_lost(lost: u64, as_json: bool) -> String {
    if as_json {
        format!("{}\n", json!({ "lost": lost }))
    } else {
        format!("({lost} requests are missing here: there were more than could be shown in time)\n")
    }
}

const HEAD: &str = "TIME(s)      QUEUE OP            SECTOR      BYTES STATUS       LAT(ms)\n";

/// When the trace began, by two clocks.
struct Clock {
    began: u64,
    wall: Duration,
}

impl Clock {
    fn now() -> Self {
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { began: sys::monotonic_ns(), wall }
    }

    /// Since then.
    fn since(&self, record: &Record) -> Duration {
        Duration::from_nanos(record.ended.saturating_sub(self.began))
    }

    fn line(&self, record: &Record) -> String {
        let Record { queue, operation, sector, bytes, status, latency, .. } = record;
        let (name, status) = (operation.name(), answer(*status));
        let ms = Duration::from_nanos(*latency).as_secs_f64() * 1e3;
        let time = self.since(record).as_secs_f64();
        format!("{time:<12.6} {queue:>5} {name:8} {sector:>11} {bytes:>10} {status:11} {ms:>8.3}\n")
    }

    fn json(&self, record: &Record) -> String {
        let Record { queue, operation, sector, bytes, status, latency, .. } = record;
        let time = (self.wall + self.since(record)).as_secs_f64();
        let told = json!({
            "time": time, "queue": queue, "operation": operation.name(), "sector": sector, "bytes": bytes,
            "status": answer(*status), "latency_ns": latency,
        });
        format!("{told}\n")
    }
}

fn answer(status: Status) -> &'static str {
    match status {
        Status::Ok => "ok",
        Status::IoErr => "io",
        Status::Unsupp => "unsupported",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_they_are_typed() {
        for (text, ns) in
            [("10ms", 10_000_000), ("1.5us", 1500), ("0s", 0), ("2 s", 2_000_000_000), ("7ns", 7)]
        {
            assert_eq!(time(text), Ok(Duration::from_nanos(ns)), "{text}");
        }
        for text in ["10", "", "ms", "-1ms", "1h", "nan ms", "1e300s"] {
            assert!(time(text).is_err(), "{text}");
        }
    }
}
