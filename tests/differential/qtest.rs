//! The six cases of QEMU's own test of vhost-user-blk back-ends, told anew
//! for a raw front-end (there: basic, indirect, idx, nxvirtq, hotplug,
//! multiqueue).

use super::Bench;
use crate::support::daemon::Options;
use crate::support::device::{
    Device, IOERR, OK, Setup, T_DISCARD, T_IN, T_OUT, T_WRITE_ZEROES, UNSUPP, header, negotiate, range,
};
use crate::support::disk::{assert_same, pattern, salted};
use crate::support::frontend::{feature, msg};
use crate::support::ring::{back, out};
use std::time::Duration;

/// What a discard or write-zeroes request must refuse.
fn bad_ranges(bench: &Bench, device: &mut Device, kind: u32) {
    let two = [range(0, 1, 0), range(1, 1, 0)].concat();
    let config = device.frontend.config(0, 60).unwrap();
    // Where the config space has the largest number of segments.
    let at = if kind == T_DISCARD { 40 } else { 52 };
    let offered = u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    let status = device.status(kind, 0, &two, 0);
    if bench.deviates("segments") || offered == 1 {
        assert_eq!(offered, 1);
        assert_eq!(status, UNSUPP, "two segments where one is offered");
    } else {
        assert_eq!(status, OK, "two of {offered} segments");
        let many: Vec<u8> = (0..=u64::from(offered)).flat_map(|index| range(index * 8, 1, 0)).collect();
        assert_eq!(device.status(kind, 0, &many, 0), UNSUPP, "one too many");
        let most = &many[..many.len() - 16];
        assert_eq!(device.status(kind, 0, most, 0), OK, "as many as offered");
        // One bad range spoils the request, wherever it stands.
        for bad in [range(1 << 40, 1, 0), range(0, u32::MAX, 0)] {
            for ranges in [[range(0, 1, 0), bad.clone()], [bad.clone(), range(0, 1, 0)]] {
                let status = device.status(kind, 0, &ranges.concat(), 0);
                assert_eq!(status, IOERR, "a bad range among good ones");
            }
        }
    }
    let end = bench.disk.sectors;
    for (bad, what) in [
        (range(0, u32::MAX, 0), "too long"),
        (range(end + 1, 1, 0), "past the end"),
        (range(end, 1, 0), "at the end"),
        (range(end - 1, 2, 0), "over the end"),
        (range(u64::MAX, 1, 0), "overflowing"),
        (range(1 << 55, 8, 0), "overflowing in bytes"),
    ] {
        assert_eq!(device.status(kind, 0, &bad, 0), IOERR, "{what}");
    }
    for flags in [!1, 2, 1 << 31] {
        let status = device.status(kind, 0, &range(0, 1, flags), 0);
        assert_eq!(status, UNSUPP, "unknown flags {flags:#x}");
    }
    // Half a range, and none.
    for len in [8, 15, 24] {
        let status = device.status(kind, 0, &vec![0; len], 0);
        assert_ne!(status, OK, "{len} bytes of ranges");
    }
}

pub fn basic(bench: &Bench) {
    let (_daemon, mut device) =
        bench.with(Setup { without: feature::INDIRECT_DESC | feature::EVENT_IDX, ..Setup::default() });
    let capacity = device.frontend.config(0, 8).unwrap();
    assert_eq!(capacity, bench.disk.sectors.to_le_bytes());
    // Three descriptors.
    let data = salted(1, 0, 1);
    device.write(0, &data);
    assert_same(&device.read(0, 1), &data, "sector 0");
    let done = device.run(0, T_WRITE_ZEROES, 0, &range(0, 1, 0), 0);
    assert_eq!(done.status, OK);
    assert_eq!(device.read(0, 1), [0; 512], "write-zeroes did");
    bad_ranges(bench, &mut device, T_WRITE_ZEROES);
    if device.features & feature::DISCARD != 0 {
        assert_eq!(device.status(T_DISCARD, 0, &range(0, 1, 0), 0), OK);
        bad_ranges(bench, &mut device, T_DISCARD);
    }
    // Two descriptors: 16 + 512 bytes out, 512 + 1 bytes back.
    let data = salted(2, 1, 1);
    let at = device.memory.alloc(4096, 4096);
    device.memory.write(at, &header(T_OUT, 1));
    device.memory.write(at + 16, &data);
    let (status, used) = device.run_segs(&[out(at, 528), back(at + 528, 1)], false);
    assert_eq!((status, used.len), (OK, 1));
    device.memory.write(at, &header(T_IN, 1));
    let (status, used) = device.run_segs(&[out(at, 16), back(at + 16, 513)], false);
    assert_eq!((status, used.len), (OK, 513));
    assert_same(&device.memory.read(at + 16, 512), &data, "sector 1");
}

pub fn indirect(bench: &Bench) {
    let (_daemon, mut device) = bench.with(Setup { without: feature::EVENT_IDX, ..Setup::default() });
    assert_ne!(device.features & feature::INDIRECT_DESC, 0);
    let data = salted(3, 0, 1);
    let at = device.memory.alloc(4096, 4096);
    device.memory.write(at, &header(T_OUT, 0));
    device.memory.write(at + 16, &data);
    let (status, used) = device.run_segs(&[out(at, 528), back(at + 528, 1)], true);
    assert_eq!((status, used.len), (OK, 1));
    device.memory.write(at, &header(T_IN, 0));
    device.memory.write(at + 16, &[0; 512]);
    let (status, used) = device.run_segs(&[out(at, 16), back(at + 16, 513)], true);
    assert_eq!((status, used.len), (OK, 513));
    assert_same(&device.memory.read(at + 16, 512), &data, "sector 0");
}

