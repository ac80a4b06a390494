//! A backbone as everyone else sees it: a name, a state and a forward pass.

use std::collections::HashSet;

use arcface_proto::spec::{ModelSpec, Precision};
use tch::{Device, Kind, Tensor};

use super::{
    IMAGE_SIZE, fill,
    footprint::Walk,
    graph::{Graph, Trace, address},
    inference::Inference,
    init,
    layers::Network,
    norm::Place,
    pass::{Computing, DropoutDraw, ForwardMode, Pass, Tap},
    registry::{self, REGISTRY, Registered},
    state::{Builder, Role, StateEntry},
    training::TrainingPass,
};
use crate::kernels::Kernels;

/// What to build.
#[derive(Clone, Debug, PartialEq)]
pub struct BackboneConfig {
    /// Name in the registry.
    pub network: String,
    /// Embedding length D.
    pub embedding_size: i64,
    /// Dropout probability before the last linear layer; MobileFaceNets have none.
    pub dropout: f64,
    /// Batch norm uses its running statistics while training too, and its affine parameters do not train.
    pub freeze_batch_norm: bool,
    /// Training passes compute the trunk's activations again on the way back instead of keeping them.
    pub gradient_checkpointing: bool,
}

impl BackboneConfig {
    /// For evaluation: no dropout, batch norm as always, nothing computed twice.
    pub fn new(network: impl Into<String>, embedding_size: i64) -> Self {
        Self {
            network: network.into(),
            embedding_size,
            dropout: 0.0,
            freeze_batch_norm: false,
            gradient_checkpointing: false,
        }
    }
}

impl From<&ModelSpec> for BackboneConfig {
    fn from(spec: &ModelSpec) -> Self {
        Self {
            network: spec.network.clone(),
            embedding_size: i64::from(spec.embedding_size),
            dropout: spec.dropout,
            freeze_batch_norm: spec.freeze_batch_norm,
            gradient_checkpointing: spec.gradient_checkpointing,
        }
    }
}

/// Why a backbone cannot be built or loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The registry has no such name.
    #[error("unknown network {network:?}; known networks: {}", known())]
    UnknownNetwork {
        /// As given.
        network: String,
    },
    /// The embedding size is not in 1..=65536.
    #[error("embedding size {got} is not in 1..=65536")]
    EmbeddingSize {
        /// As given.
        got: i64,
    },
    /// Entries of the network that the source lacks.
    #[error("key {key} of {network} is missing{}", more(*.others))]
    Missing {
        /// The network that was loaded.
        network: String,
        /// The first one.
        key: String,
        /// How many more.
        others: usize,
    },
    /// Entries of the source that the network lacks.
    #[error("key {key} is not one of {network}'s{}", more(*.others))]
    Unexpected {
        /// The network that was loaded.
        network: String,
        /// The first one.
        key: String,
        /// How many more.
        others: usize,
    },
    /// A tensor has another shape.
    #[error("key {key} of {network} has shape {got:?}, expected {expected:?}")]
    Shape {
        /// The network that was loaded.
        network: String,
        /// Its name.
        key: String,
        /// The network's shape.
        expected: Vec<i64>,
        /// The source's shape.
        got: Vec<i64>,
    },
    /// A tensor has another kind of numbers, which says that it is another tensor.
    #[error("key {key} of {network} has kind {got:?}, expected {expected:?}")]
    Kind {
        /// The network that was loaded.
        network: String,
        /// Its name.
        key: String,
        /// The network's kind.
        expected: Kind,
        /// The source's kind.
        got: Kind,
    },
}

fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16)
}

fn known() -> String {
    let names: Vec<&str> = REGISTRY.iter().map(|network| network.name).collect();
    names.join(", ")
}

fn more(others: usize) -> String {
    match others {
        0 => String::new(),
        n => format!(" (and {n} more)"),
    }
}

/// A network with its parameters, on the CPU until it is moved.
pub struct Backbone {
    config: BackboneConfig,
    state: Vec<StateEntry>,
    network: Box<dyn Network>,
    computing: Computing,
}

impl Backbone {
    /// Allocates every tensor as zeros: initialise, fill or load before use.
    pub fn new(config: &BackboneConfig) -> Result<Self, ModelError> {
        Self::build(config, |state| Builder::new(state, config.freeze_batch_norm))
    }

