//! The cache mode belongs to the device: the mode that the guest chose stays
//! until the guest chooses again, also across resets, connections and daemons.
//!
//! A guest in write-through sends no FLUSH. If the device became write-back
//! after a reset or a crash, a power cut would lose writes that were answered.

use std::os::unix::fs::FileExt;
use std::rc::Rc;

use rustix::process::{Signal, kill_process};
use serde_json::json;

use super::stage::{BLOCK_SECTORS, Server, Stage, Store, WRITEBACK, disk_status, set_writeback};
use crate::session::each_engine;
use crate::succession::daemon_of;
use crate::support::control::settle;
use crate::support::daemon::{Daemon, URING};
use crate::support::device::{Device, OK, Setup, T_FLUSH, negotiate, start_ring};
use crate::support::disk::{assert_same, salted};
use crate::support::frontend::msg;
use crate::support::inflight::Inflight;
use crate::support::memory::Memory;
use crate::support::ring::Ring;
use crate::support::sys::{Deadline, PATIENCE};

/// The config space and the status say write-through, and a write that is answered
/// survives a power cut.
#[track_caller]
fn assert_writethrough(stage: &Stage, daemon: &Daemon, device: &mut Device, salt: u64, when: &str) {
    assert_eq!(device.frontend.config(WRITEBACK, 1).unwrap(), [0], "{when}: the guest sees write-back");
    assert_eq!(disk_status(daemon, "write_cache"), json!("writethrough"), "{when}");
    let (block, syncs) = (salt % 64, stage.gate.syncs().good);
    let data = salted(salt, block * BLOCK_SECTORS, BLOCK_SECTORS);
    device.write(block * BLOCK_SECTORS, &data);
    assert!(stage.gate.syncs().good > syncs, "{when}: a write was answered before any fsync");
    stage.gate.power_cut();
    let got = device.read(block * BLOCK_SECTORS, BLOCK_SECTORS);
    assert_same(&got, &data, &format!("{when}: a write that was answered, after a power cut"));
}

/// The config space and the status say write-back, and a write is durable after a
/// FLUSH, without an fsync before that.
#[track_caller]
fn assert_writeback(stage: &Stage, daemon: &Daemon, device: &mut Device, salt: u64, when: &str) {
    assert_eq!(device.frontend.config(WRITEBACK, 1).unwrap(), [1], "{when}: the guest sees write-through");
    assert_eq!(disk_status(daemon, "write_cache"), json!("writeback"), "{when}");
    let (block, syncs) = (salt % 64, stage.gate.syncs().good);
    let data = salted(salt, block * BLOCK_SECTORS, BLOCK_SECTORS);
    device.write(block * BLOCK_SECTORS, &data);
    assert_eq!(stage.gate.syncs().good, syncs, "{when}: a write waited for an fsync");
    assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK, "{when}");
    assert_same(&stage.durable(block), &data, &format!("{when}: a block that was flushed"));
}

/// What a front-end does when its guest reboots.
#[track_caller]
fn reset(device: &mut Device) {
    device.frontend.vring_base(0).unwrap();
    device.frontend.tell(msg::RESET_DEVICE, &[], &[]);
    device.frontend.tell64(msg::SET_FEATURES, device.features);
    device.frontend.set_mem_table(&device.memory);
    let ring = Ring::new(Rc::clone(&device.memory), 128, 0, true);
    start_ring(&device.frontend, 0, &ring);
    device.rings = vec![ring];
}

/// A connection that goes on with a guest's ring, and with its region if it has one.
#[track_caller]
fn attach(daemon: &Daemon, memory: Rc<Memory>, ring: Ring, region: Option<&Inflight>) -> Device {
    let mut frontend = daemon.connect();
    let features = negotiate(&mut frontend, 0);
    frontend.set_mem_table(&memory);
    if let Some(region) = region {
        region.give(&frontend);
    }
    start_ring(&frontend, 0, &ring);
    Device { frontend, memory, rings: vec![ring], features }
}

/// Closes the connection and opens another one for the same guest.
#[track_caller]
fn reconnect(device: Device, daemon: &Daemon, region: Option<&Inflight>) -> Device {
    let (memory, mut rings) = device.disconnect();
    attach(daemon, memory, rings.remove(0), region)
}

/// A device with an in-flight region that no back-end has used.
#[track_caller]
fn with_region(daemon: &Daemon) -> (Device, Inflight) {
    let memory = Memory::plain();
    let mut frontend = daemon.connect();
    let features = negotiate(&mut frontend, 0);
    frontend.set_mem_table(&memory);
    let region = Inflight::ask(&frontend, 1, 128);
    region.give(&frontend);
    let ring = Ring::new(Rc::clone(&memory), 128, 0, true);
    start_ring(&frontend, 0, &ring);
    (Device { frontend, memory, rings: vec![ring], features }, region)
}

