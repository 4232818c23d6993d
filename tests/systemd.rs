//! The units in `dist/systemd`: that systemd takes them, that the daemon starts by
//! socket activation for real, with a front-end waiting, and that daemons go on
//! for one another from the descriptor store.

mod network;
mod units;

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};

use crate::recovery::{assert_hits, kills};
use crate::support::daemon::{Daemon, URING, run};
use crate::support::device::{Device, Setup, negotiate, start_ring};
use crate::support::disk::Disk;
use crate::support::frontend::{Frontend, msg};
use crate::support::load::{LANES, Load, empty_disk};
use crate::support::manager::Manager;
use crate::support::memory::Memory;
use crate::support::ring::Ring;
use crate::support::sys::{Deadline, PATIENCE, installed};
use crate::support::systemd::{Systemd, ships, units};

/// `systemd-analyze verify` looks up the binary, so it is given the built one.
#[test]
fn units_are_valid() {
    if !installed("systemd-analyze", "systemd::units_are_valid") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]);
    for (name, text) in units(env!("CARGO_BIN_EXE_vublkd")) {
        let unit = folder.path().join(name.replace('@', "@vm1"));
        std::fs::write(&unit, text).unwrap();
        verify.arg(unit);
    }
    let drop_ins = folder.path().join("vublk@vm1.service.d");
    std::fs::create_dir(&drop_ins).unwrap();
    for name in ["image-elsewhere", "network", "block-device", "pin-memory", "limits"] {
        let name = format!("{name}.conf");
        std::fs::copy(ships().join("examples").join(&name), drop_ins.join(&name)).unwrap();
    }
    let (status, stdout, stderr) = run(verify);
    assert!(status.success(), "{stdout}{stderr}");
    assert_eq!(stderr, "", "a warning is a mistake too");
}

/// The first connection starts the daemon, which then serves that connection.
#[test]
fn socket_activate_serves_the_front_end_that_woke_it() {
    if !installed("systemd-socket-activate", "systemd::socket_activate_serves_the_front_end_that_woke_it") {
        return;
    }
    let disk = Disk::new();
    let socket = disk.dir.path().join("vm1.sock");
    let direct = if disk.takes_direct() { "on" } else { "off" };
    let mut activate = Command::new("systemd-socket-activate");
    activate.arg("-l").arg(&socket).arg(env!("CARGO_BIN_EXE_vublkd"));
    activate.arg(format!("--blk-file={}", disk.path.display())).arg(format!("--direct={direct}"));
    let mut daemon = Daemon::spawn(URING, activate, socket.clone());
    daemon.wait_listening();
    let early = Frontend::new(UnixStream::connect(&socket).unwrap());
    let mut device = Device::over(early, Setup::default());
    device.assert_serves(0);
    drop(device);
    Device::plain(&daemon).assert_serves(0);
    daemon.stop();
    assert!(socket.exists(), "the socket belongs to systemd");
}

/// Two queues that share a call, which a store has once, and a load for the first.
fn two_queues(mut frontend: Frontend) -> (Frontend, Ring, Ring, Load) {
    let memory = Memory::plain();
    let first = Ring::new(memory.clone(), 256, 9, true);
    let second = Ring::new(memory.clone(), 64, 0, true);
    negotiate(&mut frontend, 0);
    frontend.set_mem_table(&memory);
    start_ring(&frontend, 0, &first);
    start_ring(&frontend, 1, &second);
    frontend.vring_fd(msg::SET_VRING_CALL, 1, &first.call);
    let load = Load::new(&memory, 0xfd);
    (frontend, first, second, load)
}

