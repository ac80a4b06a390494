//! Why an evaluation cannot be made.

use crate::data::pickle::PickleError;
use std::path::PathBuf;

/// Why an evaluation cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// File.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no pickle that we read.
    #[error("{}: {source}", path.display())]
    Pickle {
        /// File.
        path: PathBuf,
        /// What was wrong.
        source: PickleError,
    },
    /// The file holds something else than expected.
    #[error("{}: {detail}", path.display())]
    Layout {
        /// File.
        path: PathBuf,
        /// What and where.
        detail: String,
    },
    /// An image cannot be decoded.
    #[error("{}: image {}, counted from 1: {detail}", path.display(), .index + 1)]
    Image {
        /// File.
        path: PathBuf,
        /// Index of the image, from 0; the pair is half of it.
        index: usize,
        /// What was wrong.
        detail: String,
    },
    /// Fewer pairs than folds.
    #[error("{pairs} pairs cannot be split into {folds} folds")]
    TooFewPairs {
        /// Pairs.
        pairs: usize,
        /// Folds.
        folds: usize,
    },
    /// The numbers of embeddings, their length and the number of pairs disagree.
    #[error("{emb} + {emb_flip} embedding values of length {dim} do not belong to {pairs} pairs")]
    Sizes {
        /// Values of the plain embeddings.
        emb: usize,
        /// Values of the mirrored ones.
        emb_flip: usize,
        /// Embedding size.
        dim: usize,
        /// Pairs.
        pairs: usize,
    },
    /// An embedding has NaN or an infinity.
    #[error("the embedding of image {}, counted from 1, is not finite", .row + 1)]
    NotFinite {
        /// Index of the image, from 0.
        row: usize,
    },
    /// The network failed.
    #[error("embed images {} to {end}, counted from 1: {cause:#}", .first + 1)]
    Embed {
        /// First image of the batch, from 0.
        first: usize,
        /// One past the last.
        end: usize,
        /// Why.
        cause: anyhow::Error,
    },
}
