//! How long a worker looks before it sleeps.
//!
//! What it is: a sleep and the wake-up after it cost more than a short wait.
//! So before a sleep the rings and the completions are looked at for a while,
//! with kicks suppressed, if that has paid lately. What pays is found out by
//! doing it: a sleep that ended soon says little, most of it was the wake-up.
//!
//! What it is not: it has no clock of its own and looks at nothing itself.
//!
//! Invariant: looking that is in vain ends after a few times and is tried again
//! ever more rarely: an idle disk, or a slow one, costs nothing.
//!
//! ```text
//!            in vain too often ┌──────────┐ a trial found something
//!                 ┌────────────┤   look   │◄────────────┐
//!                 ▼            └──────────┘             │
//!            ┌─────────┐   after some sleeps       ┌────┴────┐
//!            │  sleep  ├──────────────────────────►│  trial  │
//!            └─────────┘◄──────────────────────────┴─────────┘
//!                          in vain: twice as many sleeps
//! ```

use std::time::Duration;

/// Looking goes on while the score is above 0: a find adds one, a look in vain
/// takes away two, so that two in three have to find something.
const BEST_SCORE: u8 = 16;
const TRIAL_SCORE: u8 = 4;
const IN_VAIN: u8 = 2;
/// Sleeps before a trial: the first, and the most.
const FIRST_TRIAL: u32 = 8;
const LAST_TRIAL: u32 = 1024;

/// One kind of wait, learnt apart from others.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// How long a look is; 0: never look.
    length: Duration,
    score: u8,
    /// Sleeps until the next trial, and how many there were before this one.
    until_trial: u32,
    trial_after: u32,
}

impl Window {
    /// Looks of `length`; 0: never look, always sleep.
    #[must_use]
    pub fn new(length: Duration) -> Self {
        Self { length, score: 0, until_trial: FIRST_TRIAL, trial_after: FIRST_TRIAL }
    }

    /// How long to look before the next sleep.
    #[must_use]
    pub fn now(self) -> Duration {
        if self.score > 0 || self.until_trial == 0 { self.length } else { Duration::ZERO }
    }

    /// A wait ended: by a look that found something, or by a sleep.
    pub fn learn(&mut self, found: bool) {
        let looked = self.score > 0;
        let trial = !looked && self.until_trial == 0;
        if found {
            self.score = if trial { TRIAL_SCORE } else { (self.score + 1).min(BEST_SCORE) };
            if self.score == BEST_SCORE {
                self.trial_after = FIRST_TRIAL;
            }
        } else if looked || trial {
            self.score = self.score.saturating_sub(IN_VAIN);
            if self.score == 0 {
                self.trial_after = (self.trial_after * 2).min(LAST_TRIAL);
                self.until_trial = self.trial_after;
            }
        } else {
            self.until_trial -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: Duration = Duration::from_micros(50);

    /// Waits of which `finds` says whether a look would find something.
    fn looks(window: &mut Window, waits: u32, finds: impl Fn(u32) -> bool) -> u32 {
        let mut count = 0;
        for wait in 0..waits {
            let looking = !window.now().is_zero();
            count += u32::from(looking);
            window.learn(looking && finds(wait));
        }
        count
    }

    #[test]
    fn it_looks_while_that_pays() {
        let mut window = Window::new(LENGTH);
        assert!(looks(&mut window, 1000, |_| true) > 980, "short waits");
        assert!(looks(&mut window, 1000, |wait| wait % 5 > 0) > 900, "most of them short");
        assert!(looks(&mut window, 10_000, |_| false) < 30, "long waits");
        let mixed = looks(&mut window, 10_000, |wait| wait % 2 > 0);
        assert!(mixed < 3_000, "every other one is too few: {mixed}");
        assert!(looks(&mut window, 3000, |_| true) > 1900, "short again");
    }

    #[test]
    fn without_a_length_it_never_looks() {
        let mut window = Window::new(Duration::ZERO);
        assert_eq!(looks(&mut window, 1000, |_| true), 0);
    }
}
