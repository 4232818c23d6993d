//! The messages of the vhost-user document, one short method each.
//!
//! What it is: `vhost`'s request-handler trait for a [`Session`]: what a message
//! means, told by its name.
//!
//! What it is not: it starts and stops no ring itself; [`Session::update`] does.
//!
//! Invariants: what cannot be served is not offered, and refused if sent all the
//! same, as is what there are no descriptors or threads for; a guest's mistake
//! (SET_CONFIG) is ignored and counted.

use std::fmt::Display;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::state::{InflightState, KeptRegion, LogState};
use super::{KeptFd, Session, Vring};
use crate::device::Blame;
use crate::dirty::DirtyLog;
use crate::hold::AtStop;
use crate::inflight::{self, CacheMode};
use crate::memory::{GuestMemory, MAX_REGIONS, MemoryError, RegionLayout};
use crate::promise;
use crate::ring::MAX_QUEUE_SIZE;
use crate::sys;
use crate::worker::{Ack, Command};

/// What a message's layout is as ours.
fn layout(region: &VhostUserMemoryRegion) -> RegionLayout {
    RegionLayout {
        guest: region.guest_phys_addr,
        len: region.memory_size,
        user: region.user_addr,
        offset: region.mmap_offset,
    }
}

/// A received eventfd: close-on-exec, and, where we write it, non-blocking, so that a full
/// one does not block. The front-end can take that back: see [`sys::signal_foreign`].
fn adopt(file: File, nonblocking: bool) -> Result<Arc<OwnedFd>> {
    use rustix::fs::OFlags;
    let fd = OwnedFd::from(file);
    let io = |e: rustix::io::Errno| refused(e);
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).map_err(io)?;
    if nonblocking {
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(io)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(io)?;
    }
    Ok(fd.into())
}

/// A message that is refused, and why.
fn refused(why: impl Display) -> Error {
    Error::ReqHandlerError(io::Error::other(why.to_string()))
}

fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

impl Session {
    /// Goes on with another memory table, or rejects the message that had it.
    fn take_memory(
        &mut self,
        memory: std::result::Result<GuestMemory, MemoryError>,
        regions: Vec<KeptRegion>,
    ) -> Result<()> {
        let memory = memory.map_err(refused)?;
        if self.log_in_use().is_some_and(|log| !log.covers(memory.end())) {
            let end = memory.end();
            return Err(refused(format_args!(
                "guest memory that ends at {end:#x} is more than the dirty log covers"
            )));
        }
        self.memory = Arc::new(memory);
        self.regions = regions;
        self.apply_memory();
        self.carried_out()
    }

    /// Whether everything that the message asked for was done.
    pub(super) fn carried_out(&mut self) -> Result<()> {
        self.take_undone().map_or(Ok(()), |why| Err(refused(why)))
    }

    /// Keeps an eventfd that we write, and gives it to the ring's worker.
    fn give(
        &mut self,
        index: u8,
        fd: Option<File>,
        place: impl FnOnce(&mut Vring) -> &mut Option<KeptFd>,
        command: impl FnOnce(u16, Option<Arc<OwnedFd>>, Ack<()>) -> Command,
    ) -> Result<u16> {
        let fd = fd.map(|f| adopt(f, true)).transpose()?;
        let id = self.received();
        let (at, vring) = self.vring(index.into())?;
        *place(vring) = fd.clone().map(|fd| KeptFd { fd, id });
        if vring.running {
            let asked = self.workers.ask(at, |ack| command(at, fd, ack));
            self.answered(asked);
        }
        Ok(at)
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(()) // deprecated, and the document asks for no action
    }

