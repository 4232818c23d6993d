//! Disks that other programs serve over NBD: real servers, lost and started anew under a load whose every byte is known.

mod given_up;
mod migration;
mod network;
mod resize;
mod server;
pub mod told;

use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use serde_json::json;

use crate::recovery::{assert_hits, kills};
use crate::succession::{attach, daemon_of, kill_and_wait, replayed};
use crate::support::control::{Control, vublk};
use crate::support::daemon::{Daemon, URING, bare_vublkd};
use crate::support::device::{
    Device, IOERR, OK, Setup, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, UNWRITTEN, header,
    range,
};
use crate::support::disk::{Disk, SECTOR, assert_same, pattern, salted};
use crate::support::inflight::Inflight;
use crate::support::load::{Load, empty_disk};
use crate::support::memory::{Memory, Span};
use crate::support::nbd::Server;
use crate::support::ring::{Ring, back, out};
use crate::support::sys::{Deadline, PATIENCE, installed};

/// vublkd on this URI; its socket is beside the disk's file.
#[track_caller]
pub fn serve(disk: &Disk, uri: &str, extra: &[&str]) -> Daemon {
    serve_as(disk, "disk.sock", uri, extra, |_| ())
}

/// The same with a socket of this name, and what else its command line needs.
#[track_caller]
pub fn serve_as(
    disk: &Disk,
    socket: &str,
    uri: &str,
    extra: &[&str],
    more: impl FnOnce(&mut Command),
) -> Daemon {
    let socket = disk.dir.path().join(socket);
    let mut command = bare_vublkd();
    command.arg(format!("--socket-path={}", socket.display())).arg(format!("--disk={uri}"));
    command.arg("--log-level=debug").args(extra);
    more(&mut command);
    let mut daemon = Daemon::spawn(URING, command, socket);
    daemon.wait_listening();
    daemon
}

/// Some requests, of which others are in flight when it returns.
pub fn work(load: &mut Load, ring: &mut Ring) {
    load.offer(ring);
    for _ in 0..load.dice.below(200) {
        load.take(ring);
        load.offer(ring);
    }
}

#[track_caller]
fn serves_what_it_should(disk: &Disk, server: &Server, export: &str) {
    let mut daemon = serve(disk, &server.uri(export), &[]);
    let mut device = Device::plain(&daemon);
    assert_same(&device.read(8, 8), &pattern(8, 8), "what the server has");
    device.write(16, &salted(1, 16, 2048)); // 1 MiB, in one request
    assert_same(&device.read(16, 2048), &salted(1, 16, 2048), "what was written");
    device.write(1, &salted(2, 1, 1));
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
    assert_same(&disk.read(16, 2048), &salted(1, 16, 2048), "what the server's file has");
    assert_eq!(device.status(T_WRITE_ZEROES, 0, &range(64, 64, 1), 0), OK);
    assert_same(&device.read(64, 64), &vec![0; 64 * SECTOR], "zeroes");
    assert_eq!(device.status(T_DISCARD, 0, &range(256, 64, 0), 0), OK);
    assert_same(&device.read(1, 1), &salted(2, 1, 1), "a sector");
    daemon.stop();
}

#[test]
fn each_server_is_served() {
    if installed("nbdkit", "remote::each_server_is_served") {
        let disk = Disk::new();
        serves_what_it_should(&disk, &Server::of(&disk), "");
    }
    if installed("qemu-nbd", "remote::each_server_is_served by qemu-nbd") {
        let disk = Disk::new();
        serves_what_it_should(&disk, &Server::qemu_nbd_of(&disk), "");
    }
}

/// Of the connections that its workers need the server takes some: a start says so.
#[test]
fn a_server_that_takes_too_few_connections() {
    if !installed("qemu-nbd", "remote::a_server_that_takes_too_few_connections") {
        return;
    }
    let disk = Disk::new();
    let server = Server::qemu_nbd(1 << 20, 0, &["--shared=2"]);
    let socket = disk.dir.path().join("none.sock");
    let mut command = bare_vublkd();
    command.arg(format!("--socket-path={}", socket.display()));
    command.arg(format!("--disk={}", server.uri(""))).args(["--workers=4", "--supervise=off"]);
    let mut daemon = Daemon::spawn(URING, command, socket);
    // It has the third connection, and waits 10 s for an answer on it.
    assert!(!daemon.wait_end(2 * PATIENCE).success(), "it is served");
    assert!(daemon.log().contains("--shared=0"), "{}", daemon.log());
}

