//! The classes of a shard that take part, chosen on the device as `../sampling.rs` has it, and the list of all that took part
//! in any of the micro-batches of an update. Knows no weights.

use super::{
    kernels::{Choice, DIGITS, List, chunks},
    micro::Micro,
    raw::SELECTION,
    tiles::Taking,
};
use crate::kernels::{Kernels, Started, launch::LaunchError};
use crate::random::{Draws, Purpose};
use arcface_proto::types::ClassRange;
use tch::{Device, Kind, Tensor};

/// Memory and numbers of the choice. n classes of the shard.
pub struct Choosing {
    seed: u64,
    shard: ClassRange,
    wanted: u32,
    /// `[n]` u8: classes of the samples.
    positive: Tensor,
    /// `[n]` u8: classes of any micro-batch since the last update.
    taken: Tensor,
    digits: Tensor,
    chunks: Tensor,
    /// Numbers of the list in hand.
    selection: Tensor,
    /// u32: the classes of all micro-batches, where there are several.
    union: Tensor,
    union_count: i64,
}

impl Choosing {
    /// The choice of `int(rate * n)` classes a step.
    pub fn new(seed: u64, rate: f64, shard: ClassRange, device: Device) -> Self {
        let classes = i64::from(shard.len());
        let zeros = |count: i64, kind| Tensor::zeros([count], (kind, device));
        Self {
            seed,
            shard,
            // Truncation is the reference's.
            wanted: (rate * f64::from(shard.len())) as u32,
            positive: zeros(classes, Kind::Uint8),
            taken: zeros(classes, Kind::Uint8),
            digits: zeros(DIGITS, Kind::Int),
            chunks: zeros(chunks(classes), Kind::Int),
            selection: zeros(SELECTION, Kind::Int64),
            union: zeros(0, Kind::Int),
            union_count: 0,
        }
    }

    /// Classes that may take part with so many samples.
    pub fn room(&self, batch: i64) -> i64 {
        i64::from(self.wanted).max(batch).min(i64::from(self.shard.len()))
    }

    /// How many will take part; `None` where that depends on how many classes the samples have.
    pub fn count(&self, batch: i64) -> Option<i64> {
        let wanted = i64::from(self.wanted);
        (self.room(batch) == wanted).then_some(wanted)
    }

    /// The same, given how many classes the samples have here.
    pub fn count_with(&self, positives: u32) -> i64 {
        self.wanted.max(positives).into()
    }

    /// Chooses for the micro-batch `micros[pending]`, whose `count` is known, after those before it.
    pub fn choose(&mut self, kernels: &Kernels, step: u64, micros: &[Micro], pending: usize) -> Started {
        let micro = &micros[pending];
        let Some(classes) = &micro.list else { return Ok(()) };
        let choice = Choice {
            draws: Draws::new(self.seed, Purpose::ClassSampling, step).word(),
            shard: self.shard,
            wanted: self.wanted.into(),
            flags: &self.positive,
            digits: &self.digits,
            chunks: &self.chunks,
        };
        let list = List {
            classes,
            selection: &self.selection,
        };
        kernels.choose(&choice, &micro.local, &list)?;
        kernels.find_columns(&list, &micro.local, &micro.column)?;
        if pending == 0 {
            let _ = self.taken.zero_();
        }
        kernels.mark_chosen(&classes.narrow(0, 0, micro.count), &self.taken)?;
        if pending > 0 {
            self.list_union(kernels, micros, pending)?;
        }
        Ok(())
    }

    /// Lists what took part in any micro-batch up to `pending`; the list's length comes with that one's report, so that the
    /// update needs no word of the device.
    fn list_union(&mut self, kernels: &Kernels, micros: &[Micro], pending: usize) -> Started {
        let most: i64 = micros[..=pending].iter().map(|micro| micro.count).sum();
        let most = most.min(self.shard.len().into());
        if (self.union.numel() as i64) < most {
            self.union = Tensor::zeros([most], (Kind::Int, self.union.device()));
        }
        let list = List {
            classes: &self.union,
            selection: &micros[pending].report.selection(),
        };
        kernels.list_flagged(self.shard, &self.taken, &self.chunks, &list, most)
    }

    /// Notes the length of the list of several micro-batches.
    pub fn set_union_count(&mut self, count: i64) {
        self.union_count = count;
    }

    /// The classes that took part in any of several micro-batches, the last of which is `last`; finds the columns of all.
    pub fn union(&self, kernels: &Kernels, micros: &[Micro]) -> Result<Taking, LaunchError> {
        let selection = micros
            .last()
            .map_or_else(|| self.selection.shallow_clone(), |last| last.report.selection());
        let list = List {
            classes: &self.union,
            selection: &selection,
        };
        for micro in micros {
            kernels.find_columns(&list, &micro.local, &micro.column)?;
        }
        Ok(Taking {
            list: Some(self.union.narrow(0, 0, self.union_count)),
            count: self.union_count,
        })
    }

    /// `[n]` u8: 1 for classes that took part in any micro-batch since the last update.
    pub fn taken(&self) -> &Tensor {
        &self.taken
    }
}
