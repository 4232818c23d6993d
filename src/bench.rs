//! `vublk bench`: a load generator for any vhost-user-blk back-end.
//!
//! What it is: a closed loop on a virtio-blk driver (`bench/driver.rs`): `queues` × `qd`
//! requests in flight, each completed one replaced at once. One thread; it waits for
//! interrupts as a guest does, or polls.
//!
//! What it is not: a benchmark of the generator; `make bench` shows what the
//! same loop costs against a back-end that does nothing (`--engine=null`).
//!
//! Invariants: an I/O error, or with `--verify` a byte that differs, fails the
//! run; no figure is printed for a run that failed. A pattern that writes runs only
//! when that was confirmed (`--destroy-data`).

mod driver;

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use clap::builder::{PathBufValueParser, TypedValueParser};
use hdrhistogram::Histogram;
use serde::Serialize;

use self::driver::{Connection, Driver};
use crate::args::{self, number, size};
use crate::inspect::Layout;
use crate::rpc::call;
use crate::sys;

/// How soon a back-end answers that has no other front-end.
const SOON: Duration = Duration::from_secs(1);
/// How long a back-end may be silent before the run fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Pattern {
    /// Reads, one block after another.
    Read,
    /// Writes, one block after another.
    Write,
    /// Reads anywhere.
    RandRead,
    /// Writes anywhere.
    RandWrite,
    /// 70 % reads and 30 % writes, anywhere.
    RandRw,
}

impl Pattern {
    /// It overwrites what is on the disk.
    #[must_use]
    pub fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::RandRead)
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

/// One run.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The back-end's socket, or the name of a disk that vublk list shows
    #[arg(value_parser = PathBufValueParser::new().try_map(args::socket))]
    pub socket: PathBuf,
    /// What to do; all but read and randread overwrite the disk
    #[arg(long, value_enum, default_value = "randread")]
    pub rw: Pattern,
    /// Overwrite the disk: what it holds is lost. Without it a terminal is asked
    #[arg(long)]
    pub destroy_data: bool,
    /// Bytes of a request, such as 4k: a multiple of the disk's block
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = request)]
    pub bs: u32,
    /// Requests in flight on each queue, 1 to 256
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = number::<u16>(1, 256))]
    pub qd: u16,
    /// Queues, 1 to 256
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = number::<u16>(1, 256))]
    pub queues: u16,
    /// How long, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub runtime: Duration,
    /// Poll for completions instead of waiting for interrupts
    #[arg(long, conflicts_with = "wait")]
    pub poll: bool,
    /// Wait for interrupts, as a guest does (the default)
    #[arg(long)]
    pub wait: bool,
    /// Write numbered blocks, and compare what is read of them
    #[arg(long)]
    pub verify: bool,
    /// Have the requests in huge pages of 2 MiB: SPDK reads from and writes to an NVMe device of its own only there
    #[arg(long)]
    pub huge_pages: bool,
    /// Also tell how many requests ended in each interval, in seconds
    #[arg(long, value_name = "SECONDS", value_parser = interval)]
    pub interval: Option<Duration>,
    /// Print the result as JSON; intervals are lines of their own before it
    #[arg(long)]
    pub json: bool,
}

fn request(text: &str) -> Result<u32, String> {
    let size = size(text).ok().and_then(|size| u32::try_from(size).ok());
    let valid = size.filter(|size| size.is_multiple_of(512) && (512..=1 << 30).contains(size));
    valid.ok_or_else(|| "use a multiple of 512 bytes, 1G at most, such as 4k".into())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let time = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let ends = |t: &Duration| t.checked_add(PATIENCE).and_then(|t| Instant::now().checked_add(t)).is_some();
    time.filter(ends).ok_or_else(|| "use seconds, such as 5 or 0.5".into())
}

fn interval(text: &str) -> Result<Duration, String> {
    let time = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let valid = time.filter(|time| (Duration::from_millis(1)..=PATIENCE).contains(time));
    valid.ok_or_else(|| "use seconds from 0.001 to 60, such as 0.1".into())
}

/// What a run found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The pattern.
    pub rw: Pattern,
    /// Bytes of a request.
    pub bs: u32,
    /// Requests in flight on each queue.
    pub qd: u16,
    /// Queues.
    pub queues: u16,
    /// Requests completed.
    pub requests: u64,
    /// Requests a second.
    pub iops: f64,
    /// Megabytes (10^6) a second.
    pub mb_per_s: f64,
    /// Latency in microseconds.
    pub mean_us: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// 99th percentile in microseconds.
    pub p99_us: f64,
    /// 99.9th percentile in microseconds.
    pub p999_us: f64,
    /// CPU seconds that the back-end used for a million requests.
    pub backend_cpu_s_per_million: Option<f64>,
    /// Times that the back-end's threads went to sleep, for a request.
    pub backend_switches_per_request: Option<f64>,
    /// Blocks compared, with `--verify`.
    pub verified: u64,
    /// Why the figures may say little of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// One request that is in flight again and again.
