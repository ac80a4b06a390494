// Rows of length 1 from embeddings and from class weights, and what they were multiplied by.
//
// A row is a block's. Sums are taken in double precision: reading the row takes longer.

#include "common.cuh"

namespace {

// What a row whose squares add up to `squares` is multiplied by. Not fmax, which would hide a NaN.
__device__ double inverse_norm(double squares) {
    const double norm = sqrt(squares);
    return 1.0 / (norm < MIN_NORM ? MIN_NORM : norm);
}

template <class In, class Out>
__device__ void normalize_rows(const In* rows, i64 count, i64 dim, Out* unit, float* inverse, double* norm) {
    for (i64 row = blockIdx.x; row < count; row += gridDim.x) {
        const In* in = rows + row * dim;
        double squares = 0.0;
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            const double x = load(in, d);
            squares += x * x;
        }
        squares = block_sum(squares);
        const double factor = inverse_norm(squares);
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            store(unit + row * dim, d, static_cast<float>(load(in, d) * factor));
        }
        if (threadIdx.x == 0) {
            inverse[row] = static_cast<float>(factor);
            norm[row] = sqrt(squares);
        }
    }
}

template <class Out>
__device__ void normalize_weights(const float* weight, const float* momentum, History history, const u32* chosen,
                                  i64 count, i64 dim, Out* unit, float* inverse) {
    for (i64 place = blockIdx.x; place < count; place += gridDim.x) {
        const i64 row = chosen == nullptr ? place : chosen[place];
        const RowMap* missed = history.missed(row);
        const auto value = [&](i64 d) {
            const float w = weight[row * dim + d];
            return missed == nullptr ? w : missed->weight(w, momentum[row * dim + d]);
        };
        double squares = 0.0;
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            const double w = value(d);
            squares += w * w;
        }
        const double factor = inverse_norm(block_sum(squares));
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            store(unit + place * dim, d, static_cast<float>(value(d) * factor));
        }
        if (threadIdx.x == 0) {
            inverse[place] = static_cast<float>(factor);
        }
    }
}

} // namespace

// [count, dim] rows to rows of length 1; by row 1 / norm, and the norm itself (which some losses look at).
#define NORMALIZE_ROWS(NAME, IN, OUT)                                                                             \
    KERNEL NAME(const IN* rows, i64 count, i64 dim, OUT* unit, float* inverse, double* norm) {                    \
        normalize_rows(rows, count, dim, unit, inverse, norm);                                                    \
    }
NORMALIZE_ROWS(head_normalize_rows_f32_f32, float, float)
NORMALIZE_ROWS(head_normalize_rows_f32_bf16, float, Bf16)
NORMALIZE_ROWS(head_normalize_rows_bf16_f32, Bf16, float)
NORMALIZE_ROWS(head_normalize_rows_bf16_bf16, Bf16, Bf16)

// The same for the rows `chosen` (null: all) of the class weights, as they are once missed steps are made up for. Neither
// weights nor momentum change: a step that is skipped leaves no trace.
#define NORMALIZE_WEIGHTS(NAME, OUT)                                                                              \
    KERNEL NAME(const float* weight, const float* momentum, History history, const u32* chosen, i64 count,        \
                i64 dim, OUT* unit, float* inverse) {                                                             \
        normalize_weights(weight, momentum, history, chosen, count, dim, unit, inverse);                          \
    }
NORMALIZE_WEIGHTS(head_normalize_weights_f32, float)
NORMALIZE_WEIGHTS(head_normalize_weights_bf16, Bf16)
