//! What a guest asks of its disk, good and bad, and how it judges the answers.

use vublk::engine::Token;

use super::disk::SECTOR;
use super::guest::{Play, Queue};
use super::setup::AREA;
use crate::support::device::{
    IOERR, OK, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, UNSUPP, UNWRITTEN, header, range,
};
use crate::support::dice::Dice;
use crate::support::memory::Memory;
use crate::support::ring::{Desc, NEXT, Seg, back, out};

/// For each sector of the disk, what is there: see [`Model::mark`].
#[derive(Clone)]
pub struct Marks(Vec<(usize, usize)>);

impl Marks {
    /// Of what was surely written.
    pub fn sure(&self) -> impl Iterator<Item = usize> {
        self.0.iter().map(|marks| marks.1)
    }
}

impl std::fmt::Debug for Marks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} sectors", self.0.len())
    }
}

#[derive(Clone, Debug)]
pub enum What {
    Read,
    /// The value of each sector.
    Write(Vec<u64>),
    Zero,
    Discard,
    Flush(Marks),
    /// Comes back, with this status or with none of the kind.
    Refused(u8),
    /// Comes back: no more can be said.
    Nonsense,
}

/// One request at a time, on sectors of its own.
pub struct Lane {
    pub header: u64,
    pub data: u64,
    pub sector: u64,
    pub count: u64,
    pub queue: usize,
    pub what: Option<What>,
    /// When it was sent: how often the cache mode had changed, and whether a sync had failed.
    changes: u64,
    sync_failed: bool,
    /// Likewise: how often a server was started anew and requests were given up, and whether something was lost with it.
    server: (u64, u64),
    dropped: bool,
}

impl Lane {
    pub fn new(memory: &Memory) -> Self {
        Self {
            header: memory.alloc(4096, 4096),
            data: memory.alloc(AREA * 512 + 4096, 4096),
            sector: 0,
            count: 0,
            queue: 0,
            what: None,
            changes: 0,
            sync_failed: false,
            server: (0, 0),
            dropped: false,
        }
    }

    pub fn status(&self) -> u64 {
        self.header + 64
    }
}

impl Play {
    /// Requests for some of the lanes that have none.
    pub fn offer(&mut self) {
        let queue = self.dice.below(self.queues.len() as u64) as usize;
        let before = self.queues[queue].ring.avail_idx;
        for at in 0..self.lanes.len() {
            if self.lanes[at].what.is_none() && self.dice.rarely(2) && self.queues[queue].ring.free() >= 6 {
                self.request(at, queue);
            }
        }
        let ring = &self.queues[queue].ring;
        let now = ring.avail_idx;
        if now == before {
            return;
        }
        ring.publish();
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let wanted = if ring.event_idx {
            now.wrapping_sub(ring.avail_event()).wrapping_sub(1) < now.wrapping_sub(before)
        } else {
            !ring.device_wants_no_kicks()
        };
        if wanted {
            self.world.borrow_mut().signal(self.setup.worker_of(queue), Token(queue as u16 + 1));
        }
        self.driver_wrote(queue);
    }

    fn request(&mut self, at: usize, queue: usize) {
        let kind = match self.dice.below(16) {
            0..=5 => T_IN,
            6..=11 => T_OUT,
            12 | 13 => T_FLUSH,
            14 if self.dice.rarely(2) => T_WRITE_ZEROES,
            14 => T_DISCARD,
            _ => 99,
        };
        let (header, data) = (self.lanes[at].header, self.lanes[at].data);
        self.memory.write(self.lanes[at].status(), &[UNWRITTEN]);
        let head = if kind == 99 { self.nonsense(at, queue) } else { self.sound(at, queue, kind) };
        self.guest_wrote(header, 4096);
        self.guest_wrote(data, AREA * 512 + 4096);
        let sync_failed = self.world.borrow().sync_failed;
        let server = self.server_count();
        let lane = &mut self.lanes[at];
        (lane.server, lane.dropped) = (server, self.dropped);
        (lane.queue, lane.changes, lane.sync_failed) = (queue, self.mode.changes, sync_failed);
        let Queue { ring, owner, .. } = &mut self.queues[queue];
        owner[usize::from(head)] = at;
        ring.stage(head);
        self.count.requests += 1;
    }

