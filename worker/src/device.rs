//! The one place that asks what hardware there is.
