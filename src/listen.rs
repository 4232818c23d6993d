//! Listening on a path: the disk's socket, and the control socket.
//!
//! What it is: a socket that appears at its path with its mode and ready to be
//! connected to, in place of a stale one, and goes away with us.
//!
//! What it is not: it accepts no connection.
//!
//! Invariant: a path that another process listens on, or put there since, is
//! never taken or removed.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why this process cannot listen on a path. The last part of each is the option that
/// names it.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Another process serves on this path.
    #[error("{0}: another process is listening there. Stop it, or choose another {1}")]
    Live(PathBuf, &'static str),
    /// Something that is no socket is there.
    #[error("{0}: exists and is not a socket. Remove it, or choose another {1}")]
    NotASocket(PathBuf, &'static str),
    /// The socket cannot be made.
    #[error(
        "{0}: cannot listen there: {1}. Check that its folder exists and is writable, or choose another {2}"
    )]
    Bind(PathBuf, io::Error, &'static str),
}

/// A socket's path, and what tells ours from one that another put there.
#[derive(Debug)]
pub struct OwnPath {
    path: PathBuf,
    inode: (u64, u64),
}

impl OwnPath {
    /// That of a listener that an earlier process of ours made; `None` if its path is
    /// gone, or leads to something else than a socket.
    #[must_use]
    pub fn taken_over(path: &Path) -> Option<Self> {
        let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
        if is_socket { Some(Self { path: path.into(), inode: Self::inode(path).ok()? }) } else { None }
    }

    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn inode(path: &Path) -> io::Result<(u64, u64)> {
        std::fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
    }

    /// Removes it, unless a successor already listens there.
    pub fn remove(&self) {
        if Self::inode(&self.path).is_ok_and(|now| now == self.inode) {
            let _gone_already = std::fs::remove_file(&self.path);
        }
    }
}

/// Makes sure that no process listens on `path`. `option`: what the user calls it.
///
/// # Errors
/// [`ListenError::Live`], [`ListenError::NotASocket`].
pub fn check(path: &Path, option: &'static str) -> Result<(), ListenError> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => Err(ListenError::NotASocket(path.into(), option)),
        Ok(_) if UnixStream::connect(path).is_ok() => Err(ListenError::Live(path.into(), option)),
        _ => Ok(()),
    }
}

/// Listens on `path`, in place of a stale socket.
///
/// # Errors
/// Each of [`ListenError`].
pub fn listen(path: &Path, mode: u32, option: &'static str) -> Result<(UnixListener, OwnPath), ListenError> {
    check(path, option)?;
    let bind = |e| ListenError::Bind(path.into(), e, option);
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}", std::process::id()));
    let fresh = path.with_file_name(name);
    let listener = UnixListener::bind(&fresh).map_err(bind)?;
    let published = std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(mode))
        .and_then(|()| OwnPath::inode(&fresh))
        .and_then(|inode| std::fs::rename(&fresh, path).map(|()| inode));
    match published {
        Ok(inode) => Ok((listener, OwnPath { path: path.into(), inode })),
        Err(e) => {
            let _left = std::fs::remove_file(&fresh);
            Err(bind(e))
        }
    }
}
