//! What limits owe and what they do not: changes while much is owed, requests that grow, sizes that differ.

use super::*;
use crate::support::device::{Pending, T_DISCARD, T_FLUSH, UNWRITTEN, range};
use crate::support::frontend::msg;
use crate::support::ring::{Desc, NEXT, WRITE};

/// Bytes of a write that, at a KiB a second, is owed for minutes.
const LARGE: usize = 256 * K;
const MINUTES: &str = "--bps-write=1k";

/// A write that is done, and one behind it that waits for minutes.
fn two_writes(device: &mut Device, daemon: &Daemon) -> Pending {
    let first = device.submit(0, T_OUT, 0, &[1; LARGE], 0);
    let used = device.rings[0].wait_used("a write into an empty bucket");
    assert_eq!(device.outcome(&first, used).status, OK);
    let second = device.submit(0, T_OUT, 1024, &[2; 512], 0);
    assert_waits(device, daemon, &second);
    second
}

/// Nothing is in flight, and the request has no answer, once the daemon has looked at it again.
#[track_caller]
fn assert_waits(device: &mut Device, daemon: &Daemon, pending: &Pending) {
    settle(daemon);
    // Another queue of the same worker has its answer.
    assert_eq!(device.run(1, T_IN, 8, &[], 512).status, OK);
    let status = Control::of(daemon).call("status", json!({})).unwrap();
    assert_eq!(status["disk"]["in_flight"], 0, "{status}");
    assert_eq!(device.memory.byte(pending.status_at), UNWRITTEN);
}

fn three_queues(engine: Backend, options: &[&str]) -> (Disk, Daemon, Device) {
    let disk = empty_disk();
    let options: Vec<_> = options.iter().copied().chain(["--workers=1"]).collect();
    let daemon = Daemon::start(engine, &disk, &Options::with(&options));
    let device = Device::new(&daemon, wide(3));
    (disk, daemon, device)
}

/// What is owed is not forgiven by a change: neither of another limit nor to a slower rate. A faster one is waited for
/// at that rate.
#[test]
fn a_change_forgives_nothing() {
    each_engine(|engine| {
        let (_disk, mut daemon, mut device) = three_queues(engine, &[MINUTES]);
        let pending = two_writes(&mut device, &daemon);
        for change in
            [json!({"iops_read": 100_000}), json!({"bps_write": 512}), json!({"bps_write_max": 1024})]
        {
            Control::of(&daemon).call("throttle", change).unwrap();
            assert_waits(&mut device, &daemon, &pending);
        }
        let began = Instant::now();
        Control::of(&daemon).call("throttle", json!({"bps_write": LARGE, "bps_write_max": 0})).unwrap();
        let used = device.rings[0].wait_used("a write that is owed less");
        assert_eq!(device.outcome(&pending, used).status, OK);
        let took = began.elapsed();
        // A second, less the twentieth that the bucket holds and what leaked.
        assert!(took >= Duration::from_millis(800), "{took:?}");
        drop(device);
        daemon.stop();
    });
}

/// Flushes are not limited, discards are.
#[test]
fn flushes_and_discards() {
    each_engine(|engine| {
        let (_disk, mut daemon, mut device) = three_queues(engine, &["--iops-write=1", MINUTES]);
        let _waits = two_writes(&mut device, &daemon);
        assert_eq!(device.run(1, T_FLUSH, 0, &[], 0).status, OK);
        let discards: Vec<_> = (0..3).map(|_| device.submit(1, T_DISCARD, 0, &range(0, 8, 0), 0)).collect();
        // The worker has seen them once it has answered another queue.
        assert_eq!(device.run(2, T_FLUSH, 0, &[], 0).status, OK);
        let answered = |at: &Pending| device.memory.byte(at.status_at) != UNWRITTEN;
        assert!(discards.iter().filter(|at| answered(at)).count() <= 2, "three requests at one a second");
        Control::of(&daemon).call("throttle", json!({"iops_write": 0})).unwrap();
        for _ in discards {
            device.rings[1].wait_used("a discard, whose bytes do not count");
        }
        drop(device);
        daemon.stop();
    });
}

