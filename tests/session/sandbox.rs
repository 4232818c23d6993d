//! Where io_uring is forbidden, as containers and some distributions do.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use crate::support::daemon::{Daemon, URING, vublkd};
use crate::support::device::Device;
use crate::support::disk::{Disk, salted};

/// Makes these system calls fail with this error in the command and its children.
pub(super) fn forbid(command: &mut Command, calls: &[i64], errno: i32) {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let refuse = libc::SECCOMP_RET_ERRNO | u32::try_from(errno).unwrap();
    // The first word of the data is the number of the system call.
    let mut filter = vec![step(LOAD, 0, 0, 0)];
    for &call in calls {
        filter.push(step(JUMP_IF_EQUAL, 0, 1, u32::try_from(call).unwrap()));
        filter.push(step(RETURN, 0, 0, refuse));
    }
    filter.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    // SAFETY: the closure makes two prctl calls and nothing else; the filter
    // is a value it owns.
    unsafe {
        command.pre_exec(move || {
            let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
            let off: libc::c_ulong = 0;
            let on: libc::c_ulong = 1;
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, on, off, off, off) != 0
                || libc::prctl(
                    libc::PR_SET_SECCOMP,
                    libc::c_ulong::from(libc::SECCOMP_MODE_FILTER),
                    &raw const program,
                ) != 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

fn start_without(engine: &str, errno: i32, disk: &Disk) -> Daemon {
    let socket = disk.dir.path().join("disk.sock");
    let mut command = vublkd(engine, &socket, &disk.path);
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    forbid(&mut command, &[libc::SYS_io_uring_setup], errno);
    Daemon::spawn(URING, command, socket)
}

#[test]
fn auto_falls_back_to_threads() {
    for errno in [libc::EPERM, libc::ENOSYS] {
        let disk = Disk::new();
        let mut daemon = start_without("auto", errno, &disk);
        daemon.wait_listening();
        let mut device = Device::plain(&daemon);
        device.assert_serves(0);
        device.write(8, &salted(1, 8, 8));
        assert_eq!(device.read(8, 8), salted(1, 8, 8));
        let line = daemon.wait_log("threads");
        assert!(line.contains("io_uring"), "{line}");
        drop(device);
        daemon.stop();
    }
}

#[test]
fn io_uring_asked_for_is_a_clear_error() {
    let disk = Disk::new();
    let mut daemon = start_without("io_uring", libc::EPERM, &disk);
    let status = daemon.wait_end(Duration::from_secs(10));
    assert!(!status.success());
    let log = daemon.log();
    assert!(log.contains("io_uring"), "{log}");
    assert!(log.contains("threads"), "no way out is named: {log}");
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn auto_takes_io_uring_where_it_may() {
    let disk = Disk::new();
    let socket = disk.dir.path().join("disk.sock");
    let mut command = vublkd("auto", &socket, &disk.path);
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    let mut daemon = Daemon::spawn(URING, command, socket);
    daemon.wait_listening();
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let rings = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid()))
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.to_string_lossy().contains("io_uring"))
        .count();
    if rings == 0 {
        crate::support::sys::skip("auto_takes_io_uring_where_it_may", "io_uring is not available here");
    }
}
