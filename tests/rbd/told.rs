//! What the log and `vublk status` tell of a cluster that does not answer.

use crate::remote::serve;
use crate::remote::told::note;
use crate::support::ceph::Ceph;
use crate::support::device::{Device, OK, T_OUT};
use crate::support::disk::{Disk, salted};
use crate::support::sys::{Deadline, PATIENCE};

#[test]
fn a_cluster_that_does_not_answer() {
    let Some(ceph) = Ceph::start("rbd::told::a_cluster_that_does_not_answer") else { return };
    let disk = Disk::new();
    let image = ceph.image_of(&disk);
    let mut daemon = serve(&disk, &image.uri(), &[]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    ceph.order("kill-osd");
    let write = device.submit(0, T_OUT, 8, &salted(1, 8, 8), 0);
    Deadline::within(2 * PATIENCE, "a line about it")
        .until_slowly(|| daemon.log().contains("the cluster has not answered a request for 1").then_some(()));
    let log = daemon.log();
    assert!(log.contains(" s: 1 request waits. ceph health detail tells"), "{log}");
    let told = note(&daemon).unwrap();
    assert!(
        told.contains("has not answered a request for 1") && told.contains(", and 1 request waits"),
        "{told}"
    );
    ceph.order("start-osd");
    let used = device.rings[0].wait_used("the write");
    assert_eq!(device.outcome(&write, used).status, OK);
    daemon.wait_log("the cluster answers again");
    assert_eq!(note(&daemon), None);
    assert_eq!(daemon.log().matches("the cluster has not answered").count(), 1);
    drop(device);
    daemon.stop();
}
