//! A real systemd, in namespaces of its own, with the units that ship.

use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use super::daemon::run;
use super::disk::Disk;
use super::sys::{Deadline, installed, root, skip};

/// What the units name, and no test needs.
const STUBS: [&str; 5] =
    ["sysinit.target", "basic.target", "sockets.target", "local-fs.target", "remote-fs.target"];
/// What the programs of a package would be.
const PROGRAM: &str = "/usr/bin/vublkd";
/// Where it is here: a folder of one's own, since a build may be where the units see nothing (/home).
const BUILT: &str = "/run/bin/vublkd";

/// Where the units that ship are.
pub fn ships() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("dist/systemd")
}

/// The units that ship, with the program that was built: name and text.
pub fn units(program: &str) -> Vec<(String, String)> {
    let names = ["vublk@.service", "vublk@.socket", "vublk.target", "vublk.slice"];
    let read = |name: &str| std::fs::read_to_string(ships().join(name)).unwrap().replace(PROGRAM, program);
    names.iter().map(|name| ((*name).to_owned(), read(name))).collect()
}

/// The files of a systemd of one's own.
pub struct Files(PathBuf);

impl Files {
    /// With the units that ship, and `vm1` for a disk.
    fn new(folder: PathBuf, disk: &Disk) -> Self {
        let files = Self(folder);
        for folder in ["etc/vublk", "etc/systemd/system", "lib", "bin"] {
            std::fs::create_dir_all(files.0.join(folder)).unwrap();
        }
        for program in [env!("CARGO_BIN_EXE_vublkd"), env!("CARGO_BIN_EXE_vublk")] {
            let name = Path::new(program).file_name().unwrap();
            std::fs::copy(program, files.0.join("bin").join(name)).unwrap();
        }
        files.write("etc/machine-id", "0123456789abcdef0123456789abcdef\n");
        let mut users = Command::new("systemd-sysusers");
        users.arg(format!("--root={}", files.0.display())).arg("/usr/lib/sysusers.d/basic.conf");
        let (status, _, complained) = run({
            users.arg(ships().join("vublk.sysusers"));
            users
        });
        assert!(status.success(), "systemd-sysusers: {complained}");
        for name in STUBS {
            files.unit(name, &format!("[Unit]\nDescription={name}\nDefaultDependencies=no\n"));
        }
        for (name, text) in units(BUILT) {
            files.unit(&name, &text);
        }
        files.unit("test.target", "[Unit]\nDefaultDependencies=no\nWants=vublk@vm1.socket\n");
        files.unit(
            "shutdown.target",
            "[Unit]\nDefaultDependencies=no\nRefuseManualStart=no\nAllowIsolate=yes\n",
        );
        files.drop_in("vublk@.service", "[Service]\nStandardError=append:/var/lib/vublkd.log\n");
        files.disk("vm1", disk);
        files.options("vm1", "--log-level=debug");
        files
    }

