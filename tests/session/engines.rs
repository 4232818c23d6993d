//! Engines and workers: however the work is spread, it is the same disk.

use std::time::{Duration, Instant};

use super::each_engine;
use crate::support::daemon::{Backend, Daemon, Options};
use crate::support::device::{Device, OK, Setup, T_FLUSH, T_IN, T_OUT};
use crate::support::disk::{Disk, assert_same, salted};

/// Answers everything, touches nothing: for measurements.
#[test]
fn null_engine() {
    let disk = Disk::new();
    let before = disk.read(0, 64);
    let daemon = Daemon::start(Backend::Vublkd("null"), &disk, &Options::default());
    let mut device = Device::plain(&daemon);
    for sector in 0..100 {
        let done = device.run(0, T_IN, sector, &[], 4096);
        assert_eq!((done.status, done.written), (OK, 4097));
        // Nothing of the host may show: zeroes, or what was there before.
        assert_eq!(done.data, [0; 4096]);
        assert_eq!(device.status(T_OUT, sector, &[7; 4096], 0), OK);
    }
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
    assert_eq!(disk.read(0, 64), before);
}

/// Fewer workers than queues, as many, more.
#[test]
fn workers() {
    each_engine(|engine| {
        for workers in [1, 2, 3, 8, 20] {
            let disk = Disk::new();
            let options = Options { queues: Some(8), ..Options::with(&[&format!("--workers={workers}")]) };
            let daemon = Daemon::start(engine, &disk, &options);
            let mut device = Device::new(&daemon, Setup { queues: 8, ..Setup::default() });
            let mut waiting = Vec::new();
            for index in 0..128 {
                let (queue, sector) = (index as usize % 8, index * 16);
                let data = salted(1, sector, 16);
                let pending = device.submit(queue, T_OUT, sector, &data, 0);
                waiting.push((queue, pending));
            }
            for (queue, _) in &waiting {
                device.rings[*queue].wait_used("a write");
            }
            for (_, pending) in &waiting {
                assert_eq!(device.memory.byte(pending.status_at), OK);
            }
            let want = salted(1, 0, 2048);
            assert_same(&disk.read(0, 2048), &want, "all queues' writes");
        }
    });
}

/// A flush covers what was answered before it, on every queue.
#[test]
fn flushes_among_writes() {
    each_engine(|engine| {
        let disk = Disk::new();
        let daemon = Daemon::start(engine, &disk, &Options::default());
        let mut device = Device::new(&daemon, Setup { queues: 2, ring_size: 256, ..Setup::default() });
        for round in 0..20 {
            let mut waiting = Vec::new();
            for index in 0..30 {
                let queue = index as usize % 2;
                let kind = if index % 5 == 4 { T_FLUSH } else { T_OUT };
                let data = if kind == T_OUT { salted(round + 1, index * 8, 8) } else { Vec::new() };
                let sector = if kind == T_OUT { index * 8 } else { 0 };
                waiting.push((queue, device.submit(queue, kind, sector, &data, 0)));
            }
            for (queue, _) in &waiting {
                let used = device.rings[*queue].wait_used("writes and flushes");
                assert_eq!(used.len, 1);
            }
            for (_, pending) in &waiting {
                assert_eq!(device.memory.byte(pending.status_at), OK);
            }
        }
    });
}

/// Many small requests at depth 32 on a busy machine: no stall. Not a
/// benchmark; it finds engines that wait for a timer.
#[test]
fn no_request_waits_for_a_timer() {
    each_engine(|engine| {
        let disk = Disk::new();
        let daemon = Daemon::start(engine, &disk, &Options::default());
        let mut device = Device::plain(&daemon);
        let begun = Instant::now();
        for sector in 0..1000 {
            assert_eq!(device.status(T_IN, sector, &[], 512), OK);
        }
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(8), "1000 reads took {took:?}");
    });
}
