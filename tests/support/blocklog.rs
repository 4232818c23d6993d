//! What a disk with a volatile cache was told, in order, and what it may hold when the power goes.
//!
//! The disk ends what it was told in an order that is drawn: changes (writes, zeroes, holes) and syncs are under
//! way side by side, as in a drive with a deep queue.

use super::dice::Dice;

/// More than this are never under way at once.
const DEEPEST: usize = 48;

/// What one entry of the log says. A cut after `n` entries is a power cut between the entries `n - 1` and `n`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A change reached the disk: sectors of it may be on the platter from here on.
    Begun(usize),
    /// It was answered: reads see it. It is still in the disk's cache.
    Ended(usize),
    /// A sync was answered. Durable are the changes that had ended when it reached the disk, `since` entries into
    /// the log; of those that ended later the disk has said nothing.
    Synced { since: usize },
}

/// Bytes that took the place of others.
#[derive(Clone, Debug)]
pub struct Change {
    pub at: usize,
    pub data: Vec<u8>,
}

/// The log, whole or up to now.
#[derive(Clone, Debug, Default)]
pub struct Log {
    pub entries: Vec<Entry>,
    pub changes: Vec<Change>,
}

/// What is done when an operation ends.
pub enum End {
    /// The change of this number is seen by reads from now on.
    Change(usize),
    Sync,
}

struct UnderWay {
    /// The number that the kernel gave the operation.
    unique: u64,
    /// What the answer says behind its header.
    answer: Vec<u8>,
    /// The change, or how long the log was when a sync arrived.
    what: Result<usize, usize>,
}

/// Keeps the log, and draws what ends when.
pub struct Recorder {
    pub log: Log,
    under_way: Vec<UnderWay>,
    dice: Dice,
}

impl Recorder {
    pub fn new(seed: u64) -> Self {
        Self { log: Log::default(), under_way: Vec::new(), dice: Dice::new(seed) }
    }

    pub fn is_idle(&self) -> bool {
        self.under_way.is_empty()
    }

    /// Something else may end before the next operation is looked for.
    pub fn ends_one_now(&mut self) -> bool {
        self.under_way.len() > DEEPEST || self.dice.rarely(3)
    }

    pub fn change(&mut self, unique: u64, answer: Vec<u8>, change: Change) {
        let number = self.log.changes.len();
        self.log.changes.push(change);
        self.log.entries.push(Entry::Begun(number));
        self.under_way.push(UnderWay { unique, answer, what: Ok(number) });
    }

    pub fn sync(&mut self, unique: u64) {
        let since = self.log.entries.len();
        self.under_way.push(UnderWay { unique, answer: Vec::new(), what: Err(since) });
    }

    /// Ends any one of those under way: gives its number, what to do and what to answer then. The log has it
    /// already: who has seen the answer finds it there.
    pub fn end_one(&mut self) -> Option<(u64, End, Vec<u8>)> {
        if self.under_way.is_empty() {
            return None;
        }
        let drawn = self.dice.below(self.under_way.len() as u64) as usize;
        let UnderWay { unique, answer, what } = self.under_way.swap_remove(drawn);
        let (entry, end) = match what {
            Ok(change) => (Entry::Ended(change), End::Change(change)),
            Err(since) => (Entry::Synced { since }, End::Sync),
        };
        self.log.entries.push(entry);
        Some((unique, end, answer))
    }
}
