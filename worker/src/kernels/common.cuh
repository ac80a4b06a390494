// What all kernels of the head share. See mod.rs for the launch contract.
//
// The sources are read by two compilers: NVRTC, which brings no header files, and the host's C++ compiler with
// twin/device.h before them. So they include nothing of CUDA's, and use no warp intrinsics: threads of a block meet in shared
// memory alone. The two instructions that have no name in C++ are here, each with what it computes in the other compiler.
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

// 2^x for x in [-1, 1], to a last place or two.
#ifdef __CUDACC__
__device__ inline float exp2_near_0(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#else
inline float exp2_near_0(float x) { return exp2f(x); }
#endif

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

// Two of them in a word, as `store` rounds; GPUs since the A100 have an instruction for it.
__device__ inline u32 two_bf16(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    Bf16 two[2];
    store(two, 0, low);
    store(two, 1, high);
    return two[0].bits | static_cast<u32>(two[1].bits) << 16;
#endif
}

// Neighbouring numbers that one thread reads and writes at once, 16 bytes at a time.
constexpr u32 GROUP = 8;

struct alignas(16) Quad {
    u32 words[4];
};

__device__ inline void load_group(const float* from, float (&to)[GROUP]) {
    const Quad* quads = reinterpret_cast<const Quad*>(from);
    const Quad low = quads[0], high = quads[1];
    for (u32 i = 0; i < 4; ++i) {
        to[i] = __uint_as_float(low.words[i]);
        to[i + 4] = __uint_as_float(high.words[i]);
    }
}

__device__ inline void load_group(const Bf16* from, float (&to)[GROUP]) {
    const Quad quad = *reinterpret_cast<const Quad*>(from);
    for (u32 i = 0; i < 4; ++i) {
        to[2 * i] = __uint_as_float(quad.words[i] << 16);
        to[2 * i + 1] = __uint_as_float(quad.words[i] & 0xffff0000u);
    }
}

__device__ inline void store_group(float* to, const float (&from)[GROUP]) {
    Quad quads[2];
    for (u32 i = 0; i < GROUP; ++i) {
        quads[i / 4].words[i % 4] = __float_as_uint(from[i]);
    }
    reinterpret_cast<Quad*>(to)[0] = quads[0];
    reinterpret_cast<Quad*>(to)[1] = quads[1];
}

__device__ inline void store_group(Bf16* to, const float (&from)[GROUP]) {
    Quad quad;
    for (u32 i = 0; i < 4; ++i) {
        quad.words[i] = two_bf16(from[2 * i], from[2 * i + 1]);
    }
    *reinterpret_cast<Quad*>(to) = quad;
}

// Groups of a row of `count` numbers where rows are `stride` apart; none where they do not begin at whole groups. What is left
// of a row is read number by number.
__device__ inline i64 whole_groups(i64 count, i64 stride) { return stride % GROUP == 0 ? count / GROUP : 0; }

// Where in a group of a row its number `at` is; GROUP if it is not in it.
__device__ inline u32 place_in_group(i64 at, i64 group) {
    const i64 place = at - group * GROUP;
    return place >= 0 && place < GROUP ? static_cast<u32>(place) : GROUP;
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
