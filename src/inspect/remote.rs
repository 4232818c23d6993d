//! What `vublk inspect` reports of a disk of an NBD server.
//!
//! What it is: a [`Report`] as text or JSON; its extents are counted with `NBD_CMD_BLOCK_STATUS`.
//!
//! What it is not: the daemon's client, which an engine drives; this one asks, waits, and asks again.
//!
//! Invariants: nothing is written. Each step ends within its time, whatever the server sends, and holds one reply in memory.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use serde::Serialize;
use thiserror::Error;

use crate::nbd::connect::{self, Stream};
use crate::nbd::handshake::{Export, HandshakeError, negotiate};
use crate::nbd::uri::Uri;
use crate::nbd::wire::{
    self, CHUNK_BYTES, ChunkKind, Command, Head, SIMPLE_REPLY_BYTES, Violation, block_status, errno,
    error_of, request,
};

/// [`Report::kind`].
pub const EXPORT: &str = "NBD export";

/// How long connecting takes at most; the same time for the handshake.
const CONNECT: Duration = Duration::from_secs(5);
/// How long extents are counted.
const COUNT: Duration = Duration::from_secs(10);
/// Bytes of the export whose extents are counted.
const COUNTED: u64 = 64 << 30;
/// Requests for extents, at most.
const REQUESTS: u64 = 100_000;
/// Bytes of one request for extents; a multiple of every block.
const STEP: u64 = 1 << 30;
/// Chunks in the answer to one request, at most.
const CHUNKS: usize = 16;

/// An export, in the names of `vublk inspect --json`.
#[derive(Clone, Debug, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "each of them is one flag of the protocol")]
pub struct Report {
    /// The URI.
    pub path: String,
    /// [`EXPORT`].
    pub kind: &'static str,
    /// Bytes.
    pub size: u64,
    /// Offsets and lengths of requests are multiples of this, bytes.
    pub minimum_block: u32,
    /// Below it requests are slower, bytes.
    pub preferred_block: u32,
    /// Longest read or write, bytes.
    pub maximum_request: u32,
    /// Writes fail.
    pub read_only: bool,
    /// `NBD_CMD_FLUSH`.
    pub flush: bool,
    /// `NBD_CMD_FLAG_FUA`.
    pub fua: bool,
    /// `NBD_CMD_TRIM`.
    pub trim: bool,
    /// `NBD_CMD_WRITE_ZEROES`.
    pub write_zeroes: bool,
    /// `NBD_CMD_FLAG_FAST_ZERO`.
    pub fast_zero: bool,
    /// A flush on one connection is one for all.
    pub multi_conn: bool,
    /// Structured replies.
    pub structured_replies: bool,
    /// What of the export is allocated.
    #[serde(flatten)]
    pub allocation: Allocation,
}

/// Extents of an export by `base:allocation`, bytes. `None` is unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Allocation {
    /// So many from the beginning on were looked at.
    pub counted_bytes: u64,
    /// That is the whole export.
    pub counted_whole: bool,
    /// Of these: takes room on the server's disk.
    pub allocated_bytes: Option<u64>,
    /// Of these: reads as zeroes, allocated or not.
    pub zero_bytes: Option<u64>,
    /// Why no more was counted.
    pub allocation_error: Option<String>,
}

/// Why there is no report.
#[derive(Debug, Error)]
pub enum RemoteError {
    /// The host has no address.
    #[error("the host of {uri} was not found: {source}")]
    Resolve {
        /// What was asked for.
        uri: String,
        /// Why.
        source: io::Error,
    },
    /// No connection.
    #[error("{uri}: no connection to the NBD server: {}", in_words(.source))]
    Connect {
        /// What was asked for.
        uri: String,
        /// Why.
        source: io::Error,
    },
    /// The server was reached.
    #[error("{uri}: {source}")]
    Handshake {
        /// What was asked for.
        uri: String,
        /// Why.
        source: HandshakeError,
    },
}

