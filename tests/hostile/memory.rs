//! Memory that is lost, sealed or replaced while requests use it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::rc::Rc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::Victim;
use crate::session::each_engine;
use crate::support::daemon::URING;
use crate::support::device::{Device, IOERR, OK, Setup, T_IN, T_OUT, UNWRITTEN, header};
use crate::support::disk::{SECTOR, assert_same, pattern, salted};
use crate::support::frontend::{msg, single_region, words64};
use crate::support::inflight::describe;
use crate::support::memory::{Memory, Region, Span};
use crate::support::ring::{Desc, INDIRECT, back, out};
use crate::support::sys::{Deadline, Event};

const KEPT: Span = Span { guest: 1 << 20, len: 64 << 20 };
const LOST: Span = Span { guest: 1 << 30, len: 4 << 20 };

/// What of a request is on the page that is lost.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Header,
    Table,
    Status,
    ReadData,
    WriteData,
    /// Its buffer is not aligned, so the daemon itself copies it.
    CopiedData,
    Ring,
}

/// A file is truncated in the middle of I/O, with requests on their way that need it and others that do not. The daemon
/// itself trips over what it reads or writes itself, and leaves the front-end. What only the disk's driver touches is an
/// I/O error.
#[test]
fn a_page_is_lost_in_the_middle_of_io() {
    each_engine(|engine| {
        let mut victim = Victim::new(engine);
        for part in [
            Part::Header,
            Part::Table,
            Part::Status,
            Part::ReadData,
            Part::WriteData,
            Part::CopiedData,
            Part::Ring,
        ] {
            lose(&mut victim, part);
            victim.serves(&format!("{part:?} was on a page that was lost"));
        }
        assert_same(&victim.disk.read(0, 64), &pattern(0, 64), "nothing of a lost page reached the disk");
        victim.stops();
    });
}

#[track_caller]
fn lose(victim: &mut Victim, part: Part) {
    let memory = Memory::with(&[KEPT, LOST]);
    let mut device =
        Device::new(&victim.daemon, Setup { ring_size: 256, memory: Rc::clone(&memory), ..Setup::default() });
    if part == Part::Ring {
        // Its second queue is in the memory that is lost.
        let place = memory.alloc_in(1, 4096, 4096);
        let mut payload = crate::support::frontend::words32(&[1, 0]);
        let user = memory.user(place);
        payload.extend(words64(&[user, user + 2048, user + 1024, 0]));
        device.frontend.vring_state(msg::SET_VRING_NUM, 1, 16);
        device.frontend.tell(msg::SET_VRING_ADDR, &payload, &[]);
    }
    let lost = LOST.guest;
    let (kind, sector) =
        if matches!(part, Part::WriteData | Part::CopiedData) { (T_OUT, 8) } else { (T_IN, 8) };
    let status = memory.page_with(&[UNWRITTEN]);
    let place = |which: Part, at: u64| if part == which { lost } else { at };
    let head = place(Part::Header, memory.alloc(4096, 4096));
    memory.write(head, &header(kind, sector));
    let status_at = place(Part::Status, status);
    let buffer = match part {
        Part::ReadData | Part::WriteData => lost,
        Part::CopiedData => lost + 8,
        _ => memory.alloc(4096, 4096),
    };
    let data = if kind == T_IN { back(buffer, 4096) } else { out(buffer, 4096) };
    let segs = [out(head, 16), data, back(status_at, 1)];
    let chain = if part == Part::Table {
        device.rings[0].indirect_at(lost, &segs)
    } else {
        device.rings[0].chain(&segs)
    };
    let errors = victim.count("errors");
    // Others are on their way.
    let others: Vec<_> = (0..32).map(|n| device.submit(0, T_IN, 8 * n, &[], 4096)).collect();
    memory.regions[1].file.set_len(0).unwrap();
    device.rings[0].offer(chain);
    if part == Part::Ring {
        let kick = Event::new();
        // Refused, or accepted and then noticed: there is nothing to read in its ring.
        let _ = device.frontend.command(msg::SET_VRING_KICK, &1_u64.to_le_bytes(), &[kick.as_fd()]);
        let _ =
            device.frontend.command(msg::SET_VRING_ENABLE, &crate::support::frontend::words32(&[1, 1]), &[]);
    }
    if matches!(part, Part::ReadData | Part::WriteData) {
        for _ in 0..=others.len() {
            device.rings[0].wait_used("a request that lost its memory, or one beside it");
        }
        assert_eq!(memory.byte(status), IOERR, "{part:?}");
        for pending in &others {
            assert_eq!(memory.byte(pending.status_at), OK, "{part:?}");
        }
        device.frontend.sync();
        assert_eq!(victim.count("errors"), errors + 1);
        victim.daemon.wait_log("Bad address");
        device.assert_serves(0);
    } else {
        device.frontend.wait_hangup(&format!("{part:?} is gone"));
        victim.daemon.wait_log("took back memory");
        if !matches!(part, Part::Status | Part::Ring) {
            assert_ne!(memory.byte(status), OK, "{part:?}");
        }
    }
}

