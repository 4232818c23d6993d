//! Daemons that go on for one another on one connection: the front-end here never
//! reconnects, and notices a pause.
//!
//! `vublkd --supervise` is the parent; what is killed, or told to make room, is
//! the daemon that it started.

use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::TempDir;

use crate::recovery::{assert_hits, kills};
use crate::session::migration;
use crate::support::control::{self, Control, settle, vublk};
use crate::support::daemon::{Backend, Daemon, Options, URING, vublkd};
use crate::support::device::{
    Device, IOERR, OK, Setup, T_FLUSH, T_OUT, negotiate, set_ring_addr, start_ring,
};
use crate::support::dice::Dice;
use crate::support::disk::{Disk, SECTOR, salted};
use crate::support::frontend::{Frontend, feature, msg};
use crate::support::gate::Gate;
use crate::support::load::{LANES, Load, empty_disk};
use crate::support::loopdev::LoopDevice;
use crate::support::memory::{Memory, Region};
use crate::support::ring::Ring;
use crate::support::sys::{Deadline, PATIENCE, open_fds, register_tally};

fn supervised(engine: Backend, disk: &Disk, extra: &[&str]) -> Daemon {
    let words: Vec<&str> = ["--supervise"].iter().chain(extra).copied().collect();
    Daemon::start(engine, disk, &Options::with(&words))
}

/// One on a device, and the folder of its socket.
pub fn supervised_on(store: &LoopDevice) -> (TempDir, Daemon) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("disk.sock");
    let mut command = vublkd("io_uring", &socket, &store.path);
    command.arg("--supervise");
    let mut daemon = Daemon::spawn(URING, command, socket);
    daemon.wait_listening();
    (folder, daemon)
}

/// The daemon that a parent runs now.
#[track_caller]
pub fn daemon_of(parent: &Daemon) -> Pid {
    let pid = parent.pid();
    Deadline::new("the parent's daemon").until_slowly(|| {
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        children.split_whitespace().next().and_then(|pid| Pid::from_raw(pid.parse().unwrap()))
    })
}

pub fn kill(parent: &Daemon) {
    // Past the moment in which it is not known whether a reply is out, or whether it serves.
    settle(parent);
    // It may have died by itself, which other lines find out.
    let _gone = kill_process(daemon_of(parent), Signal::KILL);
}

/// The same, and returns when the next daemon is there, so that no client reaches the dead one's socket.
#[track_caller]
pub fn kill_and_wait(parent: &Daemon) {
    let victim = daemon_of(parent);
    kill(parent);
    Deadline::new("the end of the daemon").until_slowly(|| (daemon_of(parent) != victim).then_some(()));
}

/// Requests that successors found in flight, one number for each daemon and queue.
pub fn replayed(log: &str) -> Vec<u64> {
    log.lines()
        .filter_map(|line| line.split_once("goes on with ")?.1.split_once(" requests")?.0.parse().ok())
        .collect()
}

/// A ring that starts at `base`, on a connection that asked for no in-flight region,
/// and a load for it.
pub fn attach(daemon: &Daemon, base: u16) -> (Frontend, Ring, Load) {
    let memory = Memory::plain();
    let ring = Ring::new(Rc::clone(&memory), 256, base, true);
    let load = Load::new(&memory, u64::from(base) + 0xfeed);
    let mut frontend = daemon.connect();
    negotiate(&mut frontend, 0);
    frontend.set_mem_table(&memory);
    start_ring(&frontend, 0, &ring);
    // Past the messages of the start: a daemon that dies of a kill in one of them closes the connection.
    settle(daemon);
    (frontend, ring, load)
}

/// A ring that another daemon served so far goes on at `base`, with the same memory.
#[track_caller]
pub fn attach_to(daemon: &Daemon, ring: &Ring, base: u16) -> Frontend {
    let mut frontend = daemon.connect();
    negotiate(&mut frontend, 0);
    frontend.set_mem_table(&ring.memory);
    frontend.vring_state(msg::SET_VRING_NUM, 0, u32::from(ring.size));
    frontend.vring_state(msg::SET_VRING_BASE, 0, u32::from(base));
    set_ring_addr(&frontend, 0, ring);
    frontend.vring_fd(msg::SET_VRING_KICK, 0, &ring.kick);
    frontend.vring_fd(msg::SET_VRING_CALL, 0, &ring.call);
    frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
    frontend
}

