//! One training process. The agent starts it with an assignment on standard input (`tools/rank.rs`); it meets its
//! peers, trains, reports, and ends.
//!
//! `run` is its life, `setup` what it opens, `train` the loop, `step` the recipe, `captured` how a GPU repeats it, `nonfinite` what follows a loss that is
//! none, `report` its only gRPC, `watched` what its agent sees of it. It imports everything below it and nothing imports it.

pub mod captured;
pub mod checkpoints;
pub mod copies;
pub mod evaluate;
pub mod failure;
pub mod figures;
pub mod gradients;
pub mod head_start;
pub mod log;
mod meeting;
mod memory;
pub mod nonfinite;
mod outbox;
pub mod outputs;
mod own_pace;
mod pace;
pub mod phases;
pub mod report;
mod run;
mod same_data;
pub mod setup;
mod spans;
pub mod step;
mod tensorboard;
#[cfg(test)]
mod tests;
pub mod train;
mod watched;

pub use run::run;
