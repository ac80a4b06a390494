//! The bytes of a tensor, without a copy: the one file of this module that needs `unsafe`. Knows no sockets.
#![allow(unsafe_code)]

use tch::{Device, Tensor};

/// The elements of a contiguous CPU tensor as bytes; `None` for any other tensor.
pub fn bytes(tensor: &Tensor) -> Option<&[u8]> {
    let length = byte_length(tensor)?;
    if length == 0 {
        return Some(&[]);
    }
    // SAFETY: a contiguous CPU tensor of `length` bytes owns that many initialised bytes from `data_ptr` (not null,
    // since it has elements), and they live as long as the tensor, which the result borrows. Nobody writes them
    // meanwhile: a collective call owns its tensors until it returns (contract of `Collective`).
    Some(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), length) })
}

/// The same, to write. Every bit pattern is a value of every kind that [`super::reduce::element_size`] allows.
pub fn bytes_mut(tensor: &mut Tensor) -> Option<&mut [u8]> {
    let length = byte_length(tensor)?;
    if length == 0 {
        return Some(&mut []);
    }
    // SAFETY: as in `bytes`; the exclusive borrow of this handle, and the contract that nobody else touches the
    // storage during the call, make it the only access.
    Some(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), length) })
}

fn byte_length(tensor: &Tensor) -> Option<usize> {
    let plain = tensor.device() == Device::Cpu && tensor.is_contiguous();
    let size = super::reduce::element_size(tensor.kind())?;
    plain.then(|| tensor.numel() * size)
}
