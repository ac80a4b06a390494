//! From features of images to one feature per template, and scores of pairs of them. Pure arithmetic, in the order
//! and precision of the reference: images are added in f32, templates are normalised and compared in f64, so that
//! close scores keep their order.

use super::{IjbError, features::ImageFeatures, meta::Membership, meta::Pairs};
use rayon::prelude::*;
use std::fmt;

/// What becomes of the feature of an image before it is added to its template. Named as in the reference's
/// `ijb_evals.py`; `eval_ijbc.py` calls its N the other way round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// N: bring the feature to length 1. Without, long features, which networks give to good images, weigh more.
    pub normalize: bool,
    /// D: weigh by the score of the face detector.
    pub detector_score: bool,
    /// F: add the feature of the mirror image.
    pub flip: bool,
}

impl Settings {
    /// What published numbers are made with: N1 D1 F1 of `eval_ijbc.py`, N0 D1 F1 of `ijb_evals.py`.
    pub const REFERENCE: Self = Self {
        normalize: false,
        detector_score: true,
        flip: true,
    };

    /// All eight, in the order of `ijb_evals.py`.
    pub fn all() -> [Self; 8] {
        std::array::from_fn(|index| Self {
            normalize: index & 4 == 0,
            detector_score: index & 2 == 0,
            flip: index & 1 == 0,
        })
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (n, d, flip) = (
            self.normalize.into(),
            self.detector_score.into(),
            self.flip.into(),
        );
        let (n, d, flip): (u8, u8, u8) = (n, d, flip);
        write!(f, "N{n}D{d}F{flip}")
    }
}

/// The images of each template, those of one media together.
#[derive(Clone, Debug)]
pub struct Members {
    /// Template t has the images `order[start[t]..start[t + 1]]`.
    start: Vec<usize>,
    order: Vec<u32>,
    media: Vec<u32>,
}

impl Members {
    /// Groups images by template, media and place in the list.
    pub fn of(memberships: &[Membership], templates: usize) -> Self {
        // The list fits into memory, so its indices fit.
        let mut order: Vec<u32> = (0..memberships.len() as u32).collect();
        order.sort_by_key(|&image| {
            let image = memberships[image as usize];
            (image.template, image.media)
        });
        let mut start = vec![0; templates + 1];
        for image in memberships {
            start[image.template as usize + 1] += 1;
        }
        for template in 0..templates {
            start[template + 1] += start[template];
        }
        Self {
            start,
            order,
            media: memberships.iter().map(|image| image.media).collect(),
        }
    }

    /// Templates.
    pub fn templates(&self) -> usize {
        self.start.len() - 1
    }

    /// The images of a template, a slice per media.
    fn media(&self, template: usize) -> impl Iterator<Item = &[u32]> {
        let images = &self.order[self.start[template]..self.start[template + 1]];
        images.chunk_by(|&a, &b| self.media[a as usize] == self.media[b as usize])
    }
}

/// Features of templates, of length 1 (a template whose images cancel out has length 0).
#[derive(Clone, Debug, PartialEq)]
pub struct Templates {
    dim: usize,
    values: Vec<f64>,
}

impl Templates {
    /// Templates from their values, `[templates, dim]` row-major.
    #[cfg(test)]
    pub(super) fn from_values(dim: usize, values: Vec<f64>) -> Self {
        Self { dim, values }
    }

    /// The feature of a template.
    pub fn row(&self, template: u32) -> &[f64] {
        let start = template as usize * self.dim;
        &self.values[start..start + self.dim]
    }

    /// All values, `[templates, dim]` row-major.
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// Cosine of each pair of templates, in [-1, 1] but for rounding.
    pub fn scores(&self, pairs: &Pairs) -> Vec<f64> {
        let pairs = (&pairs.first, &pairs.second);
        pairs
            .into_par_iter()
            .with_min_len(1024)
            .map(|(&a, &b)| dot(self.row(a), self.row(b)))
            .collect()
    }
}

/// Sum of products. Eight sums side by side, which the compiler keeps in vector registers.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

/// The feature of every template: the mean over the images of one media, so that a video counts as much as a
/// photograph, then the sum over the media, brought to length 1. `faceness` has a value per image.
pub fn pool(
    features: &dyn ImageFeatures,
    members: &Members,
    faceness: &[f32],
    settings: Settings,
) -> Result<Templates, IjbError> {
    let dim = features.dim();
    let mut values = vec![0.0f64; members.templates() * dim];
    values.par_chunks_mut(dim).enumerate().try_for_each_init(
        || Scratch::new(dim),
        |scratch, (template, out)| scratch.pool(features, members.media(template), faceness, settings, out),
    )?;
    Ok(Templates { dim, values })
}

/// Buffers of one thread.
struct Scratch {
    image: Vec<f32>,
    mirrored: Vec<f32>,
    media: Vec<f32>,
    sum: Vec<f32>,
}

impl Scratch {
    fn new(dim: usize) -> Self {
        Self {
            image: vec![0.0; dim],
            mirrored: vec![0.0; dim],
            media: vec![0.0; dim],
            sum: vec![0.0; dim],
        }
    }

