//! A disk, a guest's memory and range locks made of byte arrays, and the final judgement.
//!
//! What it is: [`World`] moves the bytes of an operation and says at the end whether every
//! byte of the disk and of the memory is what the requests ask for.
//!
//! What it is not: it does not know the machine; [`super::request`] carries its actions out.
//!
//! Invariant: bytes of the disk are odd, those of the guest even, bytes that were never written are
//! [`GARBAGE`]: no byte is right by accident of where it came from.
//!
//! ```text
//!   addresses   MEMORY ─── the guest's ───┐     POOL ─── pool pages, 4096-aligned ───
//! ```

use std::sync::LazyLock;

use arrayvec::ArrayVec;

use crate::backing::{Backing, Discard};
use crate::engine::{Kind, Outcome, Target};
use crate::memory::HostSpan;
use crate::op::action::{Buffer, Submit};
use crate::pages::{MAX_IOVECS, PageArray};
use crate::promise::MAX_RANGES;
use crate::request::{Command, Range, Ranges};

/// The rule that was broken.
pub(super) type Checked<T = ()> = Result<T, &'static str>;

/// Addresses and lengths of the buffers of one operation.
pub(super) type Spans = ArrayVec<(usize, usize), MAX_IOVECS>;

/// Address of the guest's first byte.
const MEMORY: usize = 0x10_0000;
/// Address of a request's first pool page.
const POOL: usize = 0x1000_0000;
/// In pool pages that were not filled, and in buffers of reads that failed.
pub(super) const GARBAGE: u8 = 0xfe;
/// What GET_ID answers.
const SERIAL: &[u8; 20] = b"0123456789abcdefghij";

pub(super) fn must(holds: bool, rule: &'static str) -> Checked {
    if holds { Ok(()) } else { Err(rule) }
}

/// What is on every disk and in every guest's memory at first.
static FIRST: LazyLock<(Vec<u8>, Vec<u8>)> = LazyLock::new(|| {
    let mixed = |i: u32| i.wrapping_add(0x1234).wrapping_mul(0x9e37_79b1).to_le_bytes()[2];
    ((0..1 << 20).map(|i| mixed(i) | 1).collect(), (0..1 << 20).map(|i| (mixed(!i) & 0x7c) | 2).collect())
});

/// Everything that decides how a request is carried out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Disk {
    pub block: u64,
    pub mem_align: u64,
    pub bytes: u64,
    pub fallocate_align: u64,
    pub discard_unit: u64,
    pub dsync: bool,
    pub is_device: bool,
    pub read_only: bool,
    pub write_through: bool,
    pub can_punch: bool,
    pub can_zero_range: bool,
    pub ignores_discard: bool,
    /// The driver changes the cache mode at any time.
    pub mode_changes: bool,
    /// Ranges are locked. False: a planted mistake.
    pub locks_work: bool,
    pub chunk: u64,
    pub chunks: u64,
}

impl Disk {
    /// A file that takes everything, of blocks that are also the alignment of memory.
    pub fn of(block: u64, bytes: u64) -> Self {
        Self {
            block,
            mem_align: block,
            bytes,
            fallocate_align: 1,
            discard_unit: 4096,
            dsync: false,
            is_device: false,
            read_only: false,
            write_through: false,
            can_punch: true,
            can_zero_range: true,
            ignores_discard: false,
            mode_changes: false,
            locks_work: true,
            chunk: block.max(512) * 2,
            chunks: 16,
        }
    }

    fn backing(&self) -> Backing {
        let mut backing = if self.ignores_discard {
            let file =
                rustix::fs::memfd_create("ignores", rustix::fs::MemfdFlags::CLOEXEC).expect("a file").into();
            Backing::of(&file, "ignores".into(), false, false, Discard::Ignore)
        } else {
            Backing::nowhere(self.mem_align)
        };
        backing.block = self.block;
        backing.fallocate_align = self.fallocate_align;
        backing.discard_unit = self.discard_unit;
        backing.dsync = self.dsync;
        backing.is_device = self.is_device;
        backing.read_only = self.read_only;
        backing.resized(self.bytes);
        if !self.can_punch {
            backing.cannot_punch();
        }
        if !self.can_zero_range {
            backing.cannot_zero_range();
        }
        backing
    }
}

