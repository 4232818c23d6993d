//! What the log and `vublk status` tell of a server that is lost.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use super::serve;
use super::server::{CAN_MULTI_CONN, FLAGS, handshake};
use crate::support::control::{Control, path, vublk};
use crate::support::daemon::Daemon;
use crate::support::device::{Device, IOERR, OK, T_IN};
use crate::support::disk::Disk;
use crate::support::nbd::Server;
use crate::support::sys::{Deadline, PATIENCE, installed};

const READ_ONLY: u16 = 2;

/// The line of `vublk status` that tells it in words.
#[track_caller]
pub fn note(daemon: &Daemon) -> Option<String> {
    let (status, text, complained) = vublk(&["status", path(daemon).to_str().unwrap()]);
    assert!(status.success(), "{complained}");
    text.lines().find(|line| line.starts_with("note ")).map(str::to_owned)
}

fn lost_for(daemon: &Daemon) -> Option<f64> {
    Control::of(daemon).call("status", json!({})).unwrap()["disk"]["server_lost_seconds"].as_f64()
}

/// The second worker serves no queue, so no engine takes its connection.
#[test]
fn an_outage_ends_for_a_worker_without_queues() {
    if !installed("nbdkit", "remote::told::an_outage_ends_for_a_worker_without_queues") {
        return;
    }
    let disk = Disk::new();
    let mut server = Server::of(&disk);
    let uri = server.uri("");
    let mut daemon = serve(&disk, &uri, &["--workers=2", "--num-queues=2"]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    server.kill();
    Deadline::new("an outage").until_slowly(|| lost_for(&daemon));
    let told = note(&daemon).unwrap();
    let inspect = format!(", and no request waits for it: vublk inspect '{uri}' tells");
    assert!(told.contains("its server is lost for ") && told.contains(&inspect), "{told}");
    let pending = device.submit(0, T_IN, 8, &[], 4096);
    Deadline::new("a request that waits")
        .until_slowly(|| note(&daemon).unwrap().contains(", and 1 request waits for it:").then_some(()));
    server.start_again();
    let used = device.rings[0].wait_used("the request");
    assert_eq!(device.outcome(&pending, used).status, OK);
    daemon.wait_log("connected to the server again");
    assert_eq!(lost_for(&daemon), None);
    assert_eq!(note(&daemon), None);
    drop(device);
    daemon.stop();
}

/// The reason is in the log, before the first request that ends with an error, and once.
#[test]
fn requests_that_are_not_waited_for() {
    const LINE: &str = "the server has been lost for 1 s: requests end with I/O errors (--reconnect-delay)";
    if !installed("nbdkit", "remote::told::requests_that_are_not_waited_for") {
        return;
    }
    let disk = Disk::new();
    let mut server = Server::of(&disk);
    let mut daemon = serve(&disk, &server.uri(""), &["--reconnect-delay=1"]);
    let mut device = Device::plain(&daemon);
    for round in 1..3 {
        device.assert_serves(0);
        server.kill();
        for _ in 0..4 {
            assert_eq!(device.status(T_IN, 8, &[], 4096), IOERR);
        }
        let log = daemon.log();
        assert_eq!(log.matches(LINE).count(), round, "{log}");
        assert!(log.find(LINE) < log.find("a read failed"), "{log}");
        let told = note(&daemon).unwrap();
        assert!(
            told.contains("; requests have failed for ") && told.contains(" s (--reconnect-delay=1):"),
            "{told}"
        );
        server.start_again();
        Deadline::new("the disk").until_slowly(|| (device.status(T_IN, 8, &[], 4096) == OK).then_some(()));
    }
    drop(device);
    daemon.stop();
}

/// What is wrong with the next server is not hidden behind what was wrong with the one before.
#[test]
fn why_there_is_no_connection_yet() {
    let disk = Disk::new();
    let socket: PathBuf = disk.dir.path().join("nbd.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let (lose, is_to_be_lost) = std::sync::mpsc::channel::<()>();
    let server = std::thread::spawn(move || {
        let connect = |flags| {
            Deadline::new("a connection").readable(&listener);
            let (mut stream, _) = listener.accept().unwrap();
            handshake(&mut stream, flags).unwrap();
            stream
        };
        let first = connect(FLAGS);
        is_to_be_lost.recv().unwrap();
        drop(first);
        for flags in [FLAGS | READ_ONLY, FLAGS | CAN_MULTI_CONN, FLAGS | READ_ONLY] {
            drop(connect(flags));
        }
        let _last = connect(FLAGS);
        let _ended = is_to_be_lost.recv();
    });
    let mut daemon = serve(&disk, &format!("nbd+unix:///?socket={}", socket.display()), &[]);
    let device = Device::plain(&daemon);
    let lost = Instant::now();
    lose.send(()).unwrap();
    daemon.wait_log("connected to the server again");
    assert!(lost.elapsed() < Duration::from_secs(8), "each reason is told every 10 s: {:?}", lost.elapsed());
    let log = daemon.log();
    assert_eq!(log.matches("not what it was: it is read-only now").count(), 2, "{log}");
    assert_eq!(log.matches("not what it was: the server can do other things").count(), 1, "{log}");
    drop((device, lose));
    server.join().unwrap();
    daemon.signal(Signal::TERM);
    daemon.wait_end(PATIENCE);
}
