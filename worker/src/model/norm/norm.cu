// Batch norm of what a batch says of itself, with the rectifier or the sum that follows it in the same pass over memory, and the
// way back through both.
//
// Ioffe and Szegedy, "Batch Normalization", 2015; He et al., "Delving Deep into Rectifiers", 2015 (PReLU). Here y = r(z) + s
// with z = (x - mean) * deviation^-1 * weight + bias; r is a rectifier with one slope a channel or nothing, s a
// shortcut or nothing.
//
// Matrices are [rows, channels], an image batch with its channels innermost. Channels come in groups of 8, which one thread
// reads at once; the groups are a power of two. Rows are cut into chunks, and sums over all rows are the sums of
// the chunks' sums, always in the same order.

#include "common.cuh"

namespace {

// How a block's threads lie over a part of the matrix: `wide` of them along a row, `high` rows at once.
struct Layout {
    u32 groups; // of a row
    u32 wide;
    u32 high;

    __device__ explicit Layout(i64 channels)
        : groups(static_cast<u32>(channels / GROUP)), wide(groups < blockDim.x ? groups : blockDim.x),
          high(blockDim.x / wide) {}
    __device__ u32 group() const { return threadIdx.x % wide; }
    __device__ u32 row() const { return threadIdx.x / wide; }
};

// The sums of `values` over the threads that have the same channels; right on the first row of threads. All threads must come.
__device__ inline void add_rows(float (&values)[GROUP], const Layout& layout) {
    __shared__ float parts[GROUP * MOST_THREADS];
    __syncthreads(); // the call before may still be reading
    for (u32 i = 0; i < GROUP; ++i) {
        parts[i * blockDim.x + threadIdx.x] = values[i];
    }
    __syncthreads();
    for (u32 half = layout.high / 2; half > 0; half /= 2) {
        if (layout.row() < half) {
            for (u32 i = 0; i < GROUP; ++i) {
                parts[i * blockDim.x + threadIdx.x] += parts[i * blockDim.x + threadIdx.x + half * layout.wide];
            }
        }
        __syncthreads();
    }
    for (u32 i = 0; i < GROUP; ++i) {
        values[i] = parts[i * blockDim.x + threadIdx.x];
    }
}

// What a row of x becomes, for a thread's channels: z = (x - middle) * by + plus. Far from 0 nothing else is exact.
struct Affine {
    float middle[GROUP];
    float by[GROUP];
    float plus[GROUP];