/// kill -9 under load, again and again, and the connection lives on.
#[test]
fn killed_under_load_on_one_connection() {
    register_tally();
    crate::session::each_engine(|engine| {
        let disk = empty_disk();
        let mut daemon = supervised(engine, &disk, &[]);
        let (frontend, mut ring, mut load) = attach(&daemon, 0xfff0);
        let kills = kills();
        let mut pauses = Vec::new();
        for _ in 0..kills {
            let victim = daemon_of(&daemon);
            load.offer(&mut ring);
            for _ in 0..load.dice.below(200) {
                load.take(&mut ring);
                load.offer(&mut ring);
            }
            kill_process(victim, Signal::KILL).unwrap();
            let killed = Instant::now();
            Deadline::new("the end of the daemon")
                .until_slowly(|| (daemon_of(&daemon) != victim).then_some(()));
            // Unless it had answered everything, which is rare.
            let before = ring.used_idx();
            if usize::from(before.wrapping_sub(ring.seen)) < LANES {
                Deadline::new("the first answer of its successor")
                    .until(|| (ring.used_idx() != before).then_some(()));
                pauses.push(killed.elapsed());
            }
        }
        load.drain(&mut ring);
        assert_eq!(frontend.vring_base(0).unwrap(), ring.avail_idx);
        let found = replayed(&daemon.log());
        pauses.sort_unstable();
        eprintln!(
            "{engine:?}, supervised: {kills} kills, {} of them with requests in flight ({} in all), {} answers, first one after \
             {:?} (median) to {:?}",
            found.len(),
            found.iter().sum::<u64>(),
            load.answered,
            pauses[pauses.len() / 2],
            pauses.last().unwrap()
        );
        assert_hits(found.len() as u64, kills);
        daemon.stop();
        load.verify(&disk);
    });
}

/// Killed at any moment of a handshake: the session goes on, or the connection is
/// closed; it never hangs, and the next one works.
#[test]
fn killed_in_the_middle_of_messages() {
    let disk = Disk::new();
    let mut daemon = supervised(URING, &disk, &[]);
    let pid = i32::try_from(daemon.pid()).unwrap();
    let mut dice = Dice::new(0xabc);
    let (mut whole, mut closed) = (0, 0);
    for round in 0..kills() {
        let victim = daemon_of(&daemon);
        let after = Duration::from_micros(dice.below(3000));
        let killer = std::thread::spawn(move || {
            // A moment that nothing in the daemon or the front-end has chosen.
            std::thread::sleep(after);
            let _gone = kill_process(victim, Signal::KILL);
        });
        match converse(&daemon, round) {
            Ok(()) => whole += 1,
            Err(e) => {
                let kind = e.kind();
                assert_ne!(kind, std::io::ErrorKind::WouldBlock, "round {round}: the daemon hangs");
                closed += 1;
            }
        }
        killer.join().unwrap();
        let mut device = Device::plain(&daemon);
        device.assert_serves(0);
    }
    eprintln!(
        "killed in the middle of messages: {whole} conversations were whole, {closed} connections closed"
    );
    assert!(whole > closed, "{closed} of {} connections were closed", whole + closed);
    assert!(open_fds(daemon.pid()) < 40, "the parent keeps what no successor needs");
    assert_eq!(i32::try_from(daemon.pid()).unwrap(), pid);
    daemon.stop();
}

