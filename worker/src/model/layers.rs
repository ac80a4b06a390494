//! The module vocabulary: layers with named parameters and PyTorch's semantics.
//!
//! Every layer registers its tensors with a [`Builder`] in `state_dict` order and runs in the precision of the
//! [`Pass`]. Gradients are autograd's; a layer holds no other state than its tensors.

use tch::{Device, Kind, Tensor};

use super::{
    graph::Op,
    native::{channels_last, prelu},
    norm::{self, Norm, Then},
    pass::Pass,
    state::{Builder, Init},
};

/// A network, images in, embeddings out, in three parts: what lies between the first layers and the last ones is a row
/// of pieces, each of which can be run again from its input alone.
pub trait Network: Send {
    /// From images \[N, 3, 112, 112\] f32 to the input of the trunk.
    fn stem(&self, images: &Tensor, pass: &mut Pass) -> Tensor;

    /// The pieces in between, first to last.
    fn trunk(&self) -> Vec<Piece<'_>>;

    /// From the output of the trunk to embeddings \[N, D\] f32.
    fn tail(&self, x: &Tensor, pass: &mut Pass) -> Tensor;
}

/// What a piece computes.
type Forward<'a> = dyn Fn(&Tensor, &mut Pass) -> Tensor + 'a;

/// A part of a trunk. It keeps the pass's precision and changes nothing but running statistics.
pub struct Piece<'a> {
    forward: Box<Forward<'a>>,
    tap: Option<String>,
}

impl<'a> Piece<'a> {
    /// A piece that computes `forward`.
    pub fn new(forward: impl Fn(&Tensor, &mut Pass) -> Tensor + 'a) -> Self {
        Self {
            forward: Box::new(forward),
            tap: None,
        }
    }

    /// The same, whose output is that of the child module `name`.
    pub fn ending(self, name: impl Into<String>) -> Self {
        Self {
            tap: Some(name.into()),
            ..self
        }
    }

    /// Its output.
    pub fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let y = (self.forward)(x, pass);
        if let Some(name) = &self.tap {
            pass.tap(name, &y);
        }
        y
    }
}

/// Momentum of the running statistics (PyTorch's default).
const BATCH_NORM_MOMENTUM: f64 = 0.1;
/// Added to the variance (PyTorch's default, and what the reference names for convolutional networks).
const BATCH_NORM_EPS: f64 = 1e-5;
/// Slope of a fresh PReLU (PyTorch's default).
const PRELU_INIT: f64 = 0.25;

/// PyTorch's default for weights and biases of convolutions and linear layers: uniform with bound 1/sqrt(fan_in).
fn torch_default(fan_in: i64) -> Init {
    Init::Uniform {
        bound: 1.0 / (fan_in as f64).sqrt(),
    }
}

/// Shape of a convolution with square kernel.
#[derive(Clone, Copy, Debug)]
pub struct ConvShape {
    /// Input channels.
    pub input: i64,
    /// Output channels.
    pub output: i64,
    /// Kernel height and width.
    pub kernel: i64,
    /// Stride in both directions.
    pub stride: i64,
    /// Zero padding on every side.
    pub padding: i64,
    /// Groups that see only their share of the input channels.
    pub groups: i64,
}

impl ConvShape {
    /// 3x3 convolution that keeps the size (at stride 1).
    pub fn three(input: i64, output: i64, stride: i64) -> Self {
        Self {
            input,
            output,
            kernel: 3,
            stride,
            padding: 1,
            groups: 1,
        }
    }

    /// 1x1 convolution.
    pub fn one(input: i64, output: i64, stride: i64) -> Self {
        Self {
            input,
            output,
            kernel: 1,
            stride,
            padding: 0,
            groups: 1,
        }
    }

    /// What a CPU computes in for a pass in `kind`: f32 where oneDNN's way back is slow in bf16, as it is for depthwise convolutions with a
    /// stride (a training step of mbf at batch 64 took 1.3 to 1.7 s instead of 1.05 to 1.08).
    pub fn kind_on_cpu(&self, kind: Kind) -> Kind {
        match kind == Kind::BFloat16 && self.groups > 1 && self.stride > 1 {
            true => Kind::Float,
            false => kind,
        }
    }

    /// The same in groups.
    pub fn groups(self, groups: i64) -> Self {
        Self { groups, ..self }
    }

    /// \[N, output, H', W'\] for an input of \[N, input, H, W\].
    fn output_size(self, input: &[i64]) -> Vec<i64> {
        let mut size = input.to_vec();
        size[1] = self.output;
        for side in &mut size[2..] {
            *side = (*side + 2 * self.padding - self.kernel) / self.stride + 1;
        }
        size
    }

    fn weight_size(self) -> [i64; 4] {
        [self.output, self.input / self.groups, self.kernel, self.kernel]
    }

