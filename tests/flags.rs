//! What users never type: io_uring without one of its features, completion
//! queues that overflow, a pool of one page, sectors smaller than the
//! backing's block. The disk is the same with all of them.

mod overflow;

use crate::support::daemon::{Daemon, Options, THREADS, URING, vublkd};
use crate::support::device::{Device, OK, Setup, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, header, range};
use crate::support::dice::Dice;
use crate::support::disk::{Disk, SECTOR, assert_same, salted};
use crate::support::frontend::feature;
use crate::support::loopdev::LoopDevice;
use crate::support::memory::{Memory, Span};
use crate::support::ring::{Ring, back, out};
use crate::support::sys::{Deadline, root, skip};

/// Guest memory of one request: header, status, then data from an address that
/// is aligned or not.
const ROOM: u64 = 320 << 10;
const STATUS: u64 = 1024;
const DATA: u64 = 4096;

/// How a run of the suite differs from another.
#[derive(Clone, Copy)]
struct Load {
    seed: u64,
    rounds: u64,
    /// Requests in flight, each on sectors of its own.
    lanes: u64,
    /// Sectors of a lane, at most 600.
    lane: u64,
    /// Buffers start at odd addresses.
    misaligned: bool,
    zeroes: bool,
}

struct Flight {
    kind: u32,
    lane: u64,
    sector: u64,
    len: usize,
    data_at: u64,
}

/// A guest with room for the requests of `load`.
fn memory_for(load: Load) -> std::rc::Rc<Memory> {
    Memory::with(&[
        Span { guest: 1 << 20, len: 4 << 20 },
        Span { guest: 4 << 30, len: load.lanes * ROOM + (1 << 20) },
    ])
}

/// Random reads, writes and flushes on all queues, many at a time, against a
/// model of the disk in memory. A part that is read while it is not written is
/// what the model holds.
#[track_caller]
fn play(device: &mut Device, load: Load, model: &mut [u8], what: &str) {
    let mut dice = Dice::new(load.seed);
    let base = 4 << 30;
    for round in 0..load.rounds {
        let mut owed = vec![0_usize; device.rings.len()];
        let flights: Vec<Flight> = (0..load.lanes)
            .map(|lane| {
                let sectors = 1 + if dice.rarely(3) { dice.below(load.lane) } else { dice.below(8) };
                let sectors = sectors.min(load.lane);
                let sector = lane * load.lane + dice.below(load.lane - sectors + 1);
                let len = sectors as usize * SECTOR;
                let kind = match dice.below(12) {
                    0 => T_FLUSH,
                    1 if load.zeroes => T_WRITE_ZEROES,
                    2..=6 => T_OUT,
                    _ => T_IN,
                };
                let room = base + lane * ROOM;
                let data_at = room + DATA + if load.misaligned { 1 + 2 * dice.below(2000) } else { 0 };
                let memory = &device.memory;
                memory.write(room, &header(kind, if kind == T_IN || kind == T_OUT { sector } else { 0 }));
                memory.write(room + STATUS, &[0xff]);
                let mut segs = vec![out(room, 16)];
                match kind {
                    T_OUT => {
                        memory.write(data_at, &salted(round * load.lanes + lane + 1, sector, sectors));
                        segs.push(out(data_at, len));
                    }
                    T_WRITE_ZEROES => {
                        memory.write(data_at, &range(sector, sectors as u32, dice.below(2) as u32));
                        segs.push(out(data_at, 16));
                    }
                    T_IN => {
                        memory.write(data_at, &vec![0xee; len]);
                        segs.push(back(data_at, len));
                    }
                    _ => {}
                }
                segs.push(back(room + STATUS, 1));
                let queue = dice.below(owed.len() as u64) as usize;
                owed[queue] += 1;
                let head = device.rings[queue].chain(&segs);
                device.rings[queue].stage(head);
                Flight { kind, lane, sector, len, data_at }
            })
            .collect();
        for ring in &device.rings {
            ring.publish();
            ring.kick.signal();
        }
        for (ring, owed) in device.rings.iter_mut().zip(owed) {
            for _ in 0..owed {
                ring.wait_used(what);
            }
        }
        for flight in &flights {
            let Flight { kind, sector, len, .. } = *flight;
            let what = format!("{what}: round {round}, type {kind} at {sector} for {len} bytes");
            assert_eq!(device.memory.byte(base + flight.lane * ROOM + STATUS), OK, "{what}");
            let start = sector as usize * SECTOR;
            let place = &mut model[start..start + len];
            match kind {
                T_OUT => place.copy_from_slice(&device.memory.read(flight.data_at, len)),
                T_WRITE_ZEROES => place.fill(0),
                T_IN => assert_same(&device.memory.read(flight.data_at, len), place, &what),
                _ => {}
            }
        }
    }
}

