//! MagFace (Meng, Zhao, Huang, Zhou: "MagFace: A Universal Representation for Face Recognition and Quality
//! Assessment", CVPR 2021, arXiv:2103.06627): the margin grows with the embedding's norm a, and a regulariser pulls
//! norms up, so that the norm comes to say how recognisable a face is.

use super::{NormTerm, Rule, TargetLogit, angular::MIN_SIN};
use arcface_proto::spec;
use std::f64::consts::PI;

pub(super) struct MagFace(pub(super) spec::MagFace);

impl MagFace {
    /// The norm inside [l_a, u_a], where the paper's functions are defined, and whether it was inside.
    fn bounded(&self, norm: f64) -> (f64, bool) {
        let inside = norm >= self.0.l_a && norm <= self.0.u_a;
        (norm.clamp(self.0.l_a, self.0.u_a), inside)
    }

    /// m(a) of section 3.2 in the form that the paper trains with: linear from (l_a, l_m) to (u_a, u_m). And m'(a).
    fn margin(&self, norm: f64) -> (f64, f64) {
        let (a, inside) = self.bounded(norm);
        let rise = (self.0.u_m - self.0.l_m) / (self.0.u_a - self.0.l_a);
        let slope = if inside { rise } else { 0.0 };
        (rise * (a - self.0.l_a) + self.0.l_m, slope)
    }
}

impl Rule for MagFace {
    /// The norm's gradient needs every row's cosine on the rank that owns the row, wherever the class lives.
    fn needs_all_targets(&self) -> bool {
        true
    }

    /// The loss L_i of section 3.2: s * cos(theta + m(a)), differentiated by theta and, through m(a), by a. Beyond
    /// theta + m = pi, which the paper does not consider, the authors' code goes on with cos(theta) - m * sin(m), so that
    /// a larger angle never helps; so do we.
    fn target(&self, cos: f64, norm: f64, _statistics: &[f64]) -> TargetLogit {
        let (m, slope) = self.margin(norm);
        let theta = cos.clamp(-1.0, 1.0).acos();
        let (value, by_cos, by_margin) = past_pi(cos, theta, m).unwrap_or_else(|| {
            let angle = theta + m;
            (angle.cos(), angle.sin() / theta.sin().max(MIN_SIN), -angle.sin())
        });
        TargetLogit {
            value,
            by_cos,
            by_norm: by_margin * slope,
        }
    }

    /// lambda_g * g(a), g(a) = 1/a + a/u_a^2, convex and falling up to u_a. Norms outside [l_a, u_a] count as the bound
    /// and get no gradient, as in the authors' code.
    fn norm_term(&self, norm: f64) -> Option<NormTerm> {
        let (a, inside) = self.bounded(norm);
        let square = self.0.u_a * self.0.u_a;
        let slope = if inside { 1.0 / square - 1.0 / (a * a) } else { 0.0 };
        Some(NormTerm {
            value: self.0.lambda_g * (1.0 / a + a / square),
            by_norm: self.0.lambda_g * slope,
        })
    }
}

/// Where theta + m exceeds pi: the logit, and its derivatives by cos and by m.
pub(super) fn past_pi(cos: f64, theta: f64, m: f64) -> Option<(f64, f64, f64)> {
    (theta + m > PI).then(|| (cos - m * m.sin(), 1.0, -(m.sin() + m * m.cos())))
}
