//! A file of features with a label each: safetensors with `emb` [N, D] of floats, `label` (length N) of whole numbers and, if
//! mirror images count, `emb_flip` [N, D]. Features are mapped, not read: they are paged in as they are used.

use super::MfrError;
use crate::{
    data::{Access, MappedFile},
    eval::ijb::{FeatureFile, IjbError, ImageFeatures},
};
use safetensors::{Dtype, SafeTensors};
use std::path::Path;

/// Features and the persons they belong to.
pub fn open(path: &Path) -> Result<(FeatureFile, Vec<i64>), MfrError> {
    let features = FeatureFile::open_named(path, "emb", "emb_flip")?;
    let labels = read_labels(path)?;
    if labels.len() != features.images() {
        return Err(MfrError::Labels {
            path: path.to_owned(),
            detail: format!("emb has {} rows and label {}", features.images(), labels.len()),
        });
    }
    Ok((features, labels))
}

fn read_labels(path: &Path) -> Result<Vec<i64>, MfrError> {
    let refuse = |detail: String| MfrError::Labels {
        path: path.to_owned(),
        detail,
    };
    let bytes = MappedFile::open(path, Access::Sequential).map_err(|source| IjbError::Io {
        path: path.to_owned(),
        source,
    })?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| refuse(format!("not a safetensors file: {error}")))?;
    let view = file
        .tensor("label")
        .map_err(|_| refuse("no tensor label".into()))?;
    let data = view.data();
    match (view.shape(), view.dtype()) {
        ([_], Dtype::I64) => Ok(data
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b))
            .collect()),
        ([_], Dtype::I32) => Ok(data
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| i32::from_le_bytes(*b).into())
            .collect()),
        (shape, dtype) => Err(refuse(format!(
            "tensor label is {dtype} {shape:?}, expected [N] of I64"
        ))),
    }
}
