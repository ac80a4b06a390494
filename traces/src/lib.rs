//! Spans for OpenTelemetry, sent by OTLP over gRPC to the collector that a process was started with. Without one no span is made
//! and nothing is paid. Knows no jobs and no ranks: names, times and attributes are its callers'.

mod context;
mod sender;
mod span;

pub use sender::{Otlp, Traces};
pub use span::Span;
