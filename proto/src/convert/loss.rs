//! `head.loss` and the numbers of each loss.

use super::Checker;
use crate::spec::{AdaFace, CurricularFace, Loss, LossName, MagFace, SubCenter};
use crate::v1;
use std::f64::consts::FRAC_PI_2;

/// Most centres a class: the paper tries up to 10.
const MAX_CENTERS: u32 = 16;

/// The loss, with violations for numbers out of range and for sections and keys that belong to another loss.
pub(super) fn loss(c: &mut Checker, head: &v1::HeadSection) -> Loss {
    let name = c.choice("head.loss", &head.loss, LossName::ArcFace);
    for (section, given, owner) in [
        ("adaface", head.adaface.is_some(), LossName::AdaFace),
        ("magface", head.magface.is_some(), LossName::MagFace),
        (
            "curricularface",
            head.curricularface.is_some(),
            LossName::CurricularFace,
        ),
        ("subcenter", head.subcenter.is_some(), LossName::SubCenter),
    ] {
        if given && name != owner {
            let problem = format!("belongs to another loss than {:?}", name.as_str());
            let hint = format!("remove it, or set head.loss = {:?}", owner.as_str());
            c.fail(&format!("head.{section}"), problem, hint);
        }
    }
    let loss = match name {
        LossName::ArcFace => Loss::ArcFace,
        LossName::AdaFace => Loss::AdaFace(adaface(c, head.adaface.unwrap_or_default())),
        LossName::MagFace => Loss::MagFace(magface(c, head.magface.unwrap_or_default())),
        LossName::CurricularFace => {
            Loss::CurricularFace(curricularface(c, head.curricularface.unwrap_or_default()))
        }
        LossName::SubCenter => Loss::SubCenter(subcenter(c, head.subcenter.unwrap_or_default())),
    };
    if !loss.has_margin_list() {
        let unused = [
            ("head.margin_list", !head.margin_list.is_empty()),
            ("head.margin_gradient", head.margin_gradient.is_some()),
        ];
        for (path, _) in unused.iter().filter(|(_, given)| *given) {
            let problem = format!("does nothing with loss {:?}", name.as_str());
            let hint = format!("remove it; [head.{}] has the margin", name.as_str());
            c.fail(path, problem, hint);
        }
    }
    loss
}

fn margin(c: &mut Checker, path: &str, value: f64) -> f64 {
    let valid = (0.0..=FRAC_PI_2).contains(&value);
    c.check(path, value, valid, "in [0, pi/2]", "")
}

fn t_alpha(c: &mut Checker, path: &str, value: f64) -> f64 {
    let valid = value > 0.0 && value <= 1.0;
    c.check(path, value, valid, "in (0, 1]", "0.01 is the usual value")
}

fn adaface(c: &mut Checker, section: v1::AdaFaceSection) -> AdaFace {
    let usual = AdaFace::default();
    let h = section.h.unwrap_or(usual.h);
    AdaFace {
        m: margin(c, "head.adaface.m", section.m.unwrap_or(usual.m)),
        h: c.check(
            "head.adaface.h",
            h,
            h > 0.0 && h.is_finite(),
            "a positive number",
            "",
        ),
        t_alpha: t_alpha(
            c,
            "head.adaface.t_alpha",
            section.t_alpha.unwrap_or(usual.t_alpha),
        ),
    }
}

fn magface(c: &mut Checker, section: v1::MagFaceSection) -> MagFace {
    let usual = MagFace::default();
    let l_a = section.l_a.unwrap_or(usual.l_a);
    let u_a = section.u_a.unwrap_or(usual.u_a);
    let lambda_g = section.lambda_g.unwrap_or(usual.lambda_g);
    let l_m = margin(c, "head.magface.l_m", section.l_m.unwrap_or(usual.l_m));
    let u_m = margin(c, "head.magface.u_m", section.u_m.unwrap_or(usual.u_m));
    // A margin that is no number was named above.
    let below = u_m < l_m;
    c.check("head.magface.u_m", u_m, !below, "at least l_m", "");
    let finite = |value: f64| value.is_finite() && value > 0.0;
    MagFace {
        l_a: c.check("head.magface.l_a", l_a, finite(l_a), "a positive number", ""),
        u_a: c.check("head.magface.u_a", u_a, finite(u_a) && u_a > l_a, "above l_a", ""),
        l_m,
        u_m,
        lambda_g: c.check(
            "head.magface.lambda_g",
            lambda_g,
            lambda_g >= 0.0 && lambda_g.is_finite(),
            "at least 0",
            "35 is the usual value",
        ),
    }
}

fn curricularface(c: &mut Checker, section: v1::CurricularFaceSection) -> CurricularFace {
    let usual = CurricularFace::default();
    CurricularFace {
        m: margin(c, "head.curricularface.m", section.m.unwrap_or(usual.m)),
        t_alpha: t_alpha(
            c,
            "head.curricularface.t_alpha",
            section.t_alpha.unwrap_or(usual.t_alpha),
        ),
    }
}

