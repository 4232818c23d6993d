//! The command line, and the file that it may name: what was typed ([`Typed`]) and what it means ([`Meant`]).
//!
//! What it is not: it opens nothing but that file, and touches nothing.
//!
//! Invariants: every contradiction is found here, before anything else is opened. The keys of a file are the options'
//! names, and their values are judged by the very parsers of the command line.

pub mod disk;
pub mod file;
mod limits;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{NonEmptyStringValueParser, PathBufValueParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Args, CommandFactory, FromArgMatches, Parser, ValueEnum};

use self::disk::DiskArgs;
pub use self::disk::{EngineChoice, MeantDisk, Socket};
pub use self::file::File;
pub use self::limits::LimitArgs;
use crate::log::LogLevel;
use crate::metrics::server::Place;
use crate::sandbox;
use crate::throttle::Limits;

/// What `--print-capabilities` prints: QEMU's convention for back-end programs.
pub const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

/// Queues that can be offered: one byte of SET_VRING_KICK names a queue.
pub const MAX_QUEUES: u16 = 256;

/// on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

/// The options of the process.
#[derive(Clone, Debug, Args)]
pub struct ProcessArgs {
    /// The user that vublkd becomes, a name or a number, where root starts it: once it listens, and before it opens
    /// the disk, which has to be that user's or a group's of its. The sockets belong to it, too
    #[arg(long, value_name = "USER", value_parser = NonEmptyStringValueParser::new())]
    pub user: Option<String>,

    /// The group that vublkd gets [default: the user's]. VMMs whose user is in it may connect
    #[arg(long, value_name = "GROUP", value_parser = NonEmptyStringValueParser::new())]
    pub group: Option<String>,

    /// Listen here for vublk status, resize, retry, throttle and upgrade; its mode is 0600 [default: the disk's socket, if vublkd
    /// listens, with .control behind its name]
    #[arg(long, value_name = "PATH", value_parser = PathBufValueParser::new().try_map(socket))]
    pub control: Option<PathBuf>,

    /// Answer Prometheus' scrapes here, by HTTP at /metrics: a Unix socket, or an IP address and a port, which anyone who
    /// reaches it may read
    #[arg(long, value_name = "unix:PATH|ADDR:PORT", value_parser = place)]
    pub metrics: Option<Place>,

    /// How long SIGTERM waits for requests in flight, in milliseconds, 0 to 86400000, before it ends the
    /// daemon with status 3
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = number::<u64>(0, 86_400_000))]
    pub stop_timeout_ms: u64,

    /// Give up, before the VMM says anything, all that serving does not need: capabilities, files, system calls. log
    /// lets through a system call that is missing in the list, and the kernel's log tells of it
    #[arg(long, value_enum, default_value = "on", value_name = "on|off|log", hide_possible_values = true)]
    pub sandbox: sandbox::Mode,

    /// How much to log
    #[arg(long, value_enum, default_value = "info", value_name = "LEVEL")]
    pub log_level: LogLevel,

    /// Have a small parent process that holds what a successor needs and starts it when the daemon dies, on the same
    /// connection: the VMM and its guest notice a pause. SIGUSR2 upgrades to the program that is at vublkd's path then
    /// [default: on; off with --fd-store]
    #[arg(
        long,
        value_enum,
        value_name = "on|off",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "on",
        overrides_with = "supervise",
        hide_possible_values = true
    )]
    pub supervise: Option<Switch>,

    /// Keep in systemd's file descriptor store, instead of a parent process, what a successor needs to go on, after a
    /// crash or a systemctl restart, on the same connection. The unit needs FileDescriptorStoreMax=2048
    #[arg(long)]
    pub fd_store: bool,
}

