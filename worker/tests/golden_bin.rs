//! Verification sets as Python wrote them: every `data/bin_*/*.bin`, and the real `data/small_lfw.bin`.

mod golden;

use arcface_proto::spec::Precision;
use arcface_worker::{
    eval::{VerificationSet, verification},
    model::{Backbone, BackboneConfig, ForwardMode},
};
use std::{cell::RefCell, path::Path};
use tch::{Kind, Tensor};

/// Decoded images of a set, `[2n, 3, 112, 112]` in 0..255, taken from what a network would see.
fn pixels(set: &VerificationSet) -> Tensor {
    let seen = RefCell::new(Vec::new());
    let mut embed = |images: &Tensor| {
        seen.borrow_mut().push(images.shallow_clone());
        Ok(Tensor::ones(
            [images.size()[0], 4],
            (Kind::Float, tch::Device::Cpu),
        ))
    };
    // Two calls a batch, the second with the mirrored images.
    verification::embed_set(set, 0..set.len(), set.len(), &mut embed).expect("decoded");
    let seen = seen.into_inner();
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[0].flip([3]), seen[1]);
    (seen[0].to_kind(Kind::Double) * 0.5 + 0.5) * 255.0
}

fn flags(json: &serde_json::Value) -> Vec<bool> {
    serde_json::from_value(json.clone()).expect("a list of flags")
}

#[test]
fn every_pickle_protocol_holds_the_same_set() {
    let mut count = 0;
    for expected in golden::golden_files("data", "bin_", "") {
        if !expected.is_dir() {
            continue;
        }
        let folder = format!(
            "data/{}",
            expected.file_name().and_then(|n| n.to_str()).expect("a name")
        );
        let golden_set = golden::read_safetensors(&expected.join("expected.safetensors"));
        let issame: Vec<bool> = golden_set
            .values("issame")
            .iter()
            .map(|&flag| flag != 0.0)
            .collect();
        let golden_pixels = golden_set.tensor("pixels_rgb").permute([0, 3, 1, 2]);
        for path in golden::golden_files(&folder, "", ".bin") {
            let set = VerificationSet::open(&path).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(set.issame(), issame, "{}", path.display());
            let pixels = pixels(&set);
            // Whole levels: what remains is the rounding of the normalisation.
            let difference = golden::max_abs_difference(&pixels, &golden_pixels);
            assert!(difference <= 1e-4, "{}: {difference} grey levels", path.display());
            count += 1;
        }
    }
    golden::report("verification sets", count);
}

#[test]
fn a_real_set_of_numpy_arrays_is_read() {
    let files = golden::golden_files("data", "small_lfw", ".bin");
    for path in &files {
        let expected = golden::read_json(&path.with_extension("json"));
        let set = VerificationSet::open(path).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(set.issame(), flags(&expected["issame"]));
        assert_eq!(set.pairs() as u64, expected["pairs"].as_u64().expect("a count"));
        let sums = pixels(&set)
            .round()
            .sum_dim_intlist([1i64, 2, 3].as_slice(), false, Kind::Double);
        let golden_sums: Vec<f64> =
            serde_json::from_value(expected["decoded_rgb_sum"].clone()).expect("a list of sums");
        for (index, (ours, golden)) in golden::values(&sums).iter().zip(&golden_sums).enumerate() {
            assert_eq!(ours, golden, "image {index}: sum of all values");
        }
        assert_eq!(golden_sums.len(), set.len());
    }
    golden::report("real verification sets", files.len());
}

#[test]
fn mutated_files_are_read_or_refused() {
    let files = golden::golden_files("data/bin_A", "", ".bin");
    for path in &files {
        let bytes = std::fs::read(path).expect("a golden file");
        for round in 0..200u64 {
            let mut bytes = bytes.clone();
            let draw =
                |what| arcface_worker::random::bits(round, arcface_worker::random::Purpose::Flip, what, 0);
            // Half of the changes near the pickle's own operations, which are few among the images' bytes.
            let at = draw(0) as usize % if round % 2 == 0 { 64 } else { bytes.len() };
            bytes[at] = draw(1) as u8;
            if round % 5 == 0 {
                bytes.truncate(draw(2) as usize % bytes.len());
            }
            if let Ok(set) = VerificationSet::parse(Path::new("mutated.bin"), &bytes) {
                assert_eq!(set.len(), 2 * set.pairs());
            }
        }
    }
    golden::report("mutated verification sets", files.len());
}

/// As for the networks alone: the pixels are equal, f32 sums in another order are not (about 1e-6).
const EMBEDDING_TOLERANCE: f64 = 1e-4;

#[test]
fn a_real_set_gives_the_golden_embeddings() {
    let files = golden::golden_files("data", "small_lfw_", "_embeddings.safetensors");
    for path in &files {
        let file = golden::read_safetensors(path);
        let set = VerificationSet::open(&golden::root().join("data").join(&file.metadata["source"]));
        let set = set.unwrap_or_else(|error| panic!("{error}"));
        let expected = file.tensor("emb");
        let dim = expected.size()[1];
        let mut backbone =
            Backbone::new(&BackboneConfig::new(file.metadata["network"].as_str(), dim)).expect("known");
        backbone.fill_golden();
        let mode = ForwardMode::evaluation(Precision::Fp32);
        let mut embed = |images: &Tensor| Ok(tch::no_grad(|| backbone.forward(images, &mode)));
        let found = verification::embed_set(&set, 0..set.len(), 8, &mut embed).expect("embedded");
        for (name, ours) in [("emb", &found.emb), ("emb_flip", &found.emb_flip)] {
            let ours = Tensor::from_slice(ours).view([-1, dim]);
            let distance = golden::relative_l2(&ours, &file.tensor(name));
            println!("{}: {name} differs by {distance:.2e}", path.display());
            assert!(
                distance <= EMBEDDING_TOLERANCE,
                "{}: {name}: {distance}",
                path.display()
            );
        }
        // Rows differ more from each other than from their golden values: none is swapped.
        let norm = |x: Tensor| &x / x.norm_scalaropt_dim(2.0, [1i64].as_slice(), true);
        let similarity = norm(Tensor::from_slice(&found.emb).view([-1, dim])).matmul(&norm(expected).tr());
        let diagonal = similarity.diagonal(0, 0, 1).min().double_value(&[]);
        assert!(
            diagonal > 0.999,
            "{}: least similarity {diagonal}",
            path.display()
        );
    }
    golden::report("embeddings of a real set", files.len());
}
