//! Servers whose every byte is written down: good ones, and each way to be a bad one.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::io::{self, Cursor, Read, Write};

use super::{BlockSizes, Export, HandshakeError, MAX_REPLIES, negotiate, rep};

/// A server that says its text whatever it hears, and then goes, or begins again with its last reply.
struct Scripted {
    says: Cursor<Vec<u8>>,
    again: Option<Vec<u8>>,
    heard: Vec<u8>,
}

impl Read for Scripted {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match (self.says.read(into)?, &self.again) {
            (0, Some(again)) if !into.is_empty() => {
                self.says = Cursor::new(again.clone());
                self.says.read(into)
            }
            (read, _) => Ok(read),
        }
    }
}

impl Write for Scripted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.heard.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const STRUCTURED: u32 = 8;
const META: u32 = 10;
const GO: u32 = 7;
const LIST: u32 = 3;

fn greeting() -> Vec<u8> {
    b"NBDMAGICIHAVEOPT\0\x03".to_vec()
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    [
        &0x0003_e889_0455_65a9u64.to_be_bytes()[..],
        &option.to_be_bytes(),
        &kind.to_be_bytes(),
        &len.to_be_bytes(),
        data,
    ]
    .concat()
}

fn info_export(size: u64, flags: u16) -> Vec<u8> {
    reply(GO, rep::INFO, &[&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat())
}

fn info_sizes(minimum: u32, preferred: u32, maximum: u32) -> Vec<u8> {
    let sizes = [minimum, preferred, maximum].map(u32::to_be_bytes).concat();
    reply(GO, rep::INFO, &[&[0, 3][..], &sizes].concat())
}

fn ack(option: u32) -> Vec<u8> {
    reply(option, rep::ACK, &[])
}

fn says(parts: &[Vec<u8>]) -> Scripted {
    Scripted { says: Cursor::new(parts.concat()), again: None, heard: Vec::new() }
}

fn error_of(mut server: Scripted) -> HandshakeError {
    negotiate(&mut server, "disk", false).unwrap_err()
}

/// What an operator reads when GO of "disk" is refused.
fn refusal(parts: &[Vec<u8>]) -> String {
    error_of(says(&[&[greeting(), ack(STRUCTURED)], parts].concat())).to_string()
}

#[test]
fn a_good_server_says_what_it_has() {
    let context = reply(META, rep::META_CONTEXT, b"\0\0\0\x05base:allocation");
    let mut server = says(&[
        greeting(),
        ack(STRUCTURED),
        context,
        ack(META),
        info_export(64 << 20, 0b1001_0110_1101),
        // A description, which was not asked for.
        reply(GO, rep::INFO, b"\0\x02a disk"),
        info_sizes(512, 4096, u32::MAX),
        ack(GO),
    ]);
    let export = negotiate(&mut server, "disk", true).unwrap();
    let block = BlockSizes { minimum: 512, preferred: 4096, maximum: u32::MAX - 511 };
    assert_eq!(
        export,
        Export { size: 64 << 20, flags: export.flags, structured: true, block, allocation: Some(5) }
    );
    let flags = export.flags;
    assert!(flags.can_flush() && flags.can_fua() && flags.can_trim() && flags.can_write_zeroes());
    assert!(flags.can_multi_conn() && flags.can_fast_zero());
    assert!(!flags.read_only() && !flags.can_df());
    let asked = [
        &b"\0\0\0\x03"[..],
        b"IHAVEOPT\0\0\0\x08\0\0\0\0",
        b"IHAVEOPT\0\0\0\x0a\0\0\0\x1f\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation",
        b"IHAVEOPT\0\0\0\x07\0\0\0\x0c\0\0\0\x04disk\0\x01\0\x03",
    ];
    assert_eq!(server.heard, asked.concat());
}

#[test]
fn a_plain_server_is_taken_as_it_is() {
    let unknown = |option| reply(option, rep::ERR_UNSUP, b"what?");
    // Without NBD_FLAG_NO_ZEROES, structured replies and block sizes; read-only.
    let plain =
        [b"NBDMAGICIHAVEOPT\0\x01".to_vec(), unknown(STRUCTURED), info_export(1 << 30, 0b11), ack(GO)];
    let mut server = says(&plain);
    let export = negotiate(&mut server, "", true).unwrap();
    assert!(export.flags.read_only() && !export.flags.can_flush());
    let block = BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 };
    assert_eq!((export.structured, export.block, export.allocation), (false, block, None));
    assert_eq!(server.heard[..4], [0, 0, 0, 1]);

    // Structured replies, but no contexts.
    let mut server =
        says(&[greeting(), ack(STRUCTURED), unknown(META), info_export(1 << 30, 0b1000_0001), ack(GO)]);
    let export = negotiate(&mut server, "", true).unwrap();
    assert!(export.structured && export.flags.can_df() && export.allocation.is_none());
}

