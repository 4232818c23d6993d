//! Chains no driver should build. vublkd gives the head back unserved (length
//! 0, or a status of IOERR where there is a place for one) and the queue goes
//! on; nothing of the disk changes.

use super::Bench;
use crate::support::daemon::Daemon;
use crate::support::device::{Device, IOERR, Setup, T_IN, T_OUT, UNSUPP, UNWRITTEN, header};
use crate::support::dice::Dice;
use crate::support::disk::{assert_same, pattern};
use crate::support::frontend::feature;
use crate::support::ring::{Desc, INDIRECT, NEXT, WRITE, back, out};

/// A device that goes on after a malformed chain; None for the oracle.
fn device(bench: &Bench) -> Option<(Daemon, Device)> {
    (!bench.deviates("malformed")).then(|| bench.plain())
}

/// Offers a head, expects it back unserved, and the queue in order.
#[track_caller]
fn refused(device: &mut Device, head: u16, status_at: Option<u64>, what: &str) {
    if let Some(at) = status_at {
        device.memory.write(at, &[UNWRITTEN]);
    }
    device.rings[0].offer(head);
    let used = device.rings[0].wait_used(what);
    assert_eq!(used.head, head, "{what}: head");
    match (used.len, status_at) {
        (0, _) => {}
        (1, Some(at)) => {
            let status = device.memory.byte(at);
            assert!(status == IOERR || status == UNSUPP, "{what}: status {status}");
        }
        (len, _) => panic!("{what}: used length {len}"),
    }
    device.assert_serves(0);
}

