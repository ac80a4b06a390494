//! Which images of a set a filter keeps, from their labels alone. Pure.

use crate::random::{Draws, Purpose};
use std::ops::AddAssign;

/// What is kept. The conditions apply in the order of the fields; an identity's images are counted after damaged and doubled
/// ones are gone.
#[derive(Clone, Debug, Default)]
pub struct Conditions {
    /// Identities that may be kept; without, all.
    pub keep: Option<Vec<u32>>,
    /// Identities that are dropped.
    pub drop: Vec<u32>,
    /// Fewest images of an identity.
    pub min_images: u64,
    /// Most images of an identity; one with more is dropped whole.
    pub max_images: Option<u64>,
    /// So many identities are drawn.
    pub identities: Option<u32>,
    /// Most images of an identity; of one with more so many are drawn.
    pub cap: Option<u64>,
    /// Seed of the draws.
    pub seed: u64,
}

/// How many identities and images went, by condition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Not in the list of those to keep, or in that of those to drop.
    pub by_list: Gone,
    /// Too few images.
    pub too_few: Gone,
    /// Too many images.
    pub too_many: Gone,
    /// Not drawn.
    pub not_drawn: Gone,
    /// Images beyond the cap; their identities stay.
    pub over_cap: u64,
}

/// Identities that went with all their images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gone {
    /// Identities, those without an image not counted.
    pub identities: u64,
    /// Their images.
    pub images: u64,
}

impl AddAssign for Gone {
    fn add_assign(&mut self, other: Self) {
        self.identities += other.identities;
        self.images += other.images;
    }
}

/// The kept images in order of their labels, and within one in the set's order. `labels` has one label an image,
/// nothing for images that are gone already.
pub fn choose(labels: &[Option<u32>], conditions: &Conditions) -> (Vec<u64>, Dropped) {
    let mut dropped = Dropped::default();
    let classes = labels
        .iter()
        .flatten()
        .max()
        .map_or(0, |&label| label as usize + 1);
    let mut counts = vec![0u64; classes];
    for &label in labels.iter().flatten() {
        counts[label as usize] += 1;
    }
    let mut stays: Vec<bool> = counts.iter().map(|&count| count > 0).collect();
    let listed = |list: &[u32]| {
        let mut listed = vec![false; classes];
        for &label in list {
            if let Some(place) = listed.get_mut(label as usize) {
                *place = true;
            }
        }
        listed
    };
    if let Some(keep) = &conditions.keep {
        let listed = listed(keep);
        dropped.by_list += sift(&mut stays, &counts, |label, _| !listed[label]);
    }
    let to_drop = listed(&conditions.drop);
    dropped.by_list += sift(&mut stays, &counts, |label, _| to_drop[label]);
    dropped.too_few += sift(&mut stays, &counts, |_, count| count < conditions.min_images);
    let most = conditions.max_images.unwrap_or(u64::MAX);
    dropped.too_many += sift(&mut stays, &counts, |_, count| count > most);
    if let Some(wanted) = conditions.identities {
        let drawn = draw(&stays, wanted as usize, conditions.seed);
        dropped.not_drawn += sift(&mut stays, &counts, |label, _| !drawn[label]);
    }
    let kept = in_label_order(labels, &stays, &counts);
    match conditions.cap {
        None => (kept, dropped),
        Some(cap) => {
            let all = kept.len() as u64;
            let capped = cap_images(labels, kept, cap, conditions.seed);
            dropped.over_cap = all - capped.len() as u64;
            (capped, dropped)
        }
    }
}

/// Lets identities go by their labels and numbers of images.
fn sift(stays: &mut [bool], counts: &[u64], goes: impl Fn(usize, u64) -> bool) -> Gone {
    let mut gone = Gone::default();
    for (label, stays) in stays.iter_mut().enumerate() {
        if *stays && goes(label, counts[label]) {
            *stays = false;
            gone.identities += 1;
            gone.images += counts[label];
        }
    }
    gone
}

/// So many of those that stay, by chance.
fn draw(stays: &[bool], wanted: usize, seed: u64) -> Vec<bool> {
    let draws = Draws::new(seed, Purpose::Subset, 0);
    let mut ranked: Vec<(u64, usize)> = stays
        .iter()
        .enumerate()
        .filter(|(_, stays)| **stays)
        .map(|(label, _)| (draws.bits(label as u64), label))
        .collect();
    ranked.sort_unstable();
    let mut drawn = vec![false; stays.len()];
    for &(_, label) in ranked.iter().take(wanted) {
        drawn[label] = true;
    }
    drawn
}

