//! `arcface-worker infer`: embeddings of image files, of faces in them, or of a tensor of prepared images.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context;
use arcface_proto::{
    failure::{ExitCode, Failure},
    spec::Precision,
};
use image::RgbImage;
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use serde_json::json;
use tch::{Kind, Tensor};

use super::{output::no_input, place::PlaceArgs};
use crate::{
    data::{
        align::{self, FivePoints, Similarity},
        decode::{self, OtherSize, PIXEL_BYTES, Pixels},
        image_folder::read_image_file,
        landmarks, planes,
    },
    export::{npy, safetensors},
    model::{IMAGE_SIZE, Inference},
};

/// Arguments of `infer`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    arcface-worker infer --network r50 --weights model.safetensors faces/ --out faces.npy\n  \
    arcface-worker infer --network r50 --weights backbone.pth --flip a.jpg b.png --out pair.json\n  \
    arcface-worker infer --network r50 --weights w.safetensors --landmarks faces.csv --out faces.json\n  \
    arcface-worker infer --network mbf --weights w.safetensors --tensor in.safetensors --out out.safetensors")]
pub struct InferArgs {
    /// Aligned faces, JPEG or PNG; folders are walked in order of their names. Images of another size than 112x112 are
    /// scaled to it, without keeping the ratio of their sides.
    #[arg(value_name = "IMAGE", required_unless_present_any = ["tensor", "landmarks"])]
    pub images: Vec<PathBuf>,
    /// Network that the weights belong to; `arcface-worker networks` lists them.
    #[arg(long)]
    pub network: String,
    /// Weights: .safetensors, or a PyTorch state_dict (.pth, .pt).
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// Where faces are in the images, which need not be aligned then: one line a face with the image and x, y of both eyes,
    /// nose and both corners of the mouth, left to right as in the image, separated by commas or tabs; or JSON,
    /// [{"image": "a.jpg", "landmarks": [[x, y], ..]}, ..]. 68 points are reduced to these five. An image may have
    /// several faces. Relative paths are looked for here, then beside FILE. With IMAGE, only the faces of those images.
    #[arg(long, value_name = "FILE", conflicts_with = "tensor")]
    pub landmarks: Option<PathBuf>,
    /// Instead of images: a .safetensors file with tensor `input` [N, 3, 112, 112], float32, RGB in [-1, 1].
    #[arg(long, value_name = "FILE", conflicts_with = "images")]
    pub tensor: Option<PathBuf>,
    /// Add the embedding of the mirrored image to each one.
    #[arg(long)]
    pub flip: bool,
    /// Where the embeddings [N, D], float32, go: .safetensors (tensor `embedding`), .npy or .json.
    #[arg(short = 'o', long, value_name = "FILE")]
    pub out: PathBuf,
    /// Images embedded at a time.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: u32,
    /// Arithmetic of the network: fp32 or bf16.
    #[arg(long, default_value = "fp32", value_parser = precision)]
    pub precision: Precision,
    /// Where the network computes.
    #[command(flatten)]
    pub place: PlaceArgs,
}

fn precision(name: &str) -> Result<Precision, String> {
    match name {
        "fp32" => Ok(Precision::Fp32),
        "bf16" => Ok(Precision::Bf16),
        other => Err(format!("{other:?} is neither fp32 nor bf16")),
    }
}

/// Form of the output file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Safetensors,
    Npy,
    Json,
}

impl Format {
    fn of(path: &Path) -> Result<Self, Failure> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("safetensors") => Ok(Format::Safetensors),
            Some("npy") => Ok(Format::Npy),
            Some("json") => Ok(Format::Json),
            _ => Err(Failure::new(
                ExitCode::Usage,
                format!("--out {}: unknown form of file", path.display()),
            )
            .hint("end the name in .safetensors, .npy or .json")),
        }
    }
}

/// A face in a photograph.
#[derive(Clone, Copy, Debug)]
pub(super) struct Face {
    points: FivePoints,
    onto_crop: Similarity,
}

impl Face {
    /// The crop; an error says why there is none.
    pub(super) fn cut(&self, image: &RgbImage, crop: &mut Pixels) -> Result<(), String> {
        align::check_inside(&self.points, image)?;
        align::warp(image, &self.onto_crop, crop);
        Ok(())
    }
}

/// One picture for the network.
#[derive(Clone, Debug)]
pub(super) struct Picture {
    /// The file.
    pub(super) path: PathBuf,
    /// The face in it and how its crop is cut out; a crop already, or to be scaled, without.
    pub(super) face: Option<Face>,
}

/// Where images come from.
enum Source {
    Files(Vec<Picture>),
    Tensor(Tensor),
}

impl Source {
    fn len(&self) -> usize {
        match self {
            Source::Files(files) => files.len(),
            Source::Tensor(input) => input.size()[0] as usize,
        }
    }

