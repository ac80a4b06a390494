//! The learning rate as a function of the step: linear warm-up, polynomial decay, stepped every iteration. Pure.

use std::cell::Cell;

/// The reference recipe's `PolynomialLRWarmup`, bit for bit.
///
/// Two of its properties surprise and are kept, because the recipe's results depend on them: step 0 trains at the
/// full `base_lr` (warm-up begins after it), and the decay is a running product of rounded factors, so it differs
/// from the closed form in the last bits. After `total_steps` the rate stays as it is (0, unless warm-up is longer).
#[derive(Clone, Debug)]
pub struct PolyWarmup {
    base_lr: f64,
    warmup_steps: u64,
    total_steps: u64,
    power: f64,
    /// A step of the decay and its rate, where the product goes on from: consecutive steps cost O(1).
    reached: Cell<(u64, f64)>,
}

impl PolyWarmup {
    /// Linear decay (power 1), the recipe's.
    pub fn new(base_lr: f64, warmup_steps: u64, total_steps: u64) -> Self {
        Self::with_power(base_lr, warmup_steps, total_steps, 1.0)
    }

    /// Decay with another power.
    pub fn with_power(base_lr: f64, warmup_steps: u64, total_steps: u64, power: f64) -> Self {
        let mut schedule = Self {
            base_lr,
            warmup_steps,
            total_steps,
            power,
            reached: Cell::new((0, base_lr)),
        };
        schedule.reached = Cell::new(schedule.decay_start());
        schedule
    }

    /// Learning rate of a step, counted from 0. Depends on the step alone; calls in rising order are cheap, a jump
    /// costs the steps between (a few nanoseconds each).
    pub fn lr(&self, step: u64) -> f64 {
        let step = step.min(self.total_steps);
        if step == 0 || step <= self.warmup_steps {
            return self.warmup_lr(step);
        }
        let (mut at, mut lr) = self.reached.get();
        if at > step {
            (at, lr) = self.decay_start();
        }
        while at < step {
            at += 1;
            lr *= self.decay_factor(at);
        }
        self.reached.set((at, lr));
        lr
    }

    /// Last step before the decay, and its rate.
    fn decay_start(&self) -> (u64, f64) {
        (self.warmup_steps, self.warmup_lr(self.warmup_steps))
    }

    fn warmup_lr(&self, step: u64) -> f64 {
        match step {
            0 => self.base_lr,
            _ => self.base_lr * step as f64 / self.warmup_steps as f64,
        }
    }

    /// Rate of `step` by the rate of the step before, for `warmup_steps < step <= total_steps`.
    fn decay_factor(&self, step: u64) -> f64 {
        let done = (step - self.warmup_steps) as f64;
        let span = (self.total_steps - self.warmup_steps) as f64;
        ((1.0 - done / span) / (1.0 - (done - 1.0) / span)).powf(self.power)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depends_on_the_step_alone() {
        let rising = PolyWarmup::new(0.1, 7, 50);
        let expected: Vec<f64> = (0..60).map(|step| rising.lr(step)).collect();
        let jumping = PolyWarmup::new(0.1, 7, 50);
        for step in [49, 3, 50, 12, 0, 59, 8, 7, 30] {
            assert_eq!(jumping.lr(step), expected[step as usize], "step {step}");
        }
    }

    #[test]
    fn starts_full_warms_up_and_ends_at_zero() {
        let schedule = PolyWarmup::new(0.4, 4, 10);
        assert_eq!(schedule.lr(0), 0.4);
        assert_eq!(schedule.lr(1), 0.1);
        assert_eq!(schedule.lr(4), 0.4);
        assert!(schedule.lr(9) > 0.0);
        assert_eq!(schedule.lr(10), 0.0);
        assert_eq!(schedule.lr(u64::MAX), 0.0);
    }

    #[test]
    fn a_schedule_without_steps_is_constant() {
        assert_eq!(PolyWarmup::new(0.1, 0, 0).lr(5), 0.1);
        assert_eq!(PolyWarmup::new(0.1, 8, 4).lr(9), 0.05);
    }
}
