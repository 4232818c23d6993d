//! `vublk`, the tool: loads that make no sense, that destroy, or that measure nothing.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use crate::support::control::vublk;
use crate::support::daemon::{Daemon, Options, URING};
use crate::support::disk::{Disk, assert_same, pattern};
use crate::support::sys::terminal;

#[test]
fn a_runtime_that_is_no_time() {
    refuses(&["-1", "-0.001", "nan", "inf", "-inf", "1e300"]);
}

/// A Duration holds it, a clock does not.
#[test]
fn a_runtime_that_no_clock_reaches() {
    refuses(&["1e19", "1.8e19"]);
}

#[track_caller]
fn refuses(runtimes: &[&str]) {
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    for runtime in runtimes {
        let option = format!("--runtime={runtime}");
        let (status, stdout, stderr) = vublk(&["bench", daemon.socket.to_str().unwrap(), &option]);
        assert_eq!(status.code(), Some(2), "{option}: {stderr}");
        assert_eq!(stdout, "", "{option} printed a figure");
        assert!(stderr.contains("--runtime"), "{option}: {stderr}");
        assert!(!stderr.contains("panicked"), "{option}: {stderr}");
    }
}

/// A load that writes needs a word that says so, and names the disk until it has it.
#[test]
fn a_load_that_overwrites_the_disk() {
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    let socket = daemon.socket.to_str().unwrap();
    daemon.wait_log("serving");
    for rw in ["write", "randwrite", "randrw"] {
        let option = format!("--rw={rw}");
        let load = ["bench", socket, &option, "--runtime=0.1", "--bs=4k"];
        let (status, stdout, stderr) = vublk(&load);
        assert_eq!((status.code(), stdout.as_str()), (Some(2), ""), "{rw}: {stderr}");
        assert!(
            stderr.contains("--destroy-data") && stderr.contains(disk.path.to_str().unwrap()),
            "{stderr}"
        );
        assert_same(&disk.read(0, 64), &pattern(0, 64), rw);
    }
    for rw in ["write", "randwrite", "randrw"] {
        let option = format!("--rw={rw}");
        let load =
            ["bench", socket, &option, "--runtime=0.1", "--bs=4KiB", "--destroy-data", "--verify", "--json"];
        let (status, stdout, stderr) = vublk(&load);
        assert!(status.success(), "{rw}: {stderr}");
        let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!(report["bs"], 4096, "{stdout}");
    }
    assert_ne!(disk.read(0, 64), pattern(0, 64), "nothing was written");
}

/// At a terminal it is asked, with the path of the disk.
#[test]
fn a_load_that_is_confirmed_at_a_terminal() {
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    daemon.wait_log("serving");
    for (answer, code) in [("no\n", 2), ("\n", 2), ("yes\n", 0)] {
        let (mut person, end) = terminal();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
        command.arg("bench").arg(&daemon.socket).args(["--rw=write", "--runtime=0.1", "--json"]);
        command.stdin(end.try_clone().unwrap()).stdout(Stdio::null()).stderr(end);
        let mut child = command.spawn().unwrap();
        drop(command);
        person.write_all(answer.as_bytes()).unwrap();
        let mut said = Vec::new();
        // It ends with an error when the last program has closed its end.
        let _hung_up = person.read_to_end(&mut said);
        let said = String::from_utf8_lossy(&said);
        assert_eq!(child.wait().unwrap().code(), Some(code), "{answer:?}: {said}");
        assert!(
            said.contains(disk.path.to_str().unwrap()) && said.contains("Type yes"),
            "{answer:?}: {said}"
        );
        assert_eq!(disk.read(0, 64) == pattern(0, 64), code != 0, "{answer:?}");
    }
}

/// Reading what was never written reads no disk, and the figures say so.
#[test]
fn a_load_on_holes() {
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    daemon.wait_log("serving");
    let socket = daemon.socket.to_str().unwrap();
    let load = ["bench", socket, "--runtime=0.1", "--bs=16k"];
    let (status, stdout, stderr) = vublk(&load);
    assert!(status.success(), "{stderr}");
    let note = stdout.lines().find(|line| line.starts_with("note: ")).expect(&stdout);
    assert!(note.contains("holes") && note.contains(disk.path.to_str().unwrap()), "{note}");
    // A back-end without a control socket beside it: what was read tells.
    std::fs::remove_file(format!("{socket}.control")).unwrap();
    let (_, stdout, _) = vublk(&load);
    let note = stdout.lines().find(|line| line.starts_with("note: ")).expect(&stdout);
    assert!(note.contains("zeroes"), "{note}");
    // A whole disk needs no note.
    let mut file = std::fs::File::options().write(true).open(&disk.path).unwrap();
    file.write_all(&vec![7; 64 << 20]).unwrap();
    file.sync_all().unwrap();
    let (_, stdout, _) = vublk(&load);
    assert!(!stdout.contains("note: "), "{stdout}");
}
