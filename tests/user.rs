//! The user that vublkd runs as: root's start with `--user` and `--group`, a start by a user without privileges; and
//! what the parent, which starts daemons, gives up.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::succession::daemon_of;
use crate::support::control::{self, settle};
use crate::support::daemon::{Daemon, URING, run};
use crate::support::device::Device;
use crate::support::disk::{Disk, assert_same, salted};
use crate::support::loopdev::LoopDevice;
use crate::support::sys::{Deadline, PATIENCE, root, skip, tick};

/// A user and a group that are in no database.
const USER: u32 = 64_001;
const GROUP: u32 = 64_002;

/// A disk in a folder that others may enter, and programs that they may execute, wherever the build is.
struct Place {
    disk: Disk,
}

impl Place {
    fn new(test: &str) -> Option<Self> {
        if !root(test, "to become another user") {
            return None;
        }
        let disk = Disk::new();
        let folder = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(disk.dir.path(), folder).unwrap();
        std::fs::set_permissions(&disk.path, std::fs::Permissions::from_mode(0o600)).unwrap();
        for program in [env!("CARGO_BIN_EXE_vublkd"), env!("CARGO_BIN_EXE_vublk")] {
            let name = Path::new(program).file_name().unwrap();
            std::fs::copy(program, disk.dir.path().join(name)).unwrap();
        }
        Some(Self { disk })
    }

    fn give(&self, path: &Path, user: u32) {
        chown(path, Some(user), None).unwrap();
    }

    fn socket(&self) -> PathBuf {
        self.disk.dir.path().join("disk.sock")
    }

    /// vublkd on this disk, with its parent unless told otherwise.
    fn vublkd(&self, disk: &Path, extra: &[&str]) -> Command {
        let mut command = Command::new(self.disk.dir.path().join("vublkd"));
        command.arg("--socket-path").arg(self.socket()).arg("--blk-file").arg(disk).arg("--log-level=debug");
        if !self.disk.takes_direct() {
            command.arg("--direct=off");
        }
        command.args(extra);
        command
    }

    fn start(&self, disk: &Path, extra: &[&str]) -> Daemon {
        let mut daemon = Daemon::spawn(URING, self.vublkd(disk, extra), self.socket());
        daemon.wait_listening();
        daemon
    }

    /// `vublk WORDS…` by a user: true if it worked; what it complained of.
    fn tool(&self, user: u32, words: &[&str]) -> (bool, String) {
        let mut command = Command::new(self.disk.dir.path().join("vublk"));
        command.args(words).uid(user).gid(user);
        let (status, _, complained) = run(command);
        (status.success(), complained)
    }
}

/// What `/proc/<pid>/status` says of every thread of a process, and whether it may be looked into.
#[derive(Clone, Debug, PartialEq)]
struct Privileges {
    user: String,
    group: String,
    groups: Option<String>,
    /// Inheritable, permitted, effective, ambient.
    capabilities: [u64; 4],
    no_new_privileges: bool,
    is_closed: bool,
}

impl Privileges {
    /// None.
    fn of(user: u32, group: u32) -> Self {
        // Real, effective, saved, and that of files.
        let four = |number| format!("{number}\t{number}\t{number}\t{number}");
        Self {
            user: four(user),
            group: four(group),
            groups: Some(group.to_string()),
            capabilities: [0; 4],
            no_new_privileges: true,
            is_closed: true,
        }
    }

    /// `None`: its threads do not agree, as when it has only begun.
    fn found(pid: u32, wanted: &Self) -> Option<Self> {
        let mut all = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten().filter_map(|task| {
            let status = std::fs::read_to_string(task.path().join("status")).ok()?;
            let field = |key: &str| {
                let found = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
                found.unwrap().trim().to_owned()
            };
            let set = |key| u64::from_str_radix(&field(key), 16).unwrap();
            // What is in a folder of a process that may be looked into belongs to its user; here root's is closed by
            // what it may not do.
            let owner = std::fs::metadata(format!("/proc/{pid}/fd")).ok()?.uid();
            Some(Self {
                user: field("Uid"),
                group: field("Gid"),
                groups: wanted.groups.is_some().then(|| field("Groups")),
                capabilities: ["CapInh", "CapPrm", "CapEff", "CapAmb"].map(set),
                no_new_privileges: field("NoNewPrivs") == "1",
                is_closed: owner == 0,
            })
        });
        let first = all.next()?;
        all.all(|other| other == first).then_some(first)
    }
}

/// Waits until a process has these privileges: a parent that was executed anew gives them up as it starts.
#[track_caller]
fn assert_has(pid: u32, wanted: &Privileges) {
    let mut last = None;
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        last = Privileges::found(pid, wanted);
        if last.as_ref() == Some(wanted) {
            return;
        }
        tick(&[], Duration::from_millis(2));
    }
    assert_eq!(last.as_ref(), Some(wanted), "{pid}");
}

fn number(daemon: rustix::process::Pid) -> u32 {
    daemon.as_raw_nonzero().get().unsigned_abs()
}

