//! NBD servers on the far host of a [`Network`], each in a process namespace of its own: nbd-server has a process for each
//! client, and what kills the server has to kill them all.

use std::fs::File;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

use super::disk::Disk;
use super::network::{FAR, Host, Network};
use super::sys::{Deadline, find, installed, readable_within};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Nbdkit,
    QemuNbd,
    NbdServer,
}

pub const KINDS: [Kind; 3] = [Kind::Nbdkit, Kind::QemuNbd, Kind::NbdServer];

const PORT: u16 = 10809;

impl Kind {
    fn program(self) -> &'static str {
        match self {
            Self::Nbdkit => "nbdkit",
            Self::QemuNbd => "qemu-nbd",
            Self::NbdServer => "nbd-server",
        }
    }

    /// True when it can be started here; otherwise the test is reported as left out.
    pub fn is_installed(self, test: &str) -> bool {
        installed(self.program(), &format!("{test} by {}", self.program())) && installed("unshare", test)
    }
}

/// See the head of the file. It serves one file, for any number of clients.
pub struct FarServer<'a> {
    network: &'a Network,
    kind: Kind,
    command: Command,
    /// unshare(1), whose only child is the first process of the namespace.
    child: Child,
    watch: OwnedFd,
    folder: TempDir,
}

impl<'a> FarServer<'a> {
    #[track_caller]
    pub fn start(network: &'a Network, kind: Kind, disk: &Disk) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child=KILL"]);
        let port = PORT.to_string();
        let program = find(kind.program()).unwrap();
        match kind {
            Kind::Nbdkit => {
                command.arg(program).args(["-f", "-i", "0.0.0.0", "-p", &port, "file"]).arg(&disk.path);
            }
            Kind::QemuNbd => {
                command.arg(program).args(["--persistent", "--shared=0", "--discard=unmap", "--format=raw"]);
                command.args(["--bind=0.0.0.0", "--port", &port]).arg(&disk.path);
            }
            Kind::NbdServer => {
                let config = folder.path().join("nbd.conf");
                let path = disk.path.display();
                let text = format!(
                    "[generic]\nlistenaddr = 0.0.0.0\nport = {port}\n[disk]\nexportname = {path}\nflush = true\nfua = true\n"
                );
                std::fs::write(&config, text).unwrap();
                // With -d it would stay in the foreground, but then 3.24 sometimes spins for seconds before it accepts.
                let script = "\"$1\" -C \"$2\" -p \"$3\" && exec sleep infinity";
                command
                    .args(["sh", "-c", script, "sh"])
                    .arg(program)
                    .arg(config)
                    .arg(folder.path().join("pid"));
            }
        }
        let log = File::create(folder.path().join("log")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        network.enter(Host::Far, &mut command);
        // SAFETY: the closure only makes one system call, which is allowed between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // A test that is killed must not leave its server behind, which ends with unshare.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let watch = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let server = Self { network, kind, command, child, watch, folder };
        server.wait_listening();
        server
    }

    #[track_caller]
    fn wait_listening(&self) {
        Deadline::new(format!("{:?} to listen", self.kind)).until_slowly(|| {
            assert!(
                !readable_within(self.watch.as_fd(), Duration::ZERO),
                "{:?} ended before it listened:\n{}",
                self.kind,
                self.log()
            );
            self.network.on(Host::Far, || TcpStream::connect(("127.0.0.1", PORT)).is_ok()).then_some(())
        });
    }

    /// The first process of its namespace; it may have ended by itself.
    fn first(&self) -> Option<Pid> {
        let pid = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        Pid::from_raw(children.split_whitespace().next()?.parse().unwrap())
    }

    /// It does nothing more, and its kernel goes on to receive what is sent to it. For a server of one process.
    #[track_caller]
    pub fn freeze(&self) {
        let first = self.first().unwrap();
        kill_process(first, Signal::STOP).unwrap();
        let tasks = format!("/proc/{}/task", first.as_raw_nonzero());
        Deadline::new("the server to stand still").until_slowly(|| {
            let mut all = std::fs::read_dir(&tasks).unwrap().flatten();
            let stands = |stat: String| stat.contains(") T ");
            all.all(|task| std::fs::read_to_string(task.path().join("stat")).is_ok_and(stands)).then_some(())
        });
    }

    /// kill -9; all its processes are gone when this returns.
    #[track_caller]
    pub fn kill(&mut self) {
        if let Some(first) = self.first() {
            let _gone = kill_process(first, Signal::KILL);
        }
        // unshare(1) ends once it has reaped its child, and that is the last of its namespace to end.
        if !readable_within(self.watch.as_fd(), Duration::from_secs(10)) {
            self.child.kill().unwrap();
        }
        self.child.wait().unwrap();
    }

    /// Starts it anew after [`FarServer::kill`].
    #[track_caller]
    pub fn start_again(&mut self) {
        self.child = self.command.spawn().unwrap();
        self.watch = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()).unwrap();
        self.wait_listening();
    }

    /// Its export, as the near host names it.
    pub fn uri(&self) -> String {
        let export = if self.kind == Kind::NbdServer { "disk" } else { "" };
        format!("nbd://{FAR}:{PORT}/{export}")
    }

    /// What it has written to stderr.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for FarServer<'_> {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- log of {:?} ---\n{}---", self.kind, self.log());
        }
    }
}
