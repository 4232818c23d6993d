//! What the guest is promised of its disk: size, blocks, features, limits, serial number.
//!
//! What it is: a value, made once from the command line and from facts that cannot change
//! under it (virtio 1.3, 5.2.3 and 5.2.4), and the config space that says it.
//!
//! What it is not: how any of it is kept is [`crate::backing`]'s; the cache mode is
//! [`crate::durability`]'s; what was negotiated is the session's.
//!
//! Invariants: a promise is part of the state that successors take over, and they never
//! derive it again; only a resize changes it. Features and limits are constants of every
//! writable disk, on every host and every backing: what a backing cannot do is done by
//! other means, in pieces.

use serde::{Deserialize, Serialize};

use crate::chain::MAX_DESCRIPTORS;
use crate::disk::{Disk, DiskError};
use crate::hash::fnv1a;

/// Bytes of a sector, in every field of the protocol, whatever `blk_size` says.
pub const SECTOR: u64 = 512;

/// Segments of one DISCARD or WRITE_ZEROES request that we offer.
pub const MAX_RANGES: usize = 16;

/// Bytes that GET_ID returns at most (virtio 5.2.6).
pub const ID_BYTES: usize = 20;

/// Sectors of one DISCARD or WRITE_ZEROES segment that we offer, on every disk: 2 GiB.
pub const MAX_RANGE_SECTORS: u32 = 1 << 22;

/// Data segments of a request that a driver may use: what fits into the queue
/// of 128 that QEMU and cloud-hypervisor make by default, with header and status.
pub const SEG_MAX: u32 = 126;
const _: () = assert!(SEG_MAX as usize + 2 <= MAX_DESCRIPTORS);

/// Bytes of virtio_blk_config up to the end of the WRITE_ZEROES fields, all
/// that we fill in. Longer requests are answered with zeroes behind them.
pub const CONFIG_BYTES: usize = 60;

/// Where `writeback` is in the config space: the only byte a driver may write.
pub const WRITEBACK_OFFSET: u32 = 32;

/// VIRTIO_BLK_F_FLUSH.
pub const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_CONFIG_WCE.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// VHOST_F_LOG_ALL: what is written to the guest is logged, for a migration.
pub const F_LOG_ALL: u64 = 1 << 26;
/// VIRTIO_RING_F_INDIRECT_DESC.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_RING_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;

const F_SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO.
pub const F_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE.
pub const F_BLK_SIZE: u64 = 1 << 6;
const F_TOPOLOGY: u64 = 1 << 10;
/// VIRTIO_BLK_F_MQ.
pub const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const EVERY_DISK: u64 = F_VERSION_1
    | F_LOG_ALL
    | F_INDIRECT_DESC
    | F_EVENT_IDX
    | F_PROTOCOL_FEATURES
    | F_SEG_MAX
    | F_BLK_SIZE
    | F_TOPOLOGY
    | F_FLUSH
    | F_CONFIG_WCE
    | F_MQ;

/// A file's block, bytes: QEMU's default, and the only one that SeaBIOS boots from.
const FILE_BLOCK: u32 = 512;
/// What a file is written in, bytes: a page, and a block of nearly every file system.
const FILE_PHYSICAL: u32 = 4096;

/// What the command line says of the promise.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The guest's block, bytes: 512 to 4096; the disk's own when `None`.
    pub logical_block_size: Option<u32>,
    /// What GET_ID answers; made from the path when `None`.
    pub serial: Option<String>,
}

/// See the head of the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    /// Sectors of 512 bytes.
    pub capacity: u64,
    /// Bytes of a logical block.
    pub block: u32,
    /// A physical block is 2 to this power of logical ones.
    physical_exp: u8,
    /// Logical blocks from the start of the disk to the first physical one.
    alignment_offset: u8,
    /// Logical blocks of the least I/O without a detour.
    min_io: u16,
    /// Logical blocks of the best I/O; 0: unknown.
    optimal_io: u32,
    /// Sectors that a DISCARD should be aligned to.
    discard_alignment: u32,
    /// What GET_ID answers, zero-padded.
    pub serial: [u8; ID_BYTES],
    /// Writes are refused.
    pub read_only: bool,
}

