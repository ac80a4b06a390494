//! Rows of class weights: their length, their form as operands, and their update. One pass over a row that lies in the
//! cache does all that is due to it.

use super::{exponentials::fma, isa::Pass};
use crate::head::lazy_sgd::Map;

/// Smallest norm that a row is divided by (torch.nn.functional.normalize).
pub const MIN_NORM: f32 = 1e-12;

/// Two rows `(w, v)` of weights and momentum to what steps without a gradient make of them:
/// `w + (w_by_w - 1) * w + w_by_v * v` and `v_by_w * w + v_by_v * v`. GPUs are given it as it is (common.cuh).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowMap {
    /// Change of a weight by the weight, less one: small, so that its rounding does not count.
    pub w_by_w_less_1: f32,
    /// Weight by momentum.
    pub w_by_v: f32,
    /// Momentum by weight.
    pub v_by_w: f32,
    /// Momentum by momentum.
    pub v_by_v: f32,
}

impl RowMap {
    /// A map in single precision, as rows are.
    pub fn of(map: &Map) -> Self {
        Self {
            w_by_w_less_1: (map.w_by_w - 1.0) as f32,
            w_by_v: map.w_by_v as f32,
            v_by_w: map.v_by_w as f32,
            v_by_v: map.v_by_v as f32,
        }
    }

    #[inline(always)]
    fn weight<const FMA: bool>(&self, w: f32, v: f32) -> f32 {
        fma::<FMA>(self.w_by_w_less_1, w, fma::<FMA>(self.w_by_v, v, w))
    }

    #[inline(always)]
    fn momentum<const FMA: bool>(&self, w: f32, v: f32) -> f32 {
        fma::<FMA>(self.v_by_v, v, self.v_by_w * w)
    }
}

/// Sum of products, in 32 sums side by side.
#[inline(always)]
fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 32];
    let (a, b) = (a.chunks_exact(32), b.chunks_exact(32));
    let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        for i in 0..32 {
            sums[i] = fma::<FMA>(a[i], b[i], sums[i]);
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// Copies a row, scaled to length 1; gives what it was multiplied by (1 / norm).
pub struct Unit<'a> {
    /// The row.
    pub weight: &'a [f32],
    /// Its momentum and the steps it has missed, if any.
    pub missed: Option<(&'a [f32], RowMap)>,
    /// The row of length 1; what is beyond the row's length is left as it is.
    pub unit: &'a mut [f32],
}

impl Pass for Unit<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f32 {
        let unit = &mut self.unit[..self.weight.len()];
        match self.missed {
            None => unit.copy_from_slice(self.weight),
            Some((momentum, map)) => {
                for ((unit, w), v) in unit.iter_mut().zip(self.weight).zip(momentum) {
                    *unit = map.weight::<FMA>(*w, *v);
                }
            }
        }
        let norm = dot::<FMA>(unit, unit).sqrt();
        // Not f32::max, which would hide a NaN.
        let inverse = 1.0 / if norm < MIN_NORM { MIN_NORM } else { norm };
        unit.iter_mut().for_each(|value| *value *= inverse);
        inverse
    }
}

/// The nearest bf16 of an f32, ties to even. NaN stays NaN.
#[inline(always)]
pub fn to_bf16(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if value.is_nan() {
        bits >> 16 | 0x40
    } else {
        rounded
    }
}

/// Two rows as words that pair them: word `i` is `(first[i], second[i])`.
pub struct PairRows<'a> {
    /// First row.
    pub first: &'a [f32],
    /// Second row.
    pub second: &'a [f32],
    /// The words.
    pub words: &'a mut [u32],
}

impl Pass for PairRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for ((word, a), b) in self.words.iter_mut().zip(self.first).zip(self.second) {
            *word = to_bf16(*a) | to_bf16(*b) << 16;
        }
    }
}

/// A row as words that pair its neighbours: word `i` is `(row[2i], row[2i + 1])`.
pub struct PairNeighbours<'a> {
    /// The row, of even length.
    pub row: &'a [f32],
    /// The words, as halves.
    pub halves: &'a mut [u16],
}

impl Pass for PairNeighbours<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (half, value) in self.halves.iter_mut().zip(self.row) {
            *half = to_bf16(*value) as u16;
        }
    }
}

/// `out += factor * row`.
pub struct AddScaled<'a> {
    /// Changed.
    pub out: &'a mut [f32],
    /// Added.
    pub row: &'a [f32],
    /// Its factor.
    pub factor: f32,
}

impl Pass for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (out, value) in self.out.iter_mut().zip(self.row) {
            *out = fma::<FMA>(self.factor, *value, *out);
        }
    }
}

/// Gradient by a row from the gradient by the row of length 1: its part across the row, divided by the norm. A row
/// under the smallest norm was divided by a constant and has no part along it to take away. `inverse` is 1 / norm.
#[inline(always)]
fn along<const FMA: bool>(grad_unit: &[f32], weight: &[f32], inverse: f32) -> f32 {
    match inverse < 1.0 / MIN_NORM {
        true => dot::<FMA>(grad_unit, weight) * inverse * inverse,
        false => 0.0,
    }
}

/// One row's step of SGD with momentum and weight decay, torch's form.
pub struct SgdRow<'a> {
    /// Gradient by the row of length 1.
    pub grad_unit: &'a [f32],
    /// 1 / norm of the row.
    pub inverse: f32,
    /// The row, changed.
    pub weight: &'a mut [f32],
    /// Its momentum, changed.
    pub momentum: &'a mut [f32],
    /// The steps it has missed, made up for first.
    pub missed: Option<RowMap>,
    /// Learning rate.
    pub lr: f32,
    /// Momentum's factor.
    pub mu: f32,
    /// Weight decay.
    pub decay: f32,
}

