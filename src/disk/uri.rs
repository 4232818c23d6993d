//! What an operator types for a disk on another machine.
//!
//! What it is: which kind of place a text means, and the text of each kind read by its own module.
//!
//! What it is not: it looks up no host and asks no server.
//!
//! Invariant: a text that begins like a URI is never taken for a path. A file of such a name is reached by ./ before it.

use std::fmt;
use std::io;

use crate::nbd::uri::Address;
use crate::{nbd, rbd};

/// How disks on other machines begin, here and in what other programs write.
const STARTS: [&str; 7] = ["rbd:", "nbd:", "nbds:", "nbd+", "nbds+", "ceph:", "unix:"];

/// Where Ceph's programs look for the cluster's file at first.
const CEPH_CONF: &str = "/etc/ceph/ceph.conf";

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
        text.contains("://") || STARTS.iter().any(|start| starts(text, start))
    }

    /// Reads a URI.
    ///
    /// # Errors
    /// A sentence that says what is wrong and what to type.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.trim() != text {
            return Err(format!("\"{text}\" begins or ends with a space: remove it"));
        }
        if rbd::uri::Uri::is_meant(text) {
            return rbd::uri::Uri::parse(text).map(Self::Rbd);
        }
        if starts(text, "ceph:") {
            return Err(format!("{text}: write rbd:POOL/IMAGE for an image of a Ceph cluster"));
        }
        nbd::uri::Uri::parse(text).map(Self::Nbd)
    }

    /// True where both mean one disk, as far as the texts tell: a host of two names is not seen here. Users and keyrings
    /// make no difference; images of clusters with different files are different ones.
    #[must_use]
    pub fn is_same_disk(&self, other: &Self) -> bool {
        let conf = |uri: &rbd::uri::Uri| uri.conf.clone().unwrap_or_else(|| CEPH_CONF.into());
        match (self, other) {
            (Self::Nbd(one), Self::Nbd(other)) => {
                one.export == other.export && one.address.is_same(&other.address)
            }
            (Self::Rbd(one), Self::Rbd(other)) => one.name() == other.name() && conf(one) == conf(other),
            _ => false,
        }
    }

    /// The same with each path in it made absolute.
    ///
    /// # Errors
    /// As [`std::path::absolute`].
    pub fn absolute(mut self) -> io::Result<Self> {
        let paths = match &mut self {
            Self::Nbd(nbd::uri::Uri { address: Address::Unix(socket), .. }) => [Some(socket), None],
            Self::Nbd(_) => [None, None],
            Self::Rbd(uri) => [uri.conf.as_mut(), uri.keyring.as_mut()],
        };
        for path in paths.into_iter().flatten() {
            *path = std::path::absolute(&*path)?;
        }
        Ok(self)
    }
}

fn starts(text: &str, with: &str) -> bool {
    text.trim_start().get(..with.len()).is_some_and(|start| start.eq_ignore_ascii_case(with))
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nbd(uri) => uri.fmt(f),
            Self::Rbd(uri) => uri.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Uri;

    #[test]
    fn what_begins_like_a_uri_is_no_path() {
        for (text, says) in [
            ("nbd:127.0.0.1:10809", "write nbd://"),
            ("nbd:unix:/run/nbd.sock:exportname=x", "write nbd://"),
            ("nbd+unix:/?socket=/s", "nbd+unix:///"),
            ("unix:/run/nbd.sock", "nbd+unix:///"),
            ("ceph:vms/vm1", "write rbd:"),
            (" nbd://host/x", "a space"),
            ("http://host/x", "rbd:POOL/IMAGE"),
        ] {
            assert!(Uri::is_meant(text), "{text}");
            let why = Uri::parse(text).expect_err(text);
            assert!(why.contains(says), "{text}: {why}");
        }
        for path in ["/dev/nbd0", "nbd.img", "./nbd:x", "./rbd:vms/vm1", "disk.raw", "rbd", "a:b"] {
            assert!(!Uri::is_meant(path), "{path}");
        }
    }

    fn parsed(text: &str) -> Uri {
        Uri::parse(text).unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn two_texts_of_one_disk() {
        for (one, other, same) in [
            ("nbd://Host/a", "NBD://host:10809/a", true),
            ("nbd://host/a", "nbd://host/b", false),
            ("nbd://host/a", "nbd://host:1/a", false),
            ("nbd+unix:///a?socket=/s", "nbd+unix:///%61?socket=/./s", true),
            ("nbd+unix:///a?socket=/s", "nbd://s/a", false),
            ("rbd:vms/a", "rbd:vms/a:id=u:keyring=/k:conf=/etc/ceph/ceph.conf", true),
            ("rbd:vms/a", "rbd:vms/a:conf=/other.conf", false),
            ("rbd:vms/a", "rbd:vms/tenant/a", false),
            ("rbd:vms/a", "nbd://vms/a", false),
        ] {
            assert_eq!(parsed(one).is_same_disk(&parsed(other)), same, "{one} {other}");
        }
    }

    #[test]
    fn paths_are_made_absolute() {
        let here = std::env::current_dir().unwrap_or_default();
        let here = here.display();
        for (text, absolute) in [
            ("nbd+unix:///a?socket=b/nbd.sock", format!("nbd+unix:///a?socket={here}/b/nbd.sock")),
            ("rbd:vms/a:conf=c:id=u:keyring=./k", format!("rbd:vms/a:conf={here}/c:id=u:keyring={here}/k")),
            ("nbd://host/a", "nbd://host/a".to_owned()),
            ("rbd:vms/a:conf=/c", "rbd:vms/a:conf=/c".to_owned()),
        ] {
            let found = parsed(text).absolute().unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(found, parsed(&absolute), "{text}");
        }
    }
}
