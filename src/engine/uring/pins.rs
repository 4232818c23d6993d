//! Guest memory registered with io_uring, for `--pin-memory`.
//!
//! What it is: a ring of the control thread's that does no I/O. It registers
//! the guest's memory once; each worker's ring clones the table, which shares
//! the pinned pages.
//!
//! What it is not: for guests that give memory back. A registered page stays
//! the one it was: after a balloon, free-page reporting or virtio-mem took it
//! from under the guest, the disk goes on with the old page.
//!
//! Invariant: the ring has no SINGLE_ISSUER, so that other threads may clone
//! from it; a request in flight keeps the registration it was started with.
#![expect(unsafe_code, reason = "registers addresses with the kernel")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::IoUring;
use io_uring::register::Restriction;

use crate::memory::{GuestMemory, HostSpan};

/// IORING_UNREGISTER_BUFFERS: all that a ring which is enabled against our will could be asked for.
const UNREGISTER_BUFFERS: u8 = 1;
/// Bytes of one registered buffer at most: the kernel's limit.
const MAX_BUFFER: usize = 1 << 30;

/// See the head of the file.
pub struct Pins {
    ring: IoUring,
    buffers: Vec<HostSpan>,
}

impl std::fmt::Debug for Pins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pins").field("buffers", &self.buffers.len()).finish_non_exhaustive()
    }
}

impl Pins {
    /// Pins all of `memory`, which has to be memfd, tmpfs or hugetlbfs.
    ///
    /// # Errors
    /// As IORING_REGISTER_BUFFERS: ENOMEM beyond RLIMIT_MEMLOCK, EOPNOTSUPP for
    /// files of a disk.
    pub fn new(memory: &GuestMemory) -> io::Result<Self> {
        let mut buffers = Vec::new();
        for region in memory.host_spans() {
            let mut at = 0;
            while at < region.len() {
                let part = region.slice(at, MAX_BUFFER);
                at += part.len();
                buffers.push(part);
            }
        }
        buffers.sort_by_key(|b| b.addr());
        let iovecs: Vec<_> = buffers.iter().map(|&b| crate::pages::iovec(b)).collect();
        // Never enabled: the sandbox must find no ring that does I/O of any kind.
        let ring = IoUring::builder().setup_r_disabled().build(1)?;
        ring.submitter().register_restrictions(&mut [Restriction::register_op(UNREGISTER_BUFFERS)])?;
        if !iovecs.is_empty() {
            // SAFETY: the kernel pins the pages; the workers, who pass these
            // addresses, keep the memory table that maps them.
            unsafe { ring.submitter().register_buffers(&iovecs) }?;
        }
        Ok(Self { ring, buffers })
    }

    /// The ring to clone from.
    pub(super) fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// What is registered, in the order of the table.
    #[must_use]
    pub fn buffers(&self) -> &[HostSpan] {
        &self.buffers
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        // Closing a ring lets go of its buffers some time later; this, now.
        if let Err(e) = self.ring.submitter().unregister_buffers() {
            tracing::debug!("cannot unregister buffers: {e}");
        }
    }
}