    __device__ Affine(const float* mean, const float* inverse, const float* weight, const float* bias, i64 first) {
        float scale[GROUP];
        load_group(mean + first, middle);
        load_group(inverse + first, scale);
        load_group(weight + first, by);
        load_group(bias + first, plus);
        for (u32 i = 0; i < GROUP; ++i) {
            by[i] *= scale[i];
        }
    }
    __device__ float of(u32 i, float x) const { return fmaf(x - middle[i], by[i], plus[i]); }
};

__device__ inline void load_slopes(const float* slope, i64 first, float (&to)[GROUP]) {
    if (slope != nullptr) {
        load_group(slope + first, to);
        return;
    }
    for (u32 i = 0; i < GROUP; ++i) {
        to[i] = 1.0f;
    }
}

template <class T>
__device__ void moments(const T* __restrict__ x, i64 rows, i64 channels, i64 chunks, float* __restrict__ sums) {
    const Layout layout(channels);
    for (i64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const i64 end = rows * (chunk + 1) / chunks;
        for (u32 group = layout.group(); group < layout.groups; group += layout.wide) {
            const i64 first = static_cast<i64>(group) * GROUP;
            float origin[GROUP], sum[GROUP] = {}, squares[GROUP] = {}, value[GROUP];
            // Far from 0, squares of what is left after the first row lose nothing.
            load_group(x + first, origin);
#pragma unroll 4
            for (i64 row = rows * chunk / chunks + layout.row(); row < end; row += layout.high) {
                load_group(x + row * channels + first, value);
                for (u32 i = 0; i < GROUP; ++i) {
                    const float left = value[i] - origin[i];
                    sum[i] += left;
                    squares[i] = fmaf(left, left, squares[i]);
                }
            }
            add_rows(sum, layout);
            add_rows(squares, layout);
            if (layout.row() == 0) {
                store_group(sums + (2 * chunk) * channels + first, sum);
                store_group(sums + (2 * chunk + 1) * channels + first, squares);
            }
        }
    }
}

template <class T>
__device__ void apply(const T* __restrict__ x, const float* __restrict__ mean, const float* __restrict__ inverse, const float* __restrict__ weight, const float* __restrict__ bias,
                      const float* __restrict__ slope, const T* __restrict__ shortcut, i64 rows, i64 channels, T* __restrict__ y) {
    const Layout layout(channels);
    for (u32 group = layout.group(); group < layout.groups; group += layout.wide) {
        const i64 first = static_cast<i64>(group) * GROUP;
        const Affine affine(mean, inverse, weight, bias, first);
        float slopes[GROUP], value[GROUP], added[GROUP] = {};
        load_slopes(slope, first, slopes);
#pragma unroll 4
        for (i64 row = static_cast<i64>(blockIdx.x) * layout.high + layout.row(); row < rows;
             row += static_cast<i64>(gridDim.x) * layout.high) {
            const i64 at = row * channels + first;
            load_group(x + at, value);
            if (shortcut != nullptr) {
                load_group(shortcut + at, added);
            }
            for (u32 i = 0; i < GROUP; ++i) {
                const float z = affine.of(i, value[i]);
                value[i] = (z > 0.0f ? z : z * slopes[i]) + added[i];
            }
            store_group(y + at, value);
        }
    }
}

template <class T>
__device__ void back_sums(const T* __restrict__ x, const T* __restrict__ grad, const float* __restrict__ mean, const float* __restrict__ inverse, const float* __restrict__ weight,
                          const float* __restrict__ bias, const float* __restrict__ slope, i64 rows, i64 channels, i64 chunks, float* __restrict__ sums) {
    const Layout layout(channels);
    for (i64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const i64 end = rows * (chunk + 1) / chunks;
        for (u32 group = layout.group(); group < layout.groups; group += layout.wide) {
            const i64 first = static_cast<i64>(group) * GROUP;
            const Affine affine(mean, inverse, weight, bias, first);
            float slopes[GROUP], value[GROUP], g[GROUP];
            float sum[GROUP] = {}, by_x[GROUP] = {}, by_slope[GROUP] = {};
            load_slopes(slope, first, slopes);
#pragma unroll 4
            for (i64 row = rows * chunk / chunks + layout.row(); row < end; row += layout.high) {
                const i64 at = row * channels + first;
                load_group(x + at, value);
                load_group(grad + at, g);
                for (u32 i = 0; i < GROUP; ++i) {
                    const float z = affine.of(i, value[i]);
                    const bool passes = z > 0.0f;
                    by_slope[i] += passes ? 0.0f : g[i] * z;
                    const float by_z = passes ? g[i] : g[i] * slopes[i];
                    sum[i] += by_z;
                    by_x[i] = fmaf(by_z, value[i] - affine.middle[i], by_x[i]);
                }
            }
            add_rows(sum, layout);
            add_rows(by_x, layout);
            add_rows(by_slope, layout);
            if (layout.row() == 0) {
                store_group(sums + (3 * chunk) * channels + first, sum);
                store_group(sums + (3 * chunk + 1) * channels + first, by_x);
                store_group(sums + (3 * chunk + 2) * channels + first, by_slope);
            }
        }
    }
}

template <class T>
__device__ void back_apply(const T* __restrict__ x, const T* __restrict__ grad, const float* __restrict__ mean, const float* __restrict__ inverse, const float* __restrict__ weight,
                           const float* __restrict__ bias, const float* __restrict__ slope, const float* __restrict__ line, i64 rows, i64 channels,
                           T* __restrict__ grad_x) {
    const Layout layout(channels);
    for (u32 group = layout.group(); group < layout.groups; group += layout.wide) {
        const i64 first = static_cast<i64>(group) * GROUP;
        const Affine affine(mean, inverse, weight, bias, first);
        float slopes[GROUP], by[GROUP], plus[GROUP], value[GROUP], g[GROUP];
        load_slopes(slope, first, slopes);
        load_group(line + first, by);
        load_group(line + channels + first, plus);
#pragma unroll 4
        for (i64 row = static_cast<i64>(blockIdx.x) * layout.high + layout.row(); row < rows;
             row += static_cast<i64>(gridDim.x) * layout.high) {
            const i64 at = row * channels + first;
            load_group(x + at, value);
            load_group(grad + at, g);
            for (u32 i = 0; i < GROUP; ++i) {
                const bool passes = affine.of(i, value[i]) > 0.0f;
                const float by_z = passes ? g[i] : g[i] * slopes[i];
                g[i] = fmaf(by_z, affine.by[i], fmaf(value[i] - affine.middle[i], by[i], plus[i]));
            }
            store_group(grad_x + at, g);
        }
    }
}

// Channels whose chunks a block adds up, side by side.
constexpr u32 SIDE_BY_SIDE = 8;
// Chunks that a thread asks for before it adds the first: memory answers late.
constexpr u32 AHEAD = 4;

// From sums by chunk, [chunks, N, channels], to those of all chunks; right on the first row of threads. Channels that there
// are not have 0. All threads must come.
template <u32 N>
__device__ void add_chunks(const float* __restrict__ sums, i64 channel, i64 channels, i64 chunks, u32 wide,
                           double (&total)[N]) {
    __shared__ double parts[MOST_THREADS];
    const i64 high = blockDim.x / wide;
    i64 chunk = channel < channels ? threadIdx.x / wide : chunks;
    for (u32 n = 0; n < N; ++n) {
        total[n] = 0.0;
    }
    for (; chunk + (AHEAD - 1) * high < chunks; chunk += AHEAD * high) {
        float some[AHEAD][N];
        for (u32 i = 0; i < AHEAD; ++i) {
            for (u32 n = 0; n < N; ++n) {
                some[i][n] = sums[((chunk + i * high) * N + n) * channels + channel];
            }
        }
        for (u32 i = 0; i < AHEAD; ++i) {
            for (u32 n = 0; n < N; ++n) {
                total[n] += some[i][n];
            }
        }
    }
    for (; chunk < chunks; chunk += high) {
        for (u32 n = 0; n < N; ++n) {
            total[n] += sums[(chunk * N + n) * channels + channel];
        }
    }
    for (u32 n = 0; n < N; ++n) {
        __syncthreads(); // the sum before may still be read
        parts[threadIdx.x] = total[n];
        __syncthreads();
        for (u32 half = high / 2; half > 0; half /= 2) {
            if (threadIdx.x / wide < half) {
                parts[threadIdx.x] += parts[threadIdx.x + half * wide];
            }
            __syncthreads();
        }
        total[n] = parts[threadIdx.x];
    }
}

} // namespace

