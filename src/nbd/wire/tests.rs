//! Bytes of the protocol, written out by hand; any bytes at all; [`Covered`] beside a bit for each byte.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use proptest::collection::vec;
use proptest::prelude::*;

use super::{
    CHUNK_BYTES, ChunkKind, Command, Covered, Extent, Head, MAX_RANGES, SIMPLE_REPLY_BYTES, Violation,
    block_status, data_offset, errno, error_of, head, hole, request,
};

#[test]
fn a_request_is_what_the_protocol_says() {
    let of = |command| request(command, 0x0102_0304_0506_0708, 0x1112_1314_1516_1718, 0x2122_2324);
    let write = of(Command::Write { fua: true });
    assert_eq!(
        write,
        [
            0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16,
            0x17, 0x18, 0x21, 0x22, 0x23, 0x24
        ]
    );
    for (command, flags, kind) in [
        (Command::Read, 0, 0),
        (Command::Write { fua: false }, 0, 1),
        (Command::Disconnect, 0, 2),
        (Command::Flush, 0, 3),
        (Command::Trim, 0, 4),
        (Command::WriteZeroes { no_hole: false, fast_zero: false }, 0, 6),
        (Command::WriteZeroes { no_hole: true, fast_zero: false }, 2, 6),
        (Command::WriteZeroes { no_hole: false, fast_zero: true }, 16, 6),
        (Command::BlockStatus, 0, 7),
    ] {
        let bytes = of(command);
        assert_eq!((bytes[4], bytes[5], bytes[6], bytes[7]), (0, flags, 0, kind), "{command:?}");
        assert_eq!((&bytes[..4], &bytes[8..]), (&write[..4], &write[8..]), "{command:?}");
    }
}

/// The fixed part of a chunk.
fn chunk(flags: u16, kind: u16, len: u32) -> Vec<u8> {
    [
        &[0x66, 0x8e, 0x33, 0xef][..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &7u64.to_be_bytes(),
        &len.to_be_bytes(),
    ]
    .concat()
}

#[test]
fn replies_are_read_once_they_are_whole() {
    let simple = [&[0x67, 0x44, 0x66, 0x98][..], &5u32.to_be_bytes(), &9u64.to_be_bytes()].concat();
    let data = chunk(0, 1, 4096 + 8);
    for (bytes, whole, size) in [
        (simple, Head::Simple { error: 5, cookie: 9 }, SIMPLE_REPLY_BYTES),
        (data, Head::Chunk { done: false, kind: ChunkKind::Data, cookie: 7, len: 4104 }, CHUNK_BYTES),
    ] {
        for len in 0..bytes.len() {
            assert_eq!(head(&bytes[..len]), Ok(None), "{whole:?}: {len} bytes of it");
        }
        let more = [&bytes[..], b"what follows"].concat();
        assert_eq!((head(&bytes), head(&more)), (Ok(Some((whole, size))), Ok(Some((whole, size)))));
    }
    assert_eq!(head(b"NBDMAGIC"), Err(Violation::Magic(0x4e42_444d)));
}

#[test]
fn a_chunk_has_a_length_that_its_kind_can_have() {
    let wrong = |kind, len| Err(Violation::ChunkLength { kind, len });
    let is = |kind, len| Ok(Some((Head::Chunk { done: true, kind, cookie: 7, len }, CHUNK_BYTES)));
    for (code, kind, good, bad) in [
        (0, ChunkKind::None, &[0][..], &[1, u32::MAX][..]),
        (1, ChunkKind::Data, &[9, 4104, u32::MAX], &[0, 8]),
        (2, ChunkKind::Hole, &[12], &[0, 11, 13, u32::MAX]),
        (5, ChunkKind::BlockStatus, &[12, 20, 4 + 8 * 1000], &[0, 4, 8, 13, 16, u32::MAX - 3]),
        (0x8001, ChunkKind::Error, &[6, 6 + 4096], &[0, 5, 65536, u32::MAX]),
        (0x8002, ChunkKind::ErrorAt, &[14, 14 + 4096], &[0, 6, 13, 65536, u32::MAX]),
        (0xffff, ChunkKind::Error, &[6, 100], &[0, 5, u32::MAX]),
    ] {
        // A flag that is not known changes nothing.
        good.iter().for_each(|&len| assert_eq!(head(&chunk(0x8001, code, len)), is(kind, len)));
        bad.iter().for_each(|&len| assert_eq!(head(&chunk(1, code, len)), wrong(code, len)));
    }
    assert_eq!(head(&chunk(0, 0, 0)), Err(Violation::EmptyChunk));
    for code in [3, 4, 6, 0x7fff] {
        assert_eq!(head(&chunk(1, code, 12)), Err(Violation::UnknownChunk(code)));
    }
}

#[test]
fn payloads_are_big_endian() {
    assert_eq!(data_offset(&[1, 2, 3, 4, 5, 6, 7, 8]), 0x0102_0304_0506_0708);
    assert_eq!(hole(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]), (0x0102_0304_0506_0708, 0x090a_0b0c));
}

