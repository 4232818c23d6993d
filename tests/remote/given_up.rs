//! Connections that end while requests are under way, and the server cannot be asked what it did with them.

use super::network::serve_near;
use crate::support::device::{Device, IOERR, OK, T_IN, T_OUT};
use crate::support::disk::{Disk, assert_same, pattern, salted};
use crate::support::far::{FarServer, Kind};
use crate::support::network::{Host, Network};
use crate::support::sys::{Deadline, PATIENCE};

/// Once the kernel gives up, it is not known what the server still carries out: writes end with errors, reads go again.
#[test]
fn the_kernel_gives_up() {
    const TEST: &str = "remote::network::the_kernel_gives_up";
    if !Kind::Nbdkit.is_installed(TEST) {
        return;
    }
    let Some(network) = Network::new(TEST) else { return };
    let disk = Disk::new();
    let server = FarServer::start(&network, Kind::Nbdkit, &disk);
    // 3 s instead of 15 minutes.
    network.on(Host::Near, || std::fs::write("/proc/sys/net/ipv4/tcp_retries2", "3").unwrap());
    let mut daemon = serve_near(&network, &disk, &server, &[]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    network.set_link(Host::Far, false);
    let write = device.submit(0, T_OUT, 8, &salted(5, 8, 8), 0);
    let read = device.submit(0, T_IN, 100, &[], 512);
    let used = device.rings[0].wait_used("the end of the write");
    assert_eq!(device.outcome(&write, used).status, IOERR);
    network.set_link(Host::Far, true);
    let used = device.rings[0].wait_used("the read");
    let read = device.outcome(&read, used);
    assert_eq!(read.status, OK);
    assert_same(&read.data, &pattern(100, 1), "what was read in the end");
    device.write(8, &salted(6, 8, 8));
    assert_same(&disk.read(8, 8), &salted(6, 8, 8), "what was written in the end");
    daemon.stop();
}

/// How many connections to the server have something to send, of no process any more.
fn orphans(network: &Network) -> usize {
    let table = network.on(Host::Near, || std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap());
    // Columns: number, own address, the other's, state (04: FIN-WAIT-1).
    table.lines().filter(|line| line.split_whitespace().nth(3) == Some("04")).count()
}

/// A queue that has to stop does not wait for ever, and what it gave up does not reach the server once the link is back:
/// a later write could be there by then.
#[test]
fn what_was_given_up_is_not_sent() {
    const TEST: &str = "remote::network::what_was_given_up_is_not_sent";
    if !Kind::Nbdkit.is_installed(TEST) {
        return;
    }
    let Some(network) = Network::new(TEST) else { return };
    let disk = Disk::new();
    let server = FarServer::start(&network, Kind::Nbdkit, &disk);
    let mut daemon = serve_near(&network, &disk, &server, &[]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    device.frontend.socket.set_read_timeout(Some(2 * PATIENCE)).unwrap();
    network.set_link(Host::Far, false);
    let write = device.submit(0, T_OUT, 8, &salted(5, 8, 8), 0);
    device.frontend.vring_base(0).unwrap();
    let used = device.rings[0].wait_used("the end of the write");
    assert_eq!(device.outcome(&write, used).status, IOERR);
    network.set_link(Host::Far, true);
    drop(device);
    let mut device = Device::plain(&daemon);
    device.write(8, &salted(6, 8, 8));
    Deadline::new("what the kernel still sends").until_slowly(|| (orphans(&network) == 0).then_some(()));
    assert_same(&device.read(8, 8), &salted(6, 8, 8), "the later of two writes");
    daemon.stop();
}

/// A server that dies while the link is cut is not heard of. Where it had received all that was sent there is nothing to send
/// again, to which its host would say that the connection is gone.
#[test]
fn a_server_that_dies_unheard() {
    const TEST: &str = "remote::given_up::a_server_that_dies_unheard";
    if !Kind::Nbdkit.is_installed(TEST) {
        return;
    }
    let Some(network) = Network::new(TEST) else { return };
    let disk = Disk::new();
    let mut server = FarServer::start(&network, Kind::Nbdkit, &disk);
    let mut daemon = serve_near(&network, &disk, &server, &["--write-cache=writethrough"]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    server.freeze();
    let write = device.submit(0, T_OUT, 8, &salted(5, 8, 8), 0);
    Deadline::new("the request to have arrived")
        .until_slowly(|| (waiting_bytes(&network) > 4096).then_some(()));
    network.set_link(Host::Far, false);
    server.kill();
    server.start_again();
    network.set_link(Host::Far, true);
    let used = device.rings[0].wait_used("the write");
    assert_eq!(device.outcome(&write, used).status, OK);
    assert_same(&disk.read(8, 8), &salted(5, 8, 8), "what was written");
    daemon.stop();
}

/// What the server's kernel has received, and the server has not.
fn waiting_bytes(network: &Network) -> u64 {
    let table = network.on(Host::Far, || std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap());
    // Columns: number, own address, the other's, state (01: ESTABLISHED), bytes to send:bytes received.
    let lines = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let received = |line: Vec<&str>| u64::from_str_radix(line[4].split_once(':')?.1, 16).ok();
    lines.filter(|line| line.get(3) == Some(&"01")).filter_map(received).sum()
}
