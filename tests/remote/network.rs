//! Two hosts: vublkd on one, the server on the other. The link is cut and loses packets, server and daemon are killed, and
//! nothing is lost, wrong or hung: each answer has to come in time, and what it says has to be so.

use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};

use super::{serve_as, work};
use crate::recovery::{assert_hits, kills};
use crate::succession::{attach, daemon_of, replayed};
use crate::support::daemon::Daemon;
use crate::support::dice::Dice;
use crate::support::disk::Disk;
use crate::support::far::{FarServer, KINDS, Kind};
use crate::support::load::empty_disk;
use crate::support::network::{Host, Network};
use crate::support::sys::{Deadline, skip, tick};

/// vublkd on the near host.
#[track_caller]
pub fn serve_near(network: &Network, disk: &Disk, server: &FarServer<'_>, extra: &[&str]) -> Daemon {
    serve_as(disk, "disk.sock", &server.uri(), extra, |command| network.enter(Host::Near, command))
}

/// What is done to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Daemon,
    Server,
    Link,
    /// The server dies unheard, or is started anew before the link is back.
    ServerBehindLink,
    DaemonBehindLink,
    /// It may be put off, and then this daemon goes on.
    UpgradeBehindLink,
    Both,
}

/// Of a new connection each of some ten packets may be lost, and TCP waits a second for the first ones, and twice as long
/// each time.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often each of them was hit.
#[derive(Debug, Default)]
struct Hits {
    daemon: u64,
    server: u64,
    link: u64,
}

/// In turn, four kills of vublkd, four of the server and four cuts each time.
const MIX: [Fault; 9] = [
    Fault::Daemon,
    Fault::Server,
    Fault::Link,
    Fault::Server,
    Fault::DaemonBehindLink,
    Fault::Both,
    Fault::ServerBehindLink,
    Fault::UpgradeBehindLink,
    Fault::Daemon,
];

struct Stage<'a> {
    network: &'a Network,
    server: FarServer<'a>,
    daemon: Daemon,
    dice: Dice,
    hits: Hits,
}

impl Stage<'_> {
    /// Some moment, at most so many milliseconds away.
    fn a_while(&mut self, most: u64) {
        tick(&[], Duration::from_micros(self.dice.below(most * 1000)));
    }

    fn cut(&mut self) -> Host {
        let host = if self.dice.rarely(2) { Host::Near } else { Host::Far };
        self.network.set_link(host, false);
        self.hits.link += 1;
        host
    }

    /// kill -9; the next daemon is starting when this returns.
    #[track_caller]
    fn kill_daemon(&mut self) {
        let victim = daemon_of(&self.daemon);
        // It may have ended by itself: a start without a server fails.
        let _gone = kill_process(victim, Signal::KILL);
        Deadline::new("the end of the daemon")
            .until_slowly(|| (daemon_of(&self.daemon) != victim).then_some(()));
        self.hits.daemon += 1;
    }

    fn kill_server(&mut self) {
        self.server.kill();
        self.hits.server += 1;
    }

    #[track_caller]
    fn do_it(&mut self, fault: Fault) {
        match fault {
            Fault::Daemon => self.kill_daemon(),
            Fault::Server => {
                self.kill_server();
                self.a_while(30);
                self.server.start_again();
            }
            Fault::Link => {
                let host = self.cut();
                self.a_while(300);
                self.network.set_link(host, true);
            }
            Fault::ServerBehindLink => {
                let host = self.cut();
                self.kill_server();
                self.server.start_again();
                self.a_while(100);
                self.network.set_link(host, true);
            }
            Fault::DaemonBehindLink => {
                let host = self.cut();
                self.a_while(100);
                self.kill_daemon();
                self.a_while(100);
                self.network.set_link(host, true);
            }
            Fault::UpgradeBehindLink => {
                let host = self.cut();
                self.daemon.signal(Signal::USR2);
                self.a_while(300);
                self.network.set_link(host, true);
            }
            Fault::Both => {
                let is_first = self.dice.rarely(2);
                if is_first {
                    self.kill_server();
                }
                self.kill_daemon();
                if !is_first {
                    self.kill_server();
                }
                self.server.start_again();
            }
        }
    }
}

