//! NBD servers of others: nbdkit, qemu-nbd, nbd-server. Each has a Unix socket in a folder of its own, and ends with the test.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

use super::disk::Disk;
use super::sys::{Deadline, program, readable_within};

pub struct Server {
    /// How it is started.
    command: Command,
    child: Child,
    watch: OwnedFd,
    /// Where it listens.
    pub socket: PathBuf,
    /// Or on this port of this host.
    port: Option<u16>,
    folder: TempDir,
}

impl Server {
    /// nbdkit with these arguments.
    #[track_caller]
    pub fn nbdkit(arguments: &[&str]) -> Self {
        Self::start("nbdkit", |command, socket, _| {
            command.args(["--exit-with-parent", "-U"]).arg(socket).args(arguments);
        })
    }

    /// qemu-nbd on a raw file of so many bytes with data in the first `data` of them.
    #[track_caller]
    pub fn qemu_nbd(size: u64, data: u64, arguments: &[&str]) -> Self {
        Self::start("qemu-nbd", |command, socket, folder| {
            let disk = image(folder, size, data);
            command.args(["--persistent", "--format=raw", "--socket"]).arg(socket).args(arguments).arg(disk);
        })
    }

    /// nbd-server on such a file, as the export "disk".
    #[track_caller]
    pub fn nbd_server(size: u64, data: u64) -> Self {
        Self::start("sh", |command, socket, folder| {
            let disk = image(folder, size, data);
            let config = folder.path().join("nbd.conf");
            let (socket, disk) = (socket.display(), disk.display());
            let text = format!(
                "[generic]\nunixsock = {socket}\n[disk]\nexportname = {disk}\nflush = true\nfua = true\ntrim = true\n"
            );
            std::fs::write(&config, text).unwrap();
            // With -d it would stay in the foreground, but then 3.24 sometimes spins for seconds before it accepts. It ends
            // with the shell's standard input: when the test does, however it ends.
            let script = "nbd-server -C \"$1\" -p \"$2\" && read -r _; kill \"$(cat \"$2\")\"";
            command
                .args(["-c", script, "sh"])
                .arg(config)
                .arg(folder.path().join("pid"))
                .stdin(Stdio::piped());
        })
    }

    #[track_caller]
    fn start(name: &str, arguments: impl FnOnce(&mut Command, &PathBuf, &TempDir)) -> Self {
        Self::start_on(None, name, arguments)
    }

    #[track_caller]
    fn start_on(
        port: Option<u16>,
        name: &str,
        arguments: impl FnOnce(&mut Command, &PathBuf, &TempDir),
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("nbd.sock");
        let mut command = program(name);
        command.stdin(Stdio::null());
        arguments(&mut command, &socket, &folder);
        let log = File::create(folder.path().join("log")).unwrap();
        command.stdout(Stdio::null()).stderr(log);
        let signal = if name == "sh" { 0 } else { libc::SIGTERM };
        // SAFETY: the closure only makes one system call, which is allowed between fork and exec.
        unsafe {
            command.pre_exec(move || {
                // A test that is killed must not leave its server behind.
                libc::prctl(libc::PR_SET_PDEATHSIG, signal);
                Ok(())
            });
        }
        let child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
        let watch = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let server = Self { command, child, watch, socket, port, folder };
        server.wait_listening();
        server
    }

    fn wait_listening(&self) {
        Deadline::new("the server to listen").until_slowly(|| {
            assert!(
                !readable_within(self.watch.as_fd(), Duration::ZERO),
                "the server ended before it listened:\n{}",
                self.log()
            );
            match self.port {
                Some(port) => TcpStream::connect(("127.0.0.1", port)).is_ok().then_some(()),
                None => UnixStream::connect(&self.socket).is_ok().then_some(()),
            }
        });
    }

    /// kill -9; it is gone when this returns.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let _none = std::fs::remove_file(&self.socket);
    }

    /// Starts it anew after [`Server::kill`].
    #[track_caller]
    pub fn start_again(&mut self) {
        self.child = self.command.spawn().unwrap();
        self.watch = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()).unwrap();
        self.wait_listening();
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// nbdkit on a disk.
    #[track_caller]
    pub fn of(disk: &Disk) -> Self {
        Self::nbdkit(&["-f", "file", disk.path.to_str().unwrap()])
    }

    /// nbdkit on a disk, on a port of this host that was free a moment ago. It listens on its Unix socket no more.
    #[track_caller]
    pub fn over_tcp(disk: &Disk) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).unwrap().port();
        let path = disk.path.to_str().unwrap().to_owned();
        Self::start_on(Some(port), "nbdkit", |command, _, _| {
            command.args([
                "--exit-with-parent",
                "-f",
                "-i",
                "127.0.0.1",
                "-p",
                &port.to_string(),
                "file",
                &path,
            ]);
        })
    }

    /// Its export on that port, as a URI.
    pub fn tcp_uri(&self) -> String {
        format!("nbd://127.0.0.1:{}", self.port.unwrap())
    }

    /// qemu-nbd on a disk, for any number of clients.
    #[track_caller]
    pub fn qemu_nbd_of(disk: &Disk) -> Self {
        let path = disk.path.clone();
        Self::start("qemu-nbd", |command, socket, _| {
            command.args(["--persistent", "--shared=0", "--discard=unmap", "--format=raw", "--socket"]);
            command.arg(socket).arg(path);
        })
    }

    /// Its export, as a URI.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// What it has written to stderr.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }
}

/// A file of so many bytes, the first `data` of them written.
fn image(folder: &TempDir, size: u64, data: u64) -> PathBuf {
    let path = folder.path().join("disk.raw");
    std::fs::write(&path, vec![1; data.try_into().unwrap()]).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(size).unwrap();
    path
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.stdin.take().is_none() {
            let _gone = kill_process(Pid::from_child(&self.child), Signal::CONT);
            let _gone = kill_process(Pid::from_child(&self.child), Signal::TERM);
        }
        if !readable_within(self.watch.as_fd(), Duration::from_secs(3)) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the NBD server ---\n{}---", self.log());
        }
    }
}