/// vublk cannot clone what another machine has, and says who can.
#[test]
fn a_snapshot_is_made_by_the_server() {
    if !installed("nbdkit", "remote::a_snapshot_is_made_by_the_server") {
        return;
    }
    let disk = Disk::new();
    let server = Server::of(&disk);
    let mut daemon = serve(&disk, &server.uri(""), &[]);
    let at = crate::support::control::path(&daemon);
    let copy = disk.dir.path().join("copy");
    let (status, _, why) = vublk(&["snapshot", at.to_str().unwrap(), copy.to_str().unwrap()]);
    assert!(status.code() == Some(1) && why.contains("cannot clone a disk on another machine"), "{why}");
    assert!(why.contains("vublk pause disk") && why.contains("vublk resume disk"), "{why}");
    assert!(!copy.exists(), "what is no snapshot is left");
    daemon.stop();
}

/// The server dies under load, again and again: requests wait for the next one, and nothing is lost or wrong.
#[test]
fn a_server_that_is_killed_loses_no_request() {
    if !installed("nbdkit", "remote::a_server_that_is_killed_loses_no_request") {
        return;
    }
    let disk = empty_disk();
    let mut server = Server::of(&disk);
    let mut daemon = serve(&disk, &server.uri(""), &[]);
    let (frontend, mut ring, mut load) = attach(&daemon, 0);
    for _ in 0..kills() / 2 {
        work(&mut load, &mut ring);
        server.kill();
        server.start_again();
    }
    load.drain(&mut ring);
    assert_eq!(frontend.vring_base(0).unwrap(), ring.avail_idx);
    eprintln!("{} kills of the server, {} answers", kills() / 2, load.answered);
    // Not with 0: it cannot know that the file of this server keeps what was not flushed.
    daemon.signal(Signal::TERM);
    daemon.wait_end(PATIENCE);
    load.verify(&disk);
}

/// Over TCP: the thread that connects anew may connect there, in the sandbox.
#[test]
fn a_server_of_the_network_is_killed() {
    if !installed("nbdkit", "remote::a_server_of_the_network_is_killed") {
        return;
    }
    let disk = empty_disk();
    let mut server = Server::over_tcp(&disk);
    let mut daemon = serve(&disk, &server.tcp_uri(), &["--write-cache=writethrough"]);
    let (_frontend, mut ring, mut load) = attach(&daemon, 0);
    for _ in 0..kills() / 4 {
        work(&mut load, &mut ring);
        server.kill();
        server.start_again();
    }
    load.drain(&mut ring);
    daemon.stop();
    load.verify(&disk);
}

/// Another daemon goes on under load, with nothing in flight.
#[test]
fn upgraded_under_load() {
    if !installed("nbdkit", "remote::upgraded_under_load") {
        return;
    }
    let disk = empty_disk();
    let server = Server::of(&disk);
    let mut daemon = serve(&disk, &server.uri(""), &["--supervise"]);
    let (_frontend, mut ring, mut load) = attach(&daemon, 0);
    for done in 1..=kills() as usize / 8 {
        daemon.signal(Signal::USR2);
        let taken = Deadline::new("the successor");
        while daemon.log().matches("took over from a vublkd that stopped").count() < done {
            load.offer(&mut ring);
            load.take(&mut ring);
            taken.check();
        }
    }
    load.drain(&mut ring);
    assert!(replayed(&daemon.log()).is_empty(), "something was in flight at a hand-over");
    daemon.stop();
    load.verify(&disk);
}

/// Which disk it is, as the guest sees it.
#[test]
fn the_serial_number_is_the_exports() {
    if !installed("nbdkit", "remote::the_serial_number_is_the_exports") {
        return;
    }
    let disk = Disk::new();
    let server = Server::of(&disk);
    for (export, start) in [("", "nbd-"), ("vm1%20root", "vm1_root-")] {
        let mut daemon = serve(&disk, &server.uri(export), &[]);
        let mut device = Device::plain(&daemon);
        let serial = String::from_utf8(device.run(0, T_GET_ID, 0, &[], 20).data).unwrap();
        assert!(serial.starts_with(start), "{serial}");
        drop(device);
        daemon.stop();
    }
}