    fn reset_device(&mut self) -> Result<()> {
        // The cache mode stays: QEMU does not tell it again after a reset.
        self.reset_rings(AtStop::Fail);
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.promise().features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.device.promise().features();
        if unknown != 0 {
            return Err(refused(format_args!("features that were not offered: {unknown:#x}")));
        }
        self.features = features;
        // virtio 5.2.6.2: a driver that cannot flush takes every write for durable. Without
        // VERSION_1 none has spoken yet.
        let driver = features & promise::F_VERSION_1 != 0;
        let can_flush = features & promise::F_FLUSH != 0 || !driver;
        if self.device.durability.driver_can_flush(can_flush) {
            self.sync();
        }
        self.apply_log();
        if features & promise::F_PROTOCOL_FEATURES == 0 {
            self.vrings.iter_mut().for_each(|vring| vring.enabled = true);
            self.update_all();
        }
        self.carried_out()
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let layouts: Vec<_> = regions.iter().map(layout).collect();
        let kept = layouts.iter().map(|&layout| (layout, self.received())).collect();
        self.take_memory(GuestMemory::map(&layouts, files), kept).map(|()| None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.change(index, |vring| vring.size = num)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let used_log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        let addresses = Some([descriptor, available, used]);
        let (at, vring) = self.vring(index)?;
        if vring.addresses != addresses {
            return self.change(index, |vring| (vring.addresses, vring.used_log) = (addresses, used_log));
        }
        // The same again, as at the start of a migration.
        vring.used_log = used_log;
        if vring.running {
            let asked = self.workers.ask(at, |ack| Command::SetUsedLog(at, used_log, ack));
            self.answered(asked);
        }
        self.update(at);
        self.carried_out()
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.change(index, |vring| vring.base = base)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let (at, vring) = self.vring(index)?;
        vring.kick = None; // the document: a kick starts the ring again
        self.update(at);
        self.carried_out()?;
        let base = self.vring(index)?.1.base;
        if self.failed() {
            Err(Error::BackendInternalError)
        } else {
            Ok(VhostUserVringState::new(index, base.into()))
        }
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let kick = fd.map(|f| adopt(f, false)).transpose()?;
        let id = self.received();
        let (at, vring) = self.vring(index.into())?;
        let running = vring.running;
        vring.kick = kick.clone().map(|fd| KeptFd { fd, id });
        match kick {
            Some(kick) if running => {
                let asked = self.workers.ask(at, |ack| Command::SetKick(at, kick, ack));
                if let Some(Err(e)) = self.answered(asked) {
                    self.vring(at.into())?.1.kick = None;
                    self.update(at);
                    return Err(refused(format_args!(
                        "cannot watch the kick of queue {at}, which is stopped: {e}"
                    )));
                }
            }
            None => {
                self.device.complain(
                    Blame::Queues,
                    format_args!("queue {at} has no kick, and polling is not offered: it is not served"),
                );
                self.update(at);
            }
            Some(_) => self.update(at),
        }
        self.carried_out()
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let at = self.give(index, fd, |vring| &mut vring.call, Command::SetCall)?;
        // The driver looks once, whatever it has been told before: an interrupt may have
        // gone to the old eventfd, or may not have been sent. After the switch, or one more
        // could be lost between the two.
        if let Some(call) = self.vrings.get(usize::from(at)).and_then(|v| v.call.as_ref()) {
            sys::signal_foreign(&call.fd);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.give(index, fd, |vring| &mut vring.err, Command::SetErr).map(drop)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.get_protocol_features()?.bits();
        if unknown != 0 {
            return Err(refused(format_args!("protocol features that were not offered: {unknown:#x}")));
        }
        self.protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (at, vring) = self.vring(index)?;
        vring.enabled = enable;
        self.update(at);
        self.carried_out()
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let queues = u16::try_from(self.vrings.len()).unwrap_or(u16::MAX);
        let write_back = !self.device.durability.is_write_through();
        let space = self.device.promise().config_space(queues, write_back);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let size = usize::try_from(size).unwrap_or(0);
        Ok(space
            .into_iter()
            .chain(std::iter::repeat(0))
            .skip(from.min(promise::CONFIG_BYTES))
            .take(size)
            .collect())
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        match (offset, bytes) {
            (promise::WRITEBACK_OFFSET, &[on @ (0 | 1)]) if self.features & promise::F_CONFIG_WCE != 0 => {
                self.mode_is_settled = true;
                self.choose_cache(on == 1);
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
        let mut kept = self.regions.clone();
        kept.push((layout(region), self.received()));
        let memory = self.memory.with(layout(region), &file);
        sys::close_foreign([file.into()]);
        self.take_memory(memory, kept).map(|()| None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (guest, len) = (region.guest_phys_addr, region.memory_size);
        let mut kept = self.regions.clone();
        kept.retain(|(r, _)| (r.guest, r.user, r.len) != (guest, region.user_addr, len));
        self.take_memory(self.memory.without(guest, region.user_addr, len), kept)?;
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

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        if usize::from(queues) > self.vrings.len() || size > MAX_QUEUE_SIZE || queues == 0 || size == 0 {
            return Err(refused(format_args!("an in-flight region of {queues} queues of {size}")));
        }
        let (file, bytes) = inflight::Region::create(queues, size)
            .map_err(|e| refused(format_args!("cannot make an in-flight region: {e}")))?;
        // Mapped once it comes back with SET_INFLIGHT_FD.
        Ok((
            VhostUserInflight { mmap_size: bytes, mmap_offset: 0, num_queues: queues, queue_size: size },
            file,
        ))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let &VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = inflight;
        let region = inflight::Region::map(&file, mmap_size, mmap_offset, num_queues, queue_size);
        sys::close_foreign([file.into()]);
        let region = region.map_err(|e| {
            refused(format_args!(
                "an in-flight region of {num_queues} queues of {queue_size} in {mmap_size} bytes: {e}"
            ))
        })?;
        // A ring that runs without a journal, or with another one, changes when it
        // owes nothing.
        let ran = self.stop_rings(AtStop::Fail);
        let at = InflightState {
            bytes: mmap_size,
            offset: mmap_offset,
            queues: num_queues,
            size: queue_size,
            fd: self.received(),
            own: false,
        };
        let mode = region.cache_mode();
        self.inflight = Some((Arc::new(region), at));
        match mode {
            // Where none is noted, an earlier back-end kept it to itself.
            CacheMode::Unknown => {
                self.mode_is_settled = false;
                self.assume_mode();
            }
            // The guest may have chosen since: write-through is what it takes no harm from.
            CacheMode::Known { write_back } => {
                let chosen = self.device.durability.write_back_chosen();
                self.choose_cache(write_back && (chosen || !self.mode_is_settled));
                self.mode_is_settled = true;
            }
            CacheMode::NoHistory if self.mode_is_settled => self.note_cache(),
            CacheMode::NoHistory => {} // noted when a ring starts: its driver may have a history
        }
        if ran {
            self.has_moved = true;
        } else {
            self.update_all(); // those that only waited for a region that has a place for them
        }
        self.carried_out()
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

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let &VhostUserLog { mmap_size, mmap_offset } = log;
        let log = DirtyLog::map(&file, mmap_size, mmap_offset);
        sys::close_foreign([file.into()]);
        let log =
            log.map_err(|e| refused(format_args!("cannot map a dirty log of {mmap_size} bytes: {e}")))?;
        if !log.covers(self.memory.end()) {
            let end = self.memory.end();
            return Err(refused(format_args!(
                "a dirty log of {mmap_size} bytes is too short for guest memory that ends at {end:#x}"
            )));
        }
        let at = LogState { bytes: mmap_size, offset: mmap_offset, fd: self.received() };
        self.log = Some((Arc::new(log), at));
        self.apply_log();
        Ok(())
    }
}
