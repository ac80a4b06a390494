//! The network's way there and back as CUDA graphs: recorded once, launched in every step from then on. What is between them, the
//! head and the gradients' sum over the ranks, stays as it is: there is a graph for each piece of the way back, so a bucket's sum
//! still runs beside the next one.
//!
//! A graph is of one batch size, and of a network that does the same in every step. The first passes run launch by launch in any
//! case: libtorch looks for the fastest convolutions then, which cannot be recorded.

use super::failure::RankFailure;
use crate::data::planes;
use crate::device::{CudaGraph, CudaGraphError, Recorder};
use crate::model::{Backbone, ForwardMode, let_go_of_gradient, take_gradient};
use tch::{Device, Tensor};
use tracing::{info, warn};

/// Passes that run launch by launch before a recording.
pub const PASSES_BEFORE: u32 = 2;

/// A training pass as graphs, with the memory that they read and write.
pub struct Captured {
    images: Tensor,
    grad_bd: Tensor,
    embedding_bd: Tensor,
    forward: CudaGraph,
    /// The way back, the last parts first.
    backward: Vec<Segment>,
}

struct Segment {
    graph: CudaGraph,
    first_part: usize,
    /// By parameter.
    gradients: Vec<(usize, Tensor)>,
}

impl Captured {
    /// Records a pass over images of this form, with a piece of the way back for each of these parts
    /// ([`Backbone::forward_to_train_for`]), on the GPU of this number. Nothing is computed. `params` are the backbone's, without
    /// gradients; the recording leaves them some that hold nothing.
    ///
    /// # Errors
    /// Why there is none.
    pub fn record(
        backbone: &Backbone,
        params: &[Tensor],
        images: &Tensor,
        mode: &ForwardMode,
        parts: &[usize],
        gpu: usize,
    ) -> Result<Self, CudaGraphError> {
        let images = images.zeros_like();
        let mut recorder = Recorder::new(gpu)?;
        let (forward, pass) =
            recorder.record(|| backbone.forward_to_train_for(&planes::normalised(&images), mode, parts))?;
        let embedding_bd = pass.embedding();
        let grad_bd = embedding_bd.zeros_like();
        let mut grad = grad_bd.shallow_clone();
        let mut backward: Vec<Segment> = Vec::new();
        let mut found = vec![false; params.len()];
        for segment in pass.into_segments() {
            let first_part = segment.first_part();
            let (graph, before) = recorder.record(|| segment.differentiate(&grad))?;
            let gradients = params.iter().enumerate().filter_map(|(index, param)| {
                let grad = param.grad();
                (!found[index] && grad.defined()).then_some((index, grad))
            });
            let gradients: Vec<(usize, Tensor)> = gradients.collect();
            for (index, _) in &gradients {
                found[*index] = true;
            }
            backward.push(Segment {
                graph,
                first_part,
                gradients,
            });
            grad = before.unwrap_or(grad);
        }
        Ok(Self {
            images,
            grad_bd,
            embedding_bd,
            forward,
            backward,
        })
    }

    /// The way there; embeddings \[N, D\] f32, outside autograd, good until the next one.
    ///
    /// # Errors
    /// What CUDA says.
    pub fn forward(&mut self, images: &Tensor) -> Result<Tensor, CudaGraphError> {
        self.images.copy_(images);
        self.forward.launch()?;
        Ok(self.embedding_bd.shallow_clone())
    }

    /// The way back, as [`TrainingPass::backward_by_part`](crate::model::TrainingPass::backward_by_part). `alone`: no other gradient
    /// is added to these before they are used, and none need be kept beyond the next way back.
    ///
    /// # Errors
    /// What CUDA or `finished` says.
    pub fn backward_by_part(
        &mut self,
        grad_bd: &Tensor,
        params: &mut [Tensor],
        alone: bool,
        mut finished: impl FnMut(usize, &[Tensor]) -> Result<(), RankFailure>,
    ) -> Result<(), RankFailure> {
        self.grad_bd.copy_(grad_bd);
        for segment in &self.backward {
            segment.graph.launch()?;
            for (index, gradient) in &segment.gradients {
                add_gradient(&mut params[*index], gradient, alone);
            }
            // Who hears a part's number takes all after it for complete.
            finished(segment.first_part, params)?;
        }
        Ok(())
    }
}

/// Adds to a leaf's gradient what stands in memory that the next way back writes to.
fn add_gradient(leaf: &mut Tensor, gradient: &Tensor, alone: bool) {
    let before = leaf.grad();
    if before.defined() {
        let _ = tch::no_grad(|| before.shallow_clone().g_add_(gradient));
    } else if alone {
        take_gradient(leaf, gradient);
    } else {
        take_gradient(leaf, &gradient.copy());
    }
}

