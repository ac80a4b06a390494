// libtorch's update rules that pass over memory once: tch does not offer them. On the CPU and on a GPU, wherever the tensors are.

#include <ATen/ATen.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <c10/core/GradMode.h>

#include <cstdio>
#include <exception>
#include <vector>

namespace {

using at::Tensor;

std::vector<Tensor> list(const void* const* tensors, size_t count) {
    std::vector<Tensor> list;
    list.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        list.push_back(*static_cast<const Tensor*>(tensors[i]));
    }
    return list;
}

// 0, or 1 with the reason in `error`: exceptions end here.
template <class Work>
int guarded(char* error, size_t length, Work work) {
    try {
        const c10::NoGradGuard no_grad;
        work();
        return 0;
    } catch (const std::exception& exception) {
        std::snprintf(error, length, "%s", exception.what());
        return 1;
    }
}

} // namespace

extern "C" int arcface_fused_sgd(const void* const* params, const void* const* grads, const void* const* momentum,
                                 size_t count, double lr, double mu, double weight_decay, char* error, size_t length) {
    return guarded(error, length, [&] {
        // A buffer of zeros needs no first step; without momentum there is to be none.
        at::_fused_sgd_(list(params, count), list(grads, count), list(momentum, mu == 0.0 ? 0 : count), weight_decay, mu, lr,
                        /*dampening=*/0.0, /*nesterov=*/false, /*maximize=*/false, /*is_first_step=*/false);
    });
}

extern "C" int arcface_fused_adamw(const void* const* params, const void* const* grads, const void* const* mean,
                                   const void* const* mean_square, size_t count, double step, double lr, double beta1,
                                   double beta2, double weight_decay, double eps, char* error, size_t length) {
    return guarded(error, length, [&] {
        const std::vector<Tensor> all = list(params, count);
        if (all.empty()) {
            return;
        }
        const Tensor steps = at::full({}, step, all[0].options().dtype(at::kFloat).requires_grad(false));
        at::_fused_adamw_(all, list(grads, count), list(mean, count), list(mean_square, count), {},
                          std::vector<Tensor>(count, steps), lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false,
                          /*maximize=*/false);
    });
}