fn in_words(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::NotFound => "there is no such socket; is the server running?".into(),
        ErrorKind::ConnectionRefused => "nothing listens there; is the server running?".into(),
        ErrorKind::TimedOut => format!("it did not answer within {} s", CONNECT.as_secs()),
        ErrorKind::PermissionDenied => "this user may not open the socket".into(),
        _ => error.to_string(),
    }
}

/// Why counting ended early.
#[derive(Debug, Error)]
enum CountError {
    #[error("{}", of_count(.0))]
    Io(#[from] io::Error),
    #[error(transparent)]
    Violation(#[from] Violation),
    #[error("the server answered with an error: {}", io::Error::from_raw_os_error(errno(*.0)))]
    Refused(u32),
    #[error("the server answered something else")]
    Nonsense,
}

fn of_count(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => stopped_after_its_time(),
        ErrorKind::UnexpectedEof => "the server closed the connection".into(),
        _ => error.to_string(),
    }
}

fn stopped_after_its_time() -> String {
    format!("counting stopped after {} s", COUNT.as_secs())
}

/// Connects to an export, and finds out what is to be told of it. `counts`: what is allocated, too, which may take a while.
///
/// # Errors
/// When there is no connection, or the server does not give the export.
pub fn inspect(uri: &Uri, counts: bool) -> Result<Report, RemoteError> {
    let name = || uri.to_string();
    let peers =
        connect::resolve(&uri.address).map_err(|source| RemoteError::Resolve { uri: name(), source })?;
    let mut stream =
        connect::connect(&peers, CONNECT).map_err(|source| RemoteError::Connect { uri: name(), source })?;
    let export = negotiate(&mut stream.until(Instant::now() + CONNECT), &uri.export, counts)
        .map_err(|source| RemoteError::Handshake { uri: name(), source })?;
    let allocation = if counts { allocation(&mut stream, &export) } else { Allocation::default() };
    // The server may be gone; there is no reply to it.
    let _sent = stream.until(Instant::now() + CONNECT).write_all(&request(Command::Disconnect, 0, 0, 0));
    let flags = export.flags;
    Ok(Report {
        path: uri.to_string(),
        kind: EXPORT,
        size: export.size,
        minimum_block: export.block.minimum,
        preferred_block: export.block.preferred,
        maximum_request: export.block.maximum,
        read_only: flags.read_only(),
        flush: flags.can_flush(),
        fua: flags.can_fua(),
        trim: flags.can_trim(),
        write_zeroes: flags.can_write_zeroes(),
        fast_zero: flags.can_fast_zero(),
        multi_conn: flags.can_multi_conn(),
        structured_replies: export.structured,
        allocation,
    })
}

fn allocation(stream: &mut Stream, export: &Export) -> Allocation {
    let Some(context) = export.allocation else {
        let why = "the server does not tell (base:allocation)";
        return Allocation { allocation_error: Some(why.into()), ..Allocation::default() };
    };
    let end = Instant::now() + COUNT;
    // What is behind the last whole block cannot be asked for.
    let usable = export.size - export.size % u64::from(export.block.minimum);
    let limit = usable.min(COUNTED);
    let (mut at, mut allocated, mut zero, mut error) = (0, 0, 0, None);
    for cookie in 0..REQUESTS {
        if at >= limit {
            break;
        }
        if Instant::now() >= end {
            error = Some(stopped_after_its_time());
            break;
        }
        let asked = (limit - at).min(STEP);
        match extents(&mut stream.until(end), context, (cookie, at, asked)) {
            Ok(counted) => {
                at += counted.bytes;
                allocated += counted.allocated;
                zero += counted.zero;
            }
            Err(e) => {
                error = Some(e.to_string());
                break;
            }
        }
    }
    let counted_whole = at == usable;
    if !counted_whole && error.is_none() {
        error = Some(if at == limit {
            format!("no more than {} GiB are counted", COUNTED >> 30)
        } else {
            format!("counting stopped after {REQUESTS} requests")
        });
    }
    Allocation {
        counted_bytes: at,
        counted_whole,
        allocated_bytes: (at > 0 || counted_whole).then_some(allocated),
        zero_bytes: (at > 0 || counted_whole).then_some(zero),
        allocation_error: error,
    }
}

/// Sums over extents, bytes.
#[derive(Debug, Default)]
struct Counted {
    bytes: u64,
    allocated: u64,
    zero: u64,
}

/// Asks for the extents of a range, and counts as many of them as the server tells, at least one. The range is cookie,
/// offset, and bytes, at most [`STEP`].
fn extents(
    stream: &mut (impl Read + Write),
    context: u32,
    (cookie, at, asked): (u64, u64, u64),
) -> Result<Counted, CountError> {
    let len = u32::try_from(asked).map_err(|_| CountError::Nonsense)?;
    stream.write_all(&request(Command::BlockStatus, cookie, at, len))?;
    let mut counted = Counted::default();
    for _ in 0..CHUNKS {
        let (done, kind, len) = match reply(stream)? {
            Head::Simple { error, cookie: of } if error != 0 && of == cookie => {
                return Err(CountError::Refused(error));
            }
            Head::Chunk { done, kind, cookie: of, len } if of == cookie => (done, kind, len),
            _ => return Err(CountError::Nonsense),
        };
        match kind {
            ChunkKind::None => {}
            ChunkKind::BlockStatus => {
                let bytes = payload(stream, len)?;
                let (of, extents) = block_status(&bytes)?;
                if of == context {
                    extents.for_each(|extent| {
                        let bytes = u64::from(extent.len).min(asked - counted.bytes);
                        counted.bytes += bytes;
                        counted.allocated += if extent.is_hole { 0 } else { bytes };
                        counted.zero += if extent.reads_zero { bytes } else { 0 };
                    });
                }
            }
            ChunkKind::Error | ChunkKind::ErrorAt => {
                return Err(CountError::Refused(error_of(&payload(stream, len)?)?));
            }
            ChunkKind::Data | ChunkKind::Hole => return Err(CountError::Nonsense),
        }
        if done {
            return if counted.bytes == 0 { Err(CountError::Nonsense) } else { Ok(counted) };
        }
    }
    Err(CountError::Nonsense)
}

/// A chunk's payload; [`wire::head`] has bounded its length for the kinds that are read.
fn payload(stream: &mut impl Read, len: u32) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if stream.take(len.into()).read_to_end(&mut bytes)? < len as usize {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

/// The fixed part of the next reply.
fn reply(stream: &mut impl Read) -> Result<Head, CountError> {
    let mut bytes = [0; CHUNK_BYTES];
    stream.read_exact(&mut bytes[..SIMPLE_REPLY_BYTES])?;
    if let Some((head, _)) = wire::head(&bytes[..SIMPLE_REPLY_BYTES])? {
        return Ok(head);
    }
    stream.read_exact(&mut bytes[SIMPLE_REPLY_BYTES..])?;
    wire::head(&bytes)?.map(|(head, _)| head).ok_or(CountError::Nonsense)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let yes = |on| if on { "yes" } else { "no" };
        writeln!(f, "{}: {}, {} bytes", self.path, self.kind, self.size)?;
        writeln!(
            f,
            "requests           in multiples of {} bytes, best of {}, up to {}",
            self.minimum_block, self.preferred_block, self.maximum_request
        )?;
        writeln!(f, "read-only          {}", yes(self.read_only))?;
        writeln!(f, "flush              {}", yes(self.flush))?;
        writeln!(f, "durable writes     {}", if self.fua { "FUA" } else { "no FUA" })?;
        writeln!(f, "trim               {}", yes(self.trim))?;
        writeln!(f, "write zeroes       {}, fast zero: {}", yes(self.write_zeroes), yes(self.fast_zero))?;
        writeln!(f, "multi-conn         {}", yes(self.multi_conn))?;
        writeln!(f, "replies            {}", if self.structured_replies { "structured" } else { "simple" })?;
        self.allocation.fmt(f)
    }
}

impl fmt::Display for Allocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = self.allocation_error.as_deref().unwrap_or_default();
        let (Some(allocated), Some(zero)) = (self.allocated_bytes, self.zero_bytes) else {
            return writeln!(f, "allocated          unknown: {why}");
        };
        let part =
            if self.counted_whole { String::new() } else { format!(" of the first {}", self.counted_bytes) };
        writeln!(f, "allocated          {allocated} bytes{part}")?;
        writeln!(f, "reads as zeroes    {zero} bytes{part}")?;
        if !self.counted_whole {
            writeln!(f, "                   {why}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Cursor, Read, Write};

    use super::{CHUNKS, CountError, Counted, extents};

    /// A server that says its text whatever it hears.
    struct Scripted(Cursor<Vec<u8>>);

    impl Read for Scripted {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.0.read(into)
        }
    }

    impl Write for Scripted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A chunk of the reply to request 7.
    fn chunk(flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
        let len = u32::try_from(payload.len()).expect("a short payload").to_be_bytes();
        let fields = [&flags.to_be_bytes()[..], &kind.to_be_bytes(), &7u64.to_be_bytes(), &len].concat();
        [&[0x66, 0x8e, 0x33, 0xef][..], &fields, payload].concat()
    }

    /// Extents of context 3: pairs of length and flags.
    fn status(flags: u16, numbers: &[u32]) -> Vec<u8> {
        let payload: Vec<u8> = std::iter::once(&3).chain(numbers).flat_map(|n| n.to_be_bytes()).collect();
        chunk(flags, 5, &payload)
    }

    fn count(parts: &[Vec<u8>]) -> Result<Counted, CountError> {
        extents(&mut Scripted(Cursor::new(parts.concat())), 3, (7, 4096, 1000))
    }

    #[test]
    fn extents_are_counted_within_what_was_asked() {
        let other = chunk(0, 5, &[0, 0, 0, 4, 0, 0, 0, 9, 0, 0, 0, 0]);
        let counted = count(&[other, status(0, &[100, 3, 50, 0]), chunk(1, 0, &[])]).expect("a good answer");
        assert_eq!((counted.bytes, counted.allocated, counted.zero), (150, 50, 100));
        let long = count(&[status(1, &[600, 2, u32::MAX, 1, u32::MAX, 0])]).expect("a good answer");
        assert_eq!((long.bytes, long.allocated, long.zero), (1000, 600, 600));
    }

    #[test]
    fn an_answer_that_is_none_ends_the_count() {
        let nonsense = |parts: &[Vec<u8>]| matches!(count(parts), Err(CountError::Nonsense));
        assert!(nonsense(&[status(1, &[0, 0])]), "no bytes");
        assert!(nonsense(&[chunk(1, 0, &[])]), "nothing");
        assert!(nonsense(&[chunk(1, 2, &[0; 12])]), "an answer to a read");
        let mut of_another = status(1, &[100, 0]);
        of_another[15] = 8;
        assert!(nonsense(&[of_another]), "an answer to another request");
        assert!(nonsense(&vec![status(0, &[1, 0]); CHUNKS]), "without an end");
        let short = status(1, &[100, 0]);
        let cut = |len: usize| count(&[short[..len].to_vec()]);
        assert!((0..short.len()).all(|len| matches!(cut(len), Err(CountError::Io(_)))), "the server goes");
        let refused = |parts: &[Vec<u8>]| matches!(count(parts), Err(CountError::Refused(22)));
        assert!(refused(&[chunk(1, 0x8001, &[0, 0, 0, 22, 0, 0])]));
        let simple = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 22][..], &7u64.to_be_bytes()].concat();
        assert!(refused(&[simple]));
    }
}
