//! How the store behind a disk wants to be spoken to, as it is now.
//!
//! What it is: alignments, the odd end of a file, and what fallocate turned out to do:
//! everything that decides HOW a request is carried out.
//!
//! What it is not: nothing here is told to the guest ([`crate::promise`] is what it is
//! told), so all of it may differ after a restart, on another host, or a minute later.
//!
//! Invariant: what the store can do is found out by doing it. A call that it does not know
//! is remembered and done by other means; nothing is tried out at start, on an image that
//! may be another daemon's yet.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::nbd::handshake::Export;
use crate::sys;

/// A block that the store asks for, if it does not say: what no file system exceeds for
/// direct I/O on the usual disks.
const ASSUMED_BLOCK: u32 = 4096;

/// What librbd takes for a discard that is worth it (rbd_discard_granularity_bytes), bytes.
const IMAGE_DISCARD: u32 = 64 << 10;

/// The smallest unit of every request, bytes.
const SECTOR: u64 = 512;

/// What a DISCARD does, in QEMU's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discard {
    /// The blocks are given back to the store.
    #[default]
    Unmap,
    /// Nothing: a preallocated image stays allocated.
    Ignore,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Backing {
    /// Offsets and lengths on the disk are multiples of this, bytes; a power of two. 1: any
    /// byte will do.
    pub block: u64,
    /// fallocate(2) takes multiples of this, bytes; a power of two.
    pub fallocate_align: u64,
    /// A DISCARD gives back multiples of this, bytes.
    pub discard_unit: u64,
    /// RWF_DSYNC reaches the device. Not so on FUSE, which ignores it; and through the page cache
    /// its error may be about another write.
    pub dsync: bool,
    /// A block device, not a file.
    pub is_device: bool,
    /// tmpfs, zram or a RAM disk: operations are copies, and io_uring, whose calls must not
    /// block, would give each to a kernel thread.
    pub in_memory: bool,
    /// Opened for reading only.
    pub read_only: bool,
    discard: Discard,
    path: PathBuf,
    /// Addresses of direct I/O are multiples of this, bytes; a power of two. Grows when the
    /// kernel turns out to want more than it said.
    mem_align: AtomicU32,
    /// Where the last, partial block of a file begins, bytes; `u64::MAX`: there is none.
    tail: AtomicU64,
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    no_discard: AtomicBool,
    /// io_uring has no discard here.
    discards_by_call: AtomicBool,
}

impl Backing {
    /// Looks at an open file or block device; `direct`: it was opened with O_DIRECT.
    #[must_use]
    pub fn of(file: &File, path: PathBuf, direct: bool, read_only: bool, discard: Discard) -> Self {
        let device = DeviceLimits::of(file);
        let kind = rustix::fs::fstatfs(file).map_or(0, |fs| fs.f_type);
        let on_tmpfs = device.is_none() && kind == TMPFS;
        let (mem, block) = match (&device, sys::dio_align(file)) {
            _ if !direct || on_tmpfs => (1, 1), // both are the page cache, which takes any byte
            (Some(limits), said) => (said.map_or(limits.logical_block, |(mem, _)| mem), limits.logical_block),
            // A probe by reading would lie: ext4 reads a hole at any alignment.
            (None, Some((mem, offset))) if offset.is_power_of_two() => (mem, offset),
            (None, _) => (ASSUMED_BLOCK, ASSUMED_BLOCK),
        };
        let backing = Self {
            fallocate_align: device.as_ref().map_or(1, |limits| limits.logical_block.into()),
            discard_unit: device.as_ref().map_or(ASSUMED_BLOCK, |limits| limits.discard_granularity).into(),
            dsync: direct && (device.is_some() || DSYNC_WORKS.contains(&kind)),
            is_device: device.is_some(),
            in_memory: device.as_ref().map_or(on_tmpfs, |limits| limits.in_memory),
            read_only,
            discard,
            path,
            mem_align: AtomicU32::new(mem.next_power_of_two()),
            ..Self::nowhere(block.into())
        };
        backing.resized(file.metadata().map_or(0, |meta| meta.len()));
        backing
    }

