//! Locks on the image: QEMU's, so that no other process writes to it, and our fence.
//!
//! What it is: open file description locks (fcntl(2), F_OFD_SETLK) on bytes
//! that hold no data of the guest's.
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
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::sys::{self, LockKind};

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

/// Another process has the image.
#[derive(Debug, Error)]
pub enum LockError {
    /// Another process writes to it.
    #[error(
        "another process is writing to this image (it holds QEMU's \"{0}\" lock). Stop that process (lslocks shows it), \
         or add --lock=off if you are sure that it does no harm"
    )]
    InUse(&'static str),
    /// Another process forbids what we need.
    #[error(
        "another process has this image open and does not share \"{0}\". Stop that process (lslocks shows it), use \
         --read-only, or add --lock=off if you are sure that it does no harm"
    )]
    Forbidden(&'static str),
    /// The fence is held by a daemon that lives.
    #[error("another vublkd serves this image on the same socket. Stop it, or choose another --socket-path")]
    Served,
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

/// Tells whether the locks could be taken, and takes none.
///
/// # Errors
/// [`LockError`].
pub fn test(file: &File, read_only: bool) -> Result<(), LockError> {
    let (uses, forbids) = permissions(read_only);
    let free = |byte| sys::ofd_would_lock(file, LockKind::Exclusive, byte, 1);
    for &p in uses {
        if !free(FORBIDS + p)? {
            return Err(LockError::Forbidden(name(p)));
        }
    }
    for &p in forbids {
        if !free(USES + p)? {
            return Err(LockError::InUse(name(p)));
        }
    }
    Ok(())
}

/// Takes the locks: first ours, then a look at the others', so that two who
/// start at once cannot both win.
///
/// # Errors
/// [`LockError`]; then none is held.
pub fn take(file: &File, read_only: bool) -> Result<(), LockError> {
    let (uses, forbids) = permissions(read_only);
    let bytes = uses.iter().map(|p| USES + p).chain(forbids.iter().map(|p| FORBIDS + p));
    for byte in bytes {
        if let Err(e) = sys::ofd_lock(file, LockKind::Shared, byte, 1) {
            release(file);
            return Err(e.into());
        }
    }
    test(file, read_only).inspect_err(|_| release(file))
}

/// Drops the image locks; the fence stays.
pub fn release(file: &File) {
    if let Err(e) = sys::ofd_lock(file, LockKind::None, USES, FORBIDS + 64 - USES) {
        tracing::warn!("cannot drop the image locks: {e}");
    }
}

/// Drops a description's fence, when nothing is in flight and nothing more will be.
pub fn pass_on(file: &File) {
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
/// # Errors
/// [`LockError::Served`] once `served` says that the other one lives.
pub fn fence(
    file: &File,
    instance: &str,
    read_only: bool,
    path: &Path,
    served: &dyn Fn() -> bool,
) -> Result<(), LockError> {
    let number = number(instance);
    let kind = kind(read_only);
    let started = Instant::now();
    let mut logged = started;
    let mut pause = Duration::from_micros(200);
    let (own, further) = (FENCE + number, FURTHER + number * DESCRIPTIONS);
    let pass = || -> io::Result<bool> {
        match sys::ofd_lock(file, kind, own, 1) {
            Ok(()) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => return Ok(false),
            Err(e) => return Err(e),
        }
        let alone = |start, len| sys::ofd_would_lock(file, LockKind::Exclusive, start, len);
        Ok(alone(own, 1)? && alone(further, DESCRIPTIONS)?)
    };
    loop {
        match pass() {
            Ok(true) => break,
            Ok(false) => {}
            Err(e) => {
                tracing::warn!(disk = %path.display(), "no start-up fence, the file system has no locks: {e}");
                return Ok(());
            }
        }
        if served() {
            return Err(LockError::Served);
        }
        if read_only {
            // Two that hold it would wait for each other.
            sys::ofd_lock(file, LockKind::None, own, 1)?;
        }
        if logged.elapsed() >= Duration::from_secs(2) {
            logged = Instant::now();
            tracing::warn!(
                disk = %path.display(),
                "waiting {} s for an earlier daemon's operations on this disk to end",
                started.elapsed().as_secs()
            );
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
