//! Locks on the image: QEMU's, so that no other process writes to it, a block device's
//! exclusive claim, and our fence.
//!
//! What it is: open file description locks (fcntl(2), F_OFD_SETLK) on bytes
//! that hold no data of the guest's, and open(2) with O_EXCL.
//!
//! ```text
//!   byte 100 + p   shared lock: a process uses permission p
//!   byte 200 + p   shared lock: a process forbids permission p to others
//!                  p: 0 consistent read, 1 write, 2 write unchanged, 3 resize
//!   byte 2^62 + n  the fence of the instance whose socket hashes to n
//!   512 bytes from 2^62 + 2^40 + 512 n on: one for each further description that it has
//! ```
//!
//! What it is not: protection from programs that ask for no lock.
//!
//! Invariant: the fence is taken on a freshly opened description, also with
//! `--lock=off`. A killed daemon's requests keep its description, hence its
//! fence, until the last one has ended in the kernel: a daemon that holds the fence
//! knows that no stale write can land and no stale read can fill guest memory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::holder::{Holders, loops_over, own_name, who_claimed};
use crate::sys::{self, Conflict, LockKind};

/// How long a lock of another process is waited for.
pub const PATIENCE: Duration = Duration::from_secs(10);

const USES: u64 = 100;
const FORBIDS: u64 = 200;
const READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;
const FENCE: u64 = 1 << 62;
/// Where the further descriptions of all instances have their bytes, and how many of them an
/// instance may have: one for each of 256 workers, and one for the page cache.
const FURTHER: u64 = FENCE + (1 << 40);
const DESCRIPTIONS: u64 = 512;
/// [`Conflict::pid`] of a lock like ours.
const OFD: i32 = -1;

/// Another process has the image.
#[derive(Debug, Error)]
pub enum LockError {
    /// Another process writes to it.
    #[error(
        "{1} is writing to this image (it holds QEMU's \"{0}\" lock). Stop that process; for a VM that comes from there \
         by live migration add --incoming; or add --lock=off if you are sure that it does no harm"
    )]
    InUse(&'static str, Holders),
    /// Another process forbids what we need.
    #[error(
        "{1} has this image open and does not share \"{0}\". Stop that process, or use --read-only; for a VM that \
         comes from there by live migration add --incoming; or add --lock=off if you are sure that it does no harm"
    )]
    Forbidden(&'static str, Holders),
    /// Neither QEMU nor a vublkd locks like this.
    #[error(
        "{0} has locked a part of this image (lockf or fcntl) where vublkd and QEMU have their own locks. Stop that \
         process, or have it drop its lock"
    )]
    Foreign(Holders),
    /// A block device that is mounted, say.
    #[error("{0} is in use: {1}. Use --read-only, or add --lock=off if you are sure that it does no harm")]
    Claimed(String, String),
    /// The fence is held by a daemon that lives.
    #[error("another vublkd serves this image on the same socket. Stop it, or choose another --socket-path")]
    Served,
    /// Another client of the cluster.
    #[error("the client {0} of the cluster has this image and keeps it. Stop it")]
    Client(String),
    /// The cluster has this client on its blocklist.
    #[error(
        "the cluster refuses this vublkd (its blocklist), for another client has taken the image since. Stop and start vublkd \
         once no other has it"
    )]
    Refused,
    /// The cluster.
    #[error("cannot take the image's exclusive lock: {0}")]
    Cluster(io::Error),
    /// No locks here.
    #[error("cannot lock the image: {0}. If its file system has no locks, add --lock=off")]
    Io(#[from] io::Error),
}

/// (permissions we use, permissions we forbid to others).
fn permissions(read_only: bool) -> (&'static [u64], &'static [u64]) {
    if read_only { (&[READ], &[WRITE, RESIZE]) } else { (&[READ, WRITE, RESIZE], &[WRITE, RESIZE]) }
}

fn name(permission: u64) -> &'static str {
    match permission {
        WRITE => "write",
        RESIZE => "resize",
        _ => "consistent read",
    }
}

