//! Files that hold named tensors: safetensors (ours, read and written), PyTorch's `state_dict` (read and written without
//! Python, executing nothing) and ONNX (written).
//!
//! Owns the formats and atomic writing. It must not know where tensors come from or what they are for, except
//! [`weights`], which fits a file to a backbone, and [`onnx`], which writes one with its operations.

pub mod atomic;
mod error;
pub mod npy;
pub mod onnx;
pub mod pytorch;
mod pytorch_write;
pub mod safetensors;
pub mod weights;

pub use error::FileError;

use ::safetensors::Dtype;
use tch::{Device, Kind, Tensor};

/// Kinds of numbers that files and tensors both know.
const KINDS: [(Dtype, Kind); 10] = [
    (Dtype::F32, Kind::Float),
    (Dtype::F64, Kind::Double),
    (Dtype::F16, Kind::Half),
    (Dtype::BF16, Kind::BFloat16),
    (Dtype::I64, Kind::Int64),
    (Dtype::I32, Kind::Int),
    (Dtype::I16, Kind::Int16),
    (Dtype::I8, Kind::Int8),
    (Dtype::U8, Kind::Uint8),
    (Dtype::BOOL, Kind::Bool),
];

/// The kind of tensor for a file's numbers.
pub fn kind_of(dtype: Dtype) -> Option<Kind> {
    KINDS.iter().find(|(d, _)| *d == dtype).map(|(_, kind)| *kind)
}

/// The kind of a file's numbers for those of a tensor.
pub fn dtype_of(kind: Kind) -> Option<Dtype> {
    KINDS.iter().find(|(_, k)| *k == kind).map(|(dtype, _)| *dtype)
}

/// The values of a tensor as bytes, row major, in the machine's byte order (the build is for little-endian machines).
fn bytes(tensor: &Tensor) -> Vec<u8> {
    let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    bytes
}

/// A tensor of little-endian bytes, if they are exactly as many as the shape needs.
fn from_bytes(bytes: &[u8], shape: &[i64], kind: Kind) -> Option<Tensor> {
    let elements = shape
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(usize::try_from(d).ok()?))?;
    let wanted = elements.checked_mul(kind.elt_size_in_bytes())?;
    (wanted == bytes.len()).then(|| Tensor::from_data_size(bytes, shape, kind))
}
