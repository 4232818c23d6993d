//! `vublk inspect`: cached pages, holes, unwritten extents, as text and as JSON.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate, fstatfs};
use serde_json::Value;

use crate::support::daemon::{Daemon, Options, URING, run};
use crate::support::disk::{Disk, pattern};
use crate::support::loopdev::LoopDevice;
use crate::support::sys::{root, skip};

const MIB: u64 = 1 << 20;

#[track_caller]
fn inspect(disk: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
    command.arg("inspect").arg(disk).args(arguments);
    let (status, stdout, stderr) = run(command);
    assert!(status.success(), "{stderr}");
    stdout
}

#[track_caller]
fn inspect_json(disk: &Path, arguments: &[&str]) -> Value {
    let text = inspect(disk, &[arguments, &["--json"]].concat());
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn file_system(file: &File) -> i64 {
    fstatfs(file).unwrap().f_type
}

/// File systems that have FIEMAP: ext4, XFS, btrfs.
fn has_fiemap(file: &File) -> bool {
    [0xef53, 0x5846_5342, 0x9123_683e].contains(&file_system(file))
}

/// 64 MiB: 2 written, 1 unwritten, else a hole; nothing in the page cache.
fn laid_out() -> (Disk, File) {
    let disk = Disk::new();
    let file = File::options().read(true).write(true).open(&disk.path).unwrap();
    if has_fiemap(&file) {
        fallocate(&file, FallocateFlags::empty(), 8 * MIB, MIB).unwrap();
    }
    file.sync_all().unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    (disk, file)
}

#[test]
fn holes_and_unwritten_extents_of_a_file() {
    let test = "inspect::holes_and_unwritten_extents_of_a_file";
    let (disk, file) = laid_out();
    if !has_fiemap(&file) || !disk.takes_direct() {
        return skip(test, "the temp folder's file system has no FIEMAP or no O_DIRECT");
    }
    let report = inspect_json(&disk.path, &[]);
    assert_eq!(report["kind"], "file", "{report}");
    assert_eq!(report["path"], disk.path.to_str().unwrap(), "{report}");
    assert_eq!(report["size"], 64 * MIB, "{report}");
    assert_eq!(report["hole_bytes"], 61 * MIB, "{report}");
    assert_eq!(report["unwritten_bytes"], MIB, "{report}");
    assert_eq!(report["shared_bytes"], 0, "{report}");
    assert!(report["extents"].as_u64().unwrap() >= 2, "{report}");
    assert_eq!(report["extents_complete"], true, "{report}");
    let text = inspect(&disk.path, &[]);
    let path = disk.path.display();
    for want in [
        "holes              63963136 bytes\n".to_owned(),
        "unwritten extents  1048576 bytes\n".to_owned(),
        "shared extents     0 bytes\n".to_owned(),
        format!("    fallocate -l 67108864 {path}\n"),
        format!("    cp -p --reflink=never --sparse=never {path} {path}.new && mv {path}.new {path}\n"),
    ] {
        assert!(text.contains(&want), "{want:?} is missing:\n{text}");
    }
    let buffered = inspect(&disk.path, &["--buffered"]);
    assert!(buffered.contains("holes              63963136 bytes\n"), "{buffered}");
    assert!(!buffered.contains("fallocate"), "{buffered}");

    // The two commands do what they are given for.
    fallocate(&file, FallocateFlags::empty(), 0, 64 * MIB).unwrap();
    let report = inspect_json(&disk.path, &[]);
    assert_eq!(
        (&report["hole_bytes"], &report["unwritten_bytes"]),
        (&0.into(), &(62 * MIB).into()),
        "{report}"
    );
    file.write_all_at(&pattern(0, 64 * MIB / 512), 0).unwrap();
    file.sync_all().unwrap();
    let report = inspect_json(&disk.path, &[]);
    assert_eq!((&report["hole_bytes"], &report["unwritten_bytes"]), (&0.into(), &0.into()), "{report}");
    let text = inspect(&disk.path, &[]);
    assert!(!text.contains("fallocate") && !text.contains("cp -p"), "{text}");
}

#[test]
fn a_cached_page_is_told_and_vublkd_drops_it() {
    let test = "inspect::a_cached_page_is_told_and_vublkd_drops_it";
    let (disk, file) = laid_out();
    if !disk.takes_direct() {
        return skip(test, "the temp folder's file system has no O_DIRECT");
    }
    let report = inspect_json(&disk.path, &[]);
    if report["cached_bytes"] != 0 {
        return skip(test, &format!("the temp folder's file system keeps the cache: {report}"));
    }
    // No readahead.
    fadvise(&file, 0, None, Advice::Random).unwrap();
    file.read_exact_at(&mut [0; 512], MIB).unwrap();
    let before = file.metadata().unwrap();
    let report = inspect_json(&disk.path, &[]);
    let cached = report["cached_bytes"].as_u64().unwrap();
    assert!((4096..MIB).contains(&cached), "{report}");
    let text = inspect(&disk.path, &[]);
    let drop_it = format!("    sync {0} && dd if={0} iflag=nocache count=0\n", disk.path.display());
    assert!(text.contains(&format!("\n{cached} bytes are in the page cache.")), "{text}");
    assert!(text.contains(&drop_it), "{text}");
    // Inspecting has changed nothing.
    assert_eq!(inspect_json(&disk.path, &[]), report);
    let times = |meta: &std::fs::Metadata| {
        (meta.atime_nsec(), meta.mtime_nsec(), meta.ctime_nsec(), meta.blocks(), meta.atime())
    };
    assert_eq!(times(&file.metadata().unwrap()), times(&before));

    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    assert_eq!(inspect_json(&disk.path, &[])["cached_bytes"], 0);
    assert!(!inspect(&disk.path, &[]).contains("are in the page cache"));
    // A backup program.
    disk.read(0, 8);
    assert_ne!(inspect_json(&disk.path, &[])["cached_bytes"], 0);
    daemon.stop();
}

#[test]
fn what_is_not_written_back_is_told() {
    let (disk, file) = laid_out();
    // The kernel may write it back before anybody looks.
    let told = (0..10).any(|n| {
        file.write_all_at(&[1; 4096], n * 4096).unwrap();
        let report = inspect_json(&disk.path, &["--buffered"]);
        // Unknown without cachestat.
        report["dirty_bytes"].as_u64().is_none_or(|bytes| bytes > 0)
    });
    assert!(told, "{}", inspect(&disk.path, &["--buffered"]));
}

#[test]
fn a_file_on_tmpfs() {
    const TMPFS: i64 = 0x0102_1994;
    let test = "inspect::a_file_on_tmpfs";
    let Ok(file) = tempfile::NamedTempFile::new_in("/dev/shm") else {
        return skip(test, "no file in /dev/shm");
    };
    if file_system(file.as_file()) != TMPFS {
        return skip(test, "/dev/shm is no tmpfs");
    }
    file.as_file().set_len(4 * MIB).unwrap();
    file.as_file().write_all_at(&vec![1; MIB as usize], MIB).unwrap();
    // O_DIRECT on tmpfs is new in Linux 6.6.
    let report = inspect_json(file.path(), &["--buffered"]);
    assert_eq!(report["hole_bytes"], 3 * MIB, "{report}");
    assert_eq!(report["cached_bytes"], MIB, "{report}");
    for unknown in ["unwritten_bytes", "shared_bytes", "extents"] {
        assert_eq!(report.get(unknown), Some(&Value::Null), "{unknown}: {report}");
    }
    let text = inspect(file.path(), &["--buffered"]);
    assert!(text.contains("holes              3145728 bytes\n"), "{text}");
    assert!(text.contains("unwritten extents  unknown\n"), "{text}");
    assert!(text.contains("extents            unknown: the file system has no FIEMAP\n"), "{text}");
    assert!(!text.contains("fallocate"), "nothing is gained by it in memory:\n{text}");
}

#[test]
fn a_block_device_has_no_extents() {
    let test = "inspect::a_block_device_has_no_extents";
    if !root(test, "a loop device") {
        return;
    }
    let disk = Disk::new();
    let device = match LoopDevice::over(&disk.path, 4096) {
        Ok(device) => device,
        Err(reason) => return skip(test, &format!("no loop device: {reason}")),
    };
    let report = inspect_json(&device.path, &[]);
    assert_eq!(report["kind"], "block device", "{report}");
    assert_eq!(report["block"], 4096, "{report}");
    for none in ["cached_bytes", "dirty_bytes", "hole_bytes", "unwritten_bytes", "shared_bytes", "extents"] {
        assert_eq!(report.get(none), Some(&Value::Null), "{none}: {report}");
    }
    let text = inspect(&device.path, &[]);
    assert!(!text.contains("extents") && !text.contains("page cache"), "{text}");
}

/// Each kind of disk that a command takes stands in its help.
#[test]
fn help_names_each_kind_of_disk() {
    let help = |command: &str| {
        let mut tool = Command::new(env!("CARGO_BIN_EXE_vublk"));
        tool.args([command, "--help"]);
        run(tool).1
    };
    let text = help("inspect");
    assert!(text.contains("nbd+unix:///EXPORT") && text.contains("rbd:POOL/IMAGE"), "{text}");
    let text = help("add");
    assert!(text.contains("at least --blk-file or --disk"), "{text}");
}
