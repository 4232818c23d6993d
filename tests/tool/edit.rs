//! `vublk add` and `vublk remove`.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::manage::{at, fails, run, told};
use crate::disks::Vm;
use crate::support::daemon::run as run_to_end;
use crate::support::device::{Device, Setup};
use crate::support::load::empty_disk;
use crate::support::sys::{root, skip};

fn serving(names: &[&str]) -> Vec<(String, String)> {
    names.iter().map(|name| ((*name).to_owned(), "serving".to_owned())).collect()
}

/// A disk is added and removed under another one's load, its file keeps what people wrote, and the disk's guest is asked
/// for.
#[test]
fn a_disk_comes_and_goes() {
    let mut vm = Vm::start(2, "# what people wrote");
    let at = at(&vm.daemon);
    let text = fs::read_to_string(vm.file()).unwrap();
    assert_eq!(told(&["status", &at])["config"], json!(vm.file()));
    let (_frontend, mut ring, mut load) = vm.attach(0);
    load.offer(&mut ring);
    let disk = empty_disk();
    let options = [
        format!("--blk-file={}", disk.path.display()),
        format!("--socket-path={}/logs.sock", vm.folder.path().display()),
    ];
    let words = [
        "add",
        &at,
        &options[0],
        &options[1],
        "--read-only",
        "--num-queues=2",
        "--discard=ignore",
        "--bps-total=50M",
    ];
    let added = told(&words);
    load.drain(&mut ring);
    assert_eq!((&added["disk"], &added["config"]), (&json!("logs"), &json!(vm.file())), "{added}");
    assert!(added["upgrade"]["pid"].is_u64(), "{added}");
    assert_eq!(vm.states(), serving(&["d0", "d1", "logs"]));
    let table = format!(
        "\n[[disk]]\nblk-file = \"{}\"\nsocket-path = \"{}/logs.sock\"\nread-only = true\ndiscard = \"ignore\"\nnum-queues = 2\n\
         bps-total = \"50M\"\n",
        disk.path.display(),
        vm.folder.path().display()
    );
    assert_eq!(fs::read_to_string(vm.file()).unwrap(), format!("{text}{table}"));
    let shown = told(&["status", &at, "--disk=logs"]);
    assert_eq!(
        (&shown["disk"]["read_only"], &shown["disk"]["throttle"]["bps_total"]),
        (&json!(true), &json!(50 << 20)),
        "{shown}"
    );
    fails(&[&words[..3], &["--name=d0", "--socket-path=/tmp/x.sock"]].concat(), 1, "is called d0, too");
    fails(&["add", &at, &options[0], "--fd=4", "--name=x"], 1, "fd is for the command line");
    fails(&["add", &at, "--name=x"], 2, "--blk-file");

    // Its guest has it.
    let device = Device::over(vm.connect("logs"), Setup::default());
    fails(&["remove", &at, "logs"], 1, &format!("process {} is connected", std::process::id()));
    fails(&["remove", &at, "other"], 1, "there are: d0, d1, logs");
    load.offer(&mut ring);
    let removed = told(&["remove", &at, "logs", "--force"]);
    load.drain(&mut ring);
    assert!(removed["disk"] == "logs" && removed["upgrade"]["pid"].is_u64(), "{removed}");
    device.frontend.wait_hangup("its disk was removed");
    assert_eq!(vm.states(), serving(&["d0", "d1"]));
    assert_eq!(fs::read_to_string(vm.file()).unwrap(), text);
    // By the name that vublk list shows.
    let said = run(&["remove", "d0/d1"]);
    assert!(said.contains("disk d1 removed; vublkd ") && said.contains("has taken over"), "{said}");
    assert_eq!(vm.states(), serving(&["d0"]));
    fails(&["remove", &at, "d0", "--force"], 1, "is its only disk");
    // By its file, for which the daemon is found.
    let elsewhere = TempDir::new().unwrap();
    let link = elsewhere.path().join("link.toml");
    symlink(vm.file(), &link).unwrap();
    let added = told(&["add", link.to_str().unwrap(), &options[0], &options[1]]);
    assert!(added["upgrade"]["pid"].is_u64(), "{added}");
    assert_eq!(vm.states(), serving(&["d0", "logs"]));
    let left: Vec<_> =
        fs::read_dir(vm.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with(".vublk-")), "{left:?}");
    vm.daemon.stop();
    load.verify(&vm.disks[0].1);
}

