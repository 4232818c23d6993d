//! `vublk`, the tool: loads that make no sense, that destroy, or that measure nothing; what disks do.

mod doctor;
mod edit;
mod manage;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::succession::kill_and_wait;
use crate::support::control::{Control, vublk};
use crate::support::daemon::{Daemon, Options, URING, listens};
use crate::support::device::{Device, OK, Setup, T_IN, T_OUT, T_WRITE_ZEROES, range};
use crate::support::disk::{Disk, assert_same, pattern};
use crate::support::sys::{Deadline, terminal};

/// A disk of so few blocks that a load reads again what it wrote, however slow the machine is.
const SMALL: u64 = 128 << 10;

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
    let _up = Control::of(&daemon);
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
    let _up = Control::of(&daemon);
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

/// Any back-end is driven: this one takes its memory by SET_MEM_TABLE alone, as SPDK's and many others do.
#[test]
fn a_load_on_a_back_end_of_another() {
    let disk = Disk::of_size(SMALL);
    let program = Path::new(env!("CARGO_BIN_EXE_vublk")).with_file_name("examples").join("stock");
    if !program.exists() {
        // Only some tests are run, and nothing has built it.
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--locked", "--example=stock"]);
        build.args((!cfg!(debug_assertions)).then_some("--release"));
        assert!(build.status().unwrap().success());
    }
    let socket = disk.dir.path().join("stock.sock");
    let mut stock = Command::new(program).arg(&socket).arg(&disk.path).arg("2").spawn().unwrap();
    Deadline::new("the stock back-end").until_slowly(|| listens(stock.id(), &socket).then_some(()));
    let load = |more: &[&str]| {
        let words = ["bench", socket.to_str().unwrap(), "--runtime=0.1", "--qd=4"];
        vublk(&[&words, more].concat())
    };
    // A slow machine may not come to read again what it wrote.
    Deadline::new("blocks that were verified").until_slowly(|| {
        let (status, stdout, stderr) = load(&["--rw=randrw", "--verify", "--destroy-data", "--queues=2"]);
        assert!(status.success(), "{stderr}");
        stdout.contains("verified").then_some(())
    });
    let (status, _, stderr) = load(&["--queues=3"]);
    assert!(status.code() == Some(1) && stderr.contains("has 2 queues"), "{stderr}");
    stock.kill().unwrap();
    stock.wait().unwrap();
    let (status, _, stderr) = load(&[]);
    assert!(status.code() == Some(1) && stderr.contains("Use the socket on which"), "{stderr}");
}

/// A load in huge pages runs, or says what is missing: nothing dies of a page that is not there.
#[test]
fn a_load_in_huge_pages() {
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    let load = ["bench", daemon.socket.to_str().unwrap(), "--runtime=0.1", "--bs=4k", "--huge-pages"];
    let (status, stdout, stderr) = vublk(&load);
    match status.code() {
        Some(0) => assert!(stdout.contains("IOPS"), "{stdout}"),
        code => assert!(code == Some(1) && stderr.contains("vm.nr_hugepages"), "{status}: {stderr}"),
    }
    daemon.wait_log("disconnected");
}

/// A load has an in-flight region, as a guest has, and goes on over a crash; where there is no successor it ends at once.
#[test]
fn a_load_on_a_back_end_that_dies() {
    let disk = Disk::of_size(SMALL);
    let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--supervise"]));
    let load = |runtime: &str, socket: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
        command.arg("bench").arg(socket).args(["--rw=randrw", "--verify", "--destroy-data", "--json"]);
        command.args(["--qd=4", "--interval=0.01", runtime]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        lines.nth(10).expect("an interval").unwrap(); // it runs
        (child, lines)
    };
    let (child, lines) = load("--runtime=1", &daemon.socket);
    kill_and_wait(&daemon);
    let lines: Vec<_> = lines.map(Result::unwrap).collect();
    let said = child.wait_with_output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let report: serde_json::Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    assert!(report["verified"].as_u64() > Some(0), "{report}");
    daemon.wait_log("took over from a vublkd that died");
    daemon.stop();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    let (child, lines) = load("--runtime=50", &daemon.socket);
    daemon.child.kill().unwrap();
    lines.for_each(|line| drop(line.unwrap()));
    let said = child.wait_with_output().unwrap();
    let why = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.status.code() == Some(1) && why.contains("closed the connection"), "{why}");
}

