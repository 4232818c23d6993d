//! A write that the guest was told is durable is on the disk: after resets,
//! crashes and migrations, when an fsync fails, and when the kernel makes no
//! threads. With it, how operations of one request and of several share a disk.
//!
//! The backing is mostly `support::gate`: a file that loses what was not synced,
//! and whose writes and fsyncs end when and how a test says.

mod cache_mode;
mod failed_sync;
pub mod no_threads;
mod page_cache;
mod pieces;
mod qemu;
pub mod stage;
mod workers;
