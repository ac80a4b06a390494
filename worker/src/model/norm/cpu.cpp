// The arithmetic of norm.cu on the CPU: y = r(z) + s with z = (x - mean) * inverse * weight + bias, where r is a rectifier with one
// slope a channel or nothing, s a shortcut or nothing. What lies between them is neither written nor rounded, and z is computed
// again on the way back.

#include "cpu.h"

#include "../native/rows.h"

#include <cmath>
#include <functional>

namespace arcface {
namespace {

using at::Tensor;

// Activations that are worth a thread.
constexpr int64_t NUMBERS_OF_THREAD = 1 << 15;

// What x becomes, by channel: (x - middle) * by + plus. Far from 0 nothing else is exact.
struct Affine {
    const float *middle, *by, *plus;
};

// Numbers of neighbouring channels, as wide as the widest registers; where they are narrower, the compiler takes several.
constexpr int64_t LANES = 16;
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t BitLanes __attribute__((vector_size(LANES * sizeof(float))));
typedef Bf16 Bf16Lanes __attribute__((vector_size(LANES * sizeof(Bf16))));

PART_OF_IT void load(const float* from, float& to) { to = *from; }
PART_OF_IT void load(const Bf16* from, float& to) { to = widen(*from); }
PART_OF_IT void load(const float* from, Lanes& to) { std::memcpy(&to, from, sizeof to); }
PART_OF_IT void load(const Bf16* from, Lanes& to) {
    Bf16Lanes bits;
    std::memcpy(&bits, from, sizeof bits);
    to = (Lanes)(__builtin_convertvector(bits, BitLanes) << 16);
}

PART_OF_IT void store(float value, float* to) { *to = value; }
PART_OF_IT void store(float value, Bf16* to) { narrow(value, *to); }
PART_OF_IT void store(Lanes value, float* to) { std::memcpy(to, &value, sizeof value); }
// As narrow() does.
PART_OF_IT void store(Lanes value, Bf16* to) {
    const BitLanes bits = (BitLanes)value;
    const BitLanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const BitLanes nan = BitLanes{} + 0x7fc0u;
    const Bf16Lanes narrowed = __builtin_convertvector(value == value ? rounded : nan, Bf16Lanes);
    std::memcpy(to, &narrowed, sizeof narrowed);
}

// Calls `each(lanes, first channel, first number)` for all numbers of a matrix, from its beginning to its end.
template <typename Each>
PART_OF_IT void for_lanes(int64_t rows, int64_t channels, Each each) {
    for (int64_t row = 0, at = 0; row < rows; ++row, at += channels) {
        int64_t c = 0;
        for (; c + LANES <= channels; c += LANES) {
            each(Lanes{}, c, at + c);
        }
        for (; c < channels; ++c) {
            each(0.0f, c, at + c);
        }
    }
}

// As a value, or added to one.
template <typename L, typename T>
PART_OF_IT L loaded(const T* from) {
    L value;
    load(from, value);
    return value;
}
template <typename L>
PART_OF_IT void add(L value, float* to) {
    store(loaded<L>(to) + value, to);
}

// Sums of x - middle and of its square, [2, channels].
template <typename T>
PART_OF_IT void moments_of(const T* x, const float* middle, float* sums, int64_t rows, int64_t channels) {
    for_lanes(rows, channels, [=](auto lanes, int64_t c, int64_t at) __attribute__((always_inline)) {
        using L = decltype(lanes);
        const L distance = loaded<L>(x + at) - loaded<L>(middle + c);
        add(distance, sums + c);
        add(distance * distance, sums + channels + c);
    });
}

template <typename T, bool RECTIFIES, bool ADDS>
PART_OF_IT void apply_to(const T* x, Affine a, const float* slope, const T* shortcut, T* y, int64_t rows,
                         int64_t channels) {
    for_lanes(rows, channels, [=](auto lanes, int64_t c, int64_t at) __attribute__((always_inline)) {
        using L = decltype(lanes);
        const L distance = loaded<L>(x + at) - loaded<L>(a.middle + c);
        L z = distance * loaded<L>(a.by + c) + loaded<L>(a.plus + c);
        if (RECTIFIES) {
            z = z > 0.0f ? z : z * loaded<L>(slope + c);
        }
        if (ADDS) {
            z += loaded<L>(shortcut + at);
        }
        store(z, y + at);
    });
}

// Sums of the gradient by z, of it times x - mean, and of that by the slope, [3, channels].
template <typename T, bool RECTIFIES>
PART_OF_IT void back_sums_of(const T* x, const T* grad, Affine a, const float* slope, float* sums, int64_t rows,
                             int64_t channels) {
    for_lanes(rows, channels, [=](auto lanes, int64_t c, int64_t at) __attribute__((always_inline)) {
        using L = decltype(lanes);
        L g = loaded<L>(grad + at);
        const L distance = loaded<L>(x + at) - loaded<L>(a.middle + c);
        if (RECTIFIES) {
            const L z = distance * loaded<L>(a.by + c) + loaded<L>(a.plus + c);
            add(z > 0.0f ? L{} : g * z, sums + 2 * channels + c);
            g = z > 0.0f ? g : g * loaded<L>(slope + c);
        }
        add(g, sums + c);
        add(g * distance, sums + channels + c);
    });
}

// The gradient by x, which adds (x - mean) * line[0] + line[1] to it through mean and variance.
template <typename T, bool RECTIFIES>
PART_OF_IT void back_apply_to(const T* x, const T* grad, Affine a, const float* slope, const float* line, T* grad_x,
                              int64_t rows, int64_t channels) {
    for_lanes(rows, channels, [=](auto lanes, int64_t c, int64_t at) __attribute__((always_inline)) {
        using L = decltype(lanes);
        L g = loaded<L>(grad + at);
        const L distance = loaded<L>(x + at) - loaded<L>(a.middle + c), by = loaded<L>(a.by + c);
        if (RECTIFIES) {
            g = distance * by + loaded<L>(a.plus + c) > 0.0f ? g : g * loaded<L>(slope + c);
        }
        store(g * by + (distance * loaded<L>(line + c) + loaded<L>(line + channels + c)), grad_x + at);
    });
}

// For both kinds of activations: functions for every CPU are no templates.
#define FUNCTIONS(T)                                                                                                  \
    FOR_EVERY_CPU                                                                                                     \
    void moments(const T* x, const float* middle, float* sums, int64_t rows, int64_t channels) {                      \
        moments_of(x, middle, sums, rows, channels);                                                                  \
    }                                                                                                                 \
    FOR_EVERY_CPU                                                                                                     \
    void apply(const T* x, Affine a, const float* slope, const T* shortcut, T* y, int64_t rows, int64_t channels) {   \
        if (slope != nullptr) {                                                                                       \
            apply_to<T, true, false>(x, a, slope, shortcut, y, rows, channels);                                       \
        } else if (shortcut != nullptr) {                                                                             \
            apply_to<T, false, true>(x, a, slope, shortcut, y, rows, channels);                                       \
        } else {                                                                                                      \
            apply_to<T, false, false>(x, a, slope, shortcut, y, rows, channels);                                      \
        }                                                                                                             \
    }                                                                                                                 \
    FOR_EVERY_CPU                                                                                                     \
    void back_sums(const T* x, const T* grad, Affine a, const float* slope, float* sums, int64_t rows,                \
                   int64_t channels) {                                                                                \
        if (slope != nullptr) {                                                                                       \
            back_sums_of<T, true>(x, grad, a, slope, sums, rows, channels);                                           \
        } else {                                                                                                      \
            back_sums_of<T, false>(x, grad, a, slope, sums, rows, channels);                                          \
        }                                                                                                             \
    }                                                                                                                 \
    FOR_EVERY_CPU                                                                                                     \
    void back_apply(const T* x, const T* grad, Affine a, const float* slope, const float* line, T* grad_x,            \
                    int64_t rows, int64_t channels) {                                                                 \
        if (slope != nullptr) {                                                                                       \
            back_apply_to<T, true>(x, grad, a, slope, line, grad_x, rows, channels);                                  \
        } else {                                                                                                      \
            back_apply_to<T, false>(x, grad, a, slope, line, grad_x, rows, channels);                                 \
        }                                                                                                             \
    }
FUNCTIONS(float)
FUNCTIONS(Bf16)

// Rows of a matrix that threads walk through.
template <typename Walk>
void walk_rows(int64_t rows, int64_t channels, Walk walk) {
    const int64_t grain = std::max<int64_t>(1, NUMBERS_OF_THREAD / channels);
    at::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) { walk(first * channels, last - first); });
}