/// Median and maximum.
fn told(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let middle = times.get(times.len() / 2).copied().unwrap_or_default();
    format!("{middle:.0?} (median) to {:.0?}", times.last().copied().unwrap_or_default())
}

/// All at once, at random times, under a load whose every byte is known.
#[track_caller]
fn mixed(kind: Kind, test: &str) {
    if !kind.is_installed(test) {
        return;
    }
    let Some(network) = Network::new(test) else { return };
    let disk = empty_disk();
    let server = FarServer::start(&network, kind, &disk);
    let daemon = serve_near(&network, &disk, &server, &["--supervise", "--write-cache=writethrough"]);
    let (frontend, mut ring, mut load) = attach(&daemon, kind as u16);
    if !network.drop_packets(10) {
        skip(&format!("{test} with dropped packets"), "this kernel has no tc filters by BPF");
    }
    let dice = Dice::new(0x0e7 + kind as u64);
    let mut stage = Stage { network: &network, server, daemon, dice, hits: Hits::default() };
    let mut waits = Vec::new();
    for fault in MIX.iter().cycle().take(kills() as usize * 9 / 10) {
        work(&mut load, &mut ring);
        load.offer(&mut ring);
        stage.do_it(*fault);
        // What was answered before it says nothing of how long it takes.
        while ring.used_idx() != ring.seen {
            load.take(&mut ring);
        }
        load.offer(&mut ring);
        let since = Instant::now();
        Deadline::within(PATIENCE, "an answer after a fault")
            .until_slowly(|| (ring.used_idx() != ring.seen).then_some(()));
        load.take(&mut ring);
        waits.push(since.elapsed());
    }
    load.drain(&mut ring);
    assert_eq!(frontend.vring_base(0).unwrap(), ring.avail_idx);
    let log = stage.daemon.log();
    let found = replayed(&log).len() as u64;
    eprintln!(
        "{kind:?}: {:?}; {found} daemons left requests in flight, {} answers, the next one after {}",
        stage.hits,
        load.answered,
        told(waits)
    );
    assert_hits(found, stage.hits.daemon);
    stage.daemon.stop();
    load.verify(&disk);
}

#[test]
fn nbdkit_behind_a_bad_network() {
    mixed(KINDS[0], "remote::network::nbdkit_behind_a_bad_network");
}

#[test]
fn qemu_nbd_behind_a_bad_network() {
    mixed(KINDS[1], "remote::network::qemu_nbd_behind_a_bad_network");
}

#[test]
fn nbd_server_behind_a_bad_network() {
    mixed(KINDS[2], "remote::network::nbd_server_behind_a_bad_network");
}

/// Another daemon goes on under load, and the guest hardly notices.
#[test]
fn upgraded_over_the_network() {
    const TEST: &str = "remote::network::upgraded_over_the_network";
    if !Kind::Nbdkit.is_installed(TEST) {
        return;
    }
    let Some(network) = Network::new(TEST) else { return };
    let disk = empty_disk();
    let server = FarServer::start(&network, Kind::Nbdkit, &disk);
    let mut daemon = serve_near(&network, &disk, &server, &["--supervise"]);
    let (_frontend, mut ring, mut load) = attach(&daemon, 0);
    let upgrades = kills() as usize / 5;
    let mut gaps = Vec::new();
    for done in 1..=upgrades {
        let mut longest = Duration::ZERO;
        daemon.signal(Signal::USR2);
        let taken = Deadline::new("the successor");
        // The log is looked at between two answers that are not measured.
        while daemon.log().matches("took over from a vublkd that stopped").count() < done {
            let mut last = Instant::now();
            for _ in 0..64 {
                load.offer(&mut ring);
                load.take(&mut ring);
                longest = longest.max(std::mem::replace(&mut last, Instant::now()).elapsed());
            }
            taken.check();
        }
        gaps.push(longest);
    }
    load.drain(&mut ring);
    assert!(replayed(&daemon.log()).is_empty(), "something was in flight at a hand-over");
    eprintln!("{upgrades} upgrades, no answer for {}, {} answers", told(gaps), load.answered);
    daemon.stop();
    load.verify(&disk);
}
