//! Every request type: what it does, what it answers, and how it refuses.

use super::Bench;
use crate::support::daemon::Options;
use crate::support::device::{
    Device, IOERR, OK, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, UNSUPP, range,
};
use crate::support::disk::{SECTOR, assert_same, pattern, salted};
use crate::support::frontend::feature;

pub fn read_gives_what_the_file_holds(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    for (sector, sectors) in [(0, 1), (1, 1), (7, 9), (8, 8), (1000, 256), (4095, 1)] {
        let done = device.run(0, T_IN, sector, &[], sectors * SECTOR);
        assert_eq!(done.status, OK);
        assert_eq!(done.written as usize, sectors * SECTOR + 1, "used length");
        assert_same(&done.data, &pattern(sector, sectors as u64), "what was read");
    }
    // Past the pattern the file is a hole, up to its last sector.
    let end = bench.disk.sectors;
    assert_same(&device.read(end - 8, 8), &[0; 8 * SECTOR], "the hole");
}

pub fn write_reaches_the_file(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    for (salt, (sector, sectors)) in [(0, 1), (3, 5), (8, 64), (2000, 512)].into_iter().enumerate() {
        let data = salted(salt as u64 + 1, sector, sectors);
        let done = device.run(0, T_OUT, sector, &data, 0);
        assert_eq!(done.status, OK);
        assert_eq!(done.written, 1, "used length of a write: the status byte");
        assert_same(&device.read(sector, sectors), &data, "read back");
    }
    let end = bench.disk.sectors;
    device.write(end - 1, &salted(9, end - 1, 1));
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
    // Seen by others through the page cache too.
    assert_same(&bench.stored().read(0, 1), &salted(1, 0, 1), "sector 0");
    assert_same(&bench.stored().read(1, 2), &pattern(1, 2), "neighbours");
    assert_same(&bench.stored().read(3, 5), &salted(2, 3, 5), "sectors 3 to 7");
    assert_same(&bench.stored().read(8, 64), &salted(3, 8, 64), "from sector 8");
    assert_same(&bench.stored().read(end - 1, 1), &salted(9, end - 1, 1), "last");
}

pub fn flush(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    assert_ne!(device.features & feature::FLUSH, 0, "FLUSH is offered");
    device.write(5, &salted(1, 5, 3));
    let done = device.run(0, T_FLUSH, 0, &[], 0);
    assert_eq!((done.status, done.written), (OK, 1));
    assert_same(&bench.stored().read(5, 3), &salted(1, 5, 3), "after the flush");
}

pub fn get_id(bench: &Bench) {
    let options = Options::with(&["--serial=serial-0123"]);
    let daemon = bench.start(&options);
    let mut device = Device::plain(&daemon);
    let done = device.run(0, T_GET_ID, 0, &[], 20);
    assert_eq!(done.status, OK);
    let serial: &[u8] = if bench.deviates("serial") {
        b"vhost_user_blk"
    } else {
        assert_eq!(done.written, 21, "used length: 20 bytes and the status");
        b"serial-0123"
    };
    let mut want = serial.to_vec();
    want.resize(20, 0);
    assert_eq!(done.data, want);
}

pub fn unknown_types(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    // 2 and 3: SCSI commands of old; 14: secure erase, not offered.
    let mut kinds = vec![2, 3, 5, 14, 77, 0x7fff_ffff];
    if !bench.deviates("barrier bit") {
        kinds.extend([0x8000_0000, 0x8000_0001, u32::MAX]);
    }
    for kind in kinds {
        assert_eq!(device.status(kind, 0, &[], 512), UNSUPP, "type {kind}");
        assert_eq!(device.status(kind, 0, &[7; 512], 0), UNSUPP, "type {kind}");
    }
    device.assert_serves(0);
}

pub fn beyond_the_end(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    let end = bench.disk.sectors;
    let wrong = [
        end,
        end - 1,
        end + 1,
        1 << 32,
        // Sector times 512, and sector plus length, overflow 64 bits.
        1 << 55,
        (1 << 55) - 1,
        u64::MAX - 1,
        u64::MAX,
    ];
    for sector in wrong {
        let read = device.run(0, T_IN, sector, &[], 2 * SECTOR);
        assert_eq!(read.status, IOERR, "read at sector {sector}");
        let write = device.run(0, T_OUT, sector, &[7; 2 * SECTOR], 0);
        assert_eq!(write.status, IOERR, "write at sector {sector}");
    }
    assert_eq!(device.status(T_IN, end - 2, &[], 2 * SECTOR), OK);
    assert_eq!(
        std::fs::metadata(&bench.stored().path).unwrap().len(),
        end * SECTOR as u64,
        "the file has not grown"
    );
}

pub fn odd_lengths(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    for len in [1, 511, 513, 1000, 4095] {
        assert_eq!(device.status(T_IN, 0, &[], len), IOERR, "read of {len}");
        let data = vec![7; len];
        assert_eq!(device.status(T_OUT, 0, &data, 0), IOERR, "write of {len}");
    }
    assert_same(&bench.stored().read(0, 8), &pattern(0, 8), "nothing was written");
    device.assert_serves(0);
}

