//! `vublk inspect`: what vublkd would make of a disk, and what of a file slows its
//! writes down.
//!
//! What it is: a [`Report`] as text or JSON, and the [`Layout`] of a regular file: its
//! cached pages, holes, unwritten and shared extents.
//!
//! What it is not: part of the daemon. vublkd neither needs a layout nor keeps one.
//!
//! Invariants: inspecting changes nothing, neither the file nor what of it is in the
//! page cache. The work has a limit, whatever the file system answers.
//!
//! [`remote`] reports disks of NBD servers, [`rbd`] images of a Ceph cluster.

pub mod calls;
pub mod rbd;
pub mod remote;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{Access, SeekFrom, access, seek};
use rustix::io::Errno;
use serde::Serialize;

use calls::Extent;

use crate::shell::quoted;

/// Counting stops after so many extents: some hundred milliseconds on ext4.
const MAX_EXTENTS: u64 = 1_000_000;
/// Largest file, in bytes, of which mincore looks up each page: some ten seconds.
const MAX_RESIDENT: u64 = 1 << 40;

/// [`Report::kind`] of a regular file.
pub const FILE: &str = "file";
/// [`Report::kind`] of a block device.
pub const BLOCK_DEVICE: &str = "block device";

/// What vublkd would make of a disk. The names of the fields are those of
/// `vublk inspect --json`.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was typed.
    pub path: String,
    /// [`FILE`] or [`BLOCK_DEVICE`].
    pub kind: &'static str,
    /// Bytes that the guest may use.
    pub size: u64,
    /// "raw", or what image it seems to be, in QEMU's words.
    pub format: &'static str,
    /// The guest's logical block, bytes.
    pub block: u32,
    /// The physical block, bytes.
    pub physical_block: u32,
    /// Bytes; 0 when unknown.
    pub optimal_io: u32,
    /// O_DIRECT.
    pub direct: bool,
    /// Offsets and lengths of an operation are multiples of this, bytes.
    pub offset_align: u64,
    /// Addresses of buffers are multiples of this, bytes.
    pub mem_align: u32,
    /// DISCARD is best in multiples of this, bytes.
    pub discard_granularity: u64,
    /// RWF_DSYNC makes a write durable; else fdatasync does.
    pub dsync: bool,
    /// The disk is memory: tmpfs, zram or a RAM disk.
    pub in_memory: bool,
    /// vublkd's default engine can be used here.
    pub io_uring: bool,
    /// Why it cannot.
    pub io_uring_error: Option<String>,
    /// All `None` for a block device.
    #[serde(flatten)]
    pub layout: Layout,
}

/// How a file lies in the page cache and in its file system. `None` is unknown.
///
/// Data that is dirty in the page cache is counted as the file system has it now: over
/// an unwritten extent it still counts as unwritten.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// Bytes in the page cache, in whole pages.
    pub cached_bytes: Option<u64>,
    /// Those of them that were changed and not written back.
    pub dirty_bytes: Option<u64>,
    /// Bytes without a place in the file system.
    pub hole_bytes: Option<u64>,
    /// Bytes that are allocated and were never written.
    pub unwritten_bytes: Option<u64>,
    /// Bytes in extents that other files have, too.
    pub shared_bytes: Option<u64>,
    /// How many extents there are.
    pub extents: Option<u64>,
    /// False when counting stopped early: holes and extents are then lower bounds.
    pub extents_complete: Option<bool>,
}

