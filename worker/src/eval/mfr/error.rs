//! Why images cannot be compared all to all.

use crate::{data::DataError, eval::ijb::IjbError};
use std::path::PathBuf;

/// Why images cannot be compared all to all.
#[derive(Debug, thiserror::Error)]
pub enum MfrError {
    /// A file of features is not what it should be.
    #[error(transparent)]
    Features(#[from] IjbError),
    /// Images cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The labels of a file of features are not what they should be.
    #[error("{}: {detail}", path.display())]
    Labels {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A feature that has no direction.
    #[error("the feature in row {row} {what}")]
    Feature {
        /// Row of the image, from 0.
        row: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// More images than the tables of this module hold.
    #[error("{images} images: at most {} are compared", u32::MAX)]
    TooMany {
        /// Images.
        images: usize,
    },
    /// No two images show the same person.
    #[error("no two of the {images} images have the same label: there is no pair of the same person")]
    NoGenuine {
        /// Images.
        images: usize,
    },
    /// All images show the same person.
    #[error("all {images} images have the same label: there is no pair of different persons")]
    NoImpostor {
        /// Images.
        images: usize,
    },
    /// The network failed.
    #[error("embed images {first}..{end}: {cause:#}")]
    Embed {
        /// First image of the batch, from 0.
        first: u64,
        /// One past the last.
        end: u64,
        /// Why.
        cause: anyhow::Error,
    },
    /// A product of matrices gave other numbers the second time (a fault of the machine or of its library).
    #[error("the scores of the second pass differ from those of the first")]
    Unstable,
}