/// A successor after a crash and after an upgrade, as the same user, on the same connection.
#[track_caller]
fn goes_on(parent: &Daemon, device: &mut Device, upgrade: impl Fn() -> (bool, String), is: impl Fn(u32)) {
    for round in 0..3 {
        settle(parent);
        let before = daemon_of(parent);
        if round == 1 {
            let (done, complained) = upgrade();
            assert!(done, "{complained}");
        } else {
            crate::succession::kill(parent);
        }
        Deadline::new("the successor").until_slowly(|| (daemon_of(parent) != before).then_some(()));
        device.assert_serves(0);
        // It serves: it has given up what it gives up.
        settle(parent);
        is(parent.pid());
        is(number(daemon_of(parent)));
    }
}

/// Root starts it: daemon and parent are the user's, and so are successors; the sockets are the user's and the group's.
#[test]
fn root_becomes_a_user() {
    let Some(place) = Place::new("user::root_becomes_a_user") else { return };
    place.give(&place.disk.path, USER);
    let (user, group) = (format!("--user={USER}"), format!("--group={GROUP}"));
    let is = |pid| assert_has(pid, &Privileges::of(USER, GROUP));
    // Twice: the folder is root's, so the sockets stay behind, and are replaced.
    for round in 0..2 {
        let mut parent = place.start(&place.disk.path, &[&user, &group]);
        settle(&parent); // the control socket comes after the disk's
        let control = control::path(&parent);
        for (path, mode) in [(&parent.socket, 0o660), (&control, 0o600)] {
            let socket = std::fs::metadata(path).unwrap();
            let of = (socket.uid(), socket.gid(), socket.permissions().mode() & 0o777);
            assert_eq!(of, (USER, GROUP, mode), "{}", path.display());
        }
        let mut device = Device::plain(&parent);
        device.write(8, &salted(round, 8, 8));
        is(parent.pid());
        is(number(daemon_of(&parent)));
        let control = control.to_str().unwrap();
        let (done, complained) = place.tool(GROUP, &["status", control]);
        assert!(!done && complained.contains("denied"), "{complained}");
        goes_on(&parent, &mut device, || place.tool(USER, &["upgrade", control]), is);
        assert_same(&place.disk.read(8, 8), &salted(round, 8, 8), "what the guest wrote");
        assert!(!parent.log().contains("the sandbox is without"), "{}", parent.log());
        parent.stop();
    }
}

/// The same without a parent. A name has the user's own group.
#[test]
fn alone() {
    let Some(place) = Place::new("user::alone") else { return };
    let nobody = vublk::sys::users::user_by_name(c"nobody").unwrap();
    let Some(nobody) = nobody else { return skip("user::alone", "there is no user nobody") };
    place.give(&place.disk.path, nobody.uid);
    place.give(place.disk.dir.path(), nobody.uid);
    let mut daemon = place.start(&place.disk.path, &["--user=nobody", "--supervise=off"]);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    assert_has(daemon.pid(), &Privileges::of(nobody.uid, nobody.gid));
    let control = control::path(&daemon);
    let (done, complained) = place.tool(nobody.uid, &["status", control.to_str().unwrap()]);
    assert!(done, "{complained}");
    daemon.stop();
    // In a folder of the user's they go.
    assert!(!daemon.socket.exists() && !control.exists());
}

/// A disk that the user may not open is an error when it starts, not when a successor does.
#[test]
fn a_disk_of_roots() {
    let Some(place) = Place::new("user::a_disk_of_roots") else { return };
    place.give(place.disk.dir.path(), USER);
    let (user, group) = (format!("--user={USER}"), format!("--group={GROUP}"));
    for supervise in ["--supervise=on", "--supervise=off"] {
        let command = place.vublkd(&place.disk.path, &[&user, &group, supervise]);
        let mut daemon = Daemon::spawn(URING, command, place.socket());
        assert_eq!(daemon.wait_end(PATIENCE).code(), Some(1), "{}", daemon.log());
        let log = daemon.log();
        assert!(log.contains("disk.raw: permission denied. Run vublkd as a user that may"), "{log}");
        assert!(!daemon.socket.exists() && !control::path(&daemon).exists(), "a socket stays behind");
    }
}

/// A block device is claimed by the user, too, also by a successor.
#[test]
fn a_block_device() {
    let test = "user::a_block_device";
    let Some(place) = Place::new(test) else { return };
    let device = match LoopDevice::over(&place.disk.path, 512) {
        Ok(device) => device,
        Err(reason) => return skip(test, &reason),
    };
    device.give(USER);
    let (user, group) = (format!("--user={USER}"), format!("--group={GROUP}"));
    let mut parent = place.start(&device.path, &[&user, &group]);
    let mut guest = Device::plain(&parent);
    guest.assert_serves(0);
    let control = control::path(&parent).display().to_string();
    let upgrade = || place.tool(USER, &["upgrade", &control]);
    goes_on(&parent, &mut guest, upgrade, |pid| assert_has(pid, &Privileges::of(USER, GROUP)));
    let other = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::EXCL;
    let claimed = rustix::fs::open(&device.path, other, rustix::fs::Mode::empty());
    assert_eq!(claimed.err(), Some(rustix::io::Errno::BUSY), "it is not claimed");
    parent.stop();
}

