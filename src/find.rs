//! Finds the daemons of this host: what `vublk list` shows, and what a name stands for.
//!
//! What it is: control sockets in [`FOLDER`], and those that the command lines of running vublkd processes name; each is asked
//! for its status. A disk is called as its socket is, without folder and ending: `/run/vublk/vm1.sock` is vm1.
//!
//! What it is not: it connects to no socket of another program. The kernel's table of sockets is no help: it has the names
//! that sockets were bound to, and a socket that replaces a stale one is moved to its place.
//!
//! Invariant: a daemon that does not answer costs a second, and is shown.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use crate::listen::{CONTROL, beside, disk_name};
use crate::rpc::{CallError, call_within};

/// Where the units that ship put sockets.
const FOLDER: &str = "/run/vublk";
/// How long a daemon may take to answer: it waits for nothing to do so.
const PATIENCE: Duration = Duration::from_secs(1);

/// A daemon.
#[derive(Debug)]
pub struct Found {
    /// What its disk is called.
    pub name: String,
    /// Its control socket.
    pub control: PathBuf,
    /// What it says of itself.
    pub status: Result<Value, CallError>,
}

/// All daemons of this host that this user may find, in the order of their names.
#[must_use]
pub fn daemons() -> Vec<Found> {
    let mut sockets: BTreeSet<PathBuf> = in_folder().collect();
    sockets.extend(of_processes());
    let found = sockets.into_iter().map(|control| Found {
        name: disk_name(&control),
        status: call_within(&control, "status", &json!({}), PATIENCE),
        control,
    });
    // A socket that refuses connections is a dead daemon's.
    let mut found: Vec<Found> = found.filter(|one| !is_stale(&one.status)).collect();
    found.sort_by(|one, other| one.name.cmp(&other.name));
    found
}

fn is_stale(status: &Result<Value, CallError>) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(status, Err(CallError::Connect(_, e)) if matches!(e.kind(), ConnectionRefused | NotFound))
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
        let control = of_command_line(&line)?;
        if control.is_absolute() {
            return Some(control);
        }
        // Which folder that is only root may see.
        Some(std::fs::read_link(process.join("cwd")).ok()?.join(control))
    })
}

/// The control socket that a command line names.
fn of_command_line(line: &[u8]) -> Option<PathBuf> {
    let words: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
    let value = |option: &[u8]| {
        words.iter().enumerate().rev().find_map(|(at, word)| match word.strip_prefix(option)? {
            [b'=', path @ ..] => Some(path),
            [] => words.get(at + 1).copied(),
            _ => None,
        })
    };
    let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    let control = value(b"--control").map(path);
    control.or_else(|| Some(beside(&path(value(b"--socket-path").filter(|path| !path.is_empty())?))))
}

/// The control socket of the disk that has this name or serial number.
///
/// # Errors
/// A sentence that says what to type: there is none, or there are several.
pub fn named(word: &str) -> Result<PathBuf, String> {
    let all = daemons();
    let serial = |one: &Found| {
        let status = one.status.as_ref().ok()?;
        status.pointer("/disk/serial")?.as_str().map(str::to_owned)
    };
    let by_name: Vec<&Found> = all.iter().filter(|one| one.name == word).collect();
    let by_serial = || all.iter().filter(|one| serial(one).as_deref() == Some(word)).collect();
    let found: Vec<&Found> = if by_name.is_empty() { by_serial() } else { by_name };
    match found.as_slice() {
        [one] => Ok(one.control.clone()),
        [] => Err(format!("{word}: no disk has this name: vublk list shows those that there are")),
        several => {
            let paths: Vec<String> = several.iter().map(|one| one.control.display().to_string()).collect();
            Err(format!("{word}: {} disks have this name: type one of {}", several.len(), paths.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines() {
        for (line, want) in [
            ("vublkd\0--socket-path=/a/vm.sock\0--blk-file=x\0", Some("/a/vm.sock.control")),
            ("vublkd\0--socket-path\0/a/vm.sock\0--control\0/b\0", Some("/b")),
            ("vublkd\0--control=c\0--socket-path=/a\0", Some("c")),
            ("vublkd\0--fd=3\0", None),
            ("vublkd\0--control-me=3\0--socket-path\0", None),
            ("", None),
        ] {
            assert_eq!(of_command_line(line.as_bytes()), want.map(PathBuf::from), "{line:?}");
        }
    }
}
