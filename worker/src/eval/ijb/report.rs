//! An evaluation for people and for programs: JSON, text, a table as papers print it, charts. Only text and bytes: where
//! they go is the caller's business.

use super::{Evaluation, FARS, Identification, Tar, Verification, identification};
use crate::eval::plot::{Axis, Chart, Curve};
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// Rates of false alarms of the open searches that are printed; all are in the JSON.
const SHOWN: [(usize, &str); 5] = [(0, "1e-4"), (25, "1e-3"), (50, "1e-2"), (75, "1e-1"), (100, "1")];

/// `{tpr_at_fpr, auc, templates, pairs}` with the reference's numbers, and under further keys what it does not know:
/// `tar_at_far` (rates at the very false accept rate with their 95 % intervals), `identification` (1:N), `settings`.
pub fn json(evaluation: &Evaluation) -> Value {
    let e = evaluation;
    let tar = FARS
        .iter()
        .zip(&e.tar)
        .map(|((far, _), tar)| ((*far).to_owned(), tar_json(tar)));
    let mut out = json!({
        "tpr_at_fpr": tpr_json(&e.verification),
        "auc": e.verification.roc.auc,
        "templates": e.templates,
        "pairs": e.pairs,
        "protocol": e.protocol.to_string(),
        "setting": e.verification.settings.to_string(),
        "images": e.images,
        "genuine_pairs": e.verification.roc.genuine,
        "impostor_pairs": e.verification.roc.impostor,
        "subjects": e.subjects,
        "tar_at_far": tar.collect::<Map<_, _>>(),
        "bootstrap_repetitions": e.repetitions,
    });
    if !e.all_settings.is_empty() {
        let entry = |v: &Verification| {
            let numbers = json!({"tpr_at_fpr": tpr_json(v), "auc": v.roc.auc});
            (v.settings.to_string(), numbers)
        };
        out["settings"] = e.all_settings.iter().map(entry).collect::<Map<_, _>>().into();
    }
    if let Some(identification) = &e.identification {
        out["identification"] = identification_json(identification);
    }
    out
}

fn tpr_json(verification: &Verification) -> Value {
    let rates = FARS.iter().zip(verification.tpr);
    rates
        .map(|((far, _), tpr)| ((*far).to_owned(), json!(tpr)))
        .collect::<Map<_, _>>()
        .into()
}

fn tar_json(tar: &Tar) -> Value {
    json!({
        "tar": tar.tar,
        "low": tar.interval.map(|i| i.low),
        "high": tar.interval.map(|i| i.high),
        "false_accepts": tar.false_accepts,
    })
}

fn ranks(values: impl IntoIterator<Item = Value>) -> Value {
    let named = identification::RANKS.map(|rank| rank.to_string());
    named.into_iter().zip(values).collect::<Map<_, _>>().into()
}

fn identification_json(found: &Identification) -> Value {
    let galleries = found.galleries.iter().map(|(name, templates, open)| {
        json!({
            "name": name,
            "templates": templates,
            "mated_probes": open.mated,
            "unmated_probes": open.unmated,
            "top_counts": ranks(open.hits.map(Into::into)),
            "thresholds": open.thresholds,
            "tpir": open.tpir,
        })
    });
    let joined = match &found.joined {
        Ok(closed) => {
            let dir = identification::CLOSED_FARS
                .iter()
                .zip(closed.dir)
                .map(|(far, dir)| {
                    let entry = dir.map(|(rate, threshold)| json!({"rate": rate, "threshold": threshold}));
                    (far.to_string(), json!(entry))
                });
            json!({"top": ranks(closed.top.map(Into::into)), "dir_at_far": dir.collect::<Map<_, _>>()})
        }
        Err(why) => json!({"error": why}),
    };
    json!({
        "probes": found.probes,
        "top": ranks(mean_top(found).map(Into::into)),
        "far": found.fars,
        "tpir": mean_tpir(found),
        "galleries": galleries.collect::<Vec<_>>(),
        "joined": joined,
    })
}

/// Share of the searches that find their person, over both galleries. In the benchmarks every probe's person is in one of them; in
/// other lists a search for somebody of neither finds nothing, as in the reference, and one for somebody of both counts twice, where
/// the reference divides by the probes all the same and comes to 200 %.
pub fn mean_top(found: &Identification) -> [f64; 3] {
    let [(.., first), (.., second)] = &found.galleries;
    let searches = found.probes.max(first.mated + second.mated) as f64;
    std::array::from_fn(|rank| (first.hits[rank] + second.hits[rank]) as f64 / searches)
}

