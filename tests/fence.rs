//! The start-up fence: what a killed daemon left running in the kernel has
//! ended before the next one serves.
//!
//! The backing store is a loop device with direct I/O over a file of FUSE that
//! holds requests back, so the order of events is the test's and no clock's:
//!
//! 1. daemon A gets writes and reads; half of them leave the kernel and are
//!    held, half stay in it as pages of guest memory;
//! 2. A is killed; the front-end uses its buffers for something else;
//! 3. daemon B starts on the same socket. It has to wait;
//! 4. the store carries out what it held; B serves, writes, and nothing that
//!    the killed daemon wanted may show after that, on the disk or in memory.
//!
//! It was seen to fail without the fence, in a copy of the sources where
//! `disk::lock::fence` returns at once. With `--lock=off` daemon B then serves
//! while 16 old requests run, all six blocks that it wrote end up with what A wrote or
//! with what the reused buffers held, and four buffers of the guest are
//! overwritten by reads of A's. With image locks, which the dead daemon's
//! requests hold as well, B refuses to start.

use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::process::Signal;

use crate::support::daemon::{Daemon, URING, vublkd};
use crate::support::device::{Device, OK, Setup, T_IN, T_OUT, header};
use crate::support::disk::{SECTOR, assert_same, salted};
use crate::support::frontend::Frontend;
use crate::support::gate::Gate;
use crate::support::loopdev::LoopDevice;
use crate::support::memory::Memory;
use crate::support::ring::{back, out};
use crate::support::sys::{Deadline, PATIENCE, skip};

const BLOCK: usize = 64 << 10;
const BLOCK_SECTORS: u64 = (BLOCK / SECTOR) as u64;
const DISK: usize = 8 << 20;
/// Requests of daemon A: the first are writes.
const WRITES: u64 = 12;
const READS: u64 = 4;
const ALL: usize = (WRITES + READS) as usize;
/// How many of them the store has taken out of the kernel when A is killed.
const TAKEN: usize = 6;

/// What the disk holds, what A writes, what the front-end puts into A's
/// buffers, what B writes.
const OLD: u64 = 0;
const BY_A: u64 = 1;
const REUSED: u64 = 2;
const BY_B: u64 = 3;

/// Blocks are not next to each other: none may be merged.
fn sector_of(block: u64) -> u64 {
    2 * block * BLOCK_SECTORS
}

fn block_of(salt: u64, block: u64) -> Vec<u8> {
    salted(salt, sector_of(block), BLOCK_SECTORS)
}

/// Reads and writes that the block layer has given to the loop device.
fn running(device: &LoopDevice) -> usize {
    let name = device.path.file_name().unwrap().to_str().unwrap();
    let counts = std::fs::read_to_string(format!("/sys/block/{name}/inflight")).unwrap();
    counts.split_whitespace().map(|count| count.parse::<usize>().unwrap()).sum()
}

/// Whether the loop device passes its pages on instead of copying them.
fn is_direct(device: &LoopDevice) -> bool {
    let name = device.path.file_name().unwrap().to_str().unwrap();
    std::fs::read_to_string(format!("/sys/block/{name}/loop/dio")).is_ok_and(|text| text.trim() == "1")
}

fn start(socket: &Path, disk: &LoopDevice, extra: &[&str]) -> Daemon {
    let mut command = vublkd("io_uring", socket, &disk.path);
    command.args(extra);
    Daemon::spawn(URING, command, socket.to_path_buf())
}

/// Sends A's requests off; gives the guest addresses of their buffers.
fn send(device: &mut Device) -> Vec<u64> {
    let memory = device.memory.clone();
    let ring = &mut device.rings[0];
    let buffers = (0..WRITES + READS).map(|block| {
        let write = block < WRITES;
        let head_at = memory.page_with(&header(if write { T_OUT } else { T_IN }, sector_of(block)));
        let data_at = memory.page_with(&block_of(BY_A, block));
        let data = if write { out(data_at, BLOCK) } else { back(data_at, BLOCK) };
        let head = ring.chain(&[out(head_at, 16), data, back(head_at + 64, 1)]);
        ring.stage(head);
        data_at
    });
    let buffers = buffers.collect();
    ring.publish();
    ring.kick.signal();
    buffers
}

fn refill(memory: &Memory, buffers: &[u64], salt: u64) {
    for (block, &at) in buffers.iter().enumerate() {
        memory.write(at, &block_of(salt, block as u64));
    }
}

