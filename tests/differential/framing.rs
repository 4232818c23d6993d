//! Where the pieces of a request lie: any split into descriptors, any address,
//! any memory region, any ring. The device has to find header, data and status
//! by counting bytes, not descriptors.

use super::Bench;
use crate::support::device::{Device, OK, Setup, T_IN, T_OUT, header};
use crate::support::disk::{SECTOR, assert_same, pattern, salted};
use crate::support::memory::{Memory, Span};
use crate::support::ring::{Seg, back, out};

/// Cuts a range into pieces of these lengths.
fn cut(addr: u64, lens: &[usize], seg: fn(u64, usize) -> Seg) -> Vec<Seg> {
    let mut at = addr;
    lens.iter()
        .map(|len| {
            let piece = seg(at, *len);
            at += *len as u64;
            piece
        })
        .collect()
}

pub fn header_split_anywhere(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    let buffer = device.memory.alloc(8192, 4096);
    let cuts: [&[usize]; 6] = [&[16], &[8, 8], &[1, 15], &[15, 1], &[4, 4, 4, 4], &[1, 2, 3, 4, 5, 1]];
    for (salt, lens) in cuts.into_iter().enumerate() {
        for indirect in [false, true] {
            let sector = salt as u64 + 10;
            let data = salted(salt as u64 + 1, sector, 1);
            device.memory.write(buffer, &header(T_OUT, sector));
            device.memory.write(buffer + 16, &data);
            let mut segs = cut(buffer, lens, out);
            segs.push(out(buffer + 16, SECTOR));
            segs.push(back(buffer + 4096, 1));
            let (status, used) = device.run_segs(&segs, indirect);
            assert_eq!((status, used.len), (OK, 1), "header in {lens:?}");
            // The header and the data in one run of bytes, cut alike.
            let mut segs = cut(buffer, lens, out);
            segs.last_mut().unwrap().len += SECTOR as u32;
            segs.push(back(buffer + 4096, 1));
            assert_eq!(device.run_segs(&segs, indirect).0, OK);
            assert_same(&device.read(sector, 1), &data, "written");

            device.memory.write(buffer, &header(T_IN, sector));
            let mut segs = cut(buffer, lens, out);
            segs.push(back(buffer + 2048, SECTOR));
            segs.push(back(buffer + 4096, 1));
            let (status, used) = device.run_segs(&segs, indirect);
            assert_eq!((status, used.len), (OK, 513), "header in {lens:?}");
            assert_same(&device.memory.read(buffer + 2048, SECTOR), &data, "read");
        }
    }
}

pub fn status_in_the_data_descriptor(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    let buffer = device.memory.alloc(16384, 4096);
    device.memory.write(buffer, &header(T_IN, 20));
    // 1024 bytes of data and the status, cut in several ways.
    let cuts: [&[usize]; 5] = [&[1025], &[1024, 1], &[512, 513], &[1, 1024], &[700, 300, 25]];
    for lens in cuts {
        device.memory.write(buffer + 4096, &[0xee; 1025]);
        let mut segs = vec![out(buffer, 16)];
        segs.extend(cut(buffer + 4096, lens, back));
        let (status, used) = device.run_segs(&segs, false);
        assert_eq!((status, used.len), (OK, 1025), "cut into {lens:?}");
        let data = device.memory.read(buffer + 4096, 1024);
        assert_same(&data, &pattern(20, 2), "data before the status");
    }
}

pub fn one_byte_descriptors(bench: &Bench) {
    let (_daemon, mut device) = bench.with(Setup { ring_size: 1024, ..Setup::default() });
    let buffer = device.memory.alloc(8192, 4096);
    // A sector in 60 pieces of one byte and a rest, header byte by byte.
    let mut lens = vec![1; 60];
    lens.push(SECTOR - 60);
    for indirect in [false, true] {
        let data = salted(5, 30, 1);
        device.memory.write(buffer, &header(T_OUT, 30));
        device.memory.write(buffer + 100, &data);
        let mut segs = cut(buffer, &[1; 16], out);
        segs.extend(cut(buffer + 100, &lens, out));
        segs.push(back(buffer + 4096, 1));
        assert_eq!(device.run_segs(&segs, indirect).0, OK);

        device.memory.write(buffer, &header(T_IN, 30));
        device.memory.write(buffer + 100, &[0; SECTOR]);
        let mut segs = cut(buffer, &[1; 16], out);
        segs.extend(cut(buffer + 100, &lens, back));
        segs.push(back(buffer + 4096, 1));
        assert_eq!(device.run_segs(&segs, indirect).0, OK);
        let got = device.memory.read(buffer + 100, SECTOR);
        assert_same(&got, &data, "a sector in pieces");
    }
}

