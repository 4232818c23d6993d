//! Disks that fail: a file system without room, and a disk that hangs.

use rustix::process::Signal;

use super::each_engine;
use crate::support::daemon::{Backend, Daemon, URING, vublkd};
use crate::support::device::{Device, IOERR, OK, T_DISCARD, T_FLUSH, T_IN, T_OUT, range};
use crate::support::disk::{assert_same, pattern, salted};
use crate::support::fs::Filesystem;
use crate::support::gate::Gate;
use crate::support::sys::{Deadline, PATIENCE};

const MIB: u64 = 1 << 20;
/// Sectors of a write.
const SECTORS: u64 = 128;

/// SIGTERM while the disk hangs: the daemon gives up in time and says so, and the
/// next one serves once the disk is back.
#[test]
fn a_disk_that_hangs() {
    let test = "session::faults::a_disk_that_hangs";
    let Some((gate, store)) = Gate::under_loop(test, pattern(0, 8 * MIB / 512)) else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("disk.sock");
    let start = || {
        let mut command = vublkd("io_uring", &socket, &store.path);
        command.arg("--stop-timeout-ms=200");
        Daemon::spawn(URING, command, socket.clone())
    };
    let mut daemon = start();
    daemon.wait_listening();
    let mut device = Device::plain(&daemon);
    gate.close(1, 1);
    device.submit(0, T_IN, 0, &[], 4096);
    Deadline::new("the request to hang").until_slowly(|| (gate.held() == 1).then_some(()));
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait_end(PATIENCE).code(), Some(3));
    assert!(daemon.log().contains("requests in flight were not answered"), "{}", daemon.log());
    gate.open();
    let mut next = start();
    next.wait_listening();
    Device::plain(&next).assert_serves(0);
    next.stop();
}

#[test]
fn a_file_system_without_room() {
    let test = "session::faults::a_file_system_without_room";
    each_engine(|engine| {
        let Some(fs) = Filesystem::tmpfs(test, "1m") else { return };
        let (path, _) = fs.file("disk.raw", 64 * MIB);
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("disk.sock");
        let Backend::Vublkd(name) = engine else { unreachable!("vublkd alone") };
        let mut command = vublkd(name, &socket, &path);
        command.arg("--on-error=report");
        let mut daemon = Daemon::spawn(engine, command, socket);
        daemon.wait_listening();
        let mut device = Device::plain(&daemon);
        let blocks = 2 * MIB / (SECTORS * 512);
        let statuses: Vec<u8> = (0..blocks)
            .map(|n| device.status(T_OUT, n * SECTORS, &salted(n + 1, n * SECTORS, SECTORS), 0))
            .collect();
        let fits = statuses.iter().take_while(|&&status| status == OK).count() as u64;
        assert!((8..=16).contains(&fits), "{fits} writes of 64 KiB fit into 1 MiB");
        assert!(statuses[fits as usize..].iter().all(|&status| status == IOERR), "{statuses:?}");
        daemon.wait_log("No space left on device");
        // What was there is there, can be written again, and is durable.
        for n in 0..fits {
            assert_same(&device.read(n * SECTORS, SECTORS), &salted(n + 1, n * SECTORS, SECTORS), "before");
        }
        device.write(0, &salted(99, 0, SECTORS));
        assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
        // Room that the guest makes is room.
        assert_eq!(device.status(T_DISCARD, 0, &range(0, 2 * SECTORS as u32, 0), 0), OK);
        device.write(60 * MIB / 512, &salted(7, 60 * MIB / 512, SECTORS));
        drop(device);
        daemon.stop();
    });
}
