//! What is counted: by operation and queue, to the request, over crashes, upgrades and layouts; and how long requests take.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vublk::memory::mapping::Mapping;
use vublk::request::Command;
use vublk::stats::histogram::{Histogram, end};
use vublk::stats::queue::Count;
use vublk::stats::{AREA, Event, Mark, Operation, Run, Stats, Tally, WORKERS};
use vublk::sys;

use crate::session::each_engine;
use crate::succession::{attach, daemon_of, kill_and_wait};
use crate::support::control::{Control, settle, vublk};
use crate::support::daemon::{Daemon, Options, URING, vublkd};
use crate::support::device::{
    Device, IOERR, OK, Setup, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, UNSUPP, range,
};
use crate::support::disk::{Disk, SECTOR};
use crate::support::gate::Gate;
use crate::support::ring::out;
use crate::support::sys::Deadline;

#[track_caller]
pub fn status(daemon: &Daemon) -> Value {
    Control::of(daemon).call("status", json!({})).unwrap()
}

/// Requests and bytes by operation, of a disk or a queue.
#[track_caller]
fn counted(of: &Value) -> Vec<(&str, u64, u64)> {
    let operations = of["operations"].as_object().unwrap();
    let counted = operations.iter().map(|(name, done)| {
        let requests = done["requests"].as_u64().unwrap();
        let latency: Histogram = serde_json::from_value(done["latency"].clone()).unwrap();
        assert_eq!(latency.counts.iter().sum::<u64>(), requests, "each request is in a bucket: {done}");
        assert!(latency.counts.first() != Some(&0) && latency.counts.last() != Some(&0), "{done}");
        (name.as_str(), requests, done["bytes"].as_u64().unwrap())
    });
    counted.collect()
}

/// What a guest did is there to the request, the byte and the error, and where it did it.
#[test]
fn by_operation_and_queue() {
    each_engine(|engine| {
        let disk = Disk::new();
        let mut daemon = Daemon::start(engine, &disk, &Options::default());
        assert_eq!(status(&daemon)["disk"]["operations"], json!({}), "nothing was asked for");
        let mut device = Device::new(&daemon, Setup { queues: 2, ..Setup::default() });
        for at in 0..5 {
            assert_eq!(device.run(0, T_IN, at * 8, &[], 4096).status, OK);
        }
        assert_eq!(device.run(1, T_IN, 0, &[], SECTOR).status, OK);
        for at in 0..3 {
            assert_eq!(device.run(1, T_OUT, at * 64, &[7; 8192], 0).status, OK);
        }
        assert_eq!(device.run(1, T_FLUSH, 0, &[], 0).status, OK);
        let ranges = [range(64, 64, 0), range(256, 8, 0)].concat();
        assert_eq!(device.run(0, T_DISCARD, 0, &ranges, 0).status, OK);
        assert_eq!(device.run(0, T_WRITE_ZEROES, 0, &range(512, 128, 0), 0).status, OK);
        assert_eq!(device.run(0, T_GET_ID, 0, &[], 20).status, OK);
        assert_eq!(device.run(0, T_IN, 1 << 40, &[], 512).status, IOERR, "behind the end");
        assert_eq!(device.run(1, 77, 0, &[], 512).status, UNSUPP);
        let nothing = device.rings[0].chain(&[out(device.memory.page_with(&[0; 16]), 16)]);
        device.rings[0].offer(nothing);
        device.rings[0].wait_used("a chain without a place for its status");

        let disk_status = &status(&daemon)["disk"];
        assert_eq!(
            counted(disk_status),
            [
                ("discard", 1, 72 * 512),
                ("flush", 1, 0),
                ("other", 3, 20),
                ("read", 6, 5 * 4096 + 512),
                ("write", 3, 3 * 8192),
                ("zeroes", 1, 128 * 512)
            ]
        );
        assert_eq!(disk_status["errors"], json!({"io": 1, "unsupported": 1, "malformed": 1, "held": 0}));
        let queues = Control::of(&daemon).call("queues", json!({})).unwrap();
        assert_eq!(queues["next"], Value::Null);
        let [first, second] = queues["queues"].as_array().unwrap().as_slice() else { panic!("{queues}") };
        assert_eq!(
            counted(first),
            [("discard", 1, 72 * 512), ("other", 2, 20), ("read", 5, 5 * 4096), ("zeroes", 1, 128 * 512)]
        );
        assert_eq!(
            counted(second),
            [("flush", 1, 0), ("other", 1, 0), ("read", 1, 512), ("write", 3, 3 * 8192)]
        );
        assert_eq!(first["errors"], json!({"io": 1, "unsupported": 0, "malformed": 1, "held": 0}));
        assert_eq!(second["errors"], json!({"io": 0, "unsupported": 1, "malformed": 0, "held": 0}));
        for queue in [first, second] {
            assert!(queue["kicks"].as_u64() > Some(0) && queue["calls"].as_u64() > Some(0), "{queue}");
        }
        let counters = &status(&daemon)["counters"];
        assert_eq!((&counters["requests"], &counters["malformed"]), (&json!(15), &json!(1)), "{counters}");
        assert_eq!(disk_status["front_ends"], json!(1));
        assert_eq!(status(&daemon)["front_end_pid"], json!(std::process::id()));
        drop(device);
        Deadline::new("the front-end to be gone")
            .until_slowly(|| status(&daemon).get("front_end_pid").is_none().then_some(()));
        daemon.stop();
    });
}

