//! `stock SOCKET DISK QUEUES`: the device that `make bench` compares with.
//!
//! What it is: what a developer gets who takes the stock `vhost-user-backend`
//! framework and writes a block device on it with care: one thread a queue and
//! no lock shared between them, EVENT_IDX and indirect descriptors, O_DIRECT,
//! and preadv or pwritev straight on the guest's memory, without a copy and
//! without allocating for a request.
//!
//! What it is not: a straw man, and not a product. I/O is synchronous, so a
//! queue has one request at the disk at a time, and a request must be framed
//! as drivers do it: the header in the first descriptor, the status in the
//! last one, data between them.
//!
//! Invariant: every chain that is taken is returned once, with a status unless
//! it has no place for one.
#![expect(unsafe_code, reason = "hands guest memory to preadv and pwritev")]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::{Arc, OnceLock};

use arrayvec::ArrayVec;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

const SECTOR: u64 = 512;
const QUEUE_SIZE: usize = 1024;
/// Data descriptors of a request, at most.
const SEGMENTS: usize = 126;
const SEG_MAX: u32 = 126;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringRwLock<Memory>;

struct Device {
    disk: File,
    sectors: u64,
    block: u32,
    queues: u16,
    memory: OnceLock<Memory>,
}

/// A request's status, and how many bytes of the guest's it wrote besides.
struct Outcome {
    status: u32,
    written: u32,
}

impl Outcome {
    const fn failed(status: u32) -> Self {
        Self { status, written: 0 }
    }
}

impl Device {
    fn open(path: &str, queues: u16) -> io::Result<Self> {
        let mut disk = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
        let block = if disk.metadata()?.file_type().is_block_device() {
            rustix::fs::ioctl_blksszget(&disk)?
        } else {
            512
        };
        let sectors = disk.seek(SeekFrom::End(0))? / SECTOR;
        Ok(Self { disk, sectors, block, queues, memory: OnceLock::new() })
    }

    /// `struct virtio_blk_config`, as far as the offered features reach.
    fn config(&self) -> [u8; 36] {
        let mut config = [0; 36];
        config[0..8].copy_from_slice(&self.sectors.to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&self.block.to_le_bytes());
        config[34..36].copy_from_slice(&self.queues.to_le_bytes());
        config
    }

    /// Serves what is on the ring now.
    fn pass(&self, vring: &Vring, memory: &GuestMemoryMmap) -> io::Result<()> {
        let mut vring = vring.get_mut();
        while let Some(chain) = vring.get_queue_mut().pop_descriptor_chain(memory) {
            let head = chain.head_index();
            let written = self.serve(chain, memory);
            vring.get_queue_mut().add_used(memory, head, written).map_err(io::Error::other)?;
            // After every request: the guest works while the next one is at the disk. With
            // EVENT_IDX it is a comparison, and an interrupt only when the guest sleeps.
            if vring.get_queue_mut().needs_notification(memory).map_err(io::Error::other)? {
                vring.signal_used_queue()?;
            }
        }
        Ok(())
    }

    /// One request; returns the bytes written to its chain.
    fn serve(&self, chain: DescriptorChain<&GuestMemoryMmap>, memory: &GuestMemoryMmap) -> u32 {
        let mut parts: ArrayVec<Descriptor, { SEGMENTS + 2 }> = ArrayVec::new();
        for part in chain {
            if parts.try_push(part).is_err() {
                return 0;
            }
        }
        let [header, data @ .., status] = parts.as_slice() else { return 0 };
        if !status.is_write_only() || status.len() < 1 {
            return 0;
        }
        let outcome = self.request(header, data, memory).unwrap_or(Outcome::failed(VIRTIO_BLK_S_IOERR));
        let byte = outcome.status.to_le_bytes()[0];
        if memory.write_obj(byte, status.addr()).is_ok() { outcome.written + 1 } else { 0 }
    }

