//! `arcface-worker verify`: accuracy, XNorm and TAR at FAR of a network on verification sets, or of embeddings
//! that something else computed.

use super::{output::Output, place::PlaceArgs};
use crate::{
    eval::{
        self, EvalError, Verification, VerificationSet,
        metrics::{FOLDS, folds},
        report, verification,
    },
    export::safetensors,
};
use anyhow::Context;
use arcface_proto::{
    failure::{ExitCode, Failure},
    spec::Precision,
};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};
use tch::{Kind, Tensor};

/// Arguments of `verify`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    arcface-worker verify --network r50 --weights model.safetensors lfw.bin cfp_fp.bin\n  \
    arcface-worker verify --embeddings embeddings.safetensors --output json")]
pub struct VerifyArgs {
    /// Verification sets: pickled (list of images, list of flags), two images a pair.
    #[arg(value_name = "BIN", required_unless_present = "embeddings")]
    pub bins: Vec<PathBuf>,
    /// Network that the weights belong to; `arcface-worker networks` lists them.
    #[arg(long, required_unless_present = "embeddings")]
    pub network: Option<String>,
    /// Weights: .safetensors, or a PyTorch state_dict (.pth, .pt).
    #[arg(long, value_name = "FILE", required_unless_present = "embeddings")]
    pub weights: Option<PathBuf>,
    /// A .safetensors file with `emb` and `emb_flip` [2n, D] (rows 2i and 2i+1 are pair i) and `issame` (length n),
    /// instead of a network.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["bins", "network", "weights"])]
    pub embeddings: Option<PathBuf>,
    /// Images embedded at a time.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: u32,
    /// Where the network computes.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// How to print the results.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Runs `verify`.
pub fn run(args: VerifyArgs) -> anyhow::Result<()> {
    let results = measure(&args)?;
    let text = match args.output {
        Output::Table => report::table(&results),
        Output::Json => format!("{:#}\n", report::json(&results)),
    };
    io::stdout()
        .write_all(text.as_bytes())
        .context("write the results")
}

/// The results of every set, in the order given.
pub fn measure(args: &VerifyArgs) -> anyhow::Result<Vec<Verification>> {
    if let Some(path) = &args.embeddings {
        return Ok(vec![measure_embeddings(path)?]);
    }
    let (Some(network), Some(weights)) = (&args.network, &args.weights) else {
        return Err(Failure::new(
            ExitCode::Usage,
            "verify needs --network and --weights, or --embeddings",
        )
        .into());
    };
    // All sets are opened first: a bad one should not cost the time of those before it.
    let sets: Vec<VerificationSet> = args
        .bins
        .iter()
        .map(|path| {
            let set = VerificationSet::open(path).map_err(failure)?;
            folds(set.len() / 2, FOLDS).map_err(|error| of_file(path, error))?;
            Ok(set)
        })
        .collect::<Result<_, Failure>>()?;
    let network = args.place.open_network(weights, network, Precision::Fp32)?;

    let images: usize = sets.iter().map(VerificationSet::len).sum();
    // Every image is embedded twice, plain and mirrored. Shown on a terminal only.
    let bar = ProgressBar::new(2 * images as u64);
    let style = "{msg:16} {wide_bar} {pos}/{len} images, {eta} left";
    bar.set_style(ProgressStyle::with_template(style).context("progress bar")?);
    let mut embed = |images: &Tensor| {
        let embedding = network.embed(images);
        bar.inc(images.size()[0] as u64);
        Ok(embedding)
    };
    let mut results = Vec::with_capacity(sets.len());
    for set in &sets {
        bar.set_message(set.name().to_owned());
        results.push(eval::evaluate(set, args.batch as usize, &mut embed).map_err(failure)?);
    }
    bar.finish_and_clear();
    Ok(results)
}

/// What to tell the user, and the exit code.
fn failure(error: EvalError) -> Failure {
    let code = match &error {
        EvalError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => ExitCode::NotFound,
        _ => ExitCode::Failed,
    };
    let hint = match &error {
        EvalError::Pickle { .. } | EvalError::Layout { .. } => {
            "a verification set is a pickled pair of a list of images and a list of flags; `arcface-worker data bin` writes one"
        }
        EvalError::NotFinite { .. } => "the weights are damaged, or training diverged",
        EvalError::TooFewPairs { .. } => "accuracy is a mean over ten folds: a set has ten pairs at least",
        _ => "",
    };
    Failure::new(code, error.to_string()).hint(hint)
}

/// The same of an error that does not name the file.
fn of_file(path: &Path, error: EvalError) -> Failure {
    let failure = failure(error);
    Failure {
        message: format!("{}: {}", path.display(), failure.message),
        ..failure
    }
}

fn measure_embeddings(path: &Path) -> Result<Verification, Failure> {
    let refuse = |detail: String| {
        Failure::new(ExitCode::Failed, format!("{}: {detail}", path.display()))
            .hint("it must have the tensors emb [2n, D], emb_flip [2n, D] and issame [n]")
    };
    let file = safetensors::read(path).map_err(Failure::from)?;
    let (emb, dim) = matrix(&file, "emb").map_err(refuse)?;
    let (emb_flip, flip_dim) = matrix(&file, "emb_flip").map_err(refuse)?;
    let issame = flags(&file).map_err(refuse)?;
    if dim != flip_dim || emb.len() != emb_flip.len() {
        return Err(refuse("emb and emb_flip have different shapes".into()));
    }
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    verification::score(&name, &emb, &emb_flip, dim, &issame).map_err(|error| of_file(path, error))
}

/// A floating-point matrix as f64, row-major, and its number of columns.
fn matrix(file: &safetensors::Content, name: &str) -> Result<(Vec<f64>, usize), String> {
    let tensor = file.get(name).ok_or_else(|| format!("no tensor {name}"))?;
    match *tensor.size() {
        [_, columns] if tensor.is_floating_point() => Ok((values(tensor, name)?, columns as usize)),
        _ => Err(format!(
            "tensor {name} is {:?} {:?}, expected [2n, D] of floats",
            tensor.kind(),
            tensor.size()
        )),
    }
}

/// The flags, stored as any integer or boolean.
fn flags(file: &safetensors::Content) -> Result<Vec<bool>, String> {
    let tensor = file.get("issame").ok_or("no tensor issame")?;
    if tensor.dim() != 1 || tensor.is_floating_point() {
        let (kind, shape) = (tensor.kind(), tensor.size());
        return Err(format!(
            "tensor issame is {kind:?} {shape:?}, expected [n] of booleans or integers"
        ));
    }
    let flag = |(index, value): (usize, f64)| match value {
        0.0 => Ok(false),
        1.0 => Ok(true),
        other => Err(format!("issame[{index}] is {other}, expected 0 or 1")),
    };
    values(tensor, "issame")?
        .into_iter()
        .enumerate()
        .map(flag)
        .collect()
}

fn values(tensor: &Tensor, name: &str) -> Result<Vec<f64>, String> {
    let flat = tensor
        .f_to_kind(Kind::Double)
        .and_then(|t| t.f_contiguous()?.f_view([-1]));
    flat.and_then(Vec::try_from)
        .map_err(|error| format!("tensor {name}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::safetensors::{Dtype, serialize, tensor::TensorView};
    use clap::Parser;
    use std::fs;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: VerifyArgs,
    }

    fn parse(line: &str) -> Result<VerifyArgs, clap::Error> {
        Cli::try_parse_from(line.split(' ')).map(|cli| cli.args)
    }

    fn embeddings(dir: &Path, tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> PathBuf {
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            let view = TensorView::new(*dtype, shape.to_vec(), data).expect("a tensor");
            (*name, view)
        });
        let path = dir.join("embeddings.safetensors");
        fs::write(&path, serialize(views, None).expect("a file")).expect("written");
        path
    }

    fn f32s(values: impl Iterator<Item = f32>) -> Vec<u8> {
        values.flat_map(f32::to_le_bytes).collect()
    }

    /// 20 pairs, alternately the same vector twice and two orthogonal ones.
    fn rows() -> Vec<u8> {
        f32s((0..20).flat_map(|pair| {
            if pair % 2 == 0 {
                [1.0, 0.0, 1.0, 0.0]
            } else {
                [1.0, 0.0, 0.0, 1.0]
            }
        }))
    }

    #[test]
    fn embeddings_of_any_flag_kind_are_measured() {
        let dir = tempfile::tempdir().expect("scratch");
        let flags = |size: usize| {
            (0..20).flat_map(move |p| {
                let mut bytes = vec![0; size];
                bytes[0] = u8::from(p % 2 == 0);
                bytes
            })
        };
        for (dtype, size) in [(Dtype::BOOL, 1), (Dtype::U8, 1), (Dtype::I32, 4), (Dtype::I64, 8)] {
            let path = embeddings(
                dir.path(),
                &[
                    ("emb", Dtype::F32, &[40, 2], rows()),
                    ("emb_flip", Dtype::F32, &[40, 2], rows()),
                    ("issame", dtype, &[20], flags(size).collect()),
                ],
            );
            let args =
                parse(&format!("verify --embeddings {} --output json", path.display())).expect("valid");
            let results = measure(&args).expect("measured");
            assert_eq!((results[0].name.as_str(), results[0].pairs), ("embeddings", 20));
            assert_eq!((results[0].accuracy, results[0].xnorm), (1.0, 1.0));
            let tar = results[0]
                .tar_at_far
                .as_ref()
                .expect("both kinds of pairs in every fold");
            assert!(tar.iter().all(|&(_, tar)| tar == 1.0), "{tar:?}");
        }
    }

    #[test]
    fn bad_input_is_named_with_its_exit_code() {
        let dir = tempfile::tempdir().expect("scratch");
        let fail = |line: &str| {
            let error = measure(&parse(line).expect("valid")).expect_err("refused");
            let failure = error.downcast_ref::<Failure>().expect("a failure").code;
            (error.to_string(), failure)
        };
        let (text, code) = fail("verify --embeddings /nowhere/e.safetensors");
        assert!(
            text.starts_with("/nowhere/e.safetensors") && code == ExitCode::NotFound,
            "{text}"
        );
        let (text, code) = fail("verify --network r18 --weights w.safetensors /nowhere/lfw.bin");
        assert!(
            text.starts_with("/nowhere/lfw.bin: No such file") && code == ExitCode::NotFound,
            "{text}"
        );
        let hostile = dir.path().join("lfw.bin");
        fs::write(&hostile, b"cos\nsystem\n(S'true'\ntR.").expect("written");
        let (text, code) = fail(&format!(
            "verify --network r18 --weights w.safetensors {}",
            hostile.display()
        ));
        assert!(
            text.contains("foreign global os.system") && code == ExitCode::Failed,
            "{text}"
        );

        let emb: (&str, Dtype, &[usize], Vec<u8>) = ("emb", Dtype::F32, &[40, 2], rows());
        let flip = ("emb_flip", Dtype::F32, &[40usize, 2] as &[usize], rows());
        for (tensors, expected) in [
            (vec![], "no tensor emb"),
            (
                vec![emb.clone(), ("emb_flip", Dtype::F32, &[20, 4], rows())],
                "no tensor issame",
            ),
            (
                vec![
                    emb.clone(),
                    flip.clone(),
                    ("issame", Dtype::U8, &[20], vec![2; 20]),
                ],
                "issame[0] is 2",
            ),
            (
                vec![
                    emb.clone(),
                    flip.clone(),
                    ("issame", Dtype::U8, &[19], vec![1; 19]),
                ],
                "do not belong to 19 pairs",
            ),
            (
                vec![
                    emb.clone(),
                    flip.clone(),
                    ("issame", Dtype::F32, &[5], vec![0; 20]),
                ],
                "expected [n] of booleans",
            ),
            (
                vec![("emb", Dtype::U8, &[80, 4], rows())],
                "expected [2n, D] of floats",
            ),
        ] {
            let path = embeddings(dir.path(), &tensors);
            let (text, code) = fail(&format!("verify --embeddings {}", path.display()));
            assert!(text.contains(expected) && code == ExitCode::Failed, "{text}");
        }
        let broken = dir.path().join("embeddings.safetensors");
        fs::write(&broken, b"\x10\0\0\0\0\0\0\0{").expect("written");
        let (text, _) = fail(&format!("verify --embeddings {}", broken.display()));
        assert!(text.starts_with(&broken.display().to_string()), "{text}");
    }

    #[test]
    fn a_network_with_weights_is_measured_on_every_set() {
        use crate::model::{Backbone, BackboneConfig};
        let dir = tempfile::tempdir().expect("scratch");
        let mut backbone = Backbone::new(&BackboneConfig::new("tiny", 32)).expect("known");
        backbone.fill_golden();
        let weights = dir.path().join("w.safetensors");
        let state = backbone
            .state()
            .iter()
            .map(|entry| (entry.name.as_str(), &entry.tensor));
        safetensors::write(&weights, state).expect("written");

        // 10 pairs of one and the same grey image.
        let mut jpeg = Vec::new();
        let grey = image::GrayImage::from_pixel(112, 112, image::Luma([90]));
        image::codecs::jpeg::JpegEncoder::new(&mut jpeg)
            .encode_image(&grey)
            .expect("encode");
        let set = |pairs: usize| {
            let length = (jpeg.len() as u32).to_le_bytes();
            let others = b"h\x00".repeat(2 * pairs - 1);
            let flags = vec![0x88; pairs];
            [
                b"](B".as_slice(),
                &length,
                &jpeg,
                b"q\x00",
                &others,
                b"e](",
                &flags,
                b"e\x86.",
            ]
            .concat()
        };
        let (a, b) = (dir.path().join("a.bin"), dir.path().join("b.bin"));
        for path in [&a, &b] {
            fs::write(path, set(10)).expect("written");
        }
        let line = |network: &str| {
            let files = format!("{} {} {}", weights.display(), a.display(), b.display());
            parse(&format!("verify --network {network} --batch 7 --weights {files}")).expect("valid")
        };
        let results = measure(&line("tiny")).expect("measured");
        let names: Vec<_> = results
            .iter()
            .map(|r| (r.name.as_str(), r.pairs, r.accuracy))
            .collect();
        assert_eq!(names, [("a", 10, 1.0), ("b", 10, 1.0)]);
        assert!(
            results[0].xnorm > 0.0
                && results[0]
                    == Verification {
                        name: "a".into(),
                        ..results[1].clone()
                    }
        );
        // Weights of another network, and no network at all.
        let code = |network| {
            let error = measure(&line(network)).expect_err("refused");
            error.downcast_ref::<Failure>().expect("a failure").code
        };
        assert_eq!((code("r18"), code("nosuch")), (ExitCode::Failed, ExitCode::Usage));
        // A set that is too small costs the others no time, and is named.
        fs::write(&b, set(9)).expect("written");
        let error = measure(&line("tiny")).expect_err("refused").to_string();
        let expected = format!("{}: 9 pairs cannot be split into 10 folds", b.display());
        assert_eq!(error, expected);
    }

    #[test]
    fn a_network_and_a_file_of_embeddings_exclude_each_other() {
        for line in [
            "verify",
            "verify lfw.bin",
            "verify --network r18 lfw.bin",
            "verify --embeddings e.st lfw.bin",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
