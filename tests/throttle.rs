//! Limits of disks and of groups: how exact they are, who gets which share, how they change, and what does not wait for them.
//!
//! That no more is served than a limit allows holds on every machine. That as much is served takes a machine that lets the
//! daemon and the guest run: where it does not, the same is tried again.

mod edges;

use std::fmt::Write;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

use crate::session::each_engine;
use crate::succession::{attach, daemon_of};
use crate::support::control::{self, Control, settle, vublk};
use crate::support::daemon::{Backend, Daemon, Options, THREADS, URING, bare_vublkd, run};
use crate::support::device::{Device, OK, Setup, T_IN, T_OUT, start_ring};
use crate::support::disk::Disk;
use crate::support::frontend::Frontend;
use crate::support::load::{LANES, empty_disk};
use crate::support::memory::{Memory, Span};
use crate::support::ring::{Ring, Seg};
use crate::support::sys::{Deadline, tick};

/// Requests of one queue that are made again as soon as they are answered.
struct Flow {
    lanes: Vec<(Vec<Seg>, u64, u32)>,
    owner: Vec<usize>,
    requests: u32,
    bytes: u32,
}

impl Flow {
    /// So many, of these kinds and sizes in turn.
    fn begin(device: &mut Device, queue: usize, depth: usize, each: &[(u32, usize)]) -> Self {
        let lane = |&(kind, len): &(u32, usize)| {
            let (data, back) = if kind == T_IN { (vec![], len) } else { (vec![1; len], 0) };
            let (segs, pending) = device.place(kind, 0, &data, back);
            (segs, pending.status_at, len as u32)
        };
        let lanes = each.iter().cycle().take(depth).map(lane).collect();
        let mut flow = Self { lanes, owner: vec![0; 256], requests: 0, bytes: 0 };
        let ring = &mut device.rings[queue];
        (0..depth).for_each(|at| flow.offer(at, ring));
        ring.publish();
        ring.kick.signal();
        flow
    }

    fn offer(&mut self, at: usize, ring: &mut Ring) {
        let head = ring.chain(&self.lanes[at].0);
        self.owner[usize::from(head)] = at;
        ring.stage(head);
    }

    fn turn(&mut self, ring: &mut Ring, memory: &Memory) {
        let before = self.requests;
        ring.call.take();
        ring.set_used_event(ring.seen);
        while let Some(used) = ring.take_used() {
            let at = self.owner[usize::from(used.head)];
            let (_, status_at, bytes) = self.lanes[at];
            assert_eq!(memory.byte(status_at), OK);
            self.requests += 1;
            self.bytes += bytes;
            self.offer(at, ring);
            ring.set_used_event(ring.seen);
        }
        if self.requests > before {
            ring.publish();
            ring.kick.signal();
        }
    }
}

/// Keeps these flows going until the time since `begun` is up; gives how long that was.
fn go_on(flows: &mut [(&mut Flow, &mut Ring, &Memory)], begun: Instant, time: Duration) -> f64 {
    while begun.elapsed() < time {
        flows.iter_mut().for_each(|(flow, ring, memory)| flow.turn(ring, memory));
        let calls: Vec<_> = flows.iter().map(|(_, ring, _)| ring.call.as_fd()).collect();
        tick(&calls, Duration::from_millis(5));
    }
    begun.elapsed().as_secs_f64()
}

fn wide(queues: u32) -> Setup {
    let memory = Memory::with(&[Span { guest: 0x10_0000, len: 64 << 20 }]);
    Setup { queues, ring_size: 256, memory, ..Setup::default() }
}

const K: usize = 1024;

/// What a case has: its load, how to count it, the rate, and what a burst adds in all.
struct Exact {
    engine: Backend,
    options: &'static [&'static str],
    each: &'static [(u32, usize)],
    count: fn(&Flow) -> u32,
    rate: f64,
    /// The rate and the length of a burst.
    burst: Option<(f64, f64)>,
    /// The most that one request counts for.
    largest: f64,
}

