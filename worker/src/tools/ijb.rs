//! `arcface-worker ijb`: 1:1 and 1:N numbers of IJB-B or IJB-C, of features that something else computed or of a
//! network.

use super::{output::Output, place::PlaceArgs};
use crate::{
    eval::{
        ijb::{
            Benchmark, Evaluation, FeatureFile, IjbError, ImageFeatures, Layout, Options, Phase, Protocol,
            Settings, embed::embed_images, evaluate, features::MemoryFeatures, report,
        },
        plot::{raster, svg},
    },
    export::{atomic, safetensors},
};
use anyhow::Context;
use arcface_proto::{
    failure::{ExitCode, Failure},
    spec::Precision,
};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};
use tch::Tensor;

/// Arguments of `ijb`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    arcface-worker ijb --network r50 --weights model.safetensors --root /data/IJB_release --protocol ijbc --report ijbc_r50\n  \
    arcface-worker ijb --features features.safetensors --root /data/IJB_release --protocol ijbc --all-settings\n  \
    arcface-worker ijb --features features.safetensors --root /data/IJB_release/IJBB --protocol ijbb --output json\n\n\
    Without further flags the numbers are those of the reference's eval_ijbc.py with N1 D1 F1, which its ijb_evals.py \
    calls N0 D1 F1: the two programs mean opposite things by N. Settings are named here as ijb_evals.py names them.")]
