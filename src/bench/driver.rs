//! The guest of `vublk bench`: a vhost-user front-end and a virtio-blk driver with split rings.
//!
//! What it is: one memory region, shared with the back-end. Each request that can be in flight (a lane) has its three
//! descriptors, header, data and status, at a fixed place for good.
//!
//! ```text
//! a queue's descriptors ─ avail ring ─ used ring ─ headers and statuses   ┐ once a queue
//!                                                                          ┘
//! data of lane 0 ─ data of lane 1 ─ …
//! ```
//!
//! What it is not: it needs no protocol feature but CONFIG, so that it drives every back-end there is; it sends SET_MEM_TABLE
//! once, before the rings are started. Where the back-end offers an in-flight region it has one, as it has from QEMU, and may
//! be killed and go on. The tests have drivers of their own.
//!
//! Invariant: what the back-end returns is one of the chains that it has, or the run fails.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::promise::{F_BLK_SIZE, F_EVENT_IDX, F_FLUSH, F_MQ, F_PROTOCOL_FEATURES, F_RO, F_VERSION_1};
use crate::sys;

/// Queues of a back-end without the protocol feature MQ.
const ONE: u64 = 1;
/// `struct virtio_blk_config` up to `num_queues` (virtio 1.3, 5.2.4).
const CONFIG: usize = 36;

/// VIRTQ_DESC_F_NEXT, and _WRITE: the device writes there.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Descriptors of a lane.
const CHAIN: u16 = 3;
/// VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT.
const IN: u32 = 0;
const OUT: u32 = 1;
/// A lane's header, with its status behind it.
const HEADER: usize = 16;
const CELL: usize = 32;
const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;
/// An event of the connection; other numbers are queues'.
const CONNECTION: u64 = u64::MAX;

/// What is read of a back-end before a load is made for it.
pub(super) struct Connection {
    frontend: Frontend,
    features: u64,
    /// It keeps what is in flight in a region of ours.
    has_journal: bool,
    queues: u64,
    /// Bytes of the disk, and of its logical blocks (0: it does not tell).
    pub capacity: u64,
    pub block: u32,
    /// The process that listens.
    pub pid: Option<i32>,
}

/// Why a back-end is not driven, for people.
fn said<E: std::fmt::Display>(what: &str) -> impl Fn(E) -> io::Error + '_ {
    move |e| {
        io::Error::other(format!(
            "{what}: {e}. Use the socket on which vublkd, or another vhost-user-blk back-end, listens"
        ))
    }
}

