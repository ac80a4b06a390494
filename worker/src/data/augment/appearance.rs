//! How a training image looks, changed at random: size, sharpness, colour. The chances, ranges and order are those of the
//! reference's DALI pipeline (`dali_aug`), after the definitions of DALI's operators. Pure.

use crate::data::decode::{PIXEL_BYTES, Pixels, SIDE};
use crate::random::{Purpose, Stream};
use image::{ImageBuffer, Rgb, imageops};
use std::ops::RangeInclusive;

/// Chance of a smaller image that is made large again.
const RESIZE: f64 = 0.1;
/// Its side in pixels.
pub(super) const SIDES: RangeInclusive<u32> = 56..=89;
/// Chance of a Gaussian blur.
const BLUR: f64 = 0.2;
/// Its radius in pixels.
pub(super) const RADII: [usize; 2] = [1, 2];
/// Chance of another hue and saturation: a turn of 0 to 20 degrees, a factor of 1 to 1.2.
const COLOUR: (f64, f64, f64) = (0.2, 20.0, 1.2);
/// Chance of an image without colour.
const GREY: f64 = 0.1;

/// From RGB to NTSC's luma and chroma (ITU-R BT.470), in which DALI turns the hue and scales the saturation.
const RGB_TO_YIQ: [[f64; 3]; 3] = [
    [0.299, 0.587, 0.114],
    [0.596, -0.274, -0.321],
    [0.211, -0.523, 0.311],
];
/// Back, as that standard rounds it.
const YIQ_TO_RGB: [[f64; 3]; 3] = [[1.0, 0.956, 0.621], [1.0, -0.272, -0.647], [1.0, -1.107, 1.705]];

/// What becomes of one image in one epoch; by default nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Appearance {
    /// Side of the smaller image in between.
    pub(super) side: Option<u32>,
    /// Radius of the blur in pixels.
    pub(super) radius: Option<usize>,
    /// Turn of the hue in degrees, and factor of the saturation.
    pub(super) colour: Option<(f64, f64)>,
    pub(super) grey: bool,
}

impl Appearance {
    /// Draws for the image at `index`: a function of the three numbers, so that neither the world size nor a restart
    /// changes it.
    pub fn draw(seed: u64, epoch: u64, index: u64) -> Self {
        let mut draws = Stream::new(seed, Purpose::Appearance, epoch, index);
        // Everything is drawn always, so that one chance does not move the draws of the next.
        let [least, most] = [SIDES.start(), SIDES.end()].map(|side| f64::from(*side));
        let (small, side) = (draws.next_uniform(), draws.next_in(least, most));
        let (blurred, wide) = (draws.next_uniform(), draws.next_uniform());
        let (coloured, turn) = (draws.next_uniform(), draws.next_in(0.0, COLOUR.1));
        let saturation = draws.next_in(1.0, COLOUR.2);
        Self {
            side: (small < RESIZE).then_some(side.round() as u32),
            radius: (blurred < BLUR).then_some(RADII[usize::from(wide >= 0.5)]),
            colour: (coloured < COLOUR.0).then_some((turn, saturation)),
            grey: draws.next_uniform() < GREY,
        }
    }

    /// Changes an image in place, in the reference's order; grey levels are rounded after every step, as there.
    pub fn apply(&self, pixels: &mut Pixels) {
        if let Some(side) = self.side {
            resize(pixels, side);
        }
        if let Some(radius) = self.radius {
            blur(pixels, radius);
        }
        if let Some((turn, saturation)) = self.colour {
            recolour(pixels, colour_matrix(turn, saturation));
        }
        if self.grey {
            recolour(pixels, grey_matrix());
        }
    }
}

/// Down to `side` x `side` and up again, linearly; on the way down the filter widens with the scale, so nothing aliases.
fn resize(pixels: &mut Pixels, side: u32) {
    let full = SIDE as u32;
    let Some(image) = ImageBuffer::<Rgb<u8>, &[u8]>::from_raw(full, full, pixels.as_slice()) else {
        return; // An array of this size is an image of this size.
    };
    let small = imageops::resize(&image, side, side, imageops::FilterType::Triangle);
    let large = imageops::resize(&small, full, full, imageops::FilterType::Triangle);
    pixels.copy_from_slice(large.as_raw());
}

