//! From a connected socket to an export that is ready for requests.
//!
//! What it is: the fixed newstyle negotiation ("Fixed newstyle negotiation"), with `NBD_OPT_GO`, structured replies, and
//! block sizes.
//!
//! What it is not: it connects nothing and sets no timeouts; the caller does both. It does not speak the oldstyle
//! negotiation, nor `NBD_OPT_EXPORT_NAME`, which cannot say why an export is refused.
//!
//! Invariant: what a server sends is bounded: [`MAX_REPLIES`] for an option, [`MAX_REPLY_BYTES`] for a reply. An
//! [`Export`] says nothing impossible: its block sizes and its size were judged.
//!
//! ```text
//!   S: NBDMAGIC IHAVEOPT flags            C: flags
//!   C: IHAVEOPT option length data        S: magic option type length data … until ACK or an error
//! ```

use std::io::{self, Read, Write};

use thiserror::Error;

use super::wire::take;

#[cfg(test)]
mod tests;

/// Replies to one option, at most.
pub const MAX_REPLIES: usize = 64;
/// Bytes of a reply's data, at most.
pub const MAX_REPLY_BYTES: u32 = 64 << 10;
/// Exports that an error names, at most.
const MAX_LISTED: usize = 10;
/// Characters of a server's text that are shown, at most.
const MAX_SHOWN: usize = 200;

/// "NBDMAGIC", the first bytes of a server.
const INIT: [u8; 8] = *b"NBDMAGIC";
/// "IHAVEOPT", before the handshake flags and before each option.
const OPTION: [u8; 8] = *b"IHAVEOPT";
/// `cliserv_magic`, in the place of [`OPTION`]: the oldstyle negotiation.
const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
/// Before each reply to an option.
const REPLY: u64 = 0x0003_e889_0455_65a9;

/// `NBD_FLAG_FIXED_NEWSTYLE` and `NBD_FLAG_C_FIXED_NEWSTYLE`.
const FIXED_NEWSTYLE: u16 = 1 << 0;
/// `NBD_FLAG_NO_ZEROES` and `NBD_FLAG_C_NO_ZEROES`.
const NO_ZEROES: u16 = 1 << 1;

/// The metadata context of [`Export::allocation`].
const ALLOCATION: &[u8] = b"base:allocation";

/// `NBD_OPT_*` ("Option types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Opt {
    Abort = 2,
    List = 3,
    Go = 7,
    StructuredReply = 8,
    SetMetaContext = 10,
}

/// `NBD_REP_*` ("Option reply types").
mod rep {
    pub(super) const ACK: u32 = 1;
    pub(super) const SERVER: u32 = 2;
    pub(super) const INFO: u32 = 3;
    pub(super) const META_CONTEXT: u32 = 4;
    /// Set in all that follow.
    pub(super) const IS_ERROR: u32 = 1 << 31;
    pub(super) const ERR_UNSUP: u32 = IS_ERROR | 1;
    pub(super) const ERR_POLICY: u32 = IS_ERROR | 2;
    pub(super) const ERR_TLS_REQD: u32 = IS_ERROR | 5;
    pub(super) const ERR_UNKNOWN: u32 = IS_ERROR | 6;
    pub(super) const ERR_SHUTDOWN: u32 = IS_ERROR | 7;
    pub(super) const ERR_BLOCK_SIZE_REQD: u32 = IS_ERROR | 8;
}

/// `NBD_INFO_*` of `NBD_OPT_GO`.
mod info {
    pub(super) const EXPORT: u16 = 0;
    pub(super) const BLOCK_SIZE: u16 = 3;
}

/// What a server offers under one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Bytes, at most `i64::MAX`. It need not be a multiple of the smallest block; what is behind the last multiple of it
    /// cannot be used.
    pub size: u64,
    /// What the server can do.
    pub flags: Flags,
    /// Replies to reads are structured ones.
    pub structured: bool,
    /// What requests the server takes.
    pub block: BlockSizes,
    /// The number of the metadata context `base:allocation`, where it was asked for and the server has it.
    pub allocation: Option<u32>,
}

