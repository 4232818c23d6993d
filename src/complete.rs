//! The end of a request: what the driver is told.
//!
//! What it is: the one place that maps an outcome to a status byte.
//!
//! What it is not: it does not touch the used ring ([`crate::ring`] does) and
//! decides nothing about retries ([`crate::worker`] does).
//!
//! Invariant: only a request whose every byte was transferred is `Ok`.

/// The status byte of a block request (virtio 1.3, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR.
    IoErr = 1,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupp = 2,
}

impl Status {
    /// The status of an operation that the kernel refused with `errno`. A
    /// driver only knows these: an operation that the backing cannot do at all
    /// is UNSUPP, everything else is IOERR.
    #[must_use]
    pub fn of_errno(errno: i32) -> Self {
        match errno {
            libc::EOPNOTSUPP => Self::Unsupp,
            _ => Self::IoErr,
        }
    }

    /// The byte on the wire.
    #[must_use]
    pub fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::IoErr => 1,
            Self::Unsupp => 2,
        }
    }
}
