//! `vublk doctor`: a host, and disks on it that are broken in one way each.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::remote::serve_as;
use crate::support::daemon::{Daemon, Options, URING, run};
use crate::support::device::Device;
use crate::support::disk::Disk;
use crate::support::fs::Filesystem;
use crate::support::loopdev::LoopDevice;
use crate::support::nbd::Server;
use crate::support::sys::{installed, root, skip};

/// What it finds at a path: check, verdict, words.
struct Report {
    code: Option<i32>,
    all: Vec<Value>,
}

impl Report {
    #[track_caller]
    fn of(mut command: Command, paths: &[&Path]) -> Self {
        command.arg("doctor").args(paths).arg("--json");
        let (status, said, complained) = run(command);
        let report: Value = serde_json::from_str(&said).unwrap_or_else(|_| panic!("{said}{complained}"));
        let sections = report["sections"].as_array().unwrap();
        let is_wanted = |section: &&Value| match paths.last() {
            Some(path) => section["path"] == path.to_str().unwrap(),
            None => section["path"].is_null(),
        };
        let findings =
            sections.iter().filter(is_wanted).flat_map(|section| section["findings"].as_array().unwrap());
        Self { code: status.code(), all: findings.cloned().collect() }
    }

    #[track_caller]
    fn has(&self, check: &str, verdict: &str, says: &str) -> &Value {
        let found =
            self.all.iter().find(|finding| finding["check"] == check && finding["verdict"] == verdict);
        let found = found.unwrap_or_else(|| panic!("{check}, {verdict}: {:#?}", self.all));
        assert!(found["says"].as_str().unwrap().contains(says), "{says:?}: {found}");
        assert_eq!(found.get("type").is_some(), verdict != "ok", "{found}");
        found
    }

    /// Nothing else is wrong, and the exit code says the worst.
    #[track_caller]
    fn and_nothing_else(&self, wrong: &[&str]) {
        let found: Vec<_> = self.all.iter().filter(|finding| finding["verdict"] != "ok").collect();
        assert_eq!(
            found.iter().map(|finding| finding["check"].as_str().unwrap()).collect::<Vec<_>>(),
            wrong,
            "{found:#?}"
        );
        let fails = found.iter().any(|finding| finding["verdict"] == "fail");
        assert!(!fails || self.code == Some(1), "{:?}: {found:#?}", self.code);
    }
}

fn tool() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vublk"))
}

/// The tool behind another program, which changes what it finds.
fn under(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).arg(env!("CARGO_BIN_EXE_vublk"));
    command
}

#[test]
fn a_host() {
    let report = Report::of(tool(), &[]);
    for check in ["kernel", "io_uring", "Landlock", "seccomp", "open files", "locked memory", "librbd"] {
        assert!(report.all.iter().any(|finding| finding["check"] == check), "{check}: {:#?}", report.all);
    }
    let lowered = Report::of(under(&["prlimit", "--memlock=4096:4096", "--nofile=100:100", "--"]), &[]);
    lowered.has("locked memory", "warn", "4096 bytes at most");
    lowered.has("open files", "warn", "100 at most");
    let mut command = tool();
    command.arg("doctor");
    let (status, said, _) = run(command);
    let line = said.lines().find(|line| line.contains(" kernel ")).expect(&said);
    assert!(["ok", "warn", "fail"].contains(&line.split(' ').next().unwrap()), "{line}");
    assert_eq!(status.code() == Some(1), said.lines().any(|line| line.starts_with("fail ")), "{said}");
}

/// A disk as it should be, served or not, and one that another program has.
#[test]
fn who_has_a_disk() {
    let disk = Disk::new();
    if !disk.takes_direct() {
        return skip("tool::doctor::who_has_a_disk", "the temp folder's file system has no O_DIRECT");
    }
    File::open(&disk.path).unwrap().sync_all().unwrap();
    let look = || Report::of(tool(), &[&disk.path]);
    look().has("locks", "ok", "free: no process holds a lock");
    look().has("access", "ok", "may read and write it (owner ");
    look().has("holes", "ok", "65011712 bytes");
    look().has("O_DIRECT", "ok", "works");
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let locks = look();
    // Only root and its user see whose it is.
    if root("tool::doctor::who_has_a_disk", "whose locks those are") {
        locks.has("locks", "ok", &format!("vublkd (process {}) serves it", daemon.pid()));
        locks.and_nothing_else(&[]);
    }
    device.assert_serves(0);
    drop(device);
    daemon.stop();
    // This process, as QEMU does.
    let file = File::options().read(true).write(true).open(&disk.path).unwrap();
    vublk::disk::lock::take(&file, false, &mut || false).unwrap();
    let report = look();
    report.has("locks", "fail", &format!("(process {})", std::process::id()));
    assert_eq!(report.code, Some(1));
    vublk::disk::lock::release(&file);
    vublk::sys::ofd_lock(&file, vublk::sys::LockKind::Exclusive, 0, 1 << 20).unwrap();
    look().has("locks", "fail", "where image locks are");
}

#[test]
fn paths_that_are_no_disks() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8], size: u64| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(size).unwrap();
        path
    };
    let fails = |path: &Path, check: &str, says: &str| {
        let report = Report::of(tool(), &[path]);
        report.has(check, "fail", says);
        assert_eq!(report.code, Some(1));
    };
    fails(&folder.path().join("none"), "path", "nothing is there");
    fails(Path::new("/dev/null"), "path", "is no disk");
    // A name, whose unit has no disk.
    fails(Path::new("no-disk-is-called-so"), "unit", "Assertion failed");
    fails(&file("empty", b"", 0), "open", "0 bytes");
    fails(&file("image", b"QFI\xfb\0\0\0\x03", 1 << 20), "format", "qcow2");
}

