//! Training data: formats behind one [`Dataset`] trait, the order of the samples, the loader. Knows no model, no
//! rank's life and no gRPC. A new format is one new file and one line in [`open`].

pub mod align;
pub mod augment;
pub mod bin_write;
mod cache;
pub mod choose;
pub mod decode;
pub mod duplicates;
mod error;
pub mod identities;
pub mod image_folder;
pub mod image_list;
pub mod journal;
pub mod landmarks;
pub mod loader;
mod mmap;
pub mod pair_list;
pub mod pickle;
pub mod planes;
pub mod recode;
pub mod record_index;
pub mod record_set;
pub mod recordio;
pub mod recordio_write;
pub mod repack;
pub mod roots;
pub mod sampler;
pub mod synthetic;

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    sync::Arc,
};

use arcface_proto::spec::DataSpec;

pub use self::{
    cache::ImageCache,
    decode::{OtherSize, Pixels},
    error::DataError,
    loader::{Batch, Form, Loaded, Loader, LoaderOptions},
    mmap::{Access, MappedFile},
    sampler::{Epochs, MicroBatch},
};

/// Labelled images with random access. Every number of the file is checked on the way out: a label is below
/// [`num_classes`](Self::num_classes), or the record is an error.
pub trait Dataset: Send + Sync {
    /// Images.
    fn len(&self) -> u64;

    /// Whether there is no image.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Identities.
    fn num_classes(&self) -> u32;

    /// What it is and where, for people.
    fn describe(&self) -> String;

    /// How errors and listings name an image: file and key.
    fn name(&self, index: u64) -> String;

    /// The image at `index`, from 0.
    fn record(&self, index: u64) -> Result<Record<'_>, DataError>;
}

/// One labelled image.
#[derive(Debug)]
pub struct Record<'a> {
    /// Identity, below the data set's number of classes.
    pub label: u32,
    /// The picture.
    pub image: Image<'a>,
}

/// A picture as its data set has it.
#[derive(Debug)]
pub enum Image<'a> {
    /// A JPEG or PNG file, and what to do if it is not 112x112.
    Encoded(Cow<'a, [u8]>, OtherSize),
    /// Ready pixels.
    Pixels(Box<Pixels>),
}

/// Reads, checks and decodes one image into `out`; gives its label.
pub fn read_pixels(dataset: &dyn Dataset, index: u64, out: &mut Pixels) -> Result<u32, DataError> {
    read_counted(dataset, index, out).map(|(label, _)| label)
}

/// The same, with the number of bytes that were decoded.
fn read_counted(dataset: &dyn Dataset, index: u64, out: &mut Pixels) -> Result<(u32, usize), DataError> {
    let record = dataset.record(index)?;
    let bytes = match &record.image {
        Image::Encoded(bytes, other_size) => {
            decode::decode(bytes, *other_size, out)
                .map_err(|message| DataError::record(dataset.name(index), message))?;
            bytes.len()
        }
        Image::Pixels(pixels) => {
            out.copy_from_slice(pixels.as_slice());
            pixels.len()
        }
    };
    Ok((record.label, bytes))
}

/// Opens the training set of a job: a folder with `train.rec` and `train.idx` (or a `.rec` file), an image folder, or
/// `synthetic`. `num_classes` is the job's `head.num_classes`; it and `data.num_image` are refused where the data set
/// has other numbers. `seed` draws synthetic faces. With `data_roots` the path must lie inside one of them.
pub fn open(
    spec: &DataSpec,
    num_classes: Option<u32>,
    seed: u64,
    data_roots: &[PathBuf],
) -> Result<Arc<dyn Dataset>, DataError> {
    if spec.rec == synthetic::NAME {
        let (Some(num_classes), Some(num_image)) = (num_classes, spec.num_image) else {
            return Err(DataError::Missing {
                field: "data.rec",
                message: "synthetic data needs head.num_classes and data.num_image".into(),
            });
        };
        return Ok(Arc::new(synthetic::SyntheticFaces::new(
            seed,
            num_classes,
            num_image,
        )));
    }
    let path = roots::resolve(&spec.rec, data_roots)?;
    let dataset = open_path(&path, num_classes)?;
    check_number("data.num_image", spec.num_image, dataset.len(), &path)?;
    check_number(
        "head.num_classes",
        num_classes.map(u64::from),
        dataset.num_classes().into(),
        &path,
    )?;
    Ok(dataset)
}

/// Opens a data set by its path alone, as the offline tools do. `num_classes` spares counting the identities where
/// the data set does not say how many there are.
pub fn open_path(path: &Path, num_classes: Option<u32>) -> Result<Arc<dyn Dataset>, DataError> {
    let metadata = path.metadata().map_err(|e| DataError::io(path, e))?;
    let rec = match metadata.is_dir() {
        true => path.join("train.rec"),
        false => path.into(),
    };
    if metadata.is_file() || rec.exists() || rec.with_extension("idx").exists() {
        return Ok(Arc::new(record_set::RecordSet::open(&rec, num_classes)?));
    }
    Ok(Arc::new(image_folder::ImageFolder::open(path)?))
}

fn check_number(field: &'static str, given: Option<u64>, found: u64, path: &Path) -> Result<(), DataError> {
    match given {
        Some(given) if given != found => Err(DataError::Mismatch {
            field,
            given,
            found,
            path: path.into(),
        }),
        _ => Ok(()),
    }
}
