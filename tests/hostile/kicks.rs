//! Kicks without end: they cost the front-end's own processor time, and no other queue, no status and no stop.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::Victim;
use crate::session::each_engine;
use crate::support::device::{Device, Setup};
use crate::support::disk::{Disk, assert_same, pattern};
use crate::support::frontend::msg;
use crate::support::sys::Event;

/// A thread that writes an eventfd as fast as it can.
struct Storm {
    stop: Arc<AtomicBool>,
    kicks: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Storm {
    fn on(event: &Event) -> Self {
        let (stop, kicks) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (ends, count) = (Arc::clone(&stop), Arc::clone(&kicks));
        let fd: OwnedFd = event.as_fd().try_clone_to_owned().unwrap();
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                // Full: what it was to tell is told.
                let _ = rustix::io::write(&fd, &1_u64.to_ne_bytes());
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { stop, kicks, thread: Some(thread) }
    }

    fn kicks(&self) -> u64 {
        self.kicks.load(Ordering::Relaxed)
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// On a queue without work, on one whose ring is broken, and on one that has been stopped. Another queue of the same
/// worker is served meanwhile.
#[test]
fn kicks_at_full_speed() {
    each_engine(|engine| {
        let mut victim = Victim::with(engine, Disk::new(), &["--workers=1"]);
        for state in ["without work", "broken", "stopped"] {
            let mut device = Device::new(&victim.daemon, Setup { queues: 2, ..Setup::default() });
            let ring = &device.rings[0];
            match state {
                "broken" => ring.memory.store16(ring.avail + 2, 1000),
                "stopped" => device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 0),
                _ => {}
            }
            let storm = Storm::on(&device.rings[0].kick);
            // It rages already, and goes on for as long as the reads take.
            while storm.kicks() == 0 {
                std::thread::yield_now();
            }
            for round in 0..100 {
                let got = device.run(1, crate::support::device::T_IN, round, &[], 4096);
                assert_same(&got.data, &pattern(round, 8), "beside a queue that is kicked");
            }
            victim.answers("kicks at full speed");
            device.frontend.sync();
            assert!(storm.kicks() > 1000, "{} kicks are no storm", storm.kicks());
            drop(storm);
            device.assert_serves(1);
            drop(device);
            victim.serves(&format!("kicks of a queue that was {state}"));
        }
        // It has to end under them, too.
        let device = Device::new(&victim.daemon, Setup { queues: 4, ..Setup::default() });
        let _storms: Vec<Storm> = device.rings.iter().map(|ring| Storm::on(&ring.kick)).collect();
        victim.answers("kicks of four queues");
        victim.stops();
    });
}

/// One eventfd is the kick, the call and the error descriptor of two queues: the daemon kicks itself whenever it answers.
#[test]
fn one_eventfd_for_everything() {
    each_engine(|engine| {
        let mut victim = Victim::with(engine, Disk::new(), &["--workers=1"]);
        let mut device = Device::new(&victim.daemon, Setup { queues: 2, ..Setup::default() });
        let event = Event::new();
        for queue in 0..2 {
            for request in [msg::SET_VRING_KICK, msg::SET_VRING_CALL, msg::SET_VRING_ERR] {
                device.frontend.vring_fd(request, queue, &event);
            }
        }
        for round in 0..50 {
            for queue in 0..2 {
                let pending = device.submit(queue, crate::support::device::T_IN, round, &[], 4096);
                event.signal();
                let used = device.rings[queue].spin_used("an answer by one eventfd for everything");
                assert_same(&device.outcome(&pending, used).data, &pattern(round, 8), "what was read");
            }
        }
        drop(device);
        victim.serves("one eventfd for everything");
        victim.stops();
    });
}
