// Rows of length 1 from embeddings and from class weights, what they were multiplied by, and the way of a gradient back
// through it.
//
// A row is a block's. Sums are taken in double precision: reading the row takes longer.

#include "history.cuh"

namespace {

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
        const auto value = [&](i64 d) { return made_up(missed, weight, momentum, row * dim + d); };
        const i64 groups = whole_groups(dim, dim);
        float some[GROUP];
        double squares = 0.0;
        for (i64 group = threadIdx.x; group < groups; group += blockDim.x) {
            made_up_group(missed, weight, momentum, row * dim + group * GROUP, some);
            for (u32 i = 0; i < GROUP; ++i) {
                squares += static_cast<double>(some[i]) * some[i];
            }
        }
        for (i64 d = groups * GROUP + threadIdx.x; d < dim; d += blockDim.x) {
            const double w = value(d);
            squares += w * w;
        }
        const double factor = inverse_norm(block_sum(squares));
        Out* out = unit + place * dim;
        for (i64 group = threadIdx.x; group < groups; group += blockDim.x) {
            made_up_group(missed, weight, momentum, row * dim + group * GROUP, some);
            for (u32 i = 0; i < GROUP; ++i) {
                some[i] = static_cast<float>(some[i] * factor);
            }
            store_group(out + group * GROUP, some);
        }
        for (i64 d = groups * GROUP + threadIdx.x; d < dim; d += blockDim.x) {
            store(out, d, static_cast<float>(value(d) * factor));
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

// The gradient by embeddings from that by their rows of length 1: its part across the row, divided by the norm, unless the
// row is under the smallest norm: that was divided by a constant. To it comes, along the row, the gradient by the norm of
// losses that have one (null: none): `each` * ((p - 1) * the target logit's derivative + that of the loss's own term). All
// times `factor`.
KERNEL head_embedding_gradient(const float* gradient_unit, const float* unit, const double* norm,
                               const double* probability, const double* logit_by_norm, const double* term_by_norm,
                               i64 rows, i64 dim, double each, double factor, float* gradient) {
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const float* g = gradient_unit + row * dim;
        const float* x = unit + row * dim;
        double along = 0.0;
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            along += static_cast<double>(g[d]) * x[d];
        }
        along = block_sum(along);
        const bool tiny = norm[row] < MIN_NORM;
        const double divisor = tiny ? MIN_NORM : norm[row];
        double by_norm = 0.0;
        if (logit_by_norm != nullptr) {
            by_norm = each * ((probability[row] - 1.0) * logit_by_norm[row] + term_by_norm[row]);
        }
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            const double across = (g[d] - (tiny ? 0.0 : x[d] * along)) / divisor;
            gradient[row * dim + d] = static_cast<float>((across + x[d] * by_norm) * factor);
        }
    }
}
