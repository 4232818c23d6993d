//! What a guest and an operator get whatever holds the data: file systems that
//! share blocks or have no O_DIRECT of their own, block devices that cannot
//! discard or zero, images of odd length, names that are alike.
//!
//! - `devices`: block devices: their limits, DISCARD, and read-only ones;
//! - `discard`: `--discard=ignore`;
//! - `edges`: payloads that are only aligned in the middle;
//! - `length`: images whose last block has one sector;
//! - `offers`: feature bits and limits that the moment of a start does not change;
//! - `serial`: the serial number that a disk has by default;
//! - `used_length`: the length in the used ring;
//! - `write_cache`: drivers that cannot flush;
//! - `zeroes`: WRITE_ZEROES of many MiB.

mod devices;
mod discard;
mod edges;
mod length;
mod offers;
mod serial;
mod used_length;
mod write_cache;
mod zeroes;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::support::daemon::{Backend, Daemon, vublkd};
use crate::support::device::Device;
use crate::support::disk::takes_direct;
use crate::support::loopdev::LoopDevice;
use crate::support::sys::{root, skip};

/// Bytes of the config space that vublkd fills in.
const CONFIG_BYTES: u32 = 60;

/// The command line of a daemon on `disk` whose socket is in `folder`.
fn command(engine: Backend, folder: &Path, disk: &Path, extra: &[&str]) -> Command {
    let Backend::Vublkd(engine) = engine else {
        unreachable!("vublkd alone");
    };
    let mut command = vublkd(engine, &folder.join("disk.sock"), disk);
    command.arg("--num-queues=4").args(extra);
    if !takes_direct(disk) {
        command.arg("--direct=off");
    }
    command
}

/// Starts a daemon on `disk` and waits until its socket, in `folder`, listens.
#[track_caller]
fn start(engine: Backend, folder: &Path, disk: &Path, extra: &[&str]) -> Daemon {
    let command = command(engine, folder, disk, extra);
    let mut daemon = Daemon::spawn(engine, command, folder.join("disk.sock"));
    daemon.wait_listening();
    daemon
}

/// A loop device over `file`, or the test is left out.
fn loop_device(test: &str, file: &Path, block_size: u32) -> Option<LoopDevice> {
    if !root(test, "a loop device") {
        return None;
    }
    LoopDevice::over(file, block_size).map_err(|reason| skip(test, &format!("no loop device: {reason}"))).ok()
}

fn config(device: &Device) -> Vec<u8> {
    device.frontend.config(0, CONFIG_BYTES).unwrap()
}

fn u16_at(config: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(config[at..at + 2].try_into().unwrap())
}

fn u32_at(config: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(config[at..at + 4].try_into().unwrap())
}

fn capacity(config: &[u8]) -> u64 {
    u64::from_le_bytes(config[..8].try_into().unwrap())
}

fn block_size(config: &[u8]) -> u32 {
    u32_at(config, 20)
}

/// Bytes that a file occupies on its disk, after everything written has its place.
fn allocated(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks() * 512
}
