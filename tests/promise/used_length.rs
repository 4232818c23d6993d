//! The length in the used ring: bytes that the device wrote from the first writable
//! byte on without a gap (virtio 1.3, 2.7.8.2). A driver may read no more than these,
//! so a length that includes bytes that were not written would show it old memory as data.

use std::fs::File;

use crate::session::each_engine;
use crate::support::daemon::{Backend, Daemon, Options};
use crate::support::device::{
    Device, IOERR, OK, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, header, range,
};
use crate::support::disk::{Disk, SECTOR, salted};
use crate::support::ring::{back, out};

/// What a buffer holds before the device writes to it.
const OLD: u8 = 0xee;

fn start(engine: Backend) -> (Disk, Daemon, Device) {
    let disk = Disk::new();
    let daemon = Daemon::start(engine, &disk, &Options::with(&["--serial=number-7"]));
    let device = Device::plain(&daemon);
    (disk, daemon, device)
}

/// Runs a request with `payload` for the device to read, and `room` writable bytes
/// before the status; gives the status, the length, and what is in the room.
#[track_caller]
fn with_room(device: &mut Device, kind: u32, sector: u64, payload: &[u8], room: usize) -> (u8, u32, Vec<u8>) {
    let memory = device.memory.clone();
    let mut segs = vec![out(memory.page_with(&header(kind, sector)), 16)];
    if !payload.is_empty() {
        segs.push(out(memory.page_with(payload), payload.len()));
    }
    let space = memory.page_with(&vec![OLD; room + 1]);
    if room > 0 {
        segs.push(back(space, room));
    }
    segs.push(back(space + room as u64, 1));
    let (status, used) = device.run_segs(&segs, false);
    (status, used.len, memory.read(space, room))
}

/// The payload is in front of the status, and none of it can be relied on.
#[test]
fn a_read_that_fails_has_written_nothing() {
    each_engine(|engine| {
        let (disk, _daemon, mut device) = start(engine);
        let (status, length, _) = with_room(&mut device, T_IN, disk.sectors, &[], SECTOR);
        assert_eq!((status, length), (IOERR, 0), "behind the end of the disk");
        let (status, length, _) = with_room(&mut device, T_IN, disk.sectors - 1, &[], 2 * SECTOR);
        assert_eq!((status, length), (IOERR, 0), "across the end of the disk");
        // The disk itself fails: its file is shorter than it was.
        let file = File::options().write(true).open(&disk.path).unwrap();
        file.set_len(1 << 20).unwrap();
        let (status, length, _) = with_room(&mut device, T_IN, 4000, &[], 8 * SECTOR);
        assert_eq!((status, length), (IOERR, 0), "where the file was cut off");
        let (status, length, _) = with_room(&mut device, T_IN, 2048 - 8, &[], 16 * SECTOR);
        assert_eq!((status, length), (IOERR, 0), "across the place where the file was cut off");
        let (status, length, _) = with_room(&mut device, T_IN, 2048 - 8, &[], 8 * SECTOR);
        assert_eq!((status, length), (OK, 8 * SECTOR as u32 + 1), "a read that works");
    });
}

/// Nothing is in front of the status, so that one byte was written without a gap.
#[test]
fn a_read_that_fails_without_a_buffer_has_written_its_status() {
    each_engine(|engine| {
        let (disk, _daemon, mut device) = start(engine);
        let (status, length, _) = with_room(&mut device, T_IN, disk.sectors + 1, &[], 0);
        assert_eq!((status, length), (IOERR, 1));
    });
}

/// A buffer of any length is filled to its end, with zeroes behind the serial number.
#[test]
fn the_serial_number_fills_the_buffer() {
    each_engine(|engine| {
        let (_disk, _daemon, mut device) = start(engine);
        for room in [8_usize, 10, 19, 20, 21, 512, 4096] {
            let (status, length, data) = with_room(&mut device, T_GET_ID, 0, &[], room);
            let mut want = b"number-7".to_vec();
            want.resize(room, 0);
            assert_eq!((status, length), (OK, room as u32 + 1), "a buffer of {room} bytes");
            assert_eq!(data, want, "a buffer of {room} bytes");
        }
        let (status, length, data) = with_room(&mut device, T_GET_ID, 0, &[], 3);
        assert_eq!((status, length, data.as_slice()), (OK, 4, &b"num"[..]), "a buffer of 3 bytes");
    });
}

/// A driver may add writable bytes that the request has no use for. The device leaves
/// them alone, so the status behind them is not written without a gap.
#[test]
fn bytes_that_a_request_has_no_use_for_are_not_counted() {
    each_engine(|engine| {
        let (disk, _daemon, mut device) = start(engine);
        let data = salted(1, 8, 8);
        let zeroes = range(64, 8, 0);
        let requests: [(u32, u64, &[u8], &str); 3] = [
            (T_OUT, 8, &data, "a write"),
            (T_FLUSH, 0, &[], "a flush"),
            (T_WRITE_ZEROES, 0, &zeroes, "zeroes"),
        ];
        for (kind, sector, payload, what) in requests {
            for room in [1, SECTOR] {
                let (status, length, untouched) = with_room(&mut device, kind, sector, payload, room);
                assert_eq!((status, length), (OK, 0), "{what} with {room} writable bytes before its status");
                assert_eq!(untouched, vec![OLD; room], "{what}: bytes before its status");
            }
            let (status, length, _) = with_room(&mut device, kind, sector, payload, 0);
            assert_eq!((status, length), (OK, 1), "{what} with just its status");
        }
        assert_eq!(disk.read(8, 8), data);
        // One that fails says no more.
        let (status, length, _) = with_room(&mut device, T_OUT, disk.sectors, &data, SECTOR);
        assert_eq!((status, length), (IOERR, 0), "a write behind the end");
        let (status, length, _) = with_room(&mut device, T_OUT, disk.sectors, &data, 0);
        assert_eq!((status, length), (IOERR, 1), "a write behind the end with just its status");
    });
}