/// Waits until the device has gone to sleep on a ring: it asks for a kick.
#[track_caller]
fn wait_armed(ring: &Ring) {
    Deadline::new("the device to ask for a kick").until(|| {
        let armed =
            if ring.event_idx { ring.avail_event() == ring.avail_idx } else { !ring.device_wants_no_kicks() };
        armed.then_some(())
    });
}

/// The whole suite on a fresh disk with these options; gives the daemon's log.
#[track_caller]
fn suite(extra: &[&str], without: u64) -> String {
    let what = format!("{extra:?} without {without:#x}");
    let disk = Disk::new();
    let load = Load { seed: 0x5eed, rounds: 20, lanes: 32, lane: 100, misaligned: false, zeroes: true };
    let mut daemon = Daemon::start(URING, &disk, &Options::with(extra));
    let setup = Setup { queues: 4, without, memory: memory_for(load), ..Setup::default() };
    let mut device = Device::new(&daemon, setup);
    let mut model = disk.read(0, load.lanes * load.lane);
    play(&mut device, load, &mut model, &what);
    play(&mut device, Load { seed: 7, rounds: 5, misaligned: true, ..load }, &mut model, &what);
    // Each queue wakes up from idleness, alone, more than once.
    for queue in (0..4).chain(0..4).rev() {
        for ring in &device.rings {
            wait_armed(ring);
        }
        let done = device.run(queue, T_IN, 0, &[], 4096);
        assert_eq!(done.status, OK);
        assert_same(&done.data, &model[..4096], &what);
    }
    // Another eventfd is watched as well as the first.
    device.new_kick(2);
    let done = device.run(2, T_IN, 8, &[], 4096);
    assert_eq!(done.status, OK);
    drop(device);
    daemon.stop();
    assert_same(&disk.read(0, load.lanes * load.lane), &model, &what);
    daemon.log()
}

const SETUP_FLAGS: [&str; 4] = ["submit-all", "single-issuer", "defer-taskrun", "no-sqarray"];
const REGISTRATIONS: [&str; 2] = ["registered-ring", "fixed-files"];

/// An old kernel lacks one of them, or a later one takes it back.
#[test]
fn every_feature_of_io_uring_can_be_missing() {
    assert!(!suite(&[], 0).contains("io_uring with only"), "this kernel has all of them");
    for refused in SETUP_FLAGS {
        let log = suite(&[&format!("--io-uring-refuse={refused}")], 0);
        let line = log.lines().find(|line| line.contains("io_uring with only: "));
        let line = line.unwrap_or_else(|| panic!("{refused} was not refused:\n{log}"));
        assert!(!line.contains(refused), "{line}");
    }
    for refused in REGISTRATIONS {
        suite(&[&format!("--io-uring-refuse={refused}")], feature::EVENT_IDX);
    }
}

