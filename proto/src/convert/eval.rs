//! `[eval]`: what is evaluated, beside what, and what follows from it.

use super::Checker;
use crate::spec::{EarlyStop, EvalSpec, Metric, set_name};
use crate::v1;

/// Names of the benchmarks, as sets.
const IJB: [&str; 2] = ["ijbb", "ijbc"];

pub(super) fn eval(c: &mut Checker, eval: v1::EvalSection) -> EvalSpec {
    for (i, target) in eval.val_targets.iter().enumerate() {
        let path = format!("eval.val_targets[{i}]");
        if target.is_empty() || target.contains('\0') {
            let hint = "a name such as \"lfw\" or the path of a .bin file";
            c.fail(&path, "is empty", hint);
        } else if IJB.contains(&set_name(target)) {
            let problem = format!("{target:?} has the name of a benchmark that is no verification set");
            c.fail(&path, problem, "eval.ijbb and eval.ijbc take its folder");
        } else if let Some(first) = eval.val_targets[..i]
            .iter()
            .find(|first| set_name(first) == set_name(target))
        {
            let problem = format!("{target:?} has the name of {first:?}, {:?}", set_name(target));
            c.fail(&path, problem, "results go by the name: call the file otherwise");
        }
    }
    let folder = |folder: Option<String>| folder.filter(|folder| !folder.is_empty());
    let (ijbb, ijbc) = (folder(eval.ijbb), folder(eval.ijbc));
    let max_share = eval.max_share.unwrap_or(0.25);
    c.check(
        "eval.max_share",
        max_share,
        max_share > 0.0 && max_share <= 1.0,
        "in (0, 1]",
        "0.25 is the usual value",
    );
    let min_delta = eval.early_stop_min_delta.unwrap_or(0.0);
    c.check(
        "eval.early_stop_min_delta",
        min_delta,
        min_delta >= 0.0 && min_delta.is_finite(),
        "at least 0",
        "0.001 is a tenth of a percent of accuracy",
    );
    let sets: Vec<&str> = eval.val_targets.iter().map(|target| set_name(target)).collect();
    let benchmarks: Vec<&str> = IJB
        .into_iter()
        .zip([&ijbb, &ijbc])
        .filter_map(|(name, folder)| folder.as_ref().map(|_| name))
        .collect();
    let wanted = eval.best.filter(|text| !text.is_empty());
    let best = wanted
        .as_ref()
        .and_then(|text| match Metric::parse(text, &sets, &benchmarks) {
            Ok(metric) => Some(metric),
            Err((problem, hint)) => {
                c.fail("eval.best", problem, hint);
                None
            }
        });
    let patience = eval.early_stop_patience.unwrap_or(0);
    if patience > 0 && wanted.is_none() {
        c.fail(
            "eval.early_stop_patience",
            "does nothing without eval.best",
            "eval.best names what has to rise: \"mean.accuracy\"",
        );
    }
    if patience == 0 && min_delta > 0.0 {
        c.fail(
            "eval.early_stop_min_delta",
            "does nothing without eval.early_stop_patience",
            "",
        );
    }
    EvalSpec {
        every_steps: Some(eval.verbose.unwrap_or(2000)).filter(|steps| *steps > 0),
        val_targets: eval.val_targets,
        ijbb,
        ijbc,
        ijb_every: Some(eval.ijb_every.unwrap_or(1)).filter(|epochs| *epochs > 0),
        background: eval.background.unwrap_or(true),
        max_share,
        best,
        early_stop: (patience > 0).then_some(EarlyStop { patience, min_delta }),
    }
}

pub(super) fn to_wire(spec: &EvalSpec) -> v1::EvalSection {
    v1::EvalSection {
        verbose: Some(spec.every_steps.unwrap_or(0)),
        val_targets: spec.val_targets.clone(),
        ijbb: spec.ijbb.clone(),
        ijbc: spec.ijbc.clone(),
        ijb_every: Some(spec.ijb_every.unwrap_or(0)),
        background: Some(spec.background),
        max_share: Some(spec.max_share),
        best: spec.best.as_ref().map(ToString::to_string),
        early_stop_patience: Some(spec.early_stop.map_or(0, |stop| stop.patience)),
        early_stop_min_delta: Some(spec.early_stop.map_or(0.0, |stop| stop.min_delta)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(section: v1::EvalSection) -> (EvalSpec, Vec<String>) {
        let mut c = Checker::default();
        let spec = eval(&mut c, section);
        (spec, c.violations.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_section_survives_the_wire() {
        let section = v1::EvalSection {
            val_targets: vec!["lfw".into(), "/sets/own.bin".into()],
            ijbc: Some("/ijb".into()),
            ijb_every: Some(0),
            background: Some(false),
            max_share: Some(0.5),
            best: Some("ijbc".into()),
            early_stop_patience: Some(3),
            early_stop_min_delta: Some(0.01),
            ..Default::default()
        };
        for section in [section, v1::EvalSection::default()] {
            let (spec, none) = checked(section);
            assert!(none.is_empty(), "{none:?}");
            assert_eq!(checked(to_wire(&spec)), (spec, none));
        }
    }

    #[test]
    fn what_does_nothing_or_means_something_else_is_refused() {
        let (_, said) = checked(v1::EvalSection {
            val_targets: vec!["lfw".into(), "x/ijbc.bin".into(), "y/lfw.bin".into()],
            max_share: Some(0.0),
            best: Some("lfv".into()),
            early_stop_min_delta: Some(-1.0),
            ..Default::default()
        });
        assert_eq!(
            said,
            [
                "eval.val_targets[1]: \"x/ijbc.bin\" has the name of a benchmark that is no verification set",
                "eval.val_targets[2]: \"y/lfw.bin\" has the name of \"lfw\", \"lfw\"",
                "eval.max_share: 0 is not in (0, 1]",
                "eval.early_stop_min_delta: -1 is not at least 0",
                "eval.best: \"lfv\" is nothing that this job measures",
            ]
        );
        let (_, said) = checked(v1::EvalSection {
            early_stop_patience: Some(2),
            ..Default::default()
        });
        assert_eq!(said, ["eval.early_stop_patience: does nothing without eval.best"]);
        let (_, said) = checked(v1::EvalSection {
            early_stop_min_delta: Some(0.1),
            ..Default::default()
        });
        assert_eq!(
            said,
            ["eval.early_stop_min_delta: does nothing without eval.early_stop_patience"]
        );
    }
}
