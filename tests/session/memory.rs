//! Guest memory that changes while requests run, and memory that goes away.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use super::{each_engine, start};
use crate::support::daemon::{Daemon, URING};
use crate::support::device::{Device, IOERR, OK, Setup, T_IN, T_OUT, UNWRITTEN, header, negotiate};
use crate::support::disk::{assert_same, pattern, salted};
use crate::support::frontend::msg;
use crate::support::fs::Filesystem;
use crate::support::memory::{Memory, Region, Span};
use crate::support::ring::{back, out};
use crate::support::sys::{Deadline, memory_file};

/// How many mappings of guest memory the daemon has.
fn mappings(daemon: &Daemon) -> usize {
    std::fs::read_to_string(format!("/proc/{}/maps", daemon.pid()))
        .unwrap()
        .lines()
        .filter(|line| line.contains("memfd:guest-ram"))
        .count()
}

/// Reads one sector into `place` of the front-end's choice; gives the status.
#[track_caller]
fn read_into(device: &mut Device, sector: u64, place: u64) -> (u8, u32) {
    let at = device.memory.page_with(&header(T_IN, sector));
    device.memory.write(at + 32, &[UNWRITTEN]);
    let ring = &mut device.rings[0];
    let head = ring.chain(&[out(at, 16), back(place, 512), back(at + 32, 1)]);
    ring.offer(head);
    let used = ring.wait_used("a read into a region of its own");
    (device.memory.byte(at + 32), used.len)
}

#[test]
fn table_is_sent_again_during_requests() {
    each_engine(|engine| {
        let (disk, daemon) = start(engine);
        let mut device = Device::new(&daemon, Setup { ring_size: 256, ..Setup::default() });
        for salt in 1..15 {
            let waiting: Vec<_> = (0..64)
                .map(|index| {
                    let data = salted(salt, index * 64, 64);
                    device.submit(0, T_OUT, index * 64, &data, 0)
                })
                .collect();
            for _ in 0..4 {
                device.frontend.set_mem_table(&device.memory);
            }
            for _ in &waiting {
                device.rings[0].wait_used("writes under a changing table");
            }
            for pending in &waiting {
                assert_eq!(device.memory.byte(pending.status_at), OK);
            }
            let want = salted(salt, 0, 4096);
            assert_same(&disk.read(0, 4096), &want, "in the file");
        }
        // Old mappings are gone, not piled up.
        Deadline::new("old mappings to go").until_slowly(|| (mappings(&daemon) <= 1).then_some(()));
        drop(device);
        daemon.connect().ask64(msg::GET_FEATURES);
        Deadline::new("all mappings to go").until_slowly(|| (mappings(&daemon) == 0).then_some(()));
    });
}

#[test]
fn regions_come_and_go() {
    each_engine(|engine| {
        let (_disk, daemon) = start(engine);
        let mut device = Device::plain(&daemon);
        let guest = 1 << 34;
        for round in 0..10 {
            // Not there yet.
            let (status, len) = read_into(&mut device, round, guest);
            assert!(len == 0 || (len == 1 && status == IOERR), "{status} {len}");
            let plug = Memory { regions: vec![Region::new(guest, 2 << 20, round * 4096)] };
            device.frontend.add_region(&plug.regions[0]);
            let (status, len) = read_into(&mut device, round, guest + 512);
            assert_eq!((status, len), (OK, 513));
            let got = plug.read(guest + 512, 512);
            assert_same(&got, &pattern(round, 1), "in plugged memory");
            device.frontend.remove_region(&plug.regions[0]);
            plug.write(guest, &[0; 4096]);
            let (status, len) = read_into(&mut device, round, guest + 512);
            assert!(len == 0 || (len == 1 && status == IOERR), "{status} {len}");
            assert_eq!(plug.read(guest + 512, 512), [0; 512], "unplugged memory");
        }
        assert_eq!(mappings(&daemon), 1, "mappings left behind");
        device.assert_serves(0);
    });
}

#[test]
fn as_many_slots_as_it_says() {
    let (_disk, daemon) = start(URING);
    let mut device = Device::plain(&daemon);
    let slots = device.frontend.ask64(msg::GET_MAX_MEM_SLOTS);
    let count = slots.min(509) - 1;
    let plugs: Vec<Region> =
        (0..count).map(|index| Region::new((1 << 36) + (index << 21), 65536, 0)).collect();
    for plug in &plugs {
        device.frontend.add_region(plug);
    }
    let last = plugs.last().unwrap();
    assert_eq!(read_into(&mut device, 7, last.guest), (OK, 513));
    for plug in &plugs {
        device.frontend.remove_region(plug);
    }
    device.assert_serves(0);
}

