//! `vublk resize`, `log-level`, and what commands tell with `--json`.

use serde_json::{Value, json};

use crate::support::control::{self, Control, vublk};
use crate::support::daemon::{Daemon, Options, URING};
use crate::support::device::Device;
use crate::support::disk::Disk;

const MIB: u64 = 1 << 20;

/// Its control socket, once that is there.
pub fn at(daemon: &Daemon) -> String {
    drop(Control::of(daemon));
    control::path(daemon).to_str().unwrap().to_owned()
}

fn len(disk: &Disk) -> u64 {
    disk.path.metadata().unwrap().len()
}

#[track_caller]
pub fn run(words: &[&str]) -> String {
    let (status, said, complained) = vublk(words);
    assert!(status.success() && complained.is_empty(), "vublk {words:?}: {said}{complained}");
    said
}

#[track_caller]
pub fn told(words: &[&str]) -> Value {
    let said = run(&[words, &["--json"]].concat());
    serde_json::from_str(&said).unwrap_or_else(|e| panic!("vublk {words:?}: {e}: {said}"))
}

/// With --json as without it: the reason is text on standard error, and nothing is on standard output.
#[track_caller]
pub fn fails(words: &[&str], code: i32, why: &str) {
    for json in [&[][..], &["--json"]] {
        let (status, said, complained) = vublk(&[words, json].concat());
        assert_eq!((status.code(), said.as_str()), (Some(code), ""), "vublk {words:?}: {complained}");
        assert!(complained.contains(why), "vublk {words:?}: {complained}");
    }
}

#[test]
fn a_disk_grows_by_so_much() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    let (size, at) = (len(&disk), at(&daemon));
    assert_eq!(told(&["resize", &at, "+1M"]), json!({"size": size + MIB, "told": "later"}));
    assert!(run(&["resize", &at, "+1M"]).starts_with(&format!("{} bytes: no guest uses it", size + 2 * MIB)));
    assert_eq!(len(&disk), size + 2 * MIB);
    for (typed, code, why) in [
        ("-1M", 2, "a disk only grows"),
        ("+", 2, "such as +1G"),
        ("++1M", 2, "such as +1G"),
        ("+-1M", 2, "such as +1G"),
        ("+1X", 2, "powers of 1024"),
        ("+1", 1, "not a multiple of 512"),
        ("+8191P", 1, "smaller size"),
        ("1M", 1, "a disk only grows"),
    ] {
        fails(&["resize", &at, typed], code, why);
        assert_eq!(len(&disk), size + 2 * MIB, "{typed}");
    }
    // Firecracker has no channel on which it could be told.
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let said = run(&["resize", &at, "+1M"]);
    assert!(said.contains("Firecracker") && said.contains("PATCH /drives/ID"), "{said}");
    drop(device);
    daemon.stop();
}

/// The level counts at once, for threads that run already, and until an upgrade.
#[test]
fn another_log_level() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--supervise"]));
    let at = at(&daemon);
    let level = || told(&["status", &at])["log_level"].clone();
    let connected = || daemon.log().matches("a front-end connected").count();
    let device = || Device::plain(&daemon).assert_serves(0);
    assert_eq!(level(), "debug");
    device();
    daemon.wait_log("a front-end connected");
    assert!(run(&["log-level", &at, "error"]).contains("until the daemon ends"));
    assert_eq!(level(), "error");
    let before = daemon.log();
    device();
    control::settle(&daemon);
    assert_eq!(daemon.log(), before);
    assert_eq!(told(&["log-level", &at, "info"]), json!({"log_level": "info"}));
    device();
    control::settle(&daemon);
    assert_eq!(connected(), 2, "{}", daemon.log());
    let since = daemon.log().split_off(before.len());
    assert!(!since.contains("DEBUG"), "{since}");
    let mut control = Control::of(&daemon);
    assert_eq!(control.call("log-level", json!({})), Ok(json!({"log_level": "info"})));
    assert_eq!(control.call("log-level", json!({"level": "loud"})).unwrap_err().0, -32602);
    fails(&["log-level", &at, "loud"], 2, "possible values");
    run(&["upgrade", &at]);
    assert_eq!(level(), "debug");
    daemon.stop();
}

/// What commands print for programs, and their exit codes.
#[test]
fn answers_for_programs() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--supervise"]));
    let at = at(&daemon);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    assert_eq!(told(&["retry", &at]), Value::Null);
    let pause = told(&["pause", &at, "--time=20"]);
    assert!(pause["pause"].is_u64() && pause["seconds"] == 20, "{pause}");
    fails(&["pause", &at], 1, "paused already");
    assert!(told(&["resume", &at])["waited_ms"].is_number());
    fails(&["resume", &at], 1, "not paused");
    let before = told(&["status", &at])["pid"].clone();
    let by = told(&["upgrade", &at]);
    assert_eq!(
        (&by["version"], &by["program"]),
        (&json!(env!("CARGO_PKG_VERSION")), &told(&["status", &at])["program"])
    );
    assert!(by["waited_ms"].is_number() && by["pid"].is_u64() && by["pid"] != before, "{by}");
    device.assert_serves(0);
    fails(&["snapshot", &at, disk.path.to_str().unwrap()], 1, "File exists");
    drop(device);
    daemon.stop();
    for words in
        [&["resize"][..], &["retry"], &["upgrade"], &["pause"], &["resume"], &["status"], &["changed"]]
    {
        fails(&[words, &[&at]].concat(), 1, "no vublkd can be reached there");
        fails(&[words, &[&at, "--loud"]].concat(), 2, "--loud");
    }
    fails(&["log-level", &at, "info"], 1, "no vublkd can be reached there");
}
