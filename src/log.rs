//! The log: lines to standard error, and never a wait for it.
//!
//! What it is: a queue of so many bytes, to which threads add lines, and one thread that
//! writes them. Where standard error is the journal each line carries its priority
//! (sd-daemon(3)).
//!
//! What it is not: it limits no one by itself; what a guest, a front-end or a server can cause is limited
//! where it is logged, by a [`Quota`].
//!
//! Invariants: a full pipe, a stopped terminal or a stalled file holds up the writer thread
//! and no other; only [`flush`] waits, and for [`FLUSH_TIME`] at most. A line is written
//! whole or counted as lost, and the count is told as soon as lines can be written again.

use std::cell::OnceCell;
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::Deserialize;
use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::{DefaultFields, Writer};
use tracing_subscriber::fmt::{FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, reload};

use crate::sandbox;

/// Bytes that wait to be written; as many may be with the writer thread.
const MOST_BYTES: usize = 64 << 10;
/// How long the end of a process may wait until its last lines are written.
pub const FLUSH_TIME: Duration = Duration::from_millis(500);

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<LogLevel> for Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Trace => Self::TRACE,
        }
    }
}

struct Queue {
    /// Whole lines.
    lines: Vec<u8>,
    /// Lines that there was no room for, all of them later than `lines`.
    lost: u64,
    /// The writer thread has lines that it took from here.
    writing: bool,
    /// The number of the writer thread that is wanted, and of those that have ended.
    writer: u32,
    ended: u32,
}

static QUEUE: Mutex<Queue> =
    Mutex::new(Queue { lines: Vec::new(), lost: 0, writing: false, writer: 0, ended: 0 });
/// There is something to write.
static ADDED: Condvar = Condvar::new();
/// All is written.
static WRITTEN: Condvar = Condvar::new();

fn queue() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the writer thread, which keeps the caller's signal mask, and sends the message of
/// a panic the same way.
///
/// # Errors
/// When no thread can be had; then nothing is written.
pub fn start() -> io::Result<()> {
    start_writer(0)?;
    std::panic::set_hook(Box::new(|info| {
        complain(info);
        flush();
    }));
    Ok(())
}

/// `generation`: not for the thread to look up, which may begin to run after the next one was started.
fn start_writer(generation: u32) -> io::Result<()> {
    let write = move || write_lines(generation);
    std::thread::Builder::new().name("log".into()).stack_size(64 << 10).spawn(write)?;
    Ok(())
}

/// Has the lines written by a thread that gets what the caller has left: the one before it ends, unless it is in the
/// middle of a write that standard error does not take.
///
/// # Errors
/// When no thread can be had.
pub fn restart() -> io::Result<()> {
    flush();
    let generation = {
        let mut queue = queue();
        queue.writer += 1;
        queue.writer
    };
    ADDED.notify_all();
    drop(WRITTEN.wait_timeout_while(queue(), FLUSH_TIME, |q| q.ended < generation));
    start_writer(generation)
}

/// What `tracing` logs.
static FILTER: OnceLock<reload::Handle<LevelFilter, Registry>> = OnceLock::new();

/// Lets `tracing` log down to `level`.
pub fn subscribe(level: LogLevel) {
    let (filter, handle) = reload::Layer::new(LevelFilter::from(Level::from(level)));
    let _once = FILTER.set(handle);
    let lines = tracing_subscriber::fmt::layer()
        // It would complain to standard error by itself, and wait for it.
        .log_internal_errors(false)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .fmt_fields(Named(DefaultFields::new()))
        .with_writer(Lines);
    let all = tracing_subscriber::registry().with(filter);
    if is_journal() {
        all.with(lines.without_time()).init(); // the journal has its own
    } else {
        all.with(lines).init();
    }
}

/// Lets `tracing` log down to another level from now on, in this process.
pub fn set_level(level: LogLevel) {
    // Fails only where no subscriber is left, which is never dropped.
    let _set = FILTER.get().map(|filter| filter.reload(LevelFilter::from(Level::from(level))));
}

/// The level down to which `tracing` logs, as `--log-level` calls it.
#[must_use]
pub fn level() -> &'static str {
    // What a macro asks first.
    match LevelFilter::current().into_level() {
        None => "off",
        Some(Level::ERROR) => "error",
        Some(Level::WARN) => "warn",
        Some(Level::INFO) => "info",
        Some(Level::DEBUG) => "debug",
        Some(Level::TRACE) => "trace",
    }
}

/// Logs why this program ends.
pub fn complain(why: impl std::fmt::Display) {
    say(format!("vublkd: {why}"));
}

/// Logs an error as it stands, of one or more lines.
pub fn say(text: impl AsRef<[u8]>) {
    add(Level::ERROR, text.as_ref());
}

/// Waits until all lines are written, but not longer than [`FLUSH_TIME`].
pub fn flush() {
    let unwritten = |q: &mut Queue| q.writing || !q.lines.is_empty() || q.lost > 0;
    drop(WRITTEN.wait_timeout_while(queue(), FLUSH_TIME, unwritten));
}

thread_local! {
    static NAME: OnceCell<String> = const { OnceCell::new() };
}

/// Lines of this thread begin with the name of its disk, if it has one.
pub fn name_thread(disk: Option<&str>) {
    if let Some(disk) = disk {
        let _once = NAME.with(|name| name.set(disk.to_owned()));
    }
}

