//! What is offered, and what must not be offered before it works.

use super::{each_engine, start};
use crate::support::device::{Device, OK, Setup, T_OUT};
use crate::support::disk::salted;
use crate::support::frontend::{feature, msg, protocol};

#[test]
fn feature_bits() {
    each_engine(|engine| {
        let (_disk, daemon) = start(engine);
        let frontend = daemon.connect();
        let offered = frontend.ask64(msg::GET_FEATURES);
        let wanted = [
            (feature::VERSION_1, "VERSION_1"),
            (feature::INDIRECT_DESC, "INDIRECT_DESC"),
            (feature::EVENT_IDX, "EVENT_IDX"),
            (feature::LOG_ALL, "LOG_ALL"),
            (feature::PROTOCOL_FEATURES, "PROTOCOL_FEATURES"),
            (feature::SEG_MAX, "SEG_MAX"),
            (feature::BLK_SIZE, "BLK_SIZE"),
            (feature::TOPOLOGY, "TOPOLOGY"),
            (feature::FLUSH, "FLUSH"),
            (feature::CONFIG_WCE, "CONFIG_WCE"),
            (feature::MQ, "MQ"),
            (feature::DISCARD, "DISCARD"),
            (feature::WRITE_ZEROES, "WRITE_ZEROES"),
        ];
        for (bit, name) in wanted {
            assert_ne!(offered & bit, 0, "{name} is not offered");
        }
        for (bit, name) in [
            (feature::RING_PACKED, "RING_PACKED"),
            (feature::RO, "RO on a writable disk"),
            (1 << 1, "SIZE_MAX"),
            (1 << 16, "SECURE_ERASE"),
            (1 << 33, "ACCESS_PLATFORM"),
            (1 << 35, "IN_ORDER"),
            (1 << 40, "RING_RESET"),
        ] {
            assert_eq!(offered & bit, 0, "{name} is offered");
        }
    });
}

#[test]
fn protocol_bits() {
    let (_disk, daemon) = start(crate::support::daemon::URING);
    let frontend = daemon.connect();
    let offered = frontend.ask64(msg::GET_PROTOCOL_FEATURES);
    for (bit, name) in [
        (protocol::MQ, "MQ"),
        (protocol::REPLY_ACK, "REPLY_ACK"),
        (protocol::CONFIG, "CONFIG"),
        (protocol::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS"),
        (protocol::INFLIGHT_SHMFD, "INFLIGHT_SHMFD"),
        (protocol::BACKEND_REQ, "BACKEND_REQ"),
        (protocol::LOG_SHMFD, "LOG_SHMFD"),
        (protocol::RESET_DEVICE, "RESET_DEVICE"),
    ] {
        assert_ne!(offered & bit, 0, "{name} is not offered");
    }
    for (bit, name) in
        [(protocol::STATUS, "STATUS"), (protocol::INBAND_NOTIFICATIONS, "INBAND_NOTIFICATIONS")]
    {
        assert_eq!(offered & bit, 0, "{name} is offered");
    }
}

#[test]
fn limits() {
    let (_disk, daemon) = start(crate::support::daemon::URING);
    let device = Device::plain(&daemon);
    assert_eq!(device.frontend.ask64(msg::GET_QUEUE_NUM), 4);
    let slots = device.frontend.ask64(msg::GET_MAX_MEM_SLOTS);
    assert!(slots >= 32, "only {slots} memory slots");
}

#[test]
fn read_only_is_offered_when_it_is() {
    let disk = crate::support::disk::Disk::new();
    let options = crate::support::daemon::Options { read_only: true, ..Default::default() };
    let daemon = crate::support::daemon::Daemon::start(crate::support::daemon::URING, &disk, &options);
    let offered = daemon.connect().ask64(msg::GET_FEATURES);
    assert_ne!(offered & feature::RO, 0);
}

/// Every command is answered when an answer is asked for, and none is when not.
#[test]
fn reply_ack() {
    let (_disk, daemon) = start(crate::support::daemon::URING);
    // `Device` asks for an answer to each command and checks it.
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    // Without NEED_REPLY the next thing to arrive is the next answer.
    let wait = u64::to_le_bytes;
    let frontend = &device.frontend;
    frontend.send(msg::SET_FEATURES, 0, &wait(device.features), &[]).unwrap();
    frontend.send(msg::SET_OWNER, 0, &[], &[]).unwrap();
    assert_eq!(frontend.ask64(msg::GET_QUEUE_NUM), 4);
    device.assert_serves(0);
}

/// The write cache can be switched, stays switched, and the config says so.
#[test]
fn write_cache_switch() {
    each_engine(|engine| {
        let (_disk, daemon) = start(engine);
        let mut device = Device::plain(&daemon);
        assert_eq!(device.frontend.config(32, 1).unwrap(), [1]);
        device.frontend.set_config(32, &[0]);
        assert_eq!(device.frontend.config(32, 1).unwrap(), [0]);
        let data = salted(1, 8, 8);
        let done = device.run(0, T_OUT, 8, &data, 0);
        assert_eq!(done.status, OK, "a write through");
        device.frontend.set_config(32, &[1]);
        assert_eq!(device.frontend.config(32, 1).unwrap(), [1]);
        // What is not for drivers to write is ignored, not punished.
        device.frontend.set_config(0, &[0; 8]);
        device.frontend.set_config(32, &[7]);
        device.frontend.set_config(58, &[1, 2]);
        device.assert_serves(0);
        let capacity = device.frontend.config(0, 8).unwrap();
        assert_eq!(capacity, (64_u64 << 11).to_le_bytes());
    });
}

#[test]
fn write_through_from_the_start() {
    each_engine(|engine| {
        let disk = crate::support::disk::Disk::new();
        let options = crate::support::daemon::Options::with(&["--write-cache=writethrough"]);
        let daemon = crate::support::daemon::Daemon::start(engine, &disk, &options);
        let mut device = Device::plain(&daemon);
        assert_eq!(device.frontend.config(32, 1).unwrap(), [0]);
        device.write(8, &salted(2, 8, 64));
        assert_eq!(device.read(8, 64), salted(2, 8, 64));
        assert_eq!(disk.read(8, 64), salted(2, 8, 64));
    });
}

/// A driver that acks neither FLUSH nor CONFIG_WCE still gets its data.
#[test]
fn without_flush_and_wce() {
    each_engine(|engine| {
        let (disk, daemon) = start(engine);
        let mut device =
            Device::new(&daemon, Setup { without: feature::FLUSH | feature::CONFIG_WCE, ..Setup::default() });
        device.write(8, &salted(3, 8, 8));
        assert_eq!(disk.read(8, 8), salted(3, 8, 8));
    });
}
