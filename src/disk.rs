//! The backing store: open it, tell it from others, guard it.
//!
//! What it is: a [`Disk`]: the open file or block device, its locks, and how it wants to
//! be spoken to ([`Backing`]).
//!
//! What it is not: no I/O of the guest goes through here (that is an engine's), and what
//! the guest is told of it is a [`crate::promise::Promise`].
//!
//! Invariants: nothing is fetched from a ring before [`Disk::open`] has passed
//! the start-up fence: a killed daemon's operations are still running in the
//! kernel, and the locks they hold are let go only when the last has ended. The
//! descriptors are never handed to another process.

pub mod format;
pub mod holder;
pub mod lock;
pub mod range_lock;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::backing::{Backing, DeviceLimits, Discard};
use crate::engine::Files;
use crate::sys;

/// How a disk is to be opened: what the command line meant.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The file or block device.
    pub path: PathBuf,
    /// O_DIRECT.
    pub direct: bool,
    /// Refuse writes.
    pub read_only: bool,
    /// What a DISCARD does.
    pub discard: Discard,
    /// QEMU-compatible image locks, and the claim on a block device.
    pub lock: bool,
    /// The disk is raw, whatever it begins with.
    pub format_raw: bool,
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
    #[error(
        "{0}: is on a read-only file system. Add --read-only; or, where a systemd unit makes it read-only for vublkd, add \
         ReadWritePaths={0} to the unit (systemctl edit)"
    )]
    ReadOnlyFs(PathBuf),
    /// BLKROGET.
    #[error("{0}: is a read-only block device. Add --read-only, or make it writable: blockdev --setrw {0}")]
    ReadOnlyDevice(PathBuf),
    /// A folder, a socket, a terminal …
    #[error("{0}: is {1}. Use the path of a regular file or a block device")]
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
    /// Another process holds an image lock that conflicts.
    #[error("{path}: {source}")]
    Locked {
        /// The backing.
        path: PathBuf,
        /// What is in the way.
        source: lock::LockError,
    },
    /// An image of another format: path, format, QEMU's word for it.
    #[error(
        "{0}: is an image of format {1}; vublkd serves raw disks only, and a guest that wrote to this one would destroy \
         it. Make a raw disk of it: qemu-img convert -f {2} -O raw {0} NEW.raw. If it is a raw disk to which its guest \
         wrote a {2} header, add --format=raw"
    )]
    Format(PathBuf, &'static str, &'static str),
    /// A second description of it.
    #[error(
        "{0}: cannot open it once more, for each worker and for the page cache: {1}. vublkd does so through /proc, \
         which has to be mounted; and it needs a descriptor for each worker (raise LimitNOFILE= or ulimit -n, or use \
         fewer --workers)"
    )]
    Again(PathBuf, io::Error),
    /// Anything else.
    #[error("{0}: cannot {1}: {2}")]
    Io(PathBuf, &'static str, io::Error),
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
    /// Holds the image locks and the fence; the control thread's.
    file: Arc<File>,
    /// The same through the page cache, for the last, partial block of a file.
    cached: Option<Arc<File>>,
    /// How it wants to be spoken to.
    pub backing: Backing,
    identity: Identity,
    path: PathBuf,
    instance: String,
    image_lock: bool,
    /// Held with the image lock, where the guest writes to a block device.
    claim: Mutex<Option<File>>,
    /// Who opens it for that, in a sandbox.
    claimer: OnceLock<Mutex<lock::Claimer>>,
    direct: bool,
    /// What was in the page cache could not be written back when the disk was opened.
    pub lost_writes: bool,
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
    /// `served`: another daemon serves as this instance; then the wait at the
    /// fence would never end.
    pub fn open(options: &Options, served: &dyn Fn() -> bool) -> Result<Self, DiskError> {
        let path = options.path.clone();
        let file = open_file(options)?;
        let locked = |source| DiskError::Locked { path: path.clone(), source };
        let io = |what| move |e| DiskError::Io(options.path.clone(), what, e);
        // Before the image is touched: it may be another's.
        lock::fence(&file, &options.instance, options.read_only, &path, served).map_err(locked)?;
        if options.lock && !options.incoming {
            lock::test(&file, options.read_only).map_err(locked)?;
        }
        let meta = file.metadata().map_err(io("look at it"))?;
        if options.lock && !options.incoming && !options.read_only {
            // A killed daemon's claim may go some moments after its fence.
            let started = Instant::now();
            let mut wait = || {
                std::thread::sleep(Duration::from_millis(20));
                started.elapsed() < Duration::from_secs(1)
            };
            drop(lock::claim(&file, None, &mut wait).map_err(locked)?);
        }
        let mut lost_writes = false;
        if options.direct && !options.read_only {
            // What another program wrote through the page cache must be seen by us; and on
            // Linux 6.19 and later a single cached page slows every direct write. An error may
            // be the one that an earlier daemon's guest has to hear of with its next FLUSH.
            if let Err(e) = sys::drop_cache(&file, true) {
                tracing::error!(disk = %path.display(), "cannot write back its page cache: {e}");
                lost_writes = true;
            }
        }
        let backing = Backing::of(&file, path.clone(), options.direct, options.read_only, options.discard);
        let mut disk = Self {
            cached: None,
            identity: Identity::of(&meta),
            path: path.clone(),
            instance: options.instance.clone(),
            image_lock: options.lock,
            claim: Mutex::new(None),
            claimer: OnceLock::new(),
            direct: options.direct,
            lost_writes,
            ranges: range_lock::RangeLocks::default(),
            backing,
            file: Arc::new(file),
        };
        if options.direct && !disk.backing.is_device && disk.backing.block > 1 {
            let cached = disk.reopen(0, false).map_err(|e| DiskError::Again(path.clone(), e))?;
            disk.cached = Some(Arc::new(cached));
        }
        Ok(disk)
    }

    /// Refuses a disk that is an image of another format. Not for one that a daemon has served
    /// already: its guest may have written that header.
    ///
    /// # Errors
    /// [`DiskError::Format`].
    pub fn check_format(&self, options: &Options) -> Result<(), DiskError> {
        if options.format_raw || options.incoming {
            return Ok(());
        }
        format::of(&self.file).map_or(Ok(()), |name| {
            let word = name.split(' ').next().unwrap_or(name);
            Err(DiskError::Format(self.path.clone(), name, word))
        })
    }

    /// Opens the very same file once more, with a fence of its own: another open file
    /// description, to which Linux reports an error of its own if a write is lost.
    fn reopen(&self, number: u64, direct: bool) -> io::Result<File> {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(!self.backing.read_only)
            .custom_flags(if direct { libc::O_DIRECT } else { 0 })
            .open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
        lock::fence_too(&file, &self.instance, self.backing.read_only, number);
        Ok(file)
    }

    /// The descriptions that worker `number` submits to.
    ///
    /// # Errors
    /// As open(2); without /proc, for one.
    pub fn files(&self, number: u16) -> Result<Files, DiskError> {
        let disk = self.reopen(u64::from(number) + 1, self.direct);
        let disk = disk.map_err(|e| DiskError::Again(self.path.clone(), e))?;
        Ok(Files { disk, cached: self.cached.clone(), witness: Arc::clone(&self.file) })
    }

    /// Bytes of the backing as it is now; what a partial last block is follows from it.
    ///
    /// # Errors
    /// As fstat(2) or ioctl(2).
    pub fn measure(&self) -> io::Result<u64> {
        let bytes =
            if self.backing.is_device { sys::device_size(&self.file)? } else { self.file.metadata()?.len() };
        self.backing.resized(bytes);
        Ok(bytes)
    }

    /// Makes a file longer; what is new reads as zeroes. One that is longer already stays
    /// as it is.
    ///
    /// # Errors
    /// As ftruncate(2).
    pub fn grow(&self, bytes: u64) -> io::Result<()> {
        if bytes > self.measure()? { self.file.set_len(bytes) } else { Ok(()) }
    }

    /// Whether no other process has the image.
    ///
    /// # Errors
    /// [`lock::LockError`].
    pub fn test_image_lock(&self) -> Result<(), lock::LockError> {
        if self.image_lock { lock::test(&self.file, self.backing.read_only) } else { Ok(()) }
    }

    /// The control thread's description.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What a block device says of itself; `None` for a file.
    #[must_use]
    pub fn device_limits(&self) -> Option<DeviceLimits> {
        DeviceLimits::of(&self.file)
    }

    /// Which disk it is.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// True if a process that opens its path now gets this disk.
    #[must_use]
    pub fn is_at_its_path(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|meta| Identity::of(&meta) == self.identity)
    }

    /// For messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the image locks, when the first ring starts, and claims a block device. `wait` is
    /// called again and again while another process is in the way; false ends it.
    ///
    /// # Errors
    /// [`lock::LockError`]; then nothing is held.
    pub fn take_image_lock(&self, wait: &mut dyn FnMut() -> bool) -> Result<(), lock::LockError> {
        if self.image_lock {
            lock::take(&self.file, self.backing.read_only, wait)?;
            if !self.backing.read_only {
                let claim = lock::claim(&self.file, self.claimer.get(), wait)
                    .inspect_err(|_| lock::release(&self.file))?;
                *self.claim.lock().unwrap_or_else(PoisonError::into_inner) = claim;
            }
        }
        if !self.direct || self.cached.is_some() {
            // The daemon that had the image may have written to it on another host: what this
            // one has cached of it is old.
            let _never_fails = sys::drop_cache(&*self.file, false);
        }
        Ok(())
    }

    /// Has a thread of its own claim a block device from now on, for the sandbox lets no other thread open
    /// anything; `confine` is what it does first.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn start_claimer(&self, confine: impl FnOnce() + Send + 'static) -> io::Result<()> {
        if self.image_lock && self.backing.is_device && !self.backing.read_only {
            let claimer = lock::Claimer::start(Arc::clone(&self.file), confine)?;
            let _once = self.claimer.set(Mutex::new(claimer));
        }
        Ok(())
    }

    /// Drops them, when the front-end has left or its guest migrates, so that another daemon on
    /// this or another host can have the disk.
    pub fn drop_image_lock(&self) {
        if self.image_lock {
            *self.claim.lock().unwrap_or_else(PoisonError::into_inner) = None;
            lock::release(&self.file);
        }
    }

    /// Lets a successor have the image and pass the fence at once, nothing being in flight any
    /// more. An io_uring that is gone keeps the file open for some tens of milliseconds.
    pub fn release_for_successor<'a>(&'a self, workers: impl Iterator<Item = &'a File>) {
        self.drop_image_lock();
        let ours = [Some(&*self.file), self.cached.as_deref()];
        ours.into_iter().flatten().chain(workers).for_each(lock::release_for_successor);
    }

    /// fdatasync on a description that no worker uses, waiting.
    ///
    /// # Errors
    /// As fdatasync(2); [`crate::durability::Durability`] has to know.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
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
    let flags = if options.direct { libc::O_DIRECT } else { 0 };
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags | libc::O_NONBLOCK)
        .open(&options.path)
        .and_then(blocking);
    let file = opened.map_err(|e| match e.raw_os_error() {
        Some(libc::EINVAL) if options.direct => DiskError::NoDirect(path.clone()),
        Some(libc::EACCES | libc::EROFS) if kind.is_block_device() && !options.read_only => {
            // Linux opens some read-only devices for writing, and refuses others.
            DiskError::ReadOnlyDevice(path.clone())
        }
        _ => open_error(options, e),
    })?;
    if !options.read_only && kind.is_block_device() && sys::device_is_read_only(&file).unwrap_or(false) {
        return Err(DiskError::ReadOnlyDevice(path));
    }
    Ok(file)
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
