//! Synthetic identities: procedurally drawn faces as a data set without files. For demos, tests and benchmarks where no
//! photographs may be shipped; not a substitute for them.
//!
//! An identity fixes geometry and colours ([`identity`]); pose, light, expression, occlusion, blur and noise vary from
//! image to image ([`render`]). A picture is a function of (seed, identity, image) alone.

mod canvas;
mod identity;
mod render;

use super::{DataError, Dataset, Image, Record, decode::PIXEL_BYTES, decode::Pixels};

/// Name of the data set in a job file.
pub const NAME: &str = "synthetic";

/// Identities from here on are for verification: no training set reaches them.
pub const FIRST_VERIFICATION_IDENTITY: u64 = 1 << 31;

/// `num_image` pictures of `num_classes` identities, as many of each as divides: image i shows identity
/// `i % num_classes`.
#[derive(Debug)]
pub struct SyntheticFaces {
    seed: u64,
    num_classes: u32,
    num_image: u64,
}

impl SyntheticFaces {
    /// A data set; nothing is drawn yet.
    pub fn new(seed: u64, num_classes: u32, num_image: u64) -> Self {
        Self {
            seed,
            num_classes,
            num_image,
        }
    }
}

/// Draws one picture: `identity` who, `image` which picture of them.
pub fn draw(seed: u64, identity: u64, image: u64, out: &mut Pixels) {
    render::render(seed, identity, image, out);
}

impl Dataset for SyntheticFaces {
    fn len(&self) -> u64 {
        self.num_image
    }

    fn num_classes(&self) -> u32 {
        self.num_classes
    }

    fn describe(&self) -> String {
        format!(
            "synthetic faces: {} images of {} identities",
            self.num_image, self.num_classes
        )
    }

    fn name(&self, index: u64) -> String {
        format!("synthetic image {index}")
    }

    fn record(&self, index: u64) -> Result<Record<'_>, DataError> {
        let classes = u64::from(self.num_classes);
        let (Some(identity), Some(image)) = (index.checked_rem(classes), index.checked_div(classes)) else {
            return Err(DataError::record(self.name(index), "there are no identities"));
        };
        let mut pixels = Box::new([0; PIXEL_BYTES]);
        draw(self.seed, identity, image, &mut pixels);
        Ok(Record {
            label: identity as u32,
            image: Image::Pixels(pixels),
        })
    }
}