/// A disk that cannot be served, or a daemon that does not give way: file and daemon are as before.
#[test]
fn what_fails_is_taken_back() {
    let mut vm = Vm::start(1, "");
    let at = at(&vm.daemon);
    let text = fs::read_to_string(vm.file()).unwrap();
    let (_frontend, mut ring, mut load) = vm.attach(0);
    let socket = format!("--socket-path={}/new.sock", vm.folder.path().display());
    load.offer(&mut ring);
    fails(&["add", &at, "--blk-file=/nowhere/at.all", &socket], 1, "disk new: /nowhere/at.all: no such file");
    load.drain(&mut ring);
    assert_eq!((vm.states(), fs::read_to_string(vm.file()).unwrap()), (serving(&["d0"]), text.clone()));
    // A paused disk lets no upgrade through.
    let disk = empty_disk();
    let image = format!("--blk-file={}", disk.path.display());
    run(&["pause", &at, "--time=60"]);
    let words = ["add", &at, &image, &socket];
    fails(&words, 1, "paused for a snapshot");
    assert_eq!(fs::read_to_string(vm.file()).unwrap(), text);
    run(&["resume", &at]);
    load.offer(&mut ring);
    load.drain(&mut ring);
    // A mistake that the file has had before.
    fs::write(vm.file(), text.replace("num-queues = 4", "num-queues = 0")).unwrap();
    fails(&words, 1, "vm.toml:8: num-queues: invalid value '0'");
    // A folder that another vublk edits in.
    fs::write(vm.file(), &text).unwrap();
    let folder = fs::File::open(vm.folder.path()).unwrap();
    rustix::fs::flock(&folder, rustix::fs::FlockOperation::LockExclusive).unwrap();
    fails(&words, 1, "another vublk edits");
    // Not only closed: a process that another test starts in this moment has a copy.
    rustix::fs::flock(&folder, rustix::fs::FlockOperation::Unlock).unwrap();
    told(&words);
    assert_eq!(vm.states(), serving(&["d0", "new"]));
    vm.daemon.stop();
    load.verify(&vm.disks[0].1);
}

/// A daemon without a file, and none at all.
#[test]
fn a_file_whose_daemon_does_not_run() {
    let folder = TempDir::new().unwrap();
    let (real, link) = (folder.path().join("real.toml"), folder.path().join("vm.toml"));
    let text = "# of vm1\nsupervise = true # yes\n\n# root\n[[disk]]\nblk-file = \"a\"\nsocket-path = \"a.sock\"\n# the end";
    fs::write(&real, text).unwrap();
    fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
    symlink("real.toml", &link).unwrap();
    let link = link.to_str().unwrap();
    // What is typed is relative to where it is typed.
    let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
    command.current_dir(folder.path()).args([
        "add",
        "vm.toml",
        "--blk-file=b",
        "--socket-path=b.sock",
        "--name=data",
    ]);
    let (status, said, complained) = run_to_end(command);
    assert!(
        status.success() && said.contains("real.toml: disk data added; no vublkd serves"),
        "{said}{complained}"
    );
    let own = fs::canonicalize(folder.path()).unwrap();
    let own = own.display();
    let table =
        format!("[[disk]]\nname = \"data\"\nblk-file = \"{own}/b\"\nsocket-path = \"{own}/b.sock\"\n");
    assert_eq!(fs::read_to_string(&real).unwrap(), format!("{text}\n\n{table}"));
    assert!(fs::symlink_metadata(link).unwrap().is_symlink(), "the link was replaced");
    assert_eq!(fs::metadata(&real).unwrap().mode() & 0o7777, 0o640);
    fails(&["add", link, "--blk-file=c", "--socket-path=c.sock", "--num-queues=0"], 2, "num-queues");
    fails(&["add", link, &format!("--blk-file={own}/b"), "--socket-path=c.sock"], 1, "are both");
    fails(&["remove", link], 1, "which disk?");
    let removed = told(&["remove", link, "a"]);
    assert_eq!((&removed["upgrade"], &removed["disk"]), (&Value::Null, &json!("a")));
    assert_eq!(
        fs::read_to_string(&real).unwrap(),
        format!("# of vm1\nsupervise = true # yes\n\n# the end\n\n{table}")
    );
    fails(
        &["add", &format!("{own}/none.toml"), "--blk-file=c", "--socket-path=c.sock"],
        1,
        "no vublkd can be reached",
    );
}

