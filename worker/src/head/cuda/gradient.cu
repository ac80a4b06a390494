// The backward half of the softmax: the gradient of the mean loss by the cosines of a tile, which the matrix products of
// the embeddings' and the weights' gradient take from there.

#include "terms.cuh"

namespace {

template <class In, class Out>
__device__ void softmax_gradient(const In* cosines, i64 stride, i64 samples, i64 columns, i64 first, const i64* target,
                                 Others others, const float* factor, const float* target_gradient, Out* gradient,
                                 i64 gradient_stride) {
    for (i64 sample = blockIdx.x; sample < samples; sample += gridDim.x) {
        const In* row = cosines + sample * stride;
        Out* out = gradient + sample * gradient_stride;
        const i64 own = target[sample] - first;
        const float shift = others.shift[sample];
        for (i64 column = threadIdx.x; column < columns; column += blockDim.x) {
            const float raw = load(row, column);
            const Logit logit = logit_of(others, sample, clamped(raw));
            float value = term_of(others, logit.value, shift) * factor[sample] * logit.slope;
            if (fabsf(raw) > 1.0f) { // no gradient flows through the clamp where it cut; NaN is not beyond it
                value = 0.0f;
            }
            store(out, column, column == own ? target_gradient[sample] : value);
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

// (p - onehot) / samples times d logit / d cosine, for a tile of cosines as in softmax.cu. `gradient` may be `cosines` where
// both have the same kind and stride: a thread writes only where it alone has read.
#define SOFTMAX_GRADIENT(NAME, IN, OUT)                                                                           \
    KERNEL NAME(const IN* cosines, i64 stride, i64 samples, i64 columns, i64 first, const i64* target,            \
                Others others, const float* factor, const float* target_gradient, OUT* gradient,                  \
                i64 gradient_stride) {                                                                            \
        softmax_gradient(cosines, stride, samples, columns, first, target, others, factor, target_gradient,       \
                         gradient, gradient_stride);                                                              \
    }
SOFTMAX_GRADIENT(head_softmax_gradient_f32_f32, float, float)
SOFTMAX_GRADIENT(head_softmax_gradient_f32_bf16, float, Bf16)
SOFTMAX_GRADIENT(head_softmax_gradient_bf16_bf16, Bf16, Bf16)