/// What was answered and not flushed is with the server yet when a successor comes in order.
#[test]
fn upgraded_with_unflushed_writes() {
    if !installed("nbdkit", "remote::upgraded_with_unflushed_writes") {
        return;
    }
    for restarts in [false, true] {
        let disk = Disk::new();
        let mut server = Server::of(&disk);
        let mut daemon = serve(&disk, &server.uri(""), &["--supervise"]);
        let mut device = Device::plain(&daemon);
        for round in 1..4 {
            device.write(8, &salted(round, 8, 8));
            let before = daemon_of(&daemon);
            if restarts {
                server.kill();
            }
            daemon.signal(Signal::USR2);
            Deadline::new("a successor").until_slowly(|| (daemon_of(&daemon) != before).then_some(()));
            if restarts {
                server.start_again();
            }
            assert_same(&device.read(8, 8), &salted(round, 8, 8), "a file keeps it");
            assert_eq!(device.status(T_FLUSH, 0, &[], 0), if restarts { IOERR } else { OK }, "{round}");
            if restarts {
                break;
            }
        }
        drop(device);
        daemon.stop();
    }
}

/// A front-end takes memory back under requests. Of a write it is the kernel that finds out: that request fails, and no
/// other. Data of a read may be copied by the daemon, which then leaves the front-end.
#[test]
fn memory_is_lost_under_requests() {
    const KEPT: Span = Span { guest: 1 << 20, len: 64 << 20 };
    const LOST: Span = Span { guest: 1 << 30, len: 4 << 20 };
    if !installed("nbdkit", "remote::memory_is_lost_under_requests") {
        return;
    }
    let disk = Disk::new();
    let server = Server::of(&disk);
    let mut daemon = serve(&disk, &server.uri(""), &["--write-cache=writethrough"]);
    for (kind, bytes) in [(T_OUT, 4 << 10), (T_OUT, 256 << 10), (T_IN, 4 << 10), (T_IN, 256 << 10)] {
        let memory = Memory::with(&[KEPT, LOST]);
        let setup = Setup { ring_size: 256, memory: Rc::clone(&memory), ..Setup::default() };
        let mut device = Device::new(&daemon, setup);
        let (head, status) = (memory.alloc(4096, 4096), memory.page_with(&[UNWRITTEN]));
        memory.write(head, &header(kind, 8));
        let data = if kind == T_IN { back(LOST.guest, bytes) } else { out(LOST.guest, bytes) };
        let chain = device.rings[0].chain(&[out(head, 16), data, back(status, 1)]);
        let others: Vec<_> = (128..160)
            .map(|n| match n % 2 {
                0 => device.submit(0, T_IN, 8 * n, &[], 4096),
                _ => device.submit(0, T_OUT, 8 * n, &pattern(8 * n, 8), 0),
            })
            .collect();
        memory.regions[1].file.set_len(0).unwrap();
        device.rings[0].offer(chain);
        Deadline::new("an answer, or the end of the connection").until_slowly(|| {
            let all = device.rings[0].used_idx() == device.rings[0].avail_idx;
            (all || kind == T_IN && device.frontend.hung_up()).then_some(())
        });
        assert_ne!(memory.byte(status), OK, "{kind}, {bytes}");
        if kind == T_OUT {
            assert_eq!(memory.byte(status), IOERR, "{kind}, {bytes}");
            for pending in &others {
                assert_eq!(memory.byte(pending.status_at), OK, "{kind}, {bytes}");
            }
        }
    }
    Device::plain(&daemon).assert_serves(0);
    assert_same(&disk.read(8, 512), &pattern(8, 512), "nothing of a lost page reached the disk");
    let lost = daemon.log().matches("the connection to the server was lost").count();
    assert!(lost <= 8, "{lost} connections were lost");
    daemon.stop();
}

/// vublkd dies under load: its successor goes on once the server has done what the dead one had sent.
#[test]
fn a_daemon_that_is_killed_loses_nothing() {
    if !installed("nbdkit", "remote::a_daemon_that_is_killed_loses_nothing") {
        return;
    }
    let disk = empty_disk();
    let server = Server::of(&disk);
    let mut daemon = serve(&disk, &server.uri(""), &["--supervise"]);
    let (_frontend, mut ring, mut load) = attach(&daemon, 0);
    for _ in 0..kills() {
        let victim = daemon_of(&daemon);
        work(&mut load, &mut ring);
        kill_process(victim, Signal::KILL).unwrap();
        Deadline::new("the end of the daemon").until_slowly(|| (daemon_of(&daemon) != victim).then_some(()));
    }
    load.drain(&mut ring);
    let found = replayed(&daemon.log());
    eprintln!(
        "{} kills of vublkd, {} of them with requests in flight, {} answers",
        kills(),
        found.len(),
        load.answered
    );
    assert_hits(found.len() as u64, kills());
    daemon.stop();
    load.verify(&disk);
}

