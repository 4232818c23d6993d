//! Front-ends and guests that attack: what they do ends their own connection or their own requests, and a front-end
//! that comes next finds a disk that works.

mod areas;
mod connections;
mod descriptors;
mod kicks;
mod memory;
mod order;
mod owed;
mod rewriting;

use std::time::Duration;

use serde_json::json;

use crate::durability::stage::disk_status;
use crate::support::control::Control;
use crate::support::daemon::{Backend, Daemon, Options};
use crate::support::device::{Device, OK, Setup, T_FLUSH, T_IN, T_OUT};
use crate::support::disk::{Disk, assert_same, salted};
use crate::support::sys::{Deadline, open_fds};

/// Where a good front-end writes: past the pattern.
const WRITES_AT: u64 = 60_000;
/// How long a daemon under attack may take to answer `status`.
const ANSWERS: Duration = Duration::from_secs(2);

/// A daemon that is attacked, and what it was like before.
pub struct Victim {
    pub daemon: Daemon,
    pub disk: Disk,
    fds: usize,
    rounds: u64,
}

/// What `vublk status` counts.
#[track_caller]
fn count(daemon: &Daemon, name: &str) -> u64 {
    let status = Control::of(daemon).call("status", json!({})).unwrap();
    status["counters"][name].as_u64().unwrap()
}

/// `status` is answered while the daemon is attacked.
#[track_caller]
fn answers(daemon: &Daemon, what: &str) {
    assert!(Control::of(daemon).answers_within("status", ANSWERS), "no status during {what}");
}

impl Victim {
    #[track_caller]
    pub fn new(engine: Backend) -> Self {
        Self::with(engine, Disk::new(), &[])
    }

    #[track_caller]
    pub fn with(engine: Backend, disk: Disk, extra: &[&str]) -> Self {
        let daemon = Daemon::start(engine, &disk, &Options::with(extra));
        Self::over(disk, daemon)
    }

    /// One that runs.
    #[track_caller]
    pub fn over(disk: Disk, daemon: Daemon) -> Self {
        let mut victim = Self { daemon, disk, fds: usize::MAX, rounds: 0 };
        // All workers are there from now on.
        victim.serves("nothing was done yet");
        victim.fds = open_fds(victim.daemon.pid());
        victim
    }

    /// As [`count`].
    #[track_caller]
    pub fn count(&self, name: &str) -> u64 {
        count(&self.daemon, name)
    }

    /// How many requests its daemon has in flight.
    #[track_caller]
    pub fn in_flight(&self) -> u64 {
        disk_status(&self.daemon, "in_flight").as_u64().unwrap()
    }

    /// As [`answers`].
    #[track_caller]
    pub fn answers(&self, what: &str) {
        answers(&self.daemon, what);
    }

    /// A good front-end writes, reads what it wrote and what was there, and flushes, on four queues. No descriptor and
    /// no mapping of the front-ends before it is left, and no thread has panicked.
    #[track_caller]
    pub fn serves(&mut self, after: &str) {
        self.daemon.assert_alive();
        self.rounds += 1;
        let mut device = Device::new(&self.daemon, Setup { queues: 4, ..Setup::default() });
        for queue in 0..4 {
            let sector = WRITES_AT + 64 * queue as u64;
            let data = salted(self.rounds, sector, 8);
            assert_eq!(device.run(queue, T_OUT, sector, &data, 0).status, OK, "{after}");
            let got = device.run(queue, T_IN, sector, &[], data.len());
            assert_eq!(got.status, OK, "after {after}");
            assert_same(&got.data, &data, after);
            device.assert_serves(queue);
        }
        assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK, "after {after}");
        drop(device);
        let pid = self.daemon.pid();
        Deadline::new(format!("descriptors and mappings to be gone after {after}")).until_slowly(|| {
            let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
            (open_fds(pid) <= self.fds && !maps.contains("memfd:guest-ram")).then_some(())
        });
        let log = self.daemon.log();
        assert!(!log.contains("panicked"), "{log}");
    }

    /// SIGTERM ends it in time.
    #[track_caller]
    pub fn stops(&mut self) {
        self.daemon.stop_within(Duration::from_secs(3));
    }
}
