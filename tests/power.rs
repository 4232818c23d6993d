//! Power cuts: what the guest was promised is on the disk whenever the power goes.
//!
//! The disk below the daemon is a `Gate` that keeps a log (`support::blocklog`): a file of FUSE, or a loop device over
//! it. It behaves as a drive with a volatile cache and a deep queue. What it was told is under way side by side and
//! ends in an order that is drawn, so a sync that the daemon sends too early overtakes the writes that it was to cover.
//! Above the daemon is a guest with many requests under way on two queues; each sector that it writes says by which
//! request it was written. Meanwhile daemons are killed and upgraded.
//!
//! **What the disk may hold** after a cut behind the first `n` entries of the log: of each 512-byte sector, any change
//! that had begun by then, unless one that began after its end is durable. Durable is what had ended when a sync
//! reached the disk, once that sync was answered. Sectors are independent of one another, so to look at all that each
//! of them may hold is to look at every set of writes that a power cut may leave, in any order, torn at any sector.
//!
//! **What the guest was promised**, with the place in the log from which it holds:
//! - FLUSH: what the guest had seen answered before it sent the FLUSH, from where the FLUSH was seen answered;
//! - write-through: each write, and each WRITE_ZEROES, from where it was seen answered;
//! - the switch from write-back to write-through: what had been answered before it;
//! - the end of the daemon by SIGTERM: all that was answered.
//!
//! Beyond that a sector holds what it was promised to hold or a newer version that the guest has sent, and never
//! anything else. After a DISCARD it holds zeroes or one of its own older versions.
//!
//! **Where an answer is in the log.** The disk writes an entry before it answers, and the daemon answers the guest after
//! that. The guest reads the length of the log after it has seen the answer. So every entry that the answer rests on is
//! below that length, and a promise that is judged from there on is one that the daemon had made by then. What the
//! log got between the answer and the look at its length makes the test milder, by some microseconds, and never
//! stricter than the daemon's promise.
//!
//! It was seen to fail, on both stores, with each of these mistakes in a copy of the sources:
//! - a FLUSH is answered without an fdatasync;
//! - a FLUSH that comes while an fdatasync is under way is answered with it;
//! - in write-through a write is answered when it has ended, and not when it is durable;
//! - a successor forgets that the guest chose write-through;
//! - the switch to write-through makes nothing durable;
//! - blocks that are read, changed and written are not locked (reads show that one first).
//!
//! What a killed daemon left in the kernel ends here within the time that its successor needs to start; that the
//! successor waits for it is shown by `fence`.

mod guest;
mod judge;
mod promises;

use rustix::process::{Signal, kill_process};

use crate::durability::stage::{Server, Stage, Store};
use crate::recovery::kills;
use crate::session::each_engine;
use crate::succession::{daemon_of, replayed};
use crate::support::control::settle;
use crate::support::daemon::{Backend, THREADS};
use crate::support::disk::SECTOR;
use crate::support::frontend::feature;
use crate::support::sys::{Deadline, register_tally};
use guest::Guest;
use judge::{Verdict, judge};
use promises::{Promises, content};

/// Bytes of the disk: few, so that its sectors are written again and again.
const DISK: usize = 2 << 20;
/// How many daemons are killed in a round (VUBLK_KILLS: in all rounds).
const KILLS: u64 = 5;

/// What the rounds of one store and engine came to.
#[derive(Default)]
struct Sum {
    verdict: Verdict,
    answers: u64,
    upgrades: u64,
    /// Kills that found requests in flight.
    hits: u64,
}

#[test]
fn every_cut_leaves_what_was_promised_of_a_file() {
    cut_the_power("power::every_cut_leaves_what_was_promised_of_a_file", Store::File);
}

#[test]
fn every_cut_leaves_what_was_promised_of_a_block_device() {
    cut_the_power("power::every_cut_leaves_what_was_promised_of_a_block_device", Store::Loop);
}

