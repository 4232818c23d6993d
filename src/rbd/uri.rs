//! What an operator types for an image of a Ceph cluster.
//!
//! What it is: QEMU's text for it (`rbd:`, qemu-block-drivers(7)) to the names in it, and back.
//!
//! What it is not: it asks no cluster whether there is such an image.
//!
//! Invariant: what is printed parses to the same. What is not understood is refused, never left out. A key never stands on
//! a command line.
//!
//! ```text
//!   rbd:POOL[/NAMESPACE]/IMAGE[@SNAPSHOT][:KEY=VALUE]...      a backslash before : / @ = \ makes them part of a name
//! ```

use std::fmt;
use std::path::PathBuf;

use crate::shell::quoted;

const FORM: &str = "write rbd:POOL/IMAGE, rbd:POOL/IMAGE@SNAPSHOT or rbd:POOL/NAMESPACE/IMAGE, and then what is needed of \
                    :conf=FILE :id=USER :keyring=FILE";

/// Longest name, bytes: RBD_MAX_IMAGE_NAME_SIZE of librbd.h.
const MAX_NAME: usize = 95;

/// An image, or a snapshot of one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uri {
    /// The pool.
    pub pool: String,
    /// The namespace in it; empty: the default one.
    pub namespace: String,
    /// The image.
    pub image: String,
    /// The snapshot of it that is served, for reading only.
    pub snapshot: Option<String>,
    /// ceph.conf; `None`: where Ceph's programs look for it.
    pub conf: Option<PathBuf>,
    /// The user, without "client."; `None`: admin.
    pub id: Option<String>,
    /// The file with the user's key; `None`: as ceph.conf says.
    pub keyring: Option<PathBuf>,
}

impl Uri {
    /// True if a text is meant as an image of a cluster, be it right or wrong, and not as a path.
    #[must_use]
    pub fn is_meant(text: &str) -> bool {
        text.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("rbd:"))
    }

    /// Reads it.
    ///
    /// # Errors
    /// A sentence that says what is wrong and what to type.
    pub fn parse(text: &str) -> Result<Self, String> {
        let rest = text.get(4..).filter(|_| Self::is_meant(text)).unwrap_or_default();
        if rest.starts_with("//") {
            return Err(format!("{text} has // behind rbd:, which no pool has: {FORM}"));
        }
        if text.contains('\0') {
            return Err(format!("a NUL stands in {}: {FORM}", text.escape_debug()));
        }
        let mut parts = split(rest, ':');
        let (names, options) = (parts.remove(0), parts);
        let mut at = split(names, '@');
        let snapshot = match at.len() {
            1 => None,
            2 => at.pop().map(plain),
            _ => return Err(format!("{text} names two snapshots: {FORM}")),
        };
        let names: Vec<String> = split(at.remove(0), '/').into_iter().map(plain).collect();
        let (pool, namespace, image) = match names.as_slice() {
            [pool, image] => (pool, "", image),
            [pool, namespace, image] => (pool, namespace.as_str(), image),
            [_] => return Err(format!("{text} names no pool: {FORM}")),
            _ => return Err(format!("{text} has too many parts between /: {FORM}")),
        };
        let all = [("pool", Some(pool)), ("image", Some(image)), ("snapshot", snapshot.as_ref())];
        for (what, name) in all {
            match name {
                Some(name) if name.is_empty() => {
                    return Err(format!("the {what} of {text} has no name: {FORM}"));
                }
                Some(name) if name.len() > MAX_NAME => {
                    let bytes = name.len();
                    return Err(format!(
                        "the {what}'s name in {text} has {bytes} bytes; Ceph allows {MAX_NAME}"
                    ));
                }
                _ => {}
            }
        }
        let mut uri = Self {
            pool: pool.clone(),
            namespace: namespace.into(),
            image: image.clone(),
            snapshot,
            ..Self::default()
        };
        for option in options {
            uri.set(text, option)?;
        }
        Ok(uri)
    }

    /// The options with which Ceph's programs find the same cluster as the same user; a space before each.
    #[must_use]
    pub fn options(&self) -> String {
        let path = |path: &PathBuf| path.display().to_string();
        let all = [
            ("conf", self.conf.as_ref().map(path)),
            ("id", self.id.clone()),
            ("keyring", self.keyring.as_ref().map(path)),
        ];
        let typed = |(key, value): (&str, Option<String>)| Some(format!(" --{key}={}", quoted(&value?)));
        all.into_iter().filter_map(typed).collect()
    }

    fn set(&mut self, text: &str, option: &str) -> Result<(), String> {
        let (key, value) = option.split_once('=').ok_or_else(|| {
            format!("\"{option}\" in {text} is no KEY=VALUE; a : that belongs to a name is written \\:")
        })?;
        let value = plain(value);
        if value.is_empty() {
            return Err(format!("{key}= in {text} has no value"));
        }
        let is_second = match key {
            "conf" => self.conf.replace(value.into()).is_some(),
            "id" => {
                let name = value.strip_prefix("client.").unwrap_or(&value).to_owned();
                self.id.replace(name).is_some()
            }
            "keyring" => self.keyring.replace(value.into()).is_some(),
            "key" | "keyfile" | "password-secret" => {
                return Err(format!(
                    "{key}= in {}: vublk takes keys from keyrings only, which is what ceph auth get-or-create writes: \
                     :keyring=FILE",
                    text.split(&format!(":{key}=")).next().unwrap_or_default()
                ));
            }
            _ => {
                return Err(format!(
                    "vublk does not know \"{key}\" in {text}: it takes conf, id and keyring. Other settings of Ceph stand \
                     in the file of conf="
                ));
            }
        };
        if is_second { Err(format!("{key}= stands twice in {text}")) } else { Ok(()) }
    }

    /// The image without where its cluster and its key are: the same on every host.
    #[must_use]
    pub fn name(&self) -> String {
        let part = |name: &str| escaped(name, ":/@=");
        let mut name = format!("rbd:{}/", part(&self.pool));
        if !self.namespace.is_empty() {
            name += &format!("{}/", part(&self.namespace));
        }
        name += &part(&self.image);
        if let Some(snapshot) = &self.snapshot {
            name += &format!("@{}", part(snapshot));
        }
        name
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())?;
        let path = |path: &PathBuf| path.display().to_string();
        let options = [
            ("conf", self.conf.as_ref().map(path)),
            ("id", self.id.clone()),
            ("keyring", self.keyring.as_ref().map(path)),
        ];
        for (key, value) in options {
            if let Some(value) = value {
                // A / ends no value; an @ would be taken for a snapshot's.
                write!(f, ":{key}={}", escaped(&value, ":@"))?;
            }
        }
        Ok(())
    }
}

