//! The log: what a guest cannot keep out of it, and a log that cannot be
//! written, which is no reason to take a guest's disk away.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::process::Signal;

use super::{each_engine, start};
use crate::support::daemon::{Backend, Daemon, pass_fd, vublkd};
use crate::support::device::{Device, IOERR, OK, T_IN};
use crate::support::disk::{Disk, SECTOR};
use crate::support::ring::{Desc, NEXT};
use crate::support::sys::Deadline;

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
