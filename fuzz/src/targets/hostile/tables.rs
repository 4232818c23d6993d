//! Memory regions that a hostile front-end describes: good ones, and ones that lie beside, in or over another one.
//!
//! What it is not: it does not know which of them are refused; `session::model` does.

use super::super::reader::Reader;
use super::{FILE_BYTES, GUEST, MEMORY, USER};
use crate::support::frontend::words64;

/// A region as SET_MEM_TABLE and ADD_MEM_REG describe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub guest: u64,
    pub len: u64,
    pub user: u64,
    pub offset: u64,
}

impl Region {
    /// The good one, which holds the rings.
    pub const GOOD: Self = Self { guest: GUEST, len: FILE_BYTES, user: USER, offset: 0 };

    /// As it goes over the wire.
    pub fn payload(&self) -> Vec<u8> {
        words64(&[self.guest, self.len, self.user, self.offset])
    }

    /// What a message says.
    pub fn parse(payload: &[u8]) -> Self {
        let word = |at: usize| u64::from_le_bytes(payload[8 * at..8 * at + 8].try_into().unwrap());
        Self { guest: word(0), len: word(1), user: word(2), offset: word(3) }
    }

    /// Any region: a good one of either memory file, or one that is made out of those that were described before.
    pub fn any(bytes: &mut Reader<'_>, before: &[Self]) -> (Self, usize) {
        let which = bytes.below(2);
        let apart = which * 0x10_0000;
        let mut region = Self { guest: GUEST + apart, user: USER + apart, ..Self::GOOD };
        match bytes.below(8) {
            0 => region.len = bytes.u64(),
            1 => region.len = u64::from(bytes.u8()) << 4,
            2 => region.len = FILE_BYTES + 1,
            3 => region.len = 0x1000 * (1 + bytes.below(16)),
            _ => {}
        }
        if bytes.rarely() {
            region.offset = if bytes.bool() { bytes.u16().into() } else { 0_u64.wrapping_sub(region.len) };
        }
        if let Some(other) = before.get(bytes.u8() as usize % 8) {
            region.guest = beside((other.guest, other.len), region.len, bytes);
            region.user = if bytes.below(4) == 0 {
                beside((other.user, other.len), region.len, bytes)
            } else {
                // Nearly every front-end's addresses are the guest's, and a constant.
                region.guest.wrapping_add(USER - GUEST)
            };
        }
        (region, MEMORY + which as usize)
    }
}

/// Where `len` bytes begin that touch the range `[start, start + size)`, miss it, or overlap with it.
fn beside((start, size): (u64, u64), len: u64, bytes: &mut Reader<'_>) -> u64 {
    let at = match bytes.below(4) {
        0 => start.wrapping_add(size),
        1 => start.wrapping_sub(len),
        2 => start,
        _ => 0_u64.wrapping_sub(len), // the end of the address space
    };
    let by = match bytes.below(8) {
        0..3 => 0,
        3 => 1,
        4 => -1,
        5 => 0x1000,
        6 => -0x1000,
        _ => i64::from(bytes.u16().cast_signed()),
    };
    at.wrapping_add_signed(by)
}
