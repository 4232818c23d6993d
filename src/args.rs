//! The command line: what was typed ([`Typed`]) and what it means ([`Meant`]).
//!
//! What it is not: it opens nothing and touches nothing.
//!
//! Invariant: every contradiction is found here, before anything is opened.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{NonEmptyStringValueParser, PathBufValueParser, TypedValueParser};
use clap::{Parser, ValueEnum};

use crate::backing::Discard;
use crate::disk;
use crate::engine::uring::{self, Feature};
use crate::hold::OnError;
use crate::metrics::server::Place;
use crate::promise;
use crate::sandbox;
use crate::worker::{PoolSize, Tuning};

/// What `--print-capabilities` prints: QEMU's convention for back-end programs.
pub const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

/// Queues that can be offered: one byte of SET_VRING_KICK names a queue.
pub const MAX_QUEUES: u16 = 256;

/// on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

/// When a write is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WriteCache {
    /// When the disk has it; durable after a FLUSH.
    Writeback,
    /// When it is durable.
    Writethrough,
}

/// What a DISCARD of the guest does, in QEMU's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DiscardChoice {
    /// The blocks are given back to the file system or device.
    Unmap,
    /// Nothing.
    Ignore,
}

/// How the disk is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EngineChoice {
    /// io_uring, or threads where it is forbidden.
    Auto,
    /// io_uring only.
    #[value(name = "io_uring")]
    IoUring,
    /// preadv2 and pwritev2 on threads.
    Threads,
    /// Nothing is read or written: for measuring only.
    Null,
}

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[expect(missing_docs, reason = "the names say it")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<LogLevel> for tracing::Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Trace => Self::TRACE,
        }
    }
}

/// Gives a virtual machine a disk: a vhost-user-blk back-end.
///
/// A VMM (QEMU, cloud-hypervisor, Firecracker) connects to the Unix socket; its guest then reads and writes
/// the file or block device through virtio-blk. Runs in the foreground and logs to standard error. SIGTERM
/// drains and ends it with status 0, SIGUSR1 logs a line of statistics, SIGHUP tells it that the disk has grown.
#[derive(Clone, Debug, Parser)]
#[command(name = "vublkd", version, max_term_width = 100)]
pub struct Typed {
    /// Listen here for the VMM: at most 107 bytes. A stale socket is replaced, anything else that is there is an
    /// error; its mode is 0660
    #[arg(long, value_name = "PATH", conflicts_with = "fd", value_parser = PathBufValueParser::new().try_map(socket))]
    pub socket_path: Option<PathBuf>,

    /// Use this open socket, listening or connected, instead. Under systemd's socket activation neither
    /// is needed
    #[arg(long, value_name = "FDNUM", value_parser = number::<i32>(3, 0x7fff_ffff))]
    pub fd: Option<i32>,

    /// The user that vublkd becomes, a name or a number, where root starts it: once it listens, and before it opens
    /// the disk, which has to be that user's or a group's of its. The sockets belong to it, too
    #[arg(long, value_name = "USER", value_parser = NonEmptyStringValueParser::new())]
    pub user: Option<String>,

    /// The group that vublkd gets [default: the user's]. VMMs whose user is in it may connect
    #[arg(long, value_name = "GROUP", value_parser = NonEmptyStringValueParser::new())]
    pub group: Option<String>,

    /// Listen here for vublk status, resize, retry and upgrade; its mode is 0600 [default: the disk's socket, if vublkd
    /// listens, with .control behind its name]
    #[arg(long, value_name = "PATH", value_parser = PathBufValueParser::new().try_map(socket))]
    pub control: Option<PathBuf>,

    /// Answer Prometheus' scrapes here, by HTTP at /metrics: a Unix socket, or an IP address and a port, which anyone who
    /// reaches it may read
    #[arg(long, value_name = "unix:PATH|ADDR:PORT", value_parser = place)]
    pub metrics: Option<Place>,

    /// The disk: a file or a block device
    #[arg(long, value_name = "PATH")]
    pub blk_file: PathBuf,

    /// The disk's format; only raw disks are served. Typed, it lets a disk through that looks like an image of
    /// another format (qcow2, vmdk …) because its guest wrote such a header
    #[arg(long, value_name = "raw")]
    pub format: Option<String>,

    /// Bypass the page cache (O_DIRECT)
    #[arg(long, value_enum, default_value = "on", value_name = "on|off", hide_possible_values = true)]
    pub direct: Switch,

    /// The guest may only read
    #[arg(long, value_enum, default_value = "off", default_missing_value = "on", num_args = 0..=1, require_equals = true, value_name = "on|off", hide_possible_values = true)]
    pub read_only: Switch,

