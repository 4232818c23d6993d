//! Who has connected to the disk's socket and is not served yet.
//!
//! What it is: the listener, and the connections that it gave, in their order. They
//! are accepted at once, so that the log can tell which process connected while
//! another front-end has the disk.
//!
//! What it is not: it serves none of them and reads none of their messages.
//!
//! Invariants: it holds few connections, the others stay in the kernel's backlog; those
//! that wait are kept for a successor; what it can be made to log is limited.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::device::{Blame, Device};
use crate::keep::FdId;
use crate::rpc;
use crate::session::receiver::is_foreign;
use crate::succession::Succession;
use crate::sys;

/// Connections that are held; the others stay in the backlog.
const MOST: usize = 8;
/// How long nothing is accepted after it failed: descriptors ran out, or memory.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Caller {
    stream: UnixStream,
    who: String,
    /// The log has told of it.
    told: bool,
    /// It has said something, as a front-end does.
    heard: bool,
    /// Its number in the store; 0: it is not there.
    id: FdId,
}

impl Caller {
    fn new(stream: UnixStream, id: FdId, told: bool) -> Self {
        Self { who: who(&stream), stream, told, heard: false, id }
    }
}

/// See the head of the file.
#[derive(Debug)]
pub(super) struct Lobby {
    listener: UnixListener,
    callers: VecDeque<Caller>,
    paused_until: Option<Instant>,
}

impl Lobby {
    /// With those that waited for a predecessor, by their numbers in the store.
    pub(super) fn new(listener: UnixListener, waiting: Vec<(UnixStream, FdId)>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let callers = waiting.into_iter().map(|(stream, id)| Caller::new(stream, id, true)).collect();
        Ok(Self { listener, callers, paused_until: None })
    }

    /// Those of them that are kept for a successor.
    pub(super) fn kept(&self) -> Vec<FdId> {
        self.callers.iter().map(|caller| caller.id).filter(|&id| id != 0).collect()
    }

    /// What to wait for before [`Lobby::accept`] or [`Lobby::look`], and for how long at most.
    pub(super) fn fds(&self) -> (impl Iterator<Item = BorrowedFd<'_>>, Option<Duration>) {
        let pause = self.paused_until.map(|until| until.saturating_duration_since(Instant::now()));
        let open = pause.is_none() && self.callers.len() < MOST;
        let unheard = self.callers.iter().filter(|caller| !caller.heard).map(|c| c.stream.as_fd());
        (open.then(|| self.listener.as_fd()).into_iter().chain(unheard), pause)
    }

    /// Accepts those that have connected, until there are `most`. `keep` keeps each for a successor, at once: in the
    /// backlog it outlives this process, and here it does not. True: there are some.
    fn accept(&mut self, device: &Device, most: usize, mut keep: impl FnMut(&UnixStream) -> FdId) -> bool {
        if self.paused_until.is_some_and(|until| Instant::now() < until) {
            return false;
        }
        self.paused_until = None;
        let before = self.callers.len();
        // accept(2) takes a descriptor before it looks: without one it fails also where no connection waits.
        while self.callers.len() < most
            && sys::readable_within(&self.listener, Duration::ZERO).unwrap_or(true)
        {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    let id = keep(&stream);
                    self.callers.push_back(Caller::new(stream, id, false));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => {
                    if device.may_log(Blame::Connections) {
                        tracing::warn!("cannot accept a front-end: {e}");
                    }
                    self.paused_until = Some(Instant::now() + PAUSE);
                    break;
                }
            }
        }
        self.callers.len() > before
    }

    /// The next to be served.
    pub(super) fn next(&mut self, device: &Device) -> Option<UnixStream> {
        self.accept(device, 1, |_| 0); // kept as the one that is served
        let caller = self.callers.pop_front()?;
        if device.may_log(Blame::Connections) {
            tracing::info!("a front-end connected: {}", caller.who);
        }
        Some(caller.stream)
    }

    /// Looks at those that wait while `served` is served: tells of them, and answers those
    /// that are no front-ends. True: more have connected, which are told of if `served` is
    /// still there at the next look.
    pub(super) fn look(
        &mut self,
        device: &Device,
        served: BorrowedFd<'_>,
        control: Option<&Path>,
        succession: &mut Succession,
    ) -> bool {
        self.callers.retain_mut(|caller| {
            if sys::hung_up_within(&caller.stream, Duration::ZERO).unwrap_or(false) {
                sys::hang_up(&caller.stream);
                return false;
            }
            let mut first = [0; 64];
            let got = match sys::peek(&caller.stream, &mut first) {
                Ok(got @ 1..) => first.get(..got).unwrap_or_default(),
                Err(Errno::AGAIN) => &[],
                _ => {
                    sys::hang_up(&caller.stream);
                    return false;
                }
            };
            caller.heard |= !got.is_empty();
            if is_foreign(got) {
                turn_away(device, caller.stream.as_fd(), got, control);
                return false;
            }
            if caller.told {
                return true;
            }
            caller.told = true;
            if device.may_log(Blame::Connections) {
                tracing::warn!(
                    "{} connected and waits: a disk serves one front-end at a time, and {} has it. Stop one of the two",
                    caller.who,
                    who(served)
                );
            }
            true
        });
        self.accept(device, MOST, |stream| succession.keep_waiting(stream))
    }
}

/// The process that connected, for people. Its name is in /proc, which the sandbox closes.
fn who(stream: impl AsFd) -> String {
    sys::peer_pid(stream)
        .map_or_else(|| "a process of another container".into(), |pid| format!("process {pid}"))
}

/// Tells a client that does not speak vhost-user, and the log, where it is; `first`: how
/// it began, `control`: the control socket.
pub(super) fn turn_away(device: &Device, client: BorrowedFd<'_>, first: &[u8], control: Option<&Path>) {
    let first = String::from_utf8_lossy(first);
    let is_json = first.starts_with(['{', '[']);
    let why = match control {
        Some(path) => {
            format!("this is the disk's socket, for the VMM; the control socket is {}", path.display())
        }
        None => {
            "this is the disk's socket, for the VMM, and there is no control socket: see --control".into()
        }
    };
    if device.may_log(Blame::Connections) {
        let said =
            if is_json { "sent JSON".into() } else { format!("does not speak vhost-user ({first:?})") };
        tracing::warn!("{} {said}: {why}. Its connection is closed", who(client));
    }
    if is_json {
        rpc::refuse(client, &why);
    }
    // Read to its end: a close with unread bytes is a reset, which may overtake the answer.
    sys::hang_up(client);
}