/// Mean of both galleries at each rate of false alarms.
pub fn mean_tpir(found: &Identification) -> Option<Vec<f64>> {
    let [(.., first), (.., second)] = &found.galleries;
    let both = first.tpir.as_ref()?.iter().zip(second.tpir.as_ref()?);
    Some(both.map(|(a, b)| (a + b) / 2.0).collect())
}

/// The JSON with the points of the curve as they are drawn.
pub fn full_json(evaluation: &Evaluation) -> Value {
    let mut out = json(evaluation);
    let (fpr, tpr): (Vec<f64>, Vec<f64>) = roc_points(evaluation).into_iter().unzip();
    out["roc"] = json!({"fpr": fpr, "tpr": tpr});
    out
}

fn percent(rate: f64) -> String {
    format!("{:.2}", 100.0 * rate)
}

/// The rows of the 1:1 table: a name, a rate at each of [`FARS`], the area.
fn rows(e: &Evaluation) -> Vec<(String, [String; 6], String)> {
    let reference = |v: &Verification| {
        let name = format!("{}, nearest FPR", v.settings);
        (name, v.tpr.map(percent), percent(v.roc.auc))
    };
    let at = |end: fn(&Tar) -> Option<f64>| {
        let cell = |tar: &Tar| end(tar).map_or("-".into(), percent);
        e.tar.each_ref().map(cell)
    };
    let mut rows = vec![
        reference(&e.verification),
        (
            format!("{}, at the FAR", e.verification.settings),
            at(|t| Some(t.tar)),
            "-".into(),
        ),
    ];
    if e.repetitions > 0 {
        rows.push(("95 % from".into(), at(|t| t.interval.map(|i| i.low)), "-".into()));
        rows.push(("95 % to".into(), at(|t| t.interval.map(|i| i.high)), "-".into()));
    }
    rows.extend(e.all_settings.iter().map(reference));
    rows
}

fn summary(e: &Evaluation) -> String {
    format!(
        "{}: {} templates of {} images; {} pairs, {} of the same person; {} persons",
        e.protocol, e.templates, e.images, e.pairs, e.verification.roc.genuine, e.subjects
    )
}

/// Lines on the 1:N protocol.
fn identification_lines(found: &Identification) -> Vec<String> {
    let top = |top: [f64; 3]| {
        let pairs = identification::RANKS.iter().zip(top);
        let texts: Vec<String> = pairs
            .map(|(rank, share)| format!("top-{rank} {}", percent(share)))
            .collect();
        texts.join(", ")
    };
    let mut lines = vec![format!(
        "1:N, {} probes, mean of both galleries: {}",
        found.probes,
        top(mean_top(found))
    )];
    match mean_tpir(found) {
        Some(tpir) => {
            let shown = SHOWN.map(|(index, far)| format!("{far}: {}", percent(tpir[index])));
            lines.push(format!(
                "TPIR at FPIR, mean of both galleries: {}",
                shown.join(", ")
            ));
        }
        None => lines.push("TPIR at FPIR: not defined, a gallery has no mated or no unmated probes".into()),
    }
    match &found.joined {
        Ok(closed) => {
            lines.push(format!("1:N, both galleries as one: {}", top(closed.top)));
            for (far, dir) in identification::CLOSED_FARS.iter().zip(closed.dir) {
                let text = dir.map_or("not defined, too few wrong pairs".into(), |(rate, threshold)| {
                    format!("{} (threshold {threshold:.4})", percent(rate))
                });
                lines.push(format!("DIR at FAR {far}: {text}"));
            }
        }
        Err(why) => lines.push(format!("1:N, both galleries as one: not defined, {why}")),
    }
    lines
}

/// For a terminal; rates in percent.
pub fn table(evaluation: &Evaluation) -> String {
    let rows = rows(evaluation);
    let width = rows.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
    let mut out = summary(evaluation) + "\n\n";
    let mut line = |name: &str, cells: [&str; 6], auc: &str| {
        write!(out, "{name:<width$}").expect("a String takes all");
        for cell in cells.into_iter().chain([auc]) {
            write!(out, "  {cell:>6}").expect("a String takes all");
        }
        out.push('\n');
    };
    line("TPR %", FARS.map(|(far, _)| far), "AUC");
    for (name, cells, auc) in &rows {
        line(name, cells.each_ref().map(String::as_str), auc);
    }
    if let Some(found) = &evaluation.identification {
        out.push('\n');
        out.push_str(&identification_lines(found).join("\n"));
        out.push('\n');
    }
    out
}

