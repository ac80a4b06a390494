// The update of weights from the gradient by rows of length 1: SGD with momentum and weight decay on the rows that took
// part, torch's form, where steps that a row has missed are made up for first (lazy_sgd.rs); and AdamW on all rows. A row is
// a block's.

#include "common.cuh"

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

// One step on the rows `chosen` (null: all). `gradient` [count, dim] is by the rows of length 1 of normalize.cu, `inverse`
// theirs. Its part along a row is taken away, unless the row is under the smallest norm: that was divided by a constant.
// `touched` is history.since, to write: the rows then have missed nothing up to the end of this step.
KERNEL head_sgd_rows(const float* gradient, const float* inverse, const u32* chosen, i64 count, i64 dim, float* weight,
                     float* momentum, History history, u32* touched, float lr, float mu, float decay) {
    for (i64 place = blockIdx.x; place < count; place += gridDim.x) {
        const i64 row = chosen == nullptr ? place : chosen[place];
        const float* g = gradient + place * dim;
        float* w = weight + row * dim;
        float* v = momentum + row * dim;
        const RowMap* missed = history.missed(row);
        const float factor = inverse[place];
        double product = 0.0;
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            const float now = missed == nullptr ? w[d] : missed->weight(w[d], v[d]);
            product += static_cast<double>(g[d]) * now;
        }
        product = block_sum(product);
        const float along =
            factor < LARGEST_INVERSE ? static_cast<float>(product * factor * factor) : 0.0f;
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            float old_w = w[d], old_v = v[d];
            if (missed != nullptr) {
                const float made_up = missed->weight(old_w, old_v);
                old_v = missed->momentum(old_w, old_v);
                old_w = made_up;
            }
            const float grad = fmaf(-along, old_w, g[d]) * factor;
            const float new_v = fmaf(mu, old_v, fmaf(decay, old_w, grad));
            v[d] = new_v;
            w[d] = fmaf(-lr, new_v, old_w);
        }
        // Every thread has read it: block_sum came between.
        if (touched != nullptr && threadIdx.x == 0) {
            touched[row] = history.now + 1;
        }
    }
}

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

// A step of AdamW on the rows `chosen` (null: all); the other arguments as those of head_sgd_rows.
KERNEL head_adamw_rows(const float* gradient, const float* inverse, const u32* chosen, i64 count, i64 dim,
                       float* weight, float* mean, float* mean_sq, AdamW step) {
    for (i64 place = blockIdx.x; place < count; place += gridDim.x) {
        const i64 row = chosen == nullptr ? place : chosen[place];
        const float* g = gradient + place * dim;
        float* w = weight + row * dim;
        const float factor = inverse[place];
        double product = 0.0;
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            product += static_cast<double>(g[d]) * w[d];
        }
        product = block_sum(product);
        const float along =
            factor < LARGEST_INVERSE ? static_cast<float>(product * factor * factor) : 0.0f;
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            const float grad = fmaf(-along, w[d], g[d]) * factor;
            step.apply(grad, w[d], mean[row * dim + d], mean_sq[row * dim + d]);
        }
    }
}

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
