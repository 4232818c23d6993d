//! The two sockets in the file system: their modes, their paths, and what may be at a
//! path already.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use serde_json::Value;

use super::sandbox::forbid;
use crate::support::control::{Control, path, vublk};
use crate::support::daemon::{Daemon, URING, bare_vublkd, pass_fd, run, vublkd};
use crate::support::device::Device;
use crate::support::disk::Disk;
use crate::support::sys::{Deadline, root};

const NOBODY: u32 = 65534;

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// What vublkd complains of, soon, and without a word about removing anything.
#[track_caller]
fn refused(command: Command) -> String {
    let what = format!("{command:?}");
    let started = Instant::now();
    let (status, _, said) = run(command);
    assert!(started.elapsed() < Duration::from_secs(2), "{what} took {:?}", started.elapsed());
    assert!(matches!(status.code(), Some(1 | 2)), "{what}: {status}\n{said}");
    assert!(!said.contains("panicked"), "{what}\n{said}");
    said
}

/// A socket of this type that is bound to `path`.
fn bound(kind: SocketType, path: &Path) -> OwnedFd {
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    socket
}

/// A listener at `path` that has no room for another connection, and what takes it.
fn full(path: &Path) -> (OwnedFd, Vec<OwnedFd>) {
    let listener = bound(SocketType::STREAM, path);
    rustix::net::listen(&listener, 0).unwrap();
    let mut taken = Vec::new();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    loop {
        let one = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        match rustix::net::connect(&one, &SocketAddrUnix::new(path).unwrap()) {
            Ok(()) => taken.push(one),
            Err(e) => {
                assert_eq!(e, rustix::io::Errno::AGAIN);
                return (listener, taken);
            }
        }
    }
}

/// No call that changes a mode works, so each socket was made with the mode that it has
/// in the end: there is no moment in which another user can connect.
#[test]
fn the_modes_are_there_from_the_first_moment_whatever_the_umask() {
    let calls = [libc::SYS_chmod, libc::SYS_fchmod, libc::SYS_fchmodat, 452]; // fchmodat2
    for mask in [0, 0o002, 0o022, 0o077, 0o777] {
        let disk = Disk::new();
        let socket = disk.dir.path().join("disk.sock");
        let mut command = vublkd("auto", &socket, &disk.path);
        // SAFETY: one system call.
        unsafe {
            command.pre_exec(move || {
                libc::umask(mask);
                Ok(())
            });
        }
        forbid(&mut command, &calls, libc::EPERM);
        let mut daemon = Daemon::spawn(URING, command, socket);
        daemon.wait_listening();
        assert!(Control::of(&daemon).call("status", Value::Null).is_ok());
        assert_eq!((mode(&daemon.socket), mode(&path(&daemon))), (0o660, 0o600), "umask {mask:o}");
        Device::plain(&daemon).assert_serves(0);
        daemon.stop();
        let left: Vec<_> =
            std::fs::read_dir(disk.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "the disk and the log: {left:?}");
    }
}

