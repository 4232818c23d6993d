//! Broken disks: the right request fails, or is held, with the right status; all else is unharmed, nothing is OK that
//! is not, and what `status` counts agrees.

mod errors;
mod files;
mod hold;
mod succession;

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::control::Control;
use crate::support::daemon::{Backend, Daemon, vublkd};
use crate::support::sys::Deadline;

/// A daemon on this disk, and the folder of its socket.
#[track_caller]
fn serve(engine: Backend, disk: &Path, extra: &[&str]) -> (TempDir, Daemon) {
    let Backend::Vublkd(name) = engine else { unreachable!("vublkd alone") };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("disk.sock");
    let mut command = vublkd(name, &socket, disk);
    command.arg("--num-queues=4").args(extra);
    let mut daemon = Daemon::spawn(engine, command, socket);
    daemon.wait_listening();
    (folder, daemon)
}

#[track_caller]
fn status(daemon: &Daemon) -> Value {
    Control::of(daemon).call("status", json!({})).unwrap()
}

/// Waits until so many requests are held, and gives what `status` says of them.
#[track_caller]
fn wait_held(daemon: &Daemon, requests: u64) -> Value {
    Deadline::new(format!("{requests} requests to be held")).until_slowly(|| {
        let held = status(daemon)["disk"]["held"].take();
        (held["requests"].as_u64().unwrap_or(0) == requests).then_some(held)
    })
}

/// What `status` has counted.
#[track_caller]
fn counter(daemon: &Daemon, name: &str) -> u64 {
    status(daemon)["counters"][name].as_u64().unwrap()
}
