//! Clients that the cluster refuses (its blocklist), and clients that want what another one has.

use std::process::{Child, Command, Stdio};

use rustix::process::{Signal, kill_process};

use super::given_up::owner;
use crate::remote::serve;
use crate::remote::told::note;
use crate::session::migration::{Log, log_all};
use crate::succession::{daemon_of, kill_and_wait};
use crate::support::ceph::{Ceph, Image};
use crate::support::device::{Device, IOERR, OK, T_FLUSH, T_IN, T_OUT};
use crate::support::disk::{Disk, assert_same, pattern, salted};
use crate::support::sys::{Deadline, PATIENCE};

fn refuse(ceph: &Ceph, client: &str) {
    ceph.run(&["ceph", "osd", "blocklist", "add", client]);
}

/// Clients that have the image open.
fn watchers(image: &Image<'_>) -> Vec<String> {
    let status = image.ceph.run(&["rbd", "status", &image.name, "--format=json"]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let all = status["watchers"].as_array().unwrap();
    all.iter().map(|of| of["address"].as_str().unwrap().into()).collect()
}

/// Takes the lock from the client that has it, as an operator does.
fn take_lock(image: &Image<'_>) {
    let locks = image.ceph.run(&["rbd", "lock", "ls", &image.name, "--format=json"]);
    let locks: serde_json::Value = serde_json::from_str(&locks).unwrap();
    let (id, locker) = (locks[0]["id"].as_str().unwrap(), locks[0]["locker"].as_str().unwrap());
    image.ceph.run(&["rbd", "lock", "rm", &image.name, id, locker]);
}

/// Without a successor: this one can do no harm any more.
#[test]
fn a_client_that_the_cluster_refuses_says_so() {
    let Some(ceph) = Ceph::shared("rbd::refused::a_client_that_the_cluster_refuses_says_so") else { return };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &["--supervise=off"]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    refuse(ceph, &owner(&image).unwrap());
    Deadline::new("an I/O error")
        .until_slowly(|| (device.status(T_OUT, 8, &pattern(8, 8), 0) == IOERR).then_some(()));
    daemon.wait_log("the cluster refuses this client");
    drop(device);
    daemon.signal(Signal::TERM);
    daemon.wait_end(PATIENCE);
}

/// No other client has had the image since: a successor goes on with a client of its own.
#[test]
fn a_successor_goes_on_for_a_client_that_is_refused() {
    let Some(ceph) = Ceph::shared("rbd::refused::a_successor_goes_on_for_a_client_that_is_refused") else {
        return;
    };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &["--supervise"]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    for round in 1..4 {
        let (victim, client) = (daemon_of(&daemon), owner(&image).unwrap());
        refuse(ceph, &client);
        // Until its server knows, the old one answers.
        Deadline::new("a successor").until_slowly(|| {
            assert_eq!(device.status(T_OUT, 8, &salted(round, 8, 8), 0), OK);
            (daemon_of(&daemon) != victim).then_some(())
        });
        assert_same(&device.read(8, 8), &salted(round, 8, 8), "what was written");
        assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
        assert_ne!(owner(&image), Some(client));
    }
    daemon.wait_log("its successor goes on with a client of its own");
    drop(device);
    daemon.stop();
}

/// The same where no guest has come yet.
#[test]
fn a_client_that_is_refused_before_its_guest_comes() {
    let Some(ceph) = Ceph::shared("rbd::refused::a_client_that_is_refused_before_its_guest_comes") else {
        return;
    };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &["--supervise"]);
    refuse(ceph, &watchers(&image)[0]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    assert_same(&device.read(8, 8), &pattern(8, 8), "what the image has");
    drop(device);
    daemon.stop();
}

/// One that only reads has no lock to lose, whatever another client does with the image.
#[test]
fn a_reader_that_is_refused_is_succeeded() {
    let Some(ceph) = Ceph::shared("rbd::refused::a_reader_that_is_refused_is_succeeded") else { return };
    let (disk, second) = (Disk::new(), Disk::new());
    let image = ceph.image_of(&disk);
    let mut reader = serve(&second, &image.uri(), &["--read-only", "--supervise"]);
    let client = watchers(&image).remove(0);
    let mut daemon = serve(&disk, &image.uri(), &[]);
    let mut writer = Device::plain(&daemon);
    writer.write(8, &salted(1, 8, 8));
    let mut device = Device::plain(&reader);
    let victim = daemon_of(&reader);
    refuse(ceph, &client);
    Deadline::new("a successor").until_slowly(|| {
        assert_same(&device.read(8, 8), &salted(1, 8, 8), "what the writer wrote");
        (daemon_of(&reader) != victim).then_some(())
    });
    assert_same(&device.read(8, 8), &salted(1, 8, 8), "what the writer wrote");
    drop((device, writer));
    reader.stop();
    daemon.stop();
}

/// Another client has the image, or may have had it: the guest gets I/O errors, and nothing starts anew.
#[test]
fn a_guest_whose_image_was_taken_does_not_go_on() {
    let Some(ceph) = Ceph::shared("rbd::refused::a_guest_whose_image_was_taken_does_not_go_on") else {
        return;
    };
    for is_taken in [true, false] {
        let (disk, second) = (Disk::new(), Disk::new());
        let image = ceph.image_of(&disk);
        let mut daemon = serve(&disk, &image.uri(), &["--supervise"]);
        let mut other = serve(&second, &image.uri(), &["--incoming"]);
        let mut device = Device::plain(&daemon);
        device.assert_serves(0);
        let victim = daemon_of(&daemon);
        take_lock(&image);
        let mut others = is_taken.then(|| Device::plain(&other));
        others.iter_mut().for_each(|device| device.write(8, &salted(3, 8, 8)));
        let theirs = owner(&image);
        assert_eq!(device.status(T_OUT, 8, &salted(1, 8, 8), 0), IOERR);
        assert_eq!(device.status(T_IN, 8, &[], 4096), IOERR);
        match theirs {
            Some(owner) => daemon.wait_log(&format!("the client {owner} has taken the image")),
            None => daemon.wait_log("its lock was taken away"),
        };
        assert_eq!(daemon_of(&daemon), victim);
        let told = note(&daemon).unwrap();
        let what = if is_taken { "has taken the image" } else { "its lock was taken away" };
        assert!(told.contains(what) && told.contains("Stop this VM"), "{told}");
        let log = Log::new();
        log.give(&device);
        log_all(&device, true);
        assert!(device.frontend.vring_base(0).is_err(), "the guest must not go on elsewhere");
        if let Some(device) = &mut others {
            assert_same(&device.read(8, 8), &salted(3, 8, 8), "the other's");
        }
        drop((device, others));
        daemon.signal(Signal::TERM);
        daemon.wait_end(PATIENCE);
        other.stop();
    }
}

/// The same where the daemon dies first: its successor does not find the lock that its guest relied on. A guest that comes
/// later relied on none.
#[test]
fn a_successor_whose_image_was_taken_does_not_go_on() {
    let Some(ceph) = Ceph::shared("rbd::refused::a_successor_whose_image_was_taken_does_not_go_on") else {
        return;
    };
    for has_guest in [true, false] {
        let (disk, second) = (Disk::new(), Disk::new());
        let image = ceph.image_of(&disk);
        let mut daemon = serve(&disk, &image.uri(), &["--supervise"]);
        let mut device = Some(Device::plain(&daemon));
        device.iter_mut().for_each(|device| device.write(8, &salted(1, 8, 8)));
        if !has_guest {
            device = None;
            Deadline::new("a free lock").until_slowly(|| owner(&image).is_none().then_some(()));
        }
        // No successor yet.
        daemon.signal(Signal::STOP);
        let client = watchers(&image).remove(0);
        kill_process(daemon_of(&daemon), Signal::KILL).unwrap();
        if has_guest {
            take_lock(&image);
        } else {
            refuse(ceph, &client); // the other's messages would wait for its answers
        }
        let mut other = serve(&second, &image.uri(), &["--incoming"]);
        Device::plain(&other).write(8, &salted(3, 8, 8));
        other.stop();
        daemon.signal(Signal::CONT);
        let Some(mut device) = device else {
            let mut device = Device::plain(&daemon);
            assert_same(&device.read(8, 8), &salted(3, 8, 8), "the other's");
            device.write(8, &salted(4, 8, 8));
            drop(device);
            daemon.stop();
            continue;
        };
        assert_eq!(device.status(T_OUT, 8, &salted(1, 8, 8), 0), IOERR);
        daemon.wait_log("the lock on which this guest relied is gone");
        kill_and_wait(&daemon);
        assert_eq!(device.status(T_IN, 8, &[], 4096), IOERR, "with the next daemon");
        daemon.signal(Signal::USR2);
        daemon.wait_log("took over from a vublkd that stopped");
        assert_eq!(device.status(T_IN, 8, &[], 4096), IOERR, "with an upgraded one");
        assert_eq!(owner(&image), None);
        drop(device);
        // The next guest relied on nothing.
        let mut device = Device::plain(&daemon);
        assert_same(&device.read(8, 8), &salted(3, 8, 8), "the other's");
        device.write(8, &salted(4, 8, 8));
        drop(device);
        daemon.stop();
    }
}

/// The other client has the image yet when the successor starts.
#[test]
fn a_successor_finds_another_client() {
    let Some(ceph) = Ceph::shared("rbd::refused::a_successor_finds_another_client") else { return };
    let (disk, second) = (Disk::new(), Disk::new());
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &["--supervise"]);
    let mut device = Device::plain(&daemon);
    device.write(8, &salted(1, 8, 8));
    daemon.signal(Signal::STOP);
    kill_process(daemon_of(&daemon), Signal::KILL).unwrap();
    take_lock(&image);
    let mut other = serve(&second, &image.uri(), &["--incoming"]);
    let mut theirs = Device::plain(&other);
    theirs.write(8, &salted(3, 8, 8));
    daemon.signal(Signal::CONT);
    assert_eq!(device.status(T_OUT, 8, &salted(1, 8, 8), 0), IOERR);
    daemon.wait_log(&format!("the client {} has the image", owner(&image).unwrap()));
    assert_same(&theirs.read(8, 8), &salted(3, 8, 8), "the other's");
    drop(theirs);
    other.stop();
    assert_eq!(device.status(T_IN, 8, &[], 4096), IOERR, "the image is free again, and not what it was");
    kill_and_wait(&daemon);
    assert_eq!(device.status(T_IN, 8, &[], 4096), IOERR, "with the next daemon");
    // It may not move, either; and its VMM, which is turned away for that, comes back with it.
    let log = Log::new();
    log.give(&device);
    log_all(&device, true);
    assert!(device.frontend.vring_base(0).is_err());
    device.frontend.wait_hangup("a source that may not hand over");
    let mut device = Device::plain(&daemon);
    assert_eq!(device.status(T_IN, 8, &[], 4096), IOERR, "on another connection");
    drop(device);
    // That was the VM's own end.
    let mut device = Device::plain(&daemon);
    assert_same(&device.read(8, 8), &salted(3, 8, 8), "the other's");
    drop(device);
    daemon.stop();
}

