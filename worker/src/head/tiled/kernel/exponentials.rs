//! From cosines to the terms of the softmax: clamp, interclass filtering, exponential, sums over the classes.
//!
//! A logit z is taken in base 2: t = z * log2(e), and its term is 2^(t - shift) with a whole `shift` per sample, so
//! that the shift costs no rounding. The scale is at most 80, so with the shifts chosen here no sum of 2^32 terms
//! overflows, and no running maximum is needed.

use super::isa::Pass;
use std::f64::consts::{LN_2, LOG2_E};

/// Adding it to an f32 below 2^22 rounds to whole numbers, which then stand in the low bits of the sum.
const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
/// ln(2)^k / k! for k = 0..=7: 2^r for |r| <= 1/2, cut after a term whose successor is below 6e-9.
const POLYNOMIAL: [f32; 8] = {
    let mut terms = [1.0f32; 8];
    let (mut term, mut k) = (1.0f64, 1);
    while k < 8 {
        term *= LN_2 / k as f64;
        terms[k] = term as f32;
        k += 1;
    }
    terms
};
/// Terms below this power of two count as 0, which keeps their products normal numbers.
const SMALLEST: f32 = -110.0;
/// A sum below it may have lost terms: the shift of that sample is then taken from its largest logit. Next to
/// `SMALLEST` it leaves 40 bits.
pub const SMALLEST_SUM: f64 = 1.0 / (1u128 << 70) as f64;

/// The shift of every sample at the start: the terms of scale 64 are 2^-92 to 2^92 without one.
pub fn first_shift(scale: f64) -> f32 {
    (scale * LOG2_E - 93.0).ceil().max(0.0) as f32
}

/// How the cosines of each sample with other classes than its own become terms.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// Logit scale times log2(e).
    scale_log2: f32,
    /// What it lost in rounding: without it, all terms of large logits would be off to the same side.
    scale_rest: f32,
    /// Shift of every sample, whole numbers.
    pub shift: &'a [f32],
    /// What the loss does beside scaling; `None` is nothing.
    pub special: Option<Special<'a>>,
}

/// Comparisons of a loss, by sample; infinite thresholds are off.
#[derive(Clone, Copy, Debug)]
pub struct Special<'a> {
    /// Cosines above it become logit 0 with derivative 0.
    pub zero_above: &'a [f32],
    /// Cosines above it become cos * (t + cos).
    pub hard_above: &'a [f32],
    /// t of the hard ones.
    pub t: &'a [f32],
}

/// 2^(whole + fraction) of |fraction| <= 1/2; 0 below 2^[`SMALLEST`]. NaN stays NaN.
#[inline(always)]
fn exp2<const FMA: bool>(whole: f32, fraction: f32) -> f32 {
    let mut power = POLYNOMIAL[7];
    let mut k = 7;
    while k > 0 {
        k -= 1;
        power = fma::<FMA>(power, fraction, POLYNOMIAL[k]);
    }
    let bits = (whole + ROUND).to_bits().wrapping_sub(ROUND.to_bits());
    let factor = f32::from_bits(bits.wrapping_add(127) << 23);
    // `<` is false for NaN.
    if whole < SMALLEST { 0.0 } else { power * factor }
}

/// a * b + c.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// The cosine within [-1, 1]; NaN stays NaN.
#[inline(always)]
fn clamped(raw: f32) -> f32 {
    let low = if raw < -1.0 { -1.0 } else { raw };
    if low > 1.0 { 1.0 } else { low }
}

/// Turns rows of cosines into softmax terms, and adds them up by sample. What stands in the rows then is the term
/// times d logit / d cos over the scale: the gradient before it is divided by the sum.
pub struct Exponentials<'a> {
    /// `[rows, stride]`, cosines of one class with every sample; becomes the gradient.
    pub cosines: &'a mut [f32],
    /// Distance of rows.
    pub stride: usize,
    /// Which terms.
    pub terms: Terms<'a>,
    /// Sum of terms by sample, which the rows' terms are added to.
    pub sums: &'a mut [f32],
    /// (row, sample) of the targets among these rows, rising: 0, and not added.
    pub targets: &'a [(usize, usize)],
}

