//! A Ceph cluster of one node (integration/remote/ceph.py), and images in it. It ends with the process that started it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use super::disk::Disk;
use super::sys::installed;

pub struct Ceph {
    /// Its standard input is the cluster's life.
    child: Child,
    folder: PathBuf,
}

fn script() -> Command {
    let mut command = Command::new("python3");
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/integration/remote/ceph.py"));
    command
}

impl Ceph {
    /// Starts one, which takes some seconds. `None`: Ceph is not installed, which is told.
    #[track_caller]
    pub fn start(test: &str) -> Option<Self> {
        if !installed("ceph-osd", test) {
            return None;
        }
        // In memory, where there is room: its syncs would hold up those of the tests that run beside it.
        let memory = Path::new("/dev/shm");
        let has_room = rustix::fs::statvfs(memory).is_ok_and(|fs| fs.f_bavail * fs.f_frsize > 4 << 30);
        let place = if has_room { memory.to_owned() } else { std::env::temp_dir() };
        // The script removes it, also where this process is killed, or ends with the shared one.
        let folder = tempfile::Builder::new().prefix("vublk-ceph-").tempdir_in(place).unwrap().keep();
        let mut command = script();
        command.arg("start").arg(&folder).arg("--attached").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), "ready", "the cluster did not start");
        Some(Self { child, folder })
    }

    /// The one that all tests share which do no harm to it.
    pub fn shared(test: &str) -> Option<&'static Self> {
        static SHARED: OnceLock<Option<Ceph>> = OnceLock::new();
        SHARED.get_or_init(|| Self::start(test)).as_ref()
    }

    /// A command of ceph.py's about it: kill-osd, start-osd …
    #[track_caller]
    pub fn order(&self, word: &str) {
        assert!(script().arg(word).arg(&self.folder).status().unwrap().success(), "{word}");
    }

    /// A client's program (rbd, ceph …), as the cluster's admin. What it prints.
    #[track_caller]
    pub fn run(&self, words: &[&str]) -> String {
        self.try_run(words).unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    pub fn try_run(&self, words: &[&str]) -> Result<String, String> {
        let done = script().arg("run").arg(&self.folder).args(words).output().unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        if done.status.success() { Ok(text(&done.stdout)) } else { Err(text(&done.stderr)) }
    }

    /// A new image with what this disk's file holds.
    #[track_caller]
    pub fn image_of(&self, disk: &Disk) -> Image<'_> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let name = format!("vms/disk{}", NEXT.fetch_add(1, Ordering::Relaxed));
        self.run(&["rbd", "import", "--no-progress", disk.path.to_str().unwrap(), &name]);
        Image { ceph: self, name }
    }

    /// The text of its ceph.conf.
    pub fn conf(&self) -> String {
        std::fs::read_to_string(self.conf_path()).unwrap()
    }

    /// Where that is.
    pub fn conf_path(&self) -> String {
        format!("{}/ceph.conf", self.folder.display())
    }

    /// How a URI of it ends.
    pub fn options(&self) -> String {
        format!(":conf={}:id=vublk", self.conf_path())
    }
}

impl Drop for Ceph {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ended = self.child.wait();
    }
}

pub struct Image<'a> {
    pub ceph: &'a Ceph,
    /// POOL/IMAGE.
    pub name: String,
}

impl Image<'_> {
    pub fn uri(&self) -> String {
        format!("rbd:{}{}", self.name, self.ceph.options())
    }

    /// Copies it into the disk's file, where a test looks at it.
    #[track_caller]
    pub fn export_to(&self, disk: &Disk) {
        let _none = std::fs::remove_file(&disk.path);
        self.ceph.run(&["rbd", "export", "--no-progress", &self.name, disk.path.to_str().unwrap()]);
    }
}
