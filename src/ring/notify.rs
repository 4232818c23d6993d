//! Who has to wake whom: the notification protocol of a split virtqueue.
//!
//! What it is: the two places where device and driver can miss each other,
//! written over a [`Shared`] that names each access, so that the very code
//! which ships runs under a model checker too.
//!
//! What it is not: it touches no memory itself.
//!
//! Invariant (no lost wake-up): each side writes its index or its wish, fences,
//! then reads the other's. At least one of the two sees the other.
//!
//! ```text
//!   device: arm                       driver: add a chain
//!     avail_event = next_avail          avail.idx = n + 1
//!     ── full fence ──                  ── full fence ──
//!     avail.idx == next_avail?          avail_event == n?  then kick
//!        yes: sleep, no: work
//! ```

/// The words of the ring that both sides use for notification (virtio 2.7.6
/// to 2.7.10). Indexes wrap at 2^16.
pub trait Shared {
    /// avail.idx, acquire: what it covers can be read afterwards.
    fn avail_idx(&self) -> u16;
    /// avail.flags.
    fn avail_flags(&self) -> u16;
    /// used_event: the driver wants an interrupt once used.idx passes it.
    fn used_event(&self) -> u16;
    /// used.idx, release: what it covers was written before.
    fn set_used_idx(&self, idx: u16);
    /// used.flags.
    fn set_used_flags(&self, flags: u16);
    /// avail_event: we want a kick once avail.idx passes it.
    fn set_avail_event(&self, idx: u16);
    /// Orders all of our writes before all of our reads.
    fn fence(&self);
}

/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;
/// VIRTQ_USED_F_NO_NOTIFY.
const NO_NOTIFY: u16 = 1;

/// True if moving an index from `old` to `new` passes `event` (virtio 2.7.10:
/// the other side asked for a notification once the index has passed it).
#[must_use]
pub fn passes(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Asks the driver for a kick at its next chain. True: the ring was empty after
/// that, we may sleep. False: work arrived meanwhile.
pub fn arm(ring: &impl Shared, event_idx: bool, next_avail: u16) -> bool {
    if event_idx {
        ring.set_avail_event(next_avail);
    } else {
        ring.set_used_flags(0);
    }
    ring.fence();
    ring.avail_idx() == next_avail
}

/// Tells the driver that kicks are not needed while we look at the ring
/// anyway. With EVENT_IDX the stale avail_event says that already.
pub fn disarm(ring: &impl Shared, event_idx: bool) {
    if !event_idx {
        ring.set_used_flags(NO_NOTIFY);
    }
}

/// After used.idx was set to `new`: true if the driver wants an interrupt for
/// what it was not asked about, from `old` on.
pub fn wants_signal(ring: &impl Shared, event_idx: bool, old: u16, new: u16) -> bool {
    ring.fence();
    if event_idx { passes(ring.used_event(), old, new) } else { ring.avail_flags() & NO_INTERRUPT == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};

    /// Every value of the three indexes near the wrap, against a count by hand:
    /// the indexes old..new are published one after another, each is compared.
    #[test]
    fn passes_is_right_for_every_distance() {
        for base in [0u16, 1, 0x7fff, 0x8000, 0xfff0, 0xffff] {
            for moved in 0..=40u16 {
                for event_at in 0..=60u16 {
                    let event = base.wrapping_add(event_at).wrapping_sub(10);
                    let new = base.wrapping_add(moved);
                    let by_hand = (0..moved).any(|i| base.wrapping_add(i) == event);
                    assert_eq!(passes(event, base, new), by_hand, "event {event} {base}->{new}");
                }
            }
        }
    }

    /// All 2^16 events for all moves of a small queue: exhaustive.
    #[test]
    fn passes_is_right_for_every_event() {
        for moved in 0..=4u16 {
            for event in 0..=u16::MAX {
                let old = 0xfffe;
                let by_hand = (0..moved).any(|i| u16::wrapping_add(old, i) == event);
                assert_eq!(passes(event, old, old.wrapping_add(moved)), by_hand);
            }
        }
    }

    /// The shared words as loom sees them: relaxed where the ring is, so that
    /// only the fences can order them.
    #[derive(Default)]
    struct Model {
        avail_idx: AtomicU16,
        avail_flags: AtomicU16,
        used_event: AtomicU16,
        used_idx: AtomicU16,
        used_flags: AtomicU16,
        avail_event: AtomicU16,
        kicked: AtomicBool,
        called: AtomicBool,
    }

    impl Shared for Model {
        fn avail_idx(&self) -> u16 {
            self.avail_idx.load(Ordering::Acquire)
        }
        fn avail_flags(&self) -> u16 {
            self.avail_flags.load(Ordering::Relaxed)
        }
        fn used_event(&self) -> u16 {
            self.used_event.load(Ordering::Relaxed)
        }
        fn set_used_idx(&self, idx: u16) {
            self.used_idx.store(idx, Ordering::Release);
        }
        fn set_used_flags(&self, flags: u16) {
            self.used_flags.store(flags, Ordering::Relaxed);
        }
        fn set_avail_event(&self, idx: u16) {
            self.avail_event.store(idx, Ordering::Relaxed);
        }
        fn fence(&self) {
            fence(Ordering::SeqCst);
        }
    }

    /// Device arms while the driver adds a chain: never both asleep.
    fn arm_race(event_idx: bool) {
        loom::model(move || {
            let ring = Arc::new(Model::default());
            disarm(&*ring, event_idx);
            let driver = {
                let ring = Arc::clone(&ring);
                loom::thread::spawn(move || {
                    ring.avail_idx.store(1, Ordering::Release);
                    fence(Ordering::SeqCst);
                    let kick = if event_idx {
                        passes(ring.avail_event.load(Ordering::Relaxed), 0, 1)
                    } else {
                        ring.used_flags.load(Ordering::Relaxed) & NO_NOTIFY == 0
                    };
                    ring.kicked.store(kick, Ordering::SeqCst);
                })
            };
            // A stale event, as a ring that was busy leaves behind.
            if event_idx {
                ring.set_avail_event(0x8000);
            }
            let sleeps = arm(&*ring, event_idx, 0);
            driver.join().expect("driver");
            assert!(!sleeps || ring.kicked.load(Ordering::SeqCst), "slept through a chain");
        });
    }

    #[test]
    fn arm_never_misses_a_chain() {
        arm_race(true);
        arm_race(false);
    }

    /// Device publishes while the driver enables interrupts and looks.
    fn publish_race(event_idx: bool) {
        loom::model(move || {
            let ring = Arc::new(Model::default());
            ring.used_event.store(0x8000, Ordering::Relaxed);
            ring.avail_flags.store(NO_INTERRUPT, Ordering::Relaxed);
            let driver = {
                let ring = Arc::clone(&ring);
                loom::thread::spawn(move || {
                    ring.used_event.store(0, Ordering::Relaxed);
                    ring.avail_flags.store(0, Ordering::Relaxed);
                    fence(Ordering::SeqCst);
                    ring.used_idx.load(Ordering::Acquire) == 0 // true: goes to sleep
                })
            };
            ring.set_used_idx(1);
            let call = wants_signal(&*ring, event_idx, 0, 1);
            ring.called.store(call, Ordering::SeqCst);
            let driver_sleeps = driver.join().expect("driver");
            assert!(!driver_sleeps || ring.called.load(Ordering::SeqCst), "driver never woken");
        });
    }

    #[test]
    fn publish_never_leaves_the_driver_asleep() {
        publish_race(true);
        publish_race(false);
    }
}