impl Connection {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// No process listens on the socket, or the process that does is no vhost-user-blk back-end.
    pub fn open(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket).map_err(said("cannot connect"))?;
        // Process 1 listens for units of systemd: who serves is not known then.
        let pid = sys::peer_pid(&stream).filter(|&pid| pid != 1);
        let mut frontend = Frontend::from_stream(stream, ONE);
        frontend.set_owner().map_err(said("no answer to SET_OWNER"))?;
        let offered = frontend.get_features().map_err(said("no answer to GET_FEATURES"))?;
        let wanted = F_PROTOCOL_FEATURES | F_VERSION_1;
        if offered & wanted != wanted {
            return Err(io::Error::other("it offers no VERSION_1 or no protocol features: it is too old"));
        }
        // Without FLUSH the back-end would make each write durable before it answers.
        let features = offered & (wanted | F_EVENT_IDX | F_RO | F_BLK_SIZE | F_FLUSH | F_MQ);
        let negotiated = |e| said("it does not agree on features")(e);
        let protocol = frontend.get_protocol_features().map_err(negotiated)?;
        let known = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::REPLY_ACK;
        let protocol = protocol & known;
        if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(io::Error::other("it tells nothing of its disk (no protocol feature CONFIG)"));
        }
        frontend.set_protocol_features(protocol).map_err(negotiated)?;
        frontend.set_features(features).map_err(negotiated)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let queues = if protocol.contains(VhostUserProtocolFeatures::MQ) {
            frontend.get_queue_num().map_err(said("no answer to GET_QUEUE_NUM"))?
        } else {
            ONE
        };
        let length = u32::try_from(CONFIG).unwrap_or(u32::MAX);
        let (_, config) = frontend
            .get_config(0, length, VhostUserConfigFlags::empty(), &[0; CONFIG])
            .map_err(said("no answer to GET_CONFIG"))?;
        let field = |from: usize| config.get(from..).unwrap_or_default();
        let capacity = field(0).first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let block = field(20).first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let block = if features & F_BLK_SIZE == 0 { 0 } else { block };
        let has_journal = protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        let capacity = capacity.saturating_mul(512);
        Ok(Self { frontend, features, has_journal, queues, capacity, block, pid })
    }

    /// The disk may not be written to.
    pub fn is_read_only(&self) -> bool {
        self.features & F_RO != 0
    }

    /// Shares memory for `queues` × `depth` requests of `bytes` bytes, and starts the queues.
    ///
    /// # Errors
    /// The back-end has fewer queues or refuses them, or there is no memory.
    pub fn start(mut self, queues: u16, depth: u16, bytes: usize, huge: bool) -> io::Result<Driver> {
        if u64::from(queues) > self.queues {
            return Err(io::Error::other(format!(
                "has {} queues. Use --queues={0} or fewer instead of {queues}",
                self.queues
            )));
        }
        let mut driver = Driver::new(queues, depth, bytes, huge, self.features & F_EVENT_IDX != 0)?;
        if self.has_journal {
            let wanted = VhostUserInflight::new(0, 0, queues, driver.size);
            let given = self.frontend.get_inflight_fd(&wanted);
            let (region, file) = given.map_err(said("no answer to GET_INFLIGHT_FD"))?;
            let set = self.frontend.set_inflight_fd(&region, file.as_raw_fd());
            set.map_err(said("it does not take its own in-flight region"))?;
            driver.journal = Some(file);
        }
        driver.share(&mut self.frontend)?;
        let gone = EpollEvent::new(EventSet::READ_HANG_UP, CONNECTION);
        driver.interrupts.ctl(ControlOperation::Add, self.frontend.as_raw_fd(), gone)?;
        driver.frontend = Some(self.frontend);
        Ok(driver)
    }
}

/// Where the parts of a queue are in the memory.
#[derive(Clone, Copy)]
struct Layout {
    descriptors: usize,
    avail: usize,
    used: usize,
    cells: usize,
}

struct Queue {
    at: Layout,
    kick: EventFd,
    call: EventFd,
    /// The avail ring's index, and what it was at the last kick.
    avail: u16,
    kicked: u16,
    /// The used ring's index up to which completions were taken.
    used: u16,
    interrupts: bool,
    /// Which lanes of it the back-end has.
    has: Vec<bool>,
}

/// Queues that a back-end serves.
pub(super) struct Driver {
    memory: MmapRegion,
    queues: Vec<Queue>,
    size: u16,
    depth: u16,
    event_idx: bool,
    interrupts: Epoll,
    /// Where the data begins, and bytes of each lane.
    data: usize,
    bytes: usize,
    /// The back-end serves as long as the connection is open.
    frontend: Option<Frontend>,
    journal: Option<File>,
}

fn no_memory(e: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("no memory for --queues × --qd × --bs: {e}. Use smaller ones"))
}

fn no_huge_pages(count: usize, e: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!(
        "cannot have {count} huge pages of 2 MiB: {e}. Reserve more with sysctl vm.nr_hugepages=N, or do without \
         --huge-pages"
    ))
}

fn outside(e: vm_memory::VolatileMemoryError) -> io::Error {
    io::Error::other(e) // not reached: the layout is ours
}

