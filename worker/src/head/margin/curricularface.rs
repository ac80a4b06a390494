//! CurricularFace (Huang et al.: "CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition", CVPR
//! 2020, arXiv:2004.00288): other classes that come closer than the row's own class with its margin are hard; they
//! weigh more the further training has come.

use super::{Rows, Rule, TargetLogit, angular::MIN_SIN, magface::past_pi};
use arcface_proto::spec;

pub(super) struct CurricularFace(pub(super) spec::CurricularFace);

impl Rule for CurricularFace {
    /// t^(0) = 0 (at Eq. 9).
    fn statistics(&self) -> &'static [(&'static str, f64)] {
        &[("curricularface.t", 0.0)]
    }

    /// Eq. 9: t^(k) = alpha * r^(k) + (1 - alpha) * t^(k-1), r^(k) the mean cosine of the batch's rows with their own
    /// classes. (Printed as a sum; the text calls it the average.) `t_alpha` is the new batch's share, 0.01: the paper
    /// prints 0.99, and the authors say that their code, with 0.01, is right. No gradient flows through t.
    fn observe(&self, rows: &Rows, statistics: &mut [f64]) {
        let sum: f64 = rows.target_cos.iter().sum();
        let mean = sum / rows.target_cos.len() as f64;
        let alpha = rows.alpha(self.0.t_alpha);
        statistics[0] = alpha * mean + (1.0 - alpha) * statistics[0];
    }

    /// Which classes are hard depends on the row's cosine with its own class.
    fn needs_all_targets(&self) -> bool {
        true
    }

    /// T(cos theta) = cos(theta + m), as ArcFace with the true derivative (Eq. 8, j = y_i). Beyond theta + m = pi the
    /// authors' code goes on with cos(theta) - m * sin(m); so do we.
    fn target(&self, cos: f64, _norm: f64, _statistics: &[f64]) -> TargetLogit {
        let theta = cos.clamp(-1.0, 1.0).acos();
        let (value, by_cos, _) = past_pi(cos, theta, self.0.m).unwrap_or_else(|| {
            let angle = theta + self.0.m;
            (angle.cos(), angle.sin() / theta.sin().max(MIN_SIN), 0.0)
        });
        TargetLogit {
            value,
            by_cos,
            by_norm: 0.0,
        }
    }

    /// N(t, cos theta_j) = cos theta_j where T(cos theta_y) >= cos theta_j, else cos theta_j * (t + cos theta_j); its
    /// derivative t + 2 cos theta_j is Eq. 8's for hard classes. The threshold is a constant to the gradient.
    fn hard(&self, target_cos: f64, statistics: &[f64]) -> Option<(f64, f64)> {
        let theta = target_cos.clamp(-1.0, 1.0).acos();
        Some(((theta + self.0.m).cos(), statistics[0]))
    }

    /// A hard class at cosine 1 has 1 + t.
    fn largest(&self, statistics: &[f64]) -> f64 {
        1.0 + statistics[0].max(0.0)
    }
}