    /// Weights that one output element is made of.
    fn fan_in(self) -> i64 {
        self.input / self.groups * self.kernel * self.kernel
    }

    /// As PyTorch counts it: groups are not considered.
    pub fn fan_out(self) -> i64 {
        self.output * self.kernel * self.kernel
    }
}

/// Convolution: tensors `weight` and, if it has one, `bias`.
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    shape: ConvShape,
}

impl Conv2d {
    /// Without bias.
    pub fn new(mut b: Builder, shape: ConvShape, init: Init) -> Self {
        Self {
            weight: b.parameter("weight", &shape.weight_size(), init),
            bias: None,
            shape,
        }
    }

    /// With bias, PyTorch's default initialisation.
    pub fn with_bias(mut b: Builder, shape: ConvShape) -> Self {
        let init = torch_default(shape.fan_in());
        Self {
            weight: b.parameter("weight", &shape.weight_size(), init),
            bias: Some(b.parameter("bias", &[shape.output], init)),
            shape,
        }
    }

    /// \[N, input, H, W\] to \[N, output, H', W'\] in the pass's precision.
    pub fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let y = match pass.counts_only() {
            true => Tensor::zeros(self.shape.output_size(&x.size()), (pass.kind(), x.device())),
            false => self.convolve(x, pass.kind()),
        };
        pass.count_macs(&y, self.shape.fan_in());
        pass.record(&[x], y, || Op::Conv {
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            shape: self.shape,
        })
    }

    fn convolve(&self, x: &Tensor, kind: Kind) -> Tensor {
        let ConvShape {
            stride,
            padding,
            groups,
            ..
        } = self.shape;
        let (computed, weight) = match self.weight.device() {
            Device::Cpu => {
                let computed = self.shape.kind_on_cpu(kind);
                (computed, self.weight.to_kind(computed))
            }
            _ => (kind, channels_last(&self.weight, kind)),
        };
        let y = x.to_kind(computed).conv2d(
            &weight,
            self.bias.as_ref().map(|bias| bias.to_kind(computed)),
            [stride, stride],
            [padding, padding],
            [1, 1],
            groups,
        );
        y.to_kind(kind)
    }
}

/// Fully connected layer: tensors `weight` and, if it has one, `bias`.
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// With bias, PyTorch's default initialisation.
    pub fn new(mut b: Builder, input: i64, output: i64) -> Self {
        let init = torch_default(input);
        Self {
            weight: b.parameter("weight", &[output, input], init),
            bias: Some(b.parameter("bias", &[output], init)),
        }
    }

    /// With a bias that starts at 0.
    pub fn with_zero_bias(mut b: Builder, input: i64, output: i64, init: Init) -> Self {
        Self {
            weight: b.parameter("weight", &[output, input], init),
            bias: Some(b.parameter("bias", &[output], Init::Constant(0.0))),
        }
    }

    /// Without bias.
    pub fn without_bias(mut b: Builder, input: i64, output: i64, init: Init) -> Self {
        Self {
            weight: b.parameter("weight", &[output, input], init),
            bias: None,
        }
    }

    /// \[.., input\] to \[.., output\] in the pass's precision.
    pub fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let kind = pass.kind();
        let [output, input] = [self.weight.size()[0], self.weight.size()[1]];
        let y = if pass.counts_only() {
            let mut size = x.size();
            size.pop();
            size.push(output);
            Tensor::zeros(size, (kind, x.device()))
        } else {
            let bias = self.bias.as_ref().map(|bias| bias.to_kind(kind));
            x.to_kind(kind).linear(&self.weight.to_kind(kind), bias)
        };
        pass.count_macs(&y, input);
        pass.record(&[x], y, || Op::Linear {
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
        })
    }
}

/// Batch norm over dimension 1, as `BatchNorm1d` and `BatchNorm2d`: tensors `weight`, `bias`, `running_mean`,
/// `running_var`, `num_batches_tracked`.
///
/// Parameters and statistics are f32 in every precision; the output has the kind of the input. While training the
/// batch is normalised by its biased variance, and the unbiased one enters the running average.
pub struct BatchNorm {
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    eps: f64,
    frozen: bool,
}

impl BatchNorm {
    /// Registers the layer: weight 1, bias 0, statistics of a standard normal input.
    pub fn new(b: Builder, channels: i64) -> Self {
        Self::build(b, channels, true)
    }

    /// The same with a `weight` that never trains.
    pub fn with_frozen_weight(b: Builder, channels: i64) -> Self {
        Self::build(b, channels, false)
    }

    /// The same with another constant under the root.
    pub fn with_eps(self, eps: f64) -> Self {
        Self { eps, ..self }
    }

