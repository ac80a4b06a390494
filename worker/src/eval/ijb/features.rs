//! Features of single images: what a network gave for each image of the list and for its mirror image.

use super::IjbError;
use crate::data::{Access, MappedFile};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use std::{
    ops::Range,
    path::{Path, PathBuf},
};

/// Features by image, in the order of the list of images.
pub trait ImageFeatures: Sync {
    /// Images.
    fn images(&self) -> usize;

    /// Values of one feature.
    fn dim(&self) -> usize;

    /// True if there are features of the mirror images.
    fn has_flip(&self) -> bool;

    /// Copies the feature of `image` to `out` (length `dim`); of its mirror image with `flip`.
    ///
    /// # Panics
    /// If there is no such image, or no mirror image.
    fn read(&self, image: usize, flip: bool, out: &mut [f32]);
}

/// Features in memory.
#[derive(Clone, Debug, Default)]
pub struct MemoryFeatures {
    /// Of the images, `[images, dim]` row-major.
    pub feat: Vec<f32>,
    /// Of the mirror images, likewise.
    pub feat_flip: Vec<f32>,
    /// Values of one feature.
    pub dim: usize,
}

impl ImageFeatures for MemoryFeatures {
    fn images(&self) -> usize {
        self.feat.len() / self.dim.max(1)
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn has_flip(&self) -> bool {
        self.feat_flip.len() == self.feat.len()
    }

    fn read(&self, image: usize, flip: bool, out: &mut [f32]) {
        let values = if flip { &self.feat_flip } else { &self.feat };
        out.copy_from_slice(&values[image * self.dim..(image + 1) * self.dim]);
    }
}

/// Features in a safetensors file: `feat` and, if mirror images count, `feat_flip`, both `[images, D]`. The file is
/// mapped: features larger than the memory are paged in as they are used.
#[derive(Debug)]
pub struct FeatureFile {
    path: PathBuf,
    bytes: MappedFile,
    feat: Stored,
    feat_flip: Option<Stored>,
}

/// A matrix within the file.
#[derive(Clone, Debug)]
struct Stored {
    bytes: Range<usize>,
    dtype: Dtype,
    images: usize,
    dim: usize,
}

impl FeatureFile {
    /// Opens a file that must have `feat`.
    pub fn open(path: &Path) -> Result<Self, IjbError> {
        Self::open_named(path, "feat", "feat_flip")
    }

