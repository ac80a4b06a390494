//! `arcface-worker mfr`: all images of a set compared with each other, by features that something else computed or by
//! a network.

use super::{output::Output, place::PlaceArgs};
use crate::{
    data::{self, DataError, Dataset},
    eval::{
        ijb::{IjbError, ImageFeatures, features::MemoryFeatures},
        mfr::{self, Evaluation, FARS, Far, Gallery, MfrError, embed::embed_dataset, report, select},
        plot::{raster, svg},
    },
    export::{atomic, safetensors},
    model::Inference,
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
    str::FromStr,
    sync::Arc,
};
use tch::Tensor;

/// Arguments of `mfr`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    arcface-worker mfr --set all=/data/mfr/all --set children=/data/mfr/children --network r50 --weights model.safetensors\n  \
    arcface-worker mfr features.safetensors --far 1e-6,1e-4 --output json\n\n\
    With P pairs of different persons, the threshold at a FAR is the floor(FAR * P)-th largest of their scores, and a \
    pair is accepted above it. A score is the cosine of two features in 32-bit floats. A million images need no more \
    memory than their features, and two passes over all pairs.")]
pub struct MfrArgs {
    /// Sets: a folder with one sub-folder a person, a folder with train.rec, or features: a .safetensors file with `emb`
    /// [N, D], `label` (length N) of int64 and, if mirror images count, `emb_flip` [N, D].
    #[arg(value_name = "PATH", required_unless_present = "set")]
    pub paths: Vec<PathBuf>,
    /// A set with a name; repeatable. Without one a set is called by its file.
    #[arg(long, value_name = "NAME=PATH")]
    pub set: Vec<NamedSet>,
    /// Network that the weights belong to; `arcface-worker networks` lists them.
    #[arg(long, requires = "weights")]
    pub network: Option<String>,
    /// Weights: .safetensors, or a PyTorch state_dict (.pth, .pt).
    #[arg(long, value_name = "FILE", requires = "network")]
    pub weights: Option<PathBuf>,
    /// Images embedded at a time.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: u32,
    /// Where the network computes.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// False accept rates, separated by commas.
    #[arg(long, value_name = "RATE", value_delimiter = ',', default_values = FARS)]
    pub far: Vec<Far>,
    /// Leave mirror images out.
    #[arg(long)]
    pub no_flip: bool,
    /// Keep the network's features as NAME.safetensors in this folder, to be named as sets.
    #[arg(long, value_name = "DIR", requires = "network")]
    pub save_features: Option<PathBuf>,
    /// Write report.json, table.md, and the ROC curves as SVG and PNG into this folder.
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
    /// How to print the results.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// A set and what it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedSet {
    /// Its name in the report.
    pub name: String,
    /// Folder or file.
    pub path: PathBuf,
}

impl FromStr for NamedSet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !name.contains('/') && !path.is_empty() => Ok(Self {
                name: name.to_owned(),
                path: path.into(),
            }),
            _ => Err(format!("{text:?} is not NAME=PATH")),
        }
    }
}

impl MfrArgs {
    /// All sets in the order given.
    fn sets(&self) -> Result<Vec<NamedSet>, Failure> {
        let named = |path: &PathBuf| NamedSet {
            name: match path.is_dir() {
                true => path.file_name(),
                false => path.file_stem(),
            }
            .map_or("set".into(), |name| name.to_string_lossy().into_owned()),
            path: path.clone(),
        };
        let mut sets: Vec<NamedSet> = self.paths.iter().map(named).collect();
        sets.extend_from_slice(&self.set);
        for (index, set) in sets.iter().enumerate() {
            if sets[..index].iter().any(|other| other.name == set.name) {
                let message = format!("two sets are called {:?}", set.name);
                return Err(
                    Failure::new(ExitCode::Usage, message).hint("--set NAME=PATH gives a set another name")
                );
            }
        }
        Ok(sets)
    }

    fn check(&self) -> Result<(), Failure> {
        let most = select::MOST_REGIONS;
        if self.far.len() > most {
            let message = format!("--far: {} rates, at most {most} are measured", self.far.len());
            return Err(Failure::new(ExitCode::Usage, message));
        }
        for (index, far) in self.far.iter().enumerate() {
            if self.far[..index].iter().any(|other| other.text == far.text) {
                let message = format!("--far: {} comes twice", far.text);
                return Err(Failure::new(ExitCode::Usage, message));
            }
        }
        Ok(())
    }
}

