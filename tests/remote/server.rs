//! A server that does what no good one does, once on each connection, and then serves: the daemon must go on.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use super::serve;
use crate::support::device::{Device, IOERR, OK, Setup, T_IN};
use crate::support::disk::{Disk, assert_same, pattern, salted};
use crate::support::sys::{Deadline, PATIENCE, readable_within};

const SIZE: u64 = 1 << 20;
const READ: u16 = 0;
const WRITE: u16 = 1;

/// A fault: what the server sends in place of the answer to a read of `len` bytes at `from`. It closes afterwards.
type Fault = fn(cookie: u64, from: u64, len: u32) -> Vec<u8>;

fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    let head = [&0x668e_33ef_u32.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes()].concat();
    [&head[..], &cookie.to_be_bytes(), &len.to_be_bytes(), payload].concat()
}

fn data(flags: u16, cookie: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(flags, 1, cookie, &[&offset.to_be_bytes()[..], bytes].concat())
}

fn hole(flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    chunk(flags, 2, cookie, &[&offset.to_be_bytes()[..], &len.to_be_bytes()].concat())
}

const FAULTS: [Fault; 15] = [
    // closes
    |_, _, _| Vec::new(),
    // no reply
    |_, _, _| vec![0x55; 64],
    // another cookie
    |cookie, from, len| data(1, cookie ^ 1, from, &vec![9; len as usize]),
    // an old cookie
    |cookie, from, len| data(1, cookie.wrapping_sub(1 << 16), from, &vec![9; len as usize]),
    // a slot that is not there
    |cookie, from, len| data(1, cookie | 0xffff, from, &vec![9; len as usize]),
    // half of the data, then the end
    |cookie, from, len| {
        let whole = data(1, cookie, from, &vec![9; len as usize]);
        whole[..whole.len() / 2].to_vec()
    },
    // data before the request
    |cookie, from, len| data(1, cookie, from.wrapping_sub(512), &vec![9; len as usize]),
    // data past the request
    |cookie, from, len| data(1, cookie, from + 512, &vec![9; len as usize]),
    // more data than asked for
    |cookie, from, len| data(1, cookie, from, &vec![9; len as usize + 512]),
    // the same data twice
    |cookie, from, len| {
        let half = vec![9; len as usize / 2];
        [data(0, cookie, from, &half), data(1, cookie, from, &half)].concat()
    },
    // a hole far away
    |cookie, _, _| hole(1, cookie, u64::MAX - 4096, 4096),
    // a hole of 4 GiB
    |cookie, from, _| hole(1, cookie, from, u32::MAX),
    // a simple reply to a read
    |cookie, _, len| {
        let head = [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes()].concat();
        [head, vec![9; len as usize]].concat()
    },
    // it shuts down: NBD_ESHUTDOWN
    |cookie, _, _| chunk(1, 0x8001, cookie, &[0, 0, 0, 108, 0, 0]),
    // an error that is longer than its chunk
    |cookie, _, _| chunk(1, 0x8001, cookie, &[0, 0, 0, 5, 0xff, 0xff, 0, 0]),
];

fn read_exact<const N: usize>(stream: &mut UnixStream) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).ok().map(|()| bytes)
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// HAS_FLAGS, SEND_FLUSH, SEND_FUA.
pub(super) const FLAGS: u16 = 0b1101;
pub(super) const CAN_MULTI_CONN: u16 = 1 << 8;

