//! A disk on another machine: an export of an NBD server, or an image of a Ceph cluster.
//!
//! What it is: whether it can be had, what its server lacks, and who has it.
//!
//! What it is not: [`crate::inspect`] asks the server; here is what the answer means.
//!
//! Invariant: nothing is written, and no lock is taken. A server that lets one client in answers once the other has gone, or
//! not in time; the disk that it serves goes on.

use std::io::ErrorKind;

use serde_json::Value;

use super::{Finding, fail, ok, warn};
use crate::disk::uri::Uri;
use crate::find;
use crate::inspect::rbd;
use crate::inspect::remote::{self, RemoteError};
use crate::nbd::handshake::HandshakeError;
use crate::nbd::remote::MOST_BLOCK;
use crate::nbd::uri::Address;
use crate::rbd::image::RbdError;
use crate::rbd::library::Api;
use crate::shell::quoted;
use crate::{nbd::uri::Uri as NbdUri, rbd::uri::Uri as RbdUri};

/// The daemon of this host that serves the disk.
#[derive(Debug)]
struct Served {
    /// As `vublk list` shows it.
    name: String,
    pid: u64,
    /// Seconds since its server was lost.
    lost: Option<f64>,
}

impl Served {
    fn find(uri: &Uri) -> Option<Self> {
        let uri = uri.to_string();
        find::daemons().into_iter().find_map(|found| {
            let status = found.status.ok()?;
            let field = |path: &str| status.pointer(path);
            (field("/disk/path").and_then(Value::as_str) == Some(&uri)).then(|| Self {
                name: found.name,
                pid: field("/pid").and_then(Value::as_u64).unwrap_or_default(),
                lost: field("/disk/server_lost_seconds").and_then(Value::as_f64),
            })
        })
    }

    /// Which daemon that is.
    fn words(&self) -> String {
        format!("vublkd (process {}) serves it as {}", self.pid, self.name)
    }
}

/// All that can be told of the disk that this text means.
pub(super) fn all(text: &str) -> Vec<Finding> {
    match Uri::parse(text) {
        Err(why) => {
            let remedy = "vublkd --help shows, at --disk, how it is written";
            vec![fail("URI", why, remedy)]
        }
        Ok(uri) => {
            let served = Served::find(&uri);
            match &uri {
                Uri::Nbd(uri) => nbd(uri, remote::inspect(uri, false), served.as_ref()),
                Uri::Rbd(uri) => rbd(uri, rbd::inspect(uri), served.as_ref()),
            }
        }
    }
}

/// `asked`: what the server says.
fn nbd(uri: &NbdUri, asked: Result<remote::Report, RemoteError>, served: Option<&Served>) -> Vec<Finding> {
    let mut findings = match asked {
        Ok(report) => export(&report),
        Err(e) => vec![no_export(uri, &e, served)],
    };
    let check = "clients";
    findings.push(match served {
        None => ok(check, "no vublkd that this user may ask serves it; NBD tells nothing of other clients"),
        Some(served) => match served.lost {
            None => ok(check, format!("{}; NBD tells nothing of other clients", served.words())),
            Some(seconds) => fail(
                check,
                format!("{}, and lost the server {seconds} s ago: requests wait", served.words()),
                format!("start the server again; vublk status {} tells when vublkd has it", served.name),
            ),
        },
    });
    findings
}

