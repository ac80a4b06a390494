// The way back from a tensor whose gradient is known: tch differentiates scalars alone, and a product with the gradient and its
// sum would be two more passes over memory.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdio>
#include <exception>

extern "C" int arcface_differentiate(const void* y, const void* grad, char* error, size_t length) {
    try {
        torch::autograd::backward({*static_cast<const at::Tensor*>(y)}, {*static_cast<const at::Tensor*>(grad)});
        return 0;
    } catch (const std::exception& exception) {
        std::snprintf(error, length, "%s", exception.what());
        return 1;
    }
}

// The leaf has no gradient any more.
extern "C" void arcface_let_go_of_gradient(const void* leaf) {
    const_cast<at::Tensor*>(static_cast<const at::Tensor*>(leaf))->mutable_grad().reset();
}

// Makes `grad` the leaf's gradient, without a copy.
extern "C" void arcface_take_gradient(const void* leaf, const void* grad) {
    const_cast<at::Tensor*>(static_cast<const at::Tensor*>(leaf))->mutable_grad() = *static_cast<const at::Tensor*>(grad);
}
