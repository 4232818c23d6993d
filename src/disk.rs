//! The backing store: open it, tell it from others, guard it.
//!
//! What it is: a [`Disk`]: where its bytes are, a file or block device of this host ([`local`]), an export of an NBD
//! server ([`crate::nbd::remote`]) or an image of a Ceph cluster ([`crate::rbd::image`]), and how it wants to be spoken to
//! ([`Backing`]). Another kind of store is another [`Place`], another [`Way`] of the workers to it, and their engine.
//!
//! What it is not: no I/O of the guest goes through here (that is an engine's), and what
//! the guest is told of it is a [`crate::promise::Promise`].
//!
//! Invariant: nothing is fetched from a ring before a dead daemon's operations on the disk have ended: a file's locks
//! say so, the server's closing of its connections, or the cluster that refuses its client.

pub mod format;
pub mod holder;
pub mod local;
pub mod lock;
pub mod range_lock;
pub mod uri;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::local::Local;
use self::uri::Uri;
use crate::backing::{Backing, DeviceLimits, Discard};
use crate::engine::Files;
use crate::hash::fnv1a;
use crate::nbd::remote::{Remote, RemoteError};
use crate::rbd::held::Held;
use crate::rbd::image::{For, How, Image, NotLocked, RbdError};
use crate::rbd::standing::Standing;
use crate::sandbox::ConfineClient;

/// How a disk is to be opened: what the command line meant.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The file or block device; for a disk on another machine its URI, for messages.
    pub path: PathBuf,
    /// Where it is, on another machine.
    pub remote: Option<Uri>,
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
    /// Of a Ceph cluster: the clients of earlier daemons, which are dead.
    pub dead_clients: Vec<String>,
    /// Whose lock a guest relies on.
    pub held: Arc<Held>,
    /// How long requests wait for a lost server; `None`: as long as it takes.
    pub patience: Option<Duration>,
    /// What the thread of a cluster's client gives up.
    pub confine: Option<ConfineClient>,
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
    /// On another machine.
    #[error("{0}: {1}")]
    Remote(PathBuf, RemoteError),
    /// On a Ceph cluster.
    #[error("{0}: {1}")]
    Rbd(PathBuf, RbdError),
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
    /// The URI of an export; what a cluster calls an image.
    Remote(u64),
}

impl Identity {
    fn of(meta: &std::fs::Metadata) -> Self {
        if meta.file_type().is_block_device() {
            Self::Device(meta.rdev())
        } else {
            Self::File(meta.dev(), meta.ino())
        }
    }

    fn of_name(name: &str) -> Self {
        Self::Remote(fnv1a(name.as_bytes()))
    }
}

/// Where the bytes of a disk are.
#[derive(Debug)]
enum Place {
    Local(Local),
    Nbd(Arc<Remote>),
    Rbd(Arc<Image>),
}

/// How a worker gets there.
#[derive(Clone, Debug)]
pub enum Way {
    /// By descriptions of a file.
    Files(Arc<Files>),
    /// By its line to a server.
    Nbd(Arc<Remote>),
    /// By the client of a cluster that all workers share.
    Rbd(Arc<Image>),
}

/// An open disk, shared by all workers.
#[derive(Debug)]
pub struct Disk {
    place: Place,
    /// How it wants to be spoken to.
    pub backing: Backing,
    identity: Identity,
    path: PathBuf,
    /// What was in the page cache could not be written back when the disk was opened; or a server may have been started
    /// anew without what a dead daemon had written there.
    pub lost_writes: bool,
    /// Keeps read-modify-write cycles apart from every other change.
    pub ranges: range_lock::RangeLocks,
}

