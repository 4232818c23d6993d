//! Plugging: requests that follow each other on the disk are one operation for
//! the kernel, and each its own for the guest.

use std::fs::OpenOptions;

use super::each_engine;
use crate::support::daemon::{Daemon, Options};
use crate::support::device::{Device, IOERR, OK, Outcome, Pending, Setup, T_IN, T_OUT};
use crate::support::disk::{Disk, SECTOR, assert_same, pattern, salted};

/// Sectors of one request.
const EACH: u64 = 8;
const COUNT: u64 = 40;

/// Requests that the device finds all at once, and how each of them ended.
#[track_caller]
fn batch(device: &mut Device, kind: u32, sectors: &[u64], data: impl Fn(u64) -> Vec<u8>) -> Vec<Outcome> {
    let back = if kind == T_IN { EACH as usize * SECTOR } else { 0 };
    let mut waiting: Vec<Option<Pending>> = Vec::new();
    for &sector in sectors {
        let (segs, mut pending) = device.place(kind, sector, &data(sector), back);
        pending.head = device.rings[0].chain(&segs);
        device.rings[0].stage(pending.head);
        waiting.push(Some(pending));
    }
    device.rings[0].publish();
    device.rings[0].kick.signal();
    let mut outcomes: Vec<Option<Outcome>> = sectors.iter().map(|_| None).collect();
    for _ in sectors {
        let used = device.rings[0].wait_used("a request of a batch");
        let at = waiting.iter().position(|p| p.as_ref().is_some_and(|p| p.head == used.head)).unwrap();
        let pending = waiting[at].take().unwrap();
        outcomes[at] = Some(device.outcome(&pending, used));
    }
    outcomes.into_iter().map(Option::unwrap).collect()
}

fn counted(log: &str, name: &str) -> u64 {
    let text = log.rsplit_once(&format!("{name}=")).unwrap_or_else(|| panic!("no {name} in:\n{log}")).1;
    text.split_whitespace().next().unwrap().parse().unwrap()
}

fn deep() -> Setup {
    Setup { ring_size: 256, ..Setup::default() }
}

#[test]
fn adjacent_requests_are_one_operation() {
    each_engine(|engine| {
        let disk = Disk::new();
        let mut daemon = Daemon::start(engine, &disk, &Options::default());
        let mut device = Device::new(&daemon, deep());
        let forward: Vec<u64> = (0..COUNT).map(|i| i * EACH).collect();
        let written = batch(&mut device, T_OUT, &forward, |sector| salted(1, sector, EACH));
        assert!(written.iter().all(|o| o.status == OK && o.written == 1));
        assert_same(&disk.read(0, COUNT * EACH), &salted(1, 0, COUNT * EACH), "in the file");
        let read = batch(&mut device, T_IN, &forward, |_| Vec::new());
        for (outcome, sector) in read.iter().zip(&forward) {
            assert_eq!((outcome.status, outcome.written), (OK, EACH as u32 * 512 + 1));
            assert_same(&outcome.data, &salted(1, *sector, EACH), "read");
        }
        // Backwards, and with gaps: nothing to join, and nothing mixed up.
        let others: Vec<u64> = forward.iter().rev().map(|s| s * 2 + 1000).collect();
        batch(&mut device, T_OUT, &others, |sector| salted(2, sector, EACH));
        for sector in others {
            assert_same(&disk.read(sector, EACH), &salted(2, sector, EACH), "apart");
        }
        drop(device);
        daemon.stop();
        let merged = counted(&daemon.log(), "merged");
        assert!((2..2 * COUNT).contains(&merged), "merged {merged} of {}", 2 * COUNT);
    });
}

#[test]
fn without_plugging_nothing_is_joined() {
    each_engine(|engine| {
        let disk = Disk::new();
        let mut daemon = Daemon::start(engine, &disk, &Options::with(&["--plug=off"]));
        let mut device = Device::new(&daemon, deep());
        let sectors: Vec<u64> = (0..COUNT).map(|i| i * EACH).collect();
        for outcome in batch(&mut device, T_IN, &sectors, |_| Vec::new()) {
            assert_eq!(outcome.status, OK);
        }
        drop(device);
        daemon.stop();
        assert_eq!(counted(&daemon.log(), "merged"), 0);
    });
}

/// A joined operation that the disk cuts short: what is there is read, and only
/// the requests that are beyond the end fail.
#[test]
fn each_request_of_a_joined_operation_has_its_own_status() {
    each_engine(|engine| {
        let disk = Disk::new();
        let daemon = Daemon::start(engine, &disk, &Options::default());
        let mut device = Device::new(&daemon, deep());
        let left = COUNT / 2;
        let file = OpenOptions::new().write(true).open(&disk.path).unwrap();
        file.set_len(left * EACH * SECTOR as u64).unwrap();
        let sectors: Vec<u64> = (0..COUNT).map(|i| i * EACH).collect();
        let outcomes = batch(&mut device, T_IN, &sectors, |_| Vec::new());
        for (at, outcome) in outcomes.iter().enumerate() {
            if (at as u64) < left {
                assert_eq!(outcome.status, OK, "request {at}");
                assert_same(&outcome.data, &pattern(sectors[at], EACH), "what is there");
            } else {
                assert_eq!(outcome.status, IOERR, "request {at}");
            }
        }
        device.assert_serves(0);
    });
}