/// Every message of a handshake, a request, memory that comes and goes, a stop.
fn converse(daemon: &Daemon, round: u64) -> std::io::Result<()> {
    let mut frontend = daemon.connect();
    let number = |bytes: Vec<u8>| u64::from_le_bytes(bytes.try_into().unwrap());
    let offered = number(frontend.ask(msg::GET_FEATURES, &[])?);
    let protocol = number(frontend.ask(msg::GET_PROTOCOL_FEATURES, &[])?);
    frontend.send(msg::SET_PROTOCOL_FEATURES, 0, &protocol.to_le_bytes(), &[])?;
    frontend.acks = true;
    let features = offered & !(feature::LOG_ALL | feature::RO);
    let memory = Memory::plain();
    let mut ring = Ring::new(memory.clone(), 128, (round * 77) as u16, true);
    use crate::support::frontend::{single_region, words32};
    use std::os::fd::AsFd;
    frontend.command(msg::SET_FEATURES, &features.to_le_bytes(), &[])?;
    frontend.command(msg::SET_OWNER, &[], &[])?;
    frontend.try_mem_table(&memory)?;
    frontend.command(msg::SET_VRING_NUM, &words32(&[0, 128]), &[])?;
    frontend.command(msg::SET_VRING_BASE, &words32(&[0, u32::from(ring.seen)]), &[])?;
    frontend.command(msg::SET_VRING_ADDR, &crate::support::device::ring_addr(0, &ring), &[])?;
    frontend.command(msg::SET_VRING_KICK, &0_u64.to_le_bytes(), &[ring.kick.as_fd()])?;
    frontend.command(msg::SET_VRING_CALL, &0_u64.to_le_bytes(), &[ring.call.as_fd()])?;
    frontend.command(msg::SET_VRING_ENABLE, &words32(&[0, 1]), &[])?;
    let mut device = Device { frontend, memory, rings: Vec::new(), features };
    let (segs, pending) = device.place(T_OUT, 40, &salted(round + 1, 40, 1), 0);
    let head = ring.chain(&segs);
    ring.offer(head);
    let added = Region::new(1 << 32, 1 << 20, 0);
    device.frontend.command(msg::ADD_MEM_REG, &single_region(&added), &[added.file.as_fd()])?;
    device.frontend.command(msg::REM_MEM_REG, &single_region(&added), &[])?;
    let base = device.frontend.vring_base(0)?;
    // Drained: the request was done, whoever did it.
    assert_eq!(base, ring.avail_idx, "round {round}");
    assert_eq!(
        (ring.used_idx(), device.memory.byte(pending.status_at)),
        (ring.avail_idx, OK),
        "round {round}"
    );
    device.rings.clear();
    Ok(())
}

/// SIGUSR2 under load: another daemon goes on, with nothing in flight.
#[test]
fn upgraded_under_load() {
    crate::session::each_engine(|engine| {
        let disk = empty_disk();
        let mut daemon = supervised(engine, &disk, &[]);
        let (_frontend, mut ring, mut load) = attach(&daemon, 3);
        let upgrades = kills() / 4;
        for done in 1..=upgrades {
            daemon.signal(Signal::USR2);
            let taken = Deadline::new("the successor");
            loop {
                load.offer(&mut ring);
                load.take(&mut ring);
                if load.answered.is_multiple_of(64)
                    && daemon.log().matches("took over from a vublkd that stopped").count() as u64 == done
                {
                    break;
                }
                taken.check();
            }
        }
        load.drain(&mut ring);
        let log = daemon.log();
        let mut waits: Vec<f64> = log
            .lines()
            .filter_map(|line| line.split_once("the guest waited ")?.1.split_once(" ms")?.0.parse().ok())
            .collect();
        waits.sort_by(f64::total_cmp);
        assert_eq!(waits.len() as u64, upgrades);
        eprintln!(
            "{engine:?}: {upgrades} upgrades, {} answers, the guest waited {} (median) to {} ms",
            load.answered,
            waits[waits.len() / 2],
            waits.last().unwrap()
        );
        assert!(replayed(&log).is_empty(), "something was in flight at a hand-over");
        daemon.stop();
        load.verify(&disk);
    });
}

/// What a client has asked behind its upgrade is answered, too, before the daemon ends.
#[test]
fn calls_behind_an_upgrade_are_answered() {
    let disk = Disk::new();
    let mut daemon = supervised(URING, &disk, &[]);
    let mut device = Device::plain(&daemon);
    for round in 0..20 {
        let before = daemon_of(&daemon);
        let mut control = Control::of(&daemon);
        let line =
            |id: i64, method: &str| format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":\"{method}\"}}\n");
        control.send([line(1, "upgrade"), line(2, "upgrade"), line(3, "status")].concat().as_bytes());
        for id in 1..=3 {
            assert_eq!(control.receive()["id"], json!(id), "round {round}");
        }
        Deadline::new("the successor").until_slowly(|| (daemon_of(&daemon) != before).then_some(()));
        device.assert_serves(0);
        settle(&daemon);
    }
    drop(device);
    daemon.stop();
}

