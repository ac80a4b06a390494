//! One forward pass: its mode, and what it reports on the way (taps, multiply-accumulates, operations).

use arcface_proto::spec::Precision;
use tch::{Kind, Tensor};

use super::graph::{Op, Trace};
use crate::random::{Purpose, Stream};

/// Where the dropout mask of a batch comes from: row i of the batch is global sample `first_sample + i` of the step,
/// so the mask does not depend on how the global batch is cut.
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
    /// Batch statistics in batch norm (and their running averages updated), dropout active.
    pub train: bool,
    /// Arithmetic of convolutions and linear layers in the trunk; the last linear layer and the embedding stay f32,
    /// as the reference keeps them outside its autocast.
    pub precision: Precision,
    /// Counters of the dropout mask; only used while training.
    pub dropout: DropoutDraw,
}

impl ForwardMode {
    /// Evaluation: running statistics, no dropout.
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

/// Called with a module's name and its output.
pub type Tap<'a> = &'a mut dyn FnMut(&str, &Tensor);

/// The state of one forward pass, handed through all layers.
pub struct Pass<'a> {
    mode: &'a ForwardMode,
    kind: Kind,
    tap: Option<Tap<'a>>,
    counts_only: bool,
    macs: u64,
    trace: Option<&'a mut Trace>,
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
            macs: 0,
            trace: None,
        }
    }

    /// A pass that counts and does not compute: convolutions give zeros of the right shape.
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

    /// Hands on what an operation made of `inputs`. Every operation of a network in evaluation goes through here, so
    /// that a network can be exported.
    pub fn record(&mut self, inputs: &[&Tensor], output: Tensor, op: impl FnOnce() -> Op) -> Tensor {
        match &mut self.trace {
            Some(trace) => trace.record(inputs, &output, op()),
            None => output,
        }
    }

    /// Sum of two tensors of one shape: where a shortcut joins its branch.
    pub fn add(&mut self, a: &Tensor, b: &Tensor) -> Tensor {
        self.record(&[a, b], a + b, || Op::Add)
    }

    /// \[N, ..\] to \[N, F\].
    pub fn flatten(&mut self, x: &Tensor) -> Tensor {
        self.record(&[x], x.flatten(1, -1), || Op::Flatten)
    }

    /// Whether convolutions need not compute.
    pub fn counts_only(&self) -> bool {
        self.counts_only
    }

    /// Whether the network trains.
    pub fn train(&self) -> bool {
        self.mode.train
    }

    /// Kind that convolutions and linear layers compute in.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Leaves the reduced precision: the layers from here on compute in f32.
    pub fn leave_mixed_precision(&mut self, x: Tensor) -> Tensor {
        self.kind = Kind::Float;
        x.to_kind(Kind::Float)
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
        let DropoutDraw {
            seed,
            step,
            first_sample,
        } = self.mode.dropout;
        let rows = x.size().first().map_or(0, |&n| n as u64);
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
        Pass::new(&mode, None).dropout(Tensor::ones([rows, 1000], (Kind::Float, Device::Cpu)), 0.4)
    }

    #[test]
    fn dropout_does_not_depend_on_how_the_batch_is_cut() {
        let whole = drop_rows(0, 6);
        let parts = Tensor::cat(&[drop_rows(0, 2), drop_rows(2, 3), drop_rows(5, 1)], 0);
        assert_eq!(whole, parts);
        assert_ne!(whole.get(0), whole.get(1));
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
