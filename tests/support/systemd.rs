//! A real systemd, in namespaces of its own, with the units that ship.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use super::daemon::run;
use super::sys::{Deadline, installed, root, skip};

/// What the units name, and nobody else needs here.
const STUBS: [&str; 6] =
    ["test.target", "sysinit.target", "basic.target", "sockets.target", "local-fs.target", "shutdown.target"];

/// See the head of the file.
pub struct Systemd {
    unshare: Child,
    /// Its number outside.
    pid: Pid,
    cgroup: PathBuf,
    log: PathBuf,
}

impl Systemd {
    /// With the units `vublk@vm1` for a disk; or the test is left out. `folder`: for
    /// its own files.
    pub fn start(test: &str, folder: &Path, disk: &Path) -> Option<Self> {
        if !root(test, "a systemd of its own")
            || !installed("systemd-analyze", test)
            || !installed("unshare", test)
        {
            return None;
        }
        let cgroup = ["/sys/fs/cgroup/systemd", "/sys/fs/cgroup"]
            .map(Path::new)
            .into_iter()
            .find(|tree| tree.join("cgroup.procs").exists())
            .map(|tree| tree.join(format!("vublk-test-{}", std::process::id())));
        let Some(cgroup) = cgroup.filter(|cgroup| std::fs::create_dir(cgroup).is_ok()) else {
            skip(test, "no cgroup can be made");
            return None;
        };
        let units = folder.join("units");
        write_units(&units, folder, disk);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/systemd.sh");
        let output = std::fs::File::create(folder.join("systemd.log")).unwrap();
        let mut command = Command::new("sh");
        command.arg(script).arg(&units).arg(&cgroup).stdin(Stdio::null());
        command.stdout(output.try_clone().unwrap()).stderr(output);
        let unshare = command.spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let pid = Deadline::new("systemd").until_slowly(|| {
            let pid = std::fs::read_to_string(&children).ok()?.split_whitespace().next()?.parse().ok()?;
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            Pid::from_raw(pid).filter(|_| comm.trim() == "systemd")
        });
        let made = Self { unshare, pid, cgroup, log: folder.join("vublkd.log") };
        Some(made)
    }

    /// A path of its, from outside.
    pub fn path(&self, inside: &str) -> String {
        format!("/proc/{}/root/{inside}", self.pid.as_raw_nonzero())
    }

    /// A connection to the disk's socket, which systemd made and listens on.
    #[track_caller]
    pub fn connect(&self) -> UnixStream {
        let path = self.path("run/vublk/vm1.sock");
        Deadline::new("the socket unit").until_slowly(|| UnixStream::connect(&path).ok())
    }

    /// `systemctl WORDS…`; what it printed.
    #[track_caller]
    pub fn ctl(&self, words: &[&str]) -> String {
        let mut command = Command::new("nsenter");
        command
            .args(["--mount", "--pid", "--target", &self.pid.as_raw_nonzero().to_string(), "systemctl"])
            .args(words);
        let (status, said, complained) = run(command);
        assert!(status.success(), "systemctl {words:?}: {complained}");
        said.trim().to_owned()
    }

    /// The daemon, while there is one: a child of systemd's that has become one.
    pub fn daemon(&self) -> Option<Pid> {
        let pid = self.pid.as_raw_nonzero();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        let is_daemon = |pid: &&str| {
            std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "vublkd")
        };
        Pid::from_raw(children.split_whitespace().find(is_daemon)?.parse().ok()?)
    }

    /// What all the daemons have logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

fn write_units(units: &Path, folder: &Path, disk: &Path) {
    std::fs::create_dir_all(units.join("vublk@.service.d")).unwrap();
    let write = |name: &str, text: String| std::fs::write(units.join(name), text).unwrap();
    for name in STUBS {
        write(name, format!("[Unit]\nDescription={name}\nDefaultDependencies=no\n"));
    }
    write("test.target", "[Unit]\nDefaultDependencies=no\nWants=vublk@vm1.socket\n".into());
    let ships = Path::new(env!("CARGO_MANIFEST_DIR")).join("dist/systemd");
    for kind in ["service", "socket"] {
        let name = format!("vublk@.{kind}");
        let text = std::fs::read_to_string(ships.join(&name)).unwrap();
        let text = text.replace("/usr/bin/vublkd", env!("CARGO_BIN_EXE_vublkd"));
        write(&name, text.replace("/etc/vublk/", &format!("{}/", folder.display())));
    }
    let log = folder.join("vublkd.log");
    write("vublk@.service.d/log.conf", format!("[Service]\nStandardError=append:{}\n", log.display()));
    let options = format!("BLK_FILE={}\nVUBLKD_OPTIONS=--log-level=debug\n", disk.display());
    std::fs::write(folder.join("vm1.env"), options).unwrap();
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // Its namespace ends with it, and everybody in that.
        let _gone = kill_process(self.pid, Signal::KILL);
        let _reaped = self.unshare.wait();
        remove(&self.cgroup);
    }
}

/// A cgroup and those in it.
fn remove(cgroup: &Path) {
    for entry in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove(&entry.path());
        }
    }
    // A process that was killed leaves it a moment later.
    Deadline::new(format!("{} to be empty", cgroup.display()))
        .until_slowly(|| std::fs::remove_dir(cgroup).is_ok().then_some(()));
}