    /// None: it is malformed, or the disk reported an error.
    fn request(&self, header: &Descriptor, data: &[Descriptor], memory: &GuestMemoryMmap) -> Option<Outcome> {
        if header.is_write_only() || header.len() < 16 {
            return None;
        }
        let kind: u32 = memory.read_obj(header.addr()).ok()?;
        let sector: u64 =
            memory.read_obj(header.addr().0.checked_add(8).map(vm_memory::GuestAddress)?).ok()?;
        let done = Outcome::failed(VIRTIO_BLK_S_OK);
        match kind {
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => {
                let read = kind == VIRTIO_BLK_T_IN;
                let written = self.transfer(read, sector, data, memory)?;
                Some(Outcome { written: if read { written } else { 0 }, ..done })
            }
            VIRTIO_BLK_T_FLUSH => self.disk.sync_data().ok().map(|()| done),
            _ => Some(Outcome::failed(VIRTIO_BLK_S_UNSUPP)),
        }
    }

    /// Moves all of a request's bytes, in one system call; returns how many.
    fn transfer(
        &self,
        read: bool,
        sector: u64,
        data: &[Descriptor],
        memory: &GuestMemoryMmap,
    ) -> Option<u32> {
        let mut vectors: ArrayVec<libc::iovec, { 2 * SEGMENTS }> = ArrayVec::new();
        let mut len: u32 = 0;
        for part in data {
            if part.is_write_only() != read {
                return None;
            }
            len = len.checked_add(part.len())?;
            let bytes = usize::try_from(part.len()).ok()?;
            // More than one slice when the descriptor crosses regions.
            for slice in GuestMemoryBackend::get_slices(memory, part.addr(), bytes) {
                let slice = slice.ok()?;
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                vectors.try_push(libc::iovec { iov_base, iov_len: slice.len() }).ok()?;
            }
        }
        let end = sector.checked_add(u64::from(len) / SECTOR)?;
        if u64::from(len) % SECTOR != 0 || end > self.sectors {
            return None;
        }
        let offset = libc::off_t::try_from(sector * SECTOR).ok()?;
        let (fd, count) = (self.disk.as_raw_fd(), libc::c_int::try_from(vectors.len()).ok()?);
        // SAFETY: the vectors lie in mappings that `memory` keeps for as long as it
        // is borrowed, and no reference to guest memory exists.
        let moved = unsafe {
            if read {
                libc::preadv(fd, vectors.as_ptr(), count, offset)
            } else {
                libc::pwritev(fd, vectors.as_ptr(), count, offset)
            }
        };
        (u32::try_from(moved) == Ok(len)).then_some(len)
    }
}

// Not `VhostUserBackendMut`: its lock would let one queue be served at a time.
impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues.into()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        bits.iter().fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |all, bit| all | 1 << bit)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
    }

    // The rings themselves know.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let (offset, size) = (offset as usize, size as usize);
        self.config().into_iter().chain(std::iter::repeat(0)).skip(offset).take(size).collect()
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        // The same handle every time; what it leads to is exchanged.
        let _kept = self.memory.set(memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(&self, event: u16, events: EventSet, vrings: &[Vring], _thread: usize) -> io::Result<()> {
        let Some((vring, memory)) = vrings.get(usize::from(event)).zip(self.memory.get()) else {
            return Ok(());
        };
        if !events.contains(EventSet::IN) {
            return Ok(());
        }
        loop {
            let memory = memory.memory();
            vring.disable_notification().map_err(io::Error::other)?;
            self.pass(vring, memory.deref())?;
            // True when requests came while kicks were off.
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [socket, disk, queues] = words.as_slice() else {
        return Err("usage: stock SOCKET DISK QUEUES".into());
    };
    let queues: u16 = queues.parse()?;
    if !(1..=64).contains(&queues) {
        return Err("QUEUES is 1 to 64".into());
    }
    let mut listener = Listener::new(socket, true)?;
    loop {
        // A daemon of the framework serves one connection.
        let device = Arc::new(Device::open(disk, queues)?);
        let mut daemon =
            VhostUserDaemon::new("stock".to_owned(), device, Memory::new(GuestMemoryMmap::new()))
                .map_err(|e| e.to_string())?;
        daemon.start(&mut listener).map_err(|e| e.to_string())?;
        // However the front-end left: the next one is served.
        let _left = daemon.wait();
    }
}
