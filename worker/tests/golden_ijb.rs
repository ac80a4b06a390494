//! IJB-B/C against the reference's numbers: every folder `ijb/*` of the golden folder, which has a benchmark's lists
//! (`IJBB/meta` or `IJBC/meta`), features of its images (`ijb.safetensors`) and what the reference makes of them.

mod golden;

use arcface_worker::{
    eval::ijb::{
        Benchmark, FARS, FeatureFile, Identification, Layout, Options, Protocol, Settings, identification,
        roc,
    },
    eval::ijb::{evaluate, report},
    tools::ijb::{IjbArgs, measure},
};
use clap::Parser;
use std::{fs, path::PathBuf};

/// Features of templates and their cosines: images are added in f32 in the reference's order on both sides, the rest is
/// f64, where only the order of sums differs.
const F64: f64 = 1e-12;
/// Scores of `ijb_evals.py` are kept in f32, and with N1 it divides by norms that were summed in f32.
const F32: f64 = 1e-6;
/// `ijb_1n.py` prints ten digits.
const PRINTED: f64 = 1e-10;
/// Rates are quotients of the same counts.
const RATE: f64 = 1e-15;

fn all_close(what: &str, tolerance: f64, ours: &[f64], golden: &[f64]) {
    assert_eq!(ours.len(), golden.len(), "{what}");
    for (index, (ours, golden)) in ours.iter().zip(golden).enumerate() {
        let difference = (ours - golden).abs();
        assert!(
            difference <= tolerance,
            "{what}[{index}]: {ours}, golden {golden}"
        );
    }
}

fn numbers(value: &serde_json::Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{value}: {error}"))
}

/// One golden folder.
struct Case {
    folder: PathBuf,
    protocol: &'static str,
    file: golden::GoldenFile,
    json: serde_json::Value,
}

impl Case {
    fn open(folder: PathBuf) -> Self {
        let (protocol, _) = Protocol::ALL
            .into_iter()
            .find(|(name, _)| folder.join(name.to_uppercase()).is_dir())
            .unwrap_or_else(|| panic!("{}: neither IJBB nor IJBC", folder.display()));
        Self {
            protocol,
            file: golden::read_safetensors(&folder.join("ijb.safetensors")),
            json: golden::read_json(&folder.join("ijb.json")),
            folder,
        }
    }

    fn name(&self, what: &str) -> String {
        format!("{} {what}", self.folder.display())
    }

    fn all() -> Vec<Self> {
        let folders = golden::golden_files("ijb", "", "");
        folders
            .into_iter()
            .filter(|path| path.is_dir())
            .map(Self::open)
            .collect()
    }

    fn benchmark(&self) -> Benchmark {
        let protocol = self.protocol.parse().expect("known");
        let layout = Layout::find(&self.folder, protocol).expect("a benchmark");
        Benchmark::open(layout, true).unwrap_or_else(|error| panic!("{error}"))
    }

    fn features(&self) -> FeatureFile {
        FeatureFile::open(&self.folder.join("ijb.safetensors")).unwrap_or_else(|error| panic!("{error}"))
    }
}

const OPTIONS: Options = Options {
    settings: Settings::REFERENCE,
    all_settings: true,
    repetitions: 20,
    seed: 1,
};

#[test]
fn templates_scores_and_rates_equal_the_references() {
    let cases = Case::all();
    for case in &cases {
        let (benchmark, features, file) = (case.benchmark(), case.features(), &case.file);
        let ids: Vec<f64> = benchmark.ids().ids().iter().map(|&id| id.into()).collect();
        assert_eq!(ids, file.values("template_ids"));
        let faceness: Vec<f64> = benchmark
            .images()
            .iter()
            .map(|image| image.faceness.into())
            .collect();
        assert_eq!(faceness, file.values("faceness"));

        let templates = benchmark.pool(&features, Settings::REFERENCE).expect("pooled");
        all_close(
            &case.name("templates"),
            F64,
            templates.values(),
            &file.values("template_feat_f64"),
        );
        let pairs = benchmark.pairs().expect("read");
        all_close(
            &case.name("scores"),
            F64,
            &templates.scores(&pairs),
            &file.values("score_f64"),
        );
        for settings in Settings::all() {
            let templates = benchmark.pool(&features, settings).expect("pooled");
            let name = format!("evals_score.{settings}");
            all_close(
                &case.name(&name),
                F32,
                &templates.scores(&pairs),
                &file.values(&name),
            );
        }

        let found = evaluate(&benchmark, &features, &OPTIONS, &mut |_| ()).expect("evaluated");
        let roc = &found.verification.roc;
        let rates: Vec<(f64, f64)> = roc
            .points
            .iter()
            .rev()
            .map(|&p: &roc::Point| roc.rates(p))
            .collect();
        let (fpr, tpr): (Vec<f64>, Vec<f64>) = rates.into_iter().unzip();
        all_close(&case.name("fpr"), RATE, &fpr, &file.values("roc_fpr_desc"));
        all_close(&case.name("tpr"), RATE, &tpr, &file.values("roc_tpr_desc"));
        assert_eq!(numbers(&case.json["fpr_points"]), FARS.map(|(_, far)| far));
        all_close(
            &case.name("tpr_at_fpr"),
            RATE,
            &found.verification.tpr,
            &numbers(&case.json["tpr_at_fpr"]),
        );
        all_close(
            &case.name("auc"),
            F64,
            &[roc.auc],
            &[case.json["roc_auc"].as_f64().expect("a number")],
        );
        let printed = found.verification.tpr.map(|tpr| format!("{:.2}", 100.0 * tpr));
        assert_eq!(case.json["table_row_percent"], serde_json::json!(printed));

        assert_eq!(found.all_settings.len(), 8);
        for of_setting in &found.all_settings {
            let name = of_setting.settings.to_string();
            let golden = &case.json["ijb_evals_1to1"][&name];
            let golden_tpr = numbers(&golden["tpr_at_fpr_1e-6_to_1e-1"]);
            all_close(&case.name(&name), RATE, &of_setting.tpr, &golden_tpr);
            let auc = golden["auc"].as_f64().expect("a number");
            all_close(&case.name(&name), F64, &[of_setting.roc.auc], &[auc]);
        }
    }
    golden::report("ijb 1:1", cases.len());
}

