//! Decodes a chain into a block request (virtio 1.3, 5.2.6).
//!
//! What it is: pure. It reads the header and the ranges from guest memory, each
//! byte once, and judges them against the disk's [`Promise`].
//!
//! What it is not: it does no I/O and writes nothing to the guest.
//!
//! Invariant: the driver decides the framing (virtio 2.7.4.1): the header is
//! the first 16 readable bytes, the status is the last writable byte, the data
//! is what is left, wherever the boundaries are. A [`Request`] is in range.
//!
//! ```text
//!   readable │ type sector │ data out, or ranges │
//!   writable                                     │ data in │ status │
//! ```

use arrayvec::ArrayVec;

use crate::chain::{Segment, Segments};
use crate::complete::Status;
use crate::memory::{GuestMemory, HostSpan, RegionHint};
use crate::pages::PageArray;
use crate::promise::{MAX_RANGE_SECTORS, MAX_RANGES, Promise, SECTOR};
use crate::ring::Head;

/// Bytes of a GET_ID buffer that are padded with zeroes: more than any driver has.
const MAX_ID_BUFFER: u64 = 4096;

const HEADER_BYTES: u32 = 16;
const RANGE_BYTES: usize = 16;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
/// Bit 0 of a range's flags; of WRITE_ZEROES only.
const FLAG_UNMAP: u32 = 1;

/// Bytes of the disk that a DISCARD or WRITE_ZEROES names. In range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes; never 0.
    pub len: u64,
    /// WRITE_ZEROES may free the blocks.
    pub unmap: bool,
}

/// The ranges of one request.
pub type Ranges = ArrayVec<Range, MAX_RANGES>;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Fill the pages from this byte of the disk.
    Read(u64),
    /// Write the pages to this byte of the disk.
    Write(u64),
    /// Make everything completed so far durable.
    Flush,
    /// Write the identity into the pages.
    GetId,
    /// The ranges are not needed any more.
    Discard,
    /// The ranges read as zero from now on.
    WriteZeroes,
}

impl std::fmt::Display for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Read(_) => "a read",
            Self::Write(_) => "a write",
            Self::Flush => "a flush",
            Self::GetId => "a request for the serial number",
            Self::Discard => "a discard",
            Self::WriteZeroes => "a write of zeroes",
        })
    }
}

/// A valid request. Its pages and ranges are in the slot it was decoded into.
#[derive(Debug)]
pub struct Request {
    /// The chain, owed to the driver.
    pub head: Head,
    /// Where the status byte is.
    pub status: HostSpan,
    /// What to do.
    pub command: Command,
    /// Bytes that the driver can have written, the status byte included.
    pub writable: u32,
}

/// A chain that is no valid request, and what the driver gets.
#[derive(Debug)]
pub enum Reject {
    /// A status byte exists, as the last of so many writable bytes: write it.
    Status(Head, HostSpan, Status, u32),
    /// There is nowhere to write a status; used length 0.
    Bare(Head),
}

/// What a request says of itself: VIRTIO_BLK_T_…, and the first sector.
struct Header {
    kind: u32,
    sector: u64,
}

/// A reader over the readable (or writable) bytes of a chain.
struct Bytes<'a> {
    /// What is left: the first segment from its byte `taken` on, and the others.
    segments: &'a [Segment],
    taken: u32,
    left: u64,
}

impl<'a> Bytes<'a> {
    /// Over segments of `bytes` bytes in all.
    fn new(segments: &'a [Segment], bytes: u64) -> Self {
        Self { segments, taken: 0, left: bytes }
    }

    fn left(&self) -> u64 {
        self.left
    }

    /// The next at most `max` bytes that lie in one segment: their guest address
    /// and their number.
    #[inline]
    fn next(&mut self, max: u64) -> Option<(u64, u64)> {
        let (first, others) = self.segments.split_first()?;
        let have = u64::from(first.len - self.taken);
        let at = first.addr.wrapping_add(u64::from(self.taken));
        let take = max.min(have);
        self.left -= take;
        if take == have {
            self.segments = others;
            self.taken = 0;
        } else {
            self.taken += u32::try_from(take).ok()?; // less than the segment's length
        }
        Some((at, take))
    }