struct Lane {
    block: u64,
    write: bool,
    since: Instant,
}

struct Run<'a> {
    options: &'a Options,
    driver: Driver,
    blocks: u64,
    next: u64,
    lanes: Vec<Lane>,
    /// A block, on its way from or to a lane.
    block: Vec<u8>,
    /// With `--verify`: how often each block was written; odd while it is.
    written: Vec<u32>,
    busy: Vec<bool>,
    verified: u64,
    /// Reads that ended, how many blocks of them were looked at, and how many of these are zeroes.
    reads: u64,
    looked_at: u64,
    zeroes: u64,
    start: Instant,
    /// Requests that ended in this interval.
    ended: u32,
    random: fastrand::Rng,
}

impl Run<'_> {
    /// Fills a block so that half of it can be compressed, and so that another
    /// block, or another version of it, differs in every 512 bytes.
    fn fill(bytes: &mut [u8], block: u64, version: u32) {
        for (at, sector) in bytes.chunks_mut(512).enumerate() {
            let seed = block << 32 ^ u64::from(version) << 8 ^ at as u64;
            let mut random = fastrand::Rng::with_seed(seed);
            let (noise, rest) = sector.split_at_mut(sector.len() / 2);
            random.fill(noise);
            rest.fill(0x55);
        }
    }

    /// A block that no other request works on.
    fn choose(&mut self) -> u64 {
        loop {
            let block = match self.options.rw {
                Pattern::Read | Pattern::Write => {
                    self.next = (self.next + 1) % self.blocks;
                    self.next
                }
                _ => self.random.u64(0..self.blocks),
            };
            if !self.options.verify || !self.busy(block) {
                return block;
            }
        }
    }

    fn busy(&self, block: u64) -> bool {
        usize::try_from(block).ok().and_then(|b| self.busy.get(b)).copied().unwrap_or(false)
    }

    fn submit(&mut self, lane: usize) -> io::Result<()> {
        let block = self.choose();
        let write = match self.options.rw {
            Pattern::Read | Pattern::RandRead => false,
            Pattern::Write | Pattern::RandWrite => true,
            Pattern::RandRw => self.random.u8(0..10) >= 7,
        };
        if self.options.verify {
            let at = usize::try_from(block).unwrap_or(0);
            self.busy[at] = true;
            if write {
                self.written[at] += 1;
                let version = self.written[at];
                Self::fill(&mut self.block, block, version);
                self.driver.data(lane)?.copy_from(&self.block);
            }
        }
        self.lanes[lane] = Lane { block, write, since: Instant::now() };
        self.driver.submit(lane, write, block * u64::from(self.options.bs))
    }

    /// A request ended: right, or the run has failed.
    fn check(&mut self, lane: usize, status: u8) -> io::Result<()> {
        let Lane { block, write, .. } = self.lanes[lane];
        if status != 0 {
            let what = if write { "write" } else { "read" };
            return Err(io::Error::other(format!("{what} of block {block} failed with status {status}")));
        }
        if !write {
            self.look(lane)?;
        }
        if !self.options.verify {
            return Ok(());
        }
        let at = usize::try_from(block).unwrap_or(0);
        self.busy[at] = false;
        let version = self.written[at];
        if !write && version > 0 {
            let mut found = vec![0; self.block.len()];
            self.driver.data(lane)?.copy_to(&mut found);
            Self::fill(&mut self.block, block, version);
            if found != self.block {
                return Err(io::Error::other(format!("block {block} is not what was written to it")));
            }
            self.verified += 1;
        }
        Ok(())
    }

    /// Looks at what one of the reads brought: at each of the first ones, then at one of many. Those that are in flight when the
    /// time is over tell nothing: they are the slow ones, which read a disk.
    fn look(&mut self, lane: usize) -> io::Result<()> {
        self.reads += 1;
        if self.reads > 64 && !self.reads.is_multiple_of(256) {
            return Ok(());
        }
        self.driver.data(lane)?.copy_to(&mut self.block);
        self.looked_at += 1;
        self.zeroes += u64::from(self.block.iter().fold(0, |all, byte| all | byte) == 0);
        Ok(())
    }

    /// What the reads tell of a disk that only its back-end knows.
    fn holes(&self) -> Option<String> {
        (self.zeroes > 0).then(|| {
            format!(
                "{} of {} blocks that were read and looked at are zeroes: if they are holes, no disk was read",
                self.zeroes, self.looked_at
            )
        })
    }

    /// Runs until `until`, then lets what is in flight end.
    fn run(&mut self, until: Instant, latency: &mut Histogram<u64>) -> io::Result<u64> {
        let queues = usize::from(self.options.queues);
        let mut in_flight = 0;
        for lane in 0..self.lanes.len() {
            self.submit(lane)?;
            in_flight += 1;
        }
        for queue in 0..queues {
            self.driver.kick(queue)?;
        }
        let mut total = 0;
        let mut heard = Instant::now();
        let mut next = self.options.interval.map(|interval| Instant::now() + interval);
        while in_flight > 0 {
            let mut any = false;
            if let (Some(at), Some(interval)) = (next, self.options.interval)
                && Instant::now() >= at
            {
                self.tell(at, interval)?;
                next = Some(at + interval);
            }
            for queue in 0..queues {
                let mut some = false;
                while let Some((lane, status)) = self.driver.completion(queue)? {
                    let now = Instant::now();
                    (some, heard) = (true, now);
                    let took = now.duration_since(self.lanes[lane].since);
                    latency.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
                    self.check(lane, status)?;
                    total += 1;
                    self.ended += 1;
                    if now < until {
                        self.submit(lane)?;
                    } else {
                        in_flight -= 1;
                    }
                }
                if some {
                    self.driver.kick(queue)?;
                }
                any |= some;
            }
            if any {
                continue;
            }
            if heard.elapsed() > PATIENCE {
                return Err(io::Error::other(format!("no completion for {} s", PATIENCE.as_secs())));
            }
            if !self.options.poll {
                self.sleep()?;
            }
        }
        Ok(total)
    }

    /// Tells how many requests ended in the interval that is over.
    fn tell(&mut self, at: Instant, interval: Duration) -> io::Result<()> {
        let (seconds, requests) =
            (at.duration_since(self.start).as_secs_f64(), std::mem::take(&mut self.ended));
        let iops = f64::from(requests) / interval.as_secs_f64();
        let mut out = io::stdout().lock();
        if self.options.json {
            writeln!(out, "{}", serde_json::json!({"seconds": seconds, "requests": requests, "iops": iops}))
        } else {
            writeln!(out, "{seconds:8.3} s {iops:10.0} IOPS")
        }
    }

    /// Waits for an interrupt of any queue, or for the end of an interval.
    fn sleep(&mut self) -> io::Result<()> {
        // What came while interrupts were off has none.
        if self.driver.interrupts(true)? {
            return Ok(());
        }
        self.driver.wait(self.options.interval.unwrap_or(PATIENCE).min(Duration::from_secs(1)))?;
        self.driver.interrupts(false)?;
        Ok(())
    }
}

