//! What a disk's options mean: of the command line, or of a `[[disk]]` table of a file.
//!
//! What it is not: it opens nothing and touches nothing.
//!
//! Invariant: every contradiction within one disk is found here.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use clap::builder::{NonEmptyStringValueParser, PathBufValueParser, TypedValueParser};

use super::limits::LimitArgs;
use super::{MAX_QUEUES, Switch, number, size, socket};
use crate::backing::Discard;
use crate::disk;
use crate::disk::uri::Uri;
use crate::engine::uring::{self, Feature};
use crate::hold::OnError;
use crate::promise;
use crate::throttle::Limits;
use crate::worker::{PoolSize, Tuning};

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

/// The options of one disk.
#[derive(Clone, Debug, clap::Args)]
pub struct DiskArgs {
    /// Listen here for the VMM: at most 107 bytes. A stale socket is replaced, anything else that is there is an
    /// error; its mode is 0660
    #[arg(long, value_name = "PATH", conflicts_with = "fd", value_parser = PathBufValueParser::new().try_map(socket))]
    pub socket_path: Option<PathBuf>,

    /// Use this open socket, listening or connected, instead. Under systemd's socket activation neither
    /// is needed
    #[arg(long, value_name = "FDNUM", value_parser = number::<i32>(3, 0x7fff_ffff))]
    pub fd: Option<i32>,

    /// The disk: a file or a block device
    #[arg(long, value_name = "PATH", conflicts_with = "disk")]
    pub blk_file: Option<PathBuf>,

    /// The disk, on another machine too: a path as --blk-file; the URI of an NBD server's export, nbd://HOST[:PORT]/EXPORT
    /// or nbd+unix:///EXPORT?socket=PATH; or an image of a Ceph cluster, rbd:POOL/IMAGE[@SNAPSHOT][:conf=FILE][:id=USER]
    /// [:keyring=FILE]
    #[arg(long, value_name = "URI")]
    pub disk: Option<String>,

    /// How long requests wait for a server that is lost, in seconds; then they end with an I/O error. 0: at once
    /// [default: as long as it takes]
    #[arg(long, value_name = "S", value_parser = number::<u64>(0, 1_000_000))]
    pub reconnect_delay: Option<u64>,

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

    /// Serial number that the guest sees, 20 bytes at most [default: the start of the file's, export's or image's name, and
    /// a hash of the real path, of the URI, or of the image's number in its cluster]
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

    /// Most threads that serve queues, 1 to 256; the disk is opened once for each [default: as many as there are queues, or CPUs if there are fewer]
    #[arg(long, value_name = "N", value_parser = number::<u16>(1, 256))]
    pub workers: Option<u16>,

    /// Queues offered to the VMM, 1 to 256; they cost nothing until used
    #[arg(long, value_name = "N", default_value_t = MAX_QUEUES, value_parser = number::<u16>(1, 256))]
    pub num_queues: u16,

    /// How the disk is accessed; auto is io_uring, or threads where it is forbidden; null reads and
    /// writes nothing, for measuring
    #[arg(long, value_enum, default_value = "auto", value_name = "ENGINE")]
    pub engine: EngineChoice,

    /// How long a worker may look for work before it sleeps, in microseconds, 0 to 10000, if that has paid lately. 0
    /// sleeps at once; an idle disk costs nothing either way
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = number::<u64>(0, 10_000))]
    pub poll_us: u64,

    /// Join adjacent requests into one operation
    #[arg(long, value_enum, default_value = "on", value_name = "on|off", hide_possible_values = true)]
    pub plug: Switch,

    /// Keep the guest's memory pinned and registered with io_uring: less CPU for each request. Never with a
    /// balloon, free-page reporting or virtio-mem: the guest's data would be lost
    #[arg(long, value_enum, default_value = "off", default_missing_value = "on", num_args = 0..=1, require_equals = true, value_name = "on|off", hide_possible_values = true)]
    pub pin_memory: Switch,

    /// See [`LimitArgs`].
    #[command(flatten)]
    pub limits: LimitArgs,

    /// The disks of one process that name this group share one set of limits, written in one of them
    #[arg(long, value_name = "NAME", help_heading = "Limits", value_parser = NonEmptyStringValueParser::new())]
    pub throttle_group: Option<String>,

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

fn block(text: &str) -> Result<u32, String> {
    let size = size(text).ok().and_then(|size| u32::try_from(size).ok());
    let valid = size.filter(|size| size.is_power_of_two() && (512..=4096).contains(size));
    valid.ok_or_else(|| "use 512, 1024, 2048 or 4096".into())
}

fn feature(name: &str) -> Result<Feature, String> {
    let all = Feature::ALL.map(Feature::name);
    Feature::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| format!("one of {}", all.join(", ")))
}

