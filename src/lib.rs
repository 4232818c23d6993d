//! The crate behind `vublkd`, a vhost-user-blk back-end, and its tool `vublk`.
//!
//! A VMM hands the daemon its guest's memory as file descriptors. The guest's
//! virtio-blk driver puts requests on virtqueues in that memory; the daemon
//! turns each descriptor chain into a page array, without copying, and submits
//! it to the backing file with batched asynchronous direct I/O. It answers when
//! the disk has.
//!
//! A request is a different type at each stage, and the modules stand in the
//! order in which it meets them:
//!
//! ```text
//! guest ring ─► ring ─► chain ─► request ─► op ─► engine ─► op ─► complete ─► ring ─► call
//! ```
//!
//! Around that path: [`worker`] is the loop that drives it, [`session`] is what
//! the VMM said, [`control`] is the thread that listens to it. `ARCHITECTURE.md`
//! has the map and the invariants.

// The data path, in the order of a request.
pub mod memory;

pub mod dirty;
pub mod inflight;

pub mod ring;

pub mod chain;

pub mod request;

pub mod pages;

pub mod op;

pub mod engine;

pub mod complete;

pub mod worker;

// The disk, how it wants to be spoken to, and what the guest is promised of it.
pub mod backing;
pub mod changes;
pub mod device;
pub mod disk;
pub mod durability;
pub mod hash;
pub mod hold;
pub mod nbd;
pub mod promise;
pub mod pulse;
pub mod rbd;
pub mod stats;
pub mod throttle;
pub mod trace;

// The control plane.
pub mod control;
pub mod keep;
pub mod kept_file;
pub mod link;
pub mod listen;
pub mod log;
pub mod manager;
pub mod metrics;
pub mod process;
pub mod program;
pub mod rpc;
pub mod sandbox;
pub mod session;
pub mod shell;
pub mod signals;
pub mod silence;
pub mod start;
pub mod status;
pub mod store;
pub mod succession;
pub mod supervise;
pub mod user;
pub mod watchdog;
pub mod workers;

pub mod args;
pub mod bench;
pub mod find;
pub mod inspect;
pub mod notes;
pub mod rates;
pub mod sys;
pub mod tool;
