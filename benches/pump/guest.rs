//! A guest for the benches and for `tests/allocations.rs`: memory, rings, and a
//! driver that offers requests and checks each answer.
//!
//! What it is: the driver's half of the split ring with EVENT_IDX, on safe
//! accessors, and the commands by which a worker is told to serve it. The
//! worker may run on this thread or on another one.
//!
//! What it is not: no vhost-user, no socket, no session; and not quick, since
//! its own cost is never part of a figure.
//!
//! Invariants: a slot of the guest has one request at most; every answer is
//! checked for its status and length when it is taken; a guest that is dropped
//! tells its worker to exit.
//!
//! ```text
//!   queue n:  descriptors │ available │ used │ control blocks      │ data
//!                                              header status table   pages apart
//! ```

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vublk::device::Device;
use vublk::disk::{Disk, Options};
use vublk::engine::Engine;
use vublk::inflight::Region;
use vublk::memory::{GuestMemory, RegionLayout};
use vublk::promise::{self, Promise};
use vublk::ring::notify::passes;
use vublk::ring::split::{Layout, Ring};
use vublk::sys;
use vublk::worker::{Ack, Command, PoolSize, QueueParts, Tuning, Worker};

/// Requests that a queue has in flight at most.
pub const BATCH: u16 = 32;
/// Segments of a request at most.
pub const MAX_SEGMENTS: u16 = 8;
/// Type of a read.
pub const T_IN: u32 = 0;
/// Type of a write.
pub const T_OUT: u32 = 1;

const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Descriptors of one chain: header, segments, status.
const STRIDE: u16 = MAX_SEGMENTS + 2;
const SIZE: u16 = 512;
const _: () = assert!(SIZE >= BATCH * STRIDE);

// Offsets in a queue's part of the memory.
const TABLE: u64 = 0;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const CONTROL: u64 = 0x5000;
/// As in Linux, where header and status are near each other and the blocks of
/// two requests are no multiple of a page apart: 32 headers at one offset of
/// their pages would be 32 lines of one cache set.
const CONTROL_BYTES: u64 = 256;
const STATUS: u64 = 16;
const INDIRECT_TABLE: u64 = 64;
const DATA: u64 = 0x8000;
/// Room for a page and a skew; two segments are never adjacent.
const SEGMENT_ROOM: u64 = 0x2000;
const SLOT_DATA: u64 = SEGMENT_ROOM * MAX_SEGMENTS as u64;
const QUEUE_BYTES: u64 = DATA + SLOT_DATA * BATCH as u64;

/// Where the guest has its memory, and where its front-end has it.
const GUEST: u64 = 0x1_0000_0000;
const USER: u64 = 0x7000_0000_0000;

/// A request to be made.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// VIRTIO_BLK_T_…
    pub kind: u32,
    /// First sector.
    pub sector: u64,
    /// Segments of the payload, at most [`MAX_SEGMENTS`].
    pub segments: u16,
    /// Bytes of each of them, at most 4096.
    pub segment_len: u32,
    /// Each segment starts so many bytes into its page.
    pub skew: u64,
    /// One descriptor that points to a table of them.
    pub indirect: bool,
    /// The status that is right.
    pub status: u8,
}

impl Request {
    /// Bytes that the device is to write, its status included.
    fn written(&self) -> u32 {
        let bytes = u32::from(self.segments) * self.segment_len;
        match (self.status, self.kind) {
            (0, T_IN) => bytes + 1,
            (0, T_GET_ID) => bytes + 1,
            _ => 1,
        }
    }
}

/// The driver's half of a queue.
#[derive(Debug)]
pub struct Queue {
    /// Written by the driver.
    pub kick: OwnedFd,
    /// Written by the device.
    pub call: OwnedFd,
    base: u64,
    avail: u16,
    published: u16,
    taken: u16,
    /// What is in flight in each slot.
    slots: [Option<Request>; BATCH as usize],
}

/// See the head of the file.
#[derive(Debug)]
pub struct Guest {
    /// Its queues.
    pub queues: Vec<Queue>,
    memory: GuestMemoryMmap,
    commands: Sender<Command>,
    wake: OwnedFd,
    started: Vec<Receiver<std::io::Result<()>>>,
}

/// What a worker is made of, on the thread that it is to run on.
#[derive(Debug)]
pub struct Seat {
    queues: u16,
    wake: OwnedFd,
    commands: Receiver<Command>,
}

impl Seat {
    /// The worker. The one place that makes one.
    pub fn worker<E: Engine>(self, engine: E, device: Arc<Device>) -> Worker<E> {
        // As vublkd has them by default.
        let tuning = Tuning { pool: PoolSize::default(), poll: Duration::from_micros(50), plug: true };
        Worker::new(engine, device, self.queues, tuning, self.wake, self.commands).unwrap()
    }

