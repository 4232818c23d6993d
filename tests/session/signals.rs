//! Signals that come while the daemon starts or waits: none that is not about stopping may
//! end it, and those that are must.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::daemon::{Daemon, URING, vublkd};
use crate::support::device::Device;
use crate::support::disk::Disk;
use crate::support::sys::{Deadline, PATIENCE, installed, root};

/// Holds the fence of every instance, as an earlier daemon's operations do. It goes with the value.
#[track_caller]
fn hold_the_fence(disk: &Disk) -> File {
    let file = File::options().read(true).write(true).open(&disk.path).unwrap();
    // SAFETY: all zeroes is a valid flock, and F_OFD_SETLK reads one.
    unsafe {
        let mut lock: libc::flock = std::mem::zeroed();
        lock.l_type = libc::F_WRLCK as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        lock.l_start = 1 << 62;
        assert_eq!(libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock), 0);
    }
    file
}

/// A daemon's command line, and a fence that it has to wait at.
fn fenced() -> (Disk, File, Command) {
    let disk = Disk::new();
    let fence = hold_the_fence(&disk);
    let mut command = vublkd("io_uring", &disk.dir.path().join("disk.sock"), &disk.path);
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    (disk, fence, command)
}

/// Waits until process `pid` has the disk open, which is just before the fence.
#[track_caller]
fn wait_open(pid: Pid, disk: &Disk) {
    Deadline::new("the daemon to open the disk").until_slowly(|| {
        let mut fds = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let leads = |fd: std::io::Result<std::fs::DirEntry>| {
            fd.is_ok_and(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == disk.path))
        };
        fds.any(leads).then_some(())
    });
}

#[test]
fn signals_that_do_not_stop_it_wait_with_it() {
    let (disk, fence, command) = fenced();
    let mut daemon = Daemon::spawn(URING, command, disk.dir.path().join("disk.sock"));
    wait_open(Pid::from_child(&daemon.child), &disk);
    for (number, signal) in
        [(libc::SIGHUP, Signal::HUP), (libc::SIGUSR1, Signal::USR1), (libc::SIGUSR2, Signal::USR2)]
    {
        daemon.signal(signal);
        let status = format!("/proc/{}/status", daemon.pid());
        Deadline::new(format!("signal {number} to be read, or deadly")).until_slowly(|| {
            daemon.assert_alive();
            let status = std::fs::read_to_string(&status).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).unwrap().trim();
            (u64::from_str_radix(line, 16).unwrap() & 1 << (number - 1) == 0).then_some(())
        });
    }
    drop(fence);
    daemon.wait_listening();
    // They are attended to now.
    daemon.wait_log("statistics");
    Device::plain(&daemon).assert_serves(0);
    daemon.stop();
}

#[test]
fn a_daemon_that_waits_at_the_fence_can_be_stopped() {
    for (extra, signal) in [(None, Signal::TERM), (None, Signal::INT), (Some("--supervise"), Signal::TERM)] {
        let (disk, _fence, mut command) = fenced();
        command.args(extra);
        let mut daemon = Daemon::spawn(URING, command, disk.dir.path().join("disk.sock"));
        let pid = if extra.is_none() {
            Pid::from_child(&daemon.child)
        } else {
            crate::succession::daemon_of(&daemon)
        };
        wait_open(pid, &disk);
        daemon.signal(signal);
        let status = daemon.wait_end(Duration::from_secs(1));
        let killed = std::os::unix::process::ExitStatusExt::signal(&status);
        assert!(status.success() || killed == Some(signal.as_raw()), "{signal:?}: {status}");
    }
}

/// The kernel keeps pid 1, which a container's only program is, from signals without a handler.
#[test]
fn a_container_that_waits_at_the_fence_can_be_stopped() {
    let test = "a_container_that_waits_at_the_fence_can_be_stopped";
    if !root(test, "a pid namespace") || !installed("unshare", test) {
        return;
    }
    for signal in [Signal::TERM, Signal::INT] {
        let (disk, fence, inner) = fenced();
        let mut command = Command::new("unshare");
        command
            .args(["--pid", "--fork", "--kill-child=KILL"])
            .arg(inner.get_program())
            .args(inner.get_args());
        let mut unshare = Daemon::spawn(URING, command, disk.dir.path().join("disk.sock"));
        let pid = Deadline::new("vublkd in its namespace").until_slowly(|| {
            let pid = crate::succession::daemon_of(&unshare);
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            (comm.trim() == "vublkd").then_some(pid)
        });
        wait_open(pid, &disk);
        kill_process(pid, signal).unwrap();
        assert_eq!(unshare.wait_end(PATIENCE).code(), Some(0));
        drop(fence);
    }
}
