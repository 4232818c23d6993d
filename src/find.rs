//! Finds the disks of this host: what `vublk list` shows, and what a name stands for.
//!
//! What it is: control sockets in [`FOLDER`], and those that the command lines of running vublkd processes name; each is asked
//! for its status. A disk is called as its socket is, without folder and ending: `/run/vublk/vm1.sock` is vm1. Of several
//! disks in one process each is called vm1/root, as the control socket and the file of `--config` say.
//!
//! What it is not: it connects to no socket of another program. The kernel's table of sockets is no help: it has the names
//! that sockets were bound to, and a socket that replaces a stale one is moved to its place.
//!
//! Invariant: a daemon that does not answer costs a second, and is shown.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::Metadata;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::args::file::File;
use crate::listen::{CONTROL, beside, connect_to, disk_name};
use crate::rpc::{CallError, call_with, call_within};

/// Where the units that ship put sockets.
pub const FOLDER: &str = "/run/vublk";
/// How long a daemon may take to answer: it waits for nothing to do so.
const PATIENCE: Duration = Duration::from_secs(1);

/// A disk, as calls name it: a daemon, and a disk of it where it serves several.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The daemon's control socket.
    pub control: PathBuf,
    /// The disk's name, of a daemon that serves the disks of a file.
    pub disk: Option<String>,
}

impl Place {
    /// What the disk is called.
    #[must_use]
    pub fn name(&self) -> String {
        let process = disk_name(&self.control);
        self.disk.as_ref().map_or(process.clone(), |disk| format!("{process}/{disk}"))
    }

    /// Asks the daemon about this disk.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn ask(&self, method: &str, params: Value) -> Result<Value, CallError> {
        self.ask_with(method, params, &[])
    }

    /// The same, with descriptors.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn ask_with(
        &self,
        method: &str,
        mut params: Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value, CallError> {
        if let (Some(disk), Some(params)) = (&self.disk, params.as_object_mut()) {
            params.insert("disk".into(), disk.as_str().into());
        }
        call_with(&self.control, method, &params, fds)
    }
}

/// A disk that was found, or a daemon that does not answer.
#[derive(Debug)]
pub struct Found {
    /// What it is called: vm1, or vm1/root where the daemon serves several.
    pub name: String,
    /// Where to ask for it.
    pub place: Place,
    /// What the daemon says of itself and of this disk.
    pub status: Result<Value, CallError>,
}

/// All disks of this host that this user may find, in the order of their names.
#[must_use]
pub fn daemons() -> Vec<Found> {
    let found = controls().into_iter().flat_map(|control| {
        let status = call_within(&control, "status", &json!({}), PATIENCE);
        disks(&control, status)
    });
    // A socket that refuses connections is a dead daemon's.
    let mut found: Vec<Found> = found.filter(|one| !one.status.as_ref().is_err_and(is_stale)).collect();
    found.sort_by(|one, other| one.name.cmp(&other.name));
    found
}

/// The control sockets that there are; daemons that have died may have left some. No daemon is asked.
#[must_use]
pub fn controls() -> BTreeSet<PathBuf> {
    in_folder().chain(of_processes()).collect()
}

/// The disks of a daemon that has answered so.
fn disks(control: &Path, status: Result<Value, CallError>) -> Vec<Found> {
    let found = |disk: Option<String>, status| {
        let place = Place { control: control.into(), disk };
        Found { name: place.name(), place, status }
    };
    match status {
        Ok(Value::Object(mut process)) if process.get("disks").is_some_and(Value::is_array) => {
            let disks = process.remove("disks");
            let disks = disks.as_ref().and_then(Value::as_array).into_iter().flatten();
            let of = |disk: &Value| {
                let mut whole = process.clone();
                whole.extend(disk.as_object().cloned().unwrap_or_default());
                let name = disk.get("name").and_then(Value::as_str).unwrap_or_default();
                found(Some(name.to_owned()), Ok(Value::Object(whole)))
            };
            disks.map(of).collect()
        }
        other => vec![found(None, other)],
    }
}

/// True if no daemon is there.
#[must_use]
pub fn is_stale(why: &CallError) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(why, CallError::Connect(_, e) if matches!(e.kind(), ConnectionRefused | NotFound))
}

fn in_folder() -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(FOLDER).into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let path = entry.path();
        let folder = path.join("control");
        let is_control = path.as_os_str().as_bytes().ends_with(CONTROL.as_bytes());
        if is_control { Some(path) } else { folder.exists().then_some(folder) }
    })
}

/// Those that running daemons were told of.
fn of_processes() -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let process = entry.path();
        if std::fs::read(process.join("comm")).ok()? != b"vublkd\n" {
            return None;
        }
        let line = std::fs::read(process.join("cmdline")).ok()?;
        // Which folder it is in only its user and root may see.
        let absolute = |path: PathBuf| {
            if path.is_absolute() {
                return Some(path);
            }
            Some(std::fs::read_link(process.join("cwd")).ok()?.join(path))
        };
        let control = match of_command_line(&line)? {
            Said::Control(path) => path,
            Said::File(path) => File::read(&absolute(path)?).ok()?.control()?,
        };
        absolute(control)
    })
}

