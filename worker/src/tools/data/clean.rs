//! `data clean`: drops the images that a trained head says belong to nobody's class or to another's. The second half of
//! sub-centre ArcFace: train with noisy labels, clean, train again from scratch.

mod verdict;

use std::{
    fmt::Write as _,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Context;
use arcface_proto::{
    failure::{ExitCode, Failure},
    spec::Precision,
    types::ClassRange,
};
use rayon::prelude::*;
use serde_json::json;
use tch::{Kind, Tensor};

use super::{
    Output, progress,
    source::{explain, new_set, rec_path},
};
use crate::tools::output::no_input;
use crate::{
    checkpoint::Checkpoint,
    data::{
        self, Dataset, Image,
        decode::PIXEL_BYTES,
        planes,
        record_set::RecordSet,
        recordio_write::{RecordHeader, RecordWriter, write_atomically},
    },
    export::weights,
    model::{Backbone, IMAGE_SIZE, Inference},
};
use verdict::Cosines;

/// Arguments of `data clean`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  \
    arcface-worker data clean /data/webfaces --network r50 --weights work_dirs/sub/model.safetensors \\\n    \
    --checkpoint work_dirs/sub/checkpoints/step-0000100000-g1 -o /data/webfaces_clean")]
pub struct CleanArgs {
    /// Folder with train.rec and train.idx, or a .rec file: the set that the job was trained on.
    path: PathBuf,
    /// Network that the weights belong to; `arcface-worker networks` lists them.
    #[arg(long)]
    network: String,
    /// The trained network: .safetensors, or a PyTorch state_dict (.pth, .pt).
    #[arg(long, value_name = "FILE")]
    weights: PathBuf,
    /// A checkpoint of the job, for its classes' centres: a directory with manifest.json.
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// Folder for the new train.rec and train.idx; labels stay as they are.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Images farther than this from the main centre of their class are dropped, in degrees. The paper's 75 belongs to
    /// networks trained to the end.
    #[arg(long, default_value_t = 75.0, value_parser = degrees)]
    angle: f64,
    /// Also lists the dropped images here: record, label and angle, separated by tabs.
    #[arg(long, value_name = "FILE")]
    dropped: Option<PathBuf>,
    /// Images embedded at a time.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Replace a set that is in the output folder.
    #[arg(long)]
    force: bool,
    /// How the result is printed.
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Output::Table)]
    report: Output,
}

fn degrees(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(angle) if (0.0..=180.0).contains(&angle) => Ok(angle),
        _ => Err(format!("{text:?} is no angle from 0 to 180")),
    }
}

pub fn run(args: &CleanArgs) -> anyhow::Result<()> {
    let source = rec_path(&args.path);
    let target = new_set(&args.output, args.force, &[&source])?;
    if let Some(dropped) = &args.dropped {
        let index = source.with_extension("idx");
        no_input(dropped, [source.as_path(), &index, &args.weights])?;
    }
    let set = RecordSet::open(&source, None).map_err(explain)?;
    let backbone = weights::open_backbone(&args.weights, &args.network).map_err(Failure::from)?;
    let centers = read_centers(&args.checkpoint, &set, &backbone)?;
    let angles = measure(
        &set,
        &backbone.for_inference(Precision::Fp32),
        &centers,
        args.batch,
    )?;
    if !angles.iter().any(|angle| *angle <= args.angle) {
        let message = format!(
            "{}: no image is within {} degrees of its centre; an empty set is not written",
            args.path.display(),
            args.angle
        );
        return Err(Failure::new(ExitCode::Failed, message)
            .hint("a larger --angle, or the weights and the head of one training")
            .into());
    }
    let kept = copy(&set, &target, |index| angles[index] <= args.angle)?;
    if let Some(path) = &args.dropped {
        list_dropped(&set, &angles, args.angle, path)?;
    }
    let report = json!({
        "images": set.len(), "kept": kept.images, "dropped": set.len() - kept.images,
        "identities": set.num_classes(), "emptied_identities": set.num_classes() - kept.identities,
        "angle": args.angle, "output": target.display().to_string(),
    });
    let mut out = std::io::stdout();
    match args.report {
        Output::Json => writeln!(out, "{report}")?,
        Output::Table => writeln!(
            out,
            "{}: {} of {} images kept, of {} of {} identities",
            target.display(),
            kept.images,
            set.len(),
            kept.identities,
            set.num_classes()
        )?,
    }
    Ok(())
}

