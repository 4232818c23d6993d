//! `vublk doctor`: what of this host, and of disks on it, is in vublkd's way.
//!
//! What it is: the report of checks, each a line: what was looked at, how that is, what it means, and what to type.
//!
//! What it is not: the checks are in `doctor/`; of a disk `vublk inspect` tells more.
//!
//! Invariant: nothing is changed, and nothing that a daemon or a VMM would notice is done. A server has one more client
//! for a moment.

mod host;
mod image;
mod place;
mod remote;

use std::fmt::Write;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::json;

use super::printable;
use crate::disk::uri::Uri;
use crate::find::{self, FOLDER};

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// vublkd serves, but slower, or less than it could.
    Warn,
    /// vublkd does not serve, or no VMM reaches it.
    Fail,
}

/// What a check has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// What was looked at, in a word or two.
    check: &'static str,
    verdict: Verdict,
    /// How it is, and what that means.
    says: String,
    /// What to type, or to write where.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

fn ok(check: &'static str, says: impl Into<String>) -> Finding {
    Finding { check, verdict: Verdict::Ok, says: says.into(), remedy: None }
}

fn warn(check: &'static str, says: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { check, verdict: Verdict::Warn, says: says.into(), remedy: Some(remedy.into()) }
}

fn fail(check: &'static str, says: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Fail, ..warn(check, says, remedy) }
}

/// The findings about one thing.
#[derive(Debug, Serialize)]
struct Section {
    /// `None`: the host.
    path: Option<PathBuf>,
    findings: Vec<Finding>,
}

/// Looks at the host and at these paths; gives the report, and whether nothing fails.
pub(super) fn doctor(paths: Vec<PathBuf>, as_json: bool) -> (String, bool) {
    let folder = Path::new(FOLDER);
    let mut sections = vec![Section { path: None, findings: host::all() }];
    if folder.is_dir() && !paths.iter().any(|path| path == folder) {
        sections.push(Section { path: Some(folder.into()), findings: place::sockets(folder) });
    }
    sections.extend(paths.into_iter().map(|path| Section { findings: look(&path), path: Some(path) }));
    let findings = || sections.iter().flat_map(|section| &section.findings);
    let worst = findings().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
    let text = if as_json {
        format!("{}\n", json!({ "verdict": worst, "sections": sections }))
    } else {
        sections.iter().map(words).collect::<Vec<_>>().join("\n")
    };
    (text, worst != Verdict::Fail)
}

/// What is at a path that was typed.
fn look(path: &Path) -> Vec<Finding> {
    if let Some(text) = path.to_str().filter(|text| Uri::is_meant(text)) {
        return remote::all(text);
    }
    let kind = match std::fs::metadata(path) {
        Ok(meta) => meta.file_type(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            if let Some(disk) = find::disk_called(path) {
                return look(&disk);
            }
            if path.extension().is_some_and(|end| end == "sock" || end == "control") {
                return vec![fail(
                    "path",
                    "no vublkd listens there",
                    "vublk list shows the disks that are served",
                )];
            }
            if let Some(name) = path.to_str().filter(|name| !name.contains(['/', '.'])) {
                return vec![host::unit(name)];
            }
            let remedy = format!("truncate -s 10G {}", path.display());
            return vec![fail("path", "nothing is there", remedy)];
        }
        Err(e) => {
            return vec![fail("path", format!("this user cannot look at it: {e}"), "sudo vublk doctor …")];
        }
    };
    if kind.is_dir() {
        let mut findings = place::folder(path);
        findings.extend(place::sockets(path));
        findings
    } else if kind.is_socket() {
        vec![place::socket(path)]
    } else if kind.is_file() || kind.is_block_device() {
        image::all(path)
    } else {
        let says = "is no disk: neither a file nor a block device, nor a folder or a socket";
        vec![fail("path", says, "use the path of a disk")]
    }
}

/// A section for people.
fn words(section: &Section) -> String {
    let mut text = String::new();
    if let Some(path) = &section.path {
        let _written = writeln!(text, "{}", printable(&path.display().to_string()));
    }
    for Finding { check, verdict, says, remedy } in &section.findings {
        let verdict = match verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "fail",
        };
        let _written = writeln!(text, "{verdict:5} {check:14} {}", printable(says));
        if let Some(remedy) = remedy {
            let _written = writeln!(text, "{:20} {}", "", printable(remedy));
        }
    }
    text
}
