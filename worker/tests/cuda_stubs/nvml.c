// A management library with as many GPUs as the test wants, one of which may have errors in its memory.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static int number(const char* name) {
    const char* text = getenv(name);
    return text ? atoi(text) : -1;
}

struct memory {
    unsigned int version;
    unsigned long long total, reserved, free, used;
};

// A handle is the index and one.
static int index_of(void* device) { return (int)(intptr_t)device - 1; }

int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }

int nvmlDeviceGetCount_v2(unsigned int* count) {
    *count = (unsigned int)number("STUB_GPUS");
    return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void** device) {
    *device = (void*)(intptr_t)(index + 1);
    return (int)index == number("STUB_LOST_GPU") ? 15 : 0;
}

int nvmlDeviceGetName(void* device, char* name, unsigned int length) {
    (void)device;
    snprintf(name, length, "NVIDIA H100");
    return 0;
}

int nvmlDeviceGetUUID(void* device, char* uuid, unsigned int length) {
    snprintf(uuid, length, "GPU-%08x-0000-0000-0000-000000000000", index_of(device));
    return 0;
}

int nvmlDeviceGetMemoryInfo_v2(void* device, struct memory* memory) {
    (void)device;
    memory->total = 80ull << 30;
    return 0;
}

int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
    (void)device;
    *major = number("STUB_CAPABILITY") / 10;
    *minor = number("STUB_CAPABILITY") % 10;
    return 0;
}

int nvmlDeviceGetTotalEccErrors(void* device, int kind, int counter, unsigned long long* count) {
    (void)kind;
    (void)counter;
    *count = index_of(device) == number("STUB_FAULTY_GPU") ? 3 : 0;
    return 0;
}

// Not supported, as on newer GPUs.
int nvmlDeviceGetRetiredPagesPendingStatus(void* device, int* pending) {
    (void)device;
    (void)pending;
    return 3;
}
