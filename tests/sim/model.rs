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
}

impl Model {
    pub fn of(value: u64) -> Self {
        Self { left: vec![value], ruled_out: 0, durable: "by a power cut", now: vec![0] }
    }

    /// A value was written, surely or perhaps.
    pub fn written(&mut self, value: u64, surely: bool, durable: bool) {
        if surely {
            self.now.clear();
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