/// Another user of the folder puts links where vublkd makes something.
#[test]
fn names_that_another_user_swaps() {
    let disk = Disk::new();
    let folder = tempfile::tempdir().unwrap();
    let precious = disk.dir.path().join("precious");
    std::fs::write(&precious, "precious").unwrap();
    std::fs::set_permissions(&precious, std::fs::Permissions::from_mode(0o604)).unwrap();
    let before = std::fs::metadata(&precious).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let trash = disk.dir.path().join("trash");
            while !over.load(Ordering::Relaxed) {
                for entry in std::fs::read_dir(folder.path()).unwrap().flatten() {
                    let name = entry.file_name().into_string().unwrap();
                    if !matches!(name.as_str(), "d.sock" | "d.log" | "d.sock.control") {
                        let _ = std::fs::rename(entry.path(), &trash);
                        let _ = symlink(&precious, entry.path());
                    }
                }
            }
        });
        for _ in 0..40 {
            let socket = folder.path().join("d.sock");
            let daemon = Daemon::spawn(URING, vublkd("threads", &socket, &disk.path), socket);
            // It serves or it does not.
            Deadline::new("a start or a failure").until_slowly(|| {
                let log = daemon.log();
                (log.contains("serving ") || log.contains("cannot listen")).then_some(())
            });
            drop(daemon);
            for entry in std::fs::read_dir(folder.path()).unwrap().flatten() {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    let after = std::fs::metadata(&precious).unwrap();
    assert_eq!((after.mode(), after.ino(), after.len()), (before.mode(), before.ino(), before.len()));
}

/// A path of so many bytes in `disk`'s folder.
fn path_of(disk: &Disk, bytes: usize) -> PathBuf {
    let rest = bytes - disk.dir.path().as_os_str().len() - 1;
    disk.dir.path().join("s".repeat(rest))
}

#[test]
fn paths_as_long_as_an_address() {
    for bytes in [99, 100, 101, 106, 107] {
        let disk = Disk::new();
        let socket = path_of(&disk, bytes);
        let mut daemon = Daemon::spawn(URING, vublkd("auto", &socket, &disk.path), socket);
        daemon.wait_listening();
        Device::plain(&daemon).assert_serves(0);
        daemon.wait_log("serving ");
        let control = path(&daemon).display().to_string();
        let reached = || vublk(&["status", &control]).0.success().then_some(());
        Deadline::new(format!("vublk status at {} bytes", control.len())).until_slowly(reached);
        daemon.stop();
        assert!(!Path::new(&control).exists() && !daemon.socket.exists(), "a socket stays behind");
    }
    let disk = Disk::new();
    for bytes in [108, 200] {
        let long = path_of(&disk, bytes);
        let said = refused(vublkd("auto", &long, &disk.path));
        assert!(said.contains("at most 107") && said.contains("--socket-path"), "{said}");
        let mut command = vublkd("auto", &disk.dir.path().join("x.sock"), &disk.path);
        command.arg(format!("--control={}", long.display()));
        let said = refused(command);
        assert!(said.contains("at most 107") && said.contains("--control"), "{said}");
    }
}

/// What a start that was killed leaves behind does not keep the next one from working,
/// not even under the same process number.
#[test]
fn what_a_killed_start_left_behind() {
    let disk = Disk::new();
    let socket = disk.dir.path().join("disk.sock");
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(r#"touch "$0.$$" && exec "$@""#).arg(&socket);
    let meant = vublkd("auto", &socket, &disk.path);
    command.arg(meant.get_program()).args(meant.get_args());
    let mut daemon = Daemon::spawn(URING, command, socket);
    daemon.wait_log("serving ");
    Device::plain(&daemon).assert_serves(0);
    daemon.stop();
}

#[test]
fn only_a_refused_connection_means_stale() {
    let disk = Disk::new();
    let dir = disk.dir.path();
    let datagram = UnixDatagram::bind(dir.join("datagram")).unwrap();
    let packets = bound(SocketType::SEQPACKET, &dir.join("seqpacket"));
    rustix::net::listen(&packets, 1).unwrap();
    let busy = full(&dir.join("full"));
    for name in ["datagram", "seqpacket", "full"] {
        let place = dir.join(name);
        let inode = std::fs::metadata(&place).unwrap().ino();
        let said = refused(vublkd("auto", &place, &disk.path));
        assert!(said.contains("another process is listening there"), "{name}: {said}");
        let mut command = vublkd("auto", &dir.join("x.sock"), &disk.path);
        command.arg(format!("--control={}", place.display()));
        let said = refused(command);
        assert!(said.contains("another process") && said.contains("another --control"), "{name}: {said}");
        assert_eq!(std::fs::metadata(&place).unwrap().ino(), inode, "{name} was replaced");
        // The tool is not kept waiting either.
        let started = Instant::now();
        let (status, _, said) = vublk(&["status", place.to_str().unwrap()]);
        assert!(!status.success() && said.contains("no vublkd can be reached"), "{name}: {said}");
        assert!(started.elapsed() < Duration::from_secs(2), "{name}: {:?}", started.elapsed());
    }
    drop((datagram, packets, busy));
    // Now they are.
    for name in ["datagram", "seqpacket", "full"] {
        let place = dir.join(name);
        let mut daemon = Daemon::spawn(URING, vublkd("auto", &place, &disk.path), place);
        daemon.wait_listening();
        Device::plain(&daemon).assert_serves(0);
        daemon.stop();
    }
}

/// vublkd may not connect to it, so it cannot know; the folder would let it be replaced.
#[test]
fn a_socket_of_another_user_stays() {
    let test = "a_socket_of_another_user_stays";
    if !root(test, "another user's daemon") {
        return;
    }
    let disk = Disk::new();
    let dir = disk.dir.path();
    for path in [dir, &disk.path] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let place = dir.join("roots.sock");
    let listener = UnixListener::bind(&place).unwrap();
    std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o600)).unwrap();
    let inode = std::fs::metadata(&place).unwrap().ino();
    // By descriptor: nobody may not look into every folder that leads to the program.
    let program =
        std::fs::File::options().read(true).custom_flags(libc::O_PATH).open(bare_vublkd().get_program());
    let program = program.unwrap();
    let mut command = Command::new("/proc/self/fd/9");
    command.args(vublkd("threads", &place, &disk.path).get_args()).uid(NOBODY).gid(NOBODY);
    pass_fd(&mut command, program.as_fd(), 9);
    let said = refused(command);
    assert!(said.contains("cannot tell") && said.contains("roots.sock"), "{said}");
    assert_eq!(std::fs::metadata(&place).unwrap().ino(), inode, "it was replaced");
    drop(listener);
}

