//! AdaFace (Kim, Jain, Liu: "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022, arXiv:2204.00964):
//! the norm of an embedding stands for the quality of its image, and moves the margin from angular (low quality) to
//! subtractive (high).

use super::{Rows, Rule, TargetLogit, angular::MIN_SIN};
use arcface_proto::spec;
use std::f64::consts::PI;

/// Places of the statistics.
const MEAN: usize = 0;
const STD: usize = 1;

/// Norms are cut to this range before anything else. Not in the paper; the authors' code does it, so that one
/// exploding embedding cannot own the statistics.
const NORMS: (f64, f64) = (1e-3, 100.0);
/// Added to sigma in the authors' code, and the angle's distance from 0 and pi.
const EPS: f64 = 1e-3;

pub(super) struct AdaFace(pub(super) spec::AdaFace);

impl AdaFace {
    /// The normalised norm of section 3.3 ("norm normalisation"): (norm - mu_z) / (sigma_z / h), cut to [-1, 1]. No
    /// gradient flows through it: the paper stops it, as the norm stands for a property of the image.
    fn quality(&self, norm: f64, statistics: &[f64]) -> f64 {
        let norm = norm.clamp(NORMS.0, NORMS.1);
        let spread = (statistics[STD] + EPS) / self.0.h;
        ((norm - statistics[MEAN]) / spread).clamp(-1.0, 1.0)
    }
}

impl Rule for AdaFace {
    /// The authors' code starts at these; the paper does not say.
    fn statistics(&self) -> &'static [(&'static str, f64)] {
        &[("adaface.mean", 20.0), ("adaface.std", 100.0)]
    }

    /// Section 3.3: mu_z and sigma_z are moving averages over batches, here over the batches of all ranks. `t_alpha` is
    /// the new batch's share, as in the authors' code (0.01): the paper's 0.99 is the old value's.
    fn observe(&self, rows: &Rows, statistics: &mut [f64]) {
        let cut = || rows.norms.iter().map(|norm| norm.clamp(NORMS.0, NORMS.1));
        let count = rows.norms.len() as f64;
        let mean = cut().sum::<f64>() / count;
        let alpha = rows.alpha(self.0.t_alpha);
        let keep = 1.0 - alpha;
        statistics[MEAN] = alpha * mean + keep * statistics[MEAN];
        // One row says nothing about the spread.
        if rows.norms.len() > 1 {
            let squares: f64 = cut().map(|norm| (norm - mean) * (norm - mean)).sum();
            let std = (squares / (count - 1.0)).sqrt();
            statistics[STD] = alpha * std + keep * statistics[STD];
        }
    }

    /// Eq. 18: s * (cos(theta + g_angle) - g_add) with g_angle = -m * z and g_add = m * z + m, z the normalised norm.
    /// (Printed without the brackets; the authors say that s multiplies both.) The angle is kept inside (0, pi), where
    /// the cosine falls, as in the authors' code: past the ends the logit is flat.
    fn target(&self, cos: f64, norm: f64, statistics: &[f64]) -> TargetLogit {
        let quality = self.quality(norm, statistics);
        let g_angle = -self.0.m * quality;
        let g_add = self.0.m * quality + self.0.m;
        let theta = cos.clamp(-1.0, 1.0).acos();
        let angle = theta + g_angle;
        let by_cos = match (EPS..=PI - EPS).contains(&angle) {
            true => angle.sin() / theta.sin().max(MIN_SIN),
            false => 0.0,
        };
        TargetLogit {
            value: angle.clamp(EPS, PI - EPS).cos() - g_add,
            by_cos,
            by_norm: 0.0,
        }
    }
}
