//! Requests that nothing waits for any more: after `--reconnect-delay`, and what must not follow from a line of ceph.conf.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::remote::serve;
use crate::session::migration::{Log, log_all};
use crate::support::ceph::{Ceph, Image};
use crate::support::control::Control;
use crate::support::daemon::Daemon;
use crate::support::device::{Device, IOERR, OK, T_OUT};
use crate::support::disk::{Disk, assert_same, salted};
use crate::support::sys::Deadline;

/// The client that has the lock.
pub fn owner(image: &Image<'_>) -> Option<String> {
    let locks = image.ceph.run(&["rbd", "lock", "ls", &image.name, "--format=json"]);
    let locks: serde_json::Value = serde_json::from_str(&locks).unwrap();
    locks[0]["address"].as_str().map(Into::into)
}

/// Waits until a request is as old as this.
fn wait_age(daemon: &Daemon, seconds: f64) {
    let mut control = Control::of(daemon);
    Deadline::new("a request in flight").until_slowly(|| {
        let status = control.call("status", json!({})).unwrap();
        (status["disk"]["oldest_seconds"].as_f64()? > seconds).then_some(())
    });
}

/// Without `--reconnect-delay` requests wait, whatever ceph.conf says.
#[test]
fn no_line_of_ceph_conf_gives_up_a_request() {
    let Some(ceph) = Ceph::start("rbd::given_up::no_line_of_ceph_conf_gives_up_a_request") else { return };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let conf = disk.dir.path().join("ceph.conf");
    let lines = "[client]\nrados_osd_op_timeout = 1\nrados_mon_op_timeout = 1\n";
    std::fs::write(&conf, ceph.conf() + "\n" + lines).unwrap();
    let mut daemon = serve(&disk, &format!("rbd:{}:conf={}:id=vublk", image.name, conf.display()), &[]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    ceph.order("kill-osd");
    let write = device.submit(0, T_OUT, 8, &salted(1, 8, 8), 0);
    wait_age(&daemon, 4.0);
    // What the control thread asks for ends in time, and says why.
    let asked = Instant::now();
    let error = Control::of(&daemon).call("resize", json!({"size": 128 << 20})).unwrap_err();
    assert!(error.1.contains("the cluster does not answer"), "{error:?}");
    assert!(asked.elapsed() < Duration::from_secs(15), "{:?}", asked.elapsed());
    ceph.order("start-osd");
    let used = device.rings[0].wait_used("the write");
    assert_eq!(device.outcome(&write, used).status, OK);
    assert_same(&device.read(8, 8), &salted(1, 8, 8), "what was written");
    drop(device);
    daemon.stop();
}

/// What was given up may be carried out yet: by then no other client has the image, and this one's later writes come after.
#[test]
fn a_write_that_was_given_up_comes_after_no_other() {
    let Some(ceph) = Ceph::start("rbd::given_up::a_write_that_was_given_up_comes_after_no_other") else {
        return;
    };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &["--reconnect-delay=1", "--supervise"]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let client = owner(&image).unwrap();
    for round in 0..3 {
        let of = |number: u64| 10 * round + number;
        // The server has received both, and carries them out when it is thawed.
        ceph.order("freeze-osd");
        assert_eq!(device.status(T_OUT, 8, &salted(of(1), 8, 8), 0), IOERR);
        assert_eq!(device.status(T_OUT, 1024, &salted(of(1), 1024, 8), 0), IOERR);
        let later = device.submit(0, T_OUT, 8, &salted(of(2), 8, 8), 0);
        ceph.order("thaw-osd");
        let used = device.rings[0].wait_used("the later write");
        let later = device.outcome(&later, used).status;
        // Had it taken longer than a second to thaw, it may have been given up, too.
        assert!(later == OK || later == IOERR);
        device.write(8, &salted(of(3), 8, 8));
        assert_same(&device.read(8, 8), &salted(of(3), 8, 8), "the last write");
        assert_same(&device.read(1024, 8), &salted(of(1), 1024, 8), "what was given up, and carried out");
        device.write(1024, &salted(of(3), 1024, 8));
    }
    let last = salted(23, 8, 8);
    // The guest does not go to another host's daemon, which could meet a late write.
    let log = Log::new();
    log.give(&device);
    log_all(&device, true);
    assert!(device.frontend.vring_base(0).is_err());
    daemon.wait_log(
        "the guest must not go on at the target of its migration: the cluster may yet carry out writes",
    );
    drop(device);
    assert_eq!(owner(&image).as_ref(), Some(&client), "the lock was given up");
    // A successor's client has given nothing up.
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    daemon.signal(Signal::USR2);
    daemon.wait_log("the cluster refuses this client from now on");
    daemon.wait_log("took over from a vublkd that stopped");
    assert!(ceph.run(&["ceph", "osd", "blocklist", "ls"]).contains(&client));
    assert_same(&device.read(8, 8), &last, "the last write");
    let log = Log::new();
    log.give(&device);
    log_all(&device, true);
    device.assert_serves(0);
    device.frontend.vring_base(0).unwrap();
    assert_eq!(owner(&image), None);
    drop(device);
    daemon.stop();
}

/// One that ends with writes that were given up has the cluster refuse it: the next one need not wait for its watch to end.
#[test]
fn the_next_daemon_has_the_image_at_once() {
    let Some(ceph) = Ceph::start("rbd::given_up::the_next_daemon_has_the_image_at_once") else { return };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &["--reconnect-delay=1"]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    ceph.order("freeze-osd");
    assert_eq!(device.status(T_OUT, 8, &salted(1, 8, 8), 0), IOERR);
    ceph.order("thaw-osd");
    device.write(8, &salted(2, 8, 8));
    let client = owner(&image).unwrap();
    drop(device);
    daemon.stop();
    assert!(ceph.run(&["ceph", "osd", "blocklist", "ls"]).contains(&client));
    let mut daemon = serve(&disk, &image.uri(), &[]);
    let mut device = Device::plain(&daemon);
    assert_same(&device.read(8, 8), &salted(2, 8, 8), "the last write");
    device.write(8, &salted(3, 8, 8));
    drop(device);
    daemon.stop();
}
