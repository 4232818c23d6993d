//! `--pin-memory`: the guest's memory is registered with io_uring for as long
//! as it is the guest's, and the data is the same.

use super::Disk;
use crate::support::daemon::{Daemon, Options, URING, vublkd};
use crate::support::device::{Device, OK, Setup, T_OUT};
use crate::support::disk::{assert_same, salted, takes_direct};
use crate::support::frontend::msg;
use crate::support::memory::{Memory, Region, Span};
use crate::support::sys::{Deadline, skip};

/// Buffers registered with the rings of a daemon, the largest number of any.
fn registered(daemon: &Daemon) -> usize {
    let entries = std::fs::read_dir(format!("/proc/{}/fdinfo", daemon.pid())).unwrap().flatten();
    let infos = entries.filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
    infos
        .filter_map(|info| {
            let line = info.lines().find(|line| line.starts_with("UserBufs:"))?;
            line.split_whitespace().nth(1)?.parse::<usize>().ok()
        })
        .max()
        .unwrap_or(0)
}

#[test]
fn pinned_memory_is_used_and_let_go() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--pin-memory"]));
    let memory =
        Memory::with(&[Span { guest: 1 << 20, len: 64 << 20 }, Span { guest: 1 << 32, len: 16 << 20 }]);
    let mut device = Device::new(&daemon, Setup { queues: 2, ring_size: 256, memory, ..Setup::default() });
    device.write(0, &salted(1, 0, 8));
    if registered(&daemon) == 0 {
        let log = daemon.log();
        assert!(log.contains("--pin-memory has no effect") || log.contains("cannot be pinned"), "{log}");
        return skip("pinned_memory_is_used_and_let_go", "this kernel cannot share registered buffers");
    }
    assert_eq!(registered(&daemon), 2, "one for each region");
    for salt in 1..6 {
        let waiting: Vec<_> = (0..64)
            .map(|index| {
                let data = salted(salt, index * 64, 64);
                let queue = index as usize % 2;
                (queue, device.submit(queue, T_OUT, index * 64, &data, 0))
            })
            .collect();
        // The table changes while they run: again, one region more, one less.
        device.frontend.set_mem_table(&device.memory);
        let plug = Memory { regions: vec![Region::new(1 << 34, 2 << 20, 0)] };
        device.frontend.add_region(&plug.regions[0]);
        assert_eq!(registered(&daemon), 3);
        device.frontend.remove_region(&plug.regions[0]);
        assert_eq!(registered(&daemon), 2);
        for (queue, _) in &waiting {
            device.rings[*queue].wait_used("writes under a changing table");
        }
        for (_, pending) in &waiting {
            assert_eq!(device.memory.byte(pending.status_at), OK);
        }
        assert_same(&disk.read(0, 4096), &salted(salt, 0, 4096), "in the file");
        assert_same(&device.read(8, 64), &salted(salt, 8, 64), "read back");
    }
    drop(device);
    daemon.connect().ask64(msg::GET_FEATURES);
    Deadline::new("the pages to be let go").until_slowly(|| (registered(&daemon) == 0).then_some(()));
    daemon.stop();
    assert!(!daemon.log().contains("pin"), "no complaint:\n{}", daemon.log());
}

#[test]
fn where_it_has_no_effect_it_says_so() {
    let test = "where_it_has_no_effect_it_says_so";
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return skip(test, "no /dev/shm") };
    let disk = folder.path().join("disk.raw");
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let socket = folder.path().join("disk.sock");
    let mut command = vublkd("auto", &socket, &disk);
    command.arg("--pin-memory");
    if !takes_direct(&disk) {
        command.arg("--direct=off");
    }
    let daemon = Daemon::spawn(URING, command, socket);
    daemon.wait_log("--pin-memory has no effect here");
}
