//! The backing store: open it, learn what it is, guard it.
//!
//! What it is: a [`Disk`] and its [`Facts`], all found out once, at start.
//!
//! What it is not: no I/O of the guest goes through here (that is an engine's),
//! and no virtio word is known here ([`crate::config`] derives those).
//!
//! Invariants: nothing is fetched from a ring before [`Disk::open`] has passed
//! the start-up fence: a killed daemon's operations are still running in the
//! kernel, and the lock they hold is let go only when the last has ended. The
//! descriptor is never handed to another process.

pub mod lock;
pub mod range_lock;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::sys;

/// How a disk is to be opened: what the command line meant.
#[derive(Clone, Debug)]
pub struct Options {
    /// The file or block device.
    pub path: PathBuf,
    /// O_DIRECT.
    pub direct: bool,
    /// Refuse writes.
    pub read_only: bool,
    /// What the guest is told its block is; the backing's own when `None`.
    pub logical_block_size: Option<u32>,
    /// What GET_ID answers.
    pub serial: String,
    /// QEMU-compatible image locks.
    pub lock: bool,
    /// Another daemon may have the image yet: the VM comes by live migration.
    pub incoming: bool,
    /// What tells this instance from another on the same disk: its socket.
    pub instance: String,
}

/// Why a disk cannot be served. Each text says what to type next.
#[derive(Debug, Error)]
pub enum DiskError {
    /// ENOENT.
    #[error("{0}: no such file. Create it first, for example: truncate -s 10G {0}")]
    Missing(PathBuf),
    /// EACCES or EPERM.
    #[error("{0}: permission denied. Run vublkd as a user that may {1} it, or change its owner or mode")]
    Denied(PathBuf, &'static str),
    /// EROFS.
    #[error("{0}: is on a read-only file system. Add --read-only")]
    ReadOnlyFs(PathBuf),
    /// A folder, a socket, a terminal …
    #[error("{0}: is {1}, not a regular file or a block device")]
    WrongKind(PathBuf, &'static str),
    /// EINVAL from open with O_DIRECT.
    #[error("{0}: its file system does not support O_DIRECT. Add --direct=off to go through the page cache")]
    NoDirect(PathBuf),
    /// Not even one block.
    #[error(
        "{path}: has {size} bytes, less than one block of {block}. Grow it, for example: truncate -s 10G {path}"
    )]
    TooSmall {
        /// The backing.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The block in bytes.
        block: u32,
    },
    /// Somebody holds an image lock that conflicts.
    #[error("{path}: {source}")]
    Locked {
        /// The backing.
        path: PathBuf,
        /// Who is in the way.
        source: lock::LockError,
    },
    /// Anything else.
    #[error("{0}: cannot {1}: {2}")]
    Io(PathBuf, &'static str, io::Error),
}

/// How a range is made to read as zero, or given back, by fallocate(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fallocate {
    /// PUNCH_HOLE works: frees the range, which then reads as zero.
    pub punch: bool,
    /// ZERO_RANGE works: the range reads as zero and stays allocated.
    pub zero: bool,
    /// Both take only multiples of this many bytes.
    pub align: u32,
}

impl Fallocate {
    /// Nothing, or nobody knows.
    const NONE: Self = Self { punch: false, zero: false, align: 1 };
}

/// What was found out about the backing at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Bytes that the guest may use: the size, rounded down to whole blocks. It may
    /// have grown since, see [`Disk::measure`].
    pub size: u64,
    /// Block that the guest is told, bytes.
    pub logical_block: u32,
    /// Physical block and optimal I/O size of the backing, bytes.
    pub physical_block: u32,
    /// 0 when there is none.
    pub optimal_io: u32,
    /// Offsets and lengths of an operation are multiples of this, bytes.
    pub offset_align: u32,
    /// DISCARD is best in multiples of this, bytes.
    pub discard_granularity: u32,
    /// What fallocate can do here.
    pub fallocate: Fallocate,
    /// RWF_DSYNC reaches the device. Not so on FUSE, which ignores it.
    pub dsync: bool,
    /// A block device, not a file.
    pub is_device: bool,
    /// tmpfs, zram or a RAM disk: operations are copies, and io_uring, whose
    /// calls must not block, would give each to a kernel thread.
    pub in_memory: bool,
    /// Opened for reading only.
    pub read_only: bool,
}

impl Facts {
    /// Zeroes of any length are a matter of metadata here; elsewhere they are
    /// written, by us or by the kernel.
    #[must_use]
    pub fn zeroes_quickly(&self) -> bool {
        self.fallocate.zero && (self.fallocate.punch || !self.is_device)
    }
}

/// What tells a disk from any other on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Identity {
    /// Device number and inode of a file.
    File(u64, u64),
    /// Number of a block device, whatever leads to it.
    Device(u64),
}