/// Paths in the URI of a disk on another machine are relative to where they are typed, too.
#[test]
fn paths_in_uris_are_made_absolute() {
    let folder = TempDir::new().unwrap();
    let own = fs::canonicalize(folder.path()).unwrap();
    let own = own.display();
    fs::write(folder.path().join("vm.toml"), "[[disk]]\nblk-file = \"/a\"\nsocket-path = \"/a.sock\"\n")
        .unwrap();
    for (name, typed, written) in [
        ("b", "nbd+unix:///x?socket=nbd.sock", format!("nbd+unix:///x?socket={own}/nbd.sock")),
        ("c", "rbd:vms/c:keyring=k:conf=c", format!("rbd:vms/c:conf={own}/c:keyring={own}/k")),
        ("d", "NBD://host/x", "NBD://host/x".to_owned()),
        ("e", "e.raw", format!("{own}/e.raw")),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
        command.current_dir(folder.path()).args(["add", "vm.toml"]);
        command.args([format!("--disk={typed}"), format!("--socket-path={name}.sock")]);
        let (status, said, complained) = run_to_end(command);
        assert!(status.success(), "{said}{complained}");
        let text = fs::read_to_string(folder.path().join("vm.toml")).unwrap();
        assert!(text.contains(&format!("disk = \"{written}\"\n")), "{typed}: {text}");
    }
}

/// A daemon of one disk has no file.
#[test]
fn a_daemon_without_a_file() {
    use crate::support::daemon::{Daemon, Options, URING};
    let disk = empty_disk();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    let at = at(&daemon);
    fails(&["add", &at, "--blk-file=a", "--name=a"], 1, "started with --config=FILE");
    daemon.stop();
}

/// An access list stays, and one that the folder would give is not taken.
#[test]
fn the_access_list_of_a_file() {
    use rustix::fs::{XattrFlags, getxattr, setxattr};
    const LIST: &str = "system.posix_acl_access";
    // Version 2; owner rw-, user 4711 r--, group r--, mask r--, others ---.
    let entry = |tag: u16, may: u16, id: u32| {
        [&tag.to_le_bytes()[..], &may.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    let none = u32::MAX;
    let entries = [(1, 6, none), (2, 4, 4711), (4, 4, none), (16, 4, none), (32, 0, none)];
    let list =
        [vec![2, 0, 0, 0], entries.iter().flat_map(|&(tag, may, id)| entry(tag, may, id)).collect()].concat();
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("vm.toml");
    fs::write(&file, "[[disk]]\nblk-file = \"a\"\nsocket-path = \"a.sock\"\n").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    let given = setxattr(folder.path(), "system.posix_acl_default", &list, XattrFlags::empty());
    if let Err(e) = given {
        return skip("tool::edit::the_access_list_of_a_file", &format!("no access lists here: {e}"));
    }
    let place = file.to_str().unwrap();
    let of_file = |name: &str| {
        let mut value = [0; 256];
        getxattr(&file, name, &mut value).map(|got| value[..got].to_vec())
    };
    told(&["add", place, "--blk-file=b", "--socket-path=b.sock"]);
    assert_eq!(of_file(LIST), Err(rustix::io::Errno::NODATA), "the folder's list was taken");
    setxattr(&file, LIST, &list, XattrFlags::empty()).unwrap();
    setxattr(&file, "user.note", b"mine", XattrFlags::empty()).unwrap();
    told(&["remove", place, "b"]);
    assert_eq!((of_file(LIST), of_file("user.note")), (Ok(list), Ok(b"mine".to_vec())));
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o640);
}

/// The owner stays, too; and who may not keep it changes nothing.
#[test]
fn the_owner_of_a_file() {
    let test = "tool::edit::the_owner_of_a_file";
    if !root(test, "files of another user") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("vm.toml");
    let text = "[[disk]]\nblk-file = \"a\"\nsocket-path = \"a.sock\"\n";
    fs::write(&file, text).unwrap();
    chown(&file, Some(4711), Some(4712)).unwrap();
    let place = file.to_str().unwrap();
    let words = ["add", place, "--blk-file=b", "--socket-path=b.sock"];
    told(&words);
    let owner = |file| fs::metadata(file).map(|meta| (meta.uid(), meta.gid())).unwrap();
    assert_eq!(owner(&file), (4711, 4712));
    // A user who may make files here, and give none away.
    fs::write(&file, text).unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", env!("CARGO_BIN_EXE_vublk")])
        .args(words);
    if Command::new("setpriv")
        .args(["--reuid=65534", "--clear-groups", env!("CARGO_BIN_EXE_vublk"), "--version"])
        .output()
        .is_ok_and(|done| done.status.success())
    {
        let (status, _, complained) = run_to_end(command);
        assert!(status.code() == Some(1) && complained.contains("Run vublk as its owner"), "{complained}");
        assert_eq!((owner(&file), fs::read_to_string(&file).unwrap()), ((4711, 4712), text.to_owned()));
    } else {
        skip(test, "another user may not run the tool from here");
    }
}