    /// The first bytes of all, which most often are a segment of their own.
    #[inline]
    fn header(&mut self, memory: &GuestMemory, hint: &mut RegionHint) -> Option<Header> {
        match self.segments.split_first() {
            Some((first, others)) if first.len == HEADER_BYTES => {
                self.segments = others;
                self.left -= u64::from(HEADER_BYTES);
                let [kind, sector] = memory.read_pair(first.addr, hint).ok()?;
                let [t0, t1, t2, t3, ..] = kind.to_le_bytes();
                Some(Header { kind: u32::from_le_bytes([t0, t1, t2, t3]), sector })
            }
            _ => {
                let mut raw = [0; HEADER_BYTES as usize];
                let whole = self.read(&mut raw, memory, hint);
                let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = raw;
                let kind = u32::from_le_bytes([t0, t1, t2, t3]);
                whole.then_some(Header { kind, sector: u64::from_le_bytes(sector) })
            }
        }
    }

    /// Copies the next `out.len()` bytes; false if there are fewer or they are
    /// not in guest memory.
    #[inline(never)]
    fn read(&mut self, out: &mut [u8], memory: &GuestMemory, hint: &mut RegionHint) -> bool {
        let mut done = 0;
        while done < out.len() {
            let Some((at, got)) = self.next((out.len() - done) as u64) else {
                return false;
            };
            let end = done + usize::try_from(got).unwrap_or(0);
            let Some(part) = out.get_mut(done..end) else {
                return false;
            };
            if memory.read(at, part, hint).is_err() {
                return false;
            }
            done = end;
        }
        true
    }

    /// Translates the next `len` bytes into `pages`; false as in `read`.
    #[inline]
    fn pages(
        &mut self,
        len: u64,
        memory: &GuestMemory,
        hint: &mut RegionHint,
        pages: &mut PageArray,
    ) -> bool {
        // Most often they are a segment of their own, in one region.
        if self.taken == 0
            && let Some(first) = self.segments.first()
            && u64::from(first.len) == len
            && let Some(span) = memory.span(first.addr, len, hint)
        {
            return pages.push(span).is_ok();
        }
        self.all_pages(len, memory, hint, pages)
    }

    /// The same, segment by segment.
    #[inline(never)]
    fn all_pages(
        &mut self,
        len: u64,
        memory: &GuestMemory,
        hint: &mut RegionHint,
        pages: &mut PageArray,
    ) -> bool {
        let mut left = len;
        while left > 0 {
            let Some((at, got)) = self.next(left) else {
                return false;
            };
            let whole = match memory.span(at, got, hint) {
                Some(span) => pages.push(span).is_ok(),
                None => cross_regions(at, got, memory, hint, pages),
            };
            if !whole {
                return false;
            }
            left -= got;
        }
        true
    }
}

/// Translates bytes of a segment that no region has all of; false as in
/// [`Bytes::read`].
fn cross_regions(
    at: u64,
    len: u64,
    memory: &GuestMemory,
    hint: &mut RegionHint,
    pages: &mut PageArray,
) -> bool {
    let mut fits = true;
    memory.translate(at, len, hint, |span| fits &= pages.push(span).is_ok()).is_ok() && fits
}

