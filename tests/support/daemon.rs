//! Starts a back-end (vublkd, or qemu-storage-daemon as the oracle) on a disk
//! and a socket in a folder of its own, and ends it whatever happens.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use super::disk::Disk;
use super::frontend::Frontend;
use super::sys::{Deadline, PATIENCE, program, readable_within, register_tally, tick};

/// Who serves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// vublkd with this engine.
    Vublkd(&'static str),
    /// qemu-storage-daemon.
    Qsd,
}

pub const URING: Backend = Backend::Vublkd("io_uring");
pub const THREADS: Backend = Backend::Vublkd("threads");
pub const QSD: Backend = Backend::Qsd;

/// What a test wants different from the default, in words both back-ends know.
#[derive(Clone, Debug)]
pub struct Options {
    pub read_only: bool,
    pub queues: Option<u16>,
    pub logical_block_size: Option<u32>,
    /// Further arguments of vublkd (not given to qemu-storage-daemon).
    pub extra: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self { read_only: false, queues: Some(4), logical_block_size: None, extra: Vec::new() }
    }
}

impl Options {
    pub fn with(extra: &[&str]) -> Self {
        Self { extra: extra.iter().map(ToString::to_string).collect(), ..Self::default() }
    }
}

impl Options {
    /// As vublkd's options.
    pub fn add_to(&self, command: &mut Command) {
        if self.read_only {
            command.arg("--read-only");
        }
        if let Some(queues) = self.queues {
            command.arg(format!("--num-queues={queues}"));
        }
        if let Some(size) = self.logical_block_size {
            command.arg(format!("--logical-block-size={size}"));
        }
        command.args(&self.extra);
    }
}

/// A running back-end.
pub struct Daemon {
    pub backend: Backend,
    pub socket: PathBuf,
    pub child: Child,
    watch: OwnedFd,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

/// The command line of vublkd for a disk and a socket: the daemon alone, unless `--supervise` is added.
pub fn vublkd(engine: &str, socket: &Path, disk: &Path) -> Command {
    let mut command = bare_vublkd();
    command
        .arg(format!("--socket-path={}", socket.display()))
        .arg(format!("--blk-file={}", disk.display()))
        .arg(format!("--engine={engine}"))
        .args(["--log-level=debug", "--supervise=off"]);
    command
}

/// vublkd's lines are written by a thread of its own. A line is on its way until that thread sleeps again; one that has
/// only been started is called as the process is.
fn wait_written(pid: u32) {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let writes = |process: &str| {
        let tasks = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
        // proc(5): number, name in brackets, state.
        let stats = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
        let is_the_first = |stat: &String| stat.split(' ').next() == Some(process);
        let writes =
            |stat: &String| stat.contains(" (log) ") || stat.contains(" (vublkd) ") && !is_the_first(stat);
        stats.filter(writes).any(|stat| !stat.contains(") S "))
    };
    let pid = pid.to_string();
    let until = Instant::now() + Duration::from_secs(1); // a thread that is traced never sleeps
    while Instant::now() < until
        && std::iter::once(pid.as_str()).chain(children.split_whitespace()).any(writes)
    {
        std::thread::yield_now();
    }
}

pub fn bare_vublkd() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vublkd"))
}

fn storage_daemon(socket: &Path, disk: &Disk, options: &Options) -> Command {
    let mut command = program("qemu-storage-daemon");
    let direct = if disk.takes_direct() { "on" } else { "off" };
    let mut export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable={}",
        socket.display(),
        if options.read_only { "off" } else { "on" },
    );
    if let Some(queues) = options.queues {
        export.push_str(&format!(",num-queues={queues}"));
    }
    if let Some(size) = options.logical_block_size {
        export.push_str(&format!(",logical-block-size={size}"));
    }
    command
        .arg("--blockdev")
        .arg(format!(
            "driver=file,node-name=disk,filename={},cache.direct={direct},discard=unmap,read-only={}",
            disk.path.display(),
            if options.read_only { "on" } else { "off" },
        ))
        .arg("--export")
        .arg(export);
    command
}

impl Daemon {
    /// Starts a back-end and waits until its socket listens.
    #[track_caller]
    pub fn start(backend: Backend, disk: &Disk, options: &Options) -> Self {
        let mut daemon = Self::start_at(backend, disk, "disk.sock", options);
        daemon.wait_listening();
        daemon
    }

    /// The same with a socket of this name, without the wait.
    #[track_caller]
    pub fn start_at(backend: Backend, disk: &Disk, socket: &str, options: &Options) -> Self {
        let socket = disk.dir.path().join(socket);
        let command = match backend {
            Backend::Qsd => storage_daemon(&socket, disk, options),
            Backend::Vublkd(engine) => {
                let mut command = vublkd(engine, &socket, &disk.path);
                if !disk.takes_direct() {
                    command.arg("--direct=off");
                }
                options.add_to(&mut command);
                command
            }
        };
        Self::spawn(backend, command, socket)
    }

    /// Starts any command line as a back-end on `socket`.
    #[track_caller]
    pub fn spawn(backend: Backend, command: Command, socket: PathBuf) -> Self {
        Self::spawn_to(backend, command, socket, Stdio::null())
    }