/// What a process has used; the switches are those of threads that still live.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    cpu_ns: u64,
    switches: u64,
}

impl Usage {
    fn of(pid: i32) -> Option<Self> {
        let mut usage = Self { cpu_ns: sys::process_cpu_ns(pid).ok()?, switches: 0 };
        for task in std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
            let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
            let count = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
            usage.switches += count.and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
        }
        Some(usage)
    }
}

/// What vublkd tells of itself, where it serves a socket and its control socket is beside it.
fn status_of(socket: &Path) -> Option<serde_json::Value> {
    let mut control = socket.as_os_str().to_owned();
    control.push(".control");
    call(Path::new(&control), "status", &serde_json::Value::Null).ok()
}

/// The file or block device behind a socket, where it is vublkd's and its control socket is beside it.
#[must_use]
pub fn disk_of(socket: &Path) -> Option<PathBuf> {
    status_of(socket)?.pointer("/disk/path")?.as_str().map(PathBuf::from)
}

/// What of a file can be read without a disk.
fn holes(disk: &Path) -> Option<String> {
    let file = File::open(disk).ok()?;
    let (layout, size) = (Layout::of(&file), file.metadata().ok()?.len());
    let empty = layout.hole_bytes.unwrap_or(0) + layout.unwritten_bytes.unwrap_or(0);
    (empty > 0).then(|| {
        format!(
            "{empty} of the {size} bytes of {} are holes or unwritten: reading them reads no disk, and the first write \
             allocates them. Write the whole disk first: --rw=write --bs=1M --destroy-data",
            disk.display()
        )
    })
}

fn other<T>(why: String) -> io::Result<T> {
    Err(io::Error::other(why))
}

