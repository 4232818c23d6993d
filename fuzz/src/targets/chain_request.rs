//! Chains and requests: `chain::walk` and `request::decode` beside the plain walk of `model::plain`.
//!
//! The bytes are requests that are nearly valid, and harm that is done to their descriptors.

use std::cell::OnceCell;

use super::reader::Reader;
use crate::model::chains::{
    AVAIL, At, BUFFERS, CAPACITY, Case, Field, Ground, HIGH, LOW, NEXT_TO_IT, Plan, TABLE, TABLES,
};
use crate::support::request::{T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES};

/// An address: mapped, across or near an end, or anything.
fn address(bytes: &mut Reader<'_>) -> u64 {
    let near = |end: u64, by: u16| end.wrapping_sub(u64::from(by % 600));
    match bytes.u8() {
        0..160 => BUFFERS + u64::from(bytes.u16() % 0xf000),
        160..200 => HIGH.guest + u64::from(bytes.u16() % 0x8000),
        200..210 => near(NEXT_TO_IT.guest + NEXT_TO_IT.len, bytes.u16()),
        210..220 => near(HIGH.guest + HIGH.len, bytes.u16()),
        220..230 => near(LOW.guest, bytes.u16()),
        230..240 => near(0, bytes.u16()),
        240..246 => TABLES + u64::from(bytes.u16() % 0x1000),
        246..250 => AVAIL + u64::from(bytes.u16() % 0x800),
        _ => bytes.u64(),
    }
}

fn number32(bytes: &mut Reader<'_>) -> u32 {
    match bytes.below(4) {
        0 => bytes.u8().into(),
        1 => 16 * u32::from(bytes.u16() % 600),
        2 => 512 * u32::from(bytes.u8()),
        _ => bytes.u32(),
    }
}

fn number16(bytes: &mut Reader<'_>) -> u16 {
    if bytes.rarely() { bytes.u16() } else { bytes.u8().into() }
}

/// A sector: of the disk, around its end, or any.
fn sector(bytes: &mut Reader<'_>) -> u64 {
    if bytes.rarely() {
        return bytes.u64();
    }
    match bytes.u16() {
        far @ 0x8000.. => CAPACITY + 2 - u64::from(far % 32),
        near => u64::from(near) % (CAPACITY + 2),
    }
}

fn plan(bytes: &mut Reader<'_>) -> Plan {
    let kinds = [T_IN, T_OUT, T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES];
    let shape = bytes.u8();
    let kind = if shape & 0xf8 == 0xf8 { bytes.u32() } else { kinds[usize::from(shape & 7)] };
    let first = sector(bytes);
    Plan {
        kind,
        sector: first,
        sectors: bytes.below(24),
        cuts: [bytes.list(6, |b| b.u16().into()), bytes.list(6, |b| b.u16().into())],
        places: (0..14).map(|_| address(bytes)).collect(),
        indirect: bytes.bool(),
        odd: if bytes.rarely() { i64::from(bytes.u8()) - 128 } else { 0 },
        ranges: bytes.list(20, |b| (sector(b), number32(b), b.below(4) as u32)),
    }
}

fn harm(bytes: &mut Reader<'_>) -> (At, Field) {
    let at = if bytes.bool() {
        At::Ring(bytes.u8().into())
    } else {
        At::Indirect(bytes.below(8) as usize, bytes.below(16) as usize)
    };
    let field = match bytes.below(5) {
        0 => Field::Addr(address(bytes)),
        1 => Field::Len(number32(bytes)),
        2 => Field::Flags(number16(bytes)),
        3 => Field::Next(number16(bytes)),
        _ => Field::All(address(bytes), number32(bytes), number16(bytes), number16(bytes)),
    };
    (at, field)
}

fn noise(bytes: &mut Reader<'_>) -> (u64, Vec<u8>) {
    let at = if bytes.bool() { TABLE } else { TABLES } + u64::from(bytes.u8()) * 16;
    let len = bytes.u8();
    (at, bytes.bytes(len.into()).to_vec())
}

fn case(bytes: &mut Reader<'_>) -> Case {
    let flags = bytes.u8();
    Case {
        size_log: u32::from(bytes.u8() % 10),
        indirect: flags & 7 != 7,
        read_only: flags & 0x18 == 0x18,
        plans: bytes.list(7, plan),
        harm: bytes.list(59, harm),
        heads: bytes.list(3, |b| (b.below(8) as usize, number16(b))),
        ahead: if bytes.rarely() { bytes.u16() } else { bytes.below(16).saturating_sub(13) as u16 },
        noise: bytes.list(3, noise),
    }
}

pub fn run(data: &[u8]) {
    thread_local!(static GROUND: OnceCell<Ground> = const { OnceCell::new() });
    let case = case(&mut Reader::new(data));
    GROUND.with(|ground| ground.get_or_init(Ground::new).play(&case));
}
