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
