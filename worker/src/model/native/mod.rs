//! What libtorch does slowly, as an autograd function of our own in C++: tch has no custom ones. Unsafe, because it
//! passes tensors across the C interface.
#![allow(unsafe_code)]

pub mod allocations;
mod backward;
mod convolution;
mod layout;

pub use backward::{differentiate, let_go_of_gradient, take_gradient};
pub use convolution::Packed;
pub use layout::channels_last;

use std::ffi::{CStr, c_char, c_void};
use tch::{Device, Kind, Tensor};

/// Longest reason of a failure, in bytes.
const REASON: usize = 1024;

unsafe extern "C" {
    fn arcface_prelu(
        x: *const c_void,
        slope: *const c_void,
        error: *mut c_char,
        length: usize,
    ) -> *mut c_void;
}

/// PReLU of \[N, C\] or \[N, C, H, W\] with slopes \[C\] f32: libtorch's values, and gradients in one pass over memory. The
/// slopes' gradient is f32 in every precision.
///
/// # Panics
/// If the shapes do not fit, as tch's own functions do.
pub fn prelu(x: &Tensor, slope: &Tensor) -> Tensor {
    let kind = x.kind();
    if x.device() != Device::Cpu || !matches!(kind, Kind::Float | Kind::BFloat16) {
        return x.prelu(&slope.to_kind(kind));
    }
    // SAFETY: both pointers are to tensors that outlive the call.
    made("prelu", |error, length| unsafe {
        arcface_prelu(x.as_ptr().cast(), slope.as_ptr().cast(), error, length)
    })
}

/// The new tensor that a function of C++'s gives, which writes its reason to a buffer of so many bytes and gives null where it
/// fails, and lets no exception out.
///
/// # Panics
/// With `what` and the reason, where it fails.
pub(super) fn made(what: &str, call: impl FnOnce(*mut c_char, usize) -> *mut c_void) -> Tensor {
    attempt(call).unwrap_or_else(|reason| panic!("{what}: {reason}"))
}

/// The same for whom a failure is an answer.
///
/// # Errors
/// The reason.
fn attempt(call: impl FnOnce(*mut c_char, usize) -> *mut c_void) -> Result<Tensor, String> {
    let mut reason = [0u8; REASON];
    let tensor = call(reason.as_mut_ptr().cast(), reason.len());
    if tensor.is_null() {
        let reason = CStr::from_bytes_until_nul(&reason).unwrap_or_default();
        return Err(reason.to_string_lossy().into_owned());
    }
    // SAFETY: a new tensor that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(tensor.cast()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Value, gradient of x and of the slope; in f64 with libtorch's operator if `exact`.
    fn run(x: &Tensor, slope: &Tensor, grad: &Tensor, exact: bool) -> [Tensor; 3] {
        let (kind, slope_kind) = match exact {
            true => (Kind::Double, Kind::Double),
            false => (x.kind(), Kind::Float),
        };
        let x = x.to_kind(kind).detach().set_requires_grad(true);
        let slope = slope.to_kind(slope_kind).detach().set_requires_grad(true);
        let y = match exact {
            true => x.prelu(&slope),
            false => prelu(&x, &slope),
        };
        let loss = (&y * grad.to_kind(kind)).sum(if exact { Kind::Double } else { Kind::Float });
        let grads = Tensor::run_backward(&[loss], &[&x, &slope], false, false);
        [y.detach(), grads[0].shallow_clone(), grads[1].shallow_clone()]
    }

    fn distance(ours: &Tensor, exact: &Tensor) -> f64 {
        let norm = exact.norm().double_value(&[]).max(1e-3);
        (ours.to_kind(Kind::Double) - exact).norm().double_value(&[]) / norm
    }

    fn check(size: &[i64], channels_last: bool, kind: Kind) {
        tch::manual_seed(7);
        let options = (Kind::Float, Device::Cpu);
        let draw = |size: &[i64]| Tensor::randn(size, options).to_kind(kind);
        let layout = |t: Tensor| match channels_last && size.len() == 4 {
            true => t.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]),
            false => t,
        };
        let (x, grad) = (layout(draw(size)), layout(draw(size)));
        let slope = Tensor::randn([size[1]], options);
        let ours = run(&x, &slope, &grad, false);
        assert_eq!(
            ours[0],
            x.prelu(&slope.to_kind(kind)),
            "values are libtorch's, {size:?}"
        );
        let rounded = slope.to_kind(kind);
        let exact = run(
            &x,
            if kind == Kind::Float { &slope } else { &rounded },
            &grad,
            true,
        );
        let tolerances = match kind {
            Kind::Float => [1e-7, 1e-7, 1e-6],
            // 8 bits: the products are rounded once; the slope's gradient is summed in f32.
            _ => [4e-3, 4e-3, 1e-5],
        };
        for ((ours, exact), tolerance) in ours.iter().zip(&exact).zip(tolerances) {
            assert_eq!(ours.size(), exact.size());
            let difference = distance(ours, exact);
            assert!(
                difference <= tolerance,
                "{difference:e} {size:?} {kind:?} {channels_last}"
            );
        }
        assert_eq!(ours[2].kind(), Kind::Float);
        assert_eq!(ours[1].kind(), kind);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

        #[test]
        fn values_and_gradients_are_those_of_double_precision(
            n in 1i64..9, channels in 1i64..70, h in 1i64..13, w in 1i64..13,
            flat in any::<bool>(), channels_last in any::<bool>(), bf16 in any::<bool>(),
        ) {
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            match flat {
                true => check(&[n, channels], false, kind),
                false => check(&[n, channels, h, w], channels_last, kind),
            }
        }
    }

    /// Enough rows for every chunk and block.
    #[test]
    fn many_rows() {
        check(&[4, 64, 80, 80], true, Kind::Float);
        check(&[4, 64, 80, 80], true, Kind::BFloat16);
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        tch::manual_seed(3);
        let options = (Kind::Float, Device::Cpu);
        let x = Tensor::randn([8, 60, 60, 32], options).permute([0, 3, 1, 2]);
        let grad = Tensor::randn([8, 60, 60, 32], options).permute([0, 3, 1, 2]);
        let slope = Tensor::randn([32], options);
        let threads = tch::get_num_threads();
        let with = |threads| {
            tch::set_num_threads(threads);
            run(&x, &slope, &grad, false)
        };
        let (one, two) = (with(1), with(2));
        tch::set_num_threads(threads);
        assert_eq!(one, two);
    }

    #[test]
    fn no_gradient_is_kept_where_none_is_wanted_and_nothing_is_lost_at_zero() {
        let x = Tensor::from_slice(&[0.0f32, -0.0, f32::NAN, -2.0]).view([1, 4]);
        let slope = Tensor::from_slice(&[0.25f32; 4]);
        let y = prelu(&x, &slope);
        assert!(!y.requires_grad());
        let grad = Tensor::ones([1, 4], (Kind::Float, Device::Cpu));
        let [_, grad_x, grad_slope] = run(&x, &slope, &grad, false);
        assert_eq!(
            Vec::<f32>::try_from(grad_x.view([-1])).expect("f32")[..2],
            [0.25, 0.25]
        );
        let grad_slope = Vec::<f32>::try_from(grad_slope).expect("f32");
        assert!(grad_slope[2].is_nan() && grad_slope[3] == -2.0, "{grad_slope:?}");
    }

    #[test]
    #[should_panic(expected = "prelu: ")]
    fn other_shapes_are_refused() {
        let options = (Kind::Float, Device::Cpu);
        let _ = prelu(&Tensor::zeros([2, 3], options), &Tensor::zeros([4], options));
    }
}
