//! Several disks in one process: `vublkd --config`.

use std::fmt::Write;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;

use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::succession::{daemon_of, replayed};
use crate::support::control::{self, Control, vublk};
use crate::support::daemon::{Daemon, URING, bare_vublkd};
use crate::support::device::{Device, Setup, T_OUT, negotiate, start_ring};
use crate::support::disk::{Disk, SECTOR};
use crate::support::frontend::Frontend;
use crate::support::gate::Gate;
use crate::support::load::{Load, empty_disk};
use crate::support::memory::Memory;
use crate::support::ring::Ring;
use crate::support::sys::{Deadline, PATIENCE, register_tally};

/// A folder with a file of several disks, and the daemon that serves them.
pub struct Vm {
    pub daemon: Daemon,
    pub folder: TempDir,
    pub disks: Vec<(String, Disk)>,
}

fn text(folder: &TempDir, disks: &[(String, PathBuf)], process: &str) -> String {
    let mut text = format!("{process}\ncontrol = \"{}/d0.sock.control\"\n", folder.path().display());
    for (name, image) in disks {
        let socket = folder.path().join(format!("{name}.sock"));
        write!(
            text,
            "\n[[disk]]\nname = \"{name}\"\nblk-file = \"{}\"\nsocket-path = \"{}\"\nnum-queues = 4\n",
            image.display(),
            socket.display()
        )
        .unwrap();
    }
    text
}

fn named(disks: &[(String, Disk)]) -> Vec<(String, PathBuf)> {
    disks.iter().map(|(name, disk)| (name.clone(), disk.path.clone())).collect()
}

impl Vm {
    pub fn start(count: usize, process: &str) -> Self {
        let disks: Vec<_> = (0..count).map(|at| (format!("d{at}"), empty_disk())).collect();
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("vm.toml"), text(&folder, &named(&disks), process)).unwrap();
        let daemon = Self::daemon(&folder, &[]);
        let mut vm = Self { daemon, folder, disks };
        (0..count).for_each(|at| vm.wait_served(at));
        vm
    }

    pub fn daemon(folder: &TempDir, extra: &[&str]) -> Daemon {
        let mut command = bare_vublkd();
        command.arg(format!("--config={}/vm.toml", folder.path().display())).arg("--log-level=debug");
        command.args(extra);
        Daemon::spawn(URING, command, folder.path().join("d0.sock"))
    }

    pub fn file(&self) -> PathBuf {
        self.folder.path().join("vm.toml")
    }

    fn write(&self, disks: &[(String, PathBuf)]) {
        fs::write(self.file(), text(&self.folder, disks, "")).unwrap();
    }

    #[track_caller]
    fn wait_served(&mut self, at: usize) {
        let name = &self.disks[at].0;
        self.daemon.wait_log(&format!("{name}: serving "));
        self.daemon.assert_alive();
    }

    pub fn connect(&self, name: &str) -> Frontend {
        let socket = self.folder.path().join(format!("{name}.sock"));
        Frontend::new(Deadline::new("to connect").until_slowly(|| UnixStream::connect(&socket).ok()))
    }

    fn device(&self, at: usize, queues: u32) -> Device {
        Device::over(self.connect(&self.disks[at].0), Setup { queues, ..Setup::default() })
    }

    /// A ring of this disk and a load for it.
    pub fn attach(&self, at: usize) -> (Frontend, Ring, Load) {
        let memory = Memory::plain();
        let ring = Ring::new(Rc::clone(&memory), 256, 0, true);
        let load = Load::new(&memory, 77 + at as u64);
        let mut frontend = self.connect(&self.disks[at].0);
        negotiate(&mut frontend, 0);
        frontend.set_mem_table(&memory);
        start_ring(&frontend, 0, &ring);
        self.settle(at);
        (frontend, ring, load)
    }

    /// The disk's control thread is between two messages.
    fn settle(&self, at: usize) {
        Control::of(&self.daemon).call("resize", json!({"disk": self.disks[at].0})).unwrap();
    }

    pub fn states(&self) -> Vec<(String, String)> {
        let status = Control::of(&self.daemon).call("status", Value::Null).unwrap();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let disks = status["disks"].as_array().expect("disks").iter();
        disks.map(|disk| (text(&disk["name"]), text(&disk["state"]))).collect()
    }

    /// A daemon serves them all, after the end of another.
    #[track_caller]
    pub fn wait_all_served(&self) {
        let path = control::path(&self.daemon);
        Deadline::new("all disks to be served").until_slowly(|| {
            let (status, said, _) = vublk(&["status", "--json", path.to_str().unwrap()]);
            (status.success() && said.matches("\"serving\"").count() == self.disks.len()).then_some(())
        });
    }

    #[track_caller]
    fn upgrade(&self) {
        let (status, said, complained) = vublk(&["upgrade", control::path(&self.daemon).to_str().unwrap()]);
        assert!(status.success(), "{said}{complained}{}", self.daemon.log());
    }
}

