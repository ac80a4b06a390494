//! Which rows of the old shards make up a new one: pure arithmetic on class ranges.

use arcface_proto::types::ClassRange;
use std::ops::Range;

/// Consecutive rows that lie in one old part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the part in the list given.
    pub part: usize,
    /// Rows inside the part.
    pub rows: Range<u32>,
    /// First of the rows inside the new shard.
    pub at: u32,
}

impl Piece {
    /// Bytes of the piece inside a tensor of the part, `row_bytes` a row, from the tensor's start.
    pub fn bytes(&self, row_bytes: u64) -> Range<u64> {
        u64::from(self.rows.start) * row_bytes..u64::from(self.rows.end) * row_bytes
    }
}

/// A class that no part, or more than one, holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadCover {
    /// No part has it.
    #[error("no part holds class {class}")]
    Gap {
        /// The class.
        class: u32,
    },
    /// Two parts have it.
    #[error("two parts hold class {class}")]
    Overlap {
        /// The class.
        class: u32,
    },
    /// A part ends before it begins.
    #[error("a part holds classes {0}, which is no range")]
    NoRange(ClassRange),
}

/// The pieces of `parts` that make up `wanted`, in the order of classes. Parts may come in any order; together
/// they must hold every wanted class exactly once.
pub fn pieces(wanted: ClassRange, parts: &[ClassRange]) -> Result<Vec<Piece>, BadCover> {
    if let Some(&part) = parts.iter().find(|part| part.lo > part.hi) {
        return Err(BadCover::NoRange(part));
    }
    let mut order: Vec<usize> = (0..parts.len()).filter(|&part| !parts[part].is_empty()).collect();
    order.sort_by_key(|&part| parts[part].lo);
    let mut out = Vec::new();
    let mut next = wanted.lo;
    for part in order {
        let classes = parts[part];
        if wanted.is_empty() || classes.hi <= wanted.lo || classes.lo >= wanted.hi {
            continue;
        }
        let lo = classes.lo.max(wanted.lo);
        match lo {
            lo if lo > next => return Err(BadCover::Gap { class: next }),
            lo if lo < next => return Err(BadCover::Overlap { class: lo }),
            _ => {}
        }
        next = classes.hi.min(wanted.hi);
        out.push(Piece {
            part,
            rows: lo - classes.lo..next - classes.lo,
            at: lo - wanted.lo,
        });
    }
    match next < wanted.hi {
        true => Err(BadCover::Gap { class: next }),
        false => Ok(out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shards(classes: u32, world: u32) -> Vec<ClassRange> {
        (0..world)
            .map(|rank| ClassRange::of_rank(classes, rank, world))
            .collect()
    }

    /// Bytes of some rows: different in every row.
    fn rows(classes: Range<u32>, row_bytes: usize) -> Vec<u8> {
        classes
            .flat_map(|class| (0..row_bytes).map(move |k| (class.wrapping_mul(31) as usize + 7 * k) as u8))
            .collect()
    }

    proptest! {
        #[test]
        fn any_world_reads_what_any_world_wrote(classes in 0u32..3000, old in 1u32..40, new in 1u32..40,
                                                row_bytes in 1usize..9, reversed: bool) {
            let mut parts = shards(classes, old);
            if reversed {
                parts.reverse();
            }
            let stored: Vec<Vec<u8>> = parts.iter().map(|part| rows(part.indices(), row_bytes)).collect();
            for wanted in shards(classes, new) {
                let mut got = vec![0; wanted.len() as usize * row_bytes];
                let mut moved = 0;
                for piece in pieces(wanted, &parts).expect("the shards cover all classes") {
                    let from = piece.bytes(row_bytes as u64);
                    let bytes = &stored[piece.part][from.start as usize..from.end as usize];
                    let at = piece.at as usize * row_bytes;
                    got[at..at + bytes.len()].copy_from_slice(bytes);
                    moved += bytes.len();
                }
                prop_assert_eq!(moved, got.len());
                prop_assert_eq!(got, rows(wanted.indices(), row_bytes));
            }
        }
    }

    #[test]
    fn the_same_world_reads_one_part_whole() {
        let parts = shards(10, 3);
        let found = pieces(parts[1], &parts).expect("covered");
        assert_eq!(
            found,
            [Piece {
                part: 1,
                rows: 0..3,
                at: 0
            }]
        );
    }

    #[test]
    fn gaps_and_overlaps_are_named() {
        let range = |lo, hi| ClassRange { lo, hi };
        let wanted = range(2, 9);
        assert_eq!(
            pieces(wanted, &[range(0, 4), range(5, 9)]),
            Err(BadCover::Gap { class: 4 })
        );
        assert_eq!(
            pieces(wanted, &[range(0, 4), range(4, 8)]),
            Err(BadCover::Gap { class: 8 })
        );
        assert_eq!(pieces(wanted, &[range(3, 9)]), Err(BadCover::Gap { class: 2 }));
        assert_eq!(
            pieces(wanted, &[range(0, 5), range(4, 9)]),
            Err(BadCover::Overlap { class: 4 })
        );
        assert_eq!(
            pieces(wanted, &[range(0, 9), range(0, 9)]),
            Err(BadCover::Overlap { class: 2 })
        );
        assert_eq!(
            pieces(wanted, &[range(9, 2)]),
            Err(BadCover::NoRange(range(9, 2)))
        );
        assert_eq!(pieces(range(4, 4), &[]), Ok(vec![]));
    }
}