    /// When a write is answered: once the disk has it (durable after a flush), or once it is durable. A
    /// guest may change it
    #[arg(long, value_enum, default_value = "writeback", value_name = "MODE")]
    pub write_cache: WriteCache,

    /// What vublkd does with a request that the disk refuses. report: the guest gets an I/O error; enospc: a request for
    /// which the disk has no room waits, and its queue with it, until there is room; stop: a request with any other
    /// error waits, too, until vublk retry
    #[arg(
        long,
        value_enum,
        default_value = "enospc",
        value_name = "report|stop|enospc",
        hide_possible_values = true
    )]
    pub on_error: OnError,

    /// What a discard of the guest does: unmap gives the blocks back; ignore keeps them, for a preallocated
    /// image that is to stay allocated
    #[arg(
        long,
        value_enum,
        default_value = "unmap",
        value_name = "unmap|ignore",
        hide_possible_values = true
    )]
    pub discard: DiscardChoice,

    /// Serial number that the guest sees, 20 bytes at most [default: the start of the file's name, and a hash
    /// of its real path]
    #[arg(long, value_name = "TEXT")]
    pub serial: Option<String>,

    /// Block size that the guest sees: 512, 1024, 2048 or 4096 bytes, also 1k, 2k or 4k [default: 512 for a
    /// file, a block device's own]
    #[arg(long, value_name = "SIZE", value_parser = block)]
    pub logical_block_size: Option<u32>,

    /// Lock the image as QEMU does, so that no other process writes to it; claim a block device, so that it is
    /// not mounted
    #[arg(long, value_enum, default_value = "on", value_name = "on|off", hide_possible_values = true)]
    pub lock: Switch,

    /// The VM comes by live migration: the daemon at its source may have the image until then. The image is
    /// locked all the same before the first request
    #[arg(long, value_enum, default_value = "off", default_missing_value = "on", num_args = 0..=1, require_equals = true, value_name = "on|off", hide_possible_values = true)]
    pub incoming: Switch,

    /// Most threads that serve queues; the disk is opened once for each [default: as many as there are queues, or CPUs if there are fewer]
    #[arg(long, value_name = "N", value_parser = number::<u16>(1, 256))]
    pub workers: Option<u16>,

    /// Queues offered to the VMM; they cost nothing until used
    #[arg(long, value_name = "N", default_value_t = MAX_QUEUES, value_parser = number::<u16>(1, 256))]
    pub num_queues: u16,

    /// How the disk is accessed; auto is io_uring, or threads where it is forbidden; null reads and
    /// writes nothing, for measuring
    #[arg(long, value_enum, default_value = "auto", value_name = "ENGINE")]
    pub engine: EngineChoice,

    /// How long a worker may look for work before it sleeps, in microseconds, if that has paid lately. 0 sleeps
    /// at once; an idle disk costs nothing either way
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = number::<u64>(0, 10_000))]
    pub poll_us: u64,

    /// Join adjacent requests into one operation
    #[arg(long, value_enum, default_value = "on", value_name = "on|off", hide_possible_values = true)]
    pub plug: Switch,

    /// Keep the guest's memory pinned and registered with io_uring: less CPU for each request. Never with a
    /// balloon, free-page reporting or virtio-mem: the guest's data would be lost
    #[arg(long, value_enum, default_value = "off", default_missing_value = "on", num_args = 0..=1, require_equals = true, value_name = "on|off", hide_possible_values = true)]
    pub pin_memory: Switch,

    /// How long SIGTERM waits for requests in flight, in milliseconds, before it ends the daemon with
    /// status 3
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = number::<u64>(0, 86_400_000))]
    pub stop_timeout_ms: u64,

    /// Give up, before the VMM says anything, all that serving does not need: capabilities, files, system calls. log
    /// lets through a system call that is missing in the list, and the kernel's log tells of it
    #[arg(long, value_enum, default_value = "on", value_name = "on|off|log", hide_possible_values = true)]
    pub sandbox: sandbox::Mode,

    /// How much to log
    #[arg(long, value_enum, default_value = "info", value_name = "LEVEL")]
    pub log_level: LogLevel,

    /// Have a small parent process that holds what a successor needs and starts it when the daemon dies, on the same
    /// connection: the VMM and its guest notice a pause. SIGUSR2 upgrades to the program that is at vublkd's path then
    /// [default: on; off with --fd-store]
    #[arg(
        long,
        value_enum,
        value_name = "on|off",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "on",
        overrides_with = "supervise",
        hide_possible_values = true
    )]
    pub supervise: Option<Switch>,

    /// Keep in systemd's file descriptor store, instead of a parent process, what a successor needs to go on, after a
    /// crash or a systemctl restart, on the same connection. The unit needs FileDescriptorStoreMax=2048
    #[arg(long)]
    pub fd_store: bool,

    /// Print what this back-end can do, as JSON, and exit; other options are ignored
    #[arg(long)]
    pub print_capabilities: bool,

    /// Print the layouts of state that this program can go on from, and exit
    #[arg(long, hide = true)]
    pub print_state_version: bool,

    /// For tests: kernel features to do without
    #[arg(long, hide = true, value_delimiter = ',', value_parser = feature)]
    pub io_uring_refuse: Vec<Feature>,

    /// For tests: entries of the completion queue
    #[arg(long, hide = true, value_parser = number::<u32>(1, 1 << 20))]
    pub io_uring_cq_entries: Option<u32>,

    /// For tests: chunks in the pool of aligned pages
    #[arg(long, hide = true, value_parser = number::<usize>(1, 1 << 20))]
    pub pool_chunks: Option<usize>,

    /// For tests: bytes of such a chunk
    #[arg(long, hide = true, value_parser = number::<usize>(512, 1 << 30))]
    pub pool_chunk_len: Option<usize>,
}

