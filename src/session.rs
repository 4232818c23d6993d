//! The vhost-user session: what the front-end said, turned into commands for
//! the workers.
//!
//! What it is: the state of one device across connections, and one short
//! method for each message (the vhost-user document's names).
//!
//! What it is not: it reads no socket ([`receiver`]) and no ring.
//!
//! Invariants: a ring runs if and only if it has a kick, addresses and a size,
//! is enabled, and lies in the memory table; [`Session::update`] is the one
//! place that starts and stops rings by that rule. A message is rejected, which
//! ends the connection, only when going on would be worse.

pub mod receiver;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use crate::config;
use crate::device::{Blame, Device};
use crate::memory::{GuestMemory, MAX_REGIONS, RegionLayout};
use crate::ring::RingError;
use crate::ring::split::{Layout, Ring};
use crate::signals::Signals;
use crate::sys;
use crate::worker::{Command, QueueParts};
use crate::workers::{WorkerError, Workers, wait_for};

/// How long the first ring's start waits for the image locks.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// A virtqueue as the front-end described it so far.
#[derive(Debug, Default)]
struct Vring {
    size: u32,
    /// Descriptor table, available ring, used ring: front-end addresses.
    addresses: Option<[u64; 3]>,
    /// Where to go on: SET_VRING_BASE, or what the ring said when it stopped.
    base: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    enabled: bool,
    running: bool,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Session {
    device: Arc<Device>,
    workers: Workers,
    signals: Arc<Signals>,
    vrings: Vec<Vring>,
    memory: Arc<GuestMemory>,
    /// VHOST_USER_SET_FEATURES.
    features: u64,
    /// `--write-cache`, and what the guest made of it.
    configured_writeback: bool,
    writeback: bool,
    image_locked: bool,
    /// Somebody else has the image: this connection is not served.
    refused: bool,
    /// The daemon cannot go on: the disk hangs and a stop was asked for, or a
    /// worker cannot work.
    failure: Option<WorkerError>,
}

impl Session {
    /// A session with nothing said yet.
    #[must_use]
    pub fn new(device: Arc<Device>, workers: Workers, signals: Arc<Signals>, queues: u16) -> Self {
        let writeback = device.writeback();
        Self {
            device,
            workers,
            signals,
            vrings: (0..queues).map(|_| Vring::default()).collect(),
            memory: Arc::default(),
            features: 0,
            configured_writeback: writeback,
            writeback,
            image_locked: false,
            refused: false,
            failure: None,
        }
    }

    /// Ends what a connection began: drains and stops every ring, forgets all
    /// that the front-end said, unmaps its memory.
    pub fn disconnect(&mut self) {
        self.reset_rings();
        self.features = 0;
        self.refused = false;
        self.memory = Arc::default();
        self.apply_memory();
        self.set_writeback(self.configured_writeback);
    }

    /// True once the daemon cannot go on.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failure.is_some()
    }

    /// Why it cannot.
    pub fn take_failure(&mut self) -> Option<WorkerError> {
        self.failure.take()
    }

    /// True once the image turned out to be another's when a ring was to start.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// True once the front-end truncated memory that it had given us.
    #[must_use]
    pub fn memory_lost(&self) -> bool {
        self.memory.is_lost()
    }

    /// Ends the workers.
    pub fn stop_workers(&mut self) {
        self.workers.stop();
    }

    fn vring(&mut self, index: u32) -> Result<(u16, &mut Vring)> {
        let at = u16::try_from(index).map_err(|_| Error::InvalidParam)?;
        let vring = self.vrings.get_mut(usize::from(at)).ok_or_else(|| {
            tracing::error!("the front-end named queue {index}, which does not exist; use fewer queues or raise --num-queues");
            Error::InvalidParam
        })?;
        Ok((at, vring))
    }

    /// An answer of the workers; without one the session cannot go on.
    fn answered<T>(&mut self, answer: std::result::Result<T, WorkerError>) -> Option<T> {
        answer
            .map_err(|e| {
                tracing::error!(disk = %self.device.disk.path().display(), "{e}");
                self.failure.get_or_insert(e);
            })
            .ok()
    }

