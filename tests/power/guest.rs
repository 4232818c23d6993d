//! A guest that keeps many requests under way on two queues, and knows of each sector what it may hold.

use std::ops::Range;

use super::promises::{Change, Promises, content};
use crate::durability::stage::WRITEBACK;
use crate::support::daemon::Daemon;
use crate::support::device::{
    Device, OK, Setup, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, UNWRITTEN, header, range,
};
use crate::support::dice::Dice;
use crate::support::disk::{SECTOR, salted};
use crate::support::frontend::feature;
use crate::support::gate::Gate;
use crate::support::ring::{Used, back, out};
use crate::support::sys::{Deadline, tick};

const QUEUES: u32 = 2;
const LANES: usize = 16;
/// Sectors of the longest request: its 150 KiB are two of FUSE.
const LONGEST: u64 = 300;

/// Room for one request after another.
struct Lane {
    header: u64,
    status: u64,
    data: u64,
    request: Option<Request>,
}

struct Request {
    kind: u32,
    range: Range<u64>,
    /// It was sent to a device in write-through.
    write_through: bool,
    /// Of a FLUSH: what had been answered when it was sent.
    answered: Vec<usize>,
}

/// See the head of the file.
pub struct Guest<'a> {
    gate: &'a Gate,
    promises: &'a mut Promises,
    device: Device,
    lanes: Vec<Lane>,
    /// By queue and head.
    owners: Vec<Vec<usize>>,
    /// Sectors with a request under way.
    busy: Vec<bool>,
    /// Where the last request ended.
    last: u64,
    pub write_through: bool,
    dice: Dice,
    /// The number of the last request.
    pub number: u64,
    pub answers: u64,
}

impl<'a> Guest<'a> {
    /// A driver that takes the disk over, in the cache mode that it finds.
    pub fn new(
        daemon: &Daemon,
        gate: &'a Gate,
        promises: &'a mut Promises,
        without: u64,
        seed: u64,
        number: u64,
    ) -> Self {
        let device = Device::new(daemon, Setup { queues: QUEUES, without, ..Setup::default() });
        let cached = device.features & feature::FLUSH != 0;
        let write_through = !cached || device.frontend.config(WRITEBACK, 1).unwrap() == [0];
        let lane = |_| {
            let control = device.memory.alloc(4096, 4096);
            let data = device.memory.alloc(LONGEST * SECTOR as u64, 4096);
            Lane { header: control, status: control + 64, data, request: None }
        };
        Self {
            lanes: (0..LANES).map(lane).collect(),
            owners: vec![vec![usize::MAX; 128]; QUEUES as usize],
            busy: vec![false; promises.sectors() as usize],
            last: 0,
            write_through,
            dice: Dice::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            number,
            answers: 0,
            gate,
            promises,
            device,
        }
    }

    /// Switches the cache. On the way to write-through all that was answered becomes durable.
    #[track_caller]
    pub fn set_write_through(&mut self, on: bool) {
        let answered = self.promises.answered();
        self.device.frontend.set_config(WRITEBACK, &[u8::from(!on)]);
        if on {
            self.promises.promise_all(self.gate.logged_so_far(), &answered);
        } else {
            // Requests under way may be carried out in the new mode.
            self.lanes
                .iter_mut()
                .filter_map(|lane| lane.request.as_mut())
                .for_each(|r| r.write_through = false);
        }
        self.write_through = on;
    }

    /// A range that no request has: often right behind the last one, as files are written.
    fn draw(&mut self) -> Option<Range<u64>> {
        let sectors = self.promises.sectors();
        let len = match self.dice.below(20) {
            0..6 => 1,
            6..14 => 8,
            14..19 => 1 + self.dice.below(64),
            _ => LONGEST,
        };
        let start = match self.dice.below(4) {
            0..2 => self.last,
            2 => self.dice.below(sectors / 8) * 8,
            _ => self.dice.below(sectors),
        };
        let range = start..start + len;
        let free = range.end <= sectors && !self.busy[start as usize..range.end as usize].contains(&true);
        self.last = if range.end < sectors { range.end } else { 0 };
        free.then_some(range)
    }

    /// A request for every lane that has none, if one can be drawn.
    pub fn offer(&mut self) {
        for at in 0..LANES {
            if self.lanes[at].request.is_none() {
                self.offer_one(at);
            }
        }
        for ring in &self.device.rings {
            ring.publish();
            ring.kick.signal();
        }
    }

