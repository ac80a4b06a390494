//! PyTorch's `.pth`/`.pt` files as `torch.save` writes them: since 1.6 a zip archive of uncompressed storages and one
//! pickle that says which tensor views which storage, before that both one after the other. Nothing of the pickle is
//! run.
//!
//! Reads a bare `state_dict` or one inside a checkpoint dict, and strips what wrappers put before every name. Takes
//! memory for each storage once, so no more than the file has bytes.

mod archive;
mod legacy;
pub mod state_dict;

use std::path::Path;

use tch::Tensor;

pub use super::pytorch_write::write;
pub(super) use legacy::MAGIC as LEGACY_MAGIC;
pub(super) use state_dict::STORAGES;

use super::{FileError, from_bytes, kind_of};
use crate::data::{Access, MappedFile};
use state_dict::{NETWORK, Refused, StateDict};

/// A network's tensors.
#[derive(Debug)]
pub struct Content {
    /// Names and values in the order of the `state_dict`. Tensors may share memory, and need not be contiguous.
    pub tensors: Vec<(String, Tensor)>,
    /// What the file holds beside them, if they were one entry of a checkpoint; the first few keys.
    pub beside: Vec<String>,
}

/// Reads the network in a file.
pub fn read(path: &Path) -> Result<Content, FileError> {
    let file = MappedFile::open(path, Access::Sequential).map_err(FileError::io(path))?;
    let refuse = |refused: Refused| FileError::Malformed {
        path: path.to_owned(),
        what: refused.what,
        hint: refused.hint,
    };
    let described = state_dict::read(&file, &NETWORK).map_err(refuse)?;
    let tensors = tensors(&described).map_err(|what| FileError::malformed(path, what))?;
    Ok(Content {
        tensors,
        beside: described.beside,
    })
}

fn tensors(described: &StateDict) -> Result<Vec<(String, Tensor)>, String> {
    let storages: Result<Vec<Tensor>, String> = described
        .storages
        .iter()
        .map(|storage| {
            let elements = storage.elements() as i64;
            kind_of(storage.dtype)
                .and_then(|kind| from_bytes(storage.bytes, &[elements], kind))
                .ok_or_else(|| format!("values of kind {} are not read", storage.dtype))
        })
        .collect();
    let storages = storages?;
    let views = described.tensors.iter().map(|(name, view)| {
        let tensor = storages[view.storage]
            .f_as_strided(&view.size, &view.stride, view.offset)
            .map_err(|error| format!("key {name:?}: {}", one_line(&error)))?;
        Ok((name.clone(), tensor))
    });
    views.collect()
}

fn one_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests;
