//! After an fsync that failed no write counts as durable: Linux reports a lost
//! write once, so a later fsync that succeeds proves nothing about earlier writes.

use serde_json::json;

use super::stage::{BLOCK_SECTORS, STORES, Stage, disk_status, set_writeback};
use crate::session::each_engine;
use crate::succession::{daemon_of, kill_and_wait};
use crate::support::device::{Device, IOERR, OK, T_FLUSH, T_OUT, T_WRITE_ZEROES, range};
use crate::support::disk::{assert_same, pattern, salted};
use crate::support::sys::Deadline;

fn block(salt: u64, block: u64) -> Vec<u8> {
    salted(salt, block * BLOCK_SECTORS, BLOCK_SECTORS)
}

/// Durable writes and FLUSH fail; reads and cached writes succeed.
#[track_caller]
fn assert_nothing_is_durable(device: &mut Device, what: &str) {
    set_writeback(device, false);
    for at in [5, 6, 5] {
        let status = device.status(T_OUT, at * BLOCK_SECTORS, &block(3, at), 0);
        assert_eq!(status, IOERR, "{what}: a write in write-through");
    }
    let zeroes = range(10 * BLOCK_SECTORS, BLOCK_SECTORS as u32, 0);
    assert_eq!(device.status(T_WRITE_ZEROES, 0, &zeroes, 0), IOERR, "{what}: zeroes in write-through");
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), IOERR, "{what}: a FLUSH in write-through");
    let got = device.read(20 * BLOCK_SECTORS, BLOCK_SECTORS);
    assert_same(&got, &pattern(20 * BLOCK_SECTORS, BLOCK_SECTORS), what);
    set_writeback(device, true);
    device.write(30 * BLOCK_SECTORS, &block(4, 30));
    assert_same(&device.read(30 * BLOCK_SECTORS, BLOCK_SECTORS), &block(4, 30), what);
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), IOERR, "{what}: a FLUSH in write-back");
}

/// A guest in write-through sends no FLUSH, so its next writes have to report that an
/// earlier fsync failed.
#[test]
fn no_write_is_durable_after_a_flush_that_failed() {
    let test = "durability::no_write_is_durable_after_a_flush_that_failed";
    each_engine(|engine| {
        for store in STORES {
            let Some(stage) = Stage::new(test, store) else { return };
            let mut daemon = stage.start(engine, &[]);
            let mut device = Device::plain(&daemon);
            device.write(8, &block(1, 1));
            assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
            device.write(8, &block(2, 1));
            stage.gate.fail_syncs(1);
            assert_eq!(device.status(T_FLUSH, 0, &[], 0), IOERR);
            assert_eq!(disk_status(&daemon, "sync_failed"), json!(true));
            assert_nothing_is_durable(&mut device, &format!("{engine:?}, {store:?}"));
            drop(device);
            daemon.stop();
        }
    });
}

/// The same where the sync of a durable write failed.
#[test]
fn no_write_is_durable_after_a_durable_write_that_failed() {
    let test = "durability::no_write_is_durable_after_a_durable_write_that_failed";
    each_engine(|engine| {
        for store in STORES {
            let Some(stage) = Stage::new(test, store) else { return };
            let what = format!("{engine:?}, {store:?}");
            let mut daemon = stage.start(engine, &["--write-cache=writethrough"]);
            let mut device = Device::plain(&daemon);
            device.write(8, &block(1, 1));
            stage.gate.fail_syncs(1);
            assert_eq!(device.status(T_OUT, 8, &block(2, 1), 0), IOERR, "{what}");
            assert_eq!(disk_status(&daemon, "sync_failed"), json!(true), "{what}");
            assert_same(&stage.durable(1), &block(1, 1), &what);
            assert_nothing_is_durable(&mut device, &what);
            drop(device);
            daemon.stop();
        }
    });
}

/// Leaving write-back syncs what was cached. A config write has no answer, so the
/// next durable write has to report that the sync failed.
#[test]
fn no_write_is_durable_after_a_change_of_the_cache_mode_that_failed() {
    let test = "durability::no_write_is_durable_after_a_change_of_the_cache_mode_that_failed";
    each_engine(|engine| {
        for store in STORES {
            let Some(stage) = Stage::new(test, store) else { return };
            let mut daemon = stage.start(engine, &[]);
            let mut device = Device::plain(&daemon);
            device.write(8, &block(1, 1));
            stage.gate.fail_syncs(1);
            set_writeback(&device, false);
            device.frontend.sync();
            assert_eq!(disk_status(&daemon, "sync_failed"), json!(true));
            assert_nothing_is_durable(&mut device, &format!("{engine:?}, {store:?}"));
            drop(device);
            daemon.stop();
        }
    });
}

/// The control thread's own sync fails, in the sandbox, when the front-end leaves: the daemon lives, and a successor knows.
#[test]
fn a_sync_that_fails_as_the_front_end_leaves() {
    let test = "durability::a_sync_that_fails_as_the_front_end_leaves";
    each_engine(|engine| {
        for store in STORES {
            let Some(stage) = Stage::new(test, store) else { return };
            let daemon = stage.start(engine, &["--supervise"]);
            let first = daemon_of(&daemon);
            let mut device = Device::plain(&daemon);
            device.write(8, &block(1, 1));
            stage.gate.fail_syncs(1);
            drop(device);
            Deadline::new("the sync that failed")
                .until_slowly(|| (disk_status(&daemon, "sync_failed") == json!(true)).then_some(()));
            assert_eq!(daemon_of(&daemon), first, "{engine:?}, {store:?}: it has died");
            kill_and_wait(&daemon);
            let mut device = Device::plain(&daemon);
            assert_eq!(device.status(T_FLUSH, 0, &[], 0), IOERR, "{engine:?}, {store:?}: after a crash");
        }
    });
}