impl Driver {
    fn new(queues: u16, depth: u16, bytes: usize, huge: bool, event_idx: bool) -> io::Result<Self> {
        let size = (depth * 4).next_power_of_two().max(8);
        let entries = usize::from(size);
        let mut end = 0;
        let mut take = |len: usize| {
            let at = end;
            end += len.next_multiple_of(64);
            at
        };
        let made: Vec<Layout> = (0..queues)
            .map(|_| Layout {
                descriptors: take(16 * entries),
                avail: take(6 + 2 * entries),
                used: take(6 + 8 * entries),
                cells: take(CELL * usize::from(depth)),
            })
            .collect();
        let data = end.next_multiple_of(PAGE);
        let lanes = usize::from(queues) * usize::from(depth);
        let len = lanes.checked_mul(bytes).and_then(|len| len.checked_add(data));
        let len = len.ok_or_else(|| no_memory("too many bytes"))?;
        let (page, flags) = if huge {
            (HUGE, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)
        } else {
            (PAGE, MemfdFlags::empty())
        };
        let len = len.checked_next_multiple_of(page).ok_or_else(|| no_memory("too many bytes"))?;
        let file = memfd_create(c"vublk-bench", MemfdFlags::CLOEXEC | flags);
        let file = if huge {
            // A huge page that is not there would otherwise end the process, or the back-end, at the first touch.
            let all = file.and_then(|fd| fallocate(&fd, FallocateFlags::empty(), 0, len as u64).map(|()| fd));
            File::from(all.map_err(|e| no_huge_pages(len / HUGE, e))?)
        } else {
            let file = File::from(file?);
            file.set_len(len as u64).map_err(no_memory)?;
            file
        };
        let memory = MmapRegion::from_file(FileOffset::new(file, 0), len).map_err(no_memory)?;
        let queue = |at| {
            let (kick, call) = (EventFd::new(libc::EFD_CLOEXEC)?, EventFd::new(libc::EFD_CLOEXEC)?);
            let has = vec![false; usize::from(depth)];
            Ok(Queue { at, kick, call, avail: 0, kicked: 0, used: 0, interrupts: true, has })
        };
        let queues = made.into_iter().map(queue).collect::<io::Result<Vec<_>>>()?;
        let interrupts = Epoll::new()?;
        for (index, queue) in queues.iter().enumerate() {
            let event = EpollEvent::new(EventSet::IN, index as u64);
            interrupts.ctl(ControlOperation::Add, queue.call.as_raw_fd(), event)?;
        }
        let driver = Self {
            memory,
            queues,
            size,
            depth,
            event_idx,
            interrupts,
            data,
            bytes,
            frontend: None,
            journal: None,
        };
        driver.lay_chains()?;
        Ok(driver)
    }

    /// Where the back-end finds this place of the memory: guest addresses are ours.
    fn address(&self, at: usize) -> u64 {
        (self.memory.as_ptr().addr() + at) as u64
    }

    /// Writes the descriptors that stay as they are.
    fn lay_chains(&self) -> io::Result<()> {
        for (index, queue) in self.queues.iter().enumerate() {
            for lane in 0..self.depth {
                let cell = queue.at.cells + CELL * usize::from(lane);
                let data = self.data_of(index * usize::from(self.depth) + usize::from(lane));
                let first = lane * CHAIN;
                self.descriptor(queue, first, cell, HEADER, NEXT, first + 1)?;
                self.descriptor(queue, first + 1, data, self.bytes, NEXT, first + 2)?;
                self.descriptor(queue, first + 2, cell + HEADER, 1, WRITE, 0)?;
            }
        }
        Ok(())
    }