pub fn idx(bench: &Bench) {
    let (_daemon, mut device) = bench.with(Setup { without: feature::INDIRECT_DESC, ..Setup::default() });
    device.rings[0].call.wait("the signal that follows SET_VRING_CALL");
    let first = device.submit(0, T_OUT, 0, &salted(4, 0, 1), 0);
    let used = device.rings[0].spin_used("the first write");
    assert_eq!(device.outcome(&first, used).status, OK);
    device.rings[0].call.wait("the signal of the first write");

    // Signal only after the third request.
    device.rings[0].set_used_event(2);
    let data = salted(4, 1, 1);
    let write = device.submit(0, T_OUT, 1, &data, 0);
    let used = device.rings[0].spin_used("the second write");
    assert_eq!(device.outcome(&write, used).status, OK);
    device.rings[0].assert_quiet(Duration::from_millis(50), "after the second");

    let read = device.submit(0, T_IN, 1, &[], 512);
    assert_eq!(device.rings[0].call.wait("the signal after the third"), 1);
    let used = device.rings[0].take_used().expect("signal before used index");
    assert_same(&device.outcome(&read, used).data, &data, "sector 1");
}

/// Naming a queue that does not exist must not harm anybody: the message is
/// refused or ignored, at most that connection ends.
pub fn non_existent_queue(bench: &Bench) {
    let mut daemon = bench.start(&Options { queues: Some(2), ..Options::default() });
    for queue in [2, 3, 255, 256, 1000, u32::MAX] {
        let messages = [msg::SET_VRING_NUM, msg::SET_VRING_BASE, msg::SET_VRING_ENABLE, msg::GET_VRING_BASE];
        if bench.deviates("non-existent queue") {
            break;
        }
        for message in messages {
            let mut frontend = daemon.connect();
            negotiate(&mut frontend, 0);
            let payload = [queue.to_le_bytes(), 1_u32.to_le_bytes()].concat();
            let _ = frontend.send(message, 0, &payload, &[]);
        }
        let mut frontend = daemon.connect();
        negotiate(&mut frontend, 0);
        let mut payload = vec![0; 40];
        payload[..4].copy_from_slice(&queue.to_le_bytes());
        let _ = frontend.send(msg::SET_VRING_ADDR, 0, &payload, &[]);
    }
    // A queue that exists but was never set up can be asked for its base.
    let mut device = Device::plain(&daemon);
    assert_eq!(device.frontend.ask64(msg::GET_QUEUE_NUM), 2);
    device.assert_serves(0);
    daemon.assert_alive();
}

pub fn hot_plug(bench: &Bench) {
    let (_daemon, mut device) = bench.plain();
    let other = bench.another(32 << 20);
    for round in 0..3 {
        // A second disk comes and goes while the first one works.
        let busy = device.submit(0, T_IN, 0, &[], 65536);
        let mut daemon = other.start(&Options::default());
        let mut second = Device::plain(&daemon);
        let capacity = second.frontend.config(0, 8).unwrap();
        assert_eq!(capacity, (65536_u64).to_le_bytes());
        second.write(8, &salted(round + 1, 8, 8));
        assert_same(&second.read(8, 8), &salted(round + 1, 8, 8), "second disk");
        let used = device.rings[0].wait_used("the first disk");
        assert_eq!(device.outcome(&busy, used).status, OK);
        drop(second);
        daemon.stop();
        assert_same(&device.read(8, 8), &pattern(8, 8), "first disk");
    }
}

pub fn eight_queues(bench: &Bench) {
    let daemon = bench.start(&Options { queues: Some(8), ..Options::default() });
    let mut device = Device::new(&daemon, Setup { queues: 8, ..Setup::default() });
    assert_ne!(device.features & feature::MQ, 0, "MQ is offered");
    let config = device.frontend.config(0, 36).unwrap();
    assert_eq!(config[34..36], 8_u16.to_le_bytes());
    assert_eq!(device.frontend.ask64(msg::GET_QUEUE_NUM), 8);
    // All at once, 16 on each.
    for round in 0..8 {
        let mut waiting = Vec::new();
        for queue in 0..8 {
            for index in 0..16 {
                let sector = 2048 + (queue as u64 * 16 + index) * 8;
                let data = salted(round + 1, sector, 8);
                let pending = device.submit(queue, T_OUT, sector, &data, 0);
                waiting.push((queue, pending.head, pending));
            }
        }
        for (queue, ..) in &waiting {
            device.rings[*queue].wait_used("a write on one of eight queues");
        }
        for (.., pending) in &waiting {
            assert_eq!(device.memory.byte(pending.status_at), OK);
        }
    }
    let want = salted(8, 2048, 1024);
    assert_same(&bench.stored().read(2048, 1024), &want, "in the file");
    for queue in 0..8 {
        device.assert_serves(queue);
    }
}