/// Weights of a Gaussian window of `2 * radius + 1` pixels, whose deviation follows from its size as in OpenCV and DALI.
pub(super) fn window(radius: usize) -> Vec<f32> {
    let sigma = (radius as f64 - 1.0) * 0.3 + 0.8;
    let weight = |i: usize| (-(i as f64 - radius as f64).powi(2) / (2.0 * sigma * sigma)).exp();
    let weights: Vec<f64> = (0..=2 * radius).map(weight).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| (weight / sum) as f32).collect()
}

/// Mirrored at the border, whose own pixel is not repeated.
pub(super) fn mirrored(at: isize) -> usize {
    let last = SIDE as isize - 1;
    let at = at.abs();
    (if at > last { 2 * last - at } else { at }) as usize
}

fn blur(pixels: &mut Pixels, radius: usize) {
    let window = window(radius);
    let offset = |i: usize| i as isize - radius as isize;
    let mut rows = vec![0f32; PIXEL_BYTES];
    for y in 0..SIDE {
        for x in 0..SIDE {
            for (i, weight) in window.iter().enumerate() {
                let from = (y * SIDE + mirrored(x as isize + offset(i))) * 3;
                for c in 0..3 {
                    rows[(y * SIDE + x) * 3 + c] += weight * f32::from(pixels[from + c]);
                }
            }
        }
    }
    for y in 0..SIDE {
        let mut row = [0f32; SIDE * 3];
        for (i, weight) in window.iter().enumerate() {
            let from = mirrored(y as isize + offset(i)) * SIDE * 3;
            for (sum, value) in row.iter_mut().zip(&rows[from..from + SIDE * 3]) {
                *sum += weight * value;
            }
        }
        for (pixel, value) in pixels[y * SIDE * 3..(y + 1) * SIDE * 3].iter_mut().zip(row) {
            *pixel = level(value);
        }
    }
}

/// One matrix for the way to luma and chroma, the turn and scale of the chroma, and the way back.
pub(super) fn colour_matrix(turn: f64, saturation: f64) -> [[f32; 3]; 3] {
    let (sin, cos) = turn.to_radians().sin_cos();
    let (sin, cos) = (sin * saturation, cos * saturation);
    let change = [[1.0, 0.0, 0.0], [0.0, cos, sin], [0.0, -sin, cos]];
    let matrix = product(&product(&YIQ_TO_RGB, &change), &RGB_TO_YIQ);
    matrix.map(|row| row.map(|value| value as f32))
}

/// The luma in every channel.
pub(super) fn grey_matrix() -> [[f32; 3]; 3] {
    colour_matrix(0.0, 0.0)
}

fn product(a: &[[f64; 3]; 3], b: &[[f64; 3]; 3]) -> [[f64; 3]; 3] {
    std::array::from_fn(|i| std::array::from_fn(|j| (0..3).map(|k| a[i][k] * b[k][j]).sum()))
}

fn recolour(pixels: &mut Pixels, matrix: [[f32; 3]; 3]) {
    for pixel in pixels.as_chunks_mut::<3>().0 {
        let rgb = pixel.map(f32::from);
        *pixel = matrix.map(|row| level(row[0] * rgb[0] + row[1] * rgb[1] + row[2] * rgb[2]));
    }
}

