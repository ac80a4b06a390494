//! The numbers of a tensor as a slice, without a copy. Knows nothing of heads.
//!
//! It needs `unsafe` because a tensor hands out its memory as a pointer only.
#![allow(unsafe_code)]

use tch::{Device, Kind, Tensor};

/// The elements of a contiguous f32 tensor on the CPU.
///
/// # Panics
/// If it is another tensor: the head makes its own.
pub fn floats(tensor: &Tensor) -> &[f32] {
    match check(tensor) {
        0 => &[],
        // SAFETY: a contiguous f32 tensor on the CPU owns `length` initialised elements from `data_ptr` on, which is
        // not null and aligned since it has elements; they live as long as the tensor, which the result borrows.
        length => unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<f32>(), length) },
    }
}

/// The same, to write. The head owns the storage: it gives out further handles to it only by `Head::state`, whose
/// callers copy before the next update.
///
/// # Panics
/// As [`floats`].
pub fn floats_mut(tensor: &mut Tensor) -> &mut [f32] {
    match check(tensor) {
        0 => &mut [],
        // SAFETY: as above; the exclusive borrow of this handle and the contract above make it the only access.
        length => unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), length) },
    }
}

fn check(tensor: &Tensor) -> usize {
    let ours = tensor.device() == Device::Cpu && tensor.kind() == Kind::Float && tensor.is_contiguous();
    assert!(ours, "the head's tensors are contiguous f32 on the CPU");
    tensor.numel()
}