    /// A path of its, from outside, as it is before it starts, too.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.0.join(inside)
    }

    /// Writes one: `etc/…` for `/etc/…`, `lib/…` for `/var/lib/…`.
    pub fn write(&self, inside: &str, text: &str) {
        let path = self.path(inside);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    pub fn unit(&self, name: &str, text: &str) {
        self.write(&format!("etc/systemd/system/{name}"), text);
    }

    pub fn drop_in(&self, name: &str, text: &str) {
        self.write(&format!("etc/systemd/system/{name}.d/test.conf"), text);
    }

    /// What its environment file says of a disk in its usual place.
    pub fn options(&self, name: &str, options: &str) {
        let text = format!("BLK_FILE=/var/lib/vublk/{name}/disk.raw\nVUBLKD_OPTIONS={options}\n");
        self.write(&format!("etc/vublk/{name}.env"), &text);
    }

    /// Puts a disk where the units look for it, for its user.
    fn disk(&self, name: &str, disk: &Disk) {
        let path = self.path(&format!("lib/vublk/{name}/disk.raw"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::hard_link(&disk.path, &path).unwrap();
        std::os::unix::fs::chown(&path, Some(self.id("passwd", "vublk")), None).unwrap();
    }

    /// A journal of its own, in memory, for what logs to it; false where none is installed.
    pub fn journald(&self) -> bool {
        let installed = |unit: &str| std::fs::read_to_string(Path::new("/lib/systemd/system").join(unit));
        let (Ok(service), Ok(socket)) =
            (installed("systemd-journald.service"), installed("systemd-journald.socket"))
        else {
            return false;
        };
        // The others are for the kernel's and the machine's own log.
        let others = ["systemd-journald-dev-log.socket", "systemd-journald-audit.socket"];
        self.unit(
            "systemd-journald.service",
            &others.iter().fold(service, |text, unit| text.replace(unit, "")),
        );
        self.unit("systemd-journald.socket", &socket);
        let options = "Storage=volatile\nReadKMsg=no\nAudit=no\nForwardToSyslog=no\nForwardToWall=no\n";
        self.write("etc/systemd/journald.conf", &format!("[Journal]\n{options}"));
        true
    }

    /// The number of a user (`passwd`) or group (`group`).
    pub fn id(&self, file: &str, name: &str) -> u32 {
        let text = std::fs::read_to_string(self.path(&format!("etc/{file}"))).unwrap();
        let mut entries = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
        entries.find(|entry| entry[0] == name).unwrap()[2].parse().unwrap()
    }
}

/// See the head of the file.
pub struct Systemd {
    unshare: Child,
    /// Its number outside.
    pid: Pid,
    cgroups: Vec<PathBuf>,
    pub files: Files,
}

impl Systemd {
    /// With the units `vublk@vm1` for a disk; or the test is left out.
    pub fn start(test: &str, disk: &Disk) -> Option<Self> {
        Self::with(test, disk, |_| ())
    }

    /// The same with what `prepare` writes.
    pub fn with(test: &str, disk: &Disk, prepare: impl FnOnce(&Files)) -> Option<Self> {
        if !root(test, "a systemd of its own")
            || !installed("systemd-analyze", test)
            || !installed("systemd-sysusers", test)
            || !installed("unshare", test)
        {
            return None;
        }
        // In each tree that systemd uses: a rule about addresses stays with the cgroup of a unit, whose name is the same in
        // every test.
        let name = format!("vublk-test-{}", disk.dir.path().file_name().unwrap().display());
        let cgroups: Vec<PathBuf> = ["/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .map(Path::new)
            .into_iter()
            .filter(|tree| tree.join("cgroup.procs").exists())
            .map(|tree| tree.join(&name))
            .filter(|cgroup| std::fs::create_dir(cgroup).is_ok())
            .collect();
        if cgroups.is_empty() {
            skip(test, "no cgroup can be made");
            return None;
        }
        let files = Files::new(disk.dir.path().join("root"), disk);
        prepare(&files);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/systemd.sh");
        let output = std::fs::File::create(files.path("systemd.log")).unwrap();
        let mut command = Command::new("sh");
        command.arg(script).arg(&files.0).args(&cgroups).stdin(Stdio::null());
        command.stdout(output.try_clone().unwrap()).stderr(output);
        // SAFETY: the closure only makes one system call, which is allowed between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // A test that is killed must not leave its systemd behind, which ends with unshare.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let unshare = command.spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let pid = Deadline::new("systemd").until_slowly(|| {
            let pid = std::fs::read_to_string(&children).ok()?.split_whitespace().next()?.parse().ok()?;
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            Pid::from_raw(pid).filter(|_| comm.trim() == "systemd")
        });
        Some(Self { unshare, pid, cgroups, files })
    }

    /// A path of its, from outside.
    pub fn path(&self, inside: &str) -> String {
        format!("/proc/{}/root/{inside}", self.pid.as_raw_nonzero())
    }

    /// A connection to a disk's socket, which systemd made and listens on.
    #[track_caller]
    pub fn connect(&self, name: &str) -> UnixStream {
        let path = self.path(&format!("run/vublk/{name}.sock"));
        Deadline::new("the socket unit").until_slowly(|| UnixStream::connect(&path).ok())
    }

    /// A program in its place: what it is and what it gets.
    pub fn inside(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--pid", "--target", &self.pid.as_raw_nonzero().to_string()]).args(words);
        command
    }

    /// `systemctl WORDS…` to its end: status, what it printed, what it complained of.
    pub fn try_ctl(&self, words: &[&str]) -> (ExitStatus, String, String) {
        run(self.inside(&[&["systemctl"], words].concat()))
    }

    /// The same where it must succeed; what it printed.
    #[track_caller]
    pub fn ctl(&self, words: &[&str]) -> String {
        let (status, said, complained) = self.try_ctl(words);
        assert!(status.success(), "systemctl {words:?}: {complained}");
        said.trim().to_owned()
    }

    /// A property of a unit.
    #[track_caller]
    pub fn show(&self, property: &str, unit: &str) -> String {
        self.ctl(&["show", "-p", property, "--value", unit])
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

    /// The next daemon after one that ended.
    #[track_caller]
    pub fn daemon_after(&self, before: Pid) -> Pid {
        Deadline::new("the next daemon").until_slowly(|| self.daemon().filter(|pid| *pid != before))
    }

    /// What all the daemons have logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.files.path("lib/vublkd.log")).unwrap_or_default()
    }

    /// What systemd has logged.
    pub fn own_log(&self) -> String {
        std::fs::read_to_string(self.files.path("systemd.log")).unwrap_or_default()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("systemd:\n{}\nvublkd:\n{}", self.own_log(), self.log());
        }
        // Its namespace ends with it, and everybody in that.
        let _gone = kill_process(self.pid, Signal::KILL);
        let _reaped = self.unshare.wait();
        self.cgroups.iter().for_each(|cgroup| remove(cgroup));
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