/// A parser of whole numbers from `low` to `high`.
pub fn number<T: TryFrom<u64>>(low: u64, high: u64) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| {
        let number = text.parse().ok().filter(|n| (low..=high).contains(n)).and_then(|n| T::try_from(n).ok());
        number.ok_or_else(|| format!("use a whole number from {low} to {high}"))
    }
}

/// A socket's path, which the kernel limits (unix(7)).
///
/// # Errors
/// A sentence that says what to type.
pub fn socket(path: PathBuf) -> Result<PathBuf, String> {
    if path.as_os_str().len() < 108 {
        Ok(path)
    } else {
        Err("use a path of at most 107 bytes for a socket".into())
    }
}

/// Where scrapes are answered.
fn place(word: &str) -> Result<Place, String> {
    match word.strip_prefix("unix:") {
        Some("") => Err("use unix:PATH".into()),
        Some(path) => socket(path.into()).map(Place::Unix),
        None => word.parse().map(Place::Tcp).map_err(|_| {
            "use unix:PATH, or an IP address and a port, such as 127.0.0.1:9750 or [::1]:9750".into()
        }),
    }
}

/// Bytes as people write them: a number, also with k, M, G or T for powers of 1024.
///
/// # Errors
/// A sentence that says what to type.
pub fn size(text: &str) -> Result<u64, String> {
    let size = parse_size::Config::new().with_binary().parse_size(text);
    match size {
        Ok(size) if i64::try_from(size).is_ok() => Ok(size),
        Ok(_) | Err(parse_size::Error::PosOverflow) => Err("no disk is that large, use less than 8E".into()),
        Err(_) => Err("use bytes, or a number with k, M, G or T (powers of 1024), such as 4k or 20G".into()),
    }
}

fn block(text: &str) -> Result<u32, String> {
    let size = size(text).ok().and_then(|size| u32::try_from(size).ok());
    let valid = size.filter(|size| size.is_power_of_two() && (512..=4096).contains(size));
    valid.ok_or_else(|| "use 512, 1024, 2048 or 4096".into())
}

fn feature(name: &str) -> Result<Feature, String> {
    let all = Feature::ALL.map(Feature::name);
    Feature::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| format!("one of {}", all.join(", ")))
}

/// Where front-ends come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Socket {
    /// `--socket-path`.
    Path(PathBuf),
    /// `--fd`.
    Fd(i32),
    /// One that systemd, or the parent, passed.
    Passed,
}

/// What keeps what a successor needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: a crash ends the connection.
    Nowhere,
    /// vublkd's parent process.
    Parent,
    /// systemd's file descriptor store.
    Systemd,
}

/// What the command line means.
#[derive(Clone, Debug)]
pub struct Meant {
    /// Where front-ends come from.
    pub socket: Socket,
    /// Where to listen for the tool; beside the disk's socket when `None`.
    pub control: Option<PathBuf>,
    /// Where to answer scrapes.
    pub metrics: Option<Place>,
    /// The user to become, as it was typed.
    pub user: Option<String>,
    /// The group.
    pub group: Option<String>,
    /// The disk; `instance` is filled in when the socket is known.
    pub disk: disk::Options,
    /// What is promised of it.
    pub promise: promise::Options,
    /// Start in write-back mode.
    pub write_back: bool,
    /// Threads.
    pub workers: u16,
    /// Queues.
    pub queues: u16,
    /// Engine.
    pub engine: EngineChoice,
    /// Test hooks of the io_uring engine.
    pub uring: uring::Options,
    /// Pin the guest's memory.
    pub pin_memory: bool,
    /// How workers work.
    pub tuning: Tuning,
    /// Bound of a drain when stopping.
    pub stop_timeout: Duration,
    /// What keeps what a successor needs.
    pub keep: Keep,
    /// Which of the requests that the disk refuses are held.
    pub on_error: OnError,
    /// What the process gives up.
    pub sandbox: sandbox::Mode,
    /// Verbosity.
    pub log_level: LogLevel,
}

