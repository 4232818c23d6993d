//! The control socket: JSON-RPC 2.0, one object a line.
//!
//! What it is: a [`Server`] that the process's thread looks at, and [`call`] for the tool.
//!
//! What it is not: it carries nothing out, [`crate::process`] does, or lets a disk do it. Batches (arrays)
//! are not taken.
//!
//! Invariants: nothing here waits, also where an answer comes later; a client costs at most two lines of memory, and
//! one that does not read its answers is left.
//!
//! ```text
//!   → {"jsonrpc":"2.0","id":1,"method":"resize","params":{"size":1073741824}}
//!   ← {"jsonrpc":"2.0","id":1,"result":{"size":1073741824,"told":"front-end"}}
//! ```

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use thiserror::Error;

use crate::changes::Since;
use crate::link;
use crate::listen::{self, ListenError, OwnPath};
use crate::log::LogLevel;
use crate::sys;
use crate::throttle::Change;
use crate::trace;

/// Clients at a time; one more, and the oldest is left.
const MAX_CLIENTS: usize = 8;
/// Bytes of a line.
const MAX_LINE: usize = 4096;
/// How long the tool waits for an answer: a resize waits for the workers only.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// What can be asked of a daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// The state of things.
    Status,
    /// What was counted of each queue, some at a time.
    Queues {
        /// The first of them.
        from: u16,
    },
    /// Grow the disk, or find out whether it has grown.
    Resize {
        /// Bytes.
        size: Option<u64>,
    },
    /// Carry out again what is held because the disk refused it.
    Retry,
    /// Log down to another level, or tell which one.
    LogLevel(Option<LogLevel>),
    /// Change the limits of a disk, or tell them.
    Throttle(Change),
    /// Stop the rings and make durable what was answered.
    Pause {
        /// It ends by itself after so many milliseconds.
        timeout_ms: u64,
    },
    /// End a pause.
    Resume {
        /// Its number; any when `None`.
        pause: Option<u64>,
    },
    /// Count a snapshot that was made in a pause: changes are marked from then on.
    Snapshot {
        /// The number of the pause.
        pause: u64,
    },
    /// What has changed since a snapshot, some at a time.
    Changed {
        /// Which one.
        since: Since,
        /// The first byte that is asked for.
        from: u64,
    },
    /// Write down each request that ends; with the descriptors of [`trace::Request`].
    Trace {
        /// Requests that took less time than so many nanoseconds are left out.
        slow_ns: u64,
        /// When it ends by itself.
        seconds: Option<u32>,
    },
    /// Make room for another daemon.
    Upgrade {
        /// Its program; the one at vublkd's path when `None`.
        binary: Option<PathBuf>,
    },
}

/// The answer to a call, or where it will be.
#[derive(Debug)]
pub enum Answer {
    /// It is done: a value, or why there is none.
    Now(link::Answer),
    /// It will be; until then its client's next lines wait.
    Later(Arc<link::Reply>),
}

/// Error codes of JSON-RPC 2.0, section 5.1.
mod code {
    pub(super) const PARSE: i32 = -32700;
    pub(super) const REQUEST: i32 = -32600;
    pub(super) const METHOD: i32 = -32601;
    pub(super) const PARAMS: i32 = -32602;
    /// Ours: what was asked for cannot be done.
    pub(super) const REFUSED: i32 = -32000;
}

