//! The output directory of a job: its model file. Written atomically: a reader sees the old file or the new one.

use super::failure::RankFailure;
use crate::export;
use crate::model::Backbone;
use std::path::Path;

/// Name of the model file.
pub const MODEL: &str = "model.safetensors";

/// Makes the output directory.
///
/// # Errors
/// What the system says; another node or try may do better.
pub fn make_directory(output: &Path) -> Result<(), RankFailure> {
    std::fs::create_dir_all(output)
        .map_err(|error| RankFailure::transient(format!("output: make {}: {error}", output.display())))
}

/// Writes the backbone with its PyTorch names.
///
/// # Errors
/// If the file cannot be written; the old one stays.
pub fn write_model(output: &Path, backbone: &Backbone) -> Result<(), RankFailure> {
    let tensors = backbone
        .state()
        .iter()
        .map(|entry| (entry.name.as_str(), &entry.tensor));
    export::safetensors::write(&output.join(MODEL), tensors)
        .map_err(|error| RankFailure::transient(format!("write the model: {error}")))
}
