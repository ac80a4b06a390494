//! Element-wise reductions over bytes of a tensor. Pure; knows no sockets.

use super::ReduceOp;
use bytemuck::Pod;
use half::{bf16, f16};
use tch::Kind;

/// Bytes of an element, for the kinds that can be sent.
pub fn element_size(kind: Kind) -> Option<usize> {
    match kind {
        Kind::Uint8 => Some(1),
        Kind::BFloat16 | Kind::Half => Some(2),
        Kind::Float => Some(4),
        Kind::Double | Kind::Int64 => Some(8),
        _ => None,
    }
}

/// Number of a kind in a message's header, so that both ends can compare; 0 for kinds that are not sent.
pub fn code(kind: Kind) -> u8 {
    match kind {
        Kind::Uint8 => 1,
        Kind::BFloat16 => 2,
        Kind::Half => 3,
        Kind::Float => 4,
        Kind::Double => 5,
        Kind::Int64 => 6,
        _ => 0,
    }
}

/// True for the kinds that can be reduced.
pub fn reducible(kind: Kind) -> bool {
    kind != Kind::Uint8 && element_size(kind).is_some()
}

/// `into[i] = into[i] op from[i]`, whole elements of one kind; half kinds are computed in f32 and rounded once.
/// A NaN on either side stays one. Integer sums wrap.
///
/// # Panics
/// If the lengths differ, are no whole elements or are not aligned, or the kind is not [`reducible`]: the caller
/// cuts tensors of one checked kind.
pub fn reduce(kind: Kind, op: ReduceOp, into: &mut [u8], from: &[u8]) {
    assert_eq!(into.len(), from.len(), "lengths differ");
    match (kind, op) {
        (Kind::Float, ReduceOp::Sum) => apply(into, from, |a: f32, b: f32| a + b),
        (Kind::Float, ReduceOp::Max) => apply(
            into,
            from,
            |a: f32, b: f32| if a > b || a.is_nan() { a } else { b },
        ),
        (Kind::Double, ReduceOp::Sum) => apply(into, from, |a: f64, b: f64| a + b),
        (Kind::Double, ReduceOp::Max) => apply(
            into,
            from,
            |a: f64, b: f64| if a > b || a.is_nan() { a } else { b },
        ),
        (Kind::Int64, ReduceOp::Sum) => apply(into, from, i64::wrapping_add),
        (Kind::Int64, ReduceOp::Max) => apply(into, from, i64::max),
        (Kind::BFloat16, ReduceOp::Sum) => {
            apply(into, from, |a: bf16, b: bf16| {
                bf16::from_f32(a.to_f32() + b.to_f32())
            });
        }
        (Kind::BFloat16, ReduceOp::Max) => {
            apply(
                into,
                from,
                |a: bf16, b: bf16| if a > b || a.is_nan() { a } else { b },
            );
        }
        (Kind::Half, ReduceOp::Sum) => {
            apply(into, from, |a: f16, b: f16| {
                f16::from_f32(a.to_f32() + b.to_f32())
            });
        }
        (Kind::Half, ReduceOp::Max) => apply(
            into,
            from,
            |a: f16, b: f16| if a > b || a.is_nan() { a } else { b },
        ),
        (other, _) => unreachable!("{other:?} was refused before"),
    }
}

fn apply<T: Pod>(into: &mut [u8], from: &[u8], op: impl Fn(T, T) -> T) {
    let into: &mut [T] = bytemuck::cast_slice_mut(into);
    let from: &[T] = bytemuck::cast_slice(from);
    for (a, b) in into.iter_mut().zip(from) {
        *a = op(*a, *b);
    }
}
