//! The control socket: what it says, and what its clients cannot do to it.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use crate::support::control::{Control, path, vublk};
use crate::support::daemon::{Daemon, Options, URING};
use crate::support::device::{Device, Setup};
use crate::support::disk::Disk;
use crate::support::sys::Deadline;

fn start(extra: &[&str]) -> (Disk, Daemon) {
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::with(extra));
    (disk, daemon)
}

#[test]
fn status() {
    let (disk, mut daemon) = start(&[]);
    let mut control = Control::of(&daemon);
    let idle = control.call("status", Value::Null).unwrap();
    assert_eq!(idle["disk"]["path"], json!(disk.path));
    assert_eq!(idle["disk"]["size"], json!(64 << 20));
    assert_eq!((&idle["queues"], &idle["pid"]), (&json!([]), &json!(daemon.pid())));
    let mut device = Device::new(&daemon, Setup { queues: 2, ring_size: 64, ..Setup::default() });
    for _ in 0..10 {
        device.assert_serves(1);
    }
    let busy = control.call("status", json!({})).unwrap();
    assert_eq!(busy["queues"], json!([{"index": 0, "size": 64}, {"index": 1, "size": 64}]));
    assert_eq!(busy["counters"]["requests"], json!(10));
    let place = path(&daemon).display().to_string();
    let (status, text, _) = vublk(&["status", &place]);
    assert!(status.success());
    assert!(text.lines().any(|l| l.split_whitespace().eq(["counters.requests", "10"])), "{text}");
    let (_, text, _) = vublk(&["status", "--json", &place]);
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["disk"], busy["disk"]);
    assert_eq!(std::fs::metadata(&place).unwrap().permissions().mode() & 0o777, 0o600);
    drop(device);
    daemon.stop();
    assert!(!std::fs::exists(&place).unwrap(), "the control socket stays behind");
    let (status, _, complained) = vublk(&["status", &place]);
    assert!(!status.success() && complained.contains("no vublkd can be reached there"), "{complained}");
}

#[test]
fn lines_that_make_no_sense() {
    let (_disk, mut daemon) = start(&[]);
    let mut control = Control::of(&daemon);
    for (line, code, id) in [
        ("}{", -32700, Value::Null),
        ("", -32700, Value::Null),
        ("[]", -32600, Value::Null),
        (r#"{"jsonrpc":"1.0","method":"status","id":3}"#, -32600, json!(3)),
        (r#"{"jsonrpc":"2.0","id":3}"#, -32600, Value::Null),
        (r#"{"jsonrpc":"2.0","method":"format","id":"x"}"#, -32601, json!("x")),
        (r#"{"jsonrpc":"2.0","method":"format","id":null}"#, -32601, Value::Null),
        (r#"{"jsonrpc":"2.0","method":"resize","params":{"size":"1"},"id":4}"#, -32602, json!(4)),
        (r#"{"jsonrpc":"2.0","method":"resize","params":{"sise":1},"id":4}"#, -32602, json!(4)),
        (r#"{"jsonrpc":"2.0","method":"resize","params":{"size":-1},"id":4}"#, -32602, json!(4)),
    ] {
        control.send(format!("{line}\n").as_bytes());
        let answer = control.receive();
        assert_eq!((&answer["error"]["code"], &answer["id"]), (&json!(code), &id), "{line}: {answer}");
    }
    // A notification is not answered; a line may come in pieces, and two at once.
    control.send(b"{\"jsonrpc\":\"2.0\",\"method\":\"status\"}\n{\"jsonrpc\":\"2.0\",");
    control.send(b"\"method\":\"status\",\"id\":1}\n{\"jsonrpc\":\"2.0\",\"method\":\"status\",\"id\":2}\n");
    assert_eq!((control.receive()["id"].take(), control.receive()["id"].take()), (json!(1), json!(2)));
    control.send(&[b' '; 5000]);
    assert_eq!(control.receive()["error"]["code"], json!(-32600));
    assert_eq!(control.receive(), Value::Null, "one with such a line is left");
    assert!(Control::of(&daemon).call("status", Value::Null).is_ok());
    daemon.stop();
}

/// More clients than it has room for, and one that does not read: the daemon and
/// its guest go on.
#[test]
fn clients_that_are_too_many_or_do_not_read() {
    let (_disk, mut daemon) = start(&[]);
    let mut device = Device::plain(&daemon);
    let mut many: Vec<Control> = (0..20).map(|_| Control::of(&daemon)).collect();
    assert!(many.last_mut().unwrap().call("status", Value::Null).is_ok());
    assert_eq!(many[0].receive(), Value::Null, "the oldest is left");
    device.assert_serves(0);
    let deaf = UnixStream::connect(path(&daemon)).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let deadline = Deadline::new("the daemon to leave a client that does not read");
    deadline.until(|| {
        let line = b"{\"jsonrpc\":\"2.0\",\"method\":\"status\",\"id\":2}\n";
        match std::io::Write::write(&mut &deaf, line) {
            Err(e) if e.kind() != std::io::ErrorKind::WouldBlock => Some(()),
            _ => None,
        }
    });
    device.assert_serves(0);
    drop(device);
    daemon.stop();
}

/// Where it was asked for it has to be; beside the disk's socket it may fail.
#[test]
fn where_it_is() {
    let disk = Disk::new();
    let place = disk.dir.path().join("here");
    let extra = format!("--control={}", place.display());
    let mut daemon = Daemon::start(URING, &disk, &Options::with(&[&extra]));
    Deadline::new("the control socket").until_slowly(|| UnixStream::connect(&place).ok());
    assert!(!std::fs::exists(path(&daemon)).unwrap());
    let mut second = Daemon::start_at(URING, &disk, "other.sock", &Options::with(&[&extra, "--lock=off"]));
    assert_eq!(second.wait_end(crate::support::sys::PATIENCE).code(), Some(1));
    let log = second.log();
    assert!(log.contains("another process is listening there") && log.contains("another --control"), "{log}");
    daemon.stop();

    std::fs::write(path(&daemon), "not a socket").unwrap();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    daemon.wait_log("no control socket");
    Device::plain(&daemon).assert_serves(0);
    daemon.stop();
}