/// Connects as soon as the daemon listens, or says that it stands at the fence.
fn connect_or_fenced(daemon: &mut Daemon) -> Option<UnixStream> {
    Deadline::new("the second daemon to serve or to say why not").until_slowly(|| {
        daemon.assert_alive();
        if daemon.log().contains("an earlier daemon's operations") {
            return Some(None);
        }
        UnixStream::connect(&daemon.socket).ok().map(Some)
    })
}

#[track_caller]
fn after_a_kill(test: &str, extra: &[&str]) {
    let Some((gate, disk)) = Gate::under_loop(test, salted(OLD, 0, (DISK / SECTOR) as u64)) else { return };
    if !is_direct(&disk) {
        return skip(test, "the loop device does no direct I/O on FUSE");
    }
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("disk.sock");

    let mut a = start(&socket, &disk, extra);
    a.wait_listening();
    let mut device = Device::plain(&a);
    gate.close(ALL, TAKEN);
    let buffers = send(&mut device);
    let deadline = Deadline::new("daemon A's requests to be in the kernel");
    deadline.until_slowly(|| (running(&disk) == ALL && gate.held() == TAKEN).then_some(()));
    a.signal(Signal::KILL);
    a.wait_end(PATIENCE);
    let (memory, rings) = device.disconnect();
    assert_eq!(rings[0].used_idx(), 0, "nothing was answered");
    refill(&memory, &buffers, REUSED);
    gate.take_all();
    Deadline::new("the store to hold everything").until_slowly(|| (gate.held() == ALL).then_some(()));

    let mut b = start(&socket, &disk, extra);
    let early = connect_or_fenced(&mut b);
    let fenced = early.is_none();
    if fenced {
        assert_eq!(gate.held(), ALL, "nothing has ended by itself");
        gate.open();
    }
    let stream = early.unwrap_or_else(|| {
        Deadline::new("daemon B to serve once the old requests have ended")
            .until_slowly(|| UnixStream::connect(&b.socket).ok())
    });
    let left = running(&disk);
    // Had it not waited, this is where the harm is done: B's writes are
    // answered, the guest uses its buffers, and only then A's requests end.
    let mut device = Device::over(Frontend::new(stream), Setup { memory, ..Setup::default() });
    for block in 0..WRITES / 2 {
        let (first, last) = (2 * block, 2 * block + 1);
        let written = if block % 2 == 0 { first } else { last };
        assert_eq!(device.status(T_OUT, sector_of(written), &block_of(BY_B, written), 0), OK);
    }
    refill(&device.memory, &buffers, BY_B);
    gate.open();
    Deadline::new("all requests to end").until_slowly(|| (running(&disk) == 0).then_some(()));

    let mut harm = Vec::new();
    let contents = gate.contents();
    for block in 0..WRITES {
        let start = sector_of(block) as usize * SECTOR;
        let got = &contents[start..start + BLOCK];
        let by_b = if (block / 2) % 2 == 0 { block % 2 == 0 } else { block % 2 == 1 };
        // A write that was never answered may be there or not, and with it
        // whatever the buffer held: that is why the guest has to wait.
        let late = if (block as usize) < TAKEN { BY_A } else { REUSED };
        let want = if by_b { BY_B } else { late };
        if got != block_of(want, block) {
            let salt = [OLD, BY_A, REUSED, BY_B].into_iter().find(|&salt| got == block_of(salt, block));
            harm.push(format!("block {block} holds {salt:?}, wanted {want}"));
        }
    }
    for (block, &at) in buffers.iter().enumerate() {
        if device.memory.read(at, BLOCK) != block_of(BY_B, block as u64) {
            harm.push(format!("buffer {block} was overwritten in guest memory"));
        }
    }
    assert!(
        fenced && left == 0 && harm.is_empty(),
        "daemon B served with {left} old requests running (waited: {fenced}): {harm:#?}"
    );
    // What B sees is what is there.
    for block in 0..WRITES + READS {
        let start = sector_of(block) as usize * SECTOR;
        let got = device.read(sector_of(block), BLOCK_SECTORS);
        assert_same(&got, &contents[start..start + BLOCK], &format!("block {block} read by B"));
    }
    drop(device);
    b.stop();
}

#[test]
fn a_new_daemon_waits_for_the_requests_of_a_killed_one() {
    after_a_kill("fence::a_new_daemon_waits_for_the_requests_of_a_killed_one", &[]);
}

#[test]
fn also_without_image_locks() {
    after_a_kill("fence::also_without_image_locks", &["--lock=off"]);
}
