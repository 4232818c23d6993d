//! The end: SIGTERM with requests on their way, and what an idle daemon costs.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{each_engine, start};
use crate::support::daemon::{Daemon, Options, URING};
use crate::support::device::{Device, OK, Setup, T_IN, T_OUT, header};
use crate::support::disk::{Disk, assert_same, salted};
use crate::support::frontend::msg;
use crate::support::ring::{back, out};
use crate::support::sys::{Deadline, PATIENCE, skip};

#[test]
fn sigterm_and_sigint_when_idle() {
    each_engine(|engine| {
        for signal in [Signal::TERM, Signal::INT] {
            let (_disk, mut daemon) = start(engine);
            daemon.signal(signal);
            let status = daemon.wait_end(Duration::from_secs(1));
            assert_eq!(status.code(), Some(0));
            let (_disk, mut daemon) = start(engine);
            let mut device = Device::plain(&daemon);
            device.assert_serves(0);
            daemon.signal(signal);
            let status = daemon.wait_end(Duration::from_secs(1));
            assert_eq!(status.code(), Some(0), "with a front-end");
        }
    });
}

/// What was answered is on the disk; what was not is the guest's to repeat.
/// As at the end of a VM. A daemon that slept over the signal would be killed, and end with 3.
#[test]
fn sigterm_in_the_moment_in_which_a_frontend_leaves() {
    let disk = Disk::new();
    for round in 0..40 {
        let mut daemon = Daemon::start(URING, &disk, &Options::default());
        let device = Device::plain(&daemon);
        drop(device);
        let until = Instant::now() + Duration::from_micros(round % 8 * 20);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        daemon.signal(Signal::TERM);
        assert_eq!(daemon.wait_end(PATIENCE).code(), Some(0), "round {round}: {}", daemon.log());
    }
}

#[test]
fn sigterm_under_load() {
    each_engine(|engine| {
        for round in 0..5 {
            let disk = Disk::new();
            let mut daemon = Daemon::start(engine, &disk, &Options::default());
            let mut device = Device::new(&daemon, Setup { ring_size: 1024, ..Setup::default() });
            let waiting: Vec<_> = (0..200)
                .map(|index| {
                    let data = salted(1, index * 128, 128);
                    let pending = device.submit(0, T_OUT, index * 128, &data, 0);
                    (index * 128, pending)
                })
                .collect();
            // In the midst of it: some are done, most are not.
            for _ in 0..round * 5 {
                device.rings[0].wait_used("a few writes before the signal");
            }
            let begun = Instant::now();
            daemon.stop_within(Duration::from_secs(1));
            assert!(begun.elapsed() < Duration::from_secs(1));
            let settled = device.rings[0].used_idx();
            let mut answered = 0;
            for (sector, pending) in &waiting {
                if device.memory.byte(pending.status_at) == OK {
                    answered += 1;
                    let want = salted(1, *sector, 128);
                    assert_same(&disk.read(*sector, 128), &want, "an answered write");
                }
            }
            assert_eq!(answered, settled, "statuses and used elements");
            // A new daemon takes the ring where it stands; the rest is served.
            let daemon = Daemon::start(engine, &disk, &Options::default());
            let (memory, rings) = device.disconnect();
            let mut frontend = daemon.connect();
            let features = crate::support::device::negotiate(&mut frontend, 0);
            frontend.set_mem_table(&memory);
            let mut device = Device { frontend, memory, rings, features };
            let ring = &device.rings[0];
            let base = ring.used_idx();
            let size = u32::from(ring.size);
            let frontend = &device.frontend;
            frontend.vring_state(msg::SET_VRING_NUM, 0, size);
            frontend.vring_state(msg::SET_VRING_BASE, 0, u32::from(base));
            crate::support::device::set_ring_addr(frontend, 0, ring);
            frontend.vring_fd(msg::SET_VRING_KICK, 0, &ring.kick);
            frontend.vring_fd(msg::SET_VRING_CALL, 0, &ring.call);
            frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
            while device.rings[0].seen != device.rings[0].avail_idx {
                device.rings[0].wait_used("the rest, from the new daemon");
            }
            for (_, pending) in &waiting {
                assert_eq!(device.memory.byte(pending.status_at), OK);
            }
            let want = salted(1, 0, 200 * 128);
            assert_same(&disk.read(0, 200 * 128), &want, "all of it");
        }
    });
}

