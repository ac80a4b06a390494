//! The dynamic loss scale of fp16 training (Micikevicius et al. 2018), with the transitions of torch's `GradScaler`. Pure:
//! knows no tensor and no rank; whoever uses it multiplies, divides and looks for overflow.

/// Scale before the first update: torch's.
pub const INITIAL_SCALE: f32 = 65536.0;
/// Good updates in a row after which the scale grows. torch's default is 2000; the reference trains with 100.
pub const GROWTH_INTERVAL: u32 = 100;
/// Factor of growth.
const GROWTH: f32 = 2.0;
/// Factor after an overflow.
const BACKOFF: f32 = 0.5;

/// By how much gradients are enlarged, so that small ones do not vanish in fp16.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradScaler {
    scale: f32,
    good_updates: u32,
}

impl Default for GradScaler {
    fn default() -> Self {
        Self {
            scale: INITIAL_SCALE,
            good_updates: 0,
        }
    }
}

impl GradScaler {
    /// One that goes on from the values of another; `None` if no scaler has such values.
    pub fn resumed(scale: f64, good_updates: u32) -> Option<Self> {
        let possible = scale > 0.0 && (scale as f32).is_finite() && good_updates < GROWTH_INTERVAL;
        possible.then_some(Self {
            scale: scale as f32,
            good_updates,
        })
    }

    /// What the loss is multiplied by, and the gradient divided by.
    pub fn scale(&self) -> f64 {
        f64::from(self.scale)
    }

    /// Updates in a row without overflow since the scale last changed.
    pub fn good_updates(&self) -> u32 {
        self.good_updates
    }

    /// An update was due, and its gradient was finite or `overflowed`. The scale changes here alone, so that all steps of
    /// an accumulated gradient have the same.
    pub fn update(&mut self, overflowed: bool) {
        if overflowed {
            self.scale *= BACKOFF;
            self.good_updates = 0;
            return;
        }
        self.good_updates += 1;
        if self.good_updates == GROWTH_INTERVAL {
            self.good_updates = 0;
            if (self.scale * GROWTH).is_finite() {
                self.scale *= GROWTH;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A history, good updates as numbers and overflows as `x`, and what it leaves: what torch 2.11's
    /// `_amp_update_scale_(scale, tracker, found_inf, 2.0, 0.5, 100)` leaves.
    #[test]
    fn the_scale_follows_torch() {
        for (history, scale, good_updates) in [
            ("", 65536.0, 0),
            ("1", 65536.0, 1),
            ("99", 65536.0, 99),
            ("100", 131_072.0, 0),
            ("101", 131_072.0, 1),
            ("250", 262_144.0, 50),
            ("x", 32768.0, 0),
            ("99 x", 32768.0, 0),
            ("99 x 99", 32768.0, 99),
            ("99 x 100", 65536.0, 0),
            ("100 x", 65536.0, 0),
            ("x x x 3", 8192.0, 3),
            ("x x x x x x x x x x x x x x x x x x", 0.25, 0),
        ] {
            let mut scaler = GradScaler::default();
            for word in history.split_whitespace() {
                match word.parse::<u32>() {
                    Ok(good) => (0..good).for_each(|_| scaler.update(false)),
                    Err(_) => scaler.update(true),
                }
            }
            assert_eq!(
                (scaler.scale(), scaler.good_updates()),
                (scale, good_updates),
                "{history:?}"
            );
        }
    }

    #[test]
    fn a_scale_that_cannot_grow_stays() {
        let largest = 2f64.powi(127);
        let mut scaler = GradScaler::resumed(largest, 99).expect("a scaler's values");
        scaler.update(false);
        assert_eq!((scaler.scale(), scaler.good_updates()), (largest, 0));
    }

    #[test]
    fn only_values_of_a_scaler_are_resumed() {
        let mut scaler = GradScaler::default();
        scaler.update(true);
        scaler.update(false);
        assert_eq!(
            GradScaler::resumed(scaler.scale(), scaler.good_updates()),
            Some(scaler)
        );
        for (scale, good_updates) in [(0.0, 0), (-1.0, 0), (f64::NAN, 0), (1e300, 0), (1.0, 100)] {
            assert_eq!(
                GradScaler::resumed(scale, good_updates),
                None,
                "{scale} {good_updates}"
            );
        }
    }
}
