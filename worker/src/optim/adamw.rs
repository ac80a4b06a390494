//! Adam with decoupled weight decay (Loshchilov, Hutter 2019), in torch's form. Knows nothing of what it updates.

use super::{OptimError, Optimizer, check_pairs, load_slot, zeros_like};
use tch::{Tensor, no_grad};

/// `w = w*(1 - lr*wd)`, then Adam's step with bias correction: `w -= lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps)`.
pub struct AdamW {
    weight_decay: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    steps: u64,
    exp_avg: Vec<Tensor>,
    exp_avg_sq: Vec<Tensor>,
}

impl AdamW {
    /// A rule for these parameters.
    pub fn new(weight_decay: f64, beta1: f64, beta2: f64, eps: f64, params: &[Tensor]) -> Self {
        Self {
            weight_decay,
            beta1,
            beta2,
            eps,
            steps: 0,
            exp_avg: zeros_like(params),
            exp_avg_sq: zeros_like(params),
        }
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, params: &[Tensor], grads: &[Tensor], lr: f64) {
        check_pairs(params, grads, &self.exp_avg);
        self.steps += 1;
        let t = self.steps as f64;
        let correction1 = 1.0 - self.beta1.powf(t);
        let correction2_sqrt = (1.0 - self.beta2.powf(t)).sqrt();
        no_grad(|| {
            let buffers = self.exp_avg.iter_mut().zip(&mut self.exp_avg_sq);
            for ((param, grad), (mean, mean_sq)) in params.iter().zip(grads).zip(buffers) {
                let mut param = param.shallow_clone();
                param *= 1.0 - lr * self.weight_decay;
                // torch's lerp, m + (1-b1)*(g - m), not b1*m + (1-b1)*g: the same to rounding, and near-zero
                // gradients amplify rounding here.
                *mean += (grad - &*mean) * (1.0 - self.beta1);
                *mean_sq *= self.beta2;
                *mean_sq += grad.square() * (1.0 - self.beta2);
                let mut denominator = mean_sq.sqrt();
                denominator /= correction2_sqrt;
                denominator += self.eps;
                let mut change = &*mean / denominator;
                change *= lr / correction1;
                param -= change;
            }
        });
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn state(&self) -> Vec<(&'static str, &[Tensor])> {
        vec![("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)]
    }

    fn load_state(
        &mut self,
        steps: u64,
        value: &mut dyn FnMut(&str, usize) -> Option<Tensor>,
    ) -> Result<(), OptimError> {
        load_slot("exp_avg", &mut self.exp_avg, value)?;
        load_slot("exp_avg_sq", &mut self.exp_avg_sq, value)?;
        self.steps = steps;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the formula in plain f64.
    #[test]
    fn follows_the_formula() {
        let params = [Tensor::from_slice(&[0.7f32])];
        let mut rule = AdamW::new(0.1, 0.9, 0.999, 1e-8, &params);
        let (mut w, mut m, mut v) = (0.7f64, 0.0f64, 0.0f64);
        for t in 1..=6 {
            let (g, lr) = (0.4 - 0.1 * f64::from(t), 1e-2);
            rule.step(&params, &[Tensor::from_slice(&[g as f32])], lr);
            (m, v) = (0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g);
            let (m_hat, v_hat) = (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.999f64.powi(t)));
            w = w * (1.0 - lr * 0.1) - lr * m_hat / (v_hat.sqrt() + 1e-8);
            assert!((params[0].double_value(&[0]) - w).abs() < 1e-6, "step {t}");
        }
    }
}
