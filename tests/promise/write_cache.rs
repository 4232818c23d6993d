//! The writeback byte of the config space. It says 1 only to a driver that can make
//! its writes durable, which is one that negotiated FLUSH (virtio 1.3, 5.2.5 and
//! 5.2.6.2).

use serde_json::{Value, json};

use crate::session::each_engine;
use crate::support::control::Control;
use crate::support::daemon::{Backend, Daemon, Options};
use crate::support::device::{Device, Setup};
use crate::support::disk::{Disk, salted};
use crate::support::frontend::{feature, msg};

const WRITEBACK: u32 = 32;

/// A driver that accepts everything but `without`.
fn attached(engine: Backend, without: u64) -> (Disk, Daemon, Device) {
    let disk = Disk::new();
    let daemon = Daemon::start(engine, &disk, &Options::default());
    let device = Device::new(&daemon, Setup { without, ..Setup::default() });
    (disk, daemon, device)
}

/// What the config space says, and what the operator is told.
fn mode(daemon: &Daemon, device: &Device) -> (Vec<u8>, Value) {
    let mut status = Control::of(daemon).call("status", json!({})).unwrap();
    (device.frontend.config(WRITEBACK, 1).unwrap(), status["disk"]["write_cache"].take())
}

/// It can switch a cache that it cannot flush: the cache stays off.
#[test]
fn a_driver_with_the_switch_and_no_flush_has_no_write_cache() {
    each_engine(|engine| {
        let (disk, daemon, mut device) = attached(engine, feature::FLUSH);
        assert_ne!(device.features & feature::CONFIG_WCE, 0, "CONFIG_WCE was not offered");
        assert_eq!(mode(&daemon, &device), (vec![0], json!("writethrough")), "after SET_FEATURES");
        device.frontend.set_config(WRITEBACK, &[1]);
        assert_eq!(
            mode(&daemon, &device),
            (vec![0], json!("writethrough")),
            "after it switched the cache on"
        );
        device.write(8, &salted(1, 8, 8));
        assert_eq!(disk.read(8, 8), salted(1, 8, 8));
    });
}

/// It can neither flush nor switch: its writes are durable when they are answered.
#[test]
fn a_driver_with_neither_switch_nor_flush_has_no_write_cache() {
    each_engine(|engine| {
        let (disk, daemon, mut device) = attached(engine, feature::FLUSH | feature::CONFIG_WCE);
        assert_eq!(mode(&daemon, &device), (vec![0], json!("writethrough")), "after SET_FEATURES");
        device.write(8, &salted(1, 8, 8));
        assert_eq!(disk.read(8, 8), salted(1, 8, 8));
    });
}

/// It can flush, so it has the cache that the command line gives.
#[test]
fn a_driver_with_flush_and_no_switch_has_a_write_cache() {
    each_engine(|engine| {
        let (_disk, daemon, device) = attached(engine, feature::CONFIG_WCE);
        assert_eq!(mode(&daemon, &device), (vec![1], json!("writeback")), "after SET_FEATURES");
    });
}

/// Firmware that cannot flush boots a system that can, on one connection: the cache
/// of the second driver is not what the first one made do with.
#[test]
fn the_next_driver_with_flush_has_its_write_cache_again() {
    each_engine(|engine| {
        let (_disk, daemon, device) = attached(engine, feature::FLUSH);
        device.frontend.tell64(msg::SET_FEATURES, device.features | feature::FLUSH);
        assert_eq!(mode(&daemon, &device), (vec![1], json!("writeback")), "with FLUSH");
        device.frontend.tell64(msg::SET_FEATURES, device.features);
        assert_eq!(mode(&daemon, &device), (vec![0], json!("writethrough")), "without FLUSH again");
    });
}
