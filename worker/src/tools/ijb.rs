//! `arcface-worker ijb`: 1:1 and 1:N numbers of IJB-B or IJB-C, of features that something else computed or of a
//! network.

use super::output::Output;
use crate::{
    eval::{
        ijb::{
            Benchmark, Evaluation, FeatureFile, IjbError, ImageFeatures, Layout, Options, Phase, Protocol, Settings,
            evaluate, report,
        },
        plot::{raster, svg},
    },
    export::atomic,
};
use anyhow::Context;
use arcface_proto::failure::{ExitCode, Failure};
use indicatif::ProgressBar;
use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

/// Arguments of `ijb`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    arcface-worker ijb --features features.safetensors --root /data/IJB_release --protocol ijbc --report ijbc_r50\n  \
    arcface-worker ijb --features features.safetensors --root /data/IJB_release/IJBB --protocol ijbb --output json\n\n\
    Without further flags the numbers are those of the reference's eval_ijbc.py with N1 D1 F1, which its ijb_evals.py \
    calls N0 D1 F1: the two programs mean opposite things by N. Settings are named here as ijb_evals.py names them.")]
pub struct IjbArgs {
    /// Features of the images: a .safetensors file with `feat` and `feat_flip` [images, D], in the order of
    /// meta/*_name_5pts_score.txt.
    #[arg(long, value_name = "FILE")]
    pub features: PathBuf,
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
    let layout = Layout::find(&args.root, args.protocol).map_err(failure)?;
    let benchmark = Benchmark::open(layout, !args.no_identification).map_err(failure)?;
    let features = open_features(&args.features, &benchmark, args.options().settings.flip)?;
    // Shown on a terminal only.
    let spinner = ProgressBar::new_spinner();
    spinner.enable_steady_tick(Duration::from_millis(200));
    let mut begin = |phase: Phase| spinner.set_message(phase.name());
    let found = evaluate(&benchmark, &features, &args.options(), &mut begin).map_err(failure)?;
    spinner.finish_and_clear();
    if let Some(folder) = &args.report {
        write_report(folder, &found)?;
    }
    Ok(found)
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
            format!("has features of {} images, {} lists {images}", features.images(), list.display()),
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
        ("report.json", format!("{:#}\n", report::full_json(found)).into_bytes()),
        ("table.md", report::markdown(found).into_bytes()),
    ];
    let [roc, det] = [report::roc_chart(found), report::det_chart(found)];
    for (chart, vector, picture) in [(roc, "roc.svg", "roc.png"), (det, "det.svg", "det.png")] {
        files.push((vector, svg::draw(&chart).into_bytes()));
        files.push((picture, raster::png(&chart).map_err(anyhow::Error::msg).context(picture)?));
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
        IjbError::Io { .. } if code == ExitCode::NotFound => {
            "the folder needs IJBC/meta/ijbc_*.txt (or IJBB/meta/ijbb_*.txt) as released with InsightFace's evaluation"
        }
        IjbError::Line { path, .. } if path.extension().is_some_and(|ending| ending == "csv") => {
            "--no-identification measures 1:1 alone"
        }
        IjbError::NotFinite { .. } => "the weights are damaged, or training diverged",
        _ => "",
    };
    Failure::new(code, error.to_string()).hint(hint)
}
