//! Rates of sets compared all to all, for people and for programs. Only text and marks: where they go is the caller's
//! business.

use super::{Evaluation, Rate, tar};
use crate::eval::plot::{Axis, Chart, Curve};
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// A list of objects, one a set: sizes, `tar_at_far` ("1e-6" and the like to rates, null where the pairs are too few for
/// the rate) and `rates` with thresholds and counts.
pub fn json(found: &[Evaluation]) -> Value {
    found.iter().map(set_json).collect()
}

fn set_json(e: &Evaluation) -> Value {
    let tars = e.rates.iter().map(|rate| {
        let value = rate.point.map(|point| tar(e, &point));
        (rate.far.text.clone(), json!(value))
    });
    json!({
        "name": e.name,
        "images": e.images,
        "identities": e.identities,
        "genuine_pairs": e.genuine,
        "impostor_pairs": e.impostor,
        "tar_at_far": tars.collect::<Map<_, _>>(),
        "rates": e.rates.iter().map(|rate| rate_json(e, rate)).collect::<Vec<_>>(),
    })
}

fn rate_json(e: &Evaluation, rate: &Rate) -> Value {
    let point = rate.point.as_ref();
    json!({
        "far": rate.far.value,
        "place": rate.place,
        "tar": point.map(|p| tar(e, p)),
        // Its shortest decimal form, not that of the f64 next to it.
        "threshold": point.and_then(|p| p.threshold.to_string().parse::<f64>().ok()),
        "true_accepts": point.map(|p| p.true_accepts),
        "false_accepts": point.map(|p| p.false_accepts),
        "note": point.is_none().then(|| too_few(e, rate)),
    })
}

/// Why a rate is not there.
fn too_few(e: &Evaluation, rate: &Rate) -> String {
    format!(
        "FAR {} needs {:.0} pairs of different persons, {} has {}",
        rate.far.text,
        (1.0 / rate.far.value).ceil(),
        e.name,
        e.impostor
    )
}

/// The JSON with the points of the curve.
pub fn full_json(found: &[Evaluation]) -> Value {
    let sets = found.iter().map(|e| {
        let mut set = set_json(e);
        let (far, tar): (Vec<f64>, Vec<f64>) = e.curve.iter().copied().unzip();
        set["roc"] = json!({"far": far, "tar": tar});
        set
    });
    sets.collect()
}

fn percent(e: &Evaluation, rate: &Rate) -> String {
    let shown = |point| format!("{:.2}", 100.0 * tar(e, &point));
    rate.point.map_or("-".into(), shown)
}

/// The rates' names, which are those of every set.
fn fars(found: &[Evaluation]) -> Vec<&str> {
    let first = found.first().map(|e| e.rates.as_slice()).unwrap_or_default();
    first.iter().map(|rate| rate.far.text.as_str()).collect()
}

fn notes(found: &[Evaluation]) -> Vec<String> {
    let missing = |e: &Evaluation| -> Vec<String> {
        let rates = e.rates.iter().filter(|rate| rate.point.is_none());
        rates.map(|rate| too_few(e, rate)).collect()
    };
    found.iter().flat_map(missing).collect()
}

/// For a terminal; rates in percent.
pub fn table(found: &[Evaluation]) -> String {
    let names = found.iter().map(|e| e.name.chars().count());
    let width = names.max().unwrap_or(0).max(4);
    let mut out = format!(
        "{:<width$}  {:>9}  {:>10}  {:>13}  {:>15}",
        "SET", "IMAGES", "IDENTITIES", "GENUINE PAIRS", "IMPOSTOR PAIRS"
    );
    for far in fars(found) {
        write!(out, "  {:>10}", format!("TAR%@{far}")).expect("a String takes all");
    }
    for e in found {
        write!(
            out,
            "\n{:<width$}  {:>9}  {:>10}  {:>13}  {:>15}",
            e.name, e.images, e.identities, e.genuine, e.impostor
        )
        .expect("a String takes all");
        for rate in &e.rates {
            write!(out, "  {:>10}", percent(e, rate)).expect("a String takes all");
        }
    }
    for note in notes(found) {
        write!(out, "\n{note}").expect("a String takes all");
    }
    out.push('\n');
    out
}