    /// An export of an NBD server, which is spoken to as a block device is.
    #[must_use]
    pub fn of_export(export: &Export, path: PathBuf, read_only: bool, discard: Discard) -> Self {
        let block = u64::from(export.block.minimum);
        let flags = export.flags;
        let no_zeroes = !flags.can_write_zeroes();
        Self {
            // The server writes a part of a block itself; it is asked for less often by whole ones.
            fallocate_align: block.max(SECTOR),
            discard_unit: u64::from(export.block.preferred.max(ASSUMED_BLOCK)),
            dsync: flags.can_fua(),
            is_device: true,
            read_only,
            discard,
            path,
            mem_align: AtomicU32::new(1),
            no_punch: AtomicBool::new(no_zeroes),
            no_zero_range: AtomicBool::new(no_zeroes),
            no_discard: AtomicBool::new(!flags.can_trim()),
            ..Self::nowhere(block)
        }
    }

    /// An image of a Ceph cluster: any byte will do, and what was answered is durable, for librbd keeps no cache.
    #[must_use]
    pub fn of_image(path: PathBuf, read_only: bool, discard: Discard) -> Self {
        Self {
            fallocate_align: SECTOR,
            discard_unit: IMAGE_DISCARD.into(),
            dsync: true,
            is_device: true,
            read_only,
            discard,
            path,
            mem_align: AtomicU32::new(1),
            ..Self::nowhere(1)
        }
    }

    /// A file of whole blocks that takes all that fallocate can do, and is nowhere: what a look
    /// at a file begins with, and what the machine is tested on.
    #[must_use]
    pub fn nowhere(block: u64) -> Self {
        Self {
            block,
            fallocate_align: 1,
            discard_unit: block,
            dsync: false,
            is_device: false,
            in_memory: false,
            read_only: false,
            discard: Discard::Unmap,
            path: PathBuf::new(),
            mem_align: AtomicU32::new(u32::try_from(block).unwrap_or(ASSUMED_BLOCK)),
            tail: AtomicU64::new(u64::MAX),
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            no_discard: AtomicBool::new(false),
            discards_by_call: AtomicBool::new(false),
        }
    }

    /// Asks for blocks of so many bytes, a power of two: a store of larger blocks than it has.
    pub fn set_block(&mut self, block: u64, bytes: u64) {
        self.block = block;
        self.mem_align = AtomicU32::new(u32::try_from(block).unwrap_or(ASSUMED_BLOCK));
        self.resized(bytes);
    }

    /// The file has `bytes` bytes now.
    pub fn resized(&self, bytes: u64) {
        let partial = !self.is_device && bytes & (self.block - 1) != 0;
        let tail = if partial { bytes & !(self.block - 1) } else { u64::MAX };
        self.tail.store(tail, Ordering::Relaxed);
    }

    /// Where the last, partial block of a file begins, bytes: direct I/O would write past the
    /// end of the file there, and make it longer. `u64::MAX`: there is none.
    #[inline]
    #[must_use]
    pub fn tail(&self) -> u64 {
        self.tail.load(Ordering::Relaxed)
    }

    /// Alignment of direct I/O's buffers, bytes; a power of two.
    #[inline]
    #[must_use]
    pub fn mem_align(&self) -> u32 {
        self.mem_align.load(Ordering::Relaxed)
    }

    /// An operation that fitted all known rules was refused: ask for whole pages from now on.
    pub fn raise_mem_align(&self) {
        let direct = self.block > 1; // the page cache has no such rules
        if direct && self.mem_align.fetch_max(4096, Ordering::Relaxed) < 4096 {
            tracing::warn!(
                disk = %self.path.display(),
                "the kernel refused a buffer that its own rules allow; asking for 4096-byte alignment from now on"
            );
        }
    }

    /// True if a request may have to read a block in order to write a part of it.
    #[inline]
    #[must_use]
    pub fn can_modify(&self) -> bool {
        self.block > SECTOR
    }

    /// Whether a DISCARD is worth a call.
    #[must_use]
    pub fn may_discard(&self) -> bool {
        self.discard == Discard::Unmap && !self.no_discard.load(Ordering::Relaxed)
    }

