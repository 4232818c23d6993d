//! `vublk status`: what a daemon serves, for people or as it answered.
//!
//! What it is not: it makes nothing of the figures but text.
//!
//! Invariant: `--json` is the daemon's answer, unchanged.

use serde::Deserialize;
use serde_json::{Value, json};

use super::printable;
use crate::find::Place;
use crate::notes::Note;
use crate::rpc::CallError;
use crate::stats::histogram::Histogram;

pub(super) fn status(place: &Place, as_json: bool) -> Result<String, CallError> {
    let mut status = place.ask("status", json!({}))?;
    if as_json {
        return Ok(format!("{status}\n"));
    }
    let disks = status.as_object_mut().and_then(|status| status.remove("disks"));
    let notes = Note::all(&status);
    let sentences = notes.iter().map(|note| note.sentence(&place.name()));
    let mut lines: Vec<_> = sentences.map(|text| format!("{:24} {}\n", "note", printable(&text))).collect();
    flatten(&mut lines, "", &status);
    if let Some(disks) = disks.as_ref().and_then(Value::as_array) {
        lines.push("\n".into());
        lines.push(table(disks));
    }
    Ok(lines.concat())
}

/// The disks of one process, a line for each.
fn table(disks: &[Value]) -> String {
    let mut text = format!(
        "{:16} {:8} {:>8} {:>14} {:>8} {:>8} {}\n",
        "NAME", "STATE", "VMM", "BYTES", "INFLIGHT", "UPGRADES", "DISK"
    );
    for disk in disks {
        let field = |at: &str| match disk.pointer(at) {
            None | Some(Value::Null) => "-".to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
        };
        let fields = ["/name", "/state", "/front_end_pid", "/disk/size", "/disk/in_flight", "/disk/upgrades"];
        let notes = Note::all(disk);
        let [name, mut state, vmm, size, in_flight, upgrades] = fields.map(field);
        if !notes.is_empty() {
            state = Note::words(&notes);
        }
        let last = if disk.get("why").is_some() { field("/why") } else { field("/disk/path") };
        let line = format!("{name:16} {state:8} {vmm:>8} {size:>14} {in_flight:>8} {upgrades:>8} {last}");
        text.push_str(&printable(&line));
        text.push('\n');
    }
    text
}

/// `disk.size  1048576`, a line for each value.
pub(super) fn flatten(lines: &mut Vec<String>, name: &str, value: &Value) {
    let below = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
    if let Some(times) = histogram(value) {
        return lines.push(format!("{name:24} {times}\n"));
    }
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, v)| flatten(lines, &below(key), v)),
        Value::Array(all) => {
            all.iter().enumerate().for_each(|(at, v)| flatten(lines, &below(&at.to_string()), v))
        }
        Value::String(text) => lines.push(format!("{name:24} {}\n", printable(text))),
        other => lines.push(format!("{name:24} {other}\n")),
    }
}

/// A histogram as people read it.
fn histogram(value: &Value) -> Option<String> {
    let histogram = Histogram::deserialize(value).ok()?;
    let within = |share| histogram.quantile(share).map_or("none".into(), |ns| format!("{:.3} ms", ns / 1e6));
    Some(format!("p50 {}, p99 {}, p99.9 {}", within(0.5), within(0.99), within(0.999)))
}
