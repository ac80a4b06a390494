//! The head in its plain, materialised form: it builds the whole logits matrix. Slow and heavy, and easy to check:
//! the oracle that faster heads are tested against. Knows no gRPC, no file and no backbone.
//!
//! Shapes: b rows of the micro-batch over all ranks, r rows of this rank, n classes of this shard, c classes of it
//! that take part in the step, w their centres (w = c but for sub-centres), d embedding.

use super::{
    Head, HeadConfig, HeadError, HeadOutput, Seen,
    centers::Nearest,
    classes, exchange, load_weight_and_loss,
    margin::{Loss, Rows, target_cosines},
    rows_not_finite,
    sampling::{ClassSampler, RandomNegatives},
    state_of,
    unit::{normalize, normalize_backward},
};
use crate::{
    collective::{Collective, ReduceOp},
    optim::{self, Optimizer},
};
use arcface_proto::types::ClassRange;
use tch::{Device, Kind, Tensor, no_grad};

/// Smallest target probability in the loss, so that a loss is at most 69.08; does not cut the gradient.
const MIN_PROBABILITY: f64 = 1e-30;

/// Partial FC with materialised logits and a dense optimizer: rows that were not sampled are decayed and moved by
/// their momentum like the others, as in the reference.
pub struct PlainHead {
    shard: ClassRange,
    num_classes: u32,
    loss: Loss,
    /// Centres a class.
    centers: i64,
    sampler: Box<dyn ClassSampler>,
    /// `[n, d]`, or `[n, centers, d]` with several centres.
    weight: Tensor,
    /// Of the weight's shape, accumulated since the last update; `None` before the first micro-batch.
    grad: Option<Tensor>,
    optimizer: Box<dyn Optimizer>,
}

impl PlainHead {
    /// This rank's shard on the CPU, with initial weights that depend on (seed, class, dimension) alone.
    ///
    /// # Panics
    /// If `rank >= world_size`.
    pub fn new(config: &HeadConfig, rank: u32, world_size: u32) -> Self {
        Self::on(config, rank, world_size, Device::Cpu)
    }

    /// The same on another device than the CPU.
    ///
    /// # Panics
    /// If `rank >= world_size`.
    pub fn on(config: &HeadConfig, rank: u32, world_size: u32, device: Device) -> Self {
        let sampler = RandomNegatives {
            seed: config.seed,
            rate: config.sample_rate,
        };
        Self::placed(config, rank, world_size, Box::new(sampler), device)
    }

    /// The same on the CPU, with another choice of classes.
    ///
    /// # Panics
    /// If `rank >= world_size`.
    pub fn with_sampler(
        config: &HeadConfig,
        rank: u32,
        world_size: u32,
        sampler: Box<dyn ClassSampler>,
    ) -> Self {
        Self::placed(config, rank, world_size, sampler, Device::Cpu)
    }

    fn placed(
        config: &HeadConfig,
        rank: u32,
        world_size: u32,
        sampler: Box<dyn ClassSampler>,
        device: Device,
    ) -> Self {
        let shard = ClassRange::of_rank(config.num_classes, rank, world_size);
        let centers = i64::from(config.loss.centers());
        let weight = classes::initial_weight(config.seed, shard, centers * config.embedding_size);
        let mut weight = weight.to_device(device);
        if centers > 1 {
            weight = weight.view([-1, centers, config.embedding_size]);
        }
        let optimizer = optim::build(config.optimizer, &[weight.shallow_clone()]);
        Self {
            shard,
            num_classes: config.num_classes,
            loss: config.loss(),
            centers,
            sampler,
            weight,
            grad: None,
            optimizer,
        }
    }

    /// `[n, d]`, or `[n, centers, d]` with several centres a class: the gradient kept for the next update, if there was
    /// a micro-batch since the last one.
    pub fn weight_grad(&self) -> Option<&Tensor> {
        self.grad.as_ref()
    }

    /// The embedding's length d.
    fn embedding_size(&self) -> i64 {
        self.weight.size().last().copied().unwrap_or_default()
    }

    /// Adds `share` times the gradient `[w, d]` of the chosen classes.
    fn keep_gradient(&mut self, index_c: Option<&Tensor>, grad_wd: &Tensor, share: f64) {
        let grad = self.grad.get_or_insert_with(|| self.weight.zeros_like());
        let mut shape = self.weight.size();
        shape[0] = -1;
        let chosen = (grad_wd * share).view(shape.as_slice());
        match index_c {
            Some(index) => {
                let _ = grad.index_add_(0, index, &chosen);
            }
            None => *grad += chosen,
        }
    }

