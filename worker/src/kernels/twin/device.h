// What CUDA gives a kernel, for the host's compiler: the kernels then run on the CPU, for tests. A block's threads are
// fibres of one thread of the host, which change at barriers (twin.cpp).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
// One copy for all fibres of a block; blocks run one after the other.
#define __shared__ static thread_local
#define __launch_bounds__(threads)

struct Index {
    uint32_t x;
};
extern thread_local Index threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();

inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Rounded each for itself: the compiler is told not to contract (build.rs).
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }

// Fibres do not interrupt each other.
inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
    const uint32_t old = *at;
    *at += value;
    return old;
}
