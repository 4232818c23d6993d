//! Sectors that fail: below a disk that qemu-storage-daemon exports with its blkdebug filter, or a gate's.
//!
//! Through qemu-storage-daemon goes one request at a time: its FUSE export of QEMU 10.0 mixes up the data of writes that
//! come together.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{counter, serve, status, wait_held};
use crate::durability::stage::{Stage, Store};
use crate::session::each_engine;
use crate::support::device::{Device, IOERR, OK, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, range};
use crate::support::disk::{SECTOR, assert_same, pattern, salted};
use crate::support::sys::{Deadline, installed, program, root};

const SECTORS: u64 = 2048;

/// The export. It ends with its process, which unmounts it.
struct Blkdebug {
    folder: TempDir,
    process: Child,
}

impl Blkdebug {
    /// A patterned disk with these rules (blkdebug's words), or the test is left out.
    fn new(test: &str, rules: &str) -> Option<Self> {
        if !root(test, "a FUSE export") || !installed("qemu-storage-daemon", test) {
            return None;
        }
        let folder = tempfile::Builder::new().prefix("vublk-").tempdir().unwrap();
        let (image, mount) = (folder.path().join("image"), folder.path().join("disk.raw"));
        std::fs::write(&image, pattern(0, SECTORS)).unwrap();
        std::fs::write(&mount, []).unwrap();
        let mut command = program("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=file,filename={}", image.display()))
            .arg("--blockdev")
            .arg(format!("driver=blkdebug,node-name=bad,image=file,{rules}"))
            .arg("--export")
            .arg(format!("type=fuse,id=disk,node-name=bad,mountpoint={},writable=on", mount.display()))
            .stdin(Stdio::null());
        // SAFETY: the closure makes one system call, which is allowed between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // It unmounts what it has exported.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
                Ok(())
            });
        }
        let process = command.spawn().unwrap();
        let export = Self { folder, process };
        Deadline::new("the FUSE export").until_slowly(|| {
            (std::fs::metadata(export.disk()).ok()?.len() == SECTORS * SECTOR as u64).then_some(())
        });
        Some(export)
    }

    fn disk(&self) -> PathBuf {
        self.folder.path().join("disk.raw")
    }
}

impl Drop for Blkdebug {
    fn drop(&mut self) {
        let _gone = kill_process(Pid::from_child(&self.process), Signal::TERM);
        let _status = self.process.wait();
    }
}

/// A rule of blkdebug: operations of this kind that touch the sector fail.
fn rule(number: u32, iotype: &str, errno: i32, sector: u64, once: bool) -> String {
    let once = if once { "on" } else { "off" };
    format!(
        "inject-error.{number}.event=none,inject-error.{number}.iotype={iotype},inject-error.{number}.errno={errno},\
         inject-error.{number}.sector={sector},inject-error.{number}.once={once}"
    )
}

/// Many requests at once, neighbours among them, which become one operation: those that touch the bad sector fail, the
/// others do not.
#[test]
fn the_request_with_the_bad_sector_fails_and_no_other() {
    let test = "broken::errors::the_request_with_the_bad_sector_fails_and_no_other";
    const BAD: u64 = 100;
    each_engine(|engine| {
        let Some(stage) = Stage::new(test, Store::File) else { return };
        let at = BAD as usize * SECTOR;
        stage.gate.fail(at..at + SECTOR, libc::EIO);
        let daemon = stage.start(engine, &["--on-error=report"]);
        let mut device = Device::plain(&daemon);
        for kind in [T_OUT, T_IN] {
            let errors = counter(&daemon, "errors");
            let mut pending = Vec::new();
            for sector in (64..160).step_by(8) {
                let data = if kind == T_OUT { salted(1, sector, 8) } else { Vec::new() };
                let back = if kind == T_IN { 8 * SECTOR } else { 0 };
                let (segs, mut request) = device.place(kind, sector, &data, back);
                request.head = device.rings[0].chain(&segs);
                device.rings[0].stage(request.head);
                pending.push((request, sector));
            }
            device.rings[0].publish();
            device.rings[0].kick.signal();
            for _ in 0..pending.len() {
                let used = device.rings[0].wait_used("one of many");
                let (request, sector) = pending.iter().find(|(p, _)| p.head == used.head).unwrap();
                let done = device.outcome(request, used);
                let bad = (*sector..sector + 8).contains(&BAD);
                assert_eq!(done.status, if bad { IOERR } else { OK }, "type {kind} at sector {sector}");
                if kind == T_IN && !bad {
                    assert_same(&done.data, &salted(1, *sector, 8), "a neighbour");
                }
            }
            assert_eq!(counter(&daemon, "errors"), errors + 1);
        }
        assert!(counter(&daemon, "merged") > 0);
        let told = daemon.wait_log("failed at byte");
        assert!(
            told.contains("Input/output error") && told.contains("the guest gets an I/O error"),
            "{told}"
        );
        assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK, "a write that failed is no failed sync");
        assert_same(&stage.durable(BAD / 8), &pattern(BAD / 8 * 8, 8), "what failed");
    });
}