pub fn misaligned_buffers(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    let buffer = device.memory.alloc(1 << 20, 4096);
    let status = device.memory.alloc(16, 16);
    // Offsets into a page and cuts of 16 sectors: what O_DIRECT would refuse.
    let offsets = [0, 1, 2, 8, 511, 512, 513, 4095];
    let cuts: [&[usize]; 5] = [&[8192], &[512, 7680], &[1, 8191], &[4095, 2, 4095], &[1000, 3000, 192, 4000]];
    let mut salt = 10;
    for offset in offsets {
        for lens in cuts {
            salt += 1;
            // Odd sector, so that the file offset is no multiple of 4096.
            let sector = 1001 + salt;
            let data = salted(salt, sector, 16);
            device.memory.write(buffer, &header(T_OUT, sector));
            let at = buffer + 4096 + offset;
            device.memory.write(at, &data);
            let mut segs = vec![out(buffer, 16)];
            segs.extend(cut(at, lens, out));
            segs.push(back(status, 1));
            assert_eq!(device.run_segs(&segs, false).0, OK);
            assert_same(&device.read(sector, 16), &data, "written from anywhere");

            // Read it back into another place, guarded on both sides.
            let place = buffer + 65536 + offset;
            device.memory.write(place - 32, &[0xaa; 8192 + 64]);
            device.memory.write(buffer, &header(T_IN, sector));
            let mut segs = vec![out(buffer, 16)];
            segs.extend(cut(place, lens, back));
            segs.push(back(status, 1));
            let (code, used) = device.run_segs(&segs, false);
            assert_eq!((code, used.len), (OK, 8193));
            assert_same(&device.memory.read(place, 8192), &data, "read to anywhere");
            for guard in [place - 32, place + 8192] {
                assert_eq!(device.memory.read(guard, 32), [0xaa; 32], "guard");
            }
        }
    }
}

pub fn many_segments(bench: &Bench) {
    let (_daemon, mut device) = bench.with(Setup { ring_size: 256, ..Setup::default() });
    // As many data segments as the device says it takes, at most 126 here:
    // one page each, in falling order and a page apart.
    let config = device.frontend.config(0, 60).unwrap();
    let seg_max = u32::from_le_bytes(config[12..16].try_into().unwrap());
    let count = u64::from(seg_max.min(126));
    let base = device.memory.alloc(count * 8192, 4096);
    let meta = device.memory.alloc(64, 16);
    let place = |index: u64| base + (count - 1 - index) * 8192;
    for indirect in [false, true] {
        let data = salted(u64::from(indirect) + 40, 8, count * 8);
        let mut segs = vec![out(meta, 16)];
        for (index, page) in data.chunks(4096).enumerate() {
            device.memory.write(place(index as u64), page);
            segs.push(out(place(index as u64), 4096));
        }
        segs.push(back(meta + 32, 1));
        device.memory.write(meta, &header(T_OUT, 8));
        assert_eq!(device.run_segs(&segs, indirect).0, OK);
        assert_same(&bench.stored().read(8, count * 8), &data, "in the file");

        for index in 0..count {
            device.memory.write(place(index), &[0; 4096]);
        }
        device.memory.write(meta, &header(T_IN, 8));
        for seg in &mut segs[1..] {
            seg.device_writes = true;
        }
        let (status, used) = device.run_segs(&segs, indirect);
        assert_eq!((status, u64::from(used.len)), (OK, count * 4096 + 1));
        for (index, page) in data.chunks(4096).enumerate() {
            let got = device.memory.read(place(index as u64), 4096);
            assert_same(&got, page, "a scattered page");
        }
    }
}

pub fn large_requests(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    for sectors in [2048, 2049, 8192, 16384] {
        let data = salted(sectors, 4099, sectors);
        device.write(4099, &data);
        assert_same(&device.read(4099, sectors), &data, "a large request");
    }
    assert_same(&bench.stored().read(4000, 96), &pattern(4000, 96), "before it");
    assert_same(&device.read(4099 + 16384, 8), &[0; 8 * SECTOR], "and after it");
}

