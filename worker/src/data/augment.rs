//! Random changes of a training image. Pure.

mod appearance;
mod batch;

pub use appearance::Appearance;
pub use batch::{Filters, Looks};

use arcface_proto::spec::Augment;

use super::decode::{Pixels, SIDE};
use crate::random::{Purpose, uniform};

/// Whether the image at `index` is mirrored in `epoch`: a function of these and the seed, so that neither the world
/// size nor a restart changes it.
pub fn flips(augment: Augment, seed: u64, epoch: u64, index: u64) -> bool {
    match augment {
        Augment::None => false,
        Augment::Flip | Augment::Dali => uniform(seed, Purpose::Flip, epoch, index) < 0.5,
    }
}

/// How the image at `index` is to look in `epoch`; a function of the numbers, as the flip is.
pub fn appearance(augment: Augment, seed: u64, epoch: u64, index: u64) -> Appearance {
    match augment {
        Augment::None | Augment::Flip => Appearance::default(),
        Augment::Dali => Appearance::draw(seed, epoch, index),
    }
}

/// Mirrors left to right.
pub fn mirror(pixels: &mut Pixels) {
    for row in pixels.as_chunks_mut::<{ 3 * SIDE }>().0 {
        row.as_chunks_mut::<3>().0.reverse();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
                appearance(augment, 1, 0, *index).apply(&mut pixels);
                pixels != plain
            };
            (0..200).filter(differs).count()
        };
        assert_eq!((changed(Augment::None), changed(Augment::Flip)), (0, 0));
        // 1 - 0.9 * 0.8 * 0.8 * 0.9 of all.
        assert!((70..125).contains(&changed(Augment::Dali)));
    }
}
