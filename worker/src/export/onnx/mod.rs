//! Writes a backbone as ONNX: the graph of its operations in evaluation, with its weights.
//!
//! The graph comes from the network's own layers ([`crate::model::graph`]). [`fold`] merges batch norms,
//! `emit` translates, [`file`] writes. Nothing here knows a particular network.

mod constants;
mod emit;
mod file;
mod proto;
mod transformer;

use std::path::Path;

use super::FileError;
use crate::model::{Backbone, fold};

pub use file::Written;

/// Version of the operator set: the first with layer normalisation.
pub const OPSET: i64 = 17;
/// Version of the messages that this operator set came with.
const IR_VERSION: i64 = 8;

/// How to write a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Merge batch norms into the convolution or linear layer before them.
    pub fold_batch_norm: bool,
    /// Most bytes of the file; a larger network's weights go into a second one, FILE.data.
    pub limit: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            fold_batch_norm: true,
            limit: file::PROTOBUF_LIMIT,
        }
    }
}

/// Writes the network in evaluation, atomically: `input` \[batch, 3, 112, 112\] f32 to `embedding` \[batch, D\] f32,
/// any batch.
pub fn write(path: &Path, backbone: &Backbone, options: Options) -> Result<Written, FileError> {
    let config = backbone.config();
    let graph = backbone.graph();
    let (steps, batch_norm) = match options.fold_batch_norm {
        true => (fold::folded(&graph), "folded"),
        false => (fold::separate(&graph), "separate"),
    };
    let emitted = emit::emit(&config.network, &graph, &steps);
    let facts = [
        ("network", config.network.clone()),
        ("embedding_size", config.embedding_size.to_string()),
        ("batch_norm", batch_norm.to_owned()),
        // What a pixel goes through, in the terms of those who prepare images.
        ("color", "RGB".to_owned()),
        ("layout", "NCHW".to_owned()),
        ("input_mean", "127.5".to_owned()),
        ("input_std", "127.5".to_owned()),
    ];
    let metadata_props = facts.map(|(key, value)| proto::StringStringEntryProto {
        key: key.to_owned(),
        value,
    });
    let model = proto::ModelProto {
        ir_version: Some(IR_VERSION),
        producer_name: "arcface-worker".to_owned(),
        producer_version: env!("CARGO_PKG_VERSION").to_owned(),
        doc_string: format!(
            "{}: aligned faces, RGB, (pixel - 127.5) / 127.5, to embeddings that are compared by cosine",
            config.network
        ),
        graph: None,
        opset_import: vec![proto::OperatorSetIdProto {
            domain: Some(String::new()),
            version: Some(OPSET),
        }],
        metadata_props: metadata_props.to_vec(),
    };
    file::write(path, &model, &emitted, options.limit)
}

#[cfg(test)]
mod tests;