/// What a server can do that has answered.
fn export(report: &remote::Report) -> Vec<Finding> {
    let path = &report.path;
    let mut findings = vec![ok("server", format!("answers: {path}, {} bytes", report.size))];
    if report.minimum_block > MOST_BLOCK || report.maximum_request < MOST_BLOCK {
        findings.push(fail(
            "block",
            format!(
                "requests are multiples of {} bytes and have {} at most; vublkd serves blocks of {MOST_BLOCK} bytes or less",
                report.minimum_block, report.maximum_request
            ),
            "have the server offer smaller blocks (nbdkit --filter=blocksize)",
        ));
    }
    if report.read_only {
        findings.push(warn(
            "read-only",
            "the server takes no writes: vublkd serves it with --read-only alone",
            "vublkd --read-only, or have the server export it for writing",
        ));
    } else {
        let flush = if report.fua {
            "the server has it, and FUA: a durable write is one request"
        } else {
            "the server has it, and no FUA: a durable write is a write and a flush"
        };
        findings.push(if_there(
            "flush",
            report.flush.then_some(flush),
            "the server has none: what it answers counts as durable",
            "have the server offer FLUSH (nbd-server: flush = true), or see in its manual that it answers only what is durable",
        ));
        findings.push(if_there(
            "discard",
            report.trim.then_some("the server has TRIM"),
            "the server has no TRIM: a discard of the guest does nothing",
            "have the server offer it (qemu-nbd --discard=unmap; nbd-server: trim = true)",
        ));
    }
    findings.push(if_there(
        "multi-conn",
        report.multi_conn.then_some("the server has it: one connection for each worker"),
        "the server has none: one connection, and one worker for all queues",
        "have the server offer it, for a disk that is to be faster (qemu-nbd --shared=0, QEMU 7.1 or later)",
    ));
    findings
}

/// Something that a server may offer. `there`: what that is good for, if it does.
fn if_there(check: &'static str, there: Option<&str>, lacks: &str, remedy: &str) -> Finding {
    there.map_or_else(|| warn(check, lacks, remedy), |says| ok(check, says))
}

/// Why nothing is known of an export. The text names the URI.
fn no_export(uri: &NbdUri, error: &RemoteError, served: Option<&Served>) -> Finding {
    let (check, says) = ("server", error.to_string());
    let remedy = match (error, &uri.address) {
        (RemoteError::Resolve { .. }, Address::Tcp { host, .. }) => {
            format!("getent hosts {} shows what this host knows of that name", quoted(host))
        }
        (RemoteError::Connect { source, .. }, address) => match (source.kind(), address) {
            (ErrorKind::PermissionDenied, _) => {
                "sudo vublk doctor …; vublkd's user has to be able to open the socket, too".into()
            }
            (ErrorKind::NotFound | ErrorKind::ConnectionRefused, _) => start_of_server(uri),
            (_, Address::Tcp { host, port }) => {
                format!("ping {host}; is its host up, and does no firewall keep port {port} from this one?")
            }
            (_, Address::Unix(_)) => start_of_server(uri),
        },
        (RemoteError::Handshake { source, .. }, _) => {
            match source {
                // A server that lets one client in has let in that one.
                HandshakeError::Io(e) if matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => {
                    let remedy = "start the server with qemu-nbd --shared=0, or end the client that has it";
                    if served.is_some_and(|served| served.lost.is_none()) {
                        return warn(check, says, remedy);
                    }
                    remedy.into()
                }
                HandshakeError::Tls => "vublkd --disk='nbd+unix:///EXPORT?socket=PROXY'".into(),
                HandshakeError::Unknown { listed, .. } => match listed.first() {
                    Some(export) => {
                        let other = NbdUri { export: export.clone(), ..uri.clone() };
                        format!("vublk doctor {}", quoted(&other.to_string()))
                    }
                    None => "correct the export's name: the server's configuration has it".into(),
                },
                _ => format!("see the server's log, and what nbdinfo {} says", quoted(&uri.to_string())),
            }
        }
        (RemoteError::Resolve { .. }, Address::Unix(_)) => start_of_server(uri),
    };
    fail(check, says, remedy)
}

/// How a server is started that is found there.
fn start_of_server(uri: &NbdUri) -> String {
    let (on, place) = match &uri.address {
        Address::Unix(path) => (String::new(), format!("--socket={}", quoted(&path.display().to_string()))),
        Address::Tcp { host, port } => (format!("on {host}: "), format!("--port={port}")),
    };
    let export = match uri.export.as_str() {
        "" => String::new(),
        name => format!("--export-name={} ", quoted(name)),
    };
    format!("{on}qemu-nbd --format=raw --persistent --shared=0 {export}{place} FILE")
}

/// `asked`: what the cluster says.
fn rbd(uri: &RbdUri, asked: Result<rbd::Report, RbdError>, served: Option<&Served>) -> Vec<Finding> {
    let report = match asked {
        Ok(report) => report,
        Err(e) => return vec![no_image(uri, &e)],
    };
    let says =
        format!("there: {}, {} bytes, in objects of {} bytes", report.path, report.size, report.object_size);
    vec![ok("image", says), lock(uri, &report, served)]
}