    fn build(mut b: Builder, channels: i64, trainable_weight: bool) -> Self {
        let frozen = b.freezes_batch_norm();
        let one = Init::Constant(1.0);
        let zero = Init::Constant(0.0);
        let shape = [channels];
        let weight = if trainable_weight && !frozen {
            b.parameter("weight", &shape, one)
        } else {
            b.frozen("weight", &shape, one)
        };
        let bias = if frozen {
            b.frozen("bias", &shape, zero)
        } else {
            b.parameter("bias", &shape, zero)
        };
        Self {
            weight,
            bias,
            running_mean: b.buffer("running_mean", &shape, Kind::Float, zero),
            running_var: b.buffer("running_var", &shape, Kind::Float, one),
            num_batches_tracked: b.buffer("num_batches_tracked", &[], Kind::Int64, zero),
            eps: BATCH_NORM_EPS,
            frozen,
        }
    }

    /// Same shape and kind as `x`.
    pub fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        match self.in_one(x, Then::Nothing, pass) {
            Some(y) => y,
            None => self.alone(x, pass),
        }
    }

    /// The same with a rectifier behind it.
    pub fn forward_prelu(&self, x: &Tensor, prelu: &PRelu, pass: &mut Pass) -> Tensor {
        match self.in_one(x, Then::PRelu(&prelu.weight), pass) {
            Some(y) => y,
            None => prelu.forward(&self.alone(x, pass), pass),
        }
    }

    /// The same, added to a shortcut of its form.
    pub fn forward_add(&self, x: &Tensor, shortcut: &Tensor, pass: &mut Pass) -> Tensor {
        match self.in_one(x, Then::Add(shortcut), pass) {
            Some(y) => y,
            None => {
                let y = self.alone(x, pass);
                pass.add(&y, shortcut)
            }
        }
    }

    /// The norm and what follows it in one pass over memory, where functions of our own do that.
    fn in_one(&self, x: &Tensor, then: Then<'_>, pass: &mut Pass) -> Option<Tensor> {
        let place = pass.norm_place(x.device())?;
        if !pass.train() || self.frozen || !norm::takes_form(place, &x.size(), x.kind()) {
            return None;
        }
        let shortcut = match then {
            Then::Add(shortcut) => Some(shortcut),
            _ => None,
        };
        if let Some(walked) = pass.walk_norm(x, self.weight.numel() as u64, shortcut) {
            return Some(walked);
        }
        if !norm::is_laid_out(x) || shortcut.is_some_and(|shortcut| !norm::is_laid_out(shortcut)) {
            return None;
        }
        let moves = !pass.repeats() && self.values_per_channel(x) > 1;
        if moves {
            let _ = self.num_batches_tracked.shallow_clone().g_add_scalar_(1);
        }
        let norm = Norm {
            weight: &self.weight,
            bias: &self.bias,
            running: moves.then_some((&self.running_mean, &self.running_var)),
            momentum: BATCH_NORM_MOMENTUM,
            eps: self.eps,
        };
        Some(norm::batch_norm(pass.kernels(), x, &norm, then))
    }

    fn values_per_channel(&self, x: &Tensor) -> i64 {
        x.numel() as i64 / self.weight.size()[0].max(1)
    }

    fn alone(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let batch_statistics = pass.train() && !self.frozen;
        // A single value has no unbiased variance: PyTorch refuses it in Python and writes NaN from C++. A rank with
        // one sample left must go on, and must not poison the statistics.
        let track = !batch_statistics || (self.values_per_channel(x) > 1 && !pass.repeats());
        if batch_statistics && track {
            let _ = self.num_batches_tracked.shallow_clone().g_add_scalar_(1);
        }
        let y = x.batch_norm(
            Some(&self.weight),
            Some(&self.bias),
            track.then_some(&self.running_mean),
            track.then_some(&self.running_var),
            batch_statistics,
            BATCH_NORM_MOMENTUM,
            self.eps,
            true,
        );
        pass.record(&[x], y, || Op::BatchNorm {
            weight: self.weight.shallow_clone(),
            bias: self.bias.shallow_clone(),
            mean: self.running_mean.shallow_clone(),
            variance: self.running_var.shallow_clone(),
            eps: self.eps,
        })
    }
}

/// Leaky rectifier with one learned slope a channel: tensor `weight`.
pub struct PRelu {
    weight: Tensor,
}

impl PRelu {
    /// Registers the layer.
    pub fn new(mut b: Builder, channels: i64) -> Self {
        Self {
            weight: b.parameter("weight", &[channels], Init::Constant(PRELU_INIT)),
        }
    }

    /// Same shape and kind as `x`.
    pub fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let y = match pass.is_plain() {
            true => x.prelu(&self.weight.to_kind(x.kind())),
            false => prelu(x, &self.weight),
        };
        pass.record(&[x], y, || Op::PRelu {
            weight: self.weight.shallow_clone(),
        })
    }
}