pub fn buffers_across_regions(bench: &Bench) {
    // Two regions that touch for the guest but are different files.
    let spans = [Span { guest: 1 << 30, len: 8 << 20 }, Span { guest: (1 << 30) + (8 << 20), len: 8 << 20 }];
    let border = spans[1].guest;
    let (_daemon, mut device) = bench.with(Setup { memory: Memory::with(&spans), ..Setup::default() });
    let data = salted(50, 64, 32);
    // Data over the border, then the header, then an indirect table, then all.
    for (head, at) in [
        (border - 65536, border - 8192),
        (border - 65536, border - 513),
        (border - 7, border + 9),
        (border - 16, border),
    ] {
        let status = border + (1 << 20);
        device.memory.write(head, &header(T_OUT, 64));
        device.memory.write(at, &data);
        let mut segs = [out(head, 16), out(at, data.len()), back(status, 1)];
        assert_eq!(device.run_segs(&segs, false).0, OK);
        assert_same(&bench.stored().read(64, 32), &data, "in the file");
        device.memory.write(at, &vec![0; data.len()]);
        device.memory.write(head, &header(T_IN, 64));
        segs[1].device_writes = true;
        assert_eq!(device.run_segs(&segs, false).0, OK);
        assert_same(&device.memory.read(at, data.len()), &data, "read back");
    }
}

pub fn scattered_regions(bench: &Bench) {
    // Eight regions, far apart, not in order, one above 1 TiB.
    let starts: [u64; 8] = [1 << 32, 1 << 20, 1 << 40, 3 << 30, 1 << 44, 64 << 20, 7 << 34, 1 << 46];
    let spans = starts.map(|guest| Span { guest, len: 4 << 20 });
    let memory = Memory::with(&spans);
    let (_daemon, mut device) = bench.with(Setup { memory: memory.clone(), ..Setup::default() });
    let head = memory.page_with(&header(T_OUT, 128));
    let status = memory.alloc_in(7, 1, 1);
    let places: Vec<u64> = (0..8).map(|region| memory.alloc_in(region, 4096, 4096)).collect();
    let data = salted(60, 128, 64);
    let mut segs = vec![out(head, 16)];
    for (place, page) in places.iter().zip(data.chunks(4096)) {
        memory.write(*place, page);
        segs.push(out(*place, 4096));
    }
    segs.push(back(status, 1));
    assert_eq!(device.run_segs(&segs, true).0, OK);
    assert_same(&device.read(128, 64), &data, "gathered from eight regions");
}

pub fn indirect_tables(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    // More at once than direct chains would fit: 128 requests of 10 segments.
    let mut waiting = std::collections::HashMap::new();
    for index in 0..128_u64 {
        let buffer = device.memory.alloc(8192, 4096);
        device.memory.write(buffer, &header(T_IN, index * 8));
        let mut segs = vec![out(buffer, 16)];
        segs.extend(cut(buffer + 512, &[512; 8], back));
        segs.push(back(buffer + 32, 1));
        let head = device.rings[0].indirect(&segs);
        waiting.insert(head, (buffer, index * 8));
        device.rings[0].stage(head);
    }
    device.rings[0].publish();
    device.rings[0].kick.signal();
    for _ in 0..128 {
        let used = device.rings[0].wait_used("one of 128 indirect requests");
        assert_eq!(used.len, 4097);
        let (buffer, sector) = waiting.remove(&used.head).unwrap();
        let got = device.memory.read(buffer + 512, 4096);
        assert_same(&got, &pattern(sector, 8), "an indirect read");
    }
}

/// What the ring holds and what a table holds are different things: drivers
/// size their tables by seg_max.
pub fn tables_longer_than_the_ring(bench: &Bench) {
    let (_daemon, mut device) = bench.with(Setup { ring_size: 16, ..Setup::default() });
    let buffer = device.memory.alloc(1 << 20, 4096);
    for count in [15, 16, 17, 64, 126] {
        device.memory.write(buffer, &header(T_IN, 16));
        let mut segs = vec![out(buffer, 16)];
        segs.extend(cut(buffer + 4096, &vec![512; count], back));
        segs.push(back(buffer + 32, 1));
        let (status, used) = device.run_segs(&segs, true);
        assert_eq!((status, used.len as usize), (OK, count * SECTOR + 1));
        let got = device.memory.read(buffer + 4096, count * SECTOR);
        assert_same(&got, &pattern(16, count as u64), "through a long table");
    }
}

