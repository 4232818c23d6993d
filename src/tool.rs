//! The command line of `vublk`, and what each command is carried out by.
//!
//! What it is: what was typed, exit codes, and where text goes. A file of `tool/` is a command or two.
//!
//! What it is not: `bin/vublk.rs`, which only calls [`run`], so that the man pages know the same command line.
//!
//! Invariants: every command that takes a disk finds it by [`crate::find::place`]. The exit code is 0 when it is done, 1
//! when it is refused or no daemon answers, 2 for a command line that makes no sense.

mod config_file;
mod doctor;
mod edit;
mod list;
mod load;
mod look;
mod manage;
mod snapshot;
mod stat;
mod status;
mod top;
mod trace;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use serde_json::Value;

use crate::args::LimitArgs;
use crate::bench;
use crate::find::{self, Place};
use crate::log::LogLevel;
use crate::rpc::CallError;

/// The exit code of a command line that makes no sense, which is also clap's.
const USAGE: u8 = 2;

/// Inspect, measure and manage vublkd.
#[derive(Debug, Parser)]
#[command(name = "vublk", version, max_term_width = 100)]
pub struct Typed {
    #[command(subcommand)]
    command: Command,
}

/// A disk on a command line.
#[derive(Debug, Args)]
struct WhichDisk {
    /// A name or a serial number that vublk list shows, the disk's socket, or the daemon's control socket
    #[arg(value_name = "DISK")]
    word: PathBuf,
    /// The disk's name, beside the control socket of a daemon that serves several
    #[arg(long, value_name = "NAME")]
    disk: Option<String>,
}

impl WhichDisk {
    fn find(&self) -> Result<Place, String> {
        find::place(&self.word, self.disk.as_deref())
    }

