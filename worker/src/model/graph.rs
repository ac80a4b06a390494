//! A network as the list of its layers' operations, noted while the layers run once: what exporters read instead of a
//! second description of every network.
//!
//! Values are told apart by their storage. While a `Trace` listens, each recorded output is replaced by zeros of the
//! same shape in one element of storage of its own, so a trace needs no memory and no two values share an address. An
//! operation that no layer records leads to a tensor that nobody knows, and the trace ends there with a message.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::{layers::ConvShape, state::StateEntry};

/// What one layer computes in evaluation. Tensors share their storage with the network's state.
#[derive(Debug)]
pub enum Op {
    /// Convolution of \[N, C, H, W\].
    Conv {
        /// \[output, input / groups, kernel, kernel\]
        weight: Tensor,
        /// \[output\]
        bias: Option<Tensor>,
        /// Strides, padding, groups.
        shape: ConvShape,
    },
    /// Fully connected layer over the last dimension.
    Linear {
        /// \[output, input\]
        weight: Tensor,
        /// \[output\]
        bias: Option<Tensor>,
    },
    /// (x - mean) / sqrt(variance + eps) * weight + bias over dimension 1.
    BatchNorm {
        /// \[C\]
        weight: Tensor,
        /// \[C\]
        bias: Tensor,
        /// \[C\]
        mean: Tensor,
        /// \[C\]
        variance: Tensor,
        /// Added to the variance.
        eps: f64,
    },
    /// max(x, 0) + weight * min(x, 0), one weight a channel.
    PRelu {
        /// \[C\]
        weight: Tensor,
    },
    /// Layer normalisation over the last dimension.
    LayerNorm {
        /// \[F\]
        weight: Tensor,
        /// \[F\]
        bias: Tensor,
        /// Added to the variance.
        eps: f64,
    },
    /// Sum of two values of one shape.
    Add,
    /// Sum with a parameter that is the same for every sample.
    AddParameter {
        /// \[1, ..\]
        parameter: Tensor,
    },
    /// min(max(x, 0), 6)
    Relu6,
    /// \[N, ..\] to \[N, F\].
    Flatten,
    /// Pixels as tokens: \[N, C, H, W\] to \[N, H * W, C\].
    Tokens,
    /// Queries, keys and values of all heads, \[N, L, 3 * F\], to softmax(queries keys' / sqrt(F / heads)) values,
    /// \[N, L, F\].
    Attention {
        /// Heads that share the features evenly.
        heads: i64,
    },
}

impl Op {
    /// The tensors of the state that it reads.
    pub fn parameters(&self) -> Vec<&Tensor> {
        match self {
            Op::Conv { weight, bias, .. } | Op::Linear { weight, bias } => {
                std::iter::once(weight).chain(bias).collect()
            }
            Op::BatchNorm {
                weight,
                bias,
                mean,
                variance,
                ..
            } => vec![weight, bias, mean, variance],
            Op::LayerNorm { weight, bias, .. } => vec![weight, bias],
            Op::PRelu { weight } => vec![weight],
            Op::AddParameter { parameter } => vec![parameter],
            Op::Add | Op::Relu6 | Op::Flatten | Op::Tokens | Op::Attention { .. } => Vec::new(),
        }
    }

    /// The operation's name in messages.
    fn name(&self) -> &'static str {
        match self {
            Op::Conv { .. } => "convolution",
            Op::Linear { .. } => "linear layer",
            Op::BatchNorm { .. } => "batch norm",
            Op::PRelu { .. } => "PReLU",
            Op::LayerNorm { .. } => "layer norm",
            Op::Add | Op::AddParameter { .. } => "sum",
            Op::Relu6 => "ReLU6",
            Op::Flatten => "flattening",
            Op::Tokens => "cut into tokens",
            Op::Attention { .. } => "attention",
        }
    }
}

/// Index of a value in [`Graph::shapes`].
pub type ValueId = usize;

/// The value that stands for the images.
pub const IMAGES: ValueId = 0;

/// One operation with what it reads and what it makes.
#[derive(Debug)]
pub struct Node {
    /// What it computes.
    pub op: Op,
    /// What it reads.
    pub inputs: Vec<ValueId>,
    /// What it makes; no other node makes it.
    pub output: ValueId,
    /// What convolutions and linear layers compute in here.
    pub kind: Kind,
}

/// A network in evaluation: operations in an order in which each reads only what came before.
#[derive(Debug)]
pub struct Graph {
    /// Shape of every value for a batch of one; [`IMAGES`] first.
    pub shapes: Vec<Vec<i64>>,
    /// Operations.
    pub nodes: Vec<Node>,
    /// The embedding.
    pub output: ValueId,
    /// State names by storage.
    names: HashMap<usize, String>,
}

impl Graph {
    /// The state's name of a tensor that an [`Op`] holds, for example `layer1.0.conv1.weight`.
    ///
    /// # Panics
    /// If the tensor is not part of the state.
    pub fn name(&self, parameter: &Tensor) -> &str {
        self.names
            .get(&address(parameter))
            .expect("layers keep only tensors that they registered")
    }
}

/// Listens to one pass and builds the graph.
pub(super) struct Trace {
    device: Device,
    shapes: Vec<Vec<i64>>,
    nodes: Vec<Node>,
    values: HashMap<usize, ValueId>,
    /// Keeps the addresses in `values` from being given to other tensors.
    storage: Vec<Tensor>,
}