    /// Eventfds that the worker's engine watches.
    pub fn tokens(&self) -> u16 {
        self.queues + 1
    }
}

/// The device over a file of at least one block; `block`: as if the store had such blocks.
pub fn device(path: &Path, direct: bool, block: u64) -> Arc<Device> {
    let mut disk = Disk::open(
        &Options {
            path: path.to_owned(),
            direct,
            instance: format!("pump {}", std::process::id()),
            ..Options::default()
        },
        &|| false,
    )
    .unwrap();
    if block > 0 {
        let bytes = disk.measure().unwrap();
        disk.backing.set_block(block, bytes);
    }
    let promise = Promise::new(&disk, &promise::Options::default()).unwrap();
    Arc::new(Device::new(disk, promise, 1, true).unwrap())
}

/// An anonymous file; it lives in memory, wherever the tests run.
pub fn memory_file(bytes: u64) -> File {
    let file = File::from(memfd_create("pump", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}

impl Guest {
    /// A guest of so many queues, and the seat for its worker, which starts the
    /// queues in its first turn.
    pub fn new(queues: u16, journalled: bool) -> (Self, Seat) {
        let bytes = QUEUE_BYTES * u64::from(queues);
        let file = memory_file(bytes);
        let region = RegionLayout { guest: GUEST, len: bytes, user: USER, offset: 0 };
        let theirs = Arc::new(GuestMemory::map(&[region], vec![file.try_clone().unwrap()]).unwrap());
        let range = (GuestAddress(GUEST), usize::try_from(bytes).unwrap(), Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();

        let (commands, inbox) = channel();
        let wake = sys::eventfd().unwrap();
        let seat = Seat { queues, wake: wake.try_clone().unwrap(), commands: inbox };
        let (sender, _nobody) = sync_channel(1);
        let ack = Ack::new(sender, sys::eventfd().unwrap());
        commands.send(Command::SetMemory(Arc::clone(&theirs), ack)).unwrap();
        let mut guest = Self { queues: Vec::new(), memory, commands, wake, started: Vec::new() };
        let region = journalled.then(|| {
            let (file, bytes) = Region::create(queues, SIZE).unwrap();
            Arc::new(Region::map(&file, bytes, 0, queues, SIZE).unwrap())
        });
        for index in 0..queues {
            guest.start(index, &theirs, region.as_ref());
        }
        sys::signal(&guest.wake);
        (guest, seat)
    }

    fn start(&mut self, index: u16, memory: &Arc<GuestMemory>, region: Option<&Arc<Region>>) {
        let offset = QUEUE_BYTES * u64::from(index);
        let user = USER + offset;
        let layout = Layout { size: SIZE, desc: user + TABLE, avail: user + AVAIL, used: user + USED };
        let (kick, call) = (sys::eventfd().unwrap(), sys::eventfd().unwrap());
        let mut ring = Ring::new(memory, layout, 0, true).unwrap();
        if let Some(region) = region {
            ring = ring.journalled(region, index).unwrap();
        }
        let parts = QueueParts {
            ring,
            kick: kick.try_clone().unwrap().into(),
            call: Some(call.try_clone().unwrap().into()),
            err: None,
            indirect: true,
            used_log: None,
        };
        let (sender, started) = sync_channel(1);
        let ack = Ack::new(sender, sys::eventfd().unwrap());
        self.commands.send(Command::Start(index, Box::new(parts), ack)).unwrap();
        self.started.push(started);
        self.queues.push(Queue {
            kick,
            call,
            base: GUEST + offset,
            avail: 0,
            published: 0,
            taken: 0,
            slots: [None; BATCH as usize],
        });
    }

    /// Waits until the worker, which is turning, has started all queues.
    pub fn started(&mut self) {
        for answer in self.started.drain(..) {
            answer.recv_timeout(Duration::from_secs(10)).expect("a queue is started").unwrap();
        }
    }

    /// Puts a request into the ring. The device sees it after `publish`.
    ///
    /// # Panics
    /// With [`BATCH`] requests in flight.
    pub fn offer(&mut self, queue: usize, request: Request) {
        let Self { queues, memory, .. } = self;
        let queue = &mut queues[queue];
        let slot = queue.slots.iter().position(Option::is_none).unwrap();
        queue.slots[slot] = Some(request);
        let at = slot as u64;
        let control = queue.base + CONTROL + CONTROL_BYTES * at;
        let data = queue.base + DATA + SLOT_DATA * at;
        let put = |at: u64, value: u64| memory.write_obj(value.to_le(), GuestAddress(at)).unwrap();

        put(control, request.kind.into());
        put(control + 8, request.sector);
        memory.write_obj(0xffu8, GuestAddress(control + STATUS)).unwrap();
        if matches!(request.kind, T_DISCARD | T_WRITE_ZEROES) {
            put(data + request.skew, request.sector);
            put(data + request.skew + 8, 8); // eight sectors, no flags
        }

        let head = u16::try_from(slot).unwrap() * STRIDE;
        let (table, first) = match request.indirect {
            true => (control + INDIRECT_TABLE, 0),
            false => (queue.base + TABLE + 16 * u64::from(head), head),
        };
        let describe = |at: u64, addr: u64, len: u32, flags: u16, next: u16| {
            put(at, addr);
            put(at + 8, u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48);
        };
        let writable = if matches!(request.kind, T_IN | T_GET_ID) { WRITE } else { 0 };
        describe(table, control, 16, NEXT, first + 1);
        for segment in 0..request.segments {
            let addr = data + SEGMENT_ROOM * u64::from(segment) + request.skew;
            let at = table + 16 * u64::from(segment + 1);
            describe(at, addr, request.segment_len, NEXT | writable, first + segment + 2);
        }
        describe(table + 16 * u64::from(request.segments + 1), control + STATUS, 1, WRITE, 0);
        if request.indirect {
            let len = 16 * u32::from(request.segments + 2);
            describe(queue.base + TABLE + 16 * u64::from(head), table, len, INDIRECT, 0);
        }
        let entry = queue.base + AVAIL + 4 + 2 * u64::from(queue.avail % SIZE);
        memory.write_obj(head.to_le(), GuestAddress(entry)).unwrap();
        queue.avail = queue.avail.wrapping_add(1);
    }

    /// Shows the device what was offered, and kicks it if it wants that.
    pub fn publish(&mut self, queue: usize) {
        let Self { queues, memory, .. } = self;
        let queue = &mut queues[queue];
        let idx = GuestAddress(queue.base + AVAIL + 2);
        memory.store(queue.avail.to_le(), idx, Ordering::Release).unwrap();
        fence(Ordering::SeqCst);
        let event = avail_event(queue, memory);
        if passes(event, std::mem::replace(&mut queue.published, queue.avail), queue.avail) {
            sys::signal(&queue.kick);
        }
    }

    /// True if the device has fetched all that was published, and sleeps.
    pub fn is_fetched(&self, queue: usize) -> bool {
        let queue = &self.queues[queue];
        avail_event(queue, &self.memory) == queue.published
    }

    /// Takes and checks what the device has answered, and asks for a signal
    /// with the next answer. Gives how many are still in flight.
    pub fn take(&mut self, queue: usize) -> usize {
        let Self { queues, memory, .. } = self;
        let queue = &mut queues[queue];
        let load = |at| u16::from_le(memory.load(GuestAddress(at), Ordering::Acquire).unwrap());
        while load(queue.base + USED + 2) != queue.taken {
            let element = queue.base + USED + 4 + 8 * u64::from(queue.taken % SIZE);
            let [head, written]: [u32; 2] = memory.read_obj(GuestAddress(element)).unwrap();
            let slot = u32::from_le(head) / u32::from(STRIDE);
            assert_eq!(u32::from_le(head) % u32::from(STRIDE), 0, "the head of a chain");
            let request = queue.slots[slot as usize].take().expect("a request in flight");
            let control = queue.base + CONTROL + CONTROL_BYTES * u64::from(slot);
            let status: u8 = memory.read_obj(GuestAddress(control + STATUS)).unwrap();
            assert_eq!(status, request.status, "status of {request:?}");
            assert_eq!(u32::from_le(written), request.written(), "used length of {request:?}");
            queue.taken = queue.taken.wrapping_add(1);
            let event = GuestAddress(queue.base + AVAIL + 4 + 2 * u64::from(SIZE));
            memory.store(queue.taken.to_le(), event, Ordering::Relaxed).unwrap();
            // Before the look that ends the loop, or a signal could be missed.
            fence(Ordering::SeqCst);
        }
        queue.slots.iter().flatten().count()
    }
}

/// The chain with which the device wants the next kick.
fn avail_event(queue: &Queue, memory: &GuestMemoryMmap) -> u16 {
    let at = GuestAddress(queue.base + USED + 4 + 8 * u64::from(SIZE));
    u16::from_le(memory.load(at, Ordering::Relaxed).unwrap())
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _gone = self.commands.send(Command::Exit);
        sys::signal(&self.wake);
    }
}
