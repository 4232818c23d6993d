//! The file of state, as it lies in memory: two states, of which one counts, and a
//! message.
//!
//! What it is: how the file begins ([`Header`]), and reading all of it.
//!
//! What it is not: it does not know when what is written.
//!
//! Invariant: the header is written in one piece, and names only what was written
//! before it.
//!
//! ```text
//!   0       header │ 64 tries, sync failed
//!   4096    a state, another state, the message and the numbers of its descriptors
//!   STATS   the counters, which workers write themselves
//!   MARKS   what is known of a server, which engines write themselves
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::FdId;

/// Bytes of a state, and of a message: 256 queues and 509 regions need a third.
const MOST: u64 = 512 << 10;

/// Where the counters are ([`crate::stats`]), and their bytes.
pub const STATS: u64 = 4096 + 3 * MOST;
/// See [`STATS`].
pub const STATS_BYTES: usize = crate::stats::AREA;

/// Where it is noted how much a server was given and how much of that it has made durable ([`crate::nbd::marks`]), and whether a
/// guest relies on a cluster's lock ([`crate::rbd::held`]); and its bytes.
pub const MARKS: u64 = (STATS + STATS_BYTES as u64).next_multiple_of(4096);
/// See [`MARKS`].
pub const MARKS_BYTES: u64 = 4096;

/// How far a message has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// There is none.
    #[default]
    Idle = 0,
    /// Some of it may have been read from the socket.
    Reading = 1,
    /// It is whole, and not carried out.
    Received = 2,
    /// It is carried out; its reply may be out.
    Replying = 3,
}

impl Phase {
    fn of(byte: u8) -> Option<Self> {
        [Self::Idle, Self::Reading, Self::Received, Self::Replying].into_iter().find(|p| *p as u8 == byte)
    }
}

/// A message that was not carried out.
#[derive(Debug, Default)]
pub struct Pending {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its descriptors, as they are kept.
    pub fds: Vec<FdId>,
}

/// How the file of state begins. Written in one piece, which a kill cannot split.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Header {
    pub(super) phase: Phase,
    /// Which of the two states counts, and their lengths.
    pub(super) active: u8,
    pub(super) len: [u32; 2],
    pub(super) message: u32,
    pub(super) fds: u32,
}

impl Header {
    const BYTES: usize = 20;
    /// Another layout has another number.
    const VERSION: u8 = 1;

    pub(super) fn bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&[b'v', Self::VERSION, self.phase as u8, self.active]);
        let words = [self.len[0], self.len[1], self.message, self.fds];
        for (to, word) in bytes[4..].chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn parse(bytes: [u8; Self::BYTES]) -> Option<Self> {
        let [b'v', Self::VERSION, phase, active @ (0 | 1), words @ ..] = bytes else { return None };
        let mut words = words.chunks_exact(4).map(|w| w.iter().rfold(0, |n, &b| n << 8 | u32::from(b)));
        let mut word = || words.next().filter(|&n| u64::from(n) <= MOST);
        Some(Self {
            phase: Phase::of(phase)?,
            active,
            len: [word()?, word()?],
            message: word()?,
            fds: word()?,
        })
    }

    pub(super) fn at(self, slot: u8) -> u64 {
        4096 + u64::from(slot) * MOST
    }
}

/// Where a message is in the file, behind the two states.
pub(super) const MESSAGE: u8 = 2;
/// Where it says how many daemons have begun to carry out the message, and whether
/// an fdatasync failed. Bytes that do not have to agree with the header.
pub(super) const AT_TRIES: u64 = 64;
pub(super) const AT_SYNC_FAILED: u64 = 65;

pub(super) fn length(bytes: &[u8]) -> io::Result<u32> {
    u32::try_from(bytes.len())
        .ok()
        .filter(|&n| u64::from(n) <= MOST)
        .ok_or_else(|| io::Error::other("the state is too large to be kept"))
}

/// The header, the state that counts, and the message.
pub(super) fn load(file: &File) -> io::Result<(Header, Vec<u8>, Option<Pending>)> {
    let mut bytes = [0; Header::BYTES];
    file.read_exact_at(&mut bytes, 0)?;
    let header = Header::parse(bytes)
        .ok_or_else(|| io::Error::other("what an earlier vublkd left is of another version"))?;
    let read = |at: u64, len: u32| -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    };
    let len = header.len.get(usize::from(header.active)).copied().unwrap_or(0);
    let state = read(header.at(header.active), len)?;
    let pending = if header.phase == Phase::Received {
        let at = header.at(MESSAGE);
        let numbers = read(at + u64::from(header.message), header.fds)?;
        let number = |w: &[u8]| w.iter().rfold(0, |n, &b| n << 8 | u32::from(b));
        Some(Pending { bytes: read(at, header.message)?, fds: numbers.chunks_exact(4).map(number).collect() })
    } else {
        None
    };
    Ok((header, state, pending))
}