impl Promise {
    /// The promise for a disk that nothing was promised of yet.
    ///
    /// # Errors
    /// [`DiskError::TooSmall`], and when its size cannot be read.
    pub fn new(disk: &Disk, options: &Options) -> Result<Self, DiskError> {
        let path = disk.path();
        let limits = disk.device_limits();
        let own = limits.map_or(FILE_BLOCK, |l| l.logical_block);
        let block = options.logical_block_size.unwrap_or(own);
        let bytes = disk.measure().map_err(|e| DiskError::Io(path.to_owned(), "read its size", e))?;
        let size = bytes / u64::from(block) * u64::from(block);
        if size == 0 {
            return Err(DiskError::TooSmall { path: path.to_owned(), size: bytes, block });
        }
        if size != bytes {
            tracing::warn!(
                disk = %path.display(),
                "{bytes} bytes is no multiple of the {block}-byte block: the guest gets {size}, the last {} are not used",
                bytes - size
            );
        }
        let physical = limits.map_or(FILE_PHYSICAL, |l| l.physical_block).max(block);
        let granularity = limits.map_or(FILE_PHYSICAL, |l| l.discard_granularity).max(block);
        let blocks = |bytes: u32| bytes / block;
        Ok(Self {
            capacity: size / SECTOR,
            block,
            physical_exp: u8::try_from(blocks(physical).ilog2()).unwrap_or(0),
            alignment_offset: limits.map_or(0, |l| u8::try_from(blocks(l.alignment_offset)).unwrap_or(0)),
            min_io: u16::try_from(blocks(limits.map_or(physical, |l| l.minimum_io))).unwrap_or(0).max(1),
            optimal_io: limits.map_or(0, |l| blocks(l.optimal_io)),
            discard_alignment: granularity / 512,
            serial: serial(&options.serial.clone().unwrap_or_else(|| default_serial(disk))),
            read_only: disk.backing.read_only,
        })
    }

    /// True if the command line asks for nothing else.
    #[must_use]
    pub fn agrees(&self, disk: &Disk, options: &Options) -> bool {
        self.read_only == disk.backing.read_only
            && options.logical_block_size.is_none_or(|block| block == self.block)
            && options.serial.as_ref().is_none_or(|text| serial(text) == self.serial)
    }

    /// False if no disk can have been promised like that: then the state that it was read from is not ours. Else no
    /// size that is computed from it overflows.
    #[must_use]
    pub fn is_possible(&self) -> bool {
        let fits = |blocks: u64| u32::try_from(blocks.saturating_mul(self.block.into())).is_ok();
        let bytes = self.capacity.checked_mul(SECTOR).filter(|&bytes| i64::try_from(bytes).is_ok());
        let physical = 1_u64.checked_shl(self.physical_exp.into());
        self.block.is_power_of_two()
            && u64::from(self.block) >= SECTOR
            && bytes.is_some_and(|bytes| bytes > 0 && bytes.is_multiple_of(self.block.into()))
            && physical.is_some_and(fits)
            && fits(self.optimal_io.into())
    }

    /// Bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.capacity * SECTOR
    }

    /// Bytes of a physical block.
    #[must_use]
    pub fn physical_block(&self) -> u32 {
        self.block << self.physical_exp
    }

    /// Bytes of the best I/O; 0: unknown.
    #[must_use]
    pub fn optimal_io(&self) -> u32 {
        self.optimal_io * self.block
    }

    /// The same for a disk that has grown to so many bytes, whole blocks.
    #[must_use]
    pub fn grown(self, bytes: u64) -> Self {
        Self { capacity: bytes / SECTOR, ..self }
    }

    /// The feature bits that are offered.
    #[must_use]
    pub fn features(&self) -> u64 {
        EVERY_DISK | if self.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES }
    }

    /// The config space, for a device of so many queues in this cache mode.
    #[must_use]
    pub fn config_space(&self, queues: u16, write_back: bool) -> [u8; CONFIG_BYTES] {
        let ranges = u32::try_from(MAX_RANGES).unwrap_or(1);
        let fields: [&[u8]; 19] = [
            &self.capacity.to_le_bytes(),
            &0u32.to_le_bytes(), // size_max, not offered
            &SEG_MAX.to_le_bytes(),
            &[0; 4], // geometry, not offered
            &self.block.to_le_bytes(),
            &[self.physical_exp],
            &[self.alignment_offset],
            &self.min_io.to_le_bytes(),
            &self.optimal_io.to_le_bytes(),
            &[u8::from(write_back)],
            &[0],
            &queues.to_le_bytes(),
            &MAX_RANGE_SECTORS.to_le_bytes(), // of a discard
            &ranges.to_le_bytes(),
            &self.discard_alignment.to_le_bytes(),
            &MAX_RANGE_SECTORS.to_le_bytes(), // of a write-zeroes
            &ranges.to_le_bytes(),
            &[1], // it may unmap, if the backing can
            &[0; 3],
        ];
        let mut space = [0; CONFIG_BYTES];
        for (to, from) in space.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        space
    }
}

