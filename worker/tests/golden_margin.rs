//! The margins give the reference's logits and gradients (`golden/pfc/margin*.safetensors`).

mod golden;

use arcface_proto::spec::MarginGradient;
use arcface_worker::head::margin::Margin;
use tch::Tensor;

/// Logits reach 64 and the reference takes them through arccos and cos in f32: a few roundings of 64 * 6e-8 each.
const LOGIT_TOLERANCE: f64 = 5e-5;
/// The derivative is a constant factor: one rounding of the product.
const GRADIENT_TOLERANCE: f64 = 1e-6;

/// A margin by the name of its case; `combined` says that the case asks for a margin that the reference ignores.
struct Case {
    margin: [f64; 3],
    scale: f64,
    filter: Option<f64>,
    combined: bool,
}

/// Reads a name such as `arcface_s64_m0.5`, `combined_cos_0.4_filt0.4` or `combined_m1_1_m2_0.3_m3_0.2`.
fn case_of(name: &str) -> Option<Case> {
    let (name, filter) = match name.split_once("_filt") {
        Some((name, threshold)) => (name, Some(threshold.parse().ok()?)),
        None => (name, None),
    };
    let case = |margin, scale, combined| {
        Some(Case {
            margin,
            scale,
            filter,
            combined,
        })
    };
    let scale_and_margin = |rest: &str| -> Option<(f64, f64)> {
        let (scale, margin) = rest.split_once("_m")?;
        Some((scale.parse().ok()?, margin.parse().ok()?))
    };
    if let Some(rest) = name.strip_prefix("arcface_s") {
        let (scale, m2) = scale_and_margin(rest)?;
        return case([1.0, m2, 0.0], scale, false);
    }
    if let Some(rest) = name.strip_prefix("cosface_s") {
        let (scale, m3) = scale_and_margin(rest)?;
        return case([1.0, 0.0, m3], scale, false);
    }
    let rest = name.strip_prefix("combined_")?;
    if let Some(m2) = rest.strip_prefix("arc_") {
        return case([1.0, m2.parse().ok()?, 0.0], 64.0, false);
    }
    if let Some(m3) = rest.strip_prefix("cos_") {
        return case([1.0, 0.0, m3.parse().ok()?], 64.0, false);
    }
    let (m1, rest) = rest.strip_prefix("m1_")?.split_once("_m2_")?;
    let (m2, m3) = rest.split_once("_m3_")?;
    case([m1.parse().ok()?, m2.parse().ok()?, m3.parse().ok()?], 64.0, true)
}

#[test]
fn margins_equal_the_reference() {
    let mut ran = 0;
    for path in golden::golden_files("pfc", "margin", ".safetensors") {
        let file = golden::read_safetensors(&path);
        let (cos, labels, cotangent) = (
            file.tensor("logits"),
            file.tensor("labels"),
            file.tensor("cotangent"),
        );
        for name in file.names().filter_map(|name| name.strip_suffix(".out")) {
            let case =
                case_of(name).unwrap_or_else(|| panic!("{}: case {name} is not known", path.display()));
            let golden = [
                file.tensor(&format!("{name}.out")),
                file.tensor(&format!("{name}.grad")),
            ];
            let run = |m: [f64; 3]| -> [Tensor; 2] {
                let out =
                    Margin::new(m, case.scale, MarginGradient::Reference, case.filter).apply(&cos, &labels);
                [out.logits, out.derivative * &cotangent]
            };
            let [_, _, m3] = case.margin;
            if case.combined {
                // The reference takes the CosFace branch whenever m3 > 0 and silently ignores m1 and m2. We do as
                // asked: its numbers are those of CosFace, ours are not.
                let asked = run(case.margin);
                assert!(golden::max_abs_difference(&asked[0], &golden[0]) > 0.1, "{name}");
            }
            let ours = run(if case.combined {
                [1.0, 0.0, m3]
            } else {
                case.margin
            });
            let differences = [0, 1].map(|i| golden::max_abs_difference(&ours[i], &golden[i]));
            assert!(
                differences[0] <= LOGIT_TOLERANCE,
                "{name}: logits differ by {}",
                differences[0]
            );
            let largest = golden[1].abs().max().double_value(&[]);
            assert!(
                differences[1] <= GRADIENT_TOLERANCE * largest,
                "{name}: gradients differ by {}",
                differences[1]
            );
            ran += 1;
        }
    }
    golden::report("margin", ran);
}
