//! What an NBD server sends: replies of any bytes, cut anywhere, and any handshake; URIs of any text.
//!
//! A reply means the same however it arrives and takes the bytes that it says; which bytes of a read have come is kept
//! beside a bit for each. A handshake ends, and an export that comes of it is one that the protocol allows.

use std::io::{self, Cursor, Read, Write};

use vublk::nbd::handshake::{MAX_REPLIES, negotiate};
use vublk::nbd::uri::Uri;
use vublk::nbd::wire::{
    CHUNK_MAGIC, ChunkKind, Covered, Head, SIMPLE_REPLY_MAGIC, block_status, errno, error_of, head,
};

use super::reader::Reader;

/// Bytes of a read whose answer is followed.
const ASKED: usize = 64;

pub fn run(data: &[u8]) {
    let mut bytes = Reader::new(data);
    match bytes.below(4) {
        0 => replies(&mut bytes),
        1 => covered(&mut bytes),
        2 => handshake(&mut bytes),
        _ => {
            let text = String::from_utf8_lossy(bytes.bytes(1024)).into_owned();
            if let Ok(uri) = Uri::parse(&text) {
                assert_eq!(Uri::parse(&uri.to_string()).as_ref(), Ok(&uri), "{text}");
            }
        }
    }
}

/// Replies one behind the other, as a stream: the rest is only looked at once it is there.
fn replies(bytes: &mut Reader<'_>) {
    let magic = match bytes.below(4) {
        0 => SIMPLE_REPLY_MAGIC,
        1 => bytes.u32(),
        _ => CHUNK_MAGIC,
    };
    let stream = [&magic.to_be_bytes()[..], bytes.bytes(512)].concat();
    let whole = head(&stream);
    for len in 0..stream.len() {
        let part = head(&stream[..len]);
        assert!(part == Ok(None) || part == whole, "{len} bytes: {part:?}, {whole:?}");
    }
    let Ok(Some((head, used))) = whole else { return };
    let payload = &stream[used..];
    match head {
        Head::Simple { error, .. } => assert!(used == 16 && errno(error) > 0),
        Head::Chunk { done, kind, len, .. } => {
            assert_eq!((used, magic), (20, CHUNK_MAGIC));
            let is_error = matches!(kind, ChunkKind::Error | ChunkKind::ErrorAt);
            assert_eq!(is_error, stream[6] & 0x80 != 0);
            assert!(kind != ChunkKind::None || done && len == 0);
            let payload = &payload[..payload.len().min(len as usize)];
            let _ = error_of(payload);
            if let Ok((_, extents)) = block_status(payload) {
                assert_eq!(extents.count() * 8 + 4, payload.len());
            }
        }
    }
}

/// Ranges of an answer, beside a bit for each byte.
fn covered(bytes: &mut Reader<'_>) {
    let mut covered = Covered::new(ASKED as u32);
    let mut model = [false; ASKED];
    while !bytes.is_empty() {
        let (offset, len) = match bytes.below(16) {
            0 => (bytes.u64(), bytes.u64()),
            _ => (bytes.below(ASKED as u64 + 2), bytes.below(8)),
        };
        let before = covered;
        let range = offset..offset.saturating_add(len);
        let is_new =
            !range.is_empty() && range.end <= ASKED as u64 && range.clone().all(|byte| !model[byte as usize]);
        match covered.add(offset, len) {
            Ok(()) => {
                assert!(is_new, "{range:?}");
                range.for_each(|byte| model[byte as usize] = true);
            }
            Err(violation) => {
                assert_eq!(covered, before);
                let ranges = (0..ASKED).filter(|&at| model[at] && (at == 0 || !model[at - 1])).count();
                assert!(!is_new || ranges == 8, "{range:?}: {violation}");
            }
        }
        assert_eq!(covered.is_whole(), model.iter().all(|&bit| bit));
    }
}

/// A server that says its text, then its last reply again for ever, or goes.
struct Server {
    says: Cursor<Vec<u8>>,
    again: Option<Vec<u8>>,
    read: usize,
}

impl Read for Server {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut read = self.says.read(into)?;
        if let (0, Some(again)) = (read, &self.again) {
            self.says = Cursor::new(again.clone());
            read = self.says.read(into)?;
        }
        self.read += read;
        Ok(read)
    }
}

impl Write for Server {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn handshake(bytes: &mut Reader<'_>) {
    let allocation = bytes.bool();
    let mut says = match bytes.below(8) {
        0 => bytes.bytes(24).to_vec(),
        _ => b"NBDMAGICIHAVEOPT\0\x03".to_vec(),
    };
    let mut last = Vec::new();
    while !bytes.is_empty() {
        last = reply(bytes);
        says.extend(&last);
    }
    // Half of the servers never go.
    let again = (says.len().is_multiple_of(2) && !last.is_empty()).then_some(last);
    let mut server = Server { says: Cursor::new(says), again, read: 0 };
    let result = negotiate(&mut server, "disk", allocation);
    // Four options, with replies of 64 KiB and their heads.
    assert!(server.read <= 18 + 4 * MAX_REPLIES * (20 + (64 << 10)));
    match result {
        Ok(export) => {
            let block = export.block;
            assert!(i64::try_from(export.size).is_ok());
            assert!(block.minimum.is_power_of_two() && block.preferred.is_power_of_two());
            assert!(block.minimum <= block.preferred && block.minimum <= block.maximum);
            assert!(block.maximum.is_multiple_of(block.minimum));
            assert!(export.structured || export.allocation.is_none());
            assert!(allocation || export.allocation.is_none());
        }
        // An error is for a person: it fits on a screen and holds no control sequence.
        Err(error) => {
            let text = error.to_string();
            assert!(text.len() < 64 << 10 && !text.chars().any(char::is_control), "{text:?}");
        }
    }
}

/// A reply that is nearly valid.
fn reply(bytes: &mut Reader<'_>) -> Vec<u8> {
    let option: u32 = match bytes.below(9) {
        0 => bytes.u32(),
        1 | 2 => 8,
        3 | 4 => 10,
        5 => 3,
        _ => 7,
    };
    let kind: u32 = match bytes.below(9) {
        0 => bytes.u32(),
        1 | 2 => 1,
        3 => (1 << 31) + bytes.below(12) as u32,
        4 => 2,
        5 => 4,
        _ => 3,
    };
    let data = match kind {
        2 => [&(bytes.below(6) as u32).to_be_bytes()[..], bytes.bytes(4)].concat(),
        3 => match bytes.below(4) {
            0 => bytes.bytes(16).to_vec(),
            1 | 2 => [&[0, 0][..], &bytes.u64().to_be_bytes(), &[bytes.u8(), bytes.u8()]].concat(),
            _ => {
                let mut size = || ((1u32 << bytes.below(32)) - bytes.below(2) as u32).to_be_bytes();
                [&[0, 3][..], &size(), &size(), &size()].concat()
            }
        },
        4 => [&bytes.u32().to_be_bytes()[..], b"base:allocation"].concat(),
        _ => {
            let len = bytes.u8();
            bytes.bytes(len.into()).to_vec()
        }
    };
    let len = match bytes.below(16) {
        0 => bytes.u32(),
        _ => u32::try_from(data.len()).unwrap(),
    };
    [
        &0x0003_e889_0455_65a9u64.to_be_bytes()[..],
        &option.to_be_bytes(),
        &kind.to_be_bytes(),
        &len.to_be_bytes(),
        &data,
    ]
    .concat()
}
