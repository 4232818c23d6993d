//! What a request costs in system calls: with 32 in flight, a turn serves many
//! with one io_uring_enter, and no byte is copied.

use std::process::{Command, Stdio};

use crate::support::daemon::{Daemon, Options, URING};
use crate::support::device::Device;
use crate::support::disk::Disk;
use crate::support::sys::{Deadline, installed, register_tally, skip};
use rustix::process::{Pid, Signal, kill_process};
use vublk::ring::notify::passes;

const DEPTH: u64 = 32;
const REQUESTS: u64 = 20_000;
const T_IN: u32 = 0;

/// Reads 4096 bytes again and again, `DEPTH` at a time, as a driver does: all
/// that is used is offered again at once, with one kick if one is wanted.
fn load(device: &mut Device) {
    let mut requests: Vec<_> = (0..DEPTH).map(|i| device.place(T_IN, i * 8, &[], 4096)).collect();
    let ring = &mut device.rings[0];
    let mut owner = [0; 128];
    let (mut offered, mut done) = (0, 0);
    for (at, (segs, _)) in requests.iter_mut().enumerate() {
        let head = ring.chain(segs);
        owner[usize::from(head)] = at;
        ring.stage(head);
        offered += 1;
    }
    ring.publish();
    ring.kick.signal();
    let deadline = Deadline::new("20000 reads");
    let mut published: u16 = u16::try_from(offered).unwrap();
    while done < REQUESTS {
        let used = ring.wait_used("a read under load");
        let mut next = Some(used);
        while let Some(used) = next {
            done += 1;
            if offered < REQUESTS {
                let at = owner[usize::from(used.head)];
                let head = ring.chain(&requests[at].0);
                owner[usize::from(head)] = at;
                ring.stage(head);
                offered += 1;
            }
            next = ring.take_used();
        }
        ring.publish();
        let now = offered as u16;
        if passes(ring.avail_event(), published, now) {
            ring.kick.signal();
        }
        published = now;
        deadline.check();
    }
}

#[test]
fn deep_queues_cost_well_under_one_system_call_a_request() {
    register_tally();
    let test = "syscalls::deep_queues_cost_well_under_one_system_call_a_request";
    let disk = Disk::new();
    if !disk.takes_direct() {
        return skip(test, "the temporary folder has no O_DIRECT");
    }
    if !installed("strace", test) {
        return;
    }
    // The reads are adjacent: joined, they would say nothing of batches.
    let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--plug=off"]));
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let summary = disk.dir.path().join("strace");
    let mut strace = Command::new("strace")
        .args(["-c", "-f", "-p", &daemon.pid().to_string(), "-o"])
        .arg(&summary)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Attached once the kernel names a tracer of each thread.
    Deadline::new("strace to attach").until_slowly(|| traced(daemon.pid()).then_some(()));
    load(&mut device);
    kill_process(Pid::from_child(&strace), Signal::INT).unwrap();
    strace.wait().unwrap();
    let text = std::fs::read_to_string(&summary).unwrap();
    let calls: u64 = text
        .lines()
        .find(|line| line.ends_with(" total"))
        .and_then(|line| line.split_whitespace().nth(3))
        .and_then(|count| count.parse().ok())
        .unwrap_or_else(|| panic!("no total in:\n{text}"));
    eprintln!("{calls} system calls for {REQUESTS} requests at depth {DEPTH}\n{text}");
    assert!(calls * 2 < REQUESTS, "{calls} system calls for {REQUESTS} requests:\n{text}");
    drop(device);
    daemon.stop();
    assert!(daemon.log().contains("bounced=0 "), "nothing was copied:\n{}", daemon.log());
}

/// Every thread of the process has a tracer.
fn traced(pid: u32) -> bool {
    let tasks: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().collect();
    tasks.iter().all(|task| {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        status.lines().any(|l| l.strip_prefix("TracerPid:").is_some_and(|p| p.trim() != "0"))
    })
}