/// The source of a migration that has not found out yet who has taken its image.
#[test]
fn a_guest_whose_image_was_just_taken_does_not_move() {
    let Some(ceph) = Ceph::shared("rbd::refused::a_guest_whose_image_was_just_taken_does_not_move") else {
        return;
    };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &["--supervise"]);
    let mut device = Device::plain(&daemon);
    device.write(8, &salted(1, 8, 8));
    let log = Log::new();
    log.give(&device);
    log_all(&device, true);
    device.assert_serves(0);
    take_lock(&image);
    assert!(device.frontend.vring_base(0).is_err());
    daemon.wait_log("the guest must not go on at the target of its migration");
    drop(device);
    daemon.signal(Signal::TERM);
    daemon.wait_end(PATIENCE);
}

struct Bench(Child);

impl Drop for Bench {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// A client that took the lock by itself, with its first write, would give it to any that asks.
#[test]
fn a_client_that_would_give_its_lock_up_keeps_it() {
    let Some(ceph) = Ceph::shared("rbd::refused::a_client_that_would_give_its_lock_up_keeps_it") else {
        return;
    };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &[]);
    let mut command = Command::new("rbd");
    command.args(["--conf", &ceph.conf_path(), "--id=vublk", "bench", "--io-type=write", "--io-size=4096"]);
    command
        .args(["--io-threads=1", "--io-total=1T", &image.name])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let other = Bench(command.spawn().unwrap());
    let client = Deadline::new("the other's lock").until_slowly(|| owner(&image));
    let device = Device::plain(&daemon);
    daemon.wait_log(&format!("waiting up to 10 s for the client {client} to give the image up"));
    device.frontend.wait_hangup_within(2 * PATIENCE, "a VMM whose disk another client has");
    daemon.wait_log(&format!("the client {client} of the cluster has this image and keeps it"));
    assert_eq!(owner(&image), Some(client));
    drop(device);
    drop(other);
    daemon.stop();
}