/// Users that cannot be become.
#[test]
fn not_that_user() {
    let Some(place) = Place::new("user::not_that_user") else { return };
    let (user, other) = (USER.to_string(), format!("--user={GROUP}"));
    place.give(&place.disk.path, USER);
    place.give(place.disk.dir.path(), USER);
    let cases: [(bool, &[&str], i32, &str); 8] = [
        (true, &["--user=no-such-user"], 2, "--user=no-such-user: there is no such user"),
        (true, &["--user=4294967295"], 2, "there is no such user"),
        (true, &["--user="], 2, "a value is required"),
        (true, &[&other], 2, "Add --group=GROUP"),
        (
            true,
            &["--user=nobody", "--group=no-such-group"],
            2,
            "--group=no-such-group: there is no such group",
        ),
        (true, &["--group=4294967295"], 2, "there is no such group"),
        (false, &["--user=root"], 1, "--user=root: only root can start vublkd as another user"),
        (false, &["--user", &user, "--group=0"], 1, "--group=0: only root can start vublkd as another group"),
    ];
    for (as_root, words, code, said) in cases {
        let mut command = place.vublkd(&place.disk.path, words);
        if !as_root {
            command.uid(USER).gid(USER);
        }
        let (status, _, complained) = run(command);
        assert_eq!(status.code(), Some(code), "{words:?}: {complained}");
        assert!(complained.contains(said), "{words:?}: {complained}");
        assert!(!place.socket().exists(), "{words:?}");
    }
}

/// A user without privileges on a file of its own: all of the sandbox, successors, upgrades; to name oneself is fine.
#[test]
fn a_user_without_privileges() {
    let Some(place) = Place::new("user::a_user_without_privileges") else { return };
    place.give(&place.disk.path, USER);
    place.give(place.disk.dir.path(), USER);
    let itself = format!("--user={USER}");
    for words in [&[][..], &[itself.as_str()]] {
        let mut command = place.vublkd(&place.disk.path, words);
        command.uid(USER).gid(GROUP);
        let mut parent = Daemon::spawn(URING, command, place.socket());
        parent.wait_listening();
        let mut device = Device::plain(&parent);
        device.write(8, &salted(3, 8, 8));
        let control = control::path(&parent).display().to_string();
        let upgrade = || place.tool(USER, &["upgrade", &control]);
        let wanted = Privileges { groups: None, ..Privileges::of(USER, GROUP) };
        let is = |pid| assert_has(pid, &wanted);
        goes_on(&parent, &mut device, upgrade, is);
        assert_same(&place.disk.read(8, 8), &salted(3, 8, 8), "what the guest wrote");
        assert!(!parent.log().contains("the sandbox is without"), "{}", parent.log());
        parent.stop();
        assert!(!parent.socket.exists(), "the socket stays behind");
    }
}

/// The socket is removed under a daemon whose successor may not make another: the front-end that is connected goes on.
#[test]
fn the_socket_is_removed() {
    let Some(place) = Place::new("user::the_socket_is_removed") else { return };
    place.give(&place.disk.path, USER);
    let (user, group) = (format!("--user={USER}"), format!("--group={GROUP}"));
    let mut parent = place.start(&place.disk.path, &[&user, &group]);
    let mut device = Device::plain(&parent);
    device.assert_serves(0);
    settle(&parent);
    std::fs::remove_file(&parent.socket).unwrap();
    for _ in 0..2 {
        crate::succession::kill(&parent);
        device.assert_serves(0);
    }
    assert!(parent.log().contains("no front-end can connect: the socket was removed"), "{}", parent.log());
    parent.stop();
}

/// A parent of root's has only the capabilities that a daemon may need when it starts, for a disk of another user's,
/// say, and neither it nor a program that it executes gets more.
#[test]
fn the_parent_is_closed() {
    let Some(place) = Place::new("user::the_parent_is_closed") else { return };
    place.give(&place.disk.path, USER);
    let mut parent = place.start(&place.disk.path, &[]);
    let mut device = Device::plain(&parent);
    // DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, IPC_LOCK, SYS_PTRACE, SYS_RESOURCE (capability.h).
    let kept = [1, 2, 3, 14, 19, 24].iter().fold(0_u64, |set, bit| set | 1 << bit);
    let own = Privileges { groups: None, ..Privileges::of(0, 0) };
    // A container's root may not have them all.
    let kept = kept & Privileges::found(std::process::id(), &own).unwrap().capabilities[2];
    // A daemon may lock memory where it cannot raise the limit of that.
    let (locks, raises) = (1 << 14, kept & 1 << 24 != 0);
    let check = |pid: u32| {
        let kept = if pid == parent.pid() { kept } else { kept & if raises { 0 } else { locks } };
        assert_has(pid, &Privileges { capabilities: [0, kept, kept, 0], ..own.clone() });
        // A core would hold guest memory.
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    };
    check(parent.pid());
    let control = control::path(&parent).display().to_string();
    goes_on(&parent, &mut device, || place.tool(0, &["upgrade", &control]), check);
    drop(device);
    parent.stop_within(Duration::from_secs(5));
}