    /// Images `start..end` as \[n, 3, 112, 112\] f32.
    /// The pictures' files.
    fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        let files: &[Picture] = match self {
            Source::Files(files) => files,
            Source::Tensor(_) => &[],
        };
        files.iter().map(|picture| &picture.path)
    }

    fn batch(&self, start: usize, end: usize) -> anyhow::Result<Tensor> {
        match self {
            Source::Files(files) => load(&files[start..end]),
            Source::Tensor(input) => Ok(input.narrow(0, start as i64, (end - start) as i64)),
        }
    }
}

/// Runs `infer`.
pub fn run(args: InferArgs) -> anyhow::Result<()> {
    // What is cheap to refuse comes before the weights are read.
    let format = Format::of(&args.out)?;
    let source = match &args.tensor {
        Some(path) => Source::Tensor(read_input(path)?),
        None => Source::Files(pictures(&args.images, args.landmarks.as_deref())?),
    };
    let single = [Some(&args.weights), args.tensor.as_ref(), args.landmarks.as_ref()];
    let inputs = single.into_iter().flatten().chain(source.paths());
    no_input(&args.out, inputs.map(PathBuf::as_path))?;
    let network = args
        .place
        .open_network(&args.weights, &args.network, args.precision)?;
    let embedding = embed(&network, &source, &args)?;
    let names = match &source {
        Source::Files(files) => Some(files.iter().map(|file| file.path.display().to_string()).collect()),
        Source::Tensor(_) => None,
    };
    check_finite(&embedding, names.as_deref())?;
    write(&args.out, format, &embedding, names)
}

fn embed(network: &Inference, source: &Source, args: &InferArgs) -> anyhow::Result<Tensor> {
    let total = source.len();
    // Shown on a terminal only.
    let bar = ProgressBar::new(total as u64);
    let style = "{wide_bar} {pos}/{len} images, {per_sec}, {eta} left";
    bar.set_style(ProgressStyle::with_template(style).context("progress bar")?);
    let mut parts = vec![Tensor::zeros(
        [0, network.embedding_size()],
        (Kind::Float, tch::Device::Cpu),
    )];
    for start in (0..total).step_by(args.batch as usize) {
        let end = total.min(start + args.batch as usize);
        let images = source.batch(start, end)?;
        let plain = network.embed(&images);
        // The mirrored width, as verification adds it.
        parts.push(match args.flip {
            true => plain + network.embed(&images.flip([3])),
            false => plain,
        });
        bar.inc((end - start) as u64);
    }
    bar.finish_and_clear();
    Ok(Tensor::cat(&parts, 0))
}

/// # Errors
/// Names the first image whose embedding has a NaN or an infinity in it.
fn check_finite(embedding: &Tensor, names: Option<&[String]>) -> Result<(), Failure> {
    let is_finite = Vec::<bool>::try_from(embedding.isfinite().all_dim(1, false)).unwrap_or_default();
    let Some(index) = is_finite.iter().position(|finite| !finite) else {
        return Ok(());
    };
    let name = names.map_or_else(|| format!("input[{index}]"), |names| names[index].clone());
    let count = is_finite.iter().filter(|finite| !*finite).count();
    Err(Failure::new(
        ExitCode::Failed,
        format!("{name}: its embedding is not finite ({count} in all)"),
    )
    .hint("the weights are damaged, training diverged, or the input has such numbers itself"))
}

fn read_input(path: &Path) -> anyhow::Result<Tensor> {
    let file = safetensors::read(path).map_err(Failure::from)?;
    let refuse = |what: String| {
        Failure::new(ExitCode::Failed, format!("{}: {what}", path.display())).hint(format!(
            "it must have a tensor input [N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}] of float32"
        ))
    };
    let input = file
        .get("input")
        .ok_or_else(|| refuse("no tensor input".to_owned()))?;
    match (input.size().as_slice(), input.kind()) {
        ([_, 3, IMAGE_SIZE, IMAGE_SIZE], Kind::Float) => Ok(input.shallow_clone()),
        (size, kind) => Err(refuse(format!("tensor input is {kind:?} {size:?}")).into()),
    }
}

/// The pictures that the arguments name, in the order of the images, or of the landmarks where no image is named.
fn pictures(images: &[PathBuf], landmarks: Option<&Path>) -> anyhow::Result<Vec<Picture>> {
    let Some(landmarks) = landmarks else {
        let whole = |path| Picture { path, face: None };
        return Ok(image_files(images)?.into_iter().map(whole).collect());
    };
    let faces = faces(landmarks)?;
    if images.is_empty() {
        return Ok(faces);
    }
    // The same file may be named in several ways.
    let same = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mut by_image: HashMap<PathBuf, Vec<Face>> = HashMap::new();
    for picture in &faces {
        by_image
            .entry(same(&picture.path))
            .or_default()
            .extend(picture.face);
    }
    let mut chosen = Vec::new();
    for path in image_files(images)? {
        let Some(faces) = by_image.get(&same(&path)) else {
            let what = format!("{}: no face of {}", landmarks.display(), path.display());
            return Err(Failure::new(ExitCode::Failed, what)
                .hint("every image needs its landmarks")
                .into());
        };
        chosen.extend(faces.iter().map(|face| Picture {
            path: path.clone(),
            face: Some(*face),
        }));
    }
    Ok(chosen)
}