impl Disk {
    /// Opens the disk; one of this host, and its image locks are tested, and it passes the fence, which can take as long as
    /// a dead daemon's last operations do.
    ///
    /// # Errors
    /// Each of [`DiskError`].
    ///
    /// `served`: another daemon serves as this instance; then the wait at the
    /// fence would never end.
    pub fn open(options: &Options, served: &dyn Fn() -> bool) -> Result<Self, DiskError> {
        let path = options.path.clone();
        let (place, backing, identity, lost_writes) = match &options.remote {
            None => {
                let (local, backing, identity, lost_writes) = Local::open(options, served)?;
                (Place::Local(local), backing, identity, lost_writes)
            }
            Some(Uri::Nbd(uri)) => {
                let remote = Remote::open(uri, options.read_only);
                let remote = remote.map_err(|e| DiskError::Remote(path.clone(), e))?;
                let backing =
                    Backing::of_export(remote.export(), path.clone(), options.read_only, options.discard);
                (Place::Nbd(Arc::new(remote)), backing, Identity::of_name(&uri.to_string()), false)
            }
            Some(Uri::Rbd(uri)) => {
                let how = How {
                    read_only: options.read_only,
                    incoming: options.incoming,
                    dead: options.dead_clients.clone(),
                    held: Arc::clone(&options.held),
                    patience: options.patience,
                    confine: options.confine.unwrap_or(|_| {}),
                };
                let image = Image::open(uri, how).map_err(|e| DiskError::Rbd(path.clone(), e))?;
                let backing = Backing::of_image(path.clone(), options.read_only, options.discard);
                let identity = Identity::of_name(&image.facts.identity);
                (Place::Rbd(Arc::new(image)), backing, identity, false)
            }
        };
        Ok(Self { place, backing, identity, path, lost_writes, ranges: range_lock::RangeLocks::default() })
    }

    /// Refuses a disk that is an image of another format. Not for one that a daemon has served
    /// already: its guest may have written that header.
    ///
    /// # Errors
    /// [`DiskError::Format`].
    pub fn check_format(&self, options: &Options) -> Result<(), DiskError> {
        let Some(file) = self.file().filter(|_| !options.format_raw && !options.incoming) else {
            return Ok(());
        };
        format::of(file).map_or(Ok(()), |name| {
            let word = name.split(' ').next().unwrap_or(name);
            Err(DiskError::Format(self.path.clone(), name, word))
        })
    }

    /// How many workers may have a way of their own, of so many.
    #[must_use]
    pub fn most_workers(&self, workers: u16) -> u16 {
        match &self.place {
            Place::Local(_) | Place::Rbd(_) => workers,
            Place::Nbd(remote) => remote.lines_of(workers),
        }
    }

    /// The way of each of so many workers.
    ///
    /// # Errors
    /// [`DiskError::Again`], [`DiskError::Remote`].
    pub fn ways(&self, workers: u16) -> Result<Vec<Way>, DiskError> {
        match &self.place {
            Place::Local(local) => {
                let files = (0..workers).map(|n| local.files(n).map(Arc::new).map(Way::Files));
                files.collect::<Result<_, _>>().map_err(|e| DiskError::Again(self.path.clone(), e))
            }
            Place::Nbd(remote) => {
                remote.connect_lines(workers).map_err(|e| DiskError::Remote(self.path.clone(), e))?;
                Ok((0..workers).map(|_| Way::Nbd(Arc::clone(remote))).collect())
            }
            Place::Rbd(image) => Ok((0..workers).map(|_| Way::Rbd(Arc::clone(image))).collect()),
        }
    }

    /// Bytes of the backing as it is now; what a partial last block is follows from it.
    ///
    /// # Errors
    /// As fstat(2) or ioctl(2).
    pub fn measure(&self) -> io::Result<u64> {
        let bytes = match &self.place {
            Place::Local(local) => local.measure()?,
            Place::Nbd(remote) => remote.size(),
            Place::Rbd(image) => image.measure()?,
        };
        self.backing.resized(bytes);
        Ok(bytes)
    }

    /// Makes a file or an image of a cluster longer; what is new reads as zeroes. One that is longer already stays
    /// as it is.
    ///
    /// # Errors
    /// As ftruncate(2); EOPNOTSUPP for an export, which is made longer at its server.
    pub fn grow(&self, bytes: u64) -> io::Result<()> {
        match &self.place {
            _ if bytes <= self.measure()? => Ok(()),
            Place::Local(local) => local.file.set_len(bytes),
            Place::Nbd(_) => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
            Place::Rbd(image) => image.grow(bytes),
        }
    }

    /// Whether no other process has the image.
    ///
    /// # Errors
    /// [`lock::LockError`].
    pub fn test_image_lock(&self) -> Result<(), lock::LockError> {
        self.local().map_or(Ok(()), Local::test_image_lock)
    }

