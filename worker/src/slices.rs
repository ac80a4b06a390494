//! The numbers of a tensor as a slice, without a copy. Knows nothing of what they are.
//!
//! It needs `unsafe` because a tensor hands out its memory as a pointer only.
#![allow(unsafe_code)]

use tch::{Device, Kind, Tensor};

/// The elements of a contiguous f32 tensor on the CPU.
///
/// # Panics
/// If it is another tensor: who asks has made it.
pub fn floats(tensor: &Tensor) -> &[f32] {
    match length(tensor, Kind::Float) {
        0 => &[],
        // SAFETY: a contiguous f32 tensor on the CPU owns `length` initialised elements from `data_ptr` on, which is
        // not null and aligned since it has elements; they live as long as the tensor, which the result borrows.
        length => unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<f32>(), length) },
    }
}

/// The same, to write. Who asks owns the storage: nobody else reads or writes it meanwhile through a handle of their own.
///
/// # Panics
/// As [`floats`].
pub fn floats_mut(tensor: &mut Tensor) -> &mut [f32] {
    match length(tensor, Kind::Float) {
        0 => &mut [],
        // SAFETY: as above; the exclusive borrow of this handle and the contract above make it the only access.
        length => unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), length) },
    }
}

/// The elements of a contiguous u8 tensor on the CPU, to write; the contract of [`floats_mut`].
///
/// # Panics
/// As [`floats`].
pub fn bytes_mut(tensor: &mut Tensor) -> &mut [u8] {
    match length(tensor, Kind::Uint8) {
        0 => &mut [],
        // SAFETY: as above, of u8.
        length => unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), length) },
    }
}

fn length(tensor: &Tensor, kind: Kind) -> usize {
    let fits = tensor.device() == Device::Cpu && tensor.kind() == kind && tensor.is_contiguous();
    assert!(fits, "not a contiguous tensor of {kind:?} on the CPU");
    tensor.numel()
}