/// Fixed newstyle, structured replies, NBD_OPT_GO.
pub(super) fn handshake(stream: &mut UnixStream, flags: u16) -> Option<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").ok()?;
    read_exact::<4>(stream)?;
    loop {
        let head = read_exact::<16>(stream)?;
        let (option, len) = (number(&head[8..12]) as u32, number(&head[12..16]) as usize);
        let mut body = vec![0; len];
        stream.read_exact(&mut body).ok()?;
        let mut reply = |kind: u32, data: &[u8]| {
            let head =
                [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes()];
            let len = u32::try_from(data.len()).unwrap();
            stream.write_all(&[&head.concat()[..], &len.to_be_bytes(), data].concat()).ok()
        };
        match option {
            8 => reply(1, &[])?, // NBD_OPT_STRUCTURED_REPLY
            7 => {
                reply(3, &[&[0, 0][..], &SIZE.to_be_bytes(), &flags.to_be_bytes()].concat())?;
                return reply(1, &[]);
            }
            _ => reply(0x8000_0001, &[])?, // NBD_REP_ERR_UNSUP
        }
    }
}

/// Serves one connection from `disk`; the first read is answered with the fault.
fn converse(mut stream: UnixStream, disk: &mut [u8], fault: Option<Fault>) -> Option<()> {
    handshake(&mut stream, FLAGS)?;
    serve_on(stream, disk, fault)
}

fn serve_on(mut stream: UnixStream, disk: &mut [u8], mut fault: Option<Fault>) -> Option<()> {
    loop {
        let head = read_exact::<28>(&mut stream)?;
        let (kind, cookie) = (number(&head[6..8]) as u16, number(&head[8..16]));
        let (from, len) = (number(&head[16..24]), number(&head[24..28]) as u32);
        let range = from as usize..from as usize + len as usize;
        let reply = match (kind, fault.take_if(|_| kind == READ)) {
            (_, Some(fault)) => {
                stream.write_all(&fault(cookie, from, len)).ok()?;
                return None;
            }
            (READ, None) => {
                // In two chunks, the second half first, and a hole where there are zeroes.
                let (first, second) = disk[range].split_at(len as usize / 2);
                let at = from + u64::from(len) / 2;
                let part = |flags, at, bytes: &[u8]| match bytes.iter().all(|&byte| byte == 0) {
                    true => hole(flags, cookie, at, bytes.len() as u32),
                    false => data(flags, cookie, at, bytes),
                };
                [part(0, at, second), part(1, from, first)].concat()
            }
            (WRITE, None) => {
                let mut bytes = vec![0; len as usize];
                stream.read_exact(&mut bytes).ok()?;
                disk[range].copy_from_slice(&bytes);
                chunk(1, 0, cookie, &[])
            }
            _ => chunk(1, 0, cookie, &[]),
        };
        stream.write_all(&reply).ok()?;
    }
}

#[test]
fn a_server_that_breaks_the_rules_is_left_for_the_next_connection() {
    for (number, fault) in FAULTS.into_iter().enumerate() {
        let disk = Disk::new();
        let socket: PathBuf = disk.dir.path().join("nbd.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut bytes = vec![0; SIZE as usize];
        bytes[..64 * 512].copy_from_slice(&pattern(0, 64));
        // The second connection is served well.
        let server = std::thread::spawn(move || {
            for fault in [Some(fault), None] {
                let _closed = converse(listener.accept().unwrap().0, &mut bytes, fault);
            }
        });
        let mut daemon = serve(&disk, &format!("nbd+unix:///?socket={}", socket.display()), &[]);
        let mut device = Device::plain(&daemon);
        assert_same(&device.read(8, 16), &pattern(8, 16), &format!("after fault {number}"));
        device.write(100, &salted(4, 100, 8));
        let read = device.read(96, 16);
        assert_same(&read[4 * 512..12 * 512], &salted(4, 100, 8), "in two chunks and a hole");
        drop(device);
        daemon.stop();
        server.join().unwrap();
    }
}

/// A server that shuts down and does not close: its requests wait as long as was asked for, and no other connection is made
/// while it could yet do something.
#[test]
fn a_server_that_does_not_close() {
    let disk = Disk::new();
    let socket: PathBuf = disk.dir.path().join("nbd.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let (close, closes) = std::sync::mpsc::channel();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        handshake(&mut stream, FLAGS).unwrap();
        let head = read_exact::<28>(&mut stream).unwrap();
        stream.write_all(&chunk(1, 0x8001, number(&head[8..16]), &[0, 0, 0, 108, 0, 0])).unwrap();
        // Until the daemon has given up.
        closes.recv().unwrap();
        let mut rest = Vec::new();
        let _ended = stream.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{} bytes came after it had said that it shuts down", rest.len());
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "another connection was made");
        listener.set_nonblocking(false).unwrap();
        drop(stream);
        let mut bytes = vec![0; SIZE as usize];
        let _closed = converse(listener.accept().unwrap().0, &mut bytes, None);
    });
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let mut daemon = serve(&disk, &uri, &["--reconnect-delay=1"]);
    let mut device = Device::plain(&daemon);
    assert_eq!(device.status(T_IN, 8, &[], 4096), IOERR);
    daemon.wait_log("which is to close the connection");
    assert_eq!(device.status(T_IN, 8, &[], 4096), IOERR);
    close.send(()).unwrap();
    Deadline::new("the server").until_slowly(|| (device.status(T_IN, 8, &[], 4096) == OK).then_some(()));
    drop(device);
    daemon.stop();
    server.join().unwrap();
}