/// The parts between separators that no backslash precedes; at least one.
fn split(text: &str, separator: char) -> Vec<&str> {
    let mut escaped = false;
    text.split(|c: char| {
        let is_end = c == separator && !escaped;
        escaped = c == '\\' && !escaped;
        is_end
    })
    .collect()
}

/// Without the backslashes.
fn plain(text: &str) -> String {
    let mut escaped = false;
    let keeps = |c: &char| {
        escaped = *c == '\\' && !escaped;
        !escaped
    };
    text.chars().filter(keeps).collect()
}

/// With a backslash before each character that would end a name.
fn escaped(text: &str, ends: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if ends.contains(c) || c == '\\' {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::Uri;

    #[test]
    fn what_is_printed_parses_to_the_same() {
        let texts = [
            "rbd:vms/vm1",
            "rbd:vms/tenant/vm1@monday",
            "rbd:vms/vm1:conf=/etc/ceph/eu.conf:id=vublk:keyring=/run/keys/vublk",
            "rbd:a\\:b/c\\@d\\/e\\\\@f\\=g:id=h\\:i",
        ];
        for text in texts {
            let uri = Uri::parse(text).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(Uri::parse(&uri.to_string()), Ok(uri.clone()), "{uri}");
        }
        let uri = Uri::parse(texts[3]).unwrap_or_default();
        assert_eq!((uri.pool.as_str(), uri.image.as_str()), ("a:b", "c@d/e\\"));
        assert_eq!((uri.snapshot.as_deref(), uri.id.as_deref()), (Some("f=g"), Some("h:i")));
        let user = Uri::parse("RBD:vms/vm1:id=client.vublk").unwrap_or_default();
        assert_eq!(user.to_string(), "rbd:vms/vm1:id=vublk");
    }

    #[test]
    fn what_is_wrong_is_refused_with_what_to_type() {
        let wrong = [
            ("rbd:", "names no pool"),
            ("rbd:vm1", "names no pool"),
            ("rbd://vms/vm1", "// behind rbd:"),
            ("rbd:/vm1", "pool of"),
            ("rbd:vms/", "image of"),
            ("rbd:vms/vm1@", "snapshot of"),
            ("rbd:vms/vm1@a@b", "two snapshots"),
            ("rbd:a/b/c/d", "too many parts"),
            ("rbd:vms/vm1:conf", "is no KEY=VALUE"),
            ("rbd:vms/vm1:conf=", "no value"),
            ("rbd:vms/vm1:id=a:id=b", "stands twice"),
            ("rbd:vms/vm1:rbd_cache=true", "does not know \"rbd_cache\""),
            ("rbd:vms/vm1:key=AQDsecret", "from keyrings only"),
        ];
        for (text, words) in wrong {
            let error = Uri::parse(text).expect_err(text);
            assert!(error.contains(words) && !error.contains("secret"), "{text}: {error}");
        }
        assert!(Uri::parse(&format!("rbd:vms/{}", "i".repeat(96))).is_err());
        assert!(!Uri::is_meant("./rbd:vms/vm1") && !Uri::is_meant("rb") && Uri::is_meant("rbd:x"));
    }
}