impl<'a> Terms<'a> {
    /// The terms of logits of this scale.
    pub fn new(scale: f64, shift: &'a [f32], special: Option<Special<'a>>) -> Self {
        let exact = scale * LOG2_E;
        let scale_log2 = exact as f32;
        Self {
            scale_log2,
            scale_rest: (exact - f64::from(scale_log2)) as f32,
            shift,
            special,
        }
    }

    /// 2^(logit * scale * log2(e) - shift).
    #[inline(always)]
    fn of<const FMA: bool>(&self, logit: f32, shift: f32) -> f32 {
        let whole = logit * self.scale_log2 + ROUND - ROUND;
        let fraction = fma::<FMA>(logit, self.scale_log2, -whole);
        exp2::<FMA>(whole - shift, fma::<FMA>(logit, self.scale_rest, fraction))
    }
}

impl Pass for Exponentials<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let mut targets = self.targets;
        for (r, row) in self.cosines.chunks_exact_mut(self.stride).enumerate() {
            let here = targets.iter().take_while(|(row, _)| *row == r).count();
            let (own, rest) = targets.split_at(here);
            targets = rest;
            // A target adds exactly 0 that way, whatever its cosine.
            own.iter().for_each(|(_, b)| row[*b] = SKIP);
            match &self.terms.special {
                None => plain_terms::<FMA>(row, &self.terms, self.sums),
                Some(special) => special_terms::<FMA>(row, &self.terms, special, self.sums),
            }
        }
    }
}

/// In the place of a cosine: no term. No cosine of two rows of length 1 is near.
const SKIP: f32 = -1e30;

#[inline(always)]
fn plain_terms<const FMA: bool>(row: &mut [f32], terms: &Terms<'_>, sums: &mut [f32]) {
    for ((value, shift), sum) in row.iter_mut().zip(terms.shift).zip(sums.iter_mut()) {
        let raw = *value;
        let cos = clamped(raw);
        let term = terms.of::<FMA>(cos, *shift);
        let term = if raw <= SKIP { 0.0 } else { term };
        *sum += term;
        // No gradient flows through the clamp where it cut. NaN is not beyond it.
        *value = if raw.abs() > 1.0 { 0.0 } else { term };
    }
}

#[inline(always)]
fn special_terms<const FMA: bool>(
    row: &mut [f32],
    terms: &Terms<'_>,
    special: &Special<'_>,
    sums: &mut [f32],
) {
    let thresholds = special.zero_above.iter().zip(special.hard_above).zip(special.t);
    let samples = row
        .iter_mut()
        .zip(terms.shift)
        .zip(sums.iter_mut())
        .zip(thresholds);
    for (((value, shift), sum), ((zero_above, hard_above), t)) in samples {
        let raw = *value;
        let cos = clamped(raw);
        let (zero, hard) = (cos > *zero_above, cos > *hard_above);
        let logit = if hard { cos * (t + cos) } else { cos };
        let slope = if hard { t + 2.0 * cos } else { 1.0 };
        let (logit, slope) = if zero { (0.0, 0.0) } else { (logit, slope) };
        let term = terms.of::<FMA>(logit, *shift);
        let term = if raw <= SKIP { 0.0 } else { term };
        *sum += term;
        *value = if raw.abs() > 1.0 { 0.0 } else { term * slope };
    }
}

/// Raises `largest` to the largest logit, in base 2, of each sample's non-target classes.
pub struct Largest<'a> {
    /// `[rows, stride]`, cosines.
    pub cosines: &'a [f32],
    /// Distance of rows.
    pub stride: usize,
    /// Which terms.
    pub terms: Terms<'a>,
    /// By sample.
    pub largest: &'a mut [f32],
    /// (row, sample) of the targets among these rows, rising.
    pub targets: &'a [(usize, usize)],
}