impl Layout {
    /// The layout of an open file; all `None` when it is not a regular one.
    #[must_use]
    pub fn of(file: &File) -> Self {
        let Ok(meta) = file.metadata() else { return Self::default() };
        if !meta.is_file() {
            return Self::default();
        }
        let size = meta.len();
        let (cached_bytes, dirty_bytes) = cached(file, meta.uid(), size);
        let cache = Self { cached_bytes, dirty_bytes, ..Self::default() };
        if let Ok(tally) = walk(|start| calls::extents(file, start, size - start), size, MAX_EXTENTS) {
            return Self {
                hole_bytes: Some(tally.holes),
                unwritten_bytes: Some(tally.unwritten),
                shared_bytes: Some(tally.shared),
                extents: Some(tally.extents),
                extents_complete: Some(tally.complete),
                ..cache
            };
        }
        match seek_holes(file, size, MAX_EXTENTS) {
            // A file system without SEEK_HOLE says that there is no hole.
            Ok((0, true)) if meta.blocks().saturating_mul(512) < size => cache,
            Ok((holes, complete)) => {
                Self { hole_bytes: Some(holes), extents_complete: Some(complete), ..cache }
            }
            Err(_) => cache,
        }
    }
}

/// Cached and dirty bytes of a file that belongs to user `owner`.
fn cached(file: &File, owner: u32, size: u64) -> (Option<u64>, Option<u64>) {
    let Ok(page) = calls::page_size() else { return (None, None) };
    match calls::cached_pages(file, size) {
        Ok(pages) => (Some(pages.cached * page), Some(pages.dirty * page)),
        // EPERM also from containers that do not know the system call.
        Err(e)
            if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM))
                && size <= MAX_RESIDENT
                && mincore_tells(file, owner) =>
        {
            (calls::resident_pages(file, size).ok().map(|pages| pages * page), None)
        }
        Err(_) => (None, None),
    }
}

/// Whether mincore answers truly: for others it says that all is cached.
fn mincore_tells(file: &File, owner: u32) -> bool {
    rustix::process::geteuid().as_raw() == owner
        || access(format!("/proc/self/fd/{}", file.as_raw_fd()), Access::WRITE_OK).is_ok()
}

/// Sums over a file's extents; all in bytes but `extents`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    /// Everything before this offset is counted.
    position: u64,
    holes: u64,
    unwritten: u64,
    shared: u64,
    extents: u64,
    complete: bool,
}

impl Tally {
    /// Counts an extent, as far as it lies in the file and was not counted before.
    fn add(&mut self, extent: &Extent, size: u64) {
        let start = extent.logical.clamp(self.position, size.max(self.position));
        let end = extent.logical.saturating_add(extent.length).min(size);
        if end <= start {
            return;
        }
        self.extents += 1;
        self.holes += start - self.position;
        if extent.flags & calls::UNWRITTEN != 0 {
            self.unwritten += end - start;
        }
        if extent.flags & calls::SHARED != 0 {
            self.shared += end - start;
        }
        self.position = end;
    }
}

/// Counts all extents of a file of `size` bytes. `extents_from` an offset gives a batch of
/// them; the first batch that reaches `limit` is the last.
fn walk(
    mut extents_from: impl FnMut(u64) -> io::Result<Vec<Extent>>,
    size: u64,
    limit: u64,
) -> io::Result<Tally> {
    let mut tally = Tally::default();
    while tally.position < size {
        let before = tally.position;
        let batch = extents_from(before)?;
        batch.iter().for_each(|extent| tally.add(extent, size));
        if batch.last().is_none_or(|last| last.flags & calls::LAST != 0) {
            tally.holes += size - tally.position;
            tally.position = size;
        } else if tally.position < size && (tally.position == before || tally.extents >= limit) {
            return Ok(tally);
        }
    }
    tally.complete = true;
    Ok(tally)
}