impl Exact {
    /// One run of five seconds; false: the machine was late.
    fn is_reached(&self) -> bool {
        let disk = empty_disk();
        let mut daemon = Daemon::start(self.engine, &disk, &Options::with(self.options));
        let mut device = Device::new(&daemon, wide(1));
        settle(&daemon);
        let begun = Instant::now();
        let mut flow = Flow::begin(&mut device, 0, 64, self.each);
        let mut reached = true;
        for time in [1.0, 5.0] {
            let memory = &device.memory;
            let took =
                go_on(&mut [(&mut flow, &mut device.rings[0], memory)], begun, Duration::from_secs_f64(time));
            let served = f64::from((self.count)(&flow));
            let (lead, fast) = match self.burst {
                Some((max, length)) => ((max - self.rate) * length, max * took + max / 20.0),
                None => (self.rate / 20.0, f64::MAX),
            };
            let least =
                |took: f64| (self.rate * took + lead).min(self.burst.map_or(f64::MAX, |(max, _)| max * took));
            let most = (self.rate * took + lead).min(fast) + self.largest;
            eprintln!("{:?}: {served} in {took:.2} s, {most:.0} at most", self.options);
            assert!(served <= most, "{:?}: {served} in {took} s, more than {most}", self.options);
            if time > 4.0 {
                assert!(
                    self.burst.is_some() || served <= self.rate * took * 1.02,
                    "{:?}: {served} in {took} s are more than 2 % above",
                    self.options
                );
                reached &=
                    served >= (least(took) - self.rate / 20.0 * f64::from(self.burst.is_none())) * 0.98;
            }
        }
        let throttle = Control::of(&daemon).call("status", json!({})).unwrap()["disk"]["throttle"].clone();
        assert!(throttle["delayed"].as_u64() > Some(0), "{throttle}");
        assert!(throttle["delayed_seconds"].as_f64() > Some(1.0), "{throttle}");
        drop(device);
        daemon.stop();
        reached
    }
}

/// 500 reads a second, without a burst.
const STEADY: Exact = Exact {
    engine: URING,
    options: &[],
    each: &[(T_IN, 512)],
    count: |flow| flow.requests,
    rate: 500.0,
    burst: None,
    largest: 1.0,
};

/// Requests and bytes a second, bursts, and requests that count as several: to 2 % over five seconds.
#[test]
fn exact() {
    const MIB: f64 = 1048576.0;
    let small = &[(T_IN, 4 * K), (T_OUT, 4 * K)][..];
    let mixed = &[(T_OUT, 4 * K), (T_OUT, 64 * K), (T_OUT, 512), (T_OUT, 16 * K)][..];
    let cases = [
        Exact { options: &["--iops-total=500"], each: small, ..STEADY },
        Exact { engine: THREADS, options: &["--iops-total=500"], each: small, ..STEADY },
        Exact { options: &["--iops-read=500", "--io-uring-refuse=enter-timeout"], ..STEADY },
        Exact {
            options: &["--bps-write=8M"],
            each: mixed,
            count: |flow| flow.bytes,
            rate: 8.0 * MIB,
            largest: 65536.0,
            ..STEADY
        },
        // Each counts as four.
        Exact { options: &["--iops-write=2000", "--iops-size=4k"], each: &[(T_OUT, 16 * K)], ..STEADY },
        Exact {
            options: &["--iops-read=200", "--iops-read-max=1000", "--iops-read-max-length=2"],
            rate: 200.0,
            burst: Some((1000.0, 2.0)),
            ..STEADY
        },
    ];
    std::thread::scope(|scope| {
        for case in &cases {
            scope.spawn(move || {
                assert!(
                    (0..3).any(|_| case.is_reached()),
                    "{:?}: less than the limit, three times",
                    case.options
                );
            });
        }
    });
}

/// Each has about half of what there is, and both have no more than that. The machine may have been late, and one of them short of requests: again, three times.
#[track_caller]
fn assert_shares(mut run: impl FnMut() -> (u32, u32, f64)) {
    let is_fair = (0..3).any(|_| {
        let (few, many, most) = run();
        let share = f64::from(few) / f64::from(few + many);
        eprintln!("{few} and {many}: {:.0} %", share * 100.0);
        assert!(f64::from(few + many) <= most, "{few} and {many} are more than {most}");
        (0.4..=0.6).contains(&share)
    });
    assert!(is_fair, "unfair three times");
}

