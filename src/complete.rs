//! The end of a request: what the driver is told.
//!
//! What it is: the status byte, and the length in the used ring that goes with it.
//!
//! What it is not: it does not touch the used ring ([`crate::ring`] does) and decides
//! nothing ([`crate::op`] does).
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

/// The length in the used ring: bytes that were written from the first writable one on
/// (virtio 1.3, 2.7.8.2), of `writable` ones, the last of which is the status byte. A driver
/// may take every byte up to it for ours, so it is 0 unless all of them were written.
/// `filled`: bytes of the payload that were.
#[inline]
#[must_use]
pub fn used_length(writable: u32, filled: u64) -> u32 {
    // Wrapping: no payload has u64::MAX bytes, and each request would pay for the check.
    if filled.wrapping_add(1) == u64::from(writable) { writable } else { 0 }
}
