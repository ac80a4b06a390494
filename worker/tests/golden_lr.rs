//! The schedule gives the reference's learning rates bit for bit (`golden/lr`).

mod golden;

use arcface_worker::optim::schedule::PolyWarmup;

#[test]
fn schedule_equals_the_reference() {
    let mut ran = 0;
    for path in golden::golden_files("lr", "", ".json") {
        let file = golden::read_json(&path);
        let cases = file["cases"].as_array().expect("a list of cases");
        let text = std::fs::read_to_string(&path).expect("read the file again");
        for (key, divisor) in [("lr", 1.0), ("lr_group2_base_div3", 3.0)] {
            let golden = exact_lists(&text, key);
            assert_eq!(golden.len(), cases.len(), "{}: lists {key}", path.display());
            for (case, golden) in cases.iter().zip(golden) {
                let number = |key: &str| case[key].as_f64().unwrap_or_else(|| panic!("{key} of {case}"));
                let steps = |key: &str| case[key].as_u64().unwrap_or_else(|| panic!("{key} of {case}"));
                let schedule = PolyWarmup::with_power(
                    number("base_lr") / divisor,
                    steps("warmup_iters"),
                    steps("total_iters"),
                    number("power"),
                );
                let ours: Vec<f64> = (0..golden.len() as u64).map(|step| schedule.lr(step)).collect();
                assert_eq!(ours, golden, "{key} of {case}");
            }
        }
        ran += cases.len();
    }
    golden::report("lr", ran);
}

/// Every list `"key": [numbers]` of a JSON text, correctly rounded: serde_json may miss the last bit.
fn exact_lists(text: &str, key: &str) -> Vec<Vec<f64>> {
    let quoted = format!("\"{key}\"");
    let lists = text.split(&quoted).skip(1).map(|rest| {
        let (_, rest) = rest.split_once('[').expect("a list");
        let (numbers, _) = rest.split_once(']').expect("the list's end");
        numbers
            .split(',')
            .map(|number| number.trim().parse().expect("a number"))
            .collect()
    });
    lists.collect()
}