#[derive(Deserialize)]
struct Request {
    jsonrpc: String,
    method: String,
    #[serde(default)]
    params: Value,
    /// Without one it is a notification, which is not answered; null is one.
    #[serde(default, deserialize_with = "present")]
    id: Option<Value>,
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QueuesParams {
    #[serde(default)]
    from: u16,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PauseParams {
    #[serde(default = "pause_time")]
    timeout_ms: u64,
}

/// Of a pause that names no time, milliseconds.
fn pause_time() -> u64 {
    30_000
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResumeParams {
    pause: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SnapshotParams {
    pause: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChangedParams {
    #[serde(default)]
    since: Since,
    #[serde(default)]
    from: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResizeParams {
    size: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LogLevelParams {
    level: Option<LogLevel>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TraceParams {
    #[serde(default)]
    slow_ns: u64,
    seconds: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UpgradeParams {
    binary: Option<PathBuf>,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    /// `None`: another process of ours removes it.
    own: Option<OwnPath>,
    clients: Vec<Client>,
    /// Keeps a place among the descriptors: a client is answered also where they have run out.
    place: Option<OwnedFd>,
    /// There is no descriptor for the next one.
    deaf: bool,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    /// What it has sent and is not carried out: a line or more, and the start of one.
    sent: Vec<u8>,
    /// Descriptors that came along, for the next line.
    fds: Vec<OwnedFd>,
    waits: Option<Waits>,
}

/// The answer that a client waits for, and its request's number if it has one.
#[derive(Debug)]
struct Waits {
    answer: Arc<link::Reply>,
    id: Option<Value>,
}

impl Server {
    /// Listens on `path`; its mode is 0600.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn listen(path: &Path) -> Result<Self, ListenError> {
        let (listener, own) = listen::listen(path, 0o600, None, "--control")?;
        Ok(Self::over(listener, path, Some(own)))
    }

    /// Answers on a socket that listens at `path` already. `own`: it is removed at the end.
    #[must_use]
    pub fn over(listener: UnixListener, path: &Path, own: Option<OwnPath>) -> Self {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
        Self { listener, path, own, clients: Vec::new(), place: None, deaf: false }
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.path.clone()
    }

    /// The folder where it listens, if it removes its socket.
    #[must_use]
    pub fn folder(&self) -> Option<BorrowedFd<'_>> {
        self.own.as_ref().map(OwnPath::folder)
    }

    /// What to wait for before [`Server::serve`].
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let listener = (!self.deaf).then(|| self.listener.as_fd());
        // One that waits for its answer is not read.
        let clients = self.clients.iter().filter(|client| client.waits.is_none());
        listener.into_iter().chain(clients.map(|client| client.stream.as_fd()))
    }

    /// True if a client may wait to be accepted for which there was no descriptor: look again soon.
    #[must_use]
    pub fn is_deaf(&self) -> bool {
        self.deaf
    }

    /// Answers the clients that have asked something, or whose answer has come.
    pub fn serve(&mut self, mut answer: impl FnMut(Option<String>, Call, Vec<OwnedFd>) -> Answer) {
        self.deaf = false;
        self.place = self.place.take().or_else(|| self.listener.as_fd().try_clone_to_owned().ok());
        // Those that come in floods wait for the next look.
        for _ in 0..MAX_CLIENTS {
            // accept(2) takes a descriptor before it looks: without one it fails also where no client waits.
            if !sys::readable_within(&self.listener, Duration::ZERO).unwrap_or(true) {
                break;
            }
            match self.listener.accept() {
                Ok((stream, _)) if stream.set_nonblocking(true).is_ok() => {
                    if self.clients.len() == MAX_CLIENTS {
                        self.clients.remove(0);
                    }
                    self.clients.push(Client { stream, sent: Vec::new(), fds: Vec::new(), waits: None });
                }
                // Descriptors ran out: one is free then.
                Err(e) if e.kind() != ErrorKind::WouldBlock && self.place.take().is_some() => {}
                Err(e) if e.kind() != ErrorKind::WouldBlock && !self.clients.is_empty() => {
                    self.clients.remove(0);
                }
                Err(e) if e.kind() != ErrorKind::WouldBlock => {
                    self.deaf = true;
                    break;
                }
                _ => break,
            }
        }
        self.clients.retain_mut(|client| client.serve(&mut answer));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(own) = &self.own {
            own.remove();
        }
    }
}

impl Client {
    /// Carries out the lines that are there, up to one whose answer comes later, and reads once. False: it is gone.
    fn serve(&mut self, answer: &mut impl FnMut(Option<String>, Call, Vec<OwnedFd>) -> Answer) -> bool {
        if self.waits.is_none() {
            let mut bytes = [0; MAX_LINE];
            let (got, fds) = sys::receive_now(&self.stream, &mut bytes);
            self.fds.extend(fds);
            sys::close_foreign(self.fds.drain(self.fds.len().min(trace::FDS)..));
            match got {
                Ok(0) => return false,
                Ok(got) => self.sent.extend_from_slice(bytes.get(..got).unwrap_or_default()),
                Err(e) => return matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
            }
        }
        loop {
            let reply = match &mut self.waits {
                Some(waits) => {
                    let Some(done) = waits.answer.take() else { return true };
                    let reply =
                        waits.id.take().map(|id| outcome(id, done.map_err(|why| (code::REFUSED, why))));
                    self.waits = None;
                    reply
                }
                None => {
                    let end = self.sent.iter().position(|&b| b == b'\n').filter(|&end| end < MAX_LINE);
                    let Some(end) = end else { break };
                    let line: Vec<u8> = self.sent.drain(..=end).collect();
                    match carry_out(&line, std::mem::take(&mut self.fds), answer) {
                        Reply::Now(reply) => reply,
                        Reply::Later(waits) => {
                            self.waits = Some(waits);
                            continue;
                        }
                    }
                }
            };
            if reply.is_some_and(|reply| !say(&self.stream, &reply)) {
                return false;
            }
        }
        let fits = self.sent.len() < MAX_LINE;
        if !fits {
            say(&self.stream, &failure(Value::Null, code::REQUEST, "the line is too long"));
        }
        fits
    }
}

/// Writes a line. False: it does not fit, the client does not read.
fn say(to: impl AsFd, reply: &Value) -> bool {
    let line = format!("{reply}\n");
    sys::send_now(to, line.as_bytes()) == Ok(line.len())
}

/// Answers a client of another socket, whatever it asked for.
pub(crate) fn refuse(client: impl AsFd, why: &str) {
    let _read_or_not = say(client, &failure(Value::Null, code::REFUSED, why));
}

fn failure(id: Value, code: i32, message: &str) -> Value {
    json!({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": message}})
}

fn outcome(id: Value, done: Result<Value, (i32, String)>) -> Value {
    match done {
        Ok(result) => json!({"jsonrpc": "2.0", "id": id, "result": result}),
        Err((code, why)) => failure(id, code, &why),
    }
}

/// What a line leads to; a notification has no reply.
enum Reply {
    Now(Option<Value>),
    Later(Waits),
}

fn carry_out(
    line: &[u8],
    fds: Vec<OwnedFd>,
    answer: &mut impl FnMut(Option<String>, Call, Vec<OwnedFd>) -> Answer,
) -> Reply {
    let wrong = |id, code, why: &str| Reply::Now(Some(failure(id, code, why)));
    let Ok(value) = serde_json::from_slice::<Value>(line) else {
        return wrong(Value::Null, code::PARSE, "not JSON");
    };
    // A list of the fields in their order would do for serde.
    if !value.is_object() {
        return wrong(Value::Null, code::REQUEST, "not an object");
    }
    let request = match serde_json::from_value::<Request>(value) {
        Ok(request) if request.jsonrpc == "2.0" => request,
        Ok(request) => {
            return wrong(request.id.unwrap_or_default(), code::REQUEST, "\"jsonrpc\" is not \"2.0\"");
        }
        Err(e) => return wrong(Value::Null, code::REQUEST, &e.to_string()),
    };
    let meant = meaning(&request.method, request.params);
    let done = match meant.map(|(disk, call)| answer(disk, call, fds)) {
        Ok(Answer::Later(answer)) => return Reply::Later(Waits { answer, id: request.id }),
        Ok(Answer::Now(done)) => done.map_err(|why| (code::REFUSED, why)),
        Err(wrong) => Err(wrong),
    };
    Reply::Now(request.id.map(|id| outcome(id, done)))
}

/// The disk that a call is about, if it names one, and the call.
fn meaning(method: &str, params: Value) -> Result<(Option<String>, Call), (i32, String)> {
    // Without parameters is with none of them.
    let mut params = if params.is_null() { json!({}) } else { params };
    let disk = match params.as_object_mut().and_then(|params| params.remove("disk")) {
        None => Ok(None),
        Some(Value::String(name)) => Ok(Some(name)),
        Some(_) => Err((code::PARAMS, "\"disk\" is no text".into())),
    };
    let call = match method {
        "status" => Ok(Call::Status),
        "retry" => Ok(Call::Retry),
        "queues" => serde_json::from_value(params)
            .map(|QueuesParams { from }| Call::Queues { from })
            .map_err(|e| (code::PARAMS, e.to_string())),
        "pause" => serde_json::from_value(params)
            .map(|PauseParams { timeout_ms }| Call::Pause { timeout_ms })
            .map_err(|e| (code::PARAMS, e.to_string())),
        "resume" => serde_json::from_value(params)
            .map(|ResumeParams { pause }| Call::Resume { pause })
            .map_err(|e| (code::PARAMS, e.to_string())),
        "snapshot" => serde_json::from_value(params)
            .map(|SnapshotParams { pause }| Call::Snapshot { pause })
            .map_err(|e| (code::PARAMS, e.to_string())),
        "changed" => serde_json::from_value(params)
            .map(|ChangedParams { since, from }| Call::Changed { since, from })
            .map_err(|e| (code::PARAMS, e.to_string())),
        "resize" => serde_json::from_value(params)
            .map(|ResizeParams { size }| Call::Resize { size })
            .map_err(|e| (code::PARAMS, e.to_string())),
        // null takes a limit away, as 0 does.
        "throttle" => serde_json::from_value(params)
            .map(|limits: BTreeMap<String, Option<u64>>| {
                Call::Throttle(limits.into_iter().map(|(name, limit)| (name, limit.unwrap_or(0))).collect())
            })
            .map_err(|e| (code::PARAMS, e.to_string())),
        "log-level" => serde_json::from_value(params)
            .map(|LogLevelParams { level }| Call::LogLevel(level))
            .map_err(|e| (code::PARAMS, e.to_string())),
        "trace" => serde_json::from_value(params)
            .map(|TraceParams { slow_ns, seconds }| Call::Trace { slow_ns, seconds })
            .map_err(|e| (code::PARAMS, e.to_string())),
        "upgrade" => serde_json::from_value(params)
            .map(|UpgradeParams { binary }| Call::Upgrade { binary })
            .map_err(|e| (code::PARAMS, e.to_string())),
        _ => Err((
            code::METHOD,
            format!(
                "no method {method:?}; there are status, queues, resize, retry, throttle, pause, resume, snapshot, changed, log-level, trace and upgrade"
            ),
        )),
    };
    let call = call?;
    Ok((disk?, call))
}

/// Why a daemon did not do what it was asked for.
#[derive(Debug, Error)]
pub enum CallError {
    /// No daemon listens there.
    #[error("{0}: no vublkd can be reached there: {1}. vublk list shows the disks that are served")]
    Connect(PathBuf, io::Error),
    /// It hung up, or took too long.
    #[error(
        "{0}: no answer: {1}. Is it the control socket (--control)? By default that is the disk's socket with .control \
             behind its name"
    )]
    Silent(PathBuf, io::Error),
    /// It answered with an error.
    #[error("{0}")]
    Refused(String),
}

/// Asks the daemon whose control socket is at `path`, and waits for its answer.
///
/// # Errors
/// [`CallError`].
pub fn call(path: &Path, method: &str, params: &Value) -> Result<Value, CallError> {
    call_within(path, method, params, ANSWER_TIMEOUT)
}

/// The same, with descriptors.
///
/// # Errors
/// [`CallError`].
pub fn call_with(
    path: &Path,
    method: &str,
    params: &Value,
    fds: &[BorrowedFd<'_>],
) -> Result<Value, CallError> {
    exchange(path, method, params, fds, ANSWER_TIMEOUT)
}

/// The same, waiting so long at most.
///
/// # Errors
/// [`CallError`].
pub fn call_within(path: &Path, method: &str, params: &Value, time: Duration) -> Result<Value, CallError> {
    exchange(path, method, params, &[], time)
}

fn exchange(
    path: &Path,
    method: &str,
    params: &Value,
    fds: &[BorrowedFd<'_>],
    time: Duration,
) -> Result<Value, CallError> {
    let stream = listen::connect_to(path).map_err(|e| CallError::Connect(path.into(), e))?;
    let ask = || -> io::Result<Value> {
        stream.set_read_timeout(Some(time))?;
        let request = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        let line = format!("{request}\n");
        if sys::send_with(&stream, line.as_bytes(), fds)? < line.len() {
            return Err(io::Error::other("it does not read")); // the line is shorter than any socket's buffer
        }
        let mut line = String::new();
        BufReader::new(&stream).take(1 << 20).read_line(&mut line)?;
        if line.is_empty() {
            return Err(io::Error::other("it hung up"));
        }
        serde_json::from_str(&line).map_err(|_| io::Error::other("what it says is no JSON"))
    };
    let late = || io::Error::other(format!("none within {} s", time.as_secs()));
    let silent = |e: io::Error| if e.kind() == ErrorKind::WouldBlock { late() } else { e };
    let mut reply = ask().map_err(|e| CallError::Silent(path.into(), silent(e)))?;
    if let Some(why) = reply.pointer("/error/message") {
        return Err(CallError::Refused(why.as_str().unwrap_or("refused").to_owned()));
    }
    Ok(reply.get_mut("result").map(Value::take).unwrap_or_default())
}
