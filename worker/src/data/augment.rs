//! Random changes of a training image, and its way into the network's input. Pure.

mod appearance;

use appearance::Appearance;
use arcface_proto::spec::Augment;
use tch::{Kind, Tensor};

use super::decode::{PIXEL_BYTES, Pixels, SIDE};
use crate::random::{Purpose, uniform};

/// Whether the image at `index` is mirrored in `epoch`: a function of these and the seed, so that neither the world
/// size nor a restart changes it.
pub fn flips(augment: Augment, seed: u64, epoch: u64, index: u64) -> bool {
    match augment {
        Augment::None => false,
        Augment::Flip | Augment::Dali => uniform(seed, Purpose::Flip, epoch, index) < 0.5,
    }
}

/// Changes how the image at `index` looks in `epoch`, if the job wants that; a function of the numbers, as the flip is.
pub fn change(augment: Augment, seed: u64, epoch: u64, index: u64, pixels: &mut Pixels) {
    if augment == Augment::Dali {
        Appearance::draw(seed, epoch, index).apply(pixels);
    }
}

/// `(x/255 - 0.5) / 0.5`, from rows of RGB to planes: `out` is `[3, 112, 112]`; mirrored left to right if `flip`.
pub fn normalise(pixels: &Pixels, flip: bool, out: &mut [f32; PIXEL_BYTES]) {
    let table = normalised_levels();
    let (red, rest) = out.split_at_mut(SIDE * SIDE);
    let (green, blue) = rest.split_at_mut(SIDE * SIDE);
    for (y, row) in pixels.as_chunks::<{ 3 * SIDE }>().0.iter().enumerate() {
        let row = row.as_chunks::<3>().0;
        let at = y * SIDE..(y + 1) * SIDE;
        let planes = red[at.clone()]
            .iter_mut()
            .zip(&mut green[at.clone()])
            .zip(&mut blue[at]);
        let write = |(((r, g), b), rgb): (((&mut f32, &mut f32), &mut f32), &[u8; 3])| {
            *r = table[usize::from(rgb[0])];
            *g = table[usize::from(rgb[1])];
            *b = table[usize::from(rgb[2])];
        };
        match flip {
            false => planes.zip(row).for_each(write),
            true => planes.zip(row.iter().rev()).for_each(write),
        }
    }
}

/// Mirrors left to right.
pub fn mirror(pixels: &mut Pixels) {
    for row in pixels.as_chunks_mut::<{ 3 * SIDE }>().0 {
        row.as_chunks_mut::<3>().0.reverse();
    }
}

/// What [`normalise`] makes of pixels `[b, 112, 112, 3]` u8, by libtorch where they are: `[b, 3, 112, 112]` f32, the channels
/// innermost in memory. The same bits on a CPU; a GPU may round otherwise.
pub fn planes(pixels: &Tensor) -> Tensor {
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
            let mut turned = pixels;
            if flip {
                mirror(&mut turned);
            }
            let batch = Tensor::from_slice(&turned).view([1, SIDE as i64, SIDE as i64, 3]);
            let ours = Vec::<f32>::try_from(planes(&batch).contiguous().view([-1])).expect("f32");
            assert_eq!(ours, expected);
        }
        let before = pixels;
        mirror(&mut pixels);
        assert_ne!(pixels, before);
        mirror(&mut pixels);
        assert_eq!(pixels, before);
    }

    #[test]
    fn half_of_the_images_flip_and_each_epoch_differs() {
        let flips_in =
            |epoch| -> Vec<bool> { (0..4000).map(|i| flips(Augment::Flip, 5, epoch, i)).collect() };
        let (a, b) = (flips_in(0), flips_in(1));
        let share = a.iter().filter(|&&f| f).count() as f64 / 4000.0;
        assert!((share - 0.5).abs() < 0.04, "{share}");
        let equal = a.iter().zip(&b).filter(|(x, y)| x == y).count() as f64 / 4000.0;
        assert!((equal - 0.5).abs() < 0.04, "{equal}");
        assert!((0..100).all(|i| !flips(Augment::None, 5, 0, i)));
        assert!((0..100).all(|i| flips(Augment::Dali, 5, 0, i) == flips(Augment::Flip, 5, 0, i)));
    }

    #[test]
    fn only_dali_changes_the_looks() {
        let plain: Pixels = std::array::from_fn(|i| (i * i % 251) as u8);
        let changed = |augment| -> usize {
            let differs = |index: &u64| {
                let mut pixels = plain;
                change(augment, 1, 0, *index, &mut pixels);
                pixels != plain
            };
            (0..200).filter(differs).count()
        };
        assert_eq!((changed(Augment::None), changed(Augment::Flip)), (0, 0));
        // 1 - 0.9 * 0.8 * 0.8 * 0.9 of all.
        assert!((70..125).contains(&changed(Augment::Dali)));
    }
}
