// The update of weights from the gradient by rows of length 1: SGD with momentum and weight decay on the rows that took
// part, torch's form, where steps that a row has missed are made up for first (lazy_sgd.rs); and AdamW on all rows. A row is
// a block's.

#include "history.cuh"

// The numbers of a step of AdamW, the same for all rows (tiled/kernel/rows.rs, `AdamWStep`).
struct AdamW {
    float keep;            // 1 - lr * weight decay
    float one_less_beta1;
    float beta2;
    float one_less_beta2;
    float rate;            // lr / (1 - beta1^t)
    float correction;      // 1 / sqrt(1 - beta2^t)
    float eps;

    __device__ void apply(float grad, float& w, float& mean, float& mean_sq) const {
        mean += (grad - mean) * one_less_beta1;
        mean_sq = fmaf(beta2, mean_sq, grad * grad * one_less_beta2);
        w = w * keep - rate * (mean / (sqrtf(mean_sq) * correction + eps));
    }
};

namespace {

// What a row's gradient has along the row, for each unit of the row: to be taken away.
template <class G>
__device__ float along_row(const G* g, const float* weight, const float* momentum, const RowMap* missed, i64 at, i64 dim,
                           float factor) {
    const i64 groups = whole_groups(dim, dim);
    double product = 0.0;
    for (i64 group = threadIdx.x; group < groups; group += blockDim.x) {
        float some[GROUP], w[GROUP];
        load_group(g + group * GROUP, some);
        made_up_group(missed, weight, momentum, at + group * GROUP, w);
        for (u32 i = 0; i < GROUP; ++i) {
            product += static_cast<double>(some[i]) * w[i];
        }
    }
    for (i64 d = groups * GROUP + threadIdx.x; d < dim; d += blockDim.x) {
        product += static_cast<double>(load(g, d)) * made_up(missed, weight, momentum, at + d);
    }
    product = block_sum(product);
    return factor < LARGEST_INVERSE ? static_cast<float>(product * factor * factor) : 0.0f;
}

template <class G>
__device__ void sgd_rows(const G* gradient, const float* inverse, const u32* chosen, i64 count, i64 dim, float* weight,
                         float* momentum, History history, u32* touched, float lr, float mu, float decay) {
    for (i64 place = blockIdx.x; place < count; place += gridDim.x) {
        const i64 row = chosen == nullptr ? place : chosen[place];
        const G* g = gradient + place * dim;
        float* w = weight + row * dim;
        float* v = momentum + row * dim;
        const RowMap* missed = history.missed(row);
        const float factor = inverse[place];
        const float along = along_row(g, weight, momentum, missed, row * dim, dim, factor);
        const auto step = [&](float raw, float& one_w, float& one_v) {
            if (missed != nullptr) {
                const float made_up = missed->weight(one_w, one_v);
                one_v = missed->momentum(one_w, one_v);
                one_w = made_up;
            }
            const float grad = fmaf(-along, one_w, raw) * factor;
            one_v = fmaf(mu, one_v, fmaf(decay, one_w, grad));
            one_w = fmaf(-lr, one_v, one_w);
        };
        const i64 groups = whole_groups(dim, dim);
        for (i64 group = threadIdx.x; group < groups; group += blockDim.x) {
            const i64 at = group * GROUP;
            float some[GROUP], some_w[GROUP], some_v[GROUP];
            load_group(g + at, some);
            load_group(w + at, some_w);
            load_group(v + at, some_v);
            for (u32 i = 0; i < GROUP; ++i) {
                step(some[i], some_w[i], some_v[i]);
            }
            store_group(v + at, some_v);
            store_group(w + at, some_w);
        }
        for (i64 d = groups * GROUP + threadIdx.x; d < dim; d += blockDim.x) {
            step(load(g, d), w[d], v[d]);
        }
        // Every thread has read it: block_sum came between.
        if (touched != nullptr && threadIdx.x == 0) {
            touched[row] = history.now + 1;
        }
    }
}

template <class G>
__device__ void adamw_rows(const G* gradient, const float* inverse, const u32* chosen, i64 count, i64 dim, float* weight,
                           float* mean, float* mean_sq, AdamW step) {
    for (i64 place = blockIdx.x; place < count; place += gridDim.x) {
        const i64 row = chosen == nullptr ? place : chosen[place];
        const G* g = gradient + place * dim;
        float* w = weight + row * dim;
        const float factor = inverse[place];
        const float along = along_row(g, weight, nullptr, nullptr, row * dim, dim, factor);
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            const float grad = fmaf(-along, w[d], load(g, d)) * factor;
            step.apply(grad, w[d], mean[row * dim + d], mean_sq[row * dim + d]);
        }
    }
}

} // namespace

// One step on the rows `chosen` (null: all). `gradient` [count, dim] is by the rows of length 1 of normalize.cu, `inverse`
// theirs. Its part along a row is taken away, unless the row is under the smallest norm: that was divided by a constant.
// `touched` is history.since, to write: the rows then have missed nothing up to the end of this step.
#define SGD_ROWS(NAME, TYPE)                                                                                      \
    KERNEL NAME(const TYPE* gradient, const float* inverse, const u32* chosen, i64 count, i64 dim, float* weight, \
                float* momentum, History history, u32* touched, float lr, float mu, float decay) {                \
        sgd_rows(gradient, inverse, chosen, count, dim, weight, momentum, history, touched, lr, mu, decay);       \
    }
SGD_ROWS(head_sgd_rows_f32, float)
SGD_ROWS(head_sgd_rows_bf16, Bf16)

// Makes up for what rows have missed that were touched before `before`, without a step of their own: for checkpoints, and
// before steps are forgotten.
KERNEL head_make_up_rows(i64 rows, i64 dim, float* weight, float* momentum, History history, u32* touched, u32 before) {
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const RowMap* missed = touched[row] < before ? history.missed(row) : nullptr;
        __syncthreads(); // all have read when it was touched
        if (missed == nullptr) { // on every thread of the block
            continue;
        }
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            float& w = weight[row * dim + d];
            float& v = momentum[row * dim + d];
            const float made_up = missed->weight(w, v);
            v = missed->momentum(w, v);
            w = made_up;
        }
        if (threadIdx.x == 0) {
            touched[row] = history.now;
        }
    }
}

// A step of AdamW on the rows `chosen` (null: all); the other arguments as those of head_sgd_rows_*.
#define ADAMW_ROWS(NAME, TYPE)                                                                                    \
    KERNEL NAME(const TYPE* gradient, const float* inverse, const u32* chosen, i64 count, i64 dim, float* weight, \
                float* mean, float* mean_sq, AdamW step) {                                                        \
        adamw_rows(gradient, inverse, chosen, count, dim, weight, mean, mean_sq, step);                           \
    }
ADAMW_ROWS(head_adamw_rows_f32, float)
ADAMW_ROWS(head_adamw_rows_bf16, Bf16)

// The same step on the rows that are not `taken`, whose gradient is 0.
KERNEL head_adamw_idle_rows(const u8* taken, i64 rows, i64 dim, float* weight, float* mean, float* mean_sq,
                            AdamW step) {
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        if (taken[row]) { // on every thread of the block
            continue;
        }
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            const i64 at = row * dim + d;
            step.apply(0.0f, weight[at], mean[at], mean_sq[at]);
        }
    }
}
