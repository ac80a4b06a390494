//! MobileFaceNet (Chen et al., 2018) in the wide form that the reference trains: inverted residual blocks with
//! depthwise convolutions, and a global depthwise convolution before the embedding layer.

use tch::Tensor;

use super::{
    backbone::BackboneConfig,
    layers::{BatchNorm, Conv2d, ConvShape, Linear, Network, PRelu, Piece},
    pass::Pass,
    state::{Builder, Init},
};

/// Depth and width.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Blocks at 56, 28, 14 and 7 pixels.
    pub blocks: [usize; 4],
    /// Multiple of the paper's widths.
    pub scale: i64,
}

/// The reference's `mbf`.
pub const MBF: Layout = Layout {
    blocks: [1, 4, 6, 2],
    scale: 2,
};

/// The reference's `mbf_large`.
pub const MBF_LARGE: Layout = Layout {
    blocks: [2, 8, 12, 4],
    scale: 4,
};

/// The state entry whose length is the embedding size.
pub const EMBEDDING_ENTRY: &str = "features.layers.3.bias";

/// Channels before the global depthwise convolution.
const SEPARATED: i64 = 512;
/// Side of the last feature map.
const LAST_MAP: i64 = 7;

/// He initialisation for the backward pass: normal with variance 2 / fan_out.
fn he(fan_out: i64) -> Init {
    Init::Normal {
        std: (2.0 / fan_out as f64).sqrt(),
    }
}

fn conv(b: Builder, shape: ConvShape) -> Conv2d {
    Conv2d::new(b, shape, he(shape.fan_out()))
}

/// Convolution, batch norm, PReLU.
struct ConvBlock {
    conv: Conv2d,
    bn: BatchNorm,
    prelu: PRelu,
}

impl ConvBlock {
    fn new(mut b: Builder, shape: ConvShape) -> Self {
        Self {
            conv: conv(b.child("layers.0"), shape),
            bn: BatchNorm::new(b.child("layers.1"), shape.output),
            prelu: PRelu::new(b.child("layers.2"), shape.output),
        }
    }

    fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let x = self.conv.forward(x, pass);
        self.bn.forward_prelu(&x, &self.prelu, pass)
    }
}

/// Convolution and batch norm.
struct LinearBlock {
    conv: Conv2d,
    bn: BatchNorm,
}

impl LinearBlock {
    fn new(mut b: Builder, shape: ConvShape) -> Self {
        Self {
            conv: conv(b.child("layers.0"), shape),
            bn: BatchNorm::new(b.child("layers.1"), shape.output),
        }
    }

    fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let x = self.conv.forward(x, pass);
        self.bn.forward(&x, pass)
    }

    /// The same, added to a shortcut.
    fn forward_add(&self, x: &Tensor, shortcut: &Tensor, pass: &mut Pass) -> Tensor {
        let x = self.conv.forward(x, pass);
        self.bn.forward_add(&x, shortcut, pass)
    }
}

/// Inverted residual: expand by 1x1, 3x3 a channel at a time, project by 1x1.
struct DepthWise {
    expand: ConvBlock,
    depthwise: ConvBlock,
    project: LinearBlock,
    residual: bool,
}

impl DepthWise {
    /// Halves the resolution.
    fn down(b: Builder, input: i64, hidden: i64, output: i64) -> Self {
        Self::new(b, input, hidden, output, 2)
    }

    /// Keeps resolution and channels, and adds its input.
    fn residual(b: Builder, channels: i64, hidden: i64) -> Self {
        let block = Self::new(b, channels, hidden, channels, 1);
        Self {
            residual: true,
            ..block
        }
    }

    fn new(mut b: Builder, input: i64, hidden: i64, output: i64, stride: i64) -> Self {
        let depthwise = ConvShape::three(hidden, hidden, stride).groups(hidden);
        Self {
            expand: ConvBlock::new(b.child("layers.0"), ConvShape::one(input, hidden, 1)),
            depthwise: ConvBlock::new(b.child("layers.1"), depthwise),
            project: LinearBlock::new(b.child("layers.2"), ConvShape::one(hidden, output, 1)),
            residual: false,
        }
    }

    fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let y = self.expand.forward(x, pass);
        let y = self.depthwise.forward(&y, pass);
        match self.residual {
            true => self.project.forward_add(&y, x, pass),
            false => self.project.forward(&y, pass),
        }
    }
}

