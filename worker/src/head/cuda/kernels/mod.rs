//! The kernels as functions over tensors: every one compares the tensors that it is given with what its kernel reads and
//! writes, and says how many threads it takes. Knows no step and no rank. What is chosen is in `classes.rs`, what cosines
//! become in `softmax.rs`, what becomes of embeddings and weights in `rows.rs`.
//!
//! Shapes: b samples of all ranks, r samples of this one, n classes of the shard, c of them that take part, t a tile of
//! those, d embedding.

mod classes;
mod rows;
mod softmax;

pub use classes::{Choice, DIGITS, List, chunks};
pub use rows::{OwnRows, RowsGradient, SgdStep};
pub use softmax::{AngularMargin, OtherClasses, SoftmaxRows, Tile};

use super::raw::{self, ROW_MAPS};
use crate::kernels::{
    Call,
    launch::Element::{F32, U32},
};
use tch::Tensor;

/// Class weights. Handles: the tensors are the head's.
pub struct Weights {
    /// `[n, d]` f32.
    pub weight: Tensor,
    /// `[n, d]` f32; needed where rows may have missed steps.
    pub momentum: Option<Tensor>,
    /// For rows that may have missed steps.
    pub missed: Option<Missed>,
}

/// Steps that rows may have missed (`lazy_sgd.rs`).
pub struct Missed {
    /// `[n]` u32: the history's `now` when the row was touched last.
    pub since: Tensor,
    /// `[steps, 4]` f32: the map of all steps from each one on.
    pub products: Tensor,
    /// Steps taken.
    pub now: u32,
}

impl Weights {
    fn rows(&self) -> i64 {
        self.weight.size()[0]
    }

    fn dim(&self) -> i64 {
        self.weight.size()[1]
    }
}

impl Call<'_> {
    fn weights(self, weights: &Weights) -> Self {
        let count = weights.rows() * weights.dim();
        self.reads(F32, &weights.weight, count)
            .maybe_reads(F32, weights.momentum.as_ref(), count)
    }

    fn missed(mut self, weights: &Weights) -> Self {
        let Some(missed) = &weights.missed else {
            return self.value(raw::History::NONE);
        };
        let remembered = missed.products.size()[0];
        self.check(U32, &missed.since, weights.rows());
        self.check(ROW_MAPS, &missed.products, remembered);
        // A row that has missed a step is made up for with its momentum.
        if weights.momentum.is_none() {
            self.refuse("needs momentum beside it".to_owned());
        }
        self.value(raw::History {
            since: missed.since.data_ptr(),
            products: missed.products.data_ptr(),
            remembered: u32::try_from(remembered).unwrap_or(0),
            now: missed.now,
        })
    }
}