impl Trace {
    /// A trace of a pass over images of shape `images` on a network's device, and what to run the network on.
    pub(super) fn new(images: &[i64], device: Device) -> (Self, Tensor) {
        let mut trace = Self {
            device,
            shapes: Vec::new(),
            nodes: Vec::new(),
            values: HashMap::new(),
            storage: Vec::new(),
        };
        let (_, images) = trace.value(images);
        (trace, images)
    }

    /// Notes that `op` made `output` of `inputs` in a pass that computes in `kind`, and returns what stands for it.
    ///
    /// # Panics
    /// If an input was made by something that is not recorded.
    pub(super) fn record(&mut self, inputs: &[&Tensor], output: &Tensor, op: Op, kind: Kind) -> Tensor {
        let inputs = inputs.iter().map(|input| self.find(input, op.name())).collect();
        let (output, placeholder) = self.value(&output.size());
        self.nodes.push(Node {
            op,
            inputs,
            output,
            kind,
        });
        placeholder
    }

    /// Operations so far.
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// By storage of a parameter, the operation that reads it.
    pub(super) fn readers(&self) -> HashMap<usize, usize> {
        let nodes = self.nodes.iter().enumerate();
        nodes
            .flat_map(|(number, node)| {
                let parameters = node.op.parameters().into_iter();
                parameters.map(move |parameter| (address(parameter), number))
            })
            .collect()
    }

    /// The graph that ends in `output`.
    pub(super) fn finish(self, output: &Tensor, state: &[StateEntry]) -> Graph {
        let output = self.find(output, "network's output");
        let names = state
            .iter()
            .map(|entry| (address(&entry.tensor), entry.name.clone()))
            .collect();
        Graph {
            shapes: self.shapes,
            nodes: self.nodes,
            output,
            names,
        }
    }

    fn value(&mut self, shape: &[i64]) -> (ValueId, Tensor) {
        let cell = Tensor::zeros([1], (Kind::Float, self.device));
        let value = self.shapes.len();
        self.shapes.push(shape.to_vec());
        self.values.insert(address(&cell), value);
        let placeholder = cell.expand(shape, false);
        self.storage.push(cell);
        (value, placeholder)
    }

    fn find(&self, tensor: &Tensor, reader: &str) -> ValueId {
        let known = self.values.get(&address(tensor));
        match known {
            // A view has its source's address and, if it changes anything, another shape.
            Some(&value) if self.shapes[value] == tensor.size() => value,
            _ => panic!(
                "after {} operations: the {reader} reads a tensor of shape {:?} that no layer recorded",
                self.nodes.len(),
                tensor.size()
            ),
        }
    }
}

/// What tells storages apart.
pub(super) fn address(tensor: &Tensor) -> usize {
    tensor.data_ptr() as usize
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::model::{Backbone, BackboneConfig, registry::REGISTRY};

    #[test]
    fn every_network_leaves_a_graph_in_which_values_are_made_before_they_are_read() {
        for network in REGISTRY {
            let backbone = Backbone::outline(&BackboneConfig::new(network.name, 16)).unwrap();
            let graph = backbone.graph();
            let mut made = vec![false; graph.shapes.len()];
            made[IMAGES] = true;
            for node in &graph.nodes {
                assert!(
                    node.inputs.iter().all(|&input| made[input]),
                    "{}: {node:?}",
                    network.name
                );
                assert!(!made[node.output], "{}: {node:?}", network.name);
                made[node.output] = true;
            }
            assert!(made.iter().all(|&made| made), "{}", network.name);
            assert_eq!(graph.shapes[graph.output], [1, 16], "{}", network.name);
        }
    }

    #[test]
    fn every_parameter_of_every_network_is_in_its_graph() {
        for network in REGISTRY {
            let backbone = Backbone::outline(&BackboneConfig::new(network.name, 16)).unwrap();
            let graph = backbone.graph();
            let used: HashSet<&str> = graph
                .nodes
                .iter()
                .flat_map(|node| node.op.parameters())
                .map(|parameter| graph.name(parameter))
                .collect();
            // What training alone reads.
            let unused = ["num_batches_tracked", "mask_token"];
            for entry in backbone.state() {
                let expected = !unused.iter().any(|leaf| entry.name.ends_with(leaf));
                assert_eq!(
                    used.contains(entry.name.as_str()),
                    expected,
                    "{}: {}",
                    network.name,
                    entry.name
                );
            }
        }
    }

    #[test]
    fn operations_know_their_layers_names() {
        let backbone = Backbone::new(&BackboneConfig::new("tiny", 16)).unwrap();
        let graph = backbone.graph();
        let convolutions: Vec<&str> = graph
            .nodes
            .iter()
            .filter_map(|node| match &node.op {
                Op::Conv { weight, .. } => Some(graph.name(weight)),
                _ => None,
            })
            .collect();
        assert_eq!(convolutions.len(), 13, "a stem, and three in each of four stages");
        assert_eq!(convolutions[0], "conv1.weight");
        assert_eq!(convolutions[3], "layer1.0.downsample.0.weight");
    }

    #[test]
    #[should_panic(expected = "the sum reads a tensor of shape [1, 3] that no layer recorded")]
    fn an_operation_that_is_not_recorded_is_noticed() {
        let (mut trace, images) = Trace::new(&[1, 3], Device::Cpu);
        let doubled = &images * 2.0;
        let _sum = trace.record(&[&images, &doubled], &images, Op::Add, Kind::Float);
    }
}
