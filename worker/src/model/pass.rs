//! One forward pass: its mode, and what it reports on the way (taps, multiply-accumulates, operations).

use std::cell::Cell;

use arcface_proto::spec::Precision;
use tch::{Device, Kind, Tensor};

use super::footprint::Walk;
use super::graph::{Op, Trace};
use super::norm::Place;
use crate::kernels::Kernels;
use crate::random::{self, Purpose, Stream};

/// Where the random masks of a batch (dropout, drop path, hidden tokens) come from: row i of the batch is global sample
/// `first_sample + i` of the step, so a mask does not depend on how the global batch is cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DropoutDraw {
    /// Seed of the job.
    pub seed: u64,
    /// Training step.
    pub step: u64,
    /// Position of the batch's first row in the step's global batch.
    pub first_sample: u64,
}

/// How to run the network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ForwardMode {
    /// Batch statistics in batch norm (and their running averages updated), random masks active.
    pub train: bool,
    /// Arithmetic of convolutions and linear layers in the trunk; the last linear layer and the embedding stay f32,
    /// as the reference keeps them outside its autocast.
    pub precision: Precision,
    /// Counters of the random masks; only used while training.
    pub dropout: DropoutDraw,
}

impl ForwardMode {
    /// Evaluation: running statistics, no random masks.
    pub fn evaluation(precision: Precision) -> Self {
        Self {
            train: false,
            precision,
            dropout: DropoutDraw::default(),
        }
    }

    /// Training in f32 or with a reduced precision in the trunk.
    pub fn training(precision: Precision, dropout: DropoutDraw) -> Self {
        Self {
            train: true,
            precision,
            dropout,
        }
    }
}

/// Who computes what several could.
#[derive(Clone, Default)]
pub(super) enum Computing {
    /// The fastest of libtorch's operations and layouts, and our own functions on the CPU.
    #[default]
    Usual,
    /// libtorch's operations alone, in the layout that images come in: what a trainer in Python does.
    Plain,
    /// Kernels of our own what they do better, the rest as usual.
    Kernels(Kernels),
}

/// Called with a module's name and its output.
pub type Tap<'a> = &'a mut dyn FnMut(&str, &Tensor);

/// The state of one forward pass, handed through all layers.
pub struct Pass<'a> {
    mode: &'a ForwardMode,
    kind: Kind,
    tap: Option<Tap<'a>>,
    counts_only: bool,
    repeats: bool,
    macs: u64,
    computing: &'a Computing,
    trace: Option<&'a mut Trace>,
    walk: Option<&'a mut Walk>,
    draws: Cell<bool>,
}

impl<'a> Pass<'a> {
    /// A pass that starts in the mode's precision.
    pub fn new(mode: &'a ForwardMode, tap: Option<Tap<'a>>) -> Self {
        let kind = match mode.precision {
            Precision::Fp32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
            Precision::Fp16 => Kind::Half,
        };
        Self {
            mode,
            kind,
            tap,
            counts_only: false,
            repeats: false,
            macs: 0,
            computing: &Computing::Usual,
            trace: None,
            walk: None,
            draws: Cell::new(false),
        }
    }

    /// The same, computed so.
    pub(super) fn computing(self, computing: &'a Computing) -> Self {
        Self { computing, ..self }
    }

    /// A pass that computes what an earlier one has computed: the same random masks, and statistics that have already
    /// moved stay.
    pub(super) fn repeating(mode: &'a ForwardMode) -> Self {
        Self {
            repeats: true,
            ..Self::new(mode, None)
        }
    }

    /// A pass that counts and does not compute: convolutions and linear layers give zeros of the right shape.
    pub fn counting(mode: &'a ForwardMode) -> Self {
        Self {
            counts_only: true,
            ..Self::new(mode, None)
        }
    }

    /// A counting pass that also takes down every operation.
    pub(super) fn tracing(mode: &'a ForwardMode, trace: &'a mut Trace) -> Self {
        Self {
            trace: Some(trace),
            ..Self::counting(mode)
        }
    }

    /// A counting pass of training, over statistics that stay, that notes what autograd would keep.
    pub(super) fn walking(mode: &'a ForwardMode, walk: &'a mut Walk) -> Self {
        Self {
            walk: Some(walk),
            counts_only: true,
            ..Self::repeating(mode)
        }
    }

