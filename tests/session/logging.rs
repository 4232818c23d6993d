//! The log: what a guest cannot keep out of it, and a log that cannot be written, or
//! that is not read, which is no reason to take a guest's disk away.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{each_engine, start};
use crate::succession::daemon_of;
use crate::support::control::settle;
use crate::support::daemon::{Backend, Daemon, URING, pass_fd, vublkd};
use crate::support::device::{Device, IOERR, OK, Setup, T_IN, negotiate, ring_addr};
use crate::support::disk::{Disk, SECTOR};
use crate::support::frontend::{Frontend, NO_FD, feature, msg, protocol, single_region, words32};
use crate::support::memory::{Memory, Region};
use crate::support::ring::{Desc, NEXT, Ring};
use crate::support::sys::{Deadline, memory_file, terminal};

/// A daemon that logs to `fd`.
#[track_caller]
fn start_logging_to(backend: Backend, disk: &Disk, fd: BorrowedFd<'_>) -> Daemon {
    let command = logging_to(backend, disk, fd);
    Daemon::spawn(backend, command, disk.dir.path().join("disk.sock"))
}

fn logging_to(backend: Backend, disk: &Disk, fd: BorrowedFd<'_>) -> Command {
    let Backend::Vublkd(engine) = backend else {
        unreachable!("vublkd alone");
    };
    let socket = disk.dir.path().join("disk.sock");
    let mut command = vublkd(engine, &socket, &disk.path);
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    pass_fd(&mut command, fd, 2);
    command
}

/// SIGUSR1, and the wait until the daemon has taken it.
#[track_caller]
fn ask_for_statistics(daemon: &Daemon) {
    daemon.signal(Signal::USR1);
    let bit = 1 << (libc::SIGUSR1 - 1);
    let pending = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).unwrap().trim().to_owned();
        u64::from_str_radix(&line, 16).unwrap() & bit != 0
    };
    Deadline::new("SIGUSR1 to be taken").until_slowly(|| (!pending()).then_some(()));
}

#[test]
fn a_log_that_cannot_be_written_does_no_harm() {
    each_engine(|engine| {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (reader, left) = rustix::pipe::pipe().unwrap();
        drop(reader);
        for log in [full.as_fd(), left.as_fd()] {
            let disk = Disk::new();
            let mut daemon = start_logging_to(engine, &disk, log);
            daemon.wait_listening();
            for _ in 0..3 {
                let mut device = Device::plain(&daemon);
                device.assert_serves(0);
                ask_for_statistics(&daemon);
                // The line is logged by the thread that answers this.
                device.frontend.sync();
                // And one that the worker logs.
                make_no_sense(&mut device);
                device.assert_serves(0);
            }
            daemon.assert_alive();
            daemon.stop();
        }
    });
}

/// A chain that the worker has a line about.
#[track_caller]
fn make_no_sense(device: &mut Device) {
    let ring = &mut device.rings[0];
    let head = ring.raw(Desc { addr: 1 << 20, len: 16, flags: NEXT, next: 999 });
    ring.offer(head);
    ring.wait_used("a chain that makes no sense");
}

/// A guest can use up its own lines, but not those about its disk.
#[test]
fn a_truncated_image_is_told_whatever_the_guest_does() {
    each_engine(|engine| {
        let (disk, daemon) = start(engine);
        let mut device = Device::plain(&daemon);
        for _ in 0..60 {
            make_no_sense(&mut device);
        }
        daemon.wait_log("left out");
        let image = File::options().write(true).open(&disk.path).unwrap();
        image.set_len(1 << 20).unwrap();
        assert_eq!(device.status(T_IN, 4000, &[], SECTOR), IOERR, "beyond the end");
        daemon.wait_log("truncated");
        assert_eq!(device.status(T_IN, 2044, &[], 8 * SECTOR), IOERR, "over the end");
        assert_eq!(device.status(T_IN, 2040, &[], 8 * SECTOR), OK, "up to the end");
        device.assert_serves(0);
        // These lines have a limit, too.
        for _ in 0..40 {
            assert_eq!(device.status(T_IN, 4000, &[], SECTOR), IOERR);
        }
        let told = daemon.log().lines().filter(|line| line.contains("truncated")).count();
        assert!(told <= 20, "{told} lines about one truncated image");
        // What is there again is served again.
        image.set_len(64 << 20).unwrap();
        assert_eq!(device.status(T_IN, 4000, &[], SECTOR), OK, "grown again");
    });
}

