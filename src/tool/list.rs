//! `vublk list`: the disks of this host.
//!
//! What it is: a line, or an object, for each disk that [`crate::find`] finds.
//!
//! What it is not: it asks no daemon itself.
//!
//! Invariant: a daemon that does not answer is shown, with the reason.

use serde_json::{Value, json};

use super::printable;
use crate::find::{self, Found};

/// The disks of this host.
pub(super) fn list(as_json: bool) -> String {
    let found = find::daemons();
    if as_json {
        let all = found.iter().map(|Found { name, place, status }| match status {
            Ok(status) => {
                let field = |at: &str| status.pointer(at).cloned().unwrap_or_default();
                json!({
                    "name": name, "control": place.control, "disk": place.disk, "state": field("/state"),
                    "pid": field("/pid"), "version": field("/version"),
                    "uptime_seconds": field("/uptime_seconds"), "front_end_pid": field("/front_end_pid"),
                    "path": field("/disk/path"), "serial": field("/disk/serial"), "size": field("/disk/size"),
                    "in_flight": field("/disk/in_flight"),
                })
            }
            Err(why) => json!({"name": name, "control": place.control, "error": why.to_string()}),
        });
        return format!("{}\n", Value::from_iter(all));
    }
    let mut text =
        format!("{:16} {:20} {:>8} {:>8} {:>14} {}\n", "NAME", "SERIAL", "PID", "VMM", "BYTES", "DISK");
    for Found { name, place, status } in &found {
        let line = match status {
            Ok(status) => {
                let field = |at: &str| match status.pointer(at) {
                    Some(Value::String(text)) => text.clone(),
                    Some(value) => value.to_string(),
                    None => "-".into(),
                };
                if status.pointer("/state").is_some_and(|state| state == "failed") {
                    let line = format!("{name:16} {:20} {:>8} failed: {}", "-", field("/pid"), field("/why"));
                    text.push_str(&printable(&line));
                    text.push('\n');
                    continue;
                }
                let [serial, pid, vmm, size, path] =
                    ["/disk/serial", "/pid", "/front_end_pid", "/disk/size", "/disk/path"].map(field);
                format!("{name:16} {serial:20} {pid:>8} {vmm:>8} {size:>14} {path}")
            }
            Err(why) => format!("{name:16} {} does not answer: {why}", place.control.display()),
        };
        text.push_str(&printable(&line));
        text.push('\n');
    }
    text
}
