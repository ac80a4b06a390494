// Batch norm with what follows it on the CPU, forward and back: what kernels.rs does on a GPU.
#pragma once

#include <ATen/ATen.h>

namespace arcface {

// Activations are [N, C, H, W] in f32 or bf16, dense with their channels innermost; all else is [C] f32. Undefined: there is none.
struct NormForward {
    const at::Tensor &x, &weight, &bias, &slope, &shortcut, &running_mean, &running_var;
    // Written.
    const at::Tensor &mean, &inverse, &y;

    void compute(double eps, double momentum) const;
};

struct NormBackward {
    const at::Tensor &x, &grad, &mean, &inverse, &weight, &bias, &slope;
    // Written.
    const at::Tensor &grad_weight, &grad_bias, &grad_slope, &grad_x;

    void compute() const;
};

} // namespace arcface