#[track_caller]
fn kill(mut daemon: Server) {
    daemon.signal(Signal::KILL);
    daemon.wait_end(PATIENCE);
}

/// Only a driver's write to the config space changes the mode. A reset does not,
/// and the next driver reads the mode that is in force.
#[test]
fn the_cache_mode_survives_a_reset() {
    each_engine(|engine| {
        let test = "durability::the_cache_mode_survives_a_reset";
        let Some(stage) = Stage::new(test, Store::File) else { return };
        let mut daemon = stage.start(engine, &[]);
        let mut device = Device::plain(&daemon);
        set_writeback(&device, false);
        assert_writethrough(&stage, &daemon, &mut device, 1, "set by the guest");
        reset(&mut device);
        assert_writethrough(&stage, &daemon, &mut device, 2, "after a reset");
        set_writeback(&device, true);
        assert_writeback(&stage, &daemon, &mut device, 3, "set by the guest");
        reset(&mut device);
        assert_writeback(&stage, &daemon, &mut device, 4, "after a reset");
        drop(device);
        daemon.stop();
    });
}

/// A front-end that reconnects does not send the mode again, and its guest relies on
/// the mode that it chose.
#[test]
fn the_cache_mode_survives_a_reconnect() {
    each_engine(|engine| {
        let test = "durability::the_cache_mode_survives_a_reconnect";
        let Some(stage) = Stage::new(test, Store::File) else { return };
        let mut daemon = stage.start(engine, &[]);
        let mut device = Device::plain(&daemon);
        set_writeback(&device, false);
        device = reconnect(device, &daemon, None);
        assert_writethrough(&stage, &daemon, &mut device, 1, "after a reconnect");
        set_writeback(&device, true);
        device = reconnect(device, &daemon, None);
        assert_writeback(&stage, &daemon, &mut device, 2, "after a reconnect");
        drop(device);
        daemon.stop();
    });
}

/// `--write-cache` is the mode at the start of the daemon. After that the guest's
/// choice holds, in this direction as well.
#[test]
fn the_cache_mode_is_the_guests_also_where_the_operator_chose_write_through() {
    let test = "durability::the_cache_mode_is_the_guests_also_where_the_operator_chose_write_through";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    let mut daemon = stage.start(URING, &["--write-cache=writethrough"]);
    let mut device = Device::plain(&daemon);
    assert_writethrough(&stage, &daemon, &mut device, 1, "as configured");
    set_writeback(&device, true);
    reset(&mut device);
    assert_writeback(&stage, &daemon, &mut device, 2, "after a reset");
    device = reconnect(device, &daemon, None);
    assert_writeback(&stage, &daemon, &mut device, 3, "after a reconnect");
    drop(device);
    daemon.stop();
    // A new daemon without an in-flight region starts with the configured mode.
    let mut daemon = stage.start(URING, &["--write-cache=writethrough"]);
    let mut device = Device::plain(&daemon);
    assert_writethrough(&stage, &daemon, &mut device, 4, "as configured");
    drop(device);
    daemon.stop();
}

/// The in-flight region is all that a new daemon gets from a killed one: neither the
/// guest nor the front-end sends the mode again.
#[test]
fn write_through_survives_a_crash() {
    let test = "durability::write_through_survives_a_crash";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    let daemon = stage.start(URING, &[]);
    let (mut device, region) = with_region(&daemon);
    set_writeback(&device, false);
    assert_writethrough(&stage, &daemon, &mut device, 1, "set by the guest");
    kill(daemon);
    let daemon = stage.start(URING, &[]);
    let mut device = reconnect(device, &daemon, Some(&region));
    assert_writethrough(&stage, &daemon, &mut device, 2, "after a crash");
    reset(&mut device);
    assert_writethrough(&stage, &daemon, &mut device, 3, "after a crash and a reset");
    // A front-end takes another region after a reset, and the mode is set already.
    let region = Inflight::ask(&device.frontend, 1, 128);
    region.give(&device.frontend);
    kill(daemon);
    let mut daemon = stage.start(URING, &[]);
    let mut device = reconnect(device, &daemon, Some(&region));
    assert_writethrough(&stage, &daemon, &mut device, 4, "after a reset and a crash");
    drop(device);
    daemon.stop();
}

