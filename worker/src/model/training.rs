//! A forward pass that will be differentiated: embeddings now, and later the parameters' gradients from the embeddings'.
//!
//! With gradient checkpointing (Chen et al., "Training deep nets with sublinear memory cost", 2016) the trunk's pieces run
//! without autograd and leave only their inputs. On the way back each piece runs again from its input, with autograd,
//! and is differentiated at once. Random masks are functions of counters, so the second run draws the same ones; running
//! statistics have moved in the first.

use tch::{Kind, Tensor};

use super::{
    layers::{Network, Piece},
    pass::{ForwardMode, Pass},
};

/// Embeddings with the way back to the parameters.
pub struct TrainingPass<'a> {
    embedding_bd: Tensor,
    trunk: Option<Trunk<'a>>,
}

/// A trunk that ran without autograd.
struct Trunk<'a> {
    mode: ForwardMode,
    /// Output of the stem, whose graph autograd has kept.
    stem: Tensor,
    /// Every piece with its input.
    pieces: Vec<(Piece<'a>, Tensor)>,
    /// Input of the tail, whose graph begins here.
    output: Tensor,
}

impl<'a> TrainingPass<'a> {
    /// Autograd has kept all of it.
    pub(super) fn keeping(embedding_bd: Tensor) -> Self {
        Self {
            embedding_bd,
            trunk: None,
        }
    }

    /// Runs the network on images, not none, and keeps the inputs of the trunk's pieces.
    pub(super) fn recomputing(network: &'a dyn Network, images: &Tensor, mode: &ForwardMode) -> Self {
        let mut pass = Pass::new(mode, None);
        let stem = network.stem(images, &mut pass);
        let mut x = stem.detach();
        let mut pieces = Vec::new();
        for piece in network.trunk() {
            let y = tch::no_grad(|| piece.forward(&x, &mut pass));
            pieces.push((piece, x));
            x = y;
        }
        let output = x.set_requires_grad(true);
        let embedding_bd = network.tail(&output, &mut pass);
        Self {
            embedding_bd,
            trunk: Some(Trunk {
                mode: *mode,
                stem,
                pieces,
                output,
            }),
        }
    }

    /// \[N, D\] f32, outside autograd.
    pub fn embedding(&self) -> Tensor {
        self.embedding_bd.detach()
    }

    /// Adds the parameters' gradients to their `grad()`, for a gradient of the embeddings \[N, D\]. An empty batch adds
    /// nothing.
    pub fn backward(self, grad_bd: &Tensor) {
        if self.embedding_bd.size()[0] == 0 {
            return;
        }
        differentiate(&self.embedding_bd, grad_bd);
        let Some(trunk) = self.trunk else { return };
        let mut grad = trunk.output.grad();
        drop(trunk.output);
        for (piece, input) in trunk.pieces.into_iter().rev() {
            let input = input.set_requires_grad(true);
            let output = piece.forward(&input, &mut Pass::repeating(&trunk.mode));
            differentiate(&output, &grad);
            grad = input.grad();
        }
        differentiate(&trunk.stem, &grad);
    }
}

/// Backward of `y`, whose gradient is `grad`.
fn differentiate(y: &Tensor, grad: &Tensor) {
    (y * grad).sum(Kind::Float).backward();
}
