//! `vublk bench`: a load generator for any vhost-user-blk back-end.
//!
//! What it is: a closed loop on the independent `virtio-driver` crate, which is
//! a real virtio-blk driver: `queues` × `qd` requests in flight, each completed
//! one replaced at once. One thread; it waits for interrupts as a guest does,
//! or polls.
//!
//! What it is not: a benchmark of the generator; `make bench` shows what the
//! same loop costs against a back-end that does nothing (`--engine=null`).
//!
//! Invariants: an I/O error, or with `--verify` a byte that differs, fails the
//! run; no figure is printed for a run that failed. A pattern that writes runs only
//! when that was confirmed (`--destroy-data`).
#![expect(unsafe_code, reason = "shares its buffers with the back-end")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::builder::{PathBufValueParser, TypedValueParser};
use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use serde::Serialize;
use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

use crate::args::{self, number, size};
use crate::inspect::Layout;
use crate::rpc::call;
use crate::sys;

/// VIRTIO_BLK_F_RO.
const READ_ONLY: u64 = 1 << 5;
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
    /// The back-end's socket
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
    /// Print the result as JSON
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
    // Before the transport, whose memory they are in.
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    transport: Box<VirtioBlkTransport>,
    buffer: *mut u8,
    blocks: u64,
    next: u64,
    lanes: Vec<Lane>,
    /// With `--verify`: how often each block was written; odd while it is.
    written: Vec<u32>,
    busy: Vec<bool>,
    verified: u64,
    random: fastrand::Rng,
}