/// The nearest grey level.
fn level(value: f32) -> u8 {
    value.round().clamp(0.0, 255.0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> Pixels {
        std::array::from_fn(|i| (i.wrapping_mul(2_654_435_761) >> 7) as u8)
    }

    fn mean(pixels: &Pixels) -> f64 {
        pixels.iter().map(|&p| f64::from(p)).sum::<f64>() / PIXEL_BYTES as f64
    }

    #[test]
    fn chances_and_ranges_are_those_of_the_recipe() {
        let draws: Vec<Appearance> = (0..20_000).map(|i| Appearance::draw(5, 2, i)).collect();
        let share = |has: &dyn Fn(&Appearance) -> bool| {
            draws.iter().filter(|draw| has(draw)).count() as f64 / draws.len() as f64
        };
        for (wanted, seen) in [
            (0.1, share(&|draw| draw.side.is_some())),
            (0.2, share(&|draw| draw.radius.is_some())),
            (0.1, share(&|draw| draw.radius == Some(2))),
            (0.2, share(&|draw| draw.colour.is_some())),
            (0.1, share(&|draw| draw.grey)),
            // Independent of each other.
            (0.02, share(&|draw| draw.side.is_some() && draw.radius.is_some())),
        ] {
            assert!((wanted - seen).abs() < 0.01, "{wanted} {seen}");
        }
        let sides: Vec<u32> = draws.iter().filter_map(|draw| draw.side).collect();
        assert!(sides.iter().min() == Some(&56) && sides.iter().max() == Some(&89));
        for (turn, saturation) in draws.iter().filter_map(|draw| draw.colour) {
            assert!((0.0..20.0).contains(&turn) && (1.0..1.2).contains(&saturation));
        }
        assert_eq!(
            Appearance::draw(5, 2, 77),
            draws[77],
            "a function of its counters"
        );
        assert_ne!(
            draws,
            (0..20_000).map(|i| Appearance::draw(5, 3, i)).collect::<Vec<_>>()
        );
    }

    #[test]
    fn one_colour_stays_itself_through_size_and_blur() {
        let plain: Pixels = std::array::from_fn(|i| [200, 90, 31][i % 3]);
        for change in [
            Appearance {
                side: Some(60),
                ..Appearance::default()
            },
            Appearance {
                radius: Some(2),
                ..Appearance::default()
            },
        ] {
            let mut changed = plain;
            change.apply(&mut changed);
            assert_eq!(changed, plain, "{change:?}");
        }
    }

    /// A point becomes the window: OpenCV's getGaussianKernel(3, 0.8) and (5, 1.1), printed there.
    #[test]
    fn a_point_is_blurred_to_the_window() {
        for (radius, weights) in [
            (1, vec![0.238_994, 0.522_011, 0.238_994]),
            (2, vec![0.070_766, 0.244_460, 0.369_547, 0.244_460, 0.070_766]),
        ] {
            for (ours, expected) in window(radius).iter().zip(&weights) {
                assert!(
                    (f64::from(*ours) - expected).abs() < 1e-4,
                    "{radius}: {ours} {expected}"
                );
            }
            let mut pixels = [0u8; PIXEL_BYTES];
            pixels[(50 * SIDE + 60) * 3 + 1] = 255;
            blur(&mut pixels, radius);
            for (dy, wy) in weights.iter().enumerate() {
                for (dx, wx) in weights.iter().enumerate() {
                    let at = ((50 + dy - radius) * SIDE + 60 + dx - radius) * 3;
                    assert!((f64::from(pixels[at + 1]) - 255.0 * wy * wx).abs() < 0.6);
                    assert_eq!((pixels[at], pixels[at + 2]), (0, 0), "colours do not mix");
                }
            }
            let outside = (50 * SIDE + 60 + radius + 1) * 3 + 1;
            assert_eq!(pixels[outside], 0);
        }
    }

    #[test]
    fn borders_are_mirrored() {
        assert_eq!([-2, -1, 0, 111, 112, 113].map(mirrored), [2, 1, 0, 111, 110, 109]);
        let mut pixels = picture();
        blur(&mut pixels, 2);
        assert!((mean(&pixels) - mean(&picture())).abs() < 1.0);
    }

    #[test]
    fn grey_is_the_luma_and_no_change_is_none() {
        let mut pixels = picture();
        recolour(&mut pixels, colour_matrix(0.0, 1.0));
        let off = pixels.iter().zip(&picture()).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(
            off <= Some(1),
            "the standard's two matrices are inverse to three digits: {off:?}"
        );
        recolour(&mut pixels, grey_matrix());
        for (grey, rgb) in pixels.as_chunks::<3>().0.iter().zip(picture().as_chunks::<3>().0) {
            let luma = 0.299 * f64::from(rgb[0]) + 0.587 * f64::from(rgb[1]) + 0.114 * f64::from(rgb[2]);
            assert!(
                grey.iter().all(|&level| (f64::from(level) - luma).abs() < 1.6),
                "{grey:?} {luma}"
            );
        }
    }

    /// A saturation above 1 moves colours away from grey; a turn of 120 degrees makes the strongest channel another one.
    #[test]
    fn hue_and_saturation_do_what_they_are_called() {
        let [mut strong, mut turned] =
            [[150u8, 100, 100]; 2].map(|rgb| -> Pixels { std::array::from_fn(|i| rgb[i % 3]) });
        recolour(&mut strong, colour_matrix(0.0, 1.2));
        assert!(strong[0] > 155 && strong[1] < 100, "{:?}", &strong[..3]);
        recolour(&mut turned, colour_matrix(120.0, 1.0));
        assert!(turned[0] < turned[1].max(turned[2]), "{:?}", &turned[..3]);
    }
}
