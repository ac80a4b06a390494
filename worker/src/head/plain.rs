//! The head in its plain, materialised form: it builds the whole logits matrix. Slow and heavy, and easy to check:
//! the oracle that faster heads are tested against. Knows no gRPC, no file and no backbone.
//!
//! Shapes: b rows of the micro-batch over all ranks, r rows of this rank, n classes of this shard, c classes of it
//! that take part in the step, d embedding.

use super::{
    Head, HeadConfig, HeadError, HeadOutput,
    margin::Margin,
    sampling::{ClassSampler, RandomNegatives},
};
use crate::{
    collective::{Collective, ReduceOp},
    optim::{self, Optimizer},
    random::{Purpose, normal},
};
use arcface_proto::types::ClassRange;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor, no_grad};

/// Smallest norm that a row is divided by (torch.nn.functional.normalize).
const MIN_NORM: f64 = 1e-12;
/// Smallest target probability in the loss, so that a loss is at most 69.08; does not cut the gradient.
const MIN_PROBABILITY: f64 = 1e-30;
/// Standard deviation of the initial weights.
const INIT_STD: f64 = 0.01;

/// Partial FC with materialised logits and a dense optimizer: rows that were not sampled are decayed and moved by
/// their momentum like the others, as in the reference.
pub struct PlainHead {
    shard: ClassRange,
    num_classes: u32,
    margin: Margin,
    sampler: Box<dyn ClassSampler>,
    weight_nd: Tensor,
    /// Accumulated since the last update; `None` before the first micro-batch.
    grad_nd: Option<Tensor>,
    optimizer: Box<dyn Optimizer>,
}

impl PlainHead {
    /// This rank's shard, with initial weights that depend on (seed, class, dimension) alone.
    ///
    /// # Panics
    /// If `rank >= world_size`.
    pub fn new(config: &HeadConfig, rank: u32, world_size: u32) -> Self {
        let sampler = RandomNegatives {
            seed: config.seed,
            rate: config.sample_rate,
        };
        Self::with_sampler(config, rank, world_size, Box::new(sampler))
    }

    /// The same with another choice of classes.
    ///
    /// # Panics
    /// If `rank >= world_size`.
    pub fn with_sampler(
        config: &HeadConfig,
        rank: u32,
        world_size: u32,
        sampler: Box<dyn ClassSampler>,
    ) -> Self {
        let shard = ClassRange::of_rank(config.num_classes, rank, world_size);
        let weight_nd = initial_weight(config.seed, shard, config.embedding_size);
        let optimizer = optim::build(config.optimizer, &[weight_nd.shallow_clone()]);
        Self {
            shard,
            num_classes: config.num_classes,
            margin: config.margin(),
            sampler,
            weight_nd,
            grad_nd: None,
            optimizer,
        }
    }

    /// `[n, d]`: the gradient kept for the next update, if there was a micro-batch since the last one.
    pub fn weight_grad(&self) -> Option<&Tensor> {
        self.grad_nd.as_ref()
    }

    /// Gathers the rows of all ranks: embeddings `[b, d]` and labels `[b]`, in rank order.
    fn gather(
        &self,
        comm: &mut dyn Collective,
        embedding_rd: &Tensor,
        labels_r: &Tensor,
        rows: &[u32],
    ) -> Result<(Tensor, Tensor), HeadError> {
        let embedding_bd = gather_rows(comm, &embedding_rd.to_kind(Kind::Float), rows)?;
        let labels_b = gather_rows(comm, &labels_r.to_kind(Kind::Int64), rows)?;
        Ok((embedding_bd, labels_b))
    }

    /// Refuses labels that are no class, naming the first; every rank sees the same rows and fails alike.
    fn check_labels(&self, labels: &[i64], rows: &[u32]) -> Result<(), HeadError> {
        let mut labels = labels.iter();
        for (rank, &rows_of_rank) in (0u32..).zip(rows) {
            for (row, &label) in (0..rows_of_rank).zip(&mut labels) {
                if !(0..i64::from(self.num_classes)).contains(&label) {
                    return Err(HeadError::LabelOutOfRange {
                        label,
                        rank,
                        row,
                        num_classes: self.num_classes,
                    });
                }
            }
        }
        Ok(())
    }