/// Gives a virtual machine a disk: a vhost-user-blk back-end.
///
/// A VMM (QEMU, cloud-hypervisor, Firecracker) connects to the Unix socket; its guest then reads and writes
/// the file or block device through virtio-blk. Runs in the foreground and logs to standard error. SIGTERM
/// drains and ends it with status 0, SIGUSR1 logs a line of statistics, SIGHUP tells it that the disk has grown.
#[derive(Clone, Debug, Parser)]
#[command(name = "vublkd", version, max_term_width = 100)]
pub struct Typed {
    /// Serve the disks of this file, each a [[disk]] table whose keys are the names of the options that are about a
    /// disk, and name. Options of the process may stand before the tables; those of the command line go before them
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Look at the file of --config, say what is wrong in which line, and exit
    #[arg(long, requires = "config")]
    pub check_config: bool,

    /// See [`DiskArgs`].
    #[command(flatten)]
    pub disk: DiskArgs,

    /// See [`ProcessArgs`].
    #[command(flatten)]
    pub process: ProcessArgs,

    /// Print what this back-end can do, as JSON, and exit; other options are ignored
    #[arg(long)]
    pub print_capabilities: bool,

    /// Print the layouts of state that this program can go on from, and exit
    #[arg(long, hide = true)]
    pub print_state_version: bool,
}

/// A parser of whole numbers from `low` to `high`.
pub fn number<T: TryFrom<u64>>(low: u64, high: u64) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| {
        let number = text.parse().ok().filter(|n| (low..=high).contains(n)).and_then(|n| T::try_from(n).ok());
        number.ok_or_else(|| format!("use a whole number from {low} to {high}"))
    }
}

/// A socket's path, which the kernel limits (unix(7)).
///
/// # Errors
/// A sentence that says what to type.
pub fn socket(path: PathBuf) -> Result<PathBuf, String> {
    if path.as_os_str().len() < 108 {
        Ok(path)
    } else {
        Err("use a path of at most 107 bytes for a socket".into())
    }
}

/// Where scrapes are answered.
fn place(word: &str) -> Result<Place, String> {
    match word.strip_prefix("unix:") {
        Some("") => Err("use unix:PATH".into()),
        Some(path) => socket(path.into()).map(Place::Unix),
        None => word.parse().map(Place::Tcp).map_err(|_| {
            "use unix:PATH, or an IP address and a port, such as 127.0.0.1:9750 or [::1]:9750".into()
        }),
    }
}

/// Bytes as people write them: a number, also with k, M, G or T for powers of 1024.
///
/// # Errors
/// A sentence that says what to type.
pub fn size(text: &str) -> Result<u64, String> {
    let size = parse_size::Config::new().with_binary().parse_size(text);
    match size {
        Ok(size) if i64::try_from(size).is_ok() => Ok(size),
        Ok(_) | Err(parse_size::Error::PosOverflow) => Err("no disk is that large, use less than 8E".into()),
        Err(_) => Err("use bytes, or a number with k, M, G or T (powers of 1024), such as 4k or 20G".into()),
    }
}

/// What keeps what a successor needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: a crash ends the connection.
    Nowhere,
    /// vublkd's parent process.
    Parent,
    /// systemd's file descriptor store.
    Systemd,
}

/// What the command line means.
#[derive(Clone, Debug)]
pub struct Meant {
    /// The disks, at least one.
    pub disks: Vec<MeantDisk>,
    /// They are those of this file.
    pub config: Option<PathBuf>,
    /// Where to listen for the tool; beside the first disk's socket when `None`.
    pub control: Option<PathBuf>,
    /// Where to answer scrapes.
    pub metrics: Option<Place>,
    /// The user to become, as it was typed.
    pub user: Option<String>,
    /// The group.
    pub group: Option<String>,
    /// Bound of a drain when stopping.
    pub stop_timeout: Duration,
    /// What keeps what a successor needs.
    pub keep: Keep,
    /// What the process gives up.
    pub sandbox: sandbox::Mode,
    /// Verbosity.
    pub log_level: LogLevel,
}

/// Why a command line, or the file that it names, makes no sense.
#[derive(Debug)]
pub enum Unreadable {
    /// As clap tells it; also the wish for help.
    CommandLine(clap::Error),
    /// The file, or options that do not go with it: a sentence.
    File(String),
}

