//! Angular margins: ArcFace (Deng et al., arXiv:1801.07698, Eq. 3), CosFace (Wang et al., arXiv:1801.09414, Eq. 4) and
//! their combination cos(m1*theta + m2) - m3 (ArcFace's paper, Eq. 4).

use super::{Loss, Margined, Prepared, Rows, Rule, TargetLogit, target_cosines};
use arcface_proto::spec::{self, MarginGradient};
use tch::Tensor;

/// Smallest sin(theta) in the exact derivative, which grows without bound as theta goes to 0: 1e-4 is reached at
/// cosines that differ from 1 by less than f32 can tell.
pub(super) const MIN_SIN: f64 = 1e-4;

/// s * (cos(m1*theta + m2) - m3) at the target, s * cos(theta) elsewhere.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Margin {
    m: [f64; 3],
    scale: f64,
    gradient: MarginGradient,
    zero_above: Option<f64>,
}

impl Margin {
    /// Margin (m1, m2, m3), scale s, derivative of the target's logit, threshold of the interclass filtering.
    pub fn new(m: [f64; 3], scale: f64, gradient: MarginGradient, zero_above: Option<f64>) -> Self {
        Self {
            m,
            scale,
            gradient,
            zero_above,
        }
    }

    /// Applies the margin by itself; see [`Prepared::apply`].
    pub fn apply(&self, cos_bc: &Tensor, target_b: &Tensor) -> Margined {
        let target_cos = target_cosines(cos_bc, target_b);
        self.prepare(&target_cos).apply(cos_bc, target_b)
    }

    /// What becomes of rows with these target cosines; a margin needs no norms.
    pub fn prepare(&self, target_cos: &[f64]) -> Prepared {
        let mut loss = Loss::new(spec::Loss::ArcFace, *self, self.scale, self.zero_above);
        let norms = vec![1.0; target_cos.len()];
        loss.prepare(&Rows {
            norms: &norms,
            target_cos,
            share: 1.0,
        })
    }
}

impl Rule for Margin {
    fn target(&self, cos: f64, _norm: f64, _statistics: &[f64]) -> TargetLogit {
        let [m1, m2, m3] = self.m;
        let logit = |value, by_cos| TargetLogit {
            value,
            by_cos,
            by_norm: 0.0,
        };
        if m1 == 1.0 && m2 == 0.0 {
            // CosFace: a shift, whose derivative is s either way.
            return logit(cos - m3, 1.0);
        }
        let theta = cos.clamp(-1.0, 1.0).acos();
        let angle = theta * m1 + m2;
        let is_arcface = m1 == 1.0 && m3 == 0.0;
        let by_cos = match self.gradient {
            // The reference computes the angle outside of autograd, so its target differentiates as s*cos.
            MarginGradient::Reference if is_arcface => 1.0,
            _ => angle.sin() * m1 / theta.sin().max(MIN_SIN),
        };
        logit(angle.cos() - m3, by_cos)
    }

    fn largest(&self, _statistics: &[f64]) -> f64 {
        // A negative m3 lifts the target.
        1.0 + (-self.m[2]).max(0.0)
    }
}
