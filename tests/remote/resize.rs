//! An export that becomes longer at its server.

use std::fs::File;

use serde_json::json;

use super::serve;
use crate::support::control::Control;
use crate::support::device::{Device, IOERR, OK, T_OUT};
use crate::support::disk::{Disk, SECTOR, assert_same, salted};
use crate::support::nbd::Server;
use crate::support::sys::{Deadline, installed};

const BEFORE: u64 = 64 << 20;
const AFTER: u64 = 96 << 20;

/// vublkd makes no export longer, and finds out that one is once it is connected to a server that was started anew. To one
/// whose export is shorter than the guest was told it connects only when that is long enough again.
#[test]
fn an_export_is_made_longer_at_its_server() {
    if !installed("nbdkit", "remote::resize::an_export_is_made_longer_at_its_server") {
        return;
    }
    let disk = Disk::new();
    let mut server = Server::of(&disk);
    let mut daemon = serve(&disk, &server.uri(""), &["--write-cache=writethrough"]);
    let mut device = Device::plain(&daemon);
    let mut control = Control::of(&daemon);
    let (_, refused) = control.call("resize", json!({"size": AFTER})).unwrap_err();
    assert!(refused.contains("is a server's. Grow it there"), "{refused}");
    let last = AFTER / SECTOR as u64 - 1;
    let data = salted(1, last, 1);
    assert_eq!(device.status(T_OUT, last, &data, 0), IOERR);

    let mut restart_with = |bytes| {
        server.kill();
        File::options().write(true).open(&disk.path).unwrap().set_len(bytes).unwrap();
        server.start_again();
    };
    restart_with(AFTER);
    Deadline::new("the new size")
        .until_slowly(|| (control.call("resize", json!({})).unwrap()["size"] == AFTER).then_some(()));
    assert_eq!(device.frontend.config(0, 8).unwrap(), (AFTER / 512).to_le_bytes());
    assert_eq!(device.status(T_OUT, last, &data, 0), OK);
    assert_same(&disk.read(last, 1), &data, "the last sector of the server's file");

    restart_with(BEFORE);
    let lost_for = |control: &mut Control| {
        control.call("status", json!({})).unwrap()["disk"]["server_lost_seconds"].as_f64()
    };
    Deadline::new("vain attempts to connect")
        .until_slowly(|| lost_for(&mut control).is_some_and(|seconds| seconds > 0.3).then_some(()));
    restart_with(AFTER);
    device.write(last, &data);
    assert_same(&disk.read(last, 1), &data, "the last sector, written once more");
    daemon.stop();
}
