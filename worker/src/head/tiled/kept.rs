//! Terms that the pass for embeddings leaves to the update. Made anew there they would be the same bits, at the price of a product and
//! of one more way through the weights. They are kept of the first places, as many as there is room for: with 128 samples, terms of bf16
//! take a sixteenth of what weights and momentum take.

use super::{buffer::Buffer, kernel::gemm::Format};
use std::ops::Range;

/// Rows of so many words and more are a cache line apart: their beginnings would all fall into the same few sets of the cache.
const SKEWED: usize = 512;
/// A cache line, in words.
const LINE: usize = 16;

/// See the head of this file.
pub struct Kept {
    /// Bytes that may be taken.
    room: usize,
    /// How many places are kept, from the first on.
    places: usize,
    /// Distance of rows in words.
    stride: usize,
    /// `[places, stride]`: terms as the left operand of the weights' gradient.
    words: Buffer,
    /// 1 / norm of each place's row.
    inverse: Vec<f32>,
}

/// Terms of some neighbouring places.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub words: &'a [u32],
    pub stride: usize,
    pub inverse: &'a [f32],
}

/// The same, to be written.
pub struct RowsMut<'a> {
    pub words: &'a mut [u32],
    pub stride: usize,
    pub inverse: &'a mut [f32],
}

impl Kept {
    /// In at most so many bytes.
    pub fn new(room: usize) -> Self {
        Self {
            room,
            places: 0,
            stride: 0,
            words: Buffer::default(),
            inverse: Vec::new(),
        }
    }

    /// Begins anew, of at most so many places with so many samples; where they are written, by `lanes` that follow each other.
    pub fn begin(
        &mut self,
        places: usize,
        columns: usize,
        format: Format,
        lanes: impl Iterator<Item = Range<usize>>,
    ) -> Vec<RowsMut<'_>> {
        let words = columns / format.per_word();
        self.stride = words + if words < SKEWED { 0 } else { LINE };
        let bytes = size_of::<u32>() * (self.stride + 1);
        self.places = places.min(self.room / bytes);
        self.words.reserve(self.places * self.stride);
        self.inverse.resize(self.inverse.len().max(self.places), 0.0);
        let (places, stride) = (self.places, self.stride);
        let (mut words, mut inverse) = (self.words.words_mut(), &mut self.inverse[..]);
        lanes
            .map(|lane| {
                let count = lane.end.min(places).saturating_sub(lane.start);
                let (own_words, other_words) = std::mem::take(&mut words).split_at_mut(count * stride);
                let (own_inverse, other_inverse) = std::mem::take(&mut inverse).split_at_mut(count);
                (words, inverse) = (other_words, other_inverse);
                RowsMut {
                    words: own_words,
                    stride,
                    inverse: own_inverse,
                }
            })
            .collect()
    }

    /// The terms of these places, if all of them are kept.
    pub fn rows(&self, places: Range<usize>) -> Option<Rows<'_>> {
        (places.end <= self.places).then(|| Rows {
            words: &self.words.words()[places.start * self.stride..places.end * self.stride],
            stride: self.stride,
            inverse: &self.inverse[places],
        })
    }
}

impl RowsMut<'_> {
    /// The first so many rows, or as many as there are, which are written now.
    pub fn take(&mut self, rows: usize) -> RowsMut<'_> {
        let rows = rows.min(self.inverse.len());
        let (words, other_words) = std::mem::take(&mut self.words).split_at_mut(rows * self.stride);
        let (inverse, other_inverse) = std::mem::take(&mut self.inverse).split_at_mut(rows);
        (self.words, self.inverse) = (other_words, other_inverse);
        RowsMut {
            words,
            stride: self.stride,
            inverse,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_write_what_is_read_by_place_as_far_as_there_is_room() {
        // 5 rows of 32 words and one number each.
        let mut kept = Kept::new(5 * 33 * 4 + 100);
        let lanes = [0..3, 3..7, 7..9];
        for (lane, mut rows) in kept
            .begin(9, 64, Format::Bf16, lanes.clone().into_iter())
            .into_iter()
            .enumerate()
        {
            for _ in 0..lanes[lane].len() {
                let row = rows.take(1);
                row.words.fill(lane as u32 + 1);
                row.inverse.fill(lane as f32);
            }
        }
        let rows = kept.rows(2..5).expect("kept");
        assert_eq!(rows.inverse, [0.0, 1.0, 1.0]);
        assert_eq!((rows.words[0], rows.words[rows.stride]), (1, 2));
        assert!(kept.rows(4..6).is_none());
        // What was kept of another batch is forgotten, and long rows are a line apart.
        assert_eq!(
            kept.begin(0, 64, Format::F32, lanes.clone().into_iter())[0].stride,
            64
        );
        assert!(kept.rows(0..1).is_none());
        assert_eq!(kept.begin(0, 512, Format::F32, lanes.into_iter())[0].stride, 528);
    }
}
