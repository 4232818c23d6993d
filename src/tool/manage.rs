//! `vublk resize`, `retry`, `throttle`, `log-level` and `upgrade`: what a running daemon is asked to do.
//!
//! What it is not: the daemon decides; here is what people type and read.
//!
//! Invariant: what is printed as done was answered by the daemon that did it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::status::flatten;
use super::told;
use crate::args::{LimitArgs, size};
use crate::find::Place;
use crate::log::LogLevel;
use crate::program::Program;
use crate::rpc::{CallError, call};

/// A size that was typed.
#[derive(Clone, Copy, Debug)]
pub(super) enum NewSize {
    /// So many bytes.
    To(u64),
    /// So many bytes more than it has.
    By(u64),
}

pub(super) fn new_size(text: &str) -> Result<NewSize, String> {
    if text.starts_with('-') {
        return Err("a disk only grows: use its new size, such as 20G, or how much more, such as +1G".into());
    }
    match text.strip_prefix('+') {
        Some(more) if more.starts_with(|c: char| c.is_ascii_digit()) => size(more).map(NewSize::By),
        Some(_) => Err("use a number behind the +, such as +1G".into()),
        None => size(text).map(NewSize::To),
    }
}

pub(super) fn resize(place: &Place, size: Option<NewSize>, as_json: bool) -> Result<String, CallError> {
    let refused = |why: &str| CallError::Refused(why.to_owned());
    let size = match size {
        None => None,
        Some(NewSize::To(size)) => Some(size),
        Some(NewSize::By(more)) => {
            let status = place.ask("status", json!({}))?;
            if status.get("disks").is_some() {
                let why =
                    "this vublkd serves several disks, and each has a size of its own: name one with --disk";
                return Err(refused(why));
            }
            let now = status.pointer("/disk/size").and_then(Value::as_u64);
            let now = now.ok_or_else(|| {
                refused("the disk is not open yet, so it has no size: vublk status says more")
            })?;
            Some(now.checked_add(more).ok_or_else(|| refused("no disk is that large"))?)
        }
    };
    let resized = place.ask("resize", size.map_or(json!({}), |size| json!({ "size": size })))?;
    Ok(told(resized, as_json, |resized| {
        let then = match resized.get("told").and_then(Value::as_str) {
            Some("unchanged") => "it had that size",
            Some("front-end") => "the VMM was told, and tells its guest",
            Some("later") => "no guest uses it now; the next one to start finds the new size",
            _ => {
                "vublkd cannot tell this VMM. Firecracker reads the size anew and tells its guest at once by PATCH \
                 /drives/ID of its API; with another VMM the guest finds it when the VM starts anew or the VMM reconnects"
            }
        };
        format!("{} bytes: {then}\n", resized.get("size").unwrap_or(&Value::Null))
    }))
}

pub(super) fn retry(place: &Place, as_json: bool) -> Result<String, CallError> {
    Ok(told(place.ask("retry", json!({}))?, as_json, |held| match held.get("requests") {
        Some(requests) => {
            format!("{requests} requests are tried again; vublk status shows whether any are still held\n")
        }
        None => "no request is held\n".into(),
    }))
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

pub(super) fn log_level(
    Place { control, .. }: &Place,
    level: LogLevel,
    as_json: bool,
) -> Result<String, CallError> {
    let level = tracing::Level::from(level).as_str().to_lowercase();
    let now = call(control, "log-level", &json!({ "level": level }))?;
    Ok(told(now, as_json, |_| format!("logs at level {level} until the daemon ends, or is upgraded\n")))
}

/// How long a successor may take: the disk has to end what it has.
const SUCCESSION: Duration = Duration::from_secs(30);

/// Has the daemon give way to a successor; gives what that says of itself.
pub(super) fn upgrade(Place { control, .. }: &Place, binary: Option<PathBuf>) -> Result<Value, CallError> {
    // Of several disks any that is served knows it.
    let field = |status: &Value, name: &str| {
        let of_a_disk = || status.get("disks")?.as_array()?.iter().find_map(|disk| disk.get(name));
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
            let mut by = json!({});
            for name in ["version", "pid", "program", "waited_ms"] {
                // Of several disks each waited for itself.
                by[name] = status.get(name).cloned().unwrap_or_default();
            }
            return Ok(by);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(CallError::Refused(format!(
        "the daemon stopped for a successor, and none serves after {} s; vublkd's log says why",
        SUCCESSION.as_secs()
    )))
}

/// What [`upgrade`] has led to.
pub(super) fn taken_over(by: &Value) -> String {
    let version = by.get("version").and_then(Value::as_str).unwrap_or("?");
    let waited = by.get("waited_ms").and_then(Value::as_f64);
    let waited = waited.map_or_else(String::new, |ms| format!(", the guest waited {ms} ms"));
    format!("vublkd {version} has taken over{waited}\n")
}
