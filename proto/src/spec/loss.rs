//! Losses of the head with their numbers, which are named as in their papers. Their equations are in the worker.

use super::{Choice, choice};

choice! {
    /// A loss by its name in the job file.
    LossName {
        /// The angular margin of `margin_list`.
        ArcFace = "arcface",
        /// Margin by the norm's place among the norms of late batches.
        AdaFace = "adaface",
        /// Margin by the norm, with a regulariser of norms.
        MagFace = "magface",
        /// Hard classes weigh more as training goes on.
        CurricularFace = "curricularface",
        /// The angular margin of `margin_list` over several centres a class.
        SubCenter = "subcenter",
    }
}

/// What becomes of cosines.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Loss {
    /// The angular margin of `margin_list`.
    ArcFace,
    /// arXiv:2204.00964.
    AdaFace(AdaFace),
    /// arXiv:2103.06627.
    MagFace(MagFace),
    /// arXiv:2004.00288.
    CurricularFace(CurricularFace),
    /// Deng et al., ECCV 2020.
    SubCenter(SubCenter),
}

impl Loss {
    /// Its name.
    pub fn name(&self) -> LossName {
        match self {
            Self::ArcFace => LossName::ArcFace,
            Self::AdaFace(_) => LossName::AdaFace,
            Self::MagFace(_) => LossName::MagFace,
            Self::CurricularFace(_) => LossName::CurricularFace,
            Self::SubCenter(_) => LossName::SubCenter,
        }
    }

    /// True if `margin_list` and `margin_gradient` decide its target.
    pub fn has_margin_list(&self) -> bool {
        matches!(self, Self::ArcFace | Self::SubCenter(_))
    }

    /// Weight rows a class.
    pub fn centers(&self) -> u32 {
        match self {
            Self::SubCenter(config) => config.k,
            _ => 1,
        }
    }
}

/// Numbers of AdaFace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaFace {
    /// Margin.
    pub m: f64,
    /// Share of the norms' standard deviation that reaches the ends of the margin's range.
    pub h: f64,
    /// Share of a new batch in the moving statistics.
    pub t_alpha: f64,
}

impl Default for AdaFace {
    /// The paper's, and for `t_alpha` its code's.
    fn default() -> Self {
        Self {
            m: 0.4,
            h: 0.333,
            t_alpha: 0.01,
        }
    }
}

/// Numbers of MagFace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MagFace {
    /// Smallest norm that counts.
    pub l_a: f64,
    /// Largest norm that counts.
    pub u_a: f64,
    /// Margin at `l_a`.
    pub l_m: f64,
    /// Margin at `u_a`.
    pub u_m: f64,
    /// Weight of the regulariser.
    pub lambda_g: f64,
}

impl Default for MagFace {
    /// The paper's.
    fn default() -> Self {
        Self {
            l_a: 10.0,
            u_a: 110.0,
            l_m: 0.45,
            u_m: 0.8,
            lambda_g: 35.0,
        }
    }
}

/// Numbers of CurricularFace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CurricularFace {
    /// Margin.
    pub m: f64,
    /// Share of a new batch in t.
    pub t_alpha: f64,
}

impl Default for CurricularFace {
    /// The paper's, and for `t_alpha` its code's.
    fn default() -> Self {
        Self {
            m: 0.5,
            t_alpha: 0.01,
        }
    }
}

/// Numbers of sub-centre ArcFace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubCenter {
    /// Centres a class.
    pub k: u32,
}

impl Default for SubCenter {
    /// The paper's.
    fn default() -> Self {
        Self { k: 3 }
    }
}
