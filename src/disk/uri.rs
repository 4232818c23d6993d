//! What an operator types for a disk on another machine.
//!
//! What it is: which kind of place a text means, and the text of each kind read by its own module.
//!
//! What it is not: it looks up no host and asks no server.
//!
//! Invariant: a text that begins like a URI is never taken for a path. A file of such a name is reached by ./ before it.

use std::fmt;

use crate::{nbd, rbd};

/// A disk on another machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// An export of an NBD server.
    Nbd(nbd::uri::Uri),
    /// An image of a Ceph cluster.
    Rbd(rbd::uri::Uri),
}

impl Uri {
    /// True if a text is meant as a URI, be it right or wrong.
    #[must_use]
    pub fn is_meant(text: &str) -> bool {
        text.contains("://") || rbd::uri::Uri::is_meant(text)
    }

    /// Reads a URI.
    ///
    /// # Errors
    /// A sentence that says what is wrong and what to type.
    pub fn parse(text: &str) -> Result<Self, String> {
        if rbd::uri::Uri::is_meant(text) {
            return rbd::uri::Uri::parse(text).map(Self::Rbd);
        }
        nbd::uri::Uri::parse(text).map(Self::Nbd)
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nbd(uri) => uri.fmt(f),
            Self::Rbd(uri) => uri.fmt(f),
        }
    }
}
