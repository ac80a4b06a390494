// From a cosine to its term of the softmax: clamp, what the loss does to other classes, exponential. The arithmetic of
// tiled/kernel/exponentials.rs.
//
// A logit z is taken in base 2, z * log2(e), and its term is 2^(that - shift) with a whole `shift` per sample, so that the
// shift costs no rounding and no maximum is needed before the sum.
#pragma once

#include "history.cuh"

// Adding it to an f32 below 2^22 rounds to whole numbers, which then stand in the low bits of the sum.
constexpr float ROUND = 12582912.0f; // 1.5 * 2^23
// Terms below this power of two count as 0.
constexpr float SMALLEST = -110.0f;
constexpr double LOG2_E = 1.4426950408889634;
constexpr double LN_2 = 0.6931471805599453;

// What the loss does to the cosines of samples with other classes than their own.
struct Others {
    float scale_log2;         // the logits' scale times log2(e)
    float scale_rest;         // what that lost in rounding
    float zero_above;         // cosines above it become logit 0 with derivative 0 (interclass filtering); infinite: off
    float t;                  // of the hard ones
    const float* hard_above;  // by sample: cosines above it become cos * (t + cos) (CurricularFace); null: none
    const float* shift;       // by sample, whole numbers
};

// Derivative and logit over the scale.
struct Logit {
    float value;
    float slope;
};

// The same for one sample.
struct OthersOfSample {
    float scale_log2;
    float scale_rest;
    float zero_above;
    float t;
    float hard_above;  // infinite: none is hard
    float shift;

    __device__ OthersOfSample(const Others& others, i64 sample)
        : scale_log2(others.scale_log2), scale_rest(others.scale_rest), zero_above(others.zero_above), t(others.t),
          hard_above(others.hard_above == nullptr ? __uint_as_float(0x7f800000u) : others.hard_above[sample]),
          shift(others.shift[sample]) {}
};

__device__ inline Logit logit_of(const OthersOfSample& others, float cosine) {
    if (cosine > others.zero_above) {
        return {0.0f, 0.0f};
    }
    if (cosine > others.hard_above) {
        return {cosine * (others.t + cosine), others.t + 2.0f * cosine};
    }
    return {cosine, 1.0f};
}

// Within [-1, 1]; NaN stays NaN.
__device__ inline float clamped(float raw) {
    const float low = raw < -1.0f ? -1.0f : raw;
    return low > 1.0f ? 1.0f : low;
}

// 2^(logit * scale * log2(e) - shift), 0 below 2^SMALLEST; NaN stays NaN. No factor is rounded away: the product is split
// into a whole number and a fraction, and what the scale lost is added to that.
__device__ inline float term_of(const OthersOfSample& others, float logit) {
    const float whole = __fsub_rn(__fadd_rn(__fmul_rn(logit, others.scale_log2), ROUND), ROUND);
    const float fraction = fmaf(logit, others.scale_rest, fmaf(logit, others.scale_log2, -whole));
    const float exponent = whole - others.shift;
    if (exponent < SMALLEST) {
        return 0.0f;
    }
    const u32 power = __float_as_uint(exponent + ROUND) - __float_as_uint(ROUND);
    return exp2_near_0(fraction) * __uint_as_float((power + 127) << 23);
}
