//! Snapshots of a disk that a guest uses, and what has changed between them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::succession::{attach, kill_and_wait};
use crate::support::control::{self, Control, settle, vublk};
use crate::support::daemon::{Daemon, Options, URING, vublkd};
use crate::support::device::{Device, OK, Setup, T_DISCARD, T_OUT, T_WRITE_ZEROES, range};
use crate::support::dice::Dice;
use crate::support::disk::{Disk, SECTOR, salted};
use crate::support::fs::Filesystem;
use crate::support::load::{Load, empty_disk};
use crate::support::ring::Ring;
use crate::support::sys::tick;

const GRAIN: u64 = 64 << 10;

#[track_caller]
fn run(words: &[&str]) -> String {
    let (status, said, complained) = vublk(words);
    assert!(status.success(), "vublk {words:?}: {said}{complained}");
    said
}

#[track_caller]
fn fails(words: &[&str], why: &str) {
    let (status, said, complained) = vublk(words);
    assert_eq!(status.code(), Some(1), "vublk {words:?}: {said}{complained}");
    assert!(complained.contains(why), "vublk {words:?}: {complained}");
}

fn at(daemon: &Daemon) -> String {
    control::path(daemon).to_str().unwrap().to_owned()
}

/// No request is answered.
fn rests(ring: &Ring) -> bool {
    let before = ring.used_idx();
    assert!(!tick(&[], Duration::from_millis(50)));
    ring.used_idx() == before
}

/// A pause drains, syncs and holds; it ends by its word, by its time, and by no other client's word.
#[test]
fn a_disk_rests_and_goes_on() {
    let disk = empty_disk();
    let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--supervise"]));
    let (frontend, mut ring, mut load) = attach(&daemon, 0);
    load.offer(&mut ring);
    load.drain(&mut ring);
    let mut control = Control::of(&daemon);
    let pause = control.call("pause", json!({"timeout_ms": 60_000})).unwrap();
    load.offer(&mut ring);
    assert!(rests(&ring), "a paused disk answers");
    let (_, why) = control.call("pause", json!({})).unwrap_err();
    assert!(why.contains("paused already"), "{why}");
    let (_, why) = control.call("resume", json!({"pause": pause.as_u64().unwrap() + 1})).unwrap_err();
    assert!(why.contains("by another client"), "{why}");
    control::says(&at(&daemon), "paused", "vublk resume disk");
    let paused = control.call("status", json!({})).unwrap()["paused"].take();
    let left = paused["ends_in_seconds"].as_f64().unwrap();
    assert!(paused["seconds"].as_f64() > Some(0.0) && (1.0..60.0).contains(&left), "{paused}");
    let screen = run(&["top", "--once=1", &at(&daemon)]);
    assert!(screen.lines().any(|line| line.starts_with("disk paused ")), "{screen}");
    fails(&["upgrade", &at(&daemon)], "paused for a snapshot");
    let ms = control.call("resume", json!({"pause": pause})).unwrap();
    assert!(ms.as_f64().unwrap() >= 50.0, "{ms}");
    load.drain(&mut ring);
    assert!(control.call("status", json!({})).unwrap().get("paused").is_none());
    let (_, why) = control.call("resume", json!({})).unwrap_err();
    assert!(why.contains("not paused"), "{why}");
    let (_, why) = control.call("snapshot", json!({"pause": pause})).unwrap_err();
    assert!(why.contains("not paused"), "{why}");
    // By its time.
    control.call("pause", json!({"timeout_ms": 200})).unwrap();
    load.offer(&mut ring);
    load.drain(&mut ring);
    daemon.wait_log("was paused for a snapshot for too long");
    // A daemon that dies leaves no pause behind.
    run(&["pause", &at(&daemon), "--time=600"]);
    load.offer(&mut ring);
    kill_and_wait(&daemon);
    load.drain(&mut ring);
    // The VMM may stop and start a ring, and leave, while it rests.
    settle(&daemon);
    run(&["pause", &at(&daemon)]);
    assert_eq!(frontend.vring_base(0).unwrap(), ring.avail_idx);
    drop(frontend);
    run(&["resume", &at(&daemon)]);
    daemon.stop();
    load.verify(&disk);
}

