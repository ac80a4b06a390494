//! What a training pass keeps in memory, counted operation by operation while the layers run once on placeholders of one
//! image: the numbers of `arcface_proto::memory::networks`, which the planner reads instead of a network.
//!
//! Autograd keeps what an operation's derivative reads: the input of convolutions, linear layers, batch norms and rectifiers,
//! and reduced-precision copies of weights. On the way back gradients of values come and go beside what is still kept;
//! gradients of parameters exist between steps too and are not counted here, but the new ones that are added to them are.
//!
//! What is not counted: workspaces of libraries, and the temporaries of the forward pass, which are there before all is kept.

use std::collections::HashMap;

use arcface_proto::{
    memory::networks::{BATCHES, Network as Sizes, Pass as Numbers, PerDim, PerImage},
    spec::Precision,
};
use tch::{Device, Kind, Tensor};

use super::{
    backbone::{Backbone, BackboneConfig, ModelError},
    graph::Op,
    norm::Place,
    registry::Registered,
    state::Role,
};

/// Index of a value; views share their source's.
type ValueId = usize;

/// The images: no gradient.
const IMAGES: ValueId = 0;

struct Value {
    bytes: u64,
    kind: Kind,
    /// Some recorded operation made it.
    made: bool,
}

/// What an operation's derivative reads.
#[derive(Clone, Copy)]
enum Saved {
    Value(ValueId),
    /// A copy that nobody else has, in bytes.
    Own(u64),
}

struct Node {
    inputs: Vec<ValueId>,
    output: ValueId,
    saved: Vec<Saved>,
    /// Kept whatever the batch: copies of weights, statistics.
    fixed: u64,
    /// Hands its output's gradient on to its inputs as it is.
    passes_on: bool,
    /// Who else gets it as it is.
    shortcut: Option<ValueId>,
    /// Bytes an image beside the gradients, while it is differentiated.
    transient: u64,
    /// New gradients of its parameters, with their copies.
    parameters: u64,
}

impl Node {
    fn new(inputs: Vec<ValueId>, output: ValueId) -> Self {
        Self {
            inputs,
            output,
            saved: Vec::new(),
            fixed: 0,
            passes_on: false,
            shortcut: None,
            transient: 0,
            parameters: 0,
        }
    }
}

/// Listens to one training pass.
pub(super) struct Walk {
    values: Vec<Value>,
    nodes: Vec<Node>,
    /// By address.
    known: HashMap<usize, ValueId>,
    /// Keeps addresses from being given to other tensors.
    storage: Vec<Tensor>,
    /// Where the trunk's pieces begin and end: nodes before, and the value there. The first is the end of the stem.
    borders: Vec<(usize, ValueId)>,
    fuses: Option<Place>,
}

impl Walk {
    /// A walk over images of shape `images`, and what to run the network on. Batch norms are one with what follows them as in this
    /// place, or all operations are libtorch's.
    pub(super) fn new(images: &[i64], fuses: Option<Place>) -> (Self, Tensor) {
        let mut walk = Self {
            fuses,
            values: Vec::new(),
            nodes: Vec::new(),
            known: HashMap::new(),
            storage: Vec::new(),
            borders: Vec::new(),
        };
        let id = walk.value(images, Kind::Float, false);
        let images = walk.placeholder(id, images, Kind::Float);
        (walk, images)
    }

    /// Whose batch norms are one with what follows them.
    pub(super) fn fuses(&self) -> Option<Place> {
        self.fuses
    }

    /// Notes that `op`, which computes in `kind`, made `output` of `inputs`; gives what stands for it.
    pub(super) fn record(&mut self, inputs: &[&Tensor], output: &Tensor, op: &Op, kind: Kind) -> Tensor {
        let values: Vec<ValueId> = inputs.iter().map(|input| self.find(input)).collect();
        let (size, output_kind) = (output.size(), output.kind());
        if is_view(op, &inputs[0].size()) {
            return self.placeholder(values[0], &size, output_kind);
        }
        let made = self.value(&size, output_kind, true);
        let node = self.node(values, made, &size, op, kind);
        self.nodes.push(node);
        self.placeholder(made, &size, output_kind)
    }

    /// Notes a batch norm that is one with what follows it, of which nothing is kept.
    pub(super) fn record_norm(&mut self, x: &Tensor, channels: u64, shortcut: Option<&Tensor>) -> Tensor {
        let input = self.find(x);
        let shortcut = shortcut.map(|shortcut| self.find(shortcut));
        let (size, kind) = (x.size(), x.kind());
        let output = self.value(&size, kind, true);
        self.nodes.push(Node {
            saved: vec![Saved::Value(input)],
            fixed: 8 * channels,
            shortcut,
            ..Node::new(vec![input], output)
        });
        self.placeholder(output, &size, kind)
    }