/// What failed once and was reported goes well when the guest asks again.
#[test]
fn an_error_that_does_not_come_again() {
    let test = "broken::errors::an_error_that_does_not_come_again";
    each_engine(|engine| {
        let rules = [rule(0, "read", libc::EIO, 1608, true), rule(1, "write", libc::EIO, 16, true)].join(",");
        let Some(export) = Blkdebug::new(test, &rules) else { return };
        let (_folder, daemon) = serve(engine, &export.disk(), &[]);
        let mut device = Device::plain(&daemon);
        assert_eq!(device.status(T_IN, 1608, &[], 8 * SECTOR), IOERR);
        assert_same(&device.read(1608, 8), &pattern(1608, 8), "after the error");
        assert_eq!(device.status(T_OUT, 16, &salted(2, 16, 8), 0), IOERR);
        device.write(16, &salted(2, 16, 8));
        assert_same(&device.read(16, 8), &salted(2, 16, 8), "after the error");
        assert_eq!(counter(&daemon, "errors"), 2);
    });
}

/// No room, once: the write is held and done a second later, and the guest sees nothing.
#[test]
fn no_room_for_a_moment() {
    let test = "broken::errors::no_room_for_a_moment";
    each_engine(|engine| {
        let Some(export) = Blkdebug::new(test, &rule(0, "write", libc::ENOSPC, 16, true)) else { return };
        let (_folder, daemon) = serve(engine, &export.disk(), &[]);
        let mut device = Device::plain(&daemon);
        device.write(16, &salted(2, 16, 8));
        assert_same(&device.read(16, 8), &salted(2, 16, 8), "a write that was held");
        assert_eq!((counter(&daemon, "errors"), counter(&daemon, "held")), (0, 1));
    });
}

/// No room, for good: held with the default, reported with `report`; a read is reported with either.
#[test]
fn no_room_for_good() {
    let test = "broken::errors::no_room_for_good";
    let rules =
        [rule(0, "write", libc::ENOSPC, 16, false), rule(1, "read", libc::ENOSPC, 32, false)].join(",");
    let Some(export) = Blkdebug::new(test, &rules) else { return };
    for (choice, holds) in [("enospc", true), ("report", false)] {
        let (_folder, daemon) =
            serve(crate::support::daemon::URING, &export.disk(), &[&format!("--on-error={choice}")]);
        let mut device = Device::plain(&daemon);
        assert_eq!(device.status(T_IN, 32, &[], SECTOR), IOERR, "{choice}");
        assert_eq!(device.status(T_WRITE_ZEROES, 0, &range(40, 8, 0), 0), OK);
        if holds {
            device.submit(0, T_OUT, 16, &salted(2, 16, 8), 0);
            let held = wait_held(&daemon, 1);
            assert_eq!(held["requests"], 1);
        } else {
            assert_eq!(device.status(T_OUT, 16, &salted(2, 16, 8), 0), IOERR);
            assert!(status(&daemon)["disk"].get("held").is_none());
        }
    }
}

/// A flush that fails below is never OK again.
#[test]
fn a_flush_that_fails() {
    let test = "broken::errors::a_flush_that_fails";
    each_engine(|engine| {
        let rules = "inject-error.0.event=none,inject-error.0.iotype=flush,inject-error.0.errno=5,inject-error.0.once=on";
        let Some(export) = Blkdebug::new(test, rules) else { return };
        let (_folder, daemon) = serve(engine, &export.disk(), &[]);
        let mut device = Device::plain(&daemon);
        device.write(16, &salted(2, 16, 8));
        let failed = (0..3).map(|_| device.status(T_FLUSH, 0, &[], 0)).collect::<Vec<_>>();
        assert_eq!(failed, [IOERR; 3]);
        assert_eq!(status(&daemon)["disk"]["sync_failed"], true);
    });
}