impl Typed {
    /// Finds out what was meant. `passed`: how many sockets systemd, or the parent, passed.
    ///
    /// # Errors
    /// A sentence that says what to type.
    pub fn mean(self, passed: usize) -> Result<Meant, String> {
        let keep = match (self.supervise, self.fd_store) {
            (Some(Switch::On), true) => {
                return Err("--supervise=on and --fd-store exclude each other: one keeps what a successor needs in a \
                            parent process, the other in systemd"
                    .into());
            }
            (_, true) => Keep::Systemd,
            (Some(Switch::Off), false) => Keep::Nowhere,
            (_, false) => Keep::Parent,
        };
        let socket = match (self.socket_path, self.fd, passed) {
            (Some(path), None, 0) => Socket::Path(path),
            (None, Some(fd), 0) => Socket::Fd(fd),
            (None, None, 1) => Socket::Passed,
            (None, None, 0) => {
                return Err("no socket: add --socket-path=PATH, or start vublkd by socket activation".into());
            }
            (Some(_), Some(_), _) => return Err("--socket-path and --fd exclude each other".into()),
            (Some(_), ..) | (_, Some(_), _) => {
                return Err("systemd passed a socket (its socket unit listens): leave --socket-path and --fd away, or \
                            stop the socket unit"
                    .into());
            }
            (None, None, more) => {
                return Err(format!(
                    "systemd passed {more} sockets, a disk has one: leave one ListenStream= in the socket unit"
                ));
            }
        };
        let typed = [
            ("--blk-file", Some(&self.blk_file)),
            ("--control", self.control.as_ref()),
            ("--metrics", if let Some(Place::Unix(path)) = &self.metrics { Some(path) } else { None }),
            ("--socket-path", if let Socket::Path(path) = &socket { Some(path) } else { None }),
        ];
        let paths = typed.map(|(option, path)| (option, path.and_then(|p| std::path::absolute(p).ok())));
        for (at, (one, path)) in paths.iter().enumerate() {
            let same = paths.iter().skip(at + 1).find(|(_, other)| path.is_some() && other == path);
            if let (Some((other, _)), Some(path)) = (same, path) {
                return Err(format!(
                    "{one} and {other} are both {}: use another path for {other}",
                    path.display()
                ));
            }
        }
        if self.pin_memory == Switch::On && matches!(self.engine, EngineChoice::Threads | EngineChoice::Null)
        {
            return Err("--pin-memory is for io_uring: remove it, or use --engine=auto".into());
        }
        if let Some(serial) = &self.serial
            && serial.len() > promise::ID_BYTES
        {
            let len = serial.len();
            return Err(format!("--serial={serial}: {len} bytes are too many, use 20 at most"));
        }
        if let Some(format) = self.format.as_deref().filter(|&format| format != "raw") {
            return Err(format!(
                "--format={format}: only raw disks are served. Convert the image: qemu-img convert -f {format} -O raw \
                 IMAGE NEW"
            ));
        }
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let pool = PoolSize::default();
        Ok(Meant {
            socket,
            control: self.control,
            metrics: self.metrics,
            user: self.user,
            group: self.group,
            disk: disk::Options {
                path: self.blk_file,
                direct: self.direct == Switch::On,
                read_only: self.read_only == Switch::On,
                discard: match self.discard {
                    DiscardChoice::Unmap => Discard::Unmap,
                    DiscardChoice::Ignore => Discard::Ignore,
                },
                lock: self.lock == Switch::On,
                format_raw: self.format.is_some(),
                incoming: self.incoming == Switch::On,
                instance: String::new(),
            },
            promise: promise::Options { logical_block_size: self.logical_block_size, serial: self.serial },
            write_back: self.write_cache == WriteCache::Writeback,
            workers: self.workers.unwrap_or(u16::try_from(cpus).unwrap_or(MAX_QUEUES)).min(self.num_queues),
            queues: self.num_queues,
            engine: self.engine,
            uring: uring::Options { refuse: self.io_uring_refuse, cq_entries: self.io_uring_cq_entries },
            pin_memory: self.pin_memory == Switch::On,
            tuning: Tuning {
                pool: PoolSize {
                    chunks: self.pool_chunks.unwrap_or(pool.chunks),
                    chunk_len: self.pool_chunk_len.unwrap_or(pool.chunk_len),
                },
                poll: Duration::from_micros(self.poll_us),
                plug: self.plug == Switch::On,
            },
            stop_timeout: Duration::from_millis(self.stop_timeout_ms),
            keep,
            on_error: self.on_error,
            sandbox: self.sandbox,
            log_level: self.log_level,
        })
    }
}