    /// Starts or stops a ring so that the invariant holds.
    fn update(&mut self, index: u16) {
        let Some(vring) = self.vrings.get(usize::from(index)) else { return };
        let wanted = vring.enabled && vring.kick.is_some() && vring.addresses.is_some() && vring.size > 0;
        if wanted && !vring.running {
            self.start(index);
        } else if !wanted && vring.running {
            self.stop(index);
        }
    }

    fn start(&mut self, index: u16) {
        if self.memory.is_empty() {
            return; // comes with SET_MEM_TABLE
        }
        if self.refused {
            return;
        }
        if self.features & config::F_VERSION_1 == 0 {
            if self.device.may_log(Blame::Guest) {
                tracing::error!(
                    queue = index,
                    "the driver did not negotiate VIRTIO_F_VERSION_1: it is not served"
                );
            }
            return;
        }
        match self.prepare(index) {
            Ok(Some(parts)) => {
                if !self.lock_image() {
                    return;
                }
                let asked = self.workers.ask(index, |ack| Command::Start(index, Box::new(parts), ack));
                match self.answered(asked) {
                    Some(Ok(())) => {
                        if let Some(vring) = self.vrings.get_mut(usize::from(index)) {
                            vring.running = true;
                        }
                        tracing::debug!(queue = index, "started");
                    }
                    Some(Err(e)) => {
                        tracing::error!(queue = index, "cannot watch its kick, the queue is not served: {e}")
                    }
                    None => {}
                }
            }
            Ok(None) => {}
            Err(e) => self.broken(index, e),
        }
    }

    /// The ring and the descriptors that its worker gets.
    fn prepare(&self, index: u16) -> std::result::Result<Option<QueueParts>, RingError> {
        let Some(vring) = self.vrings.get(usize::from(index)) else { return Ok(None) };
        let [desc, avail, used] = vring.addresses.ok_or(RingError::NoAddresses)?;
        let size = u16::try_from(vring.size).map_err(|_| RingError::Size(vring.size))?;
        let event_idx = self.features & config::F_EVENT_IDX != 0;
        let ring = Ring::new(&self.memory, Layout { size, desc, avail, used }, vring.base, event_idx)?;
        let dup = |fd: &Option<OwnedFd>| fd.as_ref().and_then(|fd| fd.try_clone().ok());
        Ok(dup(&vring.kick).map(|kick| QueueParts {
            ring,
            kick,
            call: dup(&vring.call),
            err: dup(&vring.err),
            indirect: self.features & config::F_INDIRECT_DESC != 0,
        }))
    }

    fn broken(&self, index: u16, why: RingError) {
        tracing::error!(queue = index, "{why}: the queue is not served");
        if let Some(err) = self.vrings.get(usize::from(index)).and_then(|v| v.err.as_ref()) {
            sys::signal(err);
        }
    }

    fn stop(&mut self, index: u16) {
        let asked = self.workers.ask(index, |ack| Command::Stop(index, ack));
        let state = self.answered(asked).flatten();
        if let Some(vring) = self.vrings.get_mut(usize::from(index)) {
            vring.running = false;
            if let Some(state) = state {
                vring.base = state.next_avail;
            }
        }
        tracing::debug!(queue = index, "stopped");
        // With requests still in the kernel the lock is the kernel's to let go.
        if self.image_locked && self.failure.is_none() && self.vrings.iter().all(|v| !v.running) {
            self.image_locked = false;
            self.device.disk.drop_image_lock();
        }
    }

    /// Changes a ring that may be running: stopped, changed, started again.
    fn change(&mut self, index: u32, change: impl FnOnce(&mut Vring)) -> Result<()> {
        let (at, vring) = self.vring(index)?;
        if vring.running {
            self.stop(at);
        }
        change(self.vring(index)?.1);
        self.update(at);
        Ok(())
    }

    /// Takes the image locks before the first ring starts. In a migration the
    /// other daemon may still be about to drop them.
    fn lock_image(&mut self) -> bool {
        let started = Instant::now();
        while !self.image_locked {
            match self.device.disk.take_image_lock() {
                Ok(()) => self.image_locked = true,
                Err(e) if started.elapsed() >= LOCK_TIMEOUT || self.signals.stopping() => {
                    tracing::error!(disk = %self.device.disk.path().display(), "{e}; no queue is served");
                    self.refused = true;
                    return false;
                }
                Err(_) => {
                    // Nothing tells when a lock is dropped; a signal ends the wait.
                    let waited = wait_for(&[self.signals.as_fd()], Some(Duration::from_millis(20)));
                    self.signals.take();
                    if waited.is_err() {
                        return false;
                    }
                }
            }
        }
        true
    }

