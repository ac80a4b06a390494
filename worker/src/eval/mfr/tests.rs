//! All pairs against sorting all pairs.

use super::*;
use crate::eval::ijb::features::MemoryFeatures;
use crate::random;

fn fars(texts: &[&str]) -> Vec<Far> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn features(dim: usize, feat: Vec<f32>) -> MemoryFeatures {
    MemoryFeatures {
        feat,
        feat_flip: Vec::new(),
        dim,
    }
}

/// Features that gather around one direction a person, in an order that mixes persons.
fn drawn(images: usize, persons: u64, dim: usize) -> (MemoryFeatures, Vec<i64>) {
    let noise = |a: u64, b: u64| {
        let bits = random::mix(random::mix(a) ^ b);
        (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let mut feat = Vec::with_capacity(images * dim);
    let mut labels = Vec::with_capacity(images);
    for image in 0..images as u64 {
        let person = random::mix(image ^ 77) % persons;
        labels.push(person as i64 * 3 - 50);
        for value in 0..dim as u64 {
            feat.push(noise(person, value) + noise(image + 1_000_000, value));
        }
    }
    (features(dim, feat), labels)
}

/// Every score as the gallery gives it.
#[derive(Default)]
struct Kept {
    genuine: Vec<f32>,
    impostor: Vec<f32>,
}

impl Counter for Kept {
    fn add(&mut self, genuine: &[f32], impostor: &[f32]) {
        self.genuine.extend(genuine);
        self.impostor.extend(impostor);
    }
}

/// By sorting all scores.
fn sorted_out(gallery: &Gallery, places: &[u64]) -> Vec<Option<Point>> {
    let mut kept = [Kept::default()];
    gallery.scan(&mut kept, &mut |_| {});
    let [
        Kept {
            mut genuine,
            mut impostor,
        },
    ] = kept;
    assert_eq!(genuine.len() as u64, gallery.genuine());
    assert_eq!(impostor.len() as u64, gallery.impostor());
    genuine.sort_by(|a, b| b.total_cmp(a));
    impostor.sort_by(|a, b| b.total_cmp(a));
    let above = |scores: &[f32], threshold: f32| scores.partition_point(|&score| score > threshold) as u64;
    places
        .iter()
        .map(|&place| {
            let threshold = *impostor.get(usize::try_from(place).unwrap().checked_sub(1)?)?;
            Some(Point {
                threshold,
                true_accepts: above(&genuine, threshold),
                false_accepts: above(&impostor, threshold),
            })
        })
        .collect()
}

#[test]
fn five_thousand_images_are_as_sorting_all_their_pairs_says() {
    let (features, labels) = drawn(5000, 900, 48);
    let gallery = Gallery::new(&features, &labels, false).unwrap();
    let mut seen = 0;
    let asked = fars(&["1e-6", "1e-5", "1e-4", "1e-3", "0.02", "0.5"]);
    let found = evaluate("drawn", &gallery, &asked, &mut |pairs| seen += pairs).unwrap();
    assert_eq!(seen, work(&gallery));
    assert_eq!(found.genuine + found.impostor, 5000 * 4999 / 2);
    let places: Vec<u64> = found.rates.iter().map(|rate| rate.place).collect();
    assert_eq!(places[0], (found.impostor as f64 * 1e-6).floor() as u64);
    let points: Vec<Option<Point>> = found.rates.iter().map(|rate| rate.point).collect();
    assert!(points.iter().all(Option::is_some), "{points:?}");
    assert_eq!(points, sorted_out(&gallery, &places));
    let tars: Vec<f64> = points.iter().flatten().map(|point| tar(&found, point)).collect();
    assert!(tars.is_sorted() && tars[0] > 0.0 && tars[0] < 0.99, "{tars:?}");
    assert_eq!(found.curve.last(), Some(&(1.0, 1.0)));
}

/// Features of plus and minus one give the same cosines in any order of adding, and equal ones in masses.
#[test]
fn equal_scores_are_counted_alike_by_other_arithmetic() {
    const DIM: usize = 16;
    let images = 2100;
    let sign = |image: usize, value: usize| match random::mix((image * DIM + value) as u64) & 1 {
        0 => 1i32,
        _ => -1,
    };
    let rows: Vec<[i32; DIM]> = (0..images)
        .map(|image| std::array::from_fn(|value| sign(image, value)))
        .collect();
    let labels: Vec<i64> = (0..images as i64).map(|image| image % 300).collect();
    let (mut genuine, mut impostor) = (Vec::new(), Vec::new());
    for a in 0..images {
        for b in 0..a {
            let dot: i32 = rows[a].iter().zip(&rows[b]).map(|(x, y)| x * y).sum();
            match labels[a] == labels[b] {
                true => genuine.push(dot),
                false => impostor.push(dot),
            }
        }
    }
    impostor.sort_unstable_by_key(|&dot| -dot);
    let flat = rows.iter().flatten().map(|&value| value as f32).collect();
    let gallery = Gallery::new(&features(DIM, flat), &labels, false).unwrap();
    let asked = fars(&["1e-6", "1e-3", "0.1", "0.9"]);
    let found = evaluate("signs", &gallery, &asked, &mut |_| {}).unwrap();
    assert_eq!((found.images, found.identities), (images, 300));
    for rate in &found.rates {
        let dot = impostor[rate.place as usize - 1];
        let above = |scores: &[i32]| scores.iter().filter(|&&score| score > dot).count() as u64;
        let expected = Point {
            threshold: dot as f32 / DIM as f32,
            true_accepts: above(&genuine),
            false_accepts: above(&impostor),
        };
        assert_eq!(rate.point, Some(expected), "{}", rate.far.text);
        assert!(expected.false_accepts < rate.place);
    }
}

#[test]
fn mirror_images_are_added_before_the_length_is_taken() {
    let both = MemoryFeatures {
        feat: vec![1.0, 0.0, 3.0, 0.0, 0.0, 1.0],
        feat_flip: vec![0.0, 1.0, 0.0, 3.0, 0.0, 1.0],
        dim: 2,
    };
    let gallery = Gallery::new(&both, &[4, 4, 9], true).unwrap();
    let found = evaluate("x", &gallery, &fars(&["0.5"]), &mut |_| {}).unwrap();
    let point = found.rates[0].point.unwrap();
    assert!((point.threshold - 0.5f32.sqrt()).abs() < 1e-6, "{point:?}");
    assert_eq!((point.true_accepts, point.false_accepts), (1, 0));
}

#[test]
fn sets_without_one_kind_of_pair_and_features_without_direction_are_refused() {
    let fail = |feat: &[f32], labels: &[i64]| {
        let gallery = Gallery::new(&features(2, feat.to_vec()), labels, false);
        let found = gallery.and_then(|gallery| evaluate("x", &gallery, &fars(&["1e-3"]), &mut |_| {}));
        found.unwrap_err().to_string()
    };
    let four = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0];
    assert!(fail(&four, &[1, 2, 3, 4]).contains("no two of the 4 images have the same label"));
    assert!(fail(&four, &[7; 4]).contains("all 4 images have the same label"));
    assert!(fail(&[], &[]).contains("no two of the 0 images"));
    let mut broken = four;
    broken[4] = f32::NAN;
    assert_eq!(fail(&broken, &[5, 1, 1, 2]), "the feature in row 2 is not finite");
    let mut zeros = four;
    zeros[6..].fill(0.0);
    assert_eq!(fail(&zeros, &[5, 1, 1, 0]), "the feature in row 3 is all zeros");
}

#[test]
fn too_few_pairs_for_a_rate_give_none() {
    let (features, labels) = drawn(40, 8, 8);
    let gallery = Gallery::new(&features, &labels, false).unwrap();
    let found = evaluate("few", &gallery, &fars(&["1e-6", "0.01"]), &mut |_| {}).unwrap();
    assert_eq!((found.rates[0].place, found.rates[0].point), (0, None));
    assert!(found.rates[1].point.is_some());
    let none = evaluate("few", &gallery, &fars(&["1e-6"]), &mut |_| {}).unwrap();
    assert_eq!(none.rates[0].point, None);
}

#[test]
fn places_are_whole_products_but_for_rounding() {
    assert_eq!(place(1e-6, 999_999), 0);
    assert_eq!(place(1e-6, 1_000_000), 1);
    assert_eq!(place(0.29, 100), 29);
    assert_eq!(place(1e-3, 1999), 1);
    assert_eq!(place(1e-6, 19_999_900_000), 19_999);
    assert!("0".parse::<Far>().is_err() && "1".parse::<Far>().is_err() && "x".parse::<Far>().is_err());
}
