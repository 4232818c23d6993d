//! What is judged of a message before anything else is done with it: the descriptors that
//! came with it, and how a front-end would learn that it is refused.
//!
//! What it is: [`judge`].
//!
//! What it is not: it reads no payload; whether a message makes sense is for
//! [`super::messages`] to say.
//!
//! Invariant: a descriptor that is not what it must be is neither kept nor mapped, written or
//! waited for.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};
use vhost::vhost_user::message::FrontendReq as Request;

use crate::sys;

/// The flags of a message that asks for an answer: version 1, NEED_REPLY.
const ASKS: u32 = 1 | 1 << 3;

/// What there is to say of a message.
#[derive(Debug)]
pub struct Judged {
    /// Its number.
    pub request: u32,
    /// With REPLY_ACK it is answered by a number, by which it can be refused alone. Else a
    /// refusal ends the connection: a body of its own has no place for one, and after features
    /// that were not taken the two ends would not mean the same.
    pub by_number: bool,
    /// Why it is refused.
    pub why: Option<String>,
    /// Its descriptors are to be closed, and it is to be carried out without them.
    pub without_fds: bool,
}

/// Judges a message by its number, its flags and its descriptors.
#[must_use]
pub fn judge(request: u32, flags: u32, fds: &[OwnedFd]) -> Judged {
    let known = Request::try_from(request);
    let by_number = flags == ASKS
        && matches!(
            known,
            Ok(Request::SET_OWNER
                | Request::RESET_OWNER
                | Request::RESET_DEVICE
                | Request::SET_MEM_TABLE
                | Request::ADD_MEM_REG
                | Request::REM_MEM_REG
                | Request::SET_VRING_NUM
                | Request::SET_VRING_ADDR
                | Request::SET_VRING_BASE
                | Request::SET_VRING_KICK
                | Request::SET_VRING_CALL
                | Request::SET_VRING_ERR
                | Request::SET_VRING_ENABLE
                | Request::SET_CONFIG
                | Request::SET_BACKEND_REQ_FD
                | Request::SET_INFLIGHT_FD)
        );
    // The document: one that comes with it all the same is closed without being used.
    let without_fds = known == Ok(Request::REM_MEM_REG);
    let all = |fits: &dyn Fn(&OwnedFd) -> bool| fds.iter().all(fits);
    let (fit, must) = match known {
        Ok(Request::SET_VRING_KICK | Request::SET_VRING_CALL | Request::SET_VRING_ERR) => {
            (all(&|fd| sys::is_eventfd(fd)), "its descriptor is not an eventfd")
        }
        Ok(Request::SET_MEM_TABLE | Request::ADD_MEM_REG) => (
            all(&|fd| is_local_file(fd) || is(fd, libc::S_IFCHR)),
            "memory that is neither a local file nor a character device; use memory-backend-memfd or \
             memory-backend-file with share=on",
        ),
        Ok(Request::SET_LOG_BASE | Request::SET_INFLIGHT_FD) => {
            (all(&is_local_file), "its descriptor is not a local file")
        }
        Ok(Request::SET_BACKEND_REQ_FD) => (all(&is_channel), "its descriptor is not a Unix stream socket"),
        _ => (fds.is_empty() || without_fds, "it must not bring descriptors"),
    };
    let name = known.map_or_else(|_| format!("message {request}"), |known| format!("{known:?}"));
    let why = (!fit).then(|| format!("{name}: {must}"));
    Judged { request, by_number, why, without_fds }
}

fn is(fd: &OwnedFd, kind: u32) -> bool {
    sys::facts(fd).is_ok_and(|facts| sys::is_type(&facts, kind))
}

/// True for a file for whose pages no other process or host is asked: one that does not answer would stop the thread
/// that touches them.
fn is_local_file(fd: &OwnedFd) -> bool {
    const SERVED: [&str; 8] = ["fuse", "nfs", "cifs", "smb3", "9p", "ceph", "afs", "virtiofs"];
    let Ok(facts) = sys::facts(fd) else { return false };
    if !sys::is_type(&facts, libc::S_IFREG) {
        return false;
    }
    if sys::is_memory(fd) || facts.stx_dev_major != 0 {
        return true;
    }
    // proc(5): the third field is the device, the first one behind " - " the type. statfs(2) would ask the server.
    let device = format!("0:{}", facts.stx_dev_minor);
    let mounts = mounts().unwrap_or_default();
    let kind = mounts.lines().find_map(|line| {
        let (place, what) = line.split_once(" - ")?;
        (place.split(' ').nth(2)? == device).then(|| what.split(' ').next())?
    });
    // One that is mounted elsewhere is not known.
    kind.is_some_and(|kind| !SERVED.iter().any(|served| kind.starts_with(served)))
}

/// What is mounted now. The file is opened once, by the first call: a sandbox forbids that later.
pub fn mounts() -> io::Result<String> {
    static MOUNTS: OnceLock<Option<File>> = OnceLock::new();
    let file = MOUNTS.get_or_init(|| File::open("/proc/self/mountinfo").ok());
    let file = file.as_ref().ok_or(io::ErrorKind::NotFound)?;
    let (mut text, mut part) = (Vec::new(), [0; 4096]);
    loop {
        match file.read_at(&mut part, text.len() as u64)? {
            0 => return Ok(String::from_utf8_lossy(&text).into_owned()),
            got => text.extend_from_slice(part.get(..got).unwrap_or_default()),
        }
    }
}

fn is_channel(fd: &OwnedFd) -> bool {
    socket_domain(fd) == Ok(AddressFamily::UNIX) && socket_type(fd) == Ok(SocketType::STREAM)
}
