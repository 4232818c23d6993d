//! Disks that are images of a Ceph cluster: a real one of one node, whose servers and clients die under a load whose every
//! byte is known.

mod given_up;
mod refused;
mod told;

use std::time::Duration;

use rustix::process::{Signal, kill_process};
use serde_json::json;

use crate::recovery::{assert_hits, kills};
use crate::remote::{serve, work};
use crate::succession::{attach, attach_to, daemon_of, replayed};
use crate::support::ceph::{Ceph, Image};
use crate::support::control::{Control, vublk};
use crate::support::daemon::{Daemon, bare_vublkd, run};
use crate::support::device::{
    Device, IOERR, OK, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, range,
};
use crate::support::disk::{Disk, SECTOR, assert_same, pattern, salted};
use crate::support::frontend::{msg, words32};
use crate::support::load::{Load, empty_disk};
use crate::support::sys::{Deadline, PATIENCE, installed, program, root};

/// What vublkd says that cannot serve this.
#[track_caller]
fn refuses(disk: &Disk, uri: &str, extra: &[&str]) -> String {
    let mut command = bare_vublkd();
    command.arg(format!("--socket-path={}", disk.dir.path().join("none.sock").display()));
    command.arg(format!("--disk={uri}")).arg("--supervise=off").args(extra);
    let (status, _, error) = run(command);
    assert!(!status.success(), "{uri} is served");
    error
}

/// Ends the daemon, and compares the image with what the load has written.
#[track_caller]
fn verify(mut daemon: Daemon, load: &Load, image: &Image<'_>, disk: &Disk) {
    daemon.stop();
    image.export_to(disk);
    load.verify(disk);
}

fn kill_daemon(daemon: &Daemon) {
    let victim = daemon_of(daemon);
    let _gone = kill_process(victim, Signal::KILL);
    Deadline::new("the end of the daemon").until_slowly(|| (daemon_of(daemon) != victim).then_some(()));
}

#[test]
fn an_image_is_served() {
    let Some(ceph) = Ceph::shared("rbd::an_image_is_served") else { return };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &[]);
    let mut device = Device::plain(&daemon);
    assert_same(&device.read(8, 8), &pattern(8, 8), "what the image has");
    let serial = String::from_utf8(device.run(0, T_GET_ID, 0, &[], 20).data).unwrap();
    let start = format!("{}-", image.name.rsplit('/').next().unwrap());
    assert!(serial.starts_with(&start), "{serial}");
    device.write(16, &salted(1, 16, 2048)); // 1 MiB, in one request
    assert_same(&device.read(16, 2048), &salted(1, 16, 2048), "what was written");
    device.write(1, &salted(2, 1, 1));
    // Over the border of two objects.
    device.write(8191, &salted(3, 8191, 2));
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
    assert_eq!(device.status(T_WRITE_ZEROES, 0, &range(64, 64, 1), 0), OK);
    assert_same(&device.read(64, 64), &vec![0; 64 * SECTOR], "zeroes");
    assert_eq!(device.status(T_WRITE_ZEROES, 0, &range(32, 8, 0), 0), OK);
    assert_eq!(device.status(T_DISCARD, 0, &range(16384, 8192, 0), 0), OK);
    assert_same(&device.read(16384, 8), &vec![0; 8 * SECTOR], "a discarded object");
    drop(device);
    daemon.stop();
    image.export_to(&disk);
    assert_same(&disk.read(1, 1), &salted(2, 1, 1), "a sector");
    assert_same(&disk.read(128, 1936), &salted(1, 128, 1936), "what stayed of the large one");
    assert_same(&disk.read(32, 8), &vec![0; 8 * SECTOR], "zeroes that stay allocated");
    assert_same(&disk.read(8191, 2), &salted(3, 8191, 2), "two objects");
}