/// The transmission flags ("Transmission flags").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags(u16);

impl Flags {
    /// `NBD_FLAG_HAS_FLAGS`.
    const HAS_FLAGS: u16 = 1 << 0;

    const fn has(self, bit: u16) -> bool {
        self.0 & 1 << bit != 0
    }

    /// Writes fail.
    #[must_use]
    pub const fn read_only(self) -> bool {
        self.has(1)
    }

    /// `NBD_CMD_FLUSH` may be used.
    #[must_use]
    pub const fn can_flush(self) -> bool {
        self.has(2)
    }

    /// `NBD_CMD_FLAG_FUA` may be used.
    #[must_use]
    pub const fn can_fua(self) -> bool {
        self.has(3)
    }

    /// `NBD_CMD_TRIM` may be used.
    #[must_use]
    pub const fn can_trim(self) -> bool {
        self.has(5)
    }

    /// `NBD_CMD_WRITE_ZEROES` may be used.
    #[must_use]
    pub const fn can_write_zeroes(self) -> bool {
        self.has(6)
    }

    /// `NBD_CMD_FLAG_DF` may be used.
    #[must_use]
    pub const fn can_df(self) -> bool {
        self.has(7)
    }

    /// A flush on one connection covers what was answered on any other.
    #[must_use]
    pub const fn can_multi_conn(self) -> bool {
        self.has(8)
    }

    /// `NBD_CMD_FLAG_FAST_ZERO` may be used.
    #[must_use]
    pub const fn can_fast_zero(self) -> bool {
        self.has(11)
    }
}

/// Sizes of requests ("Block size constraints"), bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it. A power of two, at most 64 KiB.
    pub minimum: u32,
    /// Below it requests are slower. A power of two, at least `minimum`, at most 32 MiB.
    pub preferred: u32,
    /// Longest read or write; a multiple of `minimum`.
    pub maximum: u32,
}

impl Default for BlockSizes {
    /// What holds for a server that says nothing.
    fn default() -> Self {
        Self { minimum: 1, preferred: 4096, maximum: 32 << 20 }
    }
}

impl BlockSizes {
    /// What a server said of an export of `size` bytes, or what is impossible about it.
    fn judged(minimum: u32, preferred: u32, maximum: u32, size: u64) -> Result<Self, &'static str> {
        if !minimum.is_power_of_two() || minimum > 64 << 10 {
            return Err("the minimum has to be a power of two, at most 65536");
        }
        if !preferred.is_power_of_two() || preferred > 32 << 20 || preferred < minimum {
            return Err(
                "the preferred size has to be a power of two, at most 33554432 and not below the minimum",
            );
        }
        // u32::MAX says that there is no limit.
        if maximum != u32::MAX && !maximum.is_multiple_of(minimum) {
            return Err("the maximum has to be a multiple of the minimum");
        }
        if maximum < minimum || u64::from(maximum) < size.min(preferred.into()) {
            return Err("the maximum is too small");
        }
        Ok(Self { minimum, preferred, maximum: maximum - maximum % minimum })
    }
}