const float* maybe(const Tensor& t) { return t.defined() ? numbers<float>(t) : nullptr; }

AlignedFloats scales(const Tensor& inverse, const Tensor& weight) {
    AlignedFloats by(weight.numel());
    std::transform(numbers<float>(inverse), numbers<float>(inverse) + weight.numel(), numbers<float>(weight), by.data(),
                   std::multiplies<float>());
    return by;
}

template <typename T>
void forward(const NormForward& f, double eps, double momentum) {
    const int64_t channels = f.weight.numel(), rows = f.x.numel() / channels;
    const T* x = numbers<T>(f.x);
    // Any row is near enough to the mean for the squares of what is left.
    AlignedFloats middle(channels);
    std::transform(x, x + channels, middle.data(), [](T value) { return widen(value); });
    const std::vector<double> sums = sum_rows(rows, 2 * channels, [&](int64_t first, int64_t count, float* sum) {
        moments(x + first * channels, middle.data(), sum, count, channels);
    });
    float *mean = numbers_to_write<float>(f.mean), *inverse = numbers_to_write<float>(f.inverse);
    for (int64_t c = 0; c < channels; ++c) {
        const double count = static_cast<double>(rows), distance = sums[c] / count;
        const double spread = sums[channels + c] / count - distance * distance;
        // Rounding may make it less than nothing; NaN stays NaN, which std::max would hide.
        const double variance = spread < 0.0 ? 0.0 : spread;
        mean[c] = static_cast<float>(middle.data()[c] + distance);
        inverse[c] = static_cast<float>(1.0 / std::sqrt(variance + eps));
        if (f.running_mean.defined()) {
            float& running_mean = numbers_to_write<float>(f.running_mean)[c];
            float& running_var = numbers_to_write<float>(f.running_var)[c];
            const double unbiased = variance * count / (count - 1.0);
            running_mean = static_cast<float>((1.0 - momentum) * running_mean + momentum * mean[c]);
            running_var = static_cast<float>((1.0 - momentum) * running_var + momentum * unbiased);
        }
    }
    AlignedFloats by = scales(f.inverse, f.weight);
    const Affine affine{mean, by.data(), numbers<float>(f.bias)};
    const T* shortcut = f.shortcut.defined() ? numbers<T>(f.shortcut) : nullptr;
    T* y = numbers_to_write<T>(f.y);
    walk_rows(rows, channels, [&](int64_t at, int64_t count) {
        apply(x + at, affine, maybe(f.slope), shortcut == nullptr ? nullptr : shortcut + at, y + at, count, channels);
    });
}

