//! The corpora of the fuzz targets, replayed: what the fuzzer found interesting, or wrong, stays right.
//!
//! `make fuzz` (`fuzz/README.md`) finds more.

#[path = "../fuzz/src/targets/mod.rs"]
mod targets;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

/// Runs a target over its corpus and over what was found, and names the file at which it fails.
fn replay(target: &str, run: fn(&[u8])) {
    let files_of = |kind: &str| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(kind).join(target);
        let files = folder.read_dir().into_iter().flatten().map(|entry| entry.unwrap().path());
        files.collect::<BTreeSet<_>>()
    };
    let corpus = files_of("corpus");
    assert!(!corpus.is_empty(), "{target} has no corpus");
    for file in corpus.into_iter().chain(files_of("found")) {
        let bytes = std::fs::read(&file).unwrap();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(&bytes))) {
            eprintln!("{} fails", file.display());
            resume_unwind(panic);
        }
    }
}

#[test]
fn chain_request() {
    replay("chain_request", targets::chain_request::run);
}

#[test]
fn ring() {
    replay("ring", targets::ring::run);
}

#[test]
fn inflight() {
    replay("inflight", targets::inflight::run);
}

#[test]
fn state() {
    replay("state", targets::state::run);
}

#[test]
fn nbd() {
    replay("nbd", targets::nbd::run);
}

#[test]
fn rpc() {
    replay("rpc", targets::rpc::run);
}

#[test]
fn session() {
    replay("session", targets::session::run);
}

#[test]
fn device() {
    replay("device", targets::device::run);
}
