// The way back through a rectifier with one slope a channel, in one pass over memory. libtorch's own writes the slope's
// gradient for every element and then sums it.

#include "rows.h"

#include <torch/csrc/autograd/custom_function.h>

#include <cstdio>
#include <exception>

namespace {

using namespace arcface;
using at::Tensor;

template <typename T>
PART_OF_IT void rows_of(const T* __restrict x, const T* __restrict grad, const float* __restrict slope,
                        T* __restrict grad_x, float* __restrict sum, int64_t rows, int64_t channels) {
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = 0; c < channels; ++c) {
            const float g = widen(grad[c]);
            const float v = widen(x[c]);
            const bool passes = v > 0.0f;
            T scaled;
            narrow(g * slope[c], scaled);
            grad_x[c] = passes ? grad[c] : scaled;
            sum[c] += passes ? 0.0f : g * v;
        }
        x += channels;
        grad += channels;
        grad_x += channels;
    }
}

FOR_EVERY_CPU
void back_rows(const float* x, const float* grad, const float* slope, float* grad_x, float* sum, int64_t rows,
               int64_t channels) {
    rows_of(x, grad, slope, grad_x, sum, rows, channels);
}

FOR_EVERY_CPU
void back_rows(const Bf16* x, const Bf16* grad, const float* slope, Bf16* grad_x, float* sum, int64_t rows,
               int64_t channels) {
    rows_of(x, grad, slope, grad_x, sum, rows, channels);
}

// [N, C] or [N, C, H, W] as rows of C numbers.
Tensor as_rows(const Tensor& t) {
    return t.dim() == 4 ? t.contiguous(at::MemoryFormat::ChannelsLast) : t.contiguous();
}

// Gradients of x (its kind) and of the slope [C] (f32).
template <typename T>
std::pair<Tensor, Tensor> back(const Tensor& x, const Tensor& grad, const Tensor& slope) {
    const int64_t channels = slope.numel();
    Tensor grad_x = at::empty_like(x);
    const T *x_data = numbers<T>(x), *grad_data = numbers<T>(grad);
    T* grad_x_data = numbers_to_write<T>(grad_x);
    const float* slope_data = numbers<float>(slope);
    const int64_t rows = channels == 0 ? 0 : x.numel() / channels;
    const std::vector<double> sums = sum_rows(rows, channels, [&](int64_t first, int64_t count, float* sum) {
        const int64_t at = first * channels;
        back_rows(x_data + at, grad_data + at, slope_data, grad_x_data + at, sum, count, channels);
    });
    Tensor grad_slope = at::empty({channels}, slope.options());
    std::copy(sums.begin(), sums.end(), numbers_to_write<float>(grad_slope));
    return {grad_x, grad_slope};
}

struct PRelu : torch::autograd::Function<PRelu> {
    static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& slope) {
        ctx->save_for_backward({x, slope});
        return at::prelu(x, slope.to(x.scalar_type()));
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                   torch::autograd::variable_list grads) {
        const auto saved = ctx->get_saved_variables();
        const Tensor x = as_rows(saved[0]);
        const Tensor grad = as_rows(grads[0]);
        const Tensor slope = saved[1].contiguous();
        auto [grad_x, grad_slope] =
            x.scalar_type() == at::kFloat ? back<float>(x, grad, slope) : back<Bf16>(x, grad, slope);
        return {grad_x, grad_slope};
    }
};

}  // namespace

// A new tensor, or null with the reason in `error` (of `length` bytes, ended by 0).
extern "C" void* arcface_prelu(const void* x, const void* slope, char* error, size_t length) {
    try {
        const Tensor& input = *static_cast<const Tensor*>(x);
        const Tensor& slopes = *static_cast<const Tensor*>(slope);
        TORCH_CHECK(input.scalar_type() == at::kFloat || input.scalar_type() == at::kBFloat16, "input is ",
                    input.scalar_type());
        TORCH_CHECK(slopes.scalar_type() == at::kFloat && slopes.dim() == 1, "slopes are not [C] f32");
        TORCH_CHECK((input.dim() == 2 || input.dim() == 4) && input.size(1) == slopes.numel(), "input is ",
                    input.sizes());
        return new Tensor(PRelu::apply(input, slopes));
    } catch (const std::exception& exception) {
        std::snprintf(error, length, "%s", exception.what());
        return nullptr;
    }
}
