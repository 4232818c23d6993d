//! The dirty log of a live migration, as the source's front-end has it: what the
//! device wrote to the guest is marked, and nothing else.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::{each_engine, start};
use crate::support::daemon::{Daemon, URING};
use crate::support::device::{Device, OK, Setup, T_FLUSH, T_GET_ID, T_IN, T_OUT, header, ring_addr};
use crate::support::dice::Dice;
use crate::support::disk::{SECTOR, salted};
use crate::support::frontend::{feature, msg, single_region, words64};
use crate::support::memory::{Memory, Region, Span};
use crate::support::ring::{Seg, back, out};
use crate::support::sys::memory_file;

pub const PAGE: u64 = 4096;
/// Guest memory: two regions side by side, and one far away.
pub const SPANS: [Span; 3] = [
    Span { guest: 1 << 20, len: 32 << 20 },
    Span { guest: 33 << 20, len: 8 << 20 },
    Span { guest: 4 << 30, len: 8 << 20 },
];
/// A bit for every page up to the end of it, and the bytes before it in its file.
const LOG_BYTES: u64 = ((4 << 30) + (8 << 20)) / PAGE / 8;
const LOG_OFFSET: u64 = 4096 + 64;

/// A log in a file of ours.
pub struct Log(File);

impl Log {
    pub fn new() -> Self {
        Self(memory_file(LOG_OFFSET + LOG_BYTES))
    }

    #[track_caller]
    pub fn give(&self, device: &Device) {
        let payload = words64(&[LOG_BYTES, LOG_OFFSET]);
        device.frontend.send(msg::SET_LOG_BASE, 0, &payload, &[self.0.as_fd()]).unwrap();
        assert_eq!(device.frontend.receive().unwrap().payload, payload);
    }

    /// Page numbers that are marked; they are not any more.
    pub fn take(&self) -> Vec<u64> {
        let mut bytes = vec![0; LOG_BYTES as usize];
        self.0.read_exact_at(&mut bytes, LOG_OFFSET).unwrap();
        self.0.write_all_at(&vec![0; bytes.len()], LOG_OFFSET).unwrap();
        let bits = |(at, byte): (usize, u8)| {
            (0..8_u64).filter(move |bit| byte & 1 << bit != 0).map(move |bit| at as u64 * 8 + bit)
        };
        bytes.into_iter().enumerate().filter(|(_, byte)| *byte != 0).flat_map(bits).collect()
    }
}

/// LOG_ALL on or off, and the used rings with it, while they run.
#[track_caller]
pub fn log_all(device: &Device, on: bool) {
    let bit = if on { feature::LOG_ALL } else { 0 };
    device.frontend.tell64(msg::SET_FEATURES, device.features | bit);
    for (index, ring) in (0..).zip(&device.rings) {
        let mut payload = ring_addr(index, ring);
        payload[4] = u8::from(on);
        payload[32..40].copy_from_slice(&ring.used.to_le_bytes());
        device.frontend.tell(msg::SET_VRING_ADDR, &payload, &[]);
    }
}

fn pages(guest: u64, len: u64) -> impl Iterator<Item = u64> {
    guest / PAGE..=(guest + len - 1) / PAGE
}

/// A request, and the guest ranges that the device may write for it.
fn request(memory: &Memory, dice: &mut Dice, written: &mut Vec<(u64, u64)>) -> Vec<Seg> {
    let kind = [T_IN, T_IN, T_IN, T_OUT, T_GET_ID, T_FLUSH, 77][dice.below(7) as usize];
    let most = if dice.rarely(4) { 200 } else { 16 };
    let sectors = 1 + dice.below(most);
    // Some are beyond the end of the disk.
    let sector = if dice.rarely(8) { (64 << 20) / 512 - 1 } else { dice.below(2000) };
    let len = if kind == T_GET_ID { 20 } else { sectors * SECTOR as u64 };
    let region = dice.below(3) as usize;
    // Buffers at any address; those of the driver have pages of their own.
    let skew = if dice.rarely(2) { dice.below(8) * 512 } else { dice.below(4096) };
    let mut data = memory.alloc_in(region, len + 2 * PAGE, PAGE) + skew;
    if region == 0 && dice.rarely(4) {
        data = SPANS[1].guest - len / 2; // across the border of two regions
    }
    let head = memory.page_with(&header(kind, sector));
    let status = memory.alloc_in(1, 1, PAGE) + dice.below(PAGE - 1);
    let mut segs = vec![out(head, 16)];
    match kind {
        T_IN | T_GET_ID => {
            written.push((data, len));
            segs.push(back(data, len as usize));
        }
        T_OUT => {
            memory.write(data, &salted(3, sector, sectors));
            segs.push(out(data, len as usize));
        }
        _ => {}
    }
    memory.write(status, &[0xff]);
    written.push((status, 1));
    segs.push(back(status, 1));
    segs
}