/// Many queues come in several answers, and the tool asks for all.
#[test]
fn more_queues_than_one_answer_has() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options { queues: Some(40), ..Options::default() });
    let mut device = Device::new(&daemon, Setup { queues: 40, ring_size: 16, ..Setup::default() });
    (0..40).for_each(|queue| device.assert_serves(queue));
    let mut control = Control::of(&daemon);
    let (mut from, mut seen) = (0, Vec::new());
    while let Some(next) = Some(from) {
        let answer = control.call("queues", json!({"from": next})).unwrap();
        seen.extend(
            answer["queues"].as_array().unwrap().iter().map(|queue| queue["index"].as_u64().unwrap()),
        );
        let Some(next) = answer["next"].as_u64() else { break };
        from = next;
    }
    assert_eq!(seen, (0..40).collect::<Vec<_>>());
    drop(device);
    daemon.stop();
}

/// A time that is known from outside: the disk holds a read for it.
#[test]
fn how_long_a_request_took() {
    let test = "stats::how_long_a_request_took";
    let Some((gate, store)) = Gate::under_loop(test, vec![0; 8 << 20]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("disk.sock");
    let mut daemon = Daemon::spawn(URING, vublkd("io_uring", &socket, &store.path), socket);
    daemon.wait_listening();
    let mut device = Device::plain(&daemon);
    let hold = Duration::from_millis(150);
    gate.close(1, 1);
    let offered = Instant::now();
    let pending = device.submit(0, T_IN, 0, &[], 4096);
    Deadline::new("the read to be held").until_slowly(|| (gate.held() == 1).then_some(()));
    let held = Instant::now();
    let in_flight = status(&daemon)["disk"]["in_flight"].clone();
    assert_eq!(in_flight, json!(1));
    assert_eq!(Control::of(&daemon).call("queues", json!({})).unwrap()["queues"][0]["in_flight"], json!(1));
    Deadline::new("the time to pass").until_slowly(|| (held.elapsed() > hold).then_some(()));
    let least = held.elapsed();
    gate.open();
    let used = device.rings[0].wait_used("the read");
    let most = offered.elapsed();
    assert_eq!(device.outcome(&pending, used).status, OK);
    let read = &status(&daemon)["disk"]["operations"]["read"];
    let took = Duration::from_secs_f64(read["seconds"].as_f64().unwrap());
    assert!(least <= took && took <= most, "{least:?} to {most:?} outside, {took:?} inside");
    let latency: Histogram = serde_json::from_value(read["latency"].clone()).unwrap();
    let [from, to] = [latency.first_bucket - 1, latency.first_bucket].map(|bucket| end(bucket).unwrap());
    assert!((from..to).contains(&u64::try_from(took.as_nanos()).unwrap()), "{took:?}: {from} to {to} ns");
    drop(device);
    daemon.stop();
}

/// At depth 1, where each turn has one request, the times are those that the driver sees, but for the wake-ups.
#[test]
fn times_at_depth_one() {
    each_engine(|engine| {
        let disk = Disk::new();
        let mut daemon = Daemon::start(engine, &disk, &Options::default());
        let mut device = Device::plain(&daemon);
        let mut outside = Duration::ZERO;
        for _ in 0..200 {
            let offered = Instant::now();
            device.assert_serves(0);
            outside += offered.elapsed();
        }
        let read = &status(&daemon)["disk"]["operations"]["read"];
        let inside = Duration::from_secs_f64(read["seconds"].as_f64().unwrap());
        assert!(Duration::ZERO < inside && inside < outside, "{inside:?} inside, {outside:?} outside");
        drop(device);
        daemon.stop();
    });
}

/// Counters, and how often daemons followed each other, go along.
#[test]
fn over_crashes_and_upgrades() {
    each_engine(|engine| {
        let disk = crate::support::load::empty_disk();
        let mut daemon = Daemon::start(engine, &disk, &Options::with(&["--supervise"]));
        let (frontend, mut ring, mut load) = attach(&daemon, 0);
        let mut answered = 0;
        for round in 0..4 {
            for _ in 0..10 {
                load.offer(&mut ring);
                load.drain(&mut ring);
            }
            let before = status(&daemon);
            let total: u64 = counted(&before["disk"]).iter().map(|(_, requests, _)| requests).sum();
            assert_eq!(total, load.answered, "after {round} successors");
            assert_eq!(before["counters"]["requests"], json!(load.answered));
            let bytes: u64 = counted(&before["disk"]).iter().map(|(.., bytes)| bytes).sum();
            assert_eq!(bytes, 4096 * load.answered);
            answered = load.answered;
            let victim = daemon_of(&daemon);
            if round % 2 == 0 {
                kill_and_wait(&daemon);
            } else {
                Control::of(&daemon).call("upgrade", json!({})).unwrap();
            }
            Deadline::new("the successor").until_slowly(|| (daemon_of(&daemon) != victim).then_some(()));
            settle(&daemon);
        }
        let after = status(&daemon);
        let disk_status = &after["disk"];
        assert_eq!((&disk_status["crashes"], &disk_status["upgrades"]), (&json!(2), &json!(2)));
        assert_eq!(disk_status["front_ends"], json!(1), "it stayed connected");
        assert_eq!(after["counters"]["requests"], json!(answered));
        assert!(disk_status["served_seconds"].as_f64() >= after["uptime_seconds"].as_f64(), "{after}");
        // What is in flight when a daemon dies is done by the next one, and shows.
        let mut replayed = 0;
        for _ in 0..20 {
            load.burst(&mut ring);
            kill_and_wait(&daemon);
            load.drain(&mut ring);
            settle(&daemon);
            replayed = status(&daemon)["disk"]["replayed"].as_u64().unwrap();
            if replayed > 0 {
                break;
            }
        }
        assert!(replayed > 0, "no daemon of 20 died with a request in flight");
        // A death is worth a warning, an upgrade is not.
        let log = daemon.log();
        let lines = |how: &'static str| log.lines().filter(move |line| line.contains(how));
        let again = lines("took over from a vublkd that died: ").map(|line| {
            assert!(line.contains("WARN"), "{line}");
            let number = line.split_once("died: ").unwrap().1.split_once(" requests").unwrap().0;
            number.parse::<u64>().unwrap()
        });
        assert_eq!(again.sum::<u64>(), replayed, "{log}");
        assert!(lines("took over from a vublkd that stopped").all(|line| line.contains("INFO")), "{log}");
        drop(frontend);
        daemon.stop();
    });
}

/// A front-end that comes again is counted.
#[test]
fn front_ends() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    for times in 1..4 {
        let mut device = Device::plain(&daemon);
        device.assert_serves(0);
        assert_eq!(status(&daemon)["disk"]["front_ends"], json!(times));
        drop(device);
        settle(&daemon);
    }
    daemon.stop();
}

