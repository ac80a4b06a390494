// Batch norm with what follows it as one function of autograd's: here is what autograd wants to know, and the numbers come from
// kernels.rs, which starts the kernels of norm.cu, or from cpu.cpp.

#include "cpu.h"

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <cstdio>
#include <exception>
#include <optional>

// kernels.rs. Tensors are borrowed; undefined ones are null. False with the reason in `error`, ended by 0.
extern "C" {
bool arcface_norm_forward(const void* kernels, const void* const* tensors, double eps, double momentum, char* error,
                          size_t length);
bool arcface_norm_backward(const void* kernels, const void* const* tensors, char* error, size_t length);
void arcface_norm_release(const void* kernels);
}

namespace {

using arcface::NormBackward;
using arcface::NormForward;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr size_t REASON = 1024;

const void* borrow(const Tensor& tensor) { return tensor.defined() ? &tensor : nullptr; }

// What starts kernels, for as long as somebody may go the way back.
struct Kernels : torch::CustomClassHolder {
    const void* kernels;
    explicit Kernels(const void* given) : kernels(given) {}
    ~Kernels() override { arcface_norm_release(kernels); }
};

// Beside what is differentiated. Without kernels the CPU computes.
struct Settings {
    Tensor running_mean;
    Tensor running_var;
    double eps;
    double momentum;
    c10::intrusive_ptr<Kernels> kernels;
};

struct Norm : torch::autograd::Function<Norm> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                          const std::optional<Tensor>& some_slope, const std::optional<Tensor>& some_shortcut,
                          const Settings& settings) {
        const Tensor slope = some_slope.value_or(Tensor()), shortcut = some_shortcut.value_or(Tensor());
        Tensor y = at::empty_like(x);
        Tensor mean = at::empty_like(weight), inverse = at::empty_like(weight);
        if (settings.kernels) {
            const void* tensors[] = {
                borrow(x), borrow(weight), borrow(bias), borrow(slope), borrow(shortcut), borrow(settings.running_mean),
                borrow(settings.running_var), borrow(mean), borrow(inverse), borrow(y),
            };
            char reason[REASON] = "";
            TORCH_CHECK(arcface_norm_forward(settings.kernels->kernels, tensors, settings.eps, settings.momentum,
                                             reason, sizeof reason),
                        reason);
            ctx->saved_data["kernels"] = c10::IValue::make_capsule(settings.kernels);
        } else {
            const auto& [running_mean, running_var, eps, momentum, kernels] = settings;
            NormForward{x, weight, bias, slope, shortcut, running_mean, running_var, mean, inverse, y}.compute(eps,
                                                                                                              momentum);
        }
        ctx->save_for_backward({x, weight, bias, slope, mean, inverse});
        ctx->saved_data["shortcut"] = shortcut.defined();
        return y;
    }

    static variable_list backward(AutogradContext* ctx, variable_list grads) {
        const auto saved = ctx->get_saved_variables();
        const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2], &slope = saved[3];
        const Tensor grad = grads[0].contiguous(at::MemoryFormat::ChannelsLast);
        Tensor grad_x = at::empty_like(x);
        Tensor grad_weight = at::empty_like(weight), grad_bias = at::empty_like(bias);
        Tensor grad_slope = slope.defined() ? at::empty_like(slope) : Tensor();
        const Tensor &mean = saved[4], &inverse = saved[5];
        if (const auto found = ctx->saved_data.find("kernels"); found != ctx->saved_data.end()) {
            const void* tensors[] = {
                borrow(x), borrow(grad), borrow(mean), borrow(inverse), borrow(weight), borrow(bias), borrow(slope),
                borrow(grad_weight), borrow(grad_bias), borrow(grad_slope), borrow(grad_x),
            };
            const auto kernels = found->second.toCapsule();
            char reason[REASON] = "";
            TORCH_CHECK(arcface_norm_backward(static_cast<const Kernels*>(kernels.get())->kernels, tensors, reason,
                                              sizeof reason),
                        reason);
        } else {
            NormBackward{x, grad, mean, inverse, weight, bias, slope, grad_weight, grad_bias, grad_slope, grad_x}
                .compute();
        }
        const Tensor grad_shortcut = ctx->saved_data["shortcut"].toBool() ? grad : Tensor();
        return {grad_x, grad_weight, grad_bias, grad_slope, grad_shortcut, Tensor()};
    }
};

const Tensor& given(const void* tensor) { return *static_cast<const Tensor*>(tensor); }

// Autograd takes no undefined tensor.
std::optional<Tensor> maybe(const void* tensor) {
    return tensor == nullptr ? std::nullopt : std::optional<Tensor>(given(tensor));
}

} // namespace

// y of x, or null with the reason in `error`. `tensors`: x, weight, bias, slope, shortcut, running mean and variance, of which
// the last four may be null. Takes the handle `kernels`, whatever happens; the CPU computes if that is null.
extern "C" void* arcface_norm(const void* kernels, const void* const* tensors, double eps, double momentum, char* error,
                              size_t length) {
    try {
        auto holder = kernels == nullptr ? c10::intrusive_ptr<Kernels>() : c10::make_intrusive<Kernels>(kernels);
        const Settings settings{maybe(tensors[5]).value_or(Tensor()), maybe(tensors[6]).value_or(Tensor()), eps,
                                momentum, std::move(holder)};
        return new Tensor(Norm::apply(given(tensors[0]), given(tensors[1]), given(tensors[2]), maybe(tensors[3]),
                                      maybe(tensors[4]), settings));
    } catch (const std::exception& exception) {
        std::snprintf(error, length, "%s", exception.what());
        return nullptr;
    }
}
