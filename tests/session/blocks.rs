//! Block devices, and disks whose blocks are larger than a sector. The device
//! is a loop device, so these need root.

use super::each_engine;
use crate::support::daemon::Backend;
use crate::support::daemon::{Daemon, vublkd};
use crate::support::device::{Device, OK, Setup, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, range};
use crate::support::disk::{Disk, SECTOR, assert_same, pattern, salted};
use crate::support::frontend::feature;
use crate::support::loopdev::LoopDevice;
use crate::support::sys::{root, skip};

/// A block device with 4096-byte blocks over a disk's file.
fn device_over(disk: &Disk, name: &str) -> Option<LoopDevice> {
    if !root(name, "a loop device") {
        return None;
    }
    match LoopDevice::over(&disk.path, 4096) {
        Ok(device) => Some(device),
        Err(reason) => {
            skip(name, &format!("no loop device: {reason}"));
            None
        }
    }
}

#[track_caller]
fn start(backend: Backend, disk: &Disk, device: &LoopDevice, extra: &[&str]) -> Daemon {
    let Backend::Vublkd(engine) = backend else {
        unreachable!("vublkd alone");
    };
    let socket = disk.dir.path().join("disk.sock");
    let mut command = vublkd(engine, &socket, &device.path);
    command.arg("--num-queues=4").args(extra);
    let mut daemon = Daemon::spawn(backend, command, socket);
    daemon.wait_listening();
    daemon
}

#[test]
fn large_blocks_are_told_to_the_driver() {
    each_engine(|engine| {
        let disk = Disk::new();
        let name = "large_blocks_are_told_to_the_driver";
        let Some(device) = device_over(&disk, name) else {
            return;
        };
        let daemon = start(engine, &disk, &device, &[]);
        let mut device = Device::plain(&daemon);
        let config = device.frontend.config(0, 60).unwrap();
        assert_eq!(config[..8], disk.sectors.to_le_bytes(), "capacity");
        assert_eq!(config[20..24], 4096_u32.to_le_bytes(), "blk_size");
        let data = salted(1, 64, 64);
        device.write(64, &data);
        assert_same(&device.read(64, 64), &data, "read back");
        assert_same(&device.read(0, 8), &pattern(0, 8), "pattern");
        assert_eq!(device.status(T_FLUSH, 0, &[], 0), OK);
        drop(device);
        drop(daemon);
        assert_same(&disk.read(64, 64), &data, "in the file under the device");
    });
}

/// Sectors of 512 on blocks of 4096: every write is a part of a block, several
/// queues write into the same block at once, and none undoes another.
#[test]
fn small_writes_into_large_blocks() {
    each_engine(|engine| {
        let disk = Disk::new();
        let name = "small_writes_into_large_blocks";
        let Some(device) = device_over(&disk, name) else {
            return;
        };
        let daemon = start(engine, &disk, &device, &["--logical-block-size=512"]);
        let mut device = Device::new(&daemon, Setup { queues: 4, ..Setup::default() });
        let config = device.frontend.config(20, 4).unwrap();
        assert_eq!(config, 512_u32.to_le_bytes());
        for round in 1..12 {
            let mut waiting = Vec::new();
            // 128 sectors in 16 blocks, one write each, spread so that the
            // neighbours are on other queues.
            for sector in 0..128 {
                let queue = sector as usize % 4;
                let data = salted(round, sector, 1);
                let pending = device.submit(queue, T_OUT, sector, &data, 0);
                waiting.push((queue, pending));
            }
            for (queue, _) in &waiting {
                device.rings[*queue].wait_used("a write of one sector");
            }
            for (_, pending) in &waiting {
                assert_eq!(device.memory.byte(pending.status_at), OK);
            }
            let want = salted(round, 0, 128);
            assert_same(&device.read(0, 128), &want, "128 sectors");
        }
        assert_same(&device.read(128, 8), &pattern(128, 8), "the next block");
        // Unaligned at both ends, longer than a block.
        let data = salted(50, 203, 42);
        device.write(203, &data);
        assert_same(&device.read(202, 1), &pattern(202, 1), "before");
        assert_same(&device.read(203, 42), &data, "written");
        assert_same(&device.read(245, 1), &pattern(245, 1), "after");
    });
}

#[test]
fn zeroes_and_discards_within_large_blocks() {
    each_engine(|engine| {
        let disk = Disk::new();
        let name = "zeroes_and_discards_within_large_blocks";
        let Some(device) = device_over(&disk, name) else {
            return;
        };
        let daemon = start(engine, &disk, &device, &["--logical-block-size=512"]);
        let mut device = Device::plain(&daemon);
        if device.features & feature::WRITE_ZEROES != 0 {
            for (sector, sectors) in [(8, 8), (33, 1), (101, 30), (201, 200)] {
                for flags in [0, 1] {
                    let zeroes = range(sector, sectors, flags);
                    assert_eq!(device.status(T_WRITE_ZEROES, 0, &zeroes, 0), OK);
                    let count = u64::from(sectors) + 2;
                    let mut want = pattern(sector - 1, count);
                    let end = want.len() - SECTOR;
                    want[SECTOR..end].fill(0);
                    assert_same(&device.read(sector - 1, count), &want, "zeroes");
                }
            }
        }
        if device.features & feature::DISCARD != 0 {
            for (sector, sectors) in [(1000, 64), (2001, 3), (3001, 100)] {
                let status = device.status(T_DISCARD, 0, &range(sector, sectors, 0), 0);
                assert_eq!(status, OK, "discard of {sectors} at {sector}");
                let after = sector + u64::from(sectors);
                assert_same(&device.read(sector - 1, 1), &pattern(sector - 1, 1), "before");
                assert_same(&device.read(after, 1), &pattern(after, 1), "after");
            }
        }
        assert_eq!(device.status(T_IN, 0, &[], 512), OK);
    });
}
