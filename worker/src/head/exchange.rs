//! What every head does with the rows of its peers: gathering them, and giving each rank its own back. Rows are padded
//! to the longest rank's, as collectives want equal shapes.

use super::{HeadError, check_form};
use crate::collective::Collective;
use tch::Tensor;

/// Refuses a micro-batch of another form than the head was built for.
pub(super) fn check_forms(
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

/// `[rows[rank], ...]` of every rank to `[sum of rows, ...]`: padded to the longest, gathered, cut.
pub(super) fn gather_rows(
    comm: &mut dyn Collective,
    local: &Tensor,
    rows: &[u32],
) -> Result<Tensor, HeadError> {
    if let [_] = rows {
        return Ok(local.contiguous());
    }
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
pub(super) fn scatter_rows(
    comm: &mut dyn Collective,
    all: &Tensor,
    rows: &[u32],
) -> Result<Tensor, HeadError> {
    if let [_] = rows {
        return Ok(all.contiguous());
    }
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