/// A load that has to wait for a VM says so, and goes on when that has left. A name will do as a socket.
#[test]
fn a_load_that_waits() {
    let disk = Disk::new();
    let name = format!("waits-{}", std::process::id());
    let mut daemon = Daemon::start_at(URING, &disk, &format!("{name}.sock"), &Options::default());
    daemon.wait_listening();
    drop(Control::of(&daemon));
    let device = Device::plain(&daemon);
    let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
    command.args(["bench", &name, "--runtime=0.1", "--json"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = said.next().expect("a line").unwrap();
    let (socket, pid) = (daemon.socket.display(), std::process::id());
    assert!(line.starts_with(&format!("vublk: {socket}: waits until process {pid}")), "{line}");
    assert!(line.contains("stop its VM") && line.contains(&format!("vublk stat {name} 1")), "{line}");
    drop(device);
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success() && said.next().is_none(), "{done:?}");
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert!(report["requests"].as_u64() > Some(0), "{report}");
}

/// Reading what was never written reads no disk, and the figures say so.
#[test]
fn a_load_on_holes() {
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    let _up = Control::of(&daemon);
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

/// A row of `vublk stat` by the names of its columns.
#[track_caller]
fn row(text: &str, disk: &str) -> std::collections::BTreeMap<String, f64> {
    let head = text.lines().find(|line| line.starts_with("Disk")).expect(text);
    let line = text.lines().rfind(|line| line.split_whitespace().next() == Some(disk)).expect(text);
    let values = line.split_whitespace().skip(1).map(|word| word.parse().unwrap());
    head.split_whitespace().skip(1).map(str::to_owned).zip(values).collect()
}

/// What a disk did, since it is served and in an interval, as a table and as JSON, of a disk and of its queues.
#[test]
fn what_disks_do() {
    let disk = Disk::new();
    let daemon = Daemon::start(URING, &disk, &Options::default());
    let mut device = Device::new(&daemon, Setup { queues: 2, ..Setup::default() });
    for at in 0..20 {
        assert_eq!(device.run(0, T_IN, at * 8, &[], 8192).status, OK);
    }
    assert_eq!(device.run(1, T_OUT, 0, &[1; 4096], 0).status, OK);
    assert_eq!(device.run(1, T_WRITE_ZEROES, 0, &range(64, 24, 0), 0).status, OK);
    let place = daemon.socket.to_str().unwrap();
    let (status, text, complained) = vublk(&["stat", place]);
    assert!(status.success(), "{complained}");
    let all = row(&text, "disk");
    assert_eq!(
        (all["rareq-sz"], all["wareq-sz"], all["inflight"], all["errors"]),
        (8.0, 8.0, 0.0, 0.0),
        "{text}"
    );
    assert!(all["r/s"] > 0.0 && all["r/s"] > all["w/s"] && all["rkB/s"] > 0.0, "{text}");
    assert!(0.0 < all["r_p50"] && all["r_p50"] <= all["r_p99"], "{text}");
    assert!(0.0 < all["r_await"] && 0.0 < all["aqu-sz"], "{text}");
    let (_, text, _) = vublk(&["stat", "--queues", place]);
    assert_eq!((row(&text, "disk/0")["w/s"], row(&text, "disk/1")["r/s"]), (0.0, 0.0), "{text}");
    // An interval in which nothing is done.
    let (_, text, _) = vublk(&["stat", place, "0.05", "3"]);
    assert_eq!(text.matches("Disk ").count(), 3, "{text}");
    assert_eq!((row(&text, "disk")["r/s"], row(&text, "disk")["r_p99"]), (0.0, 0.0), "{text}");
    let (_, text, _) = vublk(&["stat", "--json", place, "0.05", "2"]);
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let requests = |line: &serde_json::Value| line["disks"][0]["operations"]["read"]["requests"].as_u64();
    assert_eq!(lines.iter().map(requests).collect::<Vec<_>>(), [Some(20), Some(0)], "{text}");
    assert_eq!(lines[0]["disks"][0]["operations"]["zeroes"]["bytes"], serde_json::json!(24 * 512));
    for (words, code) in [
        (&["stat", place, "0"][..], 2),
        (&["stat", place, "1", "0"], 2),
        (&["stat", place, "1", "1.5"], 2),
        (&["stat", "/nowhere/at/all"], 1),
        (&["stat", "no-disk-is-called-so"], 1),
    ] {
        let (status, _, complained) = vublk(words);
        assert_eq!(status.code(), Some(code), "{words:?}: {complained}");
    }
}

/// Daemons are found by what they were started with, and commands take the names that are shown.
#[test]
fn daemons_of_this_host() {
    let disk = Disk::new();
    let name = format!("found-{}", std::process::id());
    let serial = format!("s{}", std::process::id());
    let option = format!("--serial={serial}");
    let mut daemon = Daemon::start_at(URING, &disk, &format!("{name}.sock"), &Options::with(&[&option]));
    daemon.wait_listening();
    daemon.wait_log("serving");
    let device = Device::plain(&daemon);
    let (status, text, complained) = vublk(&["list"]);
    assert!(status.success(), "{complained}");
    let line = text.lines().find(|line| line.starts_with(&name)).expect(&text);
    let words: Vec<&str> = line.split_whitespace().collect();
    let (pid, own) = (daemon.pid().to_string(), std::process::id().to_string());
    let path = disk.path.display().to_string();
    assert_eq!(words, [name.as_str(), &serial, &pid, &own, "67108864", &path], "{text}");
    let (_, text, _) = vublk(&["list", "--json"]);
    let all: serde_json::Value = serde_json::from_str(&text).unwrap();
    let one = all.as_array().unwrap().iter().find(|one| one["name"] == name.as_str()).expect(&text);
    assert_eq!((&one["serial"], &one["size"]), (&serde_json::json!(serial), &serde_json::json!(64 << 20)));
    let (_, text, complained) = vublk(&["inspect", &name]);
    assert!(text.contains(&path), "{text}{complained}");
    for word in [&name, &serial] {
        let (status, text, complained) = vublk(&["status", word]);
        assert!(status.success() && text.contains(&path), "{word}: {text}{complained}");
        // A folder of the same name, as in /var/lib/vublk, is not meant.
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(word)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
        command.args(["status", word]).current_dir(folder.path());
        assert!(command.output().unwrap().status.success(), "{word}: a folder was taken for it");
        let (status, text, complained) = vublk(&["stat", word]);
        assert!(status.success() && row(&text, &name)["r/s"] == 0.0, "{word}: {text}{complained}");
    }
    let (_, text, _) = vublk(&["stat"]);
    row(&text, &name);
    drop(device);
    daemon.stop();
    let (_, text, _) = vublk(&["list"]);
    assert!(!text.contains(&name), "{text}");
}