/// How many descriptors a disk may need: a kick, a call and an error descriptor of each queue; three for each worker's
/// engine; those of a message, and a few for connections. `copies`: systemd's store has copies, to know what it has.
#[must_use]
pub fn descriptors_of(queues: usize, workers: usize, copies: bool) -> usize {
    3 * queues + 3 * workers + 32 + 24 + if copies { 3 * queues + 64 } else { 0 }
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

/// What a disk's options mean.
#[derive(Clone, Debug)]
pub struct MeantDisk {
    /// What tells it from the others of a file; `None`: it is the command line's.
    pub name: Option<String>,
    /// Where front-ends come from.
    pub socket: Socket,
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
    /// How long requests wait for a lost server; `None`: as long as it takes.
    pub reconnect_delay: Option<Duration>,
    /// How workers work.
    pub tuning: Tuning,
    /// Which of the requests that the disk refuses are held.
    pub on_error: OnError,
    /// How much it may have.
    pub limits: Limits,
    /// The disks with which it shares that.
    pub throttle_group: Option<String>,
}

impl DiskArgs {
    /// Finds out what was meant, for a disk with this socket.
    ///
    /// # Errors
    /// A sentence that says what to type.
    pub fn mean(self, name: Option<String>, socket: Socket) -> Result<MeantDisk, String> {
        let (path, remote) = match (self.blk_file, self.disk) {
            (Some(path), _) if path.as_os_str().is_empty() => return Err("--blk-file= names no file".into()),
            (Some(path), _) if path.to_str().is_some_and(Uri::is_meant) => {
                let path = path.display();
                return Err(format!(
                    "--blk-file={path}: a disk on another machine is named by --disk={path}; a file of that name by \
                     --blk-file=./{path}"
                ));
            }
            (Some(path), _) => (path, None),
            (None, Some(text)) if text.is_empty() => return Err("--disk= names no disk".into()),
            (None, Some(text)) if Uri::is_meant(&text) => {
                let uri = Uri::parse(&text).map_err(|e| format!("--disk: {e}"))?;
                (uri.to_string().into(), Some(uri))
            }
            (None, Some(path)) => (path.into(), None),
            (None, None) => return Err(super::NO_DISK.into()),
        };
        if remote.is_some() {
            if matches!(self.engine, EngineChoice::Threads | EngineChoice::Null) {
                return Err("a disk on another machine is served by io_uring: use --engine=auto".into());
            }
            for (option, is_typed) in [
                ("--pin-memory", self.pin_memory == Switch::On),
                ("--direct=off", self.direct == Switch::Off),
                ("--lock=off", self.lock == Switch::Off),
            ] {
                if is_typed {
                    return Err(format!("{option} is for files and block devices: remove it"));
                }
            }
        } else if self.reconnect_delay.is_some() {
            return Err("--reconnect-delay is for a disk on another machine: remove it".into());
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
        let limits = self.limits.mean()?;
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let pool = PoolSize::default();
        Ok(MeantDisk {
            name,
            socket,
            disk: disk::Options {
                path,
                remote,
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
                dead_clients: Vec::new(),
                held: Arc::default(),
                patience: self.reconnect_delay.map(Duration::from_secs),
                confine: None,
            },
            promise: promise::Options { logical_block_size: self.logical_block_size, serial: self.serial },
            write_back: self.write_cache == WriteCache::Writeback,
            workers: self.workers.unwrap_or(u16::try_from(cpus).unwrap_or(MAX_QUEUES)).min(self.num_queues),
            queues: self.num_queues,
            engine: self.engine,
            uring: uring::Options { refuse: self.io_uring_refuse, cq_entries: self.io_uring_cq_entries },
            pin_memory: self.pin_memory == Switch::On,
            reconnect_delay: self.reconnect_delay.map(Duration::from_secs),
            tuning: Tuning {
                pool: PoolSize {
                    chunks: self.pool_chunks.unwrap_or(pool.chunks),
                    chunk_len: self.pool_chunk_len.unwrap_or(pool.chunk_len),
                },
                poll: Duration::from_micros(self.poll_us),
                plug: self.plug == Switch::On,
            },
            on_error: self.on_error,
            limits,
            throttle_group: self.throttle_group,
        })
    }
}

impl MeantDisk {
    /// The path of its image, unless it is only read, and how a message calls that.
    #[must_use]
    pub fn image(&self) -> Option<(String, &Path)> {
        let is_written = !self.disk.read_only && self.disk.remote.is_none();
        is_written.then(|| (self.called("blk-file"), self.disk.path.as_path()))
    }

    /// Where its image is on another machine, unless it is only read, and how a message calls that.
    #[must_use]
    pub fn remote_image(&self) -> Option<(String, &Uri)> {
        let uri = self.disk.remote.as_ref().filter(|_| !self.disk.read_only)?;
        Some((self.called("disk"), uri))
    }

    /// The path of its socket, if it has one, and how a message calls that.
    #[must_use]
    pub fn socket(&self) -> Option<(String, &Path)> {
        match &self.socket {
            Socket::Path(path) => Some((self.called("socket-path"), path)),
            Socket::Fd(_) | Socket::Passed => None,
        }
    }

    fn called(&self, option: &str) -> String {
        match &self.name {
            None => format!("--{option}"),
            Some(name) => format!("{option} of disk {name}"),
        }
    }
}
