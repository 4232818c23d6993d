//! `vublk bench`: whether a load may run, and its report.
//!
//! What it is not: [`crate::bench`] makes the load.
//!
//! Invariant: a load that writes runs only where its user has said that the disk may be overwritten.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use serde_json::json;

use super::printable;
use crate::{bench, find};

/// Whether a load makes sense, and may overwrite the disk.
pub(super) fn may_run(options: &bench::Options) -> Result<(), String> {
    let rw = options.rw;
    if options.verify && !rw.writes() {
        return Err(format!("--verify compares what the run itself wrote: use --rw=randrw instead of {rw}"));
    }
    if !rw.writes() || options.destroy_data {
        return Ok(());
    }
    let disk = bench::disk_of(&options.socket).map_or("the disk".into(), |path| path.display().to_string());
    if io::stdin().is_terminal() && io::stderr().is_terminal() {
        write!(io::stderr(), "--rw={rw} overwrites {disk}: what it holds is lost. Type yes to go on: ")
            .map_err(|e| e.to_string())?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer).map_err(|e| e.to_string())?;
        if answer.trim() == "yes" {
            return Ok(());
        }
    }
    Err(format!(
        "--rw={rw} overwrites {disk}: nothing was done. Add --destroy-data if what it holds may be lost, or use --rw=randread"
    ))
}

/// Why a back-end does not answer, and what to do.
fn waits_for(socket: &Path) -> String {
    let path = socket.display();
    // Where none is known, the socket itself must not be asked: it is a back-end's.
    let place = find::place(socket, None).ok().filter(|place| place.control != socket);
    let status = place.as_ref().and_then(|place| place.ask("status", json!({})).ok());
    let pid = status.and_then(|status| status.get("front_end_pid")?.as_i64());
    match (place, pid) {
        (Some(place), Some(pid)) => format!(
            "{path}: waits until process {pid}, which has the disk, disconnects. To measure now, stop its VM or detach the disk; \
             ^C ends this. vublk stat {} 1 shows what the disk does meanwhile",
            place.name()
        ),
        _ => format!(
            "{path}: waits for an answer. A back-end serves one front-end at a time: if a VM has the disk, stop it or detach \
             the disk; ^C ends this"
        ),
    }
}

pub(super) fn measure(options: &bench::Options) -> io::Result<String> {
    let socket = options.socket.clone();
    let report = bench::run(options, move || {
        let _printed = writeln!(io::stderr(), "vublk: {}", printable(&waits_for(&socket)));
    })?;
    if options.json { Ok(serde_json::to_string(&report)? + "\n") } else { Ok(report.to_string()) }
}
