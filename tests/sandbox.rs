//! A captured daemon: a program that is in the sandbox as the daemon is, and then does as it is told.
//!
//! It starts itself once for each attempt, with the role and the attempt in its environment, and looks what
//! became of it: the attempt has to fail with the error that is expected, or to end the process.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_sign_loss,
    clippy::cast_possible_truncation,
    reason = "a test, which makes system calls that the sandbox has to refuse"
)]

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};

use vublk::sandbox::{self, Mode, Role};

const ROLE: &str = "VUBLK_TEST_ROLE";
const ATTEMPT: &str = "VUBLK_TEST_ATTEMPT";

/// What is to become of an attempt.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// It works.
    Works,
    /// The kernel answers with this error.
    Fails(i32),
    /// It ends the process.
    Ends,
}
use Fate::{Ends, Fails, Works};

type Attempt = (&'static str, fn() -> io::Result<()>);

/// A system call as it is.
fn call(number: libc::c_long, arguments: [usize; 6]) -> io::Result<()> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: what it names in memory is valid or refused by the kernel; a mapping goes where the kernel chooses.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn parent() -> usize {
    std::os::unix::process::parent_id() as usize
}

fn open(path: &str) -> io::Result<()> {
    File::open(path).map(drop)
}

fn map(protection: libc::c_int) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    call(libc::SYS_mmap, [0, 4096, protection as usize, flags as usize, usize::MAX, 0])
}

const ATTEMPTS: [Attempt; 20] = [
    ("write a line", || call(libc::SYS_write, [2, 0, 0, 0, 0, 0])),
    ("map memory", || map(libc::PROT_READ | libc::PROT_WRITE)),
    ("let others run", || call(libc::SYS_sched_yield, [0; 6])),
    ("map memory to be executed", || map(libc::PROT_READ | libc::PROT_EXEC)),
    ("start a thread", || {
        std::thread::Builder::new().spawn(|| ())?.join().map_err(|_| io::Error::other("it panicked"))
    }),
    ("open a file", || open("/etc/passwd")),
    ("look into another process", || open("/proc/1/status")),
    ("make a file", || File::create("/tmp/vublk-captured").map(drop)),
    ("connect", || UnixStream::connect("/run/no-such-socket").map(drop)),
    ("connect to another port", || TcpStream::connect("127.0.0.1:9").map(drop)),
    ("listen", || UnixListener::bind("/tmp/vublk-captured.sock").map(drop)),
    ("listen for the network", || TcpListener::bind("127.0.0.1:0").map(drop)),
    ("start a process", || Command::new("/bin/true").status().map(drop)),
    ("execute", || {
        let argv = [c"true".as_ptr(), std::ptr::null()];
        call(libc::SYS_execve, [c"/bin/true".as_ptr().addr(), argv.as_ptr().addr(), 0, 0, 0, 0])
    }),
    ("trace", || call(libc::SYS_ptrace, [libc::PTRACE_SEIZE as usize, parent(), 0, 0, 0, 0])),
    ("signal another process", || call(libc::SYS_kill, [parent(), libc::SIGCONT as usize, 0, 0, 0, 0])),
    ("become another user", || call(libc::SYS_setuid, [1, 0, 0, 0, 0, 0])),
    ("mount", || call(libc::SYS_mount, [0, c"/tmp".as_ptr().addr(), 0, libc::MS_BIND as usize, 0, 0])),
    ("wake a library's thread", || {
        call(libc::SYS_epoll_ctl, [usize::MAX, libc::EPOLL_CTL_DEL as usize, usize::MAX, 0, 0, 0])
    }),
    ("make a ring", vublk::engine::uring::Uring::probe),
];