/// vublkd dies under load: its successor breaks the lock of the dead client, which the cluster refuses from then on.
#[test]
fn a_daemon_that_is_killed_loses_nothing() {
    let Some(ceph) = Ceph::shared("rbd::a_daemon_that_is_killed_loses_nothing") else { return };
    let disk = empty_disk();
    let image = ceph.image_of(&disk);
    let daemon = serve(&disk, &image.uri(), &["--supervise"]);
    let (_frontend, mut ring, mut load) = attach(&daemon, 0);
    for _ in 0..kills() / 4 {
        work(&mut load, &mut ring);
        kill_daemon(&daemon);
    }
    load.drain(&mut ring);
    let found = replayed(&daemon.log());
    eprintln!(
        "{} kills of vublkd, {} of them with requests in flight, {} answers",
        kills() / 4,
        found.len(),
        load.answered
    );
    assert_hits(found.len() as u64, kills() / 4);
    verify(daemon, &load, &image, &disk);
}

#[test]
fn upgraded_under_load() {
    let Some(ceph) = Ceph::shared("rbd::upgraded_under_load") else { return };
    let disk = empty_disk();
    let image = ceph.image_of(&disk);
    let daemon = serve(&disk, &image.uri(), &["--supervise"]);
    let (_frontend, mut ring, mut load) = attach(&daemon, 0);
    for done in 1..=kills() as usize / 10 {
        daemon.signal(Signal::USR2);
        let taken = Deadline::new("the successor");
        while daemon.log().matches("took over from a vublkd that stopped").count() < done {
            load.offer(&mut ring);
            load.take(&mut ring);
            taken.check();
        }
    }
    load.drain(&mut ring);
    assert!(replayed(&daemon.log()).is_empty(), "something was in flight at a hand-over");
    verify(daemon, &load, &image, &disk);
}

/// The servers die, and vublkd, in any order: requests wait, and what was answered is there.
#[test]
fn servers_and_daemons_die_at_any_time() {
    let Some(ceph) = Ceph::start("rbd::servers_and_daemons_die_at_any_time") else { return };
    let disk = empty_disk();
    let image = ceph.image_of(&disk);
    let daemon = serve(&disk, &image.uri(), &["--supervise"]);
    let (_frontend, mut ring, mut load) = attach(&daemon, 0);
    for at in 0..kills() / 10 {
        work(&mut load, &mut ring);
        ceph.order("kill-osd");
        load.offer(&mut ring);
        if at % 2 == 1 {
            let _gone = kill_process(daemon_of(&daemon), Signal::KILL);
        }
        ceph.order("start-osd");
        work(&mut load, &mut ring);
        load.drain(&mut ring);
    }
    eprintln!("{} kills of the OSD, {} answers", kills() / 10, load.answered);
    verify(daemon, &load, &image, &disk);
}

/// While one vublkd has an image, no other client writes to it; and the other way round.
#[test]
fn one_client_at_a_time() {
    let Some(ceph) = Ceph::shared("rbd::one_client_at_a_time") else { return };
    let (disk, second) = (Disk::new(), Disk::new());
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &[]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let error = refuses(&second, &image.uri(), &[]);
    assert!(error.contains("has this image"), "{error}");
    // One that is started for a migration waits for the lock, and serves no ring without it.
    let mut other = serve(&second, &image.uri(), &["--incoming"]);
    let written = ceph.try_run(&["rbd", "bench", "--io-type=write", "--io-total=4096", &image.name]);
    assert!(written.is_err(), "another client wrote to it: {written:?}");
    device.assert_serves(0);
    drop(device);
    daemon.stop();
    Device::plain(&other).assert_serves(0);
    other.stop();
}

/// The other host's daemon goes on where this one stopped, with all that was answered.
#[test]
fn an_image_moves_to_another_daemon_under_load() {
    let Some(ceph) = Ceph::shared("rbd::an_image_moves_to_another_daemon_under_load") else { return };
    let (disk, second) = (empty_disk(), empty_disk());
    let image = ceph.image_of(&disk);
    let (mut from, mut to) = (serve(&disk, &image.uri(), &[]), serve(&second, &image.uri(), &["--incoming"]));
    let (mut frontend, mut ring, mut load) = attach(&from, 0);
    for _ in 0..6 {
        work(&mut load, &mut ring);
        let base = frontend.vring_base(0).unwrap();
        // What was in flight is answered; the rest is the target's.
        drop(frontend);
        frontend = attach_to(&to, &ring, base);
        work(&mut load, &mut ring);
        std::mem::swap(&mut from, &mut to);
    }
    load.drain(&mut ring);
    drop(frontend);
    to.stop();
    verify(from, &load, &image, &disk);
}

