//! Weights in the layout of activations. Unsafe, because it passes tensors across the C interface.
#![allow(unsafe_code)]

use super::made;
use std::ffi::{c_char, c_int, c_void};
use tch::{Kind, Tensor};

unsafe extern "C" {
    fn arcface_channels_last(
        weight: *const c_void,
        kind: c_int,
        error: *mut c_char,
        length: usize,
    ) -> *mut c_void;
}

/// A convolution's weights \[O, I, H, W\] f32 in this kind with their channels innermost. Their gradient is f32 and dense as they
/// are.
///
/// # Panics
/// If they have another form, as tch's own functions do.
pub fn channels_last(weight: &Tensor, kind: Kind) -> Tensor {
    // c10::ScalarType's.
    let number = match kind {
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::BFloat16 => 15,
        other => panic!("weights: nothing is multiplied in {other:?}"),
    };
    // SAFETY: the pointer is to a tensor that outlives the call.
    made("weights", |error, length| unsafe {
        arcface_channels_last(weight.as_ptr().cast(), number, error, length)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn values_stay_and_the_gradient_comes_back_as_the_weights_are() {
        let weight = Tensor::arange(2 * 3 * 2 * 2, (Kind::Float, Device::Cpu)).view([2, 3, 2, 2]);
        let weight = weight.set_requires_grad(true);
        for kind in [Kind::BFloat16, Kind::Half, Kind::Float] {
            let y = channels_last(&weight, kind);
            assert_eq!(y.kind(), kind);
            assert!(y.permute([0, 2, 3, 1]).is_contiguous());
            assert_eq!(y.to_kind(Kind::Float), weight);
            let loss = (&y * 3.0).sum(Kind::Float);
            let grad = &Tensor::run_backward(&[loss], &[&weight], false, false)[0];
            assert_eq!(*grad, Tensor::full([2, 3, 2, 2], 3.0, (Kind::Float, Device::Cpu)));
            assert!(grad.is_contiguous());
        }
    }

    #[test]
    #[should_panic(expected = "weights: ")]
    fn other_forms_are_refused() {
        let _ = channels_last(&Tensor::zeros([3, 3], (Kind::Float, Device::Cpu)), Kind::Half);
    }
}
