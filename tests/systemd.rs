//! The units in `dist/systemd`: that systemd takes them, and that the daemon
//! starts by socket activation for real, with a front-end waiting.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use crate::support::daemon::{Daemon, URING, run};
use crate::support::device::{Device, Setup};
use crate::support::disk::Disk;
use crate::support::frontend::Frontend;
use crate::support::sys::installed;

/// `systemd-analyze verify` looks up the binary, so it is given the built one.
#[test]
fn units_are_valid() {
    if !installed("systemd-analyze", "systemd::units_are_valid") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("dist/systemd");
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]);
    for kind in ["service", "socket"] {
        let text = std::fs::read_to_string(units.join(format!("vublk@.{kind}"))).unwrap();
        let unit = folder.path().join(format!("vublk@vm1.{kind}"));
        std::fs::write(&unit, text.replace("/usr/bin/vublkd", env!("CARGO_BIN_EXE_vublkd"))).unwrap();
        verify.arg(unit);
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
