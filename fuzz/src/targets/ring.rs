//! A ring beside virtio-queue's: a driver and a device that do anything in any order, and a driver that breaks the ring
//! at the end.

use super::reader::Reader;
use crate::model::ring::{Action, Twin};

fn action(bytes: &mut Reader<'_>) -> Action {
    match bytes.below(16) {
        0..4 => Action::Add(bytes.below(12) as u16 + 1),
        4 => Action::Take,
        5 => Action::UsedEvent(if bytes.bool() {
            bytes.u16().cast_signed()
        } else {
            bytes.below(9) as i16 - 3
        }),
        6 => Action::NoInterrupt(bytes.bool()),
        7..9 => Action::Fetch(bytes.below(12) as u16 + 1),
        9..12 => Action::Push(bytes.u8().into(), bytes.u32()),
        12 => Action::Show,
        13 => Action::Publish,
        14 => Action::Backlog,
        _ => Action::Arm,
    }
}

pub fn run(data: &[u8]) {
    let mut bytes = Reader::new(data);
    let flags = bytes.u8();
    // Shortly before the indices wrap, or anywhere.
    let base = if flags & 1 == 0 { 0xfff0 | bytes.u16() } else { bytes.u16() };
    let mut twin = Twin::new(1 << (flags >> 4).min(10), base, bytes.below(3) as u16, flags & 2 == 0);
    let broken = (flags & 4 != 0).then(|| (flags & 8 != 0, bytes.u16()));
    while !bytes.is_empty() {
        twin.act(&action(&mut bytes));
    }
    match broken {
        Some((head_too_large, far)) => twin.end_broken(head_too_large, far),
        None => twin.end(),
    }
}
