//! The service manager's watchdog: its word comes as long as workers answer, whatever the disk does.

use std::os::unix::fs::chown;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use tempfile::TempDir;

use crate::durability::no_threads::{limit_threads, unused_user};
use crate::succession::daemon_of;
use crate::support::control::settle;
use crate::support::daemon::{Daemon, URING, vublkd};
use crate::support::device::{Device, OK, T_IN};
use crate::support::disk::Disk;
use crate::support::freeze::{Frozen, threads};
use crate::support::gate::Gate;
use crate::support::sys::{Deadline, PATIENCE, skip};

/// The manager's patience; the word is to come in half of it.
const LIMIT: Duration = Duration::from_millis(400);

/// A service, and where its words go.
struct Service {
    daemon: Daemon,
    inbox: UnixDatagram,
    _folder: TempDir,
}

impl Service {
    fn start(engine: &str, disk: &Path, prepare: impl FnOnce(&Path, &mut Command)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (socket, notify) = (folder.path().join("disk.sock"), folder.path().join("notify"));
        let inbox = UnixDatagram::bind(&notify).unwrap();
        let plain = vublkd(engine, &socket, disk);
        // WATCHDOG_PID is the process that the shell becomes.
        let mut command = Command::new("sh");
        command
            .args(["-c", "WATCHDOG_PID=$$ exec \"$@\"", "sh"])
            .arg(plain.get_program())
            .args(plain.get_args());
        command.env("NOTIFY_SOCKET", &notify).env("WATCHDOG_USEC", LIMIT.as_micros().to_string());
        prepare(folder.path(), &mut command);
        let mut daemon = Daemon::spawn(URING, command, socket);
        daemon.wait_listening();
        Self { daemon, inbox, _folder: folder }
    }

    /// The next word within a time.
    fn word(&self, within: Duration) -> Option<String> {
        self.inbox.set_read_timeout(Some(within)).unwrap();
        let mut bytes = [0; 256];
        let got = self.inbox.recv(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes[..got]).trim().to_owned())
    }

    /// So many words of the watchdog, one after another, from now on.
    #[track_caller]
    fn assert_words(&self, count: usize, when: &str) {
        self.forget();
        let mut left = count;
        while left > 0 {
            let word = self.word(PATIENCE).unwrap_or_else(|| panic!("no word {when}"));
            left -= usize::from(word == "WATCHDOG=1");
        }
    }

    /// What has come.
    fn forget(&self) {
        self.inbox.set_nonblocking(true).unwrap();
        while self.inbox.recv(&mut [0; 256]).is_ok() {}
        self.inbox.set_nonblocking(false).unwrap();
    }
}

/// An idle daemon wakes its worker for the word alone; a worker that stands still ends the words, until it goes on.
#[test]
fn a_worker_that_stands_still() {
    let disk = Disk::new();
    let direct = disk.takes_direct();
    let service = Service::start("io_uring", &disk.path, |_, command| {
        if !direct {
            command.arg("--direct=off");
        }
    });
    let mut device = Device::plain(&service.daemon);
    device.assert_serves(0);
    settle(&service.daemon);
    let (tid, _) = threads(&service.daemon).into_iter().find(|(_, name)| name == "vublk-0").unwrap();
    let sleeps = || {
        let status = format!("/proc/{}/task/{tid}/status", service.daemon.pid());
        let status = std::fs::read_to_string(status).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        line.trim().parse::<u32>().unwrap()
    };
    service.assert_words(1, "while it idles");
    let before = sleeps();
    service.assert_words(4, "while it idles");
    let woken = sleeps() - before;
    assert!((3..=6).contains(&woken), "the idle worker was woken {woken} times for 4 words");
    let frozen = match Frozen::thread(&service.daemon, "vublk-0") {
        Ok(frozen) => frozen,
        Err(reason) => return skip("watchdog::a_worker_that_stands_still", &reason),
    };
    // One may be for what it answered before.
    let last = service.word(LIMIT);
    service.forget();
    assert_eq!(service.word(2 * LIMIT), None, "after {last:?}");
    drop(frozen);
    service.assert_words(2, "from a worker that goes on");
    device.assert_serves(0);
}

/// A disk that hangs does not end the words, whether the kernel waits for it or the worker's own thread, where no other
/// can be had.
#[test]
fn a_disk_that_hangs() {
    let test = "watchdog::a_disk_that_hangs";
    for own_thread in [false, true] {
        let Some((gate, store)) = Gate::under_loop(test, vec![0; 8 << 20]) else { return };
        let user = unused_user();
        let engine = if own_thread { "threads" } else { "io_uring" };
        let service = Service::start(engine, &store.path, |folder, command| {
            if own_thread {
                store.give(user);
                for path in [folder, &folder.join("notify")] {
                    chown(path, Some(user), Some(user)).unwrap();
                }
                command.uid(user).gid(user);
            }
        });
        let mut device = Device::plain(&service.daemon);
        settle(&service.daemon);
        if own_thread {
            limit_threads(&service.daemon, user, false);
        }
        gate.close(1, usize::MAX);
        let pending = device.submit(0, T_IN, 0, &[], 4096);
        Deadline::new("the request to hang").until_slowly(|| (gate.held() == 1).then_some(()));
        if own_thread {
            service.daemon.wait_log("own thread");
        }
        service.assert_words(4, "while the disk hangs");
        gate.open();
        let used = device.rings[0].wait_used("the answer");
        assert_eq!(device.outcome(&pending, used).status, OK);
    }
}

/// With a parent it is the parent that is the service: it passes the word on, and gives its own while no daemon serves.
#[test]
fn with_a_parent() {
    let disk = Disk::new();
    let direct = disk.takes_direct();
    let service = Service::start("io_uring", &disk.path, |_, command| {
        command.arg("--supervise");
        if !direct {
            command.arg("--direct=off");
        }
    });
    let mut device = Device::plain(&service.daemon);
    device.assert_serves(0);
    service.assert_words(3, "of a daemon");
    settle(&service.daemon);
    // A daemon that does not say anything is not answered for.
    let victim = daemon_of(&service.daemon);
    kill_process(victim, Signal::STOP).unwrap();
    let last = service.word(LIMIT);
    service.forget();
    assert_eq!(service.word(2 * LIMIT), None, "after {last:?}");
    // Without its disk no successor serves.
    let elsewhere = disk.dir.path().join("elsewhere");
    std::fs::rename(&disk.path, &elsewhere).unwrap();
    kill_process(victim, Signal::KILL).unwrap();
    service.assert_words(6, "of the parent, while no daemon serves");
    std::fs::rename(&elsewhere, &disk.path).unwrap();
    device.assert_serves(0);
    service.assert_words(3, "of the successor");
}
