//! Named tensors of a network in `state_dict` order, and the builder that the layers register them with.
//! Knows shapes and names, no arithmetic.

use tch::{Device, Kind, Tensor};

/// What a tensor of the state is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A parameter that the optimizer updates.
    Trainable,
    /// A parameter that keeps its initial or loaded value.
    Frozen,
    /// Batch norm statistics: no gradient, saved with the parameters.
    Buffer,
}

/// How a tensor starts before training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Every element the same.
    Constant(f64),
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Uniform in [-bound, bound).
    Uniform {
        /// Largest magnitude.
        bound: f64,
    },
}

/// One tensor of a network's state.
#[derive(Debug)]
pub struct StateEntry {
    /// Full name in the `state_dict`, for example `layer1.0.conv1.weight`.
    pub name: String,
    /// The value; shares its storage with the layer that uses it.
    pub tensor: Tensor,
    /// What it is for.
    pub role: Role,
    /// How it starts.
    pub init: Init,
}

/// Registers the tensors of a network under a path, in the order in which PyTorch lists them.
pub struct Builder<'a> {
    state: &'a mut Vec<StateEntry>,
    path: String,
    freeze_batch_norm: bool,
    outline: bool,
}

impl<'a> Builder<'a> {
    /// Builder at the root of an empty state. `freeze_batch_norm` makes every batch norm that is built a constant
    /// affine map.
    pub fn new(state: &'a mut Vec<StateEntry>, freeze_batch_norm: bool) -> Self {
        Self {
            state,
            path: String::new(),
            freeze_batch_norm,
            outline: false,
        }
    }

    /// The same for a network that is looked at and not run: its tensors have shapes, and one element in memory.
    pub fn outline(self) -> Self {
        Self {
            outline: true,
            ..self
        }
    }

    /// Builder for the child module `name`.
    pub fn child(&mut self, name: impl std::fmt::Display) -> Builder<'_> {
        Builder {
            path: format!("{}{name}.", self.path),
            state: self.state,
            freeze_batch_norm: self.freeze_batch_norm,
            outline: self.outline,
        }
    }

    /// Whether batch norms are built as constants.
    pub fn freezes_batch_norm(&self) -> bool {
        self.freeze_batch_norm
    }

    /// A trainable f32 parameter.
    pub fn parameter(&mut self, leaf: &str, shape: &[i64], init: Init) -> Tensor {
        let tensor = self.zeros(shape, Kind::Float).set_requires_grad(true);
        self.register(leaf, tensor, Role::Trainable, init)
    }

    /// An f32 parameter without gradient.
    pub fn frozen(&mut self, leaf: &str, shape: &[i64], init: Init) -> Tensor {
        let tensor = self.zeros(shape, Kind::Float);
        self.register(leaf, tensor, Role::Frozen, init)
    }

    /// A buffer of any kind.
    pub fn buffer(&mut self, leaf: &str, shape: &[i64], kind: Kind, init: Init) -> Tensor {
        let tensor = self.zeros(shape, kind);
        self.register(leaf, tensor, Role::Buffer, init)
    }

    fn zeros(&self, shape: &[i64], kind: Kind) -> Tensor {
        let options = (kind, Device::Cpu);
        match self.outline {
            true => Tensor::zeros([0i64; 0], options).expand(shape, false),
            false => Tensor::zeros(shape, options),
        }
    }

    fn register(&mut self, leaf: &str, tensor: Tensor, role: Role, init: Init) -> Tensor {
        self.state.push(StateEntry {
            name: format!("{}{leaf}", self.path),
            tensor: tensor.shallow_clone(),
            role,
            init,
        });
        tensor
    }
}
