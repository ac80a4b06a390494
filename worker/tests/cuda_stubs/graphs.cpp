// Stand-in for libtorch's CUDA half, as far as graphs reach: streams, memory and graphs that do nothing but say what was asked of
// them. A stream's handle is its number; the one beside is number 7.

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace {

std::string said;
bool end_fails = false, reset_fails = false;
int graphs = 0;

thread_local c10::StreamId current = 0;

struct Guard : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
    c10::Device exchangeDevice(c10::Device device) const override { return device; }
    c10::Device getDevice() const override { return c10::Device(type(), 0); }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
    c10::Stream getStream(c10::Device device) const override {
        return c10::Stream(c10::Stream::UNSAFE, device, current);
    }
    c10::Stream exchangeStream(c10::Stream stream) const override {
        return c10::Stream(c10::Stream::UNSAFE, stream.device(), std::exchange(current, stream.id()));
    }
    c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
        return c10::Stream(c10::Stream::UNSAFE, device, 7);
    }
    void* getStreamNativeHandle(const c10::Stream stream) const override {
        return reinterpret_cast<void*>(stream.id());
    }
    void synchronizeDevice(const c10::DeviceIndex) const override { said += "wait\n"; }
};

struct Memory : c10::DeviceAllocator {
    c10::DataPtr allocate(size_t) override { throw std::runtime_error("there is no memory"); }
    void copy_data(void*, const void*, std::size_t) const override {}
    bool initialized() override { return true; }
    void emptyCache(c10::MempoolId_t) override { said += "give back\n"; }
    void recordStream(const c10::DataPtr&, c10::Stream) override {}
    c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
    void resetAccumulatedStats(c10::DeviceIndex) override {}
    void resetPeakStats(c10::DeviceIndex) override {}
};

void say(const std::string& what) { said += what + " on " + std::to_string(current) + "\n"; }

const bool registered = [] {
    static Memory memory;
    c10::SetAllocator(c10::DeviceType::CUDA, &memory, 1);
    return true;
}();

} // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

enum cudaStreamCaptureMode : int {};

namespace at::cuda {

// As libtorch names it; its own has other members, of up to so many bytes.
struct CUDAGraph {
    explicit CUDAGraph(bool keep_graph);
    ~CUDAGraph();
    void capture_begin(std::pair<unsigned long long, unsigned long long> pool, cudaStreamCaptureMode mode);
    void capture_end();
    void replay();
    void reset();
    std::pair<unsigned long long, unsigned long long> pool();

    std::string name;
    char others[1024];
};

CUDAGraph::CUDAGraph(bool keep_graph) : name("graph " + std::to_string(++graphs)) {
    say(name + (keep_graph ? " kept" : ""));
}

CUDAGraph::~CUDAGraph() { say(name + " freed"); }

void CUDAGraph::reset() {
    if (reset_fails) {
        throw std::runtime_error("unspecified launch failure");
    }
}

void CUDAGraph::capture_begin(std::pair<unsigned long long, unsigned long long> pool, cudaStreamCaptureMode mode) {
    say(name + " begins in pool " + std::to_string(pool.first) + "," + std::to_string(pool.second) + " mode " +
        std::to_string(mode));
}

void CUDAGraph::capture_end() {
    say(name + " ends");
    if (end_fails) {
        throw std::runtime_error("operation not permitted when stream is capturing\nException raised from somewhere");
    }
}

void CUDAGraph::replay() { say(name + " runs"); }

std::pair<unsigned long long, unsigned long long> CUDAGraph::pool() { return {41, 42}; }

} // namespace at::cuda

// What was said since the last call.
extern "C" const char* stand_in_said() {
    static std::string last;
    last = std::exchange(said, "");
    return last.c_str();
}

extern "C" void stand_in_says(const char* what) { say(what); }

extern "C" void stand_in_fails(bool end, bool reset) {
    end_fails = end;
    reset_fails = reset;
}
