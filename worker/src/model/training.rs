//! A forward pass that will be differentiated: embeddings now, and later the parameters' gradients from the embeddings'.
//!
//! The network has parts: the stem, the trunk's pieces, the tail. On the way back whoever sums gradients over ranks begins with
//! those that are there already, so a graph of autograd's ends where a sum begins. It ends nowhere else: each is handed to
//! autograd's thread and waited for, which on a GPU costs as much as some layers.
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
    pass::{Computing, ForwardMode, Pass},
};

/// Embeddings with the way back to the parameters.
pub struct TrainingPass<'a> {
    mode: ForwardMode,
    computing: &'a Computing,
    embedding_bd: Tensor,
    /// First to last; none of an empty batch.
    graphs: Vec<Graph<'a>>,
    /// Parts of the network.
    parts: usize,
    draws: bool,
}

/// Some parts of the network that have run.
struct Graph<'a> {
    /// The first of them, by number.
    first: usize,
    /// Where it begins; the images of the first one are nobody's to differentiate.
    input: Option<Tensor>,
    way: Way<'a>,
}

enum Way<'a> {
    /// Autograd has kept what is between its input and this output.
    Kept(Tensor),
    /// It runs again.
    Again(Piece<'a>),
}

impl<'a> TrainingPass<'a> {
    /// Of an empty batch, whose embeddings these are.
    pub(super) fn empty(network: &'a dyn Network, embedding_bd: Tensor, mode: &ForwardMode) -> Self {
        Self {
            mode: *mode,
            computing: &Computing::Usual,
            embedding_bd,
            graphs: Vec::new(),
            parts: network.trunk().len() + 2,
            draws: false,
        }
    }

    /// Runs the network on images, not none, with a new graph before every part that `begins` names.
    pub(super) fn keeping(
        network: &'a dyn Network,
        images: &Tensor,
        mode: &ForwardMode,
        computing: &'a Computing,
        begins: impl Fn(usize) -> bool,
    ) -> Self {
        let mut pass = Pass::new(mode, None).computing(computing);
        let mut graphs = Vec::new();
        let (mut first, mut input) = (0, None);
        let mut border = |x: Tensor, part: usize| {
            if !begins(part) {
                return x;
            }
            let next = begin(&x);
            graphs.push(Graph {
                first: std::mem::replace(&mut first, part),
                input: input.replace(next.shallow_clone()),
                way: Way::Kept(x),
            });
            next
        };
        let mut x = network.stem(images, &mut pass);
        let trunk = network.trunk();
        for (number, piece) in trunk.iter().enumerate() {
            x = border(x, number + 1);
            x = piece.forward(&x, &mut pass);
        }
        let last = trunk.len() + 1;
        x = border(x, last);
        let embedding_bd = network.tail(&x, &mut pass);
        graphs.push(Graph {
            first,
            input,
            way: Way::Kept(embedding_bd.shallow_clone()),
        });
        Self {
            mode: *mode,
            computing,
            embedding_bd,
            graphs,
            parts: last + 1,
            draws: pass.draws(),
        }
    }

    /// Runs the network on images, not none; the trunk's pieces keep their inputs alone.
    pub(super) fn recomputing(
        network: &'a dyn Network,
        images: &Tensor,
        mode: &ForwardMode,
        computing: &'a Computing,
    ) -> Self {
        let mut pass = Pass::new(mode, None).computing(computing);
        let stem = network.stem(images, &mut pass);
        let mut x = begin(&stem);
        let mut graphs = vec![Graph {
            first: 0,
            input: None,
            way: Way::Kept(stem),
        }];
        for piece in network.trunk() {
            let y = tch::no_grad(|| piece.forward(&x, &mut pass));
            graphs.push(Graph {
                first: graphs.len(),
                input: Some(x),
                way: Way::Again(piece),
            });
            x = begin(&y);
        }
        let embedding_bd = network.tail(&x, &mut pass);
        graphs.push(Graph {
            first: graphs.len(),
            input: Some(x),
            way: Way::Kept(embedding_bd.shallow_clone()),
        });
        Self {
            mode: *mode,
            computing,
            embedding_bd,
            parts: graphs.len(),
            graphs,
            draws: pass.draws(),
        }
    }

    /// \[N, D\] f32, outside autograd.
    pub fn embedding(&self) -> Tensor {
        self.embedding_bd.detach()
    }

    /// True if it drew random masks: the next pass over these images is another one.
    pub fn draws(&self) -> bool {
        self.draws
    }

    /// Adds the parameters' gradients to their `grad()`, for a gradient of the embeddings \[N, D\]. An empty batch adds
    /// nothing.
    pub fn backward(self, grad_bd: &Tensor) {
        let Ok(()) = self.backward_by_part(grad_bd, |_| Ok::<(), Infallible>(()));
    }

    /// The same; from the last part to the first, `finished` hears its number once the gradients of its parameters
    /// ([`parts`](super::Backbone::parts)) are complete: at the borders of graphs.
    ///
    /// # Errors
    /// What `finished` says; the way back ends there.
    pub fn backward_by_part<E>(
        self,
        grad_bd: &Tensor,
        mut finished: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut end = self.parts;
        let mut grad = grad_bd.shallow_clone();
        for segment in self.into_segments() {
            let first = segment.first_part();
            let before = segment.differentiate(&grad);
            (first..end).rev().try_for_each(&mut finished)?;
            end = first;
            grad = before.unwrap_or(grad);
        }
        (0..end).rev().try_for_each(finished)
    }

    /// The way back in pieces, in the order in which they are differentiated: the last parts of the network first. None of an empty
    /// batch.
    pub fn into_segments(self) -> impl Iterator<Item = Segment<'a>> {
        let (mode, computing) = (self.mode, self.computing);
        let graphs = self.graphs.into_iter().rev();
        graphs.map(move |graph| Segment {
            graph,
            mode,
            computing,
        })
    }
}

/// A piece of the way back.
pub struct Segment<'a> {
    graph: Graph<'a>,
    mode: ForwardMode,
    computing: &'a Computing,
}

impl Segment<'_> {
    /// The first part of the network that it goes back through.
    pub fn first_part(&self) -> usize {
        self.graph.first
    }

    /// Adds the gradients of its parameters to their `grad()`, for the gradient of where it ends: of the embeddings, or what the
    /// segment before it on the way back gave. Gives the gradient of where it begins; none at the images.
    pub fn differentiate(self, grad: &Tensor) -> Option<Tensor> {
        let input = self.graph.input;
        match self.graph.way {
            Way::Kept(output) => differentiate(&output, grad),
            Way::Again(piece) => {
                let mut pass = Pass::repeating(&self.mode).computing(self.computing);
                let input = input.as_ref().expect("no piece has the images");
                differentiate(&piece.forward(input, &mut pass), grad);
            }
        }
        input.map(|input| input.grad())
    }
}

/// Where the next graph begins.
fn begin(y: &Tensor) -> Tensor {
    y.detach().set_requires_grad(true)
}
