//! The log: what a guest cannot keep out of it, and a log that cannot be
//! written, which is no reason to take a guest's disk away.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::process::Signal;

use super::{each_engine, start};
use crate::support::daemon::{Backend, Daemon, URING, pass_fd, vublkd};
use crate::support::device::{Device, IOERR, OK, T_IN, negotiate, ring_addr};
use crate::support::disk::{Disk, SECTOR};
use crate::support::frontend::{NO_FD, feature, msg, protocol, single_region, words32};
use crate::support::memory::{Memory, Region};
use crate::support::ring::{Desc, NEXT, Ring};
use crate::support::sys::{Deadline, memory_file};

/// A daemon that logs to `fd`.
#[track_caller]
fn start_logging_to(backend: Backend, disk: &Disk, fd: BorrowedFd<'_>) -> Daemon {
    let Backend::Vublkd(engine) = backend else {
        unreachable!("vublkd alone");
    };
    let socket = disk.dir.path().join("disk.sock");
    let mut command = vublkd(engine, &socket, &disk.path);
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    pass_fd(&mut command, fd, 2);
    Daemon::spawn(backend, command, socket)
}

/// SIGUSR1, and the wait until the daemon has taken it.
#[track_caller]
fn ask_for_statistics(daemon: &Daemon) {
    daemon.signal(Signal::USR1);
    let bit = 1 << (libc::SIGUSR1 - 1);
    let pending = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).unwrap().trim().to_owned();
        u64::from_str_radix(&line, 16).unwrap() & bit != 0
    };
    Deadline::new("SIGUSR1 to be taken").until_slowly(|| (!pending()).then_some(()));
}

#[test]
fn a_log_that_cannot_be_written_does_no_harm() {
    each_engine(|engine| {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (reader, left) = rustix::pipe::pipe().unwrap();
        drop(reader);
        for log in [full.as_fd(), left.as_fd()] {
            let disk = Disk::new();
            let mut daemon = start_logging_to(engine, &disk, log);
            daemon.wait_listening();
            for _ in 0..3 {
                let mut device = Device::plain(&daemon);
                device.assert_serves(0);
                ask_for_statistics(&daemon);
                // The line is logged by the thread that answers this.
                device.frontend.sync();
                // And one that the worker logs.
                make_no_sense(&mut device);
                device.assert_serves(0);
            }
            daemon.assert_alive();
            daemon.stop();
        }
    });
}

/// A chain that the worker has a line about.
#[track_caller]
fn make_no_sense(device: &mut Device) {
    let ring = &mut device.rings[0];
    let head = ring.raw(Desc { addr: 1 << 20, len: 16, flags: NEXT, next: 999 });
    ring.offer(head);
    ring.wait_used("a chain that makes no sense");
}

/// A guest can use up its own lines, but not those about its disk.
#[test]
fn a_truncated_image_is_told_whatever_the_guest_does() {
    each_engine(|engine| {
        let (disk, daemon) = start(engine);
        let mut device = Device::plain(&daemon);
        for _ in 0..60 {
            make_no_sense(&mut device);
        }
        daemon.wait_log("left out");
        let image = File::options().write(true).open(&disk.path).unwrap();
        image.set_len(1 << 20).unwrap();
        assert_eq!(device.status(T_IN, 4000, &[], SECTOR), IOERR, "beyond the end");
        daemon.wait_log("truncated");
        assert_eq!(device.status(T_IN, 2044, &[], 8 * SECTOR), IOERR, "over the end");
        assert_eq!(device.status(T_IN, 2040, &[], 8 * SECTOR), OK, "up to the end");
        device.assert_serves(0);
        // These lines have a limit, too.
        for _ in 0..40 {
            assert_eq!(device.status(T_IN, 4000, &[], SECTOR), IOERR);
        }
        let told = daemon.log().lines().filter(|line| line.contains("truncated")).count();
        assert!(told <= 20, "{told} lines about one truncated image");
        // What is there again is served again.
        image.set_len(64 << 20).unwrap();
        assert_eq!(device.status(T_IN, 4000, &[], SECTOR), OK, "grown again");
    });
}

/// A front-end that makes one mistake after another, in one connection and in many: a few lines,
/// and how many more there would have been.
#[test]
fn a_front_end_cannot_flood_the_log() {
    const TIMES: usize = 300;
    let (_disk, mut daemon) = start(URING);
    let memory = Memory::plain();
    let ring = Ring::new(memory.clone(), 128, 0, false);
    let mut frontend = daemon.connect();
    negotiate(&mut frontend, 0);
    frontend.set_mem_table(&memory);
    frontend.vring_state(msg::SET_VRING_NUM, 0, 3);
    frontend.tell(msg::SET_VRING_ADDR, &ring_addr(0, &ring), &[]);
    frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
    let overlapping = Region::new(memory.regions[0].guest, 4096, 0);
    let not_memory = memory_file(0);
    for _ in 0..TIMES {
        frontend.vring_fd(msg::SET_VRING_KICK, 0, &ring.kick);
        frontend.tell64(msg::SET_VRING_KICK, NO_FD);
        for (fd, region) in [(&overlapping.file, &overlapping), (&not_memory, &memory.regions[0])] {
            let told = frontend.command(msg::ADD_MEM_REG, &single_region(region), &[fd.as_fd()]);
            assert_eq!(told.ok(), Some(1));
        }
        let told = frontend.command(msg::SET_VRING_NUM, &words32(&[4000, 128]), &[]);
        assert_eq!(told.ok(), Some(1));
        let told = frontend.command(msg::SET_VRING_ERR, &0_u64.to_le_bytes(), &[not_memory.as_fd()]);
        assert_eq!(told.ok(), Some(1));
    }
    drop(frontend);
    for time in 0..TIMES {
        let frontend = daemon.connect();
        match time % 4 {
            0 => frontend.send(msg::SET_FEATURES, 0, &feature::RING_PACKED.to_le_bytes(), &[]),
            1 => frontend.send(msg::SET_PROTOCOL_FEATURES, 0, &protocol::STATUS.to_le_bytes(), &[]),
            2 => frontend.send(99, 0, &[], &[]),
            _ => frontend.send(msg::GET_INFLIGHT_FD, 0, &[0xff; 24], &[]),
        }
        .unwrap();
        frontend.wait_hangup("a front-end that makes no sense");
    }
    for _ in 0..TIMES {
        drop(daemon.connect());
    }
    Device::plain(&daemon).assert_serves(0);
    daemon.stop();
    let log = daemon.log();
    let told: Vec<&str> = log.lines().filter(|line| !line.contains("DEBUG")).collect();
    // Ten of each kind in ten seconds, and this takes less than half a minute.
    assert!(told.len() < 100, "{} lines:\n{}", told.len(), told.join("\n"));
    let left_out: usize = told
        .iter()
        .filter(|line| line.contains("were left out"))
        .flat_map(|line| line.split_whitespace().find_map(|word| word.parse::<usize>().ok()))
        .sum();
    assert!(left_out > 6 * TIMES, "only {left_out} are said to be left out:\n{}", told.join("\n"));
}