    /// The same, its stdout going where the test wants it.
    #[track_caller]
    pub fn spawn_to(backend: Backend, mut command: Command, socket: PathBuf, stdout: Stdio) -> Self {
        register_tally();
        let log = socket.with_extension("log");
        command.stdin(Stdio::null()).stdout(stdout).stderr(File::create(&log).unwrap());
        // SAFETY: the closure only makes one system call, which is allowed
        // between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // A test that is killed must not leave its daemon behind; a parent has to end one.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
                Ok(())
            });
        }
        let child =
            command.spawn().unwrap_or_else(|error| panic!("{}: {error}", command.get_program().display()));
        let watch = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        Self { backend, socket, child, watch, log, ended: None }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the back-end has written to stderr so far, all that it logged before this call included.
    pub fn log(&self) -> String {
        wait_written(self.pid());
        let mut text = Vec::new();
        File::open(&self.log).unwrap().read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Waits for a line in the log that holds `word`.
    #[track_caller]
    pub fn wait_log(&self, word: &str) -> String {
        Deadline::new(format!("a log line with {word:?}"))
            .until_slowly(|| self.log().lines().find(|line| line.contains(word)).map(str::to_owned))
    }

    /// Waits until the back-end listens on the socket. It is looked up in the
    /// kernel's table: a connection to try it would count as a front-end.
    #[track_caller]
    pub fn wait_listening(&mut self) {
        let deadline = Deadline::new(format!("{} to listen", self.socket.display()));
        while !self.listens() {
            if self.poll_end(Duration::from_millis(2)) {
                panic!("{:?} ended with {:?} before it listened:\n{}", self.backend, self.ended, self.log());
            }
            deadline.check();
        }
    }

    fn listens(&self) -> bool {
        let pid = self.pid();
        match std::fs::read_dir(format!("/proc/{pid}/fd")) {
            // It lets only root look, and logs that it serves once it listens.
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                let line = format!(" on {}", self.socket.display());
                self.log().lines().any(|said| said.contains(" serving ") && said.ends_with(&line))
            }
            _ => listens(pid, &self.socket),
        }
    }

    #[track_caller]
    pub fn connect(&self) -> Frontend {
        Frontend::new(UnixStream::connect(&self.socket).expect("connect to the back-end"))
    }

    /// Waits up to `time` for the end of the process.
    fn poll_end(&mut self, time: Duration) -> bool {
        if self.ended.is_none() && readable_within(self.watch.as_fd(), time) {
            self.ended = Some(self.child.wait().unwrap());
        }
        self.ended.is_some()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for the process to end by itself.
    #[track_caller]
    pub fn wait_end(&mut self, patience: Duration) -> ExitStatus {
        assert!(
            self.poll_end(patience),
            "the back-end did not end within {patience:?}; its log:\n{}",
            self.log()
        );
        self.ended.unwrap()
    }

    /// SIGTERM; the exit status has to be 0.
    #[track_caller]
    pub fn stop(&mut self) {
        self.stop_within(PATIENCE);
    }

    #[track_caller]
    pub fn stop_within(&mut self, patience: Duration) {
        self.signal(Signal::TERM);
        let status = self.wait_end(patience);
        assert_eq!(status.code(), Some(0), "exit status after SIGTERM");
    }

    /// Still running?
    #[track_caller]
    pub fn assert_alive(&mut self) {
        assert!(!self.poll_end(Duration::ZERO), "the back-end ended with {:?}:\n{}", self.ended, self.log());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
            if !readable_within(self.watch.as_fd(), Duration::from_secs(3)) {
                // A daemon whose parent hangs would outlive it.
                let children = format!("/proc/{0}/task/{0}/children", self.pid());
                let children = std::fs::read_to_string(children).unwrap_or_default();
                let _ = self.child.kill();
                for pid in children.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- log of {:?} ---\n{}---", self.backend, self.log());
        } else {
            // Its successor goes on, so that nothing else may show it.
            assert!(!self.log().contains("a system call that its sandbox does not know"), "{}", self.log());
        }
    }
}

/// Whether process `pid` has a listening socket and there is a socket at
/// `path`. The kernel's table has the name a socket was bound to, which may
/// have been changed since, so the two are not compared.
pub fn listens(pid: u32, path: &Path) -> bool {
    if !std::fs::metadata(path).is_ok_and(|file| file.file_type().is_socket()) {
        return false;
    }
    let Ok(fds) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    let sockets: Vec<String> = fds
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|target| {
            let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
            Some(inode.to_owned())
        })
        .collect();
    // Columns: address, references, protocol, flags (hexadecimal;
    // __SO_ACCEPTCON is 0x10000), type, state, inode, path.
    // The one of its network namespace.
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/unix")).unwrap_or_default();
    let is_there = table.lines().any(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        columns.get(3) == Some(&"00010000")
            && columns.get(6).is_some_and(|inode| sockets.iter().any(|own| own == inode))
    });
    // While the folder that it was made in is there, what is at its path is a dead daemon's.
    let folder = format!(".{}.", path.file_name().unwrap().display());
    let being_made = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with(&folder);
    is_there && !std::fs::read_dir(path.parent().unwrap()).unwrap().flatten().any(being_made)
}

/// Gives the command a descriptor under a fixed number.
pub fn pass_fd(command: &mut Command, fd: BorrowedFd<'_>, number: i32) {
    let from = fd.as_raw_fd();
    // SAFETY: dup2 and fcntl may be called between fork and exec; `from` is
    // open until the command was spawned, the caller holds it.
    unsafe {
        command.pre_exec(move || {
            if from == number {
                // dup2 onto itself would keep the close-on-exec flag.
                if libc::fcntl(number, libc::F_SETFD, 0) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
            } else if libc::dup2(from, number) != number {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Runs a program to its end, with a limit; gives status, stdout and stderr.
#[track_caller]
pub fn run(mut command: Command) -> (ExitStatus, String, String) {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let watch = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
    // What these programs say fits into a pipe, so waiting first is safe.
    if !tick(&[watch.as_fd()], PATIENCE) {
        let _ = child.kill();
        let _ = child.wait();
        panic!("{command:?} did not end within {PATIENCE:?}");
    }
    let output = child.wait_with_output().unwrap();
    (
        output.status,
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}
