// Rows of class weights that may have missed steps, and what they are once these are made up for.
#pragma once

#include "common.cuh"

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

__device__ inline void made_up_group(const RowMap* missed, const float* weight, const float* momentum, i64 at,
                                     float (&to)[GROUP]) {
    load_group(weight + at, to);
    if (missed != nullptr) {
        float v[GROUP];
        load_group(momentum + at, v);
        for (u32 i = 0; i < GROUP; ++i) {
            to[i] = missed->weight(to[i], v[i]);
        }
    }
}