/// Who may write to an image, and who does.
fn lock(uri: &RbdUri, report: &rbd::Report, served: Option<&Served>) -> Finding {
    let check = "exclusive lock";
    let (name, options) = (uri.name(), uri.options());
    let image = name.trim_start_matches("rbd:");
    let here = served.map_or(String::new(), |served| format!("; {}", served.words()));
    if uri.snapshot.is_some() {
        return ok(check, format!("a snapshot needs none: no client writes to it{here}"));
    }
    match &report.owner {
        _ if !report.exclusive_lock => warn(
            check,
            format!("the image has none: vublkd serves it with --read-only alone{here}"),
            format!("rbd{options} feature enable {image} exclusive-lock"),
        ),
        Some(owner) if served.is_none() => warn(
            check,
            format!(
                "client {owner} has it, and no vublkd that this user may ask serves the image: a start for writing fails"
            ),
            format!(
                "rbd{options} status {image} lists the clients: stop that one; or vublkd --incoming, for a VM that comes from \
                 there by live migration"
            ),
        ),
        Some(owner) => ok(check, format!("client {owner} has it{here}")),
        None => ok(check, format!("free: no client writes to the image{here}")),
    }
}

/// Why nothing is known of an image. The reason says what to type.
fn no_image(uri: &RbdUri, error: &RbdError) -> Finding {
    let check = match error {
        RbdError::Library(_) => "librbd",
        RbdError::Setting(..)
        | RbdError::Conf(..)
        | RbdError::NoKey { .. }
        | RbdError::NoMonitor
        | RbdError::Connect(_) => "cluster",
        RbdError::Pool(..) => "pool",
        _ => "image",
    };
    let why = error.to_string();
    match why.split_once(". ") {
        Some((says, remedy)) => fail(check, format!("{uri}: {says}"), remedy),
        None => {
            let remedy = format!("ceph{0} -s, and rbd{0} ls, as the same user", uri.options());
            fail(check, format!("{uri}: {why}"), remedy)
        }
    }
}

/// Whether images of a cluster can be served here.
pub(super) fn librbd() -> Finding {
    found(Api::load().map(|_loaded| ()))
}

