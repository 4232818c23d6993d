//! The in-flight region as a front-end keeps it: asked for, not mapped
//! but read as a file, and given to the next back-end.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::frontend::{Frontend, msg};

/// See the head of the file.
pub struct Inflight {
    pub file: File,
    /// The 24 bytes that describe it.
    pub description: Vec<u8>,
    stride: u64,
    size: u16,
}

impl Inflight {
    /// Asks the back-end for a region.
    #[track_caller]
    pub fn ask(frontend: &Frontend, queues: u16, size: u16) -> Self {
        frontend.send(msg::GET_INFLIGHT_FD, 0, &describe(0, 0, queues, size), &[]).unwrap();
        let mut answer = frontend.receive().unwrap();
        assert_eq!((answer.request, answer.payload.len()), (msg::GET_INFLIGHT_FD, 24));
        assert_eq!(answer.fds.len(), 1, "one descriptor for the region");
        let file = File::from(answer.fds.remove(0));
        let stride = (16 + 16 * u64::from(size)).next_multiple_of(64);
        let mmap_size = u64::from_ne_bytes(answer.payload[..8].try_into().unwrap());
        assert!(mmap_size >= stride * u64::from(queues), "{mmap_size} bytes for {queues} queues of {size}");
        assert_eq!(file.metadata().unwrap().len(), mmap_size);
        Self { file, description: answer.payload, stride, size }
    }

    /// Gives it to a back-end.
    #[track_caller]
    pub fn give(&self, frontend: &Frontend) {
        frontend.tell(msg::SET_INFLIGHT_FD, &self.description, &[self.file.as_fd()]);
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// Heads of a queue that are marked.
    pub fn marked(&self, queue: u16) -> Vec<u16> {
        let start = self.stride * u64::from(queue) + 16;
        (0..self.size).filter(|&at| self.read::<1>(start + 16 * u64::from(at)) != [0]).collect()
    }

    /// `used_idx` of a queue.
    pub fn used_idx(&self, queue: u16) -> u16 {
        u16::from_ne_bytes(self.read(self.stride * u64::from(queue) + 14))
    }
}

/// The payload of both messages: bytes, offset, queues, descriptors of each.
pub fn describe(bytes: u64, offset: u64, queues: u16, size: u16) -> Vec<u8> {
    let mut payload = bytes.to_ne_bytes().to_vec();
    payload.extend(offset.to_ne_bytes());
    payload.extend(queues.to_ne_bytes());
    payload.extend(size.to_ne_bytes());
    payload.resize(24, 0);
    payload
}