    /// Asks the daemon that was meant.
    fn at(self, ask: impl FnOnce(&Place) -> Result<String, CallError>) -> Result<String, String> {
        ask(&self.find()?).map_err(|e| e.to_string())
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Loads a vhost-user-blk back-end and tells how fast it is
    Bench(bench::Options),
    /// Lists the disks that vublkd serves on this host
    ///
    /// Those whose control sockets are in /run/vublk, and those of running vublkd processes. A disk's name is that of its
    /// socket, without folder and ending; of several disks in one process (vublkd --config) it is vm1/root, vm1 being the
    /// name of the control socket. Other commands take it, or the disk's serial number.
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Tells what disks do, as iostat -x does: first since each is served, then in each interval
    ///
    /// For reads (r), writes (w, with writes of zeroes, as Linux counts them), discards (d) and flushes (f): requests and
    /// kibibytes per second, their mean size in kibibytes, and the milliseconds that they took from fetch to return: the
    /// mean (await), half of them (p50), and all but one in a hundred (p99). aqu-sz is the mean number of requests in
    /// flight, inflight their number now; errors counts those of the interval. note says whether the disk is paused (vublk pause),
    /// held (it refused requests, which wait), throttled (requests wait for its limits now) or limited (it has limits).
    Stat {
        /// The disks: names that vublk list shows, serial numbers, control sockets or disks' sockets [default: all]; then the
        /// seconds of an interval, and how many times to tell, the first included
        #[arg(value_name = "DISK… [INTERVAL [COUNT]]")]
        words: Vec<String>,
        /// Each queue by itself
        #[arg(long)]
        queues: bool,
        /// As JSON, a line each time
        #[arg(long)]
        json: bool,
    },
    /// Shows what disks do, on a screen that follows it
    ///
    /// The columns are those of vublk stat: errors are those since the disk is served, p99 is that of all requests, and sizes
    /// are in MiB. Below, of the selected disk: how long its requests took, as a map with time across, latency up and more
    /// requests darker; and how many were in flight. Beside a name stands its note. Each disk is asked once a second. Keys: q, ↑ ↓ or k j, s, p, ?.
    Top {
        /// The disks, as vublk list names them [default: all]
        #[arg(value_name = "DISK")]
        disks: Vec<PathBuf>,
        /// Prints one screen as text after so many seconds [default: 2], of 80 columns and 24 lines, or COLUMNS and LINES
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "2",
              value_parser = crate::args::number::<u32>(1, 86_400))]
        once: Option<u32>,
    },
    /// Shows each request of a disk, a line when it ends
    ///
    /// When it ended (seconds since the trace began), its queue, what it was, its first sector of 512 bytes, the bytes that it
    /// names, how it was answered, and how many milliseconds it took from fetch to return. Ends with ^C or after --seconds,
    /// and with exit code 1 where the daemon ends it: an upgrade, a crash and a stop do. One trace of a disk at a time.
    Trace {
        #[command(flatten)]
        disk: WhichDisk,
        /// Only requests that took this long or longer: a number with ns, us, ms or s, such as 10ms
        #[arg(long, value_name = "TIME", value_parser = trace::time)]
        slow: Option<Duration>,
        /// How long
        #[arg(long, value_name = "N", value_parser = crate::args::number::<u32>(1, 1_000_000))]
        seconds: Option<u32>,
        /// As JSON, a line for each request
        #[arg(long)]
        json: bool,
    },
    /// Tells what a running vublkd serves, and what it has done
    ///
    /// A disk that is paused, held or limited has a line, note, that says so in words, and what to type.
    Status {
        #[command(flatten)]
        disk: WhichDisk,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Grows a disk that a guest uses
    ///
    /// With a size the file is made longer. Without one, for a block device or a file that was grown by other
    /// means, vublkd finds out the new size. Either way the guest is told. A disk is never made smaller.
    Resize {
        #[command(flatten)]
        disk: WhichDisk,
        /// The new size, or with + how much more: bytes, or a number with k, M, G or T (powers of 1024), such as 20G or +1G
        #[arg(value_name = "[+]SIZE", value_parser = manage::new_size, allow_hyphen_values = true)]
        size: Option<manage::NewSize>,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Carries out again the requests that a daemon holds because its disk refused them (--on-error)
    ///
    /// Those for which there was no room are tried again every second without this.
    Retry {
        #[command(flatten)]
        disk: WhichDisk,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Limits a disk, or tells its limits and what had to wait for them
    ///
    /// What is typed is changed, all else stays; 0 takes a limit away. Requests that wait are looked at again at once. Other
    /// disks of its --throttle-group have the same limits from then on. The limits go along to a daemon that takes over;
    /// once vublkd was stopped its options count again.
    Throttle {
        #[command(flatten)]
        disk: WhichDisk,
        #[command(flatten)]
        limits: LimitArgs,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    #[command(flatten)]
    Snapshots(snapshot::Commands),
    /// Adds a disk to the file of vublkd --config, and has the daemon serve it
    ///
    /// The options are those of a disk (vublkd(8)); at least --blk-file or --disk, and --socket-path where systemd passes no
    /// socket. Paths are made absolute, also those in a URI. The file is checked as by vublkd --check-config, and replaced (owner, mode and access list stay); then the daemon is upgraded,
    /// which its other guests notice as a pause. If the new disk cannot be served, all of it is taken back.
    Add {
        /// A disk of the daemon as for other commands, or a file of disks, whether a daemon serves it or not
        #[arg(value_name = "DISK|FILE")]
        place: PathBuf,
        /// What the disk is called [default: the name of its socket, without folder and ending]
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        #[command(flatten)]
        keys: edit::Keys,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Removes a disk from the file of vublkd --config, and has the daemon let go of it
    ///
    /// Detach it from the VM first. What the disk holds stays. The daemon is upgraded, as by vublk add.
    Remove {
        /// A disk of the daemon as for other commands, or a file of disks, whether a daemon serves it or not
        #[arg(value_name = "DISK|FILE")]
        place: PathBuf,
        /// The disk's name in the file [default: that of DISK]
        name: Option<String>,
        /// Also where a front-end is connected: its guest loses the disk
        #[arg(long)]
        force: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Changes how much a running vublkd logs
    ///
    /// Of the daemon, all its disks; not of the parent process. It lasts until the daemon ends: the next one, after an upgrade
    /// or a crash, logs as --log-level says.
    LogLevel {
        #[command(flatten)]
        disk: WhichDisk,
        /// The level
        #[arg(value_enum)]
        level: LogLevel,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Puts a new program in the place of a running daemon: its guest notices a pause
    ///
    /// The parent of vublkd starts it, with the daemon's own arguments; if the new program does not serve, the old one
    /// goes on. Under systemd (--fd-store) it is systemd that starts it, as with systemctl restart.
    Upgrade {
        #[command(flatten)]
        disk: WhichDisk,
        /// The new program [default: the one at vublkd's path now]
        #[arg(long, value_name = "PATH")]
        binary: Option<PathBuf>,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Looks at this host, and at disks and folders on it: what is in vublkd's way, and what to type
    ///
    /// The kernel and what it allows, limits, units, sockets; of a disk who may open it, O_DIRECT, holes, cached pages, and who
    /// has locked it, if any process has. Of a disk on another machine: whether it can be had, what its server lacks, and who
    /// has it. Of a name that no daemon serves: whether its unit has a disk. Each line is ok, warn (it is slower, or does less) or fail. The exit code is 1 if anything fails.
    Doctor {
        /// Disks, also by URI as for vublk inspect, folders for disks, sockets, or names of disks
        paths: Vec<PathBuf>,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Opens a disk as vublkd would, tells what it found, and closes it again
    ///
    /// Of a file it also tells what is in the page cache, and which parts are holes, unwritten or shared extents:
    /// what that costs, and what to type. It changes nothing and may be used while a daemon serves the disk. Of a disk of an
    /// NBD server it tells what the server can do, and how much is allocated in the first 64 GiB, as far as that is counted
    /// within 10 s. Of an image of a Ceph cluster it tells size, objects, features, what is allocated, and which client has it.
    Inspect {
        /// The file or block device, the name of a disk that vublk list shows, or nbd://HOST[:PORT]/EXPORT,
        /// nbd+unix:///EXPORT?socket=PATH, or rbd:POOL/IMAGE[@SNAPSHOT][:conf=FILE][:id=USER][:keyring=FILE]
        disk: PathBuf,
        /// Through the page cache, as with vublkd --direct=off
        #[arg(long)]
        buffered: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// Does what was typed.
#[must_use]
pub fn run(Typed { command }: Typed) -> ExitCode {
    let failed = |code: u8, why: &str| {
        let _printed = writeln!(io::stderr(), "vublk: {}", printable(why));
        ExitCode::from(code)
    };
    let command = match command {
        Command::Bench(mut options) => {
            match find::socket(&options.socket) {
                Ok(socket) => options.socket = socket,
                Err(why) => return failed(1, &why),
            }
            Command::Bench(options)
        }
        other => other,
    };
    if let Command::Bench(options) = &command
        && let Err(why) = load::may_run(options)
    {
        return failed(USAGE, &format!("{}: {why}", options.socket.display()));
    }
    let text = match command {
        Command::List { json } => Ok(list::list(json)),
        Command::Stat { words, queues, json } => {
            return match stat::stat(words, queues, json) {
                Ok(()) => ExitCode::SUCCESS,
                Err((code, why)) => failed(code, &why),
            };
        }
        Command::Doctor { paths, json } => {
            let (report, is_well) = doctor::doctor(paths, json);
            let _printed = io::stdout().write_all(report.as_bytes());
            return if is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        Command::Inspect { disk, buffered, json } => {
            let called = if disk.exists() { None } else { find::disk_called(&disk) };
            look::inspect(called.unwrap_or(disk), !buffered, json)
        }
        Command::Top { disks, once } => top::top(&disks, once).map(|()| String::new()),
        Command::Trace { disk, slow, seconds, json } => disk
            .find()
            .and_then(|place| trace::trace(&place, slow.unwrap_or_default(), seconds, json))
            .map(|()| String::new()),
        Command::Status { disk, json } => disk.at(|place| status::status(place, json)),
        Command::Resize { disk, size, json } => disk.at(|place| manage::resize(place, size, json)),
        Command::Retry { disk, json } => disk.at(|place| manage::retry(place, json)),
        Command::Throttle { disk, limits, json } => disk.at(|place| manage::throttle(place, limits, json)),
        Command::Snapshots(command) => command.run(),
        Command::Add { place, name, keys, json } => edit::add(&place, name, keys, json),
        Command::Remove { place, name, force, json } => edit::remove(&place, name, force, json),
        Command::LogLevel { disk, level, json } => disk.at(|place| manage::log_level(place, level, json)),
        Command::Upgrade { disk, binary, json } => {
            disk.at(|place| manage::upgrade(place, binary).map(|by| told(by, json, manage::taken_over)))
        }
        Command::Bench(options) => {
            load::measure(&options).map_err(|e| format!("{}: {e}", options.socket.display()))
        }
    };
    match text {
        Ok(text) => {
            // A broken pipe is the reader's choice, not an error of ours.
            let _printed = io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(why) => failed(1, &why),
    }
}

/// What was done, as JSON or in words.
fn told(value: Value, as_json: bool, words: impl FnOnce(&Value) -> String) -> String {
    if as_json { format!("{value}\n") } else { words(&value) }
}

/// What may be shown on a terminal: a daemon is not trusted with its control sequences.
fn printable(text: &str) -> String {
    let show = |c: char| if c.is_control() && c != '\n' { c.escape_default().to_string() } else { c.into() };
    text.chars().map(show).collect()
}