/// `loaded`: as dlopen(3) and dlsym(3) say it.
fn found(loaded: Result<(), String>) -> Finding {
    let check = "librbd";
    match loaded {
        Ok(()) => ok(check, "installed: images of a Ceph cluster (rbd:) can be served"),
        Err(why) if why.contains("No such file") => {
            ok(check, "not installed; only images of a Ceph cluster (rbd:) need it: apt install librbd1")
        }
        Err(why) => warn(
            check,
            format!("cannot be loaded, and images of a Ceph cluster (rbd:) cannot be served: {why}"),
            "install that of Ceph 16.2 or later: apt install librbd1 (or dnf install librbd1)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict::{self, Fail, Ok as Fine, Warn};
    use super::*;

    /// The lines that are not as they should be.
    fn wrong(findings: &[Finding]) -> Vec<(&str, Verdict)> {
        for finding in findings {
            assert_eq!(finding.remedy.is_some(), finding.verdict != Fine, "{finding:?}");
        }
        let wrong = findings.iter().filter(|finding| finding.verdict != Fine);
        wrong.map(|finding| (finding.check, finding.verdict)).collect()
    }

    fn uri(text: &str) -> Uri {
        Uri::parse(text).unwrap_or_else(|e| panic!("{e}"))
    }

    fn nbd_of(text: &str) -> NbdUri {
        NbdUri::parse(text).unwrap_or_else(|e| panic!("{e}"))
    }

    fn served(lost: Option<f64>) -> Served {
        Served { name: "vm1".into(), pid: 7, lost }
    }

    #[test]
    fn what_a_server_offers() {
        let report = |yes: bool| remote::Report {
            path: "nbd://host/".into(),
            kind: remote::EXPORT,
            size: 1 << 20,
            minimum_block: 1,
            preferred_block: 4096,
            maximum_request: 1 << 20,
            read_only: false,
            flush: yes,
            fua: yes,
            trim: yes,
            write_zeroes: yes,
            fast_zero: yes,
            multi_conn: yes,
            structured_replies: yes,
            allocation: remote::Allocation::default(),
        };
        assert_eq!(wrong(&export(&report(true))), []);
        let lacks = [("flush", Warn), ("discard", Warn), ("multi-conn", Warn)];
        assert_eq!(wrong(&export(&report(false))), lacks);
        let reads = remote::Report { read_only: true, ..report(false) };
        assert_eq!(wrong(&export(&reads)), [("read-only", Warn), ("multi-conn", Warn)]);
        let large = remote::Report { minimum_block: 8192, ..report(true) };
        assert_eq!(wrong(&export(&large)), [("block", Fail)]);
        let lost = nbd(&nbd_of("nbd://host/"), Ok(report(true)), Some(&served(Some(2.5))));
        assert_eq!(wrong(&lost), [("clients", Fail)]);
    }

    #[test]
    fn servers_that_do_not_answer() {
        let of = |text: &str, error: fn(String) -> RemoteError, served: Option<&Served>| {
            no_export(&nbd_of(text), &error(text.into()), served)
        };
        let refuses = |uri| RemoteError::Connect { uri, source: ErrorKind::ConnectionRefused.into() };
        let found = of("nbd://127.0.0.1:10911/a", refuses, None);
        assert!(found.says.contains("nothing listens there"), "{found:?}");
        let remedy =
            "on 127.0.0.1: qemu-nbd --format=raw --persistent --shared=0 --export-name=a --port=10911 FILE";
        assert_eq!((found.verdict, found.remedy.as_deref()), (Fail, Some(remedy)));
        let late =
            |uri| RemoteError::Handshake { uri, source: HandshakeError::Io(ErrorKind::TimedOut.into()) };
        // The daemon has the one connection that there is.
        let verdict = |served: Option<&Served>| of("nbd+unix:///?socket=/s", late, served).verdict;
        assert_eq!(verdict(Some(&served(None))), Warn);
        assert_eq!((verdict(Some(&served(Some(1.0)))), verdict(None)), (Fail, Fail));
        let unknown = |uri| RemoteError::Handshake {
            uri,
            source: HandshakeError::Unknown { export: "a".into(), listed: vec!["b".into()] },
        };
        let found = of("nbd://host/a", unknown, None);
        assert_eq!(found.remedy.as_deref(), Some("vublk doctor nbd://host/b"));
    }

    #[test]
    fn who_has_an_image() {
        let Uri::Rbd(image) = uri("rbd:vms/a:id=u") else { panic!("an image") };
        let of = |exclusive_lock, owner: Option<&str>, served: Option<&Served>| {
            let report = rbd::Report {
                path: image.to_string(),
                kind: rbd::IMAGE,
                size: 1,
                object_size: 1,
                features: Vec::new(),
                exclusive_lock,
                owner: owner.map(str::to_owned),
                allocated_bytes: None,
            };
            lock(&image, &report, served)
        };
        assert_eq!(of(true, None, None).verdict, Fine);
        assert_eq!(of(true, Some("x"), Some(&served(None))).verdict, Fine);
        assert_eq!(of(true, Some("x"), None).verdict, Warn);
        let none = of(false, None, None);
        assert_eq!(none.remedy.as_deref(), Some("rbd --id=u feature enable vms/a exclusive-lock"));
        let found = no_image(&image, &RbdError::Pool("vms".into(), ErrorKind::NotFound.into()));
        assert_eq!((found.check, found.verdict), ("pool", Fail));
        assert_eq!(found.remedy.as_deref(), Some("ceph osd pool ls shows those that are"));
    }

    #[test]
    fn the_library() {
        assert_eq!(found(Ok(())).verdict, Fine);
        let missing = "librados.so.2: cannot open shared object file: No such file or directory";
        assert_eq!(found(Err(missing.into())).verdict, Fine);
        assert_eq!(found(Err("undefined symbol: rbd_aio_write_zeroes".into())).verdict, Warn);
    }
}
