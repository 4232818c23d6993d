//! Cuts a transfer into operations that the disk takes.
//!
//! What it is: pure arithmetic. Asked again after every operation with what is
//! left, so a short transfer, a payload of too many pieces, one larger than the
//! pool and one that is aligned only in the middle are all the same case.
//!
//! What it is not: it does not know where the bytes are.
//!
//! Invariants: every piece makes progress; no piece passes the end of the disk,
//! whose size is a multiple of the block.
//!
//! ```text
//!   disk blocks  ├────────┼────────┼────────┼────────┤
//!   a write          ▒▒▒▒▒ ▒▒▒▒▒▒▒▒ ▒▒▒▒▒▒▒▒ ▒▒
//!                    Modify └──── Direct ───┘ Modify     guest pages fit
//!                    Modify └ Bounce┘└Bounce┘ Modify     they do not
//! ```

/// Bytes of the largest operation: below the kernel's MAX_RW_COUNT (2 GiB less
/// one page) and a multiple of every block.
pub const MAX_BYTES: u64 = 1 << 30;

/// What the disk and the pool ask of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Offset and length are multiples of this, bytes; a power of two.
    pub block: u64,
    /// Bytes of a pool chunk; a multiple of `block`.
    pub chunk: u64,
}

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Disk to memory.
    Read,
    /// Memory to disk.
    Write,
}

/// The next operation of a transfer. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Between the guest's pages and the disk.
    Direct {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Read a cover into pool pages, then copy `take` bytes from `skip` on.
    BounceRead {
        /// Where on the disk; a block boundary.
        offset: u64,
        /// Whole blocks.
        len: u64,
        /// Bytes of the cover that are not wanted.
        skip: u64,
        /// Bytes that are.
        take: u64,
    },
    /// Copy `len` bytes into pool pages, then write them.
    BounceWrite {
        /// Where on the disk; a block boundary.
        offset: u64,
        /// Whole blocks.
        len: u64,
    },
    /// Read a block into pool pages, replace `take` bytes from `skip` on, and
    /// write it back.
    Modify {
        /// The block.
        offset: u64,
        /// Bytes of it that stay.
        skip: u64,
        /// Bytes that are replaced.
        take: u64,
    },
}

/// The next piece of a transfer of `len` bytes, more than 0, at `offset`.
/// `fits`: the guest's pages can be handed to the disk as they are.
#[must_use]
pub fn next_piece(direction: Direction, offset: u64, len: u64, fits: bool, rules: Rules) -> Piece {
    let mask = rules.block - 1;
    let skip = offset & mask;
    let whole = len & !mask;
    match direction {
        _ if skip == 0 && whole > 0 && fits => Piece::Direct { offset, len: whole.min(MAX_BYTES) },
        Direction::Read => {
            let start = offset - skip;
            let cover = (skip + len.min(rules.chunk)).next_multiple_of(rules.block).min(rules.chunk);
            Piece::BounceRead { offset: start, len: cover, skip, take: len.min(cover - skip) }
        }
        Direction::Write if skip == 0 && whole > 0 => {
            Piece::BounceWrite { offset, len: whole.min(rules.chunk) }
        }
        Direction::Write => Piece::Modify { offset: offset - skip, skip, take: len.min(rules.block - skip) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    proptest! {
        /// Pieces cover each byte once and in order, are whole blocks, and end.
        #[test]
        fn pieces_cover_the_transfer(
            write in any::<bool>(),
            sector in 0u64..64,
            sectors in 1u64..200,
            fits in any::<bool>(),
            block_log in 9u32..13,
            pages in 1u64..5,
        ) {
            let rules = Rules { block: 1 << block_log, chunk: pages << 12 };
            let direction = if write { Direction::Write } else { Direction::Read };
            let (offset, len) = (sector * 512, sectors * 512);
            let mut done = 0;
            let mut steps = 0;
            while done < len {
                let at = offset + done;
                let (start, size, first, moved) = match next_piece(direction, at, len - done, fits, rules) {
                    Piece::Direct { offset, len } => { prop_assert!(fits); (offset, len, offset, len) }
                    Piece::BounceRead { offset, len, skip, take } => {
                        prop_assert!(!write && len <= rules.chunk && skip + take <= len);
                        (offset, len, offset + skip, take)
                    }
                    Piece::BounceWrite { offset, len } => {
                        prop_assert!(write && !fits && len <= rules.chunk);
                        (offset, len, offset, len)
                    }
                    Piece::Modify { offset, skip, take } => {
                        prop_assert!(write && take < rules.block && skip + take <= rules.block);
                        (offset, rules.block, offset + skip, take)
                    }
                };
                prop_assert_eq!(first, at);
                prop_assert_eq!(start % rules.block, 0);
                prop_assert_eq!(size % rules.block, 0);
                prop_assert!(size > 0 && moved > 0);
                done += moved;
                steps += 1;
                prop_assert!(steps <= 400);
            }
            prop_assert_eq!(done, len);
        }
    }
}
