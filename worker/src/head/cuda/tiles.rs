//! Some columns at a time: weights of length 1, cosines, and the products of what kernels make of these. Owns the memory of a
//! tile, which grows to the largest that was asked for. Knows no loss and no rule of updates.
//!
//! Products are libtorch's, on the same stream as the kernels: a tile begins when the one before it has ended, and a second
//! tile's memory would gain nothing.
//!
//! Shapes: b samples, t columns of a tile, d embedding.

use super::kernels::Weights;
use crate::kernels::{Kernels, Started};
use tch::{Device, Kind, Tensor};

/// Columns of a tile at most: large products keep a GPU busy, and its cosines take 64 KB a sample.
pub const COLUMNS: i64 = 16 * 1024;
/// Batches above it have tiles of half the columns.
const LARGE_BATCH: i64 = 4096;

/// The classes that take part.
pub struct Taking {
    /// u32, rising, as many as `count`; `None` is all.
    pub list: Option<Tensor>,
    /// How many.
    pub count: i64,
}

/// A tile's columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub first: i64,
    /// How many.
    pub columns: i64,
}

impl Taking {
    /// The classes of a tile; `None` is the tile's own columns.
    pub fn part(&self, span: Span) -> Option<Tensor> {
        self.list
            .as_ref()
            .map(|list| list.narrow(0, span.first, span.columns))
    }

    /// The weights among which the classes of a tile are counted: all where there is a list, else the tile's own rows.
    pub fn weights(&self, weights: &Weights, span: Span) -> Weights {
        let rows = |tensor: &Tensor| match self.list {
            Some(_) => tensor.shallow_clone(),
            None => tensor.narrow(0, span.first, span.columns),
        };
        Weights {
            weight: rows(&weights.weight),
            momentum: weights.momentum.as_ref().map(rows),
            missed: weights.missed.as_ref().map(|missed| super::kernels::Missed {
                since: rows(&missed.since),
                products: missed.products.shallow_clone(),
                now: missed.now,
            }),
        }
    }
}

/// See the head of this file.
pub struct Tiles {
    kind: Kind,
    dim: i64,
    most: i64,
    cosines: Buffer,
    unit: Buffer,
    inverse: Buffer,
    /// Gradient by the tile's rows of length 1.
    gradient: Buffer,
    embeddings: Buffer,
    /// Products in bf16 before they are added to sums in f32.
    half: Buffer,
}

impl Tiles {
    /// Tiles of at most so many columns of length `dim`, with products of f32 or bf16.
    pub fn new(kind: Kind, dim: i64, most: i64, device: Device) -> Self {
        let float = || Buffer::new(Kind::Float, device);
        Self {
            kind,
            dim,
            most,
            cosines: Buffer::new(kind, device),
            unit: Buffer::new(kind, device),
            inverse: float(),
            gradient: float(),
            embeddings: float(),
            half: Buffer::new(kind, device),
        }
    }

    /// The kind of the products.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The columns that take part, in tiles.
    pub fn spans(&self, taking: &Taking, batch: i64) -> impl Iterator<Item = Span> + use<> {
        let width = if batch > LARGE_BATCH {
            self.most / 2
        } else {
            self.most
        }
        .max(1);
        let count = taking.count;
        (0..(count + width - 1) / width).map(move |tile| Span {
            first: tile * width,
            columns: width.min(count - tile * width),
        })
    }

    /// Makes the tile's weights rows of length 1.
    pub fn load(&mut self, kernels: &Kernels, weights: &Weights, taking: &Taking, span: Span) -> Started {
        let unit_td = self.unit.matrix(span.columns, self.dim);
        let inverse_t = self.inverse(span);
        let rows = taking.weights(weights, span);
        kernels.normalize_weights(&rows, taking.part(span).as_ref(), &unit_td, &inverse_t)
    }

    /// `[t]` f32: what the loaded rows were multiplied by.
    pub fn inverse(&mut self, span: Span) -> Tensor {
        self.inverse.matrix(span.columns, 1).view([span.columns])
    }