pub struct IjbArgs {
    /// Network that the weights belong to; `arcface-worker networks` lists them.
    #[arg(long, required_unless_present = "features")]
    pub network: Option<String>,
    /// Weights: .safetensors, or a PyTorch state_dict (.pth, .pt).
    #[arg(long, value_name = "FILE", required_unless_present = "features")]
    pub weights: Option<PathBuf>,
    /// Features of the images, instead of a network: a .safetensors file with `feat` and `feat_flip` [images, D], in the
    /// order of meta/*_name_5pts_score.txt.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["network", "weights"])]
    pub features: Option<PathBuf>,
    /// Keep the network's features in a file, for --features.
    #[arg(long, value_name = "FILE", conflicts_with = "features")]
    pub save_features: Option<PathBuf>,
    /// Images embedded at a time.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: u32,
    /// Where the network computes.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Folder that holds IJBB or IJBC, or one of these itself.
    #[arg(long, value_name = "DIR")]
    pub root: PathBuf,
    /// Which benchmark: ijbb or ijbc.
    #[arg(long)]
    pub protocol: Protocol,
    /// Bring the feature of every image to length 1 (N1 of ijb_evals.py, N0 of eval_ijbc.py).
    #[arg(long)]
    pub normalize: bool,
    /// Do not weigh images by the score of the face detector (D0).
    #[arg(long)]
    pub no_detector_score: bool,
    /// Leave mirror images out (F0).
    #[arg(long)]
    pub no_flip: bool,
    /// Also print the 1:1 numbers of all eight settings N{0,1}D{0,1}F{0,1}.
    #[arg(long)]
    pub all_settings: bool,
    /// Leave 1:N out; otherwise it is measured when the lists of galleries and probes are there.
    #[arg(long)]
    pub no_identification: bool,
    /// Repetitions with persons drawn anew, for the 95 % intervals; 0 leaves the intervals out.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub bootstrap: u32,
    /// Seed of these draws.
    #[arg(long, default_value_t = 2048)]
    pub seed: u64,
    /// Write report.json, table.md, and the ROC and DET curves as SVG and PNG into this folder.
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
    /// How to print the results.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

impl IjbArgs {
    fn options(&self) -> Options {
        Options {
            settings: Settings {
                normalize: self.normalize,
                detector_score: !self.no_detector_score,
                flip: !self.no_flip,
            },
            all_settings: self.all_settings,
            repetitions: self.bootstrap,
            seed: self.seed,
        }
    }
}

/// Runs `ijb`.
pub fn run(args: IjbArgs) -> anyhow::Result<()> {
    let found = measure(&args)?;
    let text = match args.output {
        Output::Table => report::table(&found),
        Output::Json => format!("{:#}\n", report::json(&found)),
    };
    io::stdout()
        .write_all(text.as_bytes())
        .context("write the results")
}

/// Measures, and writes the report if there is to be one.
pub fn measure(args: &IjbArgs) -> anyhow::Result<Evaluation> {
    if let Some(folder) = &args.report {
        // Before the work: a folder that cannot be made should not cost its time.
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let benchmark = Layout::find(&args.root, args.protocol)
        .and_then(|layout| Benchmark::open(layout, !args.no_identification))
        .map_err(|error| match args.protocol.meant_instead(&args.root) {
            Some(other) => failure(error).hint(format!("the folder has the lists of --protocol {other}")),
            None => failure(error),
        })?;
    let features: Box<dyn ImageFeatures> = match (&args.features, &args.network, &args.weights) {
        (Some(path), ..) => Box::new(open_features(path, &benchmark, args.options().settings.flip)?),
        (None, Some(network), Some(weights)) => Box::new(embed(args, &benchmark, network, weights)?),
        _ => {
            let message = "ijb needs --network and --weights, or --features";
            return Err(Failure::new(ExitCode::Usage, message).into());
        }
    };
    // Shown on a terminal only.
    let spinner = ProgressBar::new_spinner();
    spinner.enable_steady_tick(Duration::from_millis(200));
    let mut begin = |phase: Phase| spinner.set_message(phase.name());
    let found = evaluate(&benchmark, &*features, &args.options(), &mut begin).map_err(failure)?;
    spinner.finish_and_clear();
    if let Some(folder) = &args.report {
        write_report(folder, &found)?;
    }
    Ok(found)
}

/// The features that a network gives for the images.
fn embed(
    args: &IjbArgs,
    benchmark: &Benchmark,
    network: &str,
    weights: &Path,
) -> anyhow::Result<MemoryFeatures> {
    // A bad list of pairs should not cost the time of embedding.
    benchmark.pairs().map_err(failure)?;
    let network = args.place.open_network(weights, network, Precision::Fp32)?;
    let flip = args.options().settings.flip || args.all_settings || args.save_features.is_some();
    let passes = if flip { 2 } else { 1 };
    // Shown on a terminal only.
    let bar = ProgressBar::new(passes * benchmark.images().len() as u64);
    let style = "embed {wide_bar} {pos}/{len} images, {eta} left";
    bar.set_style(ProgressStyle::with_template(style).context("progress bar")?);
    let mut embed = |images: &Tensor| {
        let embedding = network.embed(images);
        bar.inc(images.size()[0] as u64);
        Ok(embedding)
    };
    let all = 0..benchmark.images().len();
    let features = embed_images(benchmark, all, args.batch as usize, flip, &mut embed).map_err(failure)?;
    bar.finish_and_clear();
    if let Some(path) = &args.save_features {
        let shape = [-1, features.dim as i64];
        let matrix = |values: &[f32]| Tensor::from_slice(values).view(shape);
        let (feat, feat_flip) = (matrix(&features.feat), matrix(&features.feat_flip));
        safetensors::write(path, [("feat", &feat), ("feat_flip", &feat_flip)]).map_err(Failure::from)?;
    }
    Ok(features)
}

/// Features that fit the list of images.
fn open_features(path: &Path, benchmark: &Benchmark, flip: bool) -> Result<FeatureFile, Failure> {
    let features = FeatureFile::open(path).map_err(failure)?;
    let images = benchmark.images().len();
    let list = benchmark.layout().images();
    let refuse = |detail: String, hint: &str| {
        Err(Failure::new(ExitCode::Failed, format!("{}: {detail}", path.display())).hint(hint))
    };
    if features.images() != images {
        return refuse(
            format!(
                "has features of {} images, {} lists {images}",
                features.images(),
                list.display()
            ),
            "the file needs one row per line of the list, in its order",
        );
    }
    if flip && !features.has_flip() {
        return refuse(
            "no tensor feat_flip".into(),
            "--no-flip measures without the mirror images",
        );
    }
    Ok(features)
}

fn write_report(folder: &Path, found: &Evaluation) -> anyhow::Result<()> {
    let mut files = vec![
        (
            "report.json",
            format!("{:#}\n", report::full_json(found)).into_bytes(),
        ),
        ("table.md", report::markdown(found).into_bytes()),
    ];
    let [roc, det] = [report::roc_chart(found), report::det_chart(found)];
    for (chart, vector, picture) in [(roc, "roc.svg", "roc.png"), (det, "det.svg", "det.png")] {
        files.push((vector, svg::draw(&chart).into_bytes()));
        files.push((
            picture,
            raster::png(&chart).map_err(anyhow::Error::msg).context(picture)?,
        ));
    }
    for (name, bytes) in files {
        atomic::write(&folder.join(name), |file| file.write_all(&bytes)).map_err(Failure::from)?;
    }
    Ok(())
}

/// What to tell the user, and the exit code.
fn failure(error: IjbError) -> Failure {
    let code = match &error {
        IjbError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => ExitCode::NotFound,
        _ => ExitCode::Failed,
    };
    let hint = match &error {
        IjbError::Io { path, .. }
            if code == ExitCode::NotFound && path.to_string_lossy().contains("_1N_") =>
        {
            "--no-identification measures 1:1 alone"
        }
        IjbError::Io { .. } if code == ExitCode::NotFound => {
            "the folder needs IJBC/meta/ijbc_*.txt (or IJBB/meta/ijbb_*.txt) as released with InsightFace's evaluation"
        }
        IjbError::Line { path, .. } if path.extension().is_some_and(|ending| ending == "csv") => {
            "--no-identification measures 1:1 alone"
        }
        IjbError::Line { path, .. } | IjbError::File { path, .. }
            if path.parent().is_some_and(|folder| folder.ends_with("meta")) =>
        {
            "the lists belong together: take all files of meta/ from one release of the benchmark"
        }
        IjbError::NotFinite { .. } => "the weights are damaged, or training diverged",
        _ => "",
    };
    Failure::new(code, error.to_string()).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        eval::ijb::synthetic::{self, Sizes},
        model::{Backbone, BackboneConfig},
    };
    use arcface_proto::failure::report as report_failure;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: IjbArgs,
    }