    /// The classes of this step (`None`: all), and for each row the column of its class among them, or -1.
    fn choose_classes(
        &mut self,
        step: u64,
        labels: &[i64],
    ) -> Result<(Option<Vec<u32>>, Vec<i64>), HeadError> {
        let shard = self.shard;
        let local = |label: i64| match u32::try_from(label) {
            Ok(class) if (shard.lo..shard.hi).contains(&class) => Some(class - shard.lo),
            _ => None,
        };
        let mut positives: Vec<u32> = labels.iter().filter_map(|&label| local(label)).collect();
        positives.sort_unstable();
        positives.dedup();
        let chosen = self.sampler.sample(step, shard, &positives);
        let Some(classes) = chosen else {
            let targets = labels.iter().map(|&label| local(label).map_or(-1, i64::from));
            return Ok((None, targets.collect()));
        };
        let fault = |detail: String| HeadError::Sampling { step, detail };
        if !classes.windows(2).all(|w| w[0] < w[1]) || classes.last().is_some_and(|&c| c >= shard.len()) {
            return Err(fault(format!(
                "classes are not rising indices below {}",
                shard.len()
            )));
        }
        let column = |label: i64| match local(label) {
            None => Ok(-1),
            Some(class) => match classes.binary_search(&class) {
                Ok(column) => Ok(column as i64),
                Err(_) => Err(fault(format!("class {label} of the batch was left out"))),
            },
        };
        let targets: Result<Vec<i64>, HeadError> = labels.iter().map(|&label| column(label)).collect();
        Ok((Some(classes), targets?))
    }

    /// Adds `share` times the gradient of the chosen rows.
    fn keep_gradient(&mut self, index_c: Option<&Tensor>, grad_cd: &Tensor, share: f64) {
        let grad_nd = self.grad_nd.get_or_insert_with(|| self.weight_nd.zeros_like());
        let grad_cd = grad_cd * share;
        match index_c {
            Some(index) => {
                let _ = grad_nd.index_add_(0, index, &grad_cd);
            }
            None => *grad_nd += grad_cd,
        }
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
        let embedding_size = self.weight_nd.size()[1];
        check_forms(comm, embedding, labels, rows, embedding_size)?;
        no_grad(|| {
            let batch: i64 = rows.iter().map(|&n| i64::from(n)).sum();
            if batch == 0 {
                return Ok(HeadOutput {
                    loss: 0.0,
                    grad_embedding: Tensor::zeros([0, embedding_size], (Kind::Float, Device::Cpu)),
                });
            }
            let (embedding_bd, labels_b) = self.gather(comm, embedding, labels, rows)?;
            let labels: Vec<i64> = to_vec(&labels_b);
            self.check_labels(&labels, rows)?;
            let (classes, targets) = self.choose_classes(step, &labels)?;
            let target_b = Tensor::from_slice(&targets);
            let index_c = classes
                .map(|classes| Tensor::from_slice(&classes.into_iter().map(i64::from).collect::<Vec<i64>>()));
            let weight_cd = match &index_c {
                Some(index) => self.weight_nd.index_select(0, index),
                None => self.weight_nd.shallow_clone(),
            };

            let (unit_bd, norm_b) = normalize(&embedding_bd);
            let (unit_cd, norm_c) = normalize(&weight_cd);
            let raw_bc = unit_bd.matmul(&unit_cd.tr());
            let cos_bc = raw_bc.clamp(-1.0, 1.0);
            let margined = self.margin.apply(&cos_bc, &target_b);

            let (loss, mut grad_bc) = cross_entropy(comm, margined.logits, &target_b)?;
            grad_bc *= margined.derivative;
            // The clamp passes no gradient where it cut; rounding puts cosines of equal directions there.
            grad_bc *= raw_bc.eq_tensor(&cos_bc);

            let grad_unit_cd = grad_bc.tr().matmul(&unit_bd);
            let grad_cd = normalize_backward(&grad_unit_cd, &unit_cd, &norm_c);
            self.keep_gradient(index_c.as_ref(), &grad_cd, share);

            // Through the normalisation only after the sum over shards: it is linear, and there are fewer rows.
            let grad_unit_rd = scatter_rows(comm, &grad_bc.matmul(&unit_cd), rows)?;
            let first: i64 = rows
                .iter()
                .take(comm.rank() as usize)
                .map(|&n| i64::from(n))
                .sum();
            let own = |all: &Tensor| all.narrow(0, first, embedding.size()[0]);
            let mut grad_embedding = normalize_backward(&grad_unit_rd, &own(&unit_bd), &own(&norm_b));
            grad_embedding *= share * f64::from(comm.world_size());
            Ok(HeadOutput { loss, grad_embedding })
        })
    }