/// Runs a load and reports.
///
/// `waits` is called where the back-end has not answered after [`SOON`]: another front-end may have the disk.
///
/// # Errors
/// A back-end that cannot be reached or does not answer, an I/O error, or with
/// `--verify` a difference.
pub fn run(options: &Options, waits: impl FnOnce() + Send + 'static) -> io::Result<Report> {
    let note = disk_of(&options.socket).and_then(|disk| holes(&disk));
    let (answered, not_yet) = channel::<()>();
    let patience = std::thread::spawn(move || {
        if not_yet.recv_timeout(SOON) == Err(RecvTimeoutError::Timeout) {
            waits();
        }
    });
    let connection = Connection::open(&options.socket);
    drop(answered);
    let _its_words_come_first = patience.join();
    let connection = connection?;
    let (capacity, block) = (connection.capacity, connection.block);
    let blocks = capacity / u64::from(options.bs);
    let lanes = usize::from(options.queues) * usize::from(options.qd);
    if options.rw.writes() && connection.is_read_only() {
        return other(format!("is a read-only disk. Use --rw=randread or read instead of {}", options.rw));
    }
    if block > 0 && !options.bs.is_multiple_of(block) {
        return other(format!(
            "has blocks of {block} bytes. Use a multiple of that instead of --bs={}",
            options.bs
        ));
    }
    if blocks < 2 * lanes as u64 {
        return other(format!(
            "has {capacity} bytes, too few for {lanes} requests of {} in flight. Use a smaller --bs or --qd",
            options.bs
        ));
    }
    // vublkd's own word goes first: its parent listened.
    let told = status_of(&options.socket).and_then(|status| status.get("pid")?.as_i64());
    let pid = told.and_then(|pid| i32::try_from(pid).ok()).or(connection.pid);
    let bytes = usize::try_from(options.bs).unwrap_or(usize::MAX);
    let mut driver = connection.start(options.queues, options.qd, bytes, options.huge_pages)?;
    driver.interrupts(!options.poll)?;
    let tracked = if options.verify { usize::try_from(blocks).unwrap_or(0) } else { 0 };
    let start = Instant::now();
    let mut run = Run {
        options,
        driver,
        blocks,
        next: 0,
        block: vec![0; bytes],
        lanes: (0..lanes).map(|_| Lane { block: 0, write: false, since: start }).collect(),
        written: vec![0; tracked],
        busy: vec![false; tracked],
        verified: 0,
        reads: 0,
        looked_at: 0,
        zeroes: 0,
        start,
        ended: 0,
        random: fastrand::Rng::with_seed(1),
    };
    for lane in 0..lanes {
        Run::fill(&mut run.block, lane as u64, 0);
        run.driver.data(lane)?.copy_from(&run.block);
    }
    // From a nanosecond to the longest wait, to three digits.
    let limit = u64::try_from(PATIENCE.as_nanos()).unwrap_or(u64::MAX);
    let mut latency = Histogram::new_with_max(limit, 3).map_err(io::Error::other)?;
    let before = pid.and_then(Usage::of);
    let start = Instant::now();
    run.start = start;
    let requests = run.run(start + options.runtime, &mut latency)?;
    let seconds = start.elapsed().as_secs_f64();
    let after = pid.and_then(Usage::of);
    let used = before
        .zip(after)
        .map(|(b, a)| (a.cpu_ns.saturating_sub(b.cpu_ns), a.switches.saturating_sub(b.switches)));
    let note = note.or_else(|| run.holes());
    let us = |ns: f64| ns / 1e3;
    let at = |quantile| us(as_f64(latency.value_at_quantile(quantile)));
    Ok(Report {
        rw: options.rw,
        bs: options.bs,
        qd: options.qd,
        queues: options.queues,
        requests,
        iops: as_f64(requests) / seconds,
        mb_per_s: as_f64(requests) * f64::from(options.bs) / seconds / 1e6,
        mean_us: us(latency.mean()),
        p50_us: at(0.5),
        p99_us: at(0.99),
        p999_us: at(0.999),
        backend_cpu_s_per_million: used.map(|(ns, _)| as_f64(ns) / 1e3 / as_f64(requests)),
        backend_switches_per_request: used.map(|(_, n)| as_f64(n) / as_f64(requests)),
        verified: run.verified,
        note,
    })
}

#[expect(clippy::cast_precision_loss, reason = "for people to read; 2^53 is more than any count here")]
fn as_f64(n: u64) -> f64 {
    n as f64
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{:.0} IOPS, {:.1} MB/s ({} requests)", self.iops, self.mb_per_s, self.requests)?;
        writeln!(
            f,
            "latency  mean {:.1} us, p50 {:.1}, p99 {:.1}, p99.9 {:.1}",
            self.mean_us, self.p50_us, self.p99_us, self.p999_us
        )?;
        if let (Some(cpu), Some(switches)) =
            (self.backend_cpu_s_per_million, self.backend_switches_per_request)
        {
            writeln!(f, "back-end {cpu:.2} CPU s per million requests, {switches:.3} sleeps per request")?;
        }
        if self.verified > 0 {
            writeln!(f, "verified {} blocks", self.verified)?;
        }
        if let Some(note) = &self.note {
            writeln!(f, "note: {note}")?;
        }
        Ok(())
    }
}
