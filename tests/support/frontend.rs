//! The tests' own vhost-user front-end: it writes the bytes of every message
//! itself, so it can also write wrong ones, half ones and ones with too many
//! descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::memory::{Memory, Region};
use super::sys::{Deadline, PATIENCE};

/// Request numbers of the protocol.
pub mod msg {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// Virtio feature bits.
pub mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_PACKED: u64 = 1 << 34;
}

/// Protocol feature bits.
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const INBAND_NOTIFICATIONS: u64 = 1 << 14;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;

    /// What a front-end that knows all takes of what vublkd offers.
    pub const WANTED: u64 = MQ
        | REPLY_ACK
        | CONFIG
        | CONFIGURE_MEM_SLOTS
        | INFLIGHT_SHMFD
        | BACKEND_REQ
        | LOG_SHMFD
        | RESET_DEVICE;
}

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// In the number of SET_VRING_KICK and its kin: no descriptor comes along.
pub const NO_FD: u64 = 1 << 8;

pub type Fds<'a> = &'a [BorrowedFd<'a>];

/// A message that came back.
#[derive(Debug)]
pub struct Answer {
    pub request: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

/// One connection.
pub struct Frontend {
    pub socket: UnixStream,
    /// Set once REPLY_ACK is acked: every command then asks for an answer.
    pub acks: bool,
}

/// A message as it goes over the wire.
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    [request, flags, size].iter().flat_map(|word| word.to_le_bytes()).chain(payload.iter().copied()).collect()
}

/// Numbers as a payload.
pub fn words32(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn words64(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Frontend {
    pub fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { socket, acks: false }
    }

    /// Sends any bytes with any descriptors.
    pub fn send_bytes(&self, bytes: &[u8], fds: Fds<'_>) -> io::Result<()> {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        assert_eq!(sent, bytes.len(), "a message went out in part");
        Ok(())
    }

    pub fn send(&self, request: u32, flags: u32, payload: &[u8], fds: Fds<'_>) -> io::Result<()> {
        self.send_bytes(&message(request, VERSION | flags, payload), fds)
    }

    /// The next message of the back-end. `UnexpectedEof`: it hung up;
    /// `WouldBlock`: it said nothing in time.
    pub fn receive(&self) -> io::Result<Answer> {
        let mut fds = Vec::new();
        let head = self.receive_exact(12, &mut fds)?;
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        let size = usize::try_from(word(8)).unwrap();
        assert!(size <= 1 << 16, "an answer of {size} bytes");
        let payload = self.receive_exact(size, &mut fds)?;
        Ok(Answer { request: word(0), flags: word(4), payload, fds })
    }

    fn receive_exact(&self, len: usize, fds: &mut Vec<OwnedFd>) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut have = 0;
        while have < len {
            let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            // A wait with a time-out is interrupted by anything, such as the end of a child.
            let got = retry_on_intr(|| {
                recvmsg(
                    &self.socket,
                    &mut [IoSliceMut::new(&mut bytes[have..])],
                    &mut control,
                    RecvFlags::CMSG_CLOEXEC,
                )
            })?;
            for item in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = item {
                    fds.extend(received);
                }
            }
            if got.bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            have += got.bytes;
        }
        Ok(bytes)
    }

    /// A message that has an answer of its own.
    pub fn ask(&self, request: u32, payload: &[u8]) -> io::Result<Vec<u8>> {
        self.send(request, 0, payload, &[])?;
        let answer = self.receive()?;
        assert_eq!(answer.request, request, "the answer is to another message");
        assert_eq!(answer.flags, VERSION | REPLY, "flags of the answer");
        assert!(answer.fds.is_empty(), "an answer with descriptors");
        Ok(answer.payload)
    }

    pub fn ask64(&self, request: u32) -> u64 {
        let payload = self.ask(request, &[]).unwrap();
        u64::from_le_bytes(payload.try_into().unwrap())
    }

    /// A command. With REPLY_ACK it waits for the answer and hands back its
    /// number (0 is success).
    pub fn command(&self, request: u32, payload: &[u8], fds: Fds<'_>) -> io::Result<u64> {
        if !self.acks {
            self.send(request, 0, payload, fds)?;
            return Ok(0);
        }
        self.send(request, NEED_REPLY, payload, fds)?;
        let answer = self.receive()?;
        assert_eq!(answer.request, request, "the answer is to another message");
        assert_eq!(answer.flags & REPLY, REPLY, "flags of the answer");
        Ok(u64::from_le_bytes(answer.payload.try_into().unwrap()))
    }

    /// A command that has to work.
    #[track_caller]
    pub fn tell(&self, request: u32, payload: &[u8], fds: Fds<'_>) {
        match self.command(request, payload, fds) {
            Ok(0) => {}
            Ok(code) => panic!("message {request} was refused with {code}"),
            Err(error) => panic!("message {request}: {error}"),
        }
    }

    #[track_caller]
    pub fn tell64(&self, request: u32, value: u64) {
        self.tell(request, &value.to_le_bytes(), &[]);
    }

    #[track_caller]
    pub fn vring_state(&self, request: u32, queue: u32, number: u32) {
        self.tell(request, &words32(&[queue, number]), &[]);
    }

    #[track_caller]
    pub fn vring_fd(&self, request: u32, queue: u32, fd: impl AsFd) {
        self.tell(request, &u64::from(queue).to_le_bytes(), &[fd.as_fd()]);
    }

    /// Stops a queue; the answer is where it stands.
    pub fn vring_base(&self, queue: u32) -> io::Result<u16> {
        let answer = self.ask(msg::GET_VRING_BASE, &words32(&[queue, 0]))?;
        assert_eq!(answer.len(), 8);
        assert_eq!(answer[..4], queue.to_le_bytes(), "queue in the answer");
        let base = u32::from_le_bytes(answer[4..].try_into().unwrap());
        Ok(u16::try_from(base).unwrap())
    }

    /// Answers may take this long from now on, in place of [`PATIENCE`].
    pub fn wait_for_answers(&self, time: Duration) {
        self.socket.set_read_timeout(Some(time)).unwrap();
    }

    /// `size` bytes of configuration from `offset`.
    pub fn config(&self, offset: u32, size: u32) -> io::Result<Vec<u8>> {
        let mut payload = words32(&[offset, size, 0]);
        payload.resize(12 + usize::try_from(size).unwrap(), 0);
        let mut answer = self.ask(msg::GET_CONFIG, &payload)?;
        assert!(answer.len() >= 12, "a configuration without its header");
        Ok(answer.split_off(12))
    }

    #[track_caller]
    pub fn set_config(&self, offset: u32, bytes: &[u8]) {
        let mut payload = words32(&[offset, u32::try_from(bytes.len()).unwrap(), 0]);
        payload.extend_from_slice(bytes);
        self.tell(msg::SET_CONFIG, &payload, &[]);
    }

    #[track_caller]
    pub fn set_mem_table(&self, memory: &Memory) {
        let told = self.try_mem_table(memory);
        assert!(matches!(told, Ok(0)), "the memory table was refused: {told:?}");
    }

    /// The memory table; gives the answer.
    pub fn try_mem_table(&self, memory: &Memory) -> io::Result<u64> {
        let regions = &memory.regions;
        let mut payload = words32(&[u32::try_from(regions.len()).unwrap(), 0]);
        for region in regions {
            payload.extend(region_words(region));
        }
        let fds: Vec<_> = regions.iter().map(|region| region.file.as_fd()).collect();
        self.command(msg::SET_MEM_TABLE, &payload, &fds)
    }

    #[track_caller]
    pub fn add_region(&self, region: &Region) {
        self.tell(msg::ADD_MEM_REG, &single_region(region), &[region.file.as_fd()]);
    }

    #[track_caller]
    pub fn remove_region(&self, region: &Region) {
        self.tell(msg::REM_MEM_REG, &single_region(region), &[]);
    }

    /// Waits until everything sent so far was looked at: messages are
    /// answered in order.
    #[track_caller]
    pub fn sync(&self) {
        self.ask64(msg::GET_FEATURES);
    }

    /// Whether the back-end has hung up already.
    pub fn hung_up(&self) -> bool {
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        !matches!(
            rustix::net::recv(&self.socket, &mut byte, flags),
            Ok((1.., _)) | Err(rustix::io::Errno::AGAIN)
        )
    }

    /// Waits for the back-end to hang up.
    #[track_caller]
    pub fn wait_hangup(&self, what: &str) {
        self.wait_hangup_within(PATIENCE, what);
    }

    #[track_caller]
    pub fn wait_hangup_within(&self, patience: Duration, what: &str) {
        let deadline = Deadline::within(patience, format!("the back-end to hang up: {what}"));
        loop {
            deadline.readable(&self.socket);
            let mut byte = [0];
            match rustix::io::read(&self.socket, &mut byte) {
                Ok(0) | Err(rustix::io::Errno::CONNRESET | rustix::io::Errno::PIPE) => return,
                Ok(_) => {}
                Err(error) => panic!("{what}: {error}"),
            }
        }
    }
}

fn region_words(region: &Region) -> Vec<u8> {
    words64(&[region.guest, region.len, region.user, region.offset])
}

/// Payload of ADD_MEM_REG and REM_MEM_REG.
pub fn single_region(region: &Region) -> Vec<u8> {
    let mut payload = words64(&[0]);
    payload.extend(region_words(region));
    payload
}
