// A driver that says what the test wants, and whose streams are counters: NCCL's stand-in works on them.
#include <stdint.h>
#include <stdlib.h>

#include "stream.h"

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, NOT_READY = 600 };

static int number(const char* name) {
    const char* text = getenv(name);
    return text ? atoi(text) : 0;
}

int cuDriverGetVersion(int* version) {
    *version = number("STUB_CUDA_VERSION");
    return 0;
}

int cuInit(unsigned int flags) {
    (void)flags;
    return number("STUB_CUDA_INIT");
}

// NVRTC asks for it where there is a driver, and does without.
int cuGetExportTable(const void** table, const void* id) {
    (void)id;
    *table = 0;
    return 500;
}

// One GPU, whose context a thread must have taken before it uses a stream.
static char the_context;
static _Thread_local void* current;

int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    (void)device;
    *context = &the_context;
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    (void)device;
    return SUCCESS;
}

int cuCtxSetCurrent(void* context) {
    current = context;
    return context == &the_context ? SUCCESS : INVALID_CONTEXT;
}

struct event {
    struct stream* stream;
    uint64_t target;
};

int cuStreamCreate(void** stream, unsigned int flags) {
    // Not one that waits for whatever is computed.
    if (flags != 1) return INVALID_VALUE;
    *stream = calloc(1, sizeof(struct stream));
    return current ? SUCCESS : INVALID_CONTEXT;
}

int cuStreamDestroy_v2(void* stream) {
    free(stream);
    return SUCCESS;
}

int cuEventCreate(void** event, unsigned int flags) {
    if (flags != 2) return INVALID_VALUE;
    *event = calloc(1, sizeof(struct event));
    return current ? SUCCESS : INVALID_CONTEXT;
}

int cuEventDestroy_v2(void* event) {
    free(event);
    return SUCCESS;
}

// Without a stream: on the one that libtorch computes on, where all is done at once.
int cuEventRecord(void* event, void* stream) {
    struct event* mark = event;
    mark->stream = stream;
    mark->target = stream ? atomic_load(&mark->stream->enqueued) : 0;
    return current ? SUCCESS : INVALID_CONTEXT;
}

int cuStreamWaitEvent(void* stream, void* event, unsigned int flags) {
    struct stream* waiting = stream;
    if (flags != 0 || ((struct event*)event)->stream) return INVALID_VALUE;
    atomic_fetch_add(&waiting->waits, 1);
    return SUCCESS;
}

int cuEventQuery(void* event) {
    struct event* mark = event;
    return !mark->stream || atomic_load(&mark->stream->completed) >= mark->target ? SUCCESS : NOT_READY;
}
