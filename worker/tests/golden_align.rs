//! Alignment of faces against skimage's similarity and OpenCV's crops: every `align/align_*.safetensors`.

use arcface_worker::data::{
    align::{FivePoints, Similarity, TEMPLATE, five_of_68, warp},
    decode::PIXEL_BYTES,
};
use golden::GoldenFile;
use image::RgbImage;

mod golden;

/// skimage computed in f32.
const MATRIX_TOLERANCE: f64 = 4e-5;
/// Grey levels that OpenCV's fixed point may be apart.
const PIXEL_TOLERANCE: u8 = 2;

fn five(values: &[f64]) -> FivePoints {
    values.as_chunks::<2>().0.try_into().expect("five points")
}

/// Largest difference of a matrix, in the size of its largest entry.
fn difference(ours: &Similarity, golden: &[f64]) -> f64 {
    let size = golden.iter().fold(0f64, |size, value| size.max(value.abs()));
    let ours = ours.matrix();
    let pairs = ours.as_flattened().iter().zip(golden);
    pairs.fold(0f64, |worst, (a, b)| worst.max((a - b).abs())) / size
}

/// Runs one file and gives its number of sets.
fn check(file: &GoldenFile) -> usize {
    let onto = five(&file.values("dst_points"));
    let template = TEMPLATE.as_flattened().iter().zip(onto.as_flattened());
    assert!(template.clone().all(|(a, b)| (a - b).abs() < 1e-5), "{onto:?}");
    let landmarks = file.values("landmarks");
    let matrices = file.values("matrix_f64");
    let sets: Vec<Similarity> = landmarks
        .chunks_exact(10)
        .map(|points| Similarity::between(&five(points), &onto).expect("a face"))
        .collect();
    assert_eq!(sets.len() * 6, matrices.len());
    let mut worst = 0f64;
    for (set, golden) in sets.iter().zip(matrices.chunks_exact(6)) {
        worst = worst.max(difference(set, golden));
    }
    if file.get("landmarks68").is_some() {
        let points = file.values("landmarks68");
        let points = five_of_68(points.as_chunks::<2>().0.try_into().expect("68 points"));
        let set = Similarity::between(&points, &onto).expect("a face");
        worst = worst.max(difference(&set, &file.values("matrix68_f64")));
    }
    assert!(
        worst < MATRIX_TOLERANCE,
        "{}: matrices differ by {worst:.1e}",
        file.path.display()
    );

    let image = file.tensor("image_bgr");
    let (height, width, _) = image.size3().expect("an image");
    let rgb = image.flip([2]).contiguous().view([-1]);
    let rgb = Vec::<u8>::try_from(rgb).expect("bytes");
    let image = RgbImage::from_raw(width as u32, height as u32, rgb).expect("all pixels");
    let crops = file.tensor("warped_rgb_chw").permute([0, 2, 3, 1]).contiguous();
    let mut apart = 0;
    for (index, set) in (0..crops.size()[0]).zip(&sets) {
        let golden = Vec::<u8>::try_from(crops.get(index).contiguous().view([-1])).expect("bytes");
        let mut ours = [0; PIXEL_BYTES];
        warp(&image, set, &mut ours);
        let worst = ours
            .iter()
            .zip(&golden)
            .map(|(a, b)| a.abs_diff(*b))
            .max()
            .unwrap_or(0);
        assert!(
            worst <= PIXEL_TOLERANCE,
            "{}: crop {index} differs by {worst} grey levels",
            file.path.display()
        );
        apart = apart.max(worst);
    }
    println!(
        "{}: {} sets, matrices within {worst:.1e}, crops within {apart}",
        file.path.display(),
        sets.len()
    );
    sets.len()
}

#[test]
fn faces_are_aligned_as_by_skimage_and_opencv() {
    let files = golden::golden_files("align", "align_", ".safetensors");
    let sets: usize = files
        .iter()
        .map(|path| check(&golden::read_safetensors(path)))
        .sum();
    golden::report("alignment", sets);
}
