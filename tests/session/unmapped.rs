//! Several rings of one worker lose their memory at once: all of them stop,
//! each is told, and each goes on when its memory is back.

use super::each_engine;
use crate::support::daemon::{Daemon, Options};
use crate::support::device::{Device, OK, Pending, Setup, T_IN};
use crate::support::disk::{Disk, SECTOR};
use crate::support::frontend::msg;
use crate::support::memory::{Memory, Span};
use crate::support::ring::Ring;
use crate::support::sys::Event;

const QUEUES: usize = 3;
const EACH: usize = 24;

/// How the memory goes, and comes back.
#[derive(Clone, Copy)]
enum How {
    /// SET_MEM_TABLE.
    Table,
    /// REM_MEM_REG and ADD_MEM_REG.
    Region,
}

/// All of a used ring, the wish for kicks too.
fn used_area(ring: &Ring) -> Vec<u8> {
    ring.memory.read(ring.used, 6 + 8 * usize::from(ring.size))
}

fn submit(device: &mut Device, each: usize) -> Vec<Pending> {
    (0..QUEUES * each).map(|at| device.submit(at % QUEUES, T_IN, at as u64, &[], SECTOR)).collect()
}

#[track_caller]
fn finish(device: &mut Device) {
    for (queue, ring) in device.rings.iter_mut().enumerate() {
        while ring.seen != ring.avail_idx {
            ring.wait_used(&format!("all requests of queue {queue}"));
        }
    }
}

#[test]
fn all_rings_of_a_worker_lose_their_memory() {
    each_engine(|engine| {
        for how in [How::Table, How::Region] {
            let disk = Disk::new();
            let daemon = Daemon::start(engine, &disk, &Options::with(&["--workers=1"]));
            let memory = Memory::with(&[
                Span { guest: 1 << 20, len: 32 << 20 },
                Span { guest: 5 << 30, len: 1 << 20 },
            ]);
            let other = Memory::with(&[Span { guest: 9 << 30, len: 1 << 20 }]);
            let setup = Setup { queues: QUEUES as u32, ring_size: 256, memory, ..Setup::default() };
            let mut device = Device::new(&daemon, setup);
            let errors: Vec<Event> = (0..QUEUES).map(|_| Event::new()).collect();
            for (queue, error) in errors.iter().enumerate() {
                device.frontend.vring_fd(msg::SET_VRING_ERR, queue as u32, error);
            }
            for _ in 0..4 {
                for (queue, error) in errors.iter().enumerate() {
                    device.assert_serves(queue);
                    assert_eq!(error.take(), 0, "an error where there is none");
                }
                // Some were on their way a moment ago.
                let mut waiting = submit(&mut device, EACH);
                finish(&mut device);
                match how {
                    How::Table => device.frontend.set_mem_table(&other),
                    How::Region => device.frontend.remove_region(&device.memory.regions[0]),
                }
                let before: Vec<_> = device.rings.iter().map(used_area).collect();
                waiting.extend(submit(&mut device, 2));
                for (queue, error) in errors.iter().enumerate() {
                    error.wait(&format!("the error descriptor of queue {queue}"));
                }
                // Once more: a worker that still looked at a kick has now seen one.
                for ring in &device.rings {
                    ring.kick.signal();
                }
                device.frontend.sync();
                let moment = std::time::Duration::from_millis(30);
                for (ring, before) in device.rings.iter().zip(&before) {
                    ring.call.take();
                    ring.assert_quiet(moment, "a ring without memory");
                    assert_eq!(&used_area(ring), before, "a used ring without memory was written");
                }
                match how {
                    How::Table => device.frontend.set_mem_table(&device.memory),
                    How::Region => device.frontend.add_region(&device.memory.regions[0]),
                }
                finish(&mut device);
                for pending in &waiting {
                    assert_eq!(device.memory.byte(pending.status_at), OK);
                }
            }
        }
    });
}