/// What has changed is known over crashes, upgrades and front-ends that leave, and not after a stop.
#[test]
fn changes_are_known_over_crashes_and_upgrades() {
    let disk = empty_disk();
    let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--supervise"]));
    let setup = Setup { queues: 1, ..Setup::default() };
    let mut device = Device::new(&daemon, setup);
    settle(&daemon);
    let changed = |daemon: &Daemon, words: &[&str]| {
        let words: Vec<&str> = ["changed"].iter().chain(words).copied().collect();
        let at = at(daemon);
        let words: Vec<&str> = words.into_iter().chain([at.as_str()]).collect();
        run(&words)
    };
    fails(&["changed", &at(&daemon)], "no snapshot was made");
    let count = |daemon: &Daemon| {
        let mut control = Control::of(daemon);
        let pause = control.call("pause", json!({})).unwrap();
        let number = control.call("snapshot", json!({"pause": pause})).unwrap();
        control.call("resume", json!({"pause": pause})).unwrap();
        number
    };
    device.write(0, &[1; SECTOR]);
    assert_eq!(count(&daemon), json!(1));
    assert_eq!(changed(&daemon, &[]), "");
    fails(&["changed", "--previous", &at(&daemon)], "no snapshot was made");
    device.write(130, &[1; SECTOR]); // the second block
    assert_eq!(changed(&daemon, &[]), format!("{GRAIN} {GRAIN}\n"));
    kill_and_wait(&daemon);
    device.write(127, &[2; 2 * SECTOR]); // the first two
    settle(&daemon);
    run(&["upgrade", &at(&daemon)]);
    device.write(1024, &[3; SECTOR]);
    // A request for nothing changes nothing, nor does one that is only read.
    device.read(4096, 8);
    assert_eq!(device.run(0, T_DISCARD, 0, &range(2048, 128, 0), 0).status, OK);
    assert_eq!(device.run(0, T_WRITE_ZEROES, 0, &range(3000, 200, 0), 0).status, OK);
    let wanted = format!(
        "0 {}\n{} {GRAIN}\n{} {GRAIN}\n{} {}\n",
        2 * GRAIN,
        8 * GRAIN,
        16 * GRAIN,
        23 * GRAIN,
        2 * GRAIN
    );
    assert_eq!(changed(&daemon, &[]), wanted);
    assert_eq!(count(&daemon), json!(2));
    assert_eq!(changed(&daemon, &["--previous"]), wanted);
    assert_eq!(changed(&daemon, &[]), "");
    run(&["upgrade", &at(&daemon)]);
    assert_eq!(changed(&daemon, &["--previous"]), wanted);
    let told: Value = serde_json::from_str(&changed(&daemon, &["--json", "--previous"])).unwrap();
    assert_eq!((&told["from"], &told["to"], &told["grain"]), (&json!(1), &json!(2), &json!(GRAIN)));
    // A guest that leaves changes nothing of what is known.
    drop(device);
    daemon.wait_log("the front-end disconnected");
    run(&["upgrade", &at(&daemon)]);
    assert_eq!(changed(&daemon, &["--previous"]), wanted);
    // Many extents, in several answers.
    let mut device = Device::plain(&daemon);
    (0..128).for_each(|block| device.write(block * 256, &[4; SECTOR]));
    assert_eq!(changed(&daemon, &[]).lines().count(), 128);
    drop(device);
    daemon.stop();
    let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--supervise"]));
    fails(&["changed", &at(&daemon)], "Make a whole backup");
    daemon.stop();
}

fn same(one: &Path, other: &Path) -> bool {
    std::fs::read(one).unwrap() == std::fs::read(other).unwrap()
}