/// Images of those that stay, by counting sort.
fn in_label_order(labels: &[Option<u32>], stays: &[bool], counts: &[u64]) -> Vec<u64> {
    let mut next: Vec<usize> = Vec::with_capacity(counts.len());
    let mut total = 0usize;
    for (&count, &stays) in counts.iter().zip(stays) {
        next.push(total);
        total += if stays { count as usize } else { 0 };
    }
    let mut kept = vec![0; total];
    for (image, label) in (0u64..).zip(labels) {
        if let Some(label) = label.map(|label| label as usize)
            && stays[label]
        {
            kept[next[label]] = image;
            next[label] += 1;
        }
    }
    kept
}

fn cap_images(labels: &[Option<u32>], kept: Vec<u64>, cap: u64, seed: u64) -> Vec<u64> {
    let draws = Draws::new(seed, Purpose::Subset, 1);
    let mut capped = Vec::with_capacity(kept.len());
    for images in kept.chunk_by(|&a, &b| labels[a as usize] == labels[b as usize]) {
        if images.len() as u64 <= cap {
            capped.extend_from_slice(images);
            continue;
        }
        let mut ranked: Vec<(u64, u64)> = images.iter().map(|&image| (draws.bits(image), image)).collect();
        ranked.sort_unstable();
        let mut some: Vec<u64> = ranked
            .iter()
            .take(cap as usize)
            .map(|&(_, image)| image)
            .collect();
        some.sort_unstable();
        capped.extend(some);
    }
    capped
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn some(labels: &[u32]) -> Vec<Option<u32>> {
        labels.iter().copied().map(Some).collect()
    }

    #[test]
    fn without_conditions_images_are_put_in_order_alone() {
        let mut labels = some(&[2, 0, 2, 0, 4]);
        let (kept, dropped) = choose(&labels, &Conditions::default());
        assert_eq!((kept, dropped), (vec![1, 3, 0, 2, 4], Dropped::default()));
        labels[1] = None;
        assert_eq!(choose(&labels, &Conditions::default()).0, [3, 0, 2, 4]);
        assert!(choose(&[], &Conditions::default()).0.is_empty());
    }

    #[test]
    fn every_condition_counts_what_it_drops() {
        let labels = some(&[0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4]);
        let (kept, dropped) = choose(
            &labels,
            &Conditions {
                keep: Some(vec![0, 1, 2, 3, 77]),
                drop: vec![1],
                min_images: 2,
                max_images: Some(3),
                ..Conditions::default()
            },
        );
        assert_eq!(kept, [3, 4, 5]);
        let gone = |identities, images| Gone { identities, images };
        assert_eq!(
            dropped,
            Dropped {
                by_list: gone(2, 4),
                too_few: gone(1, 1),
                too_many: gone(1, 4),
                ..Dropped::default()
            }
        );
    }

    proptest! {
        #[test]
        fn samples_are_of_the_size_and_depend_on_the_seed_alone(
            labels in proptest::collection::vec(0u32..12, 1..80),
            identities in 1u32..14,
            cap in 1u64..6,
            seed: u64,
        ) {
            let labels = some(&labels);
            let conditions = Conditions {
                identities: Some(identities),
                cap: Some(cap),
                seed,
                ..Conditions::default()
            };
            let (kept, dropped) = choose(&labels, &conditions);
            prop_assert_eq!(&choose(&labels, &conditions).0, &kept);
            let of = |image: &u64| labels[*image as usize].unwrap();
            prop_assert!(kept.is_sorted_by_key(|image| (of(image), *image)));
            let mut present: Vec<u32> = labels.iter().flatten().copied().collect();
            present.sort_unstable();
            present.dedup();
            let groups: Vec<&[u64]> = kept.chunk_by(|a, b| of(a) == of(b)).collect();
            prop_assert_eq!(groups.len(), present.len().min(identities as usize));
            for group in groups {
                let all = labels.iter().flatten().filter(|&&label| label == of(&group[0])).count();
                prop_assert_eq!(group.len(), all.min(cap as usize));
            }
            let gone = dropped.not_drawn.images + dropped.over_cap;
            prop_assert_eq!(kept.len() as u64 + gone, labels.len() as u64);
        }
    }
}
