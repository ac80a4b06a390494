//! The coordinator of an ArcFace cluster: rendezvous, job state, class shards and checkpoint manifests. It has no
//! tensor type and installs on a laptop.
//!
//! Pure logic (`plan`, `job`, `membership`, `straggler`, `goodput`) has no I/O, no clock and no async; `control` is the one task that owns
//! state and the only reader of the clock; `store` keeps what must survive; `api` is the gRPC rim; `spec` reads job
//! files, `recipe` turns those of arcface_torch into them, `cli` is the command line, `web` serves `/metrics` and the status page.

pub mod api;
pub mod cli;
pub mod control;
pub mod exporter;
pub mod goodput;
pub mod histograms;
pub mod job;
pub mod membership;
pub mod plan;
#[doc(hidden)]
pub mod planted;
pub mod recipe;
pub mod server;
pub mod spec;
pub mod store;
pub mod straggler;
#[cfg(test)]
mod tables;
pub mod telemetry;
pub mod tls;
pub mod view;
pub mod web;