/// Both die, in any order; what is answered is durable each time.
#[test]
fn both_are_killed_at_any_time() {
    if !installed("nbdkit", "remote::both_are_killed_at_any_time") {
        return;
    }
    let disk = empty_disk();
    let mut server = Server::of(&disk);
    let mut daemon = serve(&disk, &server.uri(""), &["--supervise", "--write-cache=writethrough"]);
    let (_frontend, mut ring, mut load) = attach(&daemon, 0);
    for _ in 0..kills() / 2 {
        work(&mut load, &mut ring);
        let victim = daemon_of(&daemon);
        let first = load.dice.rarely(2);
        if first {
            server.kill();
        }
        // It may have ended by itself: a start without a server fails.
        let _gone = kill_process(victim, Signal::KILL);
        if !first {
            server.kill();
        }
        server.start_again();
        Deadline::new("the end of the daemon").until_slowly(|| (daemon_of(&daemon) != victim).then_some(()));
    }
    load.drain(&mut ring);
    daemon.stop();
    load.verify(&disk);
}

/// A daemon that dies while it has no connection, since the server is gone, leaves what was in flight to its successor.
#[test]
fn killed_while_the_server_is_gone() {
    if !installed("nbdkit", "remote::killed_while_the_server_is_gone") {
        return;
    }
    for workers in ["--workers=1", "--workers=2"] {
        let disk = Disk::new();
        let mut server = Server::of(&disk);
        let mut daemon = serve(&disk, &server.uri(""), &["--supervise", "--num-queues=2", workers]);
        let mut device = Device::plain(&daemon);
        device.write(8, &salted(3, 8, 8));
        server.signal(Signal::STOP);
        let pending = device.submit(0, T_OUT, 16, &salted(5, 16, 8), 0);
        server.kill();
        daemon.wait_log("no connection to the server yet");
        kill_and_wait(&daemon);
        server.start_again();
        let used = device.rings[0].wait_used("the write");
        assert_eq!(device.outcome(&pending, used).status, OK, "{workers}");
        assert_same(&device.read(8, 16), &[salted(3, 8, 8), salted(5, 16, 8)].concat(), workers);
        daemon.signal(Signal::TERM);
        daemon.wait_end(PATIENCE);
    }
}

/// What was answered and not flushed may be gone with a server that was started anew: a flush says so. Nothing was at
/// risk where all was flushed, or written through.
#[test]
fn a_flush_after_a_restart_tells_the_truth() {
    if !installed("nbdkit", "remote::a_flush_after_a_restart_tells_the_truth") {
        return;
    }
    for (extra, flushes, want) in
        [(&[][..], false, IOERR), (&[], true, OK), (&["--write-cache=writethrough"], false, OK)]
    {
        let disk = Disk::new();
        let mut server = Server::of(&disk);
        let mut daemon = serve(&disk, &server.uri(""), extra);
        let mut device = Device::plain(&daemon);
        device.write(8, &salted(3, 8, 8));
        if flushes {
            assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
        }
        server.kill();
        server.start_again();
        assert_same(&device.read(8, 8), &salted(3, 8, 8), "a file keeps it");
        assert_eq!(device.status(T_FLUSH, 0, &[], 0), want, "{extra:?}, flushed before: {flushes}");
        drop(device);
        if want == IOERR {
            assert!(daemon.wait_log("a flush failed").contains("check the server's log"));
            daemon.wait_log("start no other daemon on this export before vublkd was stopped");
        }
        daemon.stop();
    }
}

