//! `vublk add` and `vublk remove`: disks of a process that come and go.
//!
//! What it is: the order of things: edit the file, have the daemon read it anew by an upgrade, look what has become of
//! the disk, and take all of it back where that is bad.
//!
//! What it is not: the daemon opens the disk and judges it. The text is [`super::config_file`]'s.
//!
//! Invariant: where a command fails, the file is as it was, and the daemon serves what it served; or the message says
//! what is not so.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::builder::Resettable;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command, Error, FromArgMatches};
use serde_json::{Value, json};

use super::config_file::ConfigFile;
use super::{manage, told};
use crate::args::disk::DiskArgs;
use crate::disk::uri::Uri;
use crate::find::{self, Place};
use crate::rpc::{CallError, call};

/// How long a disk may take to be opened by the daemon that has taken over.
const OPENING: Duration = Duration::from_secs(30);

/// The options of a disk that were typed, as keys of its table.
#[derive(Clone, Debug)]
pub(super) struct Keys(Vec<(String, toml_edit::Value)>);

impl Args for Keys {
    fn augment_args(command: Command) -> Command {
        // A descriptor has no place in a file, which its check says.
        let command = DiskArgs::augment_args(command).mut_arg("fd", |option| option.hide(true));
        // Man pages and completions are made without what is hidden.
        let command = command.mut_arg("socket_path", |option| option.conflicts_with(Resettable::Reset));
        command.mut_arg("blk_file", |option| option.required_unless_present("disk"))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Keys {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let mut keys = Self(Vec::new());
        keys.update_from_arg_matches(matches)?;
        Ok(keys)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        for option in DiskArgs::augment_args(Command::new("disk")).get_arguments() {
            if matches.value_source(option.get_id().as_str()) == Some(ValueSource::CommandLine) {
                self.0.extend(key(option, matches)?);
            }
        }
        // As people write them: which disk, then where, then how.
        self.0.sort_by_key(|(key, _)| {
            ["blk-file", "socket-path"].iter().position(|first| first == key).unwrap_or(2)
        });
        Ok(())
    }
}

/// An option that was typed, as a key and the kind of value that people write there.
fn key(option: &Arg, matches: &ArgMatches) -> Result<Option<(String, toml_edit::Value)>, Error> {
    let Some(key) = option.get_long() else { return Ok(None) };
    let mut words = Vec::new();
    for word in matches.get_raw(option.get_id().as_str()).into_iter().flatten() {
        // The daemon has another working directory.
        let absolute = match key {
            "blk-file" | "socket-path" => std::path::absolute(word).ok(),
            "disk" => absolute_disk(word),
            _ => None,
        };
        let word = absolute.unwrap_or_else(|| word.into());
        let text = word.to_str().map(str::to_owned);
        words.push(text.ok_or_else(|| {
            Error::raw(
                clap::error::ErrorKind::InvalidUtf8,
                format!("--{key}: a file of disks is UTF-8, which this is not\n"),
            )
        })?);
    }
    let text = words.join(",");
    let values = option.get_possible_values();
    let is_switch = values.iter().map(clap::builder::PossibleValue::get_name).eq(["on", "off"]);
    let is_number = option
        .get_value_names()
        .is_some_and(|names| names.iter().any(|name| *name == "N" || *name == "SIZE"));
    let value = match text.parse::<i64>() {
        _ if is_switch => (text == "on").into(),
        Ok(number) if is_number => number.into(),
        _ => text.into(),
    };
    Ok(Some((key.to_owned(), value)))
}

/// What was typed for a disk, where a path in it is not absolute. A URI that makes no sense is left to the check of the file.
fn absolute_disk(word: &OsStr) -> Option<PathBuf> {
    match word.to_str().filter(|text| Uri::is_meant(text)) {
        None => std::path::absolute(word).ok(),
        Some(text) => {
            let uri = Uri::parse(text).ok()?;
            let absolute = uri.clone().absolute().ok()?;
            // Else it stays as people wrote it.
            (absolute != uri).then(|| absolute.to_string().into())
        }
    }
}

/// A file of disks, and the daemon that serves them, if one does.
struct Target {
    file: PathBuf,
    daemon: Option<Place>,
    /// The disk that was meant, if a disk was.
    disk: Option<String>,
}

impl Target {
    /// What DISK|FILE on a command line stands for.
    fn find(word: &Path) -> Result<Self, String> {
        if word.is_file() {
            let file = word.canonicalize().map_err(|e| format!("{}: {e}", word.display()))?;
            let is_its = |found: &find::Found| {
                let config = found.status.as_ref().ok()?.get("config")?.as_str()?;
                Some(Path::new(config).canonicalize().ok()? == file)
            };
            let daemon = find::daemons().into_iter().find(|found| is_its(found) == Some(true));
            return Ok(Self { file, daemon: daemon.map(|found| found.place), disk: None });
        }
        let place = find::place(word, None)?;
        let status = call(&place.control, "status", &json!({})).map_err(|e| e.to_string())?;
        let config = status.get("config").and_then(Value::as_str).map(PathBuf::from);
        let file = config.ok_or_else(|| {
            format!(
                "{}: this vublkd serves the disk of its command line. Disks are added and removed where vublkd was \
                 started with --config=FILE",
                place.control.display()
            )
        })?;
        let disk = place.disk.clone();
        Ok(Self { file, daemon: Some(place), disk })
    }

