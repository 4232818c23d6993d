//! A disk as its driver has it: a connection, guest memory and running rings,
//! and requests in the usual framing. Tests that want another framing build
//! the segments themselves.

use std::os::fd::AsFd;
use std::rc::Rc;

use super::daemon::Daemon;
use super::disk::SECTOR;
use super::frontend::{Frontend, feature, msg, protocol, words32, words64};
use super::memory::Memory;
use super::ring::{Ring, Seg, Used, back, out};

pub use super::request::{
    IOERR, OK, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, UNSUPP, UNWRITTEN, header, range,
};

/// What the drivers of the tests accept when it is offered.
const WANTED: u64 = feature::SEG_MAX
    | feature::RO
    | feature::BLK_SIZE
    | feature::FLUSH
    | feature::TOPOLOGY
    | feature::CONFIG_WCE
    | feature::MQ
    | feature::DISCARD
    | feature::WRITE_ZEROES
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::PROTOCOL_FEATURES
    | feature::VERSION_1;

/// How to set a device up.
pub struct Setup {
    /// Features not to accept.
    pub without: u64,
    pub queues: u32,
    pub ring_size: u16,
    /// Where the indices of the rings start.
    pub base: u16,
    pub memory: Rc<Memory>,
}

impl Default for Setup {
    fn default() -> Self {
        Self { without: 0, queues: 1, ring_size: 128, base: 0, memory: Memory::plain() }
    }
}

/// A device with running rings.
pub struct Device {
    pub frontend: Frontend,
    pub memory: Rc<Memory>,
    pub rings: Vec<Ring>,
    pub features: u64,
}

/// A request on its way.
pub struct Pending {
    pub head: u16,
    pub status_at: u64,
    back_at: u64,
    back_len: usize,
}

/// A finished request.
#[derive(Debug)]
pub struct Outcome {
    pub status: u8,
    /// Length in the used element.
    pub written: u32,
    pub data: Vec<u8>,
}

/// Greets the back-end and agrees on features; gives those acked.
#[track_caller]
pub fn negotiate(frontend: &mut Frontend, without: u64) -> u64 {
    let offered = frontend.ask64(msg::GET_FEATURES);
    assert_ne!(offered & feature::PROTOCOL_FEATURES, 0);
    let protocol = frontend.ask64(msg::GET_PROTOCOL_FEATURES) & protocol::WANTED;
    frontend.tell64(msg::SET_PROTOCOL_FEATURES, protocol);
    frontend.acks = protocol & protocol::REPLY_ACK != 0;
    frontend.tell(msg::SET_OWNER, &[], &[]);
    let features = offered & WANTED & !without;
    frontend.tell64(msg::SET_FEATURES, features);
    features
}

/// Hands a ring over and enables it.
#[track_caller]
pub fn start_ring(frontend: &Frontend, index: u32, ring: &Ring) {
    frontend.vring_state(msg::SET_VRING_NUM, index, u32::from(ring.size));
    frontend.vring_state(msg::SET_VRING_BASE, index, u32::from(ring.seen));
    set_ring_addr(frontend, index, ring);
    frontend.vring_fd(msg::SET_VRING_KICK, index, &ring.kick);
    frontend.vring_fd(msg::SET_VRING_CALL, index, &ring.call);
    frontend.vring_state(msg::SET_VRING_ENABLE, index, 1);
}

#[track_caller]
pub fn set_ring_addr(frontend: &Frontend, index: u32, ring: &Ring) {
    frontend.tell(msg::SET_VRING_ADDR, &ring_addr(index, ring), &[]);
}

/// Payload of SET_VRING_ADDR.
pub fn ring_addr(index: u32, ring: &Ring) -> Vec<u8> {
    let user = |guest| ring.memory.user(guest);
    let mut payload = words32(&[index, 0]);
    payload.extend(words64(&[user(ring.table), user(ring.used), user(ring.avail), 0]));
    payload
}

impl Device {
    #[track_caller]
    pub fn new(daemon: &Daemon, setup: Setup) -> Self {
        Self::over(daemon.connect(), setup)
    }

    /// One ring of 128, everything the back-end offers.
    #[track_caller]
    pub fn plain(daemon: &Daemon) -> Self {
        Self::new(daemon, Setup::default())
    }

