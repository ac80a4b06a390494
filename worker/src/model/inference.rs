//! A network that only embeds: the list of its operations ([`graph`](super::graph)) with batch norms folded away where that is
//! exact ([`fold`](super::fold)), and with its weights in the kind and the layout that they are multiplied in. What training
//! needs does not exist here: no batch statistics, no masks, no way back.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::{
    backbone::{channels_last, num_images},
    fold::{self, Affine},
    graph::{Graph, IMAGES, Op, ValueId},
    native::{self, Packed},
    transformer::attend,
};

/// A network as its weights were when it was made. It shares with the one it was made of what it takes as it is: while it is in use,
/// that one's weights stay.
pub struct Inference {
    steps: Vec<Step>,
    values: usize,
    output: ValueId,
    embedding_size: i64,
    device: Device,
}

struct Step {
    layer: Layer,
    inputs: Vec<ValueId>,
    output: ValueId,
    /// What nobody reads after it.
    last_read: Vec<ValueId>,
}

enum Layer {
    /// A convolution on a CPU whose weights were laid out for it.
    Packed {
        weight: Packed,
        bias: Option<Tensor>,
        kind: Kind,
    },
    /// Everything else. Weights and biases of convolutions and linear layers are in `kind`.
    Other { op: Op, kind: Kind },
}

impl Inference {
    /// From the operations of a network that is on `device`.
    pub(super) fn new(graph: Graph, embedding_size: i64, device: Device) -> Self {
        let _no_grad = tch::no_grad_guard();
        let mut folded: HashMap<ValueId, (Option<Affine>, ValueId)> = fold::folded(&graph)
            .into_iter()
            .map(|step| (step.node.output, (step.then, step.output)))
            .collect();
        let Graph {
            shapes,
            nodes,
            output,
            ..
        } = graph;
        let mut steps: Vec<Step> = nodes
            .into_iter()
            .filter_map(|node| {
                // A batch norm that became part of another step has none of its own.
                let (then, output) = folded.remove(&node.output)?;
                Some(Step {
                    layer: Layer::new(node.op, node.kind, then.as_ref(), &shapes[node.inputs[0]]),
                    inputs: node.inputs,
                    output,
                    last_read: Vec::new(),
                })
            })
            .collect();
        let mut is_read = vec![false; shapes.len()];
        is_read[output] = true;
        for step in steps.iter_mut().rev() {
            for &input in &step.inputs {
                if !std::mem::replace(&mut is_read[input], true) {
                    step.last_read.push(input);
                }
            }
        }
        Self {
            steps,
            values: shapes.len(),
            output,
            embedding_size,
            device,
        }
    }

    /// Length of an embedding, D.
    pub fn embedding_size(&self) -> i64 {
        self.embedding_size
    }

    /// Embeddings \[N, D\] f32 on the CPU of normalised RGB images \[N, 3, 112, 112\] f32, which may lie anywhere.
    ///
    /// # Panics
    /// If the images have another shape.
    pub fn embed(&self, images: &Tensor) -> Tensor {
        self.forward(&images.to_device(self.device))
            .to_device(Device::Cpu)
    }

    /// The same where the network is.
    ///
    /// # Panics
    /// If the images have another shape.
    pub fn forward(&self, images: &Tensor) -> Tensor {
        if num_images(images) == 0 {
            return Tensor::zeros([0, self.embedding_size], (Kind::Float, images.device()));
        }
        let _no_grad = tch::no_grad_guard();
        let mut values: Vec<Option<Tensor>> = (0..self.values).map(|_| None).collect();
        values[IMAGES] = Some(channels_last(images));
        for step in &self.steps {
            let input = |place: usize| {
                let value = values[step.inputs[place]].as_ref();
                value.expect("a graph makes values before they are read")
            };
            let made = match &step.layer {
                Layer::Packed { weight, bias, kind } => {
                    weight.forward(&input(0).to_kind(*kind), bias.as_ref())
                }
                Layer::Other { op: Op::Add, .. } => input(0) + input(1),
                Layer::Other { op, kind } => compute(op, *kind, input(0)),
            };
            values[step.output] = Some(made);
            for &value in &step.last_read {
                values[value] = None;
            }
        }
        let embeddings = values[self.output].take();
        embeddings
            .expect("a graph ends in its output")
            .to_kind(Kind::Float)
    }
}

impl Layer {
    /// Of an operation that computes in `kind`, a batch norm that became part of it, and its input's shape.
    fn new(op: Op, kind: Kind, then: Option<&Affine>, input: &[i64]) -> Self {
        let op = match op {
            Op::Conv { weight, bias, shape } => {
                let weight = fold::rows(&weight, then)().detach();
                let bias = fold::bias(bias.as_ref(), then);
                let weight = match weight.device() {
                    Device::Cpu => weight.to_kind(kind),
                    _ => native::channels_last(&weight, kind),
                };
                if let Some(weight) = Packed::new(&weight, shape, input) {
                    return Self::Packed { weight, bias, kind };
                }
                Op::Conv {
                    weight,
                    bias: bias.map(|bias| bias.to_kind(kind)),
                    shape,
                }
            }
            Op::Linear { weight, bias } => Op::Linear {
                weight: fold::rows(&weight, then)().detach().to_kind(kind),
                bias: fold::bias(bias.as_ref(), then).map(|bias| bias.to_kind(kind)),
            },
            other => other,
        };
        Self::Other { op, kind }
    }
}

/// An operation with one input.
fn compute(op: &Op, kind: Kind, x: &Tensor) -> Tensor {
    match op {
        Op::Conv { weight, bias, shape } => x.to_kind(kind).conv2d(
            weight,
            bias.as_ref(),
            [shape.stride; 2],
            [shape.padding; 2],
            [1, 1],
            shape.groups,
        ),
        Op::Linear { weight, bias } => x.to_kind(kind).linear(weight, bias.as_ref()),
        Op::BatchNorm {
            weight,
            bias,
            mean,
            variance,
            eps,
        } => x.batch_norm(
            Some(weight),
            Some(bias),
            Some(mean),
            Some(variance),
            false,
            0.0,
            *eps,
            true,
        ),
        Op::PRelu { weight } => x.prelu(&weight.to_kind(x.kind())),
        Op::LayerNorm { weight, bias, eps } => {
            x.to_kind(Kind::Float)
                .layer_norm(weight.size(), Some(weight), Some(bias), *eps, true)
        }
        Op::AddParameter { parameter } => x + parameter,
        Op::Relu6 => x.relu6(),
        Op::Flatten => x.flatten(1, -1),
        Op::Tokens => x.flatten(2, -1).transpose(1, 2),
        Op::Attention { heads } => attend(&x.to_kind(Kind::Float), *heads),
        Op::Add => unreachable!("a sum has two inputs"),
    }
}

#[cfg(test)]
mod tests;
