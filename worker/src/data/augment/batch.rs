//! The same changes of a batch's images all at once, by libtorch where the pixels are: for a GPU, so that the host's cores are left
//! with decoding. What [`Appearance::apply`] does image by image, but for rounding: a grey level may be the next one.
//!
//! Size and blur are linear, and alike for rows and columns: with a matrix F `[112, 112]`, a filter, a plane P becomes F P F^T. The
//! filters of all sizes and radii are one table. Products are of f64, which no GPU rounds to fewer digits on the way.

use super::appearance::{Appearance, RADII, SIDES, colour_matrix, grey_matrix, mirrored, window};
use crate::{data::decode::SIDE, device};
use image::{ImageBuffer, Luma, imageops};
use tch::{Device, Kind, Tensor};

/// How a batch's images are changed; its numbers lie in pinned memory.
#[derive(Debug)]
pub struct Looks {
    /// Filters, in the order in which they are applied; `by` is their number in the table, i64 `[n]`.
    filtered: Vec<Change>,
    /// Then matrices of colours: `by` is f64 `[n, 3, 3]`.
    coloured: Vec<Change>,
}

/// One change of some images of a batch.
#[derive(Debug)]
struct Change {
    /// i64 `[n]`: which images.
    rows: Tensor,
    /// By image: what it is changed by.
    by: Tensor,
}

impl Looks {
    /// `None` if every image stays as it is.
    pub fn of(images: &[Appearance]) -> Option<Self> {
        let filters = |number: &dyn Fn(&Appearance) -> Option<usize>| {
            let number = |image: &Appearance| number(image).map(|number| number as i64);
            Change::of(images, number, Tensor::from_slice)
        };
        let matrices = |matrix: &dyn Fn(&Appearance) -> Option<[[f32; 3]; 3]>| {
            let tensor = |all: &[[[f32; 3]; 3]]| {
                Tensor::from_slice(all.as_flattened().as_flattened())
                    .view([-1, 3, 3])
                    .to_kind(Kind::Double)
            };
            Change::of(images, matrix, tensor)
        };
        let filtered = [
            filters(&|image| image.side.map(Filters::smaller)),
            filters(&|image| image.side.map(Filters::larger)),
            filters(&|image| image.radius.map(Filters::blur)),
        ];
        let coloured = [
            matrices(&|image| {
                image
                    .colour
                    .map(|(turn, saturation)| colour_matrix(turn, saturation))
            }),
            matrices(&|image| image.grey.then(grey_matrix)),
        ];
        let looks = Self {
            filtered: filtered.into_iter().flatten().collect(),
            coloured: coloured.into_iter().flatten().collect(),
        };
        (!looks.filtered.is_empty() || !looks.coloured.is_empty()).then_some(looks)
    }

    /// Changes pixels `[b, 112, 112, 3]` u8 in place.
    pub fn apply(&self, pixels: &mut Tensor, filters: &mut Filters) {
        let table = filters.on(pixels.device());
        for change in &self.filtered {
            change.apply(pixels, |levels, numbers| {
                let filter = table.index_select(0, numbers).unsqueeze(1);
                let planes = levels.permute([0, 3, 1, 2]);
                filter.matmul(&planes).matmul(&filter.mt()).permute([0, 2, 3, 1])
            });
        }
        for change in &self.coloured {
            change.apply(pixels, |levels, matrices| {
                levels.flatten(1, 2).matmul(&matrices.mt()).view_as(levels)
            });
        }
    }
}

impl Change {
    /// The images that have something to be changed by, if there are any.
    fn of<T>(
        images: &[Appearance],
        by: impl Fn(&Appearance) -> Option<T>,
        tensor: impl Fn(&[T]) -> Tensor,
    ) -> Option<Self> {
        let changed = images.iter().map(by).enumerate();
        let changed = changed.filter_map(|(row, by)| by.map(|by| (row as i64, by)));
        let (rows, by): (Vec<i64>, Vec<T>) = changed.unzip();
        (!rows.is_empty()).then(|| Self {
            rows: device::pinned(Tensor::from_slice(&rows)),
            by: device::pinned(tensor(&by)),
        })
    }

    /// `levels` makes new grey levels of old ones, f64 `[n, 112, 112, 3]`; they are rounded after every change, halves up, as
    /// [`Appearance::apply`] rounds them.
    fn apply(&self, pixels: &mut Tensor, levels: impl Fn(&Tensor, &Tensor) -> Tensor) {
        let here = |tensor: &Tensor| tensor.to_device_(pixels.device(), tensor.kind(), true, false);
        let (rows, by) = (here(&self.rows), here(&self.by));
        let old = pixels.index_select(0, &rows).to_kind(Kind::Double);
        let new = (levels(&old, &by) + 0.5)
            .floor()
            .clamp(0.0, 255.0)
            .to_kind(Kind::Uint8);
        let _ = pixels.index_copy_(0, &rows, &new);
    }
}

/// The filters of all sizes and radii, f64 `[n, 112, 112]`; made when the first one is wanted.
#[derive(Debug, Default)]
pub struct Filters(Option<Tensor>);

impl Filters {
    /// Number of the filter that makes an image `side` pixels wide and high; zeros are beyond.
    fn smaller(side: u32) -> usize {
        (side - SIDES.start()) as usize
    }

    /// Number of the filter that makes it large again.
    fn larger(side: u32) -> usize {
        SIDES.count() + Self::smaller(side)
    }

