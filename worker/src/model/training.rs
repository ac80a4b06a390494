//! A forward pass that will be differentiated: embeddings now, and later the parameters' gradients from the embeddings'.
//!
//! The network may run in parts, each with a graph of its own: the stem, the trunk's pieces, the tail. On the way back the parts
//! are differentiated one after the other, the tail first, and whoever sums gradients over ranks begins with those that are
//! there already. Where nobody does, it is one graph: autograd's thread takes each from ours, and a GPU waits for that.
//!
//! With gradient checkpointing (Chen et al., "Training deep nets with sublinear memory cost", 2016) the trunk's pieces run
//! without autograd and leave only their inputs. On the way back each piece runs again from its input, with autograd,
//! and is differentiated at once. Random masks are functions of counters, so the second run draws the same ones; running
//! statistics have moved in the first.

use std::convert::Infallible;
use tch::Tensor;

use super::{
    layers::{Network, Piece},
    native::differentiate,
    pass::{ForwardMode, Pass},
};
use crate::kernels::Kernels;

/// Where a training pass is cut into graphs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// One graph.
    Nowhere,
    /// Between the parts of the network.
    Parts,
    /// The same, and the trunk's pieces keep their inputs alone: they run again on the way back.
    RunAgain,
}

/// Embeddings with the way back to the parameters.
pub struct TrainingPass<'a> {
    mode: ForwardMode,
    kernels: Option<&'a Kernels>,
    embedding_bd: Tensor,
    /// First to last; none of an empty batch.
    parts: Vec<Part<'a>>,
    /// Parts of the network.
    count: usize,
}

/// A part that has run.
enum Part<'a> {
    /// Autograd has kept what is between its input, where its graph begins, and its output. The stem's input is the images.
    Kept { input: Option<Tensor>, output: Tensor },
    /// It runs again.
    Again { piece: Piece<'a>, input: Tensor },
}

impl<'a> TrainingPass<'a> {
    /// Of an empty batch, whose embeddings these are.
    pub(super) fn empty(network: &'a dyn Network, embedding_bd: Tensor, mode: &ForwardMode) -> Self {
        Self {
            mode: *mode,
            kernels: None,
            embedding_bd,
            parts: Vec::new(),
            count: network.trunk().len() + 2,
        }
    }

    /// Runs the network on images, not none.
    pub(super) fn run(
        network: &'a dyn Network,
        images: &Tensor,
        mode: &ForwardMode,
        cut: Cut,
        kernels: Option<&'a Kernels>,
    ) -> Self {
        if cut == Cut::Nowhere {
            return Self::whole(network, images, mode, kernels);
        }
        let again = cut == Cut::RunAgain;
        let mut pass = Pass::new(mode, None).with_kernels(kernels);
        let stem = network.stem(images, &mut pass);
        let mut x = begin(&stem);
        let mut parts = vec![Part::Kept {
            input: None,
            output: stem,
        }];
        for piece in network.trunk() {
            let y = match again {
                true => tch::no_grad(|| piece.forward(&x, &mut pass)),
                false => piece.forward(&x, &mut pass),
            };
            let next = begin(&y);
            parts.push(match again {
                true => Part::Again { piece, input: x },
                false => Part::Kept {
                    input: Some(x),
                    output: y,
                },
            });
            x = next;
        }
        let embedding_bd = network.tail(&x, &mut pass);
        parts.push(Part::Kept {
            input: Some(x),
            output: embedding_bd.shallow_clone(),
        });
        Self {
            mode: *mode,
            kernels,
            embedding_bd,
            count: parts.len(),
            parts,
        }
    }

    /// As one graph.
    fn whole(
        network: &'a dyn Network,
        images: &Tensor,
        mode: &ForwardMode,
        kernels: Option<&'a Kernels>,
    ) -> Self {
        let mut pass = Pass::new(mode, None).with_kernels(kernels);
        let mut x = network.stem(images, &mut pass);
        let trunk = network.trunk();
        for piece in &trunk {
            x = piece.forward(&x, &mut pass);
        }
        let embedding_bd = network.tail(&x, &mut pass);
        Self {
            mode: *mode,
            kernels,
            parts: vec![Part::Kept {
                input: None,
                output: embedding_bd.shallow_clone(),
            }],
            embedding_bd,
            count: trunk.len() + 2,
        }
    }

    /// \[N, D\] f32, outside autograd.
    pub fn embedding(&self) -> Tensor {
        self.embedding_bd.detach()
    }

    /// Adds the parameters' gradients to their `grad()`, for a gradient of the embeddings \[N, D\]. An empty batch adds
    /// nothing.
    pub fn backward(self, grad_bd: &Tensor) {
        let Ok(()) = self.backward_by_part(grad_bd, |_| Ok::<(), Infallible>(()));
    }

    /// The same; after each part, from the last to the first, `finished` hears its number: the gradients of its parameters
    /// ([`parts`](super::Backbone::parts)) are complete.
    ///
    /// # Errors
    /// What `finished` says; the way back ends there.
    pub fn backward_by_part<E>(
        self,
        grad_bd: &Tensor,
        mut finished: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<(), E> {
        drop(self.embedding_bd);
        if self.parts.is_empty() {
            return (0..self.count).rev().try_for_each(finished);
        }
        let whole = self.parts.len() < self.count;
        let mut grad = grad_bd.shallow_clone();
        for (number, part) in self.parts.into_iter().enumerate().rev() {
            let input = match part {
                Part::Kept { input, output } => {
                    differentiate(&output, &grad);
                    input
                }
                Part::Again { piece, input } => {
                    let mut pass = Pass::repeating(&self.mode).with_kernels(self.kernels);
                    let output = piece.forward(&input, &mut pass);
                    differentiate(&output, &grad);
                    Some(input)
                }
            };
            if whole {
                return (0..self.count).rev().try_for_each(finished);
            }
            finished(number)?;
            if let Some(input) = input {
                grad = input.grad();
            }
        }
        Ok(())
    }
}

/// Where the next part's graph begins.
fn begin(y: &Tensor) -> Tensor {
    y.detach().set_requires_grad(true)
}