fn is_held(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// A lock that is in the way of the image locks, and the byte where it is.
fn in_the_way(file: &File, read_only: bool) -> io::Result<Option<(u64, Conflict)>> {
    let (uses, forbids) = permissions(read_only);
    let bytes = |base, of: &'static [u64], kind| of.iter().map(move |p| (base + p, kind));
    // First those that use what we forbid: --read-only helps against others only.
    let others = bytes(USES, forbids, LockKind::Exclusive).chain(bytes(FORBIDS, uses, LockKind::Exclusive));
    // Ours: only what locks in another way than QEMU and vublkd can be in their way.
    let ours = bytes(USES, uses, LockKind::Shared).chain(bytes(FORBIDS, forbids, LockKind::Shared));
    for (byte, kind) in others.chain(ours) {
        if let Some(lock) = sys::ofd_conflict(file, kind, byte, 1)? {
            return Ok(Some((byte, lock)));
        }
    }
    Ok(None)
}

/// What to say of a lock that is in the way at this byte.
fn refusal(file: &File, byte: u64, lock: &Conflict) -> LockError {
    let holders = Holders::of(file, lock);
    // QEMU's are shared OFD locks of one byte each; the kernel joins neighbours.
    let qemus = lock.pid == OFD && lock.kind == LockKind::Shared && (1..=4).contains(&lock.len);
    match byte {
        _ if !qemus => LockError::Foreign(holders),
        FORBIDS.. => LockError::Forbidden(name(byte - FORBIDS), holders),
        _ => LockError::InUse(name(byte - USES), holders),
    }
}

/// Tells whether the locks could be taken, and takes none.
///
/// # Errors
/// [`LockError`].
pub fn test(file: &File, read_only: bool) -> Result<(), LockError> {
    in_the_way(file, read_only)?.map_or(Ok(()), |(byte, lock)| Err(refusal(file, byte, &lock)))
}

/// Takes the locks: first ours, then a look at the others', so that two processes that
/// start at once cannot both win. `wait`: called while another process is in the way; false
/// ends it.
///
/// # Errors
/// [`LockError`]; then none is held.
pub fn take(file: &File, read_only: bool, wait: &mut dyn FnMut() -> bool) -> Result<(), LockError> {
    let (uses, forbids) = permissions(read_only);
    loop {
        let mut bytes = uses.iter().map(|p| USES + p).chain(forbids.iter().map(|p| FORBIDS + p));
        let taken = bytes.try_for_each(|byte| sys::ofd_lock(file, LockKind::Shared, byte, 1));
        let obstacle = in_the_way(file, read_only).inspect_err(|_| release(file))?;
        if taken.is_ok() && obstacle.is_none() {
            return Ok(());
        }
        release(file);
        match (taken, obstacle) {
            (Err(e), _) if !is_held(&e) => return Err(e.into()),
            _ if wait() => {}
            (_, Some((byte, lock))) => return Err(refusal(file, byte, &lock)),
            (taken, None) => return Ok(taken?), // dropped in this moment
        }
    }
}

/// Claims a block device, as mount(8) does: until the returned description is closed no
/// process can mount it or claim it, by whichever of its device nodes. A file cannot be claimed:
/// a loop device over it must be free (which a process that may open nothing cannot tell). `wait`: as for [`take`].
///
/// # Errors
/// [`LockError`].
pub fn claim(
    file: &File,
    claimer: Option<&Mutex<Claimer>>,
    wait: &mut dyn FnMut() -> bool,
) -> Result<Option<File>, LockError> {
    if file.metadata()?.file_type().is_block_device() {
        let open = || match claimer {
            None => open_exclusively(file),
            Some(claimer) => claimer.lock().unwrap_or_else(PoisonError::into_inner).open(),
        };
        return claim_device(file, "this block device".into(), open, wait).map(Some);
    }
    for path in loops_over(file) {
        // A user that may not open it has not mounted it either.
        if let Ok(device) = File::open(&path) {
            let what = format!("{}, a block device over this image,", path.display());
            claim_device(&device, what, || open_exclusively(&device), wait)?;
        }
    }
    Ok(None)
}

/// For reading: udev looks a device through whenever a description for writing is closed.
fn open_exclusively(device: &File) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_EXCL | libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", device.as_raw_fd()))
}

/// A thread that claims a device for those that may open nothing. It opens that device, and does nothing else.
#[derive(Debug)]
pub struct Claimer {
    ask: SyncSender<()>,
    opened: Receiver<io::Result<File>>,
}

impl Claimer {
    /// Starts it; `confine` is what it does first.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn start(device: Arc<File>, confine: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let ((ask, asked), (sender, opened)) = (sync_channel(1), sync_channel(1));
        let serve = move || {
            confine();
            while asked.recv().is_ok() && sender.send(open_exclusively(&device)).is_ok() {}
        };
        std::thread::Builder::new().name("vublk-claim".into()).stack_size(64 << 10).spawn(serve)?;
        Ok(Self { ask, opened })
    }

    fn open(&self) -> io::Result<File> {
        let gone = |_| io::Error::other("the thread that claims devices has ended");
        self.ask.send(()).map_err(|_| gone(mpsc::RecvError))?;
        self.opened.recv().map_err(gone)?
    }
}

fn claim_device(
    device: &File,
    what: String,
    open: impl Fn() -> io::Result<File>,
    wait: &mut dyn FnMut() -> bool,
) -> Result<File, LockError> {
    loop {
        match open() {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                if !wait() {
                    return Err(LockError::Claimed(what, who_claimed(device)));
                }
            }
            claimed => return Ok(claimed?),
        }
    }
}

/// Drops the image locks; the fence stays.
pub fn release(file: &File) {
    if let Err(e) = sys::ofd_lock(file, LockKind::None, USES, FORBIDS + 64 - USES) {
        tracing::warn!("cannot drop the image locks: {e}");
    }
}

/// Drops a description's fence, when nothing is in flight and nothing more will be.
pub fn release_for_successor(file: &File) {
    if let Err(e) = sys::ofd_lock(file, LockKind::None, FENCE, FENCE - 1) {
        tracing::debug!("cannot drop the fence: {e}");
    }
}