    /// Writes the text, has the daemon serve what is in it, and puts the one from before back if `is_served` says no.
    fn serve(
        &self,
        file: &ConfigFile,
        text: &str,
        is_served: impl Fn(&[Value]) -> Result<bool, String>,
    ) -> Result<Option<Value>, String> {
        file.replace(text)?;
        let Some(place) = &self.daemon else { return Ok(None) };
        let taken_back = |why: String| match file.put_back(text) {
            Ok(()) => format!("{why}. {} is as it was", file.path.display()),
            Err(other) => format!("{why}. {other}"),
        };
        let by = manage::upgrade(place, None).map_err(|e| taken_back(e.to_string()))?;
        let Err(why) = settle(place, is_served) else { return Ok(Some(by)) };
        let mut why = taken_back(why);
        if let Err(e) = manage::upgrade(place, None) {
            why = format!("{why}, and vublkd does not serve it anew: {e}");
        }
        Err(why)
    }
}

/// Waits until the daemon's disks are as they should be. `is_served`: not yet, or an error: never.
fn settle(place: &Place, is_served: impl Fn(&[Value]) -> Result<bool, String>) -> Result<(), String> {
    let started = Instant::now();
    loop {
        let status = call(&place.control, "status", &json!({})).map_err(|e| e.to_string())?;
        if is_served(disks_of(&status))? {
            return Ok(());
        }
        if started.elapsed() > OPENING {
            return Err(format!("vublkd has not opened the disk within {} s", OPENING.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn disks_of(status: &Value) -> &[Value] {
    status.get("disks").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn named<'a>(disks: &'a [Value], name: &str) -> Option<&'a Value> {
    disks.iter().find(|disk| disk.get("name").is_some_and(|its| its == name))
}

/// Adds a disk of these options.
///
/// # Errors
/// A sentence; then nothing has changed.
pub(super) fn add(word: &Path, name: Option<String>, keys: Keys, as_json: bool) -> Result<String, String> {
    let target = Target::find(word)?;
    let file = ConfigFile::open(&target.file)?;
    let name = name.map(|name| ("name".to_owned(), name.into()));
    let text = file.with_disk(name.into_iter().chain(keys.0).collect());
    let checked = file.check(&text)?;
    let name = checked.names().last().unwrap_or_default().to_owned();
    let by = target.serve(&file, &text, |disks| {
        let disk = named(disks, &name).ok_or_else(|| {
            format!("vublkd does not serve disk {name}: it reads another file, or takes this one for a mistake, which its log tells")
        })?;
        let field = |name: &str| disk.get(name).and_then(Value::as_str).unwrap_or_default();
        match field("state") {
            "failed" => Err(format!("disk {name}: {}", field("why"))),
            state => Ok(state == "serving"),
        }
    })?;
    Ok(report(&file, &name, "added", by, as_json))
}

/// Removes a disk. `force`: also where a front-end has it.
///
/// # Errors
/// A sentence; then nothing has changed.
pub(super) fn remove(
    word: &Path,
    name: Option<String>,
    force: bool,
    as_json: bool,
) -> Result<String, String> {
    let target = Target::find(word)?;
    let name = name
        .or(target.disk.clone())
        .ok_or("which disk? Type its name behind the file, or the daemon's name")?;
    let file = ConfigFile::open(&target.file)?;
    let before = file.check(&file.text)?;
    let names: Vec<&str> = before.names().collect();
    let path = file.path.display();
    let at = names.iter().position(|its| *its == name);
    let at = at.ok_or_else(|| format!("{path}: there is no disk {name}; there are: {}", names.join(", ")))?;
    if names.len() == 1 {
        return Err(format!("{path}: {name} is its only disk: stop vublkd instead"));
    }
    if let Some(place) = target.daemon.as_ref().filter(|_| !force) {
        let status = call(&place.control, "status", &json!({})).map_err(|e: CallError| e.to_string())?;
        let front_end = named(disks_of(&status), &name).and_then(|disk| disk.get("front_end_pid"));
        if let Some(pid) = front_end {
            return Err(format!(
                "disk {name} is in use: process {pid} is connected. Detach it from the VM first, or add --force: the guest \
                 then loses its disk"
            ));
        }
    }
    let text = file.without_disk(at)?;
    file.check(&text)?;
    let by = target.serve(&file, &text, |disks| match named(disks, &name) {
        Some(_) => Err(format!(
            "vublkd still serves disk {name}: it reads another file, or takes this one for a mistake, which its log tells"
        )),
        None => Ok(true),
    })?;
    Ok(report(&file, &name, "removed", by, as_json))
}

fn report(file: &ConfigFile, disk: &str, done: &str, by: Option<Value>, as_json: bool) -> String {
    told(json!({ "config": file.path, "disk": disk, "upgrade": by }), as_json, |report| {
        let then = match report.get("upgrade") {
            None | Some(Value::Null) => {
                "no vublkd serves this file now; the next one that starts reads it\n".into()
            }
            Some(by) => manage::taken_over(by),
        };
        format!("{}: disk {disk} {done}; {then}", file.path.display())
    })
}