impl Pass for Largest<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let mut targets = self.targets.iter().peekable();
        for (r, row) in self.cosines.chunks_exact(self.stride).enumerate() {
            for (b, (raw, largest)) in row.iter().zip(self.largest.iter_mut()).enumerate() {
                if targets
                    .next_if(|(row, sample)| *row == r && *sample == b)
                    .is_some()
                {
                    continue;
                }
                let cos = clamped(*raw);
                let logit = match &self.terms.special {
                    Some(special) if cos > special.zero_above[b] => 0.0,
                    Some(special) if cos > special.hard_above[b] => cos * (special.t[b] + cos),
                    _ => cos,
                };
                *largest = largest.max(logit * self.terms.scale_log2);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::tiled::kernel::isa::Isa;

    /// Against f64: 2 ulp of the exponential and the rounding of the cosine's product.
    #[test]
    fn terms_are_exponentials() {
        let cosines: Vec<f32> = (0..4000).map(|i| -1.05 + i as f32 * 5.25e-4).collect();
        let shift: Vec<f32> = (0..4000).map(|i| (i % 3) as f32).collect();
        let special = Special {
            zero_above: &[0.9; 4000],
            hard_above: &[0.5; 4000],
            t: &[0.1; 4000],
        };
        for (isa, special) in Isa::all()
            .into_iter()
            .flat_map(|isa| [(isa, None), (isa, Some(special))])
        {
            let mut out = cosines.clone();
            let mut sums = vec![0f32; 4000];
            isa.run(Exponentials {
                cosines: &mut out,
                stride: 4000,
                terms: Terms::new(64.0, &shift, special),
                sums: &mut sums,
                targets: &[(0, 2000)],
            });
            for i in 0..4000 {
                let raw = f64::from(cosines[i]);
                let cos = raw.clamp(-1.0, 1.0);
                let (logit, slope) = match special.is_some() {
                    true if cos > f64::from(0.9f32) => (0.0, 0.0),
                    true if cos > 0.5 => (cos * (0.1 + cos), 0.1 + 2.0 * cos),
                    _ => (cos, 1.0),
                };
                let expected = (64.0 * logit).exp() * 2f64.powi(-((i % 3) as i32));
                let (gradient, sum) = (f64::from(out[i]), f64::from(sums[i]));
                if i == 2000 {
                    assert_eq!((gradient, sum), (0.0, 0.0));
                    continue;
                }
                // The scale as an f32 is off by 3e-8 of itself, which counts z times; so is t + cos.
                assert!(
                    (sum / expected - 1.0).abs() < 1e-5,
                    "{isa:?} {raw}: {sum} {expected}"
                );
                let expected = if raw.abs() > 1.0 { 0.0 } else { sum * slope };
                assert!((gradient - expected).abs() <= 1e-6 * expected, "{isa:?} {raw}");
            }
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so_and_the_tiny_is_zero() {
        for isa in Isa::all() {
            let shift = [first_shift(80.0); 32];
            let terms = Terms::new(80.0, &shift, None);
            let mut cosines = [-1.0f32; 32];
            cosines[5] = f32::NAN;
            cosines[6] = 1.0;
            let mut sums = [0f32; 32];
            isa.run(Exponentials {
                cosines: &mut cosines,
                stride: 32,
                terms,
                sums: &mut sums,
                targets: &[],
            });
            assert_eq!(cosines[0], 0.0);
            assert!(cosines[5].is_nan() && sums[5].is_nan());
            // Room for 2^32 such terms.
            assert!(sums[6].is_finite() && sums[6] < 2f32.powi(95));
            let mut largest = [f32::MIN; 32];
            isa.run(Largest {
                cosines: &[0.5; 64],
                stride: 32,
                terms,
                largest: &mut largest,
                targets: &[(0, 1), (1, 1)],
            });
            assert_eq!((largest[0], largest[1]), (0.5 * (80.0 * LOG2_E) as f32, f32::MIN));
        }
    }
}