/// 24 disks with four queues each, all at work, the daemon killed and upgraded meanwhile: each disk has what its guest
/// wrote, and no front-end connects again.
#[test]
fn twenty_four_with_four_queues() {
    register_tally();
    let mut vm = Vm::start(24, "");
    let mut devices: Vec<Device> = (0..24).map(|at| vm.device(at, 4)).collect();
    let mut loads: Vec<Load> = Vec::new();
    for (at, device) in devices.iter().enumerate() {
        loads.push(Load::new(&device.memory, at as u64));
        vm.settle(at);
    }
    let served = vm.states();
    assert!(served.len() == 24 && served.iter().all(|(_, state)| state == "serving"), "{served:?}");
    for round in 0..6 {
        for (device, load) in devices.iter_mut().zip(&mut loads) {
            load.offer(&mut device.rings[round % 4]);
        }
        if round % 2 == 0 {
            let victim = daemon_of(&vm.daemon);
            kill_process(victim, Signal::KILL).unwrap();
            vm.wait_all_served();
        } else {
            vm.upgrade();
        }
        for (device, load) in devices.iter_mut().zip(&mut loads) {
            load.drain(&mut device.rings[round % 4]);
        }
    }
    let found = replayed(&vm.daemon.log());
    eprintln!(
        "24 disks with 4 queues each: 3 kills, 3 upgrades, {} requests were found in flight",
        found.iter().sum::<u64>()
    );
    assert!(!found.is_empty(), "no kill has hit");
    drop(devices);
    vm.daemon.stop();
    loads.iter().zip(&vm.disks).for_each(|(load, (_, disk))| load.verify(disk));
    let left: Vec<_> =
        fs::read_dir(vm.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains(".sock") && !name.to_string_lossy().ends_with(".log")), "{left:?}");
}

/// The file is read anew by an upgrade: a disk more, a disk less; the others notice a pause.
#[test]
fn disks_that_come_and_go() {
    let mut vm = Vm::start(2, "");
    let (_stays, mut ring, mut load) = vm.attach(0);
    let goes = vm.device(1, 1);
    vm.settle(1);
    let more = empty_disk();
    let stays = vm.disks[0].1.path.clone();
    vm.write(&[("d0".into(), stays), ("d2".into(), more.path.clone())]);
    load.offer(&mut ring);
    vm.upgrade();
    load.drain(&mut ring);
    load.offer(&mut ring);
    load.drain(&mut ring);
    assert_eq!(
        vm.states(),
        [("d0", "serving"), ("d2", "serving")].map(|(n, s)| (n.to_owned(), s.to_owned()))
    );
    vm.daemon.wait_log("disk d1 is not in the file of --config any more");
    goes.frontend.wait_hangup("its disk is not in the file any more");
    vm.disks.push(("d2".into(), more));
    let mut device = vm.device(2, 1);
    device.write(8, &[7; SECTOR]);
    drop(device);
    vm.daemon.stop();
    assert_eq!(vm.disks[2].1.read(8, 1), [7; SECTOR]);
    load.verify(&vm.disks[0].1);
}

