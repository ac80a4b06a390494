//! The kernels against the heads that train today: every kernel by itself over random shapes, and a whole head.
//!
//! By itself each runs in several grids and blocks and in both orders of threads ([`Launch::all`]), and must give the same bits in
//! all that have the same block: a missing barrier shows there.

mod golden;
mod head;
mod launch;
mod normalize;
mod sampling;
mod softmax;
mod update;

use super::twin;
use crate::kernels::twin::Launch;
use crate::random::{Purpose, Stream};

/// Numbers to test with, the same in every run.
fn stream(case: u64) -> Stream {
    Stream::new(20, Purpose::Synthetic, case, 0)
}

/// Standard normal numbers.
fn normals(stream: &mut Stream, count: usize) -> Vec<f32> {
    (0..count).map(|_| stream.next_normal() as f32).collect()
}

/// A whole number in a range.
fn draw(stream: &mut Stream, range: std::ops::Range<usize>) -> usize {
    range.start + (stream.next_uniform() * range.len() as f64) as usize
}

/// Runs in every launch, and compares the bits of those whose blocks are alike.
fn in_every_launch<T: PartialEq + std::fmt::Debug>(run: impl Fn(Launch) -> T) -> Vec<T> {
    let mut seen: Vec<(u32, T)> = Vec::new();
    for launch in Launch::all() {
        let result = run(launch);
        match seen.iter().find(|(block, _)| *block == launch.block) {
            Some((_, before)) => assert_eq!(&result, before, "{launch:?}"),
            None => seen.push((launch.block, result)),
        }
    }
    seen.into_iter().map(|(_, result)| result).collect()
}

/// Fails where a value is further from what is expected than `relative` of its size and `absolute`. NaN equals NaN.
fn close(ours: &[f32], expected: &[f32], relative: f32, absolute: f32) {
    assert_eq!(ours.len(), expected.len());
    for (at, (ours, expected)) in ours.iter().zip(expected).enumerate() {
        let near = (ours - expected).abs() <= relative * expected.abs() + absolute;
        assert!(
            near || ours == expected || (ours.is_nan() && expected.is_nan()),
            "{at}: {ours:e}, expected {expected:e}"
        );
    }
}