/// What a command line says of the control socket.
#[derive(Debug, PartialEq)]
enum Said {
    Control(PathBuf),
    /// The file of `--config` says it.
    File(PathBuf),
}

fn of_command_line(line: &[u8]) -> Option<Said> {
    let words: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
    let value = |option: &[u8]| {
        let path = words.iter().enumerate().rev().find_map(|(at, word)| match word.strip_prefix(option)? {
            [b'=', path @ ..] => Some(path),
            [] => words.get(at + 1).copied(),
            _ => None,
        });
        path.filter(|path| !path.is_empty()).map(|path| PathBuf::from(OsStr::from_bytes(path)))
    };
    let control = value(b"--control").map(Said::Control);
    let file = || value(b"--config").map(Said::File);
    control.or_else(file).or_else(|| Some(Said::Control(beside(&value(b"--socket-path")?))))
}

/// The disk that was meant by a word: a name or a serial number that `vublk list` shows, a disk's socket or a control
/// socket; `disk`: of several behind it the one that is called so.
///
/// # Errors
/// A sentence that says what to type: there is none, or there are several.
pub fn place(word: &Path, disk: Option<&str>) -> Result<Place, String> {
    let mut found = resolve(word)?;
    if let Some(disk) = disk {
        if let Some(other) = found.disk.as_ref().filter(|other| *other != disk) {
            return Err(format!("{} is disk {other}, and --disk={disk} is another: use one", word.display()));
        }
        found.disk = Some(disk.to_owned());
    }
    Ok(found)
}

/// The disk that is served by this name: its path, or its URI.
#[must_use]
pub fn disk_called(word: &Path) -> Option<PathBuf> {
    let name = word.to_str().filter(|name| !name.starts_with(['/', '.']))?;
    let status = named(name, &daemons()).ok()?.ask("status", json!({})).ok()?;
    Some(PathBuf::from(status.pointer("/disk/path")?.as_str()?))
}