/// Killed, and restarted by `systemctl restart`: with the store each daemon goes on
/// where the one before it ended, and the front-end never reconnects.
#[test]
fn the_descriptor_store() {
    let disk = empty_disk();
    let mut manager = Manager::new(disk.dir.path());
    let mut daemon = manager.start(&disk);
    let (frontend, mut ring, second, mut load) = two_queues(daemon.connect());
    let most = manager.stored();
    let kills = kills();
    let mut hit = 0;
    for round in 0..kills {
        load.offer(&mut ring);
        for _ in 0..load.dice.below(100) {
            load.take(&mut ring);
            load.offer(&mut ring);
        }
        load.burst(&mut ring);
        if round % 4 == 3 {
            daemon.stop();
        } else {
            daemon.signal(Signal::KILL);
            daemon.wait_end(PATIENCE);
        }
        daemon = manager.start(&disk);
        daemon.wait_log("took over from a vublkd that");
        hit += u64::from(
            round % 4 != 3 && daemon.log().contains("requests that an earlier vublkd left in flight"),
        );
        // The same as ever is stored, however often.
        assert!(manager.stored() <= most + 1, "{} descriptors are stored, {most} at first", manager.stored());
    }
    load.drain(&mut ring);
    assert_eq!(frontend.vring_base(0).unwrap(), ring.avail_idx);
    assert_eq!(frontend.vring_base(1).unwrap(), second.avail_idx);
    eprintln!("the descriptor store: {kills} ends, {hit} with requests in flight, {} answers", load.answered);
    assert_hits(hit, kills - kills / 4);
    drop(frontend);
    // No front-end is connected: only the state is left, which says so.
    Deadline::new("the store to be emptied").until_slowly(|| (manager.stored() == 1).then_some(()));
    daemon.stop();
    load.verify(&disk);
}

/// The units that ship, under a real systemd: the first connection starts the daemon,
/// kill -9 and `systemctl restart` end it, and the front-end never reconnects.
#[test]
fn a_real_systemd() {
    let disk = empty_disk();
    let Some(systemd) = Systemd::start("systemd::a_real_systemd", &disk) else { return };
    let (frontend, mut ring, second, mut load) = two_queues(Frontend::new(systemd.connect("vm1")));
    let stored = || systemd.show("NFileDescriptorStore", "vublk@vm1.service");
    let most: u32 = stored().parse().unwrap();
    let (kills, mut waits) = (kills(), Vec::new());
    for round in 0..kills {
        let victim = systemd.daemon().unwrap();
        load.offer(&mut ring);
        for _ in 0..load.dice.below(100) {
            load.take(&mut ring);
            load.offer(&mut ring);
        }
        load.burst(&mut ring);
        if round % 8 == 7 {
            let tool = systemd.inside(&["/run/bin/vublk", "upgrade", "/run/vublk/vm1/control"]);
            let upgrade = std::thread::spawn(move || run(tool));
            let taken = Deadline::new("the tool");
            while !upgrade.is_finished() {
                load.offer(&mut ring);
                load.take(&mut ring);
                taken.check();
            }
            let (status, said, complained) = upgrade.join().unwrap();
            assert!(status.success() && said.contains("has taken over"), "{said}{complained}");
            load.offer(&mut ring);
        } else if round % 4 == 3 {
            systemd.ctl(&["restart", "vublk@vm1.service"]);
        } else {
            kill_process(victim, Signal::KILL).unwrap();
        }
        let killed = Instant::now();
        systemd.daemon_after(victim);
        let before = ring.used_idx();
        if usize::from(before.wrapping_sub(ring.seen)) < LANES {
            Deadline::new("its first answer").until(|| (ring.used_idx() != before).then_some(()));
            if round % 4 != 3 {
                waits.push(killed.elapsed());
            }
        }
        let now: u32 = stored().parse().unwrap();
        assert!((1..=most + 1).contains(&now), "{now} descriptors are stored, {most} at first");
    }
    load.drain(&mut ring);
    assert_eq!(frontend.vring_base(0).unwrap(), ring.avail_idx);
    assert_eq!(frontend.vring_base(1).unwrap(), second.avail_idx);
    let hit = systemd.log().matches("goes on with").count() as u64;
    waits.sort_unstable();
    eprintln!(
        "a real systemd: {kills} ends, {hit} with requests in flight, {} answers, first one after {:?} (median) to {:?}",
        load.answered,
        waits[waits.len() / 2],
        waits.last().unwrap()
    );
    assert_hits(hit, kills - kills / 4);
    drop(frontend);
    // No front-end is connected: only the state is left, which says so.
    Deadline::new("the store to be emptied").until_slowly(|| (stored() == "1").then_some(()));
    systemd.ctl(&["stop", "vublk@vm1.service"]);
    assert_eq!(systemd.show("Result", "vublk@vm1.service"), "success");
    load.verify(&disk);
}

