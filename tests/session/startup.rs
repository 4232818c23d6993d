//! How vublkd is started: command lines, sockets that are handed over, and
//! every way it can fail, each with a message that says what to do.

use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::daemon::{Daemon, Options, URING, bare_vublkd, pass_fd, run, vublkd};
use crate::support::device::{Device, Setup};
use crate::support::disk::Disk;
use crate::support::frontend::Frontend;
use crate::support::sys::{root, skip};

/// Runs vublkd on a file it must refuse; gives what it says.
#[track_caller]
fn refusal(disk: &Path, dir: &Path, extra: &[&str]) -> String {
    let mut command = vublkd("auto", &dir.join("refused.sock"), disk);
    command.args(extra);
    refused(command)
}

#[track_caller]
fn refused(command: Command) -> String {
    let what = format!("{command:?}");
    let (status, stdout, stderr) = run(command);
    assert!(!status.success(), "{what} went well");
    assert!(status.code().is_some(), "{what} ended by a signal: {status}");
    assert_eq!(stdout, "", "{what} wrote to stdout");
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert!(!stderr.is_empty(), "{what} said nothing");
    stderr
}

#[test]
fn files_that_cannot_be_served() {
    let disk = Disk::new();
    let dir = disk.dir.path();
    let missing = dir.join("nowhere.raw");
    let said = refusal(&missing, dir, &[]);
    assert!(said.contains("nowhere.raw"), "{said}");
    assert!(said.to_lowercase().contains("no such file"), "{said}");

    let said = refusal(dir, dir, &[]);
    assert!(said.contains("director"), "{said}");

    let empty = dir.join("empty.raw");
    std::fs::write(&empty, b"").unwrap();
    let said = refusal(&empty, dir, &[]);
    assert!(said.contains("empty.raw"), "{said}");

    let small = dir.join("small.raw");
    std::fs::write(&small, [0; 511]).unwrap();
    let said = refusal(&small, dir, &[]);
    assert!(said.contains("small"), "{said}");

    let said = refusal(Path::new("/dev/null"), dir, &[]);
    assert!(said.contains("/dev/null"), "{said}");
    assert!(!dir.join("refused.sock").exists(), "a socket was left behind");
}

#[test]
fn a_file_without_permission() {
    let name = "a_file_without_permission";
    if rustix::process::geteuid().is_root() {
        return skip(name, "root may open anything");
    }
    let disk = Disk::new();
    std::fs::set_permissions(&disk.path, std::fs::Permissions::from_mode(0o400)).unwrap();
    let said = refusal(&disk.path, disk.dir.path(), &[]);
    assert!(said.to_lowercase().contains("permission denied"), "{said}");
}

