// CUDA graphs: launches are recorded once and repeated by a single call. libtorch's class for them (ATen/cuda/CUDAGraph.h) also
// keeps the memory that they work in. It is in libtorch's CUDA half, which is opened at run time, so its functions are found there
// by name; streams come through the interface that libtorch has for all devices.

#include <ATen/ATen.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <optional>

namespace {

using c10::impl::VirtualGuardImpl;

// cudaStreamCaptureModeThreadLocal: what other threads do meanwhile is no mistake of this one's.
constexpr int THREAD_LOCAL = 1;

// Of at::cuda::CUDAGraph, as libtorch 2.11 declares it; members as functions of their object.
struct Functions {
    void (*construct)(void*, bool keep_graph);
    void (*destroy)(void*);
    void (*capture_begin)(void*, c10::MempoolId_t, int mode);
    void (*capture_end)(void*);
    void (*replay)(void*);
    void (*reset)(void*);
    c10::MempoolId_t (*pool)(void*);
};

template <class F>
void find(F*& function, const char* name) {
    function = reinterpret_cast<F*>(dlsym(RTLD_DEFAULT, name));
    TORCH_CHECK(function != nullptr, "this libtorch has no ", name);
}

const Functions& functions() {
    static const Functions found = [] {
        Functions all;
        find(all.construct, "_ZN2at4cuda9CUDAGraphC1Eb");
        find(all.destroy, "_ZN2at4cuda9CUDAGraphD1Ev");
        find(all.capture_begin, "_ZN2at4cuda9CUDAGraph13capture_beginESt4pairIyyE21cudaStreamCaptureMode");
        find(all.capture_end, "_ZN2at4cuda9CUDAGraph11capture_endEv");
        find(all.replay, "_ZN2at4cuda9CUDAGraph6replayEv");
        find(all.reset, "_ZN2at4cuda9CUDAGraph5resetEv");
        find(all.pool, "_ZN2at4cuda9CUDAGraph4poolEv");
        return all;
    }();
    return found;
}

// Room for libtorch's object, several times its size.
struct Graph {
    alignas(64) unsigned char object[2048];
};

// Graphs that are recorded one after the other, and repeated in that order, share their memory.
struct Recorder {
    c10::Stream beside;
    std::optional<c10::MempoolId_t> pool;
    std::optional<c10::Stream> before;
};

template <class T>
T* guarded(char* error, size_t length, T* (*work)(void*), void* given) {
    try {
        return work(given);
    } catch (const std::exception& exception) {
        std::snprintf(error, length, "%s", exception.what());
        return nullptr;
    }
}

void go_back(Recorder& recorder) {
    if (recorder.before.has_value()) {
        VirtualGuardImpl(c10::DeviceType::CUDA).exchangeStream(*recorder.before);
        recorder.before.reset();
    }
}

} // namespace

// The stream of the driver's that libtorch gives work of the calling thread to, on this GPU. False with the reason.
extern "C" bool arcface_current_stream(int gpu, void** stream, char* error, size_t length) {
    try {
        const VirtualGuardImpl guard(c10::DeviceType::CUDA);
        const c10::Device device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(gpu));
        *stream = guard.getStreamNativeHandle(guard.getStream(device));
        return true;
    } catch (const std::exception& exception) {
        std::snprintf(error, length, "%s", exception.what());
        return false;
    }
}

// Null with the reason in `error`, as the functions below. What libtorch holds and nobody uses is given back first: graphs have
// memory of their own.
extern "C" void* arcface_recorder(int gpu, char* error, size_t length) {
    return guarded<Recorder>(error, length, [](void* gpu) {
        const auto index = static_cast<c10::DeviceIndex>(*static_cast<int*>(gpu));
        functions();
        const c10::Device device(c10::DeviceType::CUDA, index);
        const VirtualGuardImpl guard(c10::DeviceType::CUDA);
        guard.synchronizeDevice(index);
        c10::getDeviceAllocator(c10::DeviceType::CUDA)->emptyCache();
        return new Recorder{guard.getStreamFromGlobalPool(device, false), std::nullopt, std::nullopt};
    }, &gpu);
}

extern "C" void arcface_recorder_free(void* recorder) { delete static_cast<Recorder*>(recorder); }

// From here on the calling thread's work on the GPU, and what autograd does for it, is recorded and not done.
extern "C" void* arcface_record(void* recorder, char* error, size_t length) {
    return guarded<Graph>(error, length, [](void* given) {
        Recorder& recorder = *static_cast<Recorder*>(given);
        recorder.before = VirtualGuardImpl(c10::DeviceType::CUDA).exchangeStream(recorder.beside);
        // A recording that does not come to its end is never freed: libtorch's allocator still asks it.
        auto* graph = new Graph;
        try {
            functions().construct(graph->object, false);
            functions().capture_begin(graph->object, recorder.pool.value_or(c10::MempoolId_t{0, 0}), THREAD_LOCAL);
        } catch (...) {
            go_back(recorder);
            throw;
        }
        return graph;
    }, recorder);
}

// The recording's end. False with the reason: the driver broke it off, and libtorch's allocator does not hear of that.
extern "C" bool arcface_recorded(void* recorder, void* graph, char* error, size_t length) {
    Recorder& its = *static_cast<Recorder*>(recorder);
    try {
        functions().capture_end(static_cast<Graph*>(graph)->object);
        its.pool = functions().pool(static_cast<Graph*>(graph)->object);
        go_back(its);
        return true;
    } catch (const std::exception& exception) {
        std::snprintf(error, length, "%s", exception.what());
        go_back(its);
        return false;
    }
}

// Does what was recorded, on the calling thread's stream.
extern "C" bool arcface_graph_launch(void* graph, char* error, size_t length) {
    try {
        functions().replay(static_cast<Graph*>(graph)->object);
        return true;
    } catch (const std::exception& exception) {
        std::snprintf(error, length, "%s", exception.what());
        return false;
    }
}

extern "C" void arcface_graph_free(void* graph) {
    try {
        // Which the destructor would do, where nothing can be caught.
        functions().reset(static_cast<Graph*>(graph)->object);
    } catch (const std::exception&) {
        // A GPU that failed answers nothing any more, and then there is nothing to give back.
        return;
    }
    functions().destroy(static_cast<Graph*>(graph)->object);
    delete static_cast<Graph*>(graph);
}