/// Waits until no operation of an earlier daemon of this instance is running, on any of its
/// descriptions, and takes its place.
///
/// A read-only description cannot hold an exclusive lock, so there a shared one
/// is taken and then every other one is waited for. File systems without locks
/// get a warning: there is nothing else to hold on to.
///
/// An earlier daemon's operations are waited for without a limit; a lock of any other
/// process, which may never go, for [`PATIENCE`].
///
/// # Errors
/// [`LockError::Served`] once `served` says that the other one lives; [`LockError::Foreign`].
pub fn fence(
    file: &File,
    instance: &str,
    read_only: bool,
    path: &Path,
    served: &dyn Fn() -> bool,
) -> Result<(), LockError> {
    let number = number(instance);
    let started = Instant::now();
    let mut logged = started;
    let mut pause = Duration::from_micros(200);
    let (own, further) = (FENCE + number, FURTHER + number * DESCRIPTIONS);
    let look = || -> io::Result<(bool, Option<Conflict>)> {
        let taken = match sys::ofd_lock(file, kind(read_only), own, 1) {
            Err(e) if !is_held(&e) => return Err(e),
            taken => taken.is_ok(),
        };
        let there = |start, len| sys::ofd_conflict(file, LockKind::Exclusive, start, len);
        Ok((taken, there(own, 1)?.map_or_else(|| there(further, DESCRIPTIONS), |lock| Ok(Some(lock)))?))
    };
    // An earlier daemon locks one byte, exclusively if it writes.
    let is_like_ours = |lock: &Conflict| {
        let place = lock.start == own || (further..further + DESCRIPTIONS).contains(&lock.start);
        lock.pid == OFD && lock.len == 1 && place && (read_only || lock.kind == LockKind::Exclusive)
    };
    let mut is_a_strangers = false;
    let mut foreign_since = None;
    loop {
        let lock = match look() {
            Ok((true, None)) => break,
            Ok((_, lock)) => lock,
            Err(e) => {
                tracing::warn!(disk = %path.display(), "no start-up fence, the file system has no locks: {e}");
                return Ok(());
            }
        };
        if served() {
            return Err(LockError::Served);
        }
        if read_only {
            // Two that hold it would wait for each other.
            sys::ofd_lock(file, LockKind::None, own, 1)?;
        }
        let mut foreign = lock.filter(|lock| is_a_strangers || !is_like_ours(lock));
        if let Some(lock) = lock
            && logged.elapsed() >= Duration::from_secs(2)
        {
            logged = Instant::now();
            let waited = started.elapsed().as_secs();
            let holders = Holders::of(file, &lock);
            is_a_strangers = holders.are_all_but(&own_name());
            foreign = Some(lock).filter(|lock| is_a_strangers || !is_like_ours(lock));
            if foreign.is_some() {
                let error = LockError::Foreign(holders);
                tracing::warn!(disk = %path.display(), "waiting {waited} s for a lock to be dropped: {error}");
            } else {
                tracing::warn!(
                    disk = %path.display(),
                    "waiting {waited} s for an earlier daemon's operations on this disk to end{}",
                    holders.in_brackets()
                );
            }
        }
        foreign_since = foreign.map(|_| foreign_since.unwrap_or_else(Instant::now));
        if let Some(lock) = foreign.filter(|_| foreign_since.is_some_and(|at| at.elapsed() >= PATIENCE)) {
            return Err(LockError::Foreign(Holders::of(file, &lock)));
        }
        // Asked again and again rather than waited for with F_OFD_SETLKW, so
        // that the wait can be logged and a signal ends the process as usual.
        std::thread::sleep(pause);
        // Not in step with another that waits here.
        pause = (pause * 2).min(Duration::from_micros(4000 + u64::from(std::process::id() % 1000)));
    }
    if started.elapsed() > Duration::from_millis(100) {
        tracing::info!(disk = %path.display(), "fence passed after {} ms", started.elapsed().as_millis());
    }
    Ok(())
}

/// A further description of a daemon that has passed the fence: operations on it hold the
/// next daemon up, too. `number`: less than [`DESCRIPTIONS`], one for each.
pub fn fence_too(file: &File, instance: &str, read_only: bool, number: u64) {
    let byte = FURTHER + self::number(instance) * DESCRIPTIONS + number % DESCRIPTIONS;
    // Where there are no locks, `fence` has said so.
    let _no_locks_here = sys::ofd_lock(file, kind(read_only), byte, 1);
}

fn kind(read_only: bool) -> LockKind {
    if read_only { LockKind::Shared } else { LockKind::Exclusive }
}

/// An instance's number: its socket's name and this boot. It is about this kernel's
/// operations: a daemon on another host, which a shared file system's locks reach, has another.
fn number(instance: &str) -> u64 {
    static BOOT: OnceLock<String> = OnceLock::new();
    let read = || std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let boot = BOOT.get_or_init(read);
    hash(&format!("{instance} {boot}")).into()
}

/// FNV-1a: the same for the same socket on every start, which is all it is for.
fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193))
}
