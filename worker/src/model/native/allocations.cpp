// What libtorch's tensors take on the CPU: it tells everyone who asks as a profiler of this thread.

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>

namespace {

struct Counts : c10::MemoryReportingInfoBase {
    std::mutex mutex;
    int64_t live = 0;
    int64_t peak = 0;

    void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device device) override {
        if (device.is_cpu()) {
            const std::lock_guard<std::mutex> guard(mutex);
            live += bytes;
            peak = std::max(peak, live);
        }
    }

    bool memoryProfilingEnabled() const override {
        return true;
    }
};

struct Watch {
    std::shared_ptr<Counts> counts = std::make_shared<Counts>();
    c10::DebugInfoGuard guard{c10::DebugInfoKind::PROFILER_STATE, counts};
};

}  // namespace

extern "C" void* arcface_allocations_begin() {
    return new Watch;
}

// Bytes now, and the most since the last call, which begins a new peak.
extern "C" void arcface_allocations_take(void* watch, int64_t* live, int64_t* peak) {
    Counts& counts = *static_cast<Watch*>(watch)->counts;
    const std::lock_guard<std::mutex> guard(counts.mutex);
    *live = counts.live;
    *peak = counts.peak;
    counts.peak = counts.live;
}

extern "C" void arcface_allocations_end(void* watch) {
    delete static_cast<Watch*>(watch);
}
