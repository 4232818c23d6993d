//! The words of a block request: its kinds, its statuses, and the bytes that say what it asks for.

use super::frontend::words32;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;
/// What the status byte holds before the device has written it.
pub const UNWRITTEN: u8 = 0xff;

/// The 16 bytes in front of every request.
pub fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = words32(&[kind, 0]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

/// A segment of a discard or write-zeroes request.
pub fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(words32(&[sectors, flags]));
    bytes
}