pub fn as_many_segments_as_offered(bench: &Bench) {
    let (_daemon, mut device) = bench.with(Setup { ring_size: 1024, ..Setup::default() });
    let config = device.frontend.config(0, 60).unwrap();
    let seg_max = u32::from_le_bytes(config[12..16].try_into().unwrap());
    let count = seg_max.min(1022) as usize;
    let buffer = device.memory.alloc((count as u64 + 1) * 1024 + 4096, 4096);
    device.memory.write(buffer, &header(T_IN, 16));
    let mut segs = vec![out(buffer, 16)];
    // Sectors with gaps between them, so that nothing can be merged.
    segs.extend((1..=count as u64).map(|index| back(buffer + 4096 + index * 1024, SECTOR)));
    segs.push(back(buffer + 32, 1));
    for indirect in [false, true] {
        let (status, used) = device.run_segs(&segs, indirect);
        assert_eq!((status, used.len as usize), (OK, count * SECTOR + 1));
        for index in 1..=count as u64 {
            let got = device.memory.read(buffer + 4096 + index * 1024, SECTOR);
            assert_same(&got, &pattern(15 + index, 1), "one of many sectors");
        }
    }
}

pub fn ring_sizes(bench: &Bench) {
    let daemon = bench.start(&crate::support::daemon::Options::default());
    for ring_size in [4, 8, 32, 64, 512, 1024] {
        let mut device = Device::new(&daemon, Setup { ring_size, ..Setup::default() });
        // Several times round the ring.
        for round in 0..u64::from(ring_size.min(64)) * 3 {
            let sector = round % 1000;
            assert_same(&device.read(sector, 1), &pattern(sector, 1), "a sector");
        }
    }
}

pub fn ring_of_one(bench: &Bench) {
    // Only indirect tables fit.
    let (_daemon, mut device) = bench.with(Setup { ring_size: 1, ..Setup::default() });
    let buffer = device.memory.alloc(8192, 4096);
    for sector in 0..5 {
        device.memory.write(buffer, &header(T_IN, sector));
        let segs = [out(buffer, 16), back(buffer + 512, 512), back(buffer + 32, 1)];
        assert_eq!(device.run_segs(&segs, true).0, OK);
        let got = device.memory.read(buffer + 512, 512);
        assert_same(&got, &pattern(sector, 1), "a sector");
    }
}

pub fn indices_wrap(bench: &Bench) {
    // Both indices start just below 65536 and pass it several times a ring.
    let (_daemon, mut device) = bench.with(Setup { base: 65500, ring_size: 16, ..Setup::default() });
    for sector in 0..100 {
        assert_same(&device.read(sector, 1), &pattern(sector, 1), "a sector");
    }
    assert_eq!(device.rings[0].seen, 65500_u16.wrapping_add(100));

    // And the long way round, four at a time, in buffers that stay.
    let ring = &mut device.rings[0];
    let buffer = device.memory.alloc(65536, 4096);
    let place = |index: u64| buffer + index * 8192;
    for round in 0..17_000_u64 {
        for index in 0..4 {
            let at = place(index);
            device.memory.write(at, &header(T_IN, (round + index) % 4096));
            let segs = [out(at, 16), back(at + 512, 512), back(at + 32, 1)];
            let head = ring.chain(&segs);
            ring.stage(head);
        }
        ring.publish();
        ring.kick.signal();
        for _ in 0..4 {
            let used = ring.wait_used("a read past index 65535");
            assert_eq!(used.len, 513);
        }
        if round % 512 == 0 {
            let got = device.memory.read(place(3) + 512, 512);
            assert_same(&got, &pattern((round + 3) % 4096, 1), "a sector");
        }
    }
}

pub fn zero_length_descriptors(bench: &Bench) {
    if bench.deviates("empty descriptors") {
        return;
    }
    let (_daemon, mut device) = bench.plain();
    let buffer = device.memory.alloc(8192, 4096);
    device.memory.write(buffer, &header(T_IN, 9));
    let segs = [
        out(buffer, 16),
        out(buffer, 0),
        back(buffer + 512, 0),
        back(buffer + 512, 512),
        back(buffer + 32, 1),
    ];
    let (status, used) = device.run_segs(&segs, false);
    // Served or refused, but answered, and nothing made up.
    if status == OK {
        assert_eq!(used.len, 513);
        let got = device.memory.read(buffer + 512, 512);
        assert_same(&got, &pattern(9, 1), "a sector");
    }
    device.assert_serves(0);
}