    /// Where a batch norm on this device is computed in one with what follows it; `None` where it is not.
    pub(super) fn norm_place(&self, device: Device) -> Option<Place> {
        match (&self.walk, self.computing) {
            (Some(walk), _) => walk.fuses(),
            (None, Computing::Kernels(_)) => Some(Place::Gpu),
            (None, Computing::Usual) => (device == Device::Cpu).then_some(Place::Cpu),
            (None, Computing::Plain) => None,
        }
    }

    /// In a walk, a batch norm of so many channels that is one with what follows it; `None` where nobody walks.
    pub(super) fn walk_norm(
        &mut self,
        x: &Tensor,
        channels: u64,
        shortcut: Option<&Tensor>,
    ) -> Option<Tensor> {
        let walk = self.walk.as_mut()?;
        Some(walk.record_norm(x, channels, shortcut))
    }

    /// Notes, in a walk, that a part of the network ends in `x`.
    pub(super) fn border(&mut self, x: &Tensor) {
        if let Some(walk) = &mut self.walk {
            walk.border(x);
        }
    }

    /// Hands on what an operation made of `inputs`. Every operation of a network in evaluation goes through here, so
    /// that a network can be exported.
    pub fn record(&mut self, inputs: &[&Tensor], output: Tensor, op: impl FnOnce() -> Op) -> Tensor {
        match (&mut self.trace, &mut self.walk) {
            (Some(trace), _) => trace.record(inputs, &output, op(), self.kind),
            (None, Some(walk)) => walk.record(inputs, &output, &op(), self.kind),
            (None, None) => output,
        }
    }

    /// Operations that were taken down so far.
    pub(super) fn recorded(&self) -> usize {
        self.trace.as_ref().map_or(0, |trace| trace.len())
    }

    /// Sum of two tensors of one shape: where a shortcut joins its branch.
    pub fn add(&mut self, a: &Tensor, b: &Tensor) -> Tensor {
        self.record(&[a, b], a + b, || Op::Add)
    }

    /// The tokens of `x` \[N, L, F\] that `index` \[N, K, F\] names: \[N, K, F\]. While training alone.
    pub fn gather(&mut self, x: &Tensor, index: &Tensor) -> Tensor {
        let y = x.gather(1, index, false);
        match &mut self.walk {
            Some(walk) => walk.record_gather(x, &y),
            None => y,
        }
    }

    /// \[N, ..\] to \[N, F\].
    pub fn flatten(&mut self, x: &Tensor) -> Tensor {
        self.record(&[x], x.flatten(1, -1), || Op::Flatten)
    }

    /// Whether the costly layers need not compute.
    pub fn counts_only(&self) -> bool {
        self.counts_only
    }

