//! The same disk through a driver of other authors (the virtio-driver
//! crate): many requests in flight, every byte verified.

use std::os::fd::{AsFd, AsRawFd};

use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
    iovec,
};

use super::Bench;
use crate::support::daemon::{Daemon, Options};
use crate::support::disk::{SECTOR, assert_same, salted};
use crate::support::memory::Region;
use crate::support::sys::Deadline;

/// Bytes of buffer each request has.
const SLOT: usize = 64 << 10;

/// A connected driver with its queues and one shared buffer.
struct Driver {
    // Before the transport: its memory is the transport's.
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    buffer: Region,
    transport: Box<VirtioBlkTransport>,
}

impl Driver {
    fn new(daemon: &Daemon, queues: usize, depth: usize, features: VirtioFeatureFlags) -> Self {
        let path = daemon.socket.to_str().unwrap();
        let features = features | VirtioFeatureFlags::VERSION_1;
        // The block features have no part in the rings: all of them.
        let bits = features.bits() | 0x1_ffff;
        let vhost: VhostUser<VirtioBlkConfig, VirtioBlkReqBuf> = VhostUser::new(path, bits).unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(vhost);
        let size = u16::try_from((depth * 4).next_power_of_two().max(8)).unwrap();
        let mut queues = VirtioBlkQueue::setup_queues(transport.as_mut(), queues, size).unwrap();
        for queue in &mut queues {
            queue.set_used_notif_enabled(true);
        }
        let len = (queues.len() * depth * 2 * SLOT) as u64;
        let buffer = Region::new(0, len, 0);
        transport.map_mem_region(buffer.host() as usize, len as usize, buffer.file.as_raw_fd(), 0).unwrap();
        Self { queues, buffer, transport }
    }

    fn slot(&mut self, index: usize) -> &mut [u8] {
        assert!(((index + 1) * SLOT) as u64 <= self.buffer.len);
        // SAFETY: inside the mapping; no request uses this slot now, the
        // caller keeps to one request a slot, and `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.host().add(index * SLOT), SLOT) }
    }

    fn kick(&self, queue: usize) {
        self.transport.get_submission_notifier(queue).notify().unwrap();
    }

    /// Waits for at least one completion.
    #[track_caller]
    fn wait(&mut self, queue: usize, what: &str) -> Vec<(usize, i32)> {
        let deadline = Deadline::new(what);
        let signal = self.transport.get_completion_fd(queue);
        loop {
            let done: Vec<_> =
                self.queues[queue].completions().map(|done| (done.context, done.ret)).collect();
            if !done.is_empty() {
                return done;
            }
            deadline.readable(signal.as_fd());
            signal.read().unwrap();
        }
    }

