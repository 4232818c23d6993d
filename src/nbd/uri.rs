//! What an operator types for a disk of an NBD server.
//!
//! What it is: the text of an NBD URI (doc/uri.md of the NBD project) to an address and the name of an export, and back.
//!
//! What it is not: it looks up no host and no socket; [`super::connect`] does.
//!
//! Invariant: what is printed parses to the same. What is not understood is refused, never left out.
//!
//! ```text
//!   nbd://HOST[:PORT]/EXPORT
//!   nbd+unix:///EXPORT?socket=PATH
//! ```

use std::ffi::OsString;
use std::fmt;
use std::net::Ipv6Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

/// The port of a server whose URI names none (registered with IANA).
pub const PORT: u16 = 10809;
/// Longest name of an export, bytes ("Conventions").
const MAX_EXPORT: usize = 4096;
/// Longest path of a socket, bytes: sockaddr_un has 108 with the NUL.
const MAX_SOCKET: usize = 107;

const FORMS: &str = "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH for an NBD server";

/// What stands as it is where an export or a path is printed.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// An export of an NBD server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// Where the server is.
    pub address: Address,
    /// The export's name; the empty one is the server's default.
    pub export: String,
}

/// Where an NBD server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP.
    Tcp {
        /// A name or an address; an IPv6 address has no brackets here.
        host: String,
        /// The port.
        port: u16,
    },
}

impl Address {
    /// True where both mean one server; names of hosts are the same in small letters.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Unix(one), Self::Unix(other)) => {
                let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
                absolute(one) == absolute(other)
            }
            (Self::Tcp { host, port }, Self::Tcp { host: other, port: their }) => {
                host.eq_ignore_ascii_case(other) && port == their
            }
            _ => false,
        }
    }
}

impl Uri {
    /// Reads a URI.
    ///
    /// # Errors
    /// A sentence that says what is wrong and what to type.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) =
            text.split_once("://").ok_or_else(|| format!("{text} is not a URI of an NBD server: {FORMS}"))?;
        if rest.contains('#') {
            return Err(format!(
                "{text} has a fragment, which an NBD URI cannot have: write %23 for a # of a name"
            ));
        }
        let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let export = String::from_utf8(decoded(text, path)?)
            .map_err(|_| format!("the export of {text} is not UTF-8: NBD has no such names"))?;
        if export.contains('\0') {
            return Err(format!("the export of {text} has a NUL in it: NBD has no such names"));
        }
        if export.len() > MAX_EXPORT {
            let bytes = export.len();
            return Err(format!("the export's name has {bytes} bytes; NBD allows {MAX_EXPORT}"));
        }
        if authority.contains('@') {
            return Err(format!(
                "{text} names a user, which NBD without TLS does not know: leave out what stands before the @"
            ));
        }
        let address = match scheme.to_ascii_lowercase().as_str() {
            "nbd" => tcp(text, authority, query)?,
            "nbd+unix" => unix(text, authority, query)?,
            "nbds" | "nbds+unix" | "nbds+vsock" => {
                return Err(format!(
                    "{text} asks for TLS, which vublk does not speak: run a local TLS proxy such as stunnel or \
                     ghostunnel beside vublkd, and give vublkd the proxy's socket as nbd+unix:///EXPORT?socket=PATH"
                ));
            }
            _ => {
                return Err(format!(
                    "vublk does not know the scheme {scheme}:// of {text}: {FORMS}, or rbd:POOL/IMAGE for an image of a Ceph \
                     cluster"
                ));
            }
        };
        Ok(Self { address, export })
    }
}

/// The bytes of a part of `text` without percent signs.
fn decoded(text: &str, part: &str) -> Result<Vec<u8>, String> {
    let is_digit = |digit: Option<&u8>| digit.is_some_and(u8::is_ascii_hexdigit);
    let bytes = part.as_bytes();
    if bytes
        .iter()
        .enumerate()
        .any(|(at, &byte)| byte == b'%' && !(is_digit(bytes.get(at + 1)) && is_digit(bytes.get(at + 2))))
    {
        return Err(format!(
            "{text} has a % without two hexadecimal digits behind it: write %25 for a % of a name"
        ));
    }
    Ok(percent_decode_str(part).collect())
}