    fn reset_rings(&mut self) {
        for index in 0..self.vrings.len() {
            let Ok(index) = u16::try_from(index) else { continue };
            if self.vrings.get(usize::from(index)).is_some_and(|v| v.running) {
                self.stop(index);
            }
            if let Some(vring) = self.vrings.get_mut(usize::from(index)) {
                *vring = Vring::default();
            }
        }
    }

    /// Gives the workers the current table, stops rings that are not in it, and
    /// starts those that only waited for it.
    fn apply_memory(&mut self) {
        let memory = Arc::clone(&self.memory);
        let answer = self.workers.set_memory(&memory);
        for index in self.answered(answer).unwrap_or_default() {
            self.stop(index); // and `update` will say why it cannot start again
        }
        for index in 0..self.vrings.len() {
            if let Ok(index) = u16::try_from(index) {
                self.update(index);
            }
        }
    }

    /// The cache mode that a driver gets: one that negotiated neither FLUSH nor
    /// CONFIG_WCE cannot flush, so its writes are durable (virtio 5.2.6.2).
    fn set_writeback(&mut self, wanted: bool) {
        self.writeback = wanted;
        let can_flush = self.features & (config::F_FLUSH | config::F_CONFIG_WCE) != 0;
        let effective = wanted && (can_flush || self.features == 0);
        let was = self.device.writeback();
        self.device.set_writeback(effective);
        if was && !effective && !self.device.disk.facts().read_only {
            let synced = self.workers.sync();
            self.answered(synced);
        }
    }
}

/// What a message's layout is as ours.
fn layout(region: &VhostUserMemoryRegion) -> RegionLayout {
    RegionLayout {
        guest: region.guest_phys_addr,
        len: region.memory_size,
        user: region.user_addr,
        offset: region.mmap_offset,
    }
}

/// A received descriptor: close-on-exec, and, for those that we write,
/// non-blocking, so that a full one never blocks a worker.
fn adopt(file: File, nonblocking: bool) -> Result<OwnedFd> {
    use rustix::fs::OFlags;
    let fd = OwnedFd::from(file);
    let io = |e: rustix::io::Errno| Error::ReqHandlerError(e.into());
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).map_err(io)?;
    if nonblocking {
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(io)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(io)?;
    }
    Ok(fd)
}

/// True for an eventfd (and its like): no file, pipe or socket. Its counter is
/// never read, which only an eventfd bears.
fn is_eventfd(fd: &OwnedFd) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|s| s.st_mode & libc::S_IFMT == 0)
}

fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(()) // deprecated, and the document asks for no action
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset_rings();
        self.set_writeback(self.configured_writeback);
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(config::features(self.device.disk.facts()))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !config::features(self.device.disk.facts());
        if unknown != 0 {
            tracing::error!("the front-end asks for features that were not offered: {unknown:#x}");
            return Err(Error::FeatureMismatch);
        }
        self.features = features;
        self.set_writeback(self.writeback);
        if features & config::F_PROTOCOL_FEATURES == 0 {
            for index in 0..self.vrings.len() {
                if let Some(vring) = self.vrings.get_mut(index) {
                    vring.enabled = true;
                }
                if let Ok(index) = u16::try_from(index) {
                    self.update(index);
                }
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let layouts: Vec<_> = regions.iter().map(layout).collect();
        let memory = GuestMemory::map(&layouts, files).map_err(|e| {
            tracing::error!("{e}");
            Error::InvalidParam
        })?;
        self.memory = Arc::new(memory);
        self.apply_memory();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.change(index, |vring| vring.size = num)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = Some([descriptor, available, used]);
        if self.vring(index)?.1.addresses == addresses {
            let (at, _) = self.vring(index)?;
            self.update(at);
            return Ok(()); // the same again, as at the start of a migration
        }
        self.change(index, |vring| vring.addresses = addresses)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.change(index, |vring| vring.base = base)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let (at, vring) = self.vring(index)?;
        vring.kick = None; // the document: a kick starts the ring again
        self.update(at);
        let base = self.vring(index)?.1.base;
        if self.failed() {
            Err(Error::BackendInternalError)
        } else {
            Ok(VhostUserVringState::new(index, base.into()))
        }
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let kick = fd.map(|f| adopt(f, false)).transpose()?.filter(|fd| {
            let fits = is_eventfd(fd);
            if !fits {
                tracing::error!(queue = index, "its kick is not an eventfd, the queue is not served");
            }
            fits
        });
        let (at, vring) = self.vring(index.into())?;
        if kick.is_none() {
            tracing::error!(queue = index, "no kick, and polling is not offered: the queue is not served");
        }
        let running = vring.running;
        let theirs = kick.as_ref().and_then(|fd| fd.try_clone().ok());
        vring.kick = kick;
        match theirs {
            Some(kick) if running => {
                let asked = self.workers.ask(at, |ack| Command::SetKick(at, kick, ack));
                if let Some(Err(e)) = self.answered(asked) {
                    tracing::error!(queue = at, "cannot watch its new kick: {e}");
                }
            }
            _ => self.update(at),
        }
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let call = fd.map(|f| adopt(f, true)).transpose()?;
        let (at, vring) = self.vring(index.into())?;
        let theirs = call.as_ref().and_then(|fd| fd.try_clone().ok());
        vring.call = call;
        if vring.running {
            let asked = self.workers.ask(at, |ack| Command::SetCall(at, theirs, ack));
            self.answered(asked);
        }
        // Whatever was used before, the driver looks once: an interrupt may have
        // gone to the old eventfd, or to nobody. After the switch, or one more
        // could go astray between the two.
        if let Some(call) = self.vrings.get(usize::from(at)).and_then(|v| v.call.as_ref()) {
            sys::signal(call);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let err = fd.map(|f| adopt(f, true)).transpose()?;
        let (at, vring) = self.vring(index.into())?;
        let theirs = err.as_ref().and_then(|fd| fd.try_clone().ok());
        vring.err = err;
        if vring.running {
            let asked = self.workers.ask(at, |ack| Command::SetErr(at, theirs, ack));
            self.answered(asked);
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.get_protocol_features()?.bits();
        if unknown != 0 {
            tracing::error!("the front-end asks for protocol features that were not offered: {unknown:#x}");
            return Err(Error::FeatureMismatch);
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (at, vring) = self.vring(index)?;
        vring.enabled = enable;
        self.update(at);
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let queues = u16::try_from(self.vrings.len()).unwrap_or(u16::MAX);
        let space = config::space(self.device.disk.facts(), queues, self.writeback);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let size = usize::try_from(size).unwrap_or(0);
        Ok(space
            .into_iter()
            .chain(std::iter::repeat(0))
            .skip(from.min(config::CONFIG_BYTES))
            .take(size)
            .collect())
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        match (offset, bytes) {
            (config::WRITEBACK_OFFSET, &[on @ (0 | 1)]) if self.features & config::F_CONFIG_WCE != 0 => {
                self.set_writeback(on == 1);
            }
            _ => {
                // A guest's mistake must not cost it its disk.
                if self.device.may_log(Blame::Guest) {
                    tracing::warn!("ignored: {} bytes written to the config space at {offset}", bytes.len());
                }
            }
        }
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let memory = self.memory.with(layout(region), &file).map_err(|e| {
            tracing::error!("{e}");
            Error::InvalidParam
        })?;
        self.memory = Arc::new(memory);
        self.apply_memory();
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (guest, len) = (region.guest_phys_addr, region.memory_size);
        let memory = self.memory.without(guest, region.user_addr, len).map_err(|e| {
            tracing::error!("{e}");
            Error::InvalidParam
        })?;
        self.memory = Arc::new(memory);
        self.apply_memory();
        // Answered only once nothing is read or written there any more.
        let retired = self.workers.retire(guest, len);
        self.answered(retired);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        unsupported("a disk has no GPU socket")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported("shared objects are not offered")
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unsupported("the in-flight region is not offered")
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        unsupported("the in-flight region is not offered")
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        unsupported("device state is not offered")
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported("device state is not offered")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported("shared memory regions are not offered")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported("dirty logging is not offered")
    }
}
