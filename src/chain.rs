//! Follows a descriptor chain and sorts it into what the device reads and what
//! it writes (virtio 1.3, 2.7.4 and 2.7.5).
//!
//! What it is: a bounded walk over hostile input. Each descriptor is read once.
//!
//! What it is not: it knows no block requests, and translates no buffer
//! address; only an indirect table is read from guest memory.
//!
//! Invariant: at most [`MAX_DESCRIPTORS`] descriptors are looked at, whatever
//! the guest wrote; all readable segments stand before all writable ones.
//!
//! ```text
//!   head ─► d4 ─next─► d9 ─next─► d1          direct: through the ring's table
//!           R 16       W 4096     W 1
//!   head ─► d2 (INDIRECT) ─► [R 16][W 4096][W 1]   indirect: a table elsewhere
//! ```

use arrayvec::ArrayVec;
use thiserror::Error;
use virtio_queue::desc::split::Descriptor;

use crate::memory::{GuestMemory, RegionHint};
use crate::ring::split::Chain;

/// Descriptors that one chain may have, twice what a driver needs that keeps to
/// the offered `seg_max`: firmware splits headers as it likes.
pub const MAX_DESCRIPTORS: usize = 256;

const DESCRIPTOR_BYTES: usize = size_of::<Descriptor>();

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Why a chain cannot be followed. The head is returned with length 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    /// More than [`MAX_DESCRIPTORS`], or more than the ring has: a loop.
    #[error("the chain is a loop or longer than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    /// `next` names a descriptor outside of its table.
    #[error("descriptor {0} is outside of the table")]
    NextRange(u16),
    /// An indirect descriptor inside an indirect table.
    #[error("an indirect table inside an indirect table")]
    NestedIndirect,
    /// An indirect descriptor without VIRTIO_F_INDIRECT_DESC.
    #[error("an indirect descriptor that was not negotiated")]
    NotNegotiated,
    /// A descriptor with INDIRECT and NEXT.
    #[error("an indirect descriptor with flags {0:#x}")]
    IndirectFlags(u16),
    /// An indirect table whose size is 0, no multiple of 16 or too large.
    #[error("an indirect table of {0} bytes")]
    TableSize(u32),
    /// An indirect table outside of guest memory, where the chain is.
    #[error("an indirect table outside of guest memory, at {0:#x}")]
    TableAddress(u64),
    /// A readable descriptor after a writable one (virtio 2.7.4.2).
    #[error("a readable descriptor after a writable one")]
    Order,
    /// More than 2^32 bytes in all (virtio 2.7.5).
    #[error("more than 4 GiB in one chain")]
    TooLarge,
}

/// Guest bytes as a descriptor names them. Not translated, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
}

/// A chain that was followed to its end. Reused from chain to chain.
#[derive(Debug, Default)]
pub struct Segments {
    all: ArrayVec<Segment, MAX_DESCRIPTORS>,
    readable: usize,
    readable_bytes: u64,
    writable_bytes: u64,
}

impl Segments {
    /// What the device may read, in order.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        self.all.get(..self.readable).unwrap_or_default()
    }

    /// What the device may write, in order.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        self.all.get(self.readable..).unwrap_or_default()
    }

    /// Bytes of [`Segments::readable`].
    #[must_use]
    pub fn readable_bytes(&self) -> u64 {
        self.readable_bytes
    }

    /// Bytes of [`Segments::writable`].
    #[must_use]
    pub fn writable_bytes(&self) -> u64 {
        self.writable_bytes
    }

    fn clear(&mut self) {
        self.all.clear();
        self.readable = 0;
        self.readable_bytes = 0;
        self.writable_bytes = 0;
    }

    #[inline]
    fn add(&mut self, descriptor: Descriptor) -> Result<(), Malformed> {
        let segment = Segment { addr: descriptor.addr().0, len: descriptor.len() };
        let writable = descriptor.flags() & WRITE != 0;
        if !writable && self.readable < self.all.len() {
            return Err(Malformed::Order);
        }
        if segment.len == 0 {
            return Ok(()); // harmless, and some firmware makes them
        }
        self.all.try_push(segment).map_err(|_| Malformed::TooLong)?;
        if writable {
            self.writable_bytes += u64::from(segment.len);
        } else {
            self.readable_bytes += u64::from(segment.len);
            self.readable = self.all.len();
        }
        Ok(())
    }

    /// The last descriptor was added.
    #[inline]
    fn end(&self) -> Result<(), Malformed> {
        if self.readable_bytes + self.writable_bytes > u64::from(u32::MAX) {
            return Err(Malformed::TooLarge);
        }
        Ok(())
    }
}