    /// Number of the filter that blurs.
    fn blur(radius: usize) -> usize {
        2 * SIDES.count() + radius - RADII[0]
    }

    fn on(&mut self, device: Device) -> &Tensor {
        self.0.get_or_insert_with(|| {
            let full = SIDE as u32;
            let all = SIDES.map(|side| scaling(full, side));
            let all = all.chain(SIDES.map(|side| scaling(side, full)));
            let all: Vec<f32> = all.chain(RADII.map(blurring)).flatten().collect();
            let side = SIDE as i64;
            let table = Tensor::from_slice(&all).view([-1, side, side]);
            table.to_device(device).to_kind(Kind::Double)
        })
    }
}

/// What the library does to columns of `from` pixels to have columns of `to`: it is shown a one in each place.
fn scaling(from: u32, to: u32) -> Vec<f32> {
    let ones = ImageBuffer::from_fn(from, from, |x, y| Luma([f32::from(u8::from(x == y))]));
    let columns = imageops::resize(&ones, from, to, imageops::FilterType::Triangle);
    let mut filter = vec![0.0; SIDE * SIDE];
    for (row, weights) in columns.as_raw().chunks_exact(from as usize).enumerate() {
        filter[row * SIDE..][..from as usize].copy_from_slice(weights);
    }
    filter
}

fn blurring(radius: usize) -> Vec<f32> {
    let mut filter = vec![0.0; SIDE * SIDE];
    for to in 0..SIDE {
        for (i, weight) in window(radius).into_iter().enumerate() {
            filter[to * SIDE + mirrored(to as isize + i as isize - radius as isize)] += weight;
        }
    }
    filter
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{
        decode::{PIXEL_BYTES, Pixels},
        synthetic,
    };
    use crate::slices;

    /// Noise, in which every filter meets every level, or a face.
    fn picture(index: u64) -> Pixels {
        let mut pixels: Pixels =
            std::array::from_fn(|i| ((i as u64 + index).wrapping_mul(2_654_435_761) >> 7) as u8);
        if index % 2 == 1 {
            synthetic::draw(1, index, 0, &mut pixels);
        }
        pixels
    }

    /// The images changed one by one and all at once.
    fn both(looks: &[Appearance]) -> [Vec<u8>; 2] {
        let pictures: Vec<Pixels> = (0..looks.len() as u64).map(picture).collect();
        let form = [looks.len() as i64, SIDE as i64, SIDE as i64, 3];
        let mut batch = Tensor::from_slice(pictures.as_flattened()).view(form);
        if let Some(looks) = Looks::of(looks) {
            looks.apply(&mut batch, &mut Filters::default());
        }
        let mut pictures = pictures;
        for (picture, look) in pictures.iter_mut().zip(looks) {
            look.apply(picture);
        }
        [pictures.into_flattened(), slices::bytes_mut(&mut batch).to_vec()]
    }

    /// Seldom another level, and then one of the `most` next. Where weights are round numbers many levels lie half-way.
    fn compare(looks: &[Appearance], most: u8, what: &str) {
        let [each, all] = both(looks);
        let off: Vec<u8> = each.iter().zip(&all).map(|(a, b)| a.abs_diff(*b)).collect();
        let differ = off.iter().filter(|&&off| off > 0).count();
        assert!(
            off.iter().all(|&off| off <= most),
            "{what}: {:?}",
            off.iter().max()
        );
        assert!(differ * 100 < each.len(), "{what}: {differ} of {}", each.len());
    }

    #[test]
    fn every_size_and_radius_is_as_image_by_image() {
        for side in SIDES {
            let look = Appearance {
                side: Some(side),
                ..Appearance::default()
            };
            compare(&[look; 2], 1, &format!("side {side}"));
        }
        for radius in RADII {
            let look = Appearance {
                radius: Some(radius),
                ..Appearance::default()
            };
            compare(&[look; 2], 1, &format!("radius {radius}"));
        }
    }

    #[test]
    fn colours_are_as_image_by_image() {
        let coloured = |turn, saturation, grey| Appearance {
            colour: Some((turn, saturation)),
            grey,
            ..Appearance::default()
        };
        let grey = Appearance {
            grey: true,
            ..Appearance::default()
        };
        compare(
            &[
                coloured(0.0, 1.0, false),
                coloured(20.0, 1.2, false),
                coloured(7.3, 1.1, true),
                grey,
            ],
            1,
            "colours",
        );
    }

    /// As the loader draws them: any change and any two together, and half of the images as they were.
    #[test]
    fn what_is_drawn_is_as_image_by_image() {
        let drawn: Vec<Appearance> = (0..200).map(|index| Appearance::draw(3, 1, index)).collect();
        // Colours are stronger afterwards, and with them what a change before was off by.
        compare(&drawn, 2, "drawn");
        let [_, all] = both(&drawn);
        let untouched = drawn
            .iter()
            .enumerate()
            .filter(|(_, look)| **look == Appearance::default());
        let mut count = 0;
        for (row, _) in untouched {
            assert_eq!(all[row * PIXEL_BYTES..][..PIXEL_BYTES], picture(row as u64));
            count += 1;
        }
        assert!(count > 50, "{count} of 200 stay as they are");
        assert!(Looks::of(&[Appearance::default(); 3]).is_none());
        assert!(Looks::of(&[]).is_none());
    }
}
