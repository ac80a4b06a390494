//! The language that coordinator, workers and clients share: the gRPC messages of `arcface/v1/*.proto`, the
//! domain types behind them, and the one place where the first become the second.
//!
//! This crate opens no socket, reads no file and no clock. Everything else may import it.

pub mod buckets;
pub mod convert;
pub mod failure;
pub mod location;
pub mod memory;
pub mod redirect;
mod skip;
pub mod spec;
pub mod timestamp;
pub mod tls;
pub mod types;

/// Generated messages, clients and servers of package `arcface.v1`. Their documentation is in the `.proto` files.
pub mod v1 {
    #![allow(missing_docs, unused_qualifications, clippy::all, clippy::pedantic)]
    tonic::include_proto!("arcface.v1");
}

/// Encoded `FileDescriptorSet` of all our `.proto` files, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/arcface_descriptor.bin"));
