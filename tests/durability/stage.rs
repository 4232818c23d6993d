//! A gate as a disk, and daemons on it.

use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::rc::Rc;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::control::Control;
use crate::support::daemon::{Backend, Daemon, vublkd};
use crate::support::device::Device;
use crate::support::disk::{SECTOR, pattern};
use crate::support::gate::Gate;
use crate::support::loopdev::LoopDevice;
use crate::support::sys::{root, skip};

/// Bytes of the disk.
pub const DISK: usize = 8 << 20;
/// What the guest writes at a time: one block of any backing here.
pub const BLOCK: usize = 4096;
pub const BLOCK_SECTORS: u64 = (BLOCK / SECTOR) as u64;
/// Where the config space has the cache mode.
pub const WRITEBACK: u32 = 32;

/// What the daemon has for a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// The gate's file: writes are made durable by fdatasync.
    File,
    /// A loop device over it: RWF_DSYNC reaches a block device.
    Loop,
}

pub const STORES: [Store; 2] = [Store::File, Store::Loop];

/// See the head of the file.
pub struct Stage {
    // Before the gate: it is the device's file.
    _device: Option<LoopDevice>,
    pub path: PathBuf,
    pub gate: Rc<Gate>,
    folder: TempDir,
}

impl Stage {
    /// A patterned disk; or the test is left out.
    pub fn new(test: &str, store: Store) -> Option<Self> {
        Self::over(test, store, || Gate::new(pattern(0, (DISK / SECTOR) as u64)))
    }

    /// A disk of zeroes that keeps a log; or the test is left out.
    pub fn logged(test: &str, store: Store, bytes: usize, seed: u64) -> Option<Self> {
        Self::over(test, store, || Gate::logged(bytes, seed))
    }

    fn over(test: &str, store: Store, gate: impl FnOnce() -> Result<Gate, String>) -> Option<Self> {
        if !root(test, "a mount") {
            return None;
        }
        let made = gate().and_then(|gate| {
            let device = match store {
                Store::File => None,
                Store::Loop => Some(LoopDevice::over(&gate.path(), BLOCK as u32)?),
            };
            Ok((gate, device))
        });
        let (gate, device) = made.map_err(|reason| skip(test, &reason)).ok()?;
        let path = device.as_ref().map_or_else(|| gate.path(), |device| device.path.clone());
        Some(Self { _device: device, path, gate: Rc::new(gate), folder: tempfile::tempdir().unwrap() })
    }

    /// A daemon that listens.
    #[track_caller]
    pub fn start(&self, engine: Backend, extra: &[&str]) -> Server {
        let Backend::Vublkd(name) = engine else { panic!("vublkd alone") };
        let socket = self.folder.path().join("disk.sock");
        let mut command = vublkd(name, &socket, &self.path);
        command.args(["--num-queues=4"]).args(extra);
        let mut daemon = Daemon::spawn(engine, command, socket);
        daemon.wait_listening();
        Server { _opener: Opener(Rc::clone(&self.gate)), daemon }
    }

    /// What the disk would hold at this block after a power cut.
    pub fn durable(&self, block: u64) -> Vec<u8> {
        let start = block as usize * BLOCK;
        self.gate.durable()[start..start + BLOCK].to_vec()
    }
}

/// Lets everything through that a gate holds: a process cannot end before that.
struct Opener(Rc<Gate>);

impl Drop for Opener {
    fn drop(&mut self) {
        self.0.open();
        self.0.open_syncs();
    }
}

/// A daemon that cannot hang at a gate when a test fails.
pub struct Server {
    // Before the daemon, which is waited for.
    _opener: Opener,
    daemon: Daemon,
}

impl Deref for Server {
    type Target = Daemon;

    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

impl DerefMut for Server {
    fn deref_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}

/// A field of what the control socket says about the disk.
#[track_caller]
pub fn disk_status(daemon: &Daemon, field: &str) -> Value {
    Control::of(daemon).call("status", serde_json::json!({})).unwrap()["disk"][field].clone()
}

/// The guest sets the cache mode.
#[track_caller]
pub fn set_writeback(device: &Device, on: bool) {
    device.frontend.set_config(WRITEBACK, &[u8::from(on)]);
}
