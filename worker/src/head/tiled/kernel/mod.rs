//! The arithmetic under the tiled head: products of blocks, exponentials, rows of weights. Works on slices in the
//! cache; knows no tensor, no rank and no thread. `isa.rs`, `gemm.rs` and `amx.rs` alone need `unsafe`.

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod exponentials;
pub mod gemm;
pub mod isa;
pub mod rows;
