//! Locks on the image: QEMU's, so that nobody else writes to it, and our fence.
//!
//! What it is: open file description locks (fcntl(2), F_OFD_SETLK) on bytes
//! that hold no data of the guest's.
//!
//! ```text
//!   byte 100 + p   shared lock: somebody uses permission p
//!   byte 200 + p   shared lock: somebody forbids permission p to others
//!                  p: 0 consistent read, 1 write, 2 write unchanged, 3 resize
//!   byte 2^62 + n  the fence of the instance whose socket hashes to n
//! ```
//!
//! What it is not: protection from programs that ask for no lock.
//!
//! Invariant: the fence is taken on a freshly opened description, also with
//! `--lock=off`. A killed daemon's requests keep its description, hence its
//! fence, until the last one has ended in the kernel: whoever holds the fence
//! knows that no stale write can land and no stale read can fill guest memory.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::sys::{self, LockKind};

const USES: u64 = 100;
const FORBIDS: u64 = 200;
const READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;
const FENCE: u64 = 1 << 62;

/// Somebody else has the image.
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

/// Drops the fence, when nothing is in flight and nothing more will be.
pub fn pass_on(file: &File) {
    if let Err(e) = sys::ofd_lock(file, LockKind::None, FENCE, 1 << 32) {
        tracing::debug!("cannot drop the fence: {e}");
    }
}

/// Waits until no operation of an earlier daemon of this instance is running,
/// and takes its place.
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
    // It is about this kernel's operations: a daemon on another host, which a shared
    // file system's locks reach, has another byte.
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let byte = FENCE + u64::from(hash(&format!("{instance} {boot}")));
    let kind = if read_only { LockKind::Shared } else { LockKind::Exclusive };
    let started = Instant::now();
    let mut logged = started;
    let mut pause = Duration::from_micros(200);
    loop {
        let passed = match sys::ofd_lock(file, kind, byte, 1) {
            Ok(()) if read_only => sys::ofd_would_lock(file, LockKind::Exclusive, byte, 1),
            Ok(()) => Ok(true),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            Err(e) => Err(e),
        };
        match passed {
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
            sys::ofd_lock(file, LockKind::None, byte, 1)?;
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

/// FNV-1a: the same for the same socket on every start, which is all it is for.
fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193))
}