    /// A request that makes sense; gives its head.
    fn sound(&mut self, at: usize, queue: usize, kind: u32) -> u16 {
        let block = u64::from(self.setup.block) / 512;
        let (first, area) = self.setup.lane(at as u64);
        let lane = &mut self.lanes[at];
        let start = self.dice.below(area / block) * block;
        let most = area - start;
        lane.sector = first + start;
        lane.count = (1 + self.dice.below(most / block)) * block;
        let (sector, count) = (lane.sector, lane.count);
        let bytes = (count * 512) as usize;
        // Buffers at any multiple of 8.
        let data = lane.data + if self.dice.rarely(2) { 8 * self.dice.below(500) } else { 0 };
        let mut segs: Vec<Seg> = vec![out(lane.header, 16)];
        let what = match kind {
            T_IN => {
                self.memory.write(data, &vec![0xee; bytes]);
                self.memory.write(lane.header + 128, &data.to_le_bytes());
                split_in_two(&mut segs, back(data, bytes), &mut self.dice);
                What::Read
            }
            T_OUT => {
                let values: Vec<u64> = (0..count).map(|n| self.value + n + 1).collect();
                self.value += count;
                let words: Vec<Vec<u8>> = values.iter().map(|v| v.to_le_bytes().repeat(SECTOR / 8)).collect();
                self.memory.write(data, &words.concat());
                split_in_two(&mut segs, out(data, bytes), &mut self.dice);
                What::Write(values)
            }
            T_FLUSH => {
                lane.count = 0;
                What::Flush(Marks(self.model.iter().map(|model| (model.mark(), model.sure_mark())).collect()))
            }
            _ => {
                self.memory.write(data, &range(sector, count as u32, 0));
                segs.push(out(data, 16));
                if kind == T_DISCARD { What::Discard } else { What::Zero }
            }
        };
        let sector = if kind == T_IN || kind == T_OUT { sector } else { 0 };
        self.memory.write(lane.header, &header(kind, sector));
        segs.push(back(lane.status(), 1));
        lane.what = Some(what);
        let (header, status) = (lane.header, lane.status());
        let Queue { ring, indirect, .. } = &mut self.queues[queue];
        debug_assert!(status < header + 1024);
        if *indirect && self.dice.rarely(2) {
            // A table of its own place, not one more of the memory for each request.
            ring.indirect_at(header + 1024, &segs)
        } else {
            ring.chain(&segs)
        }
    }

    /// A request that no device can serve, or no chain at all; gives its head.
    fn nonsense(&mut self, at: usize, queue: usize) -> u16 {
        let sectors = self.model.len() as u64;
        let lane = &mut self.lanes[at];
        (lane.sector, lane.count) = (self.setup.lane(at as u64).0, 0);
        let (first, data, status) = (out(lane.header, 16), lane.data, back(lane.status(), 1));
        let block = u64::from(self.setup.block);
        let ring = &mut self.queues[queue].ring;
        let (kind, sector, segs, what) = match self.dice.below(12) {
            0 => (99, 0, vec![first, status], What::Refused(UNSUPP)),
            // Beyond the end, wholly or in part, and by an overflow.
            1 => (T_IN, sectors, vec![first, back(data, block as usize), status], What::Refused(IOERR)),
            2 => {
                let sector = sectors - block / 512;
                (T_OUT, sector, vec![first, out(data, 2 * block as usize), status], What::Refused(IOERR))
            }
            3 => {
                (T_OUT, u64::MAX / 512, vec![first, out(data, block as usize), status], What::Refused(IOERR))
            }
            // No whole sectors.
            4 => (T_OUT, lane.sector, vec![first, out(data, 100), status], What::Refused(IOERR)),
            // A range without the bytes that say so.
            5 => (T_DISCARD, 0, vec![first, out(data, 7), status], What::Refused(IOERR)),
            // Nothing to write the status to.
            6 => (T_OUT, lane.sector, vec![first, out(data, block as usize)], What::Nonsense),
            7 => (T_IN, lane.sector, vec![first], What::Nonsense),
            // Outside of the memory.
            8 => (T_IN, lane.sector, vec![first, back(1 << 40, block as usize), status], What::Nonsense),
            9 => (
                T_OUT,
                lane.sector,
                vec![first, out(data, block as usize), back(u64::MAX - 7, 16)],
                What::Nonsense,
            ),
            // A circle, and a link to nowhere.
            other => {
                let next = if other == 10 { None } else { Some(ring.size) };
                lane.what = Some(What::Nonsense);
                let head = ring.raw(Desc { addr: first.addr, len: 16, flags: NEXT, next: 0 });
                let next = next.unwrap_or(head);
                ring.write_desc(head, Desc { addr: first.addr, len: 16, flags: NEXT, next });
                return head;
            }
        };
        lane.what = Some(what);
        self.memory.write(lane.header, &header(kind, sector));
        ring.chain(&segs)
    }