/// A daemon that dies before it could say so leaves that to its successor; and one that dies together with a server that
/// had everything durable leaves nothing of the kind.
#[test]
fn a_successor_tells_the_truth() {
    if !installed("nbdkit", "remote::a_successor_tells_the_truth") {
        return;
    }
    for (flushes, server_first, want) in
        [(false, true, IOERR), (true, true, OK), (false, false, IOERR), (true, false, OK)]
    {
        let disk = Disk::new();
        let mut server = Server::of(&disk);
        let mut daemon = serve(&disk, &server.uri(""), &["--supervise"]);
        let mut device = Device::plain(&daemon);
        device.write(8, &salted(3, 8, 8));
        if flushes {
            assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
        }
        if server_first {
            server.kill();
            server.start_again();
            assert_same(&device.read(8, 8), &salted(3, 8, 8), "a file keeps it");
            kill_and_wait(&daemon);
        } else {
            server.kill();
            kill_and_wait(&daemon);
            server.start_again();
        }
        assert_same(&device.read(8, 8), &salted(3, 8, 8), "a file keeps it");
        let status = device.status(T_FLUSH, 0, &[], 0);
        assert_eq!(status, want, "flushed before: {flushes}, the server died first: {server_first}");
        daemon.signal(Signal::TERM);
        daemon.wait_end(PATIENCE);
    }
}

#[test]
fn without_patience_requests_fail_while_the_server_is_gone() {
    if !installed("nbdkit", "remote::without_patience_requests_fail_while_the_server_is_gone") {
        return;
    }
    let disk = Disk::new();
    let mut server = Server::of(&disk);
    let mut daemon = serve(&disk, &server.uri(""), &["--reconnect-delay=0"]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    server.kill();
    Deadline::new("an I/O error").until_slowly(|| (device.status(T_IN, 8, &[], 4096) == IOERR).then_some(()));
    server.start_again();
    Deadline::new("the disk").until_slowly(|| (device.status(T_IN, 8, &[], 4096) == OK).then_some(()));
    daemon.stop();
}

fn wait_in_flight(daemon: &Daemon) {
    let mut control = Control::of(daemon);
    Deadline::new("a request in flight").until_slowly(|| {
        let status = control.call("status", json!({})).unwrap();
        let is_lost = status["disk"]["server_lost_seconds"].is_f64();
        (status["disk"]["in_flight"] == 1 && is_lost).then_some(())
    });
}

/// A guest that is reset, or a daemon that is stopped, does not hang for a server that is gone.
#[test]
fn a_ring_stops_in_time_while_the_server_is_gone() {
    if !installed("nbdkit", "remote::a_ring_stops_in_time_while_the_server_is_gone") {
        return;
    }
    let disk = Disk::new();
    let mut server = Server::of(&disk);
    let mut daemon = serve(&disk, &server.uri(""), &[]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    server.kill();
    let pending = device.submit(0, T_IN, 8, &[], 4096);
    wait_in_flight(&daemon);
    device.frontend.vring_base(0).unwrap();
    let used = device.rings[0].wait_used("the request");
    assert_eq!(device.outcome(&pending, used).status, IOERR);
    drop(device);
    // It waits again for the next guest, and is stopped.
    let mut device = Device::plain(&daemon);
    device.submit(0, T_OUT, 8, &pattern(8, 8), 0);
    wait_in_flight(&daemon);
    daemon.signal(Signal::TERM);
    daemon.wait_end(Duration::from_secs(5));
}

/// Without a store nothing is known of a dead daemon's requests: they are answered, and not done again.
#[test]
fn without_a_fence_nothing_is_done_again() {
    if !installed("nbdkit", "remote::without_a_fence_nothing_is_done_again") {
        return;
    }
    let disk = Disk::new();
    let server = Server::of(&disk);
    let mut daemon = serve(&disk, &server.uri(""), &["--supervise=off"]);
    let memory = Memory::plain();
    let mut ring = Ring::new(Rc::clone(&memory), 256, 0, true);
    let mut load = Load::new(&memory, 7);
    let (frontend, region) = crate::recovery::attach(&daemon, &memory, &ring, None);
    let region: Inflight = region.unwrap();
    server.signal(Signal::STOP);
    load.offer(&mut ring);
    Deadline::new("requests in flight").until(|| (!region.marked(0).is_empty()).then_some(()));
    daemon.signal(Signal::KILL);
    daemon.wait_end(PATIENCE);
    drop(frontend);
    let marked = region.marked(0).len();
    server.signal(Signal::CONT);
    let daemon = serve(&disk, &server.uri(""), &["--supervise=off"]);
    let (_frontend, _) = crate::recovery::attach(&daemon, &memory, &ring, Some(&region));
    let mut failed = 0;
    while failed < marked {
        let used = ring.wait_used("an answer");
        let lane = load.lane_of(used.head);
        failed += usize::from(memory.byte(lane) == IOERR);
    }
    daemon.wait_log("the server may carry it out yet");
}