    /// Cosines of rows with their own classes: of all rows, or where the loss does without, of the classes here.
    fn targets_of_all(
        &self,
        comm: &mut dyn Collective,
        cos_bc: &Tensor,
        target_b: &Tensor,
    ) -> Result<Vec<f64>, HeadError> {
        let mut own = target_cosines(cos_bc, target_b);
        if self.loss.needs_all_targets() {
            // Each class lives on one rank, so the sum over ranks is that rank's value.
            let mut all = Tensor::from_slice(&own).to_device(cos_bc.device());
            comm.all_reduce(&mut all, ReduceOp::Sum)?;
            all.copy_data(&mut own, all.numel());
        }
        Ok(own)
    }
}

impl Head for PlainHead {
    fn shard(&self) -> ClassRange {
        self.shard
    }

    fn forward_backward(
        &mut self,
        comm: &mut dyn Collective,
        embedding: &Tensor,
        labels: &Tensor,
        rows: &[u32],
        step: u64,
        share: f64,
    ) -> Result<HeadOutput, HeadError> {
        let (embedding_size, device) = (self.embedding_size(), self.weight.device());
        exchange::check_forms(comm, embedding, labels, rows, embedding_size)?;
        no_grad(|| {
            let batch: i64 = rows.iter().map(|&n| i64::from(n)).sum();
            if batch == 0 {
                return Ok(HeadOutput {
                    loss: 0.0,
                    grad_embedding: Tensor::zeros([0, embedding_size], (Kind::Float, device)),
                    not_finite: Vec::new(),
                    seen: Seen::default(),
                });
            }
            let here = |tensor: &Tensor, kind| tensor.to_device(device).to_kind(kind);
            let embedding_bd = exchange::gather_rows(comm, &here(embedding, Kind::Float), rows)?;
            let labels_b = exchange::gather_rows(comm, &here(labels, Kind::Int64), rows)?;
            let labels = classes::to_vec(&labels_b);
            classes::check_labels(self.num_classes, &labels, rows)?;
            let chosen = classes::choose(self.sampler.as_mut(), step, self.shard, &labels)?;
            let target_b = Tensor::from_slice(&chosen.targets).to_device(device);
            let (sampled_rows, positive_rows) = (chosen.sampled(self.shard.len()), chosen.positives);
            let index_c = chosen.classes.map(|classes| {
                let classes: Vec<i64> = classes.into_iter().map(i64::from).collect();
                Tensor::from_slice(&classes).to_device(device)
            });
            let weight = match &index_c {
                Some(index) => self.weight.index_select(0, index),
                None => self.weight.shallow_clone(),
            };

            let (unit_bd, norm_b1) = normalize(&embedding_bd);
            let (unit_wd, norm_w1) = normalize(&weight.view([-1, embedding_size]));
            let nearest = Nearest::of(unit_bd.matmul(&unit_wd.tr()), self.centers);
            let raw_bc = &nearest.cos_bc;
            let cos_bc = raw_bc.clamp(-1.0, 1.0);
            let target_cos = self.targets_of_all(comm, &cos_bc, &target_b)?;
            let norms = doubles(&norm_b1);
            let here = chosen.targets.iter().zip(&target_cos);
            let seen = Seen {
                sampled_rows,
                positive_rows,
                target_cosines: here
                    .filter(|(column, _)| **column >= 0)
                    .map(|(_, cos)| *cos)
                    .collect(),
                norms: norms.iter().copied().collect(),
            };
            let prepared = self.loss.prepare(&Rows {
                norms: &norms,
                target_cos: &target_cos,
                share,
            });
            let margined = prepared.apply(&cos_bc, &target_b);

            let softmax = cross_entropy(comm, margined.logits, &target_b)?;
            let mut grad_bc = softmax.grad_bc;
            grad_bc *= margined.derivative;
            // The clamp passes no gradient where it cut; rounding puts cosines of equal directions there.
            grad_bc *= raw_bc.eq_tensor(&cos_bc);
            let grad_bw = nearest.backward(grad_bc, self.centers);

            let grad_unit_wd = grad_bw.tr().matmul(&unit_bd);
            let grad_wd = normalize_backward(&grad_unit_wd, &unit_wd, &norm_w1);
            self.keep_gradient(index_c.as_ref(), &grad_wd, share);

            // Through the normalisation only after the sum over shards: it is linear, and there are fewer rows.
            let grad_unit_rd = exchange::scatter_rows(comm, &grad_bw.matmul(&unit_wd), rows)?;
            let first: i64 = rows
                .iter()
                .take(comm.rank() as usize)
                .map(|&n| i64::from(n))
                .sum();
            let own = |all: &Tensor| all.narrow(0, first, embedding.size()[0]);
            let unit_rd = own(&unit_bd);
            let mut grad_embedding = normalize_backward(&grad_unit_rd, &unit_rd, &own(&norm_b1));
            if prepared.moves_norms() {
                // Every rank knows all it takes, so this part of its own rows needs no sum over shards.
                let probabilities = doubles(&softmax.target_probability_b);
                let by_norm: Vec<f32> = (0..probabilities.len())
                    .map(|row| prepared.grad_norm(row, probabilities[row]) as f32)
                    .collect();
                let by_norm = Tensor::from_slice(&by_norm).to_device(device);
                grad_embedding += unit_rd * own(&by_norm).unsqueeze(1);
            }
            grad_embedding *= share * f64::from(comm.world_size());
            let loss = softmax.loss + prepared.norm_loss();
            let losses = doubles(&softmax.target_probability_b).into_iter();
            Ok(HeadOutput {
                loss,
                grad_embedding,
                not_finite: rows_not_finite(loss, &norms, losses),
                seen,
            })
        })
    }

