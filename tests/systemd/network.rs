//! A unit whose disk is on another machine.

use rustix::process::{Signal, kill_process};

use crate::support::device::{Device, Setup};
use crate::support::disk::{Disk, assert_same, salted};
use crate::support::frontend::Frontend;
use crate::support::nbd::Server;
use crate::support::sys::installed;
use crate::support::systemd::{Systemd, ships};

/// The unit with examples/network.conf serves a disk over TCP; a daemon that is killed is succeeded, and one that is
/// restarted.
#[test]
fn a_disk_on_another_machine() {
    const TEST: &str = "systemd::network::a_disk_on_another_machine";
    if !installed("nbdkit", TEST) {
        return;
    }
    let (disk, unused) = (Disk::new(), Disk::new());
    let server = Server::over_tcp(&disk);
    let Some(systemd) = Systemd::with(TEST, &unused, |files| {
        let example = std::fs::read_to_string(ships().join("examples/network.conf")).unwrap();
        let here = example.replace("192.0.2.10", "127.0.0.1");
        assert_ne!(here, example);
        files.write("etc/systemd/system/vublk@vm1.service.d/network.conf", &here);
        let text = format!("BLK_FILE={}\nVUBLKD_OPTIONS=--log-level=debug\n", server.tcp_uri());
        files.write("etc/vublk/vm1.env", &text);
    }) else {
        return;
    };
    let mut device = Device::over(Frontend::new(systemd.connect("vm1")), Setup::default());
    device.assert_serves(0);
    for round in 1..=4 {
        let before = systemd.daemon().unwrap();
        device.write(8 * round, &salted(round, 8 * round, 8));
        if round % 2 == 0 {
            systemd.ctl(&["restart", "vublk@vm1.service"]);
        } else {
            kill_process(before, Signal::KILL).unwrap();
        }
        systemd.daemon_after(before);
        assert_same(&device.read(8 * round, 8), &salted(round, 8 * round, 8), "what was written before");
    }
    assert!(systemd.log().contains("serving nbd://127.0.0.1"), "{}", systemd.log());
    assert!(!systemd.log().contains("the sandbox is without"), "{}", systemd.log());
    systemd.ctl(&["stop", "vublk@vm1.service"]);
    assert_eq!(systemd.show("Result", "vublk@vm1.service"), "success");
    assert_same(&disk.read(8, 8), &salted(1, 8, 8), "what the server has");
}
