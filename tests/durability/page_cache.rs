//! With `--direct=off` the guest's data is in this host's page cache, which other
//! hosts do not see. When the last ring of a migration's source stops, another daemon may take
//! the image: by then the cache has to be written back, and dropped.

use std::fs::File;
use std::os::fd::AsRawFd;

use super::stage::{BLOCK, BLOCK_SECTORS, DISK, STORES, Stage};
use crate::session::migration::{Log, log_all};
use crate::support::daemon::URING;
use crate::support::device::{Device, Setup};
use crate::support::disk::{assert_same, salted};
use crate::support::frontend::{msg, words32};
use crate::support::sys::Deadline;

/// The byte that a daemon locks so that no other process writes to the image.
const FORBIDS_WRITING: i64 = 201;

/// Whether another process would be refused the image.
fn is_locked(file: &File) -> bool {
    // SAFETY: all zeroes is a valid flock, and F_OFD_GETLK writes one.
    unsafe {
        let mut lock: libc::flock = std::mem::zeroed();
        lock.l_type = libc::F_WRLCK as i16;
        lock.l_start = FORBIDS_WRITING;
        lock.l_len = 1;
        assert_eq!(libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock), 0);
        i32::from(lock.l_type) != libc::F_UNLCK
    }
}

/// The destination of a migration may serve the image as soon as it is unlocked:
/// what the guest wrote at the source has to be on the disk by then.
#[test]
fn rings_that_stop_leave_the_data_on_the_disk_before_the_image_is_unlocked() {
    let test = "durability::rings_that_stop_leave_the_data_on_the_disk_before_the_image_is_unlocked";
    for store in STORES {
        let Some(stage) = Stage::new(test, store) else { return };
        let mut daemon = stage.start(URING, &["--direct=off"]);
        let other = File::options().read(true).write(true).open(&stage.path).unwrap();
        let mut device = Device::new(&daemon, Setup { queues: 2, ..Setup::default() });
        let blocks = [3, 4, 100];
        for block in blocks {
            device.write(block * BLOCK_SECTORS, &salted(1, block * BLOCK_SECTORS, BLOCK_SECTORS));
        }
        assert!(is_locked(&other), "{store:?}: the image is not locked while rings run");
        let log = Log::new();
        log.give(&device);
        log_all(&device, true);
        device.frontend.vring_base(1).unwrap();
        // A ring that is not the last one may stop without an fsync.
        stage.gate.hold_syncs();
        device.frontend.send(msg::GET_VRING_BASE, 0, &words32(&[0, 0]), &[]).unwrap();
        Deadline::new("an fsync, or an answer without one").until_slowly(|| {
            let answered = crate::support::sys::tick(
                &[std::os::fd::AsFd::as_fd(&device.frontend.socket)],
                std::time::Duration::ZERO,
            );
            assert!(!answered, "{store:?}: the last ring was stopped without an fsync");
            (stage.gate.held_syncs() > 0).then_some(())
        });
        assert!(is_locked(&other), "{store:?}: the image is unlocked before its data is on the disk");
        stage.gate.open_syncs();
        assert_eq!(device.frontend.receive().unwrap().request, msg::GET_VRING_BASE);
        for block in blocks {
            let want = salted(1, block * BLOCK_SECTORS, BLOCK_SECTORS);
            assert_same(&stage.durable(block), &want, &format!("{store:?}: block {block} on the disk"));
        }
        assert!(!is_locked(&other), "{store:?}: the image is locked though no ring runs");
        drop(device);
        daemon.stop();
    }
}

/// A guest that boots again keeps the image: nothing has to be durable for that.
#[test]
fn rings_that_stop_without_a_migration_wait_for_no_fsync() {
    let test = "durability::rings_that_stop_without_a_migration_wait_for_no_fsync";
    for store in STORES {
        for direct in ["--direct=on", "--direct=off"] {
            let Some(stage) = Stage::new(test, store) else { return };
            let mut daemon = stage.start(URING, &[direct]);
            let other = File::options().read(true).write(true).open(&stage.path).unwrap();
            let mut device = Device::plain(&daemon);
            device.write(3 * BLOCK_SECTORS, &salted(1, 3 * BLOCK_SECTORS, BLOCK_SECTORS));
            stage.gate.hold_syncs();
            device.frontend.vring_base(0).unwrap();
            device.frontend.tell(msg::RESET_DEVICE, &[], &[]);
            assert_eq!(stage.gate.held_syncs(), 0, "{store:?}, {direct}: an fsync");
            assert!(is_locked(&other), "{store:?}, {direct}: the image is not locked between two boots");
            drop(device);
            Deadline::new("an fsync once the front-end has left")
                .until_slowly(|| (stage.gate.held_syncs() > 0).then_some(()));
            assert!(is_locked(&other), "{store:?}, {direct}: unlocked before its data is on the disk");
            stage.gate.open_syncs();
            Deadline::new("the lock to go").until_slowly(|| (!is_locked(&other)).then_some(()));
            daemon.stop();
        }
    }
}

/// A VM that migrated away and comes back reads what it wrote on the other host, not
/// what this host had cached.
#[test]
fn rings_that_start_again_read_the_disk_and_not_an_old_page_cache() {
    let test = "durability::rings_that_start_again_read_the_disk_and_not_an_old_page_cache";
    for store in STORES {
        let Some(stage) = Stage::new(test, store) else { return };
        let mut daemon = stage.start(URING, &["--direct=off"]);
        let mut device = Device::new(&daemon, Setup { queues: 2, ..Setup::default() });
        let log = Log::new();
        log.give(&device);
        log_all(&device, true);
        let blocks = [0, 7, 31];
        for round in 0..3 {
            for block in blocks {
                device.read(block * BLOCK_SECTORS, BLOCK_SECTORS);
                let data = salted(10 + round, block * BLOCK_SECTORS, BLOCK_SECTORS);
                device.write(block * BLOCK_SECTORS, &data);
            }
            for queue in 0..2 {
                device.frontend.vring_base(queue).unwrap();
            }
            let here = stage.gate.durable();
            for block in blocks {
                let start = block as usize * BLOCK;
                let want = salted(10 + round, block * BLOCK_SECTORS, BLOCK_SECTORS);
                assert_same(&here[start..start + BLOCK], &want, &format!("{store:?}: block {block}"));
            }
            let elsewhere = salted(20 + round, 0, (DISK / 512) as u64);
            stage.gate.write_below(0, &elsewhere);
            for queue in 0..2 {
                let kick = &device.rings[queue as usize].kick;
                device.frontend.vring_fd(msg::SET_VRING_KICK, queue, kick);
            }
            for block in [0, 7, 31, 5] {
                let start = block as usize * BLOCK;
                let got = device.read(block * BLOCK_SECTORS, BLOCK_SECTORS);
                let what = format!("{store:?}: block {block} that was written elsewhere");
                assert_same(&got, &elsewhere[start..start + BLOCK], &what);
            }
        }
        drop(device);
        daemon.stop();
    }
}