/// What is written into the file while a daemon serves counts from the next upgrade on, not after a crash; and a file
/// that makes no sense never.
#[test]
fn a_file_that_is_being_edited() {
    let mut vm = Vm::start(2, "");
    let (_frontend, mut ring, mut load) = vm.attach(1);
    let both = vec![("d0".to_owned(), "serving".to_owned()), ("d1".to_owned(), "serving".to_owned())];
    for (written, crash) in [(Some("[[disk]"), true), (Some("[[disk]"), false), (None, true)] {
        match written {
            Some(text) => fs::write(vm.file(), text).unwrap(),
            // Makes sense, and is not meant yet.
            None => vm.write(&named(&vm.disks[..1])),
        }
        load.offer(&mut ring);
        if crash {
            kill_process(daemon_of(&vm.daemon), Signal::KILL).unwrap();
            vm.wait_all_served();
        } else {
            vm.upgrade();
            vm.daemon.wait_log("The disks that were served are served as before");
        }
        load.drain(&mut ring);
        assert_eq!(vm.states(), both, "{written:?}, crash: {crash}");
    }
    vm.daemon.stop();
    load.verify(&vm.disks[1].1);
}

/// A disk that cannot be opened, or that hangs, leaves the others as they are.
#[test]
fn a_fault_stays_with_its_disk() {
    let test = "disks::a_fault_stays_with_its_disk";
    let Some((gate, store)) = Gate::under_loop(test, vec![0; 16 << 20]) else { return };
    let mut vm = Vm::start(1, "");
    let (_frontend, mut ring, mut load) = vm.attach(0);
    let good = ("d0".to_owned(), vm.disks[0].1.path.clone());
    let nowhere = vm.folder.path().join("none.raw");
    vm.write(&[good.clone(), ("d1".to_owned(), nowhere)]);
    load.offer(&mut ring);
    vm.upgrade();
    load.drain(&mut ring);
    vm.daemon.wait_log("disk d1 is not served, the others are: ");
    let failed = vec![("d0".to_owned(), "serving".to_owned()), ("d1".to_owned(), "failed".to_owned())];
    assert_eq!(vm.states(), failed);
    // Mended, by one that will hang.
    vm.write(&[good, ("d1".to_owned(), store.path.clone())]);
    vm.upgrade();
    assert!(vm.states().iter().all(|(_, state)| state == "serving"), "{:?}", vm.states());
    let mut hangs = Device::over(vm.connect("d1"), Setup::default());
    gate.close(1, usize::MAX);
    hangs.submit(0, T_OUT, 0, &[1; SECTOR], 0);
    Deadline::new("the write to hang").until_slowly(|| (gate.held() > 0).then_some(()));
    for _ in 0..5 {
        load.offer(&mut ring);
        load.drain(&mut ring);
    }
    // An upgrade would hold the others up: it is refused, and all goes on.
    let (status, _, complained) = vublk(&["upgrade", control::path(&vm.daemon).to_str().unwrap()]);
    assert!(!status.success() && complained.contains("disk d1 has requests in flight"), "{complained}");
    load.offer(&mut ring);
    load.drain(&mut ring);
    gate.open();
    let used = hangs.rings[0].wait_used("the write that hung");
    assert_eq!(used.len, 1);
    vm.upgrade();
    hangs.write(8, &[2; SECTOR]);
    assert_eq!(hangs.read(8, 1), [2; SECTOR]);
    load.offer(&mut ring);
    load.drain(&mut ring);
    drop(hangs);
    vm.daemon.stop();
    load.verify(&vm.disks[0].1);
}

