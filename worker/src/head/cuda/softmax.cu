// The forward half of the softmax over tiles of classes: each sample's cosine with its own class, the margin there, and
// the terms of the softmax with their sums over all classes. No logits are written.
//
// Columns count the classes that take part; `target` is the column of a sample's own class, or -1 where that is on another
// rank. A sample is a block's: its sum is always added in the same order.

#include "terms.cuh"

namespace {

template <class T>
__device__ void softmax_terms(T* cosines, i64 stride, i64 samples, i64 columns, i64 first, const i64* target,
                              const double* target_logit, Others others, double* sums) {
    for (i64 sample = blockIdx.x; sample < samples; sample += gridDim.x) {
        T* row = cosines + sample * stride;
        const i64 own = target[sample] - first; // below 0 or not below `columns` where it is not in this tile
        const OthersOfSample of_sample(others, sample);
        // Of one cosine; the sample's own class has no term here.
        const auto weighted = [&](bool is_own, float raw, float& terms) {
            if (is_own) {
                return 0.0f;
            }
            const Logit logit = logit_of(of_sample, clamped(raw));
            const float term = term_of(of_sample, logit.value);
            terms += term;
            // No gradient flows through the clamp where it cut; NaN is not beyond it.
            return fabsf(raw) > 1.0f ? 0.0f : term * logit.slope;
        };
        const i64 groups = whole_groups(columns, stride);
        double sum = 0.0;
        for (i64 group = threadIdx.x; group < groups; group += blockDim.x) {
            float some[GROUP], terms = 0.0f;
            load_group(row + group * GROUP, some);
            const u32 own_here = place_in_group(own, group);
            for (u32 i = 0; i < GROUP; ++i) {
                some[i] = weighted(i == own_here, some[i], terms);
            }
            store_group(row + group * GROUP, some);
            sum += terms;
        }
        for (i64 column = groups * GROUP + threadIdx.x; column < columns; column += blockDim.x) {
            float terms = 0.0f;
            store(row, column, weighted(column == own, load(row, column), terms));
            sum += terms;
        }
        sum = block_sum(sum);
        if (threadIdx.x == 0) {
            if (own >= 0 && own < columns) {
                sum += exp2(target_logit[sample] * LOG2_E - of_sample.shift);
            }
            sums[sample] += sum;
        }
    }
}

template <class In>
__device__ void largest_logits(const In* cosines, i64 stride, i64 samples, i64 columns, i64 first, const i64* target,
                               const double* target_logit, Others others, float* largest) {
    __shared__ float parts[MOST_THREADS];
    for (i64 sample = blockIdx.x; sample < samples; sample += gridDim.x) {
        const In* row = cosines + sample * stride;
        const OthersOfSample of_sample(others, sample);
        const i64 own = target[sample] - first;
        float most = largest[sample];
        for (i64 column = threadIdx.x; column < columns; column += blockDim.x) {
            float logit = logit_of(of_sample, clamped(load(row, column))).value * others.scale_log2;
            if (column == own) {
                logit = static_cast<float>(target_logit[sample] * LOG2_E);
            }
            most = fmaxf(most, logit);
        }
        __syncthreads(); // the sample before may still be read
        parts[threadIdx.x] = most;
        __syncthreads();
        for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
            if (threadIdx.x < half) {
                parts[threadIdx.x] = fmaxf(parts[threadIdx.x], parts[threadIdx.x + half]);
            }
            __syncthreads();
        }
        if (threadIdx.x == 0) {
            largest[sample] = parts[0];
        }
    }
}

} // namespace

