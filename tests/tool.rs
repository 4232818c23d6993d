//! `vublk`, the tool beside the daemon: what it says to numbers that are none.

use std::process::Command;

use crate::support::daemon::{Daemon, Options, URING, run};
use crate::support::disk::Disk;

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
        let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
        command.arg("bench").arg(&daemon.socket).arg(format!("--runtime={runtime}"));
        let (status, stdout, stderr) = run(command);
        assert_eq!(status.code(), Some(1), "--runtime={runtime}: {stderr}");
        assert_eq!(stdout, "", "--runtime={runtime} printed a figure");
        assert!(stderr.contains("--runtime"), "--runtime={runtime}: {stderr}");
        assert!(!stderr.contains("panicked"), "--runtime={runtime}: {stderr}");
    }
}
