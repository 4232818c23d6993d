//! The file of `--config`: the disks of one process.
//!
//! What it is: TOML, turned into words of a command line, which the command line's own parsers judge.
//!
//! What it is not: it is not written here; `vublk add` and `vublk remove` do that.
//!
//! Invariant: whatever is wrong is told with its line, and its key where it has one.
//!
//! ```toml
//! control = "/run/vublk/vm1.control"
//!
//! [[disk]]
//! name = "root"
//! blk-file = "/var/lib/vublk/vm1-root.raw"
//! socket-path = "/run/vublk/vm1-root.sock"
//! ```

use std::ffi::{OsStr, OsString};
use std::io::{self, ErrorKind, Read as _};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue};
use clap::{ArgAction, Args, Command, FromArgMatches};
use toml_edit::{Document, Item, Table, Value};

use super::ProcessArgs;
use super::disk::{DiskArgs, MeantDisk, Socket};
use crate::listen::beside;

/// Disks of one process.
const MOST_DISKS: usize = 64;
/// Bytes of a file of disks.
const LARGEST: u64 = 1 << 20;
/// Bytes of a name: it is a part of names that systemd limits to 255.
const MOST_NAME: usize = 64;

/// See the head of the file.
#[derive(Clone, Debug)]
pub struct File {
    /// What is in it.
    pub text: String,
    /// The options of the process, as words of a command line.
    pub(super) process: Vec<OsString>,
    path: PathBuf,
    disks: Vec<FileDisk>,
}

/// A `[[disk]]` table.
#[derive(Clone, Debug)]
struct FileDisk {
    line: usize,
    name: String,
    args: DiskArgs,
}

/// Where the control socket of this file's daemon is by default, whose first disk has this socket.
#[must_use]
pub fn control_of_file(file: &Path, first_socket: &Path) -> Option<PathBuf> {
    Some(beside(&first_socket.with_file_name(file.file_stem()?)))
}

/// What is in a file of disks.
///
/// # Errors
/// [`ErrorKind::InvalidData`]: it is something else, as a disk is.
pub fn text_of(path: &Path) -> io::Result<String> {
    let no_text = || io::Error::new(ErrorKind::InvalidData, "it is no text of a file of disks");
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(LARGEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LARGEST {
        return Err(no_text());
    }
    String::from_utf8(bytes).map_err(|_| no_text())
}

/// The command that takes the options of `A` alone.
pub(super) fn options<A: Args>() -> Command {
    A::augment_args(Command::new("vublkd").no_binary_name(true).disable_help_flag(true))
}

impl File {
    /// Reads and understands it.
    ///
    /// # Errors
    /// A sentence that begins with its path, and a line where it is about one.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = text_of(path).map_err(|e| {
            let hint = match e.kind() {
                ErrorKind::NotFound => {
                    ". Use the path of a file of disks; man vublk.toml shows one to begin with"
                }
                ErrorKind::PermissionDenied => ". Let the user that starts vublkd read it",
                ErrorKind::InvalidData => ". A disk is given as --blk-file",
                _ => "",
            };
            format!("{}: cannot read the file of --config: {e}{hint}", path.display())
        })?;
        Self::parse(path, text)
    }

    /// Understands what is in it.
    ///
    /// # Errors
    /// As [`File::read`].
    pub fn parse(path: &Path, text: String) -> Result<Self, String> {
        let line_of = |at: Option<Range<usize>>| {
            let before = text.as_bytes().get(..at.map_or(0, |at| at.start)).unwrap_or_default();
            before.iter().filter(|&&byte| byte == b'\n').count() + 1
        };
        let wrong = |at, why: &str| format!("{}:{}: {why}", path.display(), line_of(at));
        let document = Document::parse(text.as_str()).map_err(|e| wrong(e.span(), e.message()))?;
        let mut process = Vec::new();
        let mut disks = Vec::new();
        let of_the_process = options::<ProcessArgs>();
        for (key, item) in document.iter() {
            let at = key_span(document.as_table(), key, item);
            match (key, item) {
                ("disk", Item::ArrayOfTables(tables)) => {
                    for table in tables {
                        let line = line_of(table.span());
                        disks.push(disk(table, line).map_err(|(at, why)| wrong(at, &why))?);
                    }
                }
                ("disk", _) => return Err(wrong(at, "disks are tables that begin with [[disk]]")),
                _ => process.extend(word(&of_the_process, key, item).map_err(|why| wrong(at, &why))?),
            }
        }
        if disks.is_empty() {
            return Err(wrong(
                None,
                "there is no disk: write a [[disk]] table with blk-file and socket-path",
            ));
        }
        if disks.len() > MOST_DISKS {
            return Err(format!(
                "{}: {} disks are too many, use {MOST_DISKS} at most",
                path.display(),
                disks.len()
            ));
        }
        for (at, disk) in disks.iter().enumerate() {
            if let Some(other) = disks.iter().take(at).find(|other| other.name == disk.name) {
                let (name, path) = (&disk.name, path.display());
                let (line, first) = (disk.line, other.line);
                return Err(format!(
                    "{path}:{line}: the disk of line {first} is called {name}, too: use another name"
                ));
            }
        }
        Ok(Self { process, path: path.to_owned(), disks, text })
    }

    /// Where the daemon's control socket is, if the command line says nothing else.
    #[must_use]
    pub fn control(&self) -> Option<PathBuf> {
        let typed = self.process.iter().find_map(|word| word.as_bytes().strip_prefix(b"--control="));
        let beside_first = || control_of_file(&self.path, self.disks.first()?.args.socket_path.as_deref()?);
        typed.map(|path| OsStr::from_bytes(path).into()).or_else(beside_first)
    }

    /// The names of its disks, in their order.
    pub fn names(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.disks.iter().map(|disk| disk.name.as_str())
    }

    /// The disks for which a socket has to be passed.
    pub(super) fn without_socket(&self) -> Vec<String> {
        let without = self.disks.iter().filter(|disk| disk.args.socket_path.is_none());
        without.map(|disk| disk.name.clone()).collect()
    }

    /// What its disks' options mean. `passed`: the names of the sockets that were passed.
    pub(super) fn mean(self, passed: &[&str]) -> Result<Vec<MeantDisk>, String> {
        if let Some(name) = passed.iter().find(|name| self.disks.iter().all(|disk| disk.name != **name)) {
            return Err(format!(
                "a socket was passed that is called {name}, and no disk of {} is: use its name in the socket unit \
                 (FileDescriptorName=)",
                self.path.display()
            ));
        }
        let mean = |disk: FileDisk| {
            let FileDisk { line, name, args } = disk;
            let wrong = |why: String| format!("{}:{line}: disk {name}: {why}", self.path.display());
            let socket = match (&args.socket_path, args.fd, passed.contains(&name.as_str())) {
                (_, Some(_), _) => Err("fd is for the command line: use socket-path".to_owned()),
                (Some(path), None, false) => Ok(Socket::Path(path.clone())),
                (None, None, true) => Ok(Socket::Passed),
                (Some(_), None, true) => Err(
                    "systemd passed a socket of its name: leave socket-path away, or stop the socket unit"
                        .into(),
                ),
                (None, None, false) => Err(format!(
                    "no socket: add socket-path, or have systemd pass one (FileDescriptorName={name})"
                )),
            };
            socket.and_then(|socket| args.mean(Some(name.clone()), socket)).map_err(wrong)
        };
        self.disks.into_iter().map(mean).collect()
    }
}