#[test]
fn what_is_no_place_for_a_socket() {
    let disk = Disk::new();
    let dir = disk.dir.path();
    let here = |name: &str| dir.join(name).display().to_string();
    let image = here("other.raw");
    std::fs::write(&image, "a guest's data").unwrap();
    std::fs::create_dir(dir.join("folder")).unwrap();
    drop(UnixListener::bind(dir.join("stale")).unwrap());
    symlink(dir.join("stale"), dir.join("link")).unwrap();
    symlink("nowhere", dir.join("dangling")).unwrap();
    mknodat(CWD, dir.join("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let mut cases = vec![
        (image.clone(), "a regular file"),
        (disk.path.display().to_string(), "--blk-file"),
        (here("folder"), "names a folder"),
        (here("folder/"), "names a folder"),
        (here("."), "names a folder"),
        (here(".."), "names a folder"),
        ("/".into(), "names a folder"),
        (here("new.sock/"), "names a folder"),
        (here("link"), "a symbolic link"),
        (here("dangling"), "a symbolic link"),
        (here("pipe"), "a pipe"),
        ("/dev/null".into(), "a device"),
        (here("nowhere/x.sock"), "No such file or directory"),
        (here("other.raw/x.sock"), "Not a directory"),
        (String::new(), "a value is required"),
    ];
    if root("what_is_no_place_for_a_socket", "a block device") {
        mknodat(CWD, dir.join("block"), FileType::BlockDevice, Mode::RUSR, rustix::fs::makedev(7, 77))
            .unwrap();
        cases.push((here("block"), "a block device"));
    }
    for (place, word) in &cases {
        for option in ["--socket-path", "--control"] {
            let mut command = bare_vublkd();
            command.arg(format!("--blk-file={}", disk.path.display())).arg(format!("{option}={place}"));
            if option == "--control" {
                command.arg(format!("--socket-path={}", here("disk.sock")));
            }
            let said = refused(command);
            assert!(said.contains(word) && said.contains(option), "{option}={place}: {said}");
            assert!(!said.to_lowercase().contains("remove"), "{option}={place}: {said}");
        }
    }
    let both = here("both.sock");
    let mut command = vublkd("auto", Path::new(&both), &disk.path);
    command.arg(format!("--control={both}"));
    let said = refused(command);
    assert!(said.contains("--control and --socket-path are both"), "{said}");
    assert_eq!(std::fs::read(&image).unwrap(), b"a guest's data");
    assert!(!dir.join("disk.sock").exists() && !dir.join("both.sock").exists());
    assert!(std::fs::symlink_metadata(dir.join("stale")).unwrap().file_type().is_socket());

    let (status, _, said) = vublk(&["status", &image]);
    assert!(!status.success() && said.contains("is a file or a device"), "{said}");
    let (status, _, said) = vublk(&["status", &here("folder")]);
    assert!(!status.success() && said.contains("is a folder"), "{said}");
}

/// Two daemons that start at once find the same stale socket: one has it, the other says so.
#[test]
fn two_that_start_at_once() {
    let disks = [Disk::new(), Disk::new()];
    for _ in 0..10 {
        let socket = disks[0].dir.path().join("disk.sock");
        drop(UnixListener::bind(&socket).unwrap());
        let start = |disk: &Disk| {
            let mut command = vublkd("threads", &socket, &disk.path);
            command.stderr(std::process::Stdio::piped());
            // The log of each is beside its own disk.
            let log = disk.dir.path().join("own.sock");
            Daemon::spawn(URING, command, log)
        };
        let mut daemons = disks.each_ref().map(start);
        let loser = Deadline::new("one of two to give up").until_slowly(|| {
            daemons.iter().position(|daemon| daemon.log().contains("another process is listening there"))
        });
        assert_eq!(daemons[loser].wait_end(Duration::from_secs(5)).code(), Some(1));
        let winner = &mut daemons[1 - loser];
        winner.wait_log("serving ");
        let stream = UnixStream::connect(&socket).unwrap();
        let peer = rustix::net::sockopt::socket_peercred(&stream).unwrap().pid;
        assert_eq!(u32::try_from(peer.as_raw_nonzero().get()).unwrap(), winner.pid());
        drop(stream);
        winner.stop();
        assert!(!socket.exists());
    }
}