    fn parse(words: &[&str]) -> Result<IjbArgs, clap::Error> {
        Cli::try_parse_from(words).map(|cli| cli.args)
    }

    const SIZES: Sizes = Sizes {
        images: 40,
        templates: 12,
        pairs: 100,
        dim: 32,
        seed: 1,
    };

    #[test]
    fn a_network_is_measured_and_its_features_measure_the_same() {
        let dir = tempfile::tempdir().expect("scratch");
        synthetic::write(dir.path(), &SIZES).expect("written");
        let crops = dir.path().join("IJBC/loose_crop");
        fs::create_dir(&crops).expect("made");
        for image in 1..=SIZES.images {
            let picture = image::RgbImage::from_fn(120, 120, |x, y| {
                image::Rgb([x as u8, (y * image) as u8, image as u8])
            });
            picture
                .save_with_format(crops.join(format!("{image}.jpg")), image::ImageFormat::Png)
                .expect("saved");
        }
        let mut backbone = Backbone::new(&BackboneConfig::new("tiny", 32)).expect("known");
        backbone.fill_golden();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let (weights, features, root) = (path("w.safetensors"), path("kept.safetensors"), path(""));
        let state = backbone
            .state()
            .iter()
            .map(|entry| (entry.name.as_str(), &entry.tensor));
        safetensors::write(Path::new(&weights), state).expect("written");

        let common = ["ijb", "--root", &root, "--protocol", "ijbc", "--bootstrap", "0"];
        let network = [
            "--network",
            "tiny",
            "--weights",
            &weights,
            "--save-features",
            &features,
            "--batch",
            "7",
        ];
        let from_network =
            measure(&parse(&[&common[..], &network].concat()).expect("valid")).expect("measured");
        let kept = ["--features", &features];
        let from_file = measure(&parse(&[&common[..], &kept].concat()).expect("valid")).expect("measured");
        assert_eq!(report::json(&from_network), report::json(&from_file));
        assert!(from_network.tar[0].interval.is_none() && from_network.identification.is_some());
    }