/// Follows `chain` into `out`. `indirect`: VIRTIO_F_INDIRECT_DESC was negotiated.
///
/// # Errors
/// Each of [`Malformed`]; `out` then holds nothing of use.
pub fn walk(
    chain: &Chain<'_>,
    indirect: bool,
    memory: &GuestMemory,
    hint: &mut RegionHint,
    out: &mut Segments,
) -> Result<(), Malformed> {
    out.clear();
    let limit = usize::from(chain.size()).min(MAX_DESCRIPTORS);
    let mut at = chain.head();
    for _ in 0..limit {
        let descriptor = chain.descriptor(at).ok_or(Malformed::NextRange(at))?;
        if descriptor.flags() & INDIRECT != 0 {
            if !indirect {
                return Err(Malformed::NotNegotiated);
            }
            // virtio 2.7.5.3.1: not together with NEXT. WRITE has no meaning on
            // it (2.7.5.3.2: the device MUST ignore it).
            if descriptor.flags() & NEXT != 0 {
                return Err(Malformed::IndirectFlags(descriptor.flags()));
            }
            return walk_table(descriptor, memory, hint, out);
        }
        out.add(descriptor)?;
        if descriptor.flags() & NEXT == 0 {
            return out.end();
        }
        at = descriptor.next();
    }
    Err(Malformed::TooLong)
}

/// Follows an indirect table.
fn walk_table(
    at: Descriptor,
    memory: &GuestMemory,
    hint: &mut RegionHint,
    out: &mut Segments,
) -> Result<(), Malformed> {
    let bytes = usize::try_from(at.len()).unwrap_or(usize::MAX);
    if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_BYTES) {
        return Err(Malformed::TableSize(at.len()));
    }
    // A table may be larger than the chain in it; only what is used is read.
    let count = bytes / DESCRIPTOR_BYTES;
    let mut next = 0u16;
    for _ in 0..count.min(MAX_DESCRIPTORS) {
        if usize::from(next) >= count {
            return Err(Malformed::NextRange(next));
        }
        let table = at.addr().0;
        let start = table.checked_add(u64::from(next) * DESCRIPTOR_BYTES as u64);
        let start = start.ok_or(Malformed::TableAddress(table))?;
        let pair = memory.read_pair(start, hint).map_err(|e| Malformed::TableAddress(e.0))?;
        let descriptor = descriptor_of(pair);
        if descriptor.flags() & INDIRECT != 0 {
            return Err(Malformed::NestedIndirect);
        }
        out.add(descriptor)?;
        if descriptor.flags() & NEXT == 0 {
            return out.end();
        }
        next = descriptor.next();
    }
    Err(Malformed::TooLong)
}

/// A descriptor from its 16 bytes: address, then length, flags and next.
#[inline]
fn descriptor_of([addr, rest]: [u64; 2]) -> Descriptor {
    let [l0, l1, l2, l3, f0, f1, n0, n1] = rest.to_le_bytes();
    let (flags, next) = (u16::from_le_bytes([f0, f1]), u16::from_le_bytes([n0, n1]));
    Descriptor::new(addr, u32::from_le_bytes([l0, l1, l2, l3]), flags, next)
}