pub fn empty_transfers(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    // No data at all: whatever the answer, it is an answer.
    let end = bench.disk.sectors;
    for sector in [0, 7, end - 1, end, end + 1, u64::MAX] {
        for kind in [T_IN, T_OUT] {
            let done = device.run(0, kind, sector, &[], 0);
            assert!(done.status == OK || done.status == IOERR, "{done:?}");
            assert_eq!(done.written, 1);
        }
    }
    assert_eq!(device.status(T_GET_ID, 0, &[], 0), OK);
    device.assert_serves(0);
}

pub fn read_only(bench: &Bench) {
    let daemon = bench.start(&Options { read_only: true, ..Options::default() });
    let mut device = Device::plain(&daemon);
    assert_ne!(device.features & feature::RO, 0, "RO is offered");
    assert_eq!(device.status(T_OUT, 0, &[7; SECTOR], 0), IOERR);
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        let status = device.status(kind, 0, &range(0, 8, 0), 0);
        assert!(status == IOERR || status == UNSUPP, "type {kind} on a read-only disk: status {status}");
    }
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
    assert_same(&device.read(0, 8), &pattern(0, 8), "still readable");
    assert_same(&bench.stored().read(0, 8), &pattern(0, 8), "nothing was written");
}

pub fn discard_and_write_zeroes(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    assert_ne!(device.features & feature::WRITE_ZEROES, 0);
    // Whole blocks and odd sectors, with and without leave to unmap.
    for (sector, sectors, flags) in [(64, 64, 1), (200, 1, 0), (303, 13, 1), (403, 13, 0)] {
        let done = device.run(0, T_WRITE_ZEROES, 0, &range(sector, sectors, flags), 0);
        assert_eq!((done.status, done.written), (OK, 1));
        let (first, count) = (sector - 1, u64::from(sectors) + 2);
        let mut want = pattern(first, count);
        let end = want.len() - SECTOR;
        want[SECTOR..end].fill(0);
        assert_same(&device.read(first, count), &want, "zeroes and neighbours");
        assert_same(&bench.stored().read(first, count), &want, "in the file");
    }
    if device.features & feature::DISCARD != 0 {
        let done = device.run(0, T_DISCARD, 0, &range(1024, 1024, 0), 0);
        assert_eq!((done.status, done.written), (OK, 1));
        assert_same(&device.read(1023, 1), &pattern(1023, 1), "sector before");
        assert_same(&device.read(2048, 1), &pattern(2048, 1), "sector after");
        let done = device.run(0, T_DISCARD, 0, &range(3, 3, 0), 0);
        assert_eq!(done.status, OK, "unaligned discard is best effort");
        assert_same(&device.read(2, 1), &pattern(2, 1), "sector before");
        assert_same(&device.read(6, 1), &pattern(6, 1), "sector after");
        // 5.2.6.2: a discard with the unmap flag is unsupported.
        assert_eq!(device.status(T_DISCARD, 0, &range(0, 1, 1), 0), UNSUPP);
    }
}

fn le(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

pub fn config_sizes(bench: &Bench) {
    let (_daemon, device) = bench.plain();
    // QEMU asks for 36, 48 or 57 bytes, cloud-hypervisor and Firecracker for 60.
    let whole = device.frontend.config(0, 60).unwrap();
    assert_eq!(whole.len(), 60, "size of the answer");
    for size in [8, 36, 48, 57] {
        let part = device.frontend.config(0, size).unwrap();
        assert_eq!(part, whole[..size as usize], "the first {size} bytes");
    }
    if !bench.deviates("config space") {
        let long = device.frontend.config(0, 256).unwrap();
        assert_eq!(long[..57], whole[..57]);
        assert_eq!(long[60..], [0; 196], "zeroes past the structure");
        for (offset, size) in [(0, 1), (8, 4), (20, 4), (32, 1), (34, 2), (40, 20)] {
            let part = device.frontend.config(offset, size).unwrap();
            let range = offset as usize..(offset + size) as usize;
            assert_eq!(part, whole[range], "{size} bytes at {offset}");
        }
    }
}

pub fn config_values(bench: &Bench) {
    let daemon = bench.start(&Options { queues: Some(7), ..Options::default() });
    let device = Device::plain(&daemon);
    let config = device.frontend.config(0, 60).unwrap();
    assert_eq!(le(&config[..8]), bench.disk.sectors, "capacity");
    assert!(le(&config[12..16]) >= 1, "seg_max");
    let block = le(&config[20..24]);
    assert!(block.is_power_of_two() && (512..=4096).contains(&block));
    assert_eq!(le(&config[34..36]), 7, "num_queues");
    if !bench.deviates("writeback") {
        assert_eq!(config[32], 1, "writeback");
    }
    if device.features & feature::DISCARD != 0 {
        assert!(le(&config[36..40]) > 0, "max_discard_sectors");
        assert!(le(&config[40..44]) > 0, "max_discard_seg");
        assert!(le(&config[44..48]) > 0, "discard_sector_alignment");
    }
    assert!(le(&config[48..52]) > 0, "max_write_zeroes_sectors");
    assert!(le(&config[52..56]) > 0, "max_write_zeroes_seg");
    if bench.deviates("config space") {
        return;
    }
    assert!(le(&config[12..16]) >= 126, "seg_max allows long chains");
}
