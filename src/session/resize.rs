//! A disk that grows while a guest uses it.
//!
//! What it is: growing a file or noticing that the disk has grown, and then, in
//! this order, the workers, the config space, the front-end.
//!
//! What it is not: the message that a front-end sends in answer, GET_CONFIG, is in
//! [`super::messages`].
//!
//! Invariants: what a guest was told it has is never taken back; requests are
//! judged by a new size before the front-end is told of it. The news goes out without
//! NEED_REPLY and without waiting: QEMU asks for the config space before it would
//! answer, so that a wait would never end.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::Serialize;
use thiserror::Error;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::{KeptFd, Session};
use crate::device::Blame;
use crate::disk::lock::LockError;
use crate::sys;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: request, flags (version 1), no payload.
const CONFIG_CHANGE_MSG: [u8; 12] = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// Why a disk keeps its size.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum ResizeError {
    #[error(
        "{path}: {wanted} bytes are less than the {now} that it has already; a disk only grows. Without a size vublk \
         resize gives the guest all that is there"
    )]
    Shrink { path: PathBuf, wanted: u64, now: u64 },
    #[error("{path}: {wanted} is not a multiple of {unit}, the disk's block")]
    Unit { path: PathBuf, wanted: u64, unit: u64 },
    #[error("{0}: is a block device. Grow it with its own tool, then run vublk resize without a size")]
    Device(PathBuf),
    #[error(
        "{0}: is a server's. Grow it there; once the server was started anew, run vublk resize without a size"
    )]
    Remote(PathBuf),
    #[error("{0}: is served read-only. Grow the file by other means, then run vublk resize without a size")]
    ReadOnly(PathBuf),
    #[error(
        "{path}: its file system holds no file of {wanted} bytes, which is too large for it. The disk keeps its {now}; use a \
         smaller size"
    )]
    TooLarge { path: PathBuf, wanted: u64, now: u64 },
    #[error("{0}: {1}")]
    Locked(PathBuf, LockError),
    #[error("{0}: cannot {1}: {2}")]
    Io(PathBuf, &'static str, io::Error),
    #[error(
        "{path}: has {is} bytes left of the {now} that the guest was told it has. Requests past its end fail; \
             grow it again"
    )]
    Shrunk { path: PathBuf, is: u64, now: u64 },
}

/// How the guest hears of a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Told {
    /// The size has not changed.
    Unchanged,
    /// The front-end, which tells its guest.
    FrontEnd,
    /// No queue runs: a driver that starts one finds the new size, or is told then.
    Later,
    /// The front-end takes no such news: its guest sees the size when it resets
    /// the device, or when the VM starts anew.
    AtReset,
}

/// A disk's size, and who knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Resized {
    /// Bytes.
    pub size: u64,
    /// Who was told.
    pub told: Told,
}

impl Session {
    /// Takes the channel on which the front-end can be told something, which came
    /// with the message that is being handled.
    pub fn set_channel(&mut self, fd: OwnedFd) {
        let id = self.received();
        let before = self.channel.replace(KeptFd { fd: fd.into(), id });
        before.iter().for_each(|before| sys::hang_up(&before.fd));
    }

    /// Grows a file to `wanted` bytes; without it finds out whether the disk has
    /// grown by itself.
    ///
    /// # Errors
    /// [`ResizeError`]; then the guest's disk is as it was.
    pub fn resize(&mut self, wanted: Option<u64>) -> Result<Resized, ResizeError> {
        let promise = self.device.promise();
        let now = promise.bytes();
        if let Some(wanted) = wanted {
            self.grow(wanted, now)?;
        }
        let path = || self.device.disk.path().to_owned();
        let is = self.device.disk.measure().map_err(|e| ResizeError::Io(path(), "read its size", e))?;
        let is = is / u64::from(promise.block) * u64::from(promise.block);
        if is < now {
            return Err(ResizeError::Shrunk { path: path(), is, now });
        }
        if is == now {
            return Ok(Resized { size: now, told: Told::Unchanged });
        }
        self.device.set_promise(promise.grown(is));
        let answer = self.workers.set_promise();
        self.answered(answer);
        tracing::info!(disk = %self.device.disk.path().display(), "grew from {now} to {is} bytes");
        self.news = true;
        Ok(Resized { size: is, told: self.tell_news() })
    }

    fn grow(&self, wanted: u64, now: u64) -> Result<(), ResizeError> {
        let disk = &self.device.disk;
        let (path, unit) = (disk.path().to_owned(), u64::from(self.device.promise().block));
        if disk.remote().is_some() {
            return Err(ResizeError::Remote(path));
        }
        if disk.backing.is_device && disk.image().is_none() {
            return Err(ResizeError::Device(path));
        }
        if disk.backing.read_only {
            return Err(ResizeError::ReadOnly(path));
        }
        if !wanted.is_multiple_of(unit) {
            return Err(ResizeError::Unit { path, wanted, unit });
        }
        // As it is, which may be more than the guest was told: never cut it.
        let is = disk.measure().map_err(|e| ResizeError::Io(path.clone(), "read its size", e))?;
        let is = (is / unit * unit).max(now);
        if wanted < is {
            return Err(ResizeError::Shrink { path, wanted, now: is });
        }
        disk.test_image_lock().map_err(|e| ResizeError::Locked(path.clone(), e))?;
        disk.grow(wanted).map_err(|e| match e.kind() {
            // That it is no number for a file's size is std's word for it.
            io::ErrorKind::FileTooLarge | io::ErrorKind::InvalidInput => {
                ResizeError::TooLarge { path, wanted, now }
            }
            _ => ResizeError::Io(path, "grow it", e),
        })
    }

    /// Tells the front-end that the config space has changed, if it has and a
    /// ring runs; else it is told when one starts.
    pub(super) fn tell_news(&mut self) -> Told {
        if !self.news {
            return Told::Unchanged;
        }
        // While the driver cannot flush, the config space says write-through: a front-end that
        // read it now would keep that for the next driver, which firmware's successor is.
        let can_flush = self.device.durability.driver_can_flush_now();
        if !can_flush || !self.vrings.iter().any(|vring| vring.running) {
            return Told::Later;
        }
        self.news = false;
        // The document has it for those that negotiated the config space.
        let speaks = self.protocol_features & VhostUserProtocolFeatures::CONFIG.bits() != 0;
        let Some(channel) = self.channel.as_ref().filter(|_| speaks) else { return Told::AtReset };
        match sys::send_now(&channel.fd, &CONFIG_CHANGE_MSG) {
            Ok(_whole) => Told::FrontEnd,
            Err(e) => {
                self.device.complain(
                    Blame::FrontEnd,
                    format_args!("the front-end cannot be told that the disk has grown: {e}"),
                );
                // One that only does not read is told when its next ring starts.
                self.news = e == rustix::io::Errno::AGAIN;
                if !self.news {
                    self.channel.take().iter().for_each(|channel| sys::hang_up(&channel.fd));
                }
                Told::AtReset
            }
        }
    }
}
