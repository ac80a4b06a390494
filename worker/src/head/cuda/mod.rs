//! The head's kernels for NVIDIA GPUs, as sources: CUDA C++ that NVRTC compiles on the machine that runs them (`crate::nvrtc`).
//! What is here is arithmetic alone; knows no driver, no memory and no stream.
//!
//! # A step
//! The matrix products are the library's, everything between them is one of these. b samples of all ranks, c classes of the
//! shard that take part, d the embedding's length; a *tile* is some of the c columns.
//!
//! | | kernel | |
//! | --- | --- | --- |
//! | once | `head_mark_positives` .. `head_find_columns` | which classes take part, and each sample's column among them (`sampling.cu`) |
//! | once | `head_normalize_rows_*`, `head_normalize_weights_*` | embeddings and weights of length 1 (`normalize.cu`) |
//! | once | `head_target_cosines`, `head_margin_logits` | each sample's logit of its own class (`softmax.cu`) |
//! | tile | product | cosines, `[b, tile]` |
//! | tile | `head_softmax_sums_*` | adds up exponentials; the cosines may be forgotten |
//! | | all-reduce | sums and logits over ranks; where a sum came out too small, again with the shift from `head_largest_logits_*` |
//! | once | `head_softmax_rows` | losses, and the factors of the gradient (`gradient.cu`) |
//! | tile | product | cosines again |
//! | tile | `head_softmax_gradient_*` | the loss's gradient by cosines, in their place or in bf16 beside them |
//! | tile | two products | gradient of embeddings (added up), gradient of the tile's weights |
//! | tile | `head_sgd_rows` | the update (`update.cu`); no gradient of all classes exists |
//!
//! Losses other than the angular margins have their `TargetLogit` from [`Prepared`](super::margin::Prepared) instead of
//! `head_margin_logits`: b numbers. Weights and momentum are f32; embeddings, cosines and gradients f32 or bf16, as the
//! kernel's name says (`in_out`). The same inputs give the same bits, whatever the grid: every sum has one block and one order.
//!
//! # How to launch one
//! A grid and blocks of one dimension; a block has a power of two of threads, 256 at most. Any grid is right (kernels
//! stride over what there is); one block a row, or one thread a sample where the comment says so, is fast. No dynamic
//! shared memory. Sizes are 64 bits; matrices are dense and in rows unless a `stride` is named.
//!
//! # How they are tested
//! Sources keep to what the host's C++ compiler reads too. In builds with tests, `twin/` makes every thread of a block a fibre
//! and runs the kernels on the CPU, in both orders of threads, and `tests/` compares them with the heads that we have. NVRTC
//! compiles all of them for all architectures in `crate::nvrtc`'s tests. What no test here can see: the time they take, and
//! whether a GPU's exponential and fused arithmetic are as good as the tolerances have it.

#[cfg(all(test, cuda_twin))]
mod tests;
#[cfg(all(test, cuda_twin))]
mod twin;

/// What the kernels include, by name.
pub const HEADERS: [(&str, &str); 2] = [
    ("common.cuh", include_str!("common.cuh")),
    ("terms.cuh", include_str!("terms.cuh")),
];

/// The kernels, by file.
pub const SOURCES: [(&str, &str); 5] = [
    ("normalize.cu", include_str!("normalize.cu")),
    ("softmax.cu", include_str!("softmax.cu")),
    ("gradient.cu", include_str!("gradient.cu")),
    ("update.cu", include_str!("update.cu")),
    ("sampling.cu", include_str!("sampling.cu")),
];
