//! Batch norms that disappear into the layer before them: for networks that only embed, and for exporters. Pure: a graph in, a list of steps out.
//!
//! A batch norm in evaluation is a factor and a summand a channel. Directly behind a convolution or a linear layer
//! these are a factor of that layer's rows and its bias. A batch norm *before* a padded convolution (the first of
//! IResNet's blocks) stays: its summand does not reach the zeros of the padding, so no bias equals it at the border.

use tch::{Kind, Tensor};

use super::graph::{Graph, Node, Op, ValueId};

/// x * scale + shift over dimension 1, in f64: products of weights are rounded to f32 once.
#[derive(Debug)]
pub struct Affine {
    /// \[C\]
    pub scale: Tensor,
    /// \[C\]
    pub shift: Tensor,
}

/// A node of the graph, and the batch norm that became part of it.
#[derive(Debug)]
pub struct Step<'a> {
    /// The node.
    pub node: &'a Node,
    /// What is done to its output.
    pub then: Option<Affine>,
    /// Value that it makes: the node's, or the batch norm's.
    pub output: ValueId,
}

/// Every node as a step of its own.
pub fn separate(graph: &Graph) -> Vec<Step<'_>> {
    let step = |node| Step {
        node,
        then: None,
        output: node.output,
    };
    graph.nodes.iter().map(step).collect()
}

/// The same with batch norms folded where that is exact.
pub fn folded(graph: &Graph) -> Vec<Step<'_>> {
    let mut readers = vec![0usize; graph.shapes.len()];
    readers[graph.output] += 1;
    for &input in graph.nodes.iter().flat_map(|node| &node.inputs) {
        readers[input] += 1;
    }
    // The step that makes each value.
    let mut makers: Vec<Option<usize>> = vec![None; graph.shapes.len()];
    let mut steps: Vec<Step> = Vec::with_capacity(graph.nodes.len());
    for step in separate(graph) {
        let norm = affine(&step.node.op).and_then(|affine| {
            let input = step.node.inputs[0];
            let maker = makers[input].filter(|_| readers[input] == 1)?;
            takes_affine(&steps[maker], graph).then_some((maker, affine))
        });
        let maker = match norm {
            Some((maker, affine)) => {
                steps[maker].then = Some(affine);
                steps[maker].output = step.output;
                maker
            }
            None => {
                steps.push(step);
                steps.len() - 1
            }
        };
        makers[steps[maker].output] = Some(maker);
    }
    steps
}

/// A batch norm's effect, if the operation is one.
fn affine(op: &Op) -> Option<Affine> {
    let Op::BatchNorm {
        weight,
        bias,
        mean,
        variance,
        eps,
    } = op
    else {
        return None;
    };
    let wide = |tensor: &Tensor| tensor.detach().to_kind(Kind::Double);
    let scale = wide(weight) / (wide(variance) + *eps).sqrt();
    let shift = wide(bias) - wide(mean) * &scale;
    Some(Affine { scale, shift })
}

/// Whether dimension 1 of the step's output is the rows of its weight, and nothing was folded into it yet.
fn takes_affine(step: &Step, graph: &Graph) -> bool {
    let rows_are_channels = match step.node.op {
        Op::Conv { .. } => true,
        Op::Linear { .. } => graph.shapes[step.node.output].len() == 2,
        _ => false,
    };
    rows_are_channels && step.then.is_none()
}

/// How to compute a layer's weight, each row multiplied by what follows the layer.
pub fn rows(weight: &Tensor, then: Option<&Affine>) -> impl Fn() -> Tensor + 'static {
    let weight = weight.shallow_clone();
    let scale = then.map(|then| {
        let mut shape = vec![1; weight.dim()];
        shape[0] = -1;
        then.scale.view(shape.as_slice())
    });
    move || match &scale {
        None => weight.shallow_clone(),
        Some(scale) => (weight.to_kind(Kind::Double) * scale).to_kind(Kind::Float),
    }
}

/// A layer's bias after what follows the layer, if either is there.
pub fn bias(bias: Option<&Tensor>, then: Option<&Affine>) -> Option<Tensor> {
    let wide = |bias: &Tensor| bias.detach().to_kind(Kind::Double);
    match (bias, then) {
        (None, None) => None,
        (Some(bias), None) => Some(bias.shallow_clone()),
        (None, Some(then)) => Some(then.shift.to_kind(Kind::Float)),
        (Some(bias), Some(then)) => Some((wide(bias) * &then.scale + &then.shift).to_kind(Kind::Float)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Backbone, BackboneConfig};

    fn norms_left(network: &str) -> (usize, usize) {
        let backbone = Backbone::new(&BackboneConfig::new(network, 16)).unwrap();
        let graph = backbone.graph();
        let count = |steps: Vec<Step>| {
            let norms = steps.iter().filter(|s| matches!(s.node.op, Op::BatchNorm { .. }));
            norms.count()
        };
        (count(separate(&graph)), count(folded(&graph)))
    }

    #[test]
    fn batch_norms_behind_a_layer_are_folded_and_those_before_a_padded_convolution_stay() {
        // Of each of the 4 blocks the first stays; so does the one behind the last sum.
        assert_eq!(norms_left("tiny"), (4 * 4 + 3, 4 + 1));
        assert_eq!(norms_left("mbf").1, 0);
    }

    #[test]
    fn a_value_that_others_read_too_is_not_changed() {
        let backbone = Backbone::new(&BackboneConfig::new("tiny", 16)).unwrap();
        let mut graph = backbone.graph();
        let norms = folded(&graph).len();
        // As if the output of the stem's convolution were the result as well.
        graph.output = graph.nodes[0].output;
        assert_eq!(folded(&graph).len(), norms + 1);
    }
}
