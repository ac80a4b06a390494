//! Angular margins (ArcFace, CosFace and their combination) and interclass filtering: cosines to logits, and the
//! derivative that training uses. Pure; knows no ranks.
//!
//! Shapes: b batch, c classes.

use arcface_proto::spec::MarginGradient;
use tch::{Kind, Tensor, no_grad};

/// Smallest sin(theta) in the exact derivative, which grows without bound as theta goes to 0: 1e-4 is reached at
/// cosines that differ from 1 by less than f32 can tell.
const MIN_SIN: f64 = 1e-4;

/// s * (cos(m1*theta + m2) - m3) at the target, s * cos(theta) elsewhere.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Margin {
    m: [f64; 3],
    scale: f64,
    gradient: MarginGradient,
    filter_above: Option<f64>,
}

/// Logits with their derivative by the cosine.
pub struct Margined {
    /// `[b, c]`, scaled by s.
    pub logits: Tensor,
    /// `[b, c]`: d logit / d cos as training differentiates it.
    pub derivative: Tensor,
}

impl Margin {
    /// Margin (m1, m2, m3), scale s, derivative of the target's logit, threshold of the interclass filtering.
    pub fn new(m: [f64; 3], scale: f64, gradient: MarginGradient, filter_above: Option<f64>) -> Self {
        Self {
            m,
            scale,
            gradient,
            filter_above: filter_above.filter(|&threshold| threshold > 0.0),
        }
    }

    /// Applies the margin. `cos_bc` holds cosines in [-1, 1]; `target_b` i64 the column of each row's class, -1
    /// where the class is not among these columns.
    ///
    /// Filtering comes first: a non-target cosine above the threshold becomes logit 0 (it stays in the softmax)
    /// with derivative 0.
    pub fn apply(&self, cos_bc: &Tensor, target_b: &Tensor) -> Margined {
        no_grad(|| {
            let mut logits = cos_bc * self.scale;
            let mut derivative = Tensor::full_like(cos_bc, self.scale);
            if let Some(threshold) = self.filter_above {
                let dirty = cos_bc.gt(threshold);
                let _ = logits.masked_fill_(&dirty, 0.0);
                let _ = derivative.masked_fill_(&dirty, 0.0);
            }
            let row = target_b.ge(0).nonzero().view([-1]);
            if row.numel() > 0 {
                let column = target_b.index_select(0, &row);
                let at = [Some(&row), Some(&column)];
                // A handful of values: f64 costs nothing, and arccos near 1 needs it.
                let cos = cos_bc.index(&at).to_kind(Kind::Double);
                let (logit, slope) = self.target(&cos);
                let _ = logits.index_put_(&at, &logit.to_kind(cos_bc.kind()), false);
                let _ = derivative.index_put_(&at, &slope.to_kind(cos_bc.kind()), false);
            }
            Margined { logits, derivative }
        })
    }

    /// Logits of target cosines (f64), and their derivative.
    fn target(&self, cos: &Tensor) -> (Tensor, Tensor) {
        let [m1, m2, m3] = self.m;
        let flat = || Tensor::full_like(cos, self.scale);
        if m1 == 1.0 && m2 == 0.0 {
            // CosFace: a shift, whose derivative is s either way.
            return ((cos - m3) * self.scale, flat());
        }
        let theta = cos.clamp(-1.0, 1.0).acos();
        let angle = &theta * m1 + m2;
        let logit = (angle.cos() - m3) * self.scale;
        let is_arcface = m1 == 1.0 && m3 == 0.0;
        let derivative = match self.gradient {
            // The reference computes the angle outside of autograd, so its target differentiates as s*cos.
            MarginGradient::Reference if is_arcface => flat(),
            _ => angle.sin() * (self.scale * m1) / theta.sin().clamp_min(MIN_SIN),
        };
        (logit, derivative)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: f64 = 64.0;

    fn one(margin: Margin, cos: f64) -> (f64, f64) {
        let cos = Tensor::from_slice(&[cos]).view([1, 1]);
        let out = margin.apply(&cos, &Tensor::from_slice(&[0i64]));
        (
            out.logits.double_value(&[0, 0]),
            out.derivative.double_value(&[0, 0]),
        )
    }

    #[test]
    fn formula_at_the_target() {
        for m in [
            [1.0, 0.5, 0.0],
            [1.0, 0.0, 0.4],
            [1.35, 0.0, 0.0],
            [0.9, 0.4, 0.15],
            [1.0, 0.3, 0.2],
        ] {
            for cos in [-0.99, -0.3, 0.0, 0.2, 0.8, 0.999] {
                let exact = Margin::new(m, S, MarginGradient::Exact, None);
                let logit = |cos: f64| S * ((m[0] * cos.acos() + m[1]).cos() - m[2]);
                let (value, slope) = one(exact, cos);
                assert!((value - logit(cos)).abs() < 1e-9, "{m:?} at {cos}");
                let numeric = (logit(cos + 1e-6) - logit(cos - 1e-6)) / 2e-6;
                assert!(
                    (slope - numeric).abs() < 1e-3 * S,
                    "{m:?} at {cos}: {slope} {numeric}"
                );
            }
        }
    }

    #[test]
    fn the_reference_differentiates_arcface_and_cosface_as_a_plain_cosine() {
        for m in [[1.0, 0.5, 0.0], [1.0, 0.0, 0.4]] {
            assert_eq!(one(Margin::new(m, S, MarginGradient::Reference, None), 0.3).1, S);
        }
        // It has no other margins, so there "reference" is the true derivative too.
        let m = [1.35, 0.0, 0.0];
        let exact = one(Margin::new(m, S, MarginGradient::Exact, None), 0.3);
        assert_eq!(
            one(Margin::new(m, S, MarginGradient::Reference, None), 0.3),
            exact
        );
    }

    #[test]
    fn the_exact_derivative_stays_finite_at_the_pole() {
        let margin = Margin::new([1.0, 0.5, 0.0], S, MarginGradient::Exact, None);
        for cos in [1.0, -1.0] {
            let (value, slope) = one(margin, cos);
            assert!(value.is_finite() && slope.is_finite(), "{cos}: {value} {slope}");
        }
    }

    #[test]
    fn filtering_spares_the_target_and_comes_before_the_margin() {
        let cos = Tensor::from_slice2(&[[0.5f64, 0.6, 0.1], [0.5, 0.6, 0.1]]);
        let margin = Margin::new([1.0, 0.0, 0.4], S, MarginGradient::Reference, Some(0.4));
        let out = margin.apply(&cos, &Tensor::from_slice(&[1i64, -1]));
        let expected = Tensor::from_slice2(&[[0.0, 0.2 * S, 0.1 * S], [0.0, 0.0, 0.1 * S]]);
        assert!((&out.logits - expected).abs().max().double_value(&[]) < 1e-12);
        let slopes = Tensor::from_slice2(&[[0.0, S, S], [0.0, 0.0, S]]);
        assert_eq!(out.derivative, slopes);
    }
}
