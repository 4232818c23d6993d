//! A kick that is like an eventfd in all but one thing: no thread can wait for it.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::Duration;

use vublk::sys::process_cpu_ns;

use crate::support::daemon::{Backend, Daemon, Options, THREADS, URING};
use crate::support::device::{Device, Setup, set_ring_addr};
use crate::support::disk::Disk;
use crate::support::frontend::msg;
use crate::support::sys::skip;

/// A descriptor without a file type, as an eventfd is, that poll(2) knows
/// nothing of: a landlock ruleset, or a file system that is being set up.
fn unpollable() -> Option<OwnedFd> {
    let handled: u64 = 1; // LANDLOCK_ACCESS_FS_EXECUTE
    // SAFETY: the kernel reads 8 bytes from `handled`.
    let ruleset = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const handled, 8, 0) };
    let fd = if ruleset >= 0 {
        ruleset
    } else {
        // SAFETY: the kernel reads a string that ends.
        unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), 1) }
    };
    // SAFETY: a new descriptor, close-on-exec, that nobody else knows.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Processor time that a process has used.
fn cpu_time(daemon: &Daemon) -> Duration {
    Duration::from_nanos(process_cpu_ns(i32::try_from(daemon.pid()).unwrap()).unwrap())
}

/// Nothing to do: nothing is done. The time is what is measured.
#[track_caller]
fn assert_idle(daemon: &Daemon, device: &Device) {
    device.frontend.sync();
    let before = cpu_time(daemon);
    device.rings[0].call.take();
    device.rings[0].assert_quiet(Duration::from_millis(300), "an idle ring");
    let used = cpu_time(daemon) - before;
    assert!(used < Duration::from_millis(20), "{used:?} of processor time in 0.3 s of idleness");
}

#[test]
fn a_kick_that_io_uring_cannot_wait_for() {
    check(URING, "a_kick_that_io_uring_cannot_wait_for");
}

#[test]
fn a_kick_that_epoll_cannot_wait_for() {
    check(THREADS, "a_kick_that_epoll_cannot_wait_for");
}

fn check(engine: Backend, name: &str) {
    let Some(odd) = unpollable() else {
        return skip(name, "neither landlock nor fsopen is there");
    };
    let disk = Disk::new();
    let mut daemon = Daemon::start(engine, &disk, &Options::with(&["--workers=1"]));
    let mut device = Device::new(&daemon, Setup { queues: 3, ..Setup::default() });
    for queue in 0..3 {
        device.assert_serves(queue);
    }
    // A running ring gets it, and a ring starts with it.
    let _refused = device.frontend.command(msg::SET_VRING_KICK, &1_u64.to_le_bytes(), &[odd.as_fd()]);
    let at = device.frontend.vring_base(2).unwrap();
    device.frontend.vring_state(msg::SET_VRING_BASE, 2, u32::from(at));
    set_ring_addr(&device.frontend, 2, &device.rings[2]);
    let _refused = device.frontend.command(msg::SET_VRING_KICK, &2_u64.to_le_bytes(), &[odd.as_fd()]);
    let _refused = device.frontend.command(msg::SET_VRING_ENABLE, &[2, 0, 0, 0, 1, 0, 0, 0], &[]);
    for _ in 0..10 {
        device.assert_serves(0);
    }
    assert_idle(&daemon, &device);
    daemon.wait_log("not an eventfd");
    // Real ones again.
    for queue in [1, 2] {
        device.new_kick(queue);
        device.assert_serves(queue as usize);
    }
    device.assert_serves(0);
    assert_idle(&daemon, &device);
    drop(device);
    daemon.stop();
}