/// Where a key is, for a message.
fn key_span(table: &Table, key: &str, item: &Item) -> Option<Range<usize>> {
    table.key(key).and_then(|key| key.span()).or_else(|| item.span())
}

type Wrong = (Option<Range<usize>>, String);

fn disk(table: &Table, line: usize) -> Result<FileDisk, Wrong> {
    let command = options::<DiskArgs>();
    let mut words = Vec::new();
    let mut name = None;
    for (key, item) in table.iter() {
        let at = key_span(table, key, item);
        if key == "name" {
            let wanted = item.as_str().filter(|name| is_name(name));
            let rule = format!("a name has letters, digits, and . _ -, {MOST_NAME} at most");
            name = Some(wanted.ok_or((at, rule))?.to_owned());
            continue;
        }
        words.extend(word(&command, key, item).map_err(|why| (at, why))?);
    }
    let matches = command.try_get_matches_from(&words).map_err(|e| (table.span(), sentence(&e)))?;
    let args = DiskArgs::from_arg_matches(&matches).map_err(|e| (table.span(), sentence(&e)))?;
    if args.blk_file.is_none() && args.disk.is_none() {
        return Err((table.span(), "this disk has no blk-file, and no disk".into()));
    }
    let stem =
        || args.socket_path.as_ref()?.file_stem()?.to_str().filter(|name| is_name(name)).map(str::to_owned);
    let name = name.or_else(stem);
    let name = name.ok_or_else(|| (table.span(), "this disk has no name, add name = \"…\"".to_owned()))?;
    Ok(FileDisk { line, name, args })
}

fn is_name(name: &str) -> bool {
    let usual = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=MOST_NAME).contains(&name.len()) && name.bytes().all(usual)
}

/// A key and its value as a word of a command line, once the parser of that option has taken it.
fn word(command: &Command, key: &str, item: &Item) -> Result<Option<OsString>, String> {
    let option = command.get_arguments().find(|option| option.get_long() == Some(key));
    let is_flag = option.is_some_and(|option| matches!(option.get_action(), ArgAction::SetTrue));
    let word = match item.as_value() {
        Some(Value::Boolean(yes)) if is_flag => {
            return Ok((*yes.value()).then(|| format!("--{key}").into()));
        }
        Some(Value::Boolean(yes)) => format!("--{key}={}", if *yes.value() { "on" } else { "off" }),
        Some(Value::Integer(number)) => format!("--{key}={}", number.value()),
        Some(Value::String(text)) => format!("--{key}={}", text.value()),
        _ => return Err(format!("{key}: use a text, a number, true or false")),
    };
    match command.clone().try_get_matches_from([&word]) {
        Ok(_) => Ok(Some(word.into())),
        Err(e) => Err(match (option, e.get(ContextKind::SuggestedArg)) {
            (Some(_), _) => format!("{key}: {}", sentence(&e)),
            (None, Some(ContextValue::String(other))) => {
                format!("{key}: there is no such key; {} is one", other.trim_start_matches('-'))
            }
            (None, _) => format!("{key}: there is no such key"),
        }),
    }
}

/// What clap says, without what is for a terminal.
fn sentence(error: &clap::Error) -> String {
    let text = error.to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    first.trim_start_matches("error: ").replace("\n ", "").trim().to_owned()
}