template <typename T>
void backward(const NormBackward& b) {
    const int64_t channels = b.weight.numel(), rows = b.x.numel() / channels;
    const T *x = numbers<T>(b.x), *grad = numbers<T>(b.grad);
    const float *inverse = numbers<float>(b.inverse), *weight = numbers<float>(b.weight), *slope = maybe(b.slope);
    AlignedFloats by = scales(b.inverse, b.weight);
    const Affine affine{numbers<float>(b.mean), by.data(), numbers<float>(b.bias)};
    const std::vector<double> sums = sum_rows(rows, 3 * channels, [&](int64_t first, int64_t count, float* sum) {
        back_sums(x + first * channels, grad + first * channels, affine, slope, sum, count, channels);
    });
    // What x adds to its own gradient through mean and variance: (x - mean) * line[0] + line[1].
    AlignedFloats line(2 * channels);
    for (int64_t c = 0; c < channels; ++c) {
        const double sum = sums[c], by_x = sums[channels + c], scale = inverse[c], count = static_cast<double>(rows);
        numbers_to_write<float>(b.grad_weight)[c] = static_cast<float>(by_x * scale);
        numbers_to_write<float>(b.grad_bias)[c] = static_cast<float>(sum);
        if (slope != nullptr) {
            numbers_to_write<float>(b.grad_slope)[c] = static_cast<float>(sums[2 * channels + c]);
        }
        line.data()[c] = static_cast<float>(-weight[c] * scale * scale * scale * by_x / count);
        line.data()[channels + c] = static_cast<float>(-weight[c] * scale * sum / count);
    }
    T* grad_x = numbers_to_write<T>(b.grad_x);
    walk_rows(rows, channels, [&](int64_t at, int64_t count) {
        back_apply(x + at, grad + at, affine, slope, line.data(), grad_x + at, count, channels);
    });
}

// Pointers know no lengths: what the loops above take for granted.
void check(const Tensor& x, std::initializer_list<const Tensor*> like_x, std::initializer_list<const Tensor*> by_channel) {
    const auto innermost = [](const Tensor& t) { return t.permute({0, 2, 3, 1}).is_contiguous(); };
    TORCH_CHECK(x.dim() == 4 && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16) && innermost(x),
                "activations of ", x.scalar_type(), " ", x.sizes(), " with strides ", x.strides());
    for (const Tensor* t : like_x) {
        TORCH_CHECK(!t->defined() || (t->sizes() == x.sizes() && t->scalar_type() == x.scalar_type() && innermost(*t)),
                    "beside activations of ", x.scalar_type(), " ", x.sizes(), " are ", t->scalar_type(), " ", t->sizes());
    }
    for (const Tensor* t : by_channel) {
        TORCH_CHECK(!t->defined() || (t->scalar_type() == at::kFloat && t->is_contiguous() && t->numel() == x.size(1)),
                    "for ", x.size(1), " channels are ", t->scalar_type(), " ", t->sizes());
    }
}

} // namespace

void NormForward::compute(double eps, double momentum) const {
    check(x, {&shortcut, &y}, {&weight, &bias, &slope, &running_mean, &running_var, &mean, &inverse});
    x.scalar_type() == at::kFloat ? forward<float>(*this, eps, momentum) : forward<Bf16>(*this, eps, momentum);
}

void NormBackward::compute() const {
    check(x, {&grad, &grad_x}, {&mean, &inverse, &weight, &bias, &slope, &grad_weight, &grad_bias, &grad_slope});
    x.scalar_type() == at::kFloat ? backward<float>(*this) : backward<Bf16>(*this);
}

} // namespace arcface
