// Passes over activations as rows of channels, and sums over all rows.
//
// Sums are taken over fixed chunks of rows, whatever the number of threads: the same bits on every machine of a kind.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// One function for each instruction set that matters; the loader takes the best that the machine has.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_CPU
#endif
// What such a function is made of has to become part of it.
#define PART_OF_IT __attribute__((always_inline)) inline

namespace arcface {

// Bits of a bf16.
using Bf16 = uint16_t;

PART_OF_IT float widen(float value) { return value; }

PART_OF_IT float widen(Bf16 bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

PART_OF_IT void narrow(float value, float& to) { to = value; }

// To the nearest, ties to even; NaN stays NaN.
PART_OF_IT void narrow(float value, Bf16& to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to = value == value ? static_cast<Bf16>(rounded) : static_cast<Bf16>(0x7fc0u);
}

// Chunks whose sums are added in order.
constexpr int64_t CHUNKS = 64;
// Rows that are summed in f32 before they enter a sum in f64.
constexpr int64_t BLOCK = 256;

// Numbers that begin where a line of the cache does: what lies across two of them is read and written slowly.
class AlignedFloats {
  public:
    explicit AlignedFloats(int64_t count) : numbers_(at::empty({count}, at::kFloat)) {}
    float* data() { return static_cast<float*>(numbers_.mutable_data_ptr()); }

  private:
    at::Tensor numbers_;
};

// `count` sums over all rows, which `add(first, rows, sums)` adds up for some of them.
template <typename Add>
std::vector<double> sum_rows(int64_t rows, int64_t count, Add add) {
    const int64_t chunks = std::min(CHUNKS, rows);
    std::vector<double> sums(chunks * count, 0.0);
    at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
        AlignedFloats block(count);
        for (int64_t chunk = first; chunk < last; ++chunk) {
            const int64_t end = rows * (chunk + 1) / chunks;
            double* sum = sums.data() + chunk * count;
            for (int64_t row = rows * chunk / chunks; row < end; row += BLOCK) {
                std::fill_n(block.data(), count, 0.0f);
                add(row, std::min(BLOCK, end - row), block.data());
                for (int64_t i = 0; i < count; ++i) {
                    sum[i] += block.data()[i];
                }
            }
        }
    });
    std::vector<double> total(count, 0.0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int64_t i = 0; i < count; ++i) {
            total[i] += sums[chunk * count + i];
        }
    }
    return total;
}

template <typename T>
const T* numbers(const at::Tensor& t) {
    return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* numbers_to_write(const at::Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
}

} // namespace arcface
