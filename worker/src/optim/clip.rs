//! Limits the norm of a gradient. Pure but for changing the gradients it is given.

use tch::{Device, Tensor, no_grad};

/// Scales `grads` in place so that their common L2 norm is at most `max_norm`, if there is one, and returns the norm before
/// (torch.nn.utils.clip_grad_norm_: the factor is `max_norm / (norm + 1e-6)`, never above 1).
///
/// A norm that is not finite leaves the gradients as they are (torch turns all of them into NaN): the caller skips
/// the update.
pub fn clip_grad_norm(grads: &[Tensor], max_norm: Option<f64>) -> f64 {
    no_grad(|| {
        let norms: Vec<Tensor> = grads.iter().map(Tensor::norm).collect();
        if norms.is_empty() {
            return 0.0;
        }
        // All of them at once: a GPU is waited for once.
        let norms = Tensor::stack(&norms, 0).to_device(Device::Cpu);
        let squares: f64 = (0..grads.len() as i64)
            .map(|grad| norms.double_value(&[grad]).powi(2))
            .sum();
        let norm = squares.sqrt();
        let factor = max_norm.map_or(1.0, |max_norm| max_norm / (norm + 1e-6));
        if norm.is_finite() && factor < 1.0 {
            for grad in grads {
                let mut grad = grad.shallow_clone();
                grad *= factor;
            }
        }
        norm
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_gradients_shrink_and_short_ones_stay() {
        let grads = [Tensor::from_slice(&[3f32, 0.0]), Tensor::from_slice(&[4f32])];
        assert!((clip_grad_norm(&grads, Some(10.0)) - 5.0).abs() < 1e-6);
        assert_eq!(grads[0].double_value(&[0]), 3.0);
        assert!((clip_grad_norm(&grads, Some(1.0)) - 5.0).abs() < 1e-6);
        assert!((clip_grad_norm(&grads, Some(1.0)) - 1.0).abs() < 1e-5);
        assert_eq!(clip_grad_norm(&[], Some(1.0)), 0.0);
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_left_alone() {
        let grads = [Tensor::from_slice(&[f32::INFINITY, 2.0])];
        assert!(!clip_grad_norm(&grads, Some(1.0)).is_finite());
        assert_eq!(grads[0].double_value(&[1]), 2.0);
    }
}