#[test]
fn searches_equal_the_references() {
    let cases = Case::all();
    for case in &cases {
        let found = evaluate(&case.benchmark(), &case.features(), &OPTIONS, &mut |_| ()).expect("evaluated");
        let found: &Identification = found.identification.as_ref().expect("lists of the 1:N protocol");
        let golden = &case.json["ijb_evals_1toN"];
        assert_eq!(golden["num_probe_templates"], found.probes);
        all_close(
            &case.name("fars"),
            1e-15,
            &identification::open_fars(),
            &case.file.values("evals1N.fars"),
        );
        for ((_, _, open), name) in found.galleries.iter().zip(["g1", "g2"]) {
            let hits = open.hits.map(|count| count as f64);
            all_close(
                name,
                0.0,
                &hits,
                &numbers(&golden[&format!("{name}_top1_5_10_counts")]),
            );
            let thresholds = open.thresholds.as_ref().expect("unmated probes");
            all_close(
                name,
                F64,
                thresholds,
                &case.file.values(&format!("evals1N.{name}_thresh")),
            );
            let tpir = open.tpir.as_ref().expect("mated probes");
            all_close(
                name,
                RATE,
                tpir,
                &case.file.values(&format!("evals1N.{name}_tpir")),
            );
        }
        let tpir = report::mean_tpir(found).expect("both galleries have both kinds");
        all_close("mean tpir", RATE, &tpir, &case.file.values("evals1N.mean_tpir"));
        all_close(
            "mean top",
            RATE,
            &report::mean_top(found),
            &numbers(&golden["mean_top1_5_10"]),
        );

        let golden = &case.json["ijb_1n"];
        let closed = found
            .joined
            .as_ref()
            .expect("every probe is in the galleries once");
        let golden_top = ["top1", "top5", "top10"].map(|name| golden[name].as_f64().expect("a number"));
        all_close("joined top", RATE, &closed.top, &golden_top);
        let dir = identification::CLOSED_FARS
            .iter()
            .zip(closed.dir)
            .map(|(&far, dir)| {
                let (rate, threshold) = dir.expect("enough wrong pairs");
                vec![far, rate, threshold]
            });
        let dir: Vec<f64> = dir.flatten().collect();
        let golden_dir: Vec<Vec<f64>> = serde_json::from_value(golden["dir_at_far"].clone()).expect("a list");
        all_close("DIR at FAR", PRINTED, &dir, &golden_dir.concat());
    }
    golden::report("ijb 1:N", cases.len());
}

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    args: IjbArgs,
}

#[test]
fn the_command_says_the_same_and_writes_a_report() {
    let cases = Case::all();
    for case in &cases {
        let folder = case.folder.display().to_string();
        let scratch = tempfile::tempdir().expect("scratch");
        let report = scratch.path().join("report");
        // The folder above the benchmark, and the benchmark itself.
        for root in [
            folder.clone(),
            format!("{folder}/{}", case.protocol.to_uppercase()),
        ] {
            let features = format!("{folder}/ijb.safetensors");
            let report = report.display().to_string();
            let words = [
                "ijb",
                "--features",
                &features,
                "--root",
                &root,
                "--protocol",
                case.protocol,
            ];
            let args =
                Cli::try_parse_from(words.into_iter().chain(["--report", &report, "--output", "json"]));
            let args = args.unwrap_or_else(|error| panic!("{error}")).args;
            let found = measure(&args).unwrap_or_else(|error| panic!("{error:#}"));
            let json = report::json(&found);
            for (value, (name, _)) in numbers(&case.json["tpr_at_fpr"]).iter().zip(FARS) {
                let ours = json["tpr_at_fpr"][name].as_f64().expect("a number");
                all_close(name, RATE, &[ours], &[*value]);
            }
            let auc = json["auc"].as_f64().expect("a number");
            all_close(
                "auc",
                F64,
                &[auc],
                &[case.json["roc_auc"].as_f64().expect("a number")],
            );
            assert_eq!(
                (&json["templates"], &json["pairs"]),
                (&case.json["templates"], &case.json["pairs"])
            );
        }
        let mut written: Vec<_> = fs::read_dir(&report)
            .expect("listed")
            .map(|entry| entry.expect("listed").file_name().into_string().expect("UTF-8"))
            .collect();
        written.sort();
        assert_eq!(
            written,
            [
                "det.png",
                "det.svg",
                "report.json",
                "roc.png",
                "roc.svg",
                "table.md"
            ]
        );
        let table = fs::read_to_string(report.join("table.md")).expect("read");
        for cell in case.json["table_row_percent"].as_array().expect("a list") {
            assert!(table.contains(cell.as_str().expect("a text")), "{cell}: {table}");
        }
        let json = golden::read_json(&report.join("report.json"));
        assert!(
            json["roc"]["fpr"]
                .as_array()
                .is_some_and(|points| points.len() > 1)
        );
    }
    golden::report("ijb command", cases.len());
}