/// A queue that ends keeps no other waiting for what it had asked for, not even one that waited behind it.
#[test]
fn a_queue_that_ends_leaves_nothing_behind() {
    for workers in ["--workers=1", "--workers=2"] {
        let disk = empty_disk();
        let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--bps-write=256k", workers]));
        let mut device = Device::new(&daemon, wide(4));
        let began = Instant::now();
        assert_eq!(device.run(1, T_OUT, 0, &[1; LARGE], 0).status, OK);
        // It waits for a second, and the other one, which has had more, for sixteen more.
        let first = device.submit(0, T_OUT, 0, &vec![2; 4 << 20], 0);
        assert_eq!(device.run(2, T_FLUSH, 0, &[], 0).status, OK);
        let second = device.submit(1, T_OUT, 0, &[3; 512], 0);
        assert_eq!(device.run(3, T_FLUSH, 0, &[], 0).status, OK);
        device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 0);
        settle(&daemon);
        let used = device.rings[1].wait_used("a write behind one that is not there any more");
        assert_eq!(device.outcome(&second, used).status, OK);
        let took = began.elapsed();
        assert!(took < Duration::from_secs(8), "{workers}: {took:?}");
        assert_eq!(device.memory.byte(first.status_at), UNWRITTEN, "its queue was stopped in {took:?}");
        drop(device);
        daemon.stop();
    }
}

/// A driver that puts a larger request in the place of one that waits is charged for the larger one.
#[test]
fn a_request_that_grows_while_it_waits() {
    let (_disk, mut daemon, mut device) = three_queues(URING, &["--bps-read=1M"]);
    let began = Instant::now();
    assert_eq!(device.run(0, T_IN, 0, &[], 1 << 20).status, OK);
    let (small, pending) = device.place(T_IN, 0, &[], 512);
    let large = device.memory.alloc(1 << 20, 4096);
    let head = device.rings[0].chain(&small);
    device.rings[0].offer(head);
    // It was fetched, and is back in its ring, once the same worker has served another queue.
    assert_eq!(device.run(1, T_FLUSH, 0, &[], 0).status, OK);
    let ring = &mut device.rings[0];
    let next = |at: u16| {
        let place = ring.table + 16 * u64::from(at) + 14;
        u16::from_le_bytes(device.memory.read(place, 2).try_into().unwrap())
    };
    let data = next(head);
    ring.write_desc(data, Desc { addr: large, len: 1 << 20, flags: NEXT | WRITE, next: next(data) });
    ring.wait_used("the one that grew");
    assert_eq!(device.memory.byte(pending.status_at), OK);
    assert_eq!(device.run(0, T_IN, 0, &[], 512).status, OK);
    let took = began.elapsed();
    assert!(took > Duration::from_millis(1900), "2 MiB were read in {took:?}, at 1 MiB a second");
    drop(device);
    daemon.stop();
}

/// One queue with small requests and one with large ones share bytes, not requests.
#[test]
fn sizes_that_differ() {
    assert_shares(|| {
        let disk = empty_disk();
        let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--bps-total=4M", "--workers=2"]));
        let mut device = Device::new(&daemon, wide(2));
        settle(&daemon);
        let begun = Instant::now();
        let mut large = Flow::begin(&mut device, 0, 60, &[(T_IN, 64 * K)]);
        let mut small = Flow::begin(&mut device, 1, 60, &[(T_IN, 4 * K)]);
        let memory = &device.memory;
        let [first, second] = device.rings.as_mut_slice() else { panic!("two rings") };
        let mut flows = [(&mut large, first, &**memory), (&mut small, second, &**memory)];
        let took = go_on(&mut flows, begun, Duration::from_millis(2500));
        drop(device);
        daemon.stop();
        (small.bytes, large.bytes, 1048576.0 * 4.0 * (took + 0.05) + 65536.0)
    });
}
