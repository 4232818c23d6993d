//! What the guest is told: virtio_blk_config and the feature bits.
//!
//! What it is: the one place that derives both from the disk's facts (virtio
//! 1.3, 5.2.3 and 5.2.4).
//!
//! What it is not: it remembers nothing; what was negotiated is the session's.
//!
//! Invariant: a bit is offered only if it works here, on this backing, now.

use crate::chain::MAX_DESCRIPTORS;
use crate::disk::Facts;
use crate::request::{Geometry, ID_BYTES, MAX_RANGE_SECTORS, MAX_RANGES, MAX_WRITTEN_ZERO_SECTORS, SECTOR};

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
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// The feature bits offered for a disk.
#[must_use]
pub fn features(facts: &Facts) -> u64 {
    let mut bits = F_VERSION_1
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
    if facts.read_only {
        bits |= F_RO;
    } else {
        bits |= F_WRITE_ZEROES; // falls back to writing zeroes
        if facts.fallocate.punch {
            bits |= F_DISCARD;
        }
    }
    bits
}

/// The disk as requests are judged by it.
#[must_use]
pub fn geometry(facts: &Facts, serial: &str) -> Geometry {
    let mut id = [0; ID_BYTES];
    for (to, from) in id.iter_mut().zip(serial.bytes()) {
        *to = from;
    }
    let offered = features(facts);
    Geometry {
        capacity: facts.size / SECTOR,
        read_only: facts.read_only,
        discard: offered & F_DISCARD != 0,
        write_zeroes: offered & F_WRITE_ZEROES != 0,
        max_zero_sectors: max_zero_sectors(facts),
        id,
    }
}

fn max_zero_sectors(facts: &Facts) -> u32 {
    if facts.zeroes_quickly() { MAX_RANGE_SECTORS } else { MAX_WRITTEN_ZERO_SECTORS }
}

/// The config space of a disk that has `capacity` sectors now.
#[must_use]
pub fn space(facts: &Facts, capacity: u64, queues: u16, writeback: bool) -> [u8; CONFIG_BYTES] {
    let block = facts.logical_block;
    let blocks = |bytes: u32| bytes / block;
    let physical_exp = u8::try_from((facts.physical_block / block).max(1).ilog2()).unwrap_or(0);
    let min_io = u16::try_from(blocks(facts.physical_block)).unwrap_or(1);
    let ranges = u32::try_from(MAX_RANGES).unwrap_or(1);
    let sector = u32::try_from(SECTOR).unwrap_or(512);
    let unmaps = facts.fallocate.punch;
    let fields: [&[u8]; 19] = [
        &capacity.to_le_bytes(),
        &0u32.to_le_bytes(), // size_max, not offered
        &SEG_MAX.to_le_bytes(),
        &[0; 4], // geometry, not offered
        &block.to_le_bytes(),
        &[physical_exp],
        &[0], // alignment_offset
        &min_io.to_le_bytes(),
        &blocks(facts.optimal_io).to_le_bytes(),
        &[u8::from(writeback)],
        &[0],
        &queues.to_le_bytes(),
        &MAX_RANGE_SECTORS.to_le_bytes(), // of a discard
        &ranges.to_le_bytes(),
        &(facts.discard_granularity / sector).to_le_bytes(),
        &max_zero_sectors(facts).to_le_bytes(),
        &ranges.to_le_bytes(),
        &[u8::from(unmaps)],
        &[0; 3],
    ];
    let mut space = [0; CONFIG_BYTES];
    for (to, from) in space.iter_mut().zip(fields.into_iter().flatten()) {
        *to = *from;
    }
    space
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Fallocate;

    fn facts() -> Facts {
        Facts {
            size: 1 << 20,
            logical_block: 512,
            physical_block: 4096,
            optimal_io: 1 << 16,
            offset_align: 512,
            discard_granularity: 4096,
            fallocate: Fallocate { punch: true, zero: true, align: 1 },
            dsync: true,
            is_device: false,
            in_memory: false,
            read_only: false,
        }
    }

    #[test]
    fn every_field_is_where_virtio_puts_it() {
        let space = space(&facts(), 2048, 4, true);
        let u16_at = |at: usize| u16::from_le_bytes([space[at], space[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        assert_eq!(u32_at(0), 2048);
        assert_eq!(u32_at(12), SEG_MAX);
        assert_eq!(u32_at(20), 512);
        assert_eq!((space[24], u16_at(26), u32_at(28)), (3, 8, 128));
        assert_eq!((space[32], u16_at(34)), (1, 4));
        assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (1 << 22, 16, 8));
        assert_eq!((u32_at(48), u32_at(52), space[56]), (1 << 22, 16, 1));
    }

    #[test]
    fn a_read_only_disk_offers_no_way_to_write() {
        let bits = features(&Facts { read_only: true, ..facts() });
        assert_eq!(bits & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    }
}
