//! Synthetic identities: procedurally drawn faces as a data set without files. For demos, tests and benchmarks where no
//! photographs may be shipped; not a substitute for them.
//!
//! An identity fixes geometry and colours; pose, light, expression, occlusion, blur and noise vary from
//! image to image. A picture is a function of (seed, identity, image) alone.

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

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(identity: u64, image: u64) -> Vec<f32> {
        let mut pixels = [0; PIXEL_BYTES];
        draw(7, identity, image, &mut pixels);
        pixels.iter().map(|&level| f32::from(level)).collect()
    }

    fn distance(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
    }

    #[test]
    fn a_picture_is_a_function_of_its_numbers() {
        assert_eq!(drawn(3, 4), drawn(3, 4));
        assert_ne!(drawn(3, 4), drawn(3, 5));
        assert_ne!(drawn(3, 4), drawn(4, 4));
        let set = SyntheticFaces::new(7, 5, 12);
        let record = set.record(11).unwrap();
        assert_eq!(record.label, 1);
        let Image::Pixels(pixels) = record.image else {
            panic!("drawn pictures are pixels");
        };
        assert!(
            pixels
                .iter()
                .zip(drawn(1, 2))
                .all(|(&level, expected)| f32::from(level) == expected)
        );
    }

    #[test]
    fn pixels_and_mean_colours_do_not_tell_people_apart() {
        let pairs = 150;
        let colours = |pixels: &[f32]| -> Vec<f32> {
            (0..3)
                .map(|c| pixels.iter().skip(c).step_by(3).sum::<f32>() / 12_544.0)
                .collect()
        };
        for (what, feature) in [
            (
                "pixels",
                &(|pixels: &[f32]| pixels.to_vec()) as &dyn Fn(&[f32]) -> Vec<f32>,
            ),
            ("mean colours", &colours),
        ] {
            let mut distances = Vec::new();
            for who in 0..pairs {
                let own = feature(&drawn(who, 0));
                distances.push((distance(&own, &feature(&drawn(who, 1))), true));
                distances.push((distance(&own, &feature(&drawn(who + 1, 1))), false));
            }
            // The best threshold, chosen on these very pairs.
            distances.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (mut right, mut best) = (pairs, 0);
            for (_, same) in distances {
                right = if same { right + 1 } else { right - 1 };
                best = best.max(right);
            }
            let accuracy = best as f64 / (2 * pairs) as f64;
            assert!((0.5..0.7).contains(&accuracy), "{what}: {accuracy}");
        }
    }
}
