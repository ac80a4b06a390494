//! Why an IJB evaluation cannot be made.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why an IJB evaluation cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum IjbError {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// One line of a meta file is wrong.
    #[error("{}:{line}: {detail}", path.display())]
    Line {
        /// File.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What was wrong.
        detail: String,
    },
    /// A file as a whole is wrong, or disagrees with another one.
    #[error("{}: {detail}", path.display())]
    File {
        /// File.
        path: PathBuf,
        /// What was wrong.
        detail: String,
    },
    /// The features of an image have NaN or an infinity, or overflow when they are added up.
    #[error("the features of image {image}, counted from 1, are not finite")]
    NotFinite {
        /// Line of the image in the list of images, from 1.
        image: usize,
    },
    /// Images cannot be turned into features.
    #[error("image {image}, counted from 1: {detail}")]
    Image {
        /// Line of the image in the list of images, from 1.
        image: usize,
        /// What was wrong.
        detail: String,
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

impl IjbError {
    /// Wraps an I/O error of `path`.
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    /// A file that is wrong as a whole.
    pub(super) fn file(path: &Path, detail: impl Into<String>) -> Self {
        Self::File {
            path: path.to_owned(),
            detail: detail.into(),
        }
    }
}