fn cut_the_power(test: &str, store: Store) {
    register_tally();
    each_engine(|engine| {
        // Two stores, two engines.
        let rounds = (kills() / KILLS / 4).max(1);
        let mut sum = Sum::default();
        for seed in 1..=rounds {
            let Some(stage) = Stage::logged(test, store, DISK, seed) else { return };
            round(&stage, engine, store, seed, &mut sum);
        }
        let Verdict { cuts, open, syncs, crossed, compared, violations, .. } = sum.verdict;
        eprintln!(
            "{store:?}, {engine:?}: {cuts} cut points ({open} with more than one possible outcome), {syncs} syncs ({crossed} of \
             them overtook changes), {} answers, {} kills ({} with requests in flight), {} upgrades; {compared} contents compared, \
             {violations} violations",
            sum.answers,
            rounds * KILLS,
            sum.hits,
            sum.upgrades,
        );
        assert_eq!(violations, 0, "{:#?}", sum.verdict.broken);
        assert!(open > cuts / 2, "the disk's cache was hardly used");
        // Threads that write to a file of FUSE hold a lock for which an fdatasync waits.
        assert!(crossed > 0 || (store, engine) == (Store::File, THREADS), "no sync has overtaken a write");
        assert!(sum.hits > 0, "no kill has hit a request");
    });
}

/// One daemon with its successors, in both cache modes, and its end.
fn round(stage: &Stage, engine: Backend, store: Store, seed: u64, sum: &mut Sum) {
    let mut daemon = stage.start(engine, &["--supervise", "--workers=2", "--logical-block-size=512"]);
    let mut promises = Promises::new((DISK / SECTOR) as u64);
    let gate = &stage.gate;
    let mut guest = Guest::new(&daemon, gate, &mut promises, 0, seed, 0);
    guest.work(60);
    kill(&daemon, &mut guest, sum);
    upgrade(&daemon, &mut guest, store, sum);
    kill(&daemon, &mut guest, sum);
    guest.set_write_through(true);
    kill(&daemon, &mut guest, sum);
    upgrade(&daemon, &mut guest, store, sum);
    guest.drain();
    let (answers, number) = (guest.answers, guest.number);
    drop(guest);

    // The same guest after a reset of its VMM, which does not tell the cache mode again.
    let mut guest = Guest::new(&daemon, gate, &mut promises, 0, seed + 1000, number);
    // What it chose, whatever the device says now.
    guest.write_through = true;
    guest.work(30);
    guest.set_write_through(false);
    kill(&daemon, &mut guest, sum);
    guest.drain();
    sum.answers += answers + guest.answers;
    let number = guest.number;
    drop(guest);

    // A driver without FLUSH.
    let mut guest = Guest::new(&daemon, gate, &mut promises, feature::FLUSH, seed + 2000, number);
    assert!(guest.write_through);
    kill(&daemon, &mut guest, sum);
    guest.drain();
    sum.answers += guest.answers;
    drop(guest);

    daemon.stop();
    let answered = promises.answered();
    promises.promise_all(gate.logged_so_far(), &answered);
    for (sector, bytes) in (0..).zip(gate.contents().chunks(SECTOR)) {
        let holds = content(sector, bytes);
        assert!(promises.allow_read(sector, holds), "in the end sector {sector} holds {holds:?}");
    }
    sum.verdict.add(judge(&gate.log(), &promises));
}

/// kill -9 under load, and some more of it.
fn kill(daemon: &Server, guest: &mut Guest<'_>, sum: &mut Sum) {
    // Past a message of which it is not known whether its reply is out.
    settle(daemon);
    let (victim, found) = (daemon_of(daemon), replayed(&daemon.log()).len());
    guest.work(40);
    guest.offer();
    kill_process(victim, Signal::KILL).unwrap();
    Deadline::new("the end of the daemon").until_slowly(|| (daemon_of(daemon) != victim).then_some(()));
    guest.work(40);
    sum.hits += u64::from(replayed(&daemon.log()).len() > found);
}

/// Another daemon under load.
fn upgrade(daemon: &Server, guest: &mut Guest<'_>, store: Store, sum: &mut Sum) {
    if store == Store::File {
        // Its path leads through this process's descriptors, where a daemon in its sandbox cannot look whether the
        // disk is still there.
        return;
    }
    let successors = || daemon.log().matches("took over from a vublkd that stopped").count();
    settle(daemon);
    let before = successors();
    daemon.signal(Signal::USR2);
    let deadline = Deadline::new("the successor");
    while successors() == before {
        guest.work(8);
        deadline.check();
    }
    sum.upgrades += 1;
}