/// An idle daemon is succeeded, too, and a front-end that came meanwhile is
/// served; what was resized stays so.
#[test]
fn the_state_goes_along() {
    let disk = Disk::new();
    let mut daemon = supervised(URING, &disk, &[]);
    let mut device = Device::new(&daemon, Setup { queues: 3, ..Setup::default() });
    let waiting = daemon.connect();
    waiting.send(msg::GET_FEATURES, 0, &[], &[]).unwrap();
    device.frontend.set_config(32, &[0]);
    Control::of(&daemon).call("resize", json!({"size": 96 << 20})).unwrap();
    for how in ["killed", "stopped"] {
        let before = daemon_of(&daemon);
        if how == "killed" {
            kill(&daemon)
        } else {
            daemon.signal(Signal::USR2)
        }
        Deadline::new("the successor").until_slowly(|| (daemon_of(&daemon) != before).then_some(()));
        for queue in 0..3 {
            device.assert_serves(queue);
        }
        let config = device.frontend.config(0, 60).unwrap();
        assert_eq!(
            (u64::from_le_bytes(config[..8].try_into().unwrap()), config[32]),
            ((96 << 20) / 512, 0),
            "{how}"
        );
        let last = (96 << 20) / SECTOR as u64 - 1;
        device.write(last, &salted(9, last, 1));
        let status = Control::of(&daemon).call("status", json!({})).unwrap();
        assert_eq!(status["disk"]["write_cache"], json!("writethrough"), "{how}");
    }
    // A message after all that, and the next front-end's turn.
    assert_eq!(device.frontend.vring_base(2).unwrap(), device.rings[2].avail_idx);
    drop(device);
    assert_eq!(waiting.receive().unwrap().request, msg::GET_FEATURES);
    let mut second = Device::over(waiting, Setup::default());
    second.assert_serves(0);
    drop(second);
    let socket = daemon.socket.clone();
    daemon.stop();
    assert!(!socket.exists(), "the socket stays behind");
}

/// A dirty log goes along, whether it was in use or not yet.
#[test]
fn a_dirty_log_goes_along() {
    let disk = Disk::new();
    let mut daemon = supervised(URING, &disk, &[]);
    let setup = Setup { memory: Memory::with(&migration::SPANS), ..Setup::default() };
    let mut device = Device::new(&daemon, setup);
    let log = migration::Log::new();
    log.give(&device);
    for in_use in [false, true] {
        migration::log_all(&device, in_use);
        // Not in the moment in which it is not known whether the answer is out.
        settle(&daemon);
        let before = daemon_of(&daemon);
        kill(&daemon);
        Deadline::new("the successor").until_slowly(|| (daemon_of(&daemon) != before).then_some(()));
        if !in_use {
            migration::log_all(&device, true);
        }
        let pending = device.submit(0, crate::support::device::T_IN, 0, &[], 4096);
        device.rings[0].wait_used("a read");
        device.frontend.sync();
        let (marked, page) = (log.take(), pending.status_at / migration::PAGE);
        assert!(marked.contains(&page), "in use before: {in_use}: {page:#x} is not marked");
    }
    drop(device);
    daemon.stop();
}

/// An fdatasync failed, which the kernel says once: no successor's FLUSH may succeed.
#[test]
fn a_failed_sync_goes_along() {
    let test = "succession::a_failed_sync_goes_along";
    let Some((gate, store)) = Gate::under_loop(test, vec![0; 8 << 20]) else { return };
    let (_folder, mut daemon) = supervised_on(&store);
    let mut device = Device::plain(&daemon);
    device.write(8, &salted(1, 8, 8));
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
    device.write(8, &salted(2, 8, 8));
    gate.fail_syncs(1);
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), IOERR);
    for _ in 0..2 {
        let before = daemon_of(&daemon);
        kill(&daemon);
        Deadline::new("the successor").until_slowly(|| (daemon_of(&daemon) != before).then_some(()));
        assert_eq!(device.status(T_FLUSH, 0, &[], 0), IOERR, "what was lost is forgotten");
        device.write(16, &salted(3, 16, 8));
    }
    drop(device);
    daemon.stop();
}

