//! How long a worker looks before it sleeps.
//!
//! What it is: a sleep and the wake-up after it cost more than a short wait.
//! So before a sleep the rings and the completions are looked at for a while,
//! with kicks suppressed; for how long is learnt from how long waits turn out
//! to be, as KVM's halt polling does.
//!
//! What it is not: it has no clock of its own and looks at nothing itself.
//!
//! Invariant: waits that are long, one after another, lead to no looking at
//! all: an idle disk costs nothing.
//!
//! ```text
//!   the wait was …   within the window   longer, not too long   too long
//!   the window       stays               doubles, up to max     halves, down to 0
//! ```

use std::time::Duration;

/// The first window, and the smallest one.
const SMALLEST: Duration = Duration::from_micros(4);

/// One kind of wait, learnt apart from others.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    now: Duration,
    max: Duration,
}

impl Window {
    /// Never more than `max`; 0: never look, always sleep.
    #[must_use]
    pub fn new(max: Duration) -> Self {
        Self { now: Duration::ZERO, max }
    }

    /// How long to look before the next sleep.
    #[must_use]
    pub fn now(self) -> Duration {
        self.now
    }

    /// A wait ended that took `waited`, of looking and sleeping together.
    pub fn learn(&mut self, waited: Duration) {
        // What a sleep measures has the wake-up in it, about as long again as
        // what is worth looking for.
        self.now = if waited <= self.now {
            self.now
        } else if waited <= 2 * self.max {
            (2 * self.now).max(SMALLEST).min(self.max)
        } else if self.now > SMALLEST {
            self.now / 2
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(n: u64) -> Duration {
        Duration::from_micros(n)
    }

    #[test]
    fn it_grows_with_short_waits_and_goes_with_long_ones() {
        let mut window = Window::new(us(50));
        assert_eq!(window.now(), us(0));
        for _ in 0..10 {
            window.learn(us(20));
        }
        assert_eq!(window.now(), us(32), "the first power that covers the wait");
        for _ in 0..10 {
            window.learn(us(90));
        }
        assert_eq!(window.now(), us(50));
        for _ in 0..10 {
            window.learn(us(10_000));
        }
        assert_eq!(window.now(), us(0));
    }

    #[test]
    fn without_a_maximum_it_never_looks() {
        let mut window = Window::new(us(0));
        for wait in [0, 1, 5, 100] {
            window.learn(us(wait));
            assert_eq!(window.now(), us(0));
        }
    }
}