/// Memory backed by an ordinary file, starting in the middle of it.
#[test]
fn memory_in_a_regular_file() {
    let (disk, daemon) = start(URING);
    let path = disk.dir.path().join("ram");
    let file = File::options().create_new(true).read(true).write(true).open(path).unwrap();
    file.set_len(4 << 20).unwrap();
    let mut device = Device::plain(&daemon);
    let mut plug = Region::new(1 << 34, 1 << 20, 0);
    plug.file = file;
    plug.offset = 2 << 20;
    device.frontend.add_region(&plug);
    assert_eq!(read_into(&mut device, 7, plug.guest + 4096), (OK, 513));
    let mut got = vec![0; 512];
    plug.file.read_exact_at(&mut got, (2 << 20) + 4096).unwrap();
    assert_same(&got, &pattern(7, 1), "in the file");
    device.frontend.remove_region(&plug);
}

/// The front-end cuts its memory file short under a running device. Data
/// buffers that are gone give errors; a ring that is gone ends the session.
/// The daemon survives both.
#[test]
fn memory_is_cut_short() {
    each_engine(|engine| {
        let (disk, mut daemon) = start(engine);
        for keep_rings in [true, false] {
            let memory =
                Memory::with(&[Span { guest: 1 << 20, len: 4 << 20 }, Span { guest: 1 << 30, len: 4 << 20 }]);
            let mut device = Device::new(&daemon, Setup { memory: Rc::clone(&memory), ..Setup::default() });
            device.assert_serves(0);
            let gone = 1 << 30;
            // Prepared before the cut: this process must not touch it after.
            let reads: Vec<u16> = [gone, gone + 1, gone + 4096 * 3]
                .into_iter()
                .map(|place| {
                    let at = memory.page_with(&header(T_IN, 1));
                    device.rings[0].chain(&[out(at, 16), back(place, 8192), back(at + 32, 1)])
                })
                .collect();
            // One write that needs a copy and one that does not.
            let writes = [(8, gone + 7), (16, gone + 8192)].map(|(sector, from)| {
                let at = memory.page_with(&header(T_OUT, sector));
                memory.write(at + 32, &[UNWRITTEN]);
                let segs = [out(at, 16), out(from, 4096), back(at + 32, 1)];
                (device.rings[0].chain(&segs), at + 32)
            });
            let end = memory.alloc(512, 512);
            let lost_header = device.rings[0].chain(&[out(gone + 64, 16), back(end, 512)]);
            let heads = [reads, vec![writes[0].0, writes[1].0, lost_header]].concat();
            for head in &heads {
                device.rings[0].stage(*head);
            }
            device.rings[0].publish();
            memory.regions[1].file.set_len(0).unwrap();
            if keep_rings {
                device.rings[0].kick.signal();
                let done = device.rings[0].avail_idx;
                Deadline::new("answers or a hang-up after the memory went").until_slowly(|| {
                    let answered = device.rings[0].used_idx() == done;
                    (answered || device.frontend.hung_up()).then_some(())
                });
                for (_, status) in writes {
                    assert_ne!(memory.byte(status), OK, "a write from lost memory");
                }
            } else {
                // From here on neither side can read the ring: only the
                // kick and the socket may be touched.
                memory.regions[0].file.set_len(0).unwrap();
                device.rings[0].kick.signal();
                device.frontend.wait_hangup("the front-end whose rings are gone");
            }
            // Dropped, or served with errors; here or on the next connection.
            drop(device);
            let mut next = Device::plain(&daemon);
            next.assert_serves(0);
            drop(next);
            daemon.assert_alive();
        }
        let want = pattern(0, 32);
        assert_same(&disk.read(0, 32), &want, "no lost page reached the disk");
    });
}

/// A table without the rings stops them; a table with them again lets them go
/// on where they stood.
#[test]
fn rings_lose_their_memory_and_get_it_back() {
    each_engine(|engine| {
        let (_disk, mut daemon) = start(engine);
        let mut device = Device::plain(&daemon);
        let other = Memory::with(&[Span { guest: 9 << 30, len: 1 << 20 }]);
        for _ in 0..10 {
            device.assert_serves(0);
            let told = device.frontend.try_mem_table(&other);
            assert!(told.is_ok(), "the connection ended");
            let pending = device.submit(0, T_IN, 3, &[], 512);
            device.frontend.sync();
            device.frontend.set_mem_table(&device.memory);
            let used = device.rings[0].wait_used("a read once the memory is back");
            let done = device.outcome(&pending, used);
            assert_same(&done.data, &pattern(3, 1), "sector 3");
        }
        daemon.assert_alive();
    });
}