/// Centres of all classes, rows of length 1: `[classes, centers, D]`.
fn read_centers(path: &Path, set: &RecordSet, backbone: &Backbone) -> anyhow::Result<Tensor> {
    let refuse = |what: String| Failure::new(ExitCode::Failed, format!("{}: {what}", path.display()));
    let checkpoint = Checkpoint::open_dir(path).context("open the checkpoint")?;
    let classes = checkpoint.manifest().num_classes;
    if classes != set.num_classes() {
        let what = format!("{classes} classes, the data set has {}", set.num_classes());
        return Err(refuse(what)
            .hint("name the data set that the job was trained on")
            .into());
    }
    let rows = checkpoint
        .head_rows(ClassRange { lo: 0, hi: classes })
        .context("read the head")?;
    let weight = rows.into_iter().find(|(name, _)| name == "weight");
    let (_, weight) = weight.ok_or_else(|| refuse("no tensor weight".to_owned()))?;
    let dim = backbone.config().embedding_size;
    let weight = match weight.size().as_slice() {
        [_, width] if *width == dim => weight.unsqueeze(1),
        [_, centers, width] if *centers > 0 && *width == dim => weight,
        size => {
            let what = format!("weight has the form {size:?}, the network's embeddings have length {dim}");
            return Err(refuse(what).into());
        }
    };
    Ok(unit(&weight.to_kind(Kind::Float)))
}

/// Vectors of length 1 along the last dimension.
fn unit(vectors: &Tensor) -> Tensor {
    let norm = vectors.norm_scalaropt_dim(2.0, [-1].as_slice(), true);
    vectors / norm.clamp_min(1e-12)
}

/// Angle of every image to the main centre of its class, in degrees.
fn measure(set: &RecordSet, network: &Inference, centers: &Tensor, batch: u32) -> anyhow::Result<Vec<f64>> {
    let bar = progress::bar(set.len(), "measuring");
    let mut cosines = Cosines::new(centers.size()[1] as usize);
    let mut first = 0;
    while first < set.len() {
        let end = set.len().min(first + u64::from(batch));
        let (images, labels) = load(set, first, end)?;
        let index = Tensor::from_slice(&labels.iter().map(|&label| i64::from(label)).collect::<Vec<_>>());
        let values = tch::no_grad(|| {
            let embedding_bd = unit(&network.forward(&images));
            let own_bkd = centers.index_select(0, &index);
            own_bkd.bmm(&embedding_bd.unsqueeze(2)).view([-1])
        });
        cosines.extend(
            &labels,
            &Vec::<f32>::try_from(values).context("cosines as numbers")?,
        );
        bar.inc(end - first);
        first = end;
    }
    bar.finish_and_clear();
    Ok(cosines.angles())
}

/// Images `first..end` as the network wants them, `[n, 3, 112, 112]` f32, and their labels.
fn load(set: &RecordSet, first: u64, end: u64) -> anyhow::Result<(Tensor, Vec<u32>)> {
    let mut values = vec![0f32; (end - first) as usize * PIXEL_BYTES];
    let (planes, _) = values.as_chunks_mut::<PIXEL_BYTES>();
    let indices: Vec<u64> = (first..end).collect();
    let labels = indices
        .par_iter()
        .zip(planes)
        .map(|(&index, planes)| {
            let mut pixels = [0; PIXEL_BYTES];
            let label = data::read_pixels(set, index, &mut pixels).map_err(explain)?;
            planes::normalise(&pixels, false, planes);
            Ok(label)
        })
        .collect::<anyhow::Result<Vec<u32>>>()?;
    let images = Tensor::from_slice(&values).view([labels.len() as i64, 3, IMAGE_SIZE, IMAGE_SIZE]);
    Ok((images, labels))
}

/// What was kept.
struct Kept {
    images: u64,
    identities: u32,
}

/// Copies the images that `wanted` keeps, byte for byte, under keys 0, 1, 2, ...
fn copy(set: &RecordSet, target: &Path, wanted: impl Fn(usize) -> bool) -> anyhow::Result<Kept> {
    let mut writer = RecordWriter::create(target).map_err(explain)?;
    let mut has_images = vec![false; set.num_classes() as usize];
    let mut images = 0;
    let bar = progress::bar(set.len(), "copying");
    for (index, place) in (0..set.len()).zip(0usize..) {
        bar.inc(1);
        if !wanted(place) {
            continue;
        }
        let record = set.record(index).map_err(explain)?;
        if let Image::Encoded(body, _) = &record.image {
            let header = RecordHeader {
                labels: vec![record.label as f32],
                id: images,
            };
            writer.write(images, &header, body).map_err(explain)?;
            images += 1;
            if let Some(has) = has_images.get_mut(record.label as usize) {
                *has = true;
            }
        }
    }
    writer.finish().map_err(explain)?;
    bar.finish_and_clear();
    let identities = has_images.into_iter().filter(|has| *has).count() as u32;
    Ok(Kept { images, identities })
}

fn list_dropped(set: &RecordSet, angles: &[f64], limit: f64, path: &Path) -> anyhow::Result<()> {
    let mut text = String::new();
    for (index, angle) in (0..set.len()).zip(angles).filter(|(_, angle)| **angle > limit) {
        let label = set.record(index).map_err(explain)?.label;
        writeln!(text, "{}\t{label}\t{angle:.2}", set.name(index))?;
    }
    write_atomically(path, text.as_bytes()).map_err(explain)
}

#[cfg(test)]
mod tests;