/// The faces that a file of landmarks lists. All its images must be there: one that is missing would be found after
/// hours otherwise.
pub(super) fn faces(file: &Path) -> anyhow::Result<Vec<Picture>> {
    let refuse = |what: String| {
        Failure::new(ExitCode::Failed, format!("{}: {what}", file.display()))
            .hint("a line is: image, then x and y in pixels of eyes, nose and corners of the mouth")
    };
    let text = fs::read_to_string(file).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            Failure::new(ExitCode::NotFound, format!("{} does not exist", file.display()))
        }
        io::ErrorKind::InvalidData => refuse("it is not UTF-8 text".to_owned()),
        _ => Failure::new(ExitCode::Failed, format!("{}: {error}", file.display())),
    })?;
    let listed = landmarks::parse(&text).map_err(refuse)?;
    if listed.is_empty() {
        return Err(refuse("it lists no face".to_owned()).into());
    }
    let beside = file.parent().unwrap_or(Path::new(""));
    let mut there = HashSet::new();
    let mut pictures = Vec::with_capacity(listed.len());
    for face in listed {
        let mut path = PathBuf::from(&face.image);
        if path.is_relative() && !path.exists() && beside.join(&path).exists() {
            path = beside.join(path);
        }
        if !there.contains(&path) {
            image_files(std::slice::from_ref(&path))?;
            there.insert(path.clone());
        }
        let onto_crop = Similarity::between(&face.points, &align::TEMPLATE)
            .ok_or_else(|| refuse(format!("{}: its landmarks are all in one place", face.image)))?;
        pictures.push(Picture {
            path,
            face: Some(Face {
                points: face.points,
                onto_crop,
            }),
        });
    }
    Ok(pictures)
}

/// The images that the arguments name, folders walked in order.
fn image_files(arguments: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in arguments {
        let kind = fs::metadata(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                Failure::new(ExitCode::NotFound, format!("{} does not exist", path.display()))
            }
            _ => Failure::new(ExitCode::Failed, format!("{}: {error}", path.display())),
        })?;
        if kind.is_dir() {
            let before = files.len();
            walk(path, &mut files).with_context(|| format!("list {}", path.display()))?;
            if files.len() == before {
                let what = format!("{}: no .jpg, .jpeg or .png file in it", path.display());
                return Err(Failure::new(ExitCode::NotFound, what).into());
            }
        } else {
            files.push(path.clone());
        }
    }
    Ok(files)
}

/// Hidden files and links to folders are left out, so that a walk ends.
fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    let mut entries = fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let extension = path
            .extension()
            .and_then(|e| e.to_str())
            .unwrap_or("")
            .to_ascii_lowercase();
        if entry.file_type()?.is_dir() {
            walk(&path, files)?;
        } else if ["jpg", "jpeg", "png"].contains(&extension.as_str()) {
            files.push(path);
        }
    }
    Ok(())
}

/// Images as the network wants them: \[n, 3, 112, 112\] f32.
fn load(files: &[Picture]) -> anyhow::Result<Tensor> {
    let mut values = vec![0f32; files.len() * PIXEL_BYTES];
    let (planes, _) = values.as_chunks_mut::<PIXEL_BYTES>();
    files
        .par_iter()
        .zip(planes)
        .try_for_each(|(picture, planes)| -> anyhow::Result<()> {
            let bytes = read_image_file(&picture.path).map_err(Failure::from)?;
            let mut pixels = [0; PIXEL_BYTES];
            let made = match &picture.face {
                None => decode::decode(&bytes, OtherSize::Resize, &mut pixels),
                Some(face) => decode::decode_any(&bytes).and_then(|image| face.cut(&image, &mut pixels)),
            };
            made.map_err(|what| {
                Failure::new(ExitCode::Failed, format!("{}: {what}", picture.path.display()))
            })?;
            planes::normalise(&pixels, false, planes);
            Ok(())
        })?;
    Ok(Tensor::from_slice(&values).view([files.len() as i64, 3, IMAGE_SIZE, IMAGE_SIZE]))
}

fn write(path: &Path, format: Format, embedding: &Tensor, images: Option<Vec<String>>) -> anyhow::Result<()> {
    let written = match format {
        Format::Npy => npy::write(path, embedding),
        Format::Safetensors => {
            let images = images.map(|images| ("images".to_owned(), json!(images).to_string()));
            let metadata: HashMap<String, String> = images.into_iter().collect();
            safetensors::write_with(path, [("embedding", embedding)], metadata)
        }
        Format::Json => {
            let rows: Vec<Vec<f32>> = Vec::try_from(embedding).context("embeddings as numbers")?;
            let mut report = json!({ "embedding": rows });
            if let Some(images) = images {
                report["images"] = json!(images);
            }
            crate::export::atomic::write(path, |file| {
                io::Write::write_all(file, format!("{report}\n").as_bytes())
            })
        }
    };
    Ok(written.map_err(Failure::from)?)
}

#[cfg(test)]
mod tests;
