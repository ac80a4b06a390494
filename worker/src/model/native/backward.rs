//! The way back from a tensor whose gradient is known, which tch does not offer. Unsafe, because it passes tensors across the
//! C interface.
#![allow(unsafe_code)]

use super::REASON;
use std::ffi::{CStr, c_char, c_int, c_void};
use tch::Tensor;

unsafe extern "C" {
    fn arcface_differentiate(
        y: *const c_void,
        grad: *const c_void,
        error: *mut c_char,
        length: usize,
    ) -> c_int;
    fn arcface_let_go_of_gradient(leaf: *const c_void);
    fn arcface_take_gradient(leaf: *const c_void, grad: *const c_void);
}

/// Makes a leaf one that has no gradient yet; its memory goes back.
pub fn let_go_of_gradient(leaf: &mut Tensor) {
    // SAFETY: the pointer is to a tensor that outlives the call, which nobody else changes.
    unsafe { arcface_let_go_of_gradient(leaf.as_ptr().cast()) }
}

/// Makes `grad` the gradient of a leaf of its shape and kind, without a copy: one changes with the other.
pub fn take_gradient(leaf: &mut Tensor, grad: &Tensor) {
    assert_eq!((leaf.size(), leaf.kind()), (grad.size(), grad.kind()));
    // SAFETY: both pointers are to tensors that outlive the call, of which nobody else changes the first.
    unsafe { arcface_take_gradient(leaf.as_ptr().cast(), grad.as_ptr().cast()) }
}

/// Adds to the `grad()` of everything that `y` was made of, for the gradient of `y`, which has its shape and kind. What
/// autograd kept for it is freed.
///
/// # Panics
/// If `y` has no way back, or `grad` does not fit, as tch's own functions do.
pub fn differentiate(y: &Tensor, grad: &Tensor) {
    let mut reason = [0u8; REASON];
    // SAFETY: both pointers are to tensors that outlive the call, the buffer is as long as we say, and C++ exceptions
    // end inside.
    let status = unsafe {
        arcface_differentiate(
            y.as_ptr().cast(),
            grad.as_ptr().cast(),
            reason.as_mut_ptr().cast(),
            reason.len(),
        )
    };
    if status != 0 {
        let reason = CStr::from_bytes_until_nul(&reason).unwrap_or_default();
        panic!("backward: {}", reason.to_string_lossy());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_gradient_of_the_product_with_the_gradient() {
        let x = Tensor::from_slice(&[1f32, -2.0, 3.0]).set_requires_grad(true);
        let grad = Tensor::from_slice(&[0.5f32, 2.0, -1.0]);
        differentiate(&x.square(), &grad);
        let expected: Vec<f32> = vec![1.0, -8.0, -6.0];
        assert_eq!(Vec::<f32>::try_from(x.grad()).expect("f32"), expected);
        // It adds.
        differentiate(&(&x * 1.0), &grad);
        let expected: Vec<f32> = vec![1.5, -6.0, -7.0];
        assert_eq!(Vec::<f32>::try_from(x.grad()).expect("f32"), expected);
    }

    #[test]
    fn a_gradient_that_was_let_go_of_is_taken_anew() {
        let mut x = Tensor::from_slice(&[1f32, -2.0]).set_requires_grad(true);
        let grad = Tensor::from_slice(&[1f32, 1.0]);
        let_go_of_gradient(&mut x);
        differentiate(&(&x * 3.0), &grad);
        let_go_of_gradient(&mut x);
        assert!(!x.grad().defined());
        differentiate(&(&x * 5.0), &grad);
        assert_eq!(Vec::<f32>::try_from(x.grad()).expect("f32"), [5.0, 5.0]);
    }

    #[test]
    fn a_gradient_is_taken_without_a_copy() {
        let mut x = Tensor::from_slice(&[1f32, -2.0]).set_requires_grad(true);
        let mut grad = Tensor::from_slice(&[3f32, 4.0]);
        take_gradient(&mut x, &grad);
        assert_eq!(x.grad().data_ptr(), grad.data_ptr());
        grad += 1.0;
        differentiate(&(&x * 1.0), &Tensor::from_slice(&[1f32, 1.0]));
        assert_eq!(Vec::<f32>::try_from(x.grad()).expect("f32"), [5.0, 6.0]);
    }

    #[test]
    #[should_panic(expected = "backward: ")]
    fn a_tensor_without_a_way_back_is_refused() {
        let x = Tensor::from_slice(&[1f32]);
        differentiate(&x, &x);
    }
}
