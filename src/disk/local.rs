//! A disk of this host: the open file or block device, its locks and the fence.
//!
//! What it is: a [`Local`], and how it is opened.
//!
//! What it is not: it knows nothing of disks on other machines ([`crate::nbd::remote`]).
//!
//! Invariants: nothing is fetched from a ring before [`Local::open`] has passed
//! the start-up fence: a killed daemon's operations are still running in the
//! kernel, and the locks they hold are let go only when the last has ended. The
//! descriptors are never handed to another process.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::{DiskError, Identity, Options, lock};
use crate::backing::Backing;
use crate::engine::Files;
use crate::sys;

/// See the head of the file.
#[derive(Debug)]
pub struct Local {
    /// Holds the image locks and the fence; the control thread's.
    pub(super) file: Arc<File>,
    /// The same through the page cache, for the last, partial block of a file.
    cached: Option<Arc<File>>,
    instance: String,
    image_lock: bool,
    read_only: bool,
    is_device: bool,
    /// Held with the image lock, where the guest writes to a block device.
    claim: Mutex<Option<File>>,
    /// Who opens it for that, in a sandbox.
    claimer: OnceLock<Mutex<lock::Claimer>>,
    direct: bool,
}

/// A disk that was opened: how it wants to be spoken to, which it is, and whether what was in the page cache could not be
/// written back.
pub(super) type Opened = (Local, Backing, Identity, bool);

impl Local {
    /// Opens the disk, tests the image locks, and passes the fence, which can
    /// take as long as a dead daemon's last operations do.
    ///
    /// # Errors
    /// Each of [`DiskError`].
    ///
    /// `served`: another daemon serves as this instance; then the wait at the
    /// fence would never end.
    pub(super) fn open(options: &Options, served: &dyn Fn() -> bool) -> Result<Opened, DiskError> {
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
        let mut local = Self {
            cached: None,
            instance: options.instance.clone(),
            image_lock: options.lock,
            read_only: options.read_only,
            is_device: backing.is_device,
            claim: Mutex::new(None),
            claimer: OnceLock::new(),
            direct: options.direct,
            file: Arc::new(file),
        };
        if options.direct && !backing.is_device && backing.block > 1 {
            let cached = local.reopen(0, false).map_err(|e| DiskError::Again(path, e))?;
            local.cached = Some(Arc::new(cached));
        }
        Ok((local, backing, Identity::of(&meta), lost_writes))
    }

    /// Opens the very same file once more, with a fence of its own: another open file
    /// description, to which Linux reports an error of its own if a write is lost.
    fn reopen(&self, number: u64, direct: bool) -> io::Result<File> {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(!self.read_only)
            .custom_flags(if direct { libc::O_DIRECT } else { 0 })
            .open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
        lock::fence_too(&file, &self.instance, self.read_only, number);
        Ok(file)
    }

    /// The descriptions that worker `number` submits to.
    ///
    /// # Errors
    /// As open(2); without /proc, for one.
    pub(super) fn files(&self, number: u16) -> io::Result<Files> {
        let disk = self.reopen(u64::from(number) + 1, self.direct)?;
        Ok(Files { disk, cached: self.cached.clone(), witness: Arc::clone(&self.file) })
    }

    /// Bytes as they are now.
    ///
    /// # Errors
    /// As fstat(2) or ioctl(2).
    pub(super) fn measure(&self) -> io::Result<u64> {
        if self.is_device { sys::device_size(&self.file) } else { Ok(self.file.metadata()?.len()) }
    }

    /// Whether no other process has the image.
    ///
    /// # Errors
    /// [`lock::LockError`].
    pub(super) fn test_image_lock(&self) -> Result<(), lock::LockError> {
        if self.image_lock { lock::test(&self.file, self.read_only) } else { Ok(()) }
    }

    /// Takes the image locks, when the first ring starts, and claims a block device. `wait` is
    /// called again and again while another process is in the way; false ends it.
    ///
    /// # Errors
    /// [`lock::LockError`]; then nothing is held.
    pub(super) fn take_image_lock(&self, wait: &mut dyn FnMut() -> bool) -> Result<(), lock::LockError> {
        if self.image_lock {
            lock::take(&self.file, self.read_only, wait)?;
            if !self.read_only {
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
    pub(super) fn start_claimer(&self, confine: impl FnOnce() + Send + 'static) -> io::Result<()> {
        if self.image_lock && self.is_device && !self.read_only {
            let claimer = lock::Claimer::start(Arc::clone(&self.file), confine)?;
            let _once = self.claimer.set(Mutex::new(claimer));
        }
        Ok(())
    }

    /// Drops them, when the front-end has left or its guest migrates, so that another daemon on
    /// this or another host can have the disk.
    pub(super) fn drop_image_lock(&self) {
        if self.image_lock {
            *self.claim.lock().unwrap_or_else(PoisonError::into_inner) = None;
            lock::release(&self.file);
        }
    }

    /// Lets a successor have the image and pass the fence at once, nothing being in flight any
    /// more. An io_uring that is gone keeps the file open for some tens of milliseconds.
    pub(super) fn release_for_successor<'a>(&'a self, workers: impl Iterator<Item = &'a File>) {
        self.drop_image_lock();
        let ours = [Some(&*self.file), self.cached.as_deref()];
        ours.into_iter().flatten().chain(workers).for_each(lock::release_for_successor);
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
