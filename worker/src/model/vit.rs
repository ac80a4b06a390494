//! Vision transformers (Dosovitskiy et al., 2020) in the form that the reference trains: patches of 9x9 pixels, no class
//! token, ReLU6, and a head of two linear layers over all tokens side by side.
//!
//! While training, a share of the tokens can be hidden from the blocks; a learned token stands in their place behind
//! the last layer norm.

use tch::Tensor;

use super::{
    IMAGE_SIZE,
    backbone::BackboneConfig,
    graph::Op,
    layers::{BatchNorm, Conv2d, ConvShape, Linear, Network, Piece},
    pass::Pass,
    state::Builder,
    transformer::{Block, LayerNorm, TRANSFORMER_INIT},
};

/// Size, and what is random while training.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Features of a token.
    pub features: i64,
    /// Blocks.
    pub depth: u16,
    /// Probability that a sample skips a branch of the last block; it grows linearly from 0 in the first.
    pub drop_path: f64,
    /// Whether tokens are hidden while training.
    pub hides_tokens: bool,
}

/// Tiny.
pub const T: Layout = Layout {
    features: 256,
    depth: 12,
    drop_path: 0.1,
    hides_tokens: true,
};
/// Tiny, for large data sets: less drop path, no hidden tokens.
pub const T_DP005_MASK0: Layout = Layout {
    drop_path: 0.05,
    hides_tokens: false,
    ..T
};
/// Small.
pub const S: Layout = Layout { features: 512, ..T };
/// Small, for large data sets.
pub const S_DP005_MASK0: Layout = Layout {
    features: 512,
    ..T_DP005_MASK0
};
/// Base: the small one's width and twice its depth.
pub const B: Layout = Layout { depth: 24, ..S };
/// Base with less drop path. Its name says 5 % of hidden tokens, but the reference hides 10 % here as well.
pub const B_DP005_MASK005: Layout = Layout { drop_path: 0.05, ..B };
/// Large.
pub const L_DP005_MASK005: Layout = Layout {
    features: 768,
    ..B_DP005_MASK005
};
/// Huge.
pub const H: Layout = Layout {
    features: 1024,
    depth: 48,
    drop_path: 0.1,
    hides_tokens: false,
};

/// The state entry whose length is the embedding size.
pub const EMBEDDING_ENTRY: &str = "feature.3.bias";

/// Attention heads, of every size.
const HEADS: i64 = 8;
/// Side of a patch in pixels. Twelve fit into an image's side; its last four rows and columns are not looked at.
const PATCH: i64 = 9;
/// Tokens of an image.
const TOKENS: i64 = (IMAGE_SIZE / PATCH) * (IMAGE_SIZE / PATCH);
/// Tokens that the blocks see while others are hidden. The reference hides 10 % whatever ratio a network is named for.
const SEEN: i64 = TOKENS * 9 / 10;
/// Added to the variance in the head's batch norms.
const HEAD_EPS: f64 = 2e-5;

struct VisionTransformer {
    pos_embed: Tensor,
    mask_token: Tensor,
    patch_embed: Conv2d,
    blocks: Vec<Block>,
    norm: LayerNorm,
    hides_tokens: bool,
    dropout: f64,
    flat: Linear,
    flat_norm: BatchNorm,
    embedding: Linear,
    embedding_norm: BatchNorm,
}

/// Registers a vision transformer.
pub fn build(mut b: Builder, config: &BackboneConfig, layout: &Layout) -> Box<dyn Network> {
    let features = layout.features;
    let pos_embed = b.parameter("pos_embed", &[1, TOKENS, features], TRANSFORMER_INIT);
    let mask_token = b.parameter("mask_token", &[1, 1, features], TRANSFORMER_INIT);
    let patches = ConvShape {
        input: 3,
        output: features,
        kernel: PATCH,
        stride: PATCH,
        padding: 0,
        groups: 1,
    };
    let patch_embed = Conv2d::with_bias(b.child("patch_embed.proj"), patches);
    let last = f64::from(layout.depth.max(2) - 1);
    let block = |index| {
        let drop_path = layout.drop_path * f64::from(index) / last;
        let b = b.child(format_args!("blocks.{index}"));
        Block::new(b, index, features, HEADS, drop_path)
    };
    let blocks = (0..layout.depth).map(block).collect();
    let norm = LayerNorm::new(b.child("norm"), features);
    let size = config.embedding_size;
    let linear = |b: Builder, input, output| Linear::without_bias(b, input, output, TRANSFORMER_INIT);
    Box::new(VisionTransformer {
        pos_embed,
        mask_token,
        patch_embed,
        blocks,
        norm,
        hides_tokens: layout.hides_tokens,
        dropout: config.dropout,
        flat: linear(b.child("feature.0"), TOKENS * features, features),
        flat_norm: BatchNorm::new(b.child("feature.1"), features).with_eps(HEAD_EPS),
        embedding: linear(b.child("feature.2"), features, size),
        embedding_norm: BatchNorm::new(b.child("feature.3"), size).with_eps(HEAD_EPS),
    })
}

impl VisionTransformer {
    /// Where the tokens that the blocks see come from, \[N, SEEN, F\], in a pass that hides others.
    fn seen(&self, x: &Tensor, pass: &Pass) -> Option<Tensor> {
        let hides = self.hides_tokens && pass.train();
        hides.then(|| {
            let drawn = pass.drawn_tokens(x.size()[0], TOKENS as usize, SEEN as usize);
            let features = x.size()[2];
            drawn
                .to_device(x.device())
                .unsqueeze(-1)
                .expand([-1, -1, features], false)
        })
    }
}

impl Network for VisionTransformer {
    fn stem(&self, images: &Tensor, pass: &mut Pass) -> Tensor {
        let x = pass.in_full_precision(|pass| self.patch_embed.forward(images, pass));
        let x = pass.record(&[&x], x.flatten(2, -1).transpose(1, 2), || Op::Tokens);
        pass.tap("patch_embed", &x);
        let x = pass.record(&[&x], &x + &self.pos_embed, || Op::AddParameter {
            parameter: self.pos_embed.shallow_clone(),
        });
        pass.tap("pos_drop", &x);
        match self.seen(&x, pass) {
            Some(seen) => pass.gather(&x, &seen),
            None => x,
        }
    }

    fn trunk(&self) -> Vec<Piece<'_>> {
        let blocks = self.blocks.iter().enumerate();
        blocks
            .map(|(i, block)| Piece::new(|x, pass| block.forward(x, pass)).ending(format!("blocks.{i}")))
            .collect()
    }

    fn tail(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let x = pass.leave_mixed_precision(x.shallow_clone());
        let x = self.norm.forward(&x, pass);
        pass.tap("norm", &x);
        let x = match self.seen(&x, pass) {
            Some(seen) => {
                let hidden = self.mask_token.expand([x.size()[0], TOKENS, x.size()[2]], false);
                hidden.scatter(1, &seen, &x)
            }
            None => x,
        };
        let x = pass.flatten(&x);
        let x = self.flat.forward(&x, pass);
        let x = self.flat_norm.forward(&x, pass);
        let x = pass.dropout(x, self.dropout);
        let x = self.embedding.forward(&x, pass);
        let x = self.embedding_norm.forward(&x, pass);
        pass.tap("feature", &x);
        x
    }
}