    /// What starts kernels of our own, where there are any.
    pub fn kernels(&self) -> Option<&'a Kernels> {
        match self.computing {
            Computing::Kernels(kernels) => Some(kernels),
            Computing::Usual | Computing::Plain => None,
        }
    }

    /// Whether libtorch's operations alone may compute.
    pub fn is_plain(&self) -> bool {
        matches!(self.computing, Computing::Plain)
    }

    /// Whether running statistics have seen this batch already.
    pub fn repeats(&self) -> bool {
        self.repeats
    }

    /// Whether a random mask was drawn so far.
    pub fn draws(&self) -> bool {
        self.draws.get()
    }

    /// Whether the network trains.
    pub fn train(&self) -> bool {
        self.mode.train
    }

    /// Kind that convolutions and linear layers compute in.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Runs a part of the network in f32 whatever the mode says.
    pub fn in_full_precision<T>(&mut self, part: impl FnOnce(&mut Self) -> T) -> T {
        let kind = std::mem::replace(&mut self.kind, Kind::Float);
        let made = part(self);
        self.kind = kind;
        made
    }

    /// Leaves the reduced precision: the layers from here on compute in f32.
    pub fn leave_mixed_precision(&mut self, x: Tensor) -> Tensor {
        self.kind = Kind::Float;
        x.to_kind(Kind::Float)
    }

    /// Whether somebody watches.
    pub fn is_watched(&self) -> bool {
        self.tap.is_some()
    }

    /// Reports a module's output to whoever watches.
    pub fn tap(&mut self, name: &str, output: &Tensor) {
        if let Some(tap) = &mut self.tap {
            tap(name, output);
        }
    }

    /// Counts the multiply-accumulates of a layer: `per_output` for each element of its output.
    pub fn count_macs(&mut self, output: &Tensor, per_output: i64) {
        self.macs += output.numel() as u64 * per_output as u64;
    }

    /// Multiply-accumulates so far, of the whole batch.
    pub fn macs(&self) -> u64 {
        self.macs
    }

    /// Zeroes each element of `x` \[N, F\] with probability `p` and scales the others by 1/(1-p), while training.
    pub fn dropout(&self, x: Tensor, p: f64) -> Tensor {
        if !self.mode.train || p <= 0.0 {
            return x;
        }
        self.draws.set(true);
        let DropoutDraw {
            seed,
            step,
            first_sample,
        } = self.mode.dropout;
        let rows = rows(&x);
        let per_row = (x.numel() as u64).checked_div(rows).unwrap_or(0);
        let keep = (1.0 / (1.0 - p)) as f32;
        let mut mask: Vec<f32> = Vec::with_capacity(x.numel());
        for row in 0..rows {
            let mut draws = Stream::new(seed, Purpose::Dropout, step, first_sample + row);
            mask.extend((0..per_row).map(|_| if draws.next_uniform() < p { 0.0 } else { keep }));
        }
        let mask = Tensor::from_slice(&mask).view(x.size().as_slice());
        x.multiply(&mask.to_device(x.device()).to_kind(x.kind()))
    }

    /// Stochastic depth (Huang et al., 2016): zeroes a residual branch's whole output for each sample of `x` \[N, ..\]
    /// with probability `p` and scales the others by 1/(1-p), while training. `branch` numbers the network's branches,
    /// whose draws are independent.
    pub fn drop_path(&self, x: Tensor, p: f64, branch: u16) -> Tensor {
        if !self.mode.train || p <= 0.0 {
            return x;
        }
        self.draws.set(true);
        let DropoutDraw {
            seed,
            step,
            first_sample,
        } = self.mode.dropout;
        let keep = (1.0 / (1.0 - p)) as f32;
        let scales = (0..rows(&x)).map(|row| {
            let sample_and_branch = ((first_sample + row) << 16) | u64::from(branch);
            let drawn = random::uniform(seed, Purpose::DropPath, step, sample_and_branch);
            if drawn < p { 0.0 } else { keep }
        });
        let mut shape = vec![1; x.dim()];
        shape[0] = -1;
        let scales = Tensor::from_slice(&scales.collect::<Vec<f32>>()).view(shape.as_slice());
        x.multiply(&scales.to_device(x.device()).to_kind(x.kind()))
    }

    /// Of `tokens` tokens of each of `rows` samples, `kept` that are drawn without replacement, in ascending order:
    /// \[rows, kept\] i64. Every call of a pass gives the same.
    pub fn drawn_tokens(&self, rows: i64, tokens: usize, kept: usize) -> Tensor {
        self.draws.set(true);
        let DropoutDraw {
            seed,
            step,
            first_sample,
        } = self.mode.dropout;
        let mut drawn: Vec<i64> = Vec::with_capacity(rows as usize * kept);
        for row in 0..rows as u64 {
            let mut draws = Stream::new(seed, Purpose::TokenMask, step, first_sample + row);
            let mut order: Vec<(u64, i64)> = (0..tokens as i64)
                .map(|token| (draws.next_bits(), token))
                .collect();
            order.sort_unstable();
            order.truncate(kept);
            order.sort_unstable_by_key(|&(_, token)| token);
            drawn.extend(order.iter().map(|&(_, token)| token));
        }
        Tensor::from_slice(&drawn).view([rows, kept as i64])
    }
}