#[test]
fn an_error_is_read_with_its_message_and_without() {
    assert_eq!(error_of(&[0, 0, 0, 5, 0, 0]), Ok(5));
    assert_eq!(error_of(&[0, 0, 0, 28, 0, 4, b'f', b'u', b'l', b'l']), Ok(28));
    // With the offset of NBD_REPLY_TYPE_ERROR_OFFSET.
    assert_eq!(error_of(&[0, 0, 0, 5, 0, 1, b'x', 0, 0, 0, 0, 0, 0, 16, 0]), Ok(5));
    assert_eq!(error_of(&[0, 0, 0, 0, 0, 0]), Err(Violation::NoError));
    for short in [&[][..], &[0, 0, 0, 5], &[0, 0, 0, 5, 0], &[0, 0, 0, 5, 0, 4, b'f', b'u', b'l']] {
        assert!(matches!(error_of(short), Err(Violation::MessageLength { .. })), "{short:?}");
    }
}

#[test]
fn no_error_of_a_server_is_taken_for_one_of_this_host() {
    for error in (0..2000).chain([u32::MAX]) {
        let errno = errno(error);
        // What an engine takes for an operation that was not tried.
        let here = [libc::ECANCELED, libc::EAGAIN, libc::ENOMEM, libc::EINTR];
        assert!(errno > 0 && !here.contains(&errno), "{error}");
    }
    let known = [1, 5, 12, 22, 28, 75, 95, 108].map(errno);
    let io = libc::EIO;
    assert_eq!(
        known,
        [libc::EPERM, io, io, libc::EINVAL, libc::ENOSPC, libc::EOVERFLOW, libc::EOPNOTSUPP, libc::ESHUTDOWN]
    );
}

#[test]
fn extents_of_a_block_status() {
    let payload = [0, 0, 0, 3, 0, 1, 0, 0, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 2];
    let (context, extents) = block_status(&payload).unwrap();
    assert_eq!(context, 3);
    assert_eq!(
        extents.collect::<Vec<_>>(),
        [
            Extent { len: 65536, is_hole: true, reads_zero: true },
            Extent { len: 9, is_hole: true, reads_zero: false },
            Extent { len: 8, is_hole: false, reads_zero: true },
        ]
    );
    for len in [0, 3, 4, 5, 11, 13, 19] {
        assert_eq!(block_status(&payload[..len]).err(), Some(Violation::BlockStatusLength(len)), "{len}");
    }
}

/// [`Covered`], as a bit for each byte.
struct Model(Vec<bool>);

impl Model {
    fn add(&mut self, offset: u64, len: u64) -> Result<(), Violation> {
        let asked = u32::try_from(self.0.len()).unwrap();
        if len == 0 {
            return Err(Violation::EmptyRange { offset });
        }
        let end = offset.checked_add(len).filter(|&end| end <= u64::from(asked));
        let Some(end) = end else { return Err(Violation::Outside { offset, len, asked }) };
        let mut after = self.0.clone();
        for bit in &mut after[usize::try_from(offset).unwrap()..usize::try_from(end).unwrap()] {
            if std::mem::replace(bit, true) {
                return Err(Violation::Twice { offset, len });
            }
        }
        let begins = |at: usize| after[at] && (at == 0 || !after[at - 1]);
        if (0..after.len()).filter(|&at| begins(at)).count() > MAX_RANGES {
            return Err(Violation::Fragmented);
        }
        self.0 = after;
        Ok(())
    }
}

/// Ranges of a few bytes within 64, where they meet; and some from anywhere.
fn range() -> impl Strategy<Value = (u64, u64)> {
    prop_oneof![
        30 => (0u64..66, 0u64..6),
        2 => (0u64..66, 1u64..66),
        1 => (any::<u64>(), any::<u64>()),
        1 => (u64::MAX - 8..=u64::MAX, 0u64..16),
    ]
}

proptest! {
    #[test]
    fn covered_is_a_bit_for_each_byte(asked in 0u32..65, ranges in vec(range(), 0..60)) {
        let mut covered = Covered::new(asked);
        let mut model = Model(vec![false; usize::try_from(asked).unwrap()]);
        for (offset, len) in ranges {
            let before = covered;
            let result = covered.add(offset, len);
            prop_assert_eq!(result, model.add(offset, len));
            prop_assert!(result.is_ok() || covered == before);
            prop_assert_eq!(covered.is_whole(), model.0.iter().all(|&bit| bit));
        }
    }

    #[test]
    fn pieces_in_any_order_make_a_whole(
        order in Just((0u64..8).collect::<Vec<_>>()).prop_shuffle(), size in 1u32..=u32::MAX / 8
    ) {
        let mut covered = Covered::new(size * 8);
        for piece in order {
            prop_assert!(!covered.is_whole());
            covered.add(piece * u64::from(size), size.into()).unwrap();
        }
        prop_assert!(covered.is_whole());
    }

    #[test]
    fn any_bytes_are_read(
        magic in prop_oneof![Just(super::SIMPLE_REPLY_MAGIC), Just(super::CHUNK_MAGIC), any::<u32>()],
        code in prop_oneof![0u16..8, 0x8000u16..0x8004, any::<u16>()],
        rest in vec(any::<u8>(), 0..64),
    ) {
        let bytes = [&magic.to_be_bytes()[..], &[0, 1], &code.to_be_bytes(), &rest].concat();
        if let Ok(Some((_, used))) = head(&bytes) {
            prop_assert!(used <= bytes.len());
        }
        let _ = head(&rest);
        let _ = error_of(&rest);
        if let Ok((_, extents)) = block_status(&rest) {
            prop_assert_eq!(extents.count(), (rest.len() - 4) / 8);
        }
    }
}
