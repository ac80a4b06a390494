//! A micro-batch on the device, from its loss until the update, and what of it the host reads. Knows no weights and no rank.
//!
//! As in `tiled/micro.rs`, gradient accumulation keeps micro-batches, not a gradient of all classes.

use super::{kernels::OtherClasses, raw::SELECTION, tiles::Taking};
use crate::head::margin::{Others, Prepared};
use arcface_proto::types::ClassRange;
use tch::{Device, Kind, Tensor};

/// What the device tells of each sample, f64 unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Sum of its terms; over all ranks once these are added up.
    Sums,
    /// Logit of its own class; likewise.
    TargetLogits,
    /// Its loss.
    Losses,
    /// Probability of its own class.
    Probabilities,
    /// Norm of its embedding.
    Norms,
    /// Cosine with its own class; 0 where that is on another rank, unless the loss needs them all.
    Cosines,
    /// Its label, the bits of an i64.
    Labels,
}

const PARTS: i64 = Part::Labels as i64 + 1;

/// All that the host reads of a micro-batch: one tensor, so that one copy fetches it.
pub struct Report {
    batch: i64,
    /// `[PARTS * batch + SELECTION]`.
    values: Tensor,
    /// The same memory as i64.
    words: Tensor,
}

impl Report {
    fn new(batch: i64, device: Device) -> Self {
        let values = Tensor::zeros([PARTS * batch + SELECTION], (Kind::Double, device));
        Self {
            batch,
            words: values.view_dtype(Kind::Int64),
            values,
        }
    }

    /// A part, `[batch]`.
    pub fn part(&self, part: Part) -> Tensor {
        self.values.narrow(0, part as i64 * self.batch, self.batch)
    }

    /// [`Part::Sums`] and [`Part::TargetLogits`], for one message.
    pub fn sums_and_targets(&self) -> Tensor {
        self.values
            .narrow(0, Part::Sums as i64 * self.batch, 2 * self.batch)
    }

    /// [`Part::Labels`] as i64.
    pub fn labels(&self) -> Tensor {
        self.words.narrow(0, Part::Labels as i64 * self.batch, self.batch)
    }

    /// Room for the numbers of a list (sampling.cu, `Selection`).
    pub fn selection(&self) -> Tensor {
        self.words.narrow(0, PARTS * self.batch, SELECTION)
    }

    /// Copies everything to the host, and so waits for the device.
    pub fn fetch(&self) -> Fetched {
        let mut values = vec![0f64; self.values.numel()];
        self.values.copy_data(&mut values, self.values.numel());
        Fetched {
            batch: self.batch as usize,
            values,
        }
    }
}

/// A [`Report`] on the host.
pub struct Fetched {
    batch: usize,
    values: Vec<f64>,
}

impl Fetched {
    /// A part.
    pub fn part(&self, part: Part) -> &[f64] {
        &self.values[part as usize * self.batch..][..self.batch]
    }

    /// The labels.
    pub fn labels(&self) -> Vec<i64> {
        self.part(Part::Labels)
            .iter()
            .map(|bits| bits.to_bits() as i64)
            .collect()
    }

    /// The length of the list in [`Report::selection`].
    pub fn listed(&self) -> i64 {
        self.values.last().map_or(0, |bits| bits.to_bits() as i64)
    }
}

/// See the head of this file. b samples of all ranks, d embedding.
pub struct Micro {
    /// `[b, d]` f32, rows of length 1.
    pub unit: Tensor,
    /// The same in the kind of the products.
    pub operand: Tensor,
    /// `[b]` f32: what the rows were multiplied by.
    pub inverse: Tensor,
    /// `[b]` i64: its class counted from the shard's first, or -1.
    pub local: Tensor,
    /// `[b]` i64: the column of its class among those that take part, or -1.
    pub column: Tensor,
    /// `[b]` u8: 1 where rounding put its cosine outside of [-1, 1].
    pub outside: Tensor,
    /// `[b]` f64: derivative of its own class's logit by the cosine.
    pub by_cosine: Tensor,
    /// `[b]` f32: see terms.cuh.
    pub shift: Tensor,
    /// `[b]` f32: what turns terms into the gradient by cosines.
    pub factor: Tensor,
    /// `[b]` f32: gradient by the cosine with its own class.
    pub target_gradient: Tensor,
    /// What the host reads.
    pub report: Report,
    /// u32, room for the classes that take part, rising; `None`: all do.
    pub list: Option<Tensor>,
    /// How many take part.
    pub count: i64,
    /// Share of the update's samples.
    pub share: f64,
    /// `[b]` f64, where the loss moves norms: derivatives by the norm of the own class's logit, and of the loss's own term.
    pub by_norm: Option<(Tensor, Tensor)>,
    rule: Others,
    hard_above: Option<Tensor>,
}

