//! IResNet (Duta et al., "Improved Residual Networks", 2020) in ArcFace's form: a 3x3 stem at full resolution, four
//! stages of pre-normalised basic blocks that each halve it (112, 56, 28, 14, 7), and a linear embedding layer
//! between two batch norms.

use tch::Tensor;

use super::{
    backbone::BackboneConfig,
    layers::{BatchNorm, Conv2d, ConvShape, Linear, Network, PRelu, Piece},
    pass::Pass,
    state::{Builder, Init},
};

/// Channels and blocks of the four stages; the stem has the first stage's channels.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Channels of each stage.
    pub widths: [i64; 4],
    /// Blocks of each stage.
    pub blocks: [usize; 4],
}

const WIDTHS: [i64; 4] = [64, 128, 256, 512];

/// 18 layers.
pub const R18: Layout = Layout {
    widths: WIDTHS,
    blocks: [2, 2, 2, 2],
};
/// 34 layers.
pub const R34: Layout = Layout {
    widths: WIDTHS,
    blocks: [3, 4, 6, 3],
};
/// 50 layers.
pub const R50: Layout = Layout {
    widths: WIDTHS,
    blocks: [3, 4, 14, 3],
};
/// 100 layers.
pub const R100: Layout = Layout {
    widths: WIDTHS,
    blocks: [3, 13, 30, 3],
};
/// 200 layers.
pub const R200: Layout = Layout {
    widths: WIDTHS,
    blocks: [6, 26, 60, 6],
};
/// 2060 layers.
pub const R2060: Layout = Layout {
    widths: WIDTHS,
    blocks: [3, 128, 896, 3],
};
/// A quarter of the widths and one block a stage: not a published network, but one that demonstrations and tests can
/// train on a CPU in minutes.
pub const TINY: Layout = Layout {
    widths: [16, 32, 64, 128],
    blocks: [1, 1, 1, 1],
};

/// The state entry whose length is the embedding size.
pub const EMBEDDING_ENTRY: &str = "features.bias";

/// Side of the last feature map.
const LAST_MAP: i64 = 7;
/// Tensors of its input's size that a block keeps for its backward pass.
const KEPT_BY_BLOCK: f64 = 6.0;
/// Standard deviation of fresh convolution weights, as the reference draws them.
const CONV_INIT: Init = Init::Normal { std: 0.1 };

struct Block {
    bn1: BatchNorm,
    conv1: Conv2d,
    bn2: BatchNorm,
    prelu: PRelu,
    conv2: Conv2d,
    bn3: BatchNorm,
    downsample: Option<(Conv2d, BatchNorm)>,
}

impl Block {
    fn new(mut b: Builder, input: i64, output: i64, stride: i64) -> Self {
        Self {
            bn1: BatchNorm::new(b.child("bn1"), input),
            conv1: Conv2d::new(b.child("conv1"), ConvShape::three(input, output, 1), CONV_INIT),
            bn2: BatchNorm::new(b.child("bn2"), output),
            prelu: PRelu::new(b.child("prelu"), output),
            conv2: Conv2d::new(
                b.child("conv2"),
                ConvShape::three(output, output, stride),
                CONV_INIT,
            ),
            bn3: BatchNorm::new(b.child("bn3"), output),
            downsample: (stride != 1 || input != output).then(|| {
                let shape = ConvShape::one(input, output, stride);
                (
                    Conv2d::new(b.child("downsample.0"), shape, CONV_INIT),
                    BatchNorm::new(b.child("downsample.1"), output),
                )
            }),
        }
    }

    fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let y = self.bn1.forward(x, pass);
        let y = self.conv1.forward(&y, pass);
        let y = self.bn2.forward_prelu(&y, &self.prelu, pass);
        let y = self.conv2.forward(&y, pass);
        match &self.downsample {
            None => self.bn3.forward_add(&y, x, pass),
            Some((conv, bn)) => {
                let shortcut = conv.forward(x, pass);
                let shortcut = bn.forward(&shortcut, pass);
                self.bn3.forward_add(&y, &shortcut, pass)
            }
        }
    }
}

/// Blocks in one piece of a stage. With n blocks in pieces of k, n/k inputs are kept, and while a piece is run again
/// [`KEPT_BY_BLOCK`] k tensors: the sum is least where both are equal.
fn piece_length(blocks: usize) -> usize {
    (blocks as f64 / KEPT_BY_BLOCK).sqrt().round().max(1.0) as usize
}

struct IResNet {
    conv1: Conv2d,
    bn1: BatchNorm,
    prelu: PRelu,
    stages: Vec<(String, Vec<Block>)>,
    bn2: BatchNorm,
    dropout: f64,
    fc: Linear,
    features: BatchNorm,
}

/// Registers an IResNet.
pub fn build(mut b: Builder, config: &BackboneConfig, layout: &Layout) -> Box<dyn Network> {
    let [stem, .., last] = layout.widths;
    let conv1 = Conv2d::new(b.child("conv1"), ConvShape::three(3, stem, 1), CONV_INIT);
    let bn1 = BatchNorm::new(b.child("bn1"), stem);
    let prelu = PRelu::new(b.child("prelu"), stem);
    let mut input = stem;
    let mut stages = Vec::new();
    for (stage, (&width, &count)) in layout.widths.iter().zip(&layout.blocks).enumerate() {
        let name = format!("layer{}", stage + 1);
        let mut blocks = Vec::new();
        for block in 0..count {
            let stride = if block == 0 { 2 } else { 1 };
            blocks.push(Block::new(b.child(&name).child(block), input, width, stride));
            input = width;
        }
        stages.push((name, blocks));
    }
    Box::new(IResNet {
        conv1,
        bn1,
        prelu,
        stages,
        bn2: BatchNorm::new(b.child("bn2"), last),
        dropout: config.dropout,
        fc: Linear::new(b.child("fc"), last * LAST_MAP * LAST_MAP, config.embedding_size),
        // Only the direction of an embedding counts, so its per-dimension scale stays 1, as in the reference.
        features: BatchNorm::with_frozen_weight(b.child("features"), config.embedding_size),
    })
}

impl Network for IResNet {
    fn stem(&self, images: &Tensor, pass: &mut Pass) -> Tensor {
        let x = self.conv1.forward(images, pass);
        pass.tap("conv1", &x);
        let x = match pass.is_watched() {
            true => {
                let x = self.bn1.forward(&x, pass);
                pass.tap("bn1", &x);
                self.prelu.forward(&x, pass)
            }
            false => self.bn1.forward_prelu(&x, &self.prelu, pass),
        };
        pass.tap("prelu", &x);
        x
    }

    fn trunk(&self) -> Vec<Piece<'_>> {
        let mut pieces = Vec::new();
        for (name, blocks) in &self.stages {
            let runs = blocks.chunks(piece_length(blocks.len()));
            pieces.extend(runs.map(|run| {
                Piece::new(|x, pass| {
                    run.iter()
                        .fold(x.shallow_clone(), |x, block| block.forward(&x, pass))
                })
            }));
            let last = pieces.pop().expect("a stage has blocks");
            pieces.push(last.ending(name));
        }
        pieces
    }

    fn tail(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let x = self.bn2.forward(x, pass);
        pass.tap("bn2", &x);
        let x = pass.flatten(&x);
        let x = pass.dropout(x, self.dropout);
        pass.tap("dropout", &x);
        let x = pass.leave_mixed_precision(x);
        let x = self.fc.forward(&x, pass);
        pass.tap("fc", &x);
        let x = self.features.forward(&x, pass);
        pass.tap("features", &x);
        x
    }
}