/// A queue with few requests gets its half beside one with many, on one worker and on two.
#[test]
fn queues_share() {
    each_engine(|engine| {
        for workers in ["--workers=1", "--workers=2"] {
            assert_shares(|| {
                let disk = empty_disk();
                let mut daemon = Daemon::start(engine, &disk, &Options::with(&["--iops-total=400", workers]));
                let mut device = Device::new(&daemon, wide(2));
                settle(&daemon);
                let begun = Instant::now();
                let mut many = Flow::begin(&mut device, 0, 60, &[(T_OUT, 4 * K)]);
                let mut few = Flow::begin(&mut device, 1, 8, &[(T_IN, 512)]);
                let memory = &device.memory;
                let [first, second] = device.rings.as_mut_slice() else { panic!("two rings") };
                let mut flows = [(&mut many, first, &**memory), (&mut few, second, &**memory)];
                let took = go_on(&mut flows, begun, Duration::from_secs(2));
                drop(device);
                daemon.stop();
                (few.requests, many.requests, 400.0 * (took + 0.05) + 1.0)
            });
        }
    });
}

/// Writes that wait stop neither the reads of another queue nor flushes; the limit is taken away, and all end at once.
#[test]
fn reads_go_on_and_changes_are_at_once() {
    each_engine(|engine| {
        let disk = empty_disk();
        let mut daemon = Daemon::start(engine, &disk, &Options::with(&["--bps-write=1", "--workers=1"]));
        let mut device = Device::new(&daemon, wide(2));
        let mut writes = Flow::begin(&mut device, 0, 32, &[(T_OUT, 512)]);
        for at in 0..500 {
            assert_eq!(device.run(1, T_IN, at, &[], 512).status, OK);
        }
        let at = control::path(&daemon).to_str().unwrap().to_owned();
        control::says(&at, "throttled", "1 queues wait");
        // A worker whose queue waits sleeps.
        let before = cpu_ticks(daemon.pid());
        tick(&[], Duration::from_secs(1));
        let spent = cpu_ticks(daemon.pid()) - before;
        assert!(spent <= 20, "{spent} hundredths of a second of CPU time while a queue waits");
        let began = Instant::now();
        let (status, said, complained) = vublk(&["throttle", &at, "--bps-write=0", "--bps-read=1G"]);
        assert!(status.success(), "{said}{complained}");
        assert!(said.contains("bps_read") && !said.contains("bps_write"), "{said}");
        Deadline::new("what has waited")
            .until_slowly(|| (device.rings[0].used_idx() == device.rings[0].avail_idx).then_some(()));
        assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
        writes.turn(&mut device.rings[0], &device.memory);
        control::says(&at, "limited", "no request waits");
        let mut control = Control::of(&daemon);
        let shown = control.call("throttle", json!({"bps_read": null})).unwrap();
        assert!(shown.get("bps_read").is_none() && shown["delayed"].as_u64() > Some(0), "{shown}");
        let (_, said, _) = vublk(&["throttle", &at]);
        assert!(said.starts_with("no limits"), "{said}");
        for (params, why) in [
            (json!({"iops_total": 5, "iops_read": 5}), "exclude each other"),
            (json!({"iops_write_max": 5}), "add --iops-write"),
            (json!({"iops": 5}), "there is no limit \"iops\""),
            (json!({"iops_total": -1}), "u64"),
        ] {
            let (_, refused) = control.call("throttle", params).unwrap_err();
            assert!(refused.contains(why), "{refused}");
        }
        drop(device);
        daemon.stop();
    });
}

fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // utime and stime, fields 14 and 15, after the name in parentheses.
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
    fields.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

/// Requests that wait are in the ring: neither GET_VRING_BASE, nor a front-end that leaves, nor SIGTERM waits for them.
#[test]
fn drains_wait_for_nothing() {
    each_engine(|engine| {
        let disk = empty_disk();
        let mut daemon = Daemon::start(engine, &disk, &Options::with(&["--bps-total=1"]));
        let (frontend, mut ring, mut load) = attach(&daemon, 0);
        load.offer(&mut ring);
        load.take(&mut ring);
        let began = Instant::now();
        let base = frontend.vring_base(0).unwrap();
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert_eq!(base, ring.used_idx(), "something was in flight");
        assert!(base < LANES as u16 / 2, "{base} were served");
        // It goes on from there.
        frontend.vring_state(crate::support::frontend::msg::SET_VRING_BASE, 0, base.into());
        start_ring(&frontend, 0, &ring);
        Control::of(&daemon).call("throttle", json!({"bps_total": 0})).unwrap();
        load.drain(&mut ring);
        Control::of(&daemon).call("throttle", json!({"bps_total": 1})).unwrap();
        load.offer(&mut ring);
        let began = Instant::now();
        daemon.stop();
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert!(ring.avail_idx.wrapping_sub(ring.used_idx()) > LANES as u16 / 2);
        drop(frontend);
    });
}