    /// `[b, t]`: cosines of embeddings of length 1, in the kind of the products, with the loaded rows.
    pub fn cosines(&mut self, operand_bd: &Tensor, span: Span) -> Tensor {
        let unit_td = self.unit.matrix(span.columns, self.dim);
        let cosines_bt = self.cosines.matrix(operand_bd.size()[0], span.columns);
        let _ = operand_bd.mm_out(&cosines_bt, &unit_td.tr());
        cosines_bt
    }

    /// `[b, d]` f32: the sums that [`add_embeddings`](Self::add_embeddings) adds to.
    pub fn embeddings(&mut self, batch: i64) -> Tensor {
        self.embeddings.matrix(batch, self.dim)
    }

    /// Adds the loaded rows, weighted by terms `[b, t]`.
    pub fn add_embeddings(&mut self, terms_bt: &Tensor, span: Span) {
        let unit_td = self.unit.matrix(span.columns, self.dim);
        let mut sums_bd = self.embeddings(terms_bt.size()[0]);
        if self.kind == Kind::Float {
            let _ = sums_bd.addmm_(terms_bt, &unit_td);
        } else {
            let half_bd = self.half.matrix(terms_bt.size()[0], self.dim);
            sums_bd += terms_bt.mm_out(&half_bd, &unit_td);
        }
    }

    /// `[t, d]` in the kind of the products: the gradient by the loaded rows from that by cosines `[b, t]` with these embeddings.
    pub fn gradient(&mut self, gradient_bt: &Tensor, operand_bd: &Tensor, span: Span) -> Tensor {
        let buffer = match self.kind {
            Kind::Float => &mut self.gradient,
            _ => &mut self.half,
        };
        let gradient_td = buffer.matrix(span.columns, self.dim);
        let _ = gradient_bt.tr().mm_out(&gradient_td, operand_bd);
        gradient_td
    }

    /// The same in f32; adds to that of earlier micro-batches.
    pub fn sum_of_gradients(
        &mut self,
        gradient_bt: &Tensor,
        operand_bd: &Tensor,
        span: Span,
        add: bool,
    ) -> Tensor {
        let mut gradient_td = self.gradient.matrix(span.columns, self.dim);
        let left_tb = gradient_bt.tr();
        match (self.kind, add) {
            (Kind::Float, false) => _ = left_tb.mm_out(&gradient_td, operand_bd),
            (Kind::Float, true) => _ = gradient_td.addmm_(&left_tb, operand_bd),
            (_, add) => {
                let half_td = self.half.matrix(span.columns, self.dim);
                let half_td = left_tb.mm_out(&half_td, operand_bd);
                if add {
                    gradient_td += half_td;
                } else {
                    gradient_td.copy_(&half_td);
                }
            }
        }
        gradient_td
    }
}

/// Memory for matrices of one kind, as large as the largest so far.
struct Buffer(Tensor);

impl Buffer {
    fn new(kind: Kind, device: Device) -> Self {
        Self(Tensor::empty([0], (kind, device)))
    }

    /// A matrix without gaps in it; what it holds is whatever was there.
    fn matrix(&mut self, rows: i64, columns: i64) -> Tensor {
        let numbers = rows * columns;
        if (self.0.numel() as i64) < numbers {
            self.0 = Tensor::empty([numbers], (self.0.kind(), self.0.device()));
        }
        self.0.narrow(0, 0, numbers).view([rows, columns])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_cover_every_column_once() {
        let tiles = |most| Tiles::new(Kind::Float, 4, most, Device::Cpu);
        let of = |most, count, batch| -> Vec<(i64, i64)> {
            let taking = Taking { list: None, count };
            let spans = tiles(most).spans(&taking, batch);
            spans.map(|span| (span.first, span.columns)).collect()
        };
        assert_eq!(of(5, 12, 9), [(0, 5), (5, 5), (10, 2)]);
        assert_eq!(of(5, 5, 9), [(0, 5)]);
        assert_eq!(of(5, 0, 9), []);
        assert_eq!(of(4, 3, LARGE_BATCH + 1), [(0, 2), (2, 1)]);
        assert_eq!(of(1, 2, LARGE_BATCH + 1), [(0, 1), (1, 1)]);
    }
}
