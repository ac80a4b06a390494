//! Which classes take part in a step, and where samples find their own.

use crate::{
    head::cuda::raw::SELECTIONS,
    kernels::{
        Kernels, Started,
        launch::{
            Element::{I64, U8, U32},
            Shape,
        },
    },
};
use arcface_proto::types::ClassRange;
use tch::Tensor;

/// Classes that a block writes in one go (sampling.cu, `CHUNK`).
const CHUNK: i64 = 2048;
/// Values of a digit of a key (sampling.cu, `DIGITS`).
pub const DIGITS: i64 = 256;
/// Digits of a key.
const KEY_DIGITS: i32 = 8;

/// Partial counts that lists of `classes` need.
pub fn chunks(classes: i64) -> i64 {
    (classes + CHUNK - 1) / CHUNK
}

/// How the classes of a step are chosen.
pub struct Choice<'a> {
    /// `Draws::word` of the step.
    pub draws: u64,
    /// The shard.
    pub shard: ClassRange,
    /// Classes that take part, if the samples have no more.
    pub wanted: u64,
    /// `[n]` u8: what the samples' own classes are marked in.
    pub flags: &'a Tensor,
    /// `[DIGITS]` u32, 0; left so.
    pub digits: &'a Tensor,
    /// `[chunks(n)]` u32, scratch.
    pub chunks: &'a Tensor,
}

/// A list that a kernel writes.
pub struct List<'a> {
    /// `[c]` u32, rising; with room for as many as there may be.
    pub classes: &'a Tensor,
    /// `[SELECTION]` i64: its length, among others.
    pub selection: &'a Tensor,
}

impl Kernels {
    /// `[b]` i64 labels to classes counted from the shard's first, -1 for those that are not in it.
    pub fn local_classes(&self, labels: &Tensor, shard: ClassRange, local: &Tensor) -> Started {
        let samples = labels.size()[0];
        self.call("head_local_classes")
            .reads(I64, labels, samples)
            .value(samples)
            .value(i64::from(shard.lo))
            .value(i64::from(shard.len()))
            .writes(I64, local, samples)
            .start(Shape::threads(samples))
    }

    /// Chooses the classes of a step: those of `local` `[b]`, and random ones. The list has room for `wanted` and for one a
    /// sample.
    pub fn choose(&self, choice: &Choice<'_>, local: &Tensor, list: &List<'_>) -> Started {
        let (samples, classes) = (local.size()[0], i64::from(choice.shard.len()));
        let lo = u64::from(choice.shard.lo);
        let mut flags = choice.flags.shallow_clone();
        let _ = flags.zero_();
        self.call("head_mark_positives")
            .reads(I64, local, samples)
            .value(samples)
            .writes(U8, &flags, classes)
            .start(Shape::threads(samples))?;
        for digit in (0..KEY_DIGITS).rev() {
            // Every block adds its 256 counts up: as many as a GPU runs at once.
            let shape = Shape::threads(classes);
            let shape = Shape {
                grid: shape.grid.min(1024),
                ..shape
            };
            self.call("head_count_digits")
                .value(choice.draws)
                .value(lo)
                .value(classes)
                .reads(U8, &flags, classes)
                .reads(SELECTIONS, list.selection, 1)
                .value(digit)
                .writes(U32, choice.digits, DIGITS)
                .start(shape)?;
            self.call("head_choose_digit")
                .writes(U32, choice.digits, DIGITS)
                .value(classes)
                .value(choice.wanted)
                .value(digit)
                .writes(SELECTIONS, list.selection, 1)
                .start(Shape { grid: 1, block: 1 })?;
        }
        let room = i64::try_from(choice.wanted).unwrap_or(i64::MAX);
        self.list(
            (choice.draws, choice.shard),
            choice.flags,
            choice.chunks,
            list,
            room.max(samples).min(classes),
        )
    }

    /// Lists all classes whose flag is set. The list has room for `most`.
    pub fn list_flagged(
        &self,
        shard: ClassRange,
        flags: &Tensor,
        chunks: &Tensor,
        list: &List<'_>,
        most: i64,
    ) -> Started {
        // No negatives are wanted: whatever their keys.
        let _ = list.selection.shallow_clone().zero_();
        self.list((0, shard), flags, chunks, list, most)
    }

    fn list(
        &self,
        (draws, shard): (u64, ClassRange),
        flags: &Tensor,
        scratch: &Tensor,
        list: &List<'_>,
        most: i64,
    ) -> Started {
        let (lo, classes) = (u64::from(shard.lo), i64::from(shard.len()));
        let count = chunks(classes);
        self.call("head_count_chosen")
            .value(draws)
            .value(lo)
            .value(classes)
            .reads(U8, flags, classes)
            .reads(SELECTIONS, list.selection, 1)
            .writes(U32, scratch, count)
            .start(Shape::blocks(count))?;
        self.call("head_sum_chunks")
            .writes(U32, scratch, count)
            .value(count)
            .writes(SELECTIONS, list.selection, 1)
            .start(Shape::blocks(1))?;
        self.call("head_write_chosen")
            .value(draws)
            .value(lo)
            .value(classes)
            .reads(U8, flags, classes)
            .reads(SELECTIONS, list.selection, 1)
            .reads(U32, scratch, count)
            .writes(U32, list.classes, most)
            .start(Shape::blocks(count))
    }

    /// Sets the flags `[n]` u8 of all classes of a list `[c]` u32.
    pub fn mark_chosen(&self, chosen: &Tensor, flags: &Tensor) -> Started {
        let count = chosen.size()[0];
        self.call("head_mark_chosen")
            .reads(U32, chosen, count)
            .value(count)
            .writes(U8, flags, flags.size()[0])
            .start(Shape::threads(count))
    }

    /// `[b]` i64: where in the list each sample's own class stands, -1 for those that are not here.
    pub fn find_columns(&self, list: &List<'_>, local: &Tensor, column: &Tensor) -> Started {
        let samples = local.size()[0];
        self.call("head_find_columns")
            .reads(U32, list.classes, 0)
            .reads(SELECTIONS, list.selection, 1)
            .reads(I64, local, samples)
            .value(samples)
            .writes(I64, column, samples)
            .start(Shape::threads(samples))
    }
}