/// What was set while a disk is served goes along with a crash and an upgrade; a stop and a start go back to the options.
#[test]
fn limits_survive_crashes_and_upgrades() {
    let disk = empty_disk();
    let options = Options::with(&["--supervise", "--iops-total=100000"]);
    let mut daemon = Daemon::start(URING, &disk, &options);
    let (frontend, mut ring, mut load) = attach(&daemon, 0);
    let limits =
        |daemon: &Daemon| Control::of(daemon).call("throttle", json!({})).unwrap()["iops_total"].clone();
    let is_limited = |ring: &mut Ring, load: &mut crate::support::load::Load| {
        let (began, before) = (Instant::now(), load.answered);
        (0..3).for_each(|_| {
            load.offer(ring);
            load.drain(ring);
        });
        let most = 64.0 * (began.elapsed().as_secs_f64() + 0.05) + 1.0;
        let served = u32::try_from(load.answered - before).unwrap();
        assert!(f64::from(served) <= most, "{served} of {most}");
    };
    assert_eq!(limits(&daemon), json!(100_000));
    Control::of(&daemon).call("throttle", json!({"iops_total": 64})).unwrap();
    is_limited(&mut ring, &mut load);
    load.offer(&mut ring);
    settle(&daemon);
    kill_process(daemon_of(&daemon), Signal::KILL).unwrap();
    load.drain(&mut ring);
    assert_eq!(limits(&daemon), json!(64));
    is_limited(&mut ring, &mut load);
    load.offer(&mut ring);
    let (status, said, complained) = vublk(&["upgrade", control::path(&daemon).to_str().unwrap()]);
    assert!(status.success(), "{said}{complained}");
    load.drain(&mut ring);
    assert_eq!(limits(&daemon), json!(64));
    is_limited(&mut ring, &mut load);
    drop(frontend);
    daemon.stop();
    let mut daemon = Daemon::start(URING, &disk, &options);
    settle(&daemon);
    assert_eq!(limits(&daemon), json!(100_000));
    daemon.stop();
    load.verify(&disk);
}

fn file(folder: &std::path::Path, disks: &[&Disk], lines: &[&str]) {
    let mut text = format!("control = \"{}/d0.sock.control\"\n", folder.display());
    for (at, (disk, lines)) in disks.iter().zip(lines).enumerate() {
        let (image, folder) = (disk.path.display(), folder.display());
        write!(text, "\n[[disk]]\nname = \"d{at}\"\nblk-file = \"{image}\"\nsocket-path = \"{folder}/d{at}.sock\"\n{lines}\n")
            .unwrap();
    }
    fs::write(folder.join("vm.toml"), text).unwrap();
}

