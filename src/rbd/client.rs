//! The name of a cluster's client, where it outlives the daemon that was it.
//!
//! What it is: a memfd with the text, in the store of descriptors.
//!
//! What it is not: it asks no cluster.
//!
//! Invariant: the name is in the store before the client takes a lock.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::nbd::remote;

/// The first number in the store of a client's name; those before it are of NBD servers.
pub const FIRST_ID: u32 = 1 << 25;
const _: () = assert!(FIRST_ID > remote::FIRST_ID);
/// Longest name, bytes: an address of each protocol that Ceph knows.
const MAX_NAME: usize = 512;

/// A memfd with a client's name.
///
/// # Errors
/// As memfd_create(2) and write(2).
pub fn named(name: &str) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("vublk-client", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.write_all(name.as_bytes())?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file.into())
}

/// The name in it.
///
/// # Errors
/// As pread(2).
pub fn name_in(fd: impl AsFd) -> io::Result<String> {
    let mut bytes = [0; MAX_NAME];
    let count = rustix::io::pread(fd, &mut bytes, 0)?;
    let text = bytes.get(..count).unwrap_or_default();
    Ok(String::from_utf8_lossy(text).into_owned())
}
