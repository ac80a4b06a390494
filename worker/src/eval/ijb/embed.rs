//! Features of a benchmark's images from a network: the face is cut out by its five landmarks, as the training crops
//! were, and embedded with its mirror image. Knows no network: the caller embeds.

use super::{Benchmark, IjbError, features::MemoryFeatures};
use crate::{
    data::{
        align::{self, Similarity},
        decode::{PIXEL_BYTES, Pixels, decode_any},
        image_folder::read_image_file,
    },
    eval::verification::normalise,
};
use anyhow::ensure;
use rayon::prelude::*;
use std::{
    ops::Range,
    path::{Component, Path},
};
use tch::{Kind, Tensor};

/// Embeds these images of the list and, with `flip`, their mirror images, at most `batch` at a time. `embed` takes
/// normalised images `[b, 3, 112, 112]` f32 on the CPU and gives `[b, dim]`.
pub fn embed_images(
    benchmark: &Benchmark,
    images: Range<usize>,
    batch: usize,
    flip: bool,
    embed: &mut dyn FnMut(&Tensor) -> anyhow::Result<Tensor>,
) -> Result<MemoryFeatures, IjbError> {
    let mut out = MemoryFeatures::default();
    for first in images.clone().step_by(batch.max(1)) {
        let end = (first + batch.max(1)).min(images.end);
        let failed = |cause: anyhow::Error| IjbError::Embed { first, end, cause };
        let mut pixels = vec![0; (end - first) * PIXEL_BYTES];
        let (crops, _) = pixels.as_chunks_mut::<PIXEL_BYTES>();
        crops
            .par_iter_mut()
            .enumerate()
            .try_for_each(|(offset, crop)| cut(benchmark, first + offset, crop))?;
        let images = normalise(&pixels);
        let mut rows =
            |images: &Tensor| embed(images).and_then(|found| values(&found, &mut out.dim, end - first));
        out.feat.extend(rows(&images).map_err(failed)?);
        if flip {
            out.feat_flip.extend(rows(&images.flip([3])).map_err(failed)?);
        }
    }
    Ok(out)
}

/// The values of embeddings `[count, dim]`; `dim` is set by the first.
fn values(embeddings: &Tensor, dim: &mut usize, count: usize) -> anyhow::Result<Vec<f32>> {
    let shape = embeddings.size();
    let known = *dim as i64;
    ensure!(
        matches!(shape[..], [rows, columns] if rows == count as i64 && columns > 0 && (known == 0 || columns == known)),
        "embeddings have shape {shape:?}, expected [{count}, {}]",
        if known == 0 {
            "D".to_owned()
        } else {
            known.to_string()
        }
    );
    *dim = shape[1] as usize;
    let flat = embeddings.f_to_kind(Kind::Float)?.f_contiguous()?.f_view([-1])?;
    Ok(Vec::try_from(flat)?)
}

