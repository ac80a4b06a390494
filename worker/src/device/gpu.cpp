// What tch does not offer of libtorch on a GPU: how exact products in f32 are, and what is allocated.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>

#include <cstdint>
#include <exception>

// Whether convolutions and matrix products of f32 may round their operands to TF32 (10 bits), where a GPU is faster so.
extern "C" void arcface_allow_tf32(bool allow) {
    at::globalContext().setAllowTF32CuDNN(allow);
    at::globalContext().setAllowTF32CuBLAS(allow);
}

extern "C" bool arcface_allows_tf32() {
    return at::globalContext().allowTF32CuDNN() || at::globalContext().allowTF32CuBLAS();
}

// Bytes of the first GPU: what tensors take now, what is held for them, the most that they have taken at once. False where
// there is no GPU that libtorch has opened.
extern "C" bool arcface_gpu_memory(uint64_t* bytes) {
    try {
        if (!at::accelerator::getAccelerator(false) || at::accelerator::deviceCount() == 0) {
            return false;
        }
        const auto stats = at::accelerator::getDeviceStats(0);
        constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
        bytes[0] = static_cast<uint64_t>(stats.allocated_bytes[all].current);
        bytes[1] = static_cast<uint64_t>(stats.reserved_bytes[all].current);
        bytes[2] = static_cast<uint64_t>(stats.allocated_bytes[all].peak);
        return true;
    } catch (const std::exception&) {
        return false;
    }
}

// A copy in memory that a GPU reads by itself, or null: there is no GPU. tch's own function names a device, which libtorch
// complains of every time.
extern "C" void* arcface_pinned(const void* tensor) {
    try {
        return new at::Tensor(static_cast<const at::Tensor*>(tensor)->pin_memory());
    } catch (const std::exception&) {
        return nullptr;
    }
}
