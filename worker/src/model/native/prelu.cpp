// The way back through a rectifier with one slope a channel, in one pass over memory. libtorch's own writes the slope's
// gradient for every element and then sums it.
//
// Sums are taken over fixed chunks of rows, whatever the number of threads: the same bits on every machine of a kind.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

namespace {

using at::Tensor;

// Chunks whose sums are added in order.
constexpr int64_t CHUNKS = 64;
// Rows that are summed in f32 before they enter a sum in f64.
constexpr int64_t BLOCK = 256;

// One function for each instruction set that matters; the loader takes the best that the machine has.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_CPU
#endif

FOR_EVERY_CPU
void rows_f32(const float* __restrict x, const float* __restrict grad, const float* __restrict slope,
              float* __restrict grad_x, float* __restrict sum, int64_t rows, int64_t channels) {
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = 0; c < channels; ++c) {
            const float g = grad[c];
            const float v = x[c];
            const bool passes = v > 0.0f;
            grad_x[c] = passes ? g : g * slope[c];
            sum[c] += passes ? 0.0f : g * v;
        }
        x += channels;
        grad += channels;
        grad_x += channels;
    }
}

inline float widen(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return value == value ? static_cast<uint16_t>(rounded) : static_cast<uint16_t>(0x7fc0u);
}

FOR_EVERY_CPU
void rows_bf16(const uint16_t* __restrict x, const uint16_t* __restrict grad, const float* __restrict slope,
               uint16_t* __restrict grad_x, float* __restrict sum, int64_t rows, int64_t channels) {
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = 0; c < channels; ++c) {
            const float g = widen(grad[c]);
            const float v = widen(x[c]);
            const bool passes = v > 0.0f;
            grad_x[c] = passes ? grad[c] : narrow(g * slope[c]);
            sum[c] += passes ? 0.0f : g * v;
        }
        x += channels;
        grad += channels;
        grad_x += channels;
    }
}

// [N, C] or [N, C, H, W] as rows of C numbers.
Tensor as_rows(const Tensor& t) {
    return t.dim() == 4 ? t.contiguous(at::MemoryFormat::ChannelsLast) : t.contiguous();
}

// Gradients of x (its kind) and of the slope [C] (f32).
template <typename T, typename Rows>
std::pair<Tensor, Tensor> back(const Tensor& x, const Tensor& grad, const Tensor& slope, Rows rows_of) {
    const int64_t channels = slope.numel();
    const int64_t rows = channels == 0 ? 0 : x.numel() / channels;
    Tensor grad_x = at::empty_like(x);
    const int64_t chunks = std::min(CHUNKS, rows);
    std::vector<double> sums(chunks * channels, 0.0);
    const T* x_data = static_cast<const T*>(x.const_data_ptr());
    const T* grad_data = static_cast<const T*>(grad.const_data_ptr());
    T* grad_x_data = static_cast<T*>(grad_x.mutable_data_ptr());
    const float* slope_data = slope.const_data_ptr<float>();
    at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
        std::vector<float> block(channels);
        for (int64_t chunk = first; chunk < last; ++chunk) {
            const int64_t end = rows * (chunk + 1) / chunks;
            double* sum = sums.data() + chunk * channels;
            for (int64_t row = rows * chunk / chunks; row < end; row += BLOCK) {
                std::fill(block.begin(), block.end(), 0.0f);
                const int64_t at = row * channels;
                rows_of(x_data + at, grad_data + at, slope_data, grad_x_data + at, block.data(),
                        std::min(BLOCK, end - row), channels);
                for (int64_t c = 0; c < channels; ++c) {
                    sum[c] += block[c];
                }
            }
        }
    });
    Tensor grad_slope = at::empty({channels}, slope.options());
    float* grad_slope_data = grad_slope.mutable_data_ptr<float>();
    for (int64_t c = 0; c < channels; ++c) {
        double sum = 0.0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            sum += sums[chunk * channels + c];
        }
        grad_slope_data[c] = static_cast<float>(sum);
    }
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
        auto [grad_x, grad_slope] = x.scalar_type() == at::kFloat
                                        ? back<float>(x, grad, slope, rows_f32)
                                        : back<uint16_t>(x, grad, slope, rows_bf16);
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