#[test]
fn the_guest_sees_an_image_grow() {
    let Some(ceph) = Ceph::shared("rbd::the_guest_sees_an_image_grow") else { return };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &[]);
    let mut device = Device::plain(&daemon);
    let mut control = Control::of(&daemon);
    ceph.run(&["rbd", "resize", "--no-progress", "--size=96M", &image.name]);
    Deadline::new("the new size").until_slowly(|| {
        let status = control.call("status", json!({})).unwrap();
        (status["disk"]["size"] == 96 << 20).then_some(())
    });
    control.call("resize", json!({"size": 128 << 20})).unwrap();
    let last = (128 << 20) / SECTOR as u64 - 8;
    device.write(last, &salted(1, last, 8));
    assert_same(&device.read(last, 8), &salted(1, last, 8), "the new end");
    assert!(ceph.run(&["rbd", "info", &image.name]).contains("128 MiB"));
    daemon.stop();
}

#[test]
fn snapshots_and_images_that_are_only_read() {
    let Some(ceph) = Ceph::shared("rbd::snapshots_and_images_that_are_only_read") else { return };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    ceph.run(&["rbd", "snap", "create", "--no-progress", &format!("{}@monday", image.name)]);
    let monday = format!("rbd:{}@monday{}", image.name, ceph.options());
    assert!(refuses(&disk, &monday, &[]).contains("Add --read-only"));
    let mut daemon = serve(&disk, &image.uri(), &[]);
    Device::plain(&daemon).write(8, &salted(1, 8, 8));
    let second = Disk::new();
    let mut reader = serve(&second, &monday, &["--read-only"]);
    let mut device = Device::plain(&reader);
    assert_same(&device.read(8, 8), &pattern(8, 8), "Monday's");
    assert_eq!(device.status(T_OUT, 8, &pattern(8, 8), 0), IOERR);
    drop(device);
    reader.stop();
    // While the image is written to by another.
    let mut reader = serve(&second, &image.uri(), &["--read-only"]);
    assert_same(&Device::plain(&reader).read(8, 8), &salted(1, 8, 8), "today's");
    reader.stop();
    daemon.stop();
    // Without its lock an image is not written to.
    let features = "object-map,fast-diff,exclusive-lock";
    ceph.run(&["rbd", "feature", "disable", &image.name, features]);
    let error = refuses(&disk, &image.uri(), &[]);
    assert!(error.contains("rbd feature enable") && error.contains(&image.name), "{error}");
    serve(&second, &image.uri(), &["--read-only"]).stop();
}

/// A lock has no end: it outlives a client that no successor knows, until the cluster takes that for dead.
#[test]
fn the_lock_of_a_dead_client_is_taken() {
    let Some(ceph) = Ceph::shared("rbd::the_lock_of_a_dead_client_is_taken") else { return };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &["--supervise=off"]);
    let mut device = Device::plain(&daemon);
    device.write(8, &salted(1, 8, 8));
    let locks = || -> serde_json::Value {
        serde_json::from_str(&ceph.run(&["rbd", "lock", "ls", &image.name, "--format=json"])).unwrap()
    };
    let dead = locks()[0]["address"].clone();
    daemon.signal(Signal::KILL);
    daemon.wait_end(PATIENCE);
    drop(device);
    let error = refuses(&disk, &image.uri(), &["--supervise=off"]);
    assert!(error.contains("has this image") && error.contains(dead.as_str().unwrap()), "{error}");
    // Instead of the 30 s after which servers forget it.
    ceph.run(&["ceph", "osd", "blocklist", "add", dead.as_str().unwrap()]);
    Deadline::new("the end of its watch").until_slowly(|| {
        let watched = ceph.run(&["rbd", "status", &image.name]);
        (!watched.contains(dead.as_str().unwrap())).then_some(())
    });
    assert_eq!(locks()[0]["address"], dead, "the lock is there yet");
    let mut daemon = serve(&disk, &image.uri(), &["--supervise=off"]);
    let mut device = Device::plain(&daemon);
    assert_same(&device.read(8, 8), &salted(1, 8, 8), "what the dead one was answered");
    device.assert_serves(0);
    drop(device);
    daemon.stop();
}

