//! Sockets at a path: listening (the disk's socket, the control socket), and
//! connecting to one.
//!
//! What it is: a socket that appears at its path with its mode and ready to be
//! connected to, in place of a stale one, and goes away with us.
//!
//! What it is not: it accepts no connection.
//!
//! Invariants: a path that another process listens on, or put there since, is
//! never taken or removed, and only a refused connection says that a socket is
//! stale. A folder is looked up once: what is made, replaced or removed is an entry
//! of that folder, whatever its other users do to the path meanwhile.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Statx, Uid, chownat, mkdirat, openat, renameat,
    renameat_with, unlinkat,
};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, socket_with,
};
use rustix::process::{geteuid, umask};
use thiserror::Error;

use crate::sys::{self, Inode, facts, facts_at, inode};
use crate::workers::wait_for;

/// Bytes of a path that programs can connect to: `sun_path` of unix(7), without its
/// last zero.
const MAX_PATH: usize = 107;
/// How long a connection waits for room in the backlog.
const CONNECT_TIME: Duration = Duration::from_millis(500);
/// How often a start goes on when other processes make the same names.
const TRIES: usize = 16;
const LOOK: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Why vublkd cannot listen on a path, and what to type.
#[derive(Debug, Error)]
#[error("{}: {why}", path.display())]
pub struct ListenError {
    path: PathBuf,
    why: String,
}

fn error(path: &Path, why: String) -> ListenError {
    ListenError { path: path.into(), why }
}

/// A name for what `stat` is of; `None` for a socket.
fn other_than_socket(facts: &Statx) -> Option<&'static str> {
    Some(match FileType::from_raw_mode(facts.stx_mode.into()) {
        FileType::Socket => return None,
        FileType::RegularFile => "a regular file",
        FileType::BlockDevice => "a block device",
        FileType::Directory => "a folder",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a pipe",
        _ => "a device",
    })
}

fn names_a_folder(path: &Path, option: &str) -> ListenError {
    let (why, sample) = ("names a folder, and vublkd makes its socket at", path.join("disk.sock"));
    error(path, format!("{why} {option}. Add a name, such as {}", sample.display()))
}

fn cannot_listen(path: &Path, option: &str, e: Errno) -> ListenError {
    let then = "Check that its folder exists and is writable, or choose another";
    error(path, format!("cannot listen there: {}. {then} {option}", io::Error::from(e)))
}

/// A name in a folder.
#[derive(Debug)]
struct Place<'a> {
    path: &'a Path,
    name: &'a OsStr,
    folder: OwnedFd,
    option: &'static str,
}

impl<'a> Place<'a> {
    fn find(path: &'a Path, option: &'static str) -> Result<Self, ListenError> {
        // Of "x/" and "x/." too, x is the file name.
        let name = path.file_name().filter(|name| path.as_os_str().as_bytes().ends_with(name.as_bytes()));
        let name = name.ok_or_else(|| names_a_folder(path, option))?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = openat(CWD, folder.unwrap_or(Path::new(".")), flags, Mode::empty())
            .map_err(|e| cannot_listen(path, option, e))?;
        Ok(Self { path, name, folder, option })
    }

    fn failed(&self, e: Errno) -> ListenError {
        cannot_listen(self.path, self.option, e)
    }

    /// The stale socket that is there; `None`: nothing is.
    fn stale(&self) -> Result<Option<OwnedFd>, ListenError> {
        let there = match openat(&self.folder, self.name, LOOK, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            there => there.map_err(|e| self.failed(e))?,
        };
        let facts = facts(&there).map_err(|e| self.failed(e))?;
        let (path, option) = (self.path, self.option);
        let stays = |what, hint| {
            let why = format!("{what}, which stays as it is. {option} is where vublkd makes its socket");
            Err(error(path, format!("{why}: choose a path where nothing is{hint}")))
        };
        match (FileType::from_raw_mode(facts.stx_mode.into()), other_than_socket(&facts)) {
            (_, None) => {}
            (FileType::Directory, _) => return Err(names_a_folder(path, option)),
            (FileType::RegularFile | FileType::BlockDevice, Some(what)) => {
                return stays(what, ". The disk is named by --blk-file");
            }
            (_, Some(what)) => return stays(what, ""),
        }
        match connect_to_inode(&there) {
            Err(Errno::CONNREFUSED) => Ok(Some(there)),
            // No room in its backlog; a socket of another type.
            Ok(_) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
                let why = "another process is listening there. Stop it, or choose another";
                Err(error(path, format!("{why} {option}")))
            }
            Err(e) => {
                let e = io::Error::from(e);
                let why = format!("a socket, and vublkd cannot tell whether a process listens there: {e}");
                Err(error(path, format!("{why}. Choose another {option}, or remove it if none does")))
            }
        }
    }

    /// Moves a socket here, in place of the `stale` one. False: the place has changed.
    fn take(&self, from: &Private<'_>, stale: Option<&OwnedFd>) -> Result<bool, Errno> {
        let rename = |flags| renameat_with(&from.folder, from.socket(), &self.folder, self.name, flags);
        let flags = if stale.is_some() { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
        match rename(flags) {
            Ok(()) => {}
            Err(Errno::EXIST | Errno::NOENT) => return Ok(false),
            // A file system that has no such renames.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                return renameat(&from.folder, from.socket(), &self.folder, self.name).map(|()| true);
            }
            Err(e) => return Err(e),
        }
        let Some(stale) = stale else { return Ok(true) };
        let replaced = facts_at(&from.folder, from.socket())?;
        if inode(&replaced) == inode(&facts(stale)?) {
            return Ok(true);
        }
        // Another process was quicker: its socket goes back.
        rename(flags).or_else(|_| rename(RenameFlags::NOREPLACE)).map(|()| false)
    }
}