/// A socket, and the folders above it.
#[test]
fn who_reaches_a_socket() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("a.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    mode(&socket, 0o600);
    mode(folder.path(), 0o755);
    Report::of(tool(), &[&socket]).has("socket", "warn", "only its owner");
    mode(&socket, 0o660);
    // Also among what is in its folder.
    Report::of(tool(), &[folder.path()]).has("socket", if is_root() { "warn" } else { "ok" }, "a.sock");
    if is_root() {
        std::os::unix::fs::chown(&socket, None, Some(4711)).unwrap();
        let report = Report::of(tool(), &[&socket]);
        report.has("socket", "ok", "group 4711 may connect");
        report.and_nothing_else(&[]);
        mode(folder.path(), 0o700);
        let report = Report::of(tool(), &[&socket]);
        report.has("socket", "fail", &format!("may not pass {}", folder.path().display()));
        assert_eq!(report.code, Some(1));
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Memory, and no room in it.
#[test]
fn folders_for_disks() {
    let test = "tool::doctor::folders_for_disks";
    let folder = tempfile::tempdir().unwrap();
    let plain = Report::of(tool(), &[folder.path()]);
    plain.has("O_DIRECT", if Disk::new().takes_direct() { "ok" } else { "fail" }, "");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "something is left");
    let Some(tmpfs) = Filesystem::tmpfs(test, "1m") else { return };
    let place = tmpfs.path("");
    let report = Report::of(tool(), &[&place]);
    report.has("storage", "warn", "it is memory");
    report.has("space", "ok", "1048576");
    let (image, file) = tmpfs.file("image", 2 << 20);
    Report::of(tool(), &[&image]).has("holes", "warn", "2097152 bytes are not allocated yet");
    let _full = std::io::Write::write_all(&mut &file, &[1; 2 << 20]);
    let report = Report::of(tool(), &[&place]);
    report.has("space", "fail", "0 bytes of 1048576");
    assert_eq!(report.code, Some(1));
    let Some(ramfs) = Filesystem::ramfs(test) else { return };
    let report = Report::of(tool(), &[&ramfs.path("")]);
    report.has("O_DIRECT", "fail", "has none");
    let (image, _file) = ramfs.file("image", 1 << 20);
    let report = Report::of(tool(), &[&image]);
    report.has("O_DIRECT", "fail", "has none");
    report.has("format", "ok", "raw");
    assert_eq!(report.code, Some(1));
}

/// A file of another user, and a device that is in use.
#[test]
fn disks_of_others() {
    let test = "tool::doctor::disks_of_others";
    if !root(test, "another user") {
        return;
    }
    let disk = Disk::new();
    fs::set_permissions(disk.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&disk.path, fs::Permissions::from_mode(0o600)).unwrap();
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    let mut may_run = under(&nobody);
    may_run.arg("--version");
    if may_run.output().is_ok_and(|done| done.status.success()) {
        let report = Report::of(under(&nobody), &[&disk.path]);
        report.has("access", "fail", "owner root, group root, mode 0600");
        report.and_nothing_else(&["access"]);
        assert_eq!(report.code, Some(1));
    } else {
        skip(test, "another user may not run the tool from here");
    }
    let device = match LoopDevice::over(&disk.path, 512) {
        Ok(device) => device,
        Err(reason) => return skip(test, &format!("no loop device: {reason}")),
    };
    Report::of(tool(), &[&device.path]).has("locks", "ok", "free: no process holds a lock");
    let _claim = File::options().read(true).custom_flags(libc::O_EXCL).open(&device.path).unwrap();
    Report::of(tool(), &[&device.path]).has("locks", "fail", &format!("(process {})", std::process::id()));
}

/// A disk of an NBD server, by its URI and by the name of the disk that a daemon serves.
#[test]
fn disks_of_nbd_servers() {
    let look = |what: &str| Report::of(tool(), &[Path::new(what)]);
    let port = TcpListener::bind("127.0.0.1:0").and_then(|gone| gone.local_addr()).unwrap().port();
    let report = look(&format!("nbd://127.0.0.1:{port}/disk"));
    let server = report.has("server", "fail", "nothing listens there");
    assert!(server["type"].as_str().unwrap().contains(&format!("--port={port} FILE")), "{server}");
    assert_eq!(report.code, Some(1));
    look("nbds://127.0.0.1/").has("URI", "fail", "stunnel");
    let name = format!("doctor{}", std::process::id());
    let socket = format!("{name}.sock");
    if installed("nbdkit", "tool::doctor::disks_of_nbd_servers") {
        let disk = Disk::new();
        let mut server = Server::of(&disk);
        let uri = server.uri("");
        let report = look(&uri);
        report.has("server", "ok", &uri);
        report.has("flush", "ok", "the server has it");
        report.has("clients", "ok", "no vublkd that this user may ask serves it");
        report.and_nothing_else(&[]);
        let daemon = serve_as(&disk, &socket, &uri, &[], |_| ());
        let report = look(&name);
        report.has("server", "ok", &uri);
        report.has("clients", "ok", &format!("serves it as {name}"));
        server.kill();
        look(&name).has("server", "fail", "no such socket");
        server.start_again();
        drop(daemon);
    }
    if installed("qemu-nbd", "tool::doctor::disks_of_nbd_servers by qemu-nbd") {
        // It lets one client in.
        let disk = Disk::new();
        let server = Server::qemu_nbd(1 << 20, 0, &[]);
        let mut daemon = serve_as(&disk, &socket, &server.uri(""), &[], |_| ());
        let report = look(&name);
        let taken = report.has("server", "warn", "as many connections as it takes");
        assert!(taken["type"].as_str().unwrap().contains("--shared=0"), "{taken}");
        report.and_nothing_else(&["server"]);
        daemon.stop();
    }
}