    #[test]
    fn bad_input_is_named_with_its_exit_code() {
        let dir = tempfile::tempdir().expect("scratch");
        let features = synthetic::write(dir.path(), &SIZES)
            .expect("written")
            .display()
            .to_string();
        let root = dir.path().display().to_string();
        let fail = |words: &[&str]| {
            let error = measure(&parse(&[&["ijb", "--protocol", "ijbc"], words].concat()).expect("valid"));
            let error = error.expect_err("refused");
            let failure = error.downcast_ref::<Failure>().expect("a failure");
            (failure.to_string(), failure.code)
        };
        let words = ["--protocol", "ijbb", "--features", &features, "--root", &root];
        let wrong = parse(&[&["ijb"], &words[..]].concat()).expect("valid");
        let (text, code) = report_failure(measure(&wrong).expect_err("refused").as_ref());
        assert!(
            text.contains("neither IJBB/meta nor meta")
                && text.ends_with("hint: the folder has the lists of --protocol ijbc")
                && code == ExitCode::NotFound,
            "{text}"
        );
        let (text, code) = fail(&["--features", &features, "--root", "/nowhere"]);
        assert!(
            text.starts_with("/nowhere: there is neither IJBC/meta") && code == ExitCode::NotFound,
            "{text}"
        );
        let (text, code) = fail(&["--features", "/nowhere/f.safetensors", "--root", &root]);
        assert!(
            text.starts_with("/nowhere/f.safetensors") && code == ExitCode::NotFound,
            "{text}"
        );
        let rows = |count: i64| Tensor::ones([count, 4], (tch::Kind::Float, tch::Device::Cpu));
        let other = dir.path().join("other.safetensors");
        let named = other.display().to_string();
        safetensors::write(&other, [("feat", &rows(40))]).expect("written");
        let (text, code) = fail(&["--features", &named, "--root", &root]);
        assert!(
            text.contains("no tensor feat_flip") && code == ExitCode::Failed,
            "{text}"
        );
        safetensors::write(&other, [("feat", &rows(39))]).expect("written");
        let (text, _) = fail(&["--features", &named, "--root", &root, "--no-flip"]);
        assert!(text.contains("has features of 39 images"), "{text}");
        fs::write(dir.path().join("IJBC/meta/ijbc_1N_probe_mixed.csv"), "T,S\n1,1\n").expect("written");
        let (text, _) = fail(&["--features", &features, "--root", &root]);
        assert!(
            text.contains("probe_mixed.csv:2: template 1 has no image"),
            "{text}"
        );
        let words = [
            "ijb",
            "--protocol",
            "ijbc",
            "--features",
            &features,
            "--root",
            &root,
        ];
        let without = parse(&[&words[..], &["--no-identification"]].concat()).expect("valid");
        assert!(measure(&without).expect("measured").identification.is_none());
    }

    #[test]
    fn a_network_and_a_file_of_features_exclude_each_other() {
        for words in [
            &["--network", "r18"][..],
            &[],
            &["--features", "f", "--network", "r18"],
            &["--features", "f", "--save-features", "g"],
        ] {
            let common = ["ijb", "--root", "r", "--protocol", "ijbc"];
            assert!(parse(&[&common[..], words].concat()).is_err(), "{words:?}");
        }
        assert!(parse(&["ijb", "--root", "r", "--protocol", "ijba", "--features", "f"]).is_err());
    }
}