fn tcp(text: &str, authority: &str, query: Option<&str>) -> Result<Address, String> {
    if let Some(query) = query {
        return Err(format!("{text} has \"{query}\" behind a ?, which nbd:// does not know: {FORMS}"));
    }
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, behind) =
            rest.split_once(']').filter(|(host, _)| host.parse::<Ipv6Addr>().is_ok()).ok_or_else(|| {
                format!("{text} has no IPv6 address between [ and ]: write nbd://[2001:db8::1]/EXPORT")
            })?;
        let port = match behind {
            "" => None,
            _ => Some(
                behind.strip_prefix(':').ok_or_else(|| format!("{text} has \"{behind}\" behind its host"))?,
            ),
        };
        (host, port)
    } else {
        let (host, port) =
            authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port)));
        if port.is_some_and(|port| port.contains(':')) {
            return Err(format!(
                "{text} has more than one : in its host: write an IPv6 address as [ADDRESS]"
            ));
        }
        (host, port)
    };
    if host.is_empty() {
        return Err(format!(
            "{text} names no host: write nbd://HOST[:PORT]/EXPORT, or nbd+unix:// for a Unix socket"
        ));
    }
    if !host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._:".contains(&byte)) {
        return Err(format!("\"{host}\" in {text} is no name of a host"));
    }
    let port = match port {
        // RFC 3986: nothing behind the colon is the default.
        None | Some("") => PORT,
        Some(port) => port
            .parse()
            .ok()
            .filter(|&number: &u16| number != 0 && port.bytes().all(|byte| byte.is_ascii_digit()))
            .ok_or_else(|| format!("\"{port}\" in {text} is no port: a port is a number from 1 to 65535"))?,
    };
    Ok(Address::Tcp { host: host.into(), port })
}

