//! A guest moves from one host to another, on an export that both have open.

use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{serve_as, work};
use crate::recovery::kills;
use crate::session::migration::{Log, log_all};
use crate::succession::daemon_of;
use crate::support::daemon::Daemon;
use crate::support::device::{Device, OK, T_FLUSH, negotiate, start_ring};
use crate::support::disk::{Disk, assert_same, salted};
use crate::support::far::{FarServer, KINDS, Kind};
use crate::support::frontend::Frontend;
use crate::support::load::{Load, empty_disk};
use crate::support::memory::Memory;
use crate::support::nbd::Server;
use crate::support::network::{Host, Network};
use crate::support::ring::Ring;
use crate::support::sys::{Deadline, installed};

fn serve_on(host: Host, network: &Network, disk: &Disk, server: &FarServer<'_>, extra: &[&str]) -> Daemon {
    let socket = format!("{host:?}.sock");
    serve_as(disk, &socket, &server.uri(), extra, |command| network.enter(host, command))
}

/// A front-end that has agreed on everything and starts no ring yet, as that of a VM that is to arrive.
fn connect(daemon: &Daemon, memory: &Memory) -> (Frontend, u64) {
    let mut frontend = daemon.connect();
    let features = negotiate(&mut frontend, 0);
    frontend.set_mem_table(memory);
    (frontend, features)
}

/// There and back again under load, as often as `moves` says.
fn moves(kind: Kind, moves: u64, test: &str) {
    if !kind.is_installed(test) {
        return;
    }
    let Some(network) = Network::new(test) else { return };
    let disk = empty_disk();
    let server = FarServer::start(&network, kind, &disk);
    let memory = Memory::plain();
    let ring = Ring::new(Rc::clone(&memory), 256, 0, true);
    let mut load = Load::new(&memory, 0x60);
    let mut daemon = serve_on(Host::Near, &network, &disk, &server, &["--num-queues=1"]);
    let (frontend, features) = connect(&daemon, &memory);
    start_ring(&frontend, 0, &ring);
    let mut source = Device { frontend, memory: Rc::clone(&memory), rings: vec![ring], features };
    for number in 0..moves {
        work(&mut load, &mut source.rings[0]);
        let host = if number % 2 == 0 { Host::Far } else { Host::Near };
        let target = serve_on(host, &network, &disk, &server, &["--num-queues=1", "--incoming"]);
        let (frontend, features) = connect(&target, &memory);
        let log = Log::new();
        log.give(&source);
        log_all(&source, true);
        work(&mut load, &mut source.rings[0]);
        load.offer(&mut source.rings[0]);
        let base = source.frontend.vring_base(0).unwrap();
        while source.rings[0].seen != base {
            load.take(&mut source.rings[0]);
        }
        let ring = source.rings.remove(0);
        start_ring(&frontend, 0, &ring);
        source = Device { frontend, memory: Rc::clone(&memory), rings: vec![ring], features };
        load.offer(&mut source.rings[0]);
        load.take(&mut source.rings[0]);
        daemon.stop();
        daemon = target;
    }
    load.drain(&mut source.rings[0]);
    eprintln!("{kind:?}: {moves} moves, {} answers", load.answered);
    drop(source);
    daemon.stop();
    load.verify(&disk);
}

#[test]
fn a_guest_moves_on_nbdkit() {
    moves(KINDS[0], 2 + kills() / 20, "remote::migration::a_guest_moves_on_nbdkit");
}

#[test]
fn a_guest_moves_on_qemu_nbd() {
    moves(KINDS[1], 2 + kills() / 20, "remote::migration::a_guest_moves_on_qemu_nbd");
}

#[test]
fn a_guest_moves_on_nbd_server() {
    moves(KINDS[2], 2 + kills() / 20, "remote::migration::a_guest_moves_on_nbd_server");
}

/// What was answered and not flushed may be gone with its server. Only the source knows: it does not hand the guest over.
#[test]
fn a_guest_that_may_have_lost_something_does_not_move() {
    if !installed("nbdkit", "remote::migration::a_guest_that_may_have_lost_something_does_not_move") {
        return;
    }
    for restarts in [false, true] {
        let disk = Disk::new();
        let mut server = Server::of(&disk);
        let daemon = serve_as(&disk, "disk.sock", &server.uri(""), &[], |_| ());
        let mut device = Device::plain(&daemon);
        let log = Log::new();
        log.give(&device);
        log_all(&device, true);
        device.write(8, &salted(3, 8, 8));
        if restarts {
            server.kill();
            server.start_again();
        }
        device.assert_serves(0);
        let said = device.frontend.vring_base(0);
        assert_eq!(said.is_err(), restarts, "{said:?}");
        if restarts {
            daemon.wait_log("the guest must not go on at the target of its migration: what the guest was answered is not durable");
        }
    }
}

/// A server that does not answer the flush does not hold the VMM at the source: the migration fails, and the guest goes on
/// there.
#[test]
fn a_hand_over_ends_in_time_with_a_silent_server() {
    if !installed("nbdkit", "remote::migration::a_hand_over_ends_in_time_with_a_silent_server") {
        return;
    }
    let disk = Disk::new();
    let server = Server::of(&disk);
    let mut daemon = serve_as(&disk, "disk.sock", &server.uri(""), &[], |_| ());
    let mut device = Device::plain(&daemon);
    let log = Log::new();
    log.give(&device);
    log_all(&device, true);
    device.write(8, &salted(3, 8, 8));
    server.signal(Signal::STOP);
    let asked = Instant::now();
    device.frontend.wait_for_answers(Duration::from_secs(18));
    let said = device.frontend.vring_base(0);
    assert!(said.is_err() && asked.elapsed() < Duration::from_secs(16), "{said:?} {:?}", asked.elapsed());
    daemon.wait_log("the server has not answered a flush for 10 s");
    daemon.wait_log("the guest must not go on at the target of its migration");
    server.signal(Signal::CONT);
    drop(device);
    let mut device = Device::plain(&daemon);
    assert_same(&device.read(8, 8), &salted(3, 8, 8), "the guest goes on");
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
    // Once more, and a successor comes while the flush is not answered: nothing has failed.
    log.give(&device);
    log_all(&device, true);
    device.write(8, &salted(4, 8, 8));
    server.signal(Signal::STOP);
    device.frontend.wait_for_answers(Duration::from_secs(18));
    assert!(device.frontend.vring_base(0).is_err());
    drop(device);
    let before = daemon_of(&daemon);
    daemon.signal(Signal::USR2);
    Deadline::new("an upgrade").until_slowly(|| (daemon_of(&daemon) != before).then_some(()));
    server.signal(Signal::CONT);
    // The log may come first, as in a migration that is tried again.
    let memory = Memory::plain();
    let ring = Ring::new(Rc::clone(&memory), 256, 0, true);
    let (frontend, features) = connect(&daemon, &memory);
    let mut device = Device { frontend, memory, rings: vec![ring], features };
    log.give(&device);
    log_all(&device, true);
    start_ring(&device.frontend, 0, &device.rings[0]);
    assert_same(&device.read(8, 8), &salted(4, 8, 8), "what was answered");
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
    device.frontend.vring_base(0).unwrap();
    drop(device);
    daemon.stop();
}