/// The same in Markdown, with the thresholds.
pub fn markdown(found: &[Evaluation]) -> String {
    let fars = fars(found);
    let mut out = format!(
        "# All to all\n\n| set | images | identities | genuine pairs | impostor pairs | TAR % at FAR {} |\n|---|---|---|---|---|{}\n",
        fars.join(" | "),
        "---|".repeat(fars.len())
    );
    for e in found {
        let cell = |rate: &Rate| match rate.point {
            Some(point) => format!("{} (> {:.4})", percent(e, rate), point.threshold),
            None => "-".into(),
        };
        let cells: Vec<String> = e.rates.iter().map(cell).collect();
        writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} |",
            e.name,
            e.images,
            e.identities,
            e.genuine,
            e.impostor,
            cells.join(" | ")
        )
        .expect("a String takes all");
    }
    for note in notes(found) {
        write!(out, "\n- {note}").expect("a String takes all");
    }
    out
}

/// Receiver operating characteristics of all sets.
pub fn roc_chart(found: &[Evaluation]) -> Chart {
    // What is never wrong has no place on a logarithmic axis.
    let drawn = |e: &Evaluation| -> Vec<(f64, f64)> {
        e.curve.iter().copied().filter(|point| point.0 > 0.0).collect()
    };
    let curves: Vec<Curve> = found
        .iter()
        .map(|e| Curve {
            name: e.name.clone(),
            points: drawn(e),
            bars: Vec::new(),
        })
        .collect();
    let first = curves.iter().filter_map(|curve| curve.points.first());
    let lowest = first.map(|point| point.1).fold(1.0, f64::min);
    Chart {
        title: "All to all: ROC".into(),
        x: Axis::decades("False accept rate", -6, 0),
        y: Axis::linear(
            "True accept rate",
            (lowest * 10.0).floor().clamp(0.0, 9.0) / 10.0,
            1.0,
        ),
        curves,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Point;
    use super::*;

    #[test]
    fn every_form_shows_what_is_missing_and_why() {
        let point = Point {
            threshold: 0.1,
            true_accepts: 9,
            false_accepts: 4,
        };
        let rate = |far: &str, place, point| Rate {
            far: far.parse().unwrap(),
            place,
            point,
        };
        let found = [Evaluation {
            name: "children".into(),
            images: 100,
            identities: 20,
            genuine: 10,
            impostor: 5000,
            rates: vec![rate("1e-6", 0, None), rate("1e-3", 5, Some(point))],
            curve: vec![(0.0, 0.5), (0.5, 0.9), (1.0, 1.0)],
        }];
        assert_eq!(
            table(&found),
            "SET          IMAGES  IDENTITIES  GENUINE PAIRS   IMPOSTOR PAIRS   TAR%@1e-6   TAR%@1e-3\n\
             children        100          20             10             5000           -       90.00\n\
             FAR 1e-6 needs 1000000 pairs of different persons, children has 5000\n"
        );
        let json = full_json(&found);
        assert!(json[0]["tar_at_far"]["1e-6"].is_null());
        assert_eq!(json[0]["tar_at_far"]["1e-3"], 0.9);
        assert_eq!(json[0]["rates"][1]["threshold"], 0.1);
        assert_eq!(json[0]["roc"]["far"][1], 0.5);
        assert!(
            json[0]["rates"][0]["note"]
                .as_str()
                .unwrap()
                .contains("needs 1000000")
        );
        assert!(markdown(&found).contains("| children | 100 | 20 | 10 | 5000 | - | 90.00 (> 0.1000) |"));
        assert_eq!(roc_chart(&found).curves[0].points, [(0.5, 0.9), (1.0, 1.0)]);
    }
}
