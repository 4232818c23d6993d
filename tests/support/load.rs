//! A load whose every byte is known: one request in each of its lanes, each lane
//! on blocks of its own, so that at every moment it is known what a block may
//! hold.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::device::{OK, T_IN, T_OUT, UNWRITTEN, header};
use super::dice::Dice;
use super::disk::{Disk, assert_same, salted};
use super::memory::Memory;
use super::ring::{Ring, back, out};

pub const LANES: usize = 32;
const SECTORS: u64 = 8;
const BLOCK: usize = 4096;
/// Blocks of one lane.
const BLOCKS: u64 = 16;

/// One request that is made again and again.
pub struct Lane {
    header: u64,
    status: u64,
    data: u64,
    /// Of each block, what was written last; 0: nothing yet.
    holds: [u64; BLOCKS as usize],
    block: u64,
    /// What is being written, or `None` for a read.
    writes: Option<u64>,
    pub in_flight: bool,
}

pub struct Load {
    memory: Rc<Memory>,
    pub lanes: Vec<Lane>,
    owner: Vec<usize>,
    pub dice: Dice,
    salt: u64,
    pub answered: u64,
}

fn sector(lane: usize, block: u64) -> u64 {
    // No two blocks of different lanes are neighbours.
    (block * LANES as u64 + lane as u64) * 2 * SECTORS
}

impl Load {
    pub fn new(memory: &Rc<Memory>, seed: u64) -> Self {
        let lane = |_| {
            let control = memory.alloc(4096, 4096);
            Lane {
                header: control,
                status: control + 64,
                data: memory.alloc(BLOCK as u64, 4096),
                holds: [0; BLOCKS as usize],
                block: 0,
                writes: None,
                in_flight: false,
            }
        };
        Self {
            memory: Rc::clone(memory),
            lanes: (0..LANES).map(lane).collect(),
            owner: vec![usize::MAX; 256],
            dice: Dice::new(seed),
            salt: 0,
            answered: 0,
        }
    }

    /// A request for every lane that has none.
    pub fn offer(&mut self, ring: &mut Ring) {
        for (at, lane) in self.lanes.iter_mut().enumerate().filter(|(_, lane)| !lane.in_flight) {
            lane.block = self.dice.below(BLOCKS);
            lane.in_flight = true;
            let sector = sector(at, lane.block);
            self.memory.write(lane.status, &[UNWRITTEN]);
            let data = if self.dice.rarely(3) {
                lane.writes = None;
                self.memory.write(lane.header, &header(T_IN, sector));
                self.memory.write(lane.data, &[0xee; BLOCK]);
                back(lane.data, BLOCK)
            } else {
                self.salt += 1;
                lane.writes = Some(self.salt);
                self.memory.write(lane.header, &header(T_OUT, sector));
                self.memory.write(lane.data, &salted(self.salt, sector, SECTORS));
                out(lane.data, BLOCK)
            };
            let head = ring.chain(&[out(lane.header, 16), data, back(lane.status, 1)]);
            self.owner[usize::from(head)] = at;
            ring.stage(head);
        }
        ring.publish();
        ring.kick.signal();
    }

    /// Takes and checks the next answer.
    #[track_caller]
    pub fn take(&mut self, ring: &mut Ring) {
        let used = ring.wait_used("an answer");
        let at = self.owner[usize::from(used.head)];
        let lane = &mut self.lanes[at];
        assert!(lane.in_flight, "lane {at} was answered twice");
        lane.in_flight = false;
        self.answered += 1;
        assert_eq!(self.memory.byte(lane.status), OK, "status of lane {at}");
        match lane.writes {
            Some(salt) => lane.holds[lane.block as usize] = salt,
            None => {
                let want = match lane.holds[lane.block as usize] {
                    0 => vec![0; BLOCK],
                    salt => salted(salt, sector(at, lane.block), SECTORS),
                };
                let got = self.memory.read(lane.data, BLOCK);
                assert_same(&got, &want, &format!("lane {at}, block {}", lane.block));
            }
        }
    }

    /// Where the status byte of the request with this head is.
    pub fn lane_of(&self, head: u16) -> u64 {
        self.lanes[self.owner[usize::from(head)]].status
    }

    /// A moment in which the device is likely to be at work: it was given many requests
    /// some microseconds ago.
    #[track_caller]
    pub fn burst(&mut self, ring: &mut Ring) {
        while ring.used_idx() != ring.seen {
            self.take(ring);
        }
        self.offer(ring);
        let (begun, more) = (Instant::now(), Duration::from_micros(self.dice.below(100)));
        while begun.elapsed() < more {
            std::hint::spin_loop();
        }
    }

    /// Until every lane has its answer.
    #[track_caller]
    pub fn drain(&mut self, ring: &mut Ring) {
        while self.lanes.iter().any(|lane| lane.in_flight) {
            self.take(ring);
        }
    }

    /// What is on the disk in the end.
    pub fn verify(&self, disk: &Disk) {
        for (at, lane) in self.lanes.iter().enumerate() {
            for block in (0..BLOCKS).filter(|&block| lane.holds[block as usize] != 0) {
                let want = salted(lane.holds[block as usize], sector(at, block), SECTORS);
                assert_same(
                    &disk.read(sector(at, block), SECTORS),
                    &want,
                    &format!("lane {at}, block {block}"),
                );
            }
        }
    }
}

/// An empty disk: nothing but zeroes.
pub fn empty_disk() -> Disk {
    let disk = Disk::of_size(16 << 20);
    std::fs::File::create(&disk.path).unwrap().set_len(16 << 20).unwrap();
    disk
}