/// Why there is no export.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// The connection failed, or the server let the caller's timeout pass.
    #[error("{}", of_io(.0))]
    Io(#[from] io::Error),
    /// The first bytes are not NBD's.
    #[error("what answers there is no NBD server: its first bytes are not NBDMAGIC")]
    NotNbd,
    /// The negotiation before NBD 2.9.17.
    #[error(
        "the NBD server speaks the oldstyle negotiation, which knows no exports: start it in the newstyle one (nbdkit \
         without --oldstyle; nbd-server with a configuration file; qemu-nbd with --export-name)"
    )]
    Oldstyle,
    /// `NBD_FLAG_FIXED_NEWSTYLE` is not set.
    #[error(
        "the NBD server is too old: it does not speak the fixed newstyle negotiation (NBD 3.3 and later do)"
    )]
    NotFixed,
    /// A reply begins with something else, or answers another option.
    #[error("the NBD server answered the handshake with something that is no reply to what was asked")]
    NoReply,
    /// More than [`MAX_REPLY_BYTES`].
    #[error("the NBD server sent a reply of {0} bytes in the handshake; vublk takes {MAX_REPLY_BYTES}")]
    ReplyTooLong(u32),
    /// More than [`MAX_REPLIES`].
    #[error("the NBD server sent more than {MAX_REPLIES} replies to one option of the handshake")]
    Endless,
    /// A reply that is too short for what it is, or of a type that the option does not have.
    #[error(
        "the NBD server sent a reply of type {kind} and {len} bytes in the handshake, which makes no sense there"
    )]
    Malformed {
        /// The reply's type.
        kind: u32,
        /// Bytes of its data.
        len: usize,
    },
    /// `NBD_REP_ERR_TLS_REQD`.
    #[error(
        "the NBD server wants TLS, which vublk does not speak: run a local TLS proxy such as stunnel or ghostunnel, and \
         connect to the proxy"
    )]
    Tls,
    /// `NBD_REP_ERR_SHUTDOWN`.
    #[error("the NBD server is shutting down")]
    Shutdown,
    /// `NBD_REP_ERR_UNKNOWN`.
    #[error("the NBD server has no export {}{}", named(.export), exports(.listed))]
    Unknown {
        /// The export that was asked for.
        export: String,
        /// Some that the server has; empty if it does not tell.
        listed: Vec<String>,
    },
    /// `NBD_REP_ERR_POLICY`.
    #[error("the NBD server does not let this host have the export {}{}: allow it in the server's configuration",
        named(.export), said(.message))]
    Policy {
        /// The export that was asked for.
        export: String,
        /// The server's reason.
        message: Vec<u8>,
    },
    /// `NBD_REP_ERR_BLOCK_SIZE_REQD`.
    #[error(
        "the NBD server wants a client that obeys the block sizes of the export {}, and did not take that vublk asked for \
         them: is the server up to date?", named(.0)
    )]
    BlockSizeRequired(String),
    /// `NBD_REP_ERR_UNSUP` to `NBD_OPT_GO`.
    #[error(
        "the NBD server is too old: it does not know NBD_OPT_GO (nbd-server 3.17, QEMU 2.10 and nbdkit 1.3 do)"
    )]
    NoGo,
    /// Any other error.
    #[error("the NBD server refused the export {} with error {}{}", named(.export), .error & !rep::IS_ERROR, said(.message))]
    Refused {
        /// The export that was asked for.
        export: String,
        /// The reply's type.
        error: u32,
        /// The server's reason.
        message: Vec<u8>,
    },
    /// `NBD_OPT_GO` ended without `NBD_INFO_EXPORT`, or with one without flags.
    #[error("the NBD server did not say what the export {} is", named(.0))]
    NoInfo(String),
    /// More than `i64::MAX`.
    #[error("the NBD server says that the export {} has {size} bytes, which is more than a disk can have", named(.export))]
    Size {
        /// The export that was asked for.
        export: String,
        /// Bytes.
        size: u64,
    },
    /// Block sizes that cannot be.
    #[error(
        "the NBD server says that requests to the export {} have {minimum} (minimum), {preferred} (preferred) and {maximum} \
         (maximum) bytes: {wrong}", named(.export)
    )]
    BlockSizes {
        /// The export that was asked for.
        export: String,
        /// As the server said it.
        minimum: u32,
        /// As the server said it.
        preferred: u32,
        /// As the server said it.
        maximum: u32,
        /// What is impossible about them.
        wrong: &'static str,
    },
    /// The name is too long for the protocol.
    #[error("the export's name has {0} bytes; NBD allows 4096")]
    NameTooLong(usize),
}

fn of_io(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            "the NBD server closed the connection during the handshake; its log may say why".into()
        }
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            "the NBD server did not answer the handshake in time. Has it as many connections as it takes? qemu-nbd takes one, or \
             as many as --shared says (--shared=0: any number); vublkd makes one for each worker where the server has multi-conn"
                .into()
        }
        _ => format!("the connection to the NBD server failed during the handshake: {error}"),
    }
}