/// Bytes in holes, by SEEK_DATA and SEEK_HOLE, and whether that is all of them.
fn seek_holes(file: &File, size: u64, limit: u64) -> io::Result<(u64, bool)> {
    let mut holes = 0;
    let mut position = 0;
    for _ in 0..limit {
        let data = match seek(file, SeekFrom::Data(position)) {
            Ok(data) => data.min(size),
            Err(Errno::NXIO) => size,
            Err(e) => return Err(e.into()),
        };
        holes += data.saturating_sub(position);
        if data == size {
            return Ok((holes, true));
        }
        position = seek(file, SeekFrom::Hole(data))?;
        if position >= size {
            return Ok((holes, true));
        }
    }
    Ok((holes, false))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let yes = |on| if on { "yes" } else { "no" };
        let io_uring =
            self.io_uring_error.as_ref().map_or_else(|| yes(self.io_uring).into(), |e| format!("no: {e}"));
        writeln!(f, "{}: {}, {} bytes", self.path, self.kind, self.size)?;
        let refused = "; vublkd refuses it without --format=raw: qemu-img convert makes a raw disk of it";
        writeln!(f, "format             {}{}", self.format, if self.format == "raw" { "" } else { refused })?;
        writeln!(f, "block              {} bytes, physical {}", self.block, self.physical_block)?;
        writeln!(f, "optimal I/O        {} bytes (0: unknown)", self.optimal_io)?;
        writeln!(
            f,
            "direct I/O         {}: offsets in multiples of {}, buffers of {}",
            yes(self.direct),
            self.offset_align,
            self.mem_align
        )?;
        writeln!(f, "discard in units   {} bytes", self.discard_granularity)?;
        writeln!(f, "durable writes     {}", if self.dsync { "RWF_DSYNC" } else { "by fdatasync" })?;
        writeln!(f, "io_uring           {io_uring}")?;
        if self.kind == FILE {
            self.layout.fmt(f)?;
            self.costs(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at_least = if self.extents_complete == Some(false) { "at least " } else { "" };
        let bytes = |n: Option<u64>| n.map_or("unknown".into(), |n| format!("{at_least}{n} bytes"));
        // Counted in full, however many extents there are.
        let cached = self.cached_bytes.map_or("unknown".into(), |n| format!("{n} bytes"));
        let dirty = self.dirty_bytes.map_or(String::new(), |n| format!(", {n} of them not written back"));
        writeln!(f, "in the page cache  {cached}{dirty}")?;
        writeln!(f, "holes              {}", bytes(self.hole_bytes))?;
        writeln!(f, "unwritten extents  {}", bytes(self.unwritten_bytes))?;
        writeln!(f, "shared extents     {}", bytes(self.shared_bytes))?;
        match (self.extents, self.extents_complete) {
            (Some(n), Some(false)) => writeln!(f, "extents            more than {n}: counting stopped there"),
            (Some(n), _) => writeln!(f, "extents            {n}"),
            (None, _) => writeln!(f, "extents            unknown: the file system has no FIEMAP"),
        }
    }
}

impl Report {
    /// What slows the guest's writes down, and what to type. Nothing of it holds for
    /// memory, nor for writes through the page cache.
    fn costs(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.in_memory || !self.direct {
            return Ok(());
        }
        let at_least = if self.layout.extents_complete == Some(false) { "At least " } else { "" };
        let some = |n: Option<u64>| n.filter(|&n| n > 0);
        let path = quoted(&self.path);
        let copy = quoted(&format!("{}.new", self.path));
        let rewrite = format!("cp -p --reflink=never --sparse=never {path} {copy} && mv {copy} {path}");
        if let Some(n) = some(self.layout.cached_bytes) {
            writeln!(
                f,
                "\n{n} bytes are in the page cache. On Linux 6.19 and later a single cached page makes every direct \
                 write of\nthe file slower: it goes through a kernel worker. vublkd drops these pages when it opens \
                 the disk, but a backup\nprogram that reads the image through the page cache brings them back: let it \
                 read with O_DIRECT. To drop them now:\n    sync {path} && dd if={path} iflag=nocache count=0"
            )?;
        }
        if let Some(n) = some(self.layout.hole_bytes) {
            writeln!(
                f,
                "\n{at_least}{n} bytes are holes. The first write into a hole is slower: the file system allocates blocks, on \
                 a kernel thread.\nTo allocate them all before the first use:\n    fallocate -l {} {path}",
                self.size
            )?;
        }
        if let Some(n) = some(self.layout.unwritten_bytes) {
            writeln!(
                f,
                "\n{at_least}{n} bytes are in unwritten (preallocated) extents. The first write into one is slower, though \
                 less so than into\na hole: the file system marks it as written. To write the whole image once, while \
                 no vublkd serves it:\n    {rewrite}"
            )?;
        }
        if let Some(n) = some(self.layout.shared_bytes) {
            writeln!(
                f,
                "\n{at_least}{n} bytes are in extents shared with another file (a reflink or a snapshot). The first write into \
                 each is slower:\nthe file system copies it or gives the file new blocks. To give the image blocks \
                 of its own, while no vublkd serves it:\n    {rewrite}"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn extent(logical: u64, length: u64, flags: u32) -> Extent {
        Extent { logical, length, flags, ..Extent::default() }
    }

    #[test]
    fn holes_lie_before_between_and_behind_extents() {
        let extents = [
            extent(10, 10, 0),
            extent(30, 10, calls::UNWRITTEN),
            extent(40, 10, calls::SHARED | calls::LAST),
        ];
        let tally = walk(|_| Ok(extents.to_vec()), 100, 1000).expect("no error");
        let want = Tally { position: 100, holes: 70, unwritten: 10, shared: 10, extents: 3, complete: true };
        assert_eq!(tally, want);
    }

    #[test]
    fn only_the_part_inside_the_file_counts_and_only_once() {
        let batches = [
            vec![extent(0, 50, calls::UNWRITTEN)],
            // The second call gets the extent that it begins in, and blocks past the end.
            vec![extent(0, 60, calls::UNWRITTEN), extent(60, 100, calls::UNWRITTEN), extent(160, 8, 0)],
        ];
        let mut batches = batches.into_iter();
        let tally = walk(|_| Ok(batches.next().unwrap_or_default()), 100, 1000).expect("no error");
        assert_eq!((tally.unwritten, tally.holes, tally.complete), (100, 0, true));
    }

    #[test]
    fn counting_has_a_limit() {
        let tally = walk(|start| Ok(vec![extent(start + 1, 1, 0)]), u64::MAX, 1000).expect("no error");
        assert_eq!((tally.extents, tally.holes, tally.complete), (1000, 1000, false));
        let stuck = walk(|_| Ok(vec![extent(0, 1, 0)]), 100, 1000).expect("no error");
        assert_eq!((stuck.extents, stuck.complete), (1, false));
        let overflow = walk(|_| Ok(vec![extent(u64::MAX, u64::MAX, 0)]), 100, 1000).expect("no error");
        assert!(!overflow.complete);
    }

    #[test]
    fn both_ways_to_find_holes_agree() {
        let file = tempfile::tempfile().expect("temp file");
        file.set_len(64 * MIB).expect("size");
        for at in [0, 8 * MIB, 40 * MIB] {
            file.write_all_at(&vec![1; 1 << 20], at).expect("write");
        }
        file.sync_all().expect("sync");
        assert_eq!(seek_holes(&file, 64 * MIB, 1000).expect("seek"), (61 * MIB, true));
        assert_eq!(seek_holes(&file, 64 * MIB, 2).expect("seek"), (7 * MIB, false));
        let layout = Layout::of(&file);
        assert_eq!(layout.hole_bytes, Some(61 * MIB), "{layout:?}");
    }

    #[test]
    fn both_ways_to_count_cached_pages_agree() {
        // Longer than one window of mincore.
        let size = 600 * MIB;
        let file = tempfile::tempfile().expect("temp file");
        file.set_len(size).expect("size");
        for at in [0, 300 * MIB, size - MIB] {
            file.write_all_at(&vec![1; 1 << 20], at).expect("write");
        }
        assert_eq!(
            calls::resident_pages(&file, size).expect("mincore") * calls::page_size().expect("page"),
            3 * MIB
        );
        if let Ok(pages) = calls::cached_pages(&file, size) {
            assert_eq!(calls::resident_pages(&file, size).expect("mincore"), pages.cached);
        }
    }
}
