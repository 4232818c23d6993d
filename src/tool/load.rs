//! `vublk bench`: whether a load may run, and its report.
//!
//! What it is not: [`crate::bench`] makes the load.
//!
//! Invariant: a load that writes runs only where its user has said that the disk may be overwritten.

use std::io::{self, IsTerminal, Write};

use crate::bench;

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

pub(super) fn measure(options: &bench::Options) -> io::Result<String> {
    let report = bench::run(options)?;
    if options.json { Ok(serde_json::to_string(&report)? + "\n") } else { Ok(report.to_string()) }
}