/// What the driver asks for.
#[derive(Debug)]
pub(super) struct Asked {
    pub command: Command,
    pub pages: PageArray,
    pub ranges: Ranges,
}

impl Asked {
    /// A request with a payload: runs of (offset in the guest's memory, length).
    pub fn payload(command: Command, runs: &[(usize, usize)]) -> Self {
        let mut pages = PageArray::default();
        for &(offset, len) in runs {
            pages.push(HostSpan::new(MEMORY + offset, len)).expect("few runs");
        }
        Self { command, pages, ranges: Ranges::new() }
    }

    pub fn ranges(command: Command, ranges: &[(u64, u64, bool)]) -> Self {
        let ranges = ranges.iter().map(|&(offset, len, unmap)| Range { offset, len, unmap }).collect();
        Self { command, pages: PageArray::default(), ranges }
    }

    /// The bytes of the disk that it names.
    pub fn parts(&self) -> ArrayVec<(u64, u64), MAX_RANGES> {
        match self.command {
            Command::Read(at) | Command::Write(at) => [(at, self.pages.len())].into_iter().collect(),
            Command::Flush | Command::GetId => ArrayVec::new(),
            Command::Discard | Command::WriteZeroes => {
                self.ranges.iter().map(|range| (range.offset, range.len)).collect()
            }
        }
    }

    fn memory_end(&self) -> usize {
        self.pages.runs().iter().map(|run| run.end() - MEMORY).max().unwrap_or(0)
    }
}

/// The byte arrays.
#[derive(Debug)]
pub(super) struct World {
    pub disk: Disk,
    pub backing: Backing,
    pub write_through: bool,
    pub free_chunks: u64,
    /// Whose, from, to.
    pub locks: Vec<(usize, u64, u64)>,
    file: Vec<u8>,
    memory: Vec<u8>,
}

