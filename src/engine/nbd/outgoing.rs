//! What leaves on the socket: one SENDMSG at a time, with as many requests as wait.
//!
//! What it is: the message and its iovecs, headers of requests and the pages of writes, and how far it has got: a socket
//! takes as much as it has room for, and the rest goes in another message.
//!
//! What it is not: it submits nothing.
//!
//! Invariant: a request leaves whole or the connection is lost: never is a byte of another one between its own.

use std::collections::VecDeque;
use std::ptr;

use super::request::{Phase, Request, cookie};
use super::{Command, wire};
use crate::pages::MAX_IOVECS;

/// UIO_MAXIOV (linux/uio.h).
const MAX: usize = 1024;
const _: () = assert!(MAX_IOVECS < MAX);
/// Bytes of a short message: a third of what the buffer of a Unix socket holds (net.core.wmem_default).
const SHORT: u64 = 64 << 10;

/// See the head of the file.
pub(super) struct Outgoing {
    message: libc::msghdr,
    iovecs: Vec<libc::iovec>,
    /// The first iovec that has not left whole.
    at: usize,
    /// Bytes of the message.
    bytes: u64,
    /// The requests of the message.
    batch: Vec<u16>,
    /// One request at a time: memory of one of several was gone, and it was not known of which.
    is_alone: bool,
    is_under_way: bool,
}

impl Outgoing {
    pub(super) fn new(slots: usize) -> Self {
        // SAFETY: all zeroes is a valid msghdr: no name, no iovecs, no control data.
        let message = unsafe { std::mem::zeroed() };
        Self {
            message,
            iovecs: Vec::with_capacity(MAX),
            at: 0,
            bytes: 0,
            batch: Vec::with_capacity(slots),
            is_alone: false,
            is_under_way: false,
        }
    }

    pub(super) fn is_under_way(&self) -> bool {
        self.is_under_way
    }

    /// The last message has left, and this one is short: a socket has room for at least a part of it, unless the server has not
    /// read for long.
    pub(super) fn is_short(&self) -> bool {
        self.at == 0 && self.bytes <= SHORT
    }

    /// Forgets what has not left: the connection is lost.
    pub(super) fn reset(&mut self) {
        self.iovecs.clear();
        self.batch.clear();
        (self.at, self.bytes) = (0, 0);
    }

    /// The message to send now: the rest of the last one, or the requests that wait. `None`: one is under way, or there
    /// is nothing.
    pub(super) fn next(
        &mut self,
        requests: &mut [Request],
        queue: &mut VecDeque<u16>,
        changed: u64,
    ) -> Option<*const libc::msghdr> {
        if self.is_under_way {
            return None;
        }
        if self.at == self.iovecs.len() {
            self.reset();
            self.is_alone &= !queue.is_empty();
            while let Some(&slot) = queue.front() {
                let Some(request) = requests.get_mut(usize::from(slot)) else { break };
                let is_write = matches!(request.command, Command::Write { .. });
                let buffers = if is_write { request.io.iovec_count as usize } else { 0 };
                if self.iovecs.len() + 1 + buffers > MAX || self.is_alone && !self.batch.is_empty() {
                    break;
                }
                queue.pop_front();
                self.add(slot, request, is_write);
                request.changed = changed;
            }
        }
        let left = self.iovecs.get_mut(self.at..).filter(|left| !left.is_empty())?;
        self.message.msg_iov = left.as_mut_ptr();
        self.message.msg_iovlen = left.len();
        self.is_under_way = true;
        Some(ptr::from_ref(&self.message))
    }

    fn add(&mut self, slot: u16, request: &mut Request, is_write: bool) {
        request.phase = Phase::Sending;
        request.generation = request.generation.wrapping_add(1);
        request.covered = wire::Covered::new(request.len);
        let offset = if request.command == Command::Flush { 0 } else { request.io.offset };
        request.header =
            wire::request(request.command, cookie(slot, request.generation), offset, request.len);
        let header = request.header.as_ptr().cast_mut().cast();
        self.iovecs.push(libc::iovec { iov_base: header, iov_len: request.header.len() });
        if is_write {
            let mut left = request.len as usize;
            // SAFETY: the request is in its slot.
            for iovec in unsafe { request.iovecs() } {
                let iov_len = iovec.iov_len.min(left);
                if iov_len > 0 {
                    self.iovecs.push(libc::iovec { iov_base: iovec.iov_base, iov_len });
                }
                left -= iov_len;
            }
        }
        self.bytes += request.header.len() as u64 + if is_write { u64::from(request.len) } else { 0 };
        self.batch.push(slot);
    }

    /// The SENDMSG ended. True: the message has left, and names nothing any more.
    pub(super) fn ended(&mut self, result: i32) -> bool {
        self.is_under_way = false;
        let mut left = usize::try_from(result).unwrap_or(0);
        while let Some(iovec) = self.iovecs.get_mut(self.at) {
            let now = iovec.iov_len.min(left);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(now);
            iovec.iov_len -= now;
            left -= now;
            if iovec.iov_len > 0 {
                return false;
            }
            self.at += 1;
        }
        true
    }

    /// The kernel could not read memory of the message: the request whose it was, which is known if there is only one.
    /// Else each goes alone until it was found.
    pub(super) fn faulted(&mut self) -> Option<u16> {
        let found = match self.batch[..] {
            [slot] => Some(slot),
            _ => None,
        };
        self.is_alone = found.is_none();
        found
    }

    /// One request after another of the message that has left.
    pub(super) fn take_sent(&mut self) -> Option<u16> {
        self.batch.pop()
    }
}