/// Two disks of a group share its limits evenly, see each other's changes, and keep them over a crash.
#[test]
fn disks_of_a_group_share() {
    let folder = tempfile::tempdir().unwrap();
    let disks = [empty_disk(), empty_disk()];
    let group = "throttle-group = \"vm\"";
    file(folder.path(), &[&disks[0], &disks[1]], &[&format!("{group}\niops-total = 400"), group]);
    let mut command = bare_vublkd();
    command
        .arg(format!("--config={}/vm.toml", folder.path().display()))
        .args(["--log-level=debug", "--supervise"]);
    let mut daemon = Daemon::spawn(URING, command, folder.path().join("d0.sock"));
    daemon.wait_log("d0: serving ");
    daemon.wait_log("d1: serving ");
    let device = |at: usize| {
        let socket = folder.path().join(format!("d{at}.sock"));
        let stream = Deadline::new("to connect").until_slowly(|| UnixStream::connect(&socket).ok());
        Device::over(Frontend::new(stream), wide(1))
    };
    let call = |params: Value| Control::of(&daemon).call("throttle", params);
    let (_, why) = call(json!({})).unwrap_err();
    assert!(why.contains("several disks"), "{why}");
    let shown = call(json!({"disk": "d1"})).unwrap();
    assert_eq!((&shown["group"], &shown["iops_total"]), (&json!("vm"), &json!(400)), "{shown}");
    assert_shares(|| {
        let (mut first, mut second) = (device(0), device(1));
        let begun = Instant::now();
        let mut many = Flow::begin(&mut first, 0, 60, &[(T_OUT, 4 * K)]);
        let mut few = Flow::begin(&mut second, 0, 8, &[(T_IN, 512)]);
        let mut both = [
            (&mut many, &mut first.rings[0], &*first.memory),
            (&mut few, &mut second.rings[0], &*second.memory),
        ];
        let took = go_on(&mut both, begun, Duration::from_secs(2));
        (few.requests, many.requests, 400.0 * (took + 0.05) + 1.0)
    });
    let path = control::path(&daemon);
    let (status, said, complained) =
        vublk(&["throttle", path.to_str().unwrap(), "--disk=d0", "--iops-total=300", "--iops-total-max=400"]);
    assert!(status.success() && said.contains("300"), "{said}{complained}");
    assert_eq!(call(json!({"disk": "d1"})).unwrap()["iops_total"], json!(300));
    // The other disk's control thread has written it down, too, once it has answered.
    let victim = daemon_of(&daemon);
    kill_process(victim, Signal::KILL).unwrap();
    Deadline::new("a successor").until_slowly(|| (daemon_of(&daemon) != victim).then_some(()));
    let shown = Deadline::new("the limits of both").until_slowly(|| {
        let path = path.to_str().unwrap();
        let of = |disk: &str| vublk(&["throttle", path, disk, "--json"]);
        let (one, two) = (of("--disk=d0"), of("--disk=d1"));
        (one.0.success() && two.0.success()).then_some([one.1, two.1])
    });
    for shown in shown {
        let shown: Value = serde_json::from_str(&shown).unwrap();
        assert_eq!((&shown["iops_total"], &shown["iops_total_max"]), (&json!(300), &json!(400)), "{shown}");
    }
    daemon.stop();
}

/// Limits that do not go together are refused in words, typed and in a file.
#[test]
fn what_does_not_go_together() {
    let disk = empty_disk();
    let socket = disk.dir.path().join("disk.sock");
    let typed = |words: &[&str]| {
        let mut command = bare_vublkd();
        command.arg(format!("--blk-file={}", disk.path.display()));
        command.arg(format!("--socket-path={}", socket.display())).args(words);
        run(command)
    };
    for (words, why) in [
        (&["--iops-total=5", "--iops-read=5"][..], "--iops-total and --iops-read exclude each other"),
        (&["--bps-total=5", "--bps-write=5M"], "--bps-total and --bps-write exclude each other"),
        (&["--iops-read-max=5"], "add --iops-read"),
        (&["--bps-write=5k", "--bps-write-max=4k"], "is less than --bps-write=5120"),
        (&["--bps-write=5", "--bps-write-max-length=4"], "add --bps-write-max"),
        (&["--iops-size=4k", "--bps-write=4k"], "add --iops-total"),
        (&["--iops-write=many"], "--iops-write"),
        (
            &["--iops-write=1", "--iops-write-max=2", "--iops-write-max-length=90000"],
            "--iops-write-max-length",
        ),
        (&["--throttle-group="], "--throttle-group"),
    ] {
        let (status, said, complained) = typed(words);
        assert_eq!(status.code(), Some(2), "{words:?}: {said}{complained}");
        assert!(complained.contains(why), "{words:?}: {complained}");
    }
    let other = empty_disk();
    let folder = tempfile::tempdir().unwrap();
    let in_file = |lines: &[&str]| {
        file(folder.path(), &[&disk, &other], lines);
        let mut command = bare_vublkd();
        command.arg(format!("--config={}/vm.toml", folder.path().display()));
        run(command)
    };
    for (lines, why) in [
        (["iops-total = 5\niops-read = 5", ""], "exclude each other"),
        (
            ["throttle-group = \"a\"\niops-total = 5", "throttle-group = \"a\"\niops-total = 6"],
            "disks d0 and d1 are in one throttle-group, a, and have different limits",
        ),
        (["bps-totl = 5", ""], "bps-totl: there is no such key"),
    ] {
        let (status, said, complained) = in_file(&lines);
        assert_eq!(status.code(), Some(2), "{lines:?}: {said}{complained}");
        assert!(complained.contains(why), "{lines:?}: {complained}");
    }
}
