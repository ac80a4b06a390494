//! The golden fill rule against the samples that describe it: every number bit for bit.

mod golden;

use arcface_worker::model::fill;
use tch::{Device, Kind, Tensor};

#[test]
fn fill_equals_the_samples_bit_for_bit() {
    let path = golden::root().join("fill_samples.json");
    if !path.exists() {
        return golden::report("fill samples", 0);
    }
    let samples = golden::read_json(&path);
    let samples = samples.as_array().expect("a list of samples");
    let units = unit_draws(&std::fs::read_to_string(&path).expect("the samples' text"));
    assert_eq!(units.len(), samples.len(), "every sample has its draws");
    for (sample, units) in samples.iter().zip(&units) {
        check(sample, units);
    }
    golden::report("fill samples", samples.len());
}

/// `u_first3` of every sample in order. Read from the text: the JSON reader may round a number's last bit.
fn unit_draws(text: &str) -> Vec<Vec<f64>> {
    let lists = text.split("\"u_first3\": [").skip(1);
    lists
        .map(|list| {
            let (numbers, _) = list.split_once(']').expect("the list's end");
            numbers
                .split(',')
                .map(|number| number.trim().parse().expect("a number"))
                .collect()
        })
        .collect()
}

fn check(sample: &serde_json::Value, units: &[f64]) {
    let name = sample["name"].as_str().expect("a name");
    let hash = fill::fnv1a64(name);
    assert_eq!(
        format!("{hash:016x}"),
        sample["fnv1a64"].as_str().expect("a hash"),
        "{name}: hash"
    );
    let ours: Vec<f64> = (0..units.len() as u64).map(|i| fill::unit(hash, i)).collect();
    assert_eq!(ours, units, "{name}: draws");
    let Some(category) = sample["category"].as_str() else {
        return;
    };
    let shape: Vec<i64> = numbers(&sample["shape"]).into_iter().map(|n| n as i64).collect();
    let kind = if name.ends_with("num_batches_tracked") {
        Kind::Int64
    } else {
        Kind::Float
    };
    let values = match category {
        "sym" => fill::symmetric(name, &shape),
        // A one-dimensional weight without a bias beside it is a PReLU's.
        _ => fill::value(
            name,
            &Tensor::empty(&shape, (kind, Device::Cpu)),
            category != "prelu",
        ),
    };
    // The values are f32: a last bit lost in f64 does not survive the rounding.
    let values: Vec<f32> = golden::values(&values).into_iter().map(|x| x as f32).collect();
    let first: Vec<f32> = numbers(&sample["value_first3"])
        .into_iter()
        .map(|x| x as f32)
        .collect();
    assert_eq!(values[..first.len()], first, "{name}: first values");
    let last = sample["value_last"].as_f64().expect("a last value") as f32;
    assert_eq!(values.last(), Some(&last), "{name}: last value");
}

fn numbers(value: &serde_json::Value) -> Vec<f64> {
    let list = value.as_array().expect("a list of numbers");
    list.iter().map(|n| n.as_f64().expect("a number")).collect()
}
