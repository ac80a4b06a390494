//! `eval.best`: the one number of an evaluation that says which weights are the best. More is better for all of them.

use crate::convert::nearest;
use crate::v1::Evaluation;
use std::{fmt, path::Path};

/// False accept rates of verification sets.
const SET_FARS: [&str; 4] = ["1e-1", "1e-2", "1e-3", "1e-4"];
/// False accept rates of IJB-B and IJB-C.
const IJB_FARS: [&str; 6] = ["1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6"];
/// Ranks of their 1:N protocol.
const RANKS: [&str; 3] = ["1", "5", "10"];
/// Name of the mean over the verification sets.
const MEAN: &str = "mean";

/// Whether an entry of `eval.val_targets` is the path of a file, rather than the name of one beside the training data.
pub fn is_set_path(target: &str) -> bool {
    target.contains('/') || target.ends_with(".bin")
}

/// Name of a verification set in `eval.val_targets`: `lfw` for `lfw` and for `/sets/lfw.bin`.
pub fn set_name(target: &str) -> &str {
    let stem = Path::new(target).file_stem().filter(|_| is_set_path(target));
    stem.and_then(|stem| stem.to_str()).unwrap_or(target)
}

/// A number that evaluations yield. Written `lfw.accuracy`, `mean.accuracy`, `ijbc.tar@1e-4`, `ijbb.rank-1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metric {
    name: String,
    /// Data sets that it is the mean of.
    of: Vec<String>,
    quantity: Quantity,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quantity {
    Accuracy,
    /// At a false accept rate.
    Tar(&'static str),
    Auc,
    /// Found among the best so many.
    Rank(&'static str),
}

impl Metric {
    /// Everything that a job measures: of its verification sets and their mean, and of the benchmarks `ijb`.
    pub fn all(sets: &[&str], ijb: &[&str]) -> Vec<Self> {
        let mut all = Vec::new();
        let mut add = |name: &str, of: &[&str], quantities: &[Quantity]| {
            all.extend(quantities.iter().map(|&quantity| Self {
                name: name.to_owned(),
                of: of.iter().map(|&set| set.to_owned()).collect(),
                quantity,
            }));
        };
        let of_set: Vec<Quantity> = [Quantity::Accuracy]
            .into_iter()
            .chain(SET_FARS.map(Quantity::Tar))
            .collect();
        for &set in sets {
            add(set, &[set], &of_set);
        }
        // A set of that name comes first and hides it.
        if !sets.is_empty() {
            add(MEAN, sets, &of_set);
        }
        let of_ijb: Vec<Quantity> = IJB_FARS
            .map(Quantity::Tar)
            .into_iter()
            .chain([Quantity::Auc])
            .chain(RANKS.map(Quantity::Rank))
            .collect();
        for &benchmark in ijb {
            add(benchmark, &[benchmark], &of_ijb);
        }
        all
    }

    /// Reads one of [`Metric::all`].
    ///
    /// # Errors
    /// What is wrong, and what to do.
    pub fn parse(text: &str, sets: &[&str], ijb: &[&str]) -> Result<Self, (String, String)> {
        let all = Self::all(sets, ijb);
        let found = all
            .iter()
            .find(|metric| metric.to_string() == text || (metric.name == text && metric.is_usual()));
        if let Some(metric) = found {
            return Ok(metric.clone());
        }
        let problem = format!("{text:?} is nothing that this job measures");
        let names: Vec<String> = all
            .iter()
            .map(ToString::to_string)
            .chain(all.iter().map(|metric| metric.name.clone()))
            .collect();
        let hint = match nearest(text, names.iter().map(String::as_str)) {
            _ if all.is_empty() => "eval.val_targets, eval.ijbb or eval.ijbc say what is measured".into(),
            Some(near) => format!("did you mean {near:?}?"),
            None => {
                let mut short: Vec<&str> = all.iter().map(|metric| metric.name.as_str()).collect();
                short.dedup();
                format!(
                    "one of {}, alone or with .accuracy, .tar@1e-3 and the like",
                    short.join(", ")
                )
            }
        };
        Err((problem, hint))
    }

    /// The one that a set's name alone stands for.
    fn is_usual(&self) -> bool {
        matches!(self.quantity, Quantity::Accuracy)
            || self.quantity == Quantity::Tar("1e-4") && self.name.starts_with("ijb")
    }

    /// Its value after the evaluations of one step; nothing if they do not tell it.
    pub fn value(&self, evaluations: &[Evaluation]) -> Option<f64> {
        let values: Option<Vec<f64>> = self
            .of
            .iter()
            .map(|name| {
                let found = evaluations.iter().find(|found| found.dataset == *name)?;
                self.quantity.of(found)
            })
            .collect();
        let values = values.filter(|values| !values.is_empty())?;
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        mean.is_finite().then_some(mean)
    }
}

impl Quantity {
    fn of(self, found: &Evaluation) -> Option<f64> {
        match self {
            Self::Accuracy => found.ijb.is_none().then_some(found.accuracy),
            Self::Tar(far) => found.tar_at_far.get(far).copied(),
            Self::Auc => found.ijb.as_ref().map(|ijb| ijb.auc),
            Self::Rank(rank) => found.ijb.as_ref()?.rank.get(rank).copied(),
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.name;
        match self.quantity {
            Quantity::Accuracy => write!(f, "{name}.accuracy"),
            Quantity::Tar(far) => write!(f, "{name}.tar@{far}"),
            Quantity::Auc => write!(f, "{name}.auc"),
            Quantity::Rank(rank) => write!(f, "{name}.rank-{rank}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::IjbNumbers;

    const SETS: [&str; 2] = ["lfw", "own.v2"];

    fn parse(text: &str) -> Result<Metric, (String, String)> {
        Metric::parse(text, &SETS, &["ijbc"])
    }

    #[test]
    fn names_of_sets_are_those_of_their_files() {
        let names = ["lfw", "/sets/lfw.bin", "cfp_fp.bin", "own.v2", "a/own.v2.bin"].map(set_name);
        assert_eq!(names, ["lfw", "lfw", "cfp_fp", "own.v2", "own.v2"]);
    }

    #[test]
    fn a_set_alone_stands_for_its_usual_number() {
        for (text, meant) in [
            ("lfw", "lfw.accuracy"),
            ("own.v2", "own.v2.accuracy"),
            ("own.v2.tar@1e-3", "own.v2.tar@1e-3"),
            ("mean", "mean.accuracy"),
            ("ijbc", "ijbc.tar@1e-4"),
            ("ijbc.rank-1", "ijbc.rank-1"),
            ("ijbc.auc", "ijbc.auc"),
        ] {
            let metric = parse(text).expect("valid");
            assert_eq!(metric.to_string(), meant);
            assert_eq!(parse(meant), Ok(metric));
        }
    }

    #[test]
    fn what_is_not_measured_is_refused_with_a_suggestion() {
        for (text, hint) in [
            ("lfww", "did you mean \"lfw\"?"),
            ("ijbc.tar@1e-7", "did you mean \"ijbc.tar@1e-"),
            ("lfw.accuracies", "did you mean \"lfw.accuracy\"?"),
            ("Z", "one of lfw, own.v2, mean, ijbc, alone or with"),
        ] {
            let (problem, found) = parse(text).expect_err("refused");
            assert!(problem.starts_with(&format!("{text:?} is nothing")), "{problem}");
            assert!(found.starts_with(hint), "{text}: {found}");
        }
        let (_, hint) = Metric::parse("lfw", &[], &[]).expect_err("refused");
        assert!(hint.starts_with("eval.val_targets"), "{hint}");
    }

    #[test]
    fn values_come_from_the_sets_that_they_are_of() {
        let set = |name: &str, accuracy| Evaluation {
            dataset: name.into(),
            accuracy,
            tar_at_far: [("1e-3".to_owned(), accuracy / 2.0)].into(),
            ..Default::default()
        };
        let ijb = Evaluation {
            dataset: "ijbc".into(),
            ijb: Some(IjbNumbers {
                auc: 0.75,
                ..Default::default()
            }),
            ..Default::default()
        };
        let all = [set("own.v2", 0.5), set("lfw", 1.0), ijb];
        let value = |text: &str| parse(text).expect("valid").value(&all);
        assert_eq!(value("lfw"), Some(1.0));
        assert_eq!(value("mean"), Some(0.75));
        assert_eq!(value("mean.tar@1e-3"), Some(0.375));
        assert_eq!(value("mean.tar@1e-2"), None);
        assert_eq!((value("ijbc.auc"), value("ijbc.rank-1")), (Some(0.75), None));
        let half = parse("mean").expect("valid").value(&all[..1]);
        assert_eq!(half, None, "a mean of half the sets is another number");
        assert_eq!(
            parse("own.v2").expect("valid").value(&[set("own.v2", f64::NAN)]),
            None
        );
    }
}