/// Samples of a batch.
fn rows(x: &Tensor) -> u64 {
    x.size().first().map_or(0, |&n| n as u64)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn drop_rows(first_sample: u64, rows: i64) -> Tensor {
        let draw = DropoutDraw {
            seed: 5,
            step: 9,
            first_sample,
        };
        let mode = ForwardMode::training(Precision::Fp32, draw);
        let pass = Pass::new(&mode, None);
        let ones = || Tensor::ones([rows, 1000], (Kind::Float, Device::Cpu));
        assert!(pass.dropout(ones(), 0.0) == ones() && !pass.draws());
        let dropped = pass.dropout(ones(), 0.4);
        assert!(pass.draws());
        dropped
    }

    #[test]
    fn dropout_does_not_depend_on_how_the_batch_is_cut() {
        let whole = drop_rows(0, 6);
        let parts = Tensor::cat(&[drop_rows(0, 2), drop_rows(2, 3), drop_rows(5, 1)], 0);
        assert_eq!(whole, parts);
        assert_ne!(whole.get(0), whole.get(1));
    }

    fn at(first_sample: u64) -> ForwardMode {
        let draw = DropoutDraw {
            seed: 5,
            step: 9,
            first_sample,
        };
        ForwardMode::training(Precision::Fp32, draw)
    }

    fn skipped_rows(first_sample: u64, rows: i64, branch: u16) -> Tensor {
        let ones = Tensor::ones([rows, 3, 2], (Kind::Float, Device::Cpu));
        Pass::new(&at(first_sample), None).drop_path(ones, 0.3, branch)
    }

    #[test]
    fn a_sample_skips_the_same_branches_wherever_the_batch_is_cut() {
        let whole = skipped_rows(0, 64, 7);
        let parts = Tensor::cat(
            &[
                skipped_rows(0, 10, 7),
                skipped_rows(10, 53, 7),
                skipped_rows(63, 1, 7),
            ],
            0,
        );
        assert_eq!(whole, parts);
        assert_ne!(whole, skipped_rows(0, 64, 8), "branches are independent");
        assert_ne!(whole, skipped_rows(64, 64, 7), "samples are independent");
    }

    #[test]
    fn drop_path_takes_whole_samples_and_keeps_the_mean() {
        let scales = skipped_rows(0, 20_000, 3);
        let by_sample = scales.view([-1, 6]);
        assert_eq!(by_sample.amax(1, false), by_sample.amin(1, false));
        let mean = scales.mean(Kind::Double).double_value(&[]);
        // The standard error of the mean of 20,000 samples is 0.005.
        assert!((mean - 1.0).abs() < 0.02, "{mean}");
        let zeros = scales
            .eq(0.0)
            .to_kind(Kind::Double)
            .mean(Kind::Double)
            .double_value(&[]);
        assert!((zeros - 0.3).abs() < 0.015, "{zeros}");
        let ones = Tensor::ones([2, 8], (Kind::Float, Device::Cpu));
        let mode = ForwardMode::evaluation(Precision::Fp32);
        assert_eq!(
            Pass::new(&mode, None).drop_path(ones.shallow_clone(), 0.3, 0),
            ones
        );
    }

    #[test]
    fn drawn_tokens_are_distinct_sorted_uniform_and_each_samples_own() {
        let drawn = |first_sample, rows| Pass::new(&at(first_sample), None).drawn_tokens(rows, 144, 129);
        let whole = drawn(0, 2000);
        assert_eq!(whole, Tensor::cat(&[drawn(0, 1500), drawn(1500, 500)], 0));
        let steps = whole.narrow(1, 1, 128) - whole.narrow(1, 0, 128);
        assert!(steps.min().int64_value(&[]) >= 1);
        assert!(whole.min().int64_value(&[]) >= 0 && whole.max().int64_value(&[]) < 144);
        assert_ne!(whole.get(0), whole.get(1));
        // Each token is kept with probability 129/144; the standard error over 2000 samples is 0.007.
        let counts = whole
            .view([-1])
            .bincount(None::<Tensor>, 144)
            .to_kind(Kind::Double)
            / 2000.0;
        let error = (counts - 129.0 / 144.0).abs().max().double_value(&[]);
        assert!(error < 0.035, "{error}");
    }

    #[test]
    fn dropout_keeps_the_mean_and_is_off_in_evaluation() {
        let dropped = drop_rows(0, 20);
        let mean = dropped.mean(Kind::Double).double_value(&[]);
        assert!((mean - 1.0).abs() < 0.03, "{mean}");
        let zeros = dropped
            .eq(0.0)
            .to_kind(Kind::Double)
            .mean(Kind::Double)
            .double_value(&[]);
        assert!((zeros - 0.4).abs() < 0.02, "{zeros}");
        let mode = ForwardMode::evaluation(Precision::Fp32);
        let ones = Tensor::ones([2, 8], (Kind::Float, Device::Cpu));
        assert_eq!(Pass::new(&mode, None).dropout(ones.shallow_clone(), 0.4), ones);
    }
}
