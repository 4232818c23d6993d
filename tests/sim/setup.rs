//! What a seed decides before anything happens: the disk, the daemon's options, the
//! guest's size, and how wild the world is.

use super::bugs::Bug;
use crate::support::dice::Dice;

/// Sectors of a lane at most.
pub const AREA: u64 = 16;

/// How wild the world is, in a seed, and of which kind.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// One in so many operations fails, or is cut short; 0: none.
    pub faults: u64,
    /// One in so many fdatasyncs and RWF_DSYNC writes fails to write back; 0: none.
    pub bad_syncs: u64,
    /// One in so many operations is not executed, for want of a thread or of memory; 0: none.
    pub no_threads: u64,
    /// Operations take up to so many turns.
    pub delay: u64,
    /// One in so many calls of the engine is the daemon's last; 0: none.
    pub crashes: u64,
    /// The disk is memory: reads and writes are over when they were asked for.
    pub inline: bool,
    /// Operations of a queue that are submitted together.
    pub batch: usize,
}

/// See the head of the file.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub weather: Weather,
    pub workers: usize,
    /// Of all workers.
    pub queues: usize,
    pub lanes: u64,
    /// Sectors of a lane. Neighbours may share blocks of the disk.
    pub area: u64,
    /// Sectors that the last lane has less than the others.
    pub short: u64,
    /// O_DIRECT, on a disk of 4096-byte blocks.
    pub direct: bool,
    /// The guest's block.
    pub block: u32,
    /// RWF_DSYNC works there.
    pub dsync: bool,
    /// `--write-cache`.
    pub write_back: bool,
    pub plug: bool,
    /// The front-end knows nothing of the in-flight region.
    pub ours: bool,
    /// A server has the disk.
    pub remote: bool,
    pub bug: Option<Bug>,
}

impl Setup {
    pub fn roll(dice: &mut Dice, bug: Option<Bug>) -> Self {
        let weather = Weather {
            faults: [0, 0, 60, 12][dice.below(4) as usize],
            bad_syncs: if dice.rarely(6) { 8 } else { 0 },
            no_threads: if dice.rarely(4) { 5 } else { 0 },
            delay: [0, 2, 9][dice.below(3) as usize],
            crashes: [0, 400, 60][dice.below(3) as usize],
            inline: dice.rarely(4),
            batch: [4, usize::MAX][dice.below(2) as usize],
        };
        let workers = 1 + dice.below(2) as usize;
        let queues = workers * (1 + dice.below(2) as usize);
        let (direct, small) = (dice.rarely(2), dice.rarely(3));
        let block = if direct && small { 4096 } else { 512 };
        let mut setup = Self {
            weather,
            workers,
            queues,
            // Enough of them for a driver to be woken late, where the disk is memory.
            lanes: if dice.rarely(6) { 40 } else { 12 },
            area: if block == 512 && dice.rarely(2) { 13 } else { AREA },
            short: if block == 512 { dice.below(8) } else { 0 },
            direct,
            block,
            dsync: dice.rarely(2),
            write_back: !dice.rarely(4),
            plug: dice.rarely(2),
            ours: dice.rarely(3),
            remote: bug.is_none() && dice.rarely(3),
            bug,
        };
        if let Some(bug) = bug {
            bug.shape(&mut setup);
        }
        if setup.remote {
            // A server answers whole requests; a read, changed and written block could bring back what it
            // had lost, which the model does not know.
            let weather = &mut setup.weather;
            (weather.faults, weather.no_threads, weather.inline) = (0, 0, false);
            if setup.direct {
                (setup.block, setup.area, setup.short) = (4096, AREA, 0);
            }
        }
        setup
    }

    pub fn sectors(&self) -> u64 {
        self.lanes * self.area - self.short
    }

    /// First sector of a lane, and how many it has.
    pub fn lane(&self, at: u64) -> (u64, u64) {
        let short = if at + 1 == self.lanes { self.short } else { 0 };
        (at * self.area, self.area - short)
    }

    /// Which worker serves a queue.
    pub fn worker_of(&self, queue: usize) -> usize {
        queue % self.workers
    }
}
