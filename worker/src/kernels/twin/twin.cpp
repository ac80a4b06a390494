// The kernels, and what runs their threads on the CPU, for tests.

#include "device.h"

#include "head/cuda/normalize.cu"
#include "head/cuda/softmax.cu"
#include "head/cuda/gradient.cu"
#include "head/cuda/update.cu"
#include "head/cuda/sampling.cu"
#include "model/norm/norm.cu"

#include <memory>
#include <ucontext.h>
#include <vector>

thread_local Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t STACK = 128 * 1024;

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool ended = false;
};

struct Launch {
    void (*body)(void*);
    void* data;
    std::vector<Fibre> fibres;
    ucontext_t scheduler;
};

thread_local Launch* launch;

void start() {
    launch->body(launch->data);
    launch->fibres[threadIdx.x].ended = true;
}

} // namespace

void __syncthreads() { swapcontext(&launch->fibres[threadIdx.x].context, &launch->scheduler); }

// Runs `body` as every thread of every block, from the first to the last or backwards: a kernel that lacks a barrier gives
// something else in one of the two. 1 if the threads of a block did not all come to the same number of barriers, which
// hangs or worse on a GPU; else 0.
extern "C" int kernel_twin_run(uint32_t grid, uint32_t block, int backwards, void (*body)(void*), void* data) {
    Launch here{body, data, std::vector<Fibre>(block), {}};
    launch = &here;
    gridDim.x = grid;
    blockDim.x = block;
    for (uint32_t b = 0; b < grid; ++b) {
        blockIdx.x = backwards ? grid - 1 - b : b;
        for (Fibre& fibre : here.fibres) {
            fibre.ended = false;
            getcontext(&fibre.context);
            fibre.context.uc_stack.ss_sp = fibre.stack.get();
            fibre.context.uc_stack.ss_size = STACK;
            fibre.context.uc_link = &here.scheduler;
            makecontext(&fibre.context, start, 0);
        }
        uint32_t ended = 0;
        while (ended < block) { // once around is from barrier to barrier
            for (uint32_t t = 0; t < block; ++t) {
                threadIdx.x = backwards ? block - 1 - t : t;
                swapcontext(&here.scheduler, &here.fibres[threadIdx.x].context);
                ended += here.fibres[threadIdx.x].ended;
            }
            if (ended != 0 && ended != block) {
                return 1;
            }
        }
    }
    return 0;
}

#include "launch.cpp"
