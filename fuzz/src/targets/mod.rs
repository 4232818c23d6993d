//! The bodies of the fuzz targets: a function `run` each, which panics if what it tests does not do as its model does.
//!
//! They are built twice: by `fuzz/`, for libFuzzer, and by `tests/fuzz.rs`, which replays the corpora.

pub mod chain_request;
pub mod device;
mod hostile;
pub mod inflight;
pub mod nbd;
mod reader;
pub mod ring;
pub mod rpc;
pub mod session;
mod stage;
pub mod state;