/// A daemon that ended before it had anything leaves nothing that keeps the next
/// one from serving.
#[test]
fn a_store_of_nothing() {
    let disk = Disk::new();
    let mut manager = Manager::new(disk.dir.path());
    let elsewhere = disk.dir.path().join("elsewhere");
    std::fs::rename(&disk.path, &elsewhere).unwrap();
    for _ in 0..2 {
        let started = Instant::now();
        let mut daemon = manager.start(&disk);
        assert_eq!(daemon.wait_end(PATIENCE).code(), Some(4));
        assert!(started.elapsed() >= Duration::from_secs(1), "systemd would start it in a loop");
        assert!(daemon.log().contains("no such file"), "{}", daemon.log());
    }
    std::fs::rename(&elsewhere, &disk.path).unwrap();
    let mut daemon = manager.start(&disk);
    Device::plain(&daemon).assert_serves(0);
    daemon.stop();
}

/// A message that daemons die of is not carried out for ever: once three have died the
/// connection is closed.
#[test]
fn a_message_that_kills() {
    let disk = Disk::new();
    let mut manager = Manager::new(disk.dir.path());
    let mut daemon = manager.start(&disk);
    let device = Device::plain(&daemon);
    let ask = [msg::GET_FEATURES.to_le_bytes(), 1_u32.to_le_bytes(), 0_u32.to_le_bytes()].concat();
    for tries in 0..=2 {
        daemon.signal(Signal::KILL);
        daemon.wait_end(PATIENCE);
        // As if it had died of a message that is whole, like those before it.
        let state = manager.state();
        state.write_all_at(&[2], 2).unwrap();
        state.write_all_at(&[(ask.len() as u32).to_le_bytes(), 0_u32.to_le_bytes()].concat(), 12).unwrap();
        state.write_all_at(&ask, 4096 + 2 * (512 << 10)).unwrap();
        state.write_all_at(&[tries], 64).unwrap();
        daemon = manager.start(&disk);
        if tries < 2 {
            assert_eq!(device.frontend.receive().unwrap().request, msg::GET_FEATURES, "try {tries}");
            daemon.wait_log("is carried out now");
        } else {
            device.frontend.wait_hangup("a message that killed three daemons");
            break;
        }
    }
    Device::plain(&daemon).assert_serves(0);
    daemon.stop();
}

/// A restart in the middle of a message, one that the daemon asks for, and one while the front-end leaves.
#[test]
fn restarts_at_bad_moments() {
    let disk = Disk::new();
    let mut manager = Manager::new(disk.dir.path());
    let mut daemon = manager.start(&disk);
    let device = Device::plain(&daemon);
    device.frontend.send_bytes(&[msg::GET_FEATURES as u8, 0, 0, 0, 1], &[]).unwrap();
    daemon.stop();
    daemon = manager.start(&disk);
    device.frontend.wait_hangup("half of a message was lost with the daemon");
    let mut device = Device::plain(&daemon);
    // As `vublk upgrade` has it: the daemon asks systemd for a successor by its exit code.
    daemon.signal(Signal::USR2);
    assert_eq!(daemon.wait_end(PATIENCE).code(), Some(vublk::supervise::RESTART.into()));
    daemon = manager.start(&disk);
    device.assert_serves(0);
    daemon.signal(Signal::KILL);
    daemon.wait_end(PATIENCE);
    drop(device);
    manager.drop_hung_up();
    daemon = manager.start(&disk);
    Device::plain(&daemon).assert_serves(0);
    daemon.stop();
}

/// A SIGTERM that comes while the daemon is busy with messages is one for a successor, whatever it was just looking at.
#[test]
fn a_sigterm_among_messages() {
    let disk = Disk::new();
    let mut manager = Manager::new(disk.dir.path());
    let mut daemon = manager.start(&disk);
    let mut device = Device::plain(&daemon);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let messages = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                device.frontend.ask(msg::GET_FEATURES, &[]).expect("the connection goes on");
            }
        });
        for round in 0..100 {
            daemon.signal(Signal::TERM);
            daemon.wait_end(PATIENCE);
            assert!(
                !messages.is_finished(),
                "round {round}: the daemon closed the connection\n{}",
                daemon.log()
            );
            daemon = manager.start(&disk);
            daemon.wait_log("took over from a vublkd that stopped for this one");
        }
        done.store(true, Ordering::Relaxed);
    });
    device.assert_serves(0);
    daemon.stop();
}
