//! A host runs hundreds of these: what two hundred of them cost while their
//! guests do nothing.

use std::time::Duration;

use crate::support::daemon::{Daemon, Options, URING};
use crate::support::device::Device;
use crate::support::disk::Disk;
use crate::support::sys::{Deadline, tick};

const DAEMONS: usize = 200;
/// How long nothing may happen.
const IDLE: Duration = Duration::from_secs(2);
/// Bytes of all of them together.
const MOST_MEMORY: u64 = 1200 << 20;

/// Memory of its own and of its files, bytes; the guest's is shared memory.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let of = |name| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
    };
    of("RssAnon:") + of("RssFile:")
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
    let mut daemons: Vec<_> =
        disks.iter().map(|disk| Daemon::start_at(URING, disk, "disk.sock", &Options::default())).collect();
    daemons.iter_mut().for_each(Daemon::wait_listening);
    let mut devices: Vec<_> = daemons.iter().map(Device::plain).collect();
    devices.iter_mut().for_each(|device| device.assert_serves(0));
    let total = || daemons.iter().map(|d| wakeups(d.pid())).sum::<u64>();
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
    let memory: u64 = daemons.iter().map(|d| resident(d.pid())).sum();
    let each = (memory >> 10) / DAEMONS as u64;
    eprintln!("{DAEMONS} idle daemons: {} MiB, {each} KiB each, no wake-up in {IDLE:?}", memory >> 20);
    assert!(memory < MOST_MEMORY, "{memory} bytes");
    drop(devices);
    daemons.iter_mut().for_each(Daemon::stop);
}