/// Runs `mfr`.
pub fn run(args: MfrArgs) -> anyhow::Result<()> {
    let found = measure(&args)?;
    let text = match args.output {
        Output::Table => report::table(&found),
        Output::Json => format!("{:#}\n", report::json(&found)),
    };
    io::stdout()
        .write_all(text.as_bytes())
        .context("write the results")
}

/// A set that was opened.
enum Source {
    Features(PathBuf),
    Images(Arc<dyn Dataset>),
}

/// Measures every set, and writes the report if there is to be one.
pub fn measure(args: &MfrArgs) -> anyhow::Result<Vec<Evaluation>> {
    args.check()?;
    let sets = args.sets()?;
    for folder in [&args.report, &args.save_features].into_iter().flatten() {
        // Before the work: a folder that cannot be made should not cost its time.
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    // All sets are opened first: a bad one should not cost the time of those before it.
    let sources: Vec<(NamedSet, Source)> = sets
        .into_iter()
        .map(|set| open(&set.path).map(|source| (set, source)))
        .collect::<Result<_, _>>()?;
    let has_images = sources
        .iter()
        .any(|(_, source)| matches!(source, Source::Images(_)));
    let network = match (&args.network, &args.weights) {
        (Some(network), Some(weights)) => Some(args.place.open_network(weights, network, Precision::Fp32)?),
        _ if has_images => {
            let message = "a set of images needs --network and --weights";
            return Err(Failure::new(ExitCode::Usage, message)
                .hint("features that are there already are a .safetensors file")
                .into());
        }
        _ => None,
    };
    let mut found = Vec::with_capacity(sources.len());
    for (set, source) in &sources {
        let gallery = gallery(args, set, source, network.as_ref())?;
        found.push(compare(args, set, &gallery)?);
    }
    if let Some(folder) = &args.report {
        write_report(folder, &found)?;
    }
    Ok(found)
}

fn open(path: &Path) -> Result<Source, Failure> {
    let is_features = path.extension().is_some_and(|ending| ending == "safetensors");
    if is_features {
        // What the file lacks is said now; its values are read when it is its turn.
        mfr::features::open(path).map_err(failure)?;
        return Ok(Source::Features(path.to_owned()));
    }
    data::open_path(path, None)
        .map(Source::Images)
        .map_err(Failure::from)
}

/// The features of a set, ready to be compared.
fn gallery(
    args: &MfrArgs,
    set: &NamedSet,
    source: &Source,
    network: Option<&Inference>,
) -> anyhow::Result<Gallery> {
    let named = |error: MfrError| match error {
        error @ MfrError::Feature { .. } => {
            let told = failure(error);
            Failure::new(told.code, format!("{}: {told}", set.path.display()))
                .hint("the network diverged, or the file of features is damaged")
        }
        error => failure(error),
    };
    let gallery = match (source, network) {
        (Source::Images(dataset), Some(network)) => {
            let (features, labels) = embed(args, set, dataset.as_ref(), network)?;
            Gallery::new(&features, &labels, !args.no_flip)
        }
        (Source::Features(path), _) => {
            let (features, labels) = mfr::features::open(path).map_err(failure)?;
            let flip = !args.no_flip && features.has_flip();
            Gallery::new(&features, &labels, flip)
        }
        (Source::Images(_), None) => {
            let message = format!("{}: images need --network and --weights", set.name);
            return Err(Failure::new(ExitCode::Usage, message).into());
        }
    };
    Ok(gallery.map_err(named)?)
}

/// The features that a network gives for the images of a set.
fn embed(
    args: &MfrArgs,
    set: &NamedSet,
    dataset: &dyn Dataset,
    network: &Inference,
) -> anyhow::Result<(MemoryFeatures, Vec<i64>)> {
    let passes = if args.no_flip { 1 } else { 2 };
    let bar = bar(passes * dataset.len(), &format!("embed {}", set.name))?;
    let mut embed = |images: &Tensor| {
        let embedding = network.embed(images);
        bar.inc(images.size()[0] as u64);
        Ok(embedding)
    };
    let (features, labels) =
        embed_dataset(dataset, args.batch as usize, !args.no_flip, &mut embed).map_err(failure)?;
    bar.finish_and_clear();
    if let Some(folder) = &args.save_features {
        let path = folder.join(format!("{}.safetensors", set.name));
        let matrix = |values: &[f32]| Tensor::from_slice(values).view([-1, features.dim as i64]);
        let mut tensors = vec![
            ("emb", matrix(&features.feat)),
            ("label", Tensor::from_slice(&labels)),
        ];
        if !args.no_flip {
            tensors.push(("emb_flip", matrix(&features.feat_flip)));
        }
        safetensors::write(&path, tensors.iter().map(|(name, tensor)| (*name, tensor)))
            .map_err(Failure::from)?;
    }
    Ok((features, labels))
}

fn compare(args: &MfrArgs, set: &NamedSet, gallery: &Gallery) -> Result<Evaluation, anyhow::Error> {
    let bar = bar(mfr::work(gallery), &format!("compare {}", set.name))?;
    let mut done = |pairs| bar.inc(pairs);
    let found = mfr::evaluate(&set.name, gallery, &args.far, &mut done).map_err(|error| {
        let told = failure(error);
        Failure::new(told.code, format!("{}: {told}", set.path.display()))
            .hint("each label is one person; a set needs several persons, some with several images")
    })?;
    bar.finish_and_clear();
    Ok(found)
}

/// Shown on a terminal only.
fn bar(total: u64, what: &str) -> anyhow::Result<ProgressBar> {
    let style = "{msg} [{wide_bar}] {human_pos}/{human_len} {per_sec}, {eta} left";
    let bar = ProgressBar::new(total).with_message(what.to_owned());
    bar.set_style(ProgressStyle::with_template(style).context("progress bar")?);
    Ok(bar)
}

fn write_report(folder: &Path, found: &[Evaluation]) -> anyhow::Result<()> {
    let chart = report::roc_chart(found);
    let picture = raster::png(&chart)
        .map_err(anyhow::Error::msg)
        .context("roc.png")?;
    let files = [
        (
            "report.json",
            format!("{:#}\n", report::full_json(found)).into_bytes(),
        ),
        ("table.md", report::markdown(found).into_bytes()),
        ("roc.svg", svg::draw(&chart).into_bytes()),
        ("roc.png", picture),
    ];
    for (name, bytes) in files {
        atomic::write(&folder.join(name), |file| file.write_all(&bytes)).map_err(Failure::from)?;
    }
    Ok(())
}

/// What to tell the user, and the exit code.
fn failure(error: MfrError) -> Failure {
    let missing = |source: &io::Error| source.kind() == io::ErrorKind::NotFound;
    let (code, hint) = match &error {
        MfrError::Features(IjbError::Io { source, .. }) if missing(source) => (ExitCode::NotFound, ""),
        MfrError::Data(DataError::NotFound { .. }) => (ExitCode::NotFound, ""),
        MfrError::Features(_) | MfrError::Labels { .. } => (
            ExitCode::Failed,
            "it must have the tensors emb [N, D] and label [N] (int64), and may have emb_flip [N, D]",
        ),
        MfrError::Data(_) => (
            ExitCode::Failed,
            "`arcface-worker data verify` lists every damaged image",
        ),
        _ => (ExitCode::Failed, ""),
    };
    Failure::new(code, error.to_string()).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Backbone, BackboneConfig};
    use clap::Parser;
    use tch::{Device, Kind};

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: MfrArgs,
    }

    fn parse(words: &[&str]) -> Result<MfrArgs, clap::Error> {
        Cli::try_parse_from([&["mfr"][..], words].concat()).map(|cli| cli.args)
    }

    fn fail(words: &[&str]) -> (String, ExitCode) {
        let error = measure(&parse(words).expect("valid")).expect_err("refused");
        let failure = error.downcast_ref::<Failure>().expect("a failure");
        (failure.to_string(), failure.code)
    }

    /// Three persons with two pictures each.
    fn faces(folder: &Path) {
        for person in 0..3u8 {
            let folder = folder.join(format!("person {person}"));
            fs::create_dir_all(&folder).expect("made");
            for picture in 0..2u8 {
                image::RgbImage::from_fn(112, 112, |x, y| {
                    image::Rgb([(x as u8).wrapping_mul(person + 1), y as u8, 90 * person + picture])
                })
                .save(folder.join(format!("ä {picture}.png")))
                .expect("saved");
            }
        }
    }

    #[test]
    fn a_network_is_measured_and_its_features_measure_the_same() {
        let dir = tempfile::tempdir().expect("scratch");
        let at = |name: &str| dir.path().join(name).display().to_string();
        faces(Path::new(&at("faces")));
        let mut backbone = Backbone::new(&BackboneConfig::new("tiny", 32)).expect("known");
        backbone.fill_golden();
        let weights = at("w.safetensors");
        let state = backbone
            .state()
            .iter()
            .map(|entry| (entry.name.as_str(), &entry.tensor));
        safetensors::write(Path::new(&weights), state).expect("written");
        let (faces, kept, report) = (at("faces"), at("kept"), at("report"));
        let network = ["--network", "tiny", "--weights", &weights, "--far", "0.1,0.5"];
        let words = [
            "--save-features",
            &kept,
            "--report",
            &report,
            "--batch",
            "4",
            &faces,
        ];
        let found = measure(&parse(&[&network[..], &words].concat()).expect("valid")).expect("measured");
        assert_eq!(
            (found[0].name.as_str(), found[0].images, found[0].identities),
            ("faces", 6, 3)
        );
        assert_eq!((found[0].genuine, found[0].impostor), (3, 12));
        for file in ["report.json", "table.md", "roc.svg", "roc.png"] {
            assert!(Path::new(&report).join(file).is_file(), "{file}");
        }
        let set = format!("faces={kept}/faces.safetensors");
        let again = measure(&parse(&["--set", &set, "--far", "0.1,0.5"]).expect("valid")).expect("measured");
        assert_eq!(report::full_json(&again), report::full_json(&found));
        let (text, code) = fail(&[&faces]);
        assert!(
            text.contains("needs --network") && code == ExitCode::Usage,
            "{text}"
        );
    }

    #[test]
    fn bad_input_is_named_with_its_exit_code() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("f.safetensors");
        let file = path.display().to_string();
        let write = |tensors: &[(&str, &Tensor)]| {
            safetensors::write(&path, tensors.iter().copied()).expect("written");
        };
        let rows = Tensor::ones([3, 4], (Kind::Float, Device::Cpu));
        let labels = |labels: &[i64]| Tensor::from_slice(labels);
        write(&[("emb", &rows)]);
        let (text, code) = fail(&[&file]);
        assert!(
            text.contains("no tensor label") && code == ExitCode::Failed,
            "{text}"
        );
        write(&[("label", &labels(&[1, 2]))]);
        assert!(fail(&[&file]).0.contains("no tensor emb"));
        write(&[("emb", &rows), ("label", &labels(&[1, 2]))]);
        assert!(fail(&[&file]).0.contains("emb has 3 rows and label 2"));
        write(&[("emb", &rows), ("label", &rows)]);
        assert!(
            fail(&[&file])
                .0
                .contains("label is F32 [3, 4], expected [N] of I64")
        );
        write(&[("emb", &rows), ("label", &labels(&[1, 2, 3]))]);
        assert!(fail(&[&file]).0.contains("f.safetensors: no two of the 3 images"));
        let _ = rows.get(1).get(2).fill_(f64::NAN);
        write(&[("emb", &rows), ("label", &labels(&[1, 1, 3]))]);
        assert!(
            fail(&[&file])
                .0
                .contains("f.safetensors: the feature in row 1 is not finite")
        );

        let (text, code) = fail(&["/nowhere/f.safetensors"]);
        assert!(
            text.starts_with("/nowhere/f.safetensors") && code == ExitCode::NotFound,
            "{text}"
        );
        assert_eq!(fail(&["/nowhere/faces"]).1, ExitCode::NotFound);
        let (text, code) = fail(&[&file, "--set", &format!("f={file}")]);
        assert!(text.contains("two sets are called \"f\"") && code == ExitCode::Usage);
        assert!(fail(&[&file, "--far", "1e-3,1e-3"]).0.contains("comes twice"));
        let refused: [&[&str]; 4] = [
            &[],
            &["--far", "2", &file],
            &["--set", "x"],
            &["--network", "r18", &file],
        ];
        for words in refused {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }
}
