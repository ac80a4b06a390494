//! Faces cut out of photographs: the similarity that takes five landmarks closest to their places in a 112x112 crop, and
//! the crop. Pure.
//!
//! The similarity is the least-squares one without reflection (S. Umeyama: "Least-squares estimation of transformation
//! parameters between two point patterns", PAMI 1991). In the plane it has a closed form: with points as complex
//! numbers relative to their means, the factor is sum(conj(p) q) / sum(|p|^2), which is a rotation and a scale
//! and never a reflection.

use image::RgbImage;

use super::decode::{Pixels, SIDE};

/// A point in an image, x to the right and y down, in pixels; (0, 0) is the centre of the first pixel.
pub type Point = [f64; 2];

/// Left eye, right eye, nose, left and right corner of the mouth, as they appear in the image.
pub type FivePoints = [Point; 5];

/// Where the five points lie in a crop that the networks were trained on.
pub const TEMPLATE: FivePoints = [
    [38.2946, 51.6963],
    [73.5318, 51.5014],
    [56.0252, 71.7366],
    [41.5493, 92.3655],
    [70.7299, 92.2041],
];

/// Points of the 68-point scheme (300-W): corners of the eyes, tip of the nose, corners of the mouth.
const LEFT_EYE: [usize; 2] = [36, 39];
const RIGHT_EYE: [usize; 2] = [42, 45];
const NOSE: usize = 30;
const MOUTH: [usize; 2] = [48, 54];

/// The five points among 68.
pub fn five_of_68(points: &[Point; 68]) -> FivePoints {
    let middle = |[a, b]: [usize; 2]| {
        [
            (points[a][0] + points[b][0]) / 2.0,
            (points[a][1] + points[b][1]) / 2.0,
        ]
    };
    [
        middle(LEFT_EYE),
        middle(RIGHT_EYE),
        points[NOSE],
        points[MOUTH[0]],
        points[MOUTH[1]],
    ]
}

/// `(x, y) -> (a x - b y + shift_x, b x + a y + shift_y)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Similarity {
    a: f64,
    b: f64,
    shift: Point,
}

impl Similarity {
    /// The one that takes `points` closest to `onto`; nothing if the points are no face: all in one place, or not
    /// finite.
    pub fn between(points: &FivePoints, onto: &FivePoints) -> Option<Self> {
        let (from, to) = (mean(points), mean(onto));
        let (mut real, mut imaginary, mut spread) = (0.0, 0.0, 0.0);
        for (p, q) in points.iter().zip(onto) {
            let (px, py) = (p[0] - from[0], p[1] - from[1]);
            let (qx, qy) = (q[0] - to[0], q[1] - to[1]);
            real += px * qx + py * qy;
            imaginary += px * qy - py * qx;
            spread += px * px + py * py;
        }
        let (a, b) = (real / spread, imaginary / spread);
        let shift = [
            to[0] - a * from[0] + b * from[1],
            to[1] - b * from[0] - a * from[1],
        ];
        let useful = a * a + b * b > 0.0 && [a, b, shift[0], shift[1]].iter().all(|v| v.is_finite());
        useful.then_some(Self { a, b, shift })
    }

    /// As a 2x3 matrix, row by row.
    pub fn matrix(&self) -> [[f64; 3]; 2] {
        [[self.a, -self.b, self.shift[0]], [self.b, self.a, self.shift[1]]]
    }

    fn inverse(&self) -> Self {
        let square = self.a * self.a + self.b * self.b;
        let (a, b) = (self.a / square, -self.b / square);
        let [x, y] = self.shift;
        Self {
            a,
            b,
            shift: [b * y - a * x, -b * x - a * y],
        }
    }

    fn apply(&self, [x, y]: Point) -> Point {
        [
            self.a * x - self.b * y + self.shift[0],
            self.b * x + self.a * y + self.shift[1],
        ]
    }
}

/// Refuses a face that is not in the picture: most of its points lie outside. A face at the border has some there, of which a
/// crop is of use.
///
/// # Errors
/// How many, and the picture's size.
pub fn check_inside(points: &FivePoints, image: &RgbImage) -> Result<(), String> {
    let (width, height) = (f64::from(image.width()), f64::from(image.height()));
    let is_outside = |[x, y]: &&Point| !(0.0..width).contains(x) || !(0.0..height).contains(y);
    match points.iter().filter(is_outside).count() {
        0..=2 => Ok(()),
        outside => Err(format!(
            "{outside} of the face's 5 landmarks lie outside of the picture, which is {width}x{height}"
        )),
    }
}

fn mean(points: &FivePoints) -> Point {
    let sum = points.iter().fold([0.0, 0.0], |s, p| [s[0] + p[0], s[1] + p[1]]);
    [sum[0] / 5.0, sum[1] / 5.0]
}

