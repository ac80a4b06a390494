//! Stochastic gradient descent with momentum and weight decay, in torch's form. Knows nothing of what it updates.

use super::{OptimError, Optimizer, check_pairs, load_slot, zeros_like};
use tch::{Tensor, no_grad};

const SLOT: &str = "momentum_buffer";

/// `v = mu*v + (g + wd*w)`, `w = w - lr*v` (torch.optim.SGD without dampening or Nesterov). The learning rate is
/// outside of `v`: a changed rate acts at once.
pub struct Sgd {
    momentum: f64,
    weight_decay: f64,
    steps: u64,
    momentum_buffers: Vec<Tensor>,
}

impl Sgd {
    /// A rule for these parameters.
    pub fn new(momentum: f64, weight_decay: f64, params: &[Tensor]) -> Self {
        Self {
            momentum,
            weight_decay,
            steps: 0,
            momentum_buffers: zeros_like(params),
        }
    }
}

impl Optimizer for Sgd {
    fn step(&mut self, params: &[Tensor], grads: &[Tensor], lr: f64) {
        check_pairs(params, grads, &self.momentum_buffers);
        no_grad(|| {
            for ((param, grad), buffer) in params.iter().zip(grads).zip(&mut self.momentum_buffers) {
                // A buffer of zeros gives torch's first step (v = g + wd*w) to the bit.
                let mut decayed = param * self.weight_decay;
                decayed += grad;
                *buffer *= self.momentum;
                *buffer += decayed;
                let mut param = param.shallow_clone();
                param -= &*buffer * lr;
            }
        });
        self.steps += 1;
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn state(&self) -> Vec<(&'static str, &[Tensor])> {
        vec![(SLOT, &self.momentum_buffers)]
    }

    fn load_state(
        &mut self,
        steps: u64,
        value: &mut dyn FnMut(&str, usize) -> Option<Tensor>,
    ) -> Result<(), OptimError> {
        load_slot(SLOT, &mut self.momentum_buffers, value)?;
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
        let params = [Tensor::from_slice(&[1.0f32, -0.5])];
        let mut sgd = Sgd::new(0.9, 0.01, &params);
        let (mut w, mut v) = ([1.0f64, -0.5], [0.0f64; 2]);
        for step in 0..5 {
            let (g, lr) = ([0.3 * f64::from(step), -0.2], 0.1 / f64::from(step + 1));
            sgd.step(&params, &[Tensor::from_slice(&g.map(|x| x as f32))], lr);
            for i in 0..2 {
                v[i] = 0.9 * v[i] + g[i] + 0.01 * w[i];
                w[i] -= lr * v[i];
                assert!((params[0].double_value(&[i as i64]) - w[i]).abs() < 1e-6);
            }
        }
        assert_eq!(sgd.steps(), 5);
    }
}