impl World {
    pub fn new<'a>(disk: &Disk, all: impl IntoIterator<Item = &'a Asked>) -> Self {
        let end = all.into_iter().map(Asked::memory_end).max().unwrap_or(0);
        Self {
            disk: *disk,
            backing: disk.backing(),
            write_through: disk.write_through,
            free_chunks: disk.chunks,
            locks: Vec::new(),
            file: FIRST.0[..disk.bytes as usize].to_vec(),
            memory: FIRST.1[..end + 64].to_vec(),
        }
    }

    /// The memory of an operation as the worker names it to an engine.
    pub fn spans(&self, submit: &Submit, pages: &PageArray) -> Checked<Spans> {
        let mut spans = Spans::new();
        let mut too_many = false;
        match submit.buffer {
            Buffer::Guest(from) => pages.spans(from, submit.len, |span| {
                too_many |= spans.try_push((span.addr(), span.len())).is_err();
            }),
            Buffer::Pool => spans.push((POOL, submit.len as usize)),
            Buffer::Zeroes => too_many = submit.len.div_ceil(self.disk.chunk) > MAX_IOVECS as u64,
            Buffer::Nothing => {}
        }
        must(!too_many, "an operation has no more buffers than the kernel takes")?;
        Ok(spans)
    }

    /// The bytes at an address, which are the guest's or a pool page's.
    fn bytes<'a>(memory: &'a mut [u8], pool: &'a mut [u8], addr: usize, len: usize) -> &'a mut [u8] {
        match addr.checked_sub(POOL) {
            Some(at) => &mut pool[at..at + len],
            None => &mut memory[addr - MEMORY..][..len],
        }
    }

    /// Moves the bytes of an operation that ends with `outcome`. One that failed on the way
    /// has moved the half of it, and what a read did not fill is garbage.
    pub fn carry(&mut self, submit: &Submit, spans: &[(usize, usize)], pool: &mut [u8], outcome: Outcome) {
        let half = submit.len / 2;
        let (metadata, moved) = match (outcome, submit.kind) {
            (Outcome::Moved(_), Kind::Fallocate(_) | Kind::Discard) => (true, submit.len),
            (Outcome::Moved(bytes), _) => (false, bytes),
            (Outcome::Failed(libc::EIO | libc::ENOSPC), kind) => {
                (matches!(kind, Kind::Fallocate(_) | Kind::Discard), half)
            }
            _ => return,
        };
        let (start, moved) = (submit.offset as usize, moved as usize);
        if metadata || submit.buffer == Buffer::Zeroes {
            self.file[start..start + moved].fill(0);
            return;
        }
        let mut done = 0;
        for &(addr, len) in spans {
            let bytes = Self::bytes(&mut self.memory, pool, addr, len);
            let now = len.min(moved - done);
            let on_disk = &mut self.file[start + done..][..now];
            if submit.kind == Kind::Read {
                bytes[..now].copy_from_slice(on_disk);
                bytes[now..].fill(GARBAGE);
                if matches!(outcome, Outcome::Failed(_)) {
                    bytes.fill(GARBAGE);
                }
            } else {
                on_disk.copy_from_slice(&bytes[..now]);
            }
            done += now;
        }
    }

    /// Copies between bytes of a payload and pool pages.
    pub fn copy(&mut self, pages: &PageArray, from: u64, pool: &mut [u8], to_guest: bool) {
        let mut done = 0;
        pages.spans(from, pool.len() as u64, |span| {
            let guest = &mut self.memory[span.addr() - MEMORY..][..span.len()];
            let pool = &mut pool[done..done + span.len()];
            if to_guest {
                guest.copy_from_slice(pool)
            } else {
                pool.copy_from_slice(guest)
            }
            done += span.len();
        });
    }

    pub fn write_serial(&mut self, pages: &PageArray) {
        let mut serial = SERIAL.to_vec();
        serial.resize(pages.len() as usize, 0);
        self.copy(pages, 0, &mut serial, true);
    }

    /// The disk and the memory against what these requests, which share no byte, make of
    /// them. Each is given with whether it was answered Ok.
    pub fn judge(&self, requests: &[(&Asked, bool)]) -> Checked {
        let mut file = FIRST.0[..self.file.len()].to_vec();
        let mut memory = FIRST.1[..self.memory.len()].to_vec();
        for &(asked, ok) in requests {
            let reads = matches!(asked.command, Command::Read(_) | Command::GetId);
            if reads {
                let mut want = match asked.command {
                    Command::Read(at) => file[at as usize..][..asked.pages.len() as usize].to_vec(),
                    _ => SERIAL.to_vec(),
                };
                want.resize(asked.pages.len() as usize, 0);
                let mut done = 0;
                asked.pages.spans(0, asked.pages.len(), |span| {
                    let at = span.addr() - MEMORY..span.end() - MEMORY;
                    let want = if ok { &want[done..done + span.len()] } else { &self.memory[at.clone()] };
                    memory[at].copy_from_slice(want);
                    done += span.len();
                });
                continue;
            }
            let mut payload = Vec::new();
            asked.pages.spans(0, asked.pages.len(), |span| {
                payload.extend_from_slice(&FIRST.1[span.addr() - MEMORY..][..span.len()]);
            });
            for (start, len) in asked.parts() {
                payload.resize(len as usize, 0); // zeroes, unless it is a write
                let at = start as usize..(start + len) as usize;
                let (want, got) = (&mut file[at.clone()], &self.file[at]);
                if ok && asked.command != Command::Discard {
                    want.copy_from_slice(&payload);
                } else {
                    must(each_is_one_of(got, want, &payload), "what failed left old bytes or new ones")?;
                    want.copy_from_slice(got);
                }
            }
        }
        must(file == self.file, "the disk holds exactly what was written")?;
        must(memory == self.memory, "the memory holds exactly what was read")
    }
}

fn each_is_one_of(got: &[u8], old: &[u8], new: &[u8]) -> bool {
    let parts = got.chunks(512).zip(old.chunks(512).zip(new.chunks(512)));
    parts.into_iter().all(|(got, (old, new))| {
        let mut bytes = got.iter().zip(old.iter().zip(new));
        got == old || got == new || bytes.all(|(got, (old, new))| got == old || got == new)
    })
}

/// True if an operation of this target and kind moves bytes between memory and the disk.
pub(super) fn is_direct(submit: &Submit) -> bool {
    submit.target == Target::Disk && matches!(submit.kind, Kind::Read | Kind::Write { .. })
}