/// A folder in which no other user can do anything. A socket in it is moved out once
/// it listens; the folder goes away.
#[derive(Debug)]
struct Private<'a> {
    place: &'a Place<'a>,
    name: OsString,
    folder: OwnedFd,
}

impl<'a> Private<'a> {
    fn make(place: &'a Place<'a>) -> Result<Self, Errno> {
        for _ in 0..TRIES {
            let mut name = OsString::from(".");
            name.push(place.name);
            name.push(format!(".{:08x}", fastrand::u32(..)));
            match with_umask(0o077, || mkdirat(&place.folder, &name, Mode::RWXU)) {
                Err(Errno::EXIST) => continue,
                made => made?,
            }
            let folder = openat(&place.folder, &name, LOOK | OFlags::DIRECTORY, Mode::empty())
                .inspect_err(|_| _ = unlinkat(&place.folder, &name, AtFlags::REMOVEDIR))?;
            let facts = facts(&folder)?;
            if facts.stx_uid != geteuid().as_raw() || facts.stx_mode & 0o077 != 0 {
                return Err(Errno::PERM); // not the one that was made
            }
            return Ok(Self { place, name, folder });
        }
        Err(Errno::EXIST)
    }

    /// The name that `ss` shows as its address: the final one where there is room.
    fn socket(&self) -> &OsStr {
        if self.place.name.len() <= 80 { self.place.name } else { OsStr::new("socket") }
    }

    fn listen(&self, mode: u32) -> Result<UnixListener, Errno> {
        let mut address = OsString::from(format!("/proc/self/fd/{}/", self.folder.as_raw_fd()));
        address.push(self.socket());
        let address = SocketAddrUnix::new(address)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        with_umask(0o777 & !mode, || bind(&socket, &address))?;
        rustix::net::listen(&socket, -1)?; // as many as the kernel allows
        Ok(socket.into())
    }
}

impl Drop for Private<'_> {
    fn drop(&mut self) {
        // The stale socket, or ours, if it did not get to its place.
        let _none = unlinkat(&self.folder, self.socket(), AtFlags::empty());
        let _gone_already = unlinkat(&self.place.folder, &self.name, AtFlags::REMOVEDIR);
    }
}

/// The umask is the whole process's; no thread of ours makes a file meanwhile.
fn with_umask<T>(mask: u32, make: impl FnOnce() -> T) -> T {
    let before = umask(Mode::from_raw_mode(mask));
    let made = make();
    umask(before);
    made
}

/// A socket's place, and what tells ours from one that another process put there.
#[derive(Debug)]
pub struct OwnPath {
    path: PathBuf,
    folder: OwnedFd,
    inode: Inode,
}

impl OwnPath {
    /// That of a listener that an earlier process of ours made; `None` if its path is
    /// gone, or leads to something else than a socket.
    #[must_use]
    pub fn taken_over(path: &Path) -> Option<Self> {
        let place = Place::find(path, "").ok()?;
        let facts = facts_at(&place.folder, place.name).ok()?;
        let own = Self { path: path.into(), folder: place.folder, inode: inode(&facts) };
        other_than_socket(&facts).is_none().then_some(own)
    }

    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder that it is in.
    #[must_use]
    pub fn folder(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }

    /// Removes it, unless a successor already listens there.
    pub fn remove(&self) {
        let name = self.path.file_name().unwrap_or_default();
        if facts_at(&self.folder, name).is_ok_and(|there| inode(&there) == self.inode) {
            let _gone_already = unlinkat(&self.folder, name, AtFlags::empty());
        }
    }
}

/// What the name of a control socket has behind that of its disk's socket, by default.
pub const CONTROL: &str = ".control";

/// Where the control socket of a disk's socket is by default.
#[must_use]
pub fn beside(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(CONTROL);
    name.into()
}