    fn offer_one(&mut self, at: usize) {
        let can_flush = self.device.features & feature::FLUSH != 0;
        let kind = match self.dice.below(20) {
            0..2 if can_flush => T_FLUSH,
            2..5 => T_IN,
            5..7 => T_WRITE_ZEROES,
            7 => T_DISCARD,
            _ => T_OUT,
        };
        let drawn = if kind == T_FLUSH { Some(0..0) } else { self.draw() };
        let Some(range_drawn) = drawn else { return };
        self.busy[range_drawn.start as usize..range_drawn.end as usize].fill(true);
        let Lane { header: header_at, status, data, .. } = self.lanes[at];
        let (sector, sectors) = (range_drawn.start, range_drawn.end - range_drawn.start);
        let bytes = sectors as usize * SECTOR;
        self.number += 1;
        let memory = &self.device.memory;
        let (change, segment) = match kind {
            T_OUT => {
                memory.write(data, &salted(self.number, sector, sectors));
                (Some(Change::Write), Some(out(data, bytes)))
            }
            T_IN => (None, Some(back(data, bytes))),
            T_FLUSH => (None, None),
            _ => {
                let may_unmap = u32::from(kind == T_WRITE_ZEROES && self.dice.rarely(2));
                memory.write(data, &range(sector, sectors as u32, may_unmap));
                let change = if kind == T_DISCARD { Change::Discard } else { Change::Zeroes };
                (Some(change), Some(out(data, 16)))
            }
        };
        memory.write(header_at, &header(kind, if matches!(kind, T_IN | T_OUT) { sector } else { 0 }));
        memory.write(status, &[UNWRITTEN]);
        if let Some(change) = change {
            self.promises.request(self.number, change, range_drawn.clone());
        }
        let queue = self.dice.below(u64::from(QUEUES)) as usize;
        let ring = &mut self.device.rings[queue];
        let segments: Vec<_> =
            [Some(out(header_at, 16)), segment, Some(back(status, 1))].into_iter().flatten().collect();
        let head = ring.chain(&segments);
        ring.stage(head);
        self.owners[queue][usize::from(head)] = at;
        let answered = if kind == T_FLUSH { self.promises.answered() } else { Vec::new() };
        self.lanes[at].request =
            Some(Request { kind, range: range_drawn, write_through: self.write_through, answered });
    }

    /// Waits for the next answer, of any queue.
    #[track_caller]
    fn wait(&mut self) -> (usize, Used) {
        let deadline = Deadline::new("an answer");
        loop {
            for (queue, ring) in self.device.rings.iter_mut().enumerate() {
                ring.set_used_event(ring.seen);
                if let Some(used) = ring.take_used() {
                    return (queue, used);
                }
            }
            let calls: Vec<_> =
                self.device.rings.iter().map(|ring| std::os::fd::AsFd::as_fd(&ring.call)).collect();
            tick(&calls, deadline.left());
            deadline.check();
            self.device.rings.iter().for_each(|ring| {
                ring.call.take();
            });
        }
    }

    /// Takes the next answer, and what it promises.
    #[track_caller]
    pub fn take(&mut self) {
        let (queue, used) = self.wait();
        // After the answer was seen: the log may be longer by now than it was, and is never shorter.
        let from = self.gate.logged_so_far();
        let lane = self.owners[queue][usize::from(used.head)];
        let Lane { status, data, .. } = self.lanes[lane];
        let Request { kind, range, write_through, answered } =
            self.lanes[lane].request.take().expect("one answer for each request");
        assert_eq!(self.device.memory.byte(status), OK, "a request of type {kind} for {range:?}");
        self.answers += 1;
        self.busy[range.start as usize..range.end as usize].fill(false);
        match kind {
            T_FLUSH => self.promises.promise_all(from, &answered),
            T_IN => {
                let bytes = self.device.memory.read(data, (range.end - range.start) as usize * SECTOR);
                for (sector, bytes) in range.zip(bytes.chunks(SECTOR)) {
                    let got = content(sector, bytes);
                    assert!(self.promises.allow_read(sector, got), "a read of sector {sector} gave {got:?}");
                }
            }
            _ => {
                self.promises.answer(range.clone());
                if write_through {
                    self.promises.promise_range(from, range);
                }
            }
        }
    }

    /// Until this many requests were answered, with as many under way as there can be.
    #[track_caller]
    pub fn work(&mut self, answers: u64) {
        for _ in 0..answers {
            self.offer();
            self.take();
        }
    }

    /// Until every request was answered.
    #[track_caller]
    pub fn drain(&mut self) {
        while self.lanes.iter().any(|lane| lane.request.is_some()) {
            self.take();
        }
    }
}