#[test]
fn what_is_no_newstyle_server_is_told() {
    assert!(matches!(error_of(says(&[b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()])), HandshakeError::NotNbd));
    assert!(matches!(error_of(says(&[b"NBDMAGICWHATEVER\0\x03".to_vec()])), HandshakeError::NotNbd));
    let oldstyle = [&b"NBDMAGIC"[..], &0x0000_4202_8186_1253u64.to_be_bytes(), &[0; 136]].concat();
    assert!(matches!(error_of(says(&[oldstyle])), HandshakeError::Oldstyle));
    assert!(matches!(error_of(says(&[b"NBDMAGICIHAVEOPT\0\0".to_vec()])), HandshakeError::NotFixed));
}

#[test]
fn a_server_that_goes_at_any_byte_is_an_error() {
    let whole =
        [greeting(), ack(STRUCTURED), info_export(1 << 30, 1), info_sizes(1, 4096, 32 << 20), ack(GO)]
            .concat();
    assert!(negotiate(&mut says(std::slice::from_ref(&whole)), "disk", false).is_ok());
    for len in 0..whole.len() {
        let error = error_of(says(&[whole[..len].to_vec()]));
        assert!(error.to_string().contains("closed the connection"), "{len}: {error}");
    }
}

#[test]
fn what_a_server_sends_is_bounded() {
    let huge = |len: u32| [&reply(STRUCTURED, rep::ERR_UNSUP, &[])[..16], &len.to_be_bytes()].concat();
    for len in [(64 << 10) + 1, u32::MAX] {
        let error = error_of(says(&[greeting(), huge(len)]));
        assert!(matches!(error, HandshakeError::ReplyTooLong(told) if told == len), "{error}");
    }
    let largest = reply(STRUCTURED, rep::ERR_UNSUP, &[b'x'; 64 << 10]);
    let good = [greeting(), largest, info_export(1 << 30, 1), ack(GO)];
    assert!(negotiate(&mut says(&good), "disk", false).is_ok());

    let endless = |parts: &[Vec<u8>], again: Vec<u8>| {
        let mut server = says(parts);
        server.again = Some(again);
        server
    };
    let info = reply(GO, rep::INFO, b"\0\x02again and again");
    let error = error_of(endless(&[greeting(), ack(STRUCTURED)], info));
    assert!(matches!(error, HandshakeError::Endless), "{error}");
    // As many as may be.
    let many = vec![reply(GO, rep::INFO, b"\0\x02x"); MAX_REPLIES - 2];
    let good = [vec![greeting(), ack(STRUCTURED), info_export(1 << 30, 1)], many, vec![ack(GO)]].concat();
    assert!(negotiate(&mut says(&good), "disk", false).is_ok());
    // An endless list of exports does not hide that the export is unknown.
    let unknown = [greeting(), ack(STRUCTURED), reply(GO, rep::ERR_UNKNOWN, &[])];
    let error = error_of(endless(&unknown, reply(LIST, rep::SERVER, b"\0\0\0\x01x")));
    assert!(error.to_string().ends_with("\"x\", and more"), "{error}");
}

#[test]
fn replies_that_make_no_sense_are_errors() {
    let mut wrong_magic = ack(STRUCTURED);
    wrong_magic[0] = 1;
    for wrong in [wrong_magic, ack(GO)] {
        assert!(matches!(error_of(says(&[greeting(), wrong])), HandshakeError::NoReply));
    }
    for (kind, data) in
        [(rep::SERVER, &b"\0\0\0\0"[..]), (17, b""), (rep::INFO, b""), (rep::INFO, b"\0\0\x01")]
    {
        let error = error_of(says(&[greeting(), ack(STRUCTURED), reply(GO, kind, data)]));
        assert!(matches!(error, HandshakeError::Malformed { .. }), "{kind} {data:?}: {error}");
    }
    let size = info_export(1 << 63, 1);
    assert!(refusal(&[size, ack(GO)]).contains("9223372036854775808 bytes"));
    for nothing in [&[ack(GO)][..], &[info_export(1 << 30, 0), ack(GO)]] {
        assert!(refusal(nothing).contains("did not say what the export \"disk\" is"));
    }
    assert!(negotiate(&mut says(&[]), &"x".repeat(4097), false).unwrap_err().to_string().contains("4097"));
}