/// What was typed, with what the file of `--config` says.
#[derive(Clone, Debug)]
pub struct Read {
    /// The options of the process are the command line's, and for others the file's.
    pub typed: Typed,
    /// The file, if there is one.
    pub file: Option<File>,
}

impl Read {
    /// Reads this command line, and the file that it names. `kept`: what was in that file, to be taken for it.
    ///
    /// # Errors
    /// [`Unreadable`].
    pub fn new(words: &[OsString], kept: Option<&str>) -> Result<Self, Unreadable> {
        let matches = Typed::command()
            .try_get_matches_from(words)
            .map_err(|e| Unreadable::CommandLine(with_option(e)))?;
        let typed = Typed::from_arg_matches(&matches).map_err(Unreadable::CommandLine)?;
        let Some(path) = &typed.config else { return Ok(Self { typed, file: None }) };
        let by_hand = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
        if let Some(option) =
            file::options::<DiskArgs>().get_arguments().find(|o| by_hand(o.get_id().as_str()))
        {
            let (option, path) = (option.get_long().unwrap_or_default(), path.display());
            return Err(Unreadable::File(format!(
                "--{option} is about a disk, and the disks are those of {path}: write it there, in a [[disk]] table"
            )));
        }
        let file = match kept {
            Some(text) => File::parse(path, text.to_owned()),
            None => File::read(path),
        };
        let file = file.map_err(Unreadable::File)?;
        // The last of two counts.
        let (program, typed) = words.split_at(words.len().min(1));
        let all = program.iter().chain(&file.process).chain(typed);
        let merged = Typed::command().args_override_self(true).try_get_matches_from(all);
        let typed = merged.and_then(|matches| Typed::from_arg_matches(&matches));
        Ok(Self { typed: typed.map_err(Unreadable::CommandLine)?, file: Some(file) })
    }

    /// Looks for contradictions, whatever sockets will be passed; gives the number of disks.
    ///
    /// # Errors
    /// A sentence that says what to type.
    pub fn check(self) -> Result<usize, String> {
        let named = self.file.as_ref().map(File::without_socket).unwrap_or_default();
        let named: Vec<&str> = named.iter().map(String::as_str).collect();
        self.mean(&named).map(|meant| meant.disks.len())
    }

    /// Finds out what was meant. `passed`: the names of the sockets that systemd, or the parent, passed.
    ///
    /// # Errors
    /// A sentence that says what to type.
    pub fn mean(self, passed: &[&str]) -> Result<Meant, String> {
        let Typed { process, disk, config, .. } = self.typed;
        let keep = match (process.supervise, process.fd_store) {
            (Some(Switch::On), true) => {
                return Err("--supervise=on and --fd-store exclude each other: one keeps what a successor needs in a \
                            parent process, the other in systemd"
                    .into());
            }
            (_, true) => Keep::Systemd,
            (Some(Switch::Off), false) => Keep::Nowhere,
            (_, false) => Keep::Parent,
        };
        let disks = match self.file {
            None => {
                if disk.blk_file.is_none() && disk.disk.is_none() {
                    return Err(NO_DISK.into());
                }
                let socket = only_socket(&disk, passed.len())?;
                vec![disk.mean(None, socket)?]
            }
            Some(file) => file.mean(passed)?,
        };
        share_limits(&disks)?;
        serve_once(&disks)?;
        let control = process.control.as_deref().map(|path| ("--control".to_owned(), path));
        let images = disks.iter().filter_map(MeantDisk::image);
        let metrics = match &process.metrics {
            Some(Place::Unix(path)) => Some(("--metrics".to_owned(), path.as_path())),
            _ => None,
        };
        let typed = images.chain(control).chain(metrics).chain(disks.iter().filter_map(MeantDisk::socket));
        let paths: Vec<_> =
            typed.filter_map(|(what, p)| Some((what, std::path::absolute(p).ok()?))).collect();
        for (at, (one, path)) in paths.iter().enumerate() {
            if let Some((other, _)) = paths.iter().skip(at + 1).find(|(_, other)| other == path) {
                return Err(format!(
                    "{one} and {other} are both {}: use another path for {other}",
                    path.display()
                ));
            }
        }
        Ok(Meant {
            disks,
            config,
            control: process.control,
            metrics: process.metrics,
            user: process.user,
            group: process.group,
            stop_timeout: Duration::from_millis(process.stop_timeout_ms),
            keep,
            sandbox: process.sandbox,
            log_level: process.log_level,
        })
    }
}