impl Pass for SgdRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (weight, momentum) = (self.weight, self.momentum);
        if let Some(map) = self.missed {
            make_up::<FMA>(weight, momentum, map);
        }
        let along = along::<FMA>(self.grad_unit, weight, self.inverse);
        for ((w, v), g) in weight.iter_mut().zip(momentum).zip(self.grad_unit) {
            let grad = fma::<FMA>(-along, *w, *g) * self.inverse;
            *v = fma::<FMA>(self.mu, *v, fma::<FMA>(self.decay, *w, grad));
            *w = fma::<FMA>(-self.lr, *v, *w);
        }
    }
}

#[inline(always)]
fn make_up<const FMA: bool>(weight: &mut [f32], momentum: &mut [f32], map: RowMap) {
    for (w, v) in weight.iter_mut().zip(momentum) {
        (*w, *v) = (map.weight::<FMA>(*w, *v), map.momentum::<FMA>(*w, *v));
    }
}

/// Makes up for missed steps without a new one.
pub struct MakeUp<'a> {
    /// The row.
    pub weight: &'a mut [f32],
    /// Its momentum.
    pub momentum: &'a mut [f32],
    /// The steps.
    pub missed: RowMap,
}

impl Pass for MakeUp<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        make_up::<FMA>(self.weight, self.momentum, self.missed);
    }
}

/// The numbers of an AdamW step, the same for all rows. GPUs are given it as it is (update.cu, `AdamW`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// 1 - lr * weight decay.
    pub keep: f32,
    /// 1 - beta1.
    pub one_less_beta1: f32,
    /// beta2.
    pub beta2: f32,
    /// 1 - beta2.
    pub one_less_beta2: f32,
    /// lr / (1 - beta1^t).
    pub rate: f32,
    /// 1 / sqrt(1 - beta2^t).
    pub correction: f32,
    /// eps.
    pub eps: f32,
}

impl AdamWStep {
    /// The `step`-th one, from 1.
    pub fn new(lr: f64, weight_decay: f64, (beta1, beta2): (f64, f64), eps: f64, step: u64) -> Self {
        let step = step as f64;
        Self {
            keep: (1.0 - lr * weight_decay) as f32,
            one_less_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_less_beta2: (1.0 - beta2) as f32,
            rate: (lr / (1.0 - beta1.powf(step))) as f32,
            correction: (1.0 / (1.0 - beta2.powf(step)).sqrt()) as f32,
            eps: eps as f32,
        }
    }
}

/// One row's step of AdamW, torch's form.
pub struct AdamWRow<'a> {
    /// Gradient by the row of length 1 and 1 / norm of the row; `None` is no gradient.
    pub grad_unit: Option<(&'a [f32], f32)>,
    /// The row, changed.
    pub weight: &'a mut [f32],
    /// Mean of the gradient, changed.
    pub mean: &'a mut [f32],
    /// Mean of its square, changed.
    pub mean_sq: &'a mut [f32],
    /// The step.
    pub step: AdamWStep,
}

impl Pass for AdamWRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (weight, step) = (self.weight, self.step);
        let change = |w: &mut f32, m: &mut f32, q: &mut f32, grad: f32| {
            *m += (grad - *m) * step.one_less_beta1;
            *q = fma::<FMA>(step.beta2, *q, grad * grad * step.one_less_beta2);
            let denominator = q.sqrt() * step.correction + step.eps;
            *w = *w * step.keep - step.rate * (*m / denominator);
        };
        match self.grad_unit {
            Some((grad_unit, inverse)) => {
                let along = along::<FMA>(grad_unit, weight, inverse);
                let rows = weight.iter_mut().zip(self.mean).zip(self.mean_sq).zip(grad_unit);
                for (((w, m), q), g) in rows {
                    let grad = fma::<FMA>(-along, *w, *g) * inverse;
                    change(w, m, q, grad);
                }
            }
            None => {
                for ((w, m), q) in weight.iter_mut().zip(self.mean).zip(self.mean_sq) {
                    change(w, m, q, 0.0);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::tiled::kernel::isa::Isa;
    use half::bf16;

    #[test]
    fn bf16_rounds_to_nearest_even() {
        for bits in (0..=u32::MAX).step_by(65_537 / 7) {
            let value = f32::from_bits(bits);
            let ours = bf16::from_bits(to_bf16(value) as u16);
            match value.is_nan() {
                true => assert!(ours.is_nan()),
                false => assert_eq!(ours, bf16::from_f32(value)),
            }
        }
    }

    #[test]
    fn a_row_has_length_one_whatever_its_length() {
        for isa in Isa::all() {
            for len in [1, 5, 32, 70] {
                let weight: Vec<f32> = (0..len).map(|i| 0.1 * i as f32 - 1.0).collect();
                let mut unit = vec![7f32; len + 1];
                let inverse = isa.run(Unit {
                    weight: &weight,
                    missed: None,
                    unit: &mut unit,
                });
                let norm = weight.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt();
                assert!((f64::from(inverse) * norm - 1.0).abs() < 1e-6);
                assert!((f64::from(unit[len - 1]) - f64::from(weight[len - 1]) / norm).abs() < 1e-6);
                assert_eq!(unit[len], 7.0);
            }
            let mut unit = [1f32; 4];
            isa.run(Unit {
                weight: &[0.0; 4],
                missed: None,
                unit: &mut unit,
            });
            assert_eq!(unit, [0.0; 4]);
        }
    }
}
