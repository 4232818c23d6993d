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
use vm_memory::ByteValued;

use crate::memory::{GuestMemory, RegionHint};
use crate::ring::split::Chain;

/// Descriptors that one chain may have, twice what a driver needs that keeps to
/// the offered `seg_max`: firmware splits headers as it likes.
pub const MAX_DESCRIPTORS: usize = 256;

/// Bytes of the largest indirect table.
const TABLE_BYTES: usize = MAX_DESCRIPTORS * DESCRIPTOR_BYTES;
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
    /// An indirect table outside of guest memory.
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
#[derive(Debug)]
pub struct Segments {
    all: ArrayVec<Segment, MAX_DESCRIPTORS>,
    readable: usize,
    bytes: u64,
    table: Box<[u8; TABLE_BYTES]>,
}

impl Default for Segments {
    fn default() -> Self {
        Self { all: ArrayVec::new(), readable: 0, bytes: 0, table: Box::new([0; TABLE_BYTES]) }
    }
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

    fn add(&mut self, descriptor: Descriptor) -> Result<(), Malformed> {
        let segment = Segment { addr: descriptor.addr().0, len: descriptor.len() };
        let writable = descriptor.flags() & WRITE != 0;
        if !writable && self.readable < self.all.len() {
            return Err(Malformed::Order);
        }
        self.bytes += u64::from(segment.len);
        if self.bytes > u64::from(u32::MAX) {
            return Err(Malformed::TooLarge);
        }
        if segment.len == 0 {
            return Ok(()); // harmless, and some firmware makes them
        }
        self.all.try_push(segment).map_err(|_| Malformed::TooLong)?;
        if !writable {
            self.readable += 1;
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
    out.all.clear();
    out.readable = 0;
    out.bytes = 0;
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
            return Ok(());
        }
        at = descriptor.next();
    }
    Err(Malformed::TooLong)
}

/// Follows an indirect table, which is copied whole before it is looked at.
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
    // A table may be larger than the chain in it; only what can be used is read.
    let used = bytes.min(TABLE_BYTES);
    let table = out.table.get_mut(..used).ok_or(Malformed::TableSize(at.len()))?;
    memory.read(at.addr().0, table, hint).map_err(|e| Malformed::TableAddress(e.0))?;
    let count = bytes / DESCRIPTOR_BYTES;
    let mut next = 0u16;
    for _ in 0..count.min(MAX_DESCRIPTORS) {
        let start = usize::from(next) * DESCRIPTOR_BYTES;
        if usize::from(next) >= count {
            return Err(Malformed::NextRange(next));
        }
        let raw = out.table.get(start..start + DESCRIPTOR_BYTES).ok_or(Malformed::TooLong)?;
        let mut descriptor = Descriptor::default();
        descriptor.as_mut_slice().copy_from_slice(raw);
        if descriptor.flags() & INDIRECT != 0 {
            return Err(Malformed::NestedIndirect);
        }
        out.add(descriptor)?;
        if descriptor.flags() & NEXT == 0 {
            return Ok(());
        }
        next = descriptor.next();
    }
    Err(Malformed::TooLong)
}