/// Cuts the face out of one image.
fn cut(benchmark: &Benchmark, index: usize, crop: &mut Pixels) -> Result<(), IjbError> {
    let image = &benchmark.images()[index];
    let name = Path::new(&image.name);
    let refuse = |detail: String| IjbError::Image {
        image: index + 1,
        detail: format!("{}: {detail}", image.name),
    };
    // A list from elsewhere must not make us read files elsewhere.
    if !name.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(refuse("leads out of the folder of images".into()));
    }
    let points = image.landmarks.map(|point| point.map(f64::from));
    let onto_crop = Similarity::between(&points, &align::TEMPLATE)
        .ok_or_else(|| refuse("the landmarks are all in one place".into()))?;
    let path = benchmark.layout().loose_crop().join(name);
    let bytes = read_image_file(&path).map_err(|error| IjbError::Image {
        image: index + 1,
        detail: error.to_string(),
    })?;
    let decoded = decode_any(&bytes).map_err(refuse)?;
    align::warp(&decoded, &onto_crop, crop);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{ImageFeatures, Layout, Protocol};
    use super::*;
    use std::fs;

    /// A benchmark of grey ramps whose faces lie where the crops have them.
    fn benchmark(dir: &Path, names: &[&str]) -> Benchmark {
        fs::create_dir_all(dir.join("IJBC/meta")).expect("made");
        fs::create_dir_all(dir.join("IJBC/loose_crop")).expect("made");
        let layout = Layout::find(dir, Protocol::Ijbc).expect("found");
        let points: Vec<String> = align::TEMPLATE
            .as_flattened()
            .iter()
            .map(f64::to_string)
            .collect();
        let points = points.join(" ");
        let images: String = names
            .iter()
            .map(|name| format!("{name} {points} 0.9\n"))
            .collect();
        let memberships: String = (1..)
            .zip(names)
            .map(|(i, name)| format!("{name} {i} {i}\n"))
            .collect();
        fs::write(layout.images(), images).expect("written");
        fs::write(layout.memberships(), memberships).expect("written");
        for (index, name) in names.iter().enumerate().filter(|(_, name)| !name.contains('/')) {
            let ramp = image::RgbImage::from_fn(112, 112, |x, _| image::Rgb([x as u8, index as u8, 0]));
            ramp.save_with_format(layout.loose_crop().join(name), image::ImageFormat::Png)
                .expect("saved");
        }
        Benchmark::open(layout, true).expect("read")
    }

    #[test]
    fn faces_are_cut_out_normalised_and_mirrored() {
        let dir = tempfile::tempdir().expect("scratch");
        let benchmark = benchmark(dir.path(), &["1.jpg", "2.jpg", "3.jpg"]);
        // Red of the middle row at columns 20 and 91, and green.
        let mut batches = Vec::new();
        let mut embed = |images: &Tensor| {
            batches.push(images.size()[0]);
            let red = images.select(1, 0).select(1, 56);
            Ok(Tensor::stack(
                &[
                    red.select(1, 20),
                    red.select(1, 91),
                    images.select(1, 1).select(1, 56).select(1, 56),
                ],
                1,
            ))
        };
        let features = embed_images(&benchmark, 0..3, 2, true, &mut embed).expect("embedded");
        assert_eq!(
            (features.images(), features.dim(), features.has_flip()),
            (3, 3, true)
        );
        assert_eq!(batches, [2, 2, 1, 1]);
        let level = |value: f32| ((value + 1.0) * 127.5).round();
        let mut row = [0.0; 3];
        features.read(2, false, &mut row);
        assert_eq!(row.map(level), [20.0, 91.0, 2.0]);
        features.read(2, true, &mut row);
        assert_eq!(row.map(level), [91.0, 20.0, 2.0]);
    }

    #[test]
    fn what_cannot_be_embedded_is_named() {
        let dir = tempfile::tempdir().expect("scratch");
        let mut embed = |images: &Tensor| Ok(images.flatten(1, -1).narrow(1, 0, 4));
        let said = |names: &[&str], embed: &mut dyn FnMut(&Tensor) -> anyhow::Result<Tensor>| {
            let benchmark = benchmark(dir.path(), names);
            let all = 0..benchmark.images().len();
            embed_images(&benchmark, all, 8, false, embed)
                .expect_err("refused")
                .to_string()
        };
        let text = said(&["1.jpg", "../../2.jpg"], &mut embed);
        assert_eq!(
            text,
            "image 2, counted from 1: ../../2.jpg: leads out of the folder of images"
        );
        let text = said(&["1.jpg", "missing/2.jpg"], &mut embed);
        assert!(
            text.starts_with("image 2, counted from 1: ") && text.ends_with("no such file or folder"),
            "{text}"
        );
        let mut lies = |_: &Tensor| Ok(Tensor::zeros([7, 4], (Kind::Float, tch::Device::Cpu)));
        let text = said(&["1.jpg"], &mut lies);
        assert_eq!(
            text,
            "embed images 1 to 1, counted from 1: embeddings have shape [7, 4], expected [1, D]"
        );
    }
}
