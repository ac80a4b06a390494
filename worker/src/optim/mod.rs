//! Update rules, clipping, the loss scale and the learning rate: values in, values out. Knows no model, no head, no rank, no file.
//! A new rule is one file and one line in [`build`].

pub mod adamw;
pub mod clip;
pub mod fused;
pub mod grad_scaler;
pub mod schedule;
pub mod sgd;

pub use adamw::AdamW;
pub use fused::Fused;
pub use grad_scaler::GradScaler;
pub use sgd::Sgd;

use arcface_proto::spec;
use tch::{Kind, Tensor};

/// An update rule with its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OptimizerConfig {
    /// Stochastic gradient descent, torch's form.
    Sgd {
        /// Momentum, 0 is none.
        momentum: f64,
        /// Weight decay, added to the gradient.
        weight_decay: f64,
    },
    /// Adam with decoupled weight decay.
    AdamW {
        /// Weight decay, taken from the weight.
        weight_decay: f64,
        /// Decay of the mean of the gradient.
        beta1: f64,
        /// Decay of the mean of its square.
        beta2: f64,
        /// Added to the denominator.
        eps: f64,
    },
}

impl OptimizerConfig {
    /// AdamW with torch's usual numbers: betas 0.9 and 0.999, eps 1e-8.
    pub fn adamw(weight_decay: f64) -> Self {
        Self::AdamW {
            weight_decay,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        }
    }

    /// Names of its buffers.
    pub fn slots(self) -> &'static [&'static str] {
        match self {
            Self::Sgd { .. } => &["momentum_buffer"],
            Self::AdamW { .. } => &["exp_avg", "exp_avg_sq"],
        }
    }

    /// The rule of a job's `[train]` section.
    pub fn of(train: &spec::TrainSpec) -> Self {
        match train.optimizer {
            spec::Optimizer::Sgd => Self::Sgd {
                momentum: train.momentum,
                weight_decay: train.weight_decay,
            },
            spec::Optimizer::AdamW => Self::adamw(train.weight_decay),
        }
    }
}

/// An update rule with its state: a number of buffers ("slots"), each with one tensor per parameter and of the
/// parameter's shape, zero before the first step.
pub trait Optimizer: Send {
    /// Updates `params` in place from `grads`, element by element: both have the length and the shapes that the
    /// rule was built for. Does not touch autograd's state.
    ///
    /// # Panics
    /// If lengths or shapes differ: the caller pairs them up, they come from no file.
    fn step(&mut self, params: &[Tensor], grads: &[Tensor], lr: f64);

    /// Steps taken, also before the state was loaded.
    fn steps(&self) -> u64;

    /// The buffers by name, tensors in the order of the parameters; shared with the rule, not copied.
    fn state(&self) -> Vec<(&'static str, &[Tensor])>;

    /// Takes over the values of a [`state`](Self::state) and its [`steps`](Self::steps). `value(slot, i)` is buffer
    /// `slot` of parameter `i`. After an error the state is mixed and must not be used.
    fn load_state(
        &mut self,
        steps: u64,
        value: &mut dyn FnMut(&str, usize) -> Option<Tensor>,
    ) -> Result<(), OptimError>;
}

/// Why an optimizer's state was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptimError {
    /// A buffer is absent.
    #[error("optimizer state {slot} of parameter {index} is missing")]
    Missing {
        /// The buffer.
        slot: &'static str,
        /// Index of the parameter.
        index: usize,
    },
    /// A buffer has another shape than its parameter.
    #[error("optimizer state {slot} of parameter {index}: shape {got:?}, expected {expected:?}")]
    Shape {
        /// The buffer.
        slot: &'static str,
        /// Index of the parameter.
        index: usize,
        /// The parameter's shape.
        expected: Vec<i64>,
        /// The buffer's shape.
        got: Vec<i64>,
    },
}

/// The rule for these parameters.
pub fn build(config: OptimizerConfig, params: &[Tensor]) -> Box<dyn Optimizer> {
    match config {
        OptimizerConfig::Sgd {
            momentum,
            weight_decay,
        } => Box::new(Sgd::new(momentum, weight_decay, params)),
        OptimizerConfig::AdamW {
            weight_decay,
            beta1,
            beta2,
            eps,
        } => Box::new(AdamW::new(weight_decay, beta1, beta2, eps, params)),
    }
}

/// One zero buffer per parameter, in f32 at least, without gradient.
fn zeros_like(params: &[Tensor]) -> Vec<Tensor> {
    let zeros = |param: &Tensor| Tensor::zeros(param.size(), (Kind::Float, param.device()));
    params.iter().map(zeros).collect()
}

/// Copies loaded values into one slot's buffers.
fn load_slot(
    slot: &'static str,
    buffers: &mut [Tensor],
    value: &mut dyn FnMut(&str, usize) -> Option<Tensor>,
) -> Result<(), OptimError> {
    for (index, buffer) in buffers.iter_mut().enumerate() {
        let loaded = value(slot, index).ok_or(OptimError::Missing { slot, index })?;
        if loaded.size() != buffer.size() {
            return Err(OptimError::Shape {
                slot,
                index,
                expected: buffer.size(),
                got: loaded.size(),
            });
        }
        buffer.copy_(&loaded);
    }
    Ok(())
}

fn check_pairs(params: &[Tensor], grads: &[Tensor], buffers: &[Tensor]) {
    assert_eq!(params.len(), buffers.len(), "built for other parameters");
    assert_eq!(params.len(), grads.len(), "one gradient per parameter");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double).view([-1])).expect("a CPU tensor")
    }

    /// A resumed rule goes on as if it had never stopped.
    #[test]
    fn state_round_trips() {
        let configs = [
            OptimizerConfig::Sgd {
                momentum: 0.9,
                weight_decay: 5e-4,
            },
            OptimizerConfig::adamw(0.1),
        ];
        for config in configs {
            let param = Tensor::from_slice(&[1f32, -2.0, 3.0]);
            let grad = |step: i64| [Tensor::from_slice(&[0.5f32, 0.1, -0.2]) * (step + 1) as f64];
            let params = [param.copy()];
            let mut whole = build(config, &params);
            (0..4).for_each(|step| whole.step(&params, &grad(step), 0.1));

            let resumed_params = [param.copy()];
            let mut first = build(config, &resumed_params);
            (0..2).for_each(|step| first.step(&resumed_params, &grad(step), 0.1));
            let state = first.state();
            let mut second = build(config, &resumed_params);
            let mut value = |slot: &str, index: usize| {
                let (_, buffers) = state.iter().find(|(name, _)| *name == slot)?;
                buffers.get(index).map(Tensor::shallow_clone)
            };
            second
                .load_state(first.steps(), &mut value)
                .expect("its own state");
            (2..4).for_each(|step| second.step(&resumed_params, &grad(step), 0.1));
            assert_eq!(values(&resumed_params[0]), values(&params[0]), "{config:?}");
        }
    }

    #[test]
    fn state_of_another_shape_is_refused() {
        let params = [Tensor::from_slice(&[1f32, 2.0])];
        let mut rule = build(OptimizerConfig::adamw(0.0), &params);
        let error = rule.load_state(1, &mut |_, _| Some(Tensor::from_slice(&[0f32])));
        assert_eq!(
            error.map_err(|e| e.to_string()),
            Err("optimizer state exp_avg of parameter 0: shape [1], expected [2]".to_owned())
        );
        assert!(rule.load_state(1, &mut |_, _| None).is_err());
    }
}