/// What the image, or its pool, sets for itself overrides what vublkd asks for.
#[test]
fn a_cache_that_the_image_asks_for_is_refused() {
    let Some(ceph) = Ceph::shared("rbd::a_cache_that_the_image_asks_for_is_refused") else { return };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let set = |key, value| ceph.run(&["rbd", "config", "image", "set", &image.name, key, value]);
    for (key, on, off) in [("rbd_cache", "true", "false"), ("rbd_persistent_cache_mode", "rwl", "disabled")] {
        set(key, on);
        let error = refuses(&disk, &image.uri(), &[]);
        let advice = format!("rbd config image set {} {key} {off}", image.name);
        assert!(error.contains(&advice), "{error}");
        set(key, off);
    }
    serve(&disk, &image.uri(), &[]).stop();
}

/// What the sandbox keeps from Ceph's library is an error to it, and no end of vublkd.
#[test]
fn lines_of_ceph_conf_that_the_sandbox_forbids() {
    let Some(ceph) = Ceph::shared("rbd::lines_of_ceph_conf_that_the_sandbox_forbids") else { return };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let folder = disk.dir.path();
    let lines =
        format!("[client]\nadmin_socket = {0}/$pid.asok\nlog_file = {0}/client.log\n", folder.display());
    let conf = folder.join("ceph.conf");
    std::fs::write(&conf, ceph.conf() + "\n" + &lines).unwrap();
    let uri = format!("rbd:{}:conf={}:id=vublk", image.name, conf.display());
    let mut daemon = serve(&disk, &uri, &["--supervise=off"]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    assert!(!folder.join("client.log").exists(), "a file was made");
    drop(device);
    daemon.stop();
}

/// Servers that are gone: requests wait, or fail after the time that was typed; a stop takes no longer for them.
#[test]
fn while_the_servers_are_gone() {
    let Some(ceph) = Ceph::start("rbd::while_the_servers_are_gone") else { return };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &["--reconnect-delay=1"]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    ceph.order("kill-osd");
    for _ in 0..3 {
        assert_eq!(device.status(T_IN, 8, &[], 4096), IOERR);
    }
    let log = daemon.log();
    let line = "the cluster has not answered for 1 s: requests end with I/O errors (--reconnect-delay)";
    assert_eq!(log.matches(line).count(), 1, "{log}");
    assert!(log.find(line) < log.find("a read failed"), "{log}");
    ceph.order("start-osd");
    Deadline::new("the disk").until_slowly(|| (device.status(T_IN, 8, &[], 4096) == OK).then_some(()));
    Deadline::within(2 * PATIENCE, "a line about it").until_slowly(|| {
        device.status(T_IN, 8, &[], 4096);
        daemon.log().contains("the cluster answers again").then_some(())
    });
    drop(device);
    daemon.stop();
    // That one may not have had the time to give its lock up.
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &[]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    ceph.order("kill-osd");
    device.submit(0, T_OUT, 8, &pattern(8, 8), 0);
    let mut control = Control::of(&daemon);
    Deadline::new("a request in flight").until_slowly(|| {
        let status = control.call("status", json!({})).unwrap();
        (status["disk"]["in_flight"] == 1 && status["disk"]["oldest_seconds"].as_f64()? > 0.5).then_some(())
    });
    daemon.signal(Signal::TERM);
    daemon.wait_end(Duration::from_secs(15));
    ceph.order("start-osd");
    // It could not give its lock up, which another one gets once the cluster does not wait for it any more.
    assert!(refuses(&disk, &image.uri(), &[]).contains("has this image"));
    // For a guest that is reset, and its VMM with it, the connection is closed in time.
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &["--supervise"]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    ceph.order("kill-osd");
    device.submit(0, T_OUT, 8, &pattern(8, 8), 0);
    device.frontend.send(msg::GET_VRING_BASE, 0, &words32(&[0, 0]), &[]).unwrap();
    device.frontend.wait_hangup_within(Duration::from_secs(15), "a guest that is reset");
    daemon.wait_log("the cluster has not answered for 10 s");
    ceph.order("start-osd");
    drop(device);
    Device::plain(&daemon).assert_serves(0);
    daemon.stop();
}

#[test]
fn what_is_not_there_is_told() {
    let Some(ceph) = Ceph::shared("rbd::what_is_not_there_is_told") else { return };
    let disk = Disk::new();
    let options = ceph.options();
    let conf = ceph.conf_path();
    let alone = disk.dir.path().join("ceph.conf");
    let keyring = disk.dir.path().join("keyring");
    std::fs::write(&keyring, "[client.other]\n\tkey = AQAAAAAAAAAAABAAa2tra2tra2tra2tra2traw==\n").unwrap();
    std::fs::write(&alone, format!("[global]\nkeyring = {}\n", keyring.display())).unwrap();
    let (alone, keyring) = (alone.display(), keyring.display());
    for (uri, words) in [
        (format!("rbd:nowhere/disk{options}"), "there is no pool \"nowhere\""),
        (format!("rbd:vms/nothing{options}"), &*format!("rbd --conf={conf} --id=vublk ls vms shows")),
        (format!("rbd:vms/nothing@x{options}"), "Add --read-only"),
        ("rbd:vms/disk:conf=/nowhere.conf".into(), "cannot read the cluster's file /nowhere.conf"),
        (
            format!("rbd:vms/disk{options}:keyring=/nowhere"),
            "no key for client.vublk: /nowhere: No such file",
        ),
        (format!("rbd:vms/disk{options}:keyring={keyring}"), "no key for client.vublk"),
        (format!("rbd:vms/disk:conf={alone}:id=other"), "names no monitor"),
        ("rbd:vms/disk:key=AQsecret".into(), "from keyrings only"),
    ] {
        let error = refuses(&disk, &uri, &[]);
        assert!(error.contains(words) && !error.contains("secret"), "{uri}: {error}");
    }
}

/// The programs run where Ceph is not installed, and say what to install.
#[test]
fn without_the_library() {
    if !root("rbd::without_the_library", "mounts are made")
        || !installed("unshare", "rbd::without_the_library")
    {
        return;
    }
    // A mount of its own, over the library if there is one.
    let hide = "for lib in /usr/lib/*/librbd.so.1 /usr/lib64/librbd.so.1; do [ ! -e $lib ] || mount --bind /dev/null $lib; done; \
                exec \"$0\" inspect rbd:vms/disk";
    let mut command = program("unshare");
    command.args(["--mount", "sh", "-c", hide, env!("CARGO_BIN_EXE_vublk")]);
    let (status, _, error) = run(command);
    assert!(!status.success() && error.contains("apt install librbd1"), "{error}");
}

#[test]
fn inspect_tells_what_an_image_is() {
    let Some(ceph) = Ceph::shared("rbd::inspect_tells_what_an_image_is") else { return };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let (status, text, error) = vublk(&["inspect", "--json", &image.uri()]);
    assert!(status.success(), "{error}");
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["kind"], "Ceph RBD image");
    assert_eq!((&report["size"], &report["object_size"]), (&json!(64 << 20), &json!(4 << 20)), "{report}");
    assert_eq!((&report["owner"], &report["allocated_bytes"]), (&json!(null), &json!(4 << 20)), "{report}");
    let mut daemon = serve(&disk, &image.uri(), &[]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let (_, text, _) = vublk(&["inspect", &image.uri()]);
    assert!(text.contains("exclusive-lock") && text.contains(" has it\n"), "{text}");
    // vublk doctor looks at the same.
    let (_, text, error) = vublk(&["doctor", &image.uri()]);
    assert!(text.contains("exclusive lock client ") && text.contains(") serves it as disk"), "{text}{error}");
    let (status, text, _) = vublk(&["doctor", &image.uri().replace("rbd:vms/", "rbd:nowhere/")]);
    assert!(status.code() == Some(1) && text.contains("ceph osd pool ls"), "{text}");
    // Nor does it clone it; what it says instead makes a snapshot.
    let at = crate::support::control::path(&daemon);
    let at = at.to_str().unwrap();
    let (status, _, why) = vublk(&["snapshot", at, "/nowhere"]);
    assert!(status.code() == Some(1) && why.contains("snap create vms/"), "{why}");
    let (status, text, error) = vublk(&["pause", at]);
    assert!(status.success(), "{text}{error}");
    ceph.run(&["rbd", "snap", "create", "--no-progress", &format!("{}@monday", image.name)]);
    let (status, text, error) = vublk(&["resume", at]);
    assert!(status.success(), "{text}{error}");
    device.assert_serves(0);
    drop(device);
    daemon.stop();
}