/// A front-end may give memory region by region. Its driver has not written there yet: that is no
/// private memory, which only the start of a ring tells.
#[test]
fn memory_comes_by_add_mem_reg_alone() {
    let (_disk, daemon) = start(URING);
    let mut frontend = daemon.connect();
    let features = negotiate(&mut frontend, 0);
    let memory = Memory::plain();
    frontend.add_region(&memory.regions[0]);
    let ring = crate::support::ring::Ring::new(Rc::clone(&memory), 64, 0, true);
    crate::support::device::start_ring(&frontend, 0, &ring);
    let mut device = Device { frontend, memory, rings: vec![ring], features };
    device.assert_serves(0);
    assert!(!daemon.log().contains("share"), "a false alarm:\n{}", daemon.log());
}

/// What a VMM passes that has mapped the file for itself alone: nothing is in it, whatever the guest
/// has done.
#[test]
fn memory_that_is_not_shared_is_told() {
    let (_disk, mut daemon) = start(URING);
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    assert!(!daemon.log().contains("share"), "a false alarm:\n{}", daemon.log());
    drop(device);
    let mut region = Region::new(1 << 20, 64 << 20, 0);
    region.file = memory_file(64 << 20);
    let memory = Rc::new(Memory { regions: vec![region] });
    let device = Device::new(&daemon, Setup { queues: 3, memory, ..Setup::default() });
    let line = daemon.wait_log("share=on");
    assert!(line.contains("memory-backend-memfd") && line.contains("shared=on"), "{line}");
    drop(device);
    let mut device = Device::new(&daemon, Setup { queues: 3, ..Setup::default() });
    device.assert_serves(2);
    assert_eq!(daemon.log().matches("share=on").count(), 1, "{}", daemon.log());
    daemon.assert_alive();
}

/// Guest memory may be a file of a file system without a block device where that is known to be this machine's: no server
/// can then keep the daemon waiting for a page. One that is mounted out of sight is not known, and refused.
#[test]
fn memory_of_a_file_system_without_a_device() {
    let Some(ramfs) = Filesystem::ramfs("session::memory::memory_of_a_file_system_without_a_device") else {
        return;
    };
    let known = "memory that is neither a local file nor a character device";
    // One of procfs, which is mounted, is judged to be local. It cannot be mapped.
    for (path, is_known) in [(ramfs.file("memory", 1 << 20).0, false), ("/proc/self/comm".into(), true)] {
        let (_disk, daemon) = start(URING);
        let mut device = Device::plain(&daemon);
        let mut region = Region::new(1 << 34, 4096, 0);
        region.file = File::options().read(true).write(true).open(&path).unwrap();
        let payload = crate::support::frontend::single_region(&region);
        let fds = [std::os::fd::AsFd::as_fd(&region.file)];
        assert_eq!(
            device.frontend.command(msg::ADD_MEM_REG, &payload, &fds).ok(),
            Some(1),
            "{}",
            path.display()
        );
        device.assert_serves(0);
        let log = daemon.log();
        assert!(log.contains("refused a message") && log.contains(known) != is_known, "{log}");
    }
}

/// A region that is a character device is mapped where that works, as devdax does, and refused alone
/// where not. The stand-in gives each mapping pages of its own.
#[test]
fn memory_of_a_character_device() {
    each_engine(|engine| {
        let (_disk, mut daemon) = start(engine);
        let open = |path: &str| File::options().read(true).write(true).open(path).unwrap();
        let mut device = Device::plain(&daemon);
        let mut plug = Region::new(1 << 34, 1 << 20, 0);
        plug.file = open("/dev/zero");
        device.frontend.add_region(&plug);
        assert_eq!(read_into(&mut device, 7, plug.guest + 4096), (OK, 513));
        device.frontend.remove_region(&plug);
        let mut none = Region::new(1 << 35, 1 << 20, 0);
        none.file = open("/dev/null");
        let payload = crate::support::frontend::single_region(&none);
        let fds = [std::os::fd::AsFd::as_fd(&none.file)];
        assert_eq!(device.frontend.command(msg::ADD_MEM_REG, &payload, &fds).ok(), Some(1));
        device.assert_serves(0);
        // In one table with the memory that the rings are in.
        let Ok(mut memory) = Rc::try_unwrap(Memory::plain()) else { panic!("shared already") };
        memory.regions.push(plug);
        let memory = Rc::new(memory);
        let mut device = Device::over(device.frontend, Setup { memory, ..Setup::default() });
        assert_eq!(read_into(&mut device, 7, 1 << 34), (OK, 513));
        device.assert_serves(0);
        daemon.assert_alive();
    });
}
