//! Upper bounds of the buckets into which ranks count times, in seconds: the coordinator shows the same ones.

/// From pixels that lie ready to a large photograph on slow storage: an image read and decoded.
pub const DECODE_SECONDS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0,
];
/// From a barrier on one machine to the gradients of a large network on a slow link.
pub const COLLECTIVE_SECONDS: &[f64] = &[0.0001, 0.0005, 0.002, 0.01, 0.05, 0.2, 1.0, 5.0];
