//! The file of `--config` as the running daemon understood it, kept for its successors.
//!
//! What it is: its text, in the store beside what the disks keep there.
//!
//! What it is not: it is not parsed here.
//!
//! Invariant: a daemon that dies is followed by one that serves the same disks, whatever was written into the file
//! meanwhile. The file is read anew after an upgrade, a restart and a stop; where it makes no sense then, or where a disk
//! is not served by it that a guest has, the kept text counts on.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::MemfdFlags;

use crate::manager::{Kind, Manager};
use crate::store::{FdId, Inherited, Store, number};
use crate::sys;

/// Its number in the store; no descriptor of a disk's has it.
const NUMBER: FdId = 0;
/// Bytes of a file.
const MOST: u64 = 1 << 20;
/// The first byte: whether the file is to be read anew.
const COUNTS: u8 = b'=';
const OUTDATED: u8 = b'?';

/// See the head of the file.
#[derive(Debug)]
pub struct KeptFile {
    file: File,
    first: u8,
    text: String,
}

/// True for its name in the store.
#[must_use]
pub fn is_kept_file(name: &str) -> bool {
    number(name) == Some((NUMBER, ""))
}

impl KeptFile {
    /// What an earlier daemon kept.
    #[must_use]
    pub fn find(inherited: &Inherited) -> Option<Self> {
        let (_, fd) = inherited.fds.iter().find(|(name, _)| is_kept_file(name))?;
        let file = File::from(fd.try_clone().ok()?);
        let mut text = vec![0; usize::try_from(file.metadata().ok()?.len().min(MOST)).ok()?];
        file.read_exact_at(&mut text, 0).ok()?;
        let first = *text.first()?;
        let text = String::from_utf8(text.split_off(1)).ok()?;
        Some(Self { file, first, text })
    }

    /// Whatever ends the process from now on, the next one goes on with this text: until its disks are served another text
    /// has only been tried.
    pub fn count_on(&self) {
        self.mark(COUNTS);
    }

    /// The daemon ends in order: its successor reads the file anew.
    pub fn outdate(&self) {
        self.mark(OUTDATED);
    }

    fn mark(&self, first: u8) {
        if let Err(e) = sys::write_all_at(&self.file, &[first], 0) {
            tracing::error!("a successor may take another text for that of --config: {e}");
        }
    }

    /// Keeps this text, by which disks are served, in place of `earlier`. `None`: there is no store, or it does not keep it.
    #[must_use]
    pub fn keep(text: String, earlier: Option<Self>, manager: &Manager) -> Option<Self> {
        let socket = manager.socket().filter(|_| manager.kind() != Kind::Other)?;
        if let Some(earlier) = earlier.filter(|earlier| earlier.text == text) {
            return Some(earlier);
        }
        let kept = || -> io::Result<Self> {
            let file = File::from(rustix::fs::memfd_create("vublk-config", MemfdFlags::CLOEXEC)?);
            sys::write_all_at(&file, &[COUNTS], 0)?;
            sys::write_all_at(&file, text.as_bytes(), 1)?;
            let known = (manager.kind() == Kind::Systemd).then(Default::default);
            let mut store = Store::new(Arc::clone(socket), String::new(), known);
            store.remove(NUMBER)?;
            store.put(NUMBER, file.as_fd())?;
            store.settle()?;
            Ok(Self { file, first: COUNTS, text })
        };
        kept().inspect_err(|e| tracing::error!("cannot keep the file of --config for a successor: {e}")).ok()
    }

    /// True if the file is to be read anew.
    #[must_use]
    pub fn is_outdated(&self) -> bool {
        self.first != COUNTS
    }

    /// What was in the file.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }
}