impl Identity {
    fn of(meta: &std::fs::Metadata) -> Self {
        if meta.file_type().is_block_device() {
            Self::Device(meta.rdev())
        } else {
            Self::File(meta.dev(), meta.ino())
        }
    }
}

/// An open disk, shared by all workers.
#[derive(Debug)]
pub struct Disk {
    file: File,
    facts: Facts,
    identity: Identity,
    path: PathBuf,
    image_lock: bool,
    /// Addresses of O_DIRECT buffers are multiples of this. Grows when the
    /// kernel turns out to want more than it said.
    mem_align: AtomicU32,
    /// An fsync failed: what is durable is unknown until the disk is reopened.
    sync_failed: AtomicBool,
    /// Where that is noted down for a successor: a file and an offset, bytes.
    sync_note: OnceLock<(File, u64)>,
    /// Keeps read-modify-write cycles apart from every other change.
    pub ranges: range_lock::RangeLocks,
}

impl Disk {
    /// Opens the disk, tests the image locks, and passes the fence, which can
    /// take as long as a dead daemon's last operations do.
    ///
    /// # Errors
    /// Each of [`DiskError`].
    ///
    /// `served`: somebody else serves as this instance; then the wait at the
    /// fence would never end.
    pub fn open(options: &Options, served: &dyn Fn() -> bool) -> Result<Self, DiskError> {
        let file = open_file(options)?;
        let locked = |source| DiskError::Locked { path: options.path.clone(), source };
        // Before anything is tried out on the image: it may be another's.
        lock::fence(&file, &options.instance, options.read_only, &options.path, served).map_err(locked)?;
        if options.lock && !options.incoming {
            lock::test(&file, options.read_only).map_err(locked)?;
        }
        let facts = facts(options, &file)?;
        let meta = file.metadata().map_err(|e| DiskError::Io(options.path.clone(), "look at it", e))?;
        if options.direct && !facts.read_only {
            // Whoever wrote the file through the page cache must be seen by us.
            sys::write_back_and_drop_cache(&file)
                .map_err(|e| DiskError::Io(options.path.clone(), "write back the page cache of it", e))?;
        }
        let mem_align =
            if options.direct { sys::dio_align(&file).map_or(facts.offset_align, |(mem, _)| mem) } else { 1 };
        Ok(Self {
            file,
            facts,
            identity: Identity::of(&meta),
            path: options.path.clone(),
            image_lock: options.lock,
            mem_align: AtomicU32::new(mem_align),
            sync_failed: AtomicBool::new(false),
            sync_note: OnceLock::new(),
            ranges: range_lock::RangeLocks::default(),
        })
    }

    /// Bytes that the guest may use as the backing is now: the unit is that of
    /// [`Facts::size`].
    ///
    /// # Errors
    /// As fstat(2) or ioctl(2).
    pub fn measure(&self) -> io::Result<u64> {
        let unit = self.unit();
        Ok(bytes_of(&self.file, self.facts.is_device)? / unit * unit)
    }

    /// A size is a multiple of this, bytes.
    #[must_use]
    pub fn unit(&self) -> u64 {
        self.facts.logical_block.max(self.facts.offset_align).into()
    }

    /// Makes a file longer; what is new reads as zeroes. One that is longer already,
    /// by less than a block, stays as it is.
    ///
    /// # Errors
    /// As ftruncate(2).
    pub fn grow(&self, bytes: u64) -> io::Result<()> {
        if bytes > bytes_of(&self.file, false)? { self.file.set_len(bytes) } else { Ok(()) }
    }

    /// Whether the image is nobody else's.
    ///
    /// # Errors
    /// [`lock::LockError`].
    pub fn test_image_lock(&self) -> Result<(), lock::LockError> {
        if self.image_lock { lock::test(&self.file, self.facts.read_only) } else { Ok(()) }
    }