/// Whether the network runs as graphs, and those that it runs as.
#[derive(Default)]
pub struct CapturedSteps {
    /// The job wants them.
    wanted: bool,
    /// By form of the images, passes that ran launch by launch.
    ran: Vec<(Vec<i64>, u32)>,
    captured: Option<Captured>,
}

impl CapturedSteps {
    /// `wanted`: on a GPU, where the network allows it.
    pub fn new(wanted: bool) -> Self {
        Self {
            wanted,
            ..Self::default()
        }
    }

    /// The graphs, if there are any.
    pub fn graphs(&mut self) -> Option<&mut Captured> {
        self.captured.as_mut()
    }

    /// The graphs for images of this form, recorded when their time has come. Without them the pass runs launch by launch, and is to be
    /// told to [`ran`](Self::ran).
    ///
    /// # Errors
    /// If a recording was broken off. One that is refused costs a warning.
    pub fn graphs_for(
        &mut self,
        backbone: &Backbone,
        params: &mut [Tensor],
        images: &Tensor,
        mode: &ForwardMode,
        parts: &[usize],
    ) -> Result<Option<&mut Captured>, CudaGraphError> {
        let Device::Cuda(gpu) = images.device() else {
            return Ok(None);
        };
        let form = images.size();
        // Not while gradients of earlier micro-batches wait.
        if self.is_time(&form) && params.iter().all(|param| !param.grad().defined()) {
            let recorded = Captured::record(backbone, params, images, mode, parts, gpu);
            params.iter_mut().for_each(let_go_of_gradient);
            match recorded {
                Ok(captured) => {
                    info!(images = form[0], "the network runs as CUDA graphs from now on");
                    self.captured = Some(captured);
                }
                Err(broken @ CudaGraphError::BrokenOff(_)) => return Err(broken),
                Err(error) => {
                    warn!("the network goes on without CUDA graphs (train.cuda_graph): {error}");
                    self.wanted = false;
                }
            }
        }
        Ok(self
            .captured
            .as_mut()
            .filter(|captured| captured.images.size() == form))
    }

    /// A pass over images of this form ran launch by launch; `draws`: with random masks, which are other ones every time.
    pub fn ran(&mut self, form: &[i64], draws: bool) {
        if draws && self.wanted {
            info!("the network draws random masks, and so does not run as CUDA graphs");
        }
        self.wanted &= !draws;
        if !self.wanted || form[0] == 0 {
            return;
        }
        match self.ran.iter_mut().find(|(known, _)| known == form) {
            Some((_, passes)) => *passes += 1,
            None => self.ran.push((form.to_vec(), 1)),
        }
    }

    /// One form has graphs, the first that comes often enough: a second one would need memory of its own.
    fn is_time(&self, form: &[i64]) -> bool {
        let often = |(known, passes): &(Vec<i64>, u32)| known == form && *passes >= PASSES_BEFORE;
        self.wanted && self.captured.is_none() && self.ran.iter().any(often)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_that_comes_again_is_recorded_and_random_masks_never_are() {
        let mut steps = CapturedSteps::new(true);
        let (one, other, none) = ([4, 3, 112, 112], [2, 3, 112, 112], [0, 3, 112, 112]);
        assert!(!steps.is_time(&one));
        for _ in 0..3 {
            steps.ran(&none, false);
        }
        assert!(!steps.is_time(&none), "there is nothing to compute");
        steps.ran(&one, false);
        steps.ran(&other, false);
        assert!(!steps.is_time(&one) && !steps.is_time(&other));
        // Uneven micro-batches take turns.
        steps.ran(&one, false);
        assert!(steps.is_time(&one) && !steps.is_time(&other));
        steps.ran(&one, true);
        assert!(!steps.is_time(&one));
        let mut steps = CapturedSteps::new(false);
        steps.ran(&one, false);
        steps.ran(&one, false);
        assert!(!steps.is_time(&one), "nobody wants it");
    }

    #[test]
    fn gradients_of_later_micro_batches_are_added_to_a_copy() {
        let mut leaf = Tensor::from_slice(&[0f32, 0.0]).set_requires_grad(true);
        let mut memory = Tensor::from_slice(&[1f32, 2.0]);
        add_gradient(&mut leaf, &memory, false);
        memory *= 10.0;
        add_gradient(&mut leaf, &memory, false);
        assert_eq!(Vec::<f32>::try_from(leaf.grad()).expect("f32"), [11.0, 22.0]);
        let_go_of_gradient(&mut leaf);
        add_gradient(&mut leaf, &memory, true);
        assert_eq!(leaf.grad().data_ptr(), memory.data_ptr());
    }
}
