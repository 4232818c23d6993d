//! Who connects to the disk's socket while another front-end is served, or by mistake.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::start;
use crate::support::control::{self, Control, vublk};
use crate::support::daemon::{Daemon, Options, URING};
use crate::support::device::Device;
use crate::support::disk::Disk;
use crate::support::frontend::msg;
use crate::support::sys::PATIENCE;

/// This process, as the log names it.
fn ourselves() -> String {
    format!("process {}", std::process::id())
}

#[test]
fn a_second_frontend_is_told_of_at_once() {
    let (_disk, daemon) = start(URING);
    let mut first = Device::plain(&daemon);
    let second = daemon.connect();
    let line = daemon.wait_log("waits");
    assert!(line.contains("WARN"), "{line}");
    assert_eq!(line.matches(&ourselves()).count(), 2, "who waits for whom: {line}");
    second.send(msg::GET_FEATURES, 0, &[], &[]).unwrap();
    first.assert_serves(0);
    let third = daemon.connect();
    drop(first);
    second.receive().unwrap();
    drop(second);
    third.ask64(msg::GET_FEATURES);
    // One that comes after the one before left is not told of.
    let told = |daemon: &Daemon| daemon.log().lines().filter(|line| line.contains("waits")).count();
    let before = told(&daemon);
    // At once, also where a child that another test starts has a copy yet.
    third.socket.shutdown(std::net::Shutdown::Both).unwrap();
    Device::plain(&daemon).assert_serves(0);
    assert_eq!(told(&daemon), before);
}

/// A front-end that waits and costs nothing meanwhile, whatever it has sent.
#[test]
fn who_waits_costs_no_processor_time() {
    let (_disk, daemon) = start(URING);
    let mut first = Device::plain(&daemon);
    let spoke = daemon.connect();
    spoke.send(msg::GET_FEATURES, 0, &[], &[]).unwrap();
    let silent = daemon.connect();
    let mut half = UnixStream::connect(&daemon.socket).unwrap();
    half.write_all(b"{").unwrap();
    let closed_one_way = UnixStream::connect(&daemon.socket).unwrap();
    closed_one_way.shutdown(std::net::Shutdown::Write).unwrap();
    first.frontend.sync();
    let wakeups = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        let cpu = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
        let ticks = cpu.rsplit_once(')').unwrap().1.split_whitespace().nth(11).unwrap().to_owned();
        (count.unwrap().trim().parse::<u64>().unwrap(), ticks.parse::<u64>().unwrap())
    };
    for _ in 0..3 {
        first.frontend.sync(); // so that what came has been looked at
    }
    let before = wakeups();
    crate::support::sys::tick(&[], Duration::from_millis(300));
    let after = wakeups();
    assert!(after.0 <= before.0 + 3 && after.1 <= before.1 + 2, "{before:?} {after:?}");
    first.assert_serves(0);
    drop(first);
    spoke.receive().unwrap();
    drop((silent, spoke, half, closed_one_way));
    Device::plain(&daemon).assert_serves(0);
}

#[test]
fn callers_in_a_loop_do_not_fill_the_log() {
    let (_disk, mut daemon) = start(URING);
    let started = Instant::now();
    let call = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(&daemon.socket).unwrap();
        let _ = stream.write_all(bytes);
        stream
    };
    // While no front-end is served, and while one is.
    for _ in 0..300 {
        let _ = call(b"{\"jsonrpc\":\"2.0\"}\n").read(&mut [0]);
        drop(call(b""));
    }
    let mut device = Device::plain(&daemon);
    for round in 0..300 {
        let _ = call(b"GET / HTTP/1.1\r\n\r\n").read(&mut [0]);
        let waits = call(b"");
        if round % 10 == 0 {
            device.frontend.sync();
        }
        drop(waits);
    }
    device.assert_serves(0);
    let log = daemon.log();
    let lines = log.lines().filter(|line| !line.contains("DEBUG")).count() as u64;
    let windows = started.elapsed().as_secs() / 10 + 1;
    assert!(lines <= 15 + 10 * windows, "{lines} lines in {:?}:\n{log}", started.elapsed());
    drop(device);
    daemon.stop();
}

/// Asks the disk's socket what only the control socket answers.
#[track_caller]
fn ask_wrongly(daemon: &Daemon) -> String {
    let stream = UnixStream::connect(&daemon.socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    (&stream).write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"status\"}\n").unwrap();
    let started = Instant::now();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    let answer: Value = serde_json::from_str(&line).unwrap();
    answer["error"]["message"].as_str().unwrap().to_owned()
}

#[test]
fn a_client_of_the_control_socket_on_the_disks() {
    let (_disk, daemon) = start(URING);
    let control = control::path(&daemon).display().to_string();
    let _up = Control::of(&daemon);
    let said = ask_wrongly(&daemon);
    assert!(said.contains(&control) && said.contains("disk's socket"), "{said}");
    let line = daemon.wait_log("JSON");
    assert!(line.contains(&control) && line.contains(&ourselves()), "{line}");
    // The same while a front-end is served, and another one waits.
    let mut device = Device::plain(&daemon);
    let _second = daemon.connect();
    let said = ask_wrongly(&daemon);
    assert!(said.contains(&control), "{said}");
    device.assert_serves(0);
    // What is neither gets no answer, and need not wait for one.
    let mut web = UnixStream::connect(&daemon.socket).unwrap();
    web.set_read_timeout(Some(PATIENCE)).unwrap();
    web.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert!(matches!(web.read(&mut [0]), Ok(0) | Err(_)));
    assert!(daemon.wait_log("does not speak vhost-user").contains("GET /"));
    device.assert_serves(0);
}

#[test]
fn the_tool_finds_the_control_socket_beside_the_disks() {
    let (_disk, daemon) = start(URING);
    let _up = Control::of(&daemon);
    let socket = daemon.socket.display().to_string();
    let _device = Device::plain(&daemon);
    let (status, text, said) = vublk(&["status", &socket]);
    assert!(status.success() && text.contains("disk.size"), "{said}");
    let (status, _, said) = vublk(&["resize", &socket]);
    assert!(status.success(), "{said}");
    // Elsewhere, too.
    let disk = Disk::new();
    let place = disk.dir.path().join("elsewhere");
    let daemon = Daemon::start(URING, &disk, &Options::with(&[&format!("--control={}", place.display())]));
    daemon.wait_log("serving ");
    let socket = daemon.socket.display().to_string();
    let started = Instant::now();
    let _device = Device::plain(&daemon);
    let (status, text, said) = vublk(&["status", &socket]);
    assert!(status.success() && text.contains(&disk.path.display().to_string()), "{text}{said}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}