/// ramfs has no O_DIRECT. It is mounted in a mount namespace of the daemon's
/// own, so nothing can be left behind.
#[test]
fn a_file_system_without_direct_io() {
    let name = "a_file_system_without_direct_io";
    if !root(name, "a mount") {
        return;
    }
    let disk = Disk::new();
    let dir = disk.dir.path().join("ram");
    std::fs::create_dir(&dir).unwrap();
    let file = dir.join("disk.raw");
    let start = |extra: &[&str]| {
        let socket = disk.dir.path().join("ram.sock");
        let mut command = vublkd("auto", &socket, &file);
        command.args(extra);
        let target = std::ffi::CString::new(dir.to_str().unwrap()).unwrap();
        let path = std::ffi::CString::new(file.to_str().unwrap()).unwrap();
        // SAFETY: only system calls, on strings made before the fork.
        unsafe {
            command.pre_exec(move || {
                let root = c"/".as_ptr();
                let none = std::ptr::null();
                let private = libc::MS_REC | libc::MS_PRIVATE;
                let ramfs = c"ramfs".as_ptr();
                if libc::unshare(libc::CLONE_NEWNS) != 0
                    || libc::mount(none, root, none, private, none.cast()) != 0
                    || libc::mount(ramfs, target.as_ptr(), ramfs, 0, none.cast()) != 0
                {
                    return Err(std::io::Error::last_os_error());
                }
                let flags = libc::O_CREAT | libc::O_RDWR | libc::O_CLOEXEC;
                let fd = libc::open(path.as_ptr(), flags, 0o600);
                if fd < 0 || libc::ftruncate(fd, 1 << 20) != 0 || libc::close(fd) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        Daemon::spawn(URING, command, socket)
    };
    let mut daemon = start(&[]);
    let status = daemon.wait_end(Duration::from_secs(10));
    assert!(!status.success());
    assert!(daemon.log().contains("--direct=off"), "{}", daemon.log());
    drop(daemon);
    // What the message says is what helps.
    let mut daemon = start(&["--direct=off"]);
    daemon.wait_listening();
    let mut device = Device::plain(&daemon);
    device.write(8, &[7; 4096]);
    assert_eq!(device.read(8, 8), [7; 4096]);
    assert_eq!(device.read(0, 8), [0; 4096]);
}

#[test]
fn buffered_on_request() {
    super::each_engine(|engine| {
        let disk = Disk::new();
        let daemon = Daemon::start(engine, &disk, &Options::with(&["--direct=off"]));
        let mut device = Device::plain(&daemon);
        device.assert_serves(0);
        let data = crate::support::disk::salted(1, 3, 21);
        device.write(3, &data);
        assert_eq!(device.read(3, 21), data);
        assert_eq!(disk.read(3, 21), data);
    });
}

#[test]
fn a_size_that_is_no_multiple_is_rounded_down_with_a_warning() {
    let disk = Disk::new();
    std::fs::File::options().write(true).open(&disk.path).unwrap().set_len((1 << 20) + 100).unwrap();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    let device = Device::plain(&daemon);
    let capacity = device.frontend.config(0, 8).unwrap();
    assert_eq!(capacity, 2048_u64.to_le_bytes());
    daemon.wait_log("WARN");
}

#[test]
fn logical_block_size() {
    super::each_engine(|engine| {
        let disk = Disk::new();
        let options = Options { logical_block_size: Some(4096), ..Options::default() };
        let daemon = Daemon::start(engine, &disk, &options);
        let mut device = Device::plain(&daemon);
        let size = device.frontend.config(20, 4).unwrap();
        assert_eq!(size, 4096_u32.to_le_bytes());
        let data = crate::support::disk::salted(1, 8, 16);
        device.write(8, &data);
        assert_eq!(device.read(8, 16), data);
    });
}

#[test]
fn command_lines_that_make_no_sense() {
    let disk = Disk::new();
    let dir = disk.dir.path();
    for extra in [
        "--engine=steam",
        "--direct=maybe",
        "--num-queues=0",
        "--num-queues=100000",
        "--logical-block-size=1000",
        "--logical-block-size=0",
        "--no-such-option",
        "--fd=7",
    ] {
        let said = refusal(&disk.path, dir, &[extra]);
        let option = extra.split('=').next().unwrap();
        assert!(said.contains(option), "{extra}: {said}");
    }
    let mut no_file = bare_vublkd();
    no_file.arg(format!("--socket-path={}/x.sock", dir.display()));
    assert!(refused(no_file).contains("--blk-file"));
    let mut no_socket = bare_vublkd();
    no_socket.arg(format!("--blk-file={}", disk.path.display()));
    assert!(refused(no_socket).contains("--socket-path"));
    let nowhere = dir.join("no/such/folder/x.sock");
    assert!(refused(vublkd("auto", &nowhere, &disk.path)).contains("x.sock"));
}

/// Managers ask every installed back-end what it can do.
#[test]
fn print_capabilities() {
    for others in
        [&[][..], &["--socket-path=/nowhere/x", "--blk-file=/nowhere/y"], &["--fd=9", "--read-only"]]
    {
        let mut command = bare_vublkd();
        command.arg("--print-capabilities").args(others);
        let (status, stdout, stderr) = run(command);
        assert_eq!(status.code(), Some(0), "{stderr}");
        let text: String = stdout.split_whitespace().collect();
        let want = r#"{"type":"block","features":["read-only","blk-file"]}"#;
        assert_eq!(text, want);
    }
}

#[test]
fn a_stale_socket_is_replaced() {
    let disk = Disk::new();
    let path = disk.dir.path().join("disk.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    Device::plain(&daemon).assert_serves(0);
    // And the socket of a daemon that was killed.
    daemon.signal(rustix::process::Signal::KILL);
    daemon.wait_end(Duration::from_secs(5));
    let again = Daemon::start(URING, &disk, &Options::default());
    Device::plain(&again).assert_serves(0);
}

#[test]
fn a_live_socket_is_an_error() {
    let disk = Disk::new();
    let path = disk.dir.path().join("live.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let said = refused(vublkd("auto", &path, &disk.path));
    assert!(said.contains("live.sock"), "{said}");
    assert!(path.exists(), "the other's socket was removed");
    drop(listener);
}

#[test]
fn what_is_no_socket_is_never_removed() {
    let disk = Disk::new();
    let path = disk.dir.path().join("precious.txt");
    std::fs::write(&path, "precious").unwrap();
    refused(vublkd("auto", &path, &disk.path));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let link = disk.dir.path().join("link");
    symlink(&path, &link).unwrap();
    refused(vublkd("auto", &link, &disk.path));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn socket_mode() {
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    let file = std::fs::metadata(&daemon.socket).unwrap();
    assert!(file.file_type().is_socket());
    assert_eq!(file.permissions().mode() & 0o7777, 0o660);
}

/// vublkd with `fd` as its socket, under number 7.
fn start_on_fd(disk: &Disk, fd: std::os::fd::BorrowedFd<'_>) -> Daemon {
    let mut command = bare_vublkd();
    command.arg("--fd=7").arg(format!("--blk-file={}", disk.path.display()));
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    pass_fd(&mut command, fd, 7);
    Daemon::spawn(URING, command, disk.dir.path().join("fd.sock"))
}

#[test]
fn a_listening_socket_by_number() {
    let disk = Disk::new();
    let listener = UnixListener::bind(disk.dir.path().join("fd.sock")).unwrap();
    let mut daemon = start_on_fd(&disk, listener.as_fd());
    for _ in 0..3 {
        Device::plain(&daemon).assert_serves(0);
    }
    daemon.stop();
}

#[test]
fn a_connected_socket_by_number() {
    let disk = Disk::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut daemon = start_on_fd(&disk, theirs.as_fd());
    drop(theirs);
    let mut device = Device::over(Frontend::new(ours), Setup::default());
    device.assert_serves(0);
    drop(device);
    // Nobody can come any more.
    let status = daemon.wait_end(Duration::from_secs(10));
    assert_eq!(status.code(), Some(0), "{}", daemon.log());
}

#[test]
fn what_is_no_socket_by_number() {
    let disk = Disk::new();
    let file = std::fs::File::open(&disk.path).unwrap();
    let mut daemon = start_on_fd(&disk, file.as_fd());
    let status = daemon.wait_end(Duration::from_secs(10));
    assert!(!status.success());
    assert!(daemon.log().contains("descriptor 7"), "{}", daemon.log());
}

/// A socket handed over as systemd does it: LISTEN_FDS, from number 3 on.
#[test]
fn socket_activation() {
    let disk = Disk::new();
    let path = disk.dir.path().join("act.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let direct = if disk.takes_direct() { "on" } else { "off" };
    // The shell knows its own number, which is the daemon's after exec.
    let mut command = Command::new("/bin/sh");
    command
        .arg("-c")
        .arg(r#"LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@""#)
        .arg(env!("CARGO_BIN_EXE_vublkd"))
        .arg(format!("--blk-file={}", disk.path.display()))
        .arg(format!("--direct={direct}"));
    pass_fd(&mut command, listener.as_fd(), 3);
    // A front-end that was there before the daemon is served.
    let early = Frontend::new(UnixStream::connect(&path).unwrap());
    let mut daemon = Daemon::spawn(URING, command, path);
    Device::over(early, Setup::default()).assert_serves(0);
    Device::plain(&daemon).assert_serves(0);
    daemon.stop();
    assert!(daemon.socket.exists(), "the socket belongs to the manager");
}

#[test]
fn serial() {
    let disk = Disk::new();
    // 20 bytes are the most there is.
    let daemon = Daemon::start(URING, &disk, &Options::with(&["--serial=abcdefghijklmnopqrst"]));
    let mut device = Device::plain(&daemon);
    let done = device.run(0, 8, 0, &[], 20);
    assert_eq!(done.data, b"abcdefghijklmnopqrst");
    // A shorter buffer gets what fits, or a refusal; never more.
    let short = device.run(0, 8, 0, &[], 10);
    assert!(short.status != 0 || short.data == b"abcdefghij");
    device.assert_serves(0);
}