fn resolve(word: &Path) -> Result<Place, String> {
    let whole = |control: PathBuf| Place { control, disk: None };
    if is_control_name(word) && word.exists() {
        return Ok(whole(word.into()));
    }
    let beside = beside(word);
    if connect_to(&beside).is_ok() {
        // The control socket of several disks may be beside the socket of one.
        let of_it = disks(&beside, call_within(&beside, "status", &json!({}), PATIENCE));
        return Ok(by_socket(of_it, word).unwrap_or_else(|| whole(beside)));
    }
    if let Ok(meta) = word.metadata() {
        let all = daemons();
        if !meta.file_type().is_socket() {
            // The folder of a disk is often called as the disk is.
            let by_name = word.to_str().and_then(|name| named(name, &all).ok());
            return by_name.ok_or_else(|| no_socket(&all, word, &meta));
        }
        // A daemon that was given its socket does not know the path; the units have this one.
        let of_unit = word.with_extension("").join("control");
        let of_unit = connect_to(&of_unit).is_ok().then(|| whole(of_unit));
        return Ok(by_socket(all, word).or(of_unit).unwrap_or_else(|| whole(word.into())));
    }
    match word.to_str() {
        Some(name) if name.split('/').count() <= 2 && !name.starts_with(['/', '.']) => {
            // Between a daemon and its successor no process listens.
            let end = Instant::now() + PATIENCE;
            loop {
                let all = daemons();
                let found = named(name, &all);
                if found.is_ok() || all.iter().any(|one| one.name == name) || Instant::now() >= end {
                    return found;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        _ => Ok(whole(word.into())),
    }
}

/// Why something else than a socket is not taken for a disk: it may be the file of one.
fn no_socket(all: &[Found], word: &Path, meta: &Metadata) -> String {
    let is_its = |one: &&Found| {
        let told = one.status.as_ref().ok().and_then(|status| status.pointer("/disk/path")?.as_str());
        let its = told.and_then(|path| Path::new(path).metadata().ok());
        its.is_some_and(|its| (its.dev(), its.ino()) == (meta.dev(), meta.ino()))
    };
    let path = word.display();
    if let Some(Found { name, .. }) = all.iter().find(is_its) {
        return format!("{path}: is the file of disk {name}, and not its name: type {name} instead");
    }
    let is = if meta.is_dir() { "a folder" } else { "a file or a device" };
    format!(
        "{path}: is {is}, and no vublkd that this user may ask serves it: type a name that vublk list shows. vublk doctor and \
         vublk inspect take the path of a disk"
    )
}

/// The socket that was meant by a word: its path, or the name of the disk whose front-ends connect to it.
///
/// # Errors
/// A sentence that says what to type.
pub fn socket(word: &Path) -> Result<PathBuf, String> {
    let is_path = word.metadata().is_ok_and(|meta| !meta.is_dir());
    let name = word.to_str().filter(|name| !name.starts_with(['/', '.']) && !is_path);
    let Some(name) = name else { return Ok(word.into()) };
    // No daemon is there before the first connection, where systemd listens.
    let of_unit = Path::new(FOLDER).join(format!("{name}.sock"));
    if of_unit.exists() {
        return Ok(of_unit);
    }
    let place = resolve(word)?;
    let status = place.ask("status", json!({})).map_err(|e| e.to_string())?;
    status.get("socket").and_then(Value::as_str).map(PathBuf::from).ok_or_else(|| {
        format!("{name}: its vublkd was given a socket and does not know the path: type the path of the disk's socket")
    })
}

fn is_control_name(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name == "control" || name.as_bytes().ends_with(CONTROL.as_bytes())
}

/// The disk whose front-ends connect to this socket.
fn by_socket(all: Vec<Found>, socket: &Path) -> Option<Place> {
    let socket = std::path::absolute(socket).ok()?;
    let is_its = |one: &Found| {
        let told = one.status.as_ref().ok()?.get("socket")?.as_str()?;
        Some(Path::new(told) == socket)
    };
    all.into_iter().find(|one| is_its(one) == Some(true)).map(|one| one.place)
}

/// The disk of this name or serial number: a name as it is shown goes before the name of a process, or of a disk in it.
fn named(word: &str, all: &[Found]) -> Result<Place, String> {
    let serial = |one: &Found| {
        let status = one.status.as_ref().ok()?;
        status.pointer("/disk/serial")?.as_str().map(str::to_owned)
    };
    let places = |is_it: &dyn Fn(&Found) -> bool| -> BTreeSet<Place> {
        all.iter().filter(|one| is_it(one)).map(|one| one.place.clone()).collect()
    };
    let mut found = places(&|one| one.name == word);
    if found.is_empty() {
        found = places(&|one| one.place.disk.as_deref() == Some(word));
        let of_process = all.iter().filter(|one| disk_name(&one.place.control) == word);
        found.extend(of_process.map(|one| Place { control: one.place.control.clone(), disk: None }));
    }
    if found.is_empty() {
        found = places(&|one| serial(one).as_deref() == Some(word));
    }
    let several = found.len();
    if several > 1 {
        let typed = |place: &Place| match &place.disk {
            Some(disk) => format!("{} --disk={disk}", place.control.display()),
            None => place.control.display().to_string(),
        };
        let typed: Vec<String> = found.iter().map(typed).collect();
        return Err(format!("{word}: {several} disks have this name: type one of {}", typed.join(", ")));
    }
    found
        .pop_first()
        .ok_or_else(|| format!("{word}: no disk has this name: vublk list shows those that there are"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines() {
        let control = |path: &str| Some(Said::Control(path.into()));
        for (line, want) in [
            ("vublkd\0--socket-path=/a/vm.sock\0--blk-file=x\0", control("/a/vm.sock.control")),
            ("vublkd\0--socket-path\0/a/vm.sock\0--control\0/b\0", control("/b")),
            ("vublkd\0--control=c\0--socket-path=/a\0", control("c")),
            ("vublkd\0--config=vm.toml\0--control=c\0", control("c")),
            ("vublkd\0--config\0vm.toml\0", Some(Said::File("vm.toml".into()))),
            ("vublkd\0--fd=3\0", None),
            ("vublkd\0--control-me=3\0--socket-path\0", None),
            ("", None),
        ] {
            assert_eq!(of_command_line(line.as_bytes()), want, "{line:?}");
        }
    }

    #[test]
    fn names() {
        let disk = |serial: &str| json!({"serial": serial});
        let several = json!({"pid": 1, "disks": [
            {"name": "root", "disk": disk("s1")}, {"name": "data", "socket": "/a/x.sock", "disk": disk("s2")},
        ]});
        let mut all = disks(Path::new("/run/vublk/vm1.control"), Ok(several.clone()));
        all.extend(disks(Path::new("/run/vublk/vm2.control"), Ok(several)));
        all.extend(disks(Path::new("/run/vublk/data.control"), Ok(json!({"disk": disk("s3")}))));
        let found = |word| named(word, &all).map(|place| place.name());
        for (word, want) in [("vm1/root", "vm1/root"), ("vm2", "vm2"), ("data", "data"), ("s3", "data")] {
            assert_eq!(found(word), Ok(want.to_owned()));
        }
        for (word, want) in [
            ("root", "/run/vublk/vm1.control --disk=root, /run/vublk/vm2.control --disk=root"),
            ("s2", "2 disks"),
            ("vm3/root", "no disk has this name"),
        ] {
            let why = found(word).expect_err(word);
            assert!(why.contains(want), "{why}");
        }
        let vm1 = all.split_off(0).into_iter().take(2).collect();
        assert_eq!(by_socket(vm1, Path::new("/a/x.sock")).map(|place| place.name()), Some("vm1/data".into()));
    }
}