/// A word without an option is most likely the path of a disk.
fn with_option(mut error: clap::Error) -> clap::Error {
    if let (ErrorKind::UnknownArgument, Some(ContextValue::String(word))) =
        (error.kind(), error.get(ContextKind::InvalidArg))
        && !word.starts_with('-')
    {
        let tip = format!("a disk is given as --blk-file={word}, and a file of disks as --config={word}");
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    }
    error
}

const NO_DISK: &str =
    "no disk: add --blk-file=PATH, --disk=URI for one on another machine, or --config=FILE for several";

/// The disks of a group have one set of limits: each has no other one.
fn share_limits(disks: &[MeantDisk]) -> Result<(), String> {
    let named = || disks.iter().filter(|disk| disk.throttle_group.is_some());
    for disk in named().filter(|disk| disk.limits.any()) {
        let others = named().filter(|other| other.throttle_group == disk.throttle_group);
        if let Some(other) =
            others.filter(|other| other.limits.any()).find(|other| other.limits != disk.limits)
        {
            let name = |disk: &MeantDisk| disk.name.clone().unwrap_or_default();
            return Err(format!(
                "disks {} and {} are in one throttle-group, {}, and have different limits: write the limits in one of \
                 them, or the same in each",
                name(disk),
                name(other),
                disk.throttle_group.as_deref().unwrap_or_default()
            ));
        }
    }
    Ok(())
}

/// A disk on another machine that guests write to is that of one table. Paths are compared with others' paths.
fn serve_once(disks: &[MeantDisk]) -> Result<(), String> {
    let written: Vec<_> = disks.iter().filter_map(MeantDisk::remote_image).collect();
    for (at, (one, uri)) in written.iter().enumerate() {
        let mut others = written.iter().skip(at + 1);
        if let Some((other, its)) = others.find(|(_, other)| other.is_same_disk(uri)) {
            return Err(format!(
                "{one} and {other} are both {uri}: use another disk for {other} ({its}), or read-only in one of them"
            ));
        }
    }
    Ok(())
}

/// The limits that a group of disks has.
#[must_use]
pub fn limits_of(group: &str, disks: &[MeantDisk]) -> Limits {
    let of_group = disks.iter().filter(|disk| disk.throttle_group.as_deref() == Some(group));
    of_group.map(|disk| disk.limits).find(Limits::any).unwrap_or_default()
}

/// Where the front-ends of the command line's disk come from.
fn only_socket(disk: &DiskArgs, passed: usize) -> Result<Socket, String> {
    match (&disk.socket_path, disk.fd, passed) {
        (Some(path), None, 0) => Ok(Socket::Path(path.clone())),
        (None, Some(fd), 0) => Ok(Socket::Fd(fd)),
        (None, None, 1) => Ok(Socket::Passed),
        (None, None, 0) => {
            Err("no socket: add --socket-path=PATH, or start vublkd by socket activation".into())
        }
        (Some(_), Some(_), _) => Err("--socket-path and --fd exclude each other".into()),
        (Some(_), ..) | (_, Some(_), _) => {
            Err("systemd passed a socket (its socket unit listens): leave --socket-path and --fd away, or stop the \
                 socket unit"
                .into())
        }
        (None, None, more) => {
            Err(format!("systemd passed {more} sockets, a disk has one: leave one ListenStream= in the socket unit"))
        }
    }
}