    /// Names and shapes without memory for values: to list, to count and to trace, nothing else. Writing to its tensors
    /// panics.
    pub fn outline(config: &BackboneConfig) -> Result<Self, ModelError> {
        Self::build(config, |state| {
            Builder::new(state, config.freeze_batch_norm).outline()
        })
    }

    fn build(
        config: &BackboneConfig,
        builder: impl FnOnce(&mut Vec<StateEntry>) -> Builder<'_>,
    ) -> Result<Self, ModelError> {
        let registered = Self::registered(&config.network)?;
        if !(1..=65536).contains(&config.embedding_size) {
            return Err(ModelError::EmbeddingSize {
                got: config.embedding_size,
            });
        }
        let mut state = Vec::new();
        let network = (registered.build)(builder(&mut state), config);
        Ok(Self {
            config: config.clone(),
            state,
            network,
            computing: Computing::Usual,
        })
    }

    /// The registry's line for a network's name.
    pub fn registered(network: &str) -> Result<&'static Registered, ModelError> {
        registry::find(network).ok_or_else(|| ModelError::UnknownNetwork {
            network: network.to_owned(),
        })
    }

    /// What it was built from.
    pub fn config(&self) -> &BackboneConfig {
        &self.config
    }

    /// Every tensor in `state_dict` order.
    pub fn state(&self) -> &[StateEntry] {
        &self.state
    }

    /// The parameters that the optimizer updates, in `state_dict` order; their gradients are autograd's (`grad()`).
    pub fn trainable(&self) -> Vec<(&str, &Tensor)> {
        let trainable = self.state.iter().filter(|entry| entry.role == Role::Trainable);
        trainable
            .map(|entry| (entry.name.as_str(), &entry.tensor))
            .collect()
    }

    /// Number of parameter elements, frozen ones included, buffers not.
    pub fn num_parameters(&self) -> usize {
        let parameters = self.state.iter().filter(|entry| entry.role != Role::Buffer);
        parameters.map(|entry| entry.tensor.numel()).sum()
    }

    /// Number of parameter elements that train.
    pub fn num_trainable(&self) -> usize {
        self.trainable().iter().map(|(_, tensor)| tensor.numel()).sum()
    }

    /// Where its tensors are.
    pub fn device(&self) -> Device {
        self.state
            .first()
            .map_or(Device::Cpu, |entry| entry.tensor.device())
    }

    /// Moves every tensor to a device; layers and whoever else has a handle see it there. Gradients are not moved.
    pub fn move_to(&mut self, device: Device) {
        let _no_grad = tch::no_grad_guard();
        for entry in &mut self.state {
            if entry.tensor.device() != device {
                entry.tensor.set_data(&entry.tensor.detach().to_device(device));
            }
        }
    }

    /// Lets kernels of our own compute, while training, what they do better than libtorch. They are of the device that its
    /// tensors are on.
    pub fn compute_with(&mut self, kernels: Option<Kernels>) {
        self.computing = kernels.map_or(Computing::Usual, Computing::Kernels);
    }

    /// Lets libtorch's operations alone compute, in the layout that images come in, as a trainer in Python does: what others are measured
    /// against.
    pub fn compute_plainly(&mut self) {
        self.computing = Computing::Plain;
    }

    /// Images as its layers take them.
    fn laid_out(&self, images: &Tensor) -> Tensor {
        match self.computing {
            Computing::Plain => images.contiguous(),
            Computing::Usual | Computing::Kernels(_) => channels_last(images),
        }
    }

    /// Draws initial weights with the reference's distributions.
    pub fn init_random(&mut self, seed: u64) {
        self.assign(|entry| init::draw(seed, entry));
    }

    /// Sets every tensor by the golden fill rule.
    pub fn fill_golden(&mut self) {
        let names: HashSet<&str> = self.state.iter().map(|entry| entry.name.as_str()).collect();
        self.assign(|entry| {
            let has_bias = names.contains(fill::sibling_bias(&entry.name).as_str());
            fill::value(&entry.name, &entry.tensor, has_bias)
        });
    }

    fn assign(&self, value: impl Fn(&StateEntry) -> Tensor) {
        tch::no_grad(|| {
            for entry in &self.state {
                entry.tensor.shallow_clone().copy_(&value(entry));
            }
        });
    }

    /// Sets every tensor from a source by name. Floating-point numbers of any width are converted, and whole ones, but
    /// not into each other. Nothing changes unless everything fits. Keys of the source that the network lacks are the caller's to check.
    pub fn load_state(&mut self, source: &mut dyn FnMut(&str) -> Option<Tensor>) -> Result<(), ModelError> {
        let network = &self.config.network;
        let mut found = Vec::with_capacity(self.state.len());
        let mut missing = Vec::new();
        for entry in &self.state {
            let Some(tensor) = source(&entry.name) else {
                missing.push(&entry.name);
                continue;
            };
            let expected = entry.tensor.size();
            // Some writers store scalars with shape [1].
            let scalar = expected.is_empty() && tensor.numel() == 1;
            if tensor.size() != expected && !scalar {
                return Err(ModelError::Shape {
                    network: network.clone(),
                    key: entry.name.clone(),
                    expected,
                    got: tensor.size(),
                });
            }
            if is_float(tensor.kind()) != is_float(entry.tensor.kind()) {
                return Err(ModelError::Kind {
                    network: network.clone(),
                    key: entry.name.clone(),
                    expected: entry.tensor.kind(),
                    got: tensor.kind(),
                });
            }
            found.push(tensor.reshape(expected.as_slice()));
        }
        if let Some(&key) = missing.first() {
            return Err(ModelError::Missing {
                network: network.clone(),
                key: key.clone(),
                others: missing.len() - 1,
            });
        }
        tch::no_grad(|| {
            for (entry, tensor) in self.state.iter().zip(&found) {
                entry.tensor.shallow_clone().copy_(tensor);
            }
        });
        Ok(())
    }

    /// Embeddings \[N, D\] f32 of normalised RGB images \[N, 3, 112, 112\] f32. An empty batch gives an empty result
    /// and leaves the batch norm statistics alone.
    ///
    /// # Panics
    /// If the images have another shape.
    pub fn forward(&self, images: &Tensor, mode: &ForwardMode) -> Tensor {
        self.run(images, &mut Pass::new(mode, None).computing(&self.computing))
    }

    /// The same as [`forward`](Self::forward), reporting the output of every child module by name.
    pub fn forward_tapped(&self, images: &Tensor, mode: &ForwardMode, tap: Tap) -> Tensor {
        self.run(images, &mut Pass::new(mode, Some(tap)))
    }

    /// Embeddings of images to train on, with the way back from their gradient, part by part.
    ///
    /// # Panics
    /// If the images have another shape.
    pub fn forward_to_train<'a>(&'a self, images: &Tensor, mode: &ForwardMode) -> TrainingPass<'a> {
        self.forward_to_differentiate(images, mode, |_| true)
    }

    /// The same for whom the gradients of these parts, and of all after each, are complete as soon as they are; the others
    /// come with them. Gradient checkpointing knows every part.
    ///
    /// # Panics
    /// If the images have another shape.
    pub fn forward_to_train_for<'a>(
        &'a self,
        images: &Tensor,
        mode: &ForwardMode,
        parts: &[usize],
    ) -> TrainingPass<'a> {
        self.forward_to_differentiate(images, mode, |part| parts.contains(&part))
    }

    fn forward_to_differentiate<'a>(
        &'a self,
        images: &Tensor,
        mode: &ForwardMode,
        begins: impl Fn(usize) -> bool,
    ) -> TrainingPass<'a> {
        let (network, computing) = (self.network.as_ref(), &self.computing);
        if num_images(images) == 0 {
            return TrainingPass::empty(network, self.forward(images, mode), mode);
        }
        let images = self.laid_out(images);
        match self.config.gradient_checkpointing {
            true => TrainingPass::recomputing(network, &images, mode, computing),
            false => TrainingPass::keeping(network, &images, mode, computing, begins),
        }
    }

    /// By trainable parameter, in `state_dict` order, the part of the network that reads it, as
    /// [`TrainingPass::backward`] counts them: 0 the stem, then the trunk's pieces, the tail last. What training alone reads counts
    /// as the stem's, which is differentiated last.
    pub fn parts(&self) -> Vec<usize> {
        let mode = ForwardMode::evaluation(Precision::Fp32);
        let (mut trace, image) = Trace::new(&[1, 3, IMAGE_SIZE, IMAGE_SIZE], Device::Cpu);
        let mut pass = Pass::tracing(&mode, &mut trace);
        let mut ends = Vec::new();
        tch::no_grad(|| {
            let mut x = self.network.stem(&image, &mut pass);
            ends.push(pass.recorded());
            for piece in self.network.trunk() {
                x = piece.forward(&x, &mut pass);
                ends.push(pass.recorded());
            }
            let _embedding = self.network.tail(&x, &mut pass);
        });
        let readers = trace.readers();
        self.trainable()
            .iter()
            .map(|(_, parameter)| {
                let reader = readers.get(&address(parameter));
                reader.map_or(0, |node| ends.partition_point(|end| end <= node))
            })
            .collect()
    }

    pub(super) fn run(&self, images: &Tensor, pass: &mut Pass) -> Tensor {
        if num_images(images) == 0 {
            return Tensor::zeros([0, self.config.embedding_size], (Kind::Float, images.device()));
        }
        self.through_all_parts(&self.laid_out(images), pass)
    }

    fn through_all_parts(&self, images: &Tensor, pass: &mut Pass) -> Tensor {
        let mut x = self.network.stem(images, pass);
        for piece in self.network.trunk() {
            x = piece.forward(&x, pass);
        }
        self.network.tail(&x, pass)
    }

    /// Multiply-accumulates of convolutions, linear layers and attention for one image, counted as it goes through the
    /// layers.
    pub fn macs(&self) -> u64 {
        let mode = ForwardMode::evaluation(Precision::Fp32);
        let mut pass = Pass::counting(&mode);
        let image = Tensor::zeros([1, 3, IMAGE_SIZE, IMAGE_SIZE], (Kind::Float, Device::Cpu));
        let _embedding = tch::no_grad(|| self.run(&image, &mut pass));
        pass.macs()
    }

    /// What a training pass keeps, of one image.
    pub(super) fn walk(&self, precision: Precision, fuses: Option<Place>) -> Walk {
        let mode = ForwardMode::training(precision, DropoutDraw::default());
        let (mut walk, images) = Walk::new(&[1, 3, IMAGE_SIZE, IMAGE_SIZE], fuses);
        let mut pass = Pass::walking(&mode, &mut walk);
        tch::no_grad(|| {
            let mut x = self.network.stem(&images, &mut pass);
            pass.border(&x);
            for piece in self.network.trunk() {
                x = piece.forward(&x, &mut pass);
                pass.border(&x);
            }
            let _embedding = self.network.tail(&x, &mut pass);
        });
        walk
    }

    /// The network for embedding alone, with the weights as they are now, in this arithmetic.
    pub fn for_inference(&self, precision: Precision) -> Inference {
        Inference::new(
            self.graph_in(precision),
            self.config.embedding_size,
            self.device(),
        )
    }

    /// The operations of evaluation in f32, with the current parameters.
    pub fn graph(&self) -> Graph {
        self.graph_in(Precision::Fp32)
    }

    fn graph_in(&self, precision: Precision) -> Graph {
        let mode = ForwardMode::evaluation(precision);
        let (mut trace, image) = Trace::new(&[1, 3, IMAGE_SIZE, IMAGE_SIZE], self.device());
        let mut pass = Pass::tracing(&mode, &mut trace);
        let embedding = tch::no_grad(|| self.through_all_parts(&image, &mut pass));
        trace.finish(&embedding, &self.state)
    }
}

/// N of images \[N, 3, 112, 112\].
pub(super) fn num_images(images: &Tensor) -> i64 {
    let size = images.size();
    let [n, 3, IMAGE_SIZE, IMAGE_SIZE] = size[..] else {
        panic!("images have shape {size:?}, expected [N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}]");
    };
    n
}

/// The same tensor with its channels innermost in memory, a layout that every layer keeps: the CPU's convolutions are
/// faster in it (an r18 training step at batch 64 on 2 cores: 11.5 images/s instead of 8 in f32, 27 in bf16).
pub(super) fn channels_last(images: &Tensor) -> Tensor {
    images.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
}
