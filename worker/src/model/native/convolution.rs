//! Convolutions on a CPU whose weights were laid out once. Unsafe, because it passes tensors across the C interface.
#![allow(unsafe_code)]

use super::{attempt, made};
use crate::model::layers::ConvShape;
use std::ffi::{c_char, c_void};
use std::ptr;
use tch::{Device, Tensor};

unsafe extern "C" {
    fn arcface_pack_convolution(
        weight: *const c_void,
        size: *const i64,
        stride: i64,
        padding: i64,
        groups: i64,
        error: *mut c_char,
        length: usize,
    ) -> *mut c_void;
    fn arcface_packed_convolution(
        x: *const c_void,
        packed: *const c_void,
        bias: *const c_void,
        stride: i64,
        padding: i64,
        groups: i64,
        error: *mut c_char,
        length: usize,
    ) -> *mut c_void;
}

/// A convolution's weights in oneDNN's layout.
#[derive(Debug)]
pub struct Packed {
    weight: Tensor,
    shape: ConvShape,
}

impl Packed {
    /// Weights for inputs of about this size, \[N, C, H, W\]; `None` on a GPU, and where oneDNN does not multiply in their kind on this
    /// processor.
    ///
    /// # Panics
    /// If the size has not four numbers.
    pub fn new(weight: &Tensor, shape: ConvShape, size: &[i64]) -> Option<Self> {
        assert_eq!(size.len(), 4, "images and maps have four dimensions");
        if weight.device() != Device::Cpu {
            return None;
        }
        // SAFETY: the pointers are to a tensor and four numbers that outlive the call.
        let packed = attempt(|error, length| unsafe {
            arcface_pack_convolution(
                weight.as_ptr().cast(),
                size.as_ptr(),
                shape.stride,
                shape.padding,
                shape.groups,
                error,
                length,
            )
        });
        packed.ok().map(|weight| Self { weight, shape })
    }

    /// \[N, input, H, W\] in the kind of the weights to \[N, output, H', W'\]; the bias is f32.
    ///
    /// # Panics
    /// If the shapes do not fit, as tch's own functions do.
    pub fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let bias = bias.map_or(ptr::null(), |bias| bias.as_ptr().cast());
        // SAFETY: all pointers are to tensors that outlive the call.
        made("convolution", |error, length| unsafe {
            arcface_packed_convolution(
                x.as_ptr().cast(),
                self.weight.as_ptr().cast(),
                bias,
                self.shape.stride,
                self.shape.padding,
                self.shape.groups,
                error,
                length,
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::Kind;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

        #[test]
        fn values_are_those_of_libtorchs_convolution(
            n in 1i64..5, input in 1i64..20, output in 1i64..20, side in 7i64..20, stride in 1i64..3,
            kernel in prop::sample::select(vec![1i64, 3, 7]), padded in any::<bool>(), depthwise in any::<bool>(), has_bias in any::<bool>(),
        ) {
            tch::manual_seed(11);
            let options = (Kind::Float, Device::Cpu);
            let shape = ConvShape {
                input,
                output: if depthwise { input } else { output },
                kernel,
                stride,
                padding: if padded { kernel / 2 } else { 0 },
                groups: if depthwise { input } else { 1 },
            };
            let weight = Tensor::randn([shape.output, shape.input / shape.groups, kernel, kernel], options);
            let bias = has_bias.then(|| Tensor::randn([shape.output], options));
            let x = Tensor::randn([n, side, side, input], options).permute([0, 3, 1, 2]);
            let exact = x.conv2d(&weight, bias.as_ref(), [stride; 2], [shape.padding; 2], [1, 1], shape.groups);
            // Packed for one image, as networks are.
            let packed = Packed::new(&weight, shape, &[1, input, side, side]).expect("oneDNN multiplies f32");
            let y = packed.forward(&x, bias.as_ref());
            prop_assert_eq!(y.size(), exact.size());
            let error = (y - &exact).abs().max().double_value(&[]) / exact.abs().max().double_value(&[]).max(1.0);
            prop_assert!(error < 1e-5, "{:e}", error);
        }
    }

    #[test]
    fn kinds_that_are_not_multiplied_are_left_to_libtorch() {
        let shape = ConvShape::one(2, 3, 1);
        let weight = Tensor::ones([3, 2, 1, 1], (Kind::Double, Device::Cpu));
        assert!(Packed::new(&weight, shape, &[1, 2, 4, 4]).is_none());
    }

    #[test]
    #[should_panic(expected = "convolution: ")]
    fn other_shapes_are_refused() {
        let options = (Kind::Float, Device::Cpu);
        let weight = Tensor::ones([3, 2, 1, 1], options);
        let packed =
            Packed::new(&weight, ConvShape::one(2, 3, 1), &[1, 2, 4, 4]).expect("oneDNN multiplies f32");
        let _ = packed.forward(&Tensor::zeros([1, 5, 4, 4], options), None);
    }
}