    /// Notes a choice of tokens, which no exporter sees. Its derivative holds what it chose from, for the size.
    pub(super) fn record_gather(&mut self, input: &Tensor, output: &Tensor) -> Tensor {
        let input = self.find(input);
        let (size, kind) = (output.size(), output.kind());
        let output = self.value(&size, kind, true);
        self.nodes.push(Node {
            saved: vec![Saved::Value(input)],
            ..Node::new(vec![input], output)
        });
        self.placeholder(output, &size, kind)
    }

    /// Notes that a part of the network ends in `x`.
    pub(super) fn border(&mut self, x: &Tensor) {
        let value = self.find(x);
        self.borders.push((self.nodes.len(), value));
    }

    fn node(&self, inputs: Vec<ValueId>, output: ValueId, size: &[i64], op: &Op, kind: Kind) -> Node {
        let input = inputs[0];
        // As the derivative reads it: the value itself, or its copy in another kind.
        let read_in = |kind: Kind| match self.values[input].kind == kind {
            true => Saved::Value(input),
            false => Saved::Own(self.elements(input) * bytes_of(kind)),
        };
        let mut node = Node::new(inputs, output);
        match op {
            Op::Conv { weight, .. } | Op::Linear { weight, .. } => {
                let kind = match op {
                    Op::Conv { shape, .. } if self.fuses != Some(Place::Gpu) => shape.kind_on_cpu(kind),
                    _ => kind,
                };
                let weight = weight.numel() as u64;
                node.saved = vec![read_in(kind)];
                node.parameters = weight * 4;
                if kind != Kind::Float {
                    node.fixed = weight * bytes_of(kind);
                    node.parameters += weight * bytes_of(kind);
                }
                if let Saved::Own(copy) = node.saved[0] {
                    node.transient = copy;
                }
            }
            Op::BatchNorm { weight, .. } => {
                node.saved = vec![Saved::Value(input)];
                node.fixed = 8 * weight.numel() as u64;
            }
            Op::LayerNorm { weight, .. } => {
                // Mean and 1 / deviation of every token.
                let rows = self.elements(input) / weight.numel() as u64;
                node.saved = vec![read_in(Kind::Float), Saved::Own(8 * rows)];
            }
            Op::PRelu { .. } | Op::Relu6 => node.saved = vec![Saved::Value(input)],
            Op::Attention { heads } => {
                // Queries, keys and values, the result, and a logarithm a head and token.
                let logarithms = 4 * (heads * size[1]) as u64;
                node.saved = vec![read_in(Kind::Float), Saved::Value(output), Saved::Own(logarithms)];
                // The three gradients apart, and as parts of two gradients of all three.
                node.transient = 2 * 4 * self.elements(input);
            }
            Op::Add | Op::AddParameter { .. } => node.passes_on = true,
            Op::Flatten | Op::Tokens => {}
        }
        node
    }

    fn elements(&self, value: ValueId) -> u64 {
        self.values[value].bytes / bytes_of(self.values[value].kind)
    }

    fn value(&mut self, size: &[i64], kind: Kind, made: bool) -> ValueId {
        let elements: i64 = size.iter().product();
        self.values.push(Value {
            bytes: elements as u64 * bytes_of(kind),
            kind,
            made,
        });
        self.values.len() - 1
    }

    fn placeholder(&mut self, value: ValueId, size: &[i64], kind: Kind) -> Tensor {
        let cell = Tensor::zeros([1], (kind, Device::Cpu));
        self.known.insert(address(&cell), value);
        let placeholder = cell.expand(size, false);
        self.storage.push(cell);
        placeholder
    }

    /// The value of a tensor; a new one for what an operation made that nobody records (casts, random masks).
    fn find(&mut self, tensor: &Tensor) -> ValueId {
        if let Some(&value) = self.known.get(&address(tensor)) {
            return value;
        }
        let value = self.value(&tensor.size(), tensor.kind(), false);
        self.known.insert(address(tensor), value);
        self.storage.push(tensor.shallow_clone());
        value
    }