/// Decodes one chain. `pages` and `ranges` are the slot's, and are overwritten.
///
/// # Errors
/// [`Reject`], which holds the head: nothing was done.
pub fn decode(
    head: Head,
    segments: &Segments,
    disk: &Promise,
    memory: &GuestMemory,
    hint: &mut RegionHint,
    pages: &mut PageArray,
    ranges: &mut Ranges,
) -> Result<Request, Reject> {
    pages.clear();
    ranges.clear();
    let Some(status) = status_address(segments.writable(), memory, hint) else {
        return Err(Reject::Bare(head));
    };
    // A chain has less than 4 GiB.
    let writable = u32::try_from(segments.writable_bytes()).unwrap_or(u32::MAX);
    let mut source = Bytes::new(segments.readable(), segments.readable_bytes());
    let Some(Header { kind, sector }) = source.header(memory, hint) else {
        return Err(Reject::Status(head, status, Status::IoErr, writable));
    };
    let mut sink = Bytes::new(segments.writable(), segments.writable_bytes());
    let sink_len = sink.left() - 1; // the status byte, which was found
    let command = match kind {
        T_IN => in_range(disk, sector, sink_len)
            .filter(|_| sink.pages(sink_len, memory, hint, pages))
            .map(Command::Read)
            .ok_or(Status::IoErr),
        T_OUT => {
            let len = source.left();
            in_range(disk, sector, len)
                .filter(|_| !disk.read_only && source.pages(len, memory, hint, pages))
                .map(Command::Write)
                .ok_or(Status::IoErr)
        }
        T_FLUSH => Ok(Command::Flush),
        T_GET_ID => {
            let len = sink_len.min(MAX_ID_BUFFER);
            if sink.pages(len, memory, hint, pages) { Ok(Command::GetId) } else { Err(Status::IoErr) }
        }
        T_DISCARD if !disk.read_only => {
            read_ranges(&mut source, disk, 0, memory, hint, ranges).map(|()| Command::Discard)
        }
        T_WRITE_ZEROES if !disk.read_only => {
            read_ranges(&mut source, disk, FLAG_UNMAP, memory, hint, ranges).map(|()| Command::WriteZeroes)
        }
        _ => Err(Status::Unsupp),
    };
    match command {
        Ok(command) => Ok(Request { head, status, command, writable }),
        Err(code) => Err(Reject::Status(head, status, code, writable)),
    }
}

/// Where the status byte is: the last writable byte, if it can be written.
fn status_address(writable: &[Segment], memory: &GuestMemory, hint: &mut RegionHint) -> Option<HostSpan> {
    let last = writable.last()?;
    let guest = last.addr.checked_add(u64::from(last.len) - 1)?;
    memory.span(guest, 1, hint)
}

/// The first byte of `len` bytes from `sector` on, if they are whole sectors of
/// the disk.
fn in_range(disk: &Promise, sector: u64, len: u64) -> Option<u64> {
    let end = sector.checked_add(len / SECTOR)?;
    (len.is_multiple_of(SECTOR) && end <= disk.capacity).then_some(sector)?.checked_mul(SECTOR)
}

/// Reads and judges all ranges before any of them is acted on, by the flags that
/// each may have.
fn read_ranges(
    source: &mut Bytes<'_>,
    disk: &Promise,
    known_flags: u32,
    memory: &GuestMemory,
    hint: &mut RegionHint,
    out: &mut Ranges,
) -> Result<(), Status> {
    let bytes = source.left();
    if bytes == 0 || !bytes.is_multiple_of(RANGE_BYTES as u64) {
        return Err(Status::IoErr);
    }
    if bytes > (RANGE_BYTES * MAX_RANGES) as u64 {
        return Err(Status::Unsupp);
    }
    while source.left() > 0 {
        let mut raw = [0; RANGE_BYTES];
        if !source.read(&mut raw, memory, hint) {
            return Err(Status::IoErr);
        }
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = raw;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !known_flags != 0 {
            return Err(Status::Unsupp); // virtio 5.2.6.2
        }
        let len = u64::from(sectors) * SECTOR;
        if sectors > MAX_RANGE_SECTORS {
            return Err(Status::IoErr);
        }
        let offset = in_range(disk, sector, len).ok_or(Status::IoErr)?;
        if len > 0 {
            // Cannot be full: the byte count was checked.
            let _full = out.try_push(Range { offset, len, unmap: flags & FLAG_UNMAP != 0 });
        }
    }
    Ok(())
}
