// Weights of convolutions as a GPU wants them: in the kind that it multiplies, channels innermost, in one copy there and one back.
// libtorch casts first and changes the layout afterwards, once for each of a convolution's three products.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdio>
#include <exception>

namespace {

using at::Tensor;

struct ChannelsLast : torch::autograd::Function<ChannelsLast> {
    static Tensor forward(torch::autograd::AutogradContext*, const Tensor& weight, at::ScalarType kind) {
        return at::empty(weight.sizes(), weight.options().dtype(kind), at::MemoryFormat::ChannelsLast).copy_(weight);
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                   torch::autograd::variable_list grads) {
        const Tensor& grad = grads[0];
        return {at::empty(grad.sizes(), grad.options().dtype(at::kFloat)).copy_(grad), Tensor()};
    }
};

} // namespace

// A new tensor, or null with the reason in `error` (of `length` bytes, ended by 0). `kind` as libtorch numbers them.
extern "C" void* arcface_channels_last(const void* weight, int kind, char* error, size_t length) {
    try {
        const Tensor& given = *static_cast<const Tensor*>(weight);
        TORCH_CHECK(given.scalar_type() == at::kFloat && given.dim() == 4, "weights are ", given.sizes());
        return new Tensor(ChannelsLast::apply(given, static_cast<at::ScalarType>(kind)));
    } catch (const std::exception& exception) {
        std::snprintf(error, length, "%s", exception.what());
        return nullptr;
    }
}