fn serial(text: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    for (to, from) in id.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    id
}

/// The start of the disk's name and a hash of what it is: readable, another one for each disk of a host, and the same at both
/// ends of a migration where the disk is called the same. A block device's path is taken as it was given: /dev/vg/vm1 leads to
/// another /dev/dm-N at each boot. An image of a cluster has a number there, whatever was typed for it.
fn default_serial(disk: &Disk) -> String {
    let path = disk.path();
    let (name, unique) = if let Some(image) = disk.image() {
        (image.short_name().to_owned(), image.facts.identity.clone().into_bytes())
    } else if let Some(remote) = disk.remote() {
        let name = if remote.export_name().is_empty() { "nbd" } else { remote.export_name() };
        (name.to_owned(), path.as_os_str().as_encoded_bytes().to_owned())
    } else {
        let is_device = disk.backing.is_device;
        let real = if is_device { std::path::absolute(path) } else { path.canonicalize() };
        let real = real.unwrap_or_else(|_| path.to_owned());
        let name = real.file_name().unwrap_or_default().to_string_lossy();
        (name.into_owned(), real.as_os_str().as_encoded_bytes().to_owned())
    };
    named(&name, &unique)
}

/// The start of a name, and a hash.
fn named(name: &str, unique: &[u8]) -> String {
    const HASH: usize = 8;
    let hash = fnv1a(unique);
    let hash = (hash >> 32 ^ hash) & 0xffff_ffff; // folded to 32 bits
    let readable = name.chars().map(|c| if c.is_ascii_graphic() { c } else { '_' });
    let start: String = readable.take(ID_BYTES - HASH - 1).collect();
    format!("{start}-{hash:08x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn promise() -> Promise {
        Promise {
            capacity: 2048,
            block: 512,
            physical_exp: 3,
            alignment_offset: 1,
            min_io: 8,
            optimal_io: 128,
            discard_alignment: 8,
            serial: [0; ID_BYTES],
            read_only: false,
        }
    }

    #[test]
    fn every_field_is_where_virtio_puts_it() {
        let space = promise().config_space(4, true);
        let u16_at = |at: usize| u16::from_le_bytes([space[at], space[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        assert_eq!(u32_at(0), 2048);
        assert_eq!(u32_at(12), SEG_MAX);
        assert_eq!(u32_at(20), 512);
        assert_eq!((space[24], space[25], u16_at(26), u32_at(28)), (3, 1, 8, 128));
        assert_eq!((space[32], u16_at(34)), (1, 4));
        assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (1 << 22, 16, 8));
        assert_eq!((u32_at(48), u32_at(52), space[56]), (1 << 22, 16, 1));
    }

    #[test]
    fn a_promise_that_no_disk_can_keep_is_told() {
        let good = promise();
        let bad = [
            Promise { capacity: 0, ..good },
            Promise { capacity: u64::MAX, ..good },
            Promise { capacity: 1 << 54, ..good },
            Promise { capacity: 2047, block: 1024, ..good },
            Promise { block: 0, ..good },
            Promise { block: 256, ..good },
            Promise { block: 3 << 9, capacity: 3 << 9, ..good },
            Promise { physical_exp: 23, ..good },
            Promise { physical_exp: 200, ..good },
            Promise { optimal_io: 1 << 23, ..good },
        ];
        assert!(good.is_possible() && Promise { physical_exp: 22, ..good }.is_possible());
        bad.iter().for_each(|promise| assert!(!promise.is_possible(), "{promise:?}"));
    }

    #[test]
    fn a_read_only_disk_offers_no_way_to_write() {
        let bits = Promise { read_only: true, ..promise() }.features();
        assert_eq!(bits & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    }

    #[test]
    fn images_of_one_name_have_serial_numbers_of_their_own() {
        let serials =
            ["/a/disk.img", "/b/disk.img", "/b/a name that is too long 1", "/b/a name that is too long 2"]
                .map(|path| named(&path[3..], path.as_bytes()));
        assert!(serials.iter().all(|s| s.len() <= ID_BYTES && s.is_ascii()), "{serials:?}");
        assert!(serials[0].starts_with("disk.img-") && serials[2].starts_with("a_name_that"), "{serials:?}");
        assert!(serials[0] != serials[1] && serials[2] != serials[3], "{serials:?}");
    }
}
