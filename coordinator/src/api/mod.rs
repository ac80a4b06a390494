//! The gRPC rim: decode, ask `control::Handle`, encode. No decisions are taken here.

mod router;

pub use router::Router;
