//! Backing files: sparse, in a folder of their own, with contents that can be
//! checked sector by sector.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

pub const SECTOR: usize = 512;

/// A folder with one backing file in it; both go away with the value.
pub struct Disk {
    pub dir: TempDir,
    pub path: PathBuf,
    pub sectors: u64,
}

/// How many sectors of a new disk hold `pattern`; the rest is a hole.
pub const PATTERNED: u64 = 4096;

impl Disk {
    /// 64 MiB, the first 2 MiB of them patterned.
    pub fn new() -> Self {
        Self::of_size(64 << 20)
    }

    pub fn of_size(bytes: u64) -> Self {
        let dir = tempfile::Builder::new().prefix("vublk-").tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let file = File::create(&path).unwrap();
        file.set_len(bytes).unwrap();
        let sectors = bytes / SECTOR as u64;
        let filled = pattern(0, PATTERNED.min(sectors));
        file.write_all_at(&filled, 0).unwrap();
        Self { dir, path, sectors }
    }

    /// What the file holds now, through the page cache.
    pub fn read(&self, sector: u64, sectors: u64) -> Vec<u8> {
        let mut data = vec![0; usize::try_from(sectors).unwrap() * SECTOR];
        File::open(&self.path).unwrap().read_exact_at(&mut data, sector * SECTOR as u64).unwrap();
        data
    }

    /// Whether the file system under the disk takes O_DIRECT.
    pub fn takes_direct(&self) -> bool {
        takes_direct(&self.path)
    }
}

/// Whether this file can be opened with O_DIRECT.
pub fn takes_direct(path: &Path) -> bool {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).is_ok()
}

/// Bytes that differ in every word of every sector.
pub fn pattern(sector: u64, sectors: u64) -> Vec<u8> {
    salted(0, sector, sectors)
}

/// The same for another generation of writes.
pub fn salted(salt: u64, sector: u64, sectors: u64) -> Vec<u8> {
    let words = sectors * (SECTOR as u64 / 8);
    let first = sector * (SECTOR as u64 / 8);
    (first..first + words)
        .flat_map(|word| (word + 1 + (salt << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect()
}

/// Compares long buffers and tells where they part, not all of what they hold.
#[track_caller]
pub fn assert_same(got: &[u8], want: &[u8], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    if let Some(at) = got.iter().zip(want).position(|(a, b)| a != b) {
        let end = (at + 16).min(got.len());
        panic!("{what}: differs from byte {at}: got {:02x?}, want {:02x?}", &got[at..end], &want[at..end]);
    }
}
