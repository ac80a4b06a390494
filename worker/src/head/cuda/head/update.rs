//! The update of the weights, tile by tile, and the rows that wait for one.

use super::{CudaHead, tile, weights};
use crate::{
    head::{
        cuda::{
            kernels::{RowsGradient, SgdStep, Weights},
            micro::{Micro, to_device},
            tiles::{Span, Taking},
        },
        lazy_sgd::History,
        tiled::kernel::rows::{AdamWStep, RowMap},
    },
    kernels::{Started, launch::LaunchError},
    optim::OptimizerConfig,
};
use tch::{Device, Kind, Tensor};

/// Rows that wait for steps without gradient.
pub struct Lazy {
    pub history: History,
    /// `[n]` u32: the history's `now` when the row was touched last.
    pub since: Tensor,
    /// `[steps, 4]` f32: the history's maps.
    pub products: Tensor,
}

impl Lazy {
    pub fn new(history: History, rows: u32, device: Device) -> Self {
        Self {
            history,
            since: Tensor::zeros([i64::from(rows)], (Kind::Int, device)),
            products: Tensor::zeros([0, 4], (Kind::Float, device)),
        }
    }

    /// Tells the device what the history has become: a few kilobytes, and nobody waits.
    pub fn tell(&mut self) {
        let maps: Vec<f32> = self
            .history
            .remembered()
            .map(RowMap::of)
            .flat_map(|map| [map.w_by_w_less_1, map.w_by_v, map.v_by_w, map.v_by_v])
            .collect();
        let steps = maps.len() as i64 / 4;
        let maps = Tensor::from_slice(&maps).view([steps, 4]);
        self.products = to_device(&maps, self.since.device());
    }
}

/// A step of the optimizer.
enum Rule {
    Sgd(SgdStep),
    AdamW(AdamWStep),
}

impl CudaHead {
    /// Updates the weights from the first `pending` micro-batches.
    pub(super) fn update_rows(&mut self, pending: usize, lr: f64) -> Started {
        let micros = &self.micros[..pending];
        let weights = weights(&self.weight, &*self.buffers, self.lazy.as_ref());
        let taking = match &self.choosing {
            Some(choosing) if pending > 1 => choosing.union(&self.kernels, micros)?,
            _ => micros[0].taking(),
        };
        let largest = micros.iter().map(Micro::batch).max().unwrap_or_default();
        for span in self.tiles.spans(&taking, largest) {
            self.tiles.load(&self.kernels, &weights, &taking, span)?;
            let part = taking.part(span);
            let mut gradient = None;
            for micro in micros {
                let cosines = self.tiles.cosines(&micro.operand, span);
                self.kernels.softmax_gradient(
                    tile(&cosines, span, micro),
                    &micro.others(self.config.scale),
                    &micro.factor,
                    &micro.target_gradient,
                )?;
                if let (Some(rows), Some(chosen), 2..) = (&part, micro.taking().list, pending) {
                    self.kernels.drop_columns(&cosines, rows, &chosen)?;
                }
                let add = gradient.is_some();
                gradient = Some(match pending {
                    1 => self.tiles.gradient(&cosines, &micro.operand, span),
                    _ => self.tiles.sum_of_gradients(&cosines, &micro.operand, span, add),
                });
            }
            let Some(gradient) = gradient else { continue };
            let rows = RowsGradient {
                gradient: &gradient,
                inverse: &self.tiles.inverse(span),
                chosen: part.as_ref(),
            };
            self.update_tile(&weights, &taking, span, &rows, lr)?;
        }
        self.update_others(lr)
    }

    fn update_tile(
        &self,
        weights: &Weights,
        taking: &Taking,
        span: Span,
        rows: &RowsGradient<'_>,
        lr: f64,
    ) -> Started {
        match self.rule(lr) {
            Rule::Sgd(step) => self.kernels.sgd_rows(&taking.weights(weights, span), rows, step),
            Rule::AdamW(step) => {
                let [mean, mean_sq] = self.means().map(|all| match taking.list {
                    Some(_) => all,
                    None => all.narrow(0, span.first, span.columns),
                });
                let weight = taking.weights(weights, span).weight;
                self.kernels.adamw_rows(&weight, (&mean, &mean_sq), rows, step)
            }
        }
    }

    /// What the rule does to rows that took no part.
    fn update_others(&mut self, lr: f64) -> Started {
        if let (Rule::AdamW(step), Some(choosing)) = (self.rule(lr), &self.choosing) {
            let [mean, mean_sq] = self.means();
            let means = (&mean, &mean_sq);
            self.kernels
                .adamw_idle_rows(&self.weight, means, choosing.taken(), step)?;
        }
        let Some(lazy) = &mut self.lazy else { return Ok(()) };
        lazy.history.advance(lr);
        lazy.tell();
        match lazy.history.overdue() {
            Some(before) => self.make_up(before),
            None => Ok(()),
        }
    }

    fn rule(&self, lr: f64) -> Rule {
        match self.config.optimizer {
            OptimizerConfig::Sgd {
                momentum,
                weight_decay,
            } => Rule::Sgd(SgdStep {
                lr: lr as f32,
                mu: momentum as f32,
                decay: weight_decay as f32,
            }),
            OptimizerConfig::AdamW {
                weight_decay,
                beta1,
                beta2,
                eps,
            } => Rule::AdamW(AdamWStep::new(
                lr,
                weight_decay,
                (beta1, beta2),
                eps,
                self.updates,
            )),
        }
    }

    /// AdamW's buffers.
    fn means(&self) -> [Tensor; 2] {
        let state = self.buffers.state();
        [0, 1].map(|slot| state[slot].1[0].shallow_clone())
    }

    /// Brings rows that were touched before `before` up to date; what came before is forgotten.
    pub(super) fn make_up(&mut self, before: u32) -> Started {
        self.kernels.make_up_rows(&self.weights(), before)?;
        if let Some(lazy) = &mut self.lazy {
            lazy.history.forget(before);
            lazy.tell();
        }
        Ok(())
    }
}

/// Nothing is given back from where this is asked.
pub fn works(started: Result<(), LaunchError>) {
    started.expect("kernels start as long as their device works");
}