/// No successor takes over where the guest's disk is not at its path any more.
#[test]
fn another_disk_at_the_path() {
    let disk = Disk::new();
    let mut daemon = supervised(URING, &disk, &[]);
    let mut device = Device::plain(&daemon);
    let (moved, before) = (disk.dir.path().join("moved"), daemon_of(&daemon));
    std::fs::rename(&disk.path, &moved).unwrap();
    std::fs::copy(&moved, &disk.path).unwrap();
    daemon.signal(Signal::USR2);
    daemon.wait_log("another disk is there now");
    device.assert_serves(0);
    assert_eq!(daemon_of(&daemon), before);
    // Killed: its successors refuse until the disk is back; the guest waits.
    kill(&daemon);
    daemon.wait_log("is another disk now than the guest had");
    let pending = device.submit(0, crate::support::device::T_IN, 0, &[], 512);
    device.rings[0].assert_quiet(Duration::from_millis(100), "another disk is served");
    std::fs::rename(&moved, &disk.path).unwrap();
    let used = device.rings[0].wait_used("an answer from the right disk");
    assert_eq!(device.outcome(&pending, used).status, OK);
    drop(device);
    daemon.stop();
}

/// The tool asks for a successor, at vublkd's path or elsewhere; one that is no
/// vublkd, or one of another state, is refused before anything is given up.
#[test]
fn the_tool_upgrades() {
    let disk = Disk::new();
    let mut daemon = supervised(URING, &disk, &[]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let control = control::path(&daemon).display().to_string();
    let copy = disk.dir.path().join("newer");
    std::fs::copy(env!("CARGO_BIN_EXE_vublkd"), &copy).unwrap();
    for words in [vec![], vec!["--binary", copy.to_str().unwrap()], vec![]] {
        let before = daemon_of(&daemon);
        let (status, said, complained) = vublk(&[&["upgrade", &control], words.as_slice()].concat());
        assert!(status.success(), "{complained}");
        assert!(said.contains("has taken over, the guest waited"), "{said}");
        assert_ne!(daemon_of(&daemon), before);
        let program =
            std::fs::read_link(format!("/proc/{}/exe", daemon_of(&daemon).as_raw_nonzero())).unwrap();
        assert_eq!(program == copy, !words.is_empty(), "{}", program.display());
        device.assert_serves(0);
    }
    let before = daemon_of(&daemon);
    let refused = |binary: &std::path::Path, why: &str| {
        let (status, _, complained) = vublk(&["upgrade", &control, "--binary", binary.to_str().unwrap()]);
        assert!(!status.success() && complained.contains(why), "{complained}");
        assert!(complained.contains("the daemon goes on") && !complained.contains("/proc/"), "{complained}");
        assert_eq!(daemon_of(&daemon), before);
    };
    // Ones that others may have written.
    use std::os::unix::fs::{PermissionsExt, chown};
    for mode in [0o757, 0o775] {
        std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(mode)).unwrap();
        refused(&copy, "its group and others may not write to it");
    }
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
    if rustix::process::geteuid().is_root() {
        chown(&copy, Some(65534), None).unwrap();
        refused(&copy, &format!("{}: is not executed: it has to belong to root", copy.display()));
    }
    for (binary, why) in [
        ("/bin/true", "/bin/true: is no vublkd, or an older one"),
        ("/dev/null", "is no program"),
        ("/no/such/file", "No such file"),
        ("/tmp", "is no program"),
    ] {
        refused(std::path::Path::new(binary), why);
        device.assert_serves(0);
    }
    drop(device);
    daemon.stop();
}

