//! The arithmetic under the tiled head: products of blocks, exponentials, rows of weights. Works on slices in the
//! cache; knows no tensor, no rank and no thread. `isa.rs` and `gemm.rs` alone need `unsafe`.

pub mod exponentials;
pub mod gemm;
pub mod isa;
pub mod rows;
