//! `vublk inspect`: opens a disk as vublkd would, or asks the server that has it.
//!
//! What it is not: [`crate::inspect`] makes the report.
//!
//! Invariant: nothing is changed.

use std::fmt::Display;
use std::fs::File;
use std::io;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::json;

use crate::disk::uri::Uri;
use crate::disk::{Disk, DiskError, Options, format};
use crate::engine::uring::Uring;
use crate::inspect::{self, Layout, Report, rbd, remote};
use crate::promise::{self, Promise};

pub(super) fn inspect(disk: PathBuf, direct: bool, as_json: bool) -> Result<String, String> {
    if let Some(text) = disk.to_str().filter(|text| Uri::is_meant(text)) {
        if !direct {
            return Err(format!("--buffered is for files, and {text} is a disk on another machine"));
        }
        return match Uri::parse(text)? {
            Uri::Nbd(uri) => told(remote::inspect(&uri, true).map_err(|e| e.to_string())?, as_json),
            Uri::Rbd(uri) => told(rbd::inspect(&uri).map_err(|e| format!("{uri}: {e}"))?, as_json),
        };
    }
    let (_, report) = open(disk, direct).map_err(|e| e.to_string())?;
    told(report, as_json)
}

fn told(report: impl Serialize + Display, as_json: bool) -> Result<String, String> {
    Ok(if as_json { format!("{}\n", json!(report)) } else { report.to_string() })
}

/// Opens a disk for reading, and finds out what is to be told of it.
pub(super) fn open(path: PathBuf, direct: bool) -> Result<(Disk, Report), DiskError> {
    let options = Options {
        path,
        direct,
        read_only: true,
        instance: format!("inspect-{}", std::process::id()),
        ..Options::default()
    };
    let disk = Disk::open(&options, &|| false)?;
    let promise = Promise::new(&disk, &promise::Options::default())?;
    let Some(file) = disk.file() else {
        let kind = io::Error::from(io::ErrorKind::Unsupported);
        return Err(DiskError::Io(disk.path().to_owned(), "look at it as a file", kind)); // not reached: it has a path
    };
    let report = report(&disk, file, &promise, direct);
    Ok((disk, report))
}

/// A disk under the names of the report.
fn report(disk: &Disk, file: &File, promise: &Promise, direct: bool) -> Report {
    let backing = &disk.backing;
    let io_uring = Uring::probe();
    Report {
        path: disk.path().display().to_string(),
        kind: if backing.is_device { inspect::BLOCK_DEVICE } else { inspect::FILE },
        size: promise.bytes(),
        block: promise.block,
        physical_block: promise.physical_block(),
        optimal_io: promise.optimal_io(),
        direct,
        offset_align: backing.block,
        mem_align: backing.mem_align(),
        discard_granularity: backing.discard_unit,
        dsync: backing.dsync,
        in_memory: backing.in_memory,
        io_uring: io_uring.is_ok(),
        io_uring_error: io_uring.err().map(|e| e.to_string()),
        layout: Layout::of(file),
        // Last: reading with O_DIRECT may write cached pages back.
        format: format::of(file).unwrap_or("raw"),
    }
}
