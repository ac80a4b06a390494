//! Features of a data set's images from a network. Knows no network: the caller embeds.

use super::MfrError;
use crate::{
    data::{Dataset, decode::PIXEL_BYTES, read_pixels},
    eval::{ijb::features::MemoryFeatures, verification::normalise},
};
use anyhow::ensure;
use rayon::prelude::*;
use tch::{Kind, Tensor};

/// Embeds every image and, with `flip`, its mirror image, at most `batch` at a time; gives the labels too. `embed` takes
/// normalised images `[b, 3, 112, 112]` f32 on the CPU and gives `[b, dim]`.
pub fn embed_dataset(
    dataset: &dyn Dataset,
    batch: usize,
    flip: bool,
    embed: &mut dyn FnMut(&Tensor) -> anyhow::Result<Tensor>,
) -> Result<(MemoryFeatures, Vec<i64>), MfrError> {
    let mut out = MemoryFeatures::default();
    let mut labels = Vec::new();
    for first in (0..dataset.len()).step_by(batch.max(1)) {
        let end = dataset.len().min(first + batch.max(1) as u64);
        let indices: Vec<u64> = (first..end).collect();
        let mut pixels = vec![0; indices.len() * PIXEL_BYTES];
        let (images, _) = pixels.as_chunks_mut::<PIXEL_BYTES>();
        let read: Vec<i64> = images
            .par_iter_mut()
            .zip(&indices)
            .map(|(image, &index)| read_pixels(dataset, index, image).map(i64::from))
            .collect::<Result<_, _>>()?;
        labels.extend(read);
        let images = normalise(&pixels);
        let failed = |cause: anyhow::Error| MfrError::Embed { first, end, cause };
        let mut rows =
            |images: &Tensor| embed(images).and_then(|found| values(&found, &mut out.dim, indices.len()));
        out.feat.extend(rows(&images).map_err(failed)?);
        if flip {
            out.feat_flip.extend(rows(&images.flip([3])).map_err(failed)?);
        }
    }
    Ok((out, labels))
}

/// The values of embeddings `[count, dim]`; `dim` is set by the first.
fn values(embeddings: &Tensor, dim: &mut usize, count: usize) -> anyhow::Result<Vec<f32>> {
    let shape = embeddings.size();
    let known = *dim as i64;
    let fits = matches!(shape[..], [rows, columns] if rows == count as i64 && columns > 0 && (known == 0 || columns == known));
    ensure!(fits, "embeddings have shape {shape:?}, expected [{count}, D]");
    *dim = shape[1] as usize;
    let flat = embeddings.f_to_kind(Kind::Float)?.f_contiguous()?.f_view([-1])?;
    Ok(Vec::try_from(flat)?)
}
