//! From an image's pixels to the network's input: planes of normalised levels. Pure.
//!
//! Unsafe, because instructions that not every processor has are called after a look whether this one does.
#![allow(unsafe_code)]

use tch::{Kind, Tensor};

use super::decode::{PIXEL_BYTES, Pixels, SIDE};

/// `(x/255 - 0.5) / 0.5`, from rows of RGB to planes: `out` is `[3, 112, 112]`; mirrored left to right if `flip`.
pub fn normalise(pixels: &Pixels, flip: bool, out: &mut [f32; PIXEL_BYTES]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the processor has the instructions.
        unsafe { normalise_by_vectors(pixels, flip, out) };
        return;
    }
    normalise_by_table(pixels, flip, out);
}

fn normalise_by_table(pixels: &Pixels, flip: bool, out: &mut [f32; PIXEL_BYTES]) {
    let table = normalised_levels();
    planes_of(pixels, flip, out, |level| table[usize::from(level)]);
}

/// The same bits by vectors of eight.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn normalise_by_vectors(pixels: &Pixels, flip: bool, out: &mut [f32; PIXEL_BYTES]) {
    planes_of(pixels, flip, out, normalised_level);
}

/// [`normalised_levels`] without a division: a product with the rounded reciprocal, and what it is off by.
#[cfg(any(target_arch = "x86_64", test))]
#[inline]
fn normalised_level(level: u8) -> f32 {
    const RECIPROCAL: f32 = 1.0 / 255.0;
    let level = f32::from(level);
    let near = level * RECIPROCAL;
    let quotient = near.mul_add(-255.0, level).mul_add(RECIPROCAL, near);
    (quotient - 0.5) * 2.0
}

/// From rows of RGB to planes, level by level.
#[inline(always)]
fn planes_of(pixels: &Pixels, flip: bool, out: &mut [f32; PIXEL_BYTES], value: impl Fn(u8) -> f32) {
    for (y, row) in pixels.as_chunks::<{ 3 * SIDE }>().0.iter().enumerate() {
        for (channel, plane) in out.as_chunks_mut::<{ SIDE * SIDE }>().0.iter_mut().enumerate() {
            // Gathered before they are widened: both loops become vectors.
            let mut levels = [0u8; SIDE];
            for (x, level) in levels.iter_mut().enumerate() {
                *level = row[3 * x + channel];
            }
            if flip {
                levels.reverse();
            }
            for (value_of, level) in plane.as_chunks_mut::<SIDE>().0[y].iter_mut().zip(levels) {
                *value_of = value(level);
            }
        }
    }
}

/// Images as a network takes them, of what a loader gave: pixels become planes, and planes stay.
pub fn normalised(images: &Tensor) -> Tensor {
    match images.kind() {
        Kind::Uint8 => of_pixels(images),
        _ => images.shallow_clone(),
    }
}

/// What [`normalise`] makes of pixels `[b, 112, 112, 3]` u8, by libtorch where they are: `[b, 3, 112, 112]` f32, the channels
/// innermost in memory. The same bits on a CPU; a GPU may round otherwise.
pub fn of_pixels(pixels: &Tensor) -> Tensor {
    let mut planes = pixels.to_kind(Kind::Float).permute([0, 3, 1, 2]);
    planes /= 255.0;
    planes -= 0.5;
    planes /= 0.5;
    planes
}

/// The normalised value of every grey level, in the reference's order of operations in f32: scale, shift, scale.
fn normalised_levels() -> [f32; 256] {
    std::array::from_fn(|level| (level as f32 / 255.0 - 0.5) / 0.5)
}

#[cfg(test)]
mod tests {
    use super::super::augment::mirror;
    use super::*;

    #[test]
    fn planes_are_normalised_and_mirrored() {
        let pixels: Pixels = std::array::from_fn(|i| (i % 253) as u8);
        let at =
            |c: usize, y: usize, x: usize| (f32::from(pixels[(y * SIDE + x) * 3 + c]) / 255.0 - 0.5) / 0.5;
        let mut plain = [0.0; PIXEL_BYTES];
        let mut mirrored = [0.0; PIXEL_BYTES];
        normalise(&pixels, false, &mut plain);
        normalise(&pixels, true, &mut mirrored);
        for (c, y, x) in [(0, 0, 0), (1, 50, 7), (2, 111, 111), (0, 3, 90)] {
            assert_eq!(plain[(c * SIDE + y) * SIDE + x], at(c, y, x));
            assert_eq!(mirrored[(c * SIDE + y) * SIDE + x], at(c, y, SIDE - 1 - x));
        }
        let levels = normalised_levels();
        assert_eq!((levels[0], levels[255]), (-1.0, 1.0));
    }

    /// Every grey level, mirrored or not: a batch for a GPU trains as one for the CPU.
    #[test]
    fn pixels_become_the_same_planes_by_libtorch() {
        let mut pixels: Pixels = std::array::from_fn(|i| (i * 7 % 256) as u8);
        for flip in [false, true] {
            let mut expected = [0.0; PIXEL_BYTES];
            normalise(&pixels, flip, &mut expected);
            let mut by_table = [0.0; PIXEL_BYTES];
            normalise_by_table(&pixels, flip, &mut by_table);
            assert_eq!(by_table, expected);
            let mut turned = pixels;
            if flip {
                mirror(&mut turned);
            }
            let batch = Tensor::from_slice(&turned).view([1, SIDE as i64, SIDE as i64, 3]);
            let ours = Vec::<f32>::try_from(of_pixels(&batch).contiguous().view([-1])).expect("f32");
            assert_eq!(ours, expected);
        }
        let before = pixels;
        mirror(&mut pixels);
        assert_ne!(pixels, before);
        mirror(&mut pixels);
        assert_eq!(pixels, before);
    }

    #[test]
    fn no_level_needs_a_division() {
        let levels: Vec<f32> = (0..=255).map(normalised_level).collect();
        assert_eq!(levels, normalised_levels());
    }
}