impl Run<'_> {
    fn block_bytes(&self) -> usize {
        usize::try_from(self.options.bs).unwrap_or(4096)
    }

    /// The buffer of a lane, which no request uses now.
    fn bytes(&mut self, lane: usize) -> &mut [u8] {
        let len = self.block_bytes();
        // SAFETY: lane < lanes, for each of which the mapping has `len` bytes;
        // the back-end is done with it, and `&mut self` keeps other loans away.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.add(lane * len), len) }
    }

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
        let queue = lane / usize::from(self.options.qd);
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
                Self::fill(self.bytes(lane), block, version);
            }
        }
        self.lanes[lane] = Lane { block, write, since: Instant::now() };
        let len = self.block_bytes();
        let offset = block * u64::from(self.options.bs);
        // SAFETY: a lane's part of the mapping; see `bytes`.
        let buffer = unsafe { self.buffer.add(lane * len) };
        let queue = self.queues.get_mut(queue).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the buffer stays mapped, and is the request's until it is done.
        unsafe {
            if write {
                queue.write_raw(offset, buffer, len, lane)
            } else {
                queue.read_raw(offset, buffer, len, lane)
            }
        }
    }

    /// A request ended: right, or the run has failed.
    fn check(&mut self, lane: usize, result: i32) -> io::Result<()> {
        let Lane { block, write, .. } = self.lanes[lane];
        if result != 0 {
            let what = if write { "write" } else { "read" };
            return Err(io::Error::other(format!("{what} of block {block} failed with {result}")));
        }
        if !self.options.verify {
            return Ok(());
        }
        let at = usize::try_from(block).unwrap_or(0);
        self.busy[at] = false;
        let version = self.written[at];
        if !write && version > 0 {
            let mut want = vec![0; self.block_bytes()];
            Self::fill(&mut want, block, version);
            if self.bytes(lane) != want.as_slice() {
                return Err(io::Error::other(format!("block {block} is not what was written to it")));
            }
            self.verified += 1;
        }
        Ok(())
    }

    /// What the last reads tell of a disk that only its back-end knows.
    fn zeroes(&mut self) -> Option<String> {
        let lanes: Vec<_> = (0..self.lanes.len()).filter(|&lane| !self.lanes[lane].write).collect();
        let zero = lanes.iter().filter(|&&lane| self.bytes(lane).iter().all(|&byte| byte == 0)).count();
        (zero > 0).then(|| {
            format!(
                "{zero} of the last {} blocks read are zeroes: if they are holes, no disk was read",
                lanes.len()
            )
        })
    }

    /// Takes all completions of a queue into `done`.
    fn reap(&mut self, queue: usize, done: &mut Vec<(usize, i32)>) {
        done.clear();
        if let Some(queue) = self.queues.get_mut(queue) {
            done.extend(queue.completions().map(|c| (c.context, c.ret)));
        }
    }

    fn kick(&mut self, queue: usize) -> io::Result<()> {
        let needed = self.queues.get_mut(queue).is_some_and(VirtioBlkQueue::avail_notif_needed);
        if needed { self.transport.get_submission_notifier(queue).notify() } else { Ok(()) }
    }

    /// Runs until `until`, then lets what is in flight end.
    fn run(&mut self, until: Instant, latency: &mut Histogram<u64>) -> io::Result<u64> {
        let queues = self.queues.len();
        let calls: Vec<_> = (0..queues).map(|q| self.transport.get_completion_fd(q)).collect();
        let mut in_flight = 0;
        for lane in 0..self.lanes.len() {
            self.submit(lane)?;
            in_flight += 1;
        }
        for queue in 0..queues {
            self.kick(queue)?;
        }
        let mut done = Vec::new();
        let mut total = 0;
        let mut heard = Instant::now();
        while in_flight > 0 {
            let mut any = false;
            for queue in 0..queues {
                self.reap(queue, &mut done);
                if done.is_empty() {
                    continue;
                }
                any = true;
                let now = Instant::now();
                heard = now;
                for &(lane, result) in &done {
                    let took = now.duration_since(self.lanes[lane].since);
                    latency.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
                    self.check(lane, result)?;
                    total += 1;
                    if now < until {
                        self.submit(lane)?;
                    } else {
                        in_flight -= 1;
                    }
                }
                self.kick(queue)?;
            }
            if any {
                continue;
            }
            if heard.elapsed() > PATIENCE {
                return Err(io::Error::other(format!("no completion for {} s", PATIENCE.as_secs())));
            }
            if !self.options.poll {
                self.sleep(&calls)?;
            }
        }
        Ok(total)
    }

    /// Waits for an interrupt of any queue.
    fn sleep(&mut self, calls: &[std::sync::Arc<virtio_driver::EventFd>]) -> io::Result<()> {
        for queue in &mut self.queues {
            queue.set_used_notif_enabled(true);
        }
        // What came while interrupts were off has none.
        if self.queues.iter_mut().any(|q| q.completions().has_next()) {
            return Ok(());
        }
        let mut fds: Vec<_> =
            calls.iter().map(|c| PollFd::from_borrowed_fd(c.as_fd(), PollFlags::IN)).collect();
        poll(&mut fds, Some(&Timespec { tv_sec: 1, tv_nsec: 0 }))?;
        let ready: Vec<bool> = fds.iter().map(|fd| fd.revents().contains(PollFlags::IN)).collect();
        for (call, _) in calls.iter().zip(ready).filter(|(_, ready)| *ready) {
            call.read()?;
        }
        for queue in &mut self.queues {
            queue.set_used_notif_enabled(false);
        }
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

/// The process that serves a socket: what vublkd tells, or who listened there first.
fn backend_pid(socket: &Path) -> Option<i32> {
    if let Some(pid) = status_of(socket).and_then(|status| status.get("pid")?.as_i64()) {
        return i32::try_from(pid).ok();
    }
    // It waits in the backlog and is never served: the run has the only place.
    let stream = UnixStream::connect(socket).ok()?;
    let credentials = rustix::net::sockopt::socket_peercred(&stream).ok()?;
    Some(credentials.pid.as_raw_nonzero().get())
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
/// # Errors
/// A back-end that cannot be reached or does not answer, an I/O error, or with
/// `--verify` a difference.
pub fn run(options: &Options) -> io::Result<Report> {
    let note = disk_of(&options.socket).and_then(|disk| holes(&disk));
    let mut features = VirtioFeatureFlags::VERSION_1;
    features |= VirtioFeatureFlags::RING_INDIRECT_DESC | VirtioFeatureFlags::RING_EVENT_IDX;
    let Some(socket) = options.socket.to_str() else { return other("use a path that is UTF-8".into()) };
    // All features of a block device: they have no part in the rings.
    let vhost: VhostUser<VirtioBlkConfig, VirtioBlkReqBuf> =
        VhostUser::new(socket, features.bits() | 0x1_ffff).or_else(|e| {
            other(format!("{e}. Use the socket on which vublkd, or another vhost-user-blk back-end, listens"))
        })?;
    let mut transport: Box<VirtioBlkTransport> = Box::new(vhost);
    let config = transport.get_config()?;
    let capacity = config.capacity.to_native() * 512;
    let block = config.blk_size.to_native();
    let blocks = capacity / u64::from(options.bs);
    let lanes = usize::from(options.queues) * usize::from(options.qd);
    if options.rw.writes() && transport.get_features() & READ_ONLY != 0 {
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
    // Header, data and status take a descriptor each.
    let size = (options.qd * 4).next_power_of_two().max(8);
    let mut queues =
        VirtioBlkQueue::setup_queues(transport.as_mut(), options.queues.into(), size).or_else(|e| {
            other(format!(
                "cannot set up {} queues of {size}: {e}. Use fewer --queues or a smaller --qd",
                options.queues
            ))
        })?;
    for queue in &mut queues {
        queue.set_used_notif_enabled(!options.poll);
    }
    let len = lanes * usize::try_from(options.bs).unwrap_or(4096);
    let no_memory =
        |e| other(format!("no memory of {len} bytes for --queues × --qd × --bs: {e}. Use smaller ones"));
    let file = File::from(memfd_create(c"vublk-bench", MemfdFlags::CLOEXEC)?);
    file.set_len(len as u64)?;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let buffer: *mut u8 = unsafe {
        mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
    }
    .or_else(no_memory)?
    .cast();
    transport.map_mem_region(buffer.addr(), len, file.as_raw_fd(), 0)?;
    let tracked = if options.verify { usize::try_from(blocks).unwrap_or(0) } else { 0 };
    let start = Instant::now();
    let mut run = Run {
        options,
        queues,
        transport,
        buffer,
        blocks,
        next: 0,
        lanes: (0..lanes).map(|_| Lane { block: 0, write: false, since: start }).collect(),
        written: vec![0; tracked],
        busy: vec![false; tracked],
        verified: 0,
        random: fastrand::Rng::with_seed(1),
    };
    for lane in 0..lanes {
        Run::fill(run.bytes(lane), lane as u64, 0);
    }
    let pid = backend_pid(&options.socket);
    // From a nanosecond to the longest wait, to three digits.
    let limit = u64::try_from(PATIENCE.as_nanos()).unwrap_or(u64::MAX);
    let mut latency = Histogram::new_with_max(limit, 3).map_err(io::Error::other)?;
    let before = pid.and_then(Usage::of);
    let start = Instant::now();
    let requests = run.run(start + options.runtime, &mut latency)?;
    let seconds = start.elapsed().as_secs_f64();
    let after = pid.and_then(Usage::of);
    let used = before
        .zip(after)
        .map(|(b, a)| (a.cpu_ns.saturating_sub(b.cpu_ns), a.switches.saturating_sub(b.switches)));
    let note = note.or_else(|| run.zeroes());
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
