//! RLIMIT_NOFILE: what is needed is counted at the start; and where descriptors run out all the
//! same, nothing is acknowledged that was not done, and nothing ends or spins.

use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::time::Duration;

use serde_json::json;
use vublk::sys::process_cpu_ns;

use super::{each_engine, start};
use crate::support::control::Control;
use crate::support::daemon::{Backend, Daemon, THREADS, URING, vublkd};
use crate::support::device::{Device, OK, Setup, T_IN, negotiate, set_ring_addr};
use crate::support::disk::{Disk, SECTOR};
use crate::support::frontend::{msg, words32};
use crate::support::memory::Memory;
use crate::support::ring::Ring;
use crate::support::sys::{Event, tick};

/// Starts a daemon that may have so many descriptors.
fn limited(engine: Backend, disk: &Disk, most: libc::rlim_t, extra: &[&str], supervised: bool) -> Daemon {
    let Backend::Vublkd(name) = engine else { panic!("vublkd alone") };
    let socket = disk.dir.path().join("disk.sock");
    let mut command = vublkd(name, &socket, &disk.path);
    command.args(extra);
    if supervised {
        command.arg("--supervise");
    }
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: one system call, which is allowed between fork and exec.
    unsafe {
        command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    Daemon::spawn(engine, command, socket)
}

/// Changes the soft limit of a running daemon.
fn limit(daemon: &Daemon, most: u64) {
    let pid = libc::pid_t::try_from(daemon.pid()).unwrap();
    // SAFETY: reads and writes one rlimit.
    unsafe {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        assert_eq!(libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit), 0);
        limit.rlim_cur = most.min(limit.rlim_max);
        assert_eq!(libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()), 0);
    }
}

/// It may open none.
fn exhaust(daemon: &Daemon) {
    let folder = format!("/proc/{}/fd", daemon.pid());
    let is_free = |number: &u64| !std::fs::exists(format!("{folder}/{number}")).unwrap();
    // Those above stay open.
    limit(daemon, (0..).find(is_free).unwrap());
}

#[test]
fn all_queues_are_served_with_1024_descriptors() {
    for (engine, supervised) in [(URING, false), (THREADS, false), (URING, true)] {
        let disk = Disk::new();
        let mut daemon = limited(engine, &disk, 1024, &["--num-queues=256", "--workers=4"], supervised);
        daemon.wait_listening();
        let memory = Memory::plain();
        let mut device =
            Device::new(&daemon, Setup { queues: 256, ring_size: 16, memory, ..Setup::default() });
        let errs: Vec<Event> = (0..256).map(|_| Event::new()).collect();
        for (queue, err) in (0..).zip(&errs) {
            device.frontend.vring_fd(msg::SET_VRING_ERR, queue, err);
        }
        let waiting: Vec<_> =
            (0..256).map(|queue| device.submit(queue, T_IN, queue as u64, &[], SECTOR)).collect();
        for (queue, pending) in waiting.iter().enumerate() {
            let used = device.rings[queue].wait_used("one of 256 queues");
            assert_eq!(device.outcome(pending, used).status, OK);
        }
        drop(device);
        Device::plain(&daemon).assert_serves(0);
        daemon.stop();
        assert!(!daemon.log().contains("run out"), "{}", daemon.log());
    }
}

#[test]
fn too_few_descriptors_are_told_at_the_start() {
    let disk = Disk::new();
    let mut daemon = limited(URING, &disk, 300, &["--num-queues=256"], false);
    assert_eq!(daemon.wait_end(Duration::from_secs(10)).code(), Some(1));
    let said = daemon.log();
    assert!(said.contains("open files") && said.contains("LimitNOFILE"), "{said}");
    assert!(said.contains("disk.raw") && said.contains("--num-queues"), "{said}");
    assert!(!said.contains("serving"), "{said}");
    drop(daemon);
    let mut daemon = limited(URING, &disk, 300, &["--num-queues=32", "--workers=2"], false);
    daemon.wait_listening();
    Device::plain(&daemon).assert_serves(0);
}