/// Twenty incremental backups of a disk under load, with kills in between: each restored chain is the snapshot that it
/// is of. On both file systems that clone files.
#[test]
fn twenty_incremental_backups() {
    const BYTES: u64 = 48 << 20;
    let test = "snapshot::twenty_incremental_backups";
    for fs in [Filesystem::xfs(test), Filesystem::btrfs(test)].into_iter().flatten() {
        let (path, _) = fs.file("disk.raw", BYTES);
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("disk.sock");
        let mut command = vublkd("io_uring", &socket, &path);
        command.args(["--supervise=on", "--num-queues=2"]);
        let mut daemon = Daemon::spawn(URING, command, socket);
        daemon.wait_listening();
        let mut device = Device::new(&daemon, Setup { queues: 2, ..Setup::default() });
        let mut load = Load::new(&device.memory, 5);
        settle(&daemon);
        let (mut dice, mut copied, mut pauses) = (Dice::new(42), 0, Vec::new());
        let backup = folder.path().join("backup.raw");
        for round in 1..=20_u64 {
            for _ in 0..3 {
                // Behind what the load writes.
                let sector = (8 << 11) + dice.below((BYTES >> 9) - (8 << 11) - 512);
                let outcome = match dice.below(3) {
                    0 => device.run(1, T_OUT, sector, &salted(round, sector, 9), 0),
                    1 => device.run(1, T_DISCARD, 0, &range(sector, 200, 0), 0),
                    _ => device.run(1, T_WRITE_ZEROES, 0, &range(sector, 300, 0), 0),
                };
                assert_eq!(outcome.status, OK);
            }
            load.offer(&mut device.rings[0]);
            if round % 4 == 0 {
                kill_and_wait(&daemon);
                load.drain(&mut device.rings[0]);
                settle(&daemon);
                load.offer(&mut device.rings[0]);
            }
            let file = fs.path(&format!("snapshot-{round}.raw"));
            let said = run(&["snapshot", &at(&daemon), file.to_str().unwrap()]);
            assert!(said.contains(&format!("snapshot {round}; the guest waited ")), "{said}");
            let ms = said.split("waited ").nth(1).unwrap().split(' ').next().unwrap();
            pauses.push(ms.parse::<f64>().unwrap());
            load.drain(&mut device.rings[0]);
            if round == 1 {
                std::fs::copy(&file, &backup).unwrap();
            } else {
                let from = File::open(&file).unwrap();
                let to = File::options().write(true).open(&backup).unwrap();
                for line in run(&["changed", "--previous", &at(&daemon)]).lines() {
                    let (offset, len) = line.split_once(' ').unwrap();
                    let (offset, len): (u64, usize) = (offset.parse().unwrap(), len.parse().unwrap());
                    let mut bytes = vec![0; len];
                    from.read_exact_at(&mut bytes, offset).unwrap();
                    to.write_all_at(&bytes, offset).unwrap();
                    copied += len;
                }
            }
            assert!(same(&file, &backup), "round {round}: the restored chain is not the snapshot");
            std::fs::remove_file(&file).unwrap();
        }
        pauses.sort_by(f64::total_cmp);
        eprintln!(
            "{test}: 20 snapshots of {BYTES} bytes, {copied} bytes copied for 19 incremental backups; the guest waited {} ms \
             (median), {} at most",
            pauses[10], pauses[19]
        );
        assert!(copied < 19 * BYTES as usize / 3, "{copied} bytes: whole copies would do");
        drop(device);
        daemon.stop();
    }
}

/// Where a file cannot be cloned there is no snapshot, no file, and the guest goes on.
#[test]
fn where_there_is_none() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--supervise"]));
    settle(&daemon);
    let mut device = Device::plain(&daemon);
    let elsewhere = "/dev/shm/vublk-no-snapshot.raw";
    fails(&["snapshot", &at(&daemon), elsewhere], "FILE has to be on the disk's own file system");
    assert!(!Path::new(elsewhere).exists(), "what is no snapshot is left");
    device.assert_serves(0);
    let file = disk.dir.path().join("precious.raw");
    std::fs::write(&file, "precious").unwrap();
    fails(&["snapshot", &at(&daemon), file.to_str().unwrap()], "File exists");
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    device.assert_serves(0);
    if let Some(fs) = Filesystem::ext4("snapshot::where_there_is_none", &[]) {
        let (path, _) = fs.file("disk.raw", 1 << 20);
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("disk.sock");
        let mut daemon = Daemon::spawn(URING, vublkd("io_uring", &socket, &path), socket);
        daemon.wait_listening();
        settle(&daemon);
        let file = fs.path("snapshot.raw");
        fails(&["snapshot", &at(&daemon), file.to_str().unwrap()], "Files are cloned on XFS");
        assert!(!file.exists(), "what is no snapshot is left");
        daemon.stop();
    }
    drop(device);
    daemon.stop();
}