/// The crop: each of its pixels is the bilinear mean of the four around its place in `image`, which is black beyond
/// its border. `onto_crop` takes places of the image to those of the crop.
pub fn warp(image: &RgbImage, onto_crop: &Similarity, out: &mut Pixels) {
    let onto_image = onto_crop.inverse();
    let (width, height) = (i64::from(image.width()), i64::from(image.height()));
    let pixel = |x: i64, y: i64| -> [f64; 3] {
        if !(0..width).contains(&x) || !(0..height).contains(&y) {
            return [0.0; 3];
        }
        image.get_pixel(x as u32, y as u32).0.map(f64::from)
    };
    for (place, rgb) in out.as_chunks_mut::<3>().0.iter_mut().enumerate() {
        let [x, y] = onto_image.apply([(place % SIDE) as f64, (place / SIDE) as f64]);
        let outside = x <= -1.0 || y <= -1.0 || x >= width as f64 || y >= height as f64;
        if outside || !(x.is_finite() && y.is_finite()) {
            *rgb = [0; 3];
            continue;
        }
        let (left, top) = (x.floor() as i64, y.floor() as i64);
        let (right_part, lower_part) = (x - x.floor(), y - y.floor());
        let corners = [
            (pixel(left, top), (1.0 - right_part) * (1.0 - lower_part)),
            (pixel(left + 1, top), right_part * (1.0 - lower_part)),
            (pixel(left, top + 1), (1.0 - right_part) * lower_part),
            (pixel(left + 1, top + 1), right_part * lower_part),
        ];
        for (channel, value) in rgb.iter_mut().enumerate() {
            let sum: f64 = corners.iter().map(|(pixel, share)| pixel[channel] * share).sum();
            *value = sum.round() as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::decode::PIXEL_BYTES;
    use proptest::prelude::*;

    fn picture() -> RgbImage {
        RgbImage::from_fn(112, 112, |x, y| image::Rgb([x as u8, y as u8, 90]))
    }

    #[test]
    fn a_crop_that_is_aligned_stays_as_it_is() {
        let same = Similarity::between(&TEMPLATE, &TEMPLATE).unwrap();
        let mut out = [0; PIXEL_BYTES];
        warp(&picture(), &same, &mut out);
        assert_eq!(&out[..], picture().as_raw().as_slice());
    }

    #[test]
    fn beyond_the_border_it_is_black() {
        // The face lies half a crop to the left of the image.
        let points = TEMPLATE.map(|[x, y]| [x - 56.0, y]);
        let onto = Similarity::between(&points, &TEMPLATE).unwrap();
        let mut out = [9; PIXEL_BYTES];
        warp(&picture(), &onto, &mut out);
        assert_eq!(out[3 * (5 * SIDE + 10)..][..3], [0, 0, 0]);
        assert_eq!(out[3 * (5 * SIDE + 60)..][..3], [4, 5, 90]);
    }

    #[test]
    fn a_face_is_in_its_picture() {
        let shifted = |by: f64| TEMPLATE.map(|[x, y]| [x + by, y]);
        for (by, expected) in [
            (0.0, None),
            // Its left eye and the left corner of its mouth.
            (-45.0, None),
            (
                -60.0,
                Some("3 of the face's 5 landmarks lie outside of the picture, which is 112x112"),
            ),
            (
                500.0,
                Some("5 of the face's 5 landmarks lie outside of the picture, which is 112x112"),
            ),
        ] {
            let found = check_inside(&shifted(by), &picture());
            assert_eq!(found.err().as_deref(), expected, "{by}");
        }
    }

    #[test]
    fn what_is_no_face_gives_nothing() {
        assert_eq!(Similarity::between(&[[3.0, 4.0]; 5], &TEMPLATE), None);
        let mut points = TEMPLATE;
        points[2][0] = f64::NAN;
        assert_eq!(Similarity::between(&points, &TEMPLATE), None);
    }

    proptest! {
        #[test]
        fn a_similarity_is_found_again(scale in 0.05f64..20.0, angle in -3.1f64..3.1, x in -500f64..500.0, y in -500f64..500.0) {
            let wanted = Similarity { a: scale * angle.cos(), b: scale * angle.sin(), shift: [x, y] };
            let points = TEMPLATE.map(|p| wanted.inverse().apply(p));
            let found = Similarity::between(&points, &TEMPLATE).unwrap();
            for (ours, theirs) in found.matrix().iter().flatten().zip(wanted.matrix().iter().flatten()) {
                prop_assert!((ours - theirs).abs() < 1e-6 * (1.0 + theirs.abs()), "{ours} {theirs}");
            }
        }

        #[test]
        fn any_points_give_a_crop_or_nothing(points: [[f64; 2]; 5], corner in -1e9f64..1e9) {
            let near = TEMPLATE.map(|[x, y]| [x * corner, y - corner]);
            for points in [points, near] {
                if let Some(onto) = Similarity::between(&points, &TEMPLATE) {
                    warp(&picture(), &onto, &mut [0; PIXEL_BYTES]);
                }
            }
        }
    }
}