/// Of two connections one is lost: nothing more is sent on the other, no new one is made before that one has ended, and
/// none of the new ones is used before both are there. Otherwise a FLUSH could be answered by a server that was started
/// anew while a worker has yet to read what the one before had answered.
#[test]
fn one_of_two_connections_is_lost() {
    let disk = Disk::new();
    let socket: PathBuf = disk.dir.path().join("nbd.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let accept = |listener: &UnixListener| {
        Deadline::new("a connection").readable(listener);
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let is_quiet = |listener: &UnixListener| !readable_within(listener.as_fd(), Duration::ZERO);
    let (lose, is_to_be_lost) = std::sync::mpsc::channel();
    let (tell, has_ended) = std::sync::mpsc::channel();
    let server = std::thread::spawn(move || {
        let mut first = accept(&listener);
        handshake(&mut first, FLAGS | CAN_MULTI_CONN).unwrap();
        let mut second = accept(&listener);
        handshake(&mut second, FLAGS | CAN_MULTI_CONN).unwrap();
        is_to_be_lost.recv().unwrap();
        drop(second);
        let mut sent = Vec::new();
        first.read_to_end(&mut sent).expect("the other connection ends");
        assert!(sent.is_empty(), "{} bytes came on it", sent.len());
        tell.send(()).unwrap();
        assert!(is_quiet(&listener), "a connection was made before the other one had ended");
        drop(first);
        let mut first = accept(&listener);
        handshake(&mut first, FLAGS | CAN_MULTI_CONN).unwrap();
        let mut second = accept(&listener);
        assert!(!readable_within(first.as_fd(), Duration::ZERO), "a request was sent before both were there");
        handshake(&mut second, FLAGS | CAN_MULTI_CONN).unwrap();
        [first, second]
            .map(|stream| std::thread::spawn(move || serve_on(stream, &mut pattern(0, SIZE / 512), None)))
    });
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let mut daemon = serve(&disk, &uri, &["--workers=2", "--num-queues=2"]);
    let mut device = Device::new(&daemon, Setup { queues: 2, ..Setup::default() });
    lose.send(()).unwrap();
    has_ended.recv_timeout(PATIENCE).expect("the other connection ends");
    let pending = [0, 1].map(|queue| device.submit(queue, T_IN, 8, &[], 4096));
    for (queue, pending) in pending.iter().enumerate() {
        let used = device.rings[queue].wait_used("a read over the new connection");
        assert_same(&device.outcome(pending, used).data, &pattern(8, 8), "what was read");
    }
    drop(device);
    daemon.stop();
    for connection in server.join().unwrap() {
        connection.join().unwrap();
    }
}
