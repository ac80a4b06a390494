// Convolutions whose weights lie as oneDNN multiplies them. libtorch's own puts them so at every call, which for one image takes as long
// as the widest layers' products.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdio>
#include <exception>
#include <vector>

// The packed weights, or null with the reason in `error` (of `length` bytes, ended by 0) where oneDNN or the processor does not multiply
// in their kind. `size` is that of an input, [N, C, H, W].
extern "C" void* arcface_pack_convolution(const void* weight, const int64_t* size, int64_t stride, int64_t padding,
                                          int64_t groups, char* error, size_t length) {
    try {
        const at::Tensor& given = *static_cast<const at::Tensor*>(weight);
        const std::vector<int64_t> strides{stride, stride}, paddings{padding, padding}, dilations{1, 1};
        return new at::Tensor(at::mkldnn_reorder_conv2d_weight(given.to_mkldnn(), paddings, strides, dilations, groups,
                                                               at::IntArrayRef(size, 4)));
    } catch (const std::exception& exception) {
        std::snprintf(error, length, "%s", exception.what());
        return nullptr;
    }
}

// A new tensor, or null with the reason. `x` has the kind of the weights; `bias`, f32, may be null.
extern "C" void* arcface_packed_convolution(const void* x, const void* packed, const void* bias, int64_t stride,
                                            int64_t padding, int64_t groups, char* error, size_t length) {
    try {
        static const c10::OperatorHandle convolution =
            c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_convolution_pointwise", "");
        const std::vector<int64_t> strides{stride, stride}, paddings{padding, padding}, dilations{1, 1};
        torch::jit::Stack stack{
            *static_cast<const at::Tensor*>(x),
            *static_cast<const at::Tensor*>(packed),
            bias == nullptr ? c10::IValue() : c10::IValue(*static_cast<const at::Tensor*>(bias)),
            paddings,
            strides,
            dilations,
            groups,
            "none",
            c10::List<std::optional<at::Scalar>>(),
            c10::IValue(),
        };
        convolution.callBoxed(stack);
        return new at::Tensor(stack.at(0).toTensor());
    } catch (const std::exception& exception) {
        std::snprintf(error, length, "%s", exception.what());
        return nullptr;
    }
}