/// At the first start one disk that cannot be served is a reason not to begin.
#[test]
fn a_first_start_is_of_all_or_none() {
    let folder = tempfile::tempdir().unwrap();
    let disk = empty_disk();
    let disks = [("d0".to_owned(), disk.path.clone()), ("d1".to_owned(), folder.path().join("none.raw"))];
    fs::write(folder.path().join("vm.toml"), text(&folder, &disks, "")).unwrap();
    let mut daemon = Vm::daemon(&folder, &[]);
    assert_eq!(daemon.wait_end(PATIENCE).code(), Some(1));
    let log = daemon.log();
    assert!(log.contains("disk d1: ") && log.contains("none.raw: no such file"), "{log}");
}

/// Calls name the disk that they are about.
#[test]
fn calls_name_a_disk() {
    let mut vm = Vm::start(2, "");
    let mut control = Control::of(&vm.daemon);
    let (_, why) = control.call("resize", json!({"size": 32 << 20})).unwrap_err();
    assert!(why.contains("several disks") && why.contains("d0, d1"), "{why}");
    let (_, why) = control.call("status", json!({"disk": "d2"})).unwrap_err();
    assert!(why.contains("no disk \"d2\"") && why.contains("d0, d1"), "{why}");
    control.call("resize", json!({"disk": "d1", "size": 32 << 20})).unwrap();
    let size = |control: &mut Control, disk: &str| {
        let status = control.call("status", json!({"disk": disk})).unwrap();
        assert_eq!(status["name"], disk);
        status["disk"]["size"].as_u64().unwrap()
    };
    assert_eq!((size(&mut control, "d0"), size(&mut control, "d1")), (16 << 20, 32 << 20));
    vm.daemon.stop();
}

/// The tool finds a disk of several by each of its names, and refuses what may be two.
#[test]
fn the_tool_names_a_disk() {
    let mut vm = Vm::start(2, "");
    let control = control::path(&vm.daemon);
    let control = control.to_str().unwrap();
    let socket = vm.folder.path().join("d1.sock");
    let image = vm.disks[1].1.path.display().to_string();
    let (status, said, complained) = vublk(&["list", "--json"]);
    assert!(status.success(), "{complained}");
    let all: Value = serde_json::from_str(&said).unwrap();
    let own = all.as_array().unwrap().iter().filter(|one| one["control"] == control);
    let names: Vec<_> = own.map(|one| (one["name"].clone(), one["disk"].clone())).collect();
    assert_eq!(names, [(json!("d0/d0"), json!("d0")), (json!("d0/d1"), json!("d1"))], "{said}");
    for words in [&[socket.to_str().unwrap()][..], &[control, "--disk=d1"]] {
        let (status, said, complained) = vublk(&[&["status", "--json"], words].concat());
        let told: Value = serde_json::from_str(&said).unwrap_or_else(|_| panic!("{words:?}: {complained}"));
        assert!(status.success() && told["name"] == "d1" && told["disk"]["path"] == image.as_str(), "{said}");
        let (status, said, complained) = vublk(&[&["resize"], words].concat());
        assert!(status.success() && said.contains("it had that size"), "{words:?}: {said}{complained}");
    }
    let (status, _, complained) = vublk(&["resize", control]);
    assert!(status.code() == Some(1) && complained.contains("d0, d1"), "{complained}");
    let (status, _, complained) = vublk(&["status", socket.to_str().unwrap(), "--disk=d0"]);
    assert!(status.code() == Some(1) && complained.contains("another"), "{complained}");
    let (_, said, _) = vublk(&["status", control]);
    let line = said.lines().find(|line| line.starts_with("d1 ")).expect(&said);
    assert!(line.contains("serving") && line.ends_with(&image), "{said}");
    let (status, said, complained) = vublk(&["stat", control]);
    assert!(status.success(), "{complained}");
    let shown: Vec<_> = said.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(shown, ["d0/d0", "d0/d1"], "{said}");
    let (status, _, complained) = vublk(&["status", "d0/no-other-test-has-it"]);
    assert!(status.code() == Some(1) && complained.contains("no disk has this name"), "{complained}");
    vm.daemon.stop();
}