    /// What it comes to, with everything kept or with the trunk's pieces run twice.
    fn numbers(&self, recomputes: bool) -> Numbers {
        let mut back = Back::new(self);
        let trunk = self.borders[0].0..self.borders[self.borders.len() - 1].0;
        let kept_range = |node: &usize| !recomputes || !trunk.contains(node);
        for node in (0..self.nodes.len()).filter(kept_range) {
            back.save(node);
        }
        if recomputes {
            for (_, input) in &self.borders {
                back.hold(*input);
            }
        }
        let kept = PerImage {
            per_image: back.per_image,
            fixed: back.fixed,
        };
        if !recomputes {
            back.differentiate(0..self.nodes.len());
        } else {
            back.differentiate(trunk.end..self.nodes.len());
            for piece in self.borders.windows(2).rev() {
                let [(first, _), (end, output)] = piece else {
                    continue;
                };
                // Its output again, and the gradient of it that the caller holds.
                let again = 2 * self.values[*output].bytes;
                back.release(*output);
                back.per_image += again;
                (*first..*end).for_each(|node| back.save(node));
                back.note(self.values[*output].bytes, 0);
                back.differentiate(*first..*end);
                back.per_image -= again;
            }
            back.differentiate(0..trunk.start);
        }
        let largest = |images: u64| {
            let moments = back.moments.iter().copied();
            moments.max_by_key(|moment| moment.bytes(images)).unwrap_or(kept)
        };
        Numbers {
            kept,
            backward: BATCHES.map(largest),
        }
    }
}

/// The way back: what is alive while operations are differentiated, last to first.
struct Back<'a> {
    walk: &'a Walk,
    /// Who still needs a value.
    holders: HashMap<ValueId, u32>,
    per_image: u64,
    fixed: u64,
    /// Gradients of values: which storage.
    gradients: HashMap<ValueId, usize>,
    /// Those of values that no recorded operation made; they go on to the operation before.
    passing: Vec<usize>,
    /// Bytes and owners of gradients.
    storages: Vec<(u64, u32)>,
    moments: Vec<PerImage>,
}

impl<'a> Back<'a> {
    fn new(walk: &'a Walk) -> Self {
        Self {
            walk,
            holders: HashMap::new(),
            per_image: 0,
            fixed: 0,
            gradients: HashMap::new(),
            passing: Vec::new(),
            storages: Vec::new(),
            moments: Vec::new(),
        }
    }

    fn hold(&mut self, value: ValueId) {
        let holders = self.holders.entry(value).or_default();
        if *holders == 0 {
            self.per_image += self.walk.values[value].bytes;
        }
        *holders += 1;
    }

    fn release(&mut self, value: ValueId) {
        let holders = self.holders.entry(value).or_default();
        *holders = holders.saturating_sub(1);
        if *holders == 0 {
            self.per_image -= self.walk.values[value].bytes;
        }
    }

    fn save(&mut self, node: usize) {
        let node = &self.walk.nodes[node];
        self.fixed += node.fixed;
        for saved in &node.saved {
            match saved {
                Saved::Value(value) => self.hold(*value),
                Saved::Own(bytes) => self.per_image += bytes,
            }
        }
    }

    fn forget(&mut self, node: usize) {
        let node = &self.walk.nodes[node];
        self.fixed -= node.fixed;
        for saved in &node.saved {
            match saved {
                Saved::Value(value) => self.release(*value),
                Saved::Own(bytes) => self.per_image -= bytes,
            }
        }
    }

    fn note(&mut self, per_image: u64, fixed: u64) {
        self.moments.push(PerImage {
            per_image: self.per_image + per_image,
            fixed: self.fixed + fixed,
        });
    }

    fn storage(&mut self, bytes: u64) -> usize {
        self.per_image += bytes;
        self.storages.push((bytes, 1));
        self.storages.len() - 1
    }

    fn drop_storage(&mut self, storage: usize) {
        let (bytes, owners) = &mut self.storages[storage];
        *owners -= 1;
        if *owners == 0 {
            self.per_image -= *bytes;
        }
    }

    fn differentiate(&mut self, nodes: std::ops::Range<usize>) {
        for index in nodes.rev() {
            let walk = self.walk;
            let node = &walk.nodes[index];
            let bytes = walk.values[node.output].bytes;
            let gradient = match self.gradients.remove(&node.output).or_else(|| self.passing.pop()) {
                // Through what nobody recorded, into the form that this operation made.
                Some(other) if self.storages[other].0 != bytes => {
                    let own = self.storage(bytes);
                    self.note(0, 0);
                    self.drop_storage(other);
                    own
                }
                Some(own) => own,
                None => self.storage(bytes),
            };
            if node.passes_on {
                for input in &node.inputs {
                    self.storages[gradient].1 += 1;
                    self.give(*input, gradient);
                }
                self.forget(index);
                self.drop_storage(gradient);
                continue;
            }
            let input = node.inputs[0];
            let new = (input != IMAGES).then(|| self.storage(walk.values[input].bytes));
            self.note(node.transient, node.parameters);
            self.forget(index);
            if let Some(shortcut) = node.shortcut {
                self.storages[gradient].1 += 1;
                self.give(shortcut, gradient);
            }
            self.drop_storage(gradient);
            if let Some(new) = new {
                self.give(input, new);
            }
        }
    }

