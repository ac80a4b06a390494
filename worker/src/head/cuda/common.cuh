// What all kernels of the head share. See mod.rs for the launch contract.
//
// The sources are read by two compilers: NVRTC, which brings no header files, and the host's C++ compiler with
// twin/device.h before them. So they include nothing of CUDA's, and use no warp intrinsics and no inline PTX: threads of a block
// meet in shared memory alone.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Threads of a block at most; a launch takes a power of two.
constexpr u32 MOST_THREADS = 256;

#define KERNEL extern "C" __global__ void __launch_bounds__(MOST_THREADS)

// Smallest norm that a row is divided by (torch.nn.functional.normalize), and what a row below it is multiplied by.
constexpr double MIN_NORM = 1e-12;
constexpr float LARGEST_INVERSE = static_cast<float>(1.0 / MIN_NORM);

// What a row whose squares add up to `squares` is multiplied by. Not fmax, which would hide a NaN.
__device__ inline double inverse_norm(double squares) {
    const double norm = sqrt(squares);
    return 1.0 / (norm < MIN_NORM ? MIN_NORM : norm);
}

// A number of 16 bits with the exponent of an f32. CUDA's own type needs a header.
struct Bf16 {
    u16 bits;
};

__device__ inline float load(const float* from, i64 at) { return from[at]; }
__device__ inline float load(const Bf16* from, i64 at) { return __uint_as_float(static_cast<u32>(from[at].bits) << 16); }

__device__ inline void store(float* to, i64 at, float value) { to[at] = value; }
// The nearest, ties to even; NaN stays NaN.
__device__ inline void store(Bf16* to, i64 at, float value) {
    const u32 bits = __float_as_uint(value);
    const u32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[at].bits = static_cast<u16>(value != value ? bits >> 16 | 0x40 : rounded);
}

// The sum of every thread's value, on all of them, always added in the same order. All threads of the block must come.
__device__ inline double block_sum(double value) {
    __shared__ double parts[MOST_THREADS];
    __syncthreads(); // the call before may still be reading
    parts[threadIdx.x] = value;
    __syncthreads();
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            parts[threadIdx.x] += parts[threadIdx.x + half];
        }
        __syncthreads();
    }
    return parts[0];
}

// The sum of the values of the threads before this one; `total` is that of all. All threads of the block must come.
__device__ inline u32 block_scan(u32 value, u32& total) {
    __shared__ u32 parts[MOST_THREADS];
    __syncthreads();
    parts[threadIdx.x] = value;
    __syncthreads();
    for (u32 step = 1; step < blockDim.x; step *= 2) {
        const u32 before = threadIdx.x >= step ? parts[threadIdx.x - step] : 0;
        __syncthreads();
        parts[threadIdx.x] += before;
        __syncthreads();
    }
    total = parts[blockDim.x - 1];
    return parts[threadIdx.x] - value;
}

// What SGD steps without a gradient make of a weight and its momentum (lazy_sgd.rs, `Map`), in single precision:
// w + (w_by_w - 1) * w + w_by_v * v and v_by_w * w + v_by_v * v.
struct RowMap {
    float w_by_w_less_1;
    float w_by_v;
    float v_by_w;
    float v_by_v;

    __device__ float weight(float w, float v) const { return fmaf(w_by_w_less_1, w, fmaf(w_by_v, v, w)); }
    __device__ float momentum(float w, float v) const { return fmaf(v_by_v, v, v_by_w * w); }
};

// The steps that rows may have missed (lazy_sgd.rs, `History`).
struct History {
    const u32* since;         // by row: `now` when it was touched last; null if no row ever misses a step
    const RowMap* products;   // element i: the maps of steps now - remembered + i .. now, multiplied
    u32 remembered;
    u32 now;

    // The map of all that the row has missed, or null; null too for a row that was touched in this step.
    __device__ const RowMap* missed(i64 row) const {
        if (since == nullptr || since[row] >= now) {
            return nullptr;
        }
        return products + (remembered - (now - since[row]));
    }
};

// An element of the class weights, as it is once what its row has missed is made up for.
__device__ inline float made_up(const RowMap* missed, const float* weight, const float* momentum, i64 at) {
    return missed == nullptr ? weight[at] : missed->weight(weight[at], momentum[at]);
}

// The first place of a rising list that is not below `value`.
__device__ inline i64 place_of(const u32* list, i64 count, i64 value) {
    i64 low = 0, high = count;
    while (low < high) {
        const i64 middle = (low + high) / 2;
        if (static_cast<i64>(list[middle]) < value) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}