#[test]
fn every_page_that_the_device_writes_is_marked() {
    each_engine(|engine| {
        for without in [0, feature::EVENT_IDX] {
            let (_disk, daemon) = start(engine);
            let memory = Memory::with(&SPANS);
            let mut device = Device::new(
                &daemon,
                Setup { queues: 2, without, memory: memory.clone(), ..Setup::default() },
            );
            let log = Log::new();
            log.give(&device);
            assert_eq!(device.run(0, T_IN, 0, &[], 4096).status, OK);
            assert!(log.take().is_empty(), "marked before it was asked for");
            log_all(&device, true);
            log.take();
            let mut dice = Dice::new(0xd1e7 + without);
            for round in 0..12 {
                let mut allowed: Vec<(u64, u64)> = Vec::new();
                let mut owed = [0, 0];
                for _ in 0..12 {
                    let segs = request(&memory, &mut dice, &mut allowed);
                    let queue = dice.below(2) as usize;
                    owed[queue] += 1;
                    let ring = &mut device.rings[queue];
                    let head = if dice.rarely(2) { ring.indirect(&segs) } else { ring.chain(&segs) };
                    ring.stage(head);
                }
                let before: Vec<_> = SPANS.map(|s| memory.read(s.guest, s.len as usize)).into();
                for ring in &device.rings {
                    ring.publish();
                    ring.kick.signal();
                }
                for (ring, owed) in device.rings.iter_mut().zip(owed) {
                    for _ in 0..owed {
                        ring.wait_used("a request during a migration");
                    }
                }
                // Answered by the control thread after the workers' last turn.
                device.frontend.vring_base(0).unwrap();
                device.frontend.vring_fd(msg::SET_VRING_KICK, 0, &device.rings[0].kick);
                device.frontend.vring_base(1).unwrap();
                device.frontend.vring_fd(msg::SET_VRING_KICK, 1, &device.rings[1].kick);
                let marked = log.take();
                let ours: Vec<u64> =
                    device.rings.iter().flat_map(|r| pages(r.avail, 6 + 2 * u64::from(r.size))).collect();
                let rings: Vec<u64> =
                    device.rings.iter().flat_map(|r| pages(r.used, 6 + 8 * u64::from(r.size))).collect();
                for (span, before) in SPANS.iter().zip(before) {
                    let now = memory.read(span.guest, span.len as usize);
                    for (at, (was, is)) in before.chunks(4096).zip(now.chunks(4096)).enumerate() {
                        let page = span.guest / PAGE + at as u64;
                        let changed = was != is && (!ours.contains(&page) || rings.contains(&page));
                        assert!(!changed || marked.contains(&page), "round {round}: {page:#x} is not marked");
                    }
                }
                for page in marked {
                    let may = rings.contains(&page)
                        || allowed.iter().any(|&(guest, len)| pages(guest, len).any(|p| p == page));
                    assert!(may, "round {round}: {page:#x} is marked, and the device had no business there");
                }
            }
            log_all(&device, false);
            log.take();
            assert_eq!(device.run(0, T_IN, 0, &[], 4096).status, OK);
            assert!(log.take().is_empty(), "marked when it was over");
        }
    });
}

/// Memory that comes later is logged, too, by a worker that starts later.
#[test]
fn regions_and_queues_that_come_later() {
    let (_disk, daemon) = start(URING);
    let mut device = Device::new(&daemon, Setup { queues: 1, ..Setup::default() });
    let log = Log::new();
    log.give(&device);
    log_all(&device, true);
    let added = Region::new(4 << 30, 8 << 20, 0);
    device.frontend.add_region(&added);
    // Where it could not be marked.
    let beyond = Region::new(1 << 44, 1 << 20, 0);
    let refused = device.frontend.command(msg::ADD_MEM_REG, &single_region(&beyond), &[beyond.file.as_fd()]);
    assert_eq!(refused.ok(), Some(1));
    daemon.wait_log("guest memory that ends at 0x100000100000 is more than the dirty log covers");
    let page = (4 << 30) / PAGE + 5;
    let segs = [out(device.memory.page_with(&header(T_IN, 0)), 16), back(page * PAGE, 4096 + 1)];
    let head = device.rings[0].chain(&segs);
    device.rings[0].offer(head);
    device.rings[0].wait_used("a read into the new region");
    let memory = device.memory.clone();
    let mut ring = crate::support::ring::Ring::new(memory.clone(), 64, 0, true);
    crate::support::device::start_ring(&device.frontend, 1, &ring);
    let second = page + 100;
    let head = ring.chain(&[out(memory.page_with(&header(T_IN, 0)), 16), back(second * PAGE, 4096 + 1)]);
    ring.offer(head);
    ring.wait_used("a read by another worker");
    device.frontend.sync();
    let marked = log.take();
    for page in [page, page + 1, second, second + 1] {
        assert!(marked.contains(&page), "{page:#x} is not marked");
    }
}

/// Logs that cannot be: the front-end is left, and nothing else happens.
#[test]
fn logs_that_make_no_sense() {
    let (_disk, mut daemon) = start(URING);
    let log = Log::new();
    for (bytes, offset) in [(0, 0), (64, 0), (LOG_BYTES, 1 << 40), (u64::MAX, 1), (LOG_BYTES + 1, LOG_OFFSET)]
    {
        let device = Device::new(&daemon, Setup { memory: Memory::with(&SPANS), ..Setup::default() });
        device.frontend.send(msg::SET_LOG_BASE, 0, &words64(&[bytes, offset]), &[log.0.as_fd()]).unwrap();
        device.frontend.wait_hangup("a log that is too short, or not there");
    }
    // One that is truncated while it is used.
    let mut device = Device::new(&daemon, Setup { memory: Memory::with(&SPANS), ..Setup::default() });
    log.give(&device);
    log_all(&device, true);
    device.assert_serves(0);
    log.0.set_len(0).unwrap();
    device.submit(0, T_IN, 0, &[], 4096);
    device.frontend.wait_hangup("a log that is gone");
    Device::plain(&daemon).assert_serves(0);
    daemon.assert_alive();
    daemon.stop();
}

/// The guest of `there` goes on at `target`, on the same disk, before its old daemon has lost it.
#[track_caller]
pub fn move_to(target: &mut Daemon, there: Device) {
    target.wait_listening();
    let log = Log::new();
    log.give(&there);
    log_all(&there, true);
    there.frontend.vring_base(0).unwrap();
    let mut here = Device::plain(target);
    here.assert_serves(0);
    drop(there);
    here.assert_serves(0);
}
