//! Answers scrapes: a small part of HTTP/1.1, on a thread of its own.
//!
//! What it is: GET and HEAD of `/metrics`, one answer for each connection.
//!
//! What it is not: it knows no metric. It has no TLS, no passwords and no compression: a proxy has.
//!
//! Invariants: it waits for no client: each has so many bytes and so much time, and there are few of them; the oldest is
//! left for a new one. What a client does reaches no other thread.

use std::collections::BTreeSet;
use std::fmt::{self, Write};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use prometheus_client::encoding::text;
use prometheus_client::registry::Registry;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};

use super::Metrics;
use crate::listen::{self, OwnPath};
use crate::sandbox::{self, Role};
use crate::sys;

/// Clients at a time; one more, and the oldest is left.
const MOST_CLIENTS: usize = 8;
/// Bytes and lines of a request.
const MOST_HEAD: usize = 4096;
const MOST_HEADERS: usize = 32;
/// How long a client may take, from connecting to the last byte of its answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How soon it is tried again to accept a client for which there was no descriptor.
const RETRY_EVERY: Duration = Duration::from_millis(100);

/// What an answer may be in. Prometheus asks for the first; the second is for who does not know it.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const OLDER_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What `--metrics` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// `unix:PATH`.
    Unix(PathBuf),
    /// `ADDR:PORT`.
    Tcp(SocketAddr),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

impl Place {
    /// Listens there. `owner`: whom a Unix socket is to belong to.
    ///
    /// # Errors
    /// A sentence that says what to type.
    pub fn listen(&self, owner: Option<(u32, u32)>) -> Result<(OwnedFd, Option<OwnPath>), String> {
        match self {
            Self::Unix(path) => {
                let made = listen::listen(path, 0o660, owner, "--metrics").map_err(|e| e.to_string())?;
                Ok((made.0.into(), Some(made.1)))
            }
            Self::Tcp(address) => {
                let listener = TcpListener::bind(address).and_then(|listener| {
                    listener.set_nonblocking(true)?;
                    Ok(listener)
                });
                let listener = listener.map_err(|e| {
                    format!(
                        "{address}: cannot listen there: {e}. Choose another address or port for --metrics"
                    )
                })?;
                Ok((listener.into(), None))
            }
        }
    }
}

/// The thread that answers; it ends with this value.
#[derive(Debug)]
pub struct Server {
    stop: Arc<OwnedFd>,
    /// `None` once the thread has it.
    serving: Option<Serving>,
    thread: Option<JoinHandle<()>>,
    own: Option<OwnPath>,
}

impl Server {
    /// Will answer on a socket that listens. `own`: is removed at the end.
    ///
    /// # Errors
    /// When there is no descriptor.
    pub fn new(listener: OwnedFd, metrics: Metrics, own: Option<OwnPath>) -> io::Result<Self> {
        let stop = Arc::new(sys::eventfd()?);
        let mut registry = Registry::default();
        registry.register_collector(Box::new(metrics));
        let serving = Serving { listener, stop: Arc::clone(&stop), registry, clients: Vec::new() };
        Ok(Self { stop, serving: Some(serving), thread: None, own })
    }

    /// Answers from now on.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn start(&mut self) -> io::Result<()> {
        let Some(mut serving) = self.serving.take() else { return Ok(()) };
        let serve = move || {
            sandbox::confine(Role::Metrics);
            while serving.turn() {}
        };
        self.thread = Some(std::thread::Builder::new().name("vublk-metrics".into()).spawn(serve)?);
        Ok(())
    }

    /// The folder of its socket, if it removes that.
    #[must_use]
    pub fn folder(&self) -> Option<BorrowedFd<'_>> {
        self.own.as_ref().map(OwnPath::folder)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        sys::signal(&self.stop);
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
        if let Some(own) = &self.own {
            own.remove();
        }
    }
}

#[derive(Debug)]
struct Serving {
    listener: OwnedFd,
    stop: Arc<OwnedFd>,
    registry: Registry,
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    stream: OwnedFd,
    until: Instant,
    head: Vec<u8>,
    /// The answer, and how much of it is sent.
    answer: Vec<u8>,
    sent: usize,
}