/// What people call a disk whose socket, or control socket, is there: of `/run/vublk/vm1.sock` and of
/// `/run/vublk/vm1/control` it is vm1.
#[must_use]
pub fn disk_name(socket: &Path) -> String {
    let name = socket.file_name().unwrap_or(socket.as_os_str()).to_string_lossy();
    if name == "control"
        && let Some(folder) = socket.parent().and_then(Path::file_name)
    {
        return folder.to_string_lossy().into_owned();
    }
    let name = name.strip_suffix(CONTROL).unwrap_or(&name);
    Path::new(name).file_stem().unwrap_or(OsStr::new(name)).to_string_lossy().into_owned()
}

/// Makes sure that vublkd may listen on `path`, as far as can be told without doing
/// it. `option`: what the user calls it.
///
/// # Errors
/// [`ListenError`].
pub fn check(path: &Path, option: &'static str) -> Result<(), ListenError> {
    if path.as_os_str().len() > MAX_PATH {
        let long = path.as_os_str().len();
        let why = format!("a path of {long} bytes, and that of a socket has at most {MAX_PATH}");
        return Err(error(path, format!("{why}. Choose a shorter {option}")));
    }
    Place::find(path, option)?.stale().map(drop)
}

/// Removes a socket on which no process listens any more, if that is what is there.
pub fn remove_stale(path: &Path) {
    if let Ok(place) = Place::find(path, "")
        && let Ok(Some(_)) = place.stale()
    {
        let _gone_already = unlinkat(&place.folder, place.name, AtFlags::empty());
    }
}

/// Closes the connections that wait on these sockets, and those that come within `time`; gives how many those were.
///
/// QEMU tries again at once, three times, and with a disk that is being attached its guest stands still meanwhile.
pub fn turn_away(listeners: &[OwnedFd], time: Duration) -> usize {
    let end = Instant::now() + time;
    let fds: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
    let mut gone = 0;
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|_| !fds.is_empty()) {
        if wait_for(&fds, Some(left)).is_err() {
            break;
        }
        for listener in &fds {
            if sys::readable_within(listener, Duration::ZERO).unwrap_or(false)
                && let Ok(caller) = accept_with(listener, SocketFlags::CLOEXEC)
            {
                sys::hang_up(caller);
                gone += 1;
            }
        }
    }
    gone
}

/// Listens on `path`, of any length, in place of a stale socket; accepting does not wait. `owner`: the user and the
/// group that the socket is to belong to, if it is not this process's.
///
/// # Errors
/// [`ListenError`].
pub fn listen(
    path: &Path,
    mode: u32,
    owner: Option<(u32, u32)>,
    option: &'static str,
) -> Result<(UnixListener, OwnPath), ListenError> {
    let place = Place::find(path, option)?;
    let failed = |e| place.failed(e);
    let private = Private::make(&place).map_err(failed)?;
    let listener = private.listen(mode).map_err(failed)?;
    if let Some((uid, gid)) = owner {
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        // Where no other user can put something else.
        chownat(&private.folder, private.socket(), uid, gid, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    }
    let made = facts_at(&private.folder, private.socket()).map_err(failed)?;
    for _ in 0..TRIES {
        let stale = place.stale()?;
        if place.take(&private, stale.as_ref()).map_err(failed)? {
            let folder = fcntl_dupfd_cloexec(&place.folder, 0).map_err(failed)?;
            return Ok((listener, OwnPath { path: path.into(), folder, inode: inode(&made) }));
        }
    }
    Err(failed(Errno::BUSY))
}

/// Connects to the socket at `path`, of any length.
///
/// # Errors
/// As connect(2).
pub fn connect_to(path: &Path) -> io::Result<UnixStream> {
    let there = openat(CWD, path, LOOK.difference(OFlags::NOFOLLOW), Mode::empty())?;
    match other_than_socket(&facts(&there)?) {
        Some(what) => Err(io::Error::other(format!("it is {what}, not a socket"))),
        None => connect_to_inode(&there).map_err(|e| match e {
            Errno::AGAIN => io::Error::other("it has no room for another connection"),
            e => e.into(),
        }),
    }
}

/// Connects to a socket that was opened with O_PATH.
fn connect_to_inode(there: &OwnedFd) -> Result<UnixStream, Errno> {
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}", there.as_raw_fd()))?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(CONNECT_TIME))?;
    connect(&socket, &address)?;
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (control, name) in [
            ("/run/vublk/vm1.sock.control", "vm1"),
            ("/run/vublk/vm1.control", "vm1"),
            ("disk.root.sock.control", "disk.root"),
            ("/run/vublk/vm1/control", "vm1"),
            ("control", "control"),
        ] {
            assert_eq!(disk_name(Path::new(control)), name);
        }
    }
}