fn link(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

pub fn loops(bench: &Bench) {
    let Some((_daemon, mut device)) = device(bench) else {
        return;
    };
    let at = device.memory.page_with(&header(T_IN, 0));
    // A descriptor that follows itself.
    let head = device.rings[0].raw(link(at, 16, NEXT, 0));
    device.rings[0].write_desc(head, link(at, 16, NEXT, head));
    refused(&mut device, head, None, "a chain of one in a circle");
    // Two that follow each other, writable ones.
    let other = device.rings[0].take_desc();
    let head = device.rings[0].raw(link(at, 16, NEXT, other));
    device.rings[0].write_desc(other, link(at + 512, 512, NEXT | WRITE, head));
    refused(&mut device, head, None, "a chain of two in a circle");
    // Empty ones: no byte count ever ends it.
    let head = device.rings[0].raw(link(at, 0, NEXT, 0));
    device.rings[0].write_desc(head, link(at, 0, NEXT, head));
    refused(&mut device, head, None, "an empty circle");
    // Inside an indirect table.
    let mut table = link(at, 16, NEXT, 1).bytes().to_vec();
    table.extend(link(at + 512, 512, NEXT | WRITE, 0).bytes());
    let table_at = device.memory.page_with(&table);
    let head = device.rings[0].indirect_table(table_at, table.len());
    refused(&mut device, head, None, "a circle in an indirect table");
}

pub fn links_out_of_range(bench: &Bench) {
    let Some((_daemon, mut device)) = device(bench) else {
        return;
    };
    let at = device.memory.page_with(&header(T_IN, 0));
    for next in [128, 129, 1024, u16::MAX] {
        let head = device.rings[0].raw(link(at, 16, NEXT, next));
        refused(&mut device, head, None, "a link past the table");
    }
    for next in [2, 3, u16::MAX] {
        let mut table = link(at, 16, NEXT, next).bytes().to_vec();
        table.extend(link(at + 64, 1, WRITE, 0).bytes());
        let table_at = device.memory.page_with(&table);
        let head = device.rings[0].indirect_table(table_at, table.len());
        refused(&mut device, head, None, "a link past the indirect table");
    }
}

pub fn heads_out_of_range(bench: &Bench) {
    let Some((mut daemon, mut device)) = device(bench) else {
        return;
    };
    // There is no such head to give back: the ring may stop, or skip it; the
    // daemon lives and serves the next front-end.
    device.rings[0].stage(128);
    device.rings[0].stage(u16::MAX);
    device.rings[0].publish();
    device.rings[0].kick.signal();
    device.frontend.sync();
    let base = device.frontend.vring_base(0).unwrap();
    let ahead = base.wrapping_sub(device.rings[0].seen);
    assert!(ahead <= 2, "the ring stands at {base}");
    assert!(device.rings[0].used_idx().wrapping_sub(device.rings[0].seen) <= 2);
    drop(device);
    Device::plain(&daemon).assert_serves(0);
    daemon.assert_alive();
}

pub fn nested_indirect(bench: &Bench) {
    let Some((_daemon, mut device)) = device(bench) else {
        return;
    };
    let at = device.memory.page_with(&header(T_IN, 0));
    let inner_at = device.memory.page_with(&link(at + 64, 1, WRITE, 0).bytes());
    let mut table = link(at, 16, NEXT, 1).bytes().to_vec();
    table.extend(link(inner_at, 16, INDIRECT, 0).bytes());
    let table_at = device.memory.page_with(&table);
    let head = device.rings[0].indirect_table(table_at, table.len());
    refused(&mut device, head, None, "a table in a table");
    // A table that names itself.
    let table_at = device.memory.alloc(16, 16);
    let own = link(table_at, 16, INDIRECT, 0);
    device.memory.write(table_at, &own.bytes());
    let head = device.rings[0].indirect_table(table_at, 16);
    refused(&mut device, head, None, "a table that names itself");
}

pub fn indirect_of_odd_size(bench: &Bench) {
    let Some((_daemon, mut device)) = device(bench) else {
        return;
    };
    let at = device.memory.page_with(&header(T_IN, 0));
    let mut table = link(at, 16, NEXT, 1).bytes().to_vec();
    table.extend(link(at + 64, 1, WRITE, 0).bytes());
    let table_at = device.memory.page_with(&table);
    for len in [0, 1, 15, 17, 31] {
        let head = device.rings[0].indirect_table(table_at, len);
        refused(&mut device, head, None, &format!("a table of {len} bytes"));
    }
    // 65536 entries and more: `next` cannot even name them.
    let head = device.rings[0].indirect_table(table_at, 32 << 20);
    device.rings[0].offer(head);
    let used = device.rings[0].wait_used("a table of 32 MiB");
    assert_eq!(used.head, head);
    device.assert_serves(0);
    for table_at in [0, 1 << 60, u64::MAX - 15] {
        let head = device.rings[0].indirect_table(table_at, 32);
        refused(&mut device, head, None, "a table outside memory");
    }
}

pub fn indirect_with_next(bench: &Bench) {
    let Some((_daemon, mut device)) = device(bench) else {
        return;
    };
    // 2.7.5.3.1: a driver must not set both flags.
    let at = device.memory.page_with(&header(T_IN, 0));
    let mut table = link(at, 16, NEXT, 1).bytes().to_vec();
    table.extend(link(at + 512, 512, WRITE, 0).bytes());
    let table_at = device.memory.page_with(&table);
    let tail = device.rings[0].take_desc();
    device.rings[0].write_desc(tail, link(at + 64, 1, WRITE, 0));
    let head = device.rings[0].raw(link(table_at, 32, INDIRECT | NEXT, tail));
    refused(&mut device, head, Some(at + 64), "INDIRECT and NEXT");
}

pub fn indirect_not_negotiated(bench: &Bench) {
    if bench.deviates("malformed") {
        return;
    }
    let (_daemon, mut device) = bench.with(Setup { without: feature::INDIRECT_DESC, ..Setup::default() });
    let at = device.memory.page_with(&header(T_IN, 0));
    let segs = [out(at, 16), back(at + 512, 512), back(at + 64, 1)];
    let head = device.rings[0].indirect(&segs);
    refused(&mut device, head, Some(at + 64), "a table without the feature");
    assert_eq!(device.memory.read(at + 512, 512), [0; 512], "nothing read");
}

pub fn readable_after_writable(bench: &Bench) {
    let Some((_daemon, mut device)) = device(bench) else {
        return;
    };
    let at = device.memory.page_with(&header(T_OUT, 0));
    device.memory.write(at + 512, &[7; 512]);
    for indirect in [false, true] {
        let chains = [
            [out(at, 16), back(at + 64, 1), out(at + 512, 512)],
            [back(at + 64, 1), out(at, 16), out(at + 512, 512)],
            [back(at + 64, 1), out(at, 528), back(at + 65, 1)],
        ];
        for segs in chains {
            let ring = &mut device.rings[0];
            let head = if indirect { ring.indirect(&segs) } else { ring.chain(&segs) };
            refused(&mut device, head, Some(at + 64), "readable after writable");
        }
    }
    assert_same(&bench.stored().read(0, 8), &pattern(0, 8), "nothing was written");
}

pub fn no_status_byte(bench: &Bench) {
    let Some((_daemon, mut device)) = device(bench) else {
        return;
    };
    for kind in [T_OUT, 4, 8, 99] {
        let at = device.memory.page_with(&header(kind, 0));
        let head = device.rings[0].chain(&[out(at, 16)]);
        refused(&mut device, head, None, "no status byte");
        let head = device.rings[0].chain(&[out(at, 16), out(at, 512)]);
        refused(&mut device, head, None, "no status byte after data");
        let head = device.rings[0].chain(&[out(at, 16), back(at + 64, 0)]);
        refused(&mut device, head, None, "an empty status descriptor");
    }
    assert_same(&bench.stored().read(0, 8), &pattern(0, 8), "nothing was written");
}

pub fn short_header(bench: &Bench) {
    let Some((_daemon, mut device)) = device(bench) else {
        return;
    };
    let at = device.memory.page_with(&header(T_IN, 0));
    for len in [0, 1, 4, 8, 15] {
        let head = device.rings[0].chain(&[out(at, len), back(at + 64, 1)]);
        refused(&mut device, head, Some(at + 64), "a short header");
    }
    let head = device.rings[0].chain(&[back(at + 512, 512), back(at + 64, 1)]);
    refused(&mut device, head, Some(at + 64), "no header at all");
    let head = device.rings[0].chain(&[back(at + 64, 1)]);
    refused(&mut device, head, Some(at + 64), "a lone status byte");
}

pub fn outside_memory(bench: &Bench) {
    let Some((_daemon, mut device)) = device(bench) else {
        return;
    };
    let at = device.memory.page_with(&header(T_IN, 0));
    let region = &device.memory.regions[0];
    let end = region.guest + region.len;
    for (addr, len) in [
        (0, 512),
        (end, 512),
        (end - 256, 512),
        (1 << 62, 512),
        (u64::MAX - 511, 512),
        (u64::MAX - 100, 512),
        (end - 4096, 1 << 30),
    ] {
        let head = device.rings[0].chain(&[out(at, 16), back(addr, len), back(at + 64, 1)]);
        refused(&mut device, head, Some(at + 64), "data outside memory");
    }
    for addr in [0, end, end - 8, 1 << 62, u64::MAX - 15, u64::MAX - 3] {
        let head = device.rings[0].chain(&[out(addr, 16), back(at + 512, 512), back(at + 64, 1)]);
        refused(&mut device, head, Some(at + 64), "header outside memory");
    }
    for addr in [0, end, u64::MAX] {
        let head = device.rings[0].chain(&[out(at, 16), back(at + 512, 512), back(addr, 1)]);
        refused(&mut device, head, None, "status outside memory");
    }
}

pub fn too_long(bench: &Bench) {
    let Some((_daemon, mut device)) = device(bench) else {
        return;
    };
    // Every address is fine, the sum passes 4 GiB: 70 times 60 MiB.
    let region = &device.memory.regions[0];
    let (start, len) = (region.guest, 60 << 20);
    let at = device.memory.page_with(&header(T_IN, 0));
    let mut segs = vec![out(at, 16)];
    segs.extend((0..70).map(|_| out(start, len)));
    segs.push(back(at + 64, 1));
    let head = device.rings[0].chain(&segs);
    refused(&mut device, head, Some(at + 64), "a chain of 4 GiB");
    // A chain longer than the ring, all of it legal but the length.
    let table: Vec<u8> = (0..2000_u16)
        .flat_map(|index| link(at, 16, NEXT, index + 1).bytes())
        .chain(link(at + 64, 1, WRITE, 0).bytes())
        .collect();
    let table_at = device.memory.page_with(&table);
    let head = device.rings[0].indirect_table(table_at, table.len());
    refused(&mut device, head, Some(at + 64), "a table of 2001 entries");
}

pub fn avail_index_too_far(bench: &Bench) {
    let Some((mut daemon, mut device)) = device(bench) else {
        return;
    };
    // More heads than the ring has: a broken driver. The queue may stop; it
    // must neither spin nor take the daemon along.
    let ring = &mut device.rings[0];
    ring.memory.store16(ring.avail + 2, 60_000);
    ring.kick.signal();
    device.frontend.sync();
    drop(device);
    Device::plain(&daemon).assert_serves(0);
    daemon.assert_alive();
}

pub fn a_storm_of_nonsense(bench: &Bench) {
    let Some((mut daemon, mut device)) = device(bench) else {
        return;
    };
    // Reads only, so that the disk must be unchanged in the end; every field
    // of every descriptor is random, mostly near the truth.
    let mut dice = Dice::new(0x1234_5678_9abc_def1);
    let at = device.memory.alloc(1 << 20, 4096);
    for _ in 0..3000 {
        device.memory.write(at, &header(T_IN, dice.below(5000)));
        let ring = &mut device.rings[0];
        let head = ring.raw(link(at, 16, NEXT, 0));
        for index in 0..ring.size {
            let addr = match dice.below(8) {
                0 => dice.roll(),
                1 => at,
                _ => at + dice.below(1 << 20),
            };
            let len = match dice.below(6) {
                0 => dice.roll() as u32,
                1 => 512,
                2 => 1,
                3 => 16,
                _ => dice.below(8192) as u32,
            };
            let flags = match dice.below(5) {
                0 => dice.below(8) as u16,
                1 => WRITE,
                _ => NEXT | WRITE,
            };
            let next = match dice.below(10) {
                0 => dice.roll() as u16,
                _ => dice.below(128) as u16,
            };
            ring.write_desc(index, link(addr, len, flags, next));
        }
        let first = dice.below(128) as u16;
        ring.write_desc(head, link(at, 16, NEXT, first));
        ring.offer(head);
        let used = ring.wait_used("an answer to a random chain");
        assert_eq!(used.head, head);
    }
    assert_same(&bench.stored().read(0, 4096), &pattern(0, 4096), "the disk");
    device.assert_serves(0);
    daemon.assert_alive();
    // None of it may flood the log.
    let lines = daemon.log().lines().count();
    assert!(lines < 500, "{lines} lines in the log after the storm");
    let base = device.frontend.vring_base(0).unwrap();
    assert_eq!(base, device.rings[0].used_idx(), "where the queue stopped");
}
