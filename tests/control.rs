//! The control socket: what it says, and what its clients cannot do to it.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::succession::attach;
use crate::support::control::{Control, path, vublk};
use crate::support::daemon::{Daemon, Options, URING, vublkd};
use crate::support::device::{Device, Setup, negotiate, set_ring_addr};
use crate::support::disk::Disk;
use crate::support::frontend::{msg, words32};
use crate::support::gate::Gate;
use crate::support::load::LANES;
use crate::support::memory::Memory;
use crate::support::ring::Ring;
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
    let (mut one, mut other) = (serde_json::from_str::<Value>(&text).unwrap(), busy);
    let earlier = other["disk"]["served_seconds"].take();
    assert!(one["disk"]["served_seconds"].take().as_f64() >= earlier.as_f64(), "{text}");
    assert_eq!(one["disk"], other["disk"]);
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
        ("[\"2.0\", \"status\", null, 1]", -32600, Value::Null),
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

/// `status` is answered at once, many times, while the control thread carries out no call.
#[track_caller]
fn assert_status_does_not_wait(daemon: &Daemon, what: &str) -> Value {
    let waits = || !Control::of(daemon).answers_within("resize", Duration::from_millis(200));
    Deadline::new(what).until_slowly(|| waits().then_some(()));
    let mut times: Vec<Duration> = (0..21)
        .map(|_| {
            let mut control = Control::of(daemon);
            let asked = Instant::now();
            control.call("status", json!({})).unwrap();
            asked.elapsed()
        })
        .collect();
    assert!(waits(), "{what} is over: no measurement");
    times.sort();
    // The median: this machine may be busy for a moment.
    assert!(times[10] < Duration::from_millis(100), "{times:?}");
    Control::of(daemon).call("status", json!({})).unwrap()
}

/// GET_VRING_BASE waits for the disk, and a stop does.
#[test]
fn a_status_while_the_disk_hangs() {
    let test = "control::a_status_while_the_disk_hangs";
    let Some((gate, store)) = Gate::under_loop(test, vec![0; 8 << 20]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("disk.sock");
    let mut command = vublkd("io_uring", &socket, &store.path);
    command.arg("--stop-timeout-ms=4000");
    let mut daemon = Daemon::spawn(URING, command, socket);
    daemon.wait_listening();
    let (frontend, mut ring, mut load) = attach(&daemon, 0);
    gate.close(LANES, LANES / 2);
    load.offer(&mut ring);
    Deadline::new("requests to be held").until_slowly(|| (gate.held() == LANES / 2).then_some(()));
    frontend.send(msg::GET_VRING_BASE, 0, &words32(&[0, 0]), &[]).unwrap();
    let status = assert_status_does_not_wait(&daemon, "GET_VRING_BASE, which waits for the disk");
    assert_eq!(status["queues"], json!([{"index": 0, "size": 256}]), "it is served yet");
    // Asked before the disk goes on, answered after it.
    let mut asked = Control::of(&daemon);
    asked.send(b"{\"jsonrpc\":\"2.0\",\"method\":\"resize\",\"id\":1}\n{\"jsonrpc\":\"2.0\",\"method\":\"status\",\"id\":2}\n");
    gate.open();
    frontend.receive().unwrap();
    assert_eq!(asked.receive()["result"]["told"], json!("unchanged"));
    let status = asked.receive();
    assert_eq!((&status["id"], &status["result"]["queues"]), (&json!(2), &json!([])), "in their order");
    drop(frontend);
    daemon.stop();
}

/// The first ring waits for another daemon's lock on the image.
#[test]
fn a_status_while_the_image_is_locked() {
    let disk = Disk::new();
    let first = Daemon::start(URING, &disk, &Options::default());
    let mut second = Daemon::start_at(URING, &disk, "second.sock", &Options::default());
    second.wait_listening();
    let mut device = Device::plain(&first);
    device.assert_serves(0);
    let memory = Memory::plain();
    let ring = Ring::new(Rc::clone(&memory), 256, 0, true);
    let mut frontend = second.connect();
    negotiate(&mut frontend, 0);
    frontend.set_mem_table(&memory);
    frontend.vring_state(msg::SET_VRING_NUM, 0, 256);
    set_ring_addr(&frontend, 0, &ring);
    frontend.vring_fd(msg::SET_VRING_KICK, 0, &ring.kick);
    // Its answer comes once the lock does, or ten seconds are over.
    frontend.send(msg::SET_VRING_ENABLE, 0, &words32(&[0, 1]), &[]).unwrap();
    let status = assert_status_does_not_wait(&second, "a ring that waits for the image");
    assert_eq!(status["queues"], json!([]));
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
