//! What a request costs in system calls: with 32 in flight, a turn serves many
//! with one io_uring_enter, and no byte is copied.

use std::process::{Command, Stdio};

use crate::remote::serve;
use crate::support::daemon::{Daemon, Options, URING};
use crate::support::device::{Device, OK, T_IN, T_OUT};
use crate::support::disk::Disk;
use crate::support::nbd::Server;
use crate::support::sys::{Deadline, installed, register_tally, skip};
use rustix::process::{Pid, Signal, kill_process};
use vublk::ring::notify::passes;

const DEPTH: u64 = 32;
const REQUESTS: u64 = 20_000;

/// Reads or writes 4096 bytes again and again, `depth` at a time, as a driver does: all
/// that is used is offered again at once, with one kick if one is wanted.
fn load(device: &mut Device, kind: u32, depth: u64, total: u64) {
    let (data, back) = if kind == T_OUT { (vec![7; 4096], 0) } else { (Vec::new(), 4096) };
    let mut requests: Vec<_> = (0..depth).map(|i| device.place(kind, i * 8, &data, back)).collect();
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
    let deadline = Deadline::new("the load to end");
    let mut published: u16 = u16::try_from(offered).unwrap();
    while done < total {
        let used = ring.wait_used("a request under load");
        let mut next = Some(used);
        while let Some(used) = next {
            done += 1;
            if offered < total {
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
    let calls = counted(&daemon, &disk, || load(&mut device, T_IN, DEPTH, REQUESTS));
    eprintln!("{calls} system calls for {REQUESTS} requests at depth {DEPTH}");
    assert!(calls * 2 < REQUESTS, "{calls} system calls for {REQUESTS} requests");
    drop(device);
    daemon.stop();
    assert!(daemon.log().contains("bounced=0 "), "nothing was copied:\n{}", daemon.log());
}

/// One request after another on an NBD server: a system call that ends with the kick, one that sends and ends with the reply,
/// one that tells the driver. The end of the SENDMSG costs none.
#[test]
fn a_request_to_a_server_costs_three_system_calls() {
    register_tally();
    let test = "syscalls::a_request_to_a_server_costs_three_system_calls";
    if !installed("nbdkit", test) || !installed("strace", test) {
        return;
    }
    let (disk, requests) = (Disk::new(), 2000);
    let server = Server::nbdkit(&["memory", "64M"]);
    let mut daemon = serve(&disk, &server.uri(""), &["--poll-us=0", "--supervise=off"]);
    let mut device = Device::plain(&daemon);
    let calls = counted(&daemon, &disk, || load(&mut device, T_OUT, 1, requests));
    eprintln!("{calls} system calls for {requests} requests, one after another");
    assert!(calls * 2 < requests * 7, "{calls} system calls for {requests} requests");
    assert_eq!(device.status(T_OUT, 0, &[7; 4096], 0), OK);
    drop(device);
    daemon.stop();
}

/// The system calls of the daemon while something is done.
fn counted(daemon: &Daemon, disk: &Disk, what: impl FnOnce()) -> u64 {
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
    what();
    kill_process(Pid::from_child(&strace), Signal::INT).unwrap();
    strace.wait().unwrap();
    let text = std::fs::read_to_string(&summary).unwrap();
    text.lines()
        .find(|line| line.ends_with(" total"))
        .and_then(|line| line.split_whitespace().nth(3))
        .and_then(|count| count.parse().ok())
        .unwrap_or_else(|| panic!("no total in:\n{text}"))
}

/// Every thread of the process has a tracer.
fn traced(pid: u32) -> bool {
    let tasks: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().collect();
    tasks.iter().all(|task| {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        status.lines().any(|l| l.strip_prefix("TracerPid:").is_some_and(|p| p.trim() != "0"))
    })
}