#[test]
fn block_sizes_that_cannot_be_are_told() {
    let export = |minimum, preferred, maximum| {
        let said = [
            greeting(),
            ack(STRUCTURED),
            info_sizes(minimum, preferred, maximum),
            info_export(1 << 30, 1),
            ack(GO),
        ];
        negotiate(&mut says(&said), "disk", false)
    };
    for (minimum, preferred, maximum) in [
        (0, 4096, 1 << 20),
        (3, 4096, 1 << 20),
        (1 << 17, 1 << 17, 1 << 20),
        (512, 0, 1 << 20),
        (512, 5000, 1 << 20),
        (512, 256, 1 << 20),
        (512, 1 << 26, u32::MAX),
        (512, 4096, 0),
        (512, 4096, 256),
        (512, 4096, 1024),
        (512, 4096, 5000),
    ] {
        let error = export(minimum, preferred, maximum).unwrap_err().to_string();
        let numbers =
            format!("have {minimum} (minimum), {preferred} (preferred) and {maximum} (maximum) bytes");
        assert!(error.contains(&numbers), "{error}");
    }
    for (minimum, preferred, maximum) in
        [(1, 1, 1), (1, 512, 512), (1 << 16, 1 << 16, 3 << 16), (4096, 4096, 1 << 31)]
    {
        let block = export(minimum, preferred, maximum).unwrap().block;
        assert_eq!(block, BlockSizes { minimum, preferred, maximum });
    }
}

#[test]
fn a_refusal_says_what_to_do() {
    let no = |error, message: &[u8]| reply(GO, error, message);
    let has = |name: &str| {
        let len = u32::try_from(name.len()).unwrap();
        reply(LIST, rep::SERVER, &[&len.to_be_bytes(), name.as_bytes(), b"some words"].concat())
    };
    let unknown = no(rep::ERR_UNKNOWN, b"never heard of it");
    assert_eq!(
        refusal(&[unknown.clone(), has("a"), has(""), has("b\n"), ack(LIST)]),
        "the NBD server has no export \"disk\"; it has \"a\", \"\" (the default one), \"b\\n\""
    );
    let eleven: Vec<_> = (0..11).map(|n| has(&n.to_string())).collect();
    let text = refusal(&[vec![unknown.clone()], eleven, vec![ack(LIST)]].concat());
    assert!(text.ends_with("\"8\", \"9\", and more"), "{text}");
    for silent in [reply(LIST, rep::ERR_POLICY, b"no"), reply(LIST, rep::SERVER, b"\0\0\0\xff"), Vec::new()] {
        assert!(refusal(&[unknown.clone(), silent]).ends_with("does not tell which ones it has"));
    }
    for (error, message, says) in [
        (rep::ERR_TLS_REQD, &b""[..], "stunnel"),
        (rep::ERR_SHUTDOWN, b"", "shutting down"),
        (rep::ERR_POLICY, b"not from \x1b[1mthere", "\"disk\" (not from \\u{1b}[1mthere): allow it"),
        (rep::ERR_BLOCK_SIZE_REQD, b"", "block sizes of the export \"disk\""),
        (rep::ERR_UNSUP, b"", "NBD_OPT_GO"),
        (rep::IS_ERROR | 77, b"why not", "error 77 (why not)"),
    ] {
        let text = refusal(&[no(error, message)]);
        assert!(text.contains(says), "{text}");
    }
    // TLS may be asked for from the first option on.
    let error = error_of(says(&[greeting(), reply(STRUCTURED, rep::ERR_TLS_REQD, b"")]));
    assert!(matches!(error, HandshakeError::Tls));
    let long = refusal(&[no(rep::ERR_POLICY, &[b'x'; 1000])]);
    assert!(long.contains(&format!("({}…)", "x".repeat(200))), "{long}");
}