/// Write-through would be safe but slow: a guest in write-back stays there if its
/// region says so.
#[test]
fn write_back_survives_a_crash() {
    let test = "durability::write_back_survives_a_crash";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    for set in [&[][..], &[true], &[false, true]] {
        let daemon = stage.start(URING, &[]);
        let (mut device, region) = with_region(&daemon);
        set.iter().for_each(|&on| set_writeback(&device, on));
        assert_writeback(&stage, &daemon, &mut device, 1, "before");
        kill(daemon);
        let mut daemon = stage.start(URING, &[]);
        let mut device = reconnect(device, &daemon, Some(&region));
        assert_writeback(&stage, &daemon, &mut device, 2, "after a crash");
        drop(device);
        daemon.stop();
    }
}

/// A region that another back-end has used does not tell the mode. The guest may be
/// in write-through, so that is the only safe mode.
#[test]
fn a_region_of_another_back_end_means_write_through() {
    let test = "durability::a_region_of_another_back_end_means_write_through";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    let mut daemon = stage.start(URING, &[]);
    let mut frontend = daemon.connect();
    negotiate(&mut frontend, 0);
    let region = Inflight::ask(&frontend, 1, 128);
    drop(frontend);
    // features 0, version 1, 128 descriptors, no last batch, used_idx 0.
    let words: [u16; 8] = [0, 0, 0, 0, 1, 128, 0, 0];
    let header: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    region.file.write_all_at(&header, 0).unwrap();
    let memory = Memory::plain();
    let ring = Ring::new(Rc::clone(&memory), 128, 0, true);
    let mut device = attach(&daemon, memory, ring, Some(&region));
    assert_writethrough(&stage, &daemon, &mut device, 1, "with another back-end's region");
    set_writeback(&device, true);
    assert_writeback(&stage, &daemon, &mut device, 2, "set by the guest");
    drop(device);
    daemon.stop();
}

/// A region that no back-end has used belongs to a device that starts, which has the
/// configured mode.
#[test]
fn a_new_region_means_the_configured_mode() {
    let test = "durability::a_new_region_means_the_configured_mode";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    let mut daemon = stage.start(URING, &[]);
    let (mut device, _region) = with_region(&daemon);
    assert_writeback(&stage, &daemon, &mut device, 1, "with a new region");
    drop(device);
    daemon.stop();
}

/// A guest that comes by live migration may have chosen write-through at the source.
/// The daemon at the destination is not told, so it takes the safe mode.
#[test]
fn a_guest_that_comes_by_migration_gets_write_through() {
    let test = "durability::a_guest_that_comes_by_migration_gets_write_through";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    let mut daemon = stage.start(URING, &["--incoming"]);
    let mut device = Device::new(&daemon, Setup { base: 7, ..Setup::default() });
    assert_writethrough(&stage, &daemon, &mut device, 1, "after a migration");
    set_writeback(&device, true);
    assert_writeback(&stage, &daemon, &mut device, 2, "set by the guest");
    device = reconnect(device, &daemon, None);
    assert_writeback(&stage, &daemon, &mut device, 3, "after a reconnect");
    drop(device);
    daemon.stop();
}

/// The successor that the parent starts knows the mode, for the connection that
/// goes on and for later ones.
#[test]
fn the_cache_mode_survives_a_supervised_crash() {
    let test = "durability::the_cache_mode_survives_a_supervised_crash";
    let Some(stage) = Stage::new(test, Store::File) else { return };
    let mut daemon = stage.start(URING, &["--supervise"]);
    let mut device = Device::plain(&daemon);
    let mut salt = 0;
    for on in [false, true, false] {
        set_writeback(&device, on);
        for after in ["a crash", "a reconnect", "a crash between connections"] {
            let before = daemon_of(&daemon);
            // Not in the middle of a message, whose connection would be closed.
            settle(&daemon);
            match after {
                "a crash" => kill_process(before, Signal::KILL).unwrap(),
                "a reconnect" => device = reconnect(device, &daemon, None),
                _ => {
                    let (memory, mut rings) = device.disconnect();
                    daemon.connect().sync();
                    settle(&daemon);
                    kill_process(before, Signal::KILL).unwrap();
                    Deadline::new("the successor")
                        .until_slowly(|| (daemon_of(&daemon) != before).then_some(()));
                    device = attach(&daemon, memory, rings.remove(0), None);
                }
            }
            salt += 1;
            if on {
                assert_writeback(&stage, &daemon, &mut device, salt, after);
            } else {
                assert_writethrough(&stage, &daemon, &mut device, salt, after);
            }
        }
    }
    drop(device);
    daemon.stop();
}