    fn pool<'a>(
        &mut self,
        features: &dyn ImageFeatures,
        media: impl Iterator<Item = &'a [u32]>,
        faceness: &[f32],
        settings: Settings,
        out: &mut [f64],
    ) -> Result<(), IjbError> {
        self.sum.fill(0.0);
        for images in media {
            self.media.fill(0.0);
            for &image in images {
                self.read(features, image as usize, faceness, settings)?;
                add(&mut self.media, &self.image);
            }
            let count = images.len() as f32;
            self.media.iter_mut().for_each(|x| *x /= count);
            add(&mut self.sum, &self.media);
        }
        let norm = norm(&self.sum);
        let norm = if norm == 0.0 { 1.0 } else { norm };
        for (out, &x) in out.iter_mut().zip(&self.sum) {
            *out = f64::from(x) / norm;
        }
        Ok(())
    }

    /// The feature of one image under the settings, in `self.image`.
    fn read(
        &mut self,
        features: &dyn ImageFeatures,
        image: usize,
        faceness: &[f32],
        settings: Settings,
    ) -> Result<(), IjbError> {
        features.read(image, false, &mut self.image);
        if settings.flip {
            features.read(image, true, &mut self.mirrored);
            add(&mut self.image, &self.mirrored);
        }
        if settings.normalize {
            let norm = norm(&self.image) as f32;
            let norm = if norm == 0.0 { 1.0 } else { norm };
            self.image.iter_mut().for_each(|x| *x /= norm);
        }
        if settings.detector_score {
            self.image.iter_mut().for_each(|x| *x *= faceness[image]);
        }
        // Below this, sums over all the images that fit into a machine stay finite.
        match norm(&self.image) {
            norm if norm < 1e25 => Ok(()),
            _ => Err(IjbError::NotFinite { image: image + 1 }),
        }
    }
}

fn add(sum: &mut [f32], values: &[f32]) {
    for (sum, x) in sum.iter_mut().zip(values) {
        *sum += x;
    }
}

fn norm(values: &[f32]) -> f64 {
    let squares = values.iter().map(|&x| f64::from(x) * f64::from(x));
    squares.sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::super::features::MemoryFeatures;
    use super::*;

    /// Three templates; template 0 has a video of two images and a photograph between them.
    fn memberships() -> Vec<Membership> {
        [(0, 7), (1, 9), (0, 3), (0, 7), (2, 7)]
            .map(|(template, media)| Membership { template, media })
            .to_vec()
    }

    fn features() -> MemoryFeatures {
        MemoryFeatures {
            feat: vec![1.0, 0.0, 3.0, 4.0, 0.0, 3.0, 3.0, 0.0, 1.0, -1.0],
            feat_flip: vec![1.0, 0.0, 3.0, 4.0, 0.0, 3.0, 3.0, 0.0, -1.0, 1.0],
            dim: 2,
        }
    }

    const PLAIN: Settings = Settings {
        normalize: false,
        detector_score: false,
        flip: true,
    };

    #[test]
    fn a_video_counts_as_one_photograph() {
        let members = Members::of(&memberships(), 3);
        let faceness = [0.5, 1.0, 1.0, 0.5, 1.0];
        let pool = |settings| pool(&features(), &members, &faceness, settings).expect("finite");
        let close = |found: &[f64], x: f64, y: f64| {
            let length = x.hypot(y);
            let near = |a: f64, b: f64| (a - b).abs() < 1e-7;
            assert!(
                near(found[0], x / length) && near(found[1], y / length),
                "{found:?}"
            );
        };
        // Mean of 2 and 6 beside 6.
        let plain = pool(PLAIN);
        close(plain.row(0), 4.0, 6.0);
        close(plain.row(1), 3.0, 4.0);
        assert_eq!(
            plain.row(2),
            [0.0, 0.0],
            "images that cancel out have no direction"
        );
        close(
            pool(Settings {
                detector_score: true,
                ..PLAIN
            })
            .row(0),
            2.0,
            6.0,
        );
        close(
            pool(Settings {
                normalize: true,
                ..PLAIN
            })
            .row(0),
            1.0,
            1.0,
        );
        close(pool(Settings { flip: false, ..PLAIN }).row(2), 1.0, -1.0);
        let pairs = Pairs {
            first: vec![0, 1, 1],
            second: vec![1, 1, 2],
            same: vec![false, true, false],
        };
        let scores = plain.scores(&pairs);
        let expected = [(12.0 + 24.0) / 52f64.sqrt() / 5.0, 1.0, 0.0];
        assert!(
            scores.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-7),
            "{scores:?}"
        );
    }

    #[test]
    fn settings_have_their_names() {
        let names = Settings::all().map(|s| s.to_string());
        let expected = [
            "N1D1F1", "N1D1F0", "N1D0F1", "N1D0F0", "N0D1F1", "N0D1F0", "N0D0F1", "N0D0F0",
        ];
        assert_eq!(names, expected);
        assert_eq!(Settings::REFERENCE.to_string(), "N0D1F1");
    }

    #[test]
    fn features_without_a_value_are_named() {
        let members = Members::of(&memberships(), 3);
        for bad in [f32::NAN, f32::INFINITY, 3e38] {
            let mut features = features();
            features.feat[6] = bad;
            let error = pool(&features, &members, &[1.0; 5], PLAIN).expect_err("refused");
            assert!(matches!(error, IjbError::NotFinite { image: 4 }), "{error}");
        }
    }

    #[test]
    fn products_of_any_length() {
        for length in [0, 1, 7, 8, 9, 100] {
            let a: Vec<f64> = (0..length).map(|i| f64::from(i) - 3.0).collect();
            let expected: f64 = a.iter().map(|x| x * (x + 1.0)).sum();
            let b: Vec<f64> = a.iter().map(|x| x + 1.0).collect();
            assert_eq!(dot(&a, &b), expected);
        }
    }
}