    fn update(&mut self, lr: f64) {
        if let Some(grad_nd) = self.grad_nd.take() {
            self.optimizer
                .step(&[self.weight_nd.shallow_clone()], &[grad_nd], lr);
        }
    }

    fn discard(&mut self) {
        self.grad_nd = None;
    }

    fn updates(&self) -> u64 {
        self.optimizer.steps()
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        let buffers = self.optimizer.state().into_iter();
        let buffers = buffers.map(|(slot, tensors)| (slot.to_owned(), tensors[0].shallow_clone()));
        std::iter::once(("weight".to_owned(), self.weight_nd.shallow_clone()))
            .chain(buffers)
            .collect()
    }

    fn load_state(
        &mut self,
        updates: u64,
        rows: &mut dyn FnMut(&str) -> Option<Tensor>,
    ) -> Result<(), HeadError> {
        let weight_nd = rows("weight").ok_or_else(|| HeadError::MissingState {
            name: "weight".to_owned(),
        })?;
        check_form("head state weight", &weight_nd.size(), &self.weight_nd.size())?;
        no_grad(|| self.weight_nd.copy_(&weight_nd));
        self.grad_nd = None;
        Ok(self.optimizer.load_state(updates, &mut |slot, _| rows(slot))?)
    }
}

/// Mean cross-entropy over all rows, softmax over the columns of all ranks; and its gradient by this rank's logits.
/// Rows without a target here have target -1. The logits' memory becomes the gradient's.
fn cross_entropy(
    comm: &mut dyn Collective,
    logits_bc: Tensor,
    target_b: &Tensor,
) -> Result<(f64, Tensor), HeadError> {
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
    Ok((loss, p_bc))
}

/// Rows of length 1, and the norms `[rows, 1]` they were divided by.
fn normalize(rows: &Tensor) -> (Tensor, Tensor) {
    let norm = rows
        .norm_scalaropt_dim(2.0, [1].as_slice(), true)
        .clamp_min(MIN_NORM);
    (rows / &norm, norm)
}

/// Gradient by rows from the gradient by rows of length 1: its part across the row, divided by the norm. A row
/// under the smallest norm was divided by a constant, and has no part along it to take away.
fn normalize_backward(grad_unit: &Tensor, unit: &Tensor, norm: &Tensor) -> Tensor {
    let along = (grad_unit * unit).sum_dim_intlist([1].as_slice(), true, None::<Kind>);
    let along = along * norm.gt(MIN_NORM);
    (grad_unit - unit * along) / norm
}