/// A mistake is told with its line and its key, before anything is opened.
#[test]
fn mistakes_have_lines_and_keys() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    let disk = "[[disk]]\nblk-file = \"a\"\nsocket-path = \"a.sock\"\n";
    let cases = [
        ("", ":1: there is no disk"),
        ("[disk]\nblk-file = \"a\"\n", ":1: disks are tables that begin with [[disk]]"),
        ("[[disk]]\nblk-fil = \"a\"\n", ":2: blk-fil: there is no such key; blk-file is one"),
        ("[[disk]]\nxyzzy = 1\n", ":2: xyzzy: there is no such key"),
        ("[[disk]]\nblk-file = \"a\"\n", ":1: this disk has no name"),
        ("[[disk]]\nname = \"a\"\n", ":1: this disk has no blk-file"),
        ("[[disk]]\nname = \"a\"\nblk-file = \"a\"\n", ""),
        ("[[disk]]\nname = \"a b\"\nblk-file = \"a\"\n", ":2: a name has letters"),
        ("\n\n[[disk]]\nblk-file = 1.5\n", ":4: blk-file: use a text, a number, true or false"),
        ("[[disk]]\nnum-queues = 0\n", ":2: num-queues: invalid value '0'"),
        ("[[disk]]\nengine = \"steam\"\n", ":2: engine: invalid value 'steam'"),
        ("[[disk]]\nnum-queues = 1\nnum-queues = 2\n", ":3: duplicate key"),
        ("[[disk]]\nread-only = tru\n", ":2: "),
        ("log-level = \"loud\"\n", ":1: log-level: invalid value 'loud'"),
        ("blk-file = \"a\"\n", ":1: blk-file: there is no such key"),
        ("config = \"a\"\n", ":1: config: there is no such key"),
        ("[[disk]]\nfd = 7\nname = \"a\"\nblk-file = \"a\"\n", ":1: disk a: fd is for the command line"),
        ("[[disk]]\nformat = \"qcow2\"\nname = \"a\"\nblk-file = \"a\"\n", ":1: disk a: --format=qcow2"),
    ];
    let check = |text: &str| {
        fs::write(&file, text).unwrap();
        let mut command = bare_vublkd();
        command.arg(format!("--config={}", file.display())).arg("--check-config");
        crate::support::daemon::run(command)
    };
    for (text, wanted) in cases {
        let (status, said, complained) = check(text);
        let wanted = if wanted.is_empty() { String::new() } else { format!("{}{wanted}", file.display()) };
        assert!(complained.contains(&wanted), "{text:?}: {complained}");
        assert_eq!(
            status.code(),
            Some(if wanted.is_empty() { 0 } else { 2 }),
            "{text:?}: {said}{complained}"
        );
    }
    let twice = |other: &str| format!("{disk}\n{other}");
    let pairs = [
        ("[[disk]]\nblk-file = \"b\"\nsocket-path = \"a.sock\"\n", ":5: the disk of line 1 is called a, too"),
        (
            "[[disk]]\nname = \"b\"\nblk-file = \"a\"\nsocket-path = \"b.sock\"\n",
            "blk-file of disk a and blk-file of disk b are both",
        ),
        (
            "[[disk]]\nname = \"b\"\nblk-file = \"b\"\nsocket-path = \"a.sock\"\n",
            "socket-path of disk a and socket-path of disk b",
        ),
        ("[[disk]]\nname = \"b\"\nblk-file = \"a\"\nread-only = true\nsocket-path = \"b.sock\"\n", ""),
    ];
    for (other, wanted) in pairs {
        let (status, _, complained) = check(&twice(other));
        assert!(complained.contains(wanted), "{other:?}: {complained}");
        assert_eq!(status.code(), Some(if wanted.is_empty() { 0 } else { 2 }), "{other:?}: {complained}");
    }
    // Of another machine: what the texts mean is compared.
    let remote = |at: char, uri: &str, more: &str| {
        format!("[[disk]]\nname = \"{at}\"\ndisk = \"{uri}\"\nsocket-path = \"{at}.sock\"\n{more}")
    };
    let rbd = "rbd:vms/x:id=a";
    for (one, other, more, wanted) in [
        ("nbd://host/x", "NBD://HOST:10809/x", "", "disk of disk a and disk of disk b are both nbd://host/x"),
        (rbd, "rbd:vms/x:id=b", "", "disk of disk a and disk of disk b are both rbd:vms/x"),
        ("nbd://host/x", "nbd://host/y", "", ""),
        (rbd, "rbd:vms/n/x", "", ""),
        (rbd, rbd, "read-only = true\n", ""),
    ] {
        let (status, _, complained) = check(&(remote('a', one, "") + &remote('b', other, more)));
        assert!(complained.contains(wanted), "{other:?}: {complained}");
        assert_eq!(status.code(), Some(if wanted.is_empty() { 0 } else { 2 }), "{other:?}: {complained}");
    }
    let many: String =
        (0..65).map(|at| format!("[[disk]]\nname = \"d{at}\"\nblk-file = \"{at}\"\n")).collect();
    let (status, _, complained) = check(&many);
    assert!(
        status.code() == Some(2) && complained.contains("65 disks are too many, use 64 at most"),
        "{complained}"
    );
    // What is about a disk has no place beside a file, and the command line goes before the file.
    let with = |words: &[&str]| {
        let mut command = bare_vublkd();
        command.arg(format!("--config={}", file.display())).arg("--check-config").args(words);
        crate::support::daemon::run(command)
    };
    fs::write(&file, format!("supervise = true\n{disk}")).unwrap();
    let (status, _, complained) = with(&["--num-queues=2"]);
    assert!(status.code() == Some(2) && complained.contains("--num-queues is about a disk"), "{complained}");
    assert_eq!(with(&["--supervise=off", "--fd-store"]).0.code(), Some(0));
    let (status, _, complained) = with(&["--fd-store"]);
    assert!(status.code() == Some(2) && complained.contains("exclude each other"), "{complained}");
}