/// Landlock and the missing capabilities alone, before a thread has confined itself; then each role. `None`: all that is
/// not named.
fn expected(role: Option<Role>, attempt: &str) -> Fate {
    const KERNEL: [&str; 3] = ["write a line", "map memory", "let others run"];
    if KERNEL.contains(&attempt) {
        return Works;
    }
    match (role, attempt) {
        (None | Some(Role::Process | Role::Client | Role::Caller), "wake a library's thread") => {
            Fails(libc::EBADF)
        }
        (None, "map memory to be executed" | "start a thread" | "make a ring") => Works,
        (None | Some(Role::Connect), "connect") => Fails(libc::ENOENT),
        (Some(Role::Connect), "connect to another port") => Fails(libc::EACCES),
        (None, "trace" | "signal another process" | "become another user" | "mount") => Fails(libc::EPERM),
        (None, _) => Fails(libc::EACCES),
        // Its threads read what is below /etc, say; and it connects to any port.
        (Some(Role::Client), "open a file" | "map memory to be executed" | "start a thread") => Works,
        (Some(Role::Client), "connect") => Fails(libc::ENOENT),
        (Some(Role::Client), "connect to another port") => Fails(libc::ECONNREFUSED),
        (Some(Role::Client), "look into another process" | "make a file") => Fails(libc::EACCES),
        (Some(Role::Client), _) => Fails(libc::EPERM),
        (Some(Role::Process | Role::Control), "start a thread") | (Some(Role::Process), "make a ring") => {
            Works
        }
        (Some(Role::Claim), "open a file" | "look into another process" | "make a file") => {
            Fails(libc::EACCES)
        }
        (Some(_), "open a file" | "look into another process" | "make a file") => Fails(libc::ENOSYS),
        (Some(_), _) => Ends,
    }
}

const ROLES: [Option<Role>; 11] = [
    None,
    Some(Role::Process),
    Some(Role::Control),
    Some(Role::Worker),
    Some(Role::Io),
    Some(Role::Log),
    Some(Role::Claim),
    Some(Role::Metrics),
    Some(Role::Connect),
    Some(Role::Client),
    Some(Role::Caller),
];

fn main() -> ExitCode {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<usize>().ok());
    if let (Some(role), Some(attempt)) = (number(ROLE), number(ATTEMPT)) {
        return captured(ROLES[role], ATTEMPTS[attempt].1);
    }
    let mut wrong = 0;
    // SAFETY: asks for the version alone: no attributes are read.
    let landlock = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    for (at, role) in ROLES.iter().enumerate() {
        if role.is_none() && landlock < 6 {
            println!(
                "SKIPPED sandbox without a role: this kernel has version {landlock} of Landlock, not 6 (Linux 6.12)"
            );
            continue;
        }
        for (number, (name, _)) in ATTEMPTS.iter().enumerate() {
            let mut command = Command::new(std::env::current_exe().unwrap());
            let output = command.env(ROLE, at.to_string()).env(ATTEMPT, number.to_string()).output().unwrap();
            let fate = match (output.status.code(), output.status.signal()) {
                (Some(0), _) => Works,
                (Some(errno), _) => Fails(errno),
                (None, Some(libc::SIGSYS)) => Ends,
                other => panic!(
                    "{role:?}, {name}: ended with {other:?}: {}",
                    String::from_utf8_lossy(&output.stderr)
                ),
            };
            let wanted = expected(*role, name);
            if fate != wanted {
                eprintln!("{role:?}: {name}: {fate:?}, and not {wanted:?}");
                wrong += 1;
            }
        }
        if let Some(role) = role {
            println!("{role:?}: {} system calls", sandbox::count(*role).unwrap());
        }
    }
    // What the documents promise.
    // A debug build has one more, see `calls.rs`.
    let debug = usize::from(cfg!(debug_assertions));
    assert!(
        sandbox::count(Role::Worker).unwrap() <= 20 + debug && sandbox::count(Role::Control).unwrap() <= 45
    );
    println!("sandbox: {} attempts, {wrong} with another outcome", ROLES.len() * ATTEMPTS.len());
    if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Does it, as a thread of this role; the exit code is the error.
fn captured(role: Option<Role>, attempt: fn() -> io::Result<()>) -> ExitCode {
    let folder = File::open("/").unwrap();
    // As in the daemon, whose log has one: the C library prepares itself for threads with the first.
    std::thread::spawn(|| ()).join().unwrap();
    // The thread of a cluster's client is there before the process gives anything up, and gives up what it does by itself.
    let client = sandbox::of_client(Mode::On).filter(|_| role == Some(Role::Client));
    if client.is_none() {
        sandbox::enter(Mode::On, None, &[folder.as_fd()], &[]);
    }
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    // The process's end is no call of most roles: this thread makes it.
    let captured = std::thread::spawn(move || {
        match (role, client) {
            (_, Some(confine)) => confine(&[]),
            (Some(role), None) => sandbox::confine(role),
            (None, None) => {}
        }
        tell.send(attempt()).unwrap();
    });
    let outcome = told.recv().unwrap();
    captured.join().unwrap();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => ExitCode::from(e.raw_os_error().and_then(|errno| u8::try_from(errno).ok()).unwrap_or(255)),
    }
}
