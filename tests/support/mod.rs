//! What the tests stand on: back-ends to start, a front-end, guest memory,
//! rings and disks.

pub mod daemon;
pub mod device;
pub mod dice;
pub mod disk;
pub mod frontend;
pub mod inflight;
pub mod loopdev;
pub mod memory;
pub mod ring;
pub mod sys;