/// An upgrade by which a guest would lose its disk is taken back: the old program goes on, with the file as it was.
#[test]
fn an_upgrade_that_cannot_go_on_changes_nothing() {
    let mut vm = Vm::start(2, "");
    let (_one, mut ring, mut load) = vm.attach(0);
    let (_two, mut other_ring, mut other_load) = vm.attach(1);
    let as_it_was = fs::read_to_string(vm.file()).unwrap();
    // Of the last disk.
    fs::write(vm.file(), format!("{as_it_was}read-only = true\n")).unwrap();
    load.offer(&mut ring);
    other_load.offer(&mut other_ring);
    let (status, said, complained) = vublk(&["upgrade", control::path(&vm.daemon).to_str().unwrap()]);
    assert!(!status.success() && complained.contains("the old program goes on"), "{said}{complained}");
    load.drain(&mut ring);
    other_load.drain(&mut other_ring);
    vm.daemon.wait_log("start vublkd so, or stop the VM first");
    let both = vec![("d0".to_owned(), "serving".to_owned()), ("d1".to_owned(), "serving".to_owned())];
    assert_eq!(vm.states(), both);
    other_load.offer(&mut other_ring);
    kill_process(daemon_of(&vm.daemon), Signal::KILL).unwrap();
    other_load.drain(&mut other_ring);
    vm.wait_all_served();
    fs::write(vm.file(), as_it_was).unwrap();
    vm.upgrade();
    assert_eq!(vm.states(), both);
    vm.daemon.stop();
    load.verify(&vm.disks[0].1);
    other_load.verify(&vm.disks[1].1);
}
