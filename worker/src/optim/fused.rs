//! The update rules of a network's many parameters, in one pass over memory and a few launches on a GPU: libtorch's fused
//! kernels, which tch does not offer. The same rules as `sgd.rs` and `adamw.rs` to rounding; a head's one large matrix
//! uses those, as the reference does. Knows nothing of what it updates. Unsafe, because it passes tensors across the C
//! interface.
#![allow(unsafe_code)]

use super::{OptimError, Optimizer, OptimizerConfig, check_pairs, load_slot, zeros_like};
use std::ffi::{CStr, c_char, c_int, c_void};
use tch::Tensor;

/// Longest reason of a failure, in bytes.
const REASON: usize = 1024;

unsafe extern "C" {
    fn arcface_fused_sgd(
        params: *const *const c_void,
        grads: *const *const c_void,
        momentum: *const *const c_void,
        count: usize,
        lr: f64,
        mu: f64,
        weight_decay: f64,
        error: *mut c_char,
        length: usize,
    ) -> c_int;
    fn arcface_fused_adamw(
        params: *const *const c_void,
        grads: *const *const c_void,
        mean: *const *const c_void,
        mean_square: *const *const c_void,
        count: usize,
        step: f64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        error: *mut c_char,
        length: usize,
    ) -> c_int;
}

/// SGD or AdamW over all parameters at once. Without momentum SGD's buffers stay 0: nobody reads them.
pub struct Fused {
    config: OptimizerConfig,
    steps: u64,
    /// By name, a buffer for each parameter.
    slots: Vec<(&'static str, Vec<Tensor>)>,
}

impl Fused {
    /// The rule for these parameters.
    pub fn new(config: OptimizerConfig, params: &[Tensor]) -> Self {
        Self {
            config,
            steps: 0,
            slots: config
                .slots()
                .iter()
                .map(|name| (*name, zeros_like(params)))
                .collect(),
        }
    }
}

fn pointers(tensors: &[Tensor]) -> Vec<*const c_void> {
    tensors.iter().map(|tensor| tensor.as_ptr().cast()).collect()
}

impl Optimizer for Fused {
    fn step(&mut self, params: &[Tensor], grads: &[Tensor], lr: f64) {
        for (_, buffers) in &self.slots {
            check_pairs(params, grads, buffers);
        }
        // The kernels look at nothing.
        for (param, grad) in params.iter().zip(grads) {
            let (wanted, got) = (param.size(), grad.size());
            let fits = wanted == got && param.kind() == grad.kind() && param.device() == grad.device();
            assert!(
                fits,
                "update: a gradient of form {got:?} for a parameter of form {wanted:?}"
            );
        }
        self.steps += 1;
        let mut reason = [0u8; REASON];
        let (error, length) = (reason.as_mut_ptr().cast(), reason.len());
        let (params, grads) = (pointers(params), pointers(grads));
        let slots: Vec<_> = self.slots.iter().map(|(_, buffers)| pointers(buffers)).collect();
        // SAFETY: the lists have one pointer for each parameter (checked above), all to tensors that outlive the call; the
        // reason's buffer is as long as we say; C++ exceptions end inside.
        let status = unsafe {
            match self.config {
                OptimizerConfig::Sgd {
                    momentum,
                    weight_decay,
                } => arcface_fused_sgd(
                    params.as_ptr(),
                    grads.as_ptr(),
                    slots[0].as_ptr(),
                    params.len(),
                    lr,
                    momentum,
                    weight_decay,
                    error,
                    length,
                ),
                OptimizerConfig::AdamW {
                    weight_decay,
                    beta1,
                    beta2,
                    eps,
                } => arcface_fused_adamw(
                    params.as_ptr(),
                    grads.as_ptr(),
                    slots[0].as_ptr(),
                    slots[1].as_ptr(),
                    params.len(),
                    self.steps as f64,
                    lr,
                    beta1,
                    beta2,
                    weight_decay,
                    eps,
                    error,
                    length,
                ),
            }
        };
        if status != 0 {
            let reason = CStr::from_bytes_until_nul(&reason).unwrap_or_default();
            panic!("update: {}", reason.to_string_lossy());
        }
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn state(&self) -> Vec<(&'static str, &[Tensor])> {
        self.slots
            .iter()
            .map(|(name, buffers)| (*name, buffers.as_slice()))
            .collect()
    }

    fn load_state(
        &mut self,
        steps: u64,
        value: &mut dyn FnMut(&str, usize) -> Option<Tensor>,
    ) -> Result<(), OptimError> {
        for (name, buffers) in &mut self.slots {
            load_slot(name, buffers, value)?;
        }
        self.steps = steps;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim;
    use tch::{Device, Kind};

    /// Sizes with and without a part that fills no vector; none at all.
    const SIZES: [i64; 6] = [1, 7, 64, 1003, 0, 40_000];

    /// Parameters after some steps, by either rule.
    fn train(rule: &mut dyn Optimizer, params: &[Tensor]) -> Vec<Tensor> {
        for step in 0..6 {
            let grads: Vec<Tensor> = params
                .iter()
                .enumerate()
                .map(|(i, param)| (param * (1.3 + i as f64) + f64::from(step) * 0.2 - 0.5).sin())
                .collect();
            rule.step(params, &grads, 0.1 / f64::from(step + 1));
        }
        params.iter().map(Tensor::copy).collect()
    }

    fn params() -> Vec<Tensor> {
        tch::manual_seed(5);
        let draw = |size: &i64| Tensor::randn([*size], (Kind::Float, Device::Cpu));
        SIZES.iter().map(draw).collect()
    }

    fn configs() -> [OptimizerConfig; 3] {
        [
            OptimizerConfig::Sgd {
                momentum: 0.9,
                weight_decay: 5e-4,
            },
            OptimizerConfig::Sgd {
                momentum: 0.0,
                weight_decay: 0.0,
            },
            OptimizerConfig::adamw(0.1),
        ]
    }

    #[test]
    fn it_is_the_same_rule_in_one_pass() {
        for config in configs() {
            let (one, other) = (params(), params());
            let mut plain = optim::build(config, &one);
            let mut fused = Fused::new(config, &other);
            let expected = train(plain.as_mut(), &one);
            let ours = train(&mut fused, &other);
            for (ours, expected) in ours.iter().zip(&expected) {
                let norm = expected.norm().double_value(&[]).max(1e-6);
                let difference = (ours - expected).norm().double_value(&[]) / norm;
                assert!(difference < 1e-6, "{difference:e} {config:?}");
            }
            assert_eq!(fused.steps(), plain.steps());
            let names =
                |rule: &dyn Optimizer| -> Vec<&str> { rule.state().iter().map(|(name, _)| *name).collect() };
            assert_eq!(names(&fused), names(plain.as_ref()), "a checkpoint fits either");
        }
    }

    /// Where a vector ends within a parameter does not depend on how the work is cut.
    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let threads = tch::get_num_threads();
        for config in configs() {
            let with = |threads| {
                tch::set_num_threads(threads);
                let params = params();
                train(&mut Fused::new(config, &params), &params)
            };
            let (one, three) = (with(1), with(3));
            tch::set_num_threads(threads);
            assert_eq!(one, three, "{config:?}");
        }
    }

    #[test]
    #[should_panic(expected = "update: ")]
    fn what_does_not_fit_is_refused() {
        let params = [Tensor::zeros([3], (Kind::Float, Device::Cpu))];
        let grads = [Tensor::zeros([4], (Kind::Float, Device::Cpu))];
        let config = OptimizerConfig::adamw(0.0);
        Fused::new(config, &params).step(&params, &grads, 0.1);
    }
}
