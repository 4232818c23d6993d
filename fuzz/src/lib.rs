//! The bodies of the fuzz targets, with what they need of the crate's tests.
//!
//! `tests/fuzz.rs` runs the same bodies over the corpora, with a stable compiler and without libFuzzer.

#![allow(
    dead_code,
    unused_imports,
    reason = "the tests use more of their support modules than the fuzz targets do"
)]

#[path = "../../tests/model/mod.rs"]
mod model;
mod support;
pub mod targets;

/// As Rust's own start of a program does, which libFuzzer's is not: writing to a socket that was closed is an error, and
/// not the end of the process.
pub fn ignore_sigpipe() {
    // SAFETY: no handler is set.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
