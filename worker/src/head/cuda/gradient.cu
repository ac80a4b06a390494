// The backward half of the softmax: from sums to the factors of the gradient, the gradient of embeddings from the tiles'
// products, and the gradient by the cosines of a tile, from which a product makes that of its weights.

#include "terms.cuh"

namespace {

template <class T>
__device__ void softmax_gradient(T* cosines, i64 stride, i64 samples, i64 columns, i64 first, const i64* target,
                                 Others others, const float* factor, const float* target_gradient) {
    for (i64 sample = blockIdx.x; sample < samples; sample += gridDim.x) {
        T* row = cosines + sample * stride;
        const i64 own = target[sample] - first;
        const OthersOfSample of_sample(others, sample);
        const float times = factor[sample], of_own = target_gradient[sample];
        const auto gradient = [&](bool is_own, float raw) {
            if (is_own) {
                return of_own;
            }
            const Logit logit = logit_of(of_sample, clamped(raw));
            // No gradient flows through the clamp where it cut; NaN is not beyond it.
            return fabsf(raw) > 1.0f ? 0.0f : term_of(of_sample, logit.value) * times * logit.slope;
        };
        const i64 groups = whole_groups(columns, stride);
        for (i64 group = threadIdx.x; group < groups; group += blockDim.x) {
            float some[GROUP];
            load_group(row + group * GROUP, some);
            const u32 own_here = place_in_group(own, group);
            for (u32 i = 0; i < GROUP; ++i) {
                some[i] = gradient(i == own_here, some[i]);
            }
            store_group(row + group * GROUP, some);
        }
        for (i64 column = groups * GROUP + threadIdx.x; column < columns; column += blockDim.x) {
            store(row, column, gradient(column == own, load(row, column)));
        }
    }
}

template <class T>
__device__ void drop_columns(T* gradient, i64 stride, i64 samples, i64 columns, const u32* rows, const u32* chosen,
                             i64 count) {
    const i64 all = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 column = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; column < columns; column += all) {
        const i64 place = place_of(chosen, count, rows[column]);
        if (place < count && chosen[place] == rows[column]) {
            continue;
        }
        for (i64 sample = 0; sample < samples; ++sample) {
            store(gradient, sample * stride + column, 0.0f);
        }
    }
}

} // namespace

// From the sums over all ranks to what the tiles' gradient takes, by sample: the loss -ln p of its own class, cut at
// `min_probability`, which does not cut the gradient; p; the factor that turns terms into the gradient by cosines
// (scale * share / (samples * sum)); and the gradient by the cosine with its own class. `share` is the micro-batch's weight
// in the update. A thread a sample.
KERNEL head_softmax_rows(const double* sums, const double* target_logit, const double* by_cosine, const float* shift,
                         i64 samples, double scale, double share, double min_probability, double* loss,
                         double* probability, float* factor, float* target_gradient) {
    const i64 all = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 sample = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; sample < samples; sample += all) {
        const double log_p = target_logit[sample] - shift[sample] * LN_2 - log(sums[sample]);
        const double least = log(min_probability);
        const double p = exp(log_p);
        const double each = share / static_cast<double>(samples);
        loss[sample] = -(log_p < least ? least : log_p); // not fmax, which would hide a NaN
        probability[sample] = p;
        factor[sample] = static_cast<float>(each * scale / sums[sample]);
        target_gradient[sample] = static_cast<float>((p - 1.0) * each * by_cosine[sample]);
    }
}

// The gradient of embeddings of length 1 in the place of the tiles' sums of rows weighted by terms: that times the sample's
// `factor`, and the part of its own class where that is row `local` of this shard (-1: on another rank).
KERNEL head_finish_embeddings(float* gradient, const float* factor, const float* target_gradient, const i64* local,
                              i64 samples, i64 dim, const float* weight, const float* momentum, History history) {
    for (i64 sample = blockIdx.x; sample < samples; sample += gridDim.x) {
        float* out = gradient + sample * dim;
        const i64 row = local[sample];
        if (row < 0) { // on every thread of the block
            for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
                out[d] *= factor[sample];
            }
            continue;
        }
        const RowMap* missed = history.missed(row);
        double squares = 0.0;
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            const double w = made_up(missed, weight, momentum, row * dim + d);
            squares += w * w;
        }
        const double own = target_gradient[sample] * inverse_norm(block_sum(squares));
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            const double others = static_cast<double>(out[d]) * factor[sample];
            out[d] = static_cast<float>(others + own * made_up(missed, weight, momentum, row * dim + d));
        }
    }
}

// (p - onehot) / samples times d logit / d cosine in the place of a tile of cosines as in softmax.cu.
#define SOFTMAX_GRADIENT(NAME, TYPE)                                                                              \
    KERNEL NAME(TYPE* cosines, i64 stride, i64 samples, i64 columns, i64 first, const i64* target,                \
                Others others, const float* factor, const float* target_gradient) {                               \
        softmax_gradient(cosines, stride, samples, columns, first, target, others, factor, target_gradient);      \
    }
SOFTMAX_GRADIENT(head_softmax_gradient_f32, float)
SOFTMAX_GRADIENT(head_softmax_gradient_bf16, Bf16)

// Makes 0 what a tile's gradient has for classes that took no part in its micro-batch. `rows` are the tile's classes,
// `chosen` those of the micro-batch. A thread a column.
#define DROP_COLUMNS(NAME, TYPE)                                                                                  \
    KERNEL NAME(TYPE* gradient, i64 stride, i64 samples, i64 columns, const u32* rows, const u32* chosen,         \
                i64 count) {                                                                                      \
        drop_columns(gradient, stride, samples, columns, rows, chosen, count);                                    \
    }
DROP_COLUMNS(head_drop_columns_f32, float)
DROP_COLUMNS(head_drop_columns_bf16, Bf16)