    /// Judges an answer.
    pub fn answered(&mut self, at: usize, written: u32, queue: usize) {
        assert!(at < self.lanes.len(), "a head came back that was not sent");
        let (restarts, give_ups) = self.server_count();
        let lane = &mut self.lanes[at];
        let what = lane.what.take().expect("a lane is answered once");
        let same_server = lane.server.0 == restarts;
        let status = self.memory.byte(lane.status());
        let (sector, count) = (lane.sector as usize, lane.count as usize);
        let models = &mut self.model[sector..sector + count];
        let ok = status == OK;
        // Every failure has a cause: the request's own operation, or a sync that had failed.
        let (faults, failed) = {
            let world = self.world.borrow();
            (world.weather.faults > 0 || lane.server.1 != give_ups, world.sync_failed)
        };
        let may_fail = match what {
            What::Read => faults,
            What::Flush(_) => failed,
            _ => faults || failed,
        };
        let same_mode = lane.changes == self.mode.changes;
        let durable = !self.mode.write_back && (self.mode.sound || same_mode);
        let says_durable = match what {
            What::Flush(_) => true,
            What::Write(_) | What::Zero => !self.mode.write_back && same_mode,
            _ => false,
        };
        assert!(
            !(ok && says_durable && lane.sync_failed),
            "a request after a failed sync was answered with OK: {what:?}"
        );
        match what {
            What::Nonsense => {}
            What::Refused(code) => assert_eq!(status, code, "the status of a request that cannot be served"),
            _ => assert!(ok || may_fail && status == IOERR, "status {status:#x} of {what:?}"),
        }
        // The pieces of one that was not made durable may have gone to two servers.
        let surely = ok && (same_server || durable);
        if ok && !same_server {
            let lost = |n: usize, value: u64| self.world.borrow().read((sector + n) as u64) != value;
            self.dropped |= match &what {
                What::Write(values) => values.iter().enumerate().any(|(n, value)| lost(n, *value)),
                What::Zero => (0..count).any(|n| lost(n, 0)),
                _ => false,
            };
        }
        let dropped = lane.dropped;
        match what {
            What::Nonsense => {}
            What::Read if ok => assert_eq!(written as usize, count * SECTOR + 1, "used.len"),
            // Nothing before the status byte is written then.
            What::Read => assert_eq!(written, 0, "used.len of a read that failed"),
            What::Refused(_) => assert!(written <= 1, "used.len of {what:?}"),
            _ => assert_eq!(written, 1, "used.len of {what:?}"),
        }
        match what {
            What::Read if ok => {
                let table = self.memory.read(lane.header + 128, 8);
                let data = u64::from_le_bytes(table.try_into().unwrap());
                let bytes = self.memory.read(data, count * SECTOR);
                // One that a server was started anew under may have seen either side of that.
                for (n, (model, got)) in models.iter_mut().zip(bytes.chunks(SECTOR)).enumerate() {
                    let value = u64::from_le_bytes(got[..8].try_into().unwrap());
                    assert!(got.chunks(8).all(|w| w == &got[..8]), "sector {} was read torn", sector + n);
                    let may: Vec<u64> = model.values().collect();
                    assert!(
                        !same_server || model.seen(value),
                        "sector {} reads as {value:#x}, not {may:x?}",
                        sector + n
                    );
                }
            }
            What::Read | What::Refused(_) => {}
            What::Write(values) => {
                models.iter_mut().zip(values).for_each(|(m, v)| m.written(v, surely, durable));
            }
            What::Zero => models.iter_mut().for_each(|m| m.written(0, surely, durable)),
            // Best effort: what it leaves alone is as it was.
            What::Discard => models.iter_mut().for_each(|m| m.written(0, false, false)),
            What::Flush(marks) => {
                // Answers stand in the ring in the order in which they were given.
                let failed = &mut self.queues[queue].flush_failed;
                assert!(!ok || !*failed, "a FLUSH after one that failed was answered with OK");
                *failed |= !ok;
                if ok {
                    self.judge_flush(&marks, dropped);
                    let how = "by a FLUSH";
                    self.model.iter_mut().zip(marks.0).for_each(|(model, mark)| model.flushed(mark.0, how));
                }
            }
            What::Nonsense => {}
        }
    }

    /// What is on its way may have been done, wholly, in part or not at all; no
    /// answer says which. `begun`: it may.
    pub fn give_up_lane(&mut self, at: usize, begun: bool) {
        let lane = &mut self.lanes[at];
        let (sector, count) = (lane.sector as usize, lane.count as usize);
        let what = lane.what.take();
        if !begun {
            return;
        }
        let models = &mut self.model[sector..sector + count];
        match what {
            Some(What::Write(values)) => {
                models.iter_mut().zip(values).for_each(|(m, v)| m.written(v, false, false));
            }
            Some(What::Zero | What::Discard) => models.iter_mut().for_each(|m| m.written(0, false, false)),
            _ => {}
        }
    }

    pub fn guest_wrote(&self, guest: u64, len: u64) {
        if let Some(migration) = &mut self.world.borrow_mut().migration {
            migration.guest_wrote(guest, len);
        }
    }

    /// The driver's part of a ring changed, but for its descriptors.
    pub fn driver_wrote(&self, queue: usize) {
        let ring = &self.queues[queue].ring;
        self.guest_wrote(ring.table, ring.used - ring.table);
    }
}

/// One segment, or two.
fn split_in_two(segs: &mut Vec<Seg>, seg: Seg, dice: &mut Dice) {
    let half = dice.below(u64::from(seg.len) / 8) as u32 * 8;
    if half > 0 && dice.rarely(3) {
        segs.push(Seg { len: half, ..seg });
        segs.push(Seg { addr: seg.addr + u64::from(half), len: seg.len - half, ..seg });
    } else {
        segs.push(seg);
    }
}