/// Programs that say that they could go on, and then do not, or never say it.
#[test]
fn programs_that_do_not_work() {
    let disk = Disk::new();
    let (program, socket) = (disk.dir.path().join("program"), disk.dir.path().join("disk.sock"));
    std::fs::copy(env!("CARGO_BIN_EXE_vublkd"), &program).unwrap();
    let mut command = std::process::Command::new(&program);
    command.args(vublkd("io_uring", &socket, &disk.path).get_args()).arg("--supervise");
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    let mut daemon = Daemon::spawn(URING, command, socket);
    daemon.wait_listening();
    let control = control::path(&daemon).display().to_string();
    let mut device = Device::plain(&daemon);
    let put = |text: &str| {
        use std::os::unix::fs::PermissionsExt;
        let fresh = program.with_extension("new");
        std::fs::write(&fresh, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(&fresh, &program).unwrap();
    };
    let says =
        format!("[ \"$1\" = --print-state-version ] && echo {} && exit", vublk::session::state::VERSION);
    for (text, why) in [
        (format!("{says}; kill -SEGV $$"), "was killed by signal 11"),
        (format!("{says}; exit 1"), "ended with 1 before it served"),
        ("exec sleep 20".to_owned(), "is no vublkd"),
        ("echo 0".to_owned(), "and it reads 0"),
        ("exit 1".to_owned(), "is no vublkd"),
    ] {
        put(&text);
        let before = daemon.log().matches(why).count();
        let (status, _, complained) = vublk(&["upgrade", &control]);
        assert!(!status.success() && complained.contains(why), "{text}: {complained}");
        if complained.contains("the old program goes on") {
            Deadline::new(format!("{why:?} in the log"))
                .until_slowly(|| (daemon.log().matches(why).count() > before).then_some(()));
        }
        device.assert_serves(0);
        let exe = std::fs::read_link(format!("/proc/{}/exe", daemon_of(&daemon).as_raw_nonzero())).unwrap();
        assert!(exe.to_string_lossy().ends_with("program (deleted)"), "{}", exe.display());
    }
    drop(device);
    daemon.stop();
}

/// A stop that comes while a daemon hands over is a stop.
#[test]
fn stopped_while_it_hands_over() {
    for _ in 0..10 {
        let disk = Disk::new();
        let mut daemon = supervised(URING, &disk, &[]);
        let mut device = Device::plain(&daemon);
        device.assert_serves(0);
        daemon.signal(Signal::USR2);
        daemon.stop();
    }
}

/// A successor that was killed while requests were in the kernel waits for the
/// kernel to end them before it does them again.
#[test]
fn a_successor_waits_for_what_the_kernel_still_does() {
    let test = "succession::a_successor_waits_for_what_the_kernel_still_does";
    let Some((gate, store)) = Gate::under_loop(test, vec![0; 8 << 20]) else { return };
    let (_folder, mut daemon) = supervised_on(&store);
    let (_frontend, mut ring, mut load) = attach(&daemon, 0);
    for round in 0..kills().div_ceil(3) {
        gate.close(LANES, LANES / 2);
        load.offer(&mut ring);
        Deadline::new("requests to be held").until_slowly(|| (gate.held() == LANES / 2).then_some(()));
        let victim = daemon_of(&daemon);
        kill(&daemon);
        Deadline::new("the end of the daemon").until_slowly(|| (daemon_of(&daemon) != victim).then_some(()));
        if round == 0 {
            daemon.wait_log("an earlier daemon's operations");
        }
        ring.call.take();
        ring.assert_quiet(Duration::from_millis(5), "answered while the dead daemon's requests run");
        gate.open();
        load.drain(&mut ring);
    }
    daemon.stop();
}

/// A daemon that never could serve does not come back, and says why.
#[test]
fn a_daemon_that_cannot_start() {
    let disk = Disk::new();
    std::fs::remove_file(&disk.path).unwrap();
    let mut daemon = Daemon::start_at(URING, &disk, "disk.sock", &Options::with(&["--supervise"]));
    assert_eq!(daemon.wait_end(PATIENCE).code(), Some(1));
    assert!(daemon.log().contains("no such file"));
    let mut daemon = Daemon::start_at(URING, &disk, "disk.sock", &Options::with(&["--supervise", "--bogus"]));
    assert_eq!(daemon.wait_end(PATIENCE).code(), Some(2));
}

/// SIGUSR2 where there is no store is refused, and costs nothing.
#[test]
fn without_a_store() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    let mut device = Device::plain(&daemon);
    daemon.signal(Signal::USR2);
    daemon.wait_log("started with --supervise=off");
    device.assert_serves(0);
    drop(device);
    daemon.stop();
}