// By chunk and channel, [chunks, 2, channels], the sum of what x has more than its first row, and of its squares.
#define NORM_MOMENTS(NAME, TYPE)                                                                                  \
    KERNEL NAME(const TYPE* x, i64 rows, i64 channels, i64 chunks, float* sums) {                                 \
        moments(x, rows, channels, chunks, sums);                                                                 \
    }
NORM_MOMENTS(norm_moments_f32, float)
NORM_MOMENTS(norm_moments_bf16, Bf16)

namespace {

template <class T>
__device__ void finish_moments(const float* sums, const T* x, i64 rows, i64 channels, i64 chunks, double eps,
                               double momentum, float* mean, float* inverse, float* running_mean,
                               float* running_var) {
    const u32 wide = blockDim.x < SIDE_BY_SIDE ? blockDim.x : SIDE_BY_SIDE;
    const i64 blocks = (channels + wide - 1) / wide;
    for (i64 block = blockIdx.x; block < blocks; block += gridDim.x) {
        const i64 channel = block * wide + threadIdx.x % wide;
        double totals[2];
        add_chunks(sums, channel, channels, chunks, wide, totals);
        if (channel >= channels || threadIdx.x >= wide) {
            continue;
        }
        const auto [sum, squares] = totals;
        const double count = static_cast<double>(rows);
        const double left = sum / count;
        const double center = load(x, channel) + left;
        const double spread = squares / count - left * left;
        const double variance = spread < 0.0 ? 0.0 : spread; // NaN stays NaN
        mean[channel] = static_cast<float>(center);
        inverse[channel] = static_cast<float>(1.0 / sqrt(variance + eps));
        if (running_mean != nullptr) {
            const double unbiased = variance * count / (count - 1.0);
            running_mean[channel] += static_cast<float>(momentum * (center - running_mean[channel]));
            running_var[channel] += static_cast<float>(momentum * (unbiased - running_var[channel]));
        }
    }
}

} // namespace