/// The table as papers print it, in Markdown.
pub fn markdown(evaluation: &Evaluation) -> String {
    let mut out = format!("# {}\n\n", summary(evaluation));
    let fars = FARS.map(|(far, _)| far).join(" | ");
    out.push_str(&format!(
        "| TPR % at FPR | {fars} | AUC |\n|---|{}\n",
        "---|".repeat(7)
    ));
    for (name, cells, auc) in rows(evaluation) {
        writeln!(out, "| {name} | {} | {auc} |", cells.join(" | ")).expect("a String takes all");
    }
    if let Some(found) = &evaluation.identification {
        let lines = identification_lines(found);
        write!(out, "\n- {}\n", lines.join("\n- ")).expect("a String takes all");
    }
    out
}

/// The curve from the lowest rate that is shown, without what is level or upright for less than can be seen.
fn roc_points(e: &Evaluation) -> Vec<(f64, f64)> {
    let roc = &e.verification.roc;
    let lowest = FARS[0].1;
    let mut points = vec![(lowest, e.tar[0].tar)];
    points.extend(
        roc.points
            .iter()
            .map(|&p| roc.rates(p))
            .filter(|&(fpr, _)| fpr > lowest),
    );
    points
}

/// Receiver operating characteristic, with the intervals as bars.
pub fn roc_chart(evaluation: &Evaluation) -> Chart {
    let e = evaluation;
    let points = roc_points(e);
    let bars: Vec<(f64, f64, f64)> = FARS
        .iter()
        .zip(&e.tar)
        .filter_map(|((_, far), tar)| tar.interval.map(|i| (*far, i.low, i.high)))
        .collect();
    let lowest = bars
        .iter()
        .map(|bar| bar.1)
        .chain([points[0].1])
        .fold(1.0, f64::min);
    Chart {
        title: format!("{} ROC", e.protocol),
        x: Axis::decades("False accept rate", -6, 0),
        // A whole tenth, and never so high that nothing is below.
        y: Axis::linear(
            "True accept rate",
            (lowest * 10.0).floor().clamp(0.0, 9.0) / 10.0,
            1.0,
        ),
        curves: vec![Curve {
            name: format!("{} (AUC {:.4})", e.verification.settings, e.verification.roc.auc),
            points,
            bars,
        }],
    }
}

/// Detection error tradeoff: both kinds of errors on logarithmic axes.
pub fn det_chart(evaluation: &Evaluation) -> Chart {
    let e = evaluation;
    let lowest = 1.0 / e.verification.roc.genuine as f64;
    let power = (lowest.log10().floor() as i32).clamp(-6, -1);
    let misses = |(fpr, tpr): (f64, f64)| (fpr, 1.0 - tpr);
    // Where nothing is missed any more, a logarithm ends.
    let shown = |&(_, miss): &(f64, f64)| miss >= lowest * 0.5;
    Chart {
        title: format!("{} DET", e.protocol),
        x: Axis::decades("False accept rate", -6, 0),
        y: Axis::decades("False reject rate", power, 0),
        curves: vec![Curve {
            name: e.verification.settings.to_string(),
            points: roc_points(e).into_iter().map(misses).take_while(shown).collect(),
            bars: Vec::new(),
        }],
    }
}

#[cfg(test)]
mod tests {
    use super::super::identification::OpenSet;
    use super::*;

    fn found(probes: usize, mated: [usize; 2], hits: [usize; 2]) -> Identification {
        let gallery = |index: usize| {
            let open = OpenSet {
                mated: mated[index],
                unmated: probes - mated[index],
                hits: [hits[index]; 3],
                thresholds: None,
                tpir: None,
            };
            ("G", 1, open)
        };
        Identification {
            probes,
            fars: Vec::new(),
            galleries: [gallery(0), gallery(1)],
            joined: Err("not of interest".into()),
        }
    }

    /// Divided by the probes it was 200 % where every person was in both galleries.
    #[test]
    fn what_is_searched_for_in_both_galleries_counts_twice() {
        for (probes, mated, hits, share) in [
            // As in the benchmarks: each probe's person is in one of them.
            (10, [6, 4], [3, 4], 0.7),
            (10, [10, 10], [10, 10], 1.0),
            (10, [10, 4], [10, 0], 10.0 / 14.0),
            // Strangers are not found.
            (10, [4, 0], [2, 0], 0.2),
            (10, [0, 0], [0, 0], 0.0),
        ] {
            assert_eq!(mean_top(&found(probes, mated, hits)), [share; 3], "{mated:?}");
        }
    }
}