    /// The descriptor that engines submit to.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What was found out at start.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Which disk it is.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// True if whoever opens its path now gets this disk.
    #[must_use]
    pub fn is_at_its_path(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|meta| Identity::of(&meta) == self.identity)
    }

    /// For messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the image locks, when the first ring starts. Call again while it
    /// says that somebody else is in the way.
    ///
    /// # Errors
    /// [`lock::LockError`].
    pub fn take_image_lock(&self) -> Result<(), lock::LockError> {
        if self.image_lock { lock::take(&self.file, self.facts.read_only) } else { Ok(()) }
    }

    /// Drops them, when the last ring stopped, so that another daemon on this
    /// or another host can take over.
    pub fn drop_image_lock(&self) {
        if self.image_lock {
            lock::release(&self.file);
        }
    }

    /// Lets a successor pass the fence at once, nothing being in flight any more. An
    /// io_uring that is gone keeps the file open for some tens of milliseconds.
    pub fn let_go(&self) {
        lock::pass_on(&self.file);
    }

    /// Alignment of buffers, bytes; a power of two.
    #[must_use]
    pub fn mem_align(&self) -> u32 {
        self.mem_align.load(Ordering::Relaxed)
    }

    /// An operation that fitted all known rules was refused: ask for whole
    /// pages from now on.
    pub fn raise_mem_align(&self) {
        if self.mem_align.fetch_max(4096, Ordering::Relaxed) < 4096 {
            tracing::warn!(
                disk = %self.path.display(),
                "the kernel refused a buffer that its own rules allow; asking for 4096-byte alignment from now on"
            );
        }
    }

    /// True once an fsync failed. Linux reports a lost write once, so every
    /// later FLUSH fails too.
    #[must_use]
    pub fn sync_failed(&self) -> bool {
        self.sync_failed.load(Ordering::Acquire)
    }

    /// Latches [`Disk::sync_failed`].
    pub fn set_sync_failed(&self) {
        if !self.sync_failed() {
            self.write_sync_note(); // first: whoever sees the other may be killed
        }
        if !self.sync_failed.swap(true, Ordering::AcqRel) {
            tracing::error!(
                disk = %self.path.display(),
                "fsync failed: writes that the guest believes cached may be lost. Every FLUSH fails, also \
                 after a crash or an upgrade, until vublkd was stopped and started; check the device before you do"
            );
        }
    }

    /// Notes it down there, too, from now on; once.
    pub fn note_failed_syncs(&self, file: File, at: u64) {
        let _only_one_session = self.sync_note.set((file, at));
        if self.sync_failed() {
            self.write_sync_note();
        }
    }

    fn write_sync_note(&self) {
        if let Some((file, at)) = self.sync_note.get()
            && let Err(e) = file.write_all_at(&[1], *at)
        {
            tracing::error!("cannot note that down for a successor: {e}");
        }
    }

    /// fdatasync, waiting.
    ///
    /// # Errors
    /// As fdatasync(2); then [`Disk::sync_failed`] holds.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data().inspect_err(|_| self.set_sync_failed())
    }
}

fn open_file(options: &Options) -> Result<File, DiskError> {
    let path = options.path.clone();
    // Looked at before it is opened: opening a FIFO would wait for its writer.
    let meta = std::fs::metadata(&path).map_err(|e| open_error(options, e))?;
    let kind = meta.file_type();
    let wrong = if kind.is_dir() {
        Some("a directory")
    } else if kind.is_char_device() {
        Some("a character device")
    } else if kind.is_fifo() {
        Some("a FIFO")
    } else if kind.is_socket() {
        Some("a socket")
    } else {
        None
    };
    if let Some(what) = wrong {
        return Err(DiskError::WrongKind(path, what));
    }
    let open = |flags: i32| {
        std::fs::OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(flags | libc::O_NONBLOCK)
            .open(&options.path)
            .and_then(blocking)
    };
    if !options.direct {
        return open(0).map_err(|e| open_error(options, e));
    }
    open(libc::O_DIRECT).map_err(|e| {
        if e.raw_os_error() == Some(libc::EINVAL) {
            DiskError::NoDirect(path)
        } else {
            open_error(options, e)
        }
    })
}

/// O_NONBLOCK was for the open alone. Left on, io_uring takes it for "do not
/// wait", and kernels up to 6.4 then fail with EAGAIN what they cannot do at once.
fn blocking(file: File) -> io::Result<File> {
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags - rustix::fs::OFlags::NONBLOCK)?;
    Ok(file)
}

fn open_error(options: &Options, error: io::Error) -> DiskError {
    let path = options.path.clone();
    match error.raw_os_error() {
        Some(libc::ENOENT) => DiskError::Missing(path),
        Some(libc::EACCES | libc::EPERM) => {
            DiskError::Denied(path, if options.read_only { "read" } else { "read and write" })
        }
        Some(libc::EROFS) => DiskError::ReadOnlyFs(path),
        _ => DiskError::Io(path, "open it", error),
    }
}

fn bytes_of(file: &File, is_device: bool) -> io::Result<u64> {
    if is_device { sys::device_size(file) } else { file.metadata().map(|meta| meta.len()) }
}