/// A front-end that makes one mistake after another, in one connection and in many: a few lines,
/// and how many more there would have been.
#[test]
fn a_front_end_cannot_flood_the_log() {
    const TIMES: usize = 300;
    let (_disk, mut daemon) = start(URING);
    let memory = Memory::plain();
    let ring = Ring::new(memory.clone(), 128, 0, false);
    let mut frontend = daemon.connect();
    negotiate(&mut frontend, 0);
    frontend.set_mem_table(&memory);
    frontend.vring_state(msg::SET_VRING_NUM, 0, 3);
    frontend.tell(msg::SET_VRING_ADDR, &ring_addr(0, &ring), &[]);
    frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
    let overlapping = Region::new(memory.regions[0].guest, 4096, 0);
    let not_memory = memory_file(0);
    for _ in 0..TIMES {
        frontend.vring_fd(msg::SET_VRING_KICK, 0, &ring.kick);
        frontend.tell64(msg::SET_VRING_KICK, NO_FD);
        for (fd, region) in [(&overlapping.file, &overlapping), (&not_memory, &memory.regions[0])] {
            let told = frontend.command(msg::ADD_MEM_REG, &single_region(region), &[fd.as_fd()]);
            assert_eq!(told.ok(), Some(1));
        }
        let told = frontend.command(msg::SET_VRING_NUM, &words32(&[4000, 128]), &[]);
        assert_eq!(told.ok(), Some(1));
        let told = frontend.command(msg::SET_VRING_ERR, &0_u64.to_le_bytes(), &[not_memory.as_fd()]);
        assert_eq!(told.ok(), Some(1));
    }
    drop(frontend);
    for time in 0..TIMES {
        let frontend = daemon.connect();
        match time % 4 {
            0 => frontend.send(msg::SET_FEATURES, 0, &feature::RING_PACKED.to_le_bytes(), &[]),
            1 => frontend.send(msg::SET_PROTOCOL_FEATURES, 0, &protocol::STATUS.to_le_bytes(), &[]),
            2 => frontend.send(99, 0, &[], &[]),
            _ => frontend.send(msg::GET_INFLIGHT_FD, 0, &[0xff; 24], &[]),
        }
        .unwrap();
        frontend.wait_hangup("a front-end that makes no sense");
    }
    for _ in 0..TIMES {
        drop(daemon.connect());
    }
    Device::plain(&daemon).assert_serves(0);
    daemon.stop();
    let log = daemon.log();
    let told: Vec<&str> = log.lines().filter(|line| !line.contains("DEBUG")).collect();
    // Ten of each kind in ten seconds, and this takes less than half a minute.
    assert!(told.len() < 100, "{} lines:\n{}", told.len(), told.join("\n"));
    let left_out: usize = told
        .iter()
        .filter(|line| line.contains("were left out"))
        .flat_map(|line| line.split_whitespace().find_map(|word| word.parse::<usize>().ok()))
        .sum();
    assert!(left_out > 6 * TIMES, "only {left_out} are said to be left out:\n{}", told.join("\n"));
}

/// A pipe of one page that is full, and its reader.
fn full_pipe() -> (File, OwnedFd) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let size = rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
    rustix::io::write(&writer, &vec![b'.'; size]).unwrap();
    (File::from(reader), writer)
}

/// A terminal whose output was stopped (Ctrl-S), and its other end.
fn stopped_terminal() -> (File, OwnedFd) {
    let (master, terminal) = terminal();
    // SAFETY: a plain call on an open descriptor.
    assert_eq!(unsafe { libc::tcflow(terminal.as_raw_fd(), libc::TCOOFF) }, 0);
    (master, terminal)
}

/// Some 100 bytes each: 900 are more than a page, a terminal and the daemon's queue have room for.
#[track_caller]
fn log_lines(number: usize, daemon: &Daemon, device: &mut Device) {
    for _ in 0..number {
        ask_for_statistics(daemon);
        // The line is logged by the thread that answers this.
        device.frontend.sync();
    }
    make_no_sense(device);
}

#[track_caller]
fn ends_in_time(daemon: &mut Daemon) {
    let begun = Instant::now();
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait_end(Duration::from_secs(10)).code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(2), "it took {:?} to stop", begun.elapsed());
}