#[test]
fn all_features_of_io_uring_can_be_missing() {
    let all = [SETUP_FLAGS.as_slice(), REGISTRATIONS.as_slice()].concat().join(",");
    for without in [0, feature::EVENT_IDX, feature::INDIRECT_DESC] {
        suite(&[&format!("--io-uring-refuse={all}")], without);
    }
}

/// One page for all misaligned buffers of a worker: requests go page by page,
/// wait their turn, and none fails.
#[test]
fn a_pool_of_one_page() {
    for engine in [URING, THREADS] {
        for workers in [1, 2] {
            let what = format!("one page, {engine:?}, {workers} workers");
            let disk = Disk::new();
            let workers = format!("--workers={workers}");
            let options = Options::with(&["--pool-chunks=1", "--pool-chunk-len=4096", &workers]);
            let load = Load { seed: 3, rounds: 3, lanes: 128, lane: 100, misaligned: true, zeroes: true };
            let mut daemon = Daemon::start(engine, &disk, &options);
            let setup = Setup { queues: 4, ring_size: 512, memory: memory_for(load), ..Setup::default() };
            let mut device = Device::new(&daemon, setup);
            let mut model = disk.read(0, load.lanes * load.lane);
            play(&mut device, load, &mut model, &what);
            // Few, but each of 300 KiB: many pages' worth.
            let large = Load { seed: 4, rounds: 4, lanes: 16, lane: 600, ..load };
            play(&mut device, large, &mut model, &what);
            drop(device);
            daemon.stop();
            assert_same(&disk.read(0, load.lanes * load.lane), &model, &what);
            if disk.takes_direct() {
                let log = daemon.log();
                assert!(!log.contains("pool_waits=0 "), "nothing had to wait for the page:\n{log}");
            }
        }
    }
}

/// Sectors of 512 on blocks of 4096, neighbours changed at once by queues of
/// two workers: each is a read, a change and a write of a block, and none may
/// undo another's. With a pool of one page, that one is used for it.
#[test]
fn neighbouring_sectors_in_one_block() {
    let test = "flags::neighbouring_sectors_in_one_block";
    if !root(test, "a loop device") {
        return;
    }
    for (engine, pool) in [(URING, 16), (URING, 1), (THREADS, 16), (THREADS, 1)] {
        let what = format!("{engine:?}, a pool of {pool}");
        let disk = Disk::new();
        let device = match LoopDevice::over(&disk.path, 4096) {
            Ok(device) => device,
            Err(reason) => return skip(test, &format!("no loop device: {reason}")),
        };
        let socket = disk.dir.path().join("disk.sock");
        let name = if engine == URING { "io_uring" } else { "threads" };
        let mut command = vublkd(name, &socket, &device.path);
        command.args(["--num-queues=4", "--workers=2", "--logical-block-size=512"]);
        command.args([format!("--pool-chunks={pool}"), "--pool-chunk-len=4096".to_owned()]);
        let mut daemon = Daemon::spawn(engine, command, socket);
        daemon.wait_listening();
        // Lanes of three sectors: most blocks are shared by three or four of
        // them, and every lane is on a random queue each time.
        let load = Load { seed: 11, rounds: 12, lanes: 96, lane: 3, misaligned: false, zeroes: true };
        let setup = Setup { queues: 4, ring_size: 512, memory: memory_for(load), ..Setup::default() };
        let mut guest = Device::new(&daemon, setup);
        let mut model = disk.read(0, load.lanes * 60);
        play(&mut guest, load, &mut model, &what);
        // Longer ones with odd ends, from odd addresses.
        play(&mut guest, Load { seed: 12, lane: 59, misaligned: true, rounds: 4, ..load }, &mut model, &what);
        assert_eq!(guest.status(T_FLUSH, 0, &[], 0), OK);
        for sector in (0..load.lanes * 60).step_by(480) {
            let start = sector as usize * SECTOR;
            assert_same(&guest.read(sector, 480), &model[start..start + 480 * SECTOR], &what);
        }
        drop(guest);
        daemon.stop();
    }
}