/// A child of the trunk.
enum Stage {
    Conv(ConvBlock),
    Down(Box<DepthWise>),
    Residual(Vec<DepthWise>),
}

impl Stage {
    fn down(b: Builder, input: i64, hidden: i64, output: i64) -> Self {
        Stage::Down(Box::new(DepthWise::down(b, input, hidden, output)))
    }

    fn residual(mut b: Builder, blocks: usize, channels: i64, hidden: i64) -> Self {
        let block = |i| DepthWise::residual(b.child(format_args!("layers.{i}")), channels, hidden);
        Stage::Residual((0..blocks).map(block).collect())
    }

    fn pieces(&self) -> Vec<Piece<'_>> {
        match self {
            Stage::Conv(block) => vec![Piece::new(|x, pass| block.forward(x, pass))],
            Stage::Down(block) => vec![Piece::new(|x, pass| block.forward(x, pass))],
            Stage::Residual(blocks) => {
                let blocks = blocks.iter();
                blocks
                    .map(|block| Piece::new(|x, pass| block.forward(x, pass)))
                    .collect()
            }
        }
    }
}

struct MobileFaceNet {
    stem: ConvBlock,
    stages: Vec<Stage>,
    conv_sep: ConvBlock,
    global: LinearBlock,
    fc: Linear,
    features: BatchNorm,
}

/// Registers a MobileFaceNet.
pub fn build(mut b: Builder, config: &BackboneConfig, layout: &Layout) -> Box<dyn Network> {
    let narrow = 64 * layout.scale;
    let wide = 128 * layout.scale;
    let [first, second, third, fourth] = layout.blocks;
    let stem = ConvBlock::new(b.child("layers.0"), ConvShape::three(3, narrow, 2));
    let mut stages = Vec::new();
    let mut stage = |b: &mut Builder, make: &dyn Fn(Builder) -> Stage| {
        let at = format!("layers.{}", stages.len() + 1);
        stages.push(make(b.child(at)));
    };
    let b = &mut b;
    // The reference's first stage is a grouped convolution (64 groups whatever the width) when it has one block.
    stage(b, &|b| match first {
        1 => Stage::Conv(ConvBlock::new(b, ConvShape::three(narrow, narrow, 1).groups(64))),
        _ => Stage::residual(b, first, narrow, 128),
    });
    stage(b, &|b| Stage::down(b, narrow, 128, narrow));
    stage(b, &|b| Stage::residual(b, second, narrow, 128));
    stage(b, &|b| Stage::down(b, narrow, 256, wide));
    stage(b, &|b| Stage::residual(b, third, wide, 256));
    stage(b, &|b| Stage::down(b, wide, 512, wide));
    stage(b, &|b| Stage::residual(b, fourth, wide, 256));

    let size = config.embedding_size;
    let global = ConvShape {
        input: SEPARATED,
        output: SEPARATED,
        kernel: LAST_MAP,
        stride: 1,
        padding: 0,
        groups: SEPARATED,
    };
    Box::new(MobileFaceNet {
        stem,
        stages,
        conv_sep: ConvBlock::new(b.child("conv_sep"), ConvShape::one(wide, SEPARATED, 1)),
        global: LinearBlock::new(b.child("features.layers.0"), global),
        fc: Linear::without_bias(b.child("features.layers.2"), SEPARATED, size, he(size)),
        features: BatchNorm::new(b.child("features.layers.3"), size),
    })
}

impl Network for MobileFaceNet {
    fn stem(&self, images: &Tensor, pass: &mut Pass) -> Tensor {
        let x = self.stem.forward(images, pass);
        pass.tap("layers.0", &x);
        x
    }

    fn trunk(&self) -> Vec<Piece<'_>> {
        let mut pieces = Vec::new();
        for (i, stage) in self.stages.iter().enumerate() {
            pieces.extend(stage.pieces());
            let last = pieces.pop().expect("a stage has blocks");
            pieces.push(last.ending(format!("layers.{}", i + 1)));
        }
        pieces
    }

    fn tail(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let x = pass.leave_mixed_precision(x.shallow_clone());
        let x = self.conv_sep.forward(&x, pass);
        pass.tap("conv_sep", &x);
        let x = self.global.forward(&x, pass);
        let x = pass.flatten(&x);
        let x = self.fc.forward(&x, pass);
        let x = self.features.forward(&x, pass);
        pass.tap("features", &x);
        x
    }
}