    #[track_caller]
    pub fn over(mut frontend: Frontend, setup: Setup) -> Self {
        let features = negotiate(&mut frontend, setup.without);
        frontend.set_mem_table(&setup.memory);
        let event_idx = features & feature::EVENT_IDX != 0;
        let mut device = Self { frontend, memory: setup.memory, rings: Vec::new(), features };
        for index in 0..setup.queues {
            let ring = Ring::new(Rc::clone(&device.memory), setup.ring_size, setup.base, event_idx);
            start_ring(&device.frontend, index, &ring);
            device.rings.push(ring);
        }
        device
    }

    /// Places a request in memory in the usual framing: header, data, status.
    pub fn place(&self, kind: u32, sector: u64, data: &[u8], back_len: usize) -> (Vec<Seg>, Pending) {
        let memory = &self.memory;
        let head = memory.page_with(&header(kind, sector));
        let mut segs = vec![out(head, 16)];
        let mut back_at = 0;
        if !data.is_empty() {
            segs.push(out(memory.page_with(data), data.len()));
        }
        if back_len > 0 {
            back_at = memory.alloc(back_len as u64, 4096);
            segs.push(back(back_at, back_len));
        }
        let status_at = head + 64;
        memory.write(status_at, &[UNWRITTEN]);
        segs.push(back(status_at, 1));
        let pending = Pending { head: 0, status_at, back_at, back_len };
        (segs, pending)
    }

    /// Sends a request off and kicks.
    pub fn submit(&mut self, queue: usize, kind: u32, sector: u64, data: &[u8], back_len: usize) -> Pending {
        let (segs, mut pending) = self.place(kind, sector, data, back_len);
        pending.head = self.rings[queue].chain(&segs);
        self.rings[queue].offer(pending.head);
        pending
    }

    /// What became of a request whose head came back.
    pub fn outcome(&self, pending: &Pending, used: Used) -> Outcome {
        assert_eq!(used.head, pending.head, "another head came back");
        Outcome {
            status: self.memory.byte(pending.status_at),
            written: used.len,
            data: self.memory.read(pending.back_at, pending.back_len),
        }
    }

    /// A request from start to end.
    #[track_caller]
    pub fn run(&mut self, queue: usize, kind: u32, sector: u64, data: &[u8], back_len: usize) -> Outcome {
        let pending = self.submit(queue, kind, sector, data, back_len);
        let used = self.rings[queue].wait_used(&format!("request of type {kind}"));
        self.outcome(&pending, used)
    }

    /// Runs any segments, the status being the last byte of the last one.
    #[track_caller]
    pub fn run_segs(&mut self, segs: &[Seg], indirect: bool) -> (u8, Used) {
        let last = segs.last().unwrap();
        let status_at = last.addr + u64::from(last.len) - 1;
        self.memory.write(status_at, &[UNWRITTEN]);
        let ring = &mut self.rings[0];
        let head = if indirect { ring.indirect(segs) } else { ring.chain(segs) };
        ring.offer(head);
        let used = ring.wait_used("a request in odd framing");
        assert_eq!(used.head, head, "another head came back");
        (self.memory.byte(status_at), used)
    }

    #[track_caller]
    pub fn read(&mut self, sector: u64, sectors: u64) -> Vec<u8> {
        let len = usize::try_from(sectors).unwrap() * SECTOR;
        let done = self.run(0, T_IN, sector, &[], len);
        assert_eq!(done.status, OK, "status of a read at sector {sector}");
        done.data
    }

    #[track_caller]
    pub fn write(&mut self, sector: u64, data: &[u8]) {
        let done = self.run(0, T_OUT, sector, data, 0);
        assert_eq!(done.status, OK, "status of a write at sector {sector}");
    }

    #[track_caller]
    pub fn status(&mut self, kind: u32, sector: u64, data: &[u8], back_len: usize) -> u8 {
        self.run(0, kind, sector, data, back_len).status
    }

    /// The queue still serves: one sector of the untouched pattern is read.
    #[track_caller]
    pub fn assert_serves(&mut self, queue: usize) {
        let done = self.run(queue, T_IN, 100, &[], SECTOR);
        assert_eq!(done.status, OK, "status of the read that checks the queue");
        super::disk::assert_same(&done.data, &super::disk::pattern(100, 1), "sector 100");
    }

    /// Lets go of the connection first and gives what the guest keeps.
    pub fn disconnect(self) -> (Rc<Memory>, Vec<Ring>) {
        (self.memory, self.rings)
    }

    /// Replaces the kick descriptor of a running ring.
    #[track_caller]
    pub fn new_kick(&mut self, queue: u32) {
        let ring = &mut self.rings[queue as usize];
        ring.kick = super::sys::Event::new();
        self.frontend.vring_fd(msg::SET_VRING_KICK, queue, ring.kick.as_fd());
    }
}