impl Micro {
    /// Room for so many samples; `room`: for the list of classes, where not all take part.
    pub fn new(batch: i64, dim: i64, kind: Kind, room: Option<i64>, device: Device) -> Self {
        let of_sample = |kind| Tensor::zeros([batch], (kind, device));
        let unit = Tensor::zeros([batch, dim], (Kind::Float, device));
        Self {
            operand: match kind {
                Kind::Float => unit.shallow_clone(),
                kind => Tensor::zeros([batch, dim], (kind, device)),
            },
            unit,
            inverse: of_sample(Kind::Float),
            local: of_sample(Kind::Int64),
            column: of_sample(Kind::Int64),
            outside: of_sample(Kind::Uint8),
            by_cosine: of_sample(Kind::Double),
            shift: of_sample(Kind::Float),
            factor: of_sample(Kind::Float),
            target_gradient: of_sample(Kind::Float),
            report: Report::new(batch, device),
            list: room.map(|room| Tensor::zeros([room], (Kind::Int, device))),
            count: 0,
            share: 1.0,
            by_norm: None,
            rule: Others {
                scale: 1.0,
                zero_above: f32::INFINITY,
                hard_above: f32::INFINITY,
                t: 0.0,
            },
            hard_above: None,
        }
    }

    /// Samples.
    pub fn batch(&self) -> i64 {
        self.unit.size()[0]
    }

    /// The classes that take part.
    pub fn taking(&self) -> Taking {
        Taking {
            list: self.list.as_ref().map(|list| list.narrow(0, 0, self.count)),
            count: self.count,
        }
    }

    /// Takes over what a loss that needs nothing of the samples does to other classes than their own.
    pub fn set_rule(&mut self, prepared: &Prepared) {
        self.rule = prepared.others(0);
        self.hard_above = None;
        self.by_norm = None;
    }

    /// Takes over what a loss makes of the samples, one copy to the device. `shard` and `labels` say whose classes are here.
    pub fn set_prepared(&mut self, prepared: &Prepared, shard: ClassRange, labels: &[i64]) {
        self.set_rule(prepared);
        let here = |label: &i64| (i64::from(shard.lo)..i64::from(shard.hi)).contains(label);
        let targets = || prepared.targets().iter().zip(labels);
        let terms = prepared.norm_terms();
        let term = |sample: usize| terms.get(sample).map_or(0.0, |term| term.by_norm);
        let samples = 0..prepared.targets().len();
        let columns: Vec<f64> = targets()
            .map(|(target, label)| if here(label) { target.value } else { 0.0 })
            .chain(targets().map(|(target, label)| if here(label) { target.by_cos } else { 0.0 }))
            .chain(targets().map(|(target, _)| target.by_norm))
            .chain(samples.clone().map(term))
            .chain(samples.map(|sample| f64::from(prepared.others(sample).hard_above)))
            .collect();
        let columns = to_device(
            &Tensor::from_slice(&columns).view([5, self.batch()]),
            self.unit.device(),
        );
        let column = |index| columns.select(0, index);
        self.report.part(Part::TargetLogits).copy_(&column(0));
        self.by_cosine.copy_(&column(1));
        // No gradient flows through the clamp of a cosine.
        let _ = self.by_cosine.masked_fill_(&self.outside.gt(0), 0.0);
        self.by_norm = prepared.moves_norms().then(|| (column(2), column(3)));
        if self.rule.hard_above != f32::INFINITY {
            self.hard_above = Some(column(4).to_kind(Kind::Float));
        }
    }

    /// What the loss does to other classes, with logits of this scale.
    pub fn others(&self, scale: f64) -> OtherClasses<'_> {
        OtherClasses {
            rule: self.rule,
            scale,
            hard_above: self.hard_above.as_ref(),
            shift: &self.shift,
        }
    }
}

/// Copies to a device without waiting for it; memory that is not pinned may be given back at once.
pub fn to_device(tensor: &Tensor, device: Device) -> Tensor {
    tensor.to_device_(device, tensor.kind(), true, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_keeps_its_parts_apart_and_labels_to_the_bit() {
        let report = Report::new(3, Device::Cpu);
        let labels = [i64::MIN, -1, 7];
        report.labels().copy_(&Tensor::from_slice(&labels));
        report
            .part(Part::Norms)
            .copy_(&Tensor::from_slice(&[1f64, 2.0, 3.0]));
        report
            .sums_and_targets()
            .copy_(&Tensor::from_slice(&[4f64, 5.0, 6.0, 7.0, 8.0, 9.0]));
        report.selection().copy_(&Tensor::from_slice(&[0i64, 0, 0, 12]));
        let fetched = report.fetch();
        assert_eq!(fetched.labels(), labels);
        assert_eq!(fetched.part(Part::Norms), [1.0, 2.0, 3.0]);
        assert_eq!(fetched.part(Part::Sums), [4.0, 5.0, 6.0]);
        assert_eq!(fetched.part(Part::TargetLogits), [7.0, 8.0, 9.0]);
        assert_eq!(fetched.part(Part::Cosines), [0.0; 3]);
        assert_eq!(fetched.listed(), 12);
    }
}