    fn update(&mut self, lr: f64) {
        if let Some(grad) = self.grad.take() {
            self.optimizer.step(&[self.weight.shallow_clone()], &[grad], lr);
            self.loss.commit();
        }
    }

    fn discard(&mut self) {
        self.grad = None;
        self.loss.discard();
    }

    fn updates(&self) -> u64 {
        self.optimizer.steps()
    }

    fn state(&mut self) -> Vec<(String, Tensor)> {
        state_of(&self.weight, self.optimizer.state(), &self.loss)
    }

    fn load_state(
        &mut self,
        updates: u64,
        rows: &mut dyn FnMut(&str) -> Option<Tensor>,
    ) -> Result<(), HeadError> {
        load_weight_and_loss(rows, &mut self.weight, &mut self.loss)?;
        self.grad = None;
        Ok(self.optimizer.load_state(updates, &mut |slot, _| rows(slot))?)
    }
}

/// Mean cross-entropy over all rows.
struct Softmax {
    loss: f64,
    /// `[b, c]`: its gradient by this rank's logits.
    grad_bc: Tensor,
    /// `[b]` f64: probability of each row's own class; the same on every rank.
    target_probability_b: Tensor,
}

/// The softmax over the columns of all ranks. Rows without a target here have target -1. The logits' memory becomes
/// the gradient's.
fn cross_entropy(
    comm: &mut dyn Collective,
    logits_bc: Tensor,
    target_b: &Tensor,
) -> Result<Softmax, HeadError> {
    let (batch, columns) = logits_bc.size2().expect("the logits are a matrix");
    let options = (logits_bc.kind(), logits_bc.device());
    let mut max_b = match columns {
        0 => Tensor::full([batch], f64::NEG_INFINITY, options),
        _ => logits_bc.amax([1].as_slice(), false),
    };
    comm.all_reduce(&mut max_b, ReduceOp::Max)?;
    let mut p_bc = logits_bc;
    p_bc -= max_b.unsqueeze(1);
    let _ = p_bc.exp_();

    let row_k = target_b.ge(0).nonzero().view([-1]);
    let at_target = [Some(&row_k), Some(&target_b.index_select(0, &row_k))];
    let mut target_exp_b = Tensor::zeros([batch], options);
    if row_k.numel() > 0 {
        let _ = target_exp_b.index_copy_(0, &row_k, &p_bc.index(&at_target));
    }
    let sum_exp_b = p_bc.sum_dim_intlist([1].as_slice(), false, None::<Kind>);
    // One message for both sums.
    let mut sums = Tensor::stack(&[sum_exp_b, target_exp_b], 0);
    comm.all_reduce(&mut sums, ReduceOp::Sum)?;
    let (sum_exp_b, target_exp_b) = (sums.select(0, 0), sums.select(0, 1));

    let probability_b = (target_exp_b / &sum_exp_b).to_kind(Kind::Double);
    let loss_b = probability_b.clamp_min(MIN_PROBABILITY).log();
    let loss = -loss_b.mean(None::<Kind>).double_value(&[]);

    p_bc /= sum_exp_b.unsqueeze(1);
    if row_k.numel() > 0 {
        let minus_one = Tensor::full([row_k.size()[0]], -1.0, options);
        let _ = p_bc.index_put_(&at_target, &minus_one, true);
    }
    p_bc /= batch as f64;
    Ok(Softmax {
        loss,
        grad_bc: p_bc,
        target_probability_b: probability_b,
    })
}

/// The values of a tensor, as f64.
fn doubles(tensor: &Tensor) -> Vec<f64> {
    let mut values = vec![0f64; tensor.numel()];
    tensor
        .to_kind(Kind::Double)
        .copy_data(&mut values, tensor.numel());
    values
}

#[cfg(test)]
mod tests;