    /// One request, from start to end; gives its result.
    #[track_caller]
    fn one(
        &mut self,
        request: impl FnOnce(&mut VirtioBlkQueue<'static, usize>) -> std::io::Result<()>,
        what: &str,
    ) -> i32 {
        request(&mut self.queues[0]).unwrap();
        self.kick(0);
        let done = self.wait(0, what);
        assert_eq!(done.len(), 1, "{what}");
        done[0].1
    }

    /// Keeps `depth` requests in flight on each queue: each lane writes new
    /// contents to its own part of the disk, reads them back and compares,
    /// `rounds` times.
    #[track_caller]
    fn write_and_verify(&mut self, depth: usize, rounds: u64, name: &str) {
        let queues = self.queues.len();
        let lanes = queues * depth;
        // How many half rounds each lane has behind it; odd: it has written.
        let mut steps = vec![0_u64; lanes];
        let mut left = lanes as u64 * rounds * 2;
        for lane in 0..lanes {
            self.step(lane, depth, 0);
        }
        for queue in 0..queues {
            self.kick(queue);
        }
        while left > 0 {
            for queue in 0..queues {
                if steps[queue * depth..(queue + 1) * depth].iter().all(|step| *step == rounds * 2) {
                    continue;
                }
                for (lane, result) in self.wait(queue, name) {
                    assert_eq!(result, 0, "{name}: lane {lane} step {}", steps[lane]);
                    if steps[lane] % 2 == 1 {
                        let (at, len, salt) = Self::place(lane, steps[lane] / 2);
                        let want = salted(salt, at, len);
                        let got = &self.slot(lane * 2 + 1)[..want.len()];
                        assert_same(got, &want, &format!("{name}: sector {at}"));
                    }
                    steps[lane] += 1;
                    left -= 1;
                    if steps[lane] < rounds * 2 {
                        self.step(lane, depth, steps[lane]);
                    }
                }
                self.kick(queue);
            }
        }
    }

    /// Sector, sectors and salt of a lane's round: all sizes and alignments.
    fn place(lane: usize, round: u64) -> (u64, u64, u64) {
        let lane = lane as u64;
        let sectors = 1 + (round * 37 + lane * 11) % 96;
        let start = lane * 256 + (round * 13 + lane) % 128;
        (start, sectors, round * 1000 + lane)
    }

    fn step(&mut self, lane: usize, depth: usize, step: u64) {
        let (sector, sectors, salt) = Self::place(lane, step / 2);
        let offset = sector * SECTOR as u64;
        let len = sectors as usize * SECTOR;
        if step.is_multiple_of(2) {
            self.slot(lane * 2)[..len].copy_from_slice(&salted(salt, sector, sectors));
            let buffer = self.slot(lane * 2).as_ptr();
            // SAFETY: the slot stays mapped and is left alone until the
            // request is done.
            unsafe { self.queues[lane / depth].write_raw(offset, buffer, len, lane) }.unwrap();
        } else {
            self.slot(lane * 2 + 1)[..len].fill(0);
            let buffer = self.slot(lane * 2 + 1).as_mut_ptr();
            // SAFETY: as above.
            unsafe { self.queues[lane / depth].read_raw(offset, buffer, len, lane) }.unwrap();
        }
    }
}

const ALL: VirtioFeatureFlags =
    VirtioFeatureFlags::RING_INDIRECT_DESC.union(VirtioFeatureFlags::RING_EVENT_IDX);

pub fn depths(bench: &Bench) {
    let daemon = bench.start(&Options::default());
    for depth in [1, 2, 7, 32, 128] {
        let mut driver = Driver::new(&daemon, 1, depth, ALL);
        let rounds = 256 / depth as u64 + 4;
        driver.write_and_verify(depth, rounds, &format!("depth {depth}"));
    }
}

pub fn all_requests(bench: &Bench) {
    let daemon = bench.start(&Options::default());
    let mut driver = Driver::new(&daemon, 1, 4, ALL);
    let config = driver.transport.get_config().unwrap();
    assert_eq!(u64::from(config.capacity), bench.disk.sectors);
    let data = salted(1, 64, 64);
    driver.slot(0)[..data.len()].copy_from_slice(&data);
    let buffer = driver.slot(0).as_mut_ptr();
    let (len, offset) = (data.len(), 64 * SECTOR as u64);
    // SAFETY: slot 0 is used by this request alone, until it is done.
    let result = driver.one(|q| unsafe { q.write_raw(offset, buffer, len, 0) }, "write");
    assert_eq!(result, 0);
    assert_eq!(driver.one(|q| q.flush(0), "flush"), 0);
    let zeroes = |q: &mut VirtioBlkQueue<'static, usize>| {
        q.write_zeroes(offset + 8192, 8192, true, 0)?;
        Ok(())
    };
    assert_eq!(driver.one(zeroes, "write-zeroes"), 0);
    assert_eq!(driver.one(|q| q.discard(1 << 20, 65536, 0), "discard"), 0);
    // SAFETY: as above.
    let result = driver.one(|q| unsafe { q.read_raw(offset, buffer, len, 0) }, "read");
    assert_eq!(result, 0);
    let mut want = data;
    want[8192..16384].fill(0);
    assert_same(&driver.slot(0)[..len], &want, "zeroes in the middle");
    assert_same(&bench.stored().read(64, 64), &want, "in the file");
    // Errors come out as errors.
    let end = bench.disk.sectors * SECTOR as u64;
    // SAFETY: as above.
    let result = driver.one(|q| unsafe { q.read_raw(end, buffer, 512, 0) }, "bad read");
    assert_eq!(result, -libc::EIO);
    let result = driver.one(|q| q.discard(end, 512, 0), "bad discard");
    assert_eq!(result, -libc::EIO);
}

pub fn several_queues(bench: &Bench) {
    let daemon = bench.start(&Options::default());
    for (queues, depth) in [(2, 16), (4, 1), (4, 32)] {
        let mut driver = Driver::new(&daemon, queues, depth, ALL);
        let name = format!("{queues} queues, depth {depth}");
        driver.write_and_verify(depth, 12, &name);
    }
}

pub fn without_event_idx(bench: &Bench) {
    let daemon = bench.start(&Options::default());
    for features in [
        VirtioFeatureFlags::empty(),
        VirtioFeatureFlags::RING_INDIRECT_DESC,
        VirtioFeatureFlags::RING_EVENT_IDX,
    ] {
        let mut driver = Driver::new(&daemon, 2, 16, features);
        driver.write_and_verify(16, 10, &format!("{features:?}"));
    }
}

pub fn scattered_vectors(bench: &Bench) {
    let daemon = bench.start(&Options::default());
    let mut driver = Driver::new(&daemon, 1, 32, ALL);
    // 30 pieces of odd lengths that add up to whole sectors.
    let pieces = 30;
    let mut lens: Vec<usize> = (0..pieces).map(|index| 100 + index * 37).collect();
    let sum: usize = lens.iter().sum();
    lens[0] += sum.next_multiple_of(SECTOR) - sum;
    let total: usize = lens.iter().sum();
    let data = salted(7, 33, (total / SECTOR) as u64);
    let mut vectors = Vec::new();
    let mut at = 0;
    for (index, len) in lens.iter().enumerate() {
        let place = &mut driver.slot(index)[index * 5..index * 5 + len];
        place.copy_from_slice(&data[at..at + len]);
        vectors.push(iovec { iov_base: place.as_mut_ptr().cast(), iov_len: *len });
        at += len;
    }
    let list = vectors.as_ptr();
    let offset = 33 * SECTOR as u64;
    // SAFETY: the vector and all its pieces live until the request is done.
    let result = driver.one(|q| unsafe { q.writev(offset, list, pieces, 0) }, "writev");
    assert_eq!(result, 0);
    for index in 0..pieces {
        driver.slot(index).fill(0);
    }
    // SAFETY: as above.
    let result = driver.one(|q| unsafe { q.readv(offset, list, pieces, 0) }, "readv");
    assert_eq!(result, 0);
    let mut got = Vec::new();
    for (index, len) in lens.iter().enumerate() {
        got.extend_from_slice(&driver.slot(index)[index * 5..index * 5 + len]);
    }
    assert_same(&got, &data, "through 30 pieces");
    assert_same(&bench.stored().read(33, (total / SECTOR) as u64), &data, "in the file");
}