// From these sums the mean and 1 / sqrt(variance + eps) by channel, with the biased variance. The running statistics, where
// they are not null, move by `momentum` towards the mean and the unbiased variance.
#define NORM_FINISH_MOMENTS(NAME, TYPE)                                                                           \
    KERNEL NAME(const float* sums, const TYPE* x, i64 rows, i64 channels, i64 chunks, double eps,                 \
                double momentum, float* mean, float* inverse, float* running_mean, float* running_var) {          \
        finish_moments(sums, x, rows, channels, chunks, eps, momentum, mean, inverse, running_mean, running_var); \
    }
NORM_FINISH_MOMENTS(norm_finish_moments_f32, float)
NORM_FINISH_MOMENTS(norm_finish_moments_bf16, Bf16)

// y = r(z) + s; `slope` and `shortcut` may be null.
#define NORM_APPLY(NAME, TYPE)                                                                                    \
    KERNEL NAME(const TYPE* x, const float* mean, const float* inverse, const float* weight, const float* bias,   \
                const float* slope, const TYPE* shortcut, i64 rows, i64 channels, TYPE* y) {                      \
        apply(x, mean, inverse, weight, bias, slope, shortcut, rows, channels, y);                                \
    }
NORM_APPLY(norm_apply_f32, float)
NORM_APPLY(norm_apply_bf16, Bf16)

// By chunk and channel, [chunks, 3, channels], the sums of the gradient by z, of it times x - mean, and of that by the slope.
#define NORM_BACK_SUMS(NAME, TYPE)                                                                                \
    KERNEL NAME(const TYPE* x, const TYPE* grad, const float* mean, const float* inverse, const float* weight,    \
                const float* bias, const float* slope, i64 rows, i64 channels, i64 chunks, float* sums) {         \
        back_sums(x, grad, mean, inverse, weight, bias, slope, rows, channels, chunks, sums);                     \
    }
NORM_BACK_SUMS(norm_back_sums_f32, float)
NORM_BACK_SUMS(norm_back_sums_bf16, Bf16)

// From these sums the gradients by weight, bias and slope (null: none), and what x adds to its own gradient through mean and
// variance, [2, channels]: (x - mean) * line[0] + line[1].
KERNEL norm_finish_back(const float* sums, const float* inverse, const float* weight, i64 rows,
                        i64 channels, i64 chunks, float* grad_weight, float* grad_bias, float* grad_slope,
                        float* line) {
    const u32 wide = blockDim.x < SIDE_BY_SIDE ? blockDim.x : SIDE_BY_SIDE;
    const i64 blocks = (channels + wide - 1) / wide;
    for (i64 block = blockIdx.x; block < blocks; block += gridDim.x) {
        const i64 channel = block * wide + threadIdx.x % wide;
        double totals[3];
        add_chunks(sums, channel, channels, chunks, wide, totals);
        if (channel >= channels || threadIdx.x >= wide) {
            continue;
        }
        const auto [sum, by_x, by_slope] = totals;
        const double scale = inverse[channel];
        const double by = -weight[channel] * scale * scale * scale * by_x / static_cast<double>(rows);
        grad_weight[channel] = static_cast<float>(by_x * scale);
        grad_bias[channel] = static_cast<float>(sum);
        if (grad_slope != nullptr) {
            grad_slope[channel] = static_cast<float>(by_slope);
        }
        line[channel] = static_cast<float>(by);
        line[channels + channel] =
            static_cast<float>(-weight[channel] * scale * sum / static_cast<double>(rows));
    }
}

// The gradient by x; that by the shortcut is `grad` itself.
#define NORM_BACK_APPLY(NAME, TYPE)                                                                               \
    KERNEL NAME(const TYPE* x, const TYPE* grad, const float* mean, const float* inverse, const float* weight,    \
                const float* bias, const float* slope, const float* line, i64 rows, i64 channels, TYPE* grad_x) { \
        back_apply(x, grad, mean, inverse, weight, bias, slope, line, rows, channels, grad_x);                    \
    }
NORM_BACK_APPLY(norm_back_apply_f32, float)
NORM_BACK_APPLY(norm_back_apply_bf16, Bf16)
