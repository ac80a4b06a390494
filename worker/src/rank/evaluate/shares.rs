//! How images are shared among the ranks, and how their embeddings come together on rank 0. Pure.
//!
//! Of each target a rank has an equal number of rows, the last ones fewer. What it has computed is one list of numbers: for
//! each target its rows of the images, then those of the mirror images. Short shares are filled up, so that the
//! lists of all ranks are of one length and travel piece by piece.

use crate::eval::verification::Embeddings;
use std::ops::Range;

/// Who embeds what of some targets.
#[derive(Clone, Debug)]
pub struct Shares {
    /// Images by target.
    images: Vec<usize>,
    world_size: usize,
    /// Values of an embedding.
    dim: usize,
}

impl Shares {
    /// Of targets with so many images.
    pub fn new(images: Vec<usize>, world_size: u32, dim: usize) -> Self {
        Self {
            images,
            world_size: world_size as usize,
            dim,
        }
    }

    /// Rows of a share.
    fn rows(&self, target: usize) -> usize {
        self.images[target].div_ceil(self.world_size)
    }

    /// The images that a rank embeds of a target.
    pub fn of_rank(&self, target: usize, rank: u32) -> Range<usize> {
        let (all, rows) = (self.images[target], self.rows(target));
        let first = (rank as usize * rows).min(all);
        first..(first + rows).min(all)
    }

    /// Length of a rank's list.
    pub fn values(&self) -> usize {
        (0..self.images.len())
            .map(|target| 2 * self.rows(target) * self.dim)
            .sum()
    }

    /// Appends a rank's embeddings of a target to its list.
    pub fn append(&self, list: &mut Vec<f32>, target: usize, found: &Embeddings) {
        let values = self.rows(target) * self.dim;
        for half in [&found.emb, &found.emb_flip] {
            let end = list.len() + values;
            list.extend(half);
            list.resize(end, 0.0);
        }
    }
}

/// Embeddings of all images, as far as they have come.
pub struct Gathered {
    shares: Shares,
    targets: Vec<Embeddings>,
}

impl Gathered {
    /// None yet.
    pub fn new(shares: Shares) -> Self {
        let empty = |images: &usize| Embeddings {
            emb: vec![0.0; images * shares.dim],
            emb_flip: vec![0.0; images * shares.dim],
            dim: shares.dim,
        };
        Self {
            targets: shares.images.iter().map(empty).collect(),
            shares,
        }
    }

    /// Takes in a piece of a rank's list that begins at `start`.
    pub fn place(&mut self, rank: u32, start: usize, piece: &[f32]) {
        let end = start + piece.len();
        let mut from = 0;
        for (target, found) in self.targets.iter_mut().enumerate() {
            let values = self.shares.rows(target) * self.shares.dim;
            let begin = rank as usize * values;
            for half in [&mut found.emb, &mut found.emb_flip] {
                let (low, high) = (start.max(from), end.min(from + values));
                if low < high {
                    // What fills up a short share lies behind the last image.
                    let place = (begin + low - from).min(half.len())..(begin + high - from).min(half.len());
                    let count = place.len();
                    half[place].copy_from_slice(&piece[low - start..][..count]);
                }
                from += values;
            }
        }
    }

    /// The embeddings, by target.
    pub fn into_targets(self) -> Vec<Embeddings> {
        self.targets
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_image_is_embedded_once_and_arrives_at_its_place(
            images in prop::collection::vec(1usize..20, 1..4), world_size in 1u32..6, dim in 1usize..4, piece in 1usize..30,
        ) {
            let shares = Shares::new(images.clone(), world_size, dim);
            // Which image of which target, mirrored or not.
            let value = |target: usize, half: usize, image: usize, i: usize| {
                (((target * 2 + half) * 100 + image) * 10 + i) as f32 + 1.0
            };
            let mut gathered = Gathered::new(shares.clone());
            for rank in 0..world_size {
                let mut list = Vec::new();
                for target in 0..images.len() {
                    let rows = |half| shares.of_rank(target, rank)
                        .flat_map(|image| (0..dim).map(move |i| value(target, half, image, i)))
                        .collect();
                    shares.append(&mut list, target, &Embeddings { emb: rows(0), emb_flip: rows(1), dim });
                }
                prop_assert_eq!(list.len(), shares.values());
                for start in (0..list.len()).step_by(piece) {
                    gathered.place(rank, start, &list[start..(start + piece).min(list.len())]);
                }
            }
            for (target, found) in gathered.into_targets().into_iter().enumerate() {
                for (half, rows) in [found.emb, found.emb_flip].into_iter().enumerate() {
                    let expected: Vec<f32> = (0..images[target])
                        .flat_map(|image| (0..dim).map(move |i| value(target, half, image, i)))
                        .collect();
                    prop_assert_eq!(rows, expected);
                }
            }
        }
    }
}