fn subcenter(c: &mut Checker, section: v1::SubCenterSection) -> SubCenter {
    let k = section.k.unwrap_or(SubCenter::default().k);
    let valid = (2..=MAX_CENTERS).contains(&k);
    SubCenter {
        k: c.check(
            "head.subcenter.k",
            k,
            valid,
            "in 2..=16",
            "one centre is loss \"arcface\"",
        ),
    }
}

/// The sections of a loss as written in a job: the inverse of [`loss`], every field set.
pub(super) fn to_wire(loss: &Loss, head: v1::HeadSection) -> v1::HeadSection {
    let mut head = v1::HeadSection {
        loss: Some(loss.name().as_str().into()),
        ..head
    };
    if !loss.has_margin_list() {
        head.margin_list.clear();
        head.margin_gradient = None;
    }
    match *loss {
        Loss::ArcFace => {}
        Loss::AdaFace(AdaFace { m, h, t_alpha }) => {
            head.adaface = Some(v1::AdaFaceSection {
                m: Some(m),
                h: Some(h),
                t_alpha: Some(t_alpha),
            });
        }
        Loss::MagFace(config) => {
            head.magface = Some(v1::MagFaceSection {
                l_a: Some(config.l_a),
                u_a: Some(config.u_a),
                l_m: Some(config.l_m),
                u_m: Some(config.u_m),
                lambda_g: Some(config.lambda_g),
            });
        }
        Loss::CurricularFace(CurricularFace { m, t_alpha }) => {
            head.curricularface = Some(v1::CurricularFaceSection {
                m: Some(m),
                t_alpha: Some(t_alpha),
            });
        }
        Loss::SubCenter(SubCenter { k }) => {
            head.subcenter = Some(v1::SubCenterSection { k: Some(k) });
        }
    }
    head
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::{FieldViolation, job_spec, job_spec_to_wire};

    fn job(head: v1::HeadSection) -> v1::JobSpec {
        v1::JobSpec {
            output: Some("work_dirs/x".into()),
            model: Some(v1::ModelSection {
                network: Some("r18".into()),
                ..Default::default()
            }),
            data: Some(v1::DataSection {
                rec: Some("/data".into()),
                ..Default::default()
            }),
            head: Some(head),
            ..Default::default()
        }
    }

    fn named(loss: &str) -> v1::HeadSection {
        v1::HeadSection {
            loss: Some(loss.into()),
            ..Default::default()
        }
    }

    fn paths(head: v1::HeadSection) -> Vec<String> {
        let violations: Vec<FieldViolation> = job_spec(&job(head)).expect_err("refused");
        violations.into_iter().map(|violation| violation.path).collect()
    }

    #[test]
    fn every_loss_has_defaults_and_survives_the_wire() {
        for (name, expected) in [
            ("arcface", Loss::ArcFace),
            ("adaface", Loss::AdaFace(AdaFace::default())),
            ("magface", Loss::MagFace(MagFace::default())),
            ("curricularface", Loss::CurricularFace(CurricularFace::default())),
            ("subcenter", Loss::SubCenter(SubCenter::default())),
        ] {
            let spec = job_spec(&job(named(name))).expect(name);
            assert_eq!(spec.head.loss, expected);
            assert_eq!(job_spec(&job_spec_to_wire(&spec)), Ok(spec), "{name}");
        }
    }

    #[test]
    fn numbers_out_of_range_are_named() {
        let mut head = named("magface");
        head.magface = Some(v1::MagFaceSection {
            l_a: Some(120.0),
            u_m: Some(0.1),
            lambda_g: Some(f64::NAN),
            ..Default::default()
        });
        assert_eq!(
            paths(head),
            ["head.magface.u_m", "head.magface.u_a", "head.magface.lambda_g"]
        );
        let mut head = named("adaface");
        head.adaface = Some(v1::AdaFaceSection {
            h: Some(0.0),
            t_alpha: Some(0.0),
            ..Default::default()
        });
        assert_eq!(paths(head), ["head.adaface.h", "head.adaface.t_alpha"]);
        let mut head = named("subcenter");
        head.subcenter = Some(v1::SubCenterSection { k: Some(1) });
        assert_eq!(paths(head), ["head.subcenter.k"]);
    }

    #[test]
    fn what_belongs_to_another_loss_is_refused() {
        let mut head = named("adaface");
        head.margin_list = vec![1.0, 0.5, 0.0];
        head.margin_gradient = Some("exact".into());
        head.magface = Some(v1::MagFaceSection::default());
        assert_eq!(
            paths(head),
            ["head.magface", "head.margin_list", "head.margin_gradient"]
        );
        assert_eq!(paths(named("adaFace")), ["head.loss"]);
    }
}
