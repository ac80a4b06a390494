//! The head for NVIDIA GPUs. Its kernels are sources here, CUDA C++ that NVRTC compiles on the machine that runs them
//! (`crate::nvrtc`); `head.rs` is the head, `kernels/` starts the kernels over tensors, and who starts them is behind
//! [`Launcher`]: a GPU's driver (`crate::device`). Knows no driver and no stream.
//!
//! # A step
//! The matrix products are libtorch's, everything between them is one of these. b samples of all ranks, c classes of the
//! shard that take part, d the embedding's length; a *tile* is some of the c columns.
//!
//! | | kernel | |
//! | --- | --- | --- |
//! | once | `head_local_classes`, `head_normalize_rows_*` | samples' classes in this shard; embeddings of length 1 (`normalize.cu`) |
//! | once | `head_target_cosines`, `head_margin_logits` | each sample's logit of its own class (`softmax.cu`) |
//! | once | `head_mark_positives` .. `head_find_columns` | which classes take part, and each sample's column among them (`sampling.cu`) |
//! | tile | `head_normalize_weights_*`, product | cosines, `[b, tile]` |
//! | tile | `head_softmax_terms_*`, product | terms in the cosines' place, added up; the embeddings' gradient, not yet divided by the sums |
//! | | all-reduce | sums and logits over ranks; where a sum came out too small, again with the shift from `head_largest_logits_*` |
//! | once | `head_softmax_rows`, `head_finish_embeddings` | losses, the factors of the gradient (`gradient.cu`), the embeddings' gradient |
//! | | reduce-scatter | the gradient of each rank's embeddings, then `head_embedding_gradient` |
//! | tile | `head_normalize_weights_*`, product | in the update: cosines again |
//! | tile | `head_softmax_gradient_*`, product | the loss's gradient by cosines, in their place; that of the tile's weights |
//! | tile | `head_sgd_rows`, `head_adamw_rows` | the update (`update.cu`); no gradient of all classes exists |
//!
//! Several micro-batches of a sampled head update the classes of all of them (`head_mark_chosen`), each without those that it
//! had not (`head_drop_columns_*`). Losses other than the angular margins have their `TargetLogit` from
//! [`Prepared`](super::margin::Prepared) instead of `head_margin_logits`: b numbers. Weights and momentum are f32; embeddings,
//! cosines and gradients f32 or bf16, as the kernel's name says. The same inputs give the same bits, whatever the grid: every
//! sum has one block and one order.
//!
//! # How to launch one
//! A grid and blocks of one dimension; a block has a power of two of threads, 256 at most. Any grid is right (kernels
//! stride over what there is); one block a row, or one thread a sample where the comment says so, is fast. No dynamic
//! shared memory. Sizes are 64 bits; matrices are dense and in rows unless a `stride` is named.
//!
//! # How all this is tested
//! Sources keep to what the host's C++ compiler reads too. In builds with tests, `twin/` makes every thread of a block a fibre
//! and runs the kernels on the CPU, in both orders of threads: by themselves against the heads that we have, and as a
//! [`Launcher`], with which the whole head trains on the CPU in the tests of every head. That launcher takes the very
//! arguments that a GPU would get, and holds them against the kernel's parameters. NVRTC compiles all kernels for all
//! architectures in `crate::nvrtc`'s tests. What no test here can see: the time they take, whether a GPU's exponential and
//! fused arithmetic are as good as the tolerances have it, and the driver's side of a launch (`device/launcher.rs`).

mod choosing;
mod head;
mod kernels;
pub mod launch;
mod micro;
#[cfg(all(test, cuda_twin))]
mod tests;
mod tiles;
#[cfg(all(test, cuda_twin))]
mod twin;

pub use head::CudaHead;
pub use launch::{LaunchError, Launcher};

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

/// The kernels' names, by the file that they are in, in the order of [`SOURCES`].
pub const KERNELS: [&[&str]; 5] = [
    &[
        "head_embedding_gradient",
        "head_normalize_rows_bf16_bf16",
        "head_normalize_rows_bf16_f32",
        "head_normalize_rows_f32_bf16",
        "head_normalize_rows_f32_f32",
        "head_normalize_weights_bf16",
        "head_normalize_weights_f32",
    ],
    &[
        "head_largest_logits_bf16",
        "head_largest_logits_f32",
        "head_margin_logits",
        "head_softmax_terms_bf16",
        "head_softmax_terms_f32",
        "head_target_cosines",
    ],
    &[
        "head_drop_columns_bf16",
        "head_drop_columns_f32",
        "head_finish_embeddings",
        "head_softmax_gradient_bf16",
        "head_softmax_gradient_f32",
        "head_softmax_rows",
    ],
    &[
        "head_adamw_idle_rows",
        "head_adamw_rows",
        "head_make_up_rows",
        "head_sgd_rows",
    ],
    &[
        "head_choose_digit",
        "head_count_chosen",
        "head_count_digits",
        "head_find_columns",
        "head_local_classes",
        "head_mark_chosen",
        "head_mark_positives",
        "head_sum_chunks",
        "head_write_chosen",
    ],
];