    fn descriptor(
        &self,
        queue: &Queue,
        index: u16,
        at: usize,
        len: usize,
        flags: u16,
        next: u16,
    ) -> io::Result<()> {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address(at).to_le_bytes());
        bytes[8..12].copy_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(queue.at.descriptors + 16 * usize::from(index), bytes)
    }

    fn put<const N: usize>(&self, at: usize, bytes: [u8; N]) -> io::Result<()> {
        self.memory.as_volatile_slice().write_slice(&bytes, at).map_err(outside)
    }

    fn store(&self, at: usize, value: u16, order: Ordering) -> io::Result<()> {
        self.memory.as_volatile_slice().store(value.to_le(), at, order).map_err(outside)
    }

    fn load(&self, at: usize, order: Ordering) -> io::Result<u16> {
        self.memory.as_volatile_slice().load(at, order).map(u16::from_le).map_err(outside)
    }

    /// Gives the back-end the memory and the queues.
    fn share(&self, frontend: &mut Frontend) -> io::Result<()> {
        let file = self.memory.file_offset().map_or(-1, |file| file.file().as_raw_fd());
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: self.address(0),
            memory_size: self.memory.size() as u64,
            userspace_addr: self.address(0),
            mmap_offset: 0,
            mmap_handle: file,
        };
        frontend.set_mem_table(&[region]).map_err(said("it does not take the memory"))?;
        for (index, queue) in self.queues.iter().enumerate() {
            let ring = VringConfigData {
                queue_max_size: self.size,
                queue_size: self.size,
                flags: 0,
                desc_table_addr: self.address(queue.at.descriptors),
                used_ring_addr: self.address(queue.at.used),
                avail_ring_addr: self.address(queue.at.avail),
                log_addr: None,
            };
            let mut start = || {
                frontend.set_vring_num(index, self.size)?;
                frontend.set_vring_base(index, 0)?;
                frontend.set_vring_addr(index, &ring)?;
                frontend.set_vring_call(index, &queue.call)?;
                frontend.set_vring_kick(index, &queue.kick)?;
                frontend.set_vring_enable(index, true)
            };
            start().map_err(|e| {
                io::Error::other(format!(
                    "cannot set up {} queues of {}: {e}. Use fewer --queues or a smaller --qd",
                    self.queues.len(),
                    self.size
                ))
            })?;
        }
        Ok(())
    }

    fn data_of(&self, lane: usize) -> usize {
        self.data + lane * self.bytes
    }

    /// The data of a lane.
    ///
    /// # Errors
    /// There is no such lane.
    pub fn data(&self, lane: usize) -> io::Result<VolatileSlice<'_>> {
        self.memory.get_slice(self.data_of(lane), self.bytes).map_err(outside)
    }

    /// Waits until a queue has an interrupt, or the time is over.
    ///
    /// # Errors
    /// The back-end has closed the connection, or the eventfd's.
    pub fn wait(&self, time: Duration) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 64];
        let time = i32::try_from(time.as_millis()).unwrap_or(i32::MAX);
        let ready = match self.interrupts.wait(time, &mut events) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            ready => ready?,
        };
        for event in events.iter().take(ready) {
            if event.data() == CONNECTION {
                return Err(io::Error::other("the back-end closed the connection"));
            }
            let index = usize::try_from(event.data()).unwrap_or(usize::MAX);
            if let Some(queue) = self.queues.get(index) {
                queue.call.read()?;
            }
        }
        Ok(())
    }

    /// Makes a lane's request available: what it reads or writes begins at this byte of the disk.
    ///
    /// # Errors
    /// There is no such lane.
    pub fn submit(&mut self, lane: usize, write: bool, offset: u64) -> io::Result<()> {
        let depth = usize::from(self.depth);
        let (index, within) = (lane / depth, lane % depth);
        let head = u16::try_from(within).unwrap_or(u16::MAX).saturating_mul(CHAIN);
        let queue = self.queues.get(index).ok_or(io::ErrorKind::InvalidInput)?;
        let (at, avail) = (queue.at, queue.avail);
        let cell = at.cells + CELL * within;
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&if write { OUT } else { IN }.to_le_bytes());
        header[8..].copy_from_slice(&(offset / 512).to_le_bytes());
        self.put(cell, header)?;
        // Anything but a status.
        self.put(cell + HEADER, [u8::MAX])?;
        let flags = NEXT | if write { 0 } else { WRITE };
        self.put(at.descriptors + 16 * usize::from(head + 1) + 12, flags.to_le_bytes())?;
        self.store(at.avail + 4 + 2 * usize::from(avail % self.size), head, Ordering::Relaxed)?;
        self.store(at.avail + 2, avail.wrapping_add(1), Ordering::Release)?;
        if let Some(queue) = self.queues.get_mut(index) {
            queue.avail = avail.wrapping_add(1);
            if let Some(has) = queue.has.get_mut(within) {
                *has = true;
            }
        }
        Ok(())
    }

    /// Tells the back-end of new requests, if it wants to be told.
    ///
    /// # Errors
    /// The eventfd's.
    pub fn kick(&mut self, index: usize) -> io::Result<()> {
        let Some(queue) = self.queues.get(index) else { return Ok(()) };
        // Virtio 1.3, 2.7.13.4.1: the index is stored before the back-end's wish is read.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.load(queue.at.used + 4 + 8 * usize::from(self.size), Ordering::Relaxed)?;
            queue.avail.wrapping_sub(event).wrapping_sub(1) < queue.avail.wrapping_sub(queue.kicked)
        } else {
            self.load(queue.at.used, Ordering::Relaxed)? == 0
        };
        if wanted {
            queue.kick.write(1)?;
        }
        if let Some(queue) = self.queues.get_mut(index) {
            queue.kicked = queue.avail;
        }
        Ok(())
    }

    /// The next completion of a queue: its lane, and the request's status.
    ///
    /// # Errors
    /// The back-end returned what it has not.
    pub fn completion(&mut self, index: usize) -> io::Result<Option<(usize, u8)>> {
        let Some(queue) = self.queues.get(index) else { return Ok(None) };
        if self.load(queue.at.used + 2, Ordering::Acquire)? == queue.used {
            return Ok(None);
        }
        let entry = queue.at.used + 4 + 8 * usize::from(queue.used % self.size);
        let id: [u8; 4] = self.memory.as_volatile_slice().read_obj(entry).map_err(outside)?;
        let id = u32::from_le_bytes(id);
        let within = usize::try_from(id / u32::from(CHAIN)).unwrap_or(usize::MAX);
        let wrong =
            || io::Error::other(format!("queue {index}: it returned chain {id}, which it does not have"));
        if !id.is_multiple_of(CHAIN.into()) || queue.has.get(within) != Some(&true) {
            return Err(wrong());
        }
        let status = queue.at.cells + CELL * within + HEADER;
        let [status]: [u8; 1] = self.memory.as_volatile_slice().read_obj(status).map_err(outside)?;
        if let Some(queue) = self.queues.get_mut(index) {
            queue.used = queue.used.wrapping_add(1);
            if let Some(has) = queue.has.get_mut(within) {
                *has = false;
            }
            if queue.interrupts {
                self.set_interrupts(index, true)?;
            }
        }
        Ok(Some((index * usize::from(self.depth) + within, status)))
    }

    /// Wants an interrupt with the next completion of a queue, or none.
    fn set_interrupts(&mut self, index: usize, on: bool) -> io::Result<()> {
        let Some(queue) = self.queues.get_mut(index) else { return Ok(()) };
        queue.interrupts = on;
        let (at, used) = (queue.at, queue.used);
        if self.event_idx {
            // What is left behind the index is not reached again for 65 536 completions.
            self.store(at.avail + 4 + 2 * usize::from(self.size), used, Ordering::Relaxed)?;
            // Virtio 1.3, 2.7.7.1: the wish is stored before the used index is read again.
            fence(Ordering::SeqCst);
        } else {
            self.store(at.avail, u16::from(!on), Ordering::Relaxed)?;
        }
        Ok(())
    }

    /// As [`Driver::set_interrupts`], of all queues; true: completions are there that may have come without one.
    ///
    /// # Errors
    /// Not reached.
    pub fn interrupts(&mut self, on: bool) -> io::Result<bool> {
        let mut any = false;
        for index in 0..self.queues.len() {
            self.set_interrupts(index, on)?;
            let Some(queue) = self.queues.get(index) else { continue };
            any |= on && self.load(queue.at.used + 2, Ordering::Acquire)? != queue.used;
        }
        Ok(any)
    }
}
