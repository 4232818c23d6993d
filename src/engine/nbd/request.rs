//! A request of a slot, as the server is asked for it.
//!
//! What it is not: it does not know the socket.
//!
//! Invariant: its buffers are touched only while it is in its slot.

use super::{Io, Kind, Outcome, Slot, Target};
use crate::memory::fault;
use crate::nbd::wire::{Command, Covered, REQUEST_BYTES};

/// Bytes of a large read.
const LARGE: u32 = 32 << 10;

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// There is none in this slot.
    Free,
    /// It waits for its turn on the socket, or for a connection.
    Queued,
    /// A SENDMSG that names its memory is under way.
    Sending,
    /// The server has it.
    Sent,
}

/// A request of a slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) io: Io,
    pub(super) phase: Phase,
    /// What it is in the protocol.
    pub(super) command: Command,
    /// Bytes that are asked for: at most what the server takes at once.
    pub(super) len: u32,
    pub(super) header: [u8; REQUEST_BYTES],
    /// Tells replies to it from those to an earlier one of the slot.
    pub(super) generation: u32,
    /// What has come of a read.
    pub(super) covered: Covered,
    /// An error chunk came.
    pub(super) error: Option<u32>,
    /// It was answered before its SENDMSG ended.
    pub(super) early: Option<Outcome>,
    /// Of a flush: what it makes durable.
    pub(super) changed: u64,
}

impl Request {
    pub(super) const FREE: Self = Self {
        io: Io {
            slot: Slot(0),
            kind: Kind::Sync,
            target: Target::Disk,
            own_thread: false,
            offset: 0,
            len: 0,
            iovecs: std::ptr::null(),
            iovec_count: 0,
        },
        phase: Phase::Free,
        command: Command::Flush,
        len: 0,
        header: [0; REQUEST_BYTES],
        generation: 0,
        covered: Covered::new(0),
        error: None,
        early: None,
        changed: 0,
    };

    /// It changes what the disk holds.
    pub(super) fn changes(&self) -> bool {
        !matches!(self.command, Command::Read | Command::Flush)
    }

    /// A read whose data should not be copied.
    pub(super) fn is_large_read(&self) -> bool {
        self.command == Command::Read && self.len >= LARGE
    }

    /// Memory of it was gone when it was touched: a copy went nowhere.
    pub(super) fn has_lost_memory(&self) -> bool {
        // SAFETY: the request is in its slot.
        fault::any_lost() && unsafe { self.iovecs() }.iter().any(|v| fault::is_lost_at(v.iov_base.addr()))
    }

    /// The buffers.
    ///
    /// # Safety
    /// The request is in its slot: the contract of [`Engine::queue`] holds.
    pub(super) unsafe fn iovecs(&self) -> &[libc::iovec] {
        if self.io.iovec_count == 0 {
            return &[];
        }
        // SAFETY: as many valid iovecs, which stay until the Done.
        unsafe { std::slice::from_raw_parts(self.io.iovecs, self.io.iovec_count as usize) }
    }
}

/// The cookie of a request: its slot, and which of the slot's.
pub(super) fn cookie(slot: u16, generation: u32) -> u64 {
    u64::from(generation) << 16 | u64::from(slot)
}
