//! What a vision transformer is made of, in ONNX operators. Shapes begin with 0: as many as the input has.

use tch::Tensor;

use super::{emit::Emitter, proto::AttributeProto};

fn perm(axes: &[i64]) -> Vec<AttributeProto> {
    vec![AttributeProto::ints("perm", axes)]
}

impl Emitter<'_> {
    /// A linear layer of the last of three dimensions. `Gemm` takes two, and `MatMul` no transposed weight.
    pub(super) fn linear_of_tokens(
        &mut self,
        layer: &str,
        x: &str,
        weight: &Tensor,
        bias: Option<&Tensor>,
        output: &str,
    ) {
        let size = weight.size();
        let weight = weight.shallow_clone();
        let transposed = move || weight.tr();
        let weight = self.constant(format!("{layer}.weight"), &[size[1], size[0]], transposed);
        let Some(bias) = bias.map(Tensor::shallow_clone) else {
            return self.node("MatMul", &[x, &weight], output, vec![]);
        };
        let product = format!("{layer}.product");
        self.node("MatMul", &[x, &weight], &product, vec![]);
        let bias = self.constant(format!("{layer}.bias"), &[size[0]], move || bias.shallow_clone());
        self.node("Add", &[&product, &bias], output, vec![]);
    }

    /// \[N, C, H, W\] to \[N, H * W, C\].
    pub(super) fn tokens(&mut self, x: &str, shape: &[i64], output: &str) {
        let [channels, height, width] = [shape[1], shape[2], shape[3]];
        let rows = self.shape(&[0, channels, height * width]);
        let flat = format!("{output}.rows");
        self.node("Reshape", &[x, &rows], &flat, vec![]);
        self.node("Transpose", &[&flat], output, perm(&[0, 2, 1]));
    }

    /// softmax(q k' / sqrt(F / heads)) v of q, k, v side by side: `shape` is \[N, L, 3 * F\].
    pub(super) fn attention(&mut self, qkv: &str, shape: &[i64], heads: i64, output: &str) {
        let [tokens, features] = [shape[1], shape[2] / 3];
        let by_head = self.shape(&[0, tokens, heads, features / heads]);
        let together = self.shape(&[0, tokens, features]);
        let scale = self.number((features as f32 / heads as f32).sqrt().recip());
        let name = |part: &str| format!("{output}.{part}");

        let parts = ["query", "key", "value"].map(name);
        let outputs = parts.each_ref().map(String::as_str);
        self.node_of_many("Split", &[qkv], &outputs, vec![AttributeProto::int("axis", 2)]);
        // Queries and values by head, keys transposed as well.
        let axes = [[0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]];
        let [query, key, value] = [0, 1, 2].map(|i| {
            let cut = format!("{}.cut", parts[i]);
            let heads = format!("{}.heads", parts[i]);
            self.node("Reshape", &[&parts[i], &by_head], &cut, vec![]);
            self.node("Transpose", &[&cut], &heads, perm(&axes[i]));
            heads
        });
        let scaled = name("query.scaled");
        self.node("Mul", &[&query, &scale], &scaled, vec![]);
        let products = name("products");
        self.node("MatMul", &[&scaled, &key], &products, vec![]);
        let weights = name("weights");
        self.node(
            "Softmax",
            &[&products],
            &weights,
            vec![AttributeProto::int("axis", -1)],
        );
        let attended = name("heads");
        self.node("MatMul", &[&weights, &value], &attended, vec![]);
        let side_by_side = name("side_by_side");
        self.node("Transpose", &[&attended], &side_by_side, perm(&[0, 2, 1, 3]));
        self.node("Reshape", &[&side_by_side, &together], output, vec![]);
    }
}
