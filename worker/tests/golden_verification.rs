//! Verification metrics against the reference's: every `verification/*.safetensors` of the golden folder.

mod golden;

use arcface_worker::{
    eval::{
        metrics::{self, ACCURACY_GRID, FAR_GRID},
        verification,
    },
    tools::{
        output::Output,
        place::PlaceArgs,
        verify::{VerifyArgs, measure},
    },
};

/// Both compute in f64 and count the same pairs: only the order of sums differs.
const TOLERANCE: f64 = 1e-12;

fn close(what: &str, ours: f64, golden: f64) {
    assert!(
        (ours - golden).abs() <= TOLERANCE * golden.abs().max(1.0),
        "{what}: {ours}, golden {golden}"
    );
}

fn all_close(what: &str, ours: &[f64], golden: &[f64]) {
    assert_eq!(ours.len(), golden.len(), "{what}");
    for (index, (ours, golden)) in ours.iter().zip(golden).enumerate() {
        close(&format!("{what}[{index}]"), *ours, *golden);
    }
}

#[test]
fn metrics_equal_the_references() {
    let files = golden::golden_files("verification", "", ".safetensors");
    for path in &files {
        let file = golden::read_safetensors(path);
        let (emb, emb_flip) = (file.values("emb"), file.values("emb_flip"));
        let dim = file.tensor("emb").size()[1] as usize;
        let issame: Vec<bool> = file.values("issame").iter().map(|&flag| flag != 0.0).collect();

        let distances = metrics::pair_distances(&emb, &emb_flip, dim).expect("finite embeddings");
        all_close("distances", &distances, &file.values("dist_f64"));
        for (grid, count) in [(ACCURACY_GRID, 400), (FAR_GRID, 4000)] {
            let roc = metrics::roc(&distances, &issame, grid).expect("enough pairs");
            let folds = if count == 400 {
                "accuracy_folds"
            } else {
                "accuracy_folds_4000"
            };
            all_close(folds, &roc.accuracy, &file.values(folds));
            all_close("tpr", &roc.tpr, &file.values(&format!("tpr_{count}")));
            all_close("fpr", &roc.fpr, &file.values(&format!("fpr_{count}")));
        }

        let summary = file.values("summary[acc,std,val,val_std,far,xnorm]");
        let ours = verification::score("golden", &emb, &emb_flip, dim, &issame).expect("measured");
        close("accuracy", ours.accuracy, summary[0]);
        close("accuracy_std", ours.accuracy_std, summary[1]);
        close("xnorm", ours.xnorm, summary[5]);

        let by_target = file.meta("val_valstd_far_at_far_target");
        let by_target = by_target.as_object().expect("an object by target");
        for (target, golden) in by_target {
            let far: f64 = target.parse().expect("a number");
            let found = metrics::tar_at_far(&distances, &issame, &[far]).expect("enough pairs");
            let found = found.expect("folds with both kinds of pairs")[0];
            let golden: Vec<f64> = serde_json::from_value(golden.clone()).expect("three numbers");
            all_close(target, &[found.tar, found.tar_std, found.far], &golden);
        }
        assert!(!by_target.is_empty(), "{}: no FAR target", path.display());
        let at_default = ours.tar_at_far.expect("folds with both kinds of pairs");
        let at_default = at_default
            .iter()
            .find(|(far, _)| *far == "1e-3")
            .expect("1e-3 is reported");
        close("TAR at 1e-3", at_default.1, summary[2]);

        // The command reads the same tensors from the file and must say the same.
        let command = measure(&VerifyArgs {
            bins: Vec::new(),
            network: None,
            weights: None,
            embeddings: Some(path.clone()),
            batch: 64,
            place: PlaceArgs::default(),
            output: Output::Json,
        });
        let command = command.unwrap_or_else(|error| panic!("{error:#}"));
        assert_eq!(command.len(), 1);
        close("accuracy of the command", command[0].accuracy, ours.accuracy);
        close("xnorm of the command", command[0].xnorm, ours.xnorm);
        assert_eq!(command[0].pairs, issame.len());
    }
    golden::report("verification", files.len());
}