/// SIGKILL, and a new daemon on the same socket: back within a second.
#[test]
fn killed_and_started_again() {
    let disk = Disk::new();
    for round in 1..5 {
        let mut daemon = Daemon::start(URING, &disk, &Options::default());
        let mut device = Device::plain(&daemon);
        device.write(round * 8, &salted(round, round * 8, 8));
        daemon.signal(Signal::KILL);
        daemon.wait_end(Duration::from_secs(5));
    }
    let begun = Instant::now();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    let mut device = Device::plain(&daemon);
    for round in 1..5 {
        assert_eq!(device.read(round * 8, 8), salted(round, round * 8, 8));
    }
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(1), "the restart took {took:?}");
}

/// Numbers after `name=` in a line of statistics.
fn number(line: &str, name: &str) -> u64 {
    let at = line.find(&format!("{name}=")).expect(line) + name.len() + 1;
    let digits: String = line[at..].chars().take_while(char::is_ascii_digit).collect();
    digits.parse().expect(line)
}

/// The line of statistics that SIGUSR1 brings once `requests` are counted. A
/// request may be counted a moment after the driver sees its answer.
#[track_caller]
fn statistics(daemon: &Daemon, requests: u64) -> String {
    let what = format!("statistics of {requests} requests after SIGUSR1");
    Deadline::new(what).until_slowly(|| {
        let lines = || -> Vec<String> {
            let of_statistics = |line: &&str| line.contains("bounced=");
            daemon.log().lines().filter(of_statistics).map(str::to_owned).collect()
        };
        let before = lines().len();
        daemon.signal(Signal::USR1);
        let new =
            Deadline::new("a line of statistics after SIGUSR1").until_slowly(|| lines().get(before).cloned());
        assert!(number(&new, "requests") <= requests, "{new}");
        (number(&new, "requests") == requests).then_some(new)
    })
}

/// Requests whose pages suit the disk are never copied; others are, and
/// counted.
#[test]
fn copies_are_counted() {
    each_engine(|engine| {
        let disk = Disk::new();
        if !disk.takes_direct() {
            let name = "copies_are_counted";
            return skip(name, "no O_DIRECT here");
        }
        let daemon = Daemon::start(engine, &disk, &Options::default());
        let mut device = Device::plain(&daemon);
        for sector in (0..800).step_by(8) {
            let data = salted(1, sector, 16);
            assert_eq!(device.status(T_OUT, sector, &data, 0), OK);
            assert_eq!(device.status(T_IN, sector, &[], 8192), OK);
        }
        let line = statistics(&daemon, 200);
        assert_eq!(number(&line, "bounced"), 0, "{line}");
        // One byte off: no disk takes that without a copy.
        let at = device.memory.page_with(&header(T_IN, 0));
        let place = device.memory.alloc(16384, 4096) + 1;
        let segs = [out(at, 16), back(place, 8192), back(at + 32, 1)];
        assert_eq!(device.run_segs(&segs, false).0, OK);
        let line = statistics(&daemon, 201);
        assert!(number(&line, "bounced") > 0, "{line}");
    });
}

/// Processor time used so far, in ticks.
fn ticks(daemon: &Daemon) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
    // After the name in parentheses; utime and stime are fields 14 and 15.
    let rest = stat.rsplit(')').next().unwrap();
    let fields: Vec<u64> = rest.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
    fields[11] + fields[12]
}

/// Idle means idle: no processor time with a front-end connected, rings
/// running and nothing to do.
#[test]
fn idle_costs_nothing() {
    each_engine(|engine| {
        let (_disk, daemon) = start(engine);
        let mut device = Device::new(&daemon, Setup { queues: 4, ..Setup::default() });
        for queue in 0..4 {
            device.assert_serves(queue);
        }
        let before = ticks(&daemon);
        // Nothing is waited for here: this is the time that is measured.
        device.rings[0].call.take();
        device.rings[0].assert_quiet(Duration::from_millis(400), "an idle ring");
        let used = ticks(&daemon) - before;
        assert!(used <= 2, "{used} ticks of processor time in 0.4 s of idleness");
    });
}

#[test]
fn nothing_goes_to_stdout() {
    use std::process::Stdio;
    let disk = Disk::new();
    let socket = disk.dir.path().join("disk.sock");
    let out_path = disk.dir.path().join("stdout");
    let mut command = crate::support::daemon::vublkd("auto", &socket, &disk.path);
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    let file = std::fs::File::create(&out_path).unwrap();
    let mut daemon = Daemon::spawn_to(URING, command, socket, Stdio::from(file));
    daemon.wait_listening();
    Device::plain(&daemon).assert_serves(0);
    daemon.stop();
    assert_eq!(std::fs::read_to_string(out_path).unwrap(), "");
}