/// The name of this thread's disk, for threads that it has started.
#[must_use]
pub fn thread_name() -> Option<String> {
    NAME.with(|name| name.get().cloned())
}

/// Adds a text of one or more lines, or counts it.
fn add(level: Level, text: &[u8]) {
    let mut queue = queue();
    if queue.lost > 0 || queue.lines.len() + text.len() > MOST_BYTES {
        queue.lost += 1;
    } else {
        for line in text.trim_ascii_end().split(|&b| b == b'\n') {
            queue.lines.extend_from_slice(priority(level).as_bytes());
            queue.lines.extend_from_slice(line);
            queue.lines.push(b'\n');
        }
    }
    drop(queue);
    ADDED.notify_one();
}

/// What the journal takes off the front of a line; empty where it would stay there.
fn priority(level: Level) -> &'static str {
    match level {
        _ if !is_journal() => "",
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        _ => "<7>",
    }
}

/// Standard error is the journal's socket, and not only that of the process that started this one.
fn is_journal() -> bool {
    static IS: OnceLock<bool> = OnceLock::new();
    *IS.get_or_init(|| {
        let named = std::env::var("JOURNAL_STREAM").ok();
        let is = rustix::fs::fstat(io::stderr()).map(|s| format!("{}:{}", s.st_dev, s.st_ino)).ok();
        named.is_some() && named == is
    })
}

/// The writer thread.
fn write_lines(own: u32) {
    sandbox::confine(sandbox::Role::Log);
    let mut lost = 0;
    loop {
        let mut queue = queue();
        queue.writing = false;
        WRITTEN.notify_all();
        let nothing = |q: &mut Queue| q.lines.is_empty() && q.lost == 0 && q.writer == own;
        let mut queue = ADDED.wait_while(queue, nothing).unwrap_or_else(PoisonError::into_inner);
        if queue.writer != own {
            queue.ended += 1;
            WRITTEN.notify_all();
            return;
        }
        queue.writing = true;
        let (lines, without_room) = (std::mem::take(&mut queue.lines), std::mem::take(&mut queue.lost));
        drop(queue);
        lost = write(&lines, lost) + without_room;
        lost = write(b"", lost);
    }
}

/// Writes lines, and before them how many were `lost`; gives how many are lost now and not told.
fn write(mut lines: &[u8], lost: u64) -> u64 {
    if lost > 0 {
        let told = format!(
            "{}vublkd: {lost} lines of the log were lost: standard error did not take them\n",
            priority(Level::WARN)
        );
        if write_all(told.as_bytes()).is_err() {
            return lost + count(lines);
        }
    }
    // Line by line: a pipe keeps each in one piece, whichever process writes to it as well.
    while let Some(end) = lines.iter().position(|&b| b == b'\n') {
        let (line, rest) = lines.split_at(end + 1);
        if write_all(line).is_err() {
            return count(lines);
        }
        lines = rest;
    }
    0
}

/// How much of what another can provoke is logged: a guest, its disk, a front-end, a server.
#[derive(Debug, Default)]
pub struct Quota {
    since: Option<Instant>,
    lines: u32,
}

/// Lines about one of them in each [`QUOTA_WINDOW`].
const QUOTA_LINES: u32 = 10;
/// Of those, messages; one says that others are left out, one how many were.
const QUOTA_MESSAGES: u32 = QUOTA_LINES - 2;
const QUOTA_WINDOW: Duration = Duration::from_secs(10);

impl Quota {
    /// True if another line about it may be logged now. What is left out is counted, and told.
    pub fn may_log(&mut self, about: &str) -> bool {
        let now = Instant::now();
        if self.since.is_none_or(|since| now.duration_since(since) >= QUOTA_WINDOW) {
            self.tell(about);
            self.since = Some(now);
        }
        self.lines = self.lines.saturating_add(1);
        if self.lines == QUOTA_MESSAGES + 1 {
            tracing::warn!(
                "the next messages about {about} are left out, for at most {} s",
                QUOTA_WINDOW.as_secs()
            );
        }
        self.lines <= QUOTA_MESSAGES
    }

    /// Tells how many messages were left out, and begins anew.
    pub fn tell(&mut self, about: &str) {
        if self.lines > QUOTA_MESSAGES {
            tracing::warn!("{} messages about {about} were left out", self.lines - QUOTA_MESSAGES);
        }
        *self = Self::default();
    }
}

fn count(lines: &[u8]) -> u64 {
    lines.iter().map(|&b| u64::from(b == b'\n')).sum()
}

fn write_all(mut bytes: &[u8]) -> Result<(), Errno> {
    let to = io::stderr();
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            // Another process made it non-blocking.
            Err(Errno::AGAIN) => {
                let _or_interrupted = poll(&mut [PollFd::from_borrowed_fd(to.as_fd(), PollFlags::OUT)], None);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Gives `tracing` a writer that knows the level of its line.
struct Lines;

struct Line(Level);

/// Messages that begin with the name of their thread's disk.
struct Named(DefaultFields);

impl<'writer> FormatFields<'writer> for Named {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'writer>, fields: R) -> fmt::Result {
        NAME.with(|name| name.get().map_or(Ok(()), |name| write!(writer, "{name}: ")))?;
        self.0.format_fields(writer, fields)
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Line;

    fn make_writer(&self) -> Line {
        Line(Level::INFO)
    }

    fn make_writer_for(&self, about: &Metadata<'_>) -> Line {
        Line(*about.level())
    }
}

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        add(self.0, line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
