//! Payloads that are aligned to the host's block only in the middle: the middle goes
//! between the guest's memory and the disk without a copy.

use serde_json::json;

use super::{loop_device, start};
use crate::session::each_engine;
use crate::support::control::Control;
use crate::support::daemon::Daemon;
use crate::support::device::{Device, OK, T_IN, T_OUT, header};
use crate::support::disk::{Disk, SECTOR, assert_same, pattern, salted};
use crate::support::ring::{back, out};
use crate::support::sys::Deadline;

/// A transfer that begins `skew` bytes into a page of guest memory.
struct Transfer {
    what: &'static str,
    sector: u64,
    sectors: u64,
    skew: u64,
    /// Blocks of the disk that it only has a part of.
    edges: u64,
}

const TRANSFERS: [Transfer; 3] = [
    Transfer { what: "a ragged end", sector: 8, sectors: 257, skew: 0, edges: 1 },
    Transfer { what: "a ragged start", sector: 1, sectors: 263, skew: 512, edges: 1 },
    Transfer { what: "a ragged start and end", sector: 1, sectors: 264, skew: 512, edges: 2 },
];

/// Runs a read or a write of one segment; gives the guest's buffer afterwards.
#[track_caller]
fn run(device: &mut Device, kind: u32, transfer: &Transfer, data: &[u8]) -> Vec<u8> {
    let memory = device.memory.clone();
    let buffer = memory.alloc(data.len() as u64 + transfer.skew, 4096) + transfer.skew;
    memory.write(buffer, data);
    let middle = if kind == T_OUT { out(buffer, data.len()) } else { back(buffer, data.len()) };
    let head = memory.page_with(&header(kind, transfer.sector));
    let (status, _) = device.run_segs(&[out(head, 16), middle, back(head + 64, 1)], false);
    assert_eq!(status, OK, "{}: status of request type {kind}", transfer.what);
    memory.read(buffer, data.len())
}

/// Pieces that were copied so far, `requests` requests having been answered. A worker
/// adds to the counters after it has returned a request.
#[track_caller]
fn bounced(daemon: &Daemon, requests: u64) -> u64 {
    let mut control = Control::of(daemon);
    Deadline::new(format!("{requests} requests to be counted")).until_slowly(|| {
        let status = control.call("status", json!({})).unwrap();
        let counter = |name: &str| status["counters"][name].as_u64().unwrap();
        (counter("requests") >= requests).then(|| counter("bounced"))
    })
}

/// The pool has one chunk of 4096 bytes, so each block that is copied is one piece.
#[test]
fn only_the_ragged_edges_of_a_payload_are_copied() {
    let test = "only_the_ragged_edges_of_a_payload_are_copied";
    each_engine(|engine| {
        let disk = Disk::new();
        let Some(store) = loop_device(test, &disk.path, 4096) else { return };
        let extra = ["--logical-block-size=512", "--pool-chunk-len=4096", "--pool-chunks=1"];
        let daemon = start(engine, disk.dir.path(), &store.path, &extra);
        let mut device = Device::plain(&daemon);
        let (mut requests, mut copied) = (0, 0);
        let mut told = Vec::new();
        for (generation, transfer) in (1..).zip(&TRANSFERS) {
            let Transfer { what, sector, sectors, edges, .. } = *transfer;
            let data = salted(generation, sector, sectors);
            let end = sector + sectors;
            let neighbours = device_reads(&mut device, &[sector - 1, end]);
            requests += 2;
            copied = bounced(&daemon, requests).max(copied);
            for kind in [T_OUT, T_IN] {
                let buffer = if kind == T_OUT { data.clone() } else { vec![0; data.len()] };
                let buffer = run(&mut device, kind, transfer, &buffer);
                assert_same(&buffer, &data, what);
                requests += 1;
                let now = bounced(&daemon, requests);
                told.push((what, kind, now - copied, edges));
                copied = now;
            }
            assert_eq!(device_reads(&mut device, &[sector - 1, end]), neighbours, "{what}: its neighbours");
            requests += 2;
            copied = bounced(&daemon, requests);
        }
        for (what, kind, pieces, edges) in told {
            assert!(
                (1..=edges).contains(&pieces),
                "{what}, request type {kind}: {pieces} pieces were copied, it has {edges} edges"
            );
        }
        assert_same(&device.read(2048, 8), &pattern(2048, 8), "far behind");
    });
}

/// These sectors, each by a read of its own.
fn device_reads(device: &mut Device, sectors: &[u64]) -> Vec<u8> {
    let read = |sector: &u64| device.run(0, T_IN, *sector, &[], SECTOR).data;
    sectors.iter().flat_map(read).collect()
}
