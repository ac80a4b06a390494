//! The module vocabulary of vision transformers: layer norm, attention, the two-layer network of a block, the block.
//!
//! Precision is the reference's: the linear layers compute in that of the pass; layer norms, the attention between
//! queries and keys, and the sums along the residual path are f32.

use tch::{Kind, Tensor};

use super::{
    graph::Op,
    layers::Linear,
    pass::Pass,
    state::{Builder, Init},
};

/// Added to the variance (PyTorch's default).
const LAYER_NORM_EPS: f64 = 1e-5;
/// Fresh weights of linear layers. The reference truncates the normal distribution at +-2, a hundred deviations away.
pub const TRANSFORMER_INIT: Init = Init::Normal { std: 0.02 };
/// Width of a block's hidden layer in multiples of the features.
const MLP_RATIO: i64 = 4;

/// Layer norm over the last dimension: tensors `weight`, `bias`.
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    /// Registers the layer: weight 1, bias 0.
    pub fn new(mut b: Builder, features: i64) -> Self {
        Self {
            weight: b.parameter("weight", &[features], Init::Constant(1.0)),
            bias: b.parameter("bias", &[features], Init::Constant(0.0)),
        }
    }

    /// Same shape as `x`, f32.
    pub fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let y = x.to_kind(Kind::Float).layer_norm(
            self.weight.size(),
            Some(&self.weight),
            Some(&self.bias),
            LAYER_NORM_EPS,
            true,
        );
        pass.record(&[x], y, || Op::LayerNorm {
            weight: self.weight.shallow_clone(),
            bias: self.bias.shallow_clone(),
            eps: LAYER_NORM_EPS,
        })
    }
}

/// Self-attention of several heads (Vaswani et al., 2017): children `qkv` without bias, and `proj`.
struct Attention {
    qkv: Linear,
    proj: Linear,
    heads: i64,
}

impl Attention {
    fn new(mut b: Builder, features: i64, heads: i64) -> Self {
        Self {
            qkv: Linear::without_bias(b.child("qkv"), features, 3 * features, TRANSFORMER_INIT),
            proj: Linear::with_zero_bias(b.child("proj"), features, features, TRANSFORMER_INIT),
            heads,
        }
    }

    /// \[N, L, F\] to \[N, L, F\].
    fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let qkv = self.qkv.forward(x, pass);
        let y = match pass.counts_only() {
            true => Tensor::zeros(x.size(), (Kind::Float, x.device())),
            false => attend(&qkv.to_kind(Kind::Float), self.heads),
        };
        // Queries by keys, and weights by values: each element of the output is made of L products in both.
        pass.count_macs(&y, 2 * x.size()[1]);
        let y = pass.record(&[&qkv], y, || Op::Attention { heads: self.heads });
        self.proj.forward(&y, pass)
    }
}

/// softmax(q k' / sqrt(F / heads)) v by head, of q, k, v side by side: \[N, L, 3 * F\] to \[N, L, F\].
pub(super) fn attend(qkv: &Tensor, heads: i64) -> Tensor {
    let [n, tokens, features] = [qkv.size()[0], qkv.size()[1], qkv.size()[2] / 3];
    let by_head = qkv
        .view([n, tokens, 3, heads, features / heads])
        .permute([2, 0, 3, 1, 4]);
    let [query, key, value] = [0, 1, 2].map(|part| by_head.get(part));
    Tensor::scaled_dot_product_attention(&query, &key, &value, None::<Tensor>, 0.0, false, None, false)
        .transpose(1, 2)
        .reshape([n, tokens, features])
}

/// Children `fc1` and `fc2` with ReLU6 in between.
struct Mlp {
    fc1: Linear,
    fc2: Linear,
}

impl Mlp {
    fn new(mut b: Builder, features: i64) -> Self {
        let hidden = MLP_RATIO * features;
        Self {
            fc1: Linear::with_zero_bias(b.child("fc1"), features, hidden, TRANSFORMER_INIT),
            fc2: Linear::with_zero_bias(b.child("fc2"), hidden, features, TRANSFORMER_INIT),
        }
    }

    fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let x = self.fc1.forward(x, pass);
        let x = pass.record(&[&x], x.relu6(), || Op::Relu6);
        self.fc2.forward(&x, pass)
    }
}

/// Two residual branches, each behind a layer norm: attention between tokens, and a network for every token alone.
pub struct Block {
    norm1: LayerNorm,
    norm2: LayerNorm,
    attn: Attention,
    mlp: Mlp,
    drop_path: f64,
    /// Number of its first branch among the network's.
    branch: u16,
}

impl Block {
    /// Registers the block; `index` is its place in the network, and `drop_path` the probability that a sample skips
    /// one of its branches while training.
    pub fn new(mut b: Builder, index: u16, features: i64, heads: i64, drop_path: f64) -> Self {
        Self {
            norm1: LayerNorm::new(b.child("norm1"), features),
            norm2: LayerNorm::new(b.child("norm2"), features),
            attn: Attention::new(b.child("attn"), features, heads),
            mlp: Mlp::new(b.child("mlp"), features),
            drop_path,
            branch: 2 * index,
        }
    }

    /// \[N, L, F\] to \[N, L, F\], both f32.
    pub fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let y = self.norm1.forward(x, pass);
        let y = self.attn.forward(&y, pass);
        let x = self.join(x, y, self.branch, pass);
        let y = self.norm2.forward(&x, pass);
        let y = self.mlp.forward(&y, pass);
        self.join(&x, y, self.branch + 1, pass)
    }

    fn join(&self, x: &Tensor, y: Tensor, branch: u16, pass: &mut Pass) -> Tensor {
        let y = pass.drop_path(y.to_kind(Kind::Float), self.drop_path, branch);
        pass.add(x, &y)
    }
}