/// A server's text, as far as it may be shown.
fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(MAX_SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(MAX_SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

fn named(export: &str) -> String {
    if export.is_empty() { "\"\" (the default one)".into() } else { format!("\"{}\"", shown(export)) }
}

fn said(message: &[u8]) -> String {
    if message.is_empty() {
        String::new()
    } else {
        format!(" ({})", shown(&String::from_utf8_lossy(message)))
    }
}

fn exports(listed: &[String]) -> String {
    if listed.is_empty() {
        return ", and does not tell which ones it has".into();
    }
    let names: Vec<_> = listed.iter().take(MAX_LISTED).map(|export| named(export)).collect();
    format!("; it has {}{}", names.join(", "), if listed.len() > MAX_LISTED { ", and more" } else { "" })
}

/// How a server ended its replies to an option.
enum Answer {
    Ack,
    /// The reply's type and the server's reason.
    Error(u32, Vec<u8>),
}

/// Asks a server that was just connected to for an export, and with `allocation` for `base:allocation` as well.
///
/// # Errors
/// A sentence without the server's address, which the caller adds. The connection is of no use then.
pub fn negotiate(
    stream: &mut (impl Read + Write),
    export: &str,
    allocation: bool,
) -> Result<Export, HandshakeError> {
    let name = sized(export)?;
    greet(stream)?;
    let structured = matches!(option(stream, Opt::StructuredReply, &[], |_, _| Some(()))?, Answer::Ack);
    let allocation = if allocation && structured { allocation_context(stream, &name)? } else { None };
    let mut size_and_flags = None;
    let mut block_sizes = None;
    // One kind of information is asked for; the server sends NBD_INFO_EXPORT unasked.
    let go = [&name[..], &1u16.to_be_bytes(), &info::BLOCK_SIZE.to_be_bytes()].concat();
    let answer = option(stream, Opt::Go, &go, |kind, mut data| {
        if kind != rep::INFO {
            return None;
        }
        match u16::from_be_bytes(take(&mut data)?) {
            info::EXPORT => {
                let size = u64::from_be_bytes(take(&mut data)?);
                size_and_flags = Some((size, u16::from_be_bytes(take(&mut data)?)));
            }
            info::BLOCK_SIZE => {
                let mut next = || take(&mut data).map(u32::from_be_bytes);
                block_sizes = Some((next()?, next()?, next()?));
            }
            _ => {}
        }
        Some(())
    })?;
    if let Answer::Error(error, message) = answer {
        let refusal = refused(stream, export, error, message);
        // The server may have closed the connection already.
        let _sent = send(stream, Opt::Abort, &[]);
        return Err(refusal);
    }
    let export = export.to_owned();
    let Some((size, flags)) = size_and_flags.filter(|(_, flags)| flags & Flags::HAS_FLAGS != 0) else {
        return Err(HandshakeError::NoInfo(export));
    };
    if i64::try_from(size).is_err() {
        return Err(HandshakeError::Size { export, size });
    }
    let block = match block_sizes {
        None => BlockSizes::default(),
        Some((minimum, preferred, maximum)) => BlockSizes::judged(minimum, preferred, maximum, size)
            .map_err(|wrong| HandshakeError::BlockSizes { export, minimum, preferred, maximum, wrong })?,
    };
    Ok(Export { size, flags: Flags(flags), structured, block, allocation })
}

/// A string with its length in front.
fn sized(text: &str) -> Result<Vec<u8>, HandshakeError> {
    match u32::try_from(text.len()) {
        Ok(len @ ..=4096) => Ok([&len.to_be_bytes(), text.as_bytes()].concat()),
        _ => Err(HandshakeError::NameTooLong(text.len())),
    }
}

/// The first bytes of both sides.
fn greet(stream: &mut (impl Read + Write)) -> Result<(), HandshakeError> {
    if receive(stream)? != INIT {
        return Err(HandshakeError::NotNbd);
    }
    let style: [u8; 8] = receive(stream)?;
    if u64::from_be_bytes(style) == OLDSTYLE {
        return Err(HandshakeError::Oldstyle);
    }
    if style != OPTION {
        return Err(HandshakeError::NotNbd);
    }
    let flags = u16::from_be_bytes(receive(stream)?);
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(HandshakeError::NotFixed);
    }
    stream.write_all(&u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes())?;
    Ok(())
}

fn receive<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn send(stream: &mut impl Write, option: Opt, data: &[u8]) -> Result<(), HandshakeError> {
    let len = u32::try_from(data.len()).map_err(|_| HandshakeError::NameTooLong(data.len()))?;
    stream.write_all(&[&OPTION[..], &(option as u32).to_be_bytes(), &len.to_be_bytes(), data].concat())?;
    Ok(())
}

/// Sends an option and reads all replies to it. `each` is given those before the last one, and says `None` to one that
/// makes no sense.
fn option(
    stream: &mut (impl Read + Write),
    option: Opt,
    data: &[u8],
    mut each: impl FnMut(u32, &[u8]) -> Option<()>,
) -> Result<Answer, HandshakeError> {
    send(stream, option, data)?;
    for _ in 0..MAX_REPLIES {
        let magic = u64::from_be_bytes(receive(stream)?);
        let to = u32::from_be_bytes(receive(stream)?);
        if (magic, to) != (REPLY, option as u32) {
            return Err(HandshakeError::NoReply);
        }
        let kind = u32::from_be_bytes(receive(stream)?);
        let len = u32::from_be_bytes(receive(stream)?);
        if len > MAX_REPLY_BYTES {
            return Err(HandshakeError::ReplyTooLong(len));
        }
        let mut data = Vec::new();
        if stream.take(len.into()).read_to_end(&mut data)? != len as usize {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        match kind {
            rep::ACK => return Ok(Answer::Ack),
            rep::ERR_TLS_REQD => return Err(HandshakeError::Tls),
            rep::ERR_SHUTDOWN => return Err(HandshakeError::Shutdown),
            _ if kind & rep::IS_ERROR != 0 => return Ok(Answer::Error(kind, data)),
            _ => each(kind, &data).ok_or(HandshakeError::Malformed { kind, len: data.len() })?,
        }
    }
    Err(HandshakeError::Endless)
}

/// The number of `base:allocation`, if the server has it.
fn allocation_context(stream: &mut (impl Read + Write), name: &[u8]) -> Result<Option<u32>, HandshakeError> {
    let mut context = None;
    let query = [name, &1u32.to_be_bytes(), &15u32.to_be_bytes(), ALLOCATION].concat();
    let answer = option(stream, Opt::SetMetaContext, &query, |kind, mut data| {
        if kind != rep::META_CONTEXT {
            return None;
        }
        let id = u32::from_be_bytes(take(&mut data)?);
        if data == ALLOCATION {
            context = Some(id);
        }
        Some(())
    })?;
    Ok(context.filter(|_| matches!(answer, Answer::Ack)))
}

/// Why there is no export, in words that help.
fn refused(stream: &mut (impl Read + Write), export: &str, error: u32, message: Vec<u8>) -> HandshakeError {
    let export = export.to_owned();
    match error {
        rep::ERR_UNKNOWN => HandshakeError::Unknown { export, listed: list(stream) },
        rep::ERR_POLICY => HandshakeError::Policy { export, message },
        rep::ERR_BLOCK_SIZE_REQD => HandshakeError::BlockSizeRequired(export),
        rep::ERR_UNSUP => HandshakeError::NoGo,
        _ => HandshakeError::Refused { export, error, message },
    }
}

/// Names of exports, one more than are shown at most; as many as came before an error.
fn list(stream: &mut (impl Read + Write)) -> Vec<String> {
    let mut names = Vec::new();
    let _answer = option(stream, Opt::List, &[], |kind, mut data| {
        let len = u32::from_be_bytes(take(&mut data)?);
        let name = data.get(..len as usize).filter(|_| kind == rep::SERVER)?;
        if names.len() <= MAX_LISTED {
            names.push(String::from_utf8_lossy(name).into_owned());
        }
        Some(())
    });
    names
}
