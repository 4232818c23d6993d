//! A front-end that says anything: messages in any order, of wrong sizes, with wrong descriptors, about memory regions that
//! overlap, wrap, are too long or are taken back; and a driver whose requests are of any kind.
//!
//! What it is: [`Hostile`], which makes messages out of the fuzzer's bytes, and the memory that they are about.

mod requests;
mod tables;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use self::requests::Requests;
pub use self::tables::Region;
use super::reader::Reader;
use super::stage::QUEUES;
use crate::support::frontend::{NO_FD, feature, msg, protocol, words32, words64};
use crate::support::sys::{Event, memory_file};

/// Bytes of each memory file.
const FILE_BYTES: u64 = 0x1_0000;
/// Where the good region is, for the guest and for the front-end.
const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7000_0000;
/// Bytes from one queue's ring to the next one's in the good region, and where its parts are there.
const RING: u64 = 0x3000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x1800;
/// An indirect table; and where the buffers of the first queue are, after all rings.
const TABLE: u64 = 0x2000;
const BUFFERS: u64 = RING * QUEUES as u64;

const FEATURES: u64 =
    feature::VERSION_1 | feature::PROTOCOL_FEATURES | feature::EVENT_IDX | feature::INDIRECT_DESC;
const NEED_REPLY: u32 = 1 << 3;

/// One message as it goes over the wire, and which descriptors go with it.
#[derive(Debug)]
pub struct Message {
    pub request: u32,
    pub bytes: Vec<u8>,
    pub fds: Vec<usize>,
}

impl Message {
    pub fn flags(&self) -> u32 {
        u32::from_le_bytes(self.bytes[4..8].try_into().unwrap())
    }

    pub fn payload(&self) -> &[u8] {
        &self.bytes[12..]
    }
}

pub struct Hostile {
    /// What it has to send: memory files first.
    fds: Vec<OwnedFd>,
    memory: [File; 2],
    kicks: [Event; 2],
    _peer: UnixStream,
    /// What it has described, as if all of it had been taken.
    regions: Vec<Region>,
    requests: Requests,
}

/// Descriptors by their places in [`Hostile::fds`].
const MEMORY: usize = 0;
const REGION: usize = 2;
const KICK: usize = 3;
const CALL: usize = 5;

impl Hostile {
    pub fn new() -> Self {
        let memory = [memory_file(FILE_BYTES), memory_file(FILE_BYTES)];
        let region = memory_file(FILE_BYTES);
        let kicks = [Event::new(), Event::new()];
        let call = Event::new();
        let (socket, peer) = UnixStream::pair().unwrap();
        let sealed = memory_file(4096);
        let device = |path| OwnedFd::from(File::options().read(true).write(true).open(path).unwrap());
        let (pipe, _) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        let fds = vec![
            copy(memory[0].as_fd()),
            copy(memory[1].as_fd()),
            copy(region.as_fd()),
            copy(kicks[0].as_fd()),
            copy(kicks[1].as_fd()),
            copy(call.as_fd()),
            socket.into(),
            sealed.into(),
            device("/dev/zero"),
            device("/dev/null"),
            pipe,
            File::open("/").unwrap().into(),
        ];
        Self { fds, memory, kicks, _peer: peer, regions: Vec::new(), requests: Requests::default() }
    }

