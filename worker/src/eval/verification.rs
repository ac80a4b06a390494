//! Verification of a network on a set: embed every image and its mirror image, then [`super::metrics`].

use super::{EvalError, VerificationSet, metrics};
use crate::data::decode::{OtherSize, PIXEL_BYTES, SIDE, decode};
use rayon::prelude::*;
use std::ops::Range;
use tch::{Kind, Tensor};

/// False accept rates at which the true accept rate is reported, as they are written.
pub const FAR_TARGETS: [(&str, f64); 4] = [("1e-1", 1e-1), ("1e-2", 1e-2), ("1e-3", 1e-3), ("1e-4", 1e-4)];

/// What is known of a network after a verification set.
#[derive(Clone, Debug, PartialEq)]
pub struct Verification {
    /// Set.
    pub name: String,
    /// Pairs in it.
    pub pairs: usize,
    /// Mean accuracy of 10 folds, [0, 1].
    pub accuracy: f64,
    /// Population standard deviation over the folds.
    pub accuracy_std: f64,
    /// Mean L2 norm of the embeddings before normalisation.
    pub xnorm: f64,
    /// True accept rate by false accept rate ([`FAR_TARGETS`]); nothing if a fold lacks same or different pairs.
    pub tar_at_far: Option<Vec<(&'static str, f64)>>,
}

/// The numbers of a set from its embeddings: `emb` of the images and `emb_flip` of the mirrored ones, `[2n, dim]`
/// row-major, rows 2i and 2i+1 are pair i.
pub fn score<T: Copy + Into<f64>>(
    name: &str,
    emb: &[T],
    emb_flip: &[T],
    dim: usize,
    issame: &[bool],
) -> Result<Verification, EvalError> {
    let distances = metrics::pair_distances(emb, emb_flip, dim)?;
    if distances.len() != issame.len() {
        return Err(EvalError::Sizes {
            emb: emb.len(),
            emb_flip: emb_flip.len(),
            dim,
            pairs: issame.len(),
        });
    }
    let accuracy = metrics::roc(&distances, issame, metrics::ACCURACY_GRID)?.accuracy;
    let tar = metrics::tar_at_far(&distances, issame, &FAR_TARGETS.map(|(_, far)| far))?;
    Ok(Verification {
        name: name.to_owned(),
        pairs: issame.len(),
        accuracy: metrics::mean(&accuracy),
        accuracy_std: metrics::population_std(&accuracy),
        xnorm: metrics::mean_norm(emb, emb_flip, dim),
        tar_at_far: tar.map(|tar| {
            FAR_TARGETS
                .iter()
                .zip(tar)
                .map(|((name, _), t)| (*name, t.tar))
                .collect()
        }),
    })
}

/// Embeddings of a set: `emb` and `emb_flip`, both `[2n, dim]` row-major.
#[derive(Clone, Debug)]
pub struct Embeddings {
    /// Of the images.
    pub emb: Vec<f32>,
    /// Of the mirrored images.
    pub emb_flip: Vec<f32>,
    /// Length of one.
    pub dim: usize,
}

/// Embeds these images of `set` and their mirror images, at most `batch` at a time. `embed` takes normalised images
/// `[b, 3, 112, 112]` f32 on the CPU and gives `[b, dim]`; it is called twice a batch.
pub fn embed_set(
    set: &VerificationSet,
    images: Range<usize>,
    batch: usize,
    embed: &mut dyn FnMut(&Tensor) -> anyhow::Result<Tensor>,
) -> Result<Embeddings, EvalError> {
    let mut out = Embeddings {
        emb: Vec::new(),
        emb_flip: Vec::new(),
        dim: 0,
    };
    let batch = batch.max(1);
    for first in images.clone().step_by(batch) {
        let end = (first + batch).min(images.end);
        let failed = |cause: anyhow::Error| EvalError::Embed { first, end, cause };
        let images = decode_images(set, first, end)?;
        for (rows, images) in [
            (&mut out.emb, images.shallow_clone()),
            (&mut out.emb_flip, images.flip([3])),
        ] {
            let embedding = embed(&images).map_err(failed)?;
            let &[count, dim] = embedding.size().as_slice() else {
                return Err(failed(anyhow::anyhow!(
                    "embeddings have shape {:?}",
                    embedding.size()
                )));
            };
            let known = if out.dim == 0 { dim as usize } else { out.dim };
            if count as usize != end - first || dim as usize != known || dim == 0 {
                return Err(failed(anyhow::anyhow!(
                    "embeddings have shape {:?}, expected [{}, {known}]",
                    embedding.size(),
                    end - first
                )));
            }
            out.dim = known;
            let flat = embedding
                .to_device(tch::Device::Cpu)
                .to_kind(Kind::Float)
                .contiguous()
                .view([-1]);
            let flat = Vec::<f32>::try_from(flat).map_err(|error| failed(error.into()))?;
            rows.extend(flat);
        }
    }
    Ok(out)
}

/// Measures a network on `set`; see [`embed_set`] and [`score`].
pub fn evaluate(
    set: &VerificationSet,
    batch: usize,
    embed: &mut dyn FnMut(&Tensor) -> anyhow::Result<Tensor>,
) -> Result<Verification, EvalError> {
    let Embeddings { emb, emb_flip, dim } = embed_set(set, 0..set.len(), batch, embed)?;
    score(set.name(), &emb, &emb_flip, dim, set.issame())
}

/// Images `first..end`, decoded and normalised: `[b, 3, 112, 112]` f32.
fn decode_images(set: &VerificationSet, first: usize, end: usize) -> Result<Tensor, EvalError> {
    let mut pixels = vec![0; (end - first) * PIXEL_BYTES];
    let (images, _) = pixels.as_chunks_mut::<PIXEL_BYTES>();
    images
        .par_iter_mut()
        .enumerate()
        .try_for_each(|(offset, image)| {
            let index = first + offset;
            let encoded = set.encoded(index).unwrap_or_default();
            // The sets are crops that were aligned for this size: another one means another alignment.
            decode(encoded, OtherSize::Refuse, image).map_err(|detail| EvalError::Image {
                path: set.path().to_owned(),
                index,
                detail,
            })
        })?;
    Ok(normalise(&pixels))
}

/// Decoded images, one after the other, as a network takes them: `[b, 3, 112, 112]` f32 in [-1, 1].
pub(super) fn normalise(pixels: &[u8]) -> Tensor {
    let side = SIDE as i64;
    let pixels = Tensor::from_slice(pixels).view([-1, side, side, 3]);
    let pixels = pixels.permute([0, 3, 1, 2]).to_kind(Kind::Float);
    ((pixels / 255.0 - 0.5) / 0.5).contiguous()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// A set of 10 pairs of one JPEG each.
    fn set() -> VerificationSet {
        let mut jpeg = Vec::new();
        let grey = image::GrayImage::from_fn(SIDE as u32, SIDE as u32, |x, _| image::Luma([x as u8]));
        image::codecs::jpeg::JpegEncoder::new(&mut jpeg)
            .encode_image(&grey)
            .expect("encode");
        let mut bytes = b"](B".to_vec();
        bytes.extend((jpeg.len() as u32).to_le_bytes());
        bytes.extend(&jpeg);
        bytes.extend(b"q\x00");
        bytes.extend(b"h\x00".repeat(19));
        bytes.extend(b"e](");
        bytes.extend([0x88; 10]);
        bytes.extend(b"e\x86.");
        VerificationSet::parse(Path::new("grey.bin"), &bytes).expect("valid")
    }

    #[test]
    fn images_are_normalised_mirrored_and_embedded_in_batches() {
        let mut sizes = Vec::new();
        let mut embed = |images: &Tensor| {
            sizes.push(images.size()[0]);
            assert_eq!(images.size()[1..], [3, 112, 112]);
            // Left and right border of the first row.
            let row = images.select(1, 0).select(1, 0);
            Ok(Tensor::stack(&[row.select(1, 0), row.select(1, 111)], 1))
        };
        let found = embed_set(&set(), 0..20, 8, &mut embed).expect("embedded");
        assert_eq!(sizes, [8, 8, 8, 8, 4, 4]);
        assert_eq!((found.dim, found.emb.len(), found.emb_flip.len()), (2, 40, 40));
        assert!(
            (found.emb[0] + 1.0).abs() < 0.03,
            "black is -1, found {}",
            found.emb[0]
        );
        assert_eq!(
            (found.emb[0], found.emb[1]),
            (found.emb_flip[1], found.emb_flip[0])
        );
    }

    #[test]
    fn a_network_that_fails_or_lies_is_named() {
        let mut fails = |_: &Tensor| anyhow::bail!("out of memory");
        let error = evaluate(&set(), 8, &mut fails).expect_err("failed").to_string();
        assert_eq!(error, "embed images 1 to 8, counted from 1: out of memory");
        let mut lies = |images: &Tensor| {
            Ok(Tensor::ones(
                [images.size()[0] - 1, 4],
                (Kind::Float, tch::Device::Cpu),
            ))
        };
        let error = evaluate(&set(), 8, &mut lies).expect_err("lied").to_string();
        assert!(error.contains("shape [7, 4], expected [8, 4]"), "{error}");
    }

    #[test]
    fn one_kind_of_pairs_has_accuracy_but_no_tar() {
        let mut embed = |images: &Tensor| Ok(images.flatten(1, -1).narrow(1, 0, 16));
        let found = evaluate(&set(), 7, &mut embed).expect("measured");
        assert_eq!((found.pairs, found.accuracy, found.accuracy_std), (10, 1.0, 0.0));
        assert_eq!(found.tar_at_far, None);
    }
}
