//! `vublk resize`, `retry`, `throttle` and `upgrade`: what a running daemon is asked to do.
//!
//! What it is not: the daemon decides; here is what people type and read.
//!
//! Invariant: what is printed as done was answered by the daemon that did it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::status::flatten;
use crate::args::LimitArgs;
use crate::find::Place;
use crate::program::Program;
use crate::rpc::{CallError, call};

pub(super) fn resize(place: &Place, size: Option<u64>) -> Result<String, CallError> {
    let params = size.map_or(json!({}), |size| json!({ "size": size }));
    let resized = place.ask("resize", params)?;
    let then = match resized.get("told").and_then(Value::as_str) {
        Some("unchanged") => "it had that size",
        Some("front-end") => "the VMM was told, and tells its guest",
        Some("later") => "no guest uses it now; the next one to start finds the new size",
        _ => {
            "the VMM takes no such news: the guest finds the new size when the VM starts anew or the VMM reconnects"
        }
    };
    Ok(format!("{} bytes: {then}\n", resized.get("size").unwrap_or(&Value::Null)))
}

pub(super) fn retry(place: &Place) -> Result<String, CallError> {
    let held = place.ask("retry", json!({}))?;
    Ok(match held.get("requests").and_then(Value::as_u64) {
        Some(requests) => {
            format!("{requests} requests are tried again; vublk status shows whether any are still held\n")
        }
        None => "no request is held\n".into(),
    })
}

pub(super) fn throttle(place: &Place, limits: LimitArgs, as_json: bool) -> Result<String, CallError> {
    let params: Map<String, Value> = limits.0.into_iter().map(|(name, value)| (name, value.into())).collect();
    let shown = place.ask("throttle", params.into())?;
    if as_json {
        return Ok(format!("{shown}\n"));
    }
    let mut lines = Vec::new();
    flatten(&mut lines, "", &shown);
    if shown.as_object().is_some_and(|all| !all.keys().any(|name| name.contains("ps_"))) {
        lines.insert(0, "no limits\n".into());
    }
    Ok(lines.concat())
}

/// How long a successor may take: the disk has to end what it has.
const SUCCESSION: Duration = Duration::from_secs(30);

pub(super) fn upgrade(Place { control, .. }: &Place, binary: Option<PathBuf>) -> Result<String, CallError> {
    // Of several disks any knows it.
    let field = |status: &Value, name: &str| {
        let of_a_disk = || status.pointer(&format!("/disks/0/{name}"));
        status.get(name).or_else(of_a_disk).cloned().unwrap_or_default()
    };
    let before = call(control, "status", &json!({}))?;
    let binary = binary.map(|path| std::path::absolute(&path).unwrap_or(path));
    if field(&before, "kept_by") == "systemd" && binary.is_none() {
        // systemd asks no program anything; here the one that it will start is.
        let layout = field(&before, "state_version").as_u64().and_then(|n| u32::try_from(n).ok());
        let path = field(&before, "program").as_str().map(PathBuf::from).unwrap_or_default();
        Program::open(&path)
            .and_then(|program| program.may_follow(layout.unwrap_or(0), None))
            .map_err(|why| CallError::Refused(format!("no upgrade: {why}; the daemon goes on")))?;
    }
    let params = binary.map_or(json!({}), |path| json!({ "binary": path }));
    call(control, "upgrade", &params).map_err(|e| match e {
        CallError::Refused(why) => CallError::Refused(format!("no upgrade: {why}; the daemon goes on")),
        e => e,
    })?;
    let started = Instant::now();
    while started.elapsed() < SUCCESSION {
        // Between the old daemon and the new one no process listens.
        if let Ok(status) = call(control, "status", &json!({}))
            && field(&status, "pid") != field(&before, "pid")
        {
            if let Some(why) = field(&status, "upgrade_refused").as_str() {
                return Err(CallError::Refused(format!("no upgrade: {why}; the old program goes on")));
            }
            let version = field(&status, "version");
            let waited =
                status.get("waited_ms").map_or_else(String::new, |ms| format!(", the guest waited {ms} ms"));
            return Ok(format!("vublkd {} has taken over{waited}\n", version.as_str().unwrap_or("?")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(CallError::Refused(format!(
        "the daemon stopped for a successor, and none serves after {} s; vublkd's log says why",
        SUCCESSION.as_secs()
    )))
}