/// A message whose descriptor is lost is refused, and the reason is told; what was there stays.
#[test]
fn a_message_that_loses_its_descriptor_is_refused() {
    each_engine(|engine| {
        let (_disk, mut daemon) = start(engine);
        let mut device = Device::plain(&daemon);
        device.assert_serves(0);
        let event = Event::new();
        exhaust(&daemon);
        for request in [msg::SET_VRING_KICK, msg::SET_VRING_CALL, msg::SET_VRING_ERR] {
            let told = device.frontend.command(request, &0_u64.to_le_bytes(), &[event.as_fd()]);
            assert_eq!(told.ok(), Some(1), "message {request}");
        }
        assert_ne!(device.frontend.try_mem_table(&device.memory).ok(), Some(0));
        let said = daemon.wait_log("no descriptor is left");
        assert!(said.contains("LimitNOFILE"), "{said}");
        assert!(!daemon.log().contains("more than 32"), "{}", daemon.log());
        device.assert_serves(0);
        // What a message asks for without bringing it.
        let told = device.frontend.command(msg::SET_CONFIG, &[words32(&[32, 1, 0]), vec![0]].concat(), &[]);
        assert_eq!(told.ok(), Some(0));
        device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 0);
        device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
        device.assert_serves(0);
        limit(&daemon, u64::MAX);
        device.new_kick(0);
        device.frontend.set_mem_table(&device.memory);
        device.assert_serves(0);
        daemon.assert_alive();
    });
}

/// The first ring needs a worker, which needs descriptors: until there are some its start is
/// refused.
#[test]
fn a_ring_whose_worker_cannot_start_is_not_acknowledged() {
    each_engine(|engine| {
        let (_disk, mut daemon) = start(engine);
        let mut frontend = daemon.connect();
        let features = negotiate(&mut frontend, 0);
        let memory = Memory::plain();
        frontend.set_mem_table(&memory);
        let ring = Ring::new(memory.clone(), 128, 0, true);
        frontend.vring_state(msg::SET_VRING_NUM, 0, 128);
        set_ring_addr(&frontend, 0, &ring);
        frontend.vring_fd(msg::SET_VRING_KICK, 0, &ring.kick);
        frontend.vring_fd(msg::SET_VRING_CALL, 0, &ring.call);
        exhaust(&daemon);
        for _ in 0..3 {
            let told = frontend.command(msg::SET_VRING_ENABLE, &words32(&[0, 1]), &[]);
            assert_eq!(told.ok(), Some(1), "{}", daemon.log());
        }
        daemon.wait_log("queue 0 cannot be served now");
        limit(&daemon, u64::MAX);
        frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
        let mut device = Device { frontend, memory, rings: vec![ring], features };
        device.assert_serves(0);
        daemon.assert_alive();
    });
}

/// Connections that cannot be accepted wait, and cost nothing; the control socket keeps a place.
#[test]
fn nothing_spins_while_no_connection_can_be_accepted() {
    let (_disk, mut daemon) = start(URING);
    let cpu = |daemon: &Daemon| process_cpu_ns(i32::try_from(daemon.pid()).unwrap()).unwrap();
    assert!(Control::of(&daemon).call("status", json!({})).is_ok(), "all that it needs is there");
    exhaust(&daemon);
    let (frontend, mut control) = (daemon.connect(), Control::of(&daemon));
    control.send(b"{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"status\"}\n");
    let before = cpu(&daemon);
    // The time that is measured.
    tick(&[], Duration::from_millis(500));
    let used = Duration::from_nanos(cpu(&daemon) - before);
    assert!(used < Duration::from_millis(50), "{used:?} of processor time in 0.5 s");
    assert!(control.receive()["result"]["pid"].is_number());
    daemon.assert_alive();
    limit(&daemon, u64::MAX);
    frontend.ask64(msg::GET_FEATURES);
    drop((frontend, control));
    Device::plain(&daemon).assert_serves(0);
    assert!(Control::of(&daemon).call("status", json!({})).is_ok());
}
