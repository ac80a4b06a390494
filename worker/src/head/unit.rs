//! Rows of length 1, and the way of a gradient through their making. The same for every head.

use tch::{Kind, Tensor};

/// Smallest norm that a row is divided by (torch.nn.functional.normalize).
pub(super) const MIN_NORM: f64 = 1e-12;

/// Rows of length 1, and the norms `[rows, 1]` they were divided by.
pub(super) fn normalize(rows: &Tensor) -> (Tensor, Tensor) {
    let norm = rows
        .norm_scalaropt_dim(2.0, [1].as_slice(), true)
        .clamp_min(MIN_NORM);
    (rows / &norm, norm)
}

/// Gradient by rows from the gradient by rows of length 1: its part across the row, divided by the norm. A row
/// under the smallest norm was divided by a constant, and has no part along it to take away.
pub(super) fn normalize_backward(grad_unit: &Tensor, unit: &Tensor, norm: &Tensor) -> Tensor {
    let along = (grad_unit * unit).sum_dim_intlist([1].as_slice(), true, None::<Kind>);
    let along = along * norm.gt(MIN_NORM);
    (grad_unit - unit * along) / norm
}
