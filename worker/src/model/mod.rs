//! The backbones: networks from aligned faces to embeddings, and the module vocabulary they share.
//!
//! Owns parameter names, shapes and order (those of a PyTorch `state_dict`), initialisation and the forward pass.
//! Knows no gRPC, no files and no other rank; the gradient is autograd's, piece by piece where activations are computed
//! twice.
//!
//! A new backbone is one file that builds a [`Network`](layers::Network) and one line in [`registry`].

mod backbone;
pub mod fill;
pub mod fold;
pub mod footprint;
pub mod graph;
mod inference;
mod init;
pub mod iresnet;
pub mod layers;
pub mod mobilefacenet;
mod native;
pub mod norm;
mod pass;
pub mod registry;
mod state;
mod training;
pub mod transformer;
pub mod vit;

pub use backbone::{Backbone, BackboneConfig, ModelError};
pub use inference::Inference;
pub use native::{allocations, let_go_of_gradient, take_gradient};
pub use pass::{DropoutDraw, ForwardMode, Pass};
pub use state::{Builder, Init, Role, StateEntry};
pub use training::TrainingPass;

/// Height and width of every network's input in pixels.
pub const IMAGE_SIZE: i64 = 112;

#[cfg(test)]
mod tests;
