//! The subcommands of `arcface-worker`, thin: arguments in, library call, text or JSON out.

pub mod bench;
pub mod data;
pub mod export;
pub mod ijb;
pub mod import;
pub mod infer;
pub mod mfr;
pub mod networks;
pub mod output;
pub mod place;
pub mod rank;
pub mod verify;