    /// The control thread's description; `None`: the disk is on another machine.
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        self.local().map(|local| &*local.file)
    }

    fn local(&self) -> Option<&Local> {
        match &self.place {
            Place::Local(local) => Some(local),
            Place::Nbd(_) | Place::Rbd(_) => None,
        }
    }

    /// The export that it is, of an NBD server.
    #[must_use]
    pub fn remote(&self) -> Option<&Arc<Remote>> {
        match &self.place {
            Place::Nbd(remote) => Some(remote),
            Place::Local(_) | Place::Rbd(_) => None,
        }
    }

    /// The image that it is, of a Ceph cluster.
    #[must_use]
    pub fn image(&self) -> Option<&Arc<Image>> {
        match &self.place {
            Place::Rbd(image) => Some(image),
            Place::Local(_) | Place::Nbd(_) => None,
        }
    }

    /// What a block device says of itself, or a cluster of its image; `None` for anything else.
    #[must_use]
    pub fn device_limits(&self) -> Option<DeviceLimits> {
        match &self.place {
            Place::Local(local) => DeviceLimits::of(&local.file),
            Place::Nbd(_) => None,
            Place::Rbd(image) => Some(DeviceLimits::of_image(image.facts.object_size)),
        }
    }

    /// Which disk it is.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// True if a process that opens its path now gets this disk.
    #[must_use]
    pub fn is_at_its_path(&self) -> bool {
        let is_same = |meta: std::fs::Metadata| Identity::of(&meta) == self.identity;
        self.local().is_none() || std::fs::metadata(&self.path).is_ok_and(is_same)
    }

    /// For messages: the path, or the URI.
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
        match &self.place {
            Place::Local(local) => local.take_image_lock(wait),
            Place::Nbd(_) => Ok(()),
            Place::Rbd(image) => {
                let say = |client: &str| {
                    tracing::info!(
                        disk = %self.path.display(),
                        "waiting up to {} s for the client {client} to give the image up",
                        lock::PATIENCE.as_secs()
                    );
                };
                image.lock(wait, &say).map_err(|why| match why {
                    NotLocked::Owned(client) => lock::LockError::Client(client),
                    NotLocked::Refused => lock::LockError::Refused,
                    NotLocked::Cluster(e) => lock::LockError::Cluster(e),
                })
            }
        }
    }

    /// Has a thread of its own claim a block device from now on, for the sandbox lets no other thread open
    /// anything; `confine` is what it does first.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn start_claimer(&self, confine: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.local().map_or(Ok(()), |local| local.start_claimer(confine))
    }

    /// Drops them, when the front-end has left or its guest migrates, so that another daemon on
    /// this or another host can have the disk.
    pub fn drop_image_lock(&self) {
        match &self.place {
            Place::Local(local) => local.drop_image_lock(),
            Place::Nbd(_) => {}
            Place::Rbd(image) => image.unlock(For::Any),
        }
    }

    /// Lets a successor have the image and pass the fence at once, nothing being in flight any
    /// more. An io_uring that is gone keeps the file open for some tens of milliseconds.
    pub fn release_for_successor<'a>(&'a self, workers: impl Iterator<Item = &'a File>) {
        match &self.place {
            Place::Local(local) => local.release_for_successor(workers),
            Place::Nbd(_) => {}
            Place::Rbd(image) => image.unlock(For::Successor),
        }
    }

    /// Leaves its cluster, if it has one, when nothing is done with it any more. False: a later daemon has to know this client.
    #[must_use]
    pub fn leave(&self) -> bool {
        self.image().is_none_or(|image| image.close())
    }

    /// Why the guest must not go on at the target of a migration, as far as the disk knows.
    #[must_use]
    pub fn forbids_migration(&self) -> Option<&'static str> {
        match &self.place {
            Place::Local(_) => None,
            Place::Nbd(remote) => remote
                .may_yet_change()
                .then_some("the server may yet carry out writes that ended with I/O errors"),
            Place::Rbd(image) => match image.standing() {
                Standing::Lost => Some("another client may have written to the image"),
                Standing::Looking | Standing::Successor => {
                    Some("the cluster refuses this client, and another one may have the image")
                }
                Standing::Good => image.may_yet_change().then_some(
                    "the cluster may yet carry out writes that ended with I/O errors. Type vublk upgrade, which has it \
                     refuse them, and migrate then",
                ),
            },
        }
    }

    /// Makes durable what was answered, waiting: fdatasync on a description that no worker uses, or a flush.
    ///
    /// # Errors
    /// As fdatasync(2); [`crate::durability::Durability`] has to know.
    pub fn sync(&self) -> io::Result<()> {
        match &self.place {
            Place::Local(local) => local.file.sync_data(),
            Place::Nbd(remote) => remote.flush(),
            Place::Rbd(image) => image.flush(),
        }
    }
}