// By sample the cosine with its own class, whose weights are row `target_row` of this shard (-1: on another rank, 0), in
// double precision whatever the products are in: an angle near 0 or pi needs it. `outside` is 1 where rounding put it
// outside of [-1, 1], where no gradient flows. `unit` are the embeddings [samples, dim] of length 1.
KERNEL head_target_cosines(const float* unit, i64 samples, i64 dim, const float* weight, const float* momentum,
                           History history, const i64* target_row, double* cosine, u8* outside) {
    for (i64 sample = blockIdx.x; sample < samples; sample += gridDim.x) {
        const i64 row = target_row[sample];
        if (row < 0) { // on every thread of the block
            if (threadIdx.x == 0) {
                cosine[sample] = 0.0;
                outside[sample] = 0;
            }
            continue;
        }
        const RowMap* missed = history.missed(row);
        double product = 0.0, squares_e = 0.0, squares_w = 0.0;
        for (i64 d = threadIdx.x; d < dim; d += blockDim.x) {
            float w = weight[row * dim + d];
            if (missed != nullptr) {
                w = missed->weight(w, momentum[row * dim + d]);
            }
            const double e = unit[sample * dim + d];
            product += e * w;
            squares_e += e * e;
            squares_w += static_cast<double>(w) * w;
        }
        product = block_sum(product);
        squares_e = block_sum(squares_e);
        squares_w = block_sum(squares_w);
        if (threadIdx.x == 0) {
            const double norm = sqrt(squares_w);
            const double divisor = norm < MIN_NORM ? MIN_NORM : norm;
            // The embedding's length is 1 to single precision only: the second order of that counts at the poles. A row
            // under the smallest norm has no direction.
            const double lengths = norm / divisor * sqrt(squares_e);
            const double raw = product / divisor / (lengths < 0.5 ? 1.0 : lengths);
            cosine[sample] = raw < -1.0 ? -1.0 : raw > 1.0 ? 1.0 : raw;
            outside[sample] = fabs(raw) > 1.0;
        }
    }
}

// The angular margins (margin/angular.rs): by sample the logit s * (cos(m1 * theta + m2) - m3) of its own class, and its
// derivative by the cosine: the true one if `exact`, else the reference's, which takes ArcFace's logit for s * cos. 0 for
// both where the class is on another rank. A thread a sample.
KERNEL head_margin_logits(const double* cosine, const u8* outside, const i64* target, i64 samples, double m1, double m2,
                          double m3, double scale, int exact, double* target_logit, double* by_cosine) {
    // Smallest sin(theta) in the derivative, which grows without bound as theta goes to 0.
    constexpr double MIN_SIN = 1e-4;
    const i64 all = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 sample = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; sample < samples; sample += all) {
        double logit = 0.0, slope = 0.0;
        if (target[sample] >= 0) {
            const double c = cosine[sample];
            if (m1 == 1.0 && m2 == 0.0) { // CosFace: a shift, whose derivative is s either way
                logit = c - m3;
                slope = 1.0;
            } else {
                const double theta = acos(c);
                const double angle = theta * m1 + m2;
                const double sine = sin(theta);
                logit = cos(angle) - m3;
                slope = !exact && m1 == 1.0 && m3 == 0.0 ? 1.0 : sin(angle) * m1 / (sine < MIN_SIN ? MIN_SIN : sine);
            }
        }
        target_logit[sample] = logit * scale;
        by_cosine[sample] = outside[sample] ? 0.0 : slope * scale;
    }
}

// From a tile of cosines, [samples, stride] with the classes of columns `first` to `first + columns`, to the terms of the
// softmax, each times its logit's derivative over the scale: the gradient before it is divided by the sum, which `sums`, by
// sample, is added to. The sample's own class enters the sum with its logit; where its term would stand is 0.
#define SOFTMAX_TERMS(NAME, TYPE)                                                                                 \
    KERNEL NAME(TYPE* cosines, i64 stride, i64 samples, i64 columns, i64 first, const i64* target,                \
                const double* target_logit, Others others, double* sums) {                                        \
        softmax_terms(cosines, stride, samples, columns, first, target, target_logit, others, sums);              \
    }
SOFTMAX_TERMS(head_softmax_terms_f32, float)
SOFTMAX_TERMS(head_softmax_terms_bf16, Bf16)

// Raises `largest`, by sample, to the largest logit of a tile, in base 2: where a sum came out so small that it may have
// lost terms, the shift is taken from it. NaN is passed over; the sum has it.
#define LARGEST_LOGITS(NAME, IN)                                                                                  \
    KERNEL NAME(const IN* cosines, i64 stride, i64 samples, i64 columns, i64 first, const i64* target,            \
                const double* target_logit, Others others, float* largest) {                                      \
        largest_logits(cosines, stride, samples, columns, first, target, target_logit, others, largest);          \
    }
LARGEST_LOGITS(head_largest_logits_f32, float)
LARGEST_LOGITS(head_largest_logits_bf16, Bf16)
