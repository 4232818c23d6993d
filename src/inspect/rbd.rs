//! What `vublk inspect` reports of an image of a Ceph cluster.
//!
//! What it is: a [`Report`] as text or JSON.
//!
//! What it is not: it counts no objects that the cluster would have to look for one by one.
//!
//! Invariant: nothing is written, and no lock taken.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::rbd::image::{How, Image, RbdError};
use crate::rbd::library::{FEATURE_EXCLUSIVE_LOCK, FEATURE_FAST_DIFF, FEATURES};
use crate::rbd::uri::Uri;

/// [`Report::kind`].
pub const IMAGE: &str = "Ceph RBD image";

/// An image, in the names of `vublk inspect --json`.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The URI.
    pub path: String,
    /// [`IMAGE`].
    pub kind: &'static str,
    /// Bytes.
    pub size: u64,
    /// Bytes of its objects.
    pub object_size: u64,
    /// What it has, in Ceph's words.
    pub features: Vec<&'static str>,
    /// vublkd serves it for writing too.
    pub exclusive_lock: bool,
    /// The client that has it now.
    pub owner: Option<String>,
    /// Bytes of its objects that there are. `None`: they were not counted, for the image has no fast-diff.
    pub allocated_bytes: Option<u64>,
}

/// Opens an image, and finds out what is to be told of it.
///
/// # Errors
/// [`RbdError`].
pub fn inspect(uri: &Uri) -> Result<Report, RbdError> {
    let how = How {
        read_only: true,
        incoming: true,
        dead: Vec::new(),
        held: Arc::default(),
        patience: None,
        confine: |_| {},
    };
    let image = Image::open(uri, how)?;
    let has = |feature| image.facts.features & feature != 0;
    let counted = if has(FEATURE_FAST_DIFF) { image.allocated().ok() } else { None };
    let report = Report {
        path: uri.to_string(),
        kind: IMAGE,
        size: image.size(),
        object_size: image.facts.object_size,
        features: FEATURES.iter().filter(|(feature, _)| has(*feature)).map(|(_, name)| *name).collect(),
        exclusive_lock: has(FEATURE_EXCLUSIVE_LOCK),
        owner: image.facts.owners.first().cloned(),
        allocated_bytes: counted,
    };
    let _closed = image.close();
    Ok(report)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}, {} bytes", self.path, self.kind, self.size)?;
        writeln!(f, "objects            of {} bytes", self.object_size)?;
        writeln!(f, "features           {}", self.features.join(", "))?;
        match (&self.owner, self.exclusive_lock) {
            (Some(owner), _) => writeln!(f, "exclusive lock     client {owner} has it")?,
            (None, true) => writeln!(f, "exclusive lock     free")?,
            (None, false) => {
                writeln!(
                    f,
                    "exclusive lock     none: served with --read-only; rbd feature enable … exclusive-lock"
                )?;
            }
        }
        match self.allocated_bytes {
            Some(bytes) => writeln!(f, "allocated          {bytes} bytes"),
            None => writeln!(f, "allocated          unknown: the image has no fast-diff"),
        }
    }
}