    /// Adds a gradient to a value's.
    fn give(&mut self, value: ValueId, gradient: usize) {
        if !self.walk.values[value].made {
            match value == IMAGES {
                true => self.drop_storage(gradient),
                false => self.passing.push(gradient),
            }
            return;
        }
        let Some(there) = self.gradients.insert(value, gradient) else {
            return;
        };
        // In place where the first is nobody else's.
        if self.storages[there].1 == 1 {
            self.note(0, 0);
            self.drop_storage(gradient);
            self.gradients.insert(value, there);
            return;
        }
        let sum = self.storage(self.walk.values[value].bytes);
        self.note(0, 0);
        self.drop_storage(there);
        self.drop_storage(gradient);
        self.gradients.insert(value, sum);
    }
}

/// True if the result shares the memory of its input, which has this size: tokens are another look at a feature map, and
/// flattening is one unless the channels lie innermost and there is more than one pixel.
fn is_view(op: &Op, input: &[i64]) -> bool {
    match op {
        Op::Tokens => true,
        Op::Flatten => !matches!(input[..], [_, _, height, width] if height * width > 1),
        _ => false,
    }
}

fn bytes_of(kind: Kind) -> u64 {
    kind.elt_size_in_bytes() as u64
}

fn address(tensor: &Tensor) -> usize {
    tensor.data_ptr() as usize
}

/// The sizes of a network, from its layers.
///
/// # Errors
/// If it cannot be built.
pub fn sizes(network: &'static Registered) -> Result<Sizes, ModelError> {
    let outline = |size| Backbone::outline(&BackboneConfig::new(network.name, size));
    let (short, long) = (outline(256)?, outline(512)?);
    // Linear in the embedding's length.
    let by_length = |count: &dyn Fn(&Backbone) -> u64| {
        let (at_256, at_512) = (count(&short), count(&long));
        let per_dim = (at_512 - at_256) / 256;
        PerDim {
            base: at_256 - 256 * per_dim,
            per_dim,
        }
    };
    let elements = |backbone: &Backbone, role: Role| -> u64 {
        let entries = backbone.state().iter().filter(|entry| entry.role == role);
        entries.map(|entry| entry.tensor.numel() as u64).sum()
    };
    let buffer_bytes = |backbone: &Backbone| -> u64 {
        let buffers = backbone.state().iter().filter(|entry| entry.role == Role::Buffer);
        buffers
            .map(|entry| entry.tensor.numel() as u64 * bytes_of(entry.tensor.kind()))
            .sum()
    };
    let fixed_largest = |backbone: &Backbone, other: &Backbone| -> u64 {
        let pairs = backbone.state().iter().zip(other.state());
        let same = pairs.filter(|(a, b)| a.role == Role::Trainable && a.tensor.size() == b.tensor.size());
        same.map(|(entry, _)| entry.tensor.numel() as u64)
            .max()
            .unwrap_or(0)
    };
    let growing = |backbone: &Backbone| -> u64 {
        let trainable = backbone.trainable();
        let grows = trainable.iter().zip(short.trainable());
        let grows = grows.filter(|((_, a), (_, b))| a.size() != b.size());
        // All of the same embedding's length: the largest at 512 is the largest everywhere.
        grows
            .map(|((_, tensor), _)| tensor.numel() as u64)
            .max()
            .unwrap_or(0)
    };
    let numbers = |precision, place| {
        let walk = long.walk(precision, place);
        [walk.numbers(false), walk.numbers(true)]
    };
    Ok(Sizes {
        name: network.name,
        trainable: by_length(&|backbone| elements(backbone, Role::Trainable)),
        frozen: by_length(&|backbone| elements(backbone, Role::Frozen)),
        buffer_bytes: by_length(&|backbone| buffer_bytes(backbone)),
        largest: PerDim {
            base: fixed_largest(&long, &short),
            per_dim: growing(&long) / 512,
        },
        fp32: numbers(Precision::Fp32, None),
        half: numbers(Precision::Bf16, None),
        fused_fp32: numbers(Precision::Fp32, Some(Place::Cpu)),
        cpu_bf16: numbers(Precision::Bf16, Some(Place::Cpu)),
        gpu_bf16: numbers(Precision::Bf16, Some(Place::Gpu)),
    })
}

#[cfg(test)]
mod tests;
