//! What the tests stand on: back-ends to start, a front-end, guest memory,
//! rings and disks.

pub mod blocklog;
pub mod ceph;
pub mod control;
pub mod daemon;
pub mod device;
pub mod dice;
pub mod disk;
pub mod far;
pub mod freeze;
pub mod frontend;
pub mod fs;
pub mod gate;
pub mod inflight;
pub mod load;
pub mod loopdev;
pub mod manager;
pub mod memory;
pub mod nbd;
pub mod network;
pub mod request;
pub mod ring;
pub mod sys;
pub mod systemd;
