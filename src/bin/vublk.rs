//! The command `vublk`: inspects, measures and manages vublkd.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use clap::{Parser, Subcommand};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use vublk::args::{LimitArgs, size};
use vublk::bench;
use vublk::disk::{Disk, Options, format};
use vublk::engine::uring::Uring;
use vublk::find::{self, Found};
use vublk::inspect::{self, Layout, Report};
use vublk::listen;
use vublk::program::Program;
use vublk::promise::{self, Promise};
use vublk::rates::{self, Key, Rates, Sample};
use vublk::rpc::{CallError, call};
use vublk::snapshot;
use vublk::stats::histogram::Histogram;

/// The exit code of a command line that makes no sense, which is also clap's.
const USAGE: u8 = 2;

/// Inspect, measure and manage vublkd.
#[derive(Debug, Parser)]
#[command(name = "vublk", version, max_term_width = 100)]
pub struct Typed {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Loads a vhost-user-blk back-end and tells how fast it is
    Bench(bench::Options),
    /// Lists the daemons of this host
    ///
    /// Those whose control sockets are in /run/vublk, and those of running vublkd processes. A disk's name is that of its
    /// socket, without folder and ending: other commands take it, or the disk's serial number.
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
    /// flight, inflight their number now; errors counts those of the interval.
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
    /// Tells what a running vublkd serves, and what it has done
    Status {
        /// Its control socket: by default the disk's socket with .control behind its name. The disk's socket does, too, and
        /// a name or a serial number that vublk list shows
        control: PathBuf,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Grows a disk that a guest uses
    ///
    /// With a size the file is made longer. Without one, for a block device or a file that was grown by other
    /// means, vublkd finds out the new size. Either way the guest is told.
    Resize {
        /// The daemon's control socket
        control: PathBuf,
        /// The new size: bytes, or a number with k, M, G or T (powers of 1024), such as 20G
        #[arg(value_parser = size, allow_negative_numbers = true)]
        size: Option<u64>,
    },
    /// Carries out again the requests that a daemon holds because its disk refused them (--on-error)
    ///
    /// Those for which there was no room are tried again every second without this.
    Retry {
        /// The daemon's control socket
        control: PathBuf,
    },
    /// Limits a disk, or tells its limits and what had to wait for them
    ///
    /// What is typed is changed, all else stays; 0 takes a limit away. Requests that wait are looked at again at once. Other
    /// disks of its --throttle-group have the same limits from then on. The limits go along to a daemon that takes over;
    /// once vublkd was stopped its options count again.
    Throttle {
        /// The daemon's control socket
        control: PathBuf,
        /// Which of several disks
        #[arg(long, value_name = "NAME")]
        disk: Option<String>,
        #[command(flatten)]
        limits: LimitArgs,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    #[command(flatten)]
    Snapshots(snapshot::Commands),
    /// Puts a new program in the place of a running daemon: its guest notices a pause
    ///
    /// The parent of vublkd starts it, with the daemon's own arguments; if the new program does not serve, the old one
    /// goes on. Under systemd (--fd-store) it is systemd that starts it, as with systemctl restart.
    Upgrade {
        /// The daemon's control socket
        control: PathBuf,
        /// The new program [default: the one at vublkd's path now]
        #[arg(long, value_name = "PATH")]
        binary: Option<PathBuf>,
    },
    /// Opens a disk as vublkd would, tells what it found, and closes it again
    ///
    /// Of a file it also tells what is in the page cache, and which parts are holes, unwritten or shared extents:
    /// what that costs, and what to type. It changes nothing and may be used while a daemon serves the disk.
    Inspect {
        /// The file or block device
        disk: PathBuf,
        /// Through the page cache, as with vublkd --direct=off
        #[arg(long)]
        buffered: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let command = Typed::parse().command;
    if let Command::Bench(options) = &command
        && let Err(why) = may_run(options)
    {
        let _printed = writeln!(std::io::stderr(), "vublk: {}: {why}", options.socket.display());
        return ExitCode::from(USAGE);
    }
    let text = match command {
        Command::List { json } => Ok(list(json)),
        Command::Stat { words, queues, json } => {
            return match stat(words, queues, json) {
                Ok(()) => ExitCode::SUCCESS,
                Err((code, why)) => {
                    let _printed = writeln!(std::io::stderr(), "vublk: {}", printable(&why));
                    ExitCode::from(code)
                }
            };
        }
        Command::Inspect { disk, buffered, json } => {
            inspect(disk, !buffered, json).map_err(|e| e.to_string())
        }
        Command::Status { control, json } => at(control, |control| status(control, json)),
        Command::Resize { control, size } => at(control, |control| resize(control, size)),
        Command::Retry { control } => at(control, retry),
        Command::Throttle { control, disk, limits, json } => {
            at(control, |control| throttle(control, disk, limits, json))
        }
        Command::Snapshots(command) => command.run(control_of),
        Command::Upgrade { control, binary } => at(control, |control| upgrade(control, binary)),
        Command::Bench(options) => {
            measure(&options).map_err(|e| format!("{}: {e}", options.socket.display()))
        }
    };
    match text {
        Ok(text) => {
            // A broken pipe is the reader's choice, not an error of ours.
            let _printed = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(why) => {
            let _printed = writeln!(std::io::stderr(), "vublk: {}", printable(&why));
            ExitCode::FAILURE
        }
    }
}

/// What may be shown on a terminal: a daemon is not trusted with its control sequences.
fn printable(text: &str) -> String {
    let show = |c: char| if c.is_control() && c != '\n' { c.escape_default().to_string() } else { c.into() };
    text.chars().map(show).collect()
}

/// Asks the daemon that was meant.
fn at(disk: PathBuf, ask: impl FnOnce(&Path) -> Result<String, CallError>) -> Result<String, String> {
    ask(&control_of(disk)?).map_err(|e| e.to_string())
}

/// The control socket that was meant: of a disk's socket, the one beside it; of a name, that of the disk called so.
fn control_of(path: PathBuf) -> Result<PathBuf, String> {
    let beside = listen::beside(&path);
    if listen::connect_to(&beside).is_ok() {
        let (disk, control) = (path.display(), beside.display());
        let _printed = writeln!(io::stderr(), "vublk: {disk} is the disk's socket: asking {control}");
        return Ok(beside);
    }
    match path.to_str().filter(|word| !word.contains('/')) {
        Some(word) if !path.exists() => find::named(word),
        _ => Ok(path),
    }
}

/// The daemons of this host.
fn list(as_json: bool) -> String {
    let found = find::daemons();
    if as_json {
        let all = found.iter().map(|Found { name, control, status }| match status {
            Ok(status) => {
                let field = |at: &str| status.pointer(at).cloned().unwrap_or_default();
                json!({
                    "name": name, "control": control, "pid": field("/pid"), "version": field("/version"),
                    "uptime_seconds": field("/uptime_seconds"), "front_end_pid": field("/front_end_pid"),
                    "path": field("/disk/path"), "serial": field("/disk/serial"), "size": field("/disk/size"),
                    "in_flight": field("/disk/in_flight"),
                })
            }
            Err(why) => json!({"name": name, "control": control, "error": why.to_string()}),
        });
        return format!("{}\n", Value::from_iter(all));
    }
    let mut text =
        format!("{:16} {:20} {:>8} {:>8} {:>14} {}\n", "NAME", "SERIAL", "PID", "VMM", "BYTES", "DISK");
    for Found { name, control, status } in &found {
        let line = match status {
            Ok(status) => {
                let field = |at: &str| match status.pointer(at) {
                    Some(Value::String(text)) => text.clone(),
                    Some(value) => value.to_string(),
                    None => "-".into(),
                };
                let [serial, pid, vmm, size, path] =
                    ["/disk/serial", "/pid", "/front_end_pid", "/disk/size", "/disk/path"].map(field);
                format!("{name:16} {serial:20} {pid:>8} {vmm:>8} {size:>14} {path}")
            }
            Err(why) => format!("{name:16} {} does not answer: {why}", control.display()),
        };
        text.push_str(&printable(&line));
        text.push('\n');
    }
    text
}

/// How often to tell, and how many times.
type Every = (Option<Duration>, Option<u64>);

/// Takes the interval and the count from the end of the words.
fn take_interval(words: &mut Vec<String>) -> Result<Every, String> {
    let number = |word: &String| word.parse::<f64>().ok();
    let numbers = words.iter().rev().take(2).take_while(|word| number(word).is_some()).count();
    let mut numbers = words.split_off(words.len() - numbers).into_iter();
    let Some(interval) = numbers.next() else { return Ok((None, None)) };
    let seconds = number(&interval).filter(|seconds| (0.01..=1e6).contains(seconds));
    let seconds = seconds.ok_or_else(|| format!("{interval}: use an interval of 0.01 to 1000000 seconds"))?;
    let count = numbers.next().map(|count| {
        let whole = count.parse::<u64>().ok().filter(|&count| count > 0);
        whole.ok_or_else(|| format!("{count}: use a whole number of times to tell, such as 10"))
    });
    Ok((Some(Duration::from_secs_f64(seconds)), count.transpose()?))
}

/// Tells what disks do until it has told often enough, or its reader is gone.
fn stat(mut words: Vec<String>, queues: bool, as_json: bool) -> Result<(), (u8, String)> {
    let (interval, count) = take_interval(&mut words).map_err(|why| (USAGE, why))?;
    let given = words.into_iter().map(|word| control_of(word.into())).collect::<Result<Vec<_>, _>>();
    let given = given.map_err(|why| (1, why))?;
    let mut before = BTreeMap::<Key, (Instant, Sample)>::new();
    let mut missing = BTreeSet::new();
    let mut next = Instant::now();
    for told in 0.. {
        let all = if given.is_empty() {
            find::daemons().into_iter().map(|one| one.control).collect()
        } else {
            given.clone()
        };
        let mut now = BTreeMap::new();
        for control in all {
            let at = Instant::now();
            match rates::sample(&control, queues) {
                Ok(samples) => {
                    missing.remove(&control);
                    now.extend(samples.into_iter().map(|(key, sample)| (key, (at, sample))));
                }
                // Between a daemon and its successor no process answers.
                Err(why) if told == 0 && !given.is_empty() => return Err((1, why.to_string())),
                Err(why) => {
                    if missing.insert(control) {
                        let _printed = writeln!(io::stderr(), "vublk: {}", printable(&why.to_string()));
                    }
                }
            }
        }
        let rates = now.iter().map(|(key, (at, sample))| {
            let earlier =
                before.get(key).map(|(then, sample)| (sample, at.duration_since(*then).as_secs_f64()));
            (key, Rates::between(earlier, sample))
        });
        let text = if as_json { stat_json(rates) } else { stat_table(rates, told > 0) };
        if io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()).is_err() {
            return Ok(()); // its reader has seen enough
        }
        before = now;
        let Some(interval) = interval else { return Ok(()) };
        if count.is_some_and(|count| told + 1 >= count) {
            return Ok(());
        }
        next += interval;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

fn stat_table<'a>(all: impl Iterator<Item = (&'a Key, Rates)>, again: bool) -> String {
    let mut text = if again { "\n".to_owned() } else { String::new() };
    text.push_str(&rates::head());
    for ((control, queue), rates) in all {
        let name = listen::disk_name(control);
        text.push_str(&rates.line(&queue.map_or(name.clone(), |queue| format!("{name}/{queue}"))));
    }
    text
}

fn stat_json<'a>(all: impl Iterator<Item = (&'a Key, Rates)>) -> String {
    let time =
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
    let disks = all.map(|((control, queue), rates)| {
        let mut told = rates.json();
        if let Some(fields) = told.as_object_mut() {
            fields.insert("name".into(), listen::disk_name(control).into());
            fields.insert("control".into(), json!(control));
            if let Some(queue) = queue {
                fields.insert("queue".into(), json!(queue));
            }
        }
        told
    });
    format!("{}\n", json!({"time": time, "disks": disks.collect::<Vec<_>>()}))
}

fn resize(control: &Path, size: Option<u64>) -> Result<String, CallError> {
    let params = size.map_or(json!({}), |size| json!({ "size": size }));
    let resized = call(control, "resize", &params)?;
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

fn retry(control: &Path) -> Result<String, CallError> {
    let held = call(control, "retry", &json!({}))?;
    Ok(match held.get("requests").and_then(Value::as_u64) {
        Some(requests) => {
            format!("{requests} requests are tried again; vublk status shows whether any are still held\n")
        }
        None => "no request is held\n".into(),
    })
}

fn throttle(
    control: &Path,
    disk: Option<String>,
    limits: LimitArgs,
    as_json: bool,
) -> Result<String, CallError> {
    let mut params: Map<String, Value> =
        limits.0.into_iter().map(|(name, value)| (name, value.into())).collect();
    params.extend(disk.map(|disk| ("disk".to_owned(), disk.into())));
    let shown = call(control, "throttle", &params.into())?;
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

fn upgrade(control: &Path, binary: Option<PathBuf>) -> Result<String, CallError> {
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

fn status(control: &Path, as_json: bool) -> Result<String, CallError> {
    let status = call(control, "status", &json!({}))?;
    if as_json {
        return Ok(format!("{status}\n"));
    }
    let mut lines = Vec::new();
    flatten(&mut lines, "", &status);
    Ok(lines.concat())
}

/// `disk.size  1048576`, a line for each value.
fn flatten(lines: &mut Vec<String>, name: &str, value: &Value) {
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

/// Whether a load makes sense, and may overwrite the disk.
fn may_run(options: &bench::Options) -> Result<(), String> {
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

fn measure(options: &bench::Options) -> io::Result<String> {
    let report = bench::run(options)?;
    if options.json { Ok(serde_json::to_string(&report)? + "\n") } else { Ok(report.to_string()) }
}

fn inspect(path: PathBuf, direct: bool, as_json: bool) -> Result<String, vublk::disk::DiskError> {
    let options = Options {
        path,
        direct,
        read_only: true,
        instance: format!("inspect-{}", std::process::id()),
        ..Options::default()
    };
    let disk = Disk::open(&options, &|| false)?;
    let promise = Promise::new(&disk, &promise::Options::default())?;
    let report = report(&disk, &promise, direct);
    Ok(if as_json {
        format!(
            "{}
",
            json!(report)
        )
    } else {
        report.to_string()
    })
}

/// A disk under the names of the report.
fn report(disk: &Disk, promise: &Promise, direct: bool) -> Report {
    let backing = &disk.backing;
    let io_uring = Uring::probe();
    Report {
        path: disk.path().display().to_string(),
        kind: if backing.is_device { inspect::BLOCK_DEVICE } else { inspect::FILE },
        size: promise.bytes(),
        block: promise.block,
        physical_block: promise.physical_block(),
        optimal_io: promise.optimal_io(),
        direct,
        offset_align: backing.block,
        mem_align: backing.mem_align(),
        discard_granularity: backing.discard_unit,
        dsync: backing.dsync,
        in_memory: backing.in_memory,
        io_uring: io_uring.is_ok(),
        io_uring_error: io_uring.err().map(|e| e.to_string()),
        layout: Layout::of(disk.file()),
        // Last: reading with O_DIRECT may write cached pages back.
        format: format::of(disk.file()).unwrap_or("raw"),
    }
}
