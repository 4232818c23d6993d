//! What a sector may hold: all that a guest knows of its disk.

/// What one sector may hold: the values that it was given, oldest first, without
/// those that cannot come back.
#[derive(Clone, Debug)]
pub struct Model {
    /// What may be left after a power cut.
    pub left: Vec<u64>,
    /// How many came before those.
    ruled_out: usize,
    /// What made the oldest of them durable, for messages.
    pub durable: &'static str,
    /// Which of them a read may give, by their numbers in order.
    now: Vec<usize>,
    /// The newest that was surely written.
    sure: usize,
    /// When a server was started anew: the newest that had been written, and which of them it has kept.
    restart: Option<(usize, usize)>,
}

impl Model {
    pub fn of(value: u64) -> Self {
        Self {
            left: vec![value],
            ruled_out: 0,
            durable: "by a power cut",
            now: vec![0],
            sure: 0,
            restart: None,
        }
    }

    /// A value was written, surely or perhaps.
    pub fn written(&mut self, value: u64, surely: bool, durable: bool) {
        if surely {
            self.now.clear();
            self.sure = self.ruled_out + self.left.len();
        }
        self.now.push(self.ruled_out + self.left.len());
        self.left.push(value);
        if surely && durable {
            self.flushed(self.mark(), "by write-through");
        }
    }

    pub fn values(&self) -> impl Iterator<Item = u64> {
        self.now.iter().map(|at| self.left[at - self.ruled_out])
    }

    /// A read gave this. False: it may not.
    pub fn seen(&mut self, value: u64) -> bool {
        let (left, out) = (&self.left, self.ruled_out);
        self.now.retain(|at| left[at - out] == value);
        !self.now.is_empty()
    }

    /// The oldest that may be there now: what a flush that begins now leaves.
    pub fn mark(&self) -> usize {
        self.now[0]
    }

    /// The same, of those that were surely written: what a server that was not asked must have.
    pub fn sure_mark(&self) -> usize {
        self.mark().min(self.sure)
    }

    /// A server was started anew, and has kept this; `unanswered`: a request may just have written it. Whether
    /// something is gone that was surely written. `None`: it cannot have kept this.
    pub fn restarted(&mut self, value: u64, unanswered: bool) -> Option<bool> {
        let newest = self.ruled_out + self.left.len() - 1;
        let kept = self.left.iter().rposition(|left| *left == value).map(|at| at + self.ruled_out);
        let kept = if unanswered { newest } else { kept? };
        let dropped = kept < self.sure;
        let next = newest + 1;
        (self.left, self.now, self.ruled_out) = (vec![value], vec![next], next);
        (self.sure, self.restart, self.durable) = (next, Some((newest, kept)), "by what a server has kept");
        Some(dropped)
    }

    /// False: what a flush had to make durable at this mark was gone when a server was started anew meanwhile.
    pub fn survived(&self, mark: usize) -> bool {
        self.restart.is_none_or(|(newest, kept)| mark > newest || kept >= mark)
    }

    /// What was there at `mark`, or anything newer, outlives a power cut: it was made durable
    /// `how`.
    pub fn flushed(&mut self, mark: usize, how: &'static str) {
        let older = mark.saturating_sub(self.ruled_out);
        if older > 0 {
            self.durable = how;
        }
        self.left.drain(..older);
        self.ruled_out += older;
    }
}