    /// Opens a file whose tensors have other names; the first must be there.
    pub fn open_named(path: &Path, name: &str, name_flip: &str) -> Result<Self, IjbError> {
        let bytes = MappedFile::open(path, Access::Sequential).map_err(IjbError::io(path))?;
        let feat =
            find(path, &bytes, name)?.ok_or_else(|| IjbError::file(path, format!("no tensor {name}")))?;
        let feat_flip = find(path, &bytes, name_flip)?;
        if let Some(flip) = &feat_flip
            && (flip.images, flip.dim) != (feat.images, feat.dim)
        {
            let detail = format!(
                "{name} is [{}, {}] and {name_flip} [{}, {}]",
                feat.images, feat.dim, flip.images, flip.dim
            );
            return Err(IjbError::file(path, detail));
        }
        Ok(Self {
            path: path.to_owned(),
            bytes,
            feat,
            feat_flip,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn find(path: &Path, bytes: &[u8], name: &str) -> Result<Option<Stored>, IjbError> {
    let refuse = |detail: String| IjbError::file(path, detail);
    // Checks that ranges lie within the file and agree with kinds and shapes.
    let file = SafeTensors::deserialize(bytes)
        .map_err(|error| refuse(format!("not a safetensors file: {error}")))?;
    if !file.names().contains(&name) {
        return Ok(None);
    }
    let view = file.tensor(name).map_err(|error| refuse(error.to_string()))?;
    let start = view.data().as_ptr().addr() - bytes.as_ptr().addr();
    match (view.shape(), view.dtype()) {
        (&[images, dim], dtype @ (Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)) if dim > 0 => {
            Ok(Some(Stored {
                bytes: start..start + view.data().len(),
                dtype,
                images,
                dim,
            }))
        }
        (shape, dtype) => Err(refuse(format!(
            "tensor {name} is {dtype} {shape:?}, expected [images, D] of floats"
        ))),
    }
}

impl ImageFeatures for FeatureFile {
    fn images(&self) -> usize {
        self.feat.images
    }

    fn dim(&self) -> usize {
        self.feat.dim
    }

    fn has_flip(&self) -> bool {
        self.feat_flip.is_some()
    }

    fn read(&self, image: usize, flip: bool, out: &mut [f32]) {
        let stored = match flip {
            true => self.feat_flip.as_ref().expect("the caller asked has_flip"),
            false => &self.feat,
        };
        let all = &self.bytes[stored.bytes.clone()];
        let row = all.len() / stored.images;
        let row = &all[image * row..(image + 1) * row];
        match stored.dtype {
            Dtype::F64 => decode(row, out, |bytes| f64::from_le_bytes(bytes) as f32),
            Dtype::F16 => decode(row, out, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Dtype::BF16 => decode(row, out, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            // `find` lets no other kind through.
            _ => decode(row, out, f32::from_le_bytes),
        }
    }
}

fn decode<const N: usize>(row: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    let (values, _) = row.as_chunks();
    for (out, &bytes) in out.iter_mut().zip(values) {
        *out = value(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::{serialize, tensor::TensorView};
    use std::fs;

    type Tensor<'a> = (&'a str, Dtype, &'a [usize], Vec<u8>);

    fn open(tensors: &[Tensor<'_>]) -> Result<FeatureFile, IjbError> {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("f.safetensors");
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            let view = TensorView::new(*dtype, shape.to_vec(), data).expect("a tensor");
            (*name, view)
        });
        fs::write(&path, serialize(views, None).expect("a file")).expect("written");
        FeatureFile::open(&path)
    }

    #[test]
    fn every_floating_kind_is_read() {
        let values = [1.0f32, -2.5, 3.0, 0.25, -8.0, 0.0];
        let f64s = values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect();
        let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let f16s = values
            .iter()
            .flat_map(|&v| f16::from_f32(v).to_le_bytes())
            .collect();
        let bf16s = values
            .iter()
            .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
            .collect();
        for (dtype, data) in [
            (Dtype::F64, f64s),
            (Dtype::F32, f32s.clone()),
            (Dtype::F16, f16s),
            (Dtype::BF16, bf16s),
        ] {
            let mirrored = ("feat_flip", Dtype::F32, &[3usize, 2] as &[usize], f32s.clone());
            let file = open(&[("feat", dtype, &[3, 2], data), mirrored]).expect("opened");
            assert_eq!((file.images(), file.dim(), file.has_flip()), (3, 2, true));
            for flip in [false, true] {
                let mut out = [0.0; 2];
                file.read(1, flip, &mut out);
                assert_eq!(out, [3.0, 0.25], "{dtype}");
            }
        }
    }

    #[test]
    fn other_files_are_refused() {
        for (tensors, expected) in [
            (vec![], "no tensor feat"),
            (
                vec![("feat", Dtype::I32, &[2usize, 1] as &[usize], vec![0; 8])],
                "I32 [2, 1], expected [images, D]",
            ),
            (
                vec![("feat", Dtype::F32, &[2], vec![0; 8])],
                "F32 [2], expected [images, D]",
            ),
            (
                vec![("feat", Dtype::F32, &[2, 0], vec![])],
                "F32 [2, 0], expected [images, D]",
            ),
            (
                vec![
                    ("feat", Dtype::F32, &[2, 1], vec![0; 8]),
                    ("feat_flip", Dtype::F32, &[1, 2], vec![0; 8]),
                ],
                "feat is [2, 1] and feat_flip [1, 2]",
            ),
        ] {
            let error = open(&tensors).expect_err("refused").to_string();
            assert!(error.contains(expected), "{error}");
        }
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("f.safetensors");
        fs::write(&path, b"\x10\0\0\0\0\0\0\0{").expect("written");
        let error = FeatureFile::open(&path).expect_err("refused").to_string();
        assert!(error.contains("not a safetensors file"), "{error}");
    }
}