    /// The store has no discard.
    pub fn cannot_discard(&self) {
        self.no_discard.store(true, Ordering::Relaxed);
    }

    /// Whether discards are made by a call, on the worker's own thread.
    #[must_use]
    pub fn discards_by_call(&self) -> bool {
        self.discards_by_call.load(Ordering::Relaxed)
    }

    /// io_uring refused one: it has them since Linux 6.12 only.
    pub fn discard_by_call(&self) {
        self.discards_by_call.store(true, Ordering::Relaxed);
    }

    /// Whether zeroes may be made by giving blocks back.
    #[must_use]
    pub fn may_punch(&self) -> bool {
        self.discard == Discard::Unmap && !self.no_punch.load(Ordering::Relaxed)
    }

    /// FALLOC_FL_PUNCH_HOLE is not known here.
    pub fn cannot_punch(&self) {
        self.no_punch.store(true, Ordering::Relaxed);
    }

    /// Whether zeroes may be made in blocks that stay.
    #[must_use]
    pub fn may_zero_range(&self) -> bool {
        !self.no_zero_range.load(Ordering::Relaxed)
    }

    /// FALLOC_FL_ZERO_RANGE is not known here.
    pub fn cannot_zero_range(&self) {
        self.no_zero_range.store(true, Ordering::Relaxed);
    }
}

const TMPFS: i64 = 0x0102_1994;
/// File systems whose O_DSYNC writes are known to reach the device: ext4, XFS, btrfs.
const DSYNC_WORKS: [i64; 3] = [0xef53, 0x5846_5342, 0x9123_683e];

/// What a block device says of itself, in sysfs; bytes. None of it changes while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// BLKSSZGET.
    pub logical_block: u32,
    /// At least the logical block.
    pub physical_block: u32,
    /// The least that is written without a detour.
    pub minimum_io: u32,
    /// 0: the device does not say.
    pub optimal_io: u32,
    /// From the start of a physical block to that of the device.
    pub alignment_offset: u32,
    /// At least the logical block.
    pub discard_granularity: u32,
    /// zram or a RAM disk.
    pub in_memory: bool,
}

impl DeviceLimits {
    /// Of an image of a Ceph cluster, whose objects have so many bytes.
    #[must_use]
    pub fn of_image(object_size: u64) -> Self {
        Self {
            logical_block: 512,
            physical_block: ASSUMED_BLOCK,
            minimum_io: ASSUMED_BLOCK,
            optimal_io: u32::try_from(object_size).unwrap_or(0),
            alignment_offset: 0,
            discard_granularity: IMAGE_DISCARD,
            in_memory: false,
        }
    }

    /// Of an open block device; `None` for a file.
    #[must_use]
    pub fn of(file: &File) -> Option<Self> {
        use std::os::unix::fs::FileTypeExt;
        let meta = file.metadata().ok().filter(|meta| meta.file_type().is_block_device())?;
        let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
        let dir = format!("/sys/dev/block/{major}:{minor}");
        let read = |path: String| -> Option<u32> { std::fs::read_to_string(path).ok()?.trim().parse().ok() };
        // A partition has its queue in the whole disk's folder.
        let queue = |name: &str| {
            let found = ["queue", "../queue"].iter().find_map(|q| read(format!("{dir}/{q}/{name}")));
            found.unwrap_or(0)
        };
        let logical_block = sys::device_block(file).unwrap_or(ASSUMED_BLOCK);
        let name = std::fs::read_link(&dir).ok();
        let name = name.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        Some(Self {
            logical_block,
            physical_block: queue("physical_block_size").max(logical_block),
            minimum_io: queue("minimum_io_size").max(logical_block),
            optimal_io: queue("optimal_io_size"),
            // -1: the kernel knows that it is misaligned, not by how much.
            alignment_offset: read(format!("{dir}/alignment_offset")).unwrap_or(0),
            discard_granularity: queue("discard_granularity").max(logical_block),
            in_memory: name.is_some_and(|n| ["zram", "ram"].iter().any(|driver| n.starts_with(driver))),
        })
    }
}