/// `[rows[rank], ...]` of every rank to `[sum of rows, ...]`: padded to the longest, gathered, cut.
fn gather_rows(comm: &mut dyn Collective, local: &Tensor, rows: &[u32]) -> Result<Tensor, HeadError> {
    let longest = rows.iter().copied().max().unwrap_or(0);
    let gathered = comm.all_gather(&padded(local, longest))?;
    if rows.iter().all(|&n| n == longest) {
        return Ok(gathered);
    }
    let parts = (0i64..).zip(rows);
    let parts: Vec<Tensor> = parts
        .map(|(rank, &n)| gathered.narrow(0, rank * i64::from(longest), i64::from(n)))
        .collect();
    Ok(Tensor::cat(&parts, 0))
}

/// `[sum of rows, ...]` on every rank, summed; rank r gets its `rows[r]`.
fn scatter_rows(comm: &mut dyn Collective, all: &Tensor, rows: &[u32]) -> Result<Tensor, HeadError> {
    let longest = rows.iter().copied().max().unwrap_or(0);
    let lengths: Vec<i64> = rows.iter().map(|&n| i64::from(n)).collect();
    let parts: Vec<Tensor> = all
        .split_with_sizes(&lengths, 0)
        .iter()
        .map(|part| padded(part, longest))
        .collect();
    let own = comm.reduce_scatter(&Tensor::cat(&parts, 0).contiguous())?;
    let n = lengths.get(comm.rank() as usize).copied().unwrap_or(0);
    Ok(own.narrow(0, 0, n))
}

/// The rows with zero rows after them, contiguous.
fn padded(rows: &Tensor, length: u32) -> Tensor {
    let mut shape = rows.size();
    let missing = i64::from(length) - shape[0];
    if missing == 0 {
        return rows.contiguous();
    }
    shape[0] = missing;
    Tensor::cat(&[rows, &Tensor::zeros(&shape, (rows.kind(), rows.device()))], 0)
}

/// Normal draws counted by (class, dimension): the same weights at every world size.
fn initial_weight(seed: u64, shard: ClassRange, embedding_size: i64) -> Tensor {
    /// Rows drawn at a time: bounds the copy beside the weights.
    const BLOCK: usize = 16 * 1024;
    let weight_nd = Tensor::zeros(
        [i64::from(shard.len()), embedding_size],
        (Kind::Float, Device::Cpu),
    );
    let width = embedding_size.max(1) as usize;
    let classes: Vec<u32> = (shard.lo..shard.hi).collect();
    for (block, classes) in classes.chunks(BLOCK).enumerate() {
        let mut values = vec![0f32; classes.len() * width];
        values
            .par_chunks_mut(width)
            .zip(classes)
            .for_each(|(row, &class)| {
                for (dim, value) in (0u64..).zip(row) {
                    *value = (INIT_STD * normal(seed, Purpose::HeadInit, u64::from(class), dim)) as f32;
                }
            });
        let values = Tensor::from_slice(&values).view([-1, embedding_size]);
        let first = (block * BLOCK) as i64;
        weight_nd.narrow(0, first, classes.len() as i64).copy_(&values);
    }
    weight_nd
}

fn check_forms(
    comm: &dyn Collective,
    embedding: &Tensor,
    labels: &Tensor,
    rows: &[u32],
    embedding_size: i64,
) -> Result<(), HeadError> {
    check_form(
        "the list of rows",
        &[rows.len() as i64],
        &[i64::from(comm.world_size())],
    )?;
    let own = i64::from(rows[comm.rank() as usize]);
    check_form("embedding", &embedding.size(), &[own, embedding_size])?;
    check_form("labels", &labels.size(), &[own])
}

fn check_form(what: &str, got: &[i64], expected: &[i64]) -> Result<(), HeadError> {
    if got == expected {
        return Ok(());
    }
    Err(HeadError::Form {
        what: what.to_owned(),
        expected: format!("{expected:?}"),
        got: format!("{got:?}"),
    })
}

fn to_vec(tensor: &Tensor) -> Vec<i64> {
    let mut values = vec![0i64; tensor.numel()];
    tensor.copy_data(&mut values, tensor.numel());
    values
}

#[cfg(test)]
mod tests;
