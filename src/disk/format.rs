//! Images of other formats, which would be destroyed if they were served as raw disks.
//!
//! What it is: a format told by its magic, in QEMU's words.
//!
//! What it is not: a promise that a disk is raw: a guest can write whatever it likes. LUKS is
//! none of them: a guest that encrypts its own disk writes it.
//!
//! Invariant: looking changes nothing, neither the disk nor what of it is in the page cache
//! where O_DIRECT can be had.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

/// Offset, bytes there, and the format; the first that fits is it. A second word is what else
/// it is called.
const MAGICS: [(usize, &[u8], &str); 12] = [
    (0, b"QFI\xfb\0\0\0\x01", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc (VHD)"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
];
/// The same for the last sector. A VHD of fixed size begins like a raw disk.
const LAST: [(&[u8], &str); 2] = [(b"conectix", "vpc (VHD)"), (b"koly", "dmg")];

/// Bytes that are read at a time: a multiple of every device's block.
const CHUNK: usize = 64 << 10;
const SECTOR: usize = 512;

/// The format that an open disk seems to be an image of; `None`: no other than raw.
#[must_use]
pub fn of(disk: &File) -> Option<&'static str> {
    match ends(disk, libc::O_DIRECT).or_else(|_| ends(disk, 0)) {
        Ok((head, tail)) => by_magic(&head, &tail),
        Err(e) => {
            tracing::warn!("cannot look for an image format: {e}");
            None
        }
    }
}

/// The first and the last chunk.
fn ends(disk: &File, flags: i32) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let path = format!("/proc/self/fd/{}", disk.as_raw_fd());
    let mut file = File::options().read(true).custom_flags(flags | libc::O_NONBLOCK).open(path)?;
    let size = file.seek(SeekFrom::End(0))?;
    let read = |at| -> io::Result<Vec<u8>> {
        let mut room = vec![0; 2 * CHUNK];
        let start = room.as_ptr().align_offset(CHUNK).min(CHUNK);
        let part = room.get_mut(start..start + CHUNK).unwrap_or_default();
        let got = file.read_at(part, at)?;
        Ok(part.get(..got).unwrap_or_default().to_vec())
    };
    let last = size.saturating_sub(1);
    Ok((read(0)?, read(last - last % CHUNK as u64)?))
}

fn by_magic(head: &[u8], tail: &[u8]) -> Option<&'static str> {
    let begins = |&(at, magic, _): &(usize, &[u8], _)| head.get(at..).is_some_and(|h| h.starts_with(magic));
    let last = tail.get(tail.len().saturating_sub(SECTOR)..).unwrap_or_default();
    // A vmdk whose data is in other files: text, comments before its version.
    let mut lines = head.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"));
    let versions: [&[u8]; 3] = [b"version=1", b"version=2", b"version=3"];
    let is_descriptor =
        head.starts_with(b"# Disk DescriptorFile") || first.is_some_and(|l| versions.contains(&l));
    let named = MAGICS.iter().find(|magic| begins(magic)).map(|&(_, _, name)| name);
    named
        .or_else(|| is_descriptor.then_some("vmdk"))
        .or_else(|| LAST.iter().find(|(magic, _)| last.starts_with(magic)).map(|&(_, name)| name))
}
