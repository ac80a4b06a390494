//! The head for NVIDIA GPUs. Its kernels are sources here; `head.rs` is the head, `kernels/` starts the kernels over tensors. How
//! they are compiled, started and tested is `crate::kernels`' business. Knows no driver and no stream.
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
//! | tile | `head_sgd_rows_*`, `head_adamw_rows_*` | the update (`update.cu`); no gradient of all classes exists |
//!
//! Several micro-batches of a sampled head update the classes of all of them (`head_mark_chosen`), each without those that it
//! had not (`head_drop_columns_*`). Losses other than the angular margins have their `TargetLogit` from
//! [`Prepared`](super::margin::Prepared) instead of `head_margin_logits`: b numbers. Weights and momentum are f32; embeddings,
//! cosines and gradients f32 or bf16, as the kernel's name says. The same inputs give the same bits, whatever the grid: every
//! sum has one block and one order.

mod choosing;
mod head;
mod kernels;
mod micro;
pub mod raw;
#[cfg(all(test, cuda_twin))]
mod tests;
mod tiles;
#[cfg(all(test, cuda_twin))]
mod twin;

pub use head::CudaHead;

use crate::kernels::{COMMON, File, Set};

/// The kernels, by file.
pub const KERNELS: Set = Set {
    headers: &[
        COMMON,
        ("history.cuh", include_str!("history.cuh")),
        ("terms.cuh", include_str!("terms.cuh")),
    ],
    files: &[
        File {
            name: "normalize.cu",
            text: include_str!("normalize.cu"),
            kernels: &[
                "head_embedding_gradient",
                "head_normalize_rows_bf16_bf16",
                "head_normalize_rows_bf16_f32",
                "head_normalize_rows_f32_bf16",
                "head_normalize_rows_f32_f32",
                "head_normalize_weights_bf16",
                "head_normalize_weights_f32",
            ],
        },
        File {
            name: "softmax.cu",
            text: include_str!("softmax.cu"),
            kernels: &[
                "head_largest_logits_bf16",
                "head_largest_logits_f32",
                "head_margin_logits",
                "head_softmax_terms_bf16",
                "head_softmax_terms_f32",
                "head_target_cosines",
            ],
        },
        File {
            name: "gradient.cu",
            text: include_str!("gradient.cu"),
            kernels: &[
                "head_drop_columns_bf16",
                "head_drop_columns_f32",
                "head_finish_embeddings",
                "head_softmax_gradient_bf16",
                "head_softmax_gradient_f32",
                "head_softmax_rows",
            ],
        },
        File {
            name: "update.cu",
            text: include_str!("update.cu"),
            kernels: &[
                "head_adamw_idle_rows",
                "head_adamw_rows_bf16",
                "head_adamw_rows_f32",
                "head_make_up_rows",
                "head_sgd_rows_bf16",
                "head_sgd_rows_f32",
            ],
        },
        File {
            name: "sampling.cu",
            text: include_str!("sampling.cu"),
            kernels: &[
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
        },
    ],
};