fn facts(options: &Options, file: &File) -> Result<Facts, DiskError> {
    let io = |what| move |e| DiskError::Io(options.path.clone(), what, e);
    let meta = file.metadata().map_err(io("read its size"))?;
    let is_device = meta.file_type().is_block_device();
    let bytes = bytes_of(file, is_device).map_err(io("read its size"))?;
    let device = is_device.then(|| (sys::device_block(file).unwrap_or(4096), Queue::of(meta.rdev())));
    // The block of the backing: what an O_DIRECT offset must be a multiple of.
    // A probe by reading would lie: ext4 reads a hole at any alignment.
    let backing_block = match (&device, sys::dio_align(file)) {
        (Some((block, _)), _) => *block,
        (None, Some((_, offset))) if options.direct => offset,
        (None, None) if options.direct => 4096,
        (None, _) => 512,
    };
    let block = backing_block.max(512);
    let logical_block = options.logical_block_size.unwrap_or(block);
    let unit = u64::from(logical_block.max(block));
    let size = bytes / unit * unit;
    if size == 0 {
        return Err(DiskError::TooSmall {
            path: options.path.clone(),
            size: bytes,
            block: logical_block.max(block),
        });
    }
    if size != bytes {
        tracing::warn!(
            disk = %options.path.display(),
            "{bytes} bytes is no multiple of the {unit}-byte block: the guest gets {size}, the last {} are not used",
            bytes - size
        );
    }
    let fs_block = u32::try_from(meta.blksize()).unwrap_or(4096).clamp(512, 1 << 20);
    let fallocate = match &device {
        Some((block, queue)) => Fallocate { punch: queue.zeroes, zero: true, align: *block },
        // On an image that is another's yet nothing is tried out.
        None if options.incoming => match neighbour(&options.path) {
            Ok(other) => probe_fallocate(&other, options.read_only),
            Err(_) => Fallocate::NONE,
        },
        None => probe_fallocate(file, options.read_only),
    };
    Ok(Facts {
        size,
        logical_block,
        physical_block: device
            .as_ref()
            .map_or(fs_block.min(4096), |(_, q)| q.physical_block)
            .max(logical_block),
        optimal_io: device.as_ref().map_or(0, |(_, q)| q.optimal_io),
        // The page cache takes any byte.
        offset_align: if options.direct { block } else { 1 },
        discard_granularity: device
            .as_ref()
            .map_or(fs_block, |(b, q)| q.discard_granularity.max(*b))
            .max(logical_block),
        fallocate,
        dsync: is_device || dsync_works(file),
        is_device,
        in_memory: match &device {
            Some(_) => is_memory_device(meta.rdev()),
            None => rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC),
        },
        read_only: options.read_only,
    })
}

/// A file without a name on the same file system.
fn neighbour(path: &Path) -> io::Result<File> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open(folder)
}

/// What fallocate can do on this file, tried beyond its end, where nothing is.
fn probe_fallocate(file: &File, read_only: bool) -> Fallocate {
    if read_only {
        return Fallocate::NONE;
    }
    let end = file.metadata().map_or(0, |m| m.len()).next_multiple_of(1 << 20);
    let works = |mode| sys::fallocate(file, mode | libc::FALLOC_FL_KEEP_SIZE, end, 4096).is_ok();
    let punch = works(libc::FALLOC_FL_PUNCH_HOLE);
    let zero = works(libc::FALLOC_FL_ZERO_RANGE);
    if zero && punch {
        // ZERO_RANGE may have allocated past the end: give it back.
        let _best_effort =
            sys::fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, end, 4096);
    }
    Fallocate { punch, zero, align: 1 }
}

/// File systems whose O_DSYNC writes are known to reach the device.
fn dsync_works(file: &File) -> bool {
    const KNOWN: [i64; 3] = [0xef53, 0x5846_5342, 0x9123_683e]; // ext4, xfs, btrfs
    rustix::fs::fstatfs(file).is_ok_and(|fs| KNOWN.contains(&fs.f_type))
}

const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Block devices that are memory, by the names of their drivers.
fn is_memory_device(rdev: u64) -> bool {
    let link = format!("/sys/dev/block/{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let name = std::fs::read_link(link).ok().and_then(|path| path.file_name().map(std::ffi::OsString::from));
    name.is_some_and(|n| ["zram", "ram"].iter().any(|driver| n.to_string_lossy().starts_with(driver)))
}

/// A block device's limits, from sysfs.
#[derive(Debug)]
struct Queue {
    physical_block: u32,
    optimal_io: u32,
    discard_granularity: u32,
    /// Write-zeroes in the device: without it PUNCH_HOLE answers EOPNOTSUPP.
    zeroes: bool,
}

impl Queue {
    fn of(rdev: u64) -> Self {
        let dir = format!("/sys/dev/block/{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
        let read = |name: &str| -> u64 {
            // A partition has its queue in the whole disk's folder.
            ["queue", "../queue"]
                .iter()
                .find_map(|q| std::fs::read_to_string(format!("{dir}/{q}/{name}")).ok())
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(0)
        };
        let small = |name| u32::try_from(read(name)).unwrap_or(0);
        Self {
            physical_block: small("physical_block_size").max(512),
            optimal_io: small("optimal_io_size"),
            discard_granularity: small("discard_granularity"),
            zeroes: read("discard_max_bytes") > 0 && read("write_zeroes_max_bytes") > 0,
        }
    }
}