/// I/O goes on, a signal ends the daemon in time, and what was lost is told to who reads on.
#[test]
fn a_log_that_is_not_read_holds_nothing_up() {
    each_engine(|engine| {
        for (what, (mut reader, log)) in [("pipe", full_pipe()), ("terminal", stopped_terminal())] {
            let disk = Disk::new();
            let mut daemon = start_logging_to(engine, &disk, log.as_fd());
            daemon.wait_listening();
            let mut device = Device::plain(&daemon);
            log_lines(900, &daemon, &mut device);
            device.assert_serves(0);
            daemon.assert_alive();
            // Read on.
            // SAFETY: a plain call on an open descriptor.
            unsafe { libc::tcflow(log.as_raw_fd(), libc::TCOON) };
            rustix::io::ioctl_fionbio(&reader, true).unwrap();
            let mut text = Vec::new();
            let told = Deadline::new(format!("a {what} that is read again to tell what was lost"))
                .until_slowly(|| {
                    let _all_there_is_now = reader.read_to_end(&mut text);
                    let text = String::from_utf8_lossy(&text);
                    text.lines().find(|line| line.contains("of the log were lost")).map(str::to_owned)
                });
            let lost = told.split_whitespace().find_map(|word| word.parse::<usize>().ok()).unwrap();
            let text = String::from_utf8_lossy(&text);
            let got = text.lines().filter(|line| line.contains("statistics")).count();
            assert!(got > 100 && lost > 100 && got + lost >= 900, "{what}: {got} lines came, {told}");
            // And stopped for good.
            // SAFETY: a plain call on an open descriptor.
            unsafe { libc::tcflow(log.as_raw_fd(), libc::TCOOFF) };
            log_lines(20, &daemon, &mut device);
            device.assert_serves(0);
            ends_in_time(&mut daemon);
        }
    });
}

#[test]
fn a_supervisor_and_its_daemon_log_without_waiting() {
    let disk = Disk::new();
    let (_reader, log) = full_pipe();
    let mut command = logging_to(URING, &disk, log.as_fd());
    command.arg("--supervise");
    let mut parent = Daemon::spawn(URING, command, disk.dir.path().join("disk.sock"));
    let connect = || std::os::unix::net::UnixStream::connect(&parent.socket).ok();
    let stream = Deadline::new("the daemon to listen").until_slowly(connect);
    let mut device = Device::over(Frontend::new(stream), Setup::default());
    device.assert_serves(0);
    for _ in 0..3 {
        // The parent has a line about it, and the next daemon some.
        rustix::process::kill_process(daemon_of(&parent), Signal::KILL).unwrap();
        device.assert_serves(0);
    }
    ends_in_time(&mut parent);
}

/// A command line that makes no sense is told, and told without waiting.
#[test]
fn a_complaint_that_is_not_read_holds_nothing_up() {
    for (wrong, code) in [("--poll-us=steam", 2), ("--control=/no/such/folder/control", 1)] {
        let disk = Disk::new();
        let (_reader, log) = full_pipe();
        let mut command = logging_to(URING, &disk, log.as_fd());
        command.arg(wrong);
        let mut daemon = Daemon::spawn(URING, command, disk.dir.path().join("disk.sock"));
        assert_eq!(daemon.wait_end(Duration::from_secs(3)).code(), Some(code), "{wrong}");
    }
}

#[test]
fn under_the_journal_each_line_has_its_priority() {
    for stream in ["its own", "another's"] {
        let disk = Disk::new();
        let (reader, log) = rustix::pipe::pipe().unwrap();
        let mut command = logging_to(Backend::Vublkd("null"), &disk, log.as_fd());
        let about = rustix::fs::fstat(&log).unwrap();
        let inode = about.st_ino + u64::from(stream != "its own");
        command.env("JOURNAL_STREAM", format!("{}:{inode}", about.st_dev));
        let mut daemon = Daemon::spawn(URING, command, disk.dir.path().join("disk.sock"));
        daemon.wait_listening();
        settle(&daemon); // it has said that it serves
        daemon.stop();
        drop(log);
        let mut text = String::new();
        // SIGTERM has ended it, and with it the last writer.
        File::from(reader).read_to_string(&mut text).unwrap();
        let priority = |word: &str| {
            let line = text.lines().find(|line| line.contains(word)).expect(&text);
            line.get(..3).unwrap().to_owned()
        };
        let found = ["serving ", "--engine=null", "stopped: "].map(priority);
        if stream == "its own" {
            assert_eq!(found, ["<6>", "<4>", "<6>"], "{text}");
            assert!(text.lines().all(|line| line.starts_with('<')), "{text}");
        } else {
            assert_eq!(found, ["202"; 3], "its lines tell their time: {text}");
        }
    }
    // Each line of a complaint is an entry of its own.
    let (reader, log) = rustix::pipe::pipe().unwrap();
    let about = rustix::fs::fstat(&log).unwrap();
    let disk = Disk::new();
    let mut command = logging_to(URING, &disk, log.as_fd());
    command.env("JOURNAL_STREAM", format!("{}:{}", about.st_dev, about.st_ino)).arg("--no-such-option");
    let mut daemon = Daemon::spawn(URING, command, disk.dir.path().join("disk.sock"));
    assert_eq!(daemon.wait_end(Duration::from_secs(3)).code(), Some(2));
    drop(log);
    let mut text = String::new();
    File::from(reader).read_to_string(&mut text).unwrap();
    assert!(text.lines().all(|line| line.starts_with("<3>")), "{text}");
}