impl Serving {
    /// Waits for something, and does it. False: the process ends.
    fn turn(&mut self) -> bool {
        let mut wait = self.clients.iter().map(|client| client.until).min();
        let mut is_deaf = false;
        // Those that come in floods wait for the next look.
        for _ in 0..MOST_CLIENTS {
            match accept_with(&self.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(stream) => {
                    if self.clients.len() == MOST_CLIENTS {
                        self.clients.remove(0);
                    }
                    let until = Instant::now() + PATIENCE;
                    self.clients.push(Client {
                        stream,
                        until,
                        head: Vec::new(),
                        answer: Vec::new(),
                        sent: 0,
                    });
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(_) => {
                    // Descriptors ran out.
                    is_deaf = true;
                    wait = wait.into_iter().chain([Instant::now() + RETRY_EVERY]).min();
                    break;
                }
            }
        }
        let registry = &self.registry;
        let now = Instant::now();
        self.clients.retain_mut(|client| client.until > now && client.serve(registry));
        wait = self.clients.iter().map(|client| client.until).chain(wait).min();
        let stop = self.stop.as_fd();
        let listener = (!is_deaf).then(|| self.listener.as_fd());
        let watched = [(stop, PollFlags::IN)].into_iter().chain(listener.map(|fd| (fd, PollFlags::IN)));
        let watched = watched.chain(self.clients.iter().map(Client::waits_for));
        let mut fds: Vec<PollFd<'_>> = watched.map(|(fd, what)| PollFd::from_borrowed_fd(fd, what)).collect();
        let left = wait.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let _interrupted = poll(&mut fds, timeout.as_ref());
        !fds.first().is_some_and(|stop| stop.revents().contains(PollFlags::IN))
    }
}

impl Client {
    fn waits_for(&self) -> (BorrowedFd<'_>, PollFlags) {
        (self.stream.as_fd(), if self.answer.is_empty() { PollFlags::IN } else { PollFlags::OUT })
    }

    /// Reads what is there, answers once that is a request, and sends what fits. False: it is done with.
    fn serve(&mut self, registry: &Registry) -> bool {
        if self.answer.is_empty() {
            let mut bytes = [0; MOST_HEAD];
            match recv(&self.stream, &mut bytes, RecvFlags::empty()) {
                Ok((0, _)) => return false,
                Ok((got, _)) => self.head.extend_from_slice(bytes.get(..got).unwrap_or_default()),
                Err(Errno::AGAIN | Errno::INTR) => return true,
                Err(_) => return false,
            }
            match answer(&self.head, registry) {
                Some(answer) => self.answer = answer,
                None => return true,
            }
        }
        loop {
            let rest = self.answer.get(self.sent..).unwrap_or_default();
            if rest.is_empty() {
                return false;
            }
            match send(&self.stream, rest, SendFlags::NOSIGNAL) {
                Ok(sent) => self.sent += sent,
                Err(Errno::AGAIN) => return true,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

/// The answer to a request. `None`: it is not whole yet.
fn answer(head: &[u8], registry: &Registry) -> Option<Vec<u8>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let whole = match request.parse(head) {
        Ok(status) => status.is_complete(),
        Err(_) => return Some(response("400 Bad Request", TEXT, "this is no HTTP request\n", true)),
    };
    if !whole {
        let too_long = head.len() >= MOST_HEAD;
        let status = "431 Request Header Fields Too Large";
        return too_long.then(|| response(status, TEXT, "the request is too long\n", true));
    }
    let path = request.path.unwrap_or_default();
    let path = path.split_once('?').map_or(path, |(path, _)| path);
    let with_body = match request.method {
        Some("GET") => true,
        Some("HEAD") => false,
        _ => return Some(response("405 Method Not Allowed", TEXT, "use GET\n", true)),
    };
    Some(match path {
        "/metrics" => {
            let mut body = String::new();
            // Text has room for everything.
            match text::encode(&mut body, registry) {
                Ok(()) if takes_open_metrics(request.headers) => {
                    response("200 OK", OPEN_METRICS, &body, with_body)
                }
                Ok(()) => response("200 OK", OLDER_TEXT, &older_text(&body), with_body),
                Err(_) => response("500 Internal Server Error", TEXT, "", with_body),
            }
        }
        "/" => response("200 OK", TEXT, "vublkd: metrics are at /metrics\n", with_body),
        _ => response("404 Not Found", TEXT, "metrics are at /metrics\n", with_body),
    })
}

fn takes_open_metrics(headers: &[httparse::Header<'_>]) -> bool {
    let accept = headers.iter().filter(|header| header.name.eq_ignore_ascii_case("accept"));
    accept
        .into_iter()
        .any(|header| String::from_utf8_lossy(header.value).contains("application/openmetrics-text"))
}

/// The same in the text that was before OpenMetrics: a counter is called as its values are, and there is no end.
fn older_text(text: &str) -> String {
    let counters: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let mut older = String::with_capacity(text.len());
    for line in text.lines().filter(|line| *line != "# EOF") {
        let mut words = line.splitn(4, ' ');
        let _never = match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(what), Some(name), Some(rest)) if counters.contains(name) => {
                writeln!(older, "# {what} {name}_total {rest}")
            }
            _ => writeln!(older, "{line}"),
        };
    }
    older
}

fn response(status: &str, kind: &str, body: &str, with_body: bool) -> Vec<u8> {
    let mut text = String::new();
    let length = body.len();
    let _never = write!(
        text,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n{}\r\n",
        if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" }
    );
    if with_body {
        text.push_str(body);
    }
    text.into_bytes()
}
