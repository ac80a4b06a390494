//! The node agent, the training rank and the offline tools of the ArcFace cluster.
//!
//! Who may import whom: `rank` everything below it; `model`, `head` and `optim` neither gRPC nor files;
//! `collective` neither head nor model; `agent` no tensor. See `docs/architecture.md`.

pub mod agent;
pub mod channel;
pub mod checkpoint;
pub mod collective;
pub mod data;
pub mod device;
pub mod dial;
pub mod eval;
pub mod export;
pub mod head;
pub mod kernels;
pub mod model;
pub mod nvrtc;
pub mod optim;
pub mod panics;
pub mod paths;
pub mod progress;
pub mod random;
pub mod rank;
pub mod slices;
pub mod telemetry;
pub mod timings;
pub mod tools;