    pub fn descriptors(&self, message: &Message) -> Vec<BorrowedFd<'_>> {
        message.fds.iter().map(|&at| self.fds[at].as_fd()).collect()
    }

    /// The bytes of the file that the descriptor at this place is; `None`: it is no file.
    pub fn file_bytes(&self, place: usize) -> Option<u64> {
        let facts = rustix::fs::fstat(&self.fds[place]).unwrap();
        let is_file = rustix::fs::FileType::from_raw_mode(facts.st_mode).is_file();
        is_file.then_some(facts.st_size.cast_unsigned())
    }

    /// Gives a worker the time that a request takes. No more: a broken ring returns none, nor does one that does not run.
    pub fn let_work(&self) {
        let until = Instant::now() + Duration::from_micros(500);
        let returned = |queue| self.requests.are_returned(&self.memory[0], queue);
        while !(0..QUEUES.into()).all(returned) && Instant::now() < until {
            std::thread::yield_now();
        }
    }

    /// One of the descriptors: nearly always the one that fits.
    fn fd(&self, bytes: &mut Reader<'_>, fits: usize) -> usize {
        if bytes.rarely() { usize::from(bytes.u8()) % self.fds.len() } else { fits }
    }

    fn address(bytes: &mut Reader<'_>, base: u64) -> u64 {
        match bytes.below(8) {
            0 => base.wrapping_add(bytes.u16().into()),
            1 => base.wrapping_sub(bytes.u16().into()),
            2 => bytes.u64(),
            3 => 0_u64.wrapping_sub(bytes.u16().into()),
            _ => base,
        }
    }

    fn message(request: u32, flags: u32, payload: &[u8], fds: Vec<usize>) -> Message {
        let size = u32::try_from(payload.len()).unwrap();
        let mut message = words32(&[request, 1 | flags, size]);
        message.extend_from_slice(payload);
        Message { request, bytes: message, fds }
    }

    /// Writes into guest memory, the in-flight region or an eventfd, or takes memory back. True: it did.
    fn act(&mut self, bytes: &mut Reader<'_>) -> bool {
        match bytes.below(16) {
            0..3 => {
                let (which, at) = (bytes.below(2) as usize, u64::from(bytes.u16()));
                let len = bytes.below(33) as usize;
                self.memory[which].write_all_at(bytes.bytes(len), at).unwrap();
            }
            3..7 => {
                let queue = bytes.below(QUEUES.into()) as usize;
                for _ in 0..=bytes.below(3) {
                    self.requests.add(&self.memory[0], queue, bytes);
                }
                if !bytes.rarely() {
                    self.kicks[queue & 1].signal();
                }
            }
            7 => self.kicks[bytes.below(2) as usize].signal(),
            8 if bytes.rarely() => {
                self.memory[bytes.below(2) as usize].set_len(u64::from(bytes.u16())).unwrap();
            }
            _ => return false,
        }
        true
    }

    /// What it says next; nothing if it does something else.
    pub fn next(&mut self, bytes: &mut Reader<'_>) -> Vec<Message> {
        if self.act(bytes) {
            return Vec::new();
        }
        let flags = if bytes.below(4) == 0 { 0 } else { NEED_REPLY };
        let queue = if bytes.rarely() { bytes.u32() } else { bytes.below(5) as u32 };
        let one = |request, payload: Vec<u8>, fds| vec![Self::message(request, flags, &payload, fds)];
        let state = |request, number: u32| one(request, words32(&[queue, number]), vec![]);
        match bytes.below(24) {
            // All that a good front-end says to start a ring, in its order.
            0..3 => {
                let q = queue & 3;
                let ring = USER + RING * u64::from(q);
                let mut table = words32(&[1, 0]);
                table.extend(Region::GOOD.payload());
                self.regions = vec![Region::GOOD];
                let mut addr = words32(&[q, 0]);
                addr.extend(words64(&[ring, ring + USED, ring + AVAIL, 0]));
                let size = 1 << bytes.below(8);
                let base = self.requests.set_up(q as usize, size);
                let fd = |request, at| Self::message(request, flags, &u64::from(q).to_le_bytes(), vec![at]);
                let state = |request, number| Self::message(request, flags, &words32(&[q, number]), vec![]);
                vec![
                    Self::message(msg::SET_PROTOCOL_FEATURES, 0, &protocol::WANTED.to_le_bytes(), vec![]),
                    Self::message(msg::SET_FEATURES, 0, &FEATURES.to_le_bytes(), vec![]),
                    Self::message(msg::SET_MEM_TABLE, flags, &table, vec![MEMORY]),
                    state(msg::SET_VRING_NUM, size.into()),
                    state(msg::SET_VRING_BASE, base.into()),
                    Self::message(msg::SET_VRING_ADDR, flags, &addr, vec![]),
                    fd(msg::SET_VRING_KICK, KICK + (q as usize & 1)),
                    fd(msg::SET_VRING_CALL, CALL),
                    state(msg::SET_VRING_ENABLE, 1),
                ]
            }
            3 => {
                let features = if bytes.bool() { FEATURES ^ 1 << bytes.below(40) } else { bytes.u64() };
                one(msg::SET_FEATURES, features.to_le_bytes().to_vec(), vec![])
            }
            4 => {
                let features =
                    if bytes.bool() { protocol::WANTED ^ 1 << bytes.below(20) } else { bytes.u64() };
                one(msg::SET_PROTOCOL_FEATURES, features.to_le_bytes().to_vec(), vec![])
            }
            5 | 6 => {
                self.regions.clear();
                let mut fds = Vec::new();
                for _ in 0..bytes.below(5) {
                    let (region, fits) = Region::any(bytes, &self.regions);
                    self.regions.push(region);
                    fds.push(self.fd(bytes, fits));
                }
                let claimed = if bytes.rarely() { bytes.u32() } else { fds.len() as u32 };
                let mut payload = words32(&[claimed, 0]);
                payload.extend(self.regions.iter().flat_map(Region::payload));
                if bytes.rarely() {
                    fds.pop();
                }
                one(msg::SET_MEM_TABLE, payload, fds)
            }
            7 => {
                let (region, fits) = Region::any(bytes, &self.regions);
                self.regions.push(region);
                let mut payload = words64(&[0]);
                payload.extend(region.payload());
                one(msg::ADD_MEM_REG, payload, vec![self.fd(bytes, fits)])
            }
            8 => {
                let at = usize::from(bytes.u8()) % self.regions.len().max(1);
                let mut region = match self.regions.len() {
                    0 => Region::GOOD,
                    _ => self.regions.remove(at),
                };
                match bytes.below(16) {
                    0 => region.guest ^= 1 << bytes.below(64),
                    1 => region.len ^= 1 << bytes.below(64),
                    2 => region.user ^= 1 << bytes.below(64),
                    _ => {}
                }
                let mut payload = words64(&[0]);
                payload.extend(region.payload());
                one(msg::REM_MEM_REG, payload, vec![])
            }
            9 => state(msg::SET_VRING_NUM, if bytes.bool() { bytes.u32() } else { 1 << bytes.below(12) }),
            10 => state(msg::SET_VRING_BASE, if bytes.bool() { bytes.u32() } else { bytes.u16().into() }),
            11 => state(msg::SET_VRING_ENABLE, bytes.below(3) as u32),
            12 => state(msg::GET_VRING_BASE, 0),
            13 | 14 => {
                let ring = USER + RING * u64::from(queue & 3);
                let mut payload = words32(&[queue, bytes.below(3) as u32]);
                let parts = [ring, ring + USED, ring + AVAIL].map(|at| Self::address(bytes, at));
                payload.extend(words64(&parts));
                payload.extend(words64(&[Self::address(bytes, GUEST)]));
                one(msg::SET_VRING_ADDR, payload, vec![])
            }
            15 | 16 => {
                let request =
                    [msg::SET_VRING_KICK, msg::SET_VRING_CALL, msg::SET_VRING_ERR][bytes.below(3) as usize];
                let fits = if request == msg::SET_VRING_KICK { KICK + (queue as usize & 1) } else { CALL };
                if bytes.rarely() {
                    return one(request, (u64::from(queue) | NO_FD).to_le_bytes().to_vec(), vec![]);
                }
                one(request, u64::from(queue).to_le_bytes().to_vec(), vec![self.fd(bytes, fits)])
            }
            17 => {
                let (offset, size) = (bytes.u8(), bytes.u8());
                let mut payload = words32(&[offset.into(), size.into(), 0]);
                payload.resize(12 + usize::from(size), bytes.u8());
                one(if bytes.bool() { msg::GET_CONFIG } else { msg::SET_CONFIG }, payload, vec![])
            }
            18 => {
                let mut payload = words64(&[
                    FILE_BYTES >> bytes.below(3),
                    if bytes.rarely() { bytes.u16().into() } else { 0 },
                ]);
                let size = if bytes.rarely() { bytes.u16() } else { 1 << bytes.below(11) };
                payload.extend([bytes.below(6) as u16, size].iter().flat_map(|word| word.to_le_bytes()));
                payload.resize(24, 0);
                match bytes.bool() {
                    true => one(msg::SET_INFLIGHT_FD, payload, vec![self.fd(bytes, REGION)]),
                    false => one(msg::GET_INFLIGHT_FD, payload, vec![]),
                }
            }
            19 => {
                let payload =
                    words64(&[4096 >> bytes.below(8), if bytes.rarely() { bytes.u16().into() } else { 0 }]);
                one(msg::SET_LOG_BASE, payload, vec![self.fd(bytes, 7)])
            }
            20 => {
                let simple = [
                    msg::GET_FEATURES,
                    msg::SET_OWNER,
                    msg::GET_PROTOCOL_FEATURES,
                    msg::GET_QUEUE_NUM,
                    msg::RESET_DEVICE,
                    msg::GET_MAX_MEM_SLOTS,
                ];
                one(simple[bytes.below(6) as usize], vec![], vec![])
            }
            21 => one(msg::SET_BACKEND_REQ_FD, vec![], vec![self.fd(bytes, 6)]),
            // Anything: a number, flags, and a payload of any size.
            _ => {
                let request = if bytes.bool() { bytes.u32() } else { bytes.below(45) as u32 };
                let flags = if bytes.rarely() { bytes.u32() } else { flags };
                let len = bytes.u8();
                let payload = bytes.bytes(len.into()).to_vec();
                let fds = bytes.list(3, |bytes| usize::from(bytes.u8()) % self.fds.len());
                vec![Self::message(request, flags & !1, &payload, fds)]
            }
        }
    }
}
