//! A host runs hundreds of these: what two hundred of them cost while their
//! guests do nothing.

use std::time::Duration;

use crate::succession::daemon_of;
use crate::support::daemon::{Daemon, Options, URING};
use crate::support::device::Device;
use crate::support::disk::Disk;
use crate::support::sys::{Deadline, tick};

const DAEMONS: usize = 200;
/// How long nothing may happen.
const IDLE: Duration = Duration::from_secs(2);
/// KiB of all of them together, with their parents, by proportional set size.
const MOST_MEMORY: u64 = 1200 << 10;
/// KiB that a parent has of its own.
const MOST_OF_A_PARENT: u64 = 800;

/// KiB of a process: what it shares counts in part, and what it shares with no other.
fn memory(pid: u32) -> (u64, u64) {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let of = |name| {
        let line = rollup.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    (of("Pss:"), of("Private_Dirty:"))
}

/// Times that its threads were given a CPU, and went to sleep by themselves.
fn wakeups(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks
        .map(|task| {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let line = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:")).unwrap();
            line.trim().parse::<u64>().unwrap()
        })
        .sum()
}

#[test]
fn two_hundred_idle_daemons() {
    let disks: Vec<_> = (0..DAEMONS).map(|_| Disk::of_size(1 << 20)).collect();
    let supervised = Options::with(&["--supervise"]);
    let mut daemons: Vec<_> =
        disks.iter().map(|disk| Daemon::start_at(URING, disk, "disk.sock", &supervised)).collect();
    daemons.iter_mut().for_each(Daemon::wait_listening);
    let mut devices: Vec<_> = daemons.iter().map(Device::plain).collect();
    devices.iter_mut().for_each(|device| device.assert_serves(0));
    let pid = |daemon: &Daemon| daemon_of(daemon).as_raw_nonzero().get().unsigned_abs();
    let pids: Vec<u32> = daemons.iter().flat_map(|daemon| [daemon.pid(), pid(daemon)]).collect();
    let total = || pids.iter().map(|&pid| wakeups(pid)).sum::<u64>();
    // The last of them have to come to rest first.
    let deadline = Deadline::new("idle daemons to be idle");
    loop {
        let before = total();
        assert!(!tick(&[], IDLE));
        if total() == before {
            break;
        }
        deadline.check();
    }
    let together: u64 = pids.iter().map(|&pid| memory(pid).0).sum();
    let parents = daemons.iter().map(|parent| memory(parent.pid()).1).max().unwrap();
    eprintln!(
        "{DAEMONS} idle daemons with their parents: {} MiB, {} KiB each pair, at most {parents} KiB of its own in a \
         parent, no wake-up in {IDLE:?}",
        together >> 10,
        together / DAEMONS as u64
    );
    assert!(together < MOST_MEMORY, "{together} KiB");
    assert!(parents <= MOST_OF_A_PARENT, "{parents} KiB");
    drop(devices);
    daemons.iter_mut().for_each(Daemon::stop);
}