fn area() -> File {
    let file: File = rustix::fs::memfd_create("stats", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
    file.set_len(AREA as u64).unwrap();
    file
}

fn stats_in(file: &File) -> Stats {
    let stats = Stats::default();
    stats.keep_in(Mapping::new(file, 0, AREA as u64).unwrap());
    stats
}

fn count_reads(stats: &Stats, queue: u16, requests: u64) {
    let (counters, worker) = (stats.queue(queue), stats.register());
    let now = sys::monotonic_ns();
    let mark = Mark::new(now, queue).of(Operation::from(Command::Read(0)));
    let mut run = Run::new(mark, 4096);
    (1..requests).for_each(|_| assert!(run.takes(mark, 4096)));
    let mut tally = Tally::default();
    run.end(&counters, &mut tally, now + 5000);
    worker.add(&mut tally);
    counters.count(Count::Kicks);
}

/// What the versions before this one left: counters of workers, and nothing behind them. They are carried over, and what
/// those versions did not count begins at 0. A layout that is unknown begins anew, whatever lies there.
#[test]
fn other_layouts() {
    let file = area();
    for (worker, requests) in [(0, 41_u64), (255, 1)] {
        file.write_all_at(&requests.to_ne_bytes(), worker * 128).unwrap();
    }
    let requests = |stats: &Stats| stats.counts().find(|(name, _)| *name == "requests").unwrap().1;
    let stats = stats_in(&file);
    assert_eq!(requests(&stats), 42, "carried over");
    assert!(stats.queues().is_empty());
    assert!(stats.served_for() < Duration::from_secs(60));
    count_reads(&stats, 7, 3);
    count_reads(&stats, 255, 2);
    stats.note(Event::FrontEnd, 1);
    drop(stats);

    let stats = stats_in(&file);
    assert_eq!(requests(&stats), 47);
    assert_eq!(stats.queues().iter().map(|(index, _)| *index).collect::<Vec<_>>(), [7, 255]);
    let read = stats.totals().of(Operation::Read);
    assert_eq!((read.requests, read.bytes, read.latency.counts.as_slice()), (5, 5 * 4096, [5].as_slice()));
    assert_eq!((stats.totals().count(Count::Kicks), stats.times(Event::FrontEnd)), (2, 1));
    count_reads(&stats, 7, 1);
    assert_eq!(stats.totals().of(Operation::Read).requests, 6, "counts on");
    drop(stats);

    // Another layout, and rubbish for its counters.
    file.write_all_at(&vec![0xa5; AREA - WORKERS], WORKERS as u64).unwrap();
    let stats = stats_in(&file);
    assert!(stats.queues().is_empty(), "all queues are said to be there, in a layout that is not this one");
    assert_eq!((stats.times(Event::FrontEnd), requests(&stats)), (0, 48));
    assert!(stats.served_for() < Duration::from_secs(60));
    count_reads(&stats, 7, 2);
    let read = stats.totals().of(Operation::Read);
    assert_eq!((read.requests, read.bytes, read.latency.counts.as_slice()), (2, 2 * 4096, [2].as_slice()));
}

/// `vublk status` shows times as people read them.
#[test]
fn the_tool_shows_times() {
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let place = daemon.socket.to_str().unwrap();
    let (status, text, complained) = vublk(&["status", place]);
    assert!(status.success(), "{complained}");
    let words = |name: &str| {
        let line =
            text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {text}"));
        line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(words("disk.operations.read.requests"), "1");
    let latency = words("disk.operations.read.latency");
    assert!(latency.starts_with("p50 ") && latency.contains("p99 "), "{latency}");
    assert!(text.lines().count() < 60, "{text}");
}