/// A MiB with these seals.
fn sealed(seals: SealFlags) -> File {
    let file = memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let file = File::from(file);
    file.set_len(1 << 20).unwrap();
    fcntl_add_seals(&file, seals).unwrap();
    file
}

/// A memory file that cannot be written to as we have to: with these seals from the start, or opened to be read.
fn unwritable() -> Vec<(&'static str, File)> {
    let open = sealed(SealFlags::empty());
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&open));
    let readable = File::options().read(true).custom_flags(libc::O_CLOEXEC).open(path).unwrap();
    vec![
        ("sealed against writes", sealed(SealFlags::WRITE)),
        ("sealed against writes to come", sealed(SealFlags::FUTURE_WRITE)),
        ("only readable", readable),
    ]
}

#[test]
fn memory_that_cannot_be_written_is_refused() {
    let mut victim = Victim::new(URING);
    for (what, file) in unwritable() {
        let mut device = Device::plain(&victim.daemon);
        let mut region = Region::new(1 << 34, 1 << 20, 0);
        region.file = file;
        let fd: [BorrowedFd<'_>; 1] = [region.file.as_fd()];
        let told = device.frontend.command(msg::ADD_MEM_REG, &single_region(&region), &fd);
        assert_eq!(told.ok(), Some(1), "a region that is {what}");
        device.assert_serves(0);
        let told = device.frontend.command(msg::SET_INFLIGHT_FD, &describe(1 << 20, 0, 1, 128), &fd);
        assert_eq!(told.ok(), Some(1), "an in-flight region that is {what}");
        device.assert_serves(0);
        let memory = Memory { regions: vec![region] };
        assert_eq!(device.frontend.try_mem_table(&memory).ok(), Some(1), "a table that is {what}");
        device.assert_serves(0);
        // A log is not answered by a number.
        let log = words64(&[1 << 20, 0]);
        device.frontend.send(msg::SET_LOG_BASE, 0, &log, &[memory.regions[0].file.as_fd()]).unwrap();
        device.frontend.wait_hangup(what);
        drop(device);
        victim.serves(what);
    }
    let log = victim.daemon.log();
    for line in
        ["cannot map the guest memory region", "an in-flight region of 1 queues", "cannot map a dirty log"]
    {
        assert!(log.contains(line), "no {line:?} in:\n{log}");
    }
    victim.stops();
}

/// Seals against changes of size are what good front-ends set.
#[test]
fn memory_of_a_fixed_size_is_served() {
    let mut victim = Victim::new(URING);
    let file = sealed(SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL);
    let mut device = Device::plain(&victim.daemon);
    let mut plug = Region::new(1 << 34, 1 << 20, 0);
    plug.file = file;
    device.frontend.add_region(&plug);
    let at = device.memory.page_with(&header(T_IN, 7));
    let (status, _) = device.run_segs(&[out(at, 16), back(1 << 34, SECTOR), back(at + 32, 1)], false);
    assert_eq!(status, OK);
    let mut got = vec![0; SECTOR];
    std::os::unix::fs::FileExt::read_exact_at(&plug.file, &mut got, 0).unwrap();
    assert_same(&got, &pattern(7, 1), "in sealed memory");
    drop(device);
    victim.serves("memory of a fixed size");
    victim.stops();
}

/// Other memory at the same addresses while writes from there are on their way: each write is of the one or of the
/// other memory, and whole.
#[test]
fn memory_is_replaced_under_writes() {
    const WRITES: u64 = 64;
    const SECTORS: u64 = 64;
    const FROM: u64 = 40_960;
    each_engine(|engine| {
        let mut victim = Victim::new(engine);
        for round in 1..20 {
            let mut device = Device::new(&victim.daemon, Setup { ring_size: 256, ..Setup::default() });
            let sectors = (0..WRITES).map(|index| FROM + index * SECTORS);
            let place = |sector: u64| LOST.guest + (sector - FROM) * SECTOR as u64;
            let salts = [2 * round, 2 * round + 1];
            let [old, new] = salts.map(|salt| {
                let memory = Memory::with(&[LOST]);
                sectors.clone().for_each(|at| memory.write(place(at), &salted(salt, at, SECTORS)));
                memory
            });
            device.frontend.add_region(&old.regions[0]);
            let statuses: Vec<u64> = sectors
                .clone()
                .map(|sector| {
                    let at = device.memory.page_with(&header(T_OUT, sector));
                    device.memory.write(at + 32, &[UNWRITTEN]);
                    let data = out(place(sector), SECTORS as usize * SECTOR);
                    let head = device.rings[0].chain(&[out(at, 16), data, back(at + 32, 1)]);
                    device.rings[0].stage(head);
                    at + 32
                })
                .collect();
            device.rings[0].publish();
            device.rings[0].kick.signal();
            replace(&device, &new.regions[0]);
            for &status in &statuses {
                device.rings[0].wait_used("a write under memory that is replaced");
                assert_ne!(device.memory.byte(status), IOERR);
            }
            assert!(statuses.iter().all(|&at| device.memory.byte(at) == OK));
            for sector in sectors {
                let got = victim.disk.read(sector, SECTORS);
                let is_whole = salts.iter().any(|&salt| got == salted(salt, sector, SECTORS));
                assert!(is_whole, "the write at sector {sector} is of neither memory");
            }
        }
        victim.serves("memory was replaced under writes");
        victim.stops();
    });
}

/// A table with the memory of the rings, and this one.
#[track_caller]
fn replace(device: &Device, region: &Region) {
    let rings = &device.rings[0].memory.regions[0];
    let mut payload = crate::support::frontend::words32(&[2, 0]);
    for region in [rings, region] {
        payload.extend(words64(&[region.guest, region.len, region.user, region.offset]));
    }
    device.frontend.tell(msg::SET_MEM_TABLE, &payload, &[rings.file.as_fd(), region.file.as_fd()]);
}

/// All memory is replaced by empty one, the ring with it: an index that moves back breaks the ring, and a front-end that
/// starts it anew is served.
#[test]
fn the_memory_of_a_ring_is_replaced() {
    each_engine(|engine| {
        let mut victim = Victim::new(engine);
        let mut device = Device::plain(&victim.daemon);
        let error = Event::new();
        device.frontend.vring_fd(msg::SET_VRING_ERR, 0, &error);
        for sector in 0..40 {
            assert_eq!(device.read(sector, 1), pattern(sector, 1));
        }
        let empty = Memory::with(&[KEPT]);
        device.frontend.set_mem_table(&empty);
        device.rings[0].kick.signal();
        error.wait("the error descriptor of a ring whose memory is another one");
        victim.daemon.wait_log("the driver broke the ring");
        device.frontend.vring_base(0).unwrap();
        let mut anew = Device::over(device.frontend, Setup { memory: empty, ..Setup::default() });
        anew.assert_serves(0);
        drop(anew);
        victim.serves("the memory of a ring was replaced");
        victim.stops();
    });
}

/// An indirect table of which only the first descriptor is in memory.
#[test]
fn a_table_over_the_end_of_memory() {
    let mut victim = Victim::new(URING);
    let mut device = Device::plain(&victim.daemon);
    let malformed = victim.count("malformed");
    let end = KEPT.guest + KEPT.len;
    let head = device.rings[0].raw(Desc { addr: end - 24, len: 64, flags: INDIRECT, next: 0 });
    device.memory.write(end - 24, &Desc { addr: 1 << 20, len: 16, flags: 1, next: 1 }.bytes());
    device.rings[0].offer(head);
    assert_eq!(device.rings[0].wait_used("a table over the end of memory").len, 0);
    device.frontend.sync();
    Deadline::new("the count of it")
        .until_slowly(|| (victim.count("malformed") == malformed + 1).then_some(()));
    victim.daemon.wait_log("an indirect table outside of guest memory");
    device.assert_serves(0);
    drop(device);
    victim.serves("a table over the end of memory");
}