fn unix(text: &str, authority: &str, query: Option<&str>) -> Result<Address, String> {
    if !authority.is_empty() {
        return Err(format!(
            "{text} names the host \"{authority}\", which a Unix socket does not have: write nbd+unix:///EXPORT?socket=PATH, \
             with three slashes"
        ));
    }
    let mut socket = None;
    for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if key != "socket" {
            return Err(format!(
                "vublk does not know \"{key}\" in {text}: nbd+unix:// knows socket=PATH only"
            ));
        }
        if socket.replace(decoded(text, value)?).is_some() {
            return Err(format!("{text} names two sockets: write socket=PATH once"));
        }
    }
    let path = socket
        .filter(|path| !path.is_empty())
        .ok_or_else(|| format!("{text} names no socket: write nbd+unix:///EXPORT?socket=PATH"))?;
    if path.contains(&0) {
        return Err(format!("the socket of {text} has a NUL in its path"));
    }
    if path.len() > MAX_SOCKET {
        let bytes = path.len();
        return Err(format!(
            "the path of the socket in {text} has {bytes} bytes; Linux allows {MAX_SOCKET}: move the socket, or make a \
             shorter symbolic link to its folder"
        ));
    }
    Ok(Address::Unix(PathBuf::from(OsString::from_vec(path))))
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = percent_encode(self.export.as_bytes(), PLAIN);
        match &self.address {
            Address::Unix(path) => {
                write!(
                    f,
                    "nbd+unix:///{export}?socket={}",
                    percent_encode(path.as_os_str().as_bytes(), PLAIN)
                )
            }
            Address::Tcp { host, port } => {
                let (open, close) = if host.contains(':') { ("[", "]") } else { ("", "") };
                write!(f, "nbd://{open}{host}{close}")?;
                if *port != PORT {
                    write!(f, ":{port}")?;
                }
                write!(f, "/{export}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Address, PORT, Uri};

    fn tcp(host: &str, port: u16, export: &str) -> Uri {
        Uri { address: Address::Tcp { host: host.into(), port }, export: export.into() }
    }

    fn unix(path: &str, export: &str) -> Uri {
        Uri { address: Address::Unix(path.into()), export: export.into() }
    }

    #[test]
    fn uris_of_the_specification() {
        for (text, uri) in [
            ("nbd://example.com", tcp("example.com", PORT, "")),
            ("nbd://example.com/", tcp("example.com", PORT, "")),
            ("nbd://example.com:10810/disk", tcp("example.com", 10810, "disk")),
            ("nbd://example.com:/disk", tcp("example.com", PORT, "disk")),
            ("NBD://10.0.0.1/a/b%20c", tcp("10.0.0.1", PORT, "a/b c")),
            // Only the first slash is not the export's.
            ("nbd://host//disk", tcp("host", PORT, "/disk")),
            ("nbd://[2001:db8::1]/disk", tcp("2001:db8::1", PORT, "disk")),
            ("nbd://[::1]:1/%E2%82%AC%25", tcp("::1", 1, "€%")),
            ("nbd+unix:///?socket=/run/nbd.sock", unix("/run/nbd.sock", "")),
            ("nbd+unix:///disk?socket=/a%26b%3fc", unix("/a&b?c", "disk")),
        ] {
            assert_eq!(Uri::parse(text), Ok(uri.clone()), "{text}");
            assert_eq!(Uri::parse(&uri.to_string()), Ok(uri), "{text}");
        }
        assert_eq!(tcp("::1", PORT, "a b").to_string(), "nbd://[::1]/a%20b");
        assert_eq!(unix("/run/a&b", "").to_string(), "nbd+unix:///?socket=/run/a%26b");
    }

    #[test]
    fn what_is_not_understood_is_refused_with_what_to_type() {
        let long_export = format!("nbd://host/{}", "x".repeat(4097));
        let long_socket = format!("nbd+unix:///?socket=/{}", "x".repeat(107));
        for (text, says) in [
            ("/dev/sda", "nbd+unix:///EXPORT?socket=PATH"),
            ("nbd:unix:/run/nbd.sock", "write nbd://"),
            ("nbds://host/disk", "stunnel"),
            ("nbds+unix:///disk?socket=/s", "stunnel"),
            ("nbd+vsock://2/", "scheme nbd+vsock://"),
            ("http://host/", "scheme http://"),
            ("nbd://me@host/", "before the @"),
            ("nbd:///disk", "no host"),
            ("nbd://host/disk?tls=1", "tls=1"),
            ("nbd://host/disk?", "behind a ?"),
            ("nbd://host/disk#1", "%23"),
            ("nbd://host:0/", "1 to 65535"),
            ("nbd://host:65536/", "1 to 65535"),
            ("nbd://host:+1/", "1 to 65535"),
            ("nbd://::1/", "[ADDRESS]"),
            ("nbd://[::1", "IPv6"),
            ("nbd://[host]/", "IPv6"),
            ("nbd://[::1]1/", "behind its host"),
            ("nbd://ho st/", "no name of a host"),
            ("nbd://host/%", "%25"),
            ("nbd://host/%4", "%25"),
            ("nbd://host/%zz", "%25"),
            ("nbd://host/%ff", "UTF-8"),
            ("nbd://host/%00", "NUL"),
            (&long_export, "4097 bytes"),
            ("nbd+unix:///disk", "names no socket"),
            ("nbd+unix:///disk?socket=", "names no socket"),
            ("nbd+unix:///?socket=/a&socket=/b", "two sockets"),
            ("nbd+unix:///?socket=/a%00", "NUL"),
            ("nbd+unix:///?sock=/a", "\"sock\""),
            ("nbd+unix://disk?socket=/a", "three slashes"),
            (&long_socket, "107"),
        ] {
            let why = Uri::parse(text).expect_err(text);
            assert!(why.contains(says), "{text}: {why}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_to_the_same(
            export in any::<String>(), path in "[^\0]{1,20}", host in "[a-z0-9.-]{1,20}", port in 1u16..
        ) {
            let export = export.replace('\0', "");
            for uri in [tcp(&host, port, &export), tcp("fe80::1", port, &export), unix(&path, &export)] {
                prop_assert_eq!(Uri::parse(&uri.to_string()), Ok(uri));
            }
        }

        #[test]
        fn any_text_is_read(scheme in "(nbd|nbd\\+unix|nbds)://", text in any::<String>()) {
            let _ = Uri::parse(&text);
            if let Ok(uri) = Uri::parse(&format!("{scheme}{text}")) {
                prop_assert_eq!(Uri::parse(&uri.to_string()), Ok(uri));
            }
        }
    }
}
