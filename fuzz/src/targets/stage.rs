//! A device in this process: a disk of 1 MiB in memory, a worker, and the session that commands it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use vublk::device::Device;
use vublk::disk::{self, Disk};
use vublk::link::Link;
use vublk::promise::{self, Promise};
use vublk::session::Session;
use vublk::worker::{PoolSize, Tuning};
use vublk::workers::{EngineKind, Options, Workers};
use vublk::{memory, sys};

use crate::support::sys::memory_file;

pub const DISK_BYTES: u64 = 1 << 20;
pub const QUEUES: u16 = 4;

pub struct Stage {
    pub file: File,
    pub device: Arc<Device>,
    pub link: Arc<Link>,
    pub workers: Workers,
}

impl Stage {
    pub fn new(engine: EngineKind) -> Self {
        static FAULTS: std::sync::Once = std::sync::Once::new();
        // As the daemon does: memory that a front-end takes back must not end the process.
        FAULTS.call_once(|| {
            memory::fault::install(sys::eventfd().unwrap()).unwrap();
            sys::allow_interrupts().unwrap();
        });
        let file = memory_file(DISK_BYTES);
        let options = disk::Options {
            path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
            direct: false,
            lock: false,
            instance: "fuzz".into(),
            ..disk::Options::default()
        };
        let disk = Disk::open(&options, &|| false).unwrap();
        let promise = Promise::new(&disk, &promise_options()).unwrap();
        let device = Arc::new(Device::new(disk, promise, 1, true).unwrap());
        let link = Link::new(Arc::new(sys::eventfd().unwrap()), Duration::from_secs(10)).unwrap();
        let link = Arc::new(link);
        let pool = PoolSize { chunks: 2, chunk_len: 8192 };
        let tuning = Tuning { pool, poll: Duration::ZERO, plug: false };
        let options = Options { count: 1, queues: QUEUES, engine, pin_memory: false, tuning };
        let workers = Workers::new(options, Arc::clone(&device), Arc::clone(&link)).unwrap();
        Self { file, device, link, workers }
    }

    pub fn session(self) -> (Session, Arc<Device>, File) {
        let Self { file, device, link, workers } = self;
        (Session::new(Arc::clone(&device), workers, link, QUEUES), device, file)
    }
}

pub fn promise_options() -> promise::Options {
    promise::Options { logical_block_size: None, serial: Some("fuzz".into()) }
}
